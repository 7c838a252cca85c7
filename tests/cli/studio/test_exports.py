"""Each export has a button with its command, and beside it the certificate of what was written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loratune.cli.studio.exports import EXPORTS, Export, exports_of, words_of
from loratune.cli.studio.jobs import Job
from loratune.cli.studio.places import StudioFolder
from loratune.reporting.run_files import read_run
from loratune.run.directory import RunDir
from loratune.run.records.certificate import CertificateRecord
from loratune.run.records.files import write_record
from tests.reporting.conftest import PLANTED

NAME = "__models/<i>one"


@pytest.fixture
def run(finished_run: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(finished_run.root, tmp_path / NAME)))


@pytest.fixture
def certify(run: RunDir) -> Callable[..., dict[str, Any]]:
    """Write a folder with a certificate, as an export does."""

    def write(folder: Path, **values: Any) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "kind": "gguf adapter",
            "run": str(run.root),
            "path": str(folder),
            "adapter_sha256": hashlib.sha256(run.adapter_weights.read_bytes()).hexdigest(),
            "passed": True,
            "verdict": "same",
            "complaints": [],
            "checked_with": f"llama.cpp {PLANTED[1]}",
            "template": {"num_prompts": 7, "same_token_ids": 6, "first_difference": None},
            "stop_tokens": {"ids": [2], "missing": []},
            "distributions": {
                "num_examples": 7,
                "num_positions": 70,
                "top1_agreement": 0.987,
                "num_decided": 60,
                "decided_agreement": 1.0,
                "mean_kl": 0.00012,
                "max_kl": 0.001,
            },
            "tolerance": {"mean_kl": 0.01, "margin": 0.1, "top1": 0.99, "reason": "rounding"},
            "loratune": "1",
            "compared_on": "held-out",
            **values,
        }
        written: dict[str, Any] = write_record(folder / "parity.json", CertificateRecord, record)
        return written

    return write


def the(key: str, run: RunDir, root: Path, jobs: tuple[Job, ...] = ()) -> Export:
    found = exports_of(StudioFolder.of(root), NAME, read_run(run), jobs)
    return next(export for export in found if export.key == key)


def plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_what_was_written_shows_its_certificate_in_place_of_a_button(
    user: TestClient, run: RunDir, certify: Callable[..., Any]
) -> None:
    before = user.get("/run", params={"path": NAME}).text
    assert len(re.findall(r'name="to" value="([^"]+)"', before)) == len(EXPORTS)
    certify(run.exports / "gguf")
    certify(run.root.with_name("<i>one-merged"), kind="merge", verdict="undecided", reason="the base would pass too")
    page = user.get("/run", params={"path": NAME}).text
    assert set(EXPORTS) - set(re.findall(r'name="to" value="([^"]+)"', page)) == {"gguf", "merge"}
    text = plain(page)
    assert "same model __models/&lt;i&gt;one/exports/gguf" in text
    assert "prompts with the same token ids 6 of 7" in text
    assert "same top token 98.7%" in text
    assert "mean KL 0.00012" in text
    assert "undecided __models/&lt;i&gt;one-merged" in text
    assert "reason the base would pass too" in text
    assert "checked with llama.cpp &lt;/style&gt;" in text
    assert "<i>" not in page
    assert "<script>window" not in page


def test_a_certificate_of_another_adapter_is_not_one_of_this_run(
    run: RunDir, tmp_path: Path, certify: Callable[..., Any]
) -> None:
    certify(run.exports / "vllm", adapter_sha256="0" * 64)
    found = the("vllm", run, tmp_path).certificate
    assert found is not None
    assert (found.verdict, found.tone) == ("of an adapter before this one", "stopped")


@pytest.mark.parametrize("content", ["{", "[]", '{"verdict": "same"}', '{"verdict": "great"}'])
def test_a_damaged_certificate_is_none(run: RunDir, tmp_path: Path, content: str) -> None:
    folder = run.exports / "ollama"
    folder.mkdir(parents=True)
    (folder / "parity.json").write_text(content)
    found = the("ollama", run, tmp_path).certificate
    assert found is not None
    assert found.tone == "stopped"
    assert found.verdict in ("no certificate", "the certificate cannot be read")
    (folder / "parity.json").unlink()
    found = the("ollama", run, tmp_path).certificate
    assert found is not None
    assert found.verdict == "no certificate"


def test_a_certificate_outside_of_the_folder_is_not_read(
    run: RunDir, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, certify: Callable[..., Any]
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    certify(outside)
    run.exports.mkdir(exist_ok=True)
    (run.exports / "vllm").symlink_to(outside)
    found = the("vllm", run, tmp_path).certificate
    assert found is not None
    assert (found.verdict, found.facts) == ("no certificate", ())


def test_what_has_no_button_is_shown_too_as_long_as_it_is_there(
    run: RunDir, tmp_path: Path, certify: Callable[..., Any]
) -> None:
    records = [certify(run.exports / "gguf"), certify(tmp_path / "elsewhere", kind="gguf merged")]
    run.parity.write_text(json.dumps(records))
    found = exports_of(StudioFolder.of(tmp_path), NAME, read_run(run), ())
    assert [(export.what, export.place) for export in found if not export.key] == [
        ("gguf merged", str(tmp_path / "elsewhere"))
    ]
    shutil.rmtree(tmp_path / "elsewhere")
    assert all(export.key for export in exports_of(StudioFolder.of(tmp_path), NAME, read_run(run), ()))


def test_a_command_that_runs_or_failed_stands_beside_its_own_button(run: RunDir, tmp_path: Path) -> None:
    words = tuple(words_of("gguf-merged", NAME))
    job = Job(id="1-a", words=words, about=NAME, source="", started=1.0, pid=1, code=1)
    assert the("gguf-merged", run, tmp_path, (job,)).job == job
    assert the("gguf", run, tmp_path, (job,)).job is None
    assert the("gguf-merged", run, tmp_path).line == "loratune export '__models/<i>one' --to gguf --merged"
