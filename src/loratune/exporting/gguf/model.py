"""Write a merged model as one GGUF file, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
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

from loratune.exporting.gguf.architectures import GgufLayout
from loratune.exporting.gguf.tokenizer import add_tokenizer
from loratune.exporting.merge_weights import MergedWeights, check_not_quantized
from loratune.model.gguf_config import ROPE_FACTORS, gemma_attention_scalar
from loratune.run.errors import RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from loratune.exporting.adapter_matrices import LowRank, Replaced
    from loratune.exporting.merge_weights import Values

OUTTYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32
_WRITTEN_HERE = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """The parts that a GGUF model is written from.

    Attributes:
        base: The base's folder.
        config: transformers' configuration of the base.
        tokenizer: The tokenizer of training, with its template.
        name: The value of `general.name` in the file.
        stop_token_ids: The tokens that end an answer.
        updates: Module name → the adapter's low-rank update; empty for the base unchanged.
        replaced: Tensor name → the values that replace it.
        frozen: Module name → its weight's values in training, where these differ from the base's files.
        gguf: The GGUF file that the base was imported from, whose metadata and tokenizer are copied; None for any other
            base.
    """

    base: Path
    config: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    stop_token_ids: Sequence[int]
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    replaced: Mapping[str, Replaced] = field(default_factory=dict)
    frozen: Mapping[str, Values] = field(default_factory=dict)
    gguf: Path | None = None


def write_gguf_model(source: GgufSource, file: Path, *, outtype: str) -> None:
    """Write base and adapter as one GGUF file.

    Args:
        source: The parts of the model.
        file: The file to write.
        outtype: The type of matrices, a key of `OUTTYPES`. Vectors are float32, as llama.cpp requires.

    Raises:
        RecipeError: The architecture, its rotary positions or its tokenizer cannot be written.
        RunError: llama.cpp has no tensor for one of the model's.
    """
    check_not_quantized(source.base)
    layout = GgufLayout(source.config)
    kind, file_type = OUTTYPES[outtype]
    writer = GGUFWriter(str(file), layout.family.name)
    writer.add_file_type(file_type)
    if outtype == "q8_0":
        writer.add_quantization_version(2)
    extra: dict[str, np.ndarray[Any, Any]] = {}
    with MergedWeights(source.base, source.updates, source.frozen, source.replaced) as weights:
        if source.gguf is not None:
            extra = _copy_metadata(writer, GGUFReader(source.gguf), layout)
        else:
            writer.add_type(GGUFType.MODEL)
            writer.add_name(source.name)
            extra = add_hyperparameters(writer, source.config, layout)
            rows = next(weights.shape(n)[0] for n in weights.names if layout.name(n) == "token_embd.weight")
            writer.add_vocab_size(rows)
            add_tokenizer(writer, source.tokenizer, vocab_size=rows, stop_token_ids=source.stop_token_ids)
        _write(writer, weights, _names(weights, layout, source.config), layout, kind, extra)


def is_quantized(file: Path) -> bool:
    """Return whether a GGUF file stores weights in fewer than 16 bits."""
    unquantized = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
    return any(tensor.tensor_type not in unquantized for tensor in GGUFReader(file).tensors)


def _names(weights: MergedWeights, layout: GgufLayout, config: Any) -> dict[str, str]:
    """Return the name in the file of each of the model's tensors."""
    names = {}
    for tensor in weights.names:
        if tensor == "lm_head.weight" and config.tie_word_embeddings:
            continue  # a copy of the tied embedding, which some checkpoints keep
        name = layout.name(tensor)
        if name is None and not tensor.endswith("rotary_emb.inv_freq"):
            raise RunError(f"llama.cpp's {layout.family.name} has no tensor for {tensor}", fix="use `loratune merge`")
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
) -> None:
    """Write the list of all tensors, then the tensors in that order."""
    kinds = {}
    for tensor, name in names.items():
        shape = weights.shape(tensor)
        kinds[name] = kind_of_shape(shape, kind)
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
    for values in extra.values():
        writer.write_tensor_data(values)
    writer.close()


_AS_BYTES = (GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)


def kind_of_shape(shape: Sequence[int], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if wanted is GGMLQuantizationType.Q8_0 and shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def _copy_metadata(writer: GGUFWriter, reader: GGUFReader, layout: GgufLayout) -> dict[str, np.ndarray[Any, Any]]:
    """Copy all metadata of the base's own file; return its tensors that transformers computes instead of storing."""
    architecture = reader.get_field("general.architecture")
    if architecture is None or architecture.contents() != layout.family.name:
        found = architecture.contents() if architecture is not None else "nothing"
        raise RecipeError(
            f"the base's GGUF file says {found}, its configuration {layout.family.name}", fix="use `loratune merge`"
        )
    for entry in reader.fields.values():
        if entry.name.startswith(_WRITTEN_HERE):
            continue
        kind = entry.types[0]
        writer.add_key_value(
            entry.name, entry.contents(), kind, sub_type=entry.types[-1] if kind is GGUFValueType.ARRAY else None
        )
    return {tensor.name: tensor.data.astype(np.float32) for tensor in reader.tensors if tensor.name == ROPE_FACTORS}


def add_hyperparameters(writer: GGUFWriter, config: Any, layout: GgufLayout) -> dict[str, np.ndarray[Any, Any]]:
    """Write the model's hyperparameters; return the tensors that its rotary positions need."""
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
    if layout.family.interleaved:
        writer.add_rope_dimension_count(head_dim)
    if layout.family.name in ("gemma2", "gemma3"):
        _add_gemma(writer, config, head_dim)
    return _add_positions(writer, config)


def _context_length(config: Any, layout: GgufLayout) -> int:
    """Return the longest context that llama.cpp computes correctly."""
    # llama.cpp has a sliding window for Gemma only; with other families it would attend to more than the model does.
    positions = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window is None or layout.family.name.startswith("gemma"):
        return positions
    return min(positions, int(window))


def _add_gemma(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    """Write Gemma's sliding window (in every second layer, or in all but every sixth) and soft caps."""
    every = 2 if config.model_type == "gemma2" else 6
    pattern = [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != pattern:
        raise RecipeError(
            f"this {config.model_type} does not have full attention in every {every}th layer, as llama.cpp assumes",
            fix="use `loratune merge`",
        )
    computed = gemma_attention_scalar(
        "gemma2" if config.model_type == "gemma2" else "gemma3",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        head_dim,
    )
    if config.query_pre_attn_scalar != computed:
        raise RecipeError(
            f"query_pre_attn_scalar {config.query_pre_attn_scalar} is not {computed:g}, as llama.cpp assumes",
            fix="use `loratune merge`",
        )
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_positions(writer: GGUFWriter, config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Write the rotary positions; return Llama 3's factor of each frequency, which llama.cpp reads as a tensor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(config.rope_parameters)
    if "full_attention" in rope:  # Gemma 3: one rule for full attention, another for the window
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
        return {ROPE_FACTORS: (plain / stretched.double()).float().numpy()}
    elif kind != "default":
        raise RecipeError(
            f"loratune does not write rotary positions of type {kind} to GGUF", fix="use `loratune merge`"
        )
    return {}
