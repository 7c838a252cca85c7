"""The run directory: every path and every record that a run writes. Nothing else knows a file name.

RUN/recipe.yaml        as written              RUN/plan.json         planned vs. actual memory and time
RUN/lock.json          all effective settings  RUN/metrics.jsonl     one line per step or evaluation
RUN/data.json          the data report         RUN/evaluation.json   base vs. fine-tuned, per item
RUN/checkpoints/STEP/  to resume from          RUN/adapter/          PEFT format, with template and model card
RUN/preview.json       examples by token       RUN/report.html       the report for people
RUN/parity.json        certificates of merged and exported models
RUN/best.json          the checkpoint with the lowest held-out loss
RUN/log.txt            what the terminal said
RUN/mean.json          the checkpoints averaged by train.average_checkpoints
RUN/reference/         preferences: log p of every answer before step 1
RUN/start/             the adapter of lora.start_from
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.run import processes
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.locks import lock_file
from loratune.run.records.metrics import parse_metrics_line

Record = dict[str, Any]
IN_USE = ".in_use"
"""The file whose lock says that a process works in a folder; it holds the number of that process."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """The folder of one run.

    Attributes:
        root: The folder itself.
    """

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def lock(self) -> Path:
        return self.root / "lock.json"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def preview(self) -> Path:
        return self.root / "preview.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def reference(self) -> Path:
        return self.root / "reference"

    @property
    def start(self) -> Path:
        return self.root / "start"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def best(self) -> Path:
        return self.root / "best.json"

    @property
    def mean(self) -> Path:
        return self.root / "mean.json"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def adapter_weights(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    @property
    def exports(self) -> Path:
        return self.root / "exports"

    @property
    def parity(self) -> Path:
        return self.root / "parity.json"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def trackers(self) -> Path:
        return self.root / "trackers"

    @property
    def has_adapter(self) -> bool:
        """Whether training finished and the adapter is written."""
        return (self.adapter / "adapter_config.json").is_file()

    def require_adapter(self) -> None:
        """Refuse a run whose training has not finished.

        Raises:
            RecipeError: The adapter is not written yet.
        """
        if not self.has_adapter:
            raise RecipeError("the run has no adapter yet", file=self.root, fix=f"`loratune resume {self.root}`")

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do: the adapter is written, evaluated, measured and reported."""
        return self.has_adapter and "measured" in read_json(self.plan) and self.report.is_file()

    @property
    def is_in_use(self) -> bool:
        """Whether a process is working on the run."""
        try:
            with (self.root / IN_USE).open("rb") as stream:
                lock_file(stream, shared=True)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    @property
    def _never_began(self) -> bool:
        """Whether the directory holds only what is written before the first step, as after a kill."""
        files = (self.recipe, self.data, self.preview, self.plan, self.checkpoints, self.log)
        early = {IN_USE, *(path.name for path in files)}
        names = {path.name for path in self.root.iterdir() if not is_leftover(path)}
        return names <= early and not any(self.checkpoints.glob("*"))

    @classmethod
    def at(cls, root: str | Path) -> RunDir:
        """Return the run in a folder, which need not exist yet."""
        return cls(Path(root).expanduser().resolve())

    @classmethod
    def open(cls, root: str | Path) -> RunDir:
        """Return an existing run.

        Raises:
            RecipeError: The folder is not a run directory.
        """
        run = cls.at(root)
        if run.root.is_file():
            fix = "name its run directory, which is train.output_dir in a recipe; `loratune runs` lists them"
            raise RecipeError(f"{run.root} is a file, not a run directory", fix=fix)
        if not run.lock.is_file():
            raise RecipeError(
                f"{run.root} is not a run directory: it has no lock.json",
                fix="use the train.output_dir of a run; if it stopped before the first step, `loratune train` again",
            )
        _refuse_links(run._written_in_place)
        return run

    @property
    def _written_in_place(self) -> Iterator[Path]:
        """All files outside of exports."""
        exports = self.root / "exports"  # replaced as a whole, and may link to the weights of the base
        return (path for path in self.root.rglob("*") if exports not in path.parent.parents)

    @classmethod
    def check(cls, root: str | Path, *, overwrite: bool) -> RunDir:
        """Check that a new run may be created here, without changing anything.

        Raises:
            RecipeError: The folder is not empty, and `overwrite` is false or it is not a run.
        """
        run = cls.at(root)
        if not run.root.exists() or (run.root.is_dir() and not any(run.root.iterdir())):
            return run
        other = "train.output_dir=… for another folder"
        _refuse_links([run.root / IN_USE])
        if not ((run.root / IN_USE).exists() or run.lock.is_file()):
            raise RecipeError("the output directory exists and is not a run of loratune", file=run.root, fix=other)
        with run.exclusive():
            pass
        if not overwrite and not run._never_began:
            on = f"`loratune extend {run.root} train.epochs=N` to train it further"
            on = on if run.has_adapter else f"`loratune resume {run.root}` to continue it"
            raise RecipeError(
                "the output directory already contains a run",
                file=run.root,
                fix=f"{on}, --overwrite (in Python: overwrite=True) to start over, or {other}",
            )
        return run

    @classmethod
    def create(cls, root: str | Path, *, overwrite: bool) -> RunDir:
        """Create an empty run directory.

        Raises:
            RecipeError: See `check`.
            MachineError: The folder cannot be written.
        """
        run = cls.check(root, overwrite=overwrite)
        with cannot_write(run.root, fix="train.output_dir=… for another folder"):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            with run.exclusive():
                for path in run.root.iterdir():
                    if path.name != IN_USE:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                run.checkpoints.mkdir()
        return run

    def clean(self) -> None:
        """Delete files that a kill left half written."""
        for path in (*self.root.glob(".*"), *self.checkpoints.glob(".*"), *self.adapter.glob(".*")):
            if is_leftover(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the run against other commands for as long as the context lasts and this process lives.

        Of several processes of a run, the first takes the lock for all.

        Raises:
            RecipeError: Another process has the lock.
            MachineError: The folder cannot be written.
        """
        if not processes.is_main():
            yield
            return
        with cannot_write(self.root):
            stream = (self.root / IN_USE).open("a+")
        with stream:
            try:
                lock_file(stream)
            except OSError:
                stream.seek(0)
                raise RecipeError(
                    f"another run is using this output directory (process {stream.read().strip() or 'unknown'})",
                    file=self.root,
                    fix="wait for it, stop it, or choose another folder with train.output_dir=…",
                ) from None
            with cannot_write(self.root):
                stream.truncate(0)
                stream.write(str(os.getpid()))
                stream.flush()
            yield

    def append_metrics(self, record: Record) -> None:
        """Append a line to `metrics.jsonl`; of several processes, only the first one writes.

        Raises:
            ValidationError: The line does not match any record, which is a bug.
            MachineError: The file cannot be written.
        """
        if not processes.is_main():
            return
        line = json.dumps(record)
        parse_metrics_line(line)
        with cannot_write(self.metrics), self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def sync_metrics(self) -> None:
        """Flush all lines of `metrics.jsonl` to the disk."""
        if self.metrics.is_file():
            with cannot_write(self.metrics), self.metrics.open("rb") as stream:
                os.fsync(stream.fileno())

    def read_metrics(self) -> list[Record]:
        """Return all lines of `metrics.jsonl`, without a last line cut off by a crash."""
        if not self.metrics.is_file():
            return []
        records: list[Record] = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind_metrics(self, step: int) -> None:
        """Delete the lines after a step, which a resumed run writes again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def _refuse_links(paths: Iterable[Path]) -> None:
    """Raise if a path is a link, which in a stranger's run could lead to any file."""
    link = next((path for path in paths if path.is_symlink()), None)
    if link is not None:
        raise RecipeError(
            "a run directory must not contain links", file=link, fix="replace the link by the file, or remove it"
        )


def write_json(path: Path, record: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError("the run has no such file", file=path, fix="train first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"damaged: {error}", file=path, fix="restore it or train again") from None


_FREE_SPACE = "free some disk space, then `loratune resume`"


def write_text(path: Path, text: str, fix: str = _FREE_SPACE) -> None:
    """Write a file atomically.

    Args:
        path: The file.
        text: Its contents.
        fix: What to do if it cannot be written.

    Raises:
        MachineError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with cannot_write(path, fix):
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
    except MachineError:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def cannot_write(path: Path, fix: str = _FREE_SPACE) -> Iterator[None]:
    """Turn the system's errors about a full or read-only disk into a `MachineError`."""
    try:
        yield
    except Exception as error:
        # Rust libraries wrap the system's error: safetensors in a type of its own, tokenizers in a bare Exception.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise MachineError(f"cannot write: {error}", file=path, fix=fix) from error


def is_leftover(path: Path) -> bool:
    """Whether a kill left the file half written."""
    return path.name.startswith(".") and path.name.endswith(".tmp")
