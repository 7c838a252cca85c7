"""Export a run for vLLM: the adapter or a merged folder, with the command that serves it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.exporting.adapter_matrices import read_adapter, read_replaced
from loratune.exporting.certificate import Target, Written
from loratune.exporting.load_back import TransformersReader
from loratune.exporting.merge_weights import copy_companions
from loratune.exporting.vllm import check_vllm, serve_adapter, serve_merged, write_uniform
from loratune.exporting.weights_proof import prove_adapter, with_base
from loratune.model.load import stored_dtype
from loratune.run.directory import read_json
from loratune.workflows.merged_folder import (
    TRAINED_BASE,
    base_of_training,
    is_packed_run,
    merged_tolerance,
    prove_trained_base,
    write_merged_folder,
    write_trained_base,
)

if TYPE_CHECKING:
    from pathlib import Path

    from loratune.exporting.reference_outputs import ReferenceOutputs
    from loratune.run.directory import Record
    from loratune.workflows.finished import FinishedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmExport:
    """A run for vLLM: the merged model, or the adapter alone.

    Attributes:
        finished: The run.
        target: The folder's final name.
        merged: Whether the full model is written.
    """

    finished: FinishedRun
    target: Path
    merged: bool

    @property
    def usage(self) -> tuple[str, ...]:
        """The shell command that serves the export."""
        finished = self.finished
        if self.merged:
            return (serve_merged(self.target, name=finished.name),)
        base = finished.prepared.model.base
        beside = is_packed_run(finished)
        name = str(self.target / TRAINED_BASE) if beside else base.name if base.revision else str(base.path)
        command = serve_adapter(
            base=name,
            revision=None if beside else base.revision,
            adapter=self.target,
            name=finished.name,
            rank=check_vllm(finished.updates, finished.config),
            dtype=finished.prepared.recipe.model.dtype,
            has_template=bool(finished.prepared.model.tokenizer.chat_template),
        )
        return (command,)

    def write(self, folder: Path) -> Written:
        """Write the files; return how to prove them."""
        written = write_merged_folder(self.finished, folder, "auto") if self.merged else self._copy(folder)
        script = folder / "serve.sh"
        script.write_text(f"#!/bin/sh\nexec {self.usage[0]}\n", encoding="utf-8")
        script.chmod(0o755)
        return written

    def _copy(self, folder: Path) -> Written:
        finished = self.finished
        config = read_json(finished.run.adapter / "adapter_config.json")
        if config.get("rank_pattern") or config.get("alpha_pattern"):
            write_uniform(finished.updates, config, folder)
        else:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(finished.run.adapter / name, folder / name)
        copy_companions(finished.base, finished.run.adapter, folder, finished.stops)
        if is_packed_run(finished):
            write_trained_base(finished, folder / TRAINED_BASE)
        return read_adapter_folder(finished, folder)


def read_adapter_folder(finished: FinishedRun, folder: Path) -> Written:
    """Return how to prove that a folder in PEFT's format holds the adapter of a run."""
    recipe = finished.prepared.recipe
    beside = folder / TRAINED_BASE

    def load(_: ReferenceOutputs) -> Target:
        with base_of_training(finished, beside) as base:
            return TransformersReader(
                base,
                dtype=stored_dtype(finished.config, recipe.model),
                device=recipe.train.device,
                adapter=folder,
                trust_remote_code=recipe.model.trust_remote_code,
            )

    def prove() -> Record | None:
        if finished.prepared.adapter.parameters.stacks:
            return None
        proof = prove_adapter(finished.updates, read_adapter(folder), finished.replaced, read_replaced(folder))
        return with_base(proof, prove_trained_base(finished, beside)) if beside.is_dir() else proof

    return Written(load=load, tolerance=merged_tolerance(finished), prove=prove)
