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

What TRL, PEFT, transformers, Axolotl, LLaMA-Factory, Unsloth and mlx-lm call a setting, and what it is called here. If
you write one of these names in a recipe, on the command line or in Python, the error says the same.

Four things are different in kind:

- **The batch size counts what the optimizer sees**: all examples of a step, over all devices and micro-batches. There
  is no number of accumulation steps and no per-device batch size: `train.batch_size` is their product. Memory only
  decides how a step is cut.
- **Only answers are trained** (`data.train_on: assistant`), and which tokens these are is verified before the run.
- **Nothing is padded**, so there is no packing to switch on and no grouping by length.
- **Every run measures its base model too**, on held-out data: there is no separate evaluation script.

## A file of another tool as a recipe

    loratune init --from axolotl.yaml                  # writes axolotl-loratune.yaml
    loratune init chats.jsonl --from sft.yaml          # the settings of sft.yaml, on other data
    loratune init --from arguments.json                # of SFTConfig, LoraConfig, TrainingArguments

Reads YAML of Axolotl, LLaMA-Factory and mlx-lm, and arguments of TRL, PEFT and transformers as JSON or YAML. Batch
sizes are multiplied (examples per device × accumulated steps; times the number of your devices, which no file says),
steps of a warm-up become a fraction where the number of steps is known, names in LLaMA-Factory's `dataset_info.json`
are looked up, with their columns and tags. mlx-lm's iterations are micro-batches: `iters` and `steps_per_eval` are
divided by `grad_accumulation_steps`. What the file does not set keeps loratune's defaults, which may differ from that
tool's.

**Nothing is dropped silently.** Every setting of the recipe names those of the file that it comes from. What has no
counterpart, or a value that is not valid here, is printed and stands in a comment of the recipe with the reason. Of two
settings that say different things the first counts and the other is named; about which tokens are trained, and about
the task, that is an error, and so is a list or a mapping where a word belongs.

**Preferences** become `task: preference` ([preferences.md](preferences.md)) where the loss is DPO, IPO, ORPO or SimPO:
Axolotl's `rl`, LLaMA-Factory's `stage: dpo` with `pref_loss`, TRL's `loss_type`. For SimPO, β, γ and the weight of the
supervised term are that tool's defaults unless they are set. KTO, reward models, PPO, GRPO, distillation and other
losses of pairs are refused by name. TRL averages supervised terms over the tokens of a micro-batch, and ORPO's over the
prompt too; here each is the mean over the tokens of a chosen answer. A file of TRL does not name its trainer: if it has
`beta` and no `loss_type`, the error asks for it.
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
