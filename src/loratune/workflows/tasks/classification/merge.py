"""`loratune merge` for a classifier: base, adapter and head in one folder, with the same kind of certificate as any
export."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loratune.data.batch import collate
from loratune.data.examples import Example, LabelledExample
from loratune.exporting.certificate import EXACT, ROUNDED, Question, ReferenceOutputs, Tolerance, certify
from loratune.exporting.staging import atomic_folder, check_target
from loratune.model.adapter.attach import load_adapter
from loratune.model.load import download_weights, load_config, load_model
from loratune.run.directory import Record, RunDir, cannot_write
from loratune.workflows.certify import Exported, record, write_certificate
from loratune.workflows.finished import open_run
from loratune.workflows.load import load_trained
from loratune.workflows.merged_folder import merged_dtype
from loratune.workflows.tasks.classification.load_back import ClassifierReader

if TYPE_CHECKING:
    from pathlib import Path

    from loratune.planning.preparation import Preparation
    from loratune.run.progress import Progress

MOST_EXAMPLES = 256
"""The most texts on which the merged model is compared with the trained one."""


def merge_classifier(root: str | Path, target: Path, *, dtype: str, progress: Progress) -> Exported:
    """Write base, adapter and head as one classifier. The base is in float32 while it is merged.

    Args:
        root: The run directory.
        target: The folder to write.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: as in the base's files, and bfloat16 if the base was a
            quantized GGUF file.
        progress: Shows how far it is.

    Raises:
        RecipeError: The run is not finished, its model changed, or `target` exists.
        MachineError: The disk is too small.
        RunError: The certificate fails; nothing is kept.
    """
    run, prepared = open_run(root, progress)
    own: Any = load_config(prepared.model.base, prepared.recipe.model).dtype
    wanted = merged_dtype(prepared, dtype) or own or torch.float32
    check_target(target, needed_bytes=prepared.adapter.parameters.total * wanted.itemsize)
    expected, examples = _expect(prepared, run, progress)
    with atomic_folder(target) as folder:
        progress.line(f"merging {len(prepared.adapter.targets)} matrices in float32, written in {wanted}")
        _write(prepared, run, folder, wanted)
        recipe = prepared.recipe
        reader = ClassifierReader(
            folder,
            examples,
            max_length=int(recipe.data.max_length),
            device=recipe.train.device,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        exact = recipe.model.dtype == "float32" and wanted == torch.float32
        certificate = _certificate(prepared, expected, reader, EXACT if exact else ROUNDED)
        certificate = write_certificate(run, "merge", target, folder, certificate)
    record(run, certificate, progress)
    usage = (
        "python -c \"from transformers import pipeline; print(pipeline('text-classification', "
        f"'{target.absolute()}')('TEXT'))\"",
    )
    return Exported(folder=target.absolute(), certificate=certificate, usage=usage)


def _expect(prepared: Preparation, run: RunDir, progress: Progress) -> tuple[ReferenceOutputs, list[LabelledExample]]:
    """Return the trained model's logits, by training's own code, and the examples. The model is freed afterwards."""
    known = prepared.data.eval or prepared.data.train
    chosen = [example for example in known if isinstance(example, LabelledExample)][:MOST_EXAMPLES]
    model, loss = load_trained(prepared, run, progress)
    model.eval()
    logprobs = []
    with progress.task("running base + adapter", len(chosen), "examples") as task:
        for example in chosen:
            logprobs.append(loss.logits(collate([example]).to(model.device)).log_softmax(-1).cpu())
            task.advance()
    questions = [
        Question(
            messages=tuple({"role": "text", "content": text} for text in example.texts),
            tools=None,
            input_ids=example.input_ids.tolist(),
        )
        for example in chosen
    ]
    expected = ReferenceOutputs(
        examples=[_one_place(example) for example in chosen], logprobs=logprobs, questions=questions, stop_token_ids=()
    )
    return expected, chosen


def _one_place(example: LabelledExample) -> Example:
    """Return the example with one position to compare: its last, which stands for the class."""
    place = np.zeros(len(example.input_ids), dtype=np.bool_)
    place[-1] = True
    return Example(input_ids=example.input_ids, supervised=place, origin=example.origin)


def _write(prepared: Preparation, run: RunDir, folder: Path, dtype: torch.dtype) -> None:
    base: Any = load_model(
        prepared.model.base, prepared.recipe.model, dtype=torch.float32, device="cpu", classes=prepared.model.classes
    )
    adapted: Any = load_adapter(base, run.adapter)
    merged = adapted.merge_and_unload().to(dtype)
    with cannot_write(folder):
        merged.save_pretrained(folder)
        prepared.model.tokenizer.save_pretrained(folder)
        for path in download_weights(prepared.model.base).glob("*.py"):
            shutil.copyfile(path, folder / path.name)


def _certificate(
    prepared: Preparation, expected: ReferenceOutputs, reader: ClassifierReader, tolerance: Tolerance
) -> Record:
    certificate = certify(expected, reader, tolerance, stops_required=False)
    certificate["compares"] = "classes"
    certificate["compared_on"] = "held-out" if prepared.data.eval else "training"
    names = list(prepared.data.report["labels"])
    if reader.names != names:
        certificate["passed"] = False
        certificate["complaints"].append(f"its classes are {reader.names}, those of training {names}")
    return certificate
