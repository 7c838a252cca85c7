"""Give an export its certificate, or discard it; and compare any files with a run.

Every export is written under a temporary name, loaded back with the code that will serve it, compared with base and
adapter in the training code, and renamed only if nothing differs.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.evaluation.other_program import score_answers
from loratune.evaluation.scoring import score
from loratune.exporting.certificate import Written, certify, summary
from loratune.exporting.load_back import LlamaCppReader
from loratune.exporting.staging import atomic_folder
from loratune.reporting.html import report_or_warn
from loratune.run.digest import file_sha256
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import DataError, RunError
from loratune.run.records.certificate import CertificateRecord, Certificates
from loratune.run.records.files import write_record
from loratune.workflows.reference import compute_reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loratune.run.progress import Progress
    from loratune.workflows.finished import FinishedRun


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Exported:
    """A finished export.

    Attributes:
        folder: The folder that was written.
        certificate: The content of `parity.json`.
        usage: Shell commands that use the export.
    """

    folder: Path
    certificate: Record
    usage: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The certificate in one line."""
        return summary(self.certificate)

    def __repr__(self) -> str:
        """Return the folder and the verdict: the certificate has a line for every tensor."""
        return f"Exported({str(self.folder)!r}: {self.summary})"


def export_with_certificate(
    finished: FinishedRun,
    kind: str,
    target: Path,
    write: Callable[[Path], Written],
    usage: tuple[str, ...],
    num_answers: int = 0,
) -> Exported:
    """Write an export, load it back, compare it with training, and only then rename it to `target`.

    An export that is undecided is kept, with a warning: no fault was found, but the proof has no power.

    Args:
        finished: The run.
        kind: What is written, such as `gguf merged`.
        target: The folder to write.
        write: Writes the export into a folder; returns how to prove it.
        usage: Shell commands that use the export.
        num_answers: How many held-out prompts llama.cpp answers in full.

    Raises:
        RunError: The export differs from the model that was trained; nothing is kept.
    """
    with atomic_folder(target) as folder:
        certificate = certificate_of(
            finished, write(folder), stops_required="adapter" not in kind, num_answers=num_answers
        )
        certificate = write_certificate(finished.run, kind, target, folder, certificate)
    missing = certificate["stop_tokens"]["missing"]
    if missing:
        texts = ", ".join(finished.prepared.model.tokenizer.convert_ids_to_tokens(missing))
        finished.progress.warn(
            f"the base does not end answers at {texts}, as training does: set these as stop tokens in your server"
        )
    record(finished.run, certificate, finished.progress)
    return Exported(folder=target.absolute(), certificate=certificate, usage=usage)


def write_certificate(run: RunDir, kind: str, target: Path, folder: Path, certificate: Record) -> Record:
    """Write the certificate into the export's folder.

    Args:
        run: The run that is exported.
        kind: What was written, such as `merge` or `gguf adapter`.
        target: The folder's final name.
        folder: The folder's temporary name.
        certificate: The record from `certify`.

    Raises:
        RunError: The verdict is `different`.
    """
    certificate = write_record(
        folder / "parity.json", CertificateRecord, with_origin(run, kind, target.absolute(), certificate)
    )
    if certificate["verdict"] == "different":
        raise RunError(
            f"the exported model differs from base and adapter: {'; '.join(certificate['complaints'])}",
            file=target,
            fix=f"nothing was kept; {certificate['fix']}",
        )
    return certificate


def with_origin(run: RunDir, kind: str, path: Path, certificate: Record) -> Record:
    """Add to a certificate what was compared with which run."""
    return {
        "kind": kind,
        "run": str(run.root),
        "path": str(path),
        "adapter_sha256": file_sha256(run.adapter_weights),
        **certificate,
    }


def record(run: RunDir, certificate: Record, progress: Progress) -> None:
    """Add a certificate to the run's list, in place of an older one of the same folder, and update the report.

    A verdict that is undecided is shown as a warning.
    """
    others = [
        other
        for other in (read_json(run.parity) if run.parity.is_file() else [])
        if other["path"] != certificate["path"]
    ]
    write_record(run.parity, Certificates, [*others, certificate])
    if certificate["verdict"] == "undecided":
        progress.warn(f"undecided: {certificate['reason']}\n  fix: {certificate['fix']}")
    report_or_warn(run, progress)


def without_record(run: RunDir, path: Path) -> None:
    """Remove the certificate of a deleted folder from the run's list."""
    kept = [other for other in read_json(run.parity) if other["path"] != str(path.absolute())]
    write_record(run.parity, Certificates, kept)


def certificate_of(finished: FinishedRun, written: Written, *, stops_required: bool, num_answers: int) -> Record:
    """Compare the export with training, with one model in memory at a time."""
    expected = compute_reference(finished, written.rounding)
    gc.collect()
    reader = written.load(expected)
    with finished.progress.task("checking the export", len(expected.examples), "examples") as task:
        certificate = certify(expected, reader, written, stops_required=stops_required, progress=task.advance)
    if isinstance(reader, LlamaCppReader):
        certificate["answers"] = _compare_answers(finished, reader, num_answers)
        reader.close()
    return certificate


def _compare_answers(finished: FinishedRun, reader: LlamaCppReader, limit: int) -> Record | None:
    """Compare llama.cpp's greedy answers with those of the run's evaluation; None where it has none."""
    run, tokenizer = finished.run, finished.prepared.model.tokenizer
    evaluation = read_json(run.evaluation) if run.evaluation.is_file() else {"items": []}
    items = evaluation["items"][:limit]
    if not items:
        return None
    metric, limit_tokens = evaluation["metric"], finished.prepared.recipe.evaluate.max_new_tokens
    texts = []
    with finished.progress.task("answering", len(items), "prompts") as task:
        for item in items:
            ids = tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]
            answer = reader.answer(ids, limit_tokens)
            # as `generate` decodes the run's own answers
            texts.append(str(tokenizer.decode(answer, skip_special_tokens=False, clean_up_tokenization_spaces=False)))
            task.advance()
    wanted = [item["tuned"]["text"] for item in items]
    same = sum(
        text == own or (metric == "json" and _same_json(text, own)) for text, own in zip(texts, wanted, strict=True)
    )
    return {
        "num_prompts": len(items),
        "same_text": sum(text == own for text, own in zip(texts, wanted, strict=True)),
        "same": same,
        "share": same / len(items),
        "metric": metric,
        "tokens_per_second": reader.tokens_per_second,
        "scores": score_answers(metric, items, texts),
    }


def _same_json(text: str, wanted: str) -> bool:
    try:
        return bool(score("json", text, wanted))
    except DataError:  # the run's own answer is not JSON
        return False
