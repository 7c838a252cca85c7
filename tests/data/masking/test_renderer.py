"""A renderer, alone and behind the pipes of a worker process, and what it says about a template."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from loratune.data.masking.notices import special_token_notices, template_notices
from loratune.data.masking.policy import Policy, trained_turns
from loratune.data.masking.renderer import Chunk, Renderer
from loratune.data.masking.worker import answer_requests
from loratune.data.rows.conversation import Conversation
from loratune.run.errors import DataError
from tests.data.golden import CHAT, assistant, user

POLICY = Policy(train_on="assistant", thinking="keep", max_length=64, on_long="truncate")


def served(requests: io.BytesIO) -> list[Any]:
    """The answers of a worker."""
    answers = io.BytesIO()
    answer_requests(requests, answers)
    end = answers.tell()
    answers.seek(0)
    found = []
    while answers.tell() < end:
        found.append(pickle.load(answers))  # noqa: S301 - our own
    return found


def test_a_worker_answers_with_the_renderers_own_chunks(
    smollm2_tokenizer: PreTrainedTokenizerBase, converse: Callable[..., Conversation]
) -> None:
    conversations = [converse(*CHAT, line=1), converse(user("Hi"), assistant("<|im_end|>"), line=2)]
    requests = io.BytesIO(b"".join(map(pickle.dumps, [(smollm2_tokenizer, POLICY), conversations])))
    ready, chunk = served(requests)
    assert ready is None
    expected = Renderer(smollm2_tokenizer, POLICY)(conversations)
    assert isinstance(chunk, Chunk)
    assert chunk.input_ids.tolist() == expected.input_ids.tolist()
    assert chunk.supervised.tolist() == expected.supervised.tolist()
    assert chunk.rejected == expected.rejected == [(1, "message 2 (assistant) contains the special token <|im_end|>")]


def test_a_worker_sends_errors_and_goes_on(
    smollm2_tokenizer: PreTrainedTokenizerBase, converse: Callable[..., Conversation]
) -> None:
    plain = Conversation(messages=(), tools=None, text="text", origin=converse(*CHAT).origin)
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = None
    requests = io.BytesIO(b"".join(map(pickle.dumps, [(tokenizer, POLICY), [converse(*CHAT)], [plain]])))
    _, error, chunk = served(requests)
    assert isinstance(error, DataError)
    assert chunk.rejected[0][1] == "plain text has no answers; train_on must be all"


def test_turns_follow_the_policy() -> None:
    messages = [user("a"), assistant("b"), user(" "), assistant("c")]
    assert trained_turns(messages, "assistant") == [1, 3]
    assert trained_turns(messages, "assistant", excluded=[3]) == [1]
    assert trained_turns(messages, "last") == [3]
    assert trained_turns(messages, "all") == []
    assert trained_turns(messages, ("user",)) == [0], "a blank text of a user is nothing to train"


def test_notices_count_what_was_met(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    template = Renderer(smollm2_tokenizer, POLICY).template
    assert template_notices(Counter(answers=3), template, "assistant") == []
    counts = Counter({"answers": 3, "unanswered": 2, "answers_not_trained": 1, "straddling": 1})
    assert template_notices(counts, template, "assistant") == [
        "1 answer has train: false and is not trained.",
        "2 conversations end with a message that has no answer.",
        "1 token contains both text of the chat template and the start of a trained text; it is not trained.",
    ]
    assert special_token_notices(0, as_text=True) == []
    assert "1 text has the names of special tokens" in special_token_notices(1, as_text=False)[0]
