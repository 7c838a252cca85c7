"""A person with a CSV who knows no command but `loratune studio` gets to a chat with the fine-tuned model."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from loratune.cli.studio.places import OWN
from tests.cli.studio.conftest import Started, Visitor
from tests.reporting.conftest import PLANTED

NAME = "<img src=x onerror=window.hacked=5>.csv"


def write_csv(path: Path) -> Path:
    """Questions and answers, harmful ones among them, in columns whose names say nothing."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["left", "right"])
        writer.writerows([f"Where is parcel {i}? {text}", f"On its way. {text}"] for i, text in enumerate(PLANTED * 4))
    return path


@pytest.mark.slow
def test_from_a_csv_to_a_chat(
    start_studio: Callable[[Path], Started], visit: Callable[[str], Visitor], folder: Path, tmp_path: Path
) -> None:
    studio = start_studio(folder)
    visitor = visit(studio.url)
    page = visitor.page
    page.wait_for_url(f"{studio.origin}/")
    page.get_by_role("link", name="New run").first.click()
    page.get_by_label("A CSV, JSONL").set_input_files(write_csv(tmp_path / NAME))

    page.get_by_label("prompt").select_option("left")
    page.get_by_label("completion").select_option("right")
    visitor.finds_no_harm()
    page.get_by_role("button", name="./tiny").click()
    page.get_by_role("button", name="Write the recipe").click()

    page.wait_for_url("**/recipe?*")
    for name, value in (("train.epochs", "1"), ("evaluate.max_new_tokens", "4"), ("train.device", "cpu")):
        field = page.locator(f"[data-field='{name}']")
        if not field.is_visible():
            page.get_by_text(f"More of {name.partition('.')[0]}").click()
        field.select_option(value) if name == "train.device" else field.fill(value)
        field.blur()
    expect(page.get_by_role("textbox", name="Recipe")).to_have_value(re.compile("device: cpu"))
    page.get_by_role("button", name="Save and plan").click()
    expect(page.locator("#plan")).to_contain_text("adapter file")
    expect(page.locator("#tokens mark").first).to_contain_text("On its way.")
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#tokens")).to_contain_text("Examples 4 to 6 of")
    visitor.finds_no_harm()
    # Two pages press the button, then everything is closed: there is one run, and it goes on.
    page.evaluate(
        "file => { fetch('/start', {method: 'POST', body: new URLSearchParams({file})}) }",
        page.locator("#recipe").get_attribute("data-file"),
    )
    page.get_by_role("button", name="Save and start training").click()
    page.wait_for_url("**/run?*")
    expect(page.get_by_role("button", name="Stop after this step")).to_be_visible()
    page.goto("about:blank")
    studio.close()
    assert len(list((folder / OWN).glob("*.json"))) == 1

    studio = start_studio(folder)
    visitor = visit(studio.url)
    page = visitor.page
    page.wait_for_url(f"{studio.origin}/")
    page.get_by_role("link", name="__models/").first.click()
    page.get_by_role("link", name="Chat").click()
    page.get_by_text("Settings").click()
    page.get_by_label("Maximum answer length").fill("5")
    page.get_by_label("Message", exact=True).fill(PLANTED[0])
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#chat-status")).to_have_text("", timeout=60_000)
    for side in ("base", "tuned"):
        assert page.locator(f".answer.{side} .text").inner_text().strip()
    visitor.finds_no_harm()
    assert {url.removeprefix(studio.origin)[:1] for url in visitor.requests} == {"/"}, "nothing from elsewhere"
