"""A person with a CSV who knows no command but `loratune studio` gets to a chat with the fine-tuned model."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.cli.studio.conftest import Started
from tests.reporting.conftest import PLANTED

HARMLESS = """() => ({
  hacked: window.hacked ?? null,
  elements: [...document.querySelectorAll('img, iframe, object, embed, base, script:not([src^="/static/"])')]
    .map(element => element.outerHTML),
  handlers: [...document.querySelectorAll('*')].flatMap(element => [...element.attributes])
    .filter(attribute => attribute.name.startsWith('on') || attribute.name === 'style')
    .map(attribute => attribute.name),
})"""
NOTHING = {"hacked": None, "elements": [], "handlers": []}
NAME = "<img src=x onerror=window.hacked=5>.csv"


class Visitor:
    """A page in the browser, with everything that it asked for and complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(60_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))

    def finds_no_harm(self) -> None:
        assert self.page.evaluate(HARMLESS) == NOTHING
        assert self.complaints == []


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[[str], Visitor]]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900})

    def open_(url: str) -> Visitor:
        visitor = Visitor(context.new_page())
        visitor.page.goto(url)
        return visitor

    yield open_
    context.close()


def write_csv(path: Path) -> Path:
    """Questions and answers, harmful ones among them, in columns whose names say nothing."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["left", "right"])
        writer.writerows([f"Where is parcel {i}? {text}", f"On its way. {text}"] for i, text in enumerate(PLANTED * 4))
    return path


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
    page.get_by_role("button", name="Save and start training").click()

    page.wait_for_url("**/run?*")
    page.get_by_role("link", name="Chat").click()
    page.get_by_label("Longest answer").evaluate("field => { field.value = 5 }")
    page.get_by_label("Message").fill(PLANTED[0])
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#chat-status")).to_have_text("", timeout=60_000)
    for side in ("base", "tuned"):
        assert page.locator(f".answer.{side} .text").inner_text().strip()
    visitor.finds_no_harm()
    assert {url.removeprefix(studio.origin)[:1] for url in visitor.requests} == {"/"}, "nothing from elsewhere"
