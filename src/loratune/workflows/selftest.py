"""`selftest`: check on this machine, with a tiny random model, that the optimizations change nothing.

Each check computes one thing in two ways and reports the largest difference: of any value, or, for gradients, of any
value divided by the largest of its tensor. Nothing is downloaded, and everything is written into a temporary folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from loratune.data.batch import collate
from loratune.model.adapter.attach import attach_adapter, trainable_parameters, use_fast_layers
from loratune.model.device import choose_device, choose_dtype, torch_dtype
from loratune.model.kernels.attention import packed_attention
from loratune.model.kernels.cross_entropy import Head, sum_cross_entropy
from loratune.model.kernels.lora_linear import lora_linear
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.cache_folder import CACHE_VARIABLE
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import RunError
from loratune.run.html_table import ShownList
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.training.loss import SupervisedLoss
from loratune.workflows.resume import resume
from loratune.workflows.tiny_model import conversation, write_tiny_model
from loratune.workflows.train import train

if TYPE_CHECKING:
    from loratune.data.examples import Example

Tensors = Mapping[Any, torch.Tensor]

FLOAT32 = 1e-4
"""Sums of thousands of float32 products in another order differ by some 1e-6 of the largest, a wrong factor by more."""
STEPS = 1e-4
"""For losses and weights after some AdamW steps, which divide gradients by their size and so amplify rounding."""
NARROW = 0.03
"""For a kernel in bfloat16, whose steps are up to 0.8 % apart, against float64; 0.008 was measured on a CPU."""
NARROW_MODEL = 0.1
"""For all layers of a model in bfloat16 against float32, where rounding adds up; 0.03 was measured on a CPU."""
EXACT = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    """Result of one check.

    Attributes:
        name: What must be equal.
        difference: Largest difference; infinite if one side could not be computed.
        tolerance: Largest difference allowed.
        seconds: Time the check took.
        note: The error, if one side could not be computed.
    """

    name: str
    difference: float
    tolerance: float
    seconds: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check passed; NaN never does."""
        return self.difference <= self.tolerance

    def as_dict(self) -> Record:
        """Return the record that `--json` prints, where an infinite difference is null."""
        difference = self.difference if math.isfinite(self.difference) else None
        return {**asdict(self), "difference": difference, "ok": self.ok}


def selftest(progress: Progress = NO_PROGRESS) -> list[SelfCheck]:
    """Run all checks on this machine's device."""
    device = choose_device("auto").value
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(prefix="loratune-selftest-") as name, _temporary_cache(Path(name)):
        tiny = _TinyRuns(Path(name), device)
        # Kernels of a GPU add in an order that may change from run to run.
        repeated = EXACT if device == "cpu" else STEPS
        checks: list[tuple[str, Callable[[], float], float]] = [
            ("kernels = plain PyTorch, with gradients", partial(_kernels, device, torch.float32), FLOAT32),
            ("fast engine = plain path, with gradients", tiny.fast_against_plain, FLOAT32),
            ("resumed run = uninterrupted run", tiny.resumed, repeated),
            ("saved adapter in PEFT = reported held-out loss", tiny.loaded_by_peft, FLOAT32),
        ]
        narrow = _narrow_type(device)
        if narrow is not None:  # on a GPU other kernels than float32's, and the ones that training takes
            short = str(narrow).removeprefix("torch.")
            checks += [
                (f"kernels in {short} = plain PyTorch in float64", partial(_kernels, device, narrow), NARROW),
                (
                    f"fast engine in {short} = plain path in float32",
                    partial(tiny.fast_against_plain, narrow),
                    NARROW_MODEL,
                ),
            ]
        done = []
        with progress.task("selftest", len(checks), "checks") as task:
            for title, work, tolerance in checks:
                done.append(_measure(title, work, tolerance))
                task.advance(note=title)
    return ShownList(
        done,
        title="Checks on this machine",
        columns={
            "check": lambda check: check.name,
            "difference": lambda check: f"{check.difference:.1e}",
            "tolerance": lambda check: f"{check.tolerance:.0e}",
            "passed": lambda check: "yes" if check.ok else f"no {check.note}".strip(),
        },
    )


def _narrow_type(device: str) -> torch.dtype | None:
    """Return the type in which this device trains if it is not float32; bfloat16 on any CPU."""
    dtype = torch.bfloat16 if device == "cpu" else torch_dtype(choose_dtype("auto", device).value)
    return None if dtype == torch.float32 else dtype


def selftest_table(checks: Sequence[SelfCheck]) -> Table:
    """Return a table with one row per check."""
    table = Table()
    table.add_column("check", overflow="fold")
    for name in ("difference", "tolerance", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("ok", justify="center")
    for check in checks:
        note = f"\n[red]{escape(check.note)}[/red]" if check.note else ""
        table.add_row(
            escape(check.name) + note,
            f"{check.difference:.1e}" if check.difference else "0",
            f"{check.tolerance:.0e}" if check.tolerance else "0",
            f"{check.seconds:.1f}",
            "[green]✓[/green]" if check.ok else "[red]✗[/red]",
        )
    return table


def failure(names: Sequence[str]) -> RunError:
    """Return the error for checks that failed."""
    return RunError(
        f"{len(names)} of the checks failed on this machine: {'; '.join(names)}",
        fix="do not trust results from this machine; `loratune doctor` shows versions and devices, "
        "train.engine=trl is the plain path",
    )


def _measure(name: str, work: Callable[[], float], tolerance: float) -> SelfCheck:
    started = time.perf_counter()
    try:
        difference, note = work(), ""
    except Exception as error:  # noqa: BLE001 - what is broken may fail in any way, and the other checks must still run
        difference, note = math.inf, f"{type(error).__name__}: {str(error)[:500]}"
    seconds = time.perf_counter() - started
    return SelfCheck(name=name, difference=difference, tolerance=tolerance, seconds=seconds, note=note)


@contextmanager
def _temporary_cache(folder: Path) -> Iterator[None]:
    """Keep the user's cache out of the checks."""
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder / "cache")
    try:
        yield
    finally:
        del os.environ[CACHE_VARIABLE]
        if before is not None:
            os.environ[CACHE_VARIABLE] = before


def _largest_difference(one: Tensors, other: Tensors, *, relative: bool) -> float:
    if one.keys() != other.keys() or not one:
        return math.inf
    largest = 0.0
    for name, tensor in one.items():
        difference = float((tensor - other[name]).abs().max())
        scale = float(other[name].abs().max()) if relative else 1.0
        largest = max(largest, difference / scale if scale else difference)
        if math.isnan(difference):
            return math.nan
    return largest


# ---- kernels


Function = Callable[..., torch.Tensor]


def _kernels(device: str, dtype: torch.dtype) -> float:
    """Compare attention, cross-entropy and the LoRA layer with their definitions, in value and every gradient.

    The kernels run on the device in `dtype`, with adapters in float32 as in training; the definitions on the CPU in
    float64, from the same numbers.
    """
    generator = torch.Generator().manual_seed(1)
    results: tuple[dict[Any, torch.Tensor], dict[Any, torch.Tensor]] = ({}, {})
    for name, kernel, definition, inputs in (*_attentions(device), *_layers(device, dtype, generator)):
        kept = [torch.float32 if name == "LoRA layer" and i else dtype for i in range(len(inputs))]
        numbers = [torch.randn(shape, generator=generator).to(own) for shape, own in zip(inputs, kept, strict=True)]
        exact = [tensor.double().requires_grad_() for tensor in numbers]
        leaves = [tensor.to(device).requires_grad_() for tensor in numbers]
        wanted = definition(*exact)
        upstream = torch.randn(wanted.shape, generator=generator).to(dtype)
        for found, out, its_leaves in zip(results, (kernel(*leaves), wanted), (leaves, exact), strict=True):
            gradients = torch.autograd.grad(out, its_leaves, upstream.to(out))
            found.update({(name, i): tensor.double().cpu() for i, tensor in enumerate((out.detach(), *gradients))})
    return _largest_difference(*results, relative=True)


def _attentions(device: str) -> Iterator[tuple[str, Function, Function, Sequence[tuple[int, ...]]]]:
    """Yield attention without and with a window: name, kernel, definition and the shapes of its inputs."""
    lengths = torch.tensor([5, 1, 40, 300])
    total = int(lengths.sum())
    boundaries = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32, device=device)
    example = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    behind = torch.arange(total)[:, None] - torch.arange(total)[None]
    visible = (example[:, None] == example[None]) & (behind >= 0)

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
        limits: Any = {"cu_seq_lens_q": boundaries, "max_length_q": int(lengths.max()), "sliding_window": window}
        return packed_attention(torch.nn.Module(), query, key, value, None, **limits)[0].transpose(1, 2)

    def definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        seen = visible if window is None else visible & (behind < window)
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value

    for window in (None, 7):
        shapes = [(1, number, total, 16) for number in (4, 2, 2)]
        yield f"attention, window {window}", partial(kernel, window=window), partial(definition, window=window), shapes


def _layers(
    device: str, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Function, Function, Sequence[tuple[int, ...]]]]:
    """Yield cross-entropy and the LoRA layer: name, kernel, definition and the shapes of their inputs."""
    head, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((99, 16), (20, 12), (20,)))
    targets = torch.randint(99, (50,), generator=generator)
    its_head, its_weight, its_bias, its_targets = (x.to(device) for x in (head, weight, bias, targets))
    yield (
        "cross-entropy",
        lambda hidden: sum_cross_entropy(hidden, Head(its_head), its_targets),
        lambda hidden: F.cross_entropy(hidden @ head.double().T, targets, reduction="sum"),
        [(50, 16)],
    )
    yield (
        "LoRA layer",
        lambda x, a, b: lora_linear(x, its_weight, its_bias, a, b, 1.7),
        lambda x, a, b: F.linear(x, weight.double(), bias.double()) + 1.7 * (x @ a.T @ b.T),
        [(2, 7, 12), (4, 12), (20, 4)],
    )


# ---- runs


class _TinyRuns:
    """A tiny model and data in a folder, and the run that is trained on them."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder, self._device = folder, device
        self._model = write_tiny_model(folder / "model")
        for name, numbers in (("train", range(24)), ("eval", range(100, 106))):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(conversation(n)) + "\n" for n in numbers))
        self._run: RunDir | None = None

    def _recipe(self) -> Recipe:
        data = {name: str(self._folder / f"{name}.jsonl") for name in ("train", "eval")}
        settings = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 8, "save_every": 2, "compile": False}
        place = {"output_dir": str(self._folder / "run"), "device": self._device}
        return Recipe.parse(
            {
                "model": {"name": str(self._model), "dtype": "float32"},
                "data": data,
                "lora": {"r": 4, "dropout": 0.1, "targets": "complete"},
                "train": {**settings, **place},
                "evaluate": {"samples": 0},
            }
        )

    @property
    def _uninterrupted(self) -> RunDir:
        if self._run is None:
            self._run = train(self._recipe()).run
        return self._run

    def resumed(self) -> float:
        """Resume from what a kill after step 2 leaves, and compare losses and adapter with the uninterrupted run."""
        expected = _outcome(self._uninterrupted)
        copy = RunDir(self._folder / "stopped")
        shutil.copytree(self._uninterrupted.root, copy.root)
        shutil.rmtree(copy.adapter)
        for checkpoint in copy.checkpoints.iterdir():
            if checkpoint.name != "2":
                shutil.rmtree(checkpoint)
        return _largest_difference(_outcome(resume(copy.root).run), expected, relative=False)

    def loaded_by_peft(self) -> float:
        """Compare the held-out loss that the run reports with that of the saved adapter in stock PEFT."""
        run = self._uninterrupted
        model = PeftModel.from_pretrained(self._base(), str(run.adapter)).eval()
        examples = prepare(self._recipe(), NO_PROGRESS).data.eval
        with torch.no_grad():
            total = sum(float(_plain_loss(model, example)) for example in examples)
        num_tokens = sum(int(example.supervised.sum()) for example in examples)
        return abs(total / num_tokens - read_json(run.evaluation)["tuned"]["nll"])

    def fast_against_plain(self, dtype: torch.dtype = torch.float32) -> float:
        """Compare the fast path on one micro-batch of all examples with the model's own forward of each example.

        Args:
            dtype: Type of the frozen weights on the fast path; on the other one they have the same values in float32.
        """
        prepared = prepare(self._recipe(), NO_PROGRESS)
        examples, lora = prepared.data.train, prepared.recipe.lora
        model = attach_adapter(self._base(), lora, prepared.adapter.targets, base_name="tiny", seed=1).eval()
        generator = torch.Generator().manual_seed(4)
        adapter = trainable_parameters(model)
        with torch.no_grad():
            for name, parameter in adapter.items():
                if "lora_B" in name:  # B starts at zero, where a wrong scale would not show
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            frozen = [parameter for name, parameter in model.named_parameters() if name not in adapter]
            for parameter in frozen:
                parameter.copy_(parameter.to(dtype))
        plain = _loss_and_gradients(model, lambda: sum((_plain_loss(model, e) for e in examples), torch.zeros(())))
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        use_fast_layers(model)
        fast, batch = SupervisedLoss(model), collate(examples).to(torch.device(self._device))
        return _largest_difference(_loss_and_gradients(model, lambda: fast.sum(batch)), plain, relative=True)

    def _base(self) -> Any:
        base: Any = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        return base.to(self._device)


def _outcome(run: RunDir) -> dict[str, torch.Tensor]:
    """Return the loss of every step, and the adapter."""
    losses = [record["loss"] for record in run.read_metrics() if "loss" in record]
    return {"losses": torch.tensor(losses), **load_file(run.adapter / "adapter_model.safetensors")}


def _plain_loss(model: PeftModel, example: Example) -> torch.Tensor:
    input_ids = torch.from_numpy(example.input_ids).long()[None].to(model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1].float()
    supervised = torch.from_numpy(example.supervised[1:]).to(model.device)
    return F.cross_entropy(logits[supervised], input_ids[0, 1:][supervised], reduction="sum")


def _loss_and_gradients(model: PeftModel, work: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = work()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in trainable_parameters(model).items() if p.grad is not None}
    return {"loss": loss.detach().cpu(), **gradients}
