"""`selftest`: on this machine, with a tiny random model, is what loratune promises true?

Every check computes one thing in two ways and measures how far they are apart: the largest difference of any value, or,
for gradients, of any value divided by the largest of its tensor. Nothing is downloaded; the model, its tokenizer and the
data are made here, and everything is written into a temporary folder.
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
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from loratune.data.batch import MicroBatch, collate
from loratune.data.examples import Example
from loratune.model.adapter.attach import attach_adapter, trainable_parameters, use_fast_layers
from loratune.model.device import choose_device
from loratune.model.gguf_import import CACHE_VARIABLE
from loratune.model.kernels.attention import packed_attention
from loratune.model.kernels.cross_entropy import Head, sum_cross_entropy
from loratune.model.kernels.lora_linear import lora_linear
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import Record, RunDir, read_json
from loratune.run.errors import RunError
from loratune.run.progress import NoProgress, Progress
from loratune.training.loss import SupervisedLoss
from loratune.workflows.resume import resume
from loratune.workflows.train import train

_SILENT = NoProgress()

NUM_CHATS, NUM_HELD_OUT = 24, 6
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = ("red", "green", "blue", "small", "large", "round", "flat", "warm", "cold", "loud")

FLOAT32 = 1e-4
"""Sums of thousands of float32 products in another order differ by some 1e-6 of the largest; a wrong factor by far more."""
STEPS = 1e-4
"""Of losses and weights after some AdamW steps, which divide gradients by their size and so enlarge rounding."""
EXACT = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    """One promise, and how far it was missed.

    Attributes:
        name: What must be equal.
        difference: How far the two are apart; infinite where one could not be computed.
        tolerance: The most that is allowed.
        seconds: How long it took.
        note: Why one could not be computed.
    """

    name: str
    difference: float
    tolerance: float
    seconds: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the promise is kept; NaN keeps none."""
        return self.difference <= self.tolerance

    def as_dict(self) -> Record:
        """For `--json`, where an infinite difference is null."""
        difference = self.difference if math.isfinite(self.difference) else None
        return {**asdict(self), "difference": difference, "ok": self.ok}


def selftest(progress: Progress = _SILENT) -> list[SelfCheck]:
    """Run all checks on this machine's device.

    Args:
        progress: Who is told how it goes.
    """
    device = choose_device("auto").value
    with tempfile.TemporaryDirectory(prefix="loratune-selftest-") as name, _own_cache(Path(name)):
        bench = _Bench(Path(name), device)
        # Kernels of a GPU add in an order that may change from run to run.
        again = EXACT if device == "cpu" else STEPS
        checks: list[tuple[str, Callable[[], float], float]] = [
            ("attention kernel = its definition, with gradients", partial(_attention, device), FLOAT32),
            ("cross-entropy kernel = torch's, with gradients", partial(_cross_entropy, device), FLOAT32),
            ("LoRA layer = its definition, with gradients", partial(_lora_linear, device), FLOAT32),
            ("fast loss = the model's own, with gradients", bench.fast_against_plain, FLOAT32),
            ("packed = one at a time, with gradients", bench.packed_against_separate, FLOAT32),
            ("any token budget: the same steps", bench.token_budgets, STEPS),
            ("stopped and resumed = uninterrupted", bench.resumed, again),
            ("saved and loaded by PEFT: the same held-out loss", bench.loaded_by_peft, FLOAT32),
        ]
        with progress.task("selftest", len(checks), "checks") as task:
            done = []
            for title, work, tolerance in checks:
                done.append(_measure(title, work, tolerance))
                task.advance(note=title)
    return done


def selftest_table(checks: Sequence[SelfCheck]) -> Table:
    """A row a check."""
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
    """What to say where checks failed."""
    return RunError(
        f"{len(names)} checks failed on this machine: {'; '.join(names)}",
        fix="do not trust results from here: `loratune doctor` shows versions and devices; train.engine=trl is the plain path",
    )


def _measure(name: str, work: Callable[[], float], tolerance: float) -> SelfCheck:
    started = time.perf_counter()
    try:
        difference, note = work(), ""
    except Exception as error:  # noqa: BLE001 - what is broken here fails in its own way, and the other checks still tell
        difference, note = math.inf, f"{type(error).__name__}: {str(error)[:500]}"
    return SelfCheck(
        name=name, difference=difference, tolerance=tolerance, seconds=time.perf_counter() - started, note=note
    )


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Nothing is taken from the user's cache, and nothing is left in it."""
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder / "cache")
    try:
        yield
    finally:
        del os.environ[CACHE_VARIABLE]
        if before is not None:
            os.environ[CACHE_VARIABLE] = before


# ---- kernels


def _attention(device: str) -> float:
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 1, 40, 300)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    query, key, value, upstream = (
        torch.randn(1, heads, sum(lengths), 16, generator=generator).to(device) for heads in (4, 2, 2, 4)
    )

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out, _ = packed_attention(
            torch.nn.Module(), query, key, value, None, cu_seq_lens_q=boundaries, max_length_q=max(lengths)
        )
        return out.transpose(1, 2)

    def definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        place = torch.arange(len(number), device=device)
        visible = (number[:, None] == number[None]) & (place[:, None] >= place[None])
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return scores.masked_fill(~visible, -math.inf).softmax(-1) @ value

    return _with_gradients(kernel, definition, (query, key, value), upstream)


def _cross_entropy(device: str) -> float:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(50, 16, generator=generator).to(device), torch.randn(99, 16, generator=generator)
    targets, weight = torch.randint(99, (50,), generator=generator).to(device), weight.to(device)
    return _with_gradients(
        lambda hidden: sum_cross_entropy(hidden, Head(weight), targets),
        lambda hidden: F.cross_entropy(hidden @ weight.T, targets, reduction="sum"),
        (hidden,),
        torch.ones((), device=device),
    )


def _lora_linear(device: str) -> float:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias, a, b, upstream = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((2, 7, 12), (20, 12), (20,), (4, 12), (20, 4), (2, 7, 20))
    )
    return _with_gradients(
        lambda x, a, b: lora_linear(x, weight, bias, a, b, 1.7),
        lambda x, a, b: F.linear(x, weight, bias) + 1.7 * (x @ a.T @ b.T),
        (x, a, b),
        upstream,
    )


def _with_gradients(
    one: Callable[..., torch.Tensor],
    other: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    upstream: torch.Tensor,
) -> float:
    """How far two functions are apart, in value and in the gradient to each input."""
    results = []
    for function in (one, other):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    return _largest_difference(dict(enumerate(results[0])), dict(enumerate(results[1])), relative=True)


def _largest_difference(one: Mapping[Any, torch.Tensor], other: Mapping[Any, torch.Tensor], *, relative: bool) -> float:
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


# ---- runs


class _Bench:
    """A tiny model and data in a folder, and what was trained on them."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._device = device
        self._model = _make_model(folder / "model")
        for name, numbers in (("train", range(NUM_CHATS)), ("eval", range(100, 100 + NUM_HELD_OUT))):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(_chat(n)) + "\n" for n in numbers))
        self._whole: RunDir | None = None

    def recipe(self, name: str, *, dropout: float = 0.1, **train_settings: Any) -> Recipe:
        """All matrices adapted, float32."""
        return Recipe.parse(
            {
                "model": {"name": str(self._model), "dtype": "float32"},
                "data": {"train": str(self._folder / "train.jsonl"), "eval": str(self._folder / "eval.jsonl")},
                "lora": {"r": 4, "dropout": dropout, "targets": "complete"},
                "train": {
                    "output_dir": str(self._folder / name),
                    "device": self._device,
                    "compile": False,
                    "epochs": 2,
                    "learning_rate": 1e-2,
                    "batch_size": 8,
                    "save_every": 2,
                    **train_settings,
                },
            }
        )

    @property
    def whole(self) -> RunDir:
        """An uninterrupted run."""
        if self._whole is None:
            self._whole = train(self.recipe("whole")).run
        return self._whole

    def token_budgets(self) -> float:
        """Without dropout, whose draws depend on the shape of a micro-batch."""
        found = []
        for budget in (1, 150, 100_000):
            recipe = self.recipe(f"budget-{budget}", dropout=0.0, token_budget=budget, save_every="never")
            found.append(_outcome(train(recipe).run))
        return max(_largest_difference(other, found[0], relative=False) for other in found[1:])

    def resumed(self) -> float:
        """What a kill after step 2 leaves is resumed; losses and adapter must be those of the uninterrupted run."""
        expected = _outcome(self.whole)
        copy = RunDir(self._folder / "stopped")
        shutil.copytree(self.whole.root, copy.root)
        shutil.rmtree(copy.adapter)
        for checkpoint in copy.checkpoints.iterdir():
            if checkpoint.name != "2":
                shutil.rmtree(checkpoint)
        return _largest_difference(_outcome(resume(copy.root).run), expected, relative=False)

    def loaded_by_peft(self) -> float:
        """The held-out loss that the run reports, against PEFT's and transformers' own forward of what it saved."""
        base: Any = self._base()
        model = PeftModel.from_pretrained(base, str(self.whole.adapter)).eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for example in prepare(self.recipe("none"), _SILENT).data.eval:
                total += float(_plain_loss(model, example))
                count += int(example.supervised.sum())
        reported = read_json(self.whole.evaluation)["tuned"]["nll"]
        return abs(total / count - reported)

    def fast_against_plain(self) -> float:
        """The fast path on a micro-batch of all examples, against the model's own forward of each and full logits."""
        model, examples = self._adapted()
        plain = _loss_and_gradients(model, lambda: sum((_plain_loss(model, e) for e in examples), torch.zeros(())))
        use_fast_layers(model)
        fast = SupervisedLoss(model)
        return _largest_difference(
            _loss_and_gradients(model, lambda: fast.sum(self._batch(examples))), plain, relative=True
        )

    def packed_against_separate(self) -> float:
        """A micro-batch of all examples, against a micro-batch for each."""
        model, examples = self._adapted()
        use_fast_layers(model)
        loss = SupervisedLoss(model)
        packed = _loss_and_gradients(model, lambda: loss.sum(self._batch(examples)))
        separate = _loss_and_gradients(
            model, lambda: torch.stack([loss.sum(self._batch([example])) for example in examples]).sum()
        )
        return _largest_difference(packed, separate, relative=True)

    def _base(self) -> Any:
        base: Any = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        return base.to(self._device)

    def _batch(self, examples: Sequence[Example]) -> MicroBatch:
        return collate(examples).to(torch.device(self._device))

    def _adapted(self) -> tuple[PeftModel, list[Example]]:
        """The model with an adapter whose B is not zero, so that every factor of it counts."""
        prepared = prepare(self.recipe("none"), _SILENT)
        base: Any = self._base()
        model = attach_adapter(base, prepared.recipe.lora, prepared.adapter.targets, base_name="tiny", seed=1).eval()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model, prepared.data.train


def _outcome(run: RunDir) -> dict[str, torch.Tensor]:
    """The loss of every step, and the adapter."""
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


# ---- what it is run on


def _make_model(folder: Path) -> Path:
    """A random Llama of two layers, and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = _TEMPLATE
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.1,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _chat(number: int) -> Record:
    """Of one or two turns, and of another length for each number."""
    colour, size = _WORDS[number % 10], _WORDS[(7 * number + 3) % 10]
    messages = [
        {"role": "user", "content": f"Describe thing {number}" + ", please" * (number % 4)},
        {"role": "assistant", "content": f"It is {colour} and {size}" + f", like {colour}" * (number % 3) + "."},
    ]
    if number % 3 == 0:
        messages += [{"role": "user", "content": "Shorter."}, {"role": "assistant", "content": f"{colour}."}]
    return {"messages": messages}
