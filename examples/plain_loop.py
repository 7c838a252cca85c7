"""LoRA fine-tuning in one flat file: the mathematics of `loratune train`, without anything that makes it fast.

    python examples/plain_loop.py MODEL_FOLDER train.jsonl OUTPUT_FOLDER

Read it from top to bottom: rows → chat template → mask of the answers → optimizer steps → flat micro-batches → loss on
the supervised tokens → gradient clipping → AdamW → adapter. `loratune/training/fast_trainer.py` does the same with
kernels of its own, checkpoints and several processes; `tests/test_plain_loop.py` holds both to the same adapter.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loratune.data.steps import num_steps, num_steps_per_epoch, step_examples


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The recipe's fields of the same names."""

    r: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    epochs: float = 3
    learning_rate: float = 5e-5
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 8
    seed: int = 42
    token_budget: int = 2048


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized conversation: `supervised[t]` says whether the model is trained to predict token t."""

    input_ids: list[int]
    supervised: list[bool]


def make_example(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render a conversation by the model's chat template, and mark each answer with its stop token."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            # The answer is what the template adds to its own prompt. This needs a template that only appends; loratune
            # also handles the others, and checks each mask in a second, independent way.
            prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            through = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not (text.startswith(through) and through.startswith(prompt)):
                raise ValueError("the template does not render a longer conversation as a continuation")
            # The stop token is trained, or the model never learns to end; the line break after it is the template's.
            answers.append((len(prompt), through.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)))
    # One call for the whole text, since pieces would give other tokens at their seams. The template has written the
    # special tokens already: adding them again would double the first.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    supervised = [any(start <= a and b <= stop for start, stop in answers) for a, b in encoded["offset_mapping"]]
    return Example(input_ids=encoded["input_ids"], supervised=supervised)


def micro_batches(examples: Iterable[Example], token_budget: int) -> Iterator[list[Example]]:
    """Cut a step's examples into groups of at most `token_budget` tokens, changing the memory, never the gradient."""
    batch: list[Example] = []
    for example in examples:
        if batch and sum(len(e.input_ids) for e in [*batch, example]) > token_budget:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def sum_loss(model: torch.nn.Module, batch: list[Example]) -> torch.Tensor:
    """Return the sum of -log p over the supervised tokens of a micro-batch."""
    lengths = [len(example.input_ids) for example in batch]
    # One long row without padding. Two things keep the examples apart: positions restart at 0, and no token attends to
    # another example, which makes the causal mask block-diagonal.
    input_ids = torch.tensor([token for example in batch for token in example.input_ids])
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    example_of = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(lengths))
    attends = (example_of[:, None] == example_of[None, :]).tril()
    inputs = {"input_ids": input_ids[None], "position_ids": position_ids[None], "attention_mask": attends[None, None]}
    logits = model(**inputs, use_cache=False).logits[0]
    supervised = torch.tensor([carries_loss for example in batch for carries_loss in example.supervised])
    # Token t is predicted at t - 1. Nothing predicts the first token of an example: before it, another example ends.
    targets_at = torch.nonzero(supervised & (position_ids > 0))[:, 0]
    return torch.nn.functional.cross_entropy(logits[targets_at - 1].float(), input_ids[targets_at], reduction="sum")


def step_gradients(model: torch.nn.Module, examples: list[Example], token_budget: int) -> float:
    """Add up the gradients of one optimizer step; return its loss, the mean over its supervised tokens."""
    # Divided once, by the tokens of the whole step. A mean of micro-batch means would give the tokens of a micro-batch
    # with few supervised ones more weight, and so the result would depend on the memory.
    num_supervised = sum(sum(example.supervised[1:]) for example in examples)
    total = 0.0
    for batch in micro_batches(examples, token_budget):
        loss = sum_loss(model, batch) / num_supervised
        loss.backward()
        total += loss.item()
    return total


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up, then a line that reaches 0 after the last step."""
    warmup = math.ceil(settings.warmup_fraction * steps)
    if step < warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * (steps - step) / (steps - warmup)


def train(model_folder: Path, train_file: Path, output_folder: Path, settings: Settings) -> None:
    """Train an adapter and save it in PEFT's format."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with train_file.open(encoding="utf-8") as lines:
        examples = [make_example(json.loads(line)["messages"], tokenizer) for line in lines]
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, target_modules=[*settings.targets], task_type="CAUSAL_LM"
    )
    torch.manual_seed(settings.seed)  # A is drawn here; B starts at zero, so the first step starts from the base model
    model = get_peft_model(base, config).train()

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=settings.weight_decay)
    steps = num_steps(len(examples), settings.batch_size, settings.epochs)
    for step in range(steps):
        epoch, index = divmod(step, num_steps_per_epoch(len(examples), settings.batch_size))
        order = {"batch_size": settings.batch_size, "seed": settings.seed, "epoch": epoch, "index": index}
        chosen = step_examples(len(examples), **order)
        loss = step_gradients(model, [examples[i] for i in chosen], settings.token_budget)
        torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, settings)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss:.4f}")
    model.save_pretrained(output_folder)


if __name__ == "__main__":
    train(*map(Path, sys.argv[1:4]), settings=Settings())
