"""Export a run as GGUF files, for llama.cpp or with a Modelfile for Ollama."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from gguf import GGUFReader

from loratune.exporting.certificate import QUANTIZED, ROUNDED, Target, Tolerance, Written
from loratune.exporting.gguf.adapter import read_gguf_adapter, write_gguf_adapter
from loratune.exporting.gguf.architectures import GgufLayout, layout_of
from loratune.exporting.gguf.converter import convert_lora, convert_model
from loratune.exporting.gguf.model import GgufSource, is_quantized, write_gguf_model
from loratune.exporting.gguf.quantizer import QUANTIZER_TYPES, quantize_file, types_in
from loratune.exporting.gguf.tokenizer import tokens_without_row
from loratune.exporting.load_back import LlamaCppReader, RenderPrompt, TransformersReader, has_llama_cpp
from loratune.exporting.merge_weights import MergedWeights
from loratune.exporting.ollama import TemplateParts, modelfile
from loratune.exporting.structure import gguf_differences
from loratune.exporting.vllm import write_uniform
from loratune.exporting.weights_proof import for_all, prove_adapter, prove_weights, with_base
from loratune.exporting.written_tensors import GgufTensors, rounding_in
from loratune.model.load import is_packed, stored_dtype
from loratune.model.quantization.kinds import PACKED
from loratune.run.directory import read_json
from loratune.workflows.merged_folder import (
    merged_tolerance,
    trained_values,
    write_merged_folder,
    write_trained_base,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratune.exporting.adapter_matrices import LowRank
    from loratune.exporting.certificate import Load
    from loratune.exporting.reference_outputs import ReferenceOutputs
    from loratune.run.directory import Record
    from loratune.workflows.finished import FinishedRun

DEFAULT_OUTTYPE = "f16"
"""The type of a merged GGUF model's matrices."""
_UNROUNDED = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""The run's type → the GGUF type that holds its values exactly."""

_WAY_OUT = (
    "--outtype f16 rounds less than q8_0 and q8_0 less than q4_k_m, `loratune export --to gguf` writes the adapter "
    "alone"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport:
    """GGUF files of a run: the merged model, or the adapter alone.

    Attributes:
        finished: The run.
        target: The folder's final name.
        outtype: The type of the merged model's matrices; None for the adapter alone.
        template: The chat template for Ollama; None for llama.cpp, which reads the one in the file.
        unquantized: A GGUF file of the merged model in float32 to quantize from; None writes a temporary one.
        checkout: A checkout of llama.cpp whose converter writes the files; None: loratune writes them.
    """

    finished: FinishedRun
    target: Path
    outtype: str | None
    template: TemplateParts | None
    unquantized: Path | None = None
    checkout: Path | None = None

    @property
    def file_name(self) -> str:
        return f"{self.finished.name}-{self.outtype or 'lora'}.gguf"

    @property
    def base_name(self) -> str | None:
        """The file with the base's values in training, for an adapter that was trained on a quantized base."""
        model = self.finished.prepared.recipe.model
        if self.outtype is not None or model.quantization not in PACKED:
            return None
        return f"{self.finished.name}-base-{_UNROUNDED[model.dtype]}.gguf"

    @property
    def usage(self) -> tuple[str, ...]:
        """Shell commands that use the export."""
        file, source = self.target / self.file_name, self.finished.source
        if self.template is not None:
            name = self.finished.name
            return (f"ollama create {name} -f {self.target / 'Modelfile'}", f"ollama run {name}")
        if self.outtype is not None:
            return (f"llama-cli -m {file} --jinja", f"llama-server -m {file} --jinja")
        base = self.target / self.base_name if self.base_name else source or "BASE.gguf"
        return (f"llama-cli -m {base} --lora {file} --jinja", f"llama-server -m {base} --lora {file} --jinja")

    def write(self, folder: Path) -> Written:
        """Write the files; return how to prove them."""
        finished = self.finished
        file = folder / self.file_name
        if self.outtype is not None:
            self._write_model(file, self.outtype, adapted=True)
        else:
            self._write_adapter(file)
            self._write_base(folder)
        if self.template is not None:
            stops = finished.prepared.model.tokenizer.convert_ids_to_tokens(list(finished.stops))
            here = f"./{self.file_name}"
            base = f"./{self.base_name}" if self.base_name else str(finished.source)
            model, adapter = (here, None) if self.outtype else (base, here)
            (folder / "Modelfile").write_text(modelfile(model, adapter, self.template, stops), encoding="utf-8")
        return self.read(file)

    def read(self, file: Path) -> Written:
        """Return how to prove that a GGUF file holds the run's model or adapter."""
        finished = self.finished
        layout = layout_of(finished.config)

        def load(expected: ReferenceOutputs) -> Target:
            return self._load(file, expected)

        if layout is None:
            return self._read_by_outputs(file, load)

        if self.outtype is None:
            base = self._own_base(file)

            def prove_lora() -> Record:
                adapter = prove_adapter(finished.updates, read_gguf_adapter(file, finished.config, finished.updates))
                return adapter if base is None else with_base(adapter, prove_merged(finished, self._tensors(base), {}))

            def settings() -> list[str]:
                return [] if base is None else gguf_differences(base, finished.config, layout, finished.source)

            return Written(load=load, tolerance=self._tolerance(file), prove=prove_lora, settings=settings)
        tensors = self._tensors(file)
        rounding = tensors.rounding
        # What a packed base computes in training with other weights cannot be asked: its weights cannot be replaced.
        stored = rounding is None and not is_packed(finished.config, finished.prepared.recipe.model)
        return Written(
            load=load,
            tolerance=self._tolerance(file),
            rounding=tensors.as_stored if stored else None if rounding is None else for_all(rounding),
            rounding_known=stored or rounding is not None,
            as_stored=stored,
            prove=lambda: prove_merged(finished, tensors, finished.updates),
            settings=lambda: gguf_differences(file, finished.config, layout, finished.source),
            way_out=_WAY_OUT,
        )

    def _read_by_outputs(self, file: Path, load: Load) -> Written:
        """Return how to prove a file whose tensors only llama.cpp's converter can name: by its outputs alone."""
        if self.outtype is None:
            return Written(load=load, tolerance=self._tolerance(file))
        rounding = rounding_in(GGUFReader(file).tensors)
        return Written(
            load=load,
            tolerance=self._tolerance(file),
            rounding=None if rounding is None else for_all(rounding),
            rounding_known=rounding is not None,
            way_out=_WAY_OUT,
        )

    def _tensors(self, file: Path) -> GgufTensors:
        config = self.finished.config
        return GgufTensors(file, GgufLayout(config), tied=bool(config.tie_word_embeddings))

    def _write_base(self, folder: Path) -> None:
        """Write the base of an adapter that was trained on a quantized one: no file of anybody else has its values."""
        if self.base_name is None:
            return
        model = self.finished.prepared.recipe.model
        self.finished.progress.line(
            f"the adapter was trained on a base in {model.quantization}: {self.base_name} is written beside it, the "
            f"base with the values of training, in {model.dtype}"
        )
        self._write_model(folder / self.base_name, _UNROUNDED[model.dtype], adapted=False)

    def _own_base(self, file: Path) -> Path | None:
        """Return the base that was written beside an adapter; None if it needs none, or there is none."""
        beside = file.parent / self.base_name if self.base_name else None
        return beside if beside is not None and beside.is_file() else None

    def _write_adapter(self, file: Path) -> None:
        finished = self.finished
        if self.checkout is None:
            write_gguf_adapter(finished.updates, finished.config, file, name=finished.name)
            return
        with TemporaryDirectory(dir=file.parent) as folder:
            config = read_json(finished.run.adapter / "adapter_config.json")
            write_uniform(finished.updates, config, Path(folder))
            convert_lora(self.checkout, Path(folder), finished.base, file)

    def _convert(self, file: Path, outtype: str, *, adapted: bool) -> None:
        """Have llama.cpp's converter write the model, from a temporary folder in float32."""
        finished = self.finished
        assert self.checkout is not None
        with TemporaryDirectory(dir=file.parent) as parent:
            folder = Path(parent) / finished.name
            if adapted:
                folder.mkdir()
                write_merged_folder(finished, folder, "float32")
            else:
                write_trained_base(finished, folder)
            finished.progress.line(f"llama.cpp's converter writes {file.name}")
            convert_model(self.checkout, folder, file, outtype)

    def _write_model(self, file: Path, outtype: str, *, adapted: bool) -> None:
        if outtype not in QUANTIZER_TYPES:
            self._write_unquantized(file, outtype, adapted=adapted)
            return
        if self.unquantized is not None:
            quantize_file(self.unquantized, file, outtype)
        else:
            with TemporaryDirectory(dir=file.parent) as folder:
                self._write_unquantized(Path(folder) / "float32.gguf", "f32", adapted=adapted)
                quantize_file(Path(folder) / "float32.gguf", file, outtype)
        self.finished.progress.line(f"types of the matrices in {outtype}: {types_in(file)}")

    def write_unquantized(self, file: Path) -> None:
        """Write the merged model in float32, for `unquantized`."""
        self._write_unquantized(file, "f32", adapted=True)

    def _write_unquantized(self, file: Path, outtype: str, *, adapted: bool) -> None:
        finished = self.finished
        if self.checkout is not None:
            self._convert(file, outtype, adapted=adapted)
            return
        skeleton, tokenizer = finished.prepared.model.skeleton, finished.prepared.model.tokenizer
        embeddings: Any = skeleton.get_input_embeddings()
        rows = int(embeddings.weight.shape[0])
        if finished.source is None and (beyond := tokens_without_row(tokenizer, rows)):
            finished.progress.warn(
                f"the model has only {rows:,} rows, none for {', '.join(beyond[:5])}: these are left out "
                "of the GGUF file"
            )
        source = GgufSource(
            base=finished.base,
            config=finished.config,
            tokenizer=finished.prepared.model.tokenizer,
            name=finished.name,
            stop_token_ids=finished.stops,
            updates=finished.updates if adapted else {},
            replaced=finished.replaced if adapted else {},
            frozen=trained_values(finished),
            gguf=finished.source,
        )
        write_gguf_model(source, file, outtype=outtype)

    def _load(self, file: Path, expected: ReferenceOutputs) -> Target:
        render = self.template.render if self.template is not None else None
        if has_llama_cpp():
            return self._load_with_llama_cpp(file, expected, render)
        if self.outtype is not None:
            return TransformersReader(file.parent, dtype=torch.float32, gguf_file=file.name, render=render)
        recipe = self.finished.prepared.recipe
        base = self._own_base(file)
        reader = TransformersReader(
            self.finished.base if base is None else base.parent,
            dtype=stored_dtype(self.finished.config, recipe.model),
            gguf_file=None if base is None else base.name,
            device=recipe.train.device,
            adapter=self.finished.run.adapter,
            render=render,
        )
        known = self.finished.updates
        found = read_gguf_adapter(file, self.finished.config, known)
        read_by = f"read by gguf {importlib.metadata.version('gguf')}, since llama-cpp-python is not installed"
        reader.replace_adapter({module: update for module, update in found.items() if module in known}, read_by)
        return reader

    def _load_with_llama_cpp(
        self, file: Path, expected: ReferenceOutputs, render: RenderPrompt | None
    ) -> LlamaCppReader:
        prepared = self.finished.prepared
        lengths = [len(example.input_ids) for example in expected.examples]
        lengths += [len(prompt.input_ids) + prepared.recipe.evaluate.max_new_tokens for prompt in prepared.data.prompts]
        if self.outtype is not None:
            return LlamaCppReader(file, num_tokens=max(lengths), render=render)
        beside = self._own_base(file) or (self.finished.source if self.base_name is None else None)
        if beside is not None:
            return LlamaCppReader(beside, adapter=file, num_tokens=max(lengths), render=render)
        # llama.cpp puts an adapter on a GGUF model only, and the base is none: it gets a temporary conversion of it.
        with TemporaryDirectory(dir=file.parent) as folder:
            base = Path(folder) / "base.gguf"
            self._write_model(base, _UNROUNDED[prepared.recipe.model.dtype], adapted=False)
            return LlamaCppReader(base, adapter=file, num_tokens=max(lengths), render=render)

    def _tolerance(self, file: Path) -> Tolerance:
        trained = merged_tolerance(self.finished)  # more than EXACT if training itself computed with a packed base
        if not has_llama_cpp():
            return trained
        model = file if self.outtype is not None else self._own_base(file) or self.finished.source
        quantized = model is not None and is_quantized(model)
        return QUANTIZED if quantized or trained is QUANTIZED else ROUNDED


def prove_merged(finished: FinishedRun, tensors: GgufTensors, updates: Mapping[str, LowRank]) -> Record | None:
    """Compare a file's tensors with the base's values in training and these updates."""
    replaced = finished.replaced if updates else {}
    with MergedWeights(finished.base, updates, trained_values(finished), replaced) as weights:
        return prove_weights(weights, tensors, base_name=finished.prepared.recipe.model.name)
