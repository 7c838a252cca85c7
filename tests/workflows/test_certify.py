"""What passes a certificate is kept and recorded; what fails is discarded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from loratune.exporting.certificate import Written
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RunError
from loratune.run.progress import NoProgress
from loratune.workflows.certify import export_with_certificate, record
from loratune.workflows.export import export
from loratune.workflows.finished import FinishedRun, open_finished
from loratune.workflows.merged_folder import write_merged_folder
from loratune.workflows.reference import compute_reference


class Warnings(NoProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def finished(finished_run: RunDir) -> FinishedRun:
    return open_finished(finished_run.root, Warnings())


def without_stop_tokens(finished: FinishedRun) -> Callable[[Path], Written]:
    """Writes a merged folder that ends answers elsewhere than training."""

    def write(folder: Path) -> Written:
        result = write_merged_folder(finished, folder, "auto")
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 5}))
        return result

    return write


def test_a_merged_model_without_the_stop_tokens_of_training_is_discarded(finished: FinishedRun, tmp_path: Path) -> None:
    """It answers with the same tokens, but would never end."""
    with pytest.raises(RunError, match=r"answers do not end at the tokens \[2\]"):
        export_with_certificate(finished, "merge", tmp_path / "out", without_stop_tokens(finished), ())
    assert list(tmp_path.iterdir()) == []


def test_for_an_adapter_whose_base_lacks_them_the_stop_tokens_are_named(finished: FinishedRun, tmp_path: Path) -> None:
    exported = export_with_certificate(
        finished, "vllm adapter", tmp_path / "out", without_stop_tokens(finished), ("vllm serve",)
    )
    assert exported.certificate["passed"]
    assert exported.certificate["stop_tokens"]["missing"] == [2]
    assert isinstance(finished.progress, Warnings)
    assert any("does not end answers at <|im_end|>" in text for text in finished.progress.texts)
    assert json.loads((tmp_path / "out" / "parity.json").read_text()) == exported.certificate
    assert exported.usage == ("vllm serve",)


def test_a_newer_certificate_of_the_same_folder_replaces_the_older(finished: FinishedRun, tmp_path: Path) -> None:
    run = finished.run
    before = read_json(run.parity) if run.parity.is_file() else []
    certificate = export(run.root, to="vllm", out=tmp_path / "out").certificate
    record(run, {**certificate, "loratune": "next"}, NoProgress())
    ours = [other for other in read_json(run.parity) if other["path"] == str(tmp_path / "out")]
    assert [other["loratune"] for other in ours] == ["next"]
    assert len(read_json(run.parity)) == len(before) + 1


def test_the_reference_is_base_and_adapter_at_the_supervised_tokens(finished: FinishedRun) -> None:
    expected = compute_reference(finished, None)
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(finished.run.adapter)).eval()
    assert len(expected.examples) == len(expected.questions) == 6
    for example, logprobs in zip(expected.examples, expected.logprobs, strict=True):
        positions = torch.from_numpy(example.supervised.nonzero()[0]) - 1
        with torch.no_grad():
            logits = adapted(torch.from_numpy(example.input_ids.astype("int64"))[None]).logits[0, positions]
        torch.testing.assert_close(logprobs, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)
