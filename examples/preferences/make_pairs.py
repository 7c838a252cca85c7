"""Write prompts.jsonl, new scheduling requests with their right answers, and eval.jsonl, held-out pairs.

The mistakes of eval.jsonl are made by a rule: `urgent` is the wrong way round, the first answer is repeated although a
second turn changes it, or the place is left out. Standard library only, seeded. train.jsonl is made of prompts.jsonl by
`loratune sample`; README.md has the command.
"""

import json
import random
import runpy
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parents[1] / "quickstart"
SEED, PROMPT_SEED = 2026, 7
NUM_PROMPTS, NUM_DRAWN_BEFORE = 400, 160

Messages = list[dict[str, str]]


def main(folder: Path = Path(__file__).parent) -> None:
    """Write both files into the folder."""
    script = runpy.run_path(str(QUICKSTART / "make_data.py"))
    vocabulary, _ = script["split_vocabulary"](random.Random(script["SEED"]))  # the training half of the quickstart
    known = {title_of(messages) for name in ("train", "eval") for messages in quickstart_rows(name)}
    rng = random.Random(PROMPT_SEED)
    prompts: dict[str, Messages] = {}
    while len(prompts) < NUM_PROMPTS:
        messages = conversation(rng, script, vocabulary)
        if title_of(messages) not in known:
            prompts.setdefault(title_of(messages), messages)
    rng, drawn = random.Random(SEED), set[str]()
    while len(drawn) < NUM_DRAWN_BEFORE:  # so that the held-out pairs stay those of earlier versions
        messages = conversation(rng, script, vocabulary)
        if title_of(messages) not in known and pair(rng, messages):
            drawn.add(title_of(messages))
    held_out = [row for messages in quickstart_rows("eval") if (row := pair(rng, messages))]
    write(folder / "prompts.jsonl", [{"messages": messages} for messages in prompts.values()])
    write(folder / "eval.jsonl", held_out)


def conversation(rng: random.Random, script: dict[str, Any], vocabulary: Any) -> Messages:
    """Return a request of the quickstart's kind; every third one is changed in a second turn."""
    wish = script["draw_wish"](rng, vocabulary)
    messages = [turn("user", script["request"](rng, wish)), turn("assistant", wish.answer())]
    if rng.random() < 1 / 3:
        text, amended = script["amend"](rng, vocabulary, wish)
        messages += [turn("user", text), turn("assistant", amended.answer())]
    return messages


def pair(rng: random.Random, messages: Messages) -> dict[str, Any] | None:
    """Return the conversation with a second answer that has a mistake; None if no mistake fits."""
    *prompt, last = messages
    right = json.loads(last["content"])
    wrong = {**right, "urgent": not right["urgent"]}
    if len(prompt) > 1:
        wrong = json.loads(prompt[1]["content"])
    elif right["place"] is not None and rng.random() < 0.4:
        wrong = {**right, "place": None}
    if wrong == right:
        return None
    return {"prompt": prompt, "chosen": last["content"], "rejected": json.dumps(wrong, separators=(",", ":"))}


def title_of(messages: Messages) -> str:
    """Return what a conversation is about."""
    title: str = json.loads(messages[1]["content"])["title"]
    return title


def turn(role: str, content: str) -> dict[str, str]:
    """Return a message."""
    return {"role": role, "content": content}


def quickstart_rows(name: str) -> list[Messages]:
    """Return the conversations of a file of the quickstart."""
    lines = (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows, one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
