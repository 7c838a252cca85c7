"""Runs and sweeps that the studio starts, in a real browser: stopped, resumed, followed to their end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from tests.cli.studio.conftest import Started, Visitor
from tests.conftest import conversation, write_jsonl

LONG = 240_000


@pytest.fixture
def write_recipe(folder: Path) -> Callable[..., None]:
    """Write a recipe and its data into the studio's folder."""

    def write(name: str, *, train: dict[str, Any], evaluate: dict[str, Any]) -> None:
        write_jsonl(folder / "train.jsonl", [conversation(number) for number in range(24)])
        write_jsonl(folder / "eval.jsonl", [conversation(number) for number in range(100, 108)])
        values = {
            "model": {"name": "./tiny", "dtype": "float32"},
            "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
            "lora": {"r": 4},
            "train": {"device": "cpu", "learning_rate": 1e-2, "batch_size": 8, "output_dir": f"__models/{name}"}
            | train,
            "evaluate": {"samples": 3, "max_new_tokens": 4} | evaluate,
        }
        (folder / f"{name}.yaml").write_text(Recipe.parse(values).to_yaml())

    return write


@pytest.mark.slow
def test_a_run_shows_its_answers_is_stopped_and_is_resumed(
    start_studio: Callable[[Path], Started],
    visit: Callable[[str], Visitor],
    folder: Path,
    write_recipe: Callable[..., None],
) -> None:
    write_recipe("one", train={"epochs": 150, "eval_every": 10, "save_every": 50}, evaluate={"samples_every": 5})
    studio = start_studio(folder)
    visitor = visit(studio.url)
    page = visitor.page
    page.set_default_timeout(LONG)
    page.goto(f"{studio.origin}/recipe?file=one.yaml")
    expect(page.locator("#plan")).to_contain_text("adapter file", timeout=LONG)
    page.get_by_role("button", name="Save and start training").click()
    page.wait_for_url("**/run?*")
    expect(page.locator("#live")).to_contain_text("Answers to held-out prompts", timeout=LONG)
    expect(page.locator("#live .sample").first).to_contain_text(re.compile(r"after step \d+"))
    expect(page.locator("#live")).to_contain_text("held-out")
    expect(page.locator("#live")).to_contain_text("planned")
    page.get_by_role("button", name="Stop after this step").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible(timeout=LONG)
    run = RunDir(folder / "__models/one")
    assert not run.has_adapter, "it was stopped before its end"
    expect(page.locator("#log")).to_contain_text("loratune resume")
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Stop after this step")).to_be_visible(timeout=LONG)
    expect(page.get_by_role("link", name="Chat")).to_be_visible(timeout=LONG)
    steps = [line["step"] for line in run.read_metrics() if "loss" in line]
    assert steps == list(range(1, 451)), "it went on where it was"
    visitor.finds_no_harm()


@pytest.mark.slow
def test_a_sweep_is_started_from_a_recipe_and_followed_to_its_ranks(
    start_studio: Callable[[Path], Started],
    visit: Callable[[str], Visitor],
    folder: Path,
    write_recipe: Callable[..., None],
) -> None:
    write_recipe("two", train={"epochs": 3}, evaluate={})
    studio = start_studio(folder)
    visitor = visit(studio.url)
    page = visitor.page
    page.set_default_timeout(LONG)
    page.goto(f"{studio.origin}/recipe?file=two.yaml")
    page.get_by_label("Settings to vary").fill("train.learning_rate=1e-4,2e-2 lora.r=2,4")
    page.get_by_role("button", name="Save and start the sweep").click()
    page.wait_for_url("**/sweep?*")
    expect(page.locator(".lead .badge")).to_have_text("running", timeout=LONG)
    expect(page.locator(".lead .badge")).to_have_text("finished", timeout=LONG)
    expect(page.locator("header .lead")).to_contain_text("is best: held-out loss")
    expect(page.locator("#live")).to_contain_text("±")
    expect(page.locator("#live")).to_contain_text("Trials, the best first")
    expect(page.locator("#log")).to_contain_text("trial 1")
    page.get_by_label("Compare trial 1").check()
    page.get_by_label("Compare trial 3").check()
    page.get_by_role("button", name="Compare the ticked runs").click()
    expect(page.locator("main")).to_contain_text("train.learning_rate")
    page.go_back()
    page.get_by_role("link", name="Recipe with the best settings").click()
    expect(page.get_by_label("train.learning_rate", exact=True)).not_to_have_value("0.01")
    visitor.finds_no_harm()


@pytest.mark.slow
def test_settings_are_found_within_a_time_and_lead_to_a_recipe(
    start_studio: Callable[[Path], Started],
    visit: Callable[[str], Visitor],
    folder: Path,
    write_recipe: Callable[..., None],
) -> None:
    """Also stopped on the way: the same command continues."""
    write_recipe("three", train={"epochs": 30, "learning_rate": 1e-5}, evaluate={})
    studio = start_studio(folder)
    visitor = visit(studio.url)
    page = visitor.page
    page.set_default_timeout(LONG)
    page.goto(f"{studio.origin}/recipe?file=three.yaml")
    page.get_by_label("Time for finding the settings").fill("1h")
    page.get_by_role("button", name="Save and find the settings").click()
    page.wait_for_url("**/tune?*")
    expect(page.locator(".lead .badge")).to_have_text("running", timeout=LONG)
    expect(page.locator("#live")).to_contain_text("Learning rate", timeout=LONG)
    page.get_by_role("button", name="Stop after this step").click()
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".lead .badge")).to_have_text("finished", timeout=LONG)
    expect(page.locator("header .lead")).to_contain_text("Chosen: learning_rate=")
    expect(page.locator("main")).to_contain_text("the lowest held-out loss of 7 rates")
    expect(page.locator("#live")).to_contain_text("Rank and target modules")
    page.get_by_role("link", name="Rank and target modules: trials, curves and runs").click()
    expect(page.locator("main")).to_contain_text("Trial 1")
    page.go_back()
    page.get_by_role("link", name="Recipe with these settings").click()
    expect(page.get_by_label("train.learning_rate", exact=True)).not_to_have_value("1e-5")
    page.goto(studio.origin)
    expect(page.get_by_role("link", name="__models/three-tune", exact=True)).to_be_visible()
    visitor.finds_no_harm()
