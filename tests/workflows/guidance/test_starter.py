"""A recipe to start from, as commented YAML."""

from __future__ import annotations

import yaml

from loratune.workflows.guidance.other_tools.read import LeftOut
from loratune.workflows.guidance.starter import StarterRecipe


def test_what_was_left_out_stands_at_the_top_by_its_reason_and_reasons_at_their_settings() -> None:
    left_out = tuple(LeftOut(name=name, value="1", reason=reason) for name, reason in zip("abc", "xyx", strict=True))
    starter = StarterRecipe(title="T.", settings={"lora.r": (4, "from rank: 4")}, left_out=left_out)
    text = starter.to_yaml()
    assert "# Not taken over: a: 1, c: 1 (x)\n# Not taken over: b: 1 (y)\n" in text
    assert "  # Here: from rank: 4.\n  r: 4\n" in text
    assert yaml.safe_load(text) == {"lora": {"r": 4}}
    assert starter.as_dict() == {"lora.r": {"value": 4, "reason": "from rank: 4"}}
