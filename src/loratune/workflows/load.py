"""Load the base model, attach the adapter, and set up the loss: the start of everything that needs weights."""

from __future__ import annotations

from contextlib import nullcontext
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from loratune.model.adapter.attach import attach_adapter, fallback_note, load_adapter
from loratune.model.adapter.eva_loftq import batches_for_eva, init_eva, init_loftq
from loratune.model.adapter.patterns import highest_rank
from loratune.model.adapter.start_from import load_weights_into
from loratune.model.device import torch_dtype
from loratune.model.load import download_weights, load_model
from loratune.model.quantization.fp8 import quantize_frozen_layers
from loratune.run.errors import RecipeError, RunError
from loratune.training.fsdp import is_sharded, shard_layers
from loratune.training.layers import prepare_layers
from loratune.training.neftune import EmbeddingNoise
from loratune.training.shared_forward import obstacle_to_sharing
from loratune.workflows.tasks.task import task_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peft import PeftModel

    from loratune.data.examples import Example
    from loratune.planning.preparation import Preparation
    from loratune.run.directory import RunDir
    from loratune.run.progress import Progress
    from loratune.training.loss import SupervisedLoss


_CHECKED_TOKENS = 24


def load_base(prepared: Preparation, progress: Progress) -> Any:
    """Load the base model without an adapter."""
    recipe = prepared.recipe
    progress.line(f"loading {recipe.model.name} in {recipe.model.dtype} on {recipe.train.device}")
    device = (
        "cpu" if is_sharded(recipe) else recipe.train.device
    )  # each device will hold a shard, and need not have room for all of it
    return load_model(
        prepared.model.base,
        recipe.model,
        dtype=torch_dtype(recipe.model.dtype),
        device=device,
        classes=prepared.model.classes,
    )


def attach_adapter_and_loss(prepared: Preparation, base: Any, progress: Progress) -> tuple[PeftModel, SupervisedLoss]:
    """Attach the adapter, fresh or from `lora.start_from`, and return model and loss ready for training."""
    recipe = prepared.recipe
    model = attach_adapter(
        base,
        recipe.lora,
        prepared.adapter.targets,
        base_name=_loadable_name(prepared),
        seed=recipe.train.seed,
        new_tokens=prepared.model.new_tokens,
        classes=prepared.model.classes,
    )
    if recipe.lora.variant == "eva":
        r = highest_rank(recipe.lora)
        examples = [example.input_ids.tolist() for example in prepared.data.train]
        batches = batches_for_eva(examples, r=r, batch_size=recipe.train.batch_size, device=model.device)
        init_eva(model, batches)
    if recipe.lora.variant == "loftq":
        init_loftq(model, download_weights(prepared.model.base), seed=recipe.train.seed)
    if prepared.adapter.start is not None:
        load_weights_into(model, prepared.adapter.start)
    if recipe.model.quantization == "fp8":
        quantize_frozen_layers(model)
    if not is_sharded(recipe):  # else it may be on a CPU, and too large to run there
        check_forward(model, prepared.data.train, started=prepared.adapter.start is not None)
    if recipe.train.engine == "trl":
        task_of(recipe).check_reference(model.get_base_model())
    loss = _loss(prepared, model)
    if recipe.train.engine == "trl":
        return model, loss
    for words in slow_notes(prepared, loss):
        progress.warn(words)
    note = fallback_note(model)
    if note and recipe.lora.variant != "dora":  # the plan has said so already
        progress.warn(note)
    loss.compiled, loss.smoothing = recipe.train.compile is True, recipe.train.label_smoothing
    if recipe.train.neftune_noise_alpha:
        loss.noise = EmbeddingNoise(recipe.train.neftune_noise_alpha, model.get_base_model().get_input_embeddings())
    prepare_layers(model, compiled=loss.compiled, num_recomputed=int(recipe.train.recompute))
    return model, loss


def check_forward(model: PeftModel, examples: Sequence[Example], *, started: bool) -> None:
    """Check that the model's own forward is finite before anything is compared with it.

    Args:
        model: The adapted model, as it begins.
        examples: Training examples, of which the beginning of the first is run.
        started: Whether the adapter is one of `lora.start_from`, so that it changes the model already.

    Raises:
        RunError: The forward overflows or is NaN.
    """
    tokens = torch.from_numpy(examples[0].input_ids[:_CHECKED_TOKENS]).long()[None].to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        finite = _is_finite(model, tokens)
        with model.disable_adapter() if started and not finite else nullcontext():
            base_is_finite = finite or (started and _is_finite(model, tokens))
    model.train(was_training)
    if finite:
        return
    dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    wider = "model.dtype=float32" + (", or bfloat16" if dtype == "float16" else "")
    whose = "base with the adapter of lora.start_from" if base_is_finite else "base model's own forward"
    raise RunError(
        f"the {whose} gives NaN or infinity in {dtype}, before any training, although its weights are finite",
        fix=wider if dtype != "float32" else "choose another adapter" if base_is_finite else "choose another model",
    )


def _is_finite(model: PeftModel, tokens: torch.Tensor) -> bool:
    return bool(model.get_base_model()(input_ids=tokens).logits.isfinite().all())


def load_trained(
    prepared: Preparation,
    run: RunDir,
    progress: Progress,
    load: Callable[[Preparation, Progress], Any] | None = None,
) -> tuple[PeftModel, SupervisedLoss]:
    """Load the base model, by `load_base` or another function, with the run's adapter, and its loss."""
    model = load_adapter((load or load_base)(prepared, progress), run.adapter)
    if prepared.recipe.model.quantization == "fp8":
        quantize_frozen_layers(model)
    return model, _loss(prepared, model)


def slow_notes(prepared: Preparation, loss: SupervisedLoss) -> Iterator[str]:
    """Yield why the loss is not the engine's fastest, and what that costs."""
    if loss.why_unpacked:
        budget = prepared.estimate.memory.token_budget
        mean = fmean(len(example.input_ids) for example in prepared.data.train)
        cost = f"; a forward pass has {mean:,.0f} tokens on average, where packed examples fill up to {budget:,}"
        yield loss.why_unpacked + (cost if not (loss.packed or loss.pads) and mean < budget else "")
    if loss.why_separate and loss.packed:  # else the note above says what is the matter
        yield f"prefixes that examples share go through the model once for each of them: {loss.why_separate}"
    if loss.slow_attention:
        yield (
            f"attention runs in blocks of plain matrix products, not as flash attention: {loss.slow_attention}; "
            "it takes several passes over memory, and more the longer the examples are"
        )


def _loss(prepared: Preparation, model: PeftModel) -> SupervisedLoss:
    """Return the model's loss; a base that processes share is sharded first.

    Raises:
        RecipeError: The base is to be shared, and this model's examples cannot share a forward pass.
    """
    recipe, task = prepared.recipe, task_of(prepared.recipe)
    if recipe.train.engine == "trl":
        loss = task.plain_loss(model, recipe)
        loss.why_unpacked = "train.engine is trl"
        return loss
    if not is_sharded(recipe):
        loss, loss.why_unpacked = task.make_loss(model, prepared.data.train, recipe)
        return _sharing(loss, prepared)
    shard_layers(model, recipe.train.device)
    loss, reason = task.make_loss(model, prepared.data.train, recipe)
    if reason or loss.longest_packed is not None:
        reason = reason or f"those of more than {loss.longest_packed:,} tokens need one of their own"
        raise RecipeError(
            f"train.strategy is fsdp, for which examples must share a forward pass, and they cannot: {reason}",
            fix="train.strategy=ddp",
        )
    loss.sharded = True
    return _sharing(loss, prepared)


def _sharing(loss: SupervisedLoss, prepared: Preparation) -> SupervisedLoss:
    """Return the loss, which shares prefixes if the recipe wants it and the model computes the same."""
    if prepared.recipe.train.share_prefixes is True:
        loss.why_separate = obstacle_to_sharing(loss, prepared.data.train)
        loss.shares_prefixes = not loss.why_separate
    return loss


def _loadable_name(prepared: Preparation) -> str:
    """Return the name by which PEFT can load the base model: its Hub id, or its folder."""
    return prepared.model.base.name if prepared.model.base.revision else str(prepared.model.base.path)
