"""Whose messages are trained: the values of `data.train_on`."""

from __future__ import annotations

from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["assistant", "last", "all"] | tuple[Role, ...]


def trained_roles(train_on: TrainOn) -> tuple[str, ...]:
    """Whose messages are trained as messages: of `all`, nobody's, since every token is."""
    return train_on if isinstance(train_on, tuple) else () if train_on == "all" else ("assistant",)


def check_roles(train_on: TrainOn) -> None:
    """Refuse a list of roles that says nothing, or one of them twice.

    Raises:
        ValueError: Which.
    """
    if not train_on:
        raise ValueError("train_on is an empty list; name the roles whose messages are trained, as [user, assistant]")
    if isinstance(train_on, tuple) and len(set(train_on)) < len(train_on):
        raise ValueError(f"train_on: {max(train_on, key=train_on.count)} is named twice")


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
