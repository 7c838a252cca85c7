"""Export a finished run, each export with a certificate.

merge                 the adapter into the base, as a folder that transformers, vLLM and others load
export                for llama.cpp (gguf), Ollama, vLLM or MLX: the merged model, or the adapter alone
write_served_layout   base and adapter side by side, for `transformers serve`
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.exporting.adapter_matrices import read_adapter, read_replaced
from loratune.exporting.certificate import Target, Written
from loratune.exporting.gguf.adapter import check_plain
from loratune.exporting.gguf.architectures import GgufLayout, layout_of
from loratune.exporting.gguf.converter import check_checkout, check_readable
from loratune.exporting.gguf.quantizer import QUANTIZER_TYPES, check_types
from loratune.exporting.load_back import TransformersReader
from loratune.exporting.mlx import check_mlx
from loratune.exporting.ollama import translate
from loratune.exporting.staging import check_target
from loratune.exporting.transformers_serve import check_transformers, model_folder, served_name, write_served
from loratune.exporting.vllm import check_vllm, serve_merged
from loratune.exporting.weights_proof import prove_adapter, with_base
from loratune.model.load import gguf_file, stored_dtype
from loratune.model.quantization.kinds import PACKED
from loratune.recipe.tasks import require_text
from loratune.run.directory import Record, RunDir
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.run_log import RunLog
from loratune.workflows.certify import Exported, export_with_certificate
from loratune.workflows.export_gguf import DEFAULT_OUTTYPE, GgufExport
from loratune.workflows.export_mlx import MlxExport
from loratune.workflows.export_vllm import VllmExport
from loratune.workflows.finished import FinishedRun, open_finished, recipe_of
from loratune.workflows.merged_folder import (
    is_packed_run,
    merged_bytes,
    merged_tolerance,
    prove_trained_base,
    write_merged_folder,
    write_trained_base,
)
from loratune.workflows.tasks.task import task_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from loratune.exporting.reference_outputs import ReferenceOutputs

NUM_ANSWERS = 20
"""How many held-out prompts llama.cpp answers, to compare with the run's own answers."""
NUM_SCORED_ANSWERS = 200
"""The same where the answers say what a quantization costs, in points of the metric."""


def merge(root: str | Path, out: str | Path, *, dtype: str = "auto", progress: Progress = NO_PROGRESS) -> Exported:
    """Write base and adapter as one model.

    Args:
        root: The run directory.
        out: The folder to create.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: as in the base's files, and bfloat16 where the base is a
            quantized GGUF file.
        progress: The listener for progress and warnings.

    Raises:
        RecipeError: The run is not finished, its model changed, `out` exists, or adapters cannot be merged into this
            base.
        MachineError: The disk is too small.
        RunError: The certificate fails; nothing is kept.
    """
    target = Path(out).expanduser()
    run = RunDir.open(root)
    run.require_adapter()
    with RunLog(progress, run.log) as log:
        log.note(f"merge into {target}")
        exported = task_of(recipe_of(run)).merge(root, target, dtype=dtype, progress=log)
        log.note(exported.summary)
    return exported


def merge_text_model(root: str | Path, target: Path, *, dtype: str, progress: Progress) -> Exported:
    """Merge a model that writes text; arguments and errors are those of `merge`."""
    finished = open_finished(root, progress)
    check_target(target, needed_bytes=merged_bytes(finished, dtype))
    usage = (
        f"loratune chat {target}",
        serve_merged(target.absolute(), name=finished.name),
    )
    return export_with_certificate(
        finished, "merge", target, lambda folder: write_merged_folder(finished, folder, dtype), usage
    )


def export(
    root: str | Path,
    *,
    to: str | None = None,
    merged: bool = False,
    outtype: str | None = None,
    out: str | Path | None = None,
    num_answers: int | None = None,
    llama_cpp: str | Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Exported:
    """Write a run for another program.

    Args:
        root: The run directory.
        to: `gguf`, `ollama`, `vllm` or `mlx`; None for `gguf`, where the base is a GGUF file.
        merged: Whether to write the full model, not the adapter alone.
        outtype: The type of a merged GGUF model's matrices, which implies `merged`: `f16` (the default), `bf16`,
            `q8_0`, or a type of llama.cpp's quantizer such as `q4_k_m`.
        out: The folder to create; default `RUN/exports/TO` or `RUN/exports/TO-merged`.
        num_answers: How many held-out prompts llama.cpp answers in full; None for 20, and for 200 with a type of
            llama.cpp's quantizer.
        llama_cpp: A checkout of llama.cpp whose converter writes the GGUF files, also of families that loratune does
            not write; its scripts are run. None: loratune writes them.
        progress: The listener for progress and warnings.

    Raises:
        RecipeError: As for `merge`, or the program cannot load this model or adapter.
        MachineError: The disk is too small.
        RunError: The certificate fails; nothing is kept.
    """
    if num_answers is None:
        num_answers = NUM_SCORED_ANSWERS if outtype in QUANTIZER_TYPES else NUM_ANSWERS
    outtypes = [outtype] if outtype else []
    checkout = None if llama_cpp is None else Path(llama_cpp).expanduser()
    opened = open_export(root, to, merged=merged, outtypes=outtypes, out=out, checkout=checkout, progress=progress)
    with opened as (planned, kind, log):
        exported = export_with_certificate(
            planned.finished, kind, planned.target, planned.write, planned.usage, num_answers
        )
        log.note(exported.summary)
    return exported


@contextmanager
def open_export(
    root: str | Path,
    to: str | None,
    *,
    merged: bool,
    outtypes: Sequence[str],
    out: str | Path | None,
    checkout: Path | None = None,
    progress: Progress,
) -> Iterator[tuple[GgufExport | VllmExport | MlxExport, str, RunLog]]:
    """Check what is asked for, and open the run. Yield the plan of the export, what is written, and the run's log."""
    if to is None:
        to = "gguf" if gguf_file(recipe_of(root).model) is not None else None
    if to is None or (to, merged) not in _CHECKS:
        problem = f"cannot export to {to!r}" if to else "the base is not a GGUF file, so the target must be named"
        raise RecipeError(problem, fix="--to gguf, --to ollama, --to vllm or --to mlx")
    if checkout is not None and to in ("vllm", "mlx"):
        raise RecipeError(f"--llama-cpp writes GGUF files, not an export --to {to}", fix="leave it out")
    if outtypes and to in ("vllm", "mlx"):
        raise RecipeError(f"--outtype {outtypes[0]} is a type of GGUF files, not of --to {to}", fix="leave it out")
    check_types(outtypes)
    merged = merged or bool(outtypes)  # an adapter is always written in float32
    require_text(recipe_of(root), f"loratune export --to {to}", f"loratune merge {root} OUT, which transformers loads")
    run = RunDir.open(root)
    target = Path(out).expanduser() if out is not None else run.exports / f"{to}{'-merged' if merged else ''}"
    if target.suffix == ".gguf":
        raise RecipeError(f"--out is {target}, but a folder is written", fix=f"--out {target.with_suffix('')}")
    run.require_adapter()
    with RunLog(progress, run.log) as log:
        log.note(f"export for {to} into {target}")
        finished = open_finished(root, log)
        if checkout is not None:
            _check_converted(finished, checkout, merged=merged)
        for check in _CHECKS[to, merged] if checkout is None else _CONVERTED_CHECKS[to, merged]:
            check(finished)
        outtype = outtypes[0] if outtypes else None
        planned = _plan_export(finished, target.absolute(), to, merged=merged, outtype=outtype)
        needed = _needed_bytes(finished, to, outtypes, merged=merged)
        if checkout is not None:
            assert isinstance(planned, GgufExport)
            planned = replace(planned, checkout=checkout)
            needed += 4 * finished.prepared.adapter.parameters.total  # the folder that the converter reads
        check_target(target, needed_bytes=needed)
        log.line(f"exporting {'the merged model' if merged else 'the adapter'} for {to}")
        yield planned, f"{to} {'merged' if merged else 'adapter'}", log


def _needed_bytes(finished: FinishedRun, to: str, outtypes: Sequence[str], *, merged: bool) -> int:
    """Estimate the disk space of an export, in bytes."""
    if to in ("vllm", "mlx") and not merged:
        return merged_bytes(finished, finished.prepared.recipe.model.dtype) if is_packed_run(finished) else 0
    # An adapter in GGUF may need a temporary GGUF file of the base to be checked with.
    files = max(1, len(outtypes)) * finished.base_bytes
    through_float32 = 4 * finished.prepared.adapter.parameters.total
    return files + (through_float32 if any(outtype in QUANTIZER_TYPES for outtype in outtypes) else 0)


def write_served_layout(root: str | Path, target: Path, *, progress: Progress = NO_PROGRESS) -> Exported:
    """Write base and adapter as `transformers serve` loads them, with links to the base's weights.

    Raises:
        RecipeError: As for `merge`, or `transformers serve` cannot load the model.
        RunError: The certificate fails; nothing is kept.
    """
    finished = open_finished(root, progress)
    if finished.prepared.model.new_tokens or finished.prepared.adapter.parameters.stacks:
        _check_matrices_alone(finished, "`transformers serve`")
    architecture = check_transformers(finished.config)
    recipe = finished.prepared.recipe
    packed = recipe.model.quantization in PACKED
    check_target(target, needed_bytes=merged_bytes(finished, recipe.model.dtype) if packed else 0)
    name = served_name(finished.name)

    def write(folder: Path) -> Written:
        base = finished.base
        if packed:
            base = folder / "weights"
            write_trained_base(finished, base)
        write_served(base, finished.run.adapter, folder, name=name, stop_token_ids=finished.stops)
        served = model_folder(folder, name)

        def load(_: ReferenceOutputs) -> Target:
            return TransformersReader(
                served,
                dtype=stored_dtype(finished.config, recipe.model),
                device=recipe.train.device,
                architecture=architecture,
            )

        def prove() -> Record:
            adapter = prove_adapter(finished.updates, read_adapter(served), finished.replaced, read_replaced(served))
            return with_base(adapter, prove_trained_base(finished, base)) if packed else adapter

        return Written(load=load, tolerance=merged_tolerance(finished), prove=prove)

    return export_with_certificate(finished, "served adapter", target, write, ())


def _plan_export(
    finished: FinishedRun, target: Path, to: str, *, merged: bool, outtype: str | None
) -> GgufExport | VllmExport | MlxExport:
    if to == "mlx":
        return MlxExport(finished=finished, target=target, merged=merged)
    if to == "vllm":
        return VllmExport(finished=finished, target=target, merged=merged)
    prepared = finished.prepared
    return GgufExport(
        finished=finished,
        target=target,
        outtype=(outtype or DEFAULT_OUTTYPE) if merged else None,
        template=translate(prepared.model.tokenizer, prepared.data.eval_conversations) if to == "ollama" else None,
    )


def _check_matrices_alone(finished: FinishedRun, program: str) -> None:
    """Refuse what was trained in addition to the matrices A and B of linear modules."""
    others = [*finished.replaced, *(item.name for item in finished.prepared.adapter.parameters.stacks)]
    if others:
        raise RecipeError(
            f"{program} cannot hold {others[0]}, which was trained in addition to the adapter's matrices",
            file=finished.run.adapter,
            fix=f"loratune merge {finished.run.root} OUT, or --merged, writes the full model",
        )


def _check_vllm_adapter(finished: FinishedRun) -> None:
    _check_matrices_alone(finished, "vLLM")
    check_vllm(finished.updates, finished.config)


def _check_mlx_adapter(finished: FinishedRun) -> None:
    _check_matrices_alone(finished, "an adapter for mlx-lm")
    check_mlx(finished.updates)


def _check_architecture(finished: FinishedRun) -> None:
    GgufLayout(finished.config)


def _check_gguf_adapter(finished: FinishedRun) -> None:
    check_plain(finished.updates)
    _check_matrices_alone(finished, "a GGUF adapter")


def _check_gguf_model(finished: FinishedRun) -> None:
    if finished.prepared.adapter.parameters.stacks:
        _check_matrices_alone(finished, "a GGUF file written by loratune")
    if finished.prepared.model.new_tokens and finished.source is not None:
        raise RecipeError(
            "lora.new_tokens added tokens, but the base is a GGUF file, whose tokenizer is copied unchanged",
            file=finished.run.root,
            fix=f"loratune merge {finished.run.root} OUT, then llama.cpp's convert_hf_to_gguf.py",
        )


def _check_gguf_base(finished: FinishedRun) -> None:
    if finished.source is None and finished.prepared.recipe.model.quantization not in PACKED:
        raise RecipeError(
            "Ollama loads a GGUF adapter on a GGUF model only, and the base of this run is not a GGUF file",
            fix="add --merged",
        )


def _check_converted(finished: FinishedRun, checkout: Path, *, merged: bool) -> None:
    """Check that llama.cpp's converter is there, and that what it writes can be read back."""
    check_checkout(checkout, merged=merged)
    if layout_of(finished.config) is None:
        check_readable(finished.config, merged=merged)


_GGUF_MODEL = (_check_architecture, _check_gguf_model)
_GGUF_ADAPTER = (_check_architecture, _check_gguf_adapter, _check_gguf_model)
_CHECKS: Mapping[tuple[str, bool], tuple[Callable[[FinishedRun], None], ...]] = {
    ("vllm", True): (),  # a merged folder holds the values that training multiplied with
    ("vllm", False): (_check_vllm_adapter,),
    ("mlx", True): (),
    ("mlx", False): (_check_mlx_adapter,),
    ("gguf", True): _GGUF_MODEL,
    ("gguf", False): _GGUF_ADAPTER,
    ("ollama", True): _GGUF_MODEL,
    ("ollama", False): (*_GGUF_ADAPTER, _check_gguf_base),
}
"""(program, merged) → the checks that run before anything is written."""
_CONVERTED_CHECKS: Mapping[tuple[str, bool], tuple[Callable[[FinishedRun], None], ...]] = {
    ("gguf", True): (),
    ("gguf", False): (_check_gguf_adapter,),
    ("ollama", True): (),
    ("ollama", False): (_check_gguf_adapter, _check_gguf_base),
}
"""The same where llama.cpp's converter writes the files."""
