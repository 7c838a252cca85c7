"""Memory that runs out, numbers that are not finite, losses that leap, evaluations and trackers that fail.

The faults are injected into the kernels, where the real ones come from.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loratune.data.examples import Example
from loratune.data.rows.row import Origin
from loratune.model.device import is_out_of_memory
from loratune.planning.memory import memory
from loratune.recipe.recipe import Recipe
from loratune.run.directory import Record, RunDir
from loratune.run.errors import MachineError, RunError
from loratune.run.progress import NoProgress
from loratune.training import loss as loss_module
from loratune.training.anomalies import is_spike
from loratune.training.event_log import EventLog
from loratune.training.token_budget import TokenBudget
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.invariants.test_same_mathematics import assert_same

MakeRecipe = Callable[..., Recipe]
Inject = Callable[[str, Callable[[int, Any], Any]], list[int]]

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 3 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
    ),
)


class Listener(NoProgress):
    """Keeps what the user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Pass the result of each call of a kernel through `fault`, with the call's number; return the calls so far."""

    def patch(kernel: str, fault: Callable[[int, Any], Any]) -> list[int]:
        calls: list[int] = []
        original = getattr(loss_module, kernel)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(len(calls) + 1)
            return fault(calls[-1], original(*args, **kwargs))

        monkeypatch.setattr(loss_module, kernel, call)
        return calls

    return patch


def raising(errors: dict[int, Exception]) -> Callable[[int, Any], Any]:
    def fault(number: int, result: Any) -> Any:
        if number in errors:
            raise errors[number]
        return result

    return fault


def events_of(run: RunDir, event: str) -> list[Record]:
    return [record for record in run.read_metrics() if record.get("event") == event]


def test_what_runs_out_of_memory_is_repeated_in_smaller_micro_batches_and_the_steps_stay_the_recipes(
    tiny_recipe: MakeRecipe, tmp_path: Path, inject: Inject
) -> None:
    settings = {"train__save_every": 2, "train__eval_every": 3, "lora__targets": "complete", "lora__dropout": 0.05}
    whole = train(tiny_recipe(**settings)).run
    inject("sum_cross_entropy", raising({2: NO_MEMORY[0]}))  # the second step
    inject("cross_entropy_per_token", raising({5: NO_MEMORY[2]}))  # the first four compare paths before step 1
    listener = Listener()
    run = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "small")), progress=listener).run
    assert_same(whole, run, tolerance=1e-5)
    happened = events_of(run, "out_of_memory")
    assert [event["step"] for event in happened] == [2, 3]
    assert happened[1]["token_budget"] < happened[0]["token_budget"]
    assert [line for line in listener.lines if "out of memory" in line] == [event["message"] for event in happened]

    # a run that goes on keeps the smaller budget: its last two steps take as many micro-batches as before
    def calls_of_the_rest() -> int:
        calls = inject("sum_cross_entropy", lambda _, result: result)
        shutil.rmtree(run.adapter)
        shutil.rmtree(run.checkpoints / "6")
        resume(run.root)
        return len(calls)

    adapter = load_file(run.adapter / "adapter_model.safetensors")
    assert calls_of_the_rest() > 4
    assert events_of(run, "out_of_memory") == happened
    again = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


def test_an_example_that_does_not_fit_is_named(
    tiny_recipe: MakeRecipe, chat_files: tuple[Path, Path], inject: Inject
) -> None:
    inject("sum_cross_entropy", raising(dict.fromkeys(range(1, 100), NO_MEMORY[0])))
    with pytest.raises(MachineError, match=r"one example of \d+ tokens does not fit into memory: CUDA out of") as error:
        train(tiny_recipe())
    assert error.value.file == str(chat_files[0])
    assert error.value.line is not None


def test_a_repeated_step_draws_the_same_random_numbers(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", overwrite=False)
    budget = TokenBudget(100, EventLog(run, Listener()))
    examples = [
        Example(input_ids=np.zeros(30, np.int32), supervised=np.ones(30, bool), origin=Origin(file="a.jsonl", line=i))
        for i in range(3)
    ]
    drawn, undone = [], []

    def work() -> int:
        for _ in budget.micro_batches(examples, range(3)):
            drawn.append(float(torch.rand(())))
            if len(drawn) == 1:
                raise NO_MEMORY[2]
        return budget.tokens

    assert budget.retry(work, undo=lambda: undone.append(1)) == 45
    assert drawn[0] == drawn[1]
    assert undone == [1]
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.slow
def test_the_rehearsal_changes_nothing(
    tiny_recipe: MakeRecipe, tmp_path: Path, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lora__dropout": 0.1, "train__epochs": 1}
    one = train(tiny_recipe(**settings)).run
    monkeypatch.setattr(memory, "REHEARSAL_FRACTION", 0.0)
    calls = inject("sum_cross_entropy", lambda _, result: result)
    other = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "other"))).run
    assert len(calls) == 4
    assert_same(one, other, tolerance=0)


@pytest.mark.slow
def test_answers_that_do_not_fit_together_are_generated_in_halves(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"evaluate__metric": "exact_match", "evaluate__max_new_tokens": 2, "train__epochs": 0.3}
    whole = train(tiny_recipe(**settings)).evaluation
    embed = torch.nn.Embedding.forward

    def narrow(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[0] > 2:  # rows of a batch of prompts; training and losses have one
            raise NO_MEMORY[0]
        return embed(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", narrow)
    listener = Listener()
    result = train(tiny_recipe(**settings, train__output_dir=str(tmp_path / "narrow")), progress=listener)
    assert whole is not None
    assert result.evaluation is not None
    assert result.evaluation["items"] == whole["items"]
    assert "out of memory with 6 answers at a time; splitting the batch in two" in listener.lines
    assert events_of(result.run, "smaller_answer_batches")


# ---- numbers


def infinite_gradient(number: int, result: torch.Tensor) -> torch.Tensor:
    if number == 2:
        result.register_hook(lambda gradient: gradient * math.inf)
    return result


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda number, result: result * math.nan if number == 2 else result, "the loss of step 2 is nan"),
        (infinite_gradient, "the gradient norm of step 2 is"),
    ],
)
def test_a_step_that_is_not_finite_is_not_applied_and_its_examples_are_named(
    tiny_recipe: MakeRecipe, chat_files: tuple[Path, Path], inject: Inject, fault: Callable[..., Any], words: str
) -> None:
    inject("sum_cross_entropy", fault)
    listener = Listener()
    recipe = tiny_recipe(train__on_bad_step="skip", train__eval_every=1, train__epochs=1, train__log_every=1)
    run = train(recipe, progress=listener).run
    (event,) = events_of(run, "skipped")
    assert words in event["message"]
    assert event["message"] in listener.lines
    assert {example["file"] for example in event["examples"]} == {str(chat_files[0])}
    assert any("Describe thing" in example["text"] for example in event["examples"])
    records = run.read_metrics()
    assert [record["step"] for record in records if "loss" in record] == [1, 3]
    held_out = [record["eval_nll"] for record in records if "eval_nll" in record]
    assert held_out[1] == held_out[0], "neither weights nor moments have changed"
    assert held_out[2] != held_out[0]
    assert any("step 2/3" in line and "loss nan" not in line for line in listener.lines)
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.values())
    assert words.partition(" is")[0] in run.report.read_text(encoding="utf-8")


@pytest.mark.parametrize("engine", ["fast", pytest.param("trl", marks=pytest.mark.slow)])
def test_the_recipe_says_whether_a_bad_step_ends_the_run(
    tiny_recipe: MakeRecipe, chat_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, inject: Inject, engine: str
) -> None:
    if engine == "fast":
        inject("sum_cross_entropy", lambda _, result: result * math.nan)
    else:
        from trl import SFTTrainer

        compute = SFTTrainer.compute_loss
        monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *args, **kwargs: compute(*args, **kwargs) * math.nan)
    with pytest.raises(RunError, match="the loss of step 1 is nan") as error:
        train(tiny_recipe(train__engine=engine))
    assert str(chat_files[0]) in error.value.problem
    assert "and 3 more" in error.value.problem
    assert "on_bad_step: skip" in error.value.fix
    if engine == "fast":
        with pytest.raises(RunError, match=r"3 steps could not be applied, but train\.max_skipped_steps is 2"):
            train(tiny_recipe(train__on_bad_step="skip", train__max_skipped_steps=2), overwrite=True)


def test_a_loss_that_leaps_is_told_once_and_written_down(tiny_recipe: MakeRecipe, inject: Inject) -> None:
    inject("sum_cross_entropy", lambda number, result: result * 5 if number in (24, 25) else result)
    listener = Listener()
    recipe = tiny_recipe(train__batch_size=1, train__epochs=1.5, train__learning_rate=1e-5, data__eval="none")
    run = train(recipe, progress=listener).run
    first, second = events_of(run, "spike")
    assert (first["step"], second["step"]) == (24, 25)
    assert first["value"] > 4 * first["median"]
    assert first["examples"][0]["line"] > 0
    told = [line for line in listener.lines if "jumps to" in line]
    assert told == [first["message"]]
    assert len([record for record in run.read_metrics() if "grad_norm" in record]) == 30


def test_a_spike_is_far_from_the_median_and_rare() -> None:
    draw = np.random.default_rng(0)
    losses = (1 + 0.15 * draw.standard_normal(5000)).tolist()
    assert not any(is_spike(losses[i], losses[i - 50 : i]) for i in range(50, 5000))
    assert is_spike(2.5, losses[:50])
    assert not is_spike(1.9, losses[:50]), "less than twice the median"
    assert not is_spike(9.0, losses[:10]), "too little to compare with"
    assert not is_spike(math.nan, losses[:50])


# ---- what fails beside the steps


def test_an_evaluation_that_fails_does_not_end_training(tiny_recipe: MakeRecipe, inject: Inject) -> None:
    inject(
        "cross_entropy_per_token", raising({5: RuntimeError("a bug of the model")})
    )  # the first four compare paths before step 1
    listener = Listener()
    run = train(tiny_recipe(), progress=listener).run
    (event,) = events_of(run, "evaluation_failed")
    assert event["step"] == 3
    assert event["message"] == "the held-out loss could not be measured: RuntimeError: a bug of the model"
    assert event["message"] in listener.lines
    assert [record["step"] for record in run.read_metrics() if "eval_nll" in record] == [6]
    assert run.is_complete


@pytest.mark.parametrize("method", ["__init__", "add_scalar"])
def test_a_tracker_that_fails_does_not_end_training(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the server is gone")

    from torch.utils import tensorboard

    monkeypatch.setattr(tensorboard.SummaryWriter, method, fail)
    listener = Listener()
    recipe = tiny_recipe(train__report_to=["tensorboard"], train__log_every=1, data__eval="none", train__epochs=1)
    run = train(recipe, progress=listener).run
    told = [line for line in listener.lines if "tensorboard" in line]
    assert told == ["tensorboard failed and gets no more data: ConnectionError: the server is gone"]
    assert len(events_of(run, "tracker_failed")) == 1
    assert run.is_complete


@pytest.mark.slow
@pytest.mark.parametrize("steps", [240, pytest.param(5000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_and_metrics_are_only_added_to(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """With a line for trackers each step, evaluations and checkpoints along the way."""
    import psutil

    process, resident = psutil.Process(), []
    append, read = RunDir.append_metrics, RunDir.read_metrics
    reads: list[int] = []

    def counting(self: RunDir, record: Record) -> None:
        append(self, record)
        if "loss" in record:
            resident.append(process.memory_info().rss)

    monkeypatch.setattr(RunDir, "append_metrics", counting)
    monkeypatch.setattr(RunDir, "read_metrics", lambda self: (reads.append(1), read(self))[1])
    cadence = {"train__save_every": steps // 8, "train__eval_every": steps // 8, "train__keep_checkpoints": 1}
    run = train(
        tiny_recipe(
            train__batch_size=1, train__epochs=steps / 20, train__log_every=1, train__learning_rate=1e-4, **cadence
        )
    ).run
    assert len(resident) == steps
    settled, end = max(resident[: steps // 2]), max(resident[-steps // 8 :])
    assert end - settled < 4 * 2**20 + 200 * steps, f"{(end - settled) / 2**20:.1f} MiB more"
    assert len(reads) < 8, "read at the start and at the end, not in between"
    state = run.checkpoints / str(steps) / "trainer_state.json"
    assert state.stat().st_size < 4096, "a checkpoint does not grow with the steps before it"
