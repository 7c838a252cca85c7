"""The ejected script is run, and must train what `train.engine=trl` trains, to the last bit."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe, Source
from loratune.run.directory import read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.guidance.eject import eject
from loratune.workflows.guidance.eject_rows import builder, why_not_directly
from loratune.workflows.guidance.eject_script import render_script
from loratune.workflows.guidance.eject_support import SUPPORTED_FIELDS
from loratune.workflows.train import train
from tests.conftest import make_moe

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def marked_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that marks its answers, as TRL's assistant_only_loss wants it."""
    folder = tmp_path_factory.mktemp("models") / "marked"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(MARKED)
    return folder


def losses_of_script(folder: Path) -> list[float]:
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    history = json.loads(states[-1].read_text())["log_history"]
    return [record["loss"] for record in history if "loss" in record]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # of the trainer's own checkpoints
@pytest.mark.filterwarnings("ignore:OLoRA changes the base weights:UserWarning")  # PEFT, while it converts just that
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")  # TRL, of 2.0
@pytest.mark.parametrize(
    "kind",
    [
        "start",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("rows", "olora", "patterns", "tokens", "eva", "best", "early", "mean")
        ),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("all", "marked", "noise", "muon", "dora", "adafactor")
        ),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("rslora", "pissa", "whole", "lion", "adamw_8bit", "sgd")
        ),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("layers", "inverse_sqrt", "stacks", "olora-mean", "steps")
        ),
    ],
)
def test_the_script_trains_to_the_same_losses_and_the_same_adapter(
    kind: str, recipe_file: Path, marked_model: Path, smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    adafactor = ["train.optimizer=adafactor", "train.lora_plus_ratio=4", "train.schedule=warmup_stable_decay"]
    patterns = ["lora.rank_pattern={q_proj: 2}", "lora.alpha_pattern={q_proj: 4}"]
    patterns += ["train.learning_rate_pattern={'0.*v_proj': 1e-3, v_proj: 2e-2}", "train.lora_plus_ratio=2"]
    mean = ["train.average_checkpoints=2", "train.save_every=1"]
    noise = ["train.neftune_noise_alpha=5", "train.label_smoothing=0.1"]
    kinds = {
        "patterns": patterns,
        "mean": [*mean, "train.keep_checkpoints=1"],
        "olora-mean": [*mean, "lora.variant=olora"],
        "tokens": ["lora.new_tokens=[<|one|>, <|two|>]", "train.learning_rate_pattern={embed_tokens: 1e-3}"],
        "best": ["train.final_adapter=best", "train.learning_rate=3", "train.eval_every=1", "train.save_every=1"],
        "early": ["train.early_stopping=1", "train.learning_rate=3", "train.eval_every=1", "train.epochs=3"],
        "layers": ["lora.layers=[1]", "lora.targets=complete"],
        "inverse_sqrt": ["train.schedule=inverse_sqrt"],
        "stacks": [],
        "steps": ["train.max_steps=3", "train.epochs=9"],
        "whole": ["lora.modules_to_save=[lm_head, norm]"],
        "rows": [],
        "noise": noise,
        "muon": ["train.optimizer=muon"],
        "adafactor": adafactor,
        "all": ["data.train_on=all"],
        "marked": [f"model.name={marked_model}"],
    }
    if kind == "start":
        first = train(Recipe.load(recipe_file, [f"train.output_dir={tmp_path / 'first'}"])).run
        kinds["start"] = [f"lora.start_from={first.adapter}"]
    if kind == "stacks":
        names = "lora.target_parameters=[mlp.experts.gate_up_proj, mlp.experts.down_proj]"
        kinds["stacks"] = [f"model.name={make_moe(tmp_path / 'moe', smollm2_tokenizer)}", "lora.dropout=0", names]
    kinds |= {name: [f"train.optimizer={name}"] for name in ("lion", "adamw_8bit", "sgd")}
    settings = kinds.get(kind, [f"lora.variant={kind}"])
    script, ejected = tmp_path / "script.py", tmp_path / "run-ejected"
    eject(prepare(Recipe.load(recipe_file, settings), NoProgress()), script, overwrite=False, progress=NoProgress())
    runpy.run_path(str(script), run_name="__main__")
    run = train(Recipe.load(recipe_file, [*settings, "train.engine=trl"])).run
    losses = [record["loss"] for record in run.read_metrics() if "loss" in record]
    assert losses_of_script(ejected) == losses
    assert len(losses) == (2 if kind == "early" else 3), "of 9 steps, the second is worse"
    one, other = (folder / "adapter_model.safetensors" for folder in (ejected, run.adapter))
    assert one.read_bytes() == other.read_bytes(), "the adapters differ"
    if kind == "best":
        assert read_json(run.best)["step"] < 3, "the best is the last, so that nothing was chosen"


@pytest.mark.slow
def test_the_script_of_the_quickstart_trains_as_the_trl_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model, for two short steps."""
    monkeypatch.chdir(Path(__file__).parents[3])
    settings = [
        *("data.eval=none", "evaluate.metric=none", "train.epochs=0.01", "train.batch_size=2", "train.log_every=1"),
        *("model.dtype=float32", "train.device=cpu", f"train.output_dir={tmp_path / 'run'}"),
    ]
    recipe = Recipe.load("recipes/quickstart.yaml", settings)
    script = tmp_path / "quickstart.py"
    eject(prepare(recipe, NoProgress()), script, overwrite=False, progress=NoProgress())
    runpy.run_path(str(script), run_name="__main__")
    run = train(Recipe.load("recipes/quickstart.yaml", [*settings, "train.engine=trl"])).run
    losses = [record["loss"] for record in run.read_metrics() if "loss" in record]
    assert losses_of_script(tmp_path / "run-ejected") == losses
    assert len(losses) == 2
    one, other = (folder / "adapter_model.safetensors" for folder in (tmp_path / "run-ejected", run.adapter))
    assert one.read_bytes() == other.read_bytes(), "the adapters differ"


def test_rows_that_trl_prepares_alike_are_left_where_they_are(
    recipe_file: Path, marked_model: Path, few_chats: tuple[Path, Path], tmp_path: Path
) -> None:
    for settings, words in (
        (["data.train_on=all"], "assistant_only_loss=False"),
        ([f"model.name={marked_model}", "data.train_on=[assistant]"], "assistant_only_loss=True"),
    ):
        prepared = prepare(Recipe.load(recipe_file, settings), NoProgress())
        ejected = eject(prepared, tmp_path / "script.py", overwrite=True, progress=NoProgress())
        assert (ejected.rows, ejected.why_rows) == (None, "")
        assert words in ejected.script.read_text()
        assert str(few_chats[0]) in ejected.script.read_text()


def test_the_script_imports_the_libraries_of_the_seed_and_nothing_of_ours(recipe_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    eject(prepare(Recipe.load(recipe_file), NoProgress()), script, overwrite=False, progress=NoProgress())
    tree = ast.parse(script.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"datasets", "transformers", "peft", "trl", "torch", "numpy", "pathlib"}
    assert max(map(len, script.read_text().splitlines())) <= 120


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["data.eval=0.2"], "part of the training data, chosen by loratune"),
        (["data.train={name: TRAIN, weight: 2}"], "weight 2"),
        (["data.train=[TRAIN, TRAIN]"], "several sources"),
        (["data.max_length=40", "data.on_long=drop"], "TRL makes"),
        (
            ["data.train_on=[user]"],
            "data.train_on is [user], but TRL trains either the assistant's answers or all tokens",
        ),
        (["data.train_on=last"], "TRL's trained tokens differ, first in TRAIN:1"),
    ],
)
def test_where_trl_alone_would_train_something_else_the_rows_are_written_and_it_says_why(
    settings: list[str], why: str, recipe_file: Path, marked_model: Path, few_chats: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = [setting.replace("TRAIN", str(few_chats[0])) for setting in settings]
    recipe = Recipe.load(recipe_file, [f"model.name={marked_model}", *settings])
    ejected = eject(prepare(recipe, NoProgress()), tmp_path / "s.py", overwrite=False, progress=NoProgress())
    assert why.replace("TRAIN", str(few_chats[0])) in ejected.why_rows
    assert ejected.rows is not None
    assert (ejected.rows / "train.parquet").is_file()


def test_nothing_is_overwritten_unasked(recipe_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("mine")
    prepared = prepare(Recipe.load(recipe_file), NoProgress())
    with pytest.raises(RecipeError, match="already exists"):
        eject(prepared, script, overwrite=False, progress=NoProgress())
    assert script.read_text() == "mine"
    eject(prepared, script, overwrite=True, progress=NoProgress())
    assert "SFTTrainer" in script.read_text()


@pytest.mark.parametrize(
    ("setting", "why", "fix"),
    [
        ("train.on_bad_step=skip", "transformers' Trainer applies every step", "train.on_bad_step=error"),
        ("lora.variant=loftq", "PEFT's own initialization needs CUDA", "lora.variant=plain"),
        ("model.quantization=fp8", "PEFT has no layers for it", "use model.quantization"),
    ],
)
def test_what_stock_libraries_do_not_have_is_refused_with_its_reason(
    setting: str, why: str, fix: str, recipe_file: Path, tmp_path: Path
) -> None:
    prepared = prepare(Recipe.load(recipe_file), NoProgress())
    section, _, rest = setting.partition(".")
    field, _, value = rest.partition("=")
    part = getattr(prepared.recipe, section).model_copy(update={field: value})
    prepared = replace(prepared, recipe=prepared.recipe.model_copy(update={section: part}))
    with pytest.raises(RecipeError, match=f"{section}.{field} is {value}, which a plain TRL .*: {why}") as refused:
        eject(prepared, tmp_path / "script.py", overwrite=False, progress=NoProgress())
    assert refused.value.fix.startswith(fix)


def test_a_setting_that_the_script_cannot_follow_is_refused(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUPPORTED_FIELDS, "lora", SUPPORTED_FIELDS["lora"] - {"dropout"})
    prepared = prepare(Recipe.load(recipe_file), NoProgress())
    with pytest.raises(RecipeError, match=r"lora\.dropout is 0\.1, which a plain TRL"):
        eject(prepared, tmp_path / "script.py", overwrite=False, progress=NoProgress())


def test_a_file_is_loaded_by_the_builder_of_its_suffix() -> None:
    names = {"a.jsonl": "json", "b.CSV": "csv", "c.parquet": "parquet", "d.tsv": "csv"}
    assert {name: builder(Source(name=name)) for name in names} == names


def test_the_script_says_why_it_has_its_own_rows(recipe_file: Path, tmp_path: Path) -> None:
    prepared = prepare(Recipe.load(recipe_file), NoProgress())
    why = why_not_directly(prepared)
    assert why
    script = render_script(prepared, tmp_path / "script-rows", why)
    assert " ".join(why.split()) in " ".join(script.replace("# ", "").split())
