"""Take a picture of a run's report, on a desktop and on a phone: `python docs/make_picture.py RUN OUT.png`."""

from __future__ import annotations

import base64
import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from loratune.reporting.html import report

HEIGHT = 1080
DESK, PHONE = 1120, 400
FRAME = """<style>
body { margin: 0; padding: 28px; display: flex; gap: 28px; align-items: flex-start; }
body { background: #c9d3df; width: max-content; }
img { display: block; border-radius: 14px; box-shadow: 0 6px 22px #0004; }
</style><body><img src="data:image/png;base64,%s"><img src="data:image/png;base64,%s"></body>"""


def main(run: Path, out: Path) -> None:
    """The top of the page in the light on a desk; its samples in the dark on a phone."""
    address = report(run).resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        desk = _picture(browser, address, DESK, "light")
        phone = _picture(browser, f"{address}#samples", PHONE, "dark")
        page = browser.new_page(viewport={"width": DESK + PHONE + 84, "height": HEIGHT + 56})
        page.set_content(FRAME % (desk, phone))
        together = page.screenshot()
        browser.close()
    # 256 colors: a page has few, and the file is half as large.
    Image.open(io.BytesIO(together)).convert("RGB").quantize(256).save(out, optimize=True)


def _picture(browser: Any, address: str, width: int, scheme: str) -> str:
    page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    page.goto(address)
    return base64.b64encode(page.screenshot()).decode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
