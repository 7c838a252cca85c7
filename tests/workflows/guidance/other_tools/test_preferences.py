"""Files of other tools that train preferences become `task: preference`, or are refused by the name of the method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loratune.recipe.recipe import Recipe
from loratune.run.errors import RecipeError
from loratune.workflows.guidance.init import init
from loratune.workflows.guidance.other_tools.preferences import is_preference, task_parts
from loratune.workflows.guidance.other_tools.read import read_other_file
from loratune.workflows.guidance.other_tools.settings import OtherSettings, Translated

AXOLOTL = "base_model: m\nmicro_batch_size: 1\ndatasets: [{path: a.jsonl, type: chatml.intel}]\n"
FACTORY = "model_name_or_path: m\nfinetuning_type: lora\ndataset: pairs\n"
TRL = "model_name_or_path: m\ndataset_name: trl-lib/ultrafeedback_binarized\n"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    pairs = {"file_name": "p.json", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}
    answers = {"file_name": "a.json"}
    Path("data/dataset_info.json").write_text(json.dumps({"pairs": pairs, "answers": answers}))


def preference_of(text: str) -> dict[str, Any]:
    """The section of the recipe that `init` writes, which must be readable."""
    Path("file.yaml").write_text(text)
    recipe = Recipe.load(init(source="file.yaml", overwrite=True)[0])
    assert recipe.model.task == "preference"
    return recipe.preference.model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Axolotl
        (AXOLOTL + "rl: dpo\n", {"loss": "dpo"}),
        (AXOLOTL + "rl: dpo\nrl_beta: 0.3\nrpo_alpha: 0.2\n", {"loss": "dpo", "beta": 0.3, "sft_weight": 0.2}),
        (AXOLOTL + "rl: dpo\ndpo_loss_type: [ipo]\n", {"loss": "ipo"}),
        (AXOLOTL + "rl: ipo\ntrl: {beta: 0.4}\n", {"loss": "ipo", "beta": 0.4}),
        (AXOLOTL + "rl: orpo\norpo_alpha: 0.2\n", {"loss": "orpo", "beta": 0.2}),
        # what TRL's CPOTrainer has as defaults, which are others than SimPO's paper and ours
        (AXOLOTL + "rl: simpo\n", {"loss": "simpo", "beta": 0.1, "sft_weight": 1.0, "target_margin": 0.5}),
        (
            AXOLOTL + "rl: simpo\nrl_beta: 2.0\ncpo_alpha: 0\nsimpo_gamma: 1.2\n",
            {"loss": "simpo", "beta": 2.0, "sft_weight": 0.0, "target_margin": 1.2},
        ),
        # LLaMA-Factory
        (FACTORY + "stage: dpo\n", {"loss": "dpo"}),
        (
            FACTORY + "stage: dpo\npref_loss: sigmoid\npref_beta: 0.2\npref_ftx: 0.1\ndpo_label_smoothing: 0.05\n",
            {"loss": "dpo", "beta": 0.2, "label_smoothing": 0.05, "sft_weight": 0.1},
        ),
        (FACTORY + "stage: dpo\npref_loss: orpo\n", {"loss": "orpo"}),
        (FACTORY + "stage: dpo\npref_loss: simpo\n", {"loss": "simpo", "beta": 0.1, "target_margin": 0.5}),
        # TRL
        (TRL + "beta: 0.05\nloss_type: sigmoid\n", {"loss": "dpo", "beta": 0.05}),
        (TRL + "loss_type: [ipo]\n", {"loss": "ipo"}),
        (TRL + "loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.2]\n", {"loss": "dpo", "sft_weight": 0.2}),
        (TRL + "rpo_alpha: 0.5\n", {"loss": "dpo", "sft_weight": 0.5}),
        (TRL + "f_divergence_type: reverse_kl\nbeta: 0.2\n", {"loss": "dpo", "beta": 0.2}),
        (
            TRL + "loss_type: simpo\nbeta: 2.5\nsimpo_gamma: 1.0\ncpo_alpha: 0.0\n",
            {"loss": "simpo", "beta": 2.5, "sft_weight": 0.0, "target_margin": 1.0},
        ),
    ],
)
def test_the_losses_that_we_have_are_translated(text: str, expected: dict[str, Any]) -> None:
    assert preference_of(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        *((AXOLOTL + f"rl: {name}\n", f"rl is {name}") for name in ("kto", "grpo", "gdpo", "ebft")),
        *((FACTORY + f"stage: {name}\n", f"stage is {name}") for name in ("kto", "rm", "ppo")),
        (FACTORY + "stage: dpo\npref_loss: hinge\n", "pref_loss is hinge"),
        (FACTORY + "stage: dpo\npref_loss: kto_pair\n", "pref_loss is kto_pair"),
        (FACTORY + "stage: dpo\npref_bco_weight: 1.0\n", "pref_bco_weight is 1.0, which makes the loss BCO"),
        (TRL + "num_generations: 8\n", "num_generations is set, which is for GRPO"),
        (TRL + "beta: 0.1\ndesirable_weight: 1.0\n", "desirable_weight is set, which is for KTO"),
        (TRL + "center_rewards_coefficient: 0.01\n", "center_rewards_coefficient is set, which is for reward modeling"),
        (TRL + "kl_coef: 0.05\n", "kl_coef is set, which is for PPO"),
        *((TRL + f"loss_type: {name}\n", f"loss_type is {name}") for name in ("hinge", "robust", "kto", "dapo")),
        (TRL + "loss_type: [sigmoid, bco_pair]\n", "loss_type is ['sigmoid', 'bco_pair']"),
        (TRL + "loss_type: [sigmoid, sft]\nloss_weights: [0.8, 0.2]\n", "loss_type is ['sigmoid', 'sft']"),
        (TRL + "loss_type: sigmoid\nld_alpha: 0.5\n", "ld_alpha is 0.5, which makes the loss LD-DPO"),
        (TRL + "f_divergence_type: js_divergence\n", "f_divergence_type is 'js_divergence', which makes"),
        (TRL + "loss_type: sigmoid\nsync_ref_model: true\n", "sync_ref_model is true, which makes the loss TR-DPO"),
    ],
)
def test_other_methods_and_losses_are_refused_by_name(text: str, problem: str) -> None:
    Path("file.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        read_other_file(Path("file.yaml"))
    assert error.value.problem.startswith(problem)
    assert "dpo, ipo, orpo or simpo" in error.value.problem
    assert error.value.line is not None
    assert text.splitlines()[error.value.line - 1].startswith(problem.split(maxsplit=1)[0])


@pytest.mark.parametrize("settings", ["beta: 0.1\n", "max_prompt_length: 512\n", "precompute_ref_log_probs: true\n"])
def test_settings_of_several_trainers_are_no_sft_and_the_fix_works(settings: str) -> None:
    Path("file.yaml").write_text(TRL + settings)
    with pytest.raises(RecipeError, match="the trainers of DPO, KTO, ORPO and GRPO have") as error:
        read_other_file(Path("file.yaml"))
    assert error.value.line == 3
    assert "loss_type: sigmoid for DPO" in error.value.fix
    assert preference_of(TRL + settings + "loss_type: sigmoid\n")["loss"] == "dpo"


@pytest.mark.parametrize("settings", ["", "loss_type: nll\n", "label_smoothing: 0\n", "beta: null\n"])
def test_supervised_fine_tuning_stays_it(settings: str) -> None:
    Path("file.yaml").write_text(TRL + settings)
    assert "model.task" not in read_other_file(Path("file.yaml")).settings


def test_pairs_and_answers_of_llama_factory_are_not_mixed_up() -> None:
    for text, problem, fix in (
        (FACTORY + "stage: sft\n", "pairs has ranking: true in dataset_info.json, so its rows are pairs", "stage: dpo"),
        (FACTORY.replace("pairs", "pairs, answers") + "stage: dpo\n", "answers has no ranking: true", "stage: sft"),
    ):
        Path("file.yaml").write_text(text)
        with pytest.raises(RecipeError) as error:
            read_other_file(Path("file.yaml"))
        assert error.value.problem.startswith(problem)
        assert error.value.fix.startswith(fix)
        assert error.value.line == 3


def test_the_columns_of_pairs() -> None:
    Path("file.yaml").write_text(FACTORY + "stage: dpo\n")
    found = read_other_file(Path("file.yaml"))
    assert found.settings["data.columns"] == {"instruction": "q", "chosen": "good", "rejected": "bad"}
    assert "data.format" not in found.settings
    for kind, columns in (
        ("chatml.icr", {"prompt": "input"}),
        ("llama3.argilla", {"chosen": "chosen_response", "rejected": "rejected_response"}),
        ("{field_prompt: q, field_chosen: chosen, field_rejected: bad}", {"prompt": "q", "rejected": "bad"}),
        ("chat_template.default", None),
    ):
        Path("file.yaml").write_text(AXOLOTL.replace("chatml.intel", kind) + "rl: dpo\n")
        found = read_other_file(Path("file.yaml"))
        assert found.settings.get("data.columns") == columns
        assert "data.format" not in found.settings


def test_the_task_comes_first() -> None:
    file = OtherSettings(path=Path("file.yaml"), named={"rl": "dpo", "rl_beta": 0.2}, lines={})
    assert task_parts(file)[0] == Translated(
        name="rl", value="dpo", answer={"model.task": "preference", "preference.loss": "dpo"}
    )
    assert is_preference(task_parts(file))
    assert not is_preference(task_parts(OtherSettings(path=Path("f"), named={"rl": "sft"}, lines={})))
