"""The exports of a run: a button with its command for each, and the certificate of what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.cli.next_steps import command
from loratune.cli.studio.places import as_word
from loratune.reporting.blocks import UNEXPECTED
from loratune.reporting.run_page import certificate_facts
from loratune.run.digest import file_sha256
from loratune.run.directory import read_json
from loratune.run.errors import LoratuneError
from loratune.run.records.base import read_valid_parts
from loratune.run.records.certificate import CertificateRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loratune.cli.studio.jobs import Job
    from loratune.cli.studio.places import StudioFolder
    from loratune.reporting.run_files import RunFiles

EXPORTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "merge": ("one model that needs no adapter (transformers)", ("merge", "{run}", "{run}-merged"), "{run}-merged"),
    "gguf": ("the adapter for llama.cpp (GGUF)", ("export", "{run}", "--to", "gguf"), "{run}/exports/gguf"),
    "gguf-merged": (
        "the full model for llama.cpp (GGUF)",
        ("export", "{run}", "--to", "gguf", "--merged"),
        "{run}/exports/gguf-merged",
    ),
    "ollama": ("Ollama", ("export", "{run}", "--to", "ollama"), "{run}/exports/ollama"),
    "vllm": ("vLLM", ("export", "{run}", "--to", "vllm"), "{run}/exports/vllm"),
    "mlx": ("MLX, on a Mac", ("export", "{run}", "--to", "mlx"), "{run}/exports/mlx"),
}
"""Name of a button → what it writes, the words of its command, and the folder that this writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A certificate, in words.

    Attributes:
        verdict: `same model`, `another model`, `undecided`, or why there is no verdict.
        tone: `finished`, `running` or `stopped`, as badges have it.
        facts: What was compared, and the outcome.
    """

    verdict: str
    tone: str
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An export that can be made, or was.

    Attributes:
        key: Name of its button; empty where there is none.
        what: What it is.
        line: The command line.
        place: The folder, or the address of a server.
        certificate: Its certificate; None if it has not been written.
        job: The command that was started here last to write it.
    """

    key: str
    what: str
    line: str
    place: str
    certificate: Certificate | None
    job: Job | None


def words_of(key: str, name: str) -> list[str]:
    """Return the words of an export's command, for a run of that name."""
    return [word.replace("{run}", as_word(name)) for word in EXPORTS[key][1]]


def exports_of(places: StudioFolder, name: str, files: RunFiles, jobs: Sequence[Job]) -> list[Export]:
    """Return the exports that have a button, and then what else has a certificate, such as a server."""
    adapter = file_sha256(files.run.adapter_weights) if files.run.adapter_weights.is_file() else ""
    found = []
    for key, (what, _, folder) in EXPORTS.items():
        words = words_of(key, name)
        place = folder.replace("{run}", name)
        job = next((job for job in jobs if list(job.words) == words), None)
        certificate = _read(places, place, adapter)
        found.append(Export(key=key, what=what, line=command(*words), place=place, certificate=certificate, job=job))
    known = {str(places.root / export.place) for export in found}
    return [*found, *_others(files, known, adapter)]


def _read(places: StudioFolder, place: str, adapter: str) -> Certificate | None:
    """Return the certificate in a folder that was written; None if there is no such folder."""
    if not (places.root / place).is_dir():
        return None
    try:
        values = read_json(places.inside(f"{place}/parity.json"))
    except LoratuneError:
        return Certificate(verdict="no certificate", tone="stopped")
    if not isinstance(values, dict):
        return Certificate(verdict="no certificate", tone="stopped")
    return _in_words(read_valid_parts(CertificateRecord, values), adapter)


def _others(files: RunFiles, known: set[str], adapter: str) -> Iterator[Export]:
    for record in files.certificates:
        try:
            kind, place = record.kind, record.path
        except UNEXPECTED:  # the page of the report names what is damaged
            continue
        if place not in known and (record.served is not None or Path(place).is_dir()):
            certificate = _in_words(record, adapter)
            yield Export(key="", what=kind, line="", place=place, certificate=certificate, job=None)


def _in_words(record: CertificateRecord, adapter: str) -> Certificate:
    try:
        verdict, tone = _VERDICTS[record.verdict]
        if record.adapter_sha256 != adapter:
            verdict, tone = "of an adapter before this one", "stopped"
        facts = tuple((fact, text) for fact, text in certificate_facts(record).items() if text)
        reason = (("reason", record.reason),) if record.reason else ()
        return Certificate(verdict=verdict, tone=tone, facts=(*facts, ("checked with", record.checked_with), *reason))
    except UNEXPECTED:
        return Certificate(verdict="the certificate cannot be read", tone="stopped")


_VERDICTS = {
    "same": ("same model", "finished"),
    "different": ("another model", "stopped"),
    "undecided": ("undecided", "running"),
}
