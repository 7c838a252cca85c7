"""Times one decoder layer and the output head of a model on this machine, on random weights, in a second or two.

Two layers of the model's own shape, with its adapter, dropout, type and attention, run through the code that training
uses. So element-wise work, attention and small products count with their time here, not with a fraction that was
measured elsewhere. Called by `estimate`, which hands the `LayerTimings` to `speed.plan_time`; `plan --probe` runs real
steps instead (`workflows.plan`).
"""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from loratune.model.adapter.attach import attach_adapter, use_fast_layers
from loratune.model.adapter.patterns import matching_only
from loratune.model.adapter.targets import resolve_targets
from loratune.model.device import is_out_of_memory
from loratune.model.kernels.attention import PACKED, PackingUnsupportedError, register
from loratune.model.kernels.cross_entropy import Head, chunk_rows, cross_entropy_per_token, sum_cross_entropy
from loratune.planning.speed import LayerTimings, best_seconds
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel

    from loratune.recipe.recipe import LoraSection, Variant

LAYERS = 2
"""Layers of the timed model."""

TOKENS = 512
"""Tokens of the timed micro-batch, or one example if that is longer."""

_PROBED: dict[str, Variant] = {"eva": "plain", "loftq": "plain"}
"""Variants that compute like another one, but start from data or files that the probe does not have."""

MAX_BYTES = 2**30
"""The most bytes of the two layers' weights; larger layers are not timed."""

_KNOWN: dict[tuple[Any, ...], LayerTimings] = {}
"""What was timed in this process, since the plan before a run, the run and the trials of a sweep ask for the same."""

MAX_HEAD_ROWS = 32_768
"""The most rows of the vocabulary that are timed; the time is scaled up to the full vocabulary."""

MAX_HEAD_POSITIONS = 2048
"""The most positions of a chunk that are timed: with a tiny vocabulary, a chunk has tens of thousands."""


def probe(
    config: Any,
    lora: LoraSection,
    targets: tuple[str, ...],
    *,
    layer_parameters: int,
    dtype: torch.dtype,
    device: str,
    length: int,
    num_answers: int,
) -> LayerTimings | None:
    """Time a layer and the head; return None if two layers cannot represent this architecture, or are too large.

    Args:
        config: The model's text configuration.
        lora: The recipe's LoRA section.
        targets: Full names of the adapted modules.
        layer_parameters: Frozen parameters of one layer.
        dtype: Type of the frozen weights.
        device: cpu, cuda or mps.
        length: Tokens of a typical example.
        num_answers: Answers of a batch.
    """
    if LAYERS * layer_parameters * dtype.itemsize > MAX_BYTES:
        return None
    leaves = tuple(sorted({name.rpartition(".")[2] for name in targets}))
    model = (config.to_json_string(use_diff=False), lora.model_dump_json(), leaves, dtype)
    key = (*model, device, torch.get_num_threads(), length, num_answers)
    timings = _KNOWN.get(key)
    if timings is None:
        timings = _time_layers(config, lora, leaves, dtype, device=device, length=length, num_answers=num_answers)
        if timings is not None:
            _KNOWN[key] = timings
    return timings


def _time_layers(
    config: Any,
    lora: LoraSection,
    leaves: tuple[str, ...],
    dtype: torch.dtype,
    *,
    device: str,
    length: int,
    num_answers: int,
) -> LayerTimings | None:
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            model = _two_layers(config, dtype).to(device)
            names = resolve_targets(model, leaves)
            own = matching_only(lora, names).model_copy(
                update={
                    "modules_to_save": (),
                    "new_tokens": (),
                    "layers": "all",
                    "variant": _PROBED.get(lora.variant, lora.variant),
                }
            )
            adapted = attach_adapter(model, own, names, base_name="probe", seed=0)
            decode = _decode_seconds(adapted, num_answers, device)
            train, forward = _layer_seconds(adapted, length, device)
            head = _head_seconds(config.vocab_size, config.hidden_size, num_answers, dtype, device)
    # The architecture's authors may not have expected a configuration of two layers; the run itself does not depend on
    # it. RecipeError: if layers differ in kind, the two may lack some of the adapted modules.
    except (
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        AssertionError,
        PackingUnsupportedError,
        RecipeError,
    ):
        return None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return LayerTimings(train=train, forward=forward, decode=decode, **head)


def _two_layers(config: Any, dtype: torch.dtype) -> Any:
    small = copy.deepcopy(config)
    small.num_hidden_layers = LAYERS
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:LAYERS]
    small.vocab_size = 256  # the head is timed separately
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    return AutoModelForCausalLM.from_config(small, dtype=dtype)  # type: ignore[no-untyped-call]


def _layer_seconds(adapted: PeftModel, length: int, device: str) -> tuple[float, float]:
    """Return the seconds of a token in one layer: forward and backward, and forward alone without gradients."""
    use_fast_layers(adapted)
    register()
    causal_lm: Any = adapted.get_base_model()
    causal_lm.set_attn_implementation(PACKED)
    # In every layer but the first the input gets a gradient.
    causal_lm.get_input_embeddings().register_forward_hook(_with_gradient)
    count = max(1, TOKENS // length)
    tokens = count * length
    batch = {
        "input_ids": torch.randint(0, 256, (1, tokens), device=device),
        "position_ids": torch.arange(length, device=device).repeat(count)[None],
        "cu_seq_lens_q": torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device),
        "max_length_q": length,
        "use_cache": False,
    }
    batch |= {"cu_seq_lens_k": torch.arange(0, tokens + 1, length, dtype=torch.int32), "max_length_k": length}

    def train() -> None:
        causal_lm.base_model(**batch)[0].sum().backward()

    def forward() -> None:
        with torch.no_grad():
            causal_lm.base_model(**batch)

    adapted.train()
    trained = best_seconds(train, device)
    adapted.eval()
    return trained / tokens / LAYERS, best_seconds(forward, device) / tokens / LAYERS


def _with_gradient(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 - torch's
    return output.requires_grad_()


def _decode_seconds(adapted: PeftModel, num_answers: int, device: str) -> float:
    """Return the seconds in one layer of one more token for all answers of a batch."""
    adapted.eval()
    causal_lm: Any = adapted.get_base_model()
    rows = max(1, num_answers)
    ids = torch.zeros((rows, 64), dtype=torch.long, device=device)
    with torch.no_grad():
        cache = causal_lm(input_ids=ids[:1], use_cache=True).past_key_values
        if all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
            cache.batch_repeat_interleave(rows)
        else:
            cache = causal_lm(input_ids=ids, use_cache=True).past_key_values
        step: Callable[[], Any] = lambda: causal_lm(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)  # noqa: E731
        return best_seconds(step, device) / LAYERS


@cache  # the trials of a sweep and the plan before a run time the same head
def _head_seconds(
    vocab_size: int, hidden_size: int, num_answers: int, dtype: torch.dtype, device: str
) -> dict[str, float]:
    rows = min(vocab_size, MAX_HEAD_ROWS)
    share, positions = vocab_size / rows, min(chunk_rows(vocab_size, device), MAX_HEAD_POSITIONS)
    weight = torch.randn(rows, hidden_size, dtype=dtype, device=device) / 32
    hidden = torch.randn(positions, hidden_size, dtype=dtype, device=device)
    targets = torch.zeros(positions, dtype=torch.long, device=device)
    answers = torch.randn(max(1, num_answers), hidden_size, dtype=dtype, device=device)
    return {
        "head_train": share
        * best_seconds(lambda: sum_cross_entropy(hidden, Head(weight), targets), device)
        / positions,
        "head_forward": share
        * best_seconds(lambda: cross_entropy_per_token(hidden, Head(weight), targets), device)
        / positions,
        "head_decode": share * best_seconds(lambda: torch.nn.functional.linear(answers, weight).float(), device),
    }
