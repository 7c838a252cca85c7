"""What merge and export do, in order, each with a certificate.

merge       adapter into base, as a folder that transformers, vLLM and others load
export      for llama.cpp (gguf), Ollama or vLLM, as an adapter beside the base or merged
lay_out     base and adapter beside each other, for `transformers serve`
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.certificate import EXACT, QUANTISED, ROUNDED, ReferenceOutputs, Target, Tolerance
from loratune.exporting.gguf.adapter import check_plain, read_gguf_adapter, write_gguf_adapter
from loratune.exporting.gguf.architectures import GgufLayout
from loratune.exporting.gguf.model import is_quantised, write_gguf_model
from loratune.exporting.load_back import LlamaCppReader, RenderPrompt, TransformersReader, has_llama_cpp
from loratune.exporting.merge_weights import Values, copy_companions, write_merged
from loratune.exporting.ollama import Turns, modelfile, translate
from loratune.exporting.staging import check_target
from loratune.exporting.transformers_serve import check_transformers, model_folder, served_name, write_served
from loratune.exporting.vllm import check_vllm, serve_adapter, serve_merged, write_uniform
from loratune.model.adapter.attach import load_adapter
from loratune.model.device import torch_dtype
from loratune.model.load import load_model
from loratune.model.quantization.checkpoint import method_of, rounds_inputs
from loratune.model.quantization.kinds import PACKED
from loratune.model.quantization.quantize import as_multiplied, quantized_matrices, unpack_layers
from loratune.planning.parameters import skeleton
from loratune.recipe.tasks import require_text
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.workflows.certify import (
    Exported,
    FinishedRun,
    Load,
    export_with_certificate,
    merged_dtype,
    open_finished,
    recipe_of,
)
from loratune.workflows.tasks.task import task_of

NUM_ANSWERS = 20
"""Held-out prompts that llama.cpp answers, to compare with the run's own answers."""


def merge(root: str | Path, out: str | Path, *, dtype: str = "auto", progress: Progress = NO_PROGRESS) -> Exported:
    """Write base and adapter as one model.

    Args:
        root: The run directory.
        out: The folder to make.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: as in the base's files, and bfloat16 where the base was a
            quantised GGUF file.
        progress: Who is told how it goes.

    Raises:
        RecipeError: The run is not finished, its model changed, there is something at `out`, or the base is of a kind
            that cannot be merged into.
        MachineError: The disk is too small.
        RunError: The certificate fails; nothing is kept.
    """
    target = Path(out).expanduser()
    return task_of(recipe_of(root)).merge(root, target, dtype=dtype, progress=progress)


def merge_text_model(root: str | Path, target: Path, *, dtype: str, progress: Progress) -> Exported:
    """Merge a model that writes text; arguments and errors are those of `merge`."""
    finished = open_finished(root, progress)
    check_target(target, needed_bytes=_whole_bytes(finished, dtype))
    usage = (
        f"loratune chat {target}",
        serve_merged(target.absolute(), name=finished.name),
    )
    return export_with_certificate(
        finished, "merge", target, lambda folder: _write_folder(finished, folder, dtype), usage
    )


def export(
    root: str | Path,
    *,
    to: str,
    merged: bool = False,
    outtype: str | None = None,
    out: str | Path | None = None,
    num_answers: int = NUM_ANSWERS,
    progress: Progress = NO_PROGRESS,
) -> Exported:
    """Write a run for another program.

    Args:
        root: The run directory.
        to: `gguf`, `ollama` or `vllm`.
        merged: Whether the whole model is written, not the adapter alone.
        outtype: Of a merged GGUF model: `f16` (the default), `bf16` or `q8_0`.
        out: The folder to make; default `RUN/exports/TO` or `RUN/exports/TO-merged`.
        num_answers: How many held-out prompts llama.cpp answers in full.
        progress: Who is told how it goes.

    Raises:
        As `merge`; and RecipeError where the program cannot take this model or adapter.
    """
    if outtype is not None and (to == "vllm" or not merged):
        raise RecipeError(
            f"--outtype {outtype} is for merged GGUF models; an adapter is written in float32",
            fix="leave it out, or add --merged",
        )
    require_text(recipe_of(root), f"loratune export --to {to}", f"loratune merge {root} OUT, which transformers loads")
    run = RunDir.open(root)
    target = Path(out).expanduser() if out is not None else run.exports / f"{to}{'-merged' if merged else ''}"
    if target.suffix == ".gguf":
        raise RecipeError(f"--out is {target}: a folder is written", fix=f"--out {target.with_suffix('')}")
    finished = open_finished(root, progress)
    if not merged or to != "vllm":
        _check_full_base(finished, "what is exported would be put on, or merged into, the base before quantisation")
    if to == "vllm":
        check_target(target, needed_bytes=finished.base_bytes if merged else 0)
        return _export_vllm(finished, target.absolute(), merged=merged)
    layout = GgufLayout(finished.config)
    if not merged:
        check_plain(finished.updates)
        _check_matrices_alone(finished, "a GGUF adapter")
    if finished.prepared.adapter.parameters.stacks:
        _check_matrices_alone(finished, "a GGUF file made by loratune")
    if finished.prepared.model.new_tokens and finished.source is not None:
        raise RecipeError(
            "the base is a GGUF file, whose tokenizer is kept as it is, and lora.new_tokens added to it",
            file=finished.run.root,
            fix=f"loratune merge {finished.run.root} OUT, and llama.cpp's convert_hf_to_gguf.py",
        )
    turns = (
        translate(finished.prepared.model.tokenizer, finished.prepared.data.eval_conversations)
        if to == "ollama"
        else None
    )
    if turns is not None and not merged and finished.source is None:
        raise RecipeError(
            "Ollama puts a GGUF adapter on a GGUF model only, and the base of this run is no GGUF file",
            fix="add --merged",
        )
    check_target(target, needed_bytes=finished.base_bytes)
    progress.line(f"writing {layout.family.name} as {'a GGUF model' if merged else 'a GGUF adapter'}")
    files = _Gguf(finished, target.absolute(), outtype=(outtype or "f16") if merged else None, turns=turns)
    return export_with_certificate(finished, _kind(to, merged), target, files.write, files.usage(), num_answers)


def _kind(to: str, merged: bool) -> str:
    return f"{to} {'merged' if merged else 'adapter'}"


def write_served_layout(root: str | Path, target: Path, *, progress: Progress = NO_PROGRESS) -> Exported:
    """Write base and adapter as `transformers serve` loads them; the weights of the base are links.

    Raises:
        As `merge`; and RecipeError where `transformers serve` cannot load the model.
    """
    finished = open_finished(root, progress)
    _check_full_base(finished, "the server would put it on the base before quantisation")
    if finished.prepared.model.new_tokens or finished.prepared.adapter.parameters.stacks:
        _check_matrices_alone(finished, "`transformers serve`")
    architecture = check_transformers(finished.config)
    check_target(target)
    recipe = finished.prepared.recipe
    name = served_name(finished.name)

    def write(folder: Path) -> tuple[Load, Tolerance]:
        write_served(finished.base, finished.run.adapter, folder, name=name, stop_token_ids=finished.stops)

        def load(_: ReferenceOutputs) -> Target:
            return TransformersReader(
                model_folder(folder, name),
                dtype=torch_dtype(recipe.model.dtype),
                device=recipe.train.device,
                architecture=architecture,
            )

        return load, EXACT if recipe.model.dtype == "float32" else ROUNDED

    return export_with_certificate(finished, "served adapter", target, write, ())


# ---- what is written


def _write_folder(finished: FinishedRun, folder: Path, dtype: str) -> tuple[Load, Tolerance]:
    """A merged folder."""
    recipe = finished.prepared.recipe
    wanted = merged_dtype(finished.prepared, dtype)
    method = method_of(finished.config)
    finished.progress.line(
        f"merging {len(finished.updates)} matrices in float32, written in {wanted or 'the type of the base'}"
    )
    frozen = _frozen(finished)
    if frozen:
        finished.progress.line(
            f"{len(frozen)} matrices of the base are written with the values that {recipe.model.quantization} left them, since "
            "the adapter was trained on these"
        )
    if method is not None:
        wanted = wanted or torch_dtype(recipe.model.dtype)
        finished.progress.line(
            f"the base comes quantised ({method}); it is written whole, with the values that training used"
        )
    if method is not None or finished.prepared.adapter.parameters.stacks:
        _merge_by_peft(finished, folder, wanted)
    else:
        write_merged(finished.base, finished.updates, folder, dtype=wanted, frozen=frozen, replaced=finished.replaced)
    copy_companions(finished.base, finished.run.adapter, folder, finished.stops)

    def load(_: ReferenceOutputs) -> Target:
        return TransformersReader(
            folder,
            dtype="auto",
            device=recipe.train.device,
            trust_remote_code=recipe.model.trust_remote_code,
        )

    if recipe.model.quantization == "int8" or rounds_inputs(finished.config):  # to 8 bits, and no longer
        return load, QUANTISED
    own = {str(parameter) for parameter in (wanted, torch_dtype(recipe.model.dtype)) if parameter}
    exact = own == {"torch.float32"} and (wanted is not None or finished.config.dtype == torch.float32)
    return load, EXACT if exact else ROUNDED


def _whole_bytes(finished: FinishedRun, dtype: str) -> int:
    """About what a merged folder takes."""
    if method_of(finished.config) is None:
        return finished.base_bytes
    wanted = merged_dtype(finished.prepared, dtype) or torch_dtype(finished.prepared.recipe.model.dtype)
    return finished.prepared.adapter.parameters.total * wanted.itemsize


def _merge_by_peft(finished: FinishedRun, folder: Path, dtype: torch.dtype | None) -> None:
    """The whole model in memory, in float32, merged by PEFT and written by transformers, which knows how an architecture's files name
    the experts that it stacks."""
    recipe = finished.prepared.recipe
    comes_quantised = method_of(finished.config) is not None
    held = torch_dtype(recipe.model.dtype) if comes_quantised else torch.float32  # what weights are expanded to
    base: Any = load_model(finished.prepared.model.base, recipe.model, dtype=held, device="cpu")
    if comes_quantised:
        unpack_layers(base)
        base.float()
    merged: Any = load_adapter(base, finished.run.adapter).merge_and_unload()
    merged.to(dtype or finished.config.dtype or torch.float32).save_pretrained(folder)


def _frozen(finished: FinishedRun) -> dict[str, Values]:
    """What training multiplied with in the place of the base's weights: none where these were not quantised."""
    section = finished.prepared.recipe.model
    if section.quantization not in PACKED:
        return {}
    model = skeleton(finished.config, trust_remote_code=section.trust_remote_code)
    values = partial(as_multiplied, quantization=section.quantization, dtype=torch_dtype(section.dtype))
    return {name: values for name, _ in quantized_matrices(model)}


def _check_full_base(finished: FinishedRun, what: str) -> None:
    """Refuse what puts the adapter on the base as it was before quantisation: that is another model."""
    quantization = finished.prepared.recipe.model.quantization
    if quantization in PACKED:
        raise RecipeError(
            f"the adapter was trained on a base in {quantization}; {what}",
            file=finished.run.root,
            fix=f"loratune merge {finished.run.root} OUT, which writes the values that training multiplied with",
        )


def _check_matrices_alone(finished: FinishedRun, taker: str) -> None:
    """Refuse what takes A and B alone."""
    others = [*finished.replaced, *(item.name for item in finished.prepared.adapter.parameters.stacks)]
    if others:
        raise RecipeError(
            f"{taker} has no place for {others[0]}, which was trained beside the adapter",
            file=finished.run.adapter,
            fix=f"loratune merge {finished.run.root} OUT, or --merged, writes the whole model",
        )


@dataclass(frozen=True, slots=True)
class _Gguf:
    """GGUF files for llama.cpp, or with a Modelfile for Ollama.

    Attributes:
        finished: The run.
        target: The folder, by the name it will have.
        outtype: Of the merged model; None: the adapter alone.
        turns: The template for Ollama; None: llama.cpp reads the one in the file.
    """

    finished: FinishedRun
    target: Path
    outtype: str | None
    turns: Turns | None

    @property
    def file(self) -> str:
        return f"{self.finished.name}-{self.outtype or 'lora'}.gguf"

    def write(self, folder: Path) -> tuple[Load, Tolerance]:
        finished = self.finished
        file = folder / self.file
        if self.outtype is not None:
            self._model(file, finished.updates, self.outtype)
        else:
            write_gguf_adapter(finished.updates, finished.config, file, name=finished.name)
        if self.turns is not None:
            stops = finished.prepared.model.tokenizer.convert_ids_to_tokens(list(finished.stops))
            model, adapter = (f"./{self.file}", None) if self.outtype else (str(finished.source), f"./{self.file}")
            (folder / "Modelfile").write_text(modelfile(model, adapter, self.turns, stops), encoding="utf-8")
        return (lambda expected: self._load(file, expected)), self._tolerance()

    def usage(self) -> tuple[str, ...]:
        file, source = self.target / self.file, self.finished.source
        if self.turns is not None:
            name = self.finished.name
            return (f"ollama create {name} -f {self.target / 'Modelfile'}", f"ollama run {name}")
        if self.outtype is not None:
            return (f"llama-cli -m {file} --jinja", f"llama-server -m {file} --jinja")
        base = source or "BASE.gguf"
        return (f"llama-cli -m {base} --lora {file} --jinja", f"llama-server -m {base} --lora {file} --jinja")

    def _model(self, file: Path, updates: Mapping[str, LowRank], outtype: str) -> None:
        finished = self.finished
        write_gguf_model(
            finished.base,
            updates,
            finished.config,
            finished.prepared.model.tokenizer,
            file,
            outtype=outtype,
            name=finished.name,
            stop_token_ids=finished.stops,
            source=finished.source,
            replaced=finished.replaced if updates else {},
        )

    def _load(self, file: Path, expected: ReferenceOutputs) -> Target:
        render = self.turns.render if self.turns is not None else None
        if has_llama_cpp():
            return self._by_llama_cpp(file, expected, render)
        if self.outtype is not None:
            return TransformersReader(file.parent, dtype=torch.float32, gguf_file=file.name, render=render)
        recipe = self.finished.prepared.recipe
        reader = TransformersReader(
            self.finished.base,
            dtype=torch_dtype(recipe.model.dtype),
            device=recipe.train.device,
            adapter=self.finished.run.adapter,
            render=render,
        )
        reader.replace_adapter(read_gguf_adapter(file, self.finished.config, self.finished.updates))
        return reader

    def _by_llama_cpp(self, file: Path, expected: ReferenceOutputs, render: RenderPrompt | None) -> LlamaCppReader:
        prepared = self.finished.prepared
        lengths = [len(example.input_ids) for example in expected.examples]
        lengths += [len(prompt.input_ids) + prepared.recipe.evaluate.max_new_tokens for prompt in prepared.data.prompts]
        if self.outtype is not None:
            return LlamaCppReader(file, num_tokens=max(lengths), render=render)
        if self.finished.source is not None:
            return LlamaCppReader(self.finished.source, adapter=file, num_tokens=max(lengths), render=render)
        # The base is no GGUF file: llama.cpp is asked with a conversion of it that is thrown away.
        with TemporaryDirectory(dir=file.parent) as folder:
            base = Path(folder) / "base.gguf"
            self._model(base, {}, "f32" if prepared.recipe.model.dtype == "float32" else "bf16")
            return LlamaCppReader(base, adapter=file, num_tokens=max(lengths), render=render)

    def _tolerance(self) -> Tolerance:
        source = self.finished.source
        from_quantised = self.outtype is None and source is not None and is_quantised(source)
        return QUANTISED if from_quantised or self.outtype == "q8_0" else ROUNDED


def _export_vllm(finished: FinishedRun, target: Path, *, merged: bool) -> Exported:
    recipe = finished.prepared.recipe
    if merged:
        command = serve_merged(target, name=finished.name)
    else:
        _check_matrices_alone(finished, "vLLM")
        rank = check_vllm(finished.updates, finished.config)
        base = finished.prepared.model.base
        command = serve_adapter(
            base=base.name if base.revision else str(base.path),
            revision=base.revision,
            adapter=target,
            name=finished.name,
            rank=rank,
            dtype=recipe.model.dtype,
            has_template=bool(finished.prepared.model.tokenizer.chat_template),
        )

    def write(folder: Path) -> tuple[Load, Tolerance]:
        if merged:
            load, tolerance = _write_folder(finished, folder, "auto")
        else:
            load, tolerance = _copy_adapter(finished, folder)
        script = folder / "serve.sh"
        script.write_text(f"#!/bin/sh\nexec {command}\n", encoding="utf-8")
        script.chmod(0o755)
        return load, tolerance

    return export_with_certificate(finished, _kind("vllm", merged), target, write, (command,))


def _copy_adapter(finished: FinishedRun, folder: Path) -> tuple[Load, Tolerance]:
    recipe = finished.prepared.recipe
    config = read_json(finished.run.adapter / "adapter_config.json")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        write_uniform(finished.updates, config, folder)
    else:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(finished.run.adapter / name, folder / name)
    copy_companions(finished.base, finished.run.adapter, folder, finished.stops)

    def load(_: ReferenceOutputs) -> Target:
        return TransformersReader(
            finished.base,
            dtype=torch_dtype(recipe.model.dtype),
            device=recipe.train.device,
            adapter=folder,
            trust_remote_code=recipe.model.trust_remote_code,
        )

    return load, EXACT if recipe.model.dtype == "float32" else ROUNDED
