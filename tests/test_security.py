"""What docs/security.md promises: nothing of a stranger's runs, nothing is written outside, no secret is written
down."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.text import Text
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.cli.terminal import SafeConsole
from loratune.model.safetensors_headers import index_files
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.errors import LoratuneError, RecipeError, find_secret, without_secrets
from loratune.workflows import export
from loratune.workflows.evaluate import evaluate
from loratune.workflows.plan import plan
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl

MakeRecipe = Callable[..., Recipe]

# ---- code


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_nothing_is_pickled_or_unpickled_from_training_to_resuming_and_evaluating(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle")

    for module, names in ((pickle, ("load", "loads", "dump", "Unpickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    recipe = tiny_recipe(
        lora__dropout=0.1, train__save_every=2, evaluate__metric="contains", evaluate__max_new_tokens=2
    )
    run = train(recipe).run
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "6")
    resume(run.root)
    evaluate(run.root)


def test_a_run_holds_no_file_that_only_pickle_reads(finished_run: RunDir) -> None:
    suffixes = {path.suffix for path in finished_run.root.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".md", ".html", ".txt", ""}, suffixes


def test_a_model_of_pickles_alone_is_refused(tiny_model: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as stream:
        pickle.dump(Evil(marker), stream)
    with pytest.raises(RecipeError, match="no safetensors weights"):
        train(tiny_recipe(model__name=str(folder)))
    shutil.copy(tiny_model / "model.safetensors", folder / "other.safetensors")  # a name that no loader looks for
    with pytest.raises(LoratuneError):
        train(tiny_recipe(model__name=str(folder), train__output_dir=str(tmp_path / "second")))
    assert not marker.exists()


def test_an_adapter_of_pickles_is_refused_by_every_verb_that_loads_one(finished_run: RunDir, tmp_path: Path) -> None:
    run, marker = RunDir(tmp_path / "run"), tmp_path / "ran"
    shutil.copytree(finished_run.root, run.root)
    (run.adapter / "adapter_model.safetensors").unlink()
    with (run.adapter / "adapter_model.bin").open("wb") as stream:
        pickle.dump(Evil(marker), stream)
    verbs = (["evaluate"], ["merge", str(tmp_path / "out")], ["export", "--to", "vllm"], ["chat"])
    for verb, *rest in verbs:
        result = CliRunner().invoke(app, [verb, str(run.root), *rest], input="hello\n")
        assert result.exit_code in (1, 2), (verb, result.output, result.exception)
        assert isinstance(result.exception, SystemExit), (verb, result.exception)
        assert "safetensors" in result.output
    assert not marker.exists()


def test_code_in_a_model_folder_is_told_and_never_run(
    tiny_model: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for name in (
        "modeling_evil.py",
        "tokenization_evil.py",
        "custom_generate/generate.py",
        "__init__.py",
        "conftest.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]}),
    ):
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**record, "auto_map": auto_map}))
    recipe = tiny_recipe(
        model__name=str(folder), data__max_length=512, evaluate__metric="contains", evaluate__max_new_tokens=2
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    result = CliRunner().invoke(app, ["train", str(file)])
    assert "it contains Python code" in result.output
    assert "is not run" in result.output
    assert result.exit_code == 0, result.output
    assert not marker.exists()


def test_a_name_cannot_put_code_into_an_ejected_script(
    tiny_model: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / 'a""" + exit(3) + """\nexit(3)\n#'
    shutil.copytree(tiny_model, folder)
    file = tmp_path / "recipe.yaml"
    file.write_text(tiny_recipe(model__name=str(folder), data__max_length=512).to_yaml())
    script = tmp_path / "script.py"
    result = CliRunner().invoke(app, ["eject", str(file), "--out", str(script)])
    assert result.exit_code == 0, result.output
    source = script.read_text()
    compile(source, "script.py", "exec")
    outside_of_texts = [line for line in source.splitlines() if line.startswith("exit")]
    assert outside_of_texts == []


# ---- links and paths


def test_overwriting_a_run_removes_its_links_and_not_what_they_lead_to(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "file.txt").write_text("mine")
    run = train(tiny_recipe(train__epochs=1)).run
    (run.root / "folder").symlink_to(outside, target_is_directory=True)
    (run.root / "file").symlink_to(outside / "deep" / "file.txt")
    (run.adapter / "inner").symlink_to(outside, target_is_directory=True)
    train(tiny_recipe(train__epochs=1), overwrite=True)
    assert not (run.root / "folder").exists()
    assert (outside / "deep" / "file.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".in_use", "metrics.jsonl", "lock.json.link", "adapter/README.md", ".plan.json.tmp"])
def test_a_link_in_a_run_is_refused_before_anything_is_written(name: str, finished_run: RunDir, tmp_path: Path) -> None:
    run, outside = RunDir(tmp_path / "run"), tmp_path / "outside.txt"
    shutil.copytree(finished_run.root, run.root)
    outside.write_text("mine")
    (run.root / name).unlink(missing_ok=True)
    (run.root / name).symlink_to(outside)
    for verb in ("resume", "evaluate", "report"):
        result = CliRunner().invoke(app, [verb, str(run.root)])
        assert result.exit_code == 2, result.output
        assert "a run directory must not contain links" in result.output
    assert outside.read_text() == "mine"


def test_a_new_run_does_not_follow_the_link_of_an_old_lock(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".in_use").symlink_to(outside)
    with pytest.raises(RecipeError, match="a run directory must not contain links"):
        train(tiny_recipe(), overwrite=True)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "a/b.safetensors"])  # noqa: S108 - no file
def test_weights_outside_of_the_model_are_refused(
    name: str, tiny_model: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")  # beside the former an index is not read
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(RecipeError, match="outside its folder"):
        index_files(index)
    with pytest.raises(RecipeError, match="outside its folder"):
        plan(tiny_recipe(model__name=str(folder)))


def test_merging_writes_into_its_folder_only(finished_run: RunDir, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file.txt").write_text("mine")
    target = tmp_path / "out"
    (tmp_path / ".out.unfinished").symlink_to(outside, target_is_directory=True)
    with pytest.raises(LoratuneError):
        export.merge(finished_run.root, target)
    (tmp_path / ".out.unfinished").unlink()
    target.symlink_to(outside, target_is_directory=True)
    with pytest.raises(LoratuneError):
        export.merge(finished_run.root, target)
    assert [path.name for path in outside.iterdir()] == ["file.txt"]
    assert (outside / "file.txt").read_text() == "mine"


# ---- secrets

HF, WANDB, PASSWORD = "hf_" + "Ab3" * 11, "0123456789abcdef" * 2, "pass-9f8e7d"


@pytest.fixture
def planted_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HF)
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("DATABASE_PASSWORD", PASSWORD)


@pytest.mark.usefixtures("planted_secrets")
def test_no_secret_of_the_environment_reaches_any_file_or_output(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(tiny_recipe(train__report_to=["tensorboard"], data__max_length=512).to_yaml())
    outputs = [
        CliRunner().invoke(app, [*verb, *rest])
        for verb, *rest in (
            (["train"], str(file)),
            (["report"], str(tmp_path / "run")),
            (["merge"], str(tmp_path / "run"), str(tmp_path / "merged")),
            (["doctor"],),
            (["plan", "--json"], str(file)),
        )
    ]
    assert outputs[0].exit_code == 0, outputs[0].output
    files = [path for folder in ("run", "merged") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in (HF, WANDB, PASSWORD):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert not [output for output in outputs if secret in output.output]


@pytest.mark.usefixtures("planted_secrets")
@pytest.mark.parametrize(
    "line",
    [
        f"# export HF_TOKEN={HF}",
        f"# my password: {PASSWORD}",
        f"data: {{train: 'https://user:{PASSWORD}@example.org/a.jsonl'}}",
        "data: {train: 'https://user:another-word@example.org/a.jsonl'}",
        "data: {train: 'https://ghp-token@example.org/a.jsonl'}",
        f"model: {{name: {WANDB}}}",
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_repeating_it(line: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"train: {{epochs: 1}}\n{line}\n")
    result = CliRunner().invoke(app, ["train", str(file)])
    assert result.exit_code == 2
    assert "recipe.yaml:2: the recipe contains" in result.output
    for secret in (HF, WANDB, PASSWORD, "another-word", "ghp-token"):
        assert secret not in result.output
    if not line.startswith("#"):
        section, value = next(iter(yaml.safe_load(line).items()))
        name, text = next(iter(value.items()))
        file.write_text("{}")
        override = CliRunner().invoke(app, ["train", str(file), f"{section}.{name}={text}"])
        assert (override.exit_code, "the recipe contains" in override.output) == (2, True)
        assert text not in override.output
        with pytest.raises(RecipeError, match="the recipe contains"):
            Recipe.parse({section: value})


@pytest.mark.usefixtures("planted_secrets")
def test_errors_hide_secrets_whoever_wrote_them() -> None:
    error = LoratuneError(f"401 for https://me:{PASSWORD}@host/x with {HF}", fix=f"not {WANDB}", file=f"/a/{PASSWORD}")
    for text in (str(error), json.dumps(error.as_dict())):
        assert not any(secret in text for secret in (HF, WANDB, PASSWORD))
    assert error.problem == "401 for https://•••@host/x with •••"


def test_what_is_no_secret_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "nevermind")
    monkeypatch.setenv("API_KEY", "short")
    for text in (
        "https://huggingface.co/a/b@main",
        "me@example.org",
        "hf_hub",
        "nevermind",
        "short",
        "s3://bucket/x@2",
    ):
        assert find_secret(text) is None
        assert without_secrets(text) == text


# ---- the terminal


ANSI = "\x1b[31mred\x1b]0;title\x07\x9b2J\x08\u202e"
MARKUP = "[bold red]loud[/bold red][/] [link=https://example.org]x[/link]"


def test_text_sends_nothing_to_a_terminal_but_itself(capsys: pytest.CaptureFixture[str]) -> None:
    console = SafeConsole(force_terminal=True, color_system="standard", width=200)
    console.print(Text(f"{ANSI} {MARKUP} é日🙂\ttab"), style="bold")
    out = capsys.readouterr().out
    assert "\x1b[1m" in out  # rich's own
    shown = out.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert not any(character in shown for character in "\x1b\x9b\x07\x08\u202e")
    assert r"\x1b[31mred\x1b]0;title" in shown
    assert MARKUP in shown
    assert "é日🙂" in shown


def test_control_codes_and_markup_in_data_names_and_errors_stay_text(
    tiny_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # no name is cut
    model, data = tmp_path / "mo[bold]del", tmp_path / "da[red]ta\x1b[31m"
    shutil.copytree(tiny_model, model)
    data.mkdir()
    planted = {
        "messages": [
            {"role": "user", "content": f"{MARKUP} {ANSI}"},
            {"role": "assistant", "content": f"{ANSI} {MARKUP}"},
        ]
    }
    rows = [planted, *(conversation(number) for number in range(12)), planted]
    bad: dict[str, object] = {"messages": [{"role": f"k{ANSI}", "content": "x"}]}
    settings = {
        "model__name": str(model),
        "data__train": str(write_jsonl(data / "train[b].jsonl", [*rows, bad])),
        "data__eval": str(write_jsonl(data / "eval.jsonl", rows)),
        "evaluate__metric": "contains",
        "evaluate__max_new_tokens": 3,
        "train__output_dir": str(tmp_path / "r[blue]un"),
    }
    file = tmp_path / "recipe.yaml"
    outputs = []
    for policy in ("error", "skip"):
        file.write_text(tiny_recipe(data__on_bad_row=policy, data__max_length=512, **settings).to_yaml())
        outputs.append(CliRunner().invoke(app, ["train", str(file)]))
    outputs += [CliRunner().invoke(app, verb) for verb in (["plan", str(file)], ["explain", str(file)])]
    assert [output.exit_code for output in outputs] == [3, 0, 0, 0], [output.output for output in outputs]
    for output in outputs:
        assert not any(character in output.output for character in "\x1b\x9b\x07\x08\u202e")
    unwrapped = ["".join(output.output.split()) for output in outputs]
    assert "mo[bold]del" in unwrapped[2]
    assert "[boldred]loud[/boldred]" in unwrapped[2]
    assert "train[b].jsonl" in unwrapped[0]
    assert os.environ.get("LORATUNE_CACHE")
