"""`loratune merge` for a classifier: base, adapter and head in one folder, with the same kind of certificate as any
export."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loratune.data.examples import Example, LabeledExample
from loratune.exporting.adapter_matrices import read_adapter
from loratune.exporting.certificate import EXACT, ROUNDED, Written, certify, with_decision
from loratune.exporting.places import ENOUGH_POSITIONS, Question, sides_of
from loratune.exporting.reference_outputs import Places, ReferenceOutputs, reference_outputs
from loratune.exporting.staging import atomic_folder, check_target
from loratune.exporting.verdict import Decision
from loratune.exporting.weights_proof import for_all
from loratune.exporting.written_tensors import rounding_to
from loratune.model.adapter.attach import load_adapter
from loratune.model.load import download_weights, is_packed, load_config, load_model
from loratune.run.directory import Record, RunDir, cannot_write
from loratune.workflows.certify import Exported, record, write_certificate
from loratune.workflows.finished import open_run
from loratune.workflows.load import load_trained
from loratune.workflows.merged_folder import merged_dtype
from loratune.workflows.reference import as_rounded
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
    expected, examples = _expect(prepared, run, wanted, progress)
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
        certificate = _certificate(prepared, expected, reader, run)
        certificate = write_certificate(run, "merge", target, folder, certificate)
    record(run, certificate, progress)
    usage = (
        "python -c \"from transformers import pipeline; print(pipeline('text-classification', "
        f"'{target.absolute()}')('TEXT'))\"",
    )
    return Exported(folder=target.absolute(), certificate=certificate, usage=usage)


def _expect(
    prepared: Preparation, run: RunDir, dtype: torch.dtype, progress: Progress
) -> tuple[ReferenceOutputs, list[LabeledExample]]:
    """Return the trained model's logits, by training's own code, and the examples. The model is freed afterwards."""
    held_out, training = (
        [example for example in side if isinstance(example, LabeledExample)][:MOST_EXAMPLES]
        for side in (prepared.data.eval, prepared.data.train)
    )
    added = training if len(held_out) < ENOUGH_POSITIONS else []
    chosen = [*held_out, *added][:MOST_EXAMPLES]
    model, loss = load_trained(prepared, run, progress)
    model.eval()
    questions = [
        Question(
            messages=tuple({"role": "text", "content": text} for text in example.texts),
            tools=None,
            input_ids=example.input_ids.tolist(),
        )
        for example in chosen
    ]
    config = load_config(prepared.model.base, prepared.recipe.model)
    with progress.task("running base + adapter", 3 * len(chosen), "examples") as task:
        expected = reference_outputs(
            loss,
            Places(
                examples=chosen,
                questions=questions,
                compared_on=sides_of(held_out, added),
            ),
            prepared.model.tokenizer,
            packed=is_packed(config, prepared.recipe.model),
            change=as_rounded(read_adapter(run.adapter), for_all(rounding_to(dtype))),
            progress=task.advance,
        )
    return replace(expected, examples=[_one_place(example) for example in chosen], stop_token_ids=()), chosen


def _one_place(example: LabeledExample) -> Example:
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


def _certificate(prepared: Preparation, expected: ReferenceOutputs, reader: ClassifierReader, run: RunDir) -> Record:
    packed = is_packed(load_config(prepared.model.base, prepared.recipe.model), prepared.recipe.model)
    way_out = f"loratune merge {run.root} OUT --dtype float32"
    written = Written(load=lambda _: reader, tolerance=ROUNDED if packed else EXACT, way_out=way_out)
    certificate = certify(expected, reader, written, stops_required=False)
    certificate["compares"] = "classes"
    names = list(prepared.data.report["labels"])
    if reader.names != names:
        complaint = f"its classes are {reader.names}, those of training {names}"
        fix = "use the base's own configuration"
        certificate |= with_decision(Decision(verdict="different", complaints=[complaint], reason=complaint, fix=fix))
    return certificate
