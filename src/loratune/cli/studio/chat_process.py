"""The helper process of a chat: it loads a run's base model and adapter, as `loratune chat` does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.cli.studio.lines import serve_stdin
from loratune.evaluation.sampling import Sampling
from loratune.workflows.chat import Chat, Turn, open_chat

if TYPE_CHECKING:
    from collections.abc import Callable


class Talk:
    """Answers requests about one model. The page keeps the conversation, so that two pages do not mix theirs.

    Args:
        root: A run directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._chat: Chat | None = None

    def sides(self, _: dict[str, Any], __: Callable[[Any], None]) -> list[str]:
        """Load the model; return who can answer."""
        return list(self._open().sides)

    def answer(self, request: dict[str, Any], piece: Callable[[Any], None]) -> str:
        """Answer a message with one of the models, piece by piece; return the whole answer."""
        chat = self._open()
        chat.system = request["system"]
        chat.sampling = Sampling(temperature=request["temperature"], max_new_tokens=request["max_new_tokens"])
        chat.turns = [Turn(user=turn["user"], answers=turn["answers"]) for turn in request["turns"]]
        return chat.answer(request["side"], request["text"], piece)

    def _open(self) -> Chat:
        if self._chat is None:
            self._chat = open_chat(self._root, Sampling())
        return self._chat


if __name__ == "__main__":
    talk = Talk(Path(sys.argv[1]))
    serve_stdin({"sides": talk.sides, "answer": talk.answer})
