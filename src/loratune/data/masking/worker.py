"""A helper process of `loratune.data.masking.workers`: pickles come in on standard input, and go out on standard output."""

from __future__ import annotations

import os
import pickle
import sys
from typing import BinaryIO

from loratune.data.masking.render import Renderer
from loratune.run.errors import LoratuneError


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Read a tokenizer and a policy, then conversations, and answer with what became of them, until the input ends."""
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
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that a library prints may come between the pickles
    with os.fdopen(private, "wb") as stream:
        serve(sys.stdin.buffer, stream)
