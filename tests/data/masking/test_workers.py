"""Worker processes change nothing but the time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.data.masking import workers
from loratune.data.masking.policy import Policy
from loratune.data.masking.render import CHUNK, Rendered, render
from loratune.data.rows.conversation import Conversation
from loratune.run.errors import DataError

Converse = Callable[..., Conversation]


def chats(converse: Converse, number: int) -> list[Conversation]:
    return [
        converse(
            {"role": "user", "content": f"Describe thing {n}"},
            {"role": "assistant", "content": "<|im_end|>" if n % 100 == 7 else f"It is number {n}. " * (n % 7 + 1)},
            line=n + 1,
        )
        for n in range(number)
    ]


def prepared(conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Rendered:
    policy: dict[str, Any] = {"train_on": "assistant", "thinking": "keep", "max_length": 60, "on_long": "truncate"}
    how = {name: settings.pop(name) for name in ("processes", "progress") if name in settings}
    return render(conversations, tokenizer, Policy(**{**policy, **settings}), **how)


def test_the_result_is_the_same_with_workers(smollm2_tokenizer: PreTrainedTokenizerBase, converse: Converse) -> None:
    conversations = chats(converse, 5 * CHUNK + 3)
    reported: list[int] = []

    alone = prepared(conversations, smollm2_tokenizer, processes=1)
    shared = prepared(conversations, smollm2_tokenizer, processes=3, progress=reported.append)

    assert sum(reported) == len(conversations)
    assert (alone.counts, alone.rejected, alone.notices) == (shared.counts, shared.rejected, shared.notices)
    assert len(alone.rejected) == 13
    assert len(alone.examples) == len(shared.examples) == len(conversations) - 13
    for one, other in zip(alone.examples, shared.examples, strict=True):
        assert one.origin == other.origin
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.supervised.tolist() == other.supervised.tolist()


def test_a_helper_sends_errors_back_with_their_place(
    smollm2_tokenizer: PreTrainedTokenizerBase, converse: Converse
) -> None:
    with pytest.raises(DataError, match="longer than max_length 20") as caught:
        prepared(chats(converse, 2 * CHUNK), smollm2_tokenizer, processes=2, max_length=20, on_long="error")
    assert caught.value.place == "chats.jsonl:1"


def fails_on(number: int) -> Callable[[list[int]], int]:
    def work(batch: list[int]) -> int:
        if batch[0] >= number:
            raise DataError("bad", line=batch[0])
        return batch[0]

    return work


def test_the_first_error_is_raised() -> None:
    with (
        workers.WorkerPool[int, int](fails_on(3), setup=None, num_workers=0) as pool,
        pytest.raises(DataError, match="bad") as caught,
    ):
        pool.map([[n] for n in range(6)])
    assert caught.value.line == 3


def test_a_helper_that_dies_leaves_its_work_to_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(workers, "_start_worker", start)
    with workers.WorkerPool[int, int](fails_on(99), setup=None, num_workers=2) as pool:
        assert pool.map([[n] for n in range(20)]) == list(range(20))


def test_helpers_end_when_this_process_is_interrupted(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    def interrupted(batch: list[int]) -> int:
        raise KeyboardInterrupt

    pool = workers.WorkerPool[int, int](interrupted, setup=(smollm2_tokenizer, None), num_workers=2)
    with pytest.raises(KeyboardInterrupt), pool:
        pool.map([[n] for n in range(20)])
    assert [worker.poll() is not None for worker in pool._workers] == [True, True]
    assert not any(thread.is_alive() for thread in pool._threads)


def test_helpers_end_with_the_process_that_started_them() -> None:
    code = (
        "from loratune.data.masking.workers import _start_worker; import os\n"
        "worker = _start_worker(); print(worker.pid, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    pid = int(done.stdout)
    for _ in range(600):  # it imports before it sees that it is alone
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as stream:
            if stream.read().split()[2] == "Z":
                return
        time.sleep(0.1)
    pytest.fail("the worker lives on")
