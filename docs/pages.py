"""Helpers for the scripts that write pages: a Markdown table, and writing or checking a page."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import Qwen2Config

from loratune.workflows.guidance.facts import AlternativeRow

DEFAULT_MODEL = Qwen2Config(
    hidden_size=1536,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    intermediate_size=8960,
    vocab_size=151936,
    tie_word_embeddings=False,
)
"""Shapes of the default model."""


def table(rows: list[AlternativeRow]) -> str:
    """Format rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_or_check(page: Path, text: str) -> int:
    """Write the page, or with `--check` on the command line compare it; return the exit code."""
    if "--check" not in sys.argv:
        page.write_text(text, encoding="utf-8")
    elif not page.is_file() or page.read_text(encoding="utf-8") != text:
        print(f"docs/{page.name} is out of date: run `make docs`", file=sys.stderr)
        return 1
    return 0
