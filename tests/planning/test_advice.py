"""Each rule speaks if it applies, and only then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loratune.planning.advice import give_advice
from loratune.planning.advice_facts import AdviceFacts
from loratune.recipe.recipe import Recipe

GOOD_RECIPE: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "alpha": 32, "targets": "complete"},
    "train": {"learning_rate": 2e-4, "warmup_fraction": 0.03, "batch_size": 16, "device": "cpu"},
}


def facts(recipe: dict[str, Any] | None = None, **changed: Any) -> AdviceFacts:
    """Return the facts of a run that needs no advice, except for what is changed."""
    values = {section: dict(fields) for section, fields in GOOD_RECIPE.items()}
    for name, value in (recipe or {}).items():
        section, _, field = name.partition(".")
        values.setdefault(section, {})[field] = value
    good = AdviceFacts(
        recipe=Recipe.parse(values),
        num_examples=1000,
        num_steps=189,
        num_supervised_tokens=200_000,
        num_cut=0,
        trainable=4_000_000,
        feed_forward=True,
        architecture="LlamaForCausalLM",
        stop_token="<|im_end|>",
        generation_stops=("<|im_end|>",),
        prompt_check={"checked": 64, "header_differs": 0, "history_differs": 0},
    )
    return replace(good, **changed)


DIFFERS = {
    "checked": 64,
    "file": "a.jsonl",
    "line": 7,
    "trained": "<｜Assistant｜>Hi",
    "served": "<｜Assistant｜><think>",
}


def test_a_run_that_needs_no_advice_gets_none() -> None:
    assert give_advice(facts()) == ()


@pytest.mark.parametrize(
    ("given", "about", "words"),
    [
        (facts({"train.learning_rate": 5e-5}), "train.learning_rate", "5e-05 is low for LoRA"),
        (facts({"train.learning_rate": 1e-2}), "train.learning_rate", "0.01 is high for LoRA"),
        (facts(feed_forward=False), "lora.targets", "attention only"),
        (facts(trainable=90_000), "lora.r", "200,000 trained tokens"),
        (facts({"lora.alpha": 1}), "lora.alpha", "alpha/r = 0.0625, so it learns far slower"),
        (facts({"lora.alpha": 512}), "lora.alpha", "far faster"),
        (facts({"train.warmup_fraction": 0.0, "train.learning_rate": 1e-3}), "train.warmup_fraction", "rate of 0.001"),
        (facts({"train.warmup_fraction": 0.0}, num_steps=1500), "train.warmup_fraction", "without warm-up"),
        (facts(num_devices=24), "train.batch_size", "16 of 24 devices busy and 8 idle; the smallest"),
        (facts(num_examples=20), "data.train", "20 examples are few"),
        (facts({"train.batch_size": 256}, num_steps=12), "train.batch_size", "12 optimizer steps are probably too few"),
        (facts({"train.batch_size": 256}), "train.batch_size", "batch sizes such as 256"),
        (facts({"train.log_every": 500}), "train.log_every", "with 189 steps, log_every=500 would log nothing"),
        (facts({"train.eval_every": 500}), "train.eval_every", "measure no held-out loss"),
        (facts({"train.save_every": 500}), "train.save_every", "a crash would lose everything"),
        (facts({"train.log_every": 10}, num_steps=9000), "train.eval_every", "an epoch has 3,000 steps"),
        (facts({"data.train_on": ["user"], "evaluate.metric": "bleu"}), "evaluate.metric", "data.train_on is [user]"),
        (facts(num_cut=20), "data.max_length", "20 of 1,000 examples are truncated to 1,024 tokens"),
        (facts({"lora.r": 32, "lora.alpha": 64}), "lora.r", "this adapter has rank 32"),
        (facts({"lora.r": 600, "lora.alpha": 1200}), "lora.r", "rejects adapters of rank 600"),
        (facts({"lora.variant": "pissa"}), "lora.r", "this adapter has rank 32"),
        (facts({"lora.variant": "dora"}), "lora.variant", "cannot load DoRA's magnitudes"),
        (facts(architecture="GPT2LMHeadModel"), "vLLM", "does not load LoRA adapters on GPT2LMHeadModel"),
        (facts(unknown_to_gguf=("model.layers.0.odd",)), "llama.cpp", "model.layers.0.odd"),
        (facts(generation_stops=("<|endoftext|>",)), "stop token", "stop at <|endoftext|> only"),
        (facts(prompt_check={**DIFFERS, "header_differs": 3, "history_differs": 0}), "chat template", "a.jsonl:7"),
        (facts(prompt_check={**DIFFERS, "header_differs": 0, "history_differs": 3}), "data.thinking", "of earlier"),
    ],
)  # fmt: skip
def test_each_rule_speaks_alone_and_gives_its_reason(given: AdviceFacts, about: str, words: str) -> None:
    (advice,) = give_advice(given)

    assert advice.about == about
    assert words in advice.reason
    assert advice.text


@pytest.mark.parametrize(
    "given",
    [
        facts({"train.learning_rate": 1e-4}),
        facts({"train.warmup_fraction": 0.0}),
        facts({"train.log_every": 189, "train.eval_every": 0.1}),
        facts({"train.log_every": "never", "train.eval_every": "never", "train.save_every": "never"}, num_steps=9000),
        facts(num_cut=9),
        facts({"data.train_on": "all"}, num_cut=500),
        facts({"data.train_on": ["user", "assistant"], "evaluate.metric": "bleu"}),
        facts({"data.train_on": "all", "evaluate.metric": "bleu"}),
        facts({"lora.r": 8, "lora.alpha": 16}),
        facts({"train.batch_size": 8}, num_steps=20, num_examples=60),
        facts(feed_forward=None),
        facts(stop_token="", prompt_check={}),
        facts(generation_stops=()),
    ],
)
def test_settings_in_order_get_no_advice(given: AdviceFacts) -> None:
    assert give_advice(given) == ()


@pytest.mark.parametrize(
    ("served", "words"),
    [
        ("<think>\n", "add thoughts to the answers"),
        ("<think>\n\n</think>\n\n", "data.thinking=strip"),
        ("[/INST]", "serve with the prompt that was trained"),
    ],
)
def test_what_to_do_about_the_prompt_depends_on_what_it_opens(served: str, words: str) -> None:
    check = {**DIFFERS, "header_differs": 3, "history_differs": 0, "served": served}

    (advice,) = give_advice(facts(prompt_check=check))

    assert words in advice.text


def test_vllm_is_started_with_a_rank_that_it_knows() -> None:
    (advice,) = give_advice(facts({"lora.r": 48, "lora.alpha": 96}))

    assert advice.text == "serve with vLLM's --max-lora-rank 64"
    assert str(advice).startswith("serve with vLLM's --max-lora-rank 64: its default rejects")
