"""The merged model as one GGUF file, written one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    quant_shape_to_byte_shape,
    quantize,
)

from loratune.exporting.adapter_matrices import LowRank, Replaced
from loratune.exporting.gguf.architectures import GgufLayout
from loratune.exporting.gguf.tokenizer import add_tokenizer
from loratune.exporting.merge_weights import MergedWeights, check_not_quantised
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OUTTYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32
_ROPE_FACTORS = "rope_freqs.weight"
_WRITTEN_HERE = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_gguf_model(
    base: Path,
    updates: Mapping[str, LowRank],
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    *,
    outtype: str,
    name: str,
    stop_token_ids: Sequence[int],
    source: Path | None = None,
    replaced: Mapping[str, Replaced] = MappingProxyType({}),
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Write base and adapter as one GGUF file.

    Args:
        base: The base's folder.
        updates: The adapter; none for the base as it is.
        config: transformers' configuration of the base.
        tokenizer: Of training, with its template.
        file: Where to.
        outtype: A key of `OUTTYPES`, for matrices. Vectors are float32, as llama.cpp has them.
        name: `general.name`.
        stop_token_ids: What ends an answer.
        source: The GGUF file that the base was imported from; all it says about the model and its tokenizer is kept.
        replaced: Tensor name → what stands in its place.
        on_tensor: Called after each tensor.

    Raises:
        RecipeError: The architecture, its rotary positions or its tokenizer cannot be written.
        RunError: A tensor of the model has no place in llama.cpp.
    """
    check_not_quantised(base)
    layout = GgufLayout(config)
    kind, file_type = OUTTYPES[outtype]
    writer = GGUFWriter(str(file), layout.family.name)
    writer.add_file_type(file_type)
    if outtype == "q8_0":
        writer.add_quantization_version(2)
    extra: dict[str, np.ndarray[Any, Any]] = {}
    with MergedWeights(base, updates, replaced=replaced) as weights:
        if source is not None:
            extra = _keep(writer, GGUFReader(source), layout)
        else:
            writer.add_type(GGUFType.MODEL)
            writer.add_name(name)
            extra = _add_hyperparameters(writer, config, layout)
            rows = next(weights.shape(n)[0] for n in weights.names if layout.name(n) == "token_embd.weight")
            add_tokenizer(writer, tokenizer, vocab_size=rows, stop_token_ids=stop_token_ids)
        _write(writer, weights, _names(weights, layout, config), layout, kind, extra, on_tensor)


def is_quantised(file: Path) -> bool:
    """Whether a GGUF file holds weights in fewer than 16 bits."""
    plain = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
    return any(tensor.tensor_type not in plain for tensor in GGUFReader(file).tensors)


def _names(weights: MergedWeights, layout: GgufLayout, config: Any) -> dict[str, str]:
    """The model's tensor → the name in the file."""
    names = {}
    for tensor in weights.names:
        if tensor == "lm_head.weight" and config.tie_word_embeddings:
            continue  # a copy that some checkpoints keep
        name = layout.name(tensor)
        if name is None and not tensor.endswith("rotary_emb.inv_freq"):
            raise RunError(
                f"tensor {tensor} has no place in llama.cpp's {layout.family.name}", fix="`loratune merge` instead"
            )
        if name is not None:
            names[tensor] = name
    return names


def _write(
    writer: GGUFWriter,
    weights: MergedWeights,
    names: Mapping[str, str],
    layout: GgufLayout,
    kind: GGMLQuantizationType,
    extra: Mapping[str, np.ndarray[Any, Any]],
    on_tensor: Callable[[], None],
) -> None:
    """First what the file will hold, then the tensors in that order."""
    kinds = {}
    for tensor, name in names.items():
        shape = weights.shape(tensor)
        kinds[name] = _kind(shape, kind)
        stored = quant_shape_to_byte_shape(shape, kinds[name]) if kinds[name] in _AS_BYTES else tuple(shape)
        dtype = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kinds[name], np.uint8)
        size = int(np.prod(stored)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(
            name, stored, np.dtype(dtype), size, raw_dtype=kinds[name] if kinds[name] in _AS_BYTES else None
        )
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, name in names.items():
        values = layout.values(name, weights.tensor(tensor)).float().contiguous().numpy()
        writer.write_tensor_data(quantize(values, kinds[name]))
        on_tensor()
    for values in extra.values():
        writer.write_tensor_data(values)
    writer.close()


_AS_BYTES = (GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)


def _kind(shape: Sequence[int], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if wanted is GGMLQuantizationType.Q8_0 and shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def _keep(writer: GGUFWriter, reader: GGUFReader, layout: GgufLayout) -> dict[str, np.ndarray[Any, Any]]:
    """Copy all metadata of the base's own file, and the tensors that transformers computes instead of storing."""
    architecture = reader.get_field("general.architecture")
    if architecture is None or architecture.contents() != layout.family.name:
        found = architecture.contents() if architecture is not None else "nothing"
        raise RecipeError(
            f"the base's GGUF file says {found}, its configuration {layout.family.name}", fix="merge instead"
        )
    for field in reader.fields.values():
        if field.name.startswith(_WRITTEN_HERE):
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, sub_type=field.types[-1] if kind is GGUFValueType.ARRAY else None
        )
    return {tensor.name: tensor.data.astype(np.float32) for tensor in reader.tensors if tensor.name == _ROPE_FACTORS}


def _add_hyperparameters(writer: GGUFWriter, config: Any, layout: GgufLayout) -> dict[str, np.ndarray[Any, Any]]:
    """Everything llama.cpp computes with; returns the tensors that the positions need."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(_context_length(config, layout))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if layout.family.interleaved:
        writer.add_rope_dimension_count(head_dim)
    if layout.family.name in ("gemma2", "gemma3"):
        _add_gemma(writer, config, head_dim)
    return _add_positions(writer, config)


def _context_length(config: Any, layout: GgufLayout) -> int:
    """llama.cpp has no window for these families except Gemma's: beyond the window the model would be another one."""
    positions = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window is None or layout.family.name.startswith("gemma"):
        return positions
    return min(positions, int(window))


def _add_gemma(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    """The window of every second or all but every sixth layer, and Gemma 2's soft caps."""
    every = 2 if config.model_type == "gemma2" else 6
    pattern = [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != pattern:
        raise RecipeError(
            f"layer_types of this {config.model_type} is not every {every}th layer whole", fix="merge instead"
        )
    if config.query_pre_attn_scalar != head_dim:
        raise RecipeError(
            f"query_pre_attn_scalar {config.query_pre_attn_scalar} is not head_dim {head_dim}, as llama.cpp has it",
            fix="merge instead",
        )
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_positions(writer: GGUFWriter, config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Rotary positions. Llama 3 stretches each frequency by a factor of its own, which llama.cpp takes as a tensor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(config.rope_parameters)
    if "full_attention" in rope:  # Gemma 3: one rule for whole attention, another for the window
        writer.add_rope_freq_base_swa(float(rope["sliding_attention"]["rope_theta"]))
        rope = dict(rope["full_attention"])
    kind = rope.get("rope_type", "default")
    theta = float(rope["rope_theta"])
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind == "llama3":
        stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = theta ** -(torch.arange(len(stretched), dtype=torch.float64) / len(stretched))
        return {_ROPE_FACTORS: (plain / stretched.double()).float().numpy()}
    elif kind != "default":
        raise RecipeError(f"rotary positions of type {kind} are not written to GGUF", fix="merge instead")
    return {}
