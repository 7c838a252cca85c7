"""Export a run for vLLM: the adapter or a merged folder, with the command that serves it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratune.exporting.certificate import EXACT, ROUNDED, Load, ReferenceOutputs, Target, Tolerance
from loratune.exporting.load_back import TransformersReader
from loratune.exporting.merge_weights import copy_companions
from loratune.exporting.vllm import check_vllm, serve_adapter, serve_merged, write_uniform
from loratune.model.device import torch_dtype
from loratune.run.directory import read_json
from loratune.workflows.merged_folder import write_merged_folder

if TYPE_CHECKING:
    from pathlib import Path

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
        command = serve_adapter(
            base=base.name if base.revision else str(base.path),
            revision=base.revision,
            adapter=self.target,
            name=finished.name,
            rank=check_vllm(finished.updates, finished.config),
            dtype=finished.prepared.recipe.model.dtype,
            has_template=bool(finished.prepared.model.tokenizer.chat_template),
        )
        return (command,)

    def write(self, folder: Path) -> tuple[Load, Tolerance]:
        """Write the files; return how to load them back, and how far they may differ from training."""
        load, tolerance = write_merged_folder(self.finished, folder, "auto") if self.merged else self._copy(folder)
        script = folder / "serve.sh"
        script.write_text(f"#!/bin/sh\nexec {self.usage[0]}\n", encoding="utf-8")
        script.chmod(0o755)
        return load, tolerance

    def _copy(self, folder: Path) -> tuple[Load, Tolerance]:
        finished = self.finished
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
