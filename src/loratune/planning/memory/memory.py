"""How much memory a run takes at its peak; the token budget that fits, and how many layers must recompute for it.

The terms, for a model with LoRA:

    weights      parameters × bytes of the base's type
    variant      what DoRA, PiSSA or OLoRA add, and modules trained in full (`adapter`)
    adapter      trainable × 8 for float32 weight and gradient, and a copy in the base's type if that is narrower
    optimizer    its state (`optimizer`): 8 bytes a trainable parameter for AdamW
    activations  tokens of a micro-batch × what each layer saves for the backward pass (`decoder`, `encoder`)
    working      the larger of: a chunk of logits (`loss`), one layer's gradients in the backward pass (`backward`)
    evaluation   replaces activations and working: one layer without gradients, a chunk of logits, and the cache of
                 keys and values of generation
    loading      the bytes of the weights' files while they are converted to another type
    allocator    fragmentation: a fraction of the activations, and what steps of many sizes leave behind (`overhead`)
    process      Python, torch, the other libraries and the data; a GPU's context (`overhead`)

    peak = weights + process
         + max(loading, variant + adapter + optimizer + allocator + max(activations + working, evaluation))

Each formula states its source and error at its place; `docs/results/memory.md` compares planned and measured bytes.
Called by `cost.run_memory`, which knows the recipe; nothing here does.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from loratune.planning.memory.inputs import ExecutionSetup, MemorySettings, ModelSizes, TokenSizes
from loratune.planning.memory.overhead import Overhead, overhead_of
from loratune.run.errors import MachineError

MAX_USEFUL_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Tokens beyond which a larger micro-batch is no faster. On two CPU cores micro-batches of 790, 1,530 and 3,010 tokens
ran at 285 to 297, 279 to 320 and 282 to 308 tokens/s. Those of GPUs are estimates."""

MIN_EFFICIENT_TOKENS = {"cpu": 512, "cuda": 4096, "mps": 2048}
"""Tokens below which recomputing layers costs less time than a still smaller micro-batch. Estimates."""

MAX_GENERATION_TOKENS = 16_384
"""The most tokens of a batch of answers, however much memory there is."""

PLANNABLE_FRACTION = 0.8
"""The part of the free memory that a plan may use; the rest is for what no formula sees."""

REHEARSAL_FRACTION = 0.6
"""The part of the memory above which a plan on a CPU is tried out before it is trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by component, and the token budget and recomputed layers they were computed for.

    Attributes:
        weights_bytes: The frozen base.
        adapter_bytes: The adapter's weights, gradients, and copies in the base's type.
        optimizer_bytes: The optimizer's state.
        activation_bytes: What the layers save for the backward pass.
        activation_bytes_without_recomputation: The same if every layer saved everything.
        activation_bytes_with_recomputation: The same if every layer saved its input only.
        backward_bytes: One layer's gradients in the backward pass, and quantized weights that are unpacked for it.
        loss_bytes: A chunk of logits with its working copies.
        evaluation_bytes: The held-out loss or the answers, whichever takes more.
        loading_bytes: The weights' files while they are converted.
        variant_bytes: What `lora.variant` adds during training, and modules trained in full.
        allocator_bytes: Fragmentation of the allocator's heap.
        process_bytes: Python, libraries and data.
        token_budget: Tokens of a micro-batch.
        generation_tokens: The most tokens of a batch of answers, prompts included, that needs no more than training.
        num_recomputed: Layers that save their input only.
    """

    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    activation_bytes_without_recomputation: int
    activation_bytes_with_recomputation: int
    backward_bytes: int
    loss_bytes: int
    evaluation_bytes: int
    loading_bytes: int
    variant_bytes: int
    allocator_bytes: int
    process_bytes: int
    token_budget: int
    generation_tokens: int
    num_recomputed: int

    @property
    def working_bytes(self) -> int:
        """Bytes alive for a moment: logits, or one layer's gradients; never both."""
        return max(self.loss_bytes, self.backward_bytes)

    @property
    def training_bytes(self) -> int:
        """Bytes alive at the peak of a step."""
        return self.adapter_bytes + self.optimizer_bytes + self.activation_bytes + self.working_bytes + self.base_bytes

    @property
    def base_bytes(self) -> int:
        """Bytes that training and evaluation share, adapter and optimizer aside."""
        return self.weights_bytes + self.process_bytes + self.allocator_bytes + self.variant_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak bytes: the largest of loading, training and evaluation."""
        loading = self.weights_bytes + self.process_bytes + self.loading_bytes
        evaluation = self.base_bytes + self.adapter_bytes + self.optimizer_bytes + self.evaluation_bytes
        return max(loading, self.training_bytes, evaluation)


def plan_memory(
    model: ModelSizes, work: TokenSizes, place: ExecutionSetup, settings: MemorySettings | None = None
) -> MemoryPlan:
    """Find the token budget that fits the free memory and the layers to recompute, and return the memory that it takes.

    Args:
        model: What the model and its adapter cost.
        work: What is run through the model.
        place: The device and its free memory.
        settings: What the recipe decides; None leaves both to be found.

    Raises:
        MachineError: Not even one example fits with every layer recomputed, or a held-out example does not fit.
    """
    settings = settings or MemorySettings()
    fixed = _fixed_bytes(model)
    overhead = overhead_of(place, model.dtype_bytes, work.num_sizes)
    to_come = overhead.expected_bytes + overhead.fragmentation_bytes
    free = free_bytes(place.device) if place.free_bytes is None else place.free_bytes
    plannable = free * PLANNABLE_FRACTION - sum(fixed.values()) - place.unpacked_bytes - to_come
    room = int(plannable / (1 + overhead.fragmentation_fraction)) - work.longest * model.layer.attention
    counts = _recomputation_counts(model, settings)
    num_recomputed = _fewest_recomputed(
        model, work, settings.token_budget or MIN_EFFICIENT_TOKENS[place.device], counts, room
    )
    if num_recomputed is None:
        needed = sum(fixed.values()) + to_come + work.longest * per_token_bytes(model, counts[-1])
        raise _does_not_fit(f"one example of {work.longest:,}", needed, free)
    if work.held_out * model.layer.forward > room:
        needed = sum(fixed.values()) + to_come + work.held_out * model.layer.forward
        raise _does_not_fit(f"one held-out example of {work.held_out:,}", needed, free)
    budget = settings.token_budget
    if budget is None:
        fitting = room // per_token_bytes(model, num_recomputed)
        budget = max(work.longest, min(MAX_USEFUL_TOKENS[place.device], fitting))
    return _total(model, work, place, overhead, token_budget=budget, num_recomputed=num_recomputed)


def _fixed_bytes(model: ModelSizes) -> dict[str, int]:
    """Return the components that do not depend on the tokens of a micro-batch, by their names in `MemoryPlan`."""
    gradient_and_weight, narrow_copy = 8, model.dtype_bytes if model.dtype_bytes < 4 else 0
    # `cross_entropy` holds a chunk's product in the base's type, its float32 copy, and the float32 gradient at once.
    chunk = model.loss_chunk_bytes
    return {
        "weights_bytes": model.weights_bytes,
        "adapter_bytes": model.trainable_parameters * (gradient_and_weight + narrow_copy),
        "optimizer_bytes": model.optimizer_bytes,
        "variant_bytes": model.variant_bytes,
        "loss_bytes": chunk * 2 + chunk * model.dtype_bytes // 4,
    }


def _recomputation_counts(model: ModelSizes, settings: MemorySettings) -> range:
    """Return the numbers of recomputed layers to try, fewest first."""
    if settings.num_recomputed is None:
        return range(model.num_layers + 1)
    wanted = min(settings.num_recomputed, model.num_layers)
    return range(wanted, wanted + 1)


def _fewest_recomputed(
    model: ModelSizes, work: TokenSizes, efficient_tokens: int, counts: range, room: int
) -> int | None:
    """Return the fewest recomputed layers with which a micro-batch fits; None if not even one example does.

    A micro-batch of `efficient_tokens` is worth recomputing for; if none fits, one that holds the longest example is
    tried.

    Args:
        model: What a token costs.
        work: The longest example and the largest step.
        efficient_tokens: Tokens below which a micro-batch is slow, or those that the recipe asks for.
        counts: The numbers of recomputed layers to try, fewest first.
        room: Bytes that are left for activations and gradients.
    """
    for tokens in (max(work.longest, min(efficient_tokens, work.largest_step)), work.longest):
        for count in counts:
            if tokens * per_token_bytes(model, count) <= room:
                return count
    return None


def _total(
    model: ModelSizes,
    work: TokenSizes,
    place: ExecutionSetup,
    overhead: Overhead,
    *,
    token_budget: int,
    num_recomputed: int,
) -> MemoryPlan:
    """Return all components for this token budget and so many recomputed layers."""
    layer, fixed = model.layer, _fixed_bytes(model)
    tokens = max(work.longest, min(token_budget, work.largest_step))
    activations = {
        count: tokens * (per_token_bytes(model, count) - layer.backward)
        for count in (0, num_recomputed, model.num_layers)
    }
    backward = tokens * layer.backward + work.longest * layer.attention + place.unpacked_bytes
    step = activations[num_recomputed] + max(backward, fixed["loss_bytes"])
    per_answer_token = generation_bytes(model, work)
    generation_tokens = min(MAX_GENERATION_TOKENS, step // per_answer_token)
    longest_answer = work.prompt + work.max_new_tokens
    answers = max(longest_answer, min(generation_tokens, work.num_prompts * longest_answer))
    held_out = max(work.held_out, min(token_budget, work.largest_step)) * layer.forward + fixed["loss_bytes"]
    fragmentation = int(overhead.fragmentation_fraction * activations[num_recomputed])
    return MemoryPlan(
        **fixed,
        activation_bytes=activations[num_recomputed],
        activation_bytes_without_recomputation=activations[0],
        activation_bytes_with_recomputation=activations[model.num_layers],
        backward_bytes=backward,
        evaluation_bytes=max(held_out if work.held_out else 0, answers * per_answer_token if work.num_prompts else 0),
        loading_bytes=place.stored_bytes if place.device == "cpu" else 0,
        allocator_bytes=fragmentation + overhead.fragmentation_bytes,
        process_bytes=overhead.present_bytes + overhead.expected_bytes,
        token_budget=token_budget,
        generation_tokens=generation_tokens,
        num_recomputed=num_recomputed,
    )


def _does_not_fit(what: str, needed: int, free: int) -> MachineError:
    return MachineError(
        f"{what} tokens needs {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free, of which a plan may use "
        f"{PLANNABLE_FRACTION:.0%}",
        fix="set a smaller data.max_length, model.dtype: bfloat16, train.recompute: auto, or use a smaller model",
    )


def wants_rehearsal(plan: MemoryPlan, device: str) -> bool:
    """Return whether the largest micro-batches should be tried before the first step.

    On a GPU always: it takes a fraction of a second, and it shows what no formula sees (fragmentation, kernels' work
    space). On a CPU a micro-batch takes seconds, so only if the plan comes close to the memory that this process can
    have.
    """
    if device != "cpu":
        return True
    return plan.peak_bytes > REHEARSAL_FRACTION * (free_bytes(device) + resident_bytes())


def per_token_bytes(model: ModelSizes, num_recomputed: int) -> int:
    """Return the bytes that one token needs in all layers together: what is saved, and one layer's gradients."""
    layer = model.layer
    saved = (model.num_layers - num_recomputed) * layer.saved_for_backward + num_recomputed * layer.input
    # The backward pass of a recomputed layer begins by running it again, which saves all its tensors for that while.
    return saved + layer.backward + (layer.saved_for_backward if num_recomputed else 0)


def generation_bytes(model: ModelSizes, work: TokenSizes) -> int:
    """Return the bytes that one token of a batch of answers needs at the widest point of generation.

    Keys and values of all layers, one of them twice while it grows (`torch.cat`), the forward pass of the prompts
    through one layer, and the token's share of its row's logits in float32, twice.
    """
    row = max(1, work.prompt + work.max_new_tokens)
    return (model.num_layers + 1) * model.layer.cache + model.layer.forward + 2 * model.row_logits_bytes // row


def resident_bytes() -> int:
    """Return the memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: str) -> int:
    """Return the memory of the device that a new process can have."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
