"""Take the pictures of docs/studio.md: from a CSV to a chat, in a real browser, on a desktop and on a phone.

`python docs/make_studio_pictures.py [--sweep]` writes docs/images/studio-*.png; it trains the small packaged model.
With `--sweep` it takes the picture of a sweep alone.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

HERE = Path(__file__).parent
DATA = HERE.parent / "examples" / "e2e" / "train.csv"
OUT = HERE / "images"
MINUTES = 15 * 60_000
DESK, PHONE, HEIGHT = 1280, 390, 844
QUESTION = "name[The Blue Lamp], eatType[pub], food[Italian], priceRange[cheap], area[riverside], familyFriendly[yes]"
SETTINGS = {
    "train.max_steps": "12",
    "evaluate.samples": "6",
    "train.eval_every": "4",
    "train.log_every": "1",
    "evaluate.samples_every": "2",
}
SWEEP = "train.learning_rate=1e-4,1e-3 train.max_steps=4 evaluate.samples=0 evaluate.samples_every=never"
"""A sweep that takes little time: what is shown is its page."""


class Camera:
    """Takes the same page on a desk, in the light, and on a phone, in the dark."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.phones: list[Image.Image] = []

    def take(self, name: str, *, desk: int, at: str = "") -> None:
        """Keep a picture of the page from the top, that many pixels high; and from `at` on for the phone."""
        page = self._page
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": DESK, "height": desk})
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(300)
        _save(_opened(page.screenshot()), OUT / f"studio-{name}.png")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": PHONE, "height": HEIGHT})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE, f"{name} is {wide} pixels wide"
        if at:
            page.locator(at).first.evaluate("element => element.scrollIntoView()")
        page.wait_for_timeout(300)
        self.phones.append(_opened(page.screenshot()))
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": DESK, "height": HEIGHT})

    def save_phones(self, path: Path) -> None:
        """Save the pictures of the phone side by side."""
        gap = 24
        whole = Image.new("RGB", (len(self.phones) * (PHONE + gap) + gap, HEIGHT + 2 * gap), "#c9d3df")
        for number, picture in enumerate(self.phones):
            whole.paste(picture, (gap + number * (PHONE + gap), gap))
        _save(whole, path)


def _opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def _save(picture: Image.Image, path: Path) -> None:
    picture.quantize(256).save(path, optimize=True)


def write_recipe(page: Page, camera: Camera | None) -> None:
    """Go from the CSV to a recipe."""
    page.get_by_role("link", name="New run").first.click()
    page.get_by_label("A CSV, JSONL").set_input_files(DATA)
    page.get_by_label("prompt").select_option("mr")
    page.get_by_label("completion").select_option("ref")
    page.locator(".pick").first.click()
    if camera is not None:
        camera.take("columns", desk=1000, at="#columns-title")
    page.get_by_role("button", name="Write the recipe").click()
    page.wait_for_url("**/recipe?*")


def go(page: Page, camera: Camera) -> None:
    """Go from the CSV to a chat."""
    write_recipe(page, camera)
    for name, value in SETTINGS.items():
        field = page.locator(f"[data-field='{name}']")
        if not field.is_visible():
            page.get_by_text(f"More of {name.partition('.')[0]}").click()
        field.fill(value)
        field.blur()
    expect(page.get_by_role("textbox", name="Recipe")).to_have_value(re.compile("log_every: 1\\b"))
    page.evaluate("document.querySelectorAll('details[open]').forEach(one => { one.open = false })")
    page.get_by_role("button", name="Save and plan").click()
    expect(page.locator("#plan")).to_contain_text("adapter file", timeout=MINUTES)
    expect(page.locator("#tokens mark").first).to_be_visible(timeout=MINUTES)
    camera.take("recipe", desk=1150, at="#tokens-title")
    page.get_by_role("button", name="Save and start training").click()
    page.wait_for_url("**/run?*")
    page.get_by_text(re.compile("step (8|9|[1-9]\\d)/")).first.wait_for(timeout=MINUTES)
    camera.take("running", desk=1900, at="#live")
    page.get_by_role("link", name="Chat").wait_for(timeout=MINUTES)
    camera.take("finished", desk=1700)
    page.get_by_role("link", name="Chat").click()
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#chat-status")).to_have_text("", timeout=MINUTES)
    camera.take("chat", desk=690)


def sweep(page: Page, camera: Camera) -> None:
    """Start a sweep, and see it end."""
    write_recipe(page, None)
    page.get_by_label("Settings to vary").fill(SWEEP)
    page.get_by_role("button", name="Save and start the sweep").click()
    page.wait_for_url("**/sweep?*")
    expect(page.locator(".lead .badge")).to_have_text("finished", timeout=MINUTES)
    camera.take("sweep", desk=1100, at="#live")


def main(folder: Path, *, whole_way: bool) -> None:
    """Start a studio, go the whole way or to a sweep alone, and save the pictures."""
    command = [sys.executable, "-m", "loratune", "studio", str(folder), "--no-open"]
    studio: Any = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own program
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": DESK, "height": HEIGHT})
            page.set_default_timeout(120_000)
            camera = Camera(page)
            url = studio.stdout.readline().strip()
            page.goto(url)
            if whole_way:
                go(page, camera)
                camera.save_phones(OUT / "studio-phone.png")
                page.goto(url.partition("?")[0])
            sweep(page, camera)
            browser.close()
    finally:
        studio.terminate()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary), whole_way="--sweep" not in sys.argv)
