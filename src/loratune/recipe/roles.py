"""Which messages are trained: the values of `data.train_on`."""

from __future__ import annotations

from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
TrainOn = Literal["assistant", "last", "all"] | tuple[Role, ...]


def trained_roles(train_on: TrainOn) -> tuple[str, ...]:
    """Return the roles whose messages are trained; empty for `all`, which trains every token."""
    return train_on if isinstance(train_on, tuple) else () if train_on == "all" else ("assistant",)


def as_written(value: Any) -> str:
    """Return a word, or a list of words, as YAML writes it."""
    return f"[{', '.join(value)}]" if isinstance(value, list | tuple) else str(value)


def roles_in_words(train_on: Any) -> str:
    """Describe which tokens are trained.

    Args:
        train_on: A value of `data.train_on`, as the recipe or as JSON holds it.
    """
    if isinstance(train_on, list | tuple):
        return f"all messages of {' and '.join(train_on)}"
    words = {"assistant": "assistant answers", "last": "the last answer", "all": "all tokens"}
    return words.get(train_on, str(train_on))
