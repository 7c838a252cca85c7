"""The pages in a real browser: they show what the run holds, ask for nothing, and run nothing that was planted."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.reporting.html import compare, report
from loratune.run.directory import RunDir
from tests.reporting.conftest import PLANTED, Opened, rewrite

Open = Callable[..., Opened]
Copy = Callable[..., RunDir]

HARMLESS = """() => ({
  hacked: window.hacked ?? null,
  elements: [...document.querySelectorAll(
      'script, img, iframe, object, embed, link, base, form, input, a[href]:not([href^="#"])')]
    .map(element => element.outerHTML),
  handlers: [...document.querySelectorAll('*')].flatMap(element => [...element.attributes])
    .filter(attribute => attribute.name.startsWith('on') || attribute.name === 'style')
    .map(attribute => attribute.name),
})"""
NOTHING = {"hacked": None, "elements": [], "handlers": []}


@pytest.mark.parametrize("bypass_csp", [False, True], ids=["as it is", "without its policy"])
def test_what_is_planted_in_data_and_names_is_text_and_nothing_is_requested(
    finished_run: RunDir, open_page: Open, bypass_csp: bool
) -> None:
    opened = open_page(finished_run.report, bypass_csp=bypass_csp)
    opened.page.wait_for_timeout(100)
    assert opened.page.evaluate(HARMLESS) == NOTHING
    assert opened.requests == [finished_run.report.as_uri()]
    assert opened.complaints == []
    shown = opened.page.locator("body").text_content() or ""
    for text in PLANTED:
        assert text in shown
    assert opened.page.locator("h1").text_content() == "<script>run"


def test_what_is_planted_in_any_text_of_any_file_is_text(a_copy: Copy, open_page: Open, tmp_path: Path) -> None:
    """Every text of every record, its keys included where they are data."""
    run = a_copy("<svg onload=window.hacked=5>")
    planted = PLANTED[1] + PLANTED[2]

    def plant(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plant(part) for key, part in value.items()}
        if isinstance(value, list):
            return [plant(part) for part in value]
        return f"{value}{planted}" if isinstance(value, str) else value

    for path in (run.lock, run.plan, run.data, run.preview):
        rewrite(path, plant)
    rewrite(run.lock, lambda lock: {**lock, "versions": {planted: planted}, "choices": {planted: _choice(planted)}})
    rewrite(run.evaluation, lambda record: {**record, "items": plant(record["items"])})
    for path in (report(run.root), compare([run.root, a_copy("other").root], tmp_path / "compare.html")):
        opened = open_page(path, bypass_csp=True)
        shown = opened.page.locator("main").inner_text()
        assert "Missing data" not in shown, shown[:1000]
        assert planted in shown
        assert opened.page.evaluate(HARMLESS) == NOTHING
        assert (opened.requests, opened.complaints) == ([path.as_uri()], [])


def _choice(text: str) -> dict[str, str]:
    return {"value": text, "reason": text}


def test_the_policy_of_the_page_stops_what_an_escape_would_have_missed(
    finished_run: RunDir, open_page: Open, tmp_path: Path
) -> None:
    page = tmp_path / "worse.html"
    harm = (
        "<script>window.hacked=1</script><img src=https://example.org/x.png onerror='window.hacked=1'>"
        "<style>h1{color:red}</style>"
    )
    page.write_text(
        finished_run.report.read_text(encoding="utf-8").replace("<main>", f"<main>{harm}"), encoding="utf-8"
    )
    opened = open_page(page)
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.hacked ?? null") is None
    assert opened.page.evaluate("getComputedStyle(document.querySelector('h1')).color") != "rgb(255, 0, 0)"
    assert opened.failed == [("https://example.org/x.png", "csp")]
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)


def test_the_page_of_a_plan_runs_nothing_that_was_planted_either(
    finished_run: RunDir, open_page: Open, tiny_model: Path, tmp_path: Path
) -> None:
    """In data, in file names, in the model's name."""
    lock = json.loads(finished_run.lock.read_text(encoding="utf-8"))
    model = tmp_path / "<script>window.hacked=6"
    shutil.copytree(tiny_model, model)
    recipe = tmp_path / "recipe.yaml"
    settings = {"data": lock["recipe"]["data"], "model": {**lock["recipe"]["model"], "name": str(model)}}
    recipe.write_text(json.dumps({**settings, "train": {"device": "cpu"}}), encoding="utf-8")
    page = tmp_path / "<img src=x onerror=window.hacked=7>.html"
    result = CliRunner().invoke(app, ["plan", str(recipe), "--html", str(page), "--samples", "30"])
    assert result.exit_code == 0, result.output
    opened = open_page(page)
    shown = opened.page.locator("body").text_content() or ""
    assert all(text in shown for text in PLANTED)
    assert "window.hacked=6" in shown or model.name not in shown
    assert opened.page.evaluate(HARMLESS) == NOTHING
    assert opened.requests == [page.as_uri()]
    assert opened.complaints == []


def test_every_part_is_there_and_the_plots_have_data(finished_run: RunDir, open_page: Open) -> None:
    opened = open_page(finished_run.report, viewport={"width": 1200, "height": 900})
    titles = opened.page.locator("h2").all_text_contents()
    assert titles == [
        "Verdict",
        "Samples",
        "Base vs. fine-tuned",
        "Curves",
        "Model, data, settings",
        "Planned vs. actual",
        "Data",
        "Which tokens were trained",
        "Failures",
        "Reproduce",
    ]
    assert opened.page.locator("#samples article").count() == 20
    assert opened.page.locator("#tokens mark").count() >= 5
    steps = sum("loss" in line for line in map(json.loads, finished_run.metrics.read_text().splitlines()))
    alone = opened.page.evaluate(
        """() => [...document.querySelectorAll('.charts')].filter(charts => {
             const figures = [...charts.children].map(figure => figure.getBoundingClientRect());
             const lowest = Math.max(...figures.map(box => box.top)), last = figures.filter(box => box.top == lowest);
             return last.length == 1 && last[0].width < charts.getBoundingClientRect().width - 1;
           }).length"""
    )
    assert alone == 0, "a chart beside nothing"
    drawn = opened.page.evaluate(
        """() => [...document.querySelectorAll('#curves figure')].map(figure => {
          const curve = figure.querySelector('.series-0 path'), box = curve.getBoundingClientRect();
          return {title: figure.querySelector('h3').textContent, points: curve.getAttribute('d').match(/[ML]/g).length,
                  wide: box.width, high: box.height, stroke: getComputedStyle(curve).stroke};
        })"""
    )
    assert [curve["title"] for curve in drawn] == ["Loss", "Learning rate", "Gradient norm", "Speed", "Memory"]
    for curve in drawn[:-1]:  # a peak may be flat
        assert curve["points"] >= steps - 1  # points on a straight line may be drawn as one
        assert curve["wide"] > 200
        assert curve["high"] > 20
        assert curve["stroke"].startswith("rgb(")
    bars = opened.page.evaluate(
        """() => [...document.querySelectorAll('#data figure')].map(figure => [...figure.querySelectorAll('path')]
             .filter(path => path.getAttribute('fill') === 'var(--series-0)'
                             && path.getBoundingClientRect().height > 1).length)"""
    )
    filled = [sum(map(bool, side["length"]["histogram"]["counts"])) for side in _sides(finished_run)]
    assert bars == filled


def _sides(run: RunDir) -> list[dict[str, Any]]:
    data = json.loads(run.data.read_text(encoding="utf-8"))
    return [data["train"], data["eval"]]


def test_the_curves_go_through_the_measured_values(finished_run: RunDir, open_page: Open) -> None:
    """Up and down on the page as in the file: the drawn loss correlates with the measured one."""
    opened = open_page(finished_run.report)
    points = opened.page.evaluate("document.querySelector('#curves .series-0 path').getAttribute('d')")
    numbers = [float(part) for part in points.replace("M", " ").replace("L", " ").split()]
    losses = [line["loss"] for line in map(json.loads, finished_run.metrics.read_text().splitlines()) if "loss" in line]
    heights = numbers[1::2]
    assert len(heights) == len(losses)
    scale = (heights[0] - heights[-1]) / (losses[0] - losses[-1])
    for height, loss in zip(heights, losses, strict=True):
        assert height == pytest.approx(heights[-1] + scale * (loss - losses[-1]), abs=0.3)


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_the_screen(finished_run: RunDir, open_page: Open, width: int) -> None:
    opened = open_page(finished_run.report, viewport={"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    cut = opened.page.evaluate(
        """[...document.querySelectorAll('.scroll:has(.numeric)')].filter(box => box.scrollWidth > box.clientWidth)
             .map(box => box.querySelector('caption').textContent)"""
    )
    assert width < 390 or not cut, "tables of numbers whose last column is out of sight"
    assert opened.page.locator("nav").bounding_box()["height"] < 100, "the links take the page"  # type: ignore[index]
    smallest = opened.page.evaluate(
        """Math.min(...[...document.querySelectorAll('svg text')].map(text =>
             parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width
             / text.ownerSVGElement.viewBox.baseVal.width))"""
    )
    assert smallest > 9, "the text of the charts, in pixels"


def test_light_and_dark_have_readable_contrast_and_print_is_light_with_everything_open(
    finished_run: RunDir, open_page: Open
) -> None:
    contrast = """() => {
      const luminance = color => { const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
      const ground = element => { for (let e = element; e; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor;
        if (!color.startsWith('rgba(0, 0, 0, 0')) return color; } return 'rgb(255,255,255)'; };
      return Math.min(...[...document.querySelectorAll('h1, h2, h3, p, th, td, dt, dd, li, ins, del, mark, .context, '
          + '.verdict, .badge, summary, a, pre')]
        .map(e => { const a = luminance(getComputedStyle(e).color), b = luminance(ground(e));
          return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); })); }"""
    grounds = {}
    for scheme in ("light", "dark"):
        opened = open_page(finished_run.report, color_scheme=scheme)
        assert opened.page.evaluate(contrast) >= 4.5, scheme  # WCAG 2.2, level AA
        grounds[scheme] = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] != grounds["dark"]
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert opened.page.evaluate("getComputedStyle(document.body).color") == "rgb(23, 32, 43)"
    assert opened.page.evaluate("document.querySelector('#reproduce details pre').getBoundingClientRect().height") > 100
    assert opened.page.pdf().startswith(b"%PDF")


def test_it_can_be_read_without_seeing_it(finished_run: RunDir, open_page: Open) -> None:
    page = open_page(finished_run.report).page
    assert page.get_attribute("html", "lang") == "en"
    assert page.locator("h1").count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(heading => Number(heading.tagName[1]))")
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("table:not(:has(caption))").count() == 0
    labels = page.eval_on_selector_all("svg", "all => all.map(svg => [svg.getAttribute('role'), svg.ariaLabel])")
    assert labels
    assert all(role == "img" and len(label) > 20 for role, label in labels)
    ids = page.eval_on_selector_all("[id]", "all => all.map(element => element.id)")
    assert len(ids) == len(set(ids))
    for target in page.eval_on_selector_all("nav a", "all => all.map(link => link.getAttribute('href').slice(1))"):
        assert target in ids


def test_several_runs_stand_on_one_page(finished_run: RunDir, a_copy: Copy, open_page: Open, tmp_path: Path) -> None:
    other = a_copy("other")
    rewrite(
        other.lock, lambda lock: {**lock, "recipe": {**lock["recipe"], "lora": {**lock["recipe"]["lora"], "r": 77}}}
    )

    def mend(record: dict[str, Any]) -> dict[str, Any]:
        record["items"][0]["tuned"]["score"] = 1.0
        return record

    rewrite(other.evaluation, mend)
    page = compare([finished_run.root, other.root], tmp_path / "both.html")
    opened = open_page(page)
    assert opened.page.locator("h2").all_text_contents() == [
        "Results",
        "Curves",
        "Differences",
        "Time and memory",
        "Answers that differ",
    ]
    assert opened.page.locator("#settings tbody tr").all_inner_texts() == ["lora.r\t4\t77"]
    assert opened.page.locator("#curves figure").count() == 4
    assert opened.page.locator("#curves figure").first.locator(".series-0, .series-1").count() == 2
    assert opened.page.locator("#curves figure").first.locator(".legend li").all_inner_texts() == [
        "<script>run",
        "other",
    ]
    assert opened.page.locator("#answers article").count() == 1
    assert opened.page.locator("#answers .verdict").all_inner_texts() == ["✗ wrong", "✓ correct"]
    assert (opened.requests, opened.complaints) == ([page.as_uri()], [])


@pytest.mark.parametrize("width", [390, 1280])
def test_eight_runs_are_legible_and_the_caption_stays_in_sight(
    finished_run: RunDir, a_copy: Copy, open_page: Open, tmp_path: Path, width: int
) -> None:
    runs = [finished_run]
    for number in range(7):
        run = a_copy(f"run-{number}-with-a-longer-name")
        rate = 0.0001 * (number + 1)
        rewrite(
            run.lock,
            lambda lock, rate=rate: {
                **lock,
                "recipe": {**lock["recipe"], "train": {**lock["recipe"]["train"], "learning_rate": rate}},
            },
        )
        runs.append(run)
    page = compare([run.root for run in runs], tmp_path / "eight.html")
    opened = open_page(page, viewport={"width": width, "height": 900})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    broken = opened.page.evaluate(
        """[...document.querySelectorAll('.wide td')].filter(cell => {
             const text = document.createRange();
             text.selectNodeContents(cell);
             return /^[0-9.e-]+$/.test(cell.textContent) && text.getClientRects().length > 1;
           }).map(cell => cell.textContent)"""
    )
    assert broken == [], "numbers that are cut into two lines"
    assert opened.page.locator("#results tbody th").count() == 8, "a run is a row"
    assert opened.page.evaluate(
        "[...document.querySelectorAll('#results .scroll')].every(box => box.scrollWidth <= box.clientWidth)"
    ), "results out of sight"
    ends = opened.page.eval_on_selector_all(
        ".wide caption:not(.unseen) span", "all => all.map(span => span.getBoundingClientRect().right)"
    )
    assert ends
    assert max(ends) <= width
