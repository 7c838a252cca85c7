"""What `init` infers from the rows: which columns are prompt and answer, and how answers can be scored."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratune.data.rows.row import Row
    from loratune.recipe.recipe import Column

PROMPTS = (
    *("prompt", "question", "q", "query", "instruction", "input", "request", "user", "message", "problem", "source"),
    *("frage", "anfrage", "eingabe", "pregunta", "entrada", "vraag", "domanda"),
)
"""Usual names of a column of prompts; the first that occurs counts."""
ANSWERS = (
    *("completion", "answer", "a", "response", "reply", "output", "assistant", "solution", "target", "expected"),
    *("antwort", "ausgabe", "réponse", "reponse", "respuesta", "salida", "antwoord", "risposta"),
)
"""Usual names of a column of answers."""
SYSTEMS = ("system", "system_prompt", "system_message")

SHORT_WORDS = 8
"""Words of the longest answer that a metric may look for inside another text."""
MOST_LABELS = 50
"""Distinct answers that can be labels."""


def guess_columns(rows: Sequence[Row]) -> dict[Column, str]:
    """Return `data.columns` for rows with usual column names; empty if there is no such pair."""
    first = rows[0].value
    if not isinstance(first, dict):
        return {}
    known = {str(column).strip().lower(): str(column) for column in first}
    prompt, answer, system = (_first(names, known) for names in (PROMPTS, ANSWERS, SYSTEMS))
    if prompt is None or answer is None:
        return {}
    columns: dict[Column, str] = {"prompt": prompt, "completion": answer}
    if system is not None and system != "system":
        columns["system"] = system
    return columns


def _first(names: Sequence[str], known: Mapping[str, str]) -> str | None:
    return next((known[name] for name in names if name in known), None)


def read_columns(text: str, known: Sequence[Column]) -> dict[Column, str]:
    """Read `prompt=Frage,completion=Antwort`.

    Args:
        text: The value of `--columns`.
        known: Fields that a column can be mapped to.

    Raises:
        RecipeError: It has another form, or names no such field.
    """
    columns: dict[Column, str] = {}
    for part in text.split(","):
        name, equals, column = part.strip().partition("=")
        field = next((field for field in known if field == name), None)
        if not equals or not column or field is None:
            raise RecipeError(
                f"--columns {text}: {part.strip()!r} is not FIELD=COLUMN",
                fix=f"--columns prompt=COLUMN,completion=COLUMN; fields are {', '.join(known)}",
            )
        columns[field] = column
    return columns


def suggest_metric(answers: Sequence[str]) -> tuple[str, str] | None:
    """Return a metric by which these answers can be scored and the reason; None for free text."""
    texts = [answer.strip() for answer in answers]
    if not texts or not all(texts):
        return None
    if all(map(_is_json, texts)):
        return "json", "every last answer is a JSON object or list"
    longest = max(len(text.split()) for text in texts)
    distinct = len(Counter(texts))
    if longest <= SHORT_WORDS and distinct <= MOST_LABELS and 4 * distinct <= len(texts):
        return "exact_match", f"the answers are {distinct} labels"
    if longest <= SHORT_WORDS:
        return "contains", f"the answers are short, at most {longest} words"
    return None


def answer_tokens(answers: Sequence[str], most: int) -> int:
    """Return a limit for the tokens of an answer that leaves room for the longest of these.

    Args:
        answers: Answers of the data; a token has about four characters, or two to be safe.
        most: The largest limit to return.
    """
    longest = max(map(len, answers), default=2 * most)
    return min(most, 16 * -(-max(longest // 2, 16) // 16))


def _is_json(text: str) -> bool:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)
