"""What the verbs print with `--json` is what `loratune schema VERB` describes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.cli.output import show_publication, show_service
from loratune.recipe.recipe import Recipe
from loratune.recipe.schema import recipe_schema
from loratune.run.directory import RunDir
from loratune.run.records.outputs import PlanOutput
from loratune.run.records.schemas import OUTPUTS, schema_of
from loratune.workflows.push import Publication, PushedFile
from loratune.workflows.reproduce import Reproduction
from loratune.workflows.serving.listening import Service


def call(*arguments: object) -> Any:
    """Run a command with --json, and return what it printed."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def check(verb: str, printed: Any) -> None:
    """What a verb printed fits its schema, and the schema refuses something else."""
    validator = Draft202012Validator(schema_of(verb))
    validator.check_schema(schema_of(verb))
    validator.validate(printed)
    assert not validator.is_valid({"something": "else"})


@pytest.fixture
def recipe_file(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    recipe = tiny_recipe(
        evaluate__metric="exact_match", evaluate__max_new_tokens=4, train__epochs=1, data__max_length=512
    )
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path


def test_plan_train_resume_evaluate_and_merge(recipe_file: Path, tmp_path: Path) -> None:
    planned = call("plan", recipe_file, "--price-per-hour", "2")
    check("plan", planned)
    assert planned["schema_version"] == planned["data_report"]["schema_version"] == 1
    assert planned["cost"]["price_per_hour"] == 2
    check("plan", call("plan", recipe_file, "--devices", "2xl4", "--interconnect", "pcie5"))
    trained = call("train", recipe_file)
    check("train", trained)
    assert (
        trained["schema_version"] == trained["plan"]["schema_version"] == trained["evaluation"]["schema_version"] == 1
    )
    run = RunDir.open(trained["run"])
    evaluated = call("evaluate", run.root, "--gate", "nll<=99")
    check("evaluate", evaluated)
    assert evaluated["evaluation"]["gates"][0]["passed"] is True
    run.report.unlink()
    check("resume", call("resume", run.root))
    merged = call("merge", run.root, tmp_path / "merged")
    check("merge", merged)
    assert merged["schema_version"] == merged["certificate"]["schema_version"] == 1


def test_export(finished_run: RunDir, tmp_path: Path) -> None:
    check("export", call("export", finished_run.root, "--to", "vllm", "--out", tmp_path / "vllm"))
    check("certify", call("certify", finished_run.root, tmp_path / "vllm"))


def test_report_compare_and_diff(finished_run: RunDir, tmp_path: Path) -> None:
    check("report", call("report", finished_run.root, "--out", tmp_path / "page.html"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in finished_run.root.glob("*.json*"):
        (copy / path.name).write_bytes(path.read_bytes())
    lock = json.loads((copy / "lock.json").read_text(encoding="utf-8"))
    lock["recipe"]["lora"]["r"] = 99
    (copy / "lock.json").write_text(json.dumps(lock), encoding="utf-8")
    check("compare", call("compare", finished_run.root, copy, "--out", tmp_path / "both.html"))
    found = call("diff", finished_run.root, copy)
    check("diff", found)
    assert {"group": "settings", "name": "lora.r", "first": 4, "second": 99} in found


def test_reproduce_serve_and_push(finished_run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"run": finished_run, "original": finished_run, "equal": True}
    check("reproduce", Reproduction(**same, largest_difference=0.0, num_different=0, num_weights=3).as_dict())
    file = PushedFile(path="README.md", num_bytes=3, sha256="0" * 64)
    show_publication(Publication(repo="me/it", url="", private=True, files=(file,)), as_json=True)
    check("push", json.loads(capsys.readouterr().out))
    assert asdict(file) == file.as_dict()
    show_service(
        Service(url="http://localhost:8000/v1", server="vllm", models=("base", "tuned"), needs_key=False), as_json=True
    )
    check("serve", json.loads(capsys.readouterr().out))


def test_schema_prints_the_recipes_or_a_verbs_and_names_the_verbs_it_has() -> None:
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == recipe_schema()
    assert json.loads(CliRunner().invoke(app, ["schema", "plan"]).stdout) == schema_of("plan")
    assert schema_of("plan")["description"] == PlanOutput.__doc__
    refused = CliRunner().invoke(app, ["schema", "plant"])
    assert refused.exit_code == 2
    assert "reproduce" in refused.stderr


@pytest.mark.parametrize("verb", OUTPUTS)
def test_every_field_of_every_schema_says_what_it_is(verb: str) -> None:
    schema = schema_of(verb)
    for part in (schema, *schema.get("$defs", {}).values()):
        assert part["description"]
        for name, field in part.get("properties", {}).items():
            # A field with the words of its own type has only the reference to it.
            assert "$ref" in field or field.get("description", "").endswith("."), f"{part['title']}.{name}"


def test_schemas_need_no_torch() -> None:
    code = "import sys, loratune.run.records.schemas; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
