"""The run directory: every path and every record that a run writes. Nothing else knows a file name.

RUN/recipe.yaml        as written          RUN/plan.json         what was promised, and what was measured
RUN/lock.json          everything effective RUN/metrics.jsonl     one line a step or evaluation
RUN/data.json          the data report     RUN/evaluation.json   base and tuned, per item
RUN/checkpoints/STEP/  to resume from      RUN/adapter/          PEFT format, with template and card
RUN/preview.json       examples by token   RUN/report.html       all of it for people
RUN/parity.json        certificates of what was merged and exported
RUN/best.json          which checkpoint has the lowest held-out loss
RUN/mean.json          the checkpoints whose mean the adapter is, with train.average_checkpoints
"""

from __future__ import annotations

import fcntl
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
from loratune.run.records.metrics import parse_line

Record = dict[str, Any]
_IN_USE = ".in_use"


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
    def trackers(self) -> Path:
        return self.root / "trackers"

    @property
    def has_adapter(self) -> bool:
        """Whether training ran to its end and the adapter is written."""
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
        """Whether nothing is left to do: the adapter is written, evaluated, measured and reported on."""
        return self.has_adapter and "measured" in read_json(self.plan) and self.report.is_file()

    @property
    def is_in_use(self) -> bool:
        """Whether a process is at work on the run."""
        try:
            with (self.root / _IN_USE).open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    @property
    def _never_began(self) -> bool:
        """Whether a kill left a directory that has no more than what is written before the first step."""
        early = {_IN_USE, *(path.name for path in (self.recipe, self.data, self.preview, self.plan, self.checkpoints))}
        names = {path.name for path in self.root.iterdir() if not _is_leftover(path)}
        return names <= early and not any(self.checkpoints.glob("*"))

    @classmethod
    def at(cls, root: str | Path) -> RunDir:
        """The run in a folder, which may not be there yet."""
        return cls(Path(root).expanduser().resolve())

    @classmethod
    def open(cls, root: str | Path) -> RunDir:
        """An existing run.

        Raises:
            RecipeError: The folder is no run directory.
        """
        run = cls.at(root)
        if not run.lock.is_file():
            raise RecipeError(
                f"{run.root} is no run directory: it has no lock.json",
                fix="give train.output_dir of a run; one that was stopped before it began is trained anew",
            )
        _refuse_links(run._written_in_place)
        return run

    @property
    def _written_in_place(self) -> Iterator[Path]:
        """All but what exports hold: those are replaced as a whole, and may link to the weights of the base."""
        exports = self.root / "exports"
        return (path for path in self.root.rglob("*") if exports not in path.parent.parents)

    @classmethod
    def check(cls, root: str | Path, *, overwrite: bool) -> RunDir:
        """Whether a new run may be made here, without touching anything.

        Raises:
            RecipeError: The folder holds something already, and `overwrite` is false or it is not a run.
        """
        run = cls.at(root)
        if not run.root.exists() or (run.root.is_dir() and not any(run.root.iterdir())):
            return run
        other = "train.output_dir=… for another place"
        _refuse_links([run.root / _IN_USE])
        if not ((run.root / _IN_USE).exists() or run.lock.is_file()):
            raise RecipeError("the output directory exists and is not a run of loratune", file=run.root, fix=other)
        with run.exclusive():
            pass
        if not overwrite and not run._never_began:
            goes_on = "" if run.has_adapter else f"`loratune resume {run.root}` to go on, "
            raise RecipeError(
                "the output directory holds a run already",
                file=run.root,
                fix=f"{goes_on}--overwrite to start anew, or {other}",
            )
        return run

    @classmethod
    def create(cls, root: str | Path, *, overwrite: bool) -> RunDir:
        """A new run directory, empty.

        Raises:
            RecipeError: As `check`.
            MachineError: The folder cannot be written.
        """
        run = cls.check(root, overwrite=overwrite)
        with cannot_write(run.root, fix="train.output_dir=… for another place"):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            with run.exclusive():
                for path in run.root.iterdir():
                    if path.name != _IN_USE:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                run.checkpoints.mkdir()
        return run

    def clean(self) -> None:
        """Delete what a kill left half written."""
        for path in (*self.root.glob(".*"), *self.checkpoints.glob(".*"), *self.adapter.glob(".*")):
            if _is_leftover(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other commands out of this run, as long as the context lasts and this process lives. Of several processes of a
        run the first does so for all.

        Raises:
            RecipeError: Another process has it.
            MachineError: The folder cannot be written.
        """
        if not processes.is_main():
            yield
            return
        with cannot_write(self.root):
            stream = (self.root / _IN_USE).open("a+")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.seek(0)
                raise RecipeError(
                    f"another run is using this output directory (process {stream.read().strip() or 'unknown'})",
                    file=self.root,
                    fix="wait for it, stop it, or choose another place with train.output_dir=…",
                ) from None
            with cannot_write(self.root):
                stream.truncate(0)
                stream.write(str(os.getpid()))
                stream.flush()
            yield

    def append_metrics(self, record: Record) -> None:
        """Add a line to `metrics.jsonl`. Of several processes the first one does; all know the same.

        Raises:
            ValidationError: It is not a line that the records know, which is a mistake of ours.
            MachineError: It cannot be written.
        """
        if not processes.is_main():
            return
        line = json.dumps(record)
        parse_line(line)
        with cannot_write(self.metrics), self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def sync_metrics(self) -> None:
        """Have the disk hold all lines of `metrics.jsonl` before going on."""
        if self.metrics.is_file():
            with cannot_write(self.metrics), self.metrics.open("rb") as stream:
                os.fsync(stream.fileno())

    def read_metrics(self) -> list[Record]:
        """All lines of `metrics.jsonl`; a last line cut short by a crash is left out."""
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
        """Forget the lines after a step, which a resumed run writes again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def _refuse_links(paths: Iterable[Path]) -> None:
    """What is written to a run stays in it: a link in a run of a stranger could lead to any file."""
    link = next((path for path in paths if path.is_symlink()), None)
    if link is not None:
        raise RecipeError("a link in a run directory", file=link, fix="put the file itself there, or remove the link")


def write_json(path: Path, record: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        RunError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError("the run has no such file", file=path, fix="train first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"damaged: {error}", file=path, fix="restore it or train again") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        MachineError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with cannot_write(path):
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
def cannot_write(path: Path, fix: str = "free some disk space, then `loratune resume`") -> Iterator[None]:
    """Turn what the system says when a disk is full or read-only into our error."""
    try:
        yield
    except Exception as error:
        # Libraries in Rust quote the system in errors of their own: safetensors in its type, tokenizers in a bare Exception.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise MachineError(f"cannot write: {error}", file=path, fix=fix) from error


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")
