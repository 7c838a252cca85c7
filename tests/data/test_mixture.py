"""Several sources: what an epoch has of each, and the held-out loss of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from loratune.evaluation.record import evaluation_table
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import read_json
from loratune.run.progress import NoProgress
from loratune.workflows.train import train
from tests.conftest import conversation, write_jsonl
from tests.training.test_disk import Moment

MakeRecipe = Callable[..., Recipe]


def sources(folder: Path) -> list[dict[str, object]]:
    few = write_jsonl(folder / "few.jsonl", [conversation(i) for i in range(30, 37)])
    many = write_jsonl(folder / "many.jsonl", [conversation(i) for i in range(12)])
    return [{"name": str(few), "weight": 2.5}, {"name": str(many), "weight": 0.5}]


def test_the_plan_counts_what_an_epoch_has_of_each_source(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    prepared = prepare(tiny_recipe(data__train=sources(tmp_path)), NoProgress())
    data = prepared.as_plan()["data"]
    few, many = data["sources"]
    assert (few["num_examples"], many["num_examples"]) == (7 + 7 + 4, 6)
    assert data["num_examples"] == 24
    for name in ("num_tokens", "num_supervised_tokens"):
        assert few[name] + many[name] == data[name]
    places = [(example.origin.file, example.origin.line) for example in prepared.data.train]
    assert sorted(map(places.count, set(places))) == [1] * 6 + [2] * 3 + [3] * 4


def test_streamed_sources_are_counted_by_their_sample(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    files = [str(source["name"]) for source in sources(tmp_path)]
    prepared = prepare(tiny_recipe(data__train=files, data__eval=0.2, data__streaming=True), NoProgress())
    data = prepared.as_plan()["data"]
    assert [source["name"] for source in data["sources"]] == files
    assert sum(source["num_examples"] for source in data["sources"]) == data["num_examples"] == 15


@pytest.mark.parametrize("held_out", ["sources", "part"])
def test_each_source_has_its_held_out_loss(tiny_recipe: MakeRecipe, tmp_path: Path, held_out: str) -> None:
    train_sources = sources(tmp_path)
    files = [
        write_jsonl(tmp_path / f"eval-{k}.jsonl", [conversation(i) for i in range(60 + 10 * k, 63 + 12 * k)])
        for k in range(2)
    ]
    evaluation = [str(file) for file in files] if held_out == "sources" else 0.4
    settings = {"data__train": train_sources, "train__epochs": 1}
    listener = Moment("", lambda: None)
    run = train(tiny_recipe(**settings, data__eval=evaluation), progress=listener).run
    record = read_json(run.evaluation)
    parts = record["sources"]
    names = [str(file) for file in files] if held_out == "sources" else [str(s["name"]) for s in train_sources]
    assert list(parts) == names
    assert sum(part["num_examples"] for part in parts.values()) == record["num_examples"]
    line = [line for line in run.read_metrics() if "eval_nll" in line][-1]
    for name, part in parts.items():
        assert line["eval_nll_by_source"][name] == pytest.approx(part["tuned"]["nll"], abs=1e-6)
    low, high = sorted(part["tuned"]["nll"] for part in parts.values())
    assert low < line["eval_nll"] < high, "the whole is a mean of them"
    assert any(f"{names[0]} {parts[names[0]]['tuned']['nll']:.4f}, " in text for text in listener.lines)
    if held_out == "part":
        return
    # a source alone has the same loss
    alone = tiny_recipe(**settings, data__eval=names[1], train__output_dir=str(tmp_path / "alone"))
    expected = read_json(train(alone).run.evaluation)
    for side in ("base", "tuned"):
        assert parts[names[1]][side]["nll"] == pytest.approx(expected[side]["nll"], abs=1e-6)
    assert "sources" not in expected
    console = Console(width=300)
    with console.capture() as printed:
        console.print(evaluation_table(record))
    assert f"held-out loss of {Path(names[1]).name} (5 conversations)" in printed.get()
    page = run.report.read_text()
    assert "eval-1.jsonl" in page
    assert "Missing data" not in page, "lines with losses of sources are read"
    assert "conversations of `eval-1.jsonl`" in (run.adapter / "README.md").read_text()
