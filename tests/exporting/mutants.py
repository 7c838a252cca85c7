"""Exports that are wrong, each in one way: what a certificate must never call the same model.

`python -m tests.exporting.mutants [RUN …]` prints the tables of docs/results/certificate.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.gguf.model import kind_of_shape
from loratune.exporting.load_back import has_llama_cpp
from loratune.recipe.recipe import Recipe
from loratune.run.directory import Record
from loratune.run.progress import NoProgress
from loratune.workflows.certify import certificate_of
from loratune.workflows.export_gguf import GgufExport
from loratune.workflows.finished import FinishedRun, open_finished
from loratune.workflows.merged_folder import read_merged_folder, write_merged_folder
from loratune.workflows.tiny_model import TEMPLATE, conversation, write_tiny_model
from loratune.workflows.train import train

TYPES = (
    *("float32", "bfloat16", "float16", "gguf f16", "gguf bf16", "gguf q8_0", "gguf q4_0"),
    *(("gguf q4_k_m",) if has_llama_cpp() else ()),
)
"""What an export is written as: a merged folder, or a GGUF file. q4_0 is written in float32 and then quantized, as
`llama-quantize --pure` does; q4_k_m by llama.cpp's quantizer."""
LENGTHS: dict[str, dict[str, float]] = {
    "6 steps at 1e-6": {"epochs": 2, "learning_rate": 1e-6},
    "6 steps at 5e-5": {"epochs": 2, "learning_rate": 5e-5},
    "6 steps at 1e-3": {"epochs": 2, "learning_rate": 1e-3},
    "36 steps at 1e-2": {"epochs": 12, "learning_rate": 1e-2},
}
"""Run → its settings, shortest first."""

Updates = dict[str, LowRank]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One way in which an export can be wrong.

    Attributes:
        updates: Changes the adapter that is merged.
        base: Writes another base's weights into a folder that has a copy of the base; None keeps the base.
        folder: Changes a merged folder after it was written.
        gguf: Changes metadata of a GGUF file: key → value.
    """

    updates: Callable[[Updates], Updates] = dict
    base: Callable[[Path], None] | None = None
    folder: Callable[[Path], None] = lambda _: None
    gguf: dict[str, Any] | None = None


def _scaled(factor: float) -> Callable[[Updates], Updates]:
    return lambda updates: {name: replace(update, b=update.b * factor) for name, update in updates.items()}


def _without_first_layer(updates: Updates) -> Updates:
    return {name: update for name, update in updates.items() if ".layers.0." not in name}


def _swapped_layers(updates: Updates) -> Updates:
    other = {".layers.0.": ".layers.1.", ".layers.1.": ".layers.0."}
    return {name: updates[_replace(name, other)] for name in updates}


def _replace(name: str, names: dict[str, str]) -> str:
    found = next(part for part in names if part in name)
    return name.replace(found, names[found])


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _noise(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensors[name] = (tensor.float() + 0.02 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def _attention_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name: tensor / 2 for name, tensor in tensors.items() if "q_proj" in name}


def _setting(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def _rope(folder: Path) -> None:
    _setting(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})(folder)


def _template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", "<|im_end|> "))


def _stop_lost(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 5}))


def _untied(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = (embedding.float() * 1.05).to(embedding.dtype)

    _edit(folder, change)
    _setting(tie_word_embeddings=False)(folder)


MUTANTS: dict[str, Mutant] = {
    "adapter dropped": Mutant(updates=_scaled(0)),
    "adapter halved": Mutant(updates=_scaled(0.5)),
    "one layer left out": Mutant(updates=_without_first_layer),
    "two layers swapped": Mutant(updates=_swapped_layers),
    "another base": Mutant(base=lambda folder: _edit(folder, _noise)),
    "another template": Mutant(folder=_template, gguf={"tokenizer.chat_template": "<|im_end|> "}),
    "a stop token lost": Mutant(folder=_stop_lost, gguf={"tokenizer.ggml.eos_token_id": 5}),
    "attention scale": Mutant(base=lambda folder: _edit(folder, _attention_scale)),
    "rotary positions": Mutant(folder=_rope, gguf={"llama.rope.freq_base": 5000.0}),
    "embeddings untied": Mutant(folder=_untied, gguf={}),
}
"""Name → what is wrong."""
ONLY_FOLDERS = ("embeddings untied",)
"""Mutants that loratune's GGUF writer has no way to write."""


def _tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of bytes with one merge, since a GGUF file needs some: small, so that files load at once."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate([*letters, "is"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("i", "s")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def finished(folder: Path, length: str, dtype: str) -> FinishedRun:
    """Train a tiny model for so long, and open the run."""
    base = folder / "base"
    if not base.exists():
        write_tiny_model(base, _tokenizer())
        _edit(base, lambda tensors: tensors.update({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}))
        _setting(dtype=dtype)(base)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(20)))
    (folder / "eval.jsonl").write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(100, 106)))
    run = folder / length.replace(" ", "-")
    if not run.exists():
        train(
            Recipe.parse(
                {
                    "model": {"name": str(base), "dtype": "float32"},
                    "data": {"train": str(data), "eval": str(folder / "eval.jsonl")},
                    "lora": {"dropout": 0.0, "r": 4, "targets": "complete"},
                    "train": {
                        "output_dir": str(run),
                        "batch_size": 8,
                        "device": "cpu",
                        "compile": False,
                        "save_every": "never",
                        "eval_every": "never",
                        **LENGTHS[length],
                    },
                    "evaluate": {"metric": "none"},
                }
            )
        )
    return open_finished(run, NoProgress())


def verdict(run: FinishedRun, mutant: Mutant, kind: str) -> Record:
    """Write a wrong export of a run, and return its certificate."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wrong = replace(run, updates=mutant.updates(dict(run.updates)))
        if mutant.base is not None:
            other = folder / "other"
            other.mkdir()
            for file in run.base.iterdir():
                (other / file.name).write_bytes(file.read_bytes())
            mutant.base(other)
            wrong = replace(wrong, base=other)
        out = folder / "out"
        out.mkdir()
        if not kind.startswith("gguf "):
            write_merged_folder(wrong, out, kind)
            mutant.folder(out)
            return certificate_of(run, read_merged_folder(run, out), stops_required=True, num_answers=0)
        by_others = kind == "gguf q4_0"
        outtype = "f32" if by_others else kind.removeprefix("gguf ")
        GgufExport(finished=wrong, target=out, outtype=outtype, template=None).write(out)
        (file,) = out.glob("*.gguf")
        if mutant.gguf or by_others:
            _rewrite(file, mutant.gguf or {}, GGMLQuantizationType.Q4_0 if by_others else None)
        written = GgufExport(finished=run, target=out, outtype=outtype, template=None).read(file)
        return certificate_of(run, written, stops_required=True, num_answers=0)


def _rewrite(file: Path, changes: dict[str, Any], quantized: GGMLQuantizationType | None) -> None:
    """Write a GGUF file again with other metadata, and its matrices of another type.

    A chat template gets the text added to its end tokens.
    """
    reader = GGUFReader(file)
    writer = GGUFWriter(str(file.with_suffix(".new")), reader.get_field("general.architecture").contents())
    for entry in reader.fields.values():
        if entry.name.startswith(("GGUF.", "general.architecture")):
            continue
        value = entry.contents()
        if entry.name in changes:
            new = changes[entry.name]
            value = value.replace("<|im_end|>", new) if isinstance(value, str) else new
        kind = entry.types[0]
        writer.add_key_value(entry.name, value, kind, sub_type=entry.types[-1] if kind is GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        own = tensor.tensor_type if quantized is None else kind_of_shape(tensor.data.shape, quantized)
        data = tensor.data.copy() if own == tensor.tensor_type else quantize(tensor.data, own)
        writer.add_tensor(tensor.name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").rename(file)


def cases() -> Iterator[tuple[str, str]]:
    """Yield the pairs of mutant and type that can be written."""
    for name in MUTANTS:
        for kind in TYPES:
            if not (kind.startswith("gguf ") and name in ONLY_FOLDERS):
                yield name, kind


def table(folder: Path, lengths: Iterable[str], dtype: str) -> Iterator[str]:
    """Yield the lines of the tables of verdicts, one a run."""
    for length in lengths:
        run = finished(folder, length, dtype)
        yield f"\n### {length}, base in {dtype}\n"
        yield f"| | {' | '.join(TYPES)} |"
        yield f"|---{'|---' * len(TYPES)}|"
        for name, mutant in {"right": Mutant(), **MUTANTS}.items():
            cells = []
            for kind in TYPES:
                if kind.startswith("gguf ") and name in ONLY_FOLDERS:
                    cells.append("–")
                    continue
                record = verdict(run, mutant, kind)
                weights, found = record["weights"], record["distributions"]
                details = ""
                if name == "right":
                    details = f" ({weights['kept']:.0%} kept, {found['mean_kl']:.1g} vs. {found['base_kl']:.1g})"
                cells.append(record["verdict"] + details)
            yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as temporary:
            for line in table(Path(temporary), sys.argv[1:] or LENGTHS, dtype):
                print(line, flush=True)  # noqa: T201
