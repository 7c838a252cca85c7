"""How much memory a run takes at its peak; the token budget that fits, and how many layers must recompute for it.

The terms, for a model with LoRA:

    weights      parameters × bytes of the base type
    variant      what DoRA, PiSSA or OLoRA take beside, and modules that are trained whole (`adapter_memory`)
    adapter      trainable × 8 for float32 weight and gradient, and a copy in the base type where that is narrower
    optimizer    what it keeps from step to step (`optimizer_memory`): 8 bytes a trainable parameter for AdamW
    activations  tokens of a micro-batch × what each layer keeps for its backward pass
    working      the larger of: chunks of logits (`loss`), one layer's gradients on the way back (`backward`)
    evaluation   takes the place of activations and working: one layer without gradients, chunks of logits, the cache of keys
                 and values of generation
    loading      beside the weights: the file's own bytes, where they are of another type
    allocator    the holes in its heap: a share of the activations, and what steps of many sizes leave behind
    process      Python, torch and the libraries themselves, and the data; a GPU's context

    peak = weights + process + max(loading, variant + adapter + optimizer + max(activations + working, evaluation) + allocator)

Each formula states its source and error where it stands; `docs/results/memory.md` has predicted beside measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from loratune.model.adapter.targets import Matrix
from loratune.model.kernels.block_attention import BLOCK_QUERIES
from loratune.planning.memory.adapter import kept_bytes
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import MachineError

CONTEXT_BYTES = {"cuda": 600 * 2**20, "mps": 600 * 2**20}
"""Of a GPU before any weight is loaded: its context and the libraries' code. Estimates."""

TRAINER_BYTES = 72 * 2**20
"""What the trainer's libraries add to a process that has planned: 411 → 483 MiB resident."""

RUNNING_BYTES = 40 * 2**20
"""What torch's own code and caches add when it runs: 520 → 556 MiB resident in a process that had loaded SmolLM2-135M."""

COMPILER_BYTES = 105 * 2**20
"""What stays of compiling in the process: 384 → 482 MiB of its own, after the first step, eager and compiled."""

HEAP_OVERHEAD_FRACTION = {"narrow": 0.3, "float32": 0.15, "compiled": 0.05}
"""What glibc's heap adds to the activations on a CPU. Tensors of many sizes come and go in it, those of 2 MiB and more aligned to
that for large pages, and it does not shrink. Eager steps in 16 bits mix most sizes, since norms compute in float32."""

HEAP_BYTES = 100 * 2**20
"""What it adds in eager 16-bit steps whatever their size."""

SIZES_BYTES = 270 * 2**20
"""What steps of ever new sizes leave behind besides: holes of tensors of other sizes, and oneDNN's caches of prepared products. The
quickstart grew by that until its 28th step, in either type, eager and compiled."""

FULL_SIZES = 28
"""The different sizes of steps from which on it does not grow."""

GPU_ALLOCATOR_SHARE = 0.05
"""The same of a GPU's caching allocator. An estimate."""

MAX_USEFUL_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Tokens beyond which a larger micro-batch is no faster. On two CPU cores micro-batches of 790, 1,530 and 3,010 tokens ran
at 285 to 297, 279 to 320 and 282 to 308 tokens/s. Those of GPUs are estimates."""

MIN_EFFICIENT_TOKENS = {"cpu": 512, "cuda": 4096, "mps": 2048}
"""Tokens for which layers are rather recomputed than the micro-batch made smaller. Estimates."""

GENERATION_TOKENS = 16_384
"""The most tokens of a batch of answers, however much memory there is."""

PLANNABLE_FRACTION = 0.8
"""The part of the free memory that a plan may use; the rest is for what no formula sees."""


REHEARSAL_FRACTION = 0.6
"""The part of the memory from which on a plan on a CPU is tried before it is trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """What one token costs in one decoder layer.

    Attributes:
        saved_for_backward: Bytes alive between forward and backward.
        input: Bytes of the layer's input, all that a recomputed layer keeps.
        forward: Bytes alive at the widest place of a forward without gradients.
        backward: Bytes of gradients alive at the widest place of the way back.
        cache: Bytes of keys and values that generation keeps.
        attention: Bytes of a token's keys in one block of attention on the way back, on a CPU.
    """

    saved_for_backward: int
    input: int
    forward: int
    backward: int
    cache: int
    attention: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by component, and the token budget and recomputed layers they were computed for.

    Attributes:
        weights_bytes: The frozen base.
        adapter_bytes: The adapter's weights, gradients, and copies in the base type.
        optimizer_bytes: What it keeps from step to step.
        activation_bytes: What the layers keep for the way back.
        activation_bytes_without_recomputation: The same if every layer kept everything.
        activation_bytes_with_recomputation: The same if every layer kept its input only.
        backward_bytes: One layer on the way back.
        loss_bytes: Chunks of logits.
        evaluation_bytes: Of the held-out loss or of the answers, whichever takes more.
        loading_bytes: Beside the weights while they load.
        variant_bytes: What `lora.variant` takes while it trains, and modules that are trained whole.
        allocator_bytes: Holes in the allocator's heap.
        process_bytes: Before any weight is loaded.
        token_budget: Tokens of a micro-batch.
        generation_tokens: The most tokens of a batch of answers, prompts included, that takes no more than training.
        num_recomputed: Layers that keep their input only.
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
        """Beside what is kept: logits, or one layer's gradients; they are never alive together."""
        return max(self.loss_bytes, self.backward_bytes)

    @property
    def training_bytes(self) -> int:
        """All that is alive at the peak of a step."""
        return self.adapter_bytes + self.optimizer_bytes + self.activation_bytes + self.working_bytes + self.base_bytes

    @property
    def base_bytes(self) -> int:
        """What is there whatever is done."""
        return self.weights_bytes + self.process_bytes + self.allocator_bytes + self.variant_bytes

    @property
    def peak_bytes(self) -> int:
        """Of loading, training and evaluation, whichever takes the most."""
        loading = self.weights_bytes + self.process_bytes + self.loading_bytes
        evaluation = self.base_bytes + self.adapter_bytes + self.optimizer_bytes + self.evaluation_bytes
        return max(loading, self.training_bytes, evaluation)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSizes:
    """The sizes of what is run through the model, in tokens.

    Attributes:
        longest: The longest training example: the least that a micro-batch must hold.
        largest_step: The largest step: the most that a micro-batch can hold.
        num_sizes: How many different numbers of tokens the steps of an epoch have.
        held_out: The longest held-out example; 0 where there is none.
        prompt: The longest prompt that is answered; 0 where none is.
        num_prompts: How many are answered.
        max_new_tokens: The longest answer.
        padded: Whether a micro-batch's examples are padded to its longest and run through the model's own forward, as those of encoders.
    """

    longest: int
    largest_step: int
    num_sizes: int = 1
    held_out: int = 0
    prompt: int = 0
    num_prompts: int = 0
    max_new_tokens: int = 0
    padded: bool = False


def layer_bytes(
    config: Any,
    dtype_bytes: int,
    adapted: Sequence[Matrix],
    *,
    lora: LoraSection,
    compiled: bool,
    device: str = "cpu",
    keeps_inputs: bool = False,
    whole_kept: int = 0,
) -> LayerBytes:
    """Bytes that one token costs in one decoder layer, for a Llama-like one with a gated feed-forward.

    Kept: the two norms keep their input in float32; attention keeps query, key and value; the feed-forward keeps gate, its
    activation, and up; adapted matrices keep what `kept_bytes` says. Compiled, the norms' inputs stay in the base type and the
    activation is recomputed. Frozen matrices keep nothing. On a GPU, attention keeps its output and a number a head as well
    (Dao 2023, arXiv 2307.08691). Counted with `saved_tensors_hooks` on SmolLM2-135M (balanced and complete, with dropout and
    without, float32 and bfloat16), the formula is within 1 % eager and 0 to 5 % high compiled.

    Alive for a moment: forward, four tensors of the feed-forward's width beside the residual and its float32 norm; backward,
    three of them and the gradient to the layer (10.5 kB a token measured for SmolLM2-135M in bfloat16, 10.4 computed), and
    scores, probabilities and both gradients of one block of queries over an example's keys.

    Args:
        config: The model's text configuration.
        dtype_bytes: Bytes of one frozen weight.
        adapted: The adapted matrices of the whole model.
        lora: Rank, dropout and variant.
        compiled: Whether the layers run compiled.
        device: cpu, cuda or mps.
        keeps_inputs: Whether frozen matrices keep their inputs too, as int8 layers of bitsandbytes do.
        whole_kept: What modules that are trained whole keep, in the whole model.
    """
    hidden = config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 1  # Mamba has none
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query = heads * head_dim
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    if isinstance(feed_forward, list | tuple):  # of each layer, as in Gemma 3n
        feed_forward = max(feed_forward)
    if getattr(config, "num_experts_per_tok", None):
        feed_forward = config.num_experts_per_tok * (getattr(config, "moe_intermediate_size", None) or feed_forward)
    norms = 2 * hidden * (dtype_bytes if compiled else 4)
    body = norms + dtype_bytes * (query + 2 * key_value + feed_forward * (2 if compiled else 3))
    if device != "cpu":
        body += dtype_bytes * query + 4 * heads
    per_layer = 1 / config.num_hidden_layers
    adapters = whole_kept + kept_bytes(adapted, lora, dtype_bytes, inputs=not keeps_inputs)
    if keeps_inputs:
        body += dtype_bytes * (2 * hidden + query + feed_forward)
    return LayerBytes(
        saved_for_backward=int(body + adapters * per_layer),
        input=hidden * dtype_bytes,
        forward=dtype_bytes * (4 * feed_forward + hidden) + 4 * hidden,
        backward=dtype_bytes * (3 * feed_forward + hidden),
        cache=dtype_bytes * 2 * key_value,
        attention=4 * dtype_bytes * heads * BLOCK_QUERIES if device == "cpu" else 0,
    )


def plan_memory(
    *,
    total_parameters: int,
    trainable_parameters: int,
    optimizer_bytes: int,
    stored_bytes: int,
    layer: LayerBytes,
    num_layers: int,
    dtype_bytes: int,
    device: str,
    compiled: bool,
    loss_chunk_bytes: int,
    row_logits_bytes: int,
    work: TokenSizes,
    wanted_budget: int | None,
    wanted_recomputed: int | None,
    resident: int,
    free: int | None = None,
    variant_bytes: int = 0,
    weights_bytes: int | None = None,
    unpacked_bytes: int = 0,
) -> MemoryPlan:
    """The token budget that fits the free memory, the layers to recompute, and the memory that it takes.

    Args:
        total_parameters: Of base and adapter.
        trainable_parameters: Of the adapter.
        optimizer_bytes: From `optimizer_memory`.
        stored_bytes: Of the weights' files where they must be converted to be loaded; 0 where they are mapped as they are.
        layer: What a token costs in one layer.
        num_layers: Decoder layers.
        dtype_bytes: Bytes of one frozen weight.
        device: cpu, cuda or mps.
        compiled: Whether the layers run compiled.
        loss_chunk_bytes: Bytes of one chunk of logits in float32.
        row_logits_bytes: Bytes of the logits of one position in float32.
        work: What is run through the model.
        wanted_budget: The recipe's own, or None for auto.
        wanted_recomputed: The recipe's own, or None for auto.
        resident: Bytes of this process now, with libraries and data.
        free: Bytes of a device that is not here; None for what is free on this machine.
        variant_bytes: From `adapter_memory`.
        weights_bytes: Of a quantised base; None: `dtype_bytes` a parameter.
        unpacked_bytes: Of quantised weights while they are multiplied.

    Raises:
        MachineError: Not even one example fits, with every layer recomputed; or a held-out one does not.
    """
    process, to_come = process_bytes(device, resident, compiled=compiled)
    fixed = {
        "weights_bytes": (total_parameters - trainable_parameters) * dtype_bytes
        if weights_bytes is None
        else weights_bytes,
        "adapter_bytes": trainable_parameters * (8 + (dtype_bytes if dtype_bytes < 4 else 0)),
        "optimizer_bytes": optimizer_bytes,
        "variant_bytes": variant_bytes,
        "loss_bytes": loss_chunk_bytes * 2 + loss_chunk_bytes * dtype_bytes // 4,
    }
    share, holes = allocator(device, dtype_bytes, work.num_sizes, compiled=compiled)
    to_come += holes
    longest = work.longest
    free = free_bytes(device) if free is None else free
    room = (
        int((free * PLANNABLE_FRACTION - sum(fixed.values()) - unpacked_bytes - to_come) / (1 + share))
        - longest * layer.attention
    )
    least = max(longest, min(wanted_budget or MIN_EFFICIENT_TOKENS[device], work.largest_step))
    counts = range(num_layers + 1) if wanted_recomputed is None else (min(wanted_recomputed, num_layers),)
    fitting = [n for n in counts if least * per_token_bytes(layer, num_layers, n) <= room]
    if not fitting:
        least = longest
        fitting = [n for n in counts if least * per_token_bytes(layer, num_layers, n) <= room]
    if not fitting:
        needed = sum(fixed.values()) + to_come + longest * per_token_bytes(layer, num_layers, counts[-1])
        raise _does_not_fit(f"one example of {longest:,}", needed, free)
    if work.held_out * layer.forward > room:
        needed = sum(fixed.values()) + to_come + work.held_out * layer.forward
        raise _does_not_fit(f"one held-out example of {work.held_out:,}", needed, free)
    num_recomputed = fitting[0]
    per_token = per_token_bytes(layer, num_layers, num_recomputed)
    budget = (
        wanted_budget if wanted_budget is not None else max(longest, min(MAX_USEFUL_TOKENS[device], room // per_token))
    )
    tokens = max(longest, min(budget, work.largest_step))
    kept = {
        n: tokens * (per_token_bytes(layer, num_layers, n) - layer.backward) for n in (0, num_recomputed, num_layers)
    }
    backward = tokens * layer.backward + longest * layer.attention + unpacked_bytes
    step = kept[num_recomputed] + max(backward, fixed["loss_bytes"])
    per_answer_token = generation_bytes(layer, num_layers, row_logits_bytes, work)
    generation_tokens = min(GENERATION_TOKENS, step // per_answer_token)
    answers = max(
        work.prompt + work.max_new_tokens,
        min(generation_tokens, work.num_prompts * (work.prompt + work.max_new_tokens)),
    )
    held_out = max(work.held_out, min(budget, work.largest_step)) * layer.forward + fixed["loss_bytes"]
    return MemoryPlan(
        **fixed,
        activation_bytes=kept[num_recomputed],
        activation_bytes_without_recomputation=kept[0],
        activation_bytes_with_recomputation=kept[num_layers],
        backward_bytes=backward,
        evaluation_bytes=max(held_out if work.held_out else 0, answers * per_answer_token if work.num_prompts else 0),
        loading_bytes=stored_bytes if device == "cpu" else 0,
        allocator_bytes=int(share * kept[num_recomputed]) + holes,
        process_bytes=process + to_come - holes,
        token_budget=budget,
        generation_tokens=generation_tokens,
        num_recomputed=num_recomputed,
    )


def _does_not_fit(what: str, needed: int, free: int) -> MachineError:
    return MachineError(
        f"{what} tokens needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free, of which {PLANNABLE_FRACTION:.0%} may be "
        "planned with",
        fix="set a smaller data.max_length, model.dtype: bfloat16, train.recompute: auto, or use a smaller model",
    )


def wants_rehearsal(plan: MemoryPlan, device: str) -> bool:
    """Whether the largest micro-batches should be tried before the first step.

    On a GPU always: it takes a fraction of a second, and what no formula sees (fragments, kernels' work space) is seen. On a
    CPU a micro-batch takes seconds, so only where the plan comes close to the memory that this process can have.
    """
    if device != "cpu":
        return True
    return plan.peak_bytes > REHEARSAL_FRACTION * (free_bytes(device) + psutil.Process().memory_info().rss)


def per_token_bytes(layer: LayerBytes, num_layers: int, num_recomputed: int) -> int:
    """Bytes that one token needs in all layers: what is kept, and the gradients of the layer under way. Where layers are
    recomputed, one of them is there as a whole."""
    kept = (num_layers - num_recomputed) * layer.saved_for_backward + num_recomputed * layer.input
    return kept + layer.backward + (layer.saved_for_backward if num_recomputed else 0)


def allocator(device: str, dtype_bytes: int, num_sizes: int, *, compiled: bool) -> tuple[float, int]:
    """Bytes that the allocator adds to a byte of activations, and those that it adds anyway.

    Args:
        device: cpu, cuda or mps.
        dtype_bytes: Bytes of one frozen weight.
        num_sizes: Different numbers of tokens that the steps have.
        compiled: Whether the layers run compiled.
    """
    if device != "cpu":
        return GPU_ALLOCATOR_SHARE, 0
    sizes = SIZES_BYTES * min(num_sizes, FULL_SIZES) // FULL_SIZES
    kind = "compiled" if compiled else "float32" if dtype_bytes == 4 else "narrow"
    return HEAP_OVERHEAD_FRACTION[kind], sizes + (HEAP_BYTES if kind == "narrow" else 0)


def generation_bytes(layer: LayerBytes, num_layers: int, row_logits_bytes: int, work: TokenSizes) -> int:
    """Bytes that one token of a batch of answers needs at its widest: keys and values of all layers, one of them once more
    while it grows (`torch.cat`), the forward of the prompts through one layer, and the row's share of its logits in float32,
    twice."""
    row = max(1, work.prompt + work.max_new_tokens)
    return (num_layers + 1) * layer.cache + layer.forward + 2 * row_logits_bytes // row


def process_bytes(device: str, resident: int, *, compiled: bool) -> tuple[int, int]:
    """What is there before training of other things than tensors: now, and what is still to come.

    On a CPU the first is measured, since libraries and data are there when the plan is made.
    """
    if device != "cpu":
        return 0, CONTEXT_BYTES[device]
    to_come = RUNNING_BYTES + (COMPILER_BYTES if compiled else 0)
    if "trl" not in sys.modules:
        to_come += TRAINER_BYTES
    return resident, to_come


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: str) -> int:
    """Memory of the device that a new process can have."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
