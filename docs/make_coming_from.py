"""Write docs/coming-from.md from the table of other tools' names. `--check` only tests whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from pages import write_or_check

from loratune.recipe.other_names import NO_COUNTERPART, SETTINGS, VALUES
from loratune.recipe.recipe import Recipe

PAGE = Path(__file__).parent / "coming-from.md"
HEAD = """# Coming from another tool

<!-- Written by docs/make_coming_from.py from src/loratune/recipe/other_names.py; run `make docs` to update it. -->

This page lists what TRL, PEFT, transformers, Axolotl, LLaMA-Factory, Unsloth and mlx-lm call a setting, and what it is
called in loratune. If you use one of their names in a recipe, on the command line or in Python, the error tells you
ours.

Four things work differently:

- **The batch size counts what the optimizer sees**: all examples of a step, over all devices and micro-batches. There
  are no gradient accumulation steps and no per-device batch size to set: `train.batch_size` is their product. Memory
  only decides how a step is split into micro-batches.
- **Only answers are trained** (`data.train_on: assistant`), and loratune verifies before the run which tokens these
  are.
- **Nothing is padded**, so there is no need to turn on packing or group examples by length.
- **Every run evaluates its base model too**, on held-out data, so you need no separate evaluation script.

## Translate another tool's file

    loratune init --from axolotl.yaml                  # writes axolotl-loratune.yaml
    loratune init chats.jsonl --from sft.yaml          # the settings of sft.yaml, on other data
    loratune init --from arguments.json                # of SFTConfig, LoraConfig, TrainingArguments

`--from` reads YAML files of Axolotl, LLaMA-Factory and mlx-lm, and arguments of TRL, PEFT and transformers as JSON or
YAML. Examples per device and accumulation steps are multiplied into one batch size (multiply it yourself by your number
of devices, which no file states), warm-up steps become a fraction if the number of steps is known, and names in
LLaMA-Factory's `dataset_info.json` are looked up, with their columns and tags. mlx-lm's iterations are micro-batches,
so `iters` and `steps_per_eval` are divided by `grad_accumulation_steps`. Settings that the file does not contain keep
loratune's defaults, which may differ from the other tool's.

**Nothing is dropped silently.** For every setting of the recipe, a comment names the settings of the file that it comes
from. A setting without a counterpart, or with a value that is not valid in loratune, is printed and kept in a comment
of the recipe, with the reason. If two settings contradict each other, the first counts and the other is reported; if
they are about which tokens are trained, or about the task, it is an error. A list or a mapping in place of a single
word is an error too.

**Preferences** become `task: preference` ([preferences.md](preferences.md)) where the loss is DPO, IPO, ORPO or SimPO:
Axolotl's `rl`, LLaMA-Factory's `stage: dpo` with `pref_loss`, TRL's `loss_type`. For SimPO, β, γ and the weight of the
supervised term are that tool's defaults unless they are set. Files for KTO, reward models, PPO, GRPO, distillation and
other losses of pairs are refused, with an error that says so (loratune itself can train KTO). TRL averages supervised
terms over the tokens of a micro-batch, and for ORPO over the prompt too; in loratune, each is the mean over the tokens
of a chosen answer. TRL's arguments do not say which trainer they are for: if they contain `beta` but no `loss_type`,
the error asks for it.
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD, "## Settings\n", "| elsewhere | here |", "|---|---|"]
    order = [f"{section}." for section in Recipe.model_fields]
    parts += [
        f"| `{name}` | {_answer(answer)} |"
        for name, answer in sorted(SETTINGS.items(), key=lambda pair: (_place(pair[1], order), pair[1], pair[0]))
    ]
    parts += ["\n## Values\n", "| setting | elsewhere | here |", "|---|---|---|"]
    parts += [
        f"| `{setting}` | `{theirs}` | `{ours}` |"
        for setting, values in VALUES.items()
        for theirs, ours in values.items()
    ]
    return "\n".join(parts) + "\n"


def _place(answer: str, order: list[str]) -> int:
    return next((number for number, section in enumerate(order) if answer.startswith(section)), len(order))


def _answer(answer: str) -> str:
    if answer.startswith(NO_COUNTERPART):
        return f"not needed: {answer.removeprefix(NO_COUNTERPART)}"
    setting, mark, remark = answer.partition(";")
    return f"`{setting}`{mark}{remark}"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
