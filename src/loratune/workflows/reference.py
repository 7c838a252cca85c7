"""Compute what base and adapter say in the training code, for a certificate to compare an export with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.exporting.certificate import ReferenceOutputs, choose_examples, choose_questions, reference_outputs
from loratune.model.adapter.attach import load_adapter
from loratune.model.device import torch_dtype
from loratune.model.load import load_model
from loratune.training.loss import make_loss

if TYPE_CHECKING:
    from loratune.workflows.finished import FinishedRun


def compute_reference(finished: FinishedRun) -> ReferenceOutputs:
    """Run base and adapter on held-out examples in the training code. The model is freed on return."""
    prepared = finished.prepared
    recipe = prepared.recipe
    held_out = choose_examples(prepared.data.eval or prepared.data.train)
    base = load_model(
        prepared.model.base, recipe.model, dtype=torch_dtype(recipe.model.dtype), device=recipe.train.device
    )
    model = load_adapter(base, finished.run.adapter)
    loss, _ = make_loss(model, prepared.data.train)
    model.eval()
    questions = choose_questions(prepared.data.eval_conversations, prepared.model.tokenizer)
    with finished.progress.task("running base and adapter", len(held_out), "examples") as task:
        return reference_outputs(loss, held_out, questions, prepared.model.tokenizer, task.advance)
