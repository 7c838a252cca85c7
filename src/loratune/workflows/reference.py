"""Compute the outputs of base and adapter in the training code, with which a certificate compares an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratune.exporting.places import choose_examples, choose_questions
from loratune.exporting.reference_outputs import Places, ReferenceOutputs, reference_outputs
from loratune.exporting.weights_proof import NamedRounding, trained_weight
from loratune.model.adapter.attach import load_adapter
from loratune.model.load import is_packed, load_model, stored_dtype
from loratune.training.loss import make_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from loratune.exporting.adapter_matrices import LowRank
    from loratune.model.arithmetic import Change
    from loratune.training.loss import SupervisedLoss
    from loratune.workflows.finished import FinishedRun

_PEFT = "base_model.model."


def compute_reference(finished: FinishedRun, rounding: NamedRounding | None) -> ReferenceOutputs:
    """Run base and adapter in the training code. The model is freed on return.

    Args:
        finished: The run.
        rounding: How the export's weights are rounded; None where they are the base's.
    """
    prepared = finished.prepared
    recipe = prepared.recipe
    loss, places = load_for_places(finished)
    times = 2 if rounding is None else 3
    with finished.progress.task("running base and adapter", times * len(places.examples), "examples") as task:
        return reference_outputs(
            loss,
            places,
            prepared.model.tokenizer,
            packed=is_packed(finished.config, recipe.model),
            change=None if rounding is None else as_rounded(finished.updates, rounding),
            progress=task.advance,
        )


def load_for_places(finished: FinishedRun) -> tuple[SupervisedLoss, Places]:
    """Load base and adapter in training's own code to evaluate them, and choose where exports are compared."""
    prepared = finished.prepared
    recipe = prepared.recipe
    held_out, training = (
        [sequence for example in side for sequence in example.sequences]
        for side in (prepared.data.eval, prepared.data.train)
    )
    examples, compared_on = choose_examples(held_out, training)
    dtype = stored_dtype(finished.config, recipe.model)
    base = load_model(prepared.model.base, recipe.model, dtype=dtype, device=recipe.train.device)
    loss, _ = make_loss(load_adapter(base, finished.run.adapter), prepared.data.train)
    loss.model.eval()
    questions = choose_questions(prepared.data.eval_conversations, prepared.model.tokenizer)
    return loss, Places(examples=examples, questions=questions, compared_on=compared_on)


def as_rounded(updates: Mapping[str, LowRank], rounding: NamedRounding) -> Change:
    """Return a change that makes a model with an adapter compute as if merged and rounded.

    The adapter stays beside the weights. Each of them moves by the error that rounding leaves on weight and update
    together.
    """

    def change(name: str, values: torch.Tensor) -> torch.Tensor:
        if ".lora_" in name or ".original_module." in name or not name.endswith((".weight", ".bias")):
            return values
        tensor = name.removeprefix(_PEFT).replace(".base_layer", "").replace(".modules_to_save.default", "")
        update = updates.get(tensor.removesuffix(".weight")) if tensor.endswith(".weight") else None
        if update is None:
            return rounding(tensor, values)
        trained = trained_weight(values, update)
        return values + (rounding(tensor, trained) - trained)

    return change
