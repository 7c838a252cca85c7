"""Answers from slots of one cache against transformers' own greedy generation, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from loratune.evaluation import greedy
from loratune.evaluation.generate import as_generator
from loratune.evaluation.greedy import cannot_share, fitting_rows, greedy_rows
from loratune.evaluation.slot_cache import SlotCache, holds_plain_keys
from tests.invariants.families import base_of, config_of

NEW_TOKENS = 10
SETTINGS = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0)
FAMILIES = ["Llama 2, 3", "Mistral", "Gemma 2", "Gemma 3 (text)", "gpt-oss", "GPT-2", "OPT", "DeepSeek V3, R1"]
"""Grouped heads, sliding windows shorter than the prompts, soft caps, sinks, learned positions, latent keys."""


def random_tokens(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def prompts() -> list[list[int]]:
    """Some share 18 tokens, some nothing, two are the same, one is a single token; the longest first."""
    beginning, *ends = random_tokens(18, 9, 5, 3, 2)
    alone = random_tokens(7, 20, 1)
    return sorted([*(beginning + end for end in ends), beginning + ends[0], *alone], key=len, reverse=True)


def plain_answers(model: PreTrainedModel) -> list[list[int]]:
    with as_generator(model, SETTINGS):
        return [
            model.generate(torch.tensor([prompt]), generation_config=SETTINGS)[0, len(prompt) :].tolist()
            for prompt in prompts()
        ]


def our_answers(model: PreTrainedModel, stops: tuple[int, ...], num_rows: int) -> list[list[int]]:
    with as_generator(model, SETTINGS):
        rows = greedy_rows(model, prompts(), max_new_tokens=NEW_TOKENS, stop_token_ids=stops, num_rows=num_rows)
        answers = dict(rows)
    return [answers[index] for index in range(len(prompts()))]


def until(stops: Sequence[int], row: list[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in stops), len(row)) + 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_token_for_token(family: str, tmp_path: Path) -> None:
    model = base_of(family, tmp_path).float().eval()
    assert cannot_share(model) is None
    rows = plain_answers(model)
    assert len(set(map(tuple, rows))) > 3
    stops = (rows[0][4], rows[3][1])
    expected = [until(stops, row) for row in rows]
    assert len(set(map(len, expected))) > 1, "rows end at different steps"
    for num_rows in (1, 3, 100):
        assert our_answers(model, stops, num_rows) == expected


def test_a_shared_beginning_goes_through_the_model_once(tmp_path: Path) -> None:
    model = base_of("Llama 2, 3", tmp_path).eval()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True)
    shared = [beginning + end for beginning, end in zip(random_tokens(30) * 4, random_tokens(4, 4, 4, 4), strict=True)]
    with as_generator(model, SETTINGS):
        assert len(list(greedy_rows(model, shared, max_new_tokens=1, stop_token_ids=(), num_rows=4))) == 4
    assert seen == [30, 4 * 3, 4]


def test_rows_that_stop_leave_the_batch_and_others_take_their_place(tmp_path: Path) -> None:
    model = base_of("Llama 2, 3", tmp_path).eval()
    stop = plain_answers(model)[0][2]
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["input_ids"])) if inputs["input_ids"].shape[1] == 1 else None,
        with_kwargs=True,
    )
    answers = our_answers(model, (stop,), 3)
    assert max(rows) == 3 < len(prompts())
    # A pass over the one-token prompt or over one new token of a prompt may add a row or two.
    assert sum(map(len, answers)) <= sum(rows) <= sum(map(len, answers)) + 3


def test_the_cache_holds_no_more_tokens_than_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_of("Llama 2, 3", tmp_path).eval()
    made: list[SlotCache] = []

    class Watched(SlotCache):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(greedy, "SlotCache", Watched)
    longest = len(prompts()[0]) + NEW_TOKENS
    for token_limit in (2 * longest, 170, 300, 10_000):
        made.clear()
        our_answers(model, (), fitting_rows(len(prompts()), longest, token_limit))
        held = [cache.layers[0].keys for cache in made]
        assert len(held) == 2, "the rows, and the beginning that they share"
        assert sum(keys.shape[0] * keys.shape[2] for keys in held if keys is not None) <= token_limit


def test_what_cannot_be_shared_says_why(tmp_path: Path) -> None:
    assert "more than keys and values" in str(cannot_share(base_of("Falcon H1", tmp_path)))
    assert not holds_plain_keys(config_of("Qwen3.5 (text)"))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "length of the text" in str(cannot_share(base_of("Llama 2, 3", tmp_path, rope_parameters=rope)))


def test_the_layers_of_transformers_caches_are_those_we_know() -> None:
    """A new kind of cache layer falls back to transformers; this lists the kinds that do not."""
    assert {type(layer).__name__ for layer in DynamicCache(config=config_of("Gemma 3 (text)")).layers} == {
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
    }
