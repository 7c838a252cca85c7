"""What merge and export do, in order: every way out of a run ends with a certificate, or with nothing.

merge       adapter into base, as a folder that transformers, vLLM and others load
export      for llama.cpp (gguf), Ollama or vLLM, as an adapter beside the base or merged

Each writes under a temporary name, loads that back with the code that will serve it, compares it with the adapter on its
base in training's own code, and only then gives it its name.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loratune.data.render import stop_token_ids
from loratune.errors import DataError, RecipeError, RunError
from loratune.evaluation.scoring import score
from loratune.lock import differences
from loratune.model.adapter import load_adapter
from loratune.model.device import device_here, torch_dtype
from loratune.model.load import download_weights, gguf_file, load_config, load_model
from loratune.preparation import Preparation, prepare
from loratune.progress import Progress, Silent
from loratune.recipe import Recipe
from loratune.run import Record, RunDir, read_json, write_json
from loratune.shipping.families import GgufLayout
from loratune.shipping.gguf_adapter import check_plain, read_gguf_adapter, write_gguf_adapter
from loratune.shipping.gguf_model import is_quantised, write_gguf_model
from loratune.shipping.lowrank import LowRank, read_adapter
from loratune.shipping.merge import DTYPES, check_not_quantised, copy_companions, weight_files, write_merged
from loratune.shipping.ollama import Turns, modelfile, translate
from loratune.shipping.parity import (
    EXACT,
    QUANTISED,
    ROUNDED,
    Expected,
    Target,
    Tolerance,
    certify,
    choose_examples,
    choose_questions,
    expect,
    summary,
)
from loratune.shipping.readers import LlamaCppReader, Render, TransformersReader, has_llama_cpp
from loratune.shipping.staging import check_target, staged
from loratune.shipping.vllm import check_vllm, serve_adapter, serve_merged
from loratune.training.loss import make_loss

_NOBODY = Silent()
NUM_ANSWERS = 20
"""Held-out prompts that llama.cpp answers, to compare with the run's own answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What was written.

    Attributes:
        folder: Where.
        certificate: `parity.json`.
        usage: Commands that use it.
    """

    folder: Path
    certificate: Record
    usage: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The certificate in one line."""
        return summary(self.certificate)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finished:
    """A finished run, and what it was trained on."""

    run: RunDir
    prepared: Preparation
    base: Path
    config: Any
    updates: Mapping[str, LowRank]
    stops: tuple[int, ...]
    source: Path | None
    progress: Progress

    @property
    def name(self) -> str:
        return self.run.root.name

    @property
    def base_bytes(self) -> int:
        return sum((self.base / file).stat().st_size for file in weight_files(self.base))


def merge(root: str | Path, out: str | Path, *, dtype: str = "auto", progress: Progress = _NOBODY) -> Delivery:
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
    finished = _open(root, progress)
    check_target(target, needed_bytes=finished.base_bytes)
    usage = (
        f"loratune chat {target}",
        serve_merged(target.absolute(), name=finished.name),
    )
    return _deliver(finished, "merge", target, lambda folder: _write_folder(finished, folder, dtype), usage)


def export(
    root: str | Path,
    *,
    to: str,
    merged: bool = False,
    outtype: str | None = None,
    out: str | Path | None = None,
    num_answers: int = NUM_ANSWERS,
    progress: Progress = _NOBODY,
) -> Delivery:
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
    run = RunDir.open(root)
    target = Path(out).expanduser() if out is not None else run.root / "exports" / f"{to}{'-merged' if merged else ''}"
    if target.suffix == ".gguf":
        raise RecipeError(f"--out is {target}: a folder is written", fix=f"--out {target.with_suffix('')}")
    finished = _open(root, progress)
    if to == "vllm":
        check_target(target, needed_bytes=finished.base_bytes if merged else 0)
        return _export_vllm(finished, target.absolute(), merged=merged)
    layout = GgufLayout(finished.config)
    if not merged:
        check_plain(finished.updates)
    turns = (
        translate(finished.prepared.tokenizer, finished.prepared.data.eval_conversations) if to == "ollama" else None
    )
    if turns is not None and not merged and finished.source is None:
        raise RecipeError(
            "Ollama puts a GGUF adapter on a GGUF model only, and the base of this run is no GGUF file",
            fix="add --merged",
        )
    check_target(target, needed_bytes=finished.base_bytes)
    progress.line(f"writing {layout.family.name} as {'a GGUF model' if merged else 'a GGUF adapter'}")
    files = _Gguf(finished, target.absolute(), outtype=(outtype or "f16") if merged else None, turns=turns)
    return _deliver(finished, _kind(to, merged), target, files.write, files.usage(), num_answers)


# ---- the run


def _open(root: str | Path, progress: Progress) -> _Finished:
    run = RunDir.open(root)
    if not run.is_finished:
        raise RecipeError("the run has no adapter yet", file=run.root, fix=f"`loratune resume {root}`")
    lock = read_json(run.lock)
    recipe = Recipe.parse(lock["recipe"], file=run.lock)
    here = recipe.train.model_copy(update={"device": device_here(recipe.train.device)})
    recipe = recipe.model_copy(update={"train": here})
    prepared = prepare(recipe, progress)
    now = prepared.as_lock()
    known = lock["inputs"]["model"]
    now["inputs"]["model"] = {name: value for name, value in now["inputs"]["model"].items() if name in known}
    changed = differences(lock, now, keys=("model", "template"))
    if changed:
        raise RecipeError(
            f"changed since the run: {', '.join(changed)}", file=run.lock, fix="restore the base model, or train anew"
        )
    return _Finished(
        run=run,
        prepared=prepared,
        base=download_weights(prepared.base),
        config=load_config(prepared.base, recipe.model),
        updates=read_adapter(run.adapter),
        stops=stop_token_ids(prepared.tokenizer),
        source=gguf_file(recipe.model),
        progress=progress,
    )


def _expect(finished: _Finished) -> Expected:
    """What the adapter on its base says, in training's own code. The model is gone afterwards."""
    prepared = finished.prepared
    recipe = prepared.recipe
    held_out = choose_examples(prepared.data.eval or prepared.data.train)
    base = load_model(prepared.base, recipe.model, dtype=torch_dtype(recipe.model.dtype), device=recipe.train.device)
    model = load_adapter(base, finished.run.adapter)
    loss, _ = make_loss(model, prepared.data.train)
    model.eval()
    questions = choose_questions(prepared.data.eval_conversations, prepared.tokenizer)
    with finished.progress.task("asking the adapter on its base", len(held_out), "examples") as task:
        return expect(loss, held_out, questions, prepared.tokenizer, task.advance)


_Load = Callable[[Expected], Target]
"""Loads back what was written; told what will be asked."""


def _deliver(
    finished: _Finished,
    kind: str,
    target: Path,
    write: Callable[[Path], tuple[_Load, Tolerance]],
    usage: tuple[str, ...],
    num_answers: int = 0,
) -> Delivery:
    """Write, load back, compare, and only then give it its name."""
    with staged(target) as folder:
        load, tolerance = write(folder)
        certificate = _certificate(finished, load, tolerance, whole="adapter" not in kind, num_answers=num_answers)
        certificate = {"kind": kind, "run": str(finished.run.root), "path": str(target.absolute()), **certificate}
        write_json(folder / "parity.json", certificate)
        if not certificate["passed"]:
            raise RunError(
                f"what was written is not the model that was trained: {'; '.join(certificate['complaints'])}",
                file=target,
                fix="nothing was kept; serve base and adapter with PEFT, and report this as a bug of loratune",
            )
    missing = certificate["stop_tokens"]["missing"]
    if missing:
        texts = ", ".join(finished.prepared.tokenizer.convert_ids_to_tokens(missing))
        finished.progress.warn(
            f"the base does not end answers at {texts}, as training does: tell your server to stop there"
        )
    _record(finished.run, certificate)
    return Delivery(folder=target.absolute(), certificate=certificate, usage=usage)


def _certificate(finished: _Finished, load: _Load, tolerance: Tolerance, *, whole: bool, num_answers: int) -> Record:
    """Ask training, then what was written: one model in memory at a time."""
    expected = _expect(finished)
    gc.collect()
    reader = load(expected)
    with finished.progress.task("asking what was written", len(expected.examples), "examples") as task:
        certificate = certify(expected, reader, tolerance, stops_required=whole, progress=task.advance)
    certificate["compared_on"] = "held-out" if finished.prepared.data.eval else "training"
    if isinstance(reader, LlamaCppReader):
        certificate["answers"] = _compare_answers(finished, reader, num_answers)
        reader.close()
    return certificate


def _compare_answers(finished: _Finished, reader: LlamaCppReader, limit: int) -> Record | None:
    """The run's own greedy answers to held-out prompts, against llama.cpp's; None where the run has none."""
    run, tokenizer = finished.run, finished.prepared.tokenizer
    recipe = finished.prepared.recipe
    items = read_json(run.evaluation)["items"][:limit] if run.evaluation.is_file() else []
    if not items:
        return None
    same_text = same = 0
    with finished.progress.task("answering", len(items), "prompts") as task:
        for item in items:
            ids = tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]
            text = str(tokenizer.decode(reader.answer(ids, recipe.evaluate.max_new_tokens)))
            wanted = item["tuned"]["text"]
            same_text += text == wanted
            same += text == wanted or _same_by_metric(recipe.evaluate.metric, text, wanted)
            task.advance()
    return {"num_prompts": len(items), "same_text": same_text, "same_by_metric": same, "metric": recipe.evaluate.metric}


def _same_by_metric(metric: str, text: str, wanted: str) -> bool:
    try:
        return bool(score(metric, text, wanted))
    except DataError:  # the answer to compare with is no JSON
        return False


def _record(run: RunDir, certificate: Record) -> None:
    """The run's own list of certificates, the newest of each place."""
    others = [
        other
        for other in (read_json(run.parity) if run.parity.is_file() else [])
        if other["path"] != certificate["path"]
    ]
    write_json(run.parity, [*others, certificate])


def _kind(to: str, merged: bool) -> str:
    return f"{to} {'merged' if merged else 'adapter'}"


# ---- what is written


def _write_folder(finished: _Finished, folder: Path, dtype: str) -> tuple[_Load, Tolerance]:
    """A merged folder."""
    recipe = finished.prepared.recipe
    wanted = _merged_dtype(finished, dtype)
    check_not_quantised(finished.base)
    finished.progress.line(
        f"merging {len(finished.updates)} matrices in float32, written in {wanted or 'the type of the base'}"
    )
    write_merged(finished.base, finished.updates, folder, dtype=wanted)
    copy_companions(finished.base, finished.run.adapter, folder, finished.stops)

    def load(_: Expected) -> Target:
        return TransformersReader(
            folder,
            dtype="auto",
            device=recipe.train.device,
            trust_remote_code=recipe.model.trust_remote_code,
        )

    own = {str(parameter) for parameter in (wanted, torch_dtype(recipe.model.dtype)) if parameter}
    exact = own == {"torch.float32"} and (wanted is not None or finished.config.dtype == torch.float32)
    return load, EXACT if exact else ROUNDED


def _merged_dtype(finished: _Finished, dtype: str) -> torch.dtype | None:
    """The type to write; None keeps each tensor's own."""
    if dtype != "auto":
        return DTYPES[dtype]
    if finished.source is not None and is_quantised(finished.source):
        return torch.bfloat16
    return None


@dataclass(frozen=True, slots=True)
class _Gguf:
    """GGUF files for llama.cpp, or with a Modelfile for Ollama.

    Attributes:
        finished: The run.
        target: The folder, by the name it will have.
        outtype: Of the merged model; None: the adapter alone.
        turns: The template for Ollama; None: llama.cpp reads the one in the file.
    """

    finished: _Finished
    target: Path
    outtype: str | None
    turns: Turns | None

    @property
    def file(self) -> str:
        return f"{self.finished.name}-{self.outtype or 'lora'}.gguf"

    def write(self, folder: Path) -> tuple[_Load, Tolerance]:
        finished = self.finished
        file = folder / self.file
        if self.outtype is not None:
            self._model(file, finished.updates, self.outtype)
        else:
            write_gguf_adapter(finished.updates, finished.config, file, name=finished.name)
        if self.turns is not None:
            stops = finished.prepared.tokenizer.convert_ids_to_tokens(list(finished.stops))
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
            finished.prepared.tokenizer,
            file,
            outtype=outtype,
            name=finished.name,
            stop_token_ids=finished.stops,
            source=finished.source,
        )

    def _load(self, file: Path, expected: Expected) -> Target:
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

    def _by_llama_cpp(self, file: Path, expected: Expected, render: Render | None) -> LlamaCppReader:
        prepared = self.finished.prepared
        lengths = [len(example.input_ids) for example in expected.examples]
        lengths += [len(prompt.input_ids) + prepared.recipe.evaluate.max_new_tokens for prompt in prepared.prompts]
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


def _export_vllm(finished: _Finished, target: Path, *, merged: bool) -> Delivery:
    recipe = finished.prepared.recipe
    if merged:
        command = serve_merged(target, name=finished.name)
    else:
        rank = check_vllm(finished.updates, finished.config)
        base = finished.prepared.base
        command = serve_adapter(
            base=base.name if base.revision else str(base.path),
            revision=base.revision,
            adapter=target,
            name=finished.name,
            rank=rank,
            dtype=recipe.model.dtype,
            has_template=bool(finished.prepared.tokenizer.chat_template),
        )

    def write(folder: Path) -> tuple[_Load, Tolerance]:
        if merged:
            load, tolerance = _write_folder(finished, folder, "auto")
        else:
            load, tolerance = _copy_adapter(finished, folder)
        script = folder / "serve.sh"
        script.write_text(f"#!/bin/sh\nexec {command}\n", encoding="utf-8")
        script.chmod(0o755)
        return load, tolerance

    return _deliver(finished, _kind("vllm", merged), target, write, (command,))


def _copy_adapter(finished: _Finished, folder: Path) -> tuple[_Load, Tolerance]:
    recipe = finished.prepared.recipe
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(finished.run.adapter / name, folder / name)
    copy_companions(finished.base, finished.run.adapter, folder, finished.stops)

    def load(_: Expected) -> Target:
        return TransformersReader(
            finished.base,
            dtype=torch_dtype(recipe.model.dtype),
            device=recipe.train.device,
            adapter=folder,
            trust_remote_code=recipe.model.trust_remote_code,
        )

    return load, EXACT if recipe.model.dtype == "float32" else ROUNDED
