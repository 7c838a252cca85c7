"""Training on this device: losses beside stock TRL's, what a step waits for, and the speed and memory of whole runs.

python measure_training.py losses | waiting | resume | out-of-memory | model | case NAME | profile NAME | answers
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure_common import (
    BIG,
    DEVICE,
    ON_GPU,
    RAGGED,
    SMALL,
    TOKEN_BUDGET,
    WORK,
    attempt,
    recipe,
    record,
    write_model,
)

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.training import trl_trainer
from loratune.training.fast_trainer import FastTrainer
from loratune.workflows.export import merge
from loratune.workflows.resume import resume
from loratune.workflows.train import train

WARM_UP = 2
"""Steps that compile and fill caches."""

LENGTHS = {"1k": 1024, "4k": 4096, "16k": 16_384} if ON_GPU else {"1k": 64, "4k": 128, "16k": 192}

CASES: dict[str, dict[str, Any]] = {
    "4k": {"compile": True},
    "4k-steps": {},
    "4k-trl": {"engine": "trl", "compile": False},
    "4k-trl-liger": {"engine": "trl", "compile": False},
    "4k-eager": {"compile": False},
    "4k-complete": {"targets": "complete"},
    "4k-fp8": {"quantization": "fp8"},
    "4k-nf4": {"quantization": "nf4", "compile": False},
    "1k": {"batch": 16},
    "16k": {"batch": 2},
    "16k-recomputed": {"batch": 2, "recompute": 28 if ON_GPU else 2},
}


@contextmanager
def around_gradients(around: Any) -> Iterator[None]:
    """Run `around(trainer)` around the gradients of each step."""
    real = FastTrainer._accumulate_gradients

    def gradients(self: FastTrainer, *args: Any) -> torch.Tensor:
        with around(self):
            return real(self, *args)

    FastTrainer._accumulate_gradients = gradients  # type: ignore[method-assign]
    try:
        yield
    finally:
        FastTrainer._accumulate_gradients = real  # type: ignore[method-assign]


def run(wanted: Recipe) -> dict[str, Any]:
    """Train, and return what the run directory says of it."""
    finished = train(wanted, overwrite=True).run
    steps = [line for line in finished.read_metrics() if "loss" in line]
    plan = read_json(finished.plan)
    return {
        "losses": [step["loss"] for step in steps],
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps[WARM_UP:]),
        "first_step_seconds": steps[0]["num_tokens"] / steps[0]["tokens_per_second"],
        "planned_tokens_per_second": plan["time"]["tokens_per_second"],
        "planned_peak_bytes": plan["memory"]["peak_bytes"],
        "peak_bytes": plan["measured"]["peak_bytes"],
        "token_budget": plan["memory"]["token_budget"],
        "packing": plan["measured"]["packing"],
    }


# ---- right


def losses() -> None:
    """Compare the losses of the fast engine with stock TRL's, on rows of very different lengths."""
    kinds = itertools.product(("qwen2", "llama"), ("float32", "bfloat16")) if ON_GPU else (("qwen2", "float32"),)
    for kind, dtype in kinds:
        model = write_model(f"small-{kind}-{dtype}", kind, SMALL, getattr(torch, dtype))
        ways: dict[str, dict[str, Any]] = {"trl": {"engine": "trl", "compile": False}, "eager": {"compile": False}}
        if ON_GPU:
            ways |= {"compiled": {"compile": True}, "recomputed": {"compile": True, "recompute": 4}}
        found: dict[str, list[float]] = {}

        def one(way: str, settings: dict[str, Any], dtype: str = dtype, kind: str = kind, model: Path = model) -> None:
            budget = {} if way == "trl" else {"token_budget": TOKEN_BUDGET}
            sections = {
                "model": {"dtype": dtype},
                "lora": {"dropout": 0.0, "targets": "complete"},
                "train": {"learning_rate": 1e-3, **budget, **settings},
            }
            name = f"{kind}-{dtype}-{way}"
            seen = run(recipe(name, model, steps=5, **RAGGED, **sections))
            found[way] = seen["losses"]  # noqa: B023
            apart = max(abs(a - b) for a, b in zip(found[way], found.get("trl", found[way]), strict=True))  # noqa: B023
            limit = 1e-3 if dtype == "float32" else 0.05
            record(what=f"{name} = stock TRL", ok=apart < limit, errors=[apart], packing=seen["packing"])

        for way, settings in ways.items():
            attempt(f"{kind}-{dtype}-{way}", partial(one, way, settings))


def waiting() -> None:
    """Take steps in which any synchronisation of host and device is an error."""

    def strict(trainer: FastTrainer) -> AbstractContextManager[None]:
        return _no_synchronisation() if ON_GPU and trainer.state.global_step > 0 else nullcontext()

    for dtype in ("bfloat16", "float32"):  # float32 takes another attention
        model = write_model(f"small-qwen2-{dtype}", "qwen2", SMALL, getattr(torch, dtype))

        def work(dtype: str = dtype, model: Path = model) -> None:
            with around_gradients(strict):
                sections = {"model": {"dtype": dtype}, "train": {"token_budget": TOKEN_BUDGET, "compile": False}}
                run(recipe(f"waiting-{dtype}", model, steps=4, **RAGGED, **sections))
            record(what=f"a step in {dtype} waits for nothing", ok=True if ON_GPU else "only a GPU shows it")

        attempt(f"a step in {dtype} waits for nothing", work)


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def resumed() -> None:
    """Resume from what a kill after step 2 leaves, and compare the losses with the run that was not stopped."""
    model = write_model("small-qwen2-bfloat16", "qwen2", SMALL, torch.bfloat16)
    wanted = recipe("whole", model, steps=5, **RAGGED, train={"save_every": 2, "token_budget": TOKEN_BUDGET})
    whole = train(wanted, overwrite=True).run
    stopped = RunDir(WORK / "runs" / "stopped")
    shutil.rmtree(stopped.root, ignore_errors=True)
    shutil.copytree(whole.root, stopped.root)
    shutil.rmtree(stopped.adapter)
    for checkpoint in stopped.checkpoints.iterdir():
        if checkpoint.name != "2":
            shutil.rmtree(checkpoint)
    losses = [
        [line["loss"] for line in run.read_metrics() if "loss" in line] for run in (whole, resume(stopped.root).run)
    ]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    # Not to the bit: kernels of a GPU may add in another order from run to run.
    record(what="resumed run = uninterrupted run", ok=apart < (0.02 if ON_GPU else 1e-9), errors=[apart])


def out_of_memory() -> None:
    """Fill the device but for a rest that the second step does not fit into, and see it repeated in smaller parts."""
    model = write_model("small-qwen2-bfloat16", "qwen2", SMALL, torch.bfloat16)
    wanted = recipe(
        "oom",
        model,
        tokens=2048 if ON_GPU else 128,
        batch=32 if ON_GPU else 4,
        steps=3,
        lora={"dropout": 0.0},
        train={"token_budget": 10**6, "compile": False},
    )
    expected, calls, filling = run(wanted)["losses"], [0], []

    @contextmanager
    def full(trainer: FastTrainer) -> Iterator[None]:
        calls[0] += 1
        if calls[0] == 3 and ON_GPU:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            filling.append(torch.empty(free - 2**30, dtype=torch.uint8, device=DEVICE))
        elif calls[0] == 3:
            loss = trainer.setup.loss

            def fails(*_: Any) -> torch.Tensor:
                del loss.sum  # the method again
                raise torch.OutOfMemoryError("as if the device were full")

            loss.sum = fails  # type: ignore[method-assign]
        yield

    with around_gradients(full):
        finished = train(wanted, overwrite=True).run
    lines = finished.read_metrics()
    budgets = [line["token_budget"] for line in lines if line.get("event") == "out_of_memory"]
    apart = max(abs(a - b["loss"]) for a, b in zip(expected, (x for x in lines if "loss" in x), strict=True))
    record(
        what="a step that ran out of memory = the same step",
        ok=bool(budgets) and apart < 0.02,
        errors=[apart],
        budgets=budgets,
    )


# ---- fast


def big() -> Path:
    return write_model("big", "qwen2", BIG, torch.bfloat16)


def case_recipe(name: str, *, steps: int) -> Recipe:
    length, settings = LENGTHS[name.partition("-")[0]], dict(CASES[name])
    quantization, targets = settings.pop("quantization", "none"), settings.pop("targets", "balanced")
    batch = settings.pop("batch", 8)
    return recipe(
        f"case-{name}",
        big(),
        tokens=length,
        batch=batch if ON_GPU else 2,
        steps=steps,
        model={"quantization": quantization},
        lora={"targets": targets},
        train={"compile": ON_GPU, "recompute": 0, **settings},
    )


def case(name: str) -> None:
    if CASES[name].get("quantization") == "fp8" and not ON_GPU:
        record(what=f"case {name}", ok="only a GPU has fp8 products")
        return
    if name.endswith("-liger"):
        if importlib.util.find_spec("liger_kernel") is None:
            record(what=f"case {name}", ok="liger-kernel is not installed")
            return
        stock = trl_trainer.trl_arguments
        trl_trainer.trl_arguments = lambda *args, **given: {**stock(*args, **given), "use_liger_kernel": True}
    seen = run(case_recipe(name, steps=8 if ON_GPU else 3))
    length, wide = LENGTHS[name.partition("-")[0]], BIG["num_attention_heads"]
    record(case=name, length=length, heads=wide, flops_per_token=flops_per_token(length), **seen)


def flops_per_token(length: int) -> float:
    """Return the operations of training on a token: two products a frozen weight, and attention's seven."""
    hidden, layers = BIG["hidden_size"], BIG["num_hidden_layers"]
    shared = BIG["num_key_value_heads"] / BIG["num_attention_heads"]
    weights = layers * hidden * (2 * hidden + 2 * hidden * shared + 3 * BIG["intermediate_size"])
    return 4.0 * (weights + hidden * BIG["vocab_size"]) + 3.5 * 2 * length * hidden * layers


def profile(name: str) -> None:
    """Profile one step after some others."""
    calls, seen = [0], {}
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * ON_GPU

    @contextmanager
    def around(trainer: FastTrainer) -> Iterator[None]:
        calls[0] += 1
        if calls[0] != 5:  # the first may be a rehearsal
            yield
            return
        started = time.perf_counter()
        with torch.profiler.profile(activities=kinds) as watched:
            yield
            seen["host_seconds"] = time.perf_counter() - started
            if ON_GPU:
                torch.cuda.synchronize()
            seen["seconds"] = time.perf_counter() - started
        seen["tokens"] = sum(len(example.input_ids) for example in trainer.current_step.examples)
        seen["events"] = watched.events()

    with around_gradients(around):
        run(case_recipe(name, steps=6))
    spent, launches, named = Counter[str](), 0, Counter[str]()
    for event in seen.pop("events"):
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device or not ON_GPU:
            micros = event.self_device_time_total if on_device else event.self_cpu_time_total
            spent[kind_of(event.name)] += micros
            named[event.name[:120]] += micros
            launches += 1
    busy = sum(spent.values()) / 1e6
    record(
        profile=name,
        microseconds_per_token={kind: micros / seen["tokens"] for kind, micros in spent.most_common()},
        launches=launches,
        busy_share=busy / seen["seconds"],
        longest=dict(named.most_common(40)),
        **seen,
    )


def kind_of(kernel: str) -> str:
    """Return which kind of work a kernel does, by its name."""
    name = kernel.lower()
    if any(part in name for part in ("flash", "fmha", "sdpa", "attention")):
        return "attention"
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "xmma", "splitk", "aten::mm", "addmm", "bmm")):
        return "products"
    if name.startswith(("triton", "graph_")):
        return "fused by the compiler"
    return "copies" if any(part in name for part in ("memcpy", "memset", "copy_")) else "element-wise and others"


def answers() -> None:
    """Answer prompts with base and fine-tuned model, and certify a merge."""
    number, length = (64, 64) if ON_GPU else (4, 4)
    model = write_model("small-qwen2-bfloat16", "qwen2", SMALL, torch.bfloat16) if not ON_GPU else big()
    asked = {"metric": "exact_match", "samples": number, "max_new_tokens": length}
    sections: dict[str, Any] = {"data": {"eval": 0.5}, "evaluate": asked}
    # A fast rate, since rounding the merged weights to bfloat16 loses small updates, and the certificate says so.
    sections["train"] = {"learning_rate": 0.02}
    wanted = recipe("answers", model, tokens=256 if ON_GPU else 128, batch=number // 2, steps=4, **sections)
    finished = train(wanted, overwrite=True).run
    plan = read_json(finished.plan)
    seconds = plan["measured"]["evaluate_seconds"]
    record(answers=number, new_tokens=length, planned_seconds=plan["time"]["evaluate_seconds"], seconds=seconds)
    merged = WORK / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    certificate = merge(finished.root, merged).certificate  # raises if the merged model differs from the trained one
    record(what="merge = adapter", ok=certificate["passed"], certificate=certificate)


if __name__ == "__main__":
    WORK.mkdir(exist_ok=True)
    {
        "losses": losses,
        "waiting": waiting,
        "resume": resumed,
        "out-of-memory": out_of_memory,
        "model": big,
        "case": case,
        "profile": profile,
        "answers": answers,
    }[sys.argv[1]](*sys.argv[2:])
