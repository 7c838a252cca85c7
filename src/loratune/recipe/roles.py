"""Whose messages are trained: the values of `data.train_on`."""

from __future__ import annotations

from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["assistant", "last", "all"] | tuple[Role, ...]


def trained_roles(train_on: TrainOn) -> tuple[str, ...]:
    """Whose messages are trained as messages: of `all`, nobody's, since every token is."""
    return train_on if isinstance(train_on, tuple) else () if train_on == "all" else ("assistant",)


def as_written(value: Any) -> str:
    """A word, or a list of words as YAML has it."""
    return f"[{', '.join(value)}]" if isinstance(value, list | tuple) else str(value)


def trained_in_words(train_on: Any) -> str:
    """What carries loss.

    Args:
        train_on: Of a recipe, also as JSON keeps it.
    """
    if isinstance(train_on, list | tuple):
        return f"all messages of {' and '.join(train_on)}"
    words = {"assistant": "answers of the assistant", "last": "the last answer", "all": "all tokens"}
    return words.get(train_on, str(train_on))
