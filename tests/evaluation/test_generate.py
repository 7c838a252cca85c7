"""Batched greedy answers against a plain loop that feeds the whole text again for every token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import models as architectures
from transformers.utils.logging import disable_propagation, enable_propagation

from loratune.evaluation.decode import CHUNK, LEAST_PREFIX
from loratune.evaluation.generate import Answer, generate_answers, sample_answers
from loratune.evaluation.sampling import Sampling
from loratune.model.kernels.attention import PACKED, register
from tests.conftest import some

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough that no two logits are near each other and that answers are not one token over and over.
    "initializer_range": 0.4,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, object]] = {
    "LlamaConfig": {"num_key_value_heads": 2},
    "Qwen2Config": {"num_key_value_heads": 2},
    # Its capped attention scores are beyond sdpa, so it answers with eager attention.
    # With a head of its own, since embeddings outweigh what its layers add: tied, it repeats one token.
    "Gemma2Config": GEMMA | {"attn_logit_softcapping": 0.5},
    "Gemma3TextConfig": GEMMA,
    "GPT2Config": {},
    "GPTNeoXConfig": {},
    "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.4},
}
ALIBI: dict[str, dict[str, object]] = {
    "BloomConfig": {"tie_word_embeddings": False},
    "MptConfig": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "FalconConfig": {"tie_word_embeddings": False, "alibi": True, "new_decoder_architecture": False},
}
"""Positions are distances between places, which padding in between would change."""
LENGTHS = (5, 1, 9, 5, 3, 12, 2)


@dataclass(frozen=True)
class Place:
    file: str = "eval.jsonl"
    line: int | None = 1


@dataclass(frozen=True)
class TinyPrompt:
    input_ids: list[int]
    references: tuple[str, ...] = ("",)
    origin: Place = field(default_factory=Place)
    text: str = ""
    question: str = ""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{token}": token for token in range(VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def tiny_model(family: str = "LlamaConfig") -> PreTrainedModel:
    """In float64, so that no rounding decides which token is the likeliest; eager attention knows float32 at most."""
    config = getattr(architectures, family)(**{**SIZES, **(FAMILIES | ALIBI)[family]})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.eval()
    return model.double() if model._supports_sdpa else model


def prompts() -> list[TinyPrompt]:
    generator = torch.Generator().manual_seed(1)
    return [TinyPrompt(torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()) for n in LENGTHS]


@torch.no_grad()
def plain_greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def words(answer: Answer) -> list[int]:
    return [int(word.removeprefix("w")) for word in answer.text.split()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("token_limit", [1, 40, 10_000])
def test_batched_answers_are_those_of_a_plain_loop_in_the_order_of_the_prompts(
    tokenizer: PreTrainedTokenizerFast, family: str, token_limit: int
) -> None:
    model = tiny_model(family)
    answers = generate_answers(
        model, tokenizer, prompts(), max_new_tokens=8, stop_token_ids=(), token_limit=token_limit
    )
    expected = [plain_greedy(model, prompt.input_ids, 8) for prompt in prompts()]
    assert [words(answer) for answer in answers] == expected
    assert len({tuple(row) for row in expected}) > 3
    assert all(answer.num_tokens == 8 and not answer.stopped for answer in answers)


@pytest.mark.parametrize("family", some([*FAMILIES, *ALIBI], "LlamaConfig", "Gemma2Config", "MptConfig"))
def test_prompts_that_begin_alike_or_repeat_are_answered_as_each_alone(
    tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    """Positions must not count the padding between a common prefix and the rest, and no window may be shifted by it."""
    model = tiny_model(family)
    common = torch.randint(4, VOCABULARY, (LEAST_PREFIX,), generator=torch.Generator().manual_seed(2)).tolist()
    asked = [TinyPrompt([*common, *prompt.input_ids]) for prompt in prompts()]
    asked = [*asked, asked[2], asked[0], asked[2]]
    expected = [plain_greedy(model, prompt.input_ids, 2 * CHUNK + 3) for prompt in asked]
    answers = generate_answers(model, tokenizer, asked, max_new_tokens=2 * CHUNK + 3, stop_token_ids=())
    assert [words(answer) for answer in answers] == expected
    assert max(len(set(row)) for row in expected) > 2
    stop = max(expected[0], key=expected[0].index)
    ended = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert len({len(row) for row in ended}) > 1
    answers = generate_answers(model, tokenizer, asked, max_new_tokens=2 * CHUNK + 3, stop_token_ids=(stop,))
    assert [words(answer) for answer in answers] == ended


def test_a_common_prefix_and_an_ended_answer_go_through_the_model_once(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    asked = [TinyPrompt([*range(4, 4 + LEAST_PREFIX), 30 + n % 4, 40 + n % 4]) for n in range(8)]
    rows: list[tuple[int, ...]] = []
    model.get_decoder().register_forward_pre_hook(  # type: ignore[no-untyped-call]
        lambda _, __, inputs: rows.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    written = [set(plain_greedy(model, prompt.input_ids, CHUNK)) for prompt in asked[:4]]
    stop = (set.union(*written) - set.intersection(*written)).pop()
    rows.clear()
    answers = generate_answers(model, tokenizer, asked, max_new_tokens=CHUNK + 2, stop_token_ids=(stop,))
    ended = sum(answer.stopped for answer in answers)
    assert 0 < ended < 8
    assert rows == [(1, LEAST_PREFIX), (4, 1), *[(8, 1)] * CHUNK, *[(8 - ended, 1)] * 2]


def test_an_answer_ends_before_the_first_of_the_stop_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    rows = [plain_greedy(model, prompt.input_ids, 8) for prompt in prompts()]
    stops = (rows[0][3], rows[1][0])
    answers = generate_answers(model, tokenizer, prompts(), max_new_tokens=8, stop_token_ids=stops)
    for row, answer in zip(rows, answers, strict=True):
        end = next((place for place, token in enumerate(row) if token in stops), None)
        assert words(answer) == row[:end]
        assert answer.stopped == (end is not None)
        assert answer.num_tokens == (8 if end is None else end + 1)
    assert answers[1] == Answer(text="", num_tokens=1, stopped=True)


def test_the_models_own_end_token_does_not_stop_when_it_is_not_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    first = plain_greedy(model, prompts()[0].input_ids, 4)
    model.generation_config.eos_token_id = first[1]
    (answer,) = generate_answers(model, tokenizer, prompts()[:1], max_new_tokens=4, stop_token_ids=())
    assert words(answer) == first


@pytest.fixture
def transformers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    disable_propagation()


def test_the_models_own_sampling_settings_change_nothing_and_nothing_is_warned_of(
    tokenizer: PreTrainedTokenizerFast, transformers_log: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    plain = generate_answers(model, tokenizer, prompts(), max_new_tokens=8, stop_token_ids=(2,))
    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.8, max_length=7)
    model.generation_config = own
    again = generate_answers(model, tokenizer, prompts(), max_new_tokens=8, stop_token_ids=(2,))
    assert again == plain
    assert model.generation_config is own
    assert transformers_log.messages == []


def test_modes_and_attention_are_restored_even_when_it_is_interrupted(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    register()
    model.set_attn_implementation(PACKED)
    model.train()
    model.get_submodule("model.norm").eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []

    def interrupt(_: int) -> None:
        seen.append((model.training, model.config._attn_implementation))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_answers(model, tokenizer, prompts(), max_new_tokens=2, stop_token_ids=(), progress=interrupt)
    assert seen == [(False, "sdpa")]
    assert model.config._attn_implementation == PACKED
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers by an old name.
def test_the_caller_decides_whether_the_adapter_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    base = tiny_model()
    plain = generate_answers(base, tokenizer, prompts(), max_new_tokens=6, stop_token_ids=())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert isinstance(model, PeftModel)
    model.double()
    tuned = generate_answers(model, tokenizer, prompts(), max_new_tokens=6, stop_token_ids=())
    with model.disable_adapter():
        assert generate_answers(model, tokenizer, prompts(), max_new_tokens=6, stop_token_ids=()) == plain
    assert [words(answer) for answer in tuned] == [plain_greedy(model, prompt.input_ids, 6) for prompt in prompts()]
    assert tuned != plain


def test_progress_counts_every_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    done: list[int] = []
    generate_answers(
        tiny_model(), tokenizer, prompts(), max_new_tokens=2, stop_token_ids=(), progress=done.append, token_limit=24
    )
    assert sum(done) == len(LENGTHS)
    assert len(done) > 1


def test_no_prompts_get_no_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate_answers(tiny_model(), tokenizer, [], max_new_tokens=2, stop_token_ids=()) == []


def test_the_head_gets_no_slice_with_gaps_and_is_left_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    """A slice with gaps makes torch copy the head once for every row, in bfloat16 on a CPU."""
    model = tiny_model()
    head = model.get_output_embeddings()
    seen: list[bool] = []
    own = head.forward
    head.forward = lambda x: (seen.append(x.is_contiguous()), own(x))[1]
    generate_answers(model, tokenizer, prompts(), max_new_tokens=3, stop_token_ids=())
    assert seen
    assert all(seen)
    assert not head._forward_pre_hooks


def test_drawn_answers_follow_the_models_probabilities_and_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """4,000 first tokens of one prompt against the softmax of its logits; without sampling, the likeliest ones."""
    model, prompt = tiny_model(), prompts()[0]
    model.generation_config.temperature = 9.0
    before = torch.random.get_rng_state()

    def drawn(number: int, **settings: float) -> list[int]:
        sampling = Sampling(max_new_tokens=1, **settings)  # type: ignore[arg-type]
        answers = sample_answers(model, tokenizer, [prompt] * number, sampling, stop_token_ids=())
        return [words(answer)[0] for answer in answers]

    first = drawn(4_000, temperature=0.5, seed=1)
    assert torch.random.get_rng_state().equal(before)
    assert first == drawn(4_000, temperature=0.5, seed=1) != drawn(4_000, temperature=0.5, seed=2)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.input_ids])).logits[0, -1]
    expected = torch.softmax(logits / 0.5, dim=-1)
    counted = torch.bincount(torch.tensor(first), minlength=len(expected)) / 4_000
    assert float((counted - expected).abs().max()) < 5 * float((expected * (1 - expected) / 4_000).sqrt().max())
    assert drawn(2) == [int(logits.argmax())] * 2
