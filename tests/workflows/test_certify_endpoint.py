"""`loratune certify RUN URL`: a real server in a thread, right and wrong in one way each."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune import __main__ as cli
from loratune.exporting.certificate import summary
from loratune.exporting.endpoint.client import Endpoint
from loratune.exporting.endpoint.reference import EndpointReference
from loratune.recipe.recipe import Recipe
from loratune.run.directory import Record, RunDir
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.certify_endpoint import ask_server
from loratune.workflows.certify_target import certify_target
from loratune.workflows.endpoint_reference import endpoint_reference
from loratune.workflows.finished import open_finished
from loratune.workflows.tiny_model import write_tiny_model
from loratune.workflows.train import train
from tests.conftest import write_jsonl
from tests.exporting.openai_server import Served, running

STYLES = ("vllm", "llama.cpp", "openai", "greedy")
WAYS = {"vllm": "prompt_logprobs", "llama.cpp": "one token at a time", "openai": "echo", "greedy": None}


def asked(number: int) -> dict[str, object]:
    messages = [
        {"role": "user", "content": f"Color {number}?"},
        {"role": "assistant", "content": "Orange."},
    ]
    return {"messages": messages}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of answers in which no letter occurs twice, so that the trained model is sure of every token."""
    folder = tmp_path_factory.mktemp("colors")
    write_tiny_model(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    # The head is frozen: so small a one gives no token much more than another, and the stop token's row is zero.
    head = base.lm_head.weight.data
    head[base.config.eos_token_id] = head[0].roll(1)
    head *= 8
    base.save_pretrained(folder / "base")
    recipe: dict[str, Any] = {
        "model": {"name": str(folder / "base"), "dtype": "float32"},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", [asked(number) for number in range(24)])),
            "eval": str(write_jsonl(folder / "eval.jsonl", [asked(number) for number in range(100, 114)])),
        },
        "lora": {"dropout": 0.0, "r": 8, "targets": "complete"},
        "train": {
            "output_dir": str(folder / "tiny"),
            "epochs": 20,
            "learning_rate": 2e-2,
            "batch_size": 8,
            "device": "cpu",
            "compile": False,
            "save_every": "never",
            "eval_every": "never",
        },
        "evaluate": {"metric": "none", "samples": 0, "max_new_tokens": 14},
    }
    return train(Recipe.parse(recipe)).run


@pytest.fixture(scope="module")
def expected(run: RunDir) -> EndpointReference:
    return endpoint_reference(open_finished(run.root, NO_PROGRESS))


@pytest.fixture(scope="module")
def models(run: RunDir) -> dict[str, Any]:
    """The trained model, its base, and the trained model under noise of the size of 4 bits."""
    loaded = {
        name: AutoPeftModelForCausalLM.from_pretrained(str(run.adapter)).merge_and_unload().eval()
        for name in ("tuned", "noisy")
    }
    loaded["base"] = AutoModelForCausalLM.from_pretrained(run.root.parent / "base").eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in loaded["noisy"].parameters():
            if parameter.dim() > 1:
                parameter.data += 0.05 * parameter.std() * torch.randn_like(parameter)
    return loaded


def ask(expected: EndpointReference, run: RunDir, model: Any, **options: Any) -> Record:
    """Serve a model, and return its certificate."""
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    settings = {"stops": (tokenizer.eos_token_id,), "tokenizer": tokenizer, **options}
    with running(Served(model=model, **settings)) as url:
        endpoint = Endpoint(root=url, timeout=20)
        endpoint.choose_model(None, ["tiny"])
        return ask_server(expected, endpoint, AutoTokenizer.from_pretrained(run.adapter), NO_PROGRESS)


@pytest.mark.parametrize("style", STYLES)
def test_the_trained_model_is_the_same_and_its_base_is_not(
    expected: EndpointReference, run: RunDir, models: dict[str, Any], style: str
) -> None:
    right = ask(expected, run, models["tuned"], style=style)
    assert right["verdict"] == "same", right["reason"]
    assert right["served"]["way"] == WAYS[style]
    assert right["stop_tokens"]["missing"] == []
    assert "not shown" not in right["reason"]
    wrong = ask(expected, run, models["base"], style=style)
    assert wrong["verdict"] == "different"
    assert "tiny answers like the base without the adapter" in wrong["reason"]
    greedy = right["served"]["greedy"]
    assert greedy["same"] == greedy["num_prompts"] > greedy["base_same"]
    if style == "greedy":
        assert right["distributions"] is None
        return
    found = right["distributions"]
    assert found["mean_kl"] < 1e-6 < 0.1 < found["base_kl"]
    assert right["served"]["share"] == pytest.approx(1, abs=1e-3)
    assert wrong["served"]["share"] == pytest.approx(0, abs=1e-3)
    assert wrong["distributions"]["mean_kl"] == pytest.approx(wrong["distributions"]["base_kl"], rel=1e-3)


def test_what_a_server_says_about_the_wrong_token_of_a_prompt_is_not_believed(
    expected: EndpointReference, run: RunDir, models: dict[str, Any]
) -> None:
    record = ask(expected, run, models["tuned"], style="openai", shifted=True)
    assert (record["verdict"], record["served"]["way"]) == ("same", "one token at a time")


def test_a_server_that_refuses_what_others_take_is_asked_for_less(
    expected: EndpointReference, run: RunDir, models: dict[str, Any]
) -> None:
    record = ask(expected, run, models["tuned"], style="openai", strict=True)
    assert (record["verdict"], record["served"]["way"]) == ("same", "echo")


@pytest.mark.parametrize("style", STYLES)
def test_noise_in_the_weights_is_not_taken_for_another_model(
    expected: EndpointReference, run: RunDir, models: dict[str, Any], style: str
) -> None:
    record = ask(expected, run, models["noisy"], style=style)
    assert record["verdict"] != "different", record["reason"]
    if record["served"]["share"] is not None:
        assert 0.8 < record["served"]["share"] < 1.2


@pytest.mark.parametrize("style", STYLES)
def test_another_template_is_named(
    expected: EndpointReference, run: RunDir, models: dict[str, Any], style: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>model:\n")
    record = ask(expected, run, models["tuned"], style=style, tokenizer=tokenizer)
    assert record["verdict"] == "different"
    assert "14 of 14 prompts have different token ids" in record["reason"]
    assert "chat template" in record["fix"]


@pytest.mark.parametrize("style", STYLES)
def test_a_lost_stop_token_is_named(
    expected: EndpointReference, run: RunDir, models: dict[str, Any], style: str
) -> None:
    record = ask(expected, run, models["tuned"], style=style, stops=())
    assert record["verdict"] == "different"
    assert record["stop_tokens"]["missing"] == list(expected.stop_token_ids)
    assert "eos_token_id" in record["fix"]


def test_without_chats_the_outputs_decide_and_what_is_not_shown_is_named(
    expected: EndpointReference, run: RunDir, models: dict[str, Any]
) -> None:
    record = ask(expected, run, models["tuned"], chat=False)
    assert record["verdict"] == "same"
    assert "not shown by it: the tokens of its prompts and where it stops" in record["reason"]
    nothing = ask(expected, run, models["tuned"], chat=False, style="greedy")
    assert nothing["verdict"] == "undecided"
    assert "no log-probabilities, and no chat could be compared" in nothing["reason"]


def test_a_server_that_fails_once_is_asked_again_and_one_that_goes_on_failing_is_named(
    expected: EndpointReference, run: RunDir, models: dict[str, Any]
) -> None:
    assert ask(expected, run, models["tuned"], failures=[503])["verdict"] == "same"
    with pytest.raises(RunError, match="fails: 500 out of order"):
        ask(expected, run, models["tuned"], failures=[500] * 3)
    with pytest.raises(RunError, match="fails: 503"):
        ask(expected, run, models["tuned"], failures=[404, 503, 503, 503])


def test_the_command_prints_the_record_and_its_exit_code(
    run: RunDir, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    monkeypatch.setenv("LORATUNE_API_KEY", "sesame-open")
    served = Served(model=models["tuned"], tokenizer=tokenizer, stops=(tokenizer.eos_token_id,), key="sesame-open")
    with running(served) as url:
        monkeypatch.setattr("sys.argv", ["loratune", "certify", str(run.root), f"{url}/v1", "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["verdict"], record["kind"], record["path"]) == ("same", "endpoint", f"{url}/v1")
        assert "greedy answers (the base" in summary(record)
        served.model = models["base"]
        monkeypatch.setattr("sys.argv", ["loratune", "certify", str(run.root), url])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 1
    assert "answers like the base without the adapter" in " ".join(capsys.readouterr().out.split())


def test_what_is_asked_for_and_not_there_is_named(run: RunDir, models: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    served = Served(model=models["base"], tokenizer=tokenizer, stops=(), names=("qwen", "llama"), key="sesame-open")
    with running(served) as url:
        with pytest.raises(RecipeError, match="asks for a key"):
            certify_target(run.root, url)
        with pytest.raises(RecipeError, match="none of the names tiny") as error:
            certify_target(run.root, url, api_key="sesame-open")
        assert "llama, qwen" in error.value.fix
        with pytest.raises(RecipeError, match="no model 'tuned'"):
            certify_target(run.root, url, api_key="sesame-open", model="tuned")
    with pytest.raises(RecipeError, match="names a model of a server"):
        certify_target(run.root, tmp_path, model="tuned")


def test_a_server_that_is_silent_or_gone_is_named(run: RunDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(MachineError, match=r"no answer within 0\.2 s"):
            Endpoint(root=f"http://127.0.0.1:{port}", timeout=0.2).choose_model(None, ["tiny"])
    with pytest.raises(MachineError, match="Connection refused") as error:
        certify_target(run.root, f"http://127.0.0.1:{port}")
    assert "start the server" in error.value.fix


@pytest.mark.slow
def test_loratune_serve_is_asked_by_its_answers_alone(run: RunDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "loratune",
            "serve",
            run.root,
            "--server",
            "transformers",
            "--port",
            str(port),
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        while (line := process.stdout.readline()) and line != "}\n":
            pass
        url = f"http://127.0.0.1:{port}/v1"
        right = certify_target(run.root, url)
        assert (right["verdict"], right["served"]["way"]) == ("same", None), right["reason"]
        assert right["template"] == {
            "num_prompts": 14,
            "same_token_ids": 14,
            "first_difference": None,
            "compared_by": "number of tokens",
        }
        wrong = certify_target(run.root, url, model="base")
        assert wrong["verdict"] == "different"
        assert "--model NAME, with one of tiny" in wrong["fix"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        process.stdout.close()
