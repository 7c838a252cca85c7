from __future__ import annotations

import pytest
import torch

from loratune.model.adapter.attach import attach_adapter, trainable_parameters
from loratune.model.adapter.modules_to_save import (
    fully_trained_in_words,
    fully_trained_modules,
    with_copies,
    without_copies,
)
from loratune.model.adapter.targets import resolve_targets
from loratune.recipe.recipe import LoraSection
from loratune.run.errors import RecipeError
from tests.model.adapter.test_attach import tiny


def test_a_name_matches_dotted_parts_and_not_the_end_of_a_word() -> None:
    found = fully_trained_modules(tiny(), LoraSection(modules_to_save=("norm", "lm_head")), ())
    assert [item.name for item in found] == ["lm_head", "model.norm"]
    assert [item.is_head for item in found] == [True, False]
    assert fully_trained_in_words(found) == "lm_head, norm"


def test_a_name_that_matches_nothing_and_an_adapted_module_are_refused() -> None:
    with pytest.raises(RecipeError, match="nrm matches no module") as error:
        fully_trained_modules(tiny(), LoraSection(modules_to_save=("nrm",)), ())
    assert "did you mean norm" in str(error.value.fix)
    lora = LoraSection(modules_to_save=("layers.0.self_attn",))
    with pytest.raises(RecipeError, match=r"trains all of model\.layers\.0\.self_attn"):
        fully_trained_modules(tiny(), lora, ("model.layers.0.self_attn.q_proj",))


def test_copies_are_float32_and_compute_in_the_type_of_the_base() -> None:
    base = tiny().to(torch.bfloat16)
    expected = base(torch.arange(3, 20)[None]).logits
    lora = LoraSection(dropout=0.0, modules_to_save=("lm_head",))
    model = attach_adapter(base, lora, resolve_targets(base, "balanced"), base_name="tiny", seed=0)
    head = [p for name, p in trainable_parameters(model).items() if "lm_head" in name]
    assert [p.dtype for p in head] == [torch.float32]
    actual = model(torch.arange(3, 20)[None]).logits
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)


def test_tied_tensors_are_kept_once_and_restored_under_both_names() -> None:
    one, two = torch.ones(2, 3), torch.zeros(4)
    own = {"embed": one, "norm": two, "head": one}
    assert list(without_copies(own)) == ["embed", "norm"]
    restored = with_copies({"embed": one + 1, "norm": two}, own)
    assert torch.equal(restored["head"], one + 1)
