"""Export a run for MLX: the adapter as mlx-lm loads it, or a merged folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratune.exporting.certificate import Target, Written
from loratune.exporting.load_back import TransformersReader
from loratune.exporting.mlx import MlxReader, has_mlx, read_mlx_adapter, write_mlx_adapter
from loratune.exporting.older_config import lacks_older_names, write_linked_base
from loratune.exporting.weights_proof import prove_adapter, with_base
from loratune.model.load import stored_dtype
from loratune.workflows.merged_folder import (
    TRAINED_BASE,
    is_packed_run,
    merged_tolerance,
    prove_trained_base,
    write_merged_folder,
    write_trained_base,
)

if TYPE_CHECKING:
    from pathlib import Path

    from loratune.exporting.certificate import Load
    from loratune.exporting.reference_outputs import ReferenceOutputs
    from loratune.run.directory import Record
    from loratune.workflows.finished import FinishedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxExport:
    """A run for mlx-lm: the merged model, or the adapter alone.

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
        """The shell command that chats with the export."""
        if self.merged:
            return (shlex.join(["mlx_lm.chat", "--model", str(self.target)]),)
        base = self.finished.prepared.model.base
        name = base.name if base.revision else str(self.finished.base)
        if is_packed_run(self.finished) or lacks_older_names(self.finished.base):
            name = str(self.target / TRAINED_BASE)
        return (shlex.join(["mlx_lm.chat", "--model", name, "--adapter-path", str(self.target)]),)

    def write(self, folder: Path) -> Written:
        """Write the files; return how to prove them."""
        finished = self.finished
        if self.merged:
            written = write_merged_folder(finished, folder, "auto")
            return replace(written, load=lambda _: MlxReader(folder)) if has_mlx() else written
        num_layers = finished.config.get_text_config().num_hidden_layers
        write_mlx_adapter(finished.updates, num_layers, folder)
        if is_packed_run(finished):
            write_trained_base(finished, folder / TRAINED_BASE)
        elif lacks_older_names(finished.base):
            finished.progress.line(
                "mlx-lm does not read the base's rotary positions from rope_parameters: a folder with links to the "
                f"base's weights and a config.json that it reads is written beside the adapter, {TRAINED_BASE}"
            )
            write_linked_base(finished.base, finished.run.adapter, folder / TRAINED_BASE, finished.stops)
        tolerance = merged_tolerance(finished)
        return Written(load=self._loader(folder), tolerance=tolerance, prove=lambda: self._proof(folder))

    def _proof(self, folder: Path) -> Record:
        proof = prove_adapter(self.finished.updates, read_mlx_adapter(folder))
        beside = folder / TRAINED_BASE
        return with_base(proof, prove_trained_base(self.finished, beside)) if beside.is_dir() else proof

    def _loader(self, folder: Path) -> Load:
        """Return what loads the written adapter on the base: MLX, or transformers with the values read back."""
        finished, recipe = self.finished, self.finished.prepared.recipe

        def load(_: ReferenceOutputs) -> Target:
            beside = folder / TRAINED_BASE
            base = beside if beside.is_dir() else finished.base
            if has_mlx():
                return MlxReader(base, adapter=folder)
            reader = TransformersReader(
                base,
                dtype=stored_dtype(finished.config, recipe.model),
                device=recipe.train.device,
                adapter=finished.run.adapter,
                trust_remote_code=recipe.model.trust_remote_code,
            )
            reader.replace_adapter(read_mlx_adapter(folder), "mlx-lm is not installed")
            return reader

        return load
