"""What the memory of a run is computed from: sizes of model, examples and machine, and the recipe's settings.

`cost.run_memory` fills these records from a recipe; `memory.plan_memory` turns them into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """What one token costs in one layer.

    Attributes:
        saved_for_backward: Bytes alive between the forward and the backward pass.
        input: Bytes of the layer's input, all that a recomputed layer keeps.
        forward: Bytes alive at the widest point of a forward pass without gradients.
        backward: Bytes of gradients alive at the widest point of the backward pass.
        cache: Bytes of keys and values that generation keeps.
        attention: Bytes of a token's keys in one block of attention during the backward pass; 0 in flash attention.
    """

    saved_for_backward: int
    input: int
    forward: int
    backward: int
    cache: int
    attention: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What a model and its adapter cost, however many tokens they see.

    Attributes:
        weights_bytes: Bytes of the frozen base, as the device holds it.
        trainable_parameters: Trained parameters: the adapter's, and those of modules trained in full.
        optimizer_bytes: Bytes of the optimizer's state (`optimizer.state_bytes`).
        variant_bytes: Bytes of the LoRA variant and of modules trained in full (`adapter`).
        layer: What a token costs in one layer.
        num_layers: Layers of the model.
        dtype_bytes: Bytes of one frozen weight before quantization, and of one activation.
        loss_chunk_bytes: Bytes in float32 of the logits that the loss computes at a time.
        row_logits_bytes: Bytes in float32 of the logits of one position.
    """

    weights_bytes: int
    trainable_parameters: int
    optimizer_bytes: int
    variant_bytes: int
    layer: LayerBytes
    num_layers: int
    dtype_bytes: int
    loss_chunk_bytes: int
    row_logits_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSizes:
    """The sizes of what is run through the model, in tokens.

    Attributes:
        longest: The longest training example: the least that a micro-batch must hold.
        largest_step: The largest step: the most that a micro-batch can hold.
        num_sizes: How many different numbers of tokens the steps of an epoch have.
        held_out: The longest held-out example; 0 if there is none.
        prompt: The longest prompt to be answered; 0 if there is none.
        num_prompts: How many prompts are answered.
        max_new_tokens: The longest answer.
        padded: Whether a micro-batch's examples are padded to its longest and run through the model's own forward,
            as encoders do.
    """

    longest: int
    largest_step: int
    num_sizes: int = 1
    held_out: int = 0
    prompt: int = 0
    num_prompts: int = 0
    max_new_tokens: int = 0
    padded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionSetup:
    """The device that a run computes on, and how the base lies on it.

    Attributes:
        device: cpu, cuda or mps.
        dtype: Name of the type of the frozen weights.
        compiled: Whether the layers run compiled.
        stored_bytes: Bytes of the weights' files if they are converted on loading; 0 if they are mapped as they are.
        resident_bytes: Memory of this process now, with libraries and data.
        free_bytes: Free memory of the device; None for what is free on this machine.
        weights_bytes: Bytes of a quantized base; None if each parameter is a number of type `dtype`.
        unpacked_bytes: Bytes of quantized weights that are unpacked at a time, to be multiplied.
        quantization: The recipe's `model.quantization`, or the kind of weights that are stored quantized.
        shards: Ranks that the frozen base is sharded over; 1 if each holds all of it.
    """

    device: str
    dtype: str
    compiled: bool
    stored_bytes: int = 0
    resident_bytes: int = 0
    free_bytes: int | None = None
    weights_bytes: int | None = None
    unpacked_bytes: int = 0
    quantization: str = "none"
    shards: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """The settings of a recipe that trade memory for speed.

    Attributes:
        token_budget: Tokens of a micro-batch; None for as many as fit and help.
        num_recomputed: Layers that are recomputed in the backward pass; None for as few as possible.
    """

    token_budget: int | None = None
    num_recomputed: int | None = None
