"""Export a run as GGUF files, for llama.cpp or with a Modelfile for Ollama."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from loratune.exporting.certificate import EXACT, QUANTIZED, ROUNDED, Target, Tolerance, Written
from loratune.exporting.gguf.adapter import read_gguf_adapter, write_gguf_adapter
from loratune.exporting.gguf.architectures import GgufLayout
from loratune.exporting.gguf.model import GgufSource, is_quantized, write_gguf_model
from loratune.exporting.gguf.tokenizer import tokens_without_row
from loratune.exporting.load_back import LlamaCppReader, RenderPrompt, TransformersReader, has_llama_cpp
from loratune.exporting.merge_weights import MergedWeights
from loratune.exporting.ollama import TemplateParts, modelfile
from loratune.exporting.structure import gguf_differences
from loratune.exporting.weights_proof import prove_adapter, prove_weights
from loratune.exporting.written_tensors import GgufTensors, gguf_rounding
from loratune.model.load import stored_dtype

if TYPE_CHECKING:
    from loratune.exporting.reference_outputs import ReferenceOutputs
    from loratune.run.directory import Record
    from loratune.workflows.finished import FinishedRun

DEFAULT_OUTTYPE = "f16"
"""The type of a merged GGUF model's matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport:
    """GGUF files of a run: the merged model, or the adapter alone.

    Attributes:
        finished: The run.
        target: The folder's final name.
        outtype: The type of the merged model's matrices; None for the adapter alone.
        template: The chat template for Ollama; None for llama.cpp, which reads the one in the file.
    """

    finished: FinishedRun
    target: Path
    outtype: str | None
    template: TemplateParts | None

    @property
    def file_name(self) -> str:
        return f"{self.finished.name}-{self.outtype or 'lora'}.gguf"

    @property
    def usage(self) -> tuple[str, ...]:
        """Shell commands that use the export."""
        file, source = self.target / self.file_name, self.finished.source
        if self.template is not None:
            name = self.finished.name
            return (f"ollama create {name} -f {self.target / 'Modelfile'}", f"ollama run {name}")
        if self.outtype is not None:
            return (f"llama-cli -m {file} --jinja", f"llama-server -m {file} --jinja")
        base = source or "BASE.gguf"
        return (f"llama-cli -m {base} --lora {file} --jinja", f"llama-server -m {base} --lora {file} --jinja")

    def write(self, folder: Path) -> Written:
        """Write the files; return how to prove them."""
        finished = self.finished
        file = folder / self.file_name
        if self.outtype is not None:
            self._write_model(file, self.outtype, adapted=True)
        else:
            write_gguf_adapter(finished.updates, finished.config, file, name=finished.name)
        if self.template is not None:
            stops = finished.prepared.model.tokenizer.convert_ids_to_tokens(list(finished.stops))
            here = f"./{self.file_name}"
            model, adapter = (here, None) if self.outtype else (str(finished.source), here)
            (folder / "Modelfile").write_text(modelfile(model, adapter, self.template, stops), encoding="utf-8")
        return self.read(file)

    def read(self, file: Path) -> Written:
        """Return how to prove that a GGUF file holds the run's model or adapter."""
        finished = self.finished
        layout = GgufLayout(finished.config)

        def load(expected: ReferenceOutputs) -> Target:
            return self._load(file, expected)

        if self.outtype is None:

            def prove_lora() -> Record:
                return prove_adapter(finished.updates, read_gguf_adapter(file, finished.config, finished.updates))

            return Written(load=load, tolerance=self._tolerance(), prove=prove_lora)
        tied = bool(finished.config.tie_word_embeddings)
        tensors = GgufTensors(file, layout, tied=tied)

        def prove() -> Record | None:
            with MergedWeights(finished.base, finished.updates, replaced=finished.replaced) as weights:
                return prove_weights(weights, tensors, base_name=finished.prepared.recipe.model.name)

        rounding = None if tensors.kind is None else gguf_rounding(tensors.kind)
        return Written(
            load=load,
            tolerance=self._tolerance(),
            rounding=rounding,
            rounding_known=rounding is not None,
            prove=prove,
            settings=lambda: gguf_differences(file, finished.config, layout, finished.source),
            way_out="--outtype f16 rounds less than q8_0, `loratune export --to gguf` writes the adapter alone",
        )

    def _write_model(self, file: Path, outtype: str, *, adapted: bool) -> None:
        finished = self.finished
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
        reader = TransformersReader(
            self.finished.base,
            dtype=stored_dtype(self.finished.config, recipe.model),
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
        if self.finished.source is not None:
            return LlamaCppReader(self.finished.source, adapter=file, num_tokens=max(lengths), render=render)
        # llama.cpp puts an adapter on a GGUF model only, and the base is none: it gets a temporary conversion of it.
        with TemporaryDirectory(dir=file.parent) as folder:
            base = Path(folder) / "base.gguf"
            self._write_model(base, "f32" if prepared.recipe.model.dtype == "float32" else "bf16", adapted=False)
            return LlamaCppReader(base, adapter=file, num_tokens=max(lengths), render=render)

    def _tolerance(self) -> Tolerance:
        if not has_llama_cpp():
            return EXACT
        source = self.finished.source
        from_quantized = self.outtype is None and source is not None and is_quantized(source)
        return QUANTIZED if from_quantized or self.outtype == "q8_0" else ROUNDED
