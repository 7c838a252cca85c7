"""A worker process of `loratune.data.masking.workers`: reads pickles from standard input, writes to standard output."""

from __future__ import annotations

import os
import pickle
import sys
from typing import BinaryIO

from loratune.data.masking.renderer import Renderer
from loratune.run.errors import LoratuneError


def answer_requests(requests: BinaryIO, answers: BinaryIO) -> None:
    """Read a tokenizer and a policy, then lists of conversations; answer each with a `Chunk` until the input ends."""
    renderer = Renderer(*pickle.load(requests))  # noqa: S301 - from the process that started this one
    _send(None, answers)
    while True:
        try:
            conversations = pickle.load(requests)  # noqa: S301
        except EOFError:
            return
        try:
            _send(renderer(conversations), answers)
        except LoratuneError as error:
            _send(error, answers)


def _send(answer: object, answers: BinaryIO) -> None:
    pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
    answers.flush()


if __name__ == "__main__":
    private = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not get between the pickles
    with os.fdopen(private, "wb") as stream:
        answer_requests(sys.stdin.buffer, stream)
