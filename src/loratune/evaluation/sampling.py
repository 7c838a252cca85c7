"""How the next token of an answer is chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: The sampling temperature; 0 for greedy answers.
        top_p: The probability mass to sample from, 0 to 1.
        top_k: The number of top tokens to sample from; 0 for all.
        max_new_tokens: The longest answer, in tokens.
        seed: The sampling seed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    seed: int = 0

    def changed(self, setting: str) -> Sampling:
        """Return the settings with one `name=value` changed.

        Raises:
            RecipeError: There is no such setting, or the value does not fit.
        """
        name, _, text = (part.strip() for part in setting.partition("="))
        kinds = {name: type(default) for name, default in asdict(Sampling()).items()}
        try:
            value = kinds[name](text)
        except (KeyError, ValueError):
            raise RecipeError(f"/set {setting}", fix=f"/set NAME=VALUE with one of {', '.join(kinds)}") from None
        low = 1 if name == "max_new_tokens" else 0
        if value < low or (name == "top_p" and value > 1):
            raise RecipeError(f"/set {setting}", fix=f"at least {low}{', at most 1' if name == 'top_p' else ''}")
        return replace(self, **{name: value})


def generation_config(sampling: Sampling, stop_token_ids: Sequence[int], padding: int) -> GenerationConfig:
    """Return transformers' settings: nothing of the model's own (repetition penalty, temperature) is left.

    Args:
        sampling: How the next token is chosen.
        stop_token_ids: The tokens that end an answer; none: every answer has `max_new_tokens` tokens.
        padding: The token that fills up the rows of answers that have ended.
    """
    chosen: dict[str, Any] = {}
    if sampling.temperature > 0:
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=padding,
        **chosen,
    )
