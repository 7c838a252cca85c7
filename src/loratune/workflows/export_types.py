"""Write a merged model as GGUF files of several types, each with its certificate, and choose one of them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from loratune.evaluation.gates import Gate, check_names, parse_gate, pass_gates
from loratune.exporting.gguf.quantizer import QUANTIZER_TYPES, TYPES_BY_SIZE
from loratune.exporting.load_back import has_llama_cpp
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.extras import pip_install
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.certify import export_with_certificate, without_record
from loratune.workflows.export import NUM_SCORED_ANSWERS, open_export
from loratune.workflows.export_gguf import GgufExport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratune.exporting.certificate import Written
    from loratune.run.directory import Record
    from loratune.workflows.certify import Exported

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _TooLargeError(Exception):
    """A file that does not fit."""

    def __init__(self, file_bytes: int) -> None:
        super().__init__(file_bytes)
        self.file_bytes = file_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeChoice:
    """What decides which of several types is kept.

    Attributes:
        fit_bytes: The largest size of a file, in bytes; None for any.
        gate: What the answers of llama.cpp must reach; None for nothing.
    """

    fit_bytes: int | None = None
    gate: Gate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedTypes:
    """Files of several types.

    Attributes:
        folder: The folder that was written, with a folder for each type that was kept.
        rows: What was found of each type that was written, in the order in which they were tried.
        kept: The exports that were kept, the smallest first.
    """

    folder: Path
    rows: list[Record]
    kept: tuple[Exported, ...]


def export_types(
    root: str | Path,
    outtypes: Sequence[str],
    *,
    to: str | None = None,
    fit: str | None = None,
    keep: str | None = None,
    out: str | Path | None = None,
    num_answers: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> ExportedTypes:
    """Write the merged model as GGUF files of several types, each into a folder of its name with its certificate.

    Args:
        root: The run directory.
        outtypes: The types, as for `export`.
        to: `gguf` or `ollama`; None as for `export`.
        fit: The largest size of the file, such as `4GB`; the largest type that fits is kept.
        keep: What llama.cpp's answers must reach, such as `json>=0.78` or `difference.json.low>=-0.02` (minus the run's
            own answers); the smallest type that reaches it is kept.
        out: The folder to create; default `RUN/exports/TO-merged`.
        num_answers: How many held-out prompts llama.cpp answers with each type; None for 200.
        progress: The listener for progress and warnings.

    Raises:
        RecipeError: As for `export`, or `fit` or `keep` has another form.
        MachineError: The disk is too small, or llama-cpp-python is not installed.
        RunError: A certificate fails, or no type fits and reaches what was asked for.
    """
    choice = _parse_choice(fit, keep, RunDir.open(root))
    if not outtypes:
        raise RecipeError("no --outtype to choose from", fix="--outtype q4_k_m,q5_k_m,q6_k,q8_0")
    if num_answers is None:
        num_answers = NUM_SCORED_ANSWERS
    with open_export(root, to, merged=True, outtypes=outtypes, out=out, progress=progress) as (planned, kind, log):
        assert isinstance(planned, GgufExport)
        found = _write_types(planned, kind, outtypes, choice, num_answers)
        for exported in found.kept:
            log.note(exported.summary)
    return found


def _parse_choice(fit: str | None, keep: str | None, run: RunDir) -> TypeChoice | None:
    """Read `--fit` and `--keep`; None where neither is given.

    Raises:
        RecipeError: One of them has another form, or the run's evaluation has no such number.
        MachineError: llama-cpp-python, whose answers decide, is not installed.
    """
    if fit is None and keep is None:
        return None
    gate = parse_gate(keep, option="--keep") if keep is not None else None
    if gate is not None:
        metric = read_json(run.evaluation)["metric"] if run.evaluation.is_file() else "none"
        if metric == "none":
            raise RecipeError(
                f"--keep {keep}: the run has no answers with a metric",
                file=run.root,
                fix=f"loratune evaluate {run.root} --metric json, or another metric",
            )
        check_names([gate], [metric], forgetting=False, harness=False)
        if not has_llama_cpp():
            raise MachineError(
                f"--keep {keep}: llama.cpp's answers decide, but llama-cpp-python is not installed",
                fix=pip_install("gguf"),
            )
    return TypeChoice(fit_bytes=None if fit is None else _as_bytes(fit), gate=gate)


def _write_types(
    plan: GgufExport, kind: str, outtypes: Sequence[str], choice: TypeChoice | None, num_answers: int
) -> ExportedTypes:
    """Write the types one after the other, each into a folder of its name.

    Without a choice all are kept. With a gate the smallest type that holds it is: types are tried from the smallest on,
    until one does. With a size alone it is the largest type that fits.

    Args:
        plan: How the run is exported.
        kind: What is written, as in `parity.json`.
        outtypes: The types.
        choice: What decides which type is kept.
        num_answers: How many held-out prompts llama.cpp answers.

    Raises:
        RunError: No type fits or holds; nothing is kept.
    """
    upwards = choice is None or choice.gate is not None
    order = sorted(dict.fromkeys(outtypes), key=TYPES_BY_SIZE.index, reverse=not upwards)
    rows: list[Record] = []
    kept: list[Exported] = []
    plan.target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=plan.target, prefix=".") as folder:
        if any(outtype in QUANTIZER_TYPES for outtype in order):
            source = Path(folder) / "float32.gguf"
            plan.write_unquantized(source)
            plan = replace(plan, unquantized=source)
        for outtype in order:
            one = replace(plan, outtype=outtype, target=plan.target / outtype)
            plan.finished.progress.line(f"{outtype}:")
            write = partial(_write_fitting, one, None if choice is None else choice.fit_bytes)
            try:
                exported = export_with_certificate(plan.finished, kind, one.target, write, one.usage, num_answers)
            except _TooLargeError as error:
                rows.append({"outtype": outtype, "file_bytes": error.file_bytes, "kept": False})
                continue
            rows.append(_row(one, exported))
            if choice is not None and not _holds(rows[-1], choice.gate):
                shutil.rmtree(one.target)
                without_record(plan.finished.run, one.target)
                continue
            kept.append(exported)
            rows[-1]["kept"] = True
            if choice is not None:
                break
    if not kept:
        plan.target.rmdir()
        raise RunError(_none_holds(rows, choice), fix="other types in --outtype, or another --fit or --keep")
    return ExportedTypes(folder=plan.target, rows=rows, kept=tuple(kept))


def _write_fitting(one: GgufExport, fit_bytes: int | None, folder: Path) -> Written:
    """Write a file, and give it up before anything is compared if it is too large."""
    written = one.write(folder)
    size = (folder / one.file_name).stat().st_size
    if fit_bytes is not None and size > fit_bytes:
        raise _TooLargeError(size)
    return written


def _row(one: GgufExport, exported: Exported) -> Record:
    """Return the line of the table."""
    certificate = exported.certificate
    answers = certificate.get("answers") or {}
    return {
        "outtype": one.outtype,
        "kept": False,
        "file_bytes": (exported.folder / one.file_name).stat().st_size,
        "tokens_per_second": answers.get("tokens_per_second"),
        "mean_kl": certificate["distributions"]["mean_kl"],
        "verdict": certificate["verdict"],
        "metric": answers.get("metric"),
        "num_prompts": answers.get("num_prompts"),
        "scores": answers.get("scores"),
    }


def _holds(row: Record, gate: Gate | None) -> bool:
    """Return whether the answers of a type reach what they must."""
    if gate is None:
        return True
    scores, metric = row["scores"], row["metric"]
    if scores is None:
        raise RecipeError(
            f"--keep {gate.text}: llama.cpp answered no prompts, or the metric is your own",
            fix="llama-cpp-python, --answers 100, and a metric of loratune",
        )
    record: Record = {
        "base": {metric: scores["run_score"]},
        "tuned": {metric: scores["score"]},
        "difference": {metric: scores["difference"]},
    }
    pass_gates([gate], record)
    return bool(record["gates"][0]["passed"])


def _none_holds(rows: list[Record], choice: TypeChoice | None) -> str:
    assert choice is not None
    wanted = [] if choice.gate is None else [f"holds {choice.gate.text}"]
    wanted += [] if choice.fit_bytes is None else [f"fits into {choice.fit_bytes / 1e9:.3g} GB"]
    found = ", ".join(
        f"{row['outtype']} {row['file_bytes'] / 1e9:.3g} GB"
        + (f" {row['metric']} {row['scores']['score']:.3g}" if row.get("scores") else "")
        for row in rows
    )
    return f"no type {' and '.join(wanted)}: {found}"


def _as_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+\.?\d*)\s*([KMG]i?B)", text.strip(), re.IGNORECASE)
    if found is None:
        raise RecipeError(f"--fit {text}: not a size", fix="a number with its unit: 4GB, 900MB or 3.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
