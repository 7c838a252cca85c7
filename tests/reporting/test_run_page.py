"""What the page says, of runs in every state, and how the command writes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.recipe.recipe import Recipe
from loratune.reporting.html import compare, report, report_or_warn
from loratune.reporting.run_files import read_run
from loratune.reporting.units import as_bytes, as_duration, unbroken
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import MachineError, RecipeError
from loratune.run.progress import NoProgress
from tests.reporting.conftest import rewrite

Copy = Callable[..., RunDir]
RECORDS = ("lock.json", "plan.json", "data.json", "evaluation.json", "preview.json")


def text_of(path: Path) -> str:
    """A page without its tags."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8"))).split())


def test_the_numbers_are_those_of_the_files(finished_run: RunDir) -> None:
    shown = text_of(finished_run.report)
    evaluation, plan, data = (read_json(p) for p in (finished_run.evaluation, finished_run.plan, finished_run.data))
    for side in ("base", "tuned"):
        assert f"{evaluation[side]['nll']:.4g}" in shown
    assert f"{evaluation['difference']['nll']['low']:+.4g} to {evaluation['difference']['nll']['high']:+.4g}" in shown
    assert as_bytes(plan["measured"]["peak_bytes"]) in shown
    assert f"{plan['parameters']['trainable']:,} of {plan['parameters']['total']:,}" in shown
    assert f"{data['train']['supervised_tokens']:,}" in shown
    assert "The first 20 of 22 held-out prompts" in shown
    assert read_json(finished_run.lock)["inputs"]["train"]["tokens"] in shown


def test_the_recipe_on_the_page_is_the_recipe_of_the_run(finished_run: RunDir) -> None:
    text = re.search(r"<pre[^>]*>(model:.*?)</pre>", finished_run.report.read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    written = yaml.safe_load(unescape(text[1]))
    assert Recipe.parse(written) == Recipe.parse(read_json(finished_run.lock)["recipe"])


def rows_of(page: str, caption: str) -> dict[str, list[str]]:
    """First cell → other cells of a table."""
    table = page[page.index(f">{caption}</span></caption>") :].partition("</table>")[0]
    cells = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    ]
    return {first: others for first, *others in cells}


def test_planned_and_actual_are_not_swapped(a_copy: Copy) -> None:
    run = a_copy()
    num_steps = sum("loss" in line for line in run.read_metrics())

    def change(plan: dict) -> dict:
        plan["memory"]["peak_bytes"] = 900 * 2**20
        plan["time"] |= {
            "train_seconds": 5000.0,
            "evaluate_seconds": 20.0,
            "total_seconds": 6000.0,
            "num_steps": num_steps,
        }
        plan["measured"] |= {"peak_bytes": 450 * 2**20, "evaluate_seconds": 30.0, "total_seconds": 3000.0}
        return plan

    rewrite(run.plan, change)
    page = unescape(report(run.root).read_text(encoding="utf-8"))
    actual_training = as_duration(read_run(run).train_seconds)
    rows = rows_of(page, "Planned before the weights were loaded, and actual")
    assert rows[""] == ["planned", "actual", "actual / planned"]
    assert rows["optimizer steps"] == [str(num_steps), str(num_steps), "100%"]
    assert rows["training time"][:2] == ["1 h 23 min", actual_training]
    assert rows["peak memory"] == ["900.0 MiB", "450.0 MiB", "50%"]
    assert rows["evaluation"] == ["20 s", "30 s", "150%"]
    assert rows["total, loading included"] == ["1 h 40 min", "50 min 0 s", "50%"]
    figures = dict(re.findall(r'<dt>([^<]*)</dt><dd class="value">([^<]*)</dd>', page))
    notes = dict(re.findall(r'<dt>([^<]*)</dt><dd class="value">[^<]*</dd><dd class="note">([^<]*)</dd>', page))
    assert (figures["peak memory"], notes["peak memory"]) == ("450.0 MiB", f"planned {unbroken('900.0 MiB')}")
    assert (figures["training time"], notes["training time"]) == (
        actual_training,
        f"planned {unbroken('1 h 23 min')}",
    )
    chart = page[page.index("<h3>Peak memory</h3>") :].partition("</figure>")[0]
    assert re.search('aria-label="Planned 900.0 MiB: .*Actual 450.0 MiB', chart)
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
    assert shown[shown.index("planned") + 1] == "900.0 MiB"
    assert shown[shown.index("actual") + 1] == "450.0 MiB"


def test_base_and_fine_tuned_are_not_swapped(a_copy: Copy) -> None:
    run = a_copy()

    def change(record: dict) -> dict:
        record["base"]["nll"], record["tuned"]["nll"] = 4.5, 1.25
        record["difference"]["nll"] = {"value": -3.25, "low": -3.5, "high": -3.0}
        return record

    rewrite(run.evaluation, change)
    page = unescape(report(run.root).read_text(encoding="utf-8"))
    rows = rows_of(page, "Base vs. fine-tuned")
    assert rows["held-out loss, nats per token"] == ["4.5", "1.25", "-3.25\n-3.5 to -3"]
    assert rows["measure"][:2] == ["base", "fine-tuned"]


def test_failures_name_those_that_the_base_had_right_first(a_copy: Copy) -> None:
    run = a_copy()

    def score(record: dict) -> dict:
        for number, item in enumerate(record["items"]):
            item["tuned"]["score"] = float(number > 2)
            item["base"]["score"] = float(number == 2)
        return record

    rewrite(run.evaluation, score)
    page = report(run.root).read_text(encoding="utf-8")
    failures = page[page.index('id="failures"') :]
    assert re.findall(r"<h3>(\d+) ·", failures) == ["3", "1", "2"]
    assert "answers 3 of 22 prompts wrong; the base model answers 1 of these correctly" in text_of(run.report)


def test_a_run_that_goes_on_is_told_with_the_time_left(a_copy: Copy) -> None:
    run = a_copy()
    for path in (run.evaluation, run.adapter / "adapter_config.json"):
        path.unlink()
    rewrite(run.plan, lambda plan: {key: value for key, value in plan.items() if key != "measured"})
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([*lines[:3], '{"step": 4, "lo']))
    with run.exclusive():
        shown = text_of(report(run.root))
    assert "running: step 3 of 10" in shown
    assert "the remaining steps take" in shown
    assert "Missing data" not in shown, "a line half written is how a run that goes on looks"
    assert "Base vs. fine-tuned" not in shown
    shown = text_of(report(run.root))
    assert "stopped after step 3 of 10" in shown
    assert f"loratune resume {run.root}" in shown
    assert "line 4 cannot be read" in shown


@pytest.mark.parametrize("content", ["[", "{}", "3"])
def test_damaged_certificates_are_named(a_copy: Copy, content: str) -> None:
    run = a_copy()
    run.parity.write_text(content)
    (complaint,) = read_run(run).complaints
    assert complaint.startswith("parity.json cannot be read: ")


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("content", ["", "{", "null", "[]", "\udcff", "[" * 100_000])
def test_a_damaged_file_is_named(a_copy: Copy, name: str, content: str) -> None:
    run = a_copy()
    (run.root / name).write_bytes(content.encode(errors="surrogateescape"))
    (complaint,) = read_run(run).complaints
    assert complaint.startswith(f"{name} cannot be read: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, None) for name in RECORDS if name != "lock.json"),  # without it the folder is no run
        *((name, '{"recipe": 7, "train": 3, "items": [[]], "examples": 1, "time": {}}') for name in RECORDS),
    ],
)
def test_a_file_that_is_missing_or_says_something_else_costs_its_sections_only(
    a_copy: Copy, name: str, content: str | None
) -> None:
    run = a_copy()
    path = run.root / name
    if content is not None:
        path.write_text(content)
    else:
        path.unlink()
    shown = text_of(report(run.root))
    assert "Missing data" in shown
    assert (name if content is None else "is left out: a file is damaged or of another version") in shown
    assert {"lock.json": "Base vs. fine-tuned"}.get(name, "Model, data, settings") in shown


def test_a_run_that_died_before_its_first_step_has_a_page(a_copy: Copy) -> None:
    run = a_copy()
    for name in (*RECORDS, "metrics.jsonl", "recipe.yaml"):
        if name != "lock.json":
            (run.root / name).unlink()
    shown = text_of(report(run.root))
    assert "no step was finished" in shown
    assert "Model, data, settings" in shown


def test_lines_of_metrics_that_make_no_sense_are_left_out_and_named(a_copy: Copy) -> None:
    run = a_copy()
    lines = run.metrics.read_text().splitlines()
    wrong = ["[]", '{"step": 1, "loss": "<script>"}', '{"step": 1, "loss": NaN}', f'{{"step": 1{"0" * 400}}}', "\x00"]
    run.metrics.write_text("\n".join([*wrong, *lines]) + "\n")
    shown = text_of(report(run.root))
    assert "line 1 and 4 more cannot be read" in shown
    assert "Curves" in shown


def test_half_a_character_does_not_stop_the_page(a_copy: Copy) -> None:
    run = a_copy()
    rewrite(run.preview, lambda _: {"examples": [{"title": "\ud800", "pieces": []}]})
    assert "\\ud800" in text_of(report(run.root))


def test_long_text_is_cut_and_says_so(a_copy: Copy) -> None:
    run = a_copy()

    def lengthen(record: dict) -> dict:
        record["items"][0]["question"] = "word " * 1000
        return record

    rewrite(run.evaluation, lengthen)
    assert "3,000 more characters in the run's files" in text_of(report(run.root))


def test_a_page_that_cannot_be_written_does_not_end_the_run(a_copy: Copy) -> None:
    class Listener(NoProgress):
        warnings: list[str] = []  # noqa: RUF012

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    run, listener = a_copy(), Listener()
    run.report.mkdir()
    (run.report / "something").touch()
    report_or_warn(run, listener)
    assert "no report was written" in listener.warnings[0]
    with pytest.raises(MachineError):
        report(run.root)


def test_the_commands_write_where_they_are_told_and_refuse_what_makes_no_sense(a_copy: Copy, tmp_path: Path) -> None:
    run, other, out = a_copy(), a_copy("other"), tmp_path / "here.html"
    call = CliRunner().invoke
    done = call(app, ["report", str(run.root)])
    assert (done.exit_code, done.stdout) == (0, f"{run.report}\n")
    done = call(app, ["report", str(run.root), "--out", str(out), "--json"])
    assert json.loads(done.stdout) == {"report": str(out)}
    assert out.is_file()
    done = call(app, ["compare", str(run.root), str(other.root), "--out", str(tmp_path / "both.html")])
    assert done.exit_code == 0
    assert "2 runs compared" in text_of(tmp_path / "both.html")
    assert call(app, ["report", str(tmp_path)]).exit_code == 2
    assert call(app, ["compare", str(run.root), str(run.root)]).exit_code == 2
    before = run.lock.read_bytes()
    assert call(app, ["report", str(run.root), "--out", str(run.lock)]).exit_code == 2
    assert run.lock.read_bytes() == before


def test_runs_of_one_name_are_told_apart_and_other_held_out_data_is_warned_of(a_copy: Copy, tmp_path: Path) -> None:
    first = a_copy()
    second = RunDir(tmp_path / "elsewhere" / "copy")
    second.root.parent.mkdir()
    first.root.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(second.root)
    first = a_copy()
    rewrite(
        second.lock, lambda lock: {**lock, "inputs": {**lock["inputs"], "eval": {"tokens": "0" * 64, "mask": "0" * 64}}}
    )
    shown = text_of(compare([first.root, second.root], tmp_path / "both.html"))
    assert str(second.root) in shown
    assert "different held-out data" in shown
    with pytest.raises(RecipeError, match="nothing to compare"):
        compare([first.root])


def test_a_report_needs_no_torch() -> None:
    code = "import sys, loratune.reporting.html; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_losses_of_several_sources_are_drawn_and_no_line_is_called_damaged(a_copy: Copy) -> None:
    run = a_copy()
    names = ("/data/a/eval.jsonl", "/data/b/eval.jsonl")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        if "eval_nll" in line:
            line["eval_nll_by_source"] = dict.fromkeys(names, line["eval_nll"])
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = text_of(report(run.root))
    assert "cannot be read" not in shown
    assert "Held-out loss of each source" in shown
    assert "a/eval.jsonl" in shown
    assert "Held-out loss of b/eval.jsonl" in run.report.read_text()
