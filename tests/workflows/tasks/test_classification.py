"""`task: sequence_classification`, from labeled rows to a merged classifier, each part against transformers and PEFT
alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loratune.data.batch import collate
from loratune.data.examples import LabeledExample
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NoProgress
from loratune.workflows.evaluate import evaluate
from loratune.workflows.export import merge
from loratune.workflows.guidance.explain import explain
from loratune.workflows.load import load_trained
from loratune.workflows.reproduce import reproduce
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.classifiers import KINDS, bases, class_recipe, intent, plain_logits, write_rows
from tests.conftest import some

__all__ = ["bases"]

OFTEN = ("bert", "distilbert", "llama", "qwen2")
"""Architectures that other tests train too."""

SAME = 1e-5
"""Of losses and weights in float32, which two orders of summation leave apart."""


def outcome(run: RunDir) -> dict[str, torch.Tensor]:
    """The loss of every step, and the adapter."""
    losses = [record["loss"] for record in run.read_metrics() if "loss" in record]
    return {"losses": torch.tensor(losses), **load_file(run.adapter_weights)}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ---- training


@pytest.mark.parametrize("optimizer", some(["adamw_8bit", "lion", "adafactor"], "adamw_8bit"))
def test_optimizers_keep_of_the_head_what_the_plan_says(
    optimizer: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    run = train(class_recipe(bases("bert-mlm"), tmp_path, train__optimizer=optimizer, train__epochs=0.5)).run
    state = load_file(next(run.checkpoints.glob("*/optimizer.safetensors")))
    held = sum(tensor.nbytes for tensor in state.values() if tensor.numel() > 1)
    planned = read_json(run.plan)["memory"]["optimizer_bytes"]
    assert 0 <= planned - held < 0.001 * planned + 1


@pytest.mark.parametrize("kind", some(["bert", "llama"], "llama"))
def test_the_fast_engine_takes_the_steps_of_the_stock_trainer(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    never = {"train__save_every": "never", "train__eval_every": "never"}
    fast = train(class_recipe(bases(kind), tmp_path / "fast", **never)).run
    stock = train(class_recipe(bases(kind), tmp_path / "stock", train__engine="trl", **never)).run
    small = train(class_recipe(bases(kind), tmp_path / "small", train__token_budget=20, **never)).run
    assert len(outcome(fast)["losses"]) == 12
    assert distance(outcome(fast), outcome(stock)) < SAME
    assert distance(outcome(fast), outcome(small)) < SAME
    nll = [read_json(run.evaluation)["tuned"]["nll"] for run in (fast, stock)]
    assert nll[0] == pytest.approx(nll[1], abs=SAME)


@pytest.mark.slow
def test_each_source_has_its_loss(bases: Callable[[str], Path], tmp_path: Path) -> None:
    files = [str(write_rows(tmp_path / f"{n}.jsonl", [intent(i) for i in range(n, 2 * n)])) for n in (24, 40)]
    recipe = class_recipe(
        bases("bert"),
        tmp_path,
        data__train=[files[0], {"name": files[1], "weight": 2}],
        data__eval=files,
        train__epochs=1,
    )
    run = train(recipe).run
    stock = class_recipe(
        bases("bert"),
        tmp_path / "stock",
        data__train=[files[0], {"name": files[1], "weight": 2}],
        data__eval=files,
        train__epochs=1,
        train__engine="trl",
    )
    steps, same = (
        [line["loss_by_source"] for line in r.read_metrics() if "loss" in line] for r in (run, train(stock).run)
    )
    assert len(steps) == len(same)
    assert all(mine == pytest.approx(theirs, abs=SAME) for mine, theirs in zip(steps, same, strict=True))
    mixture = read_json(run.plan)["data"]["sources"]
    assert [(part["name"], part["num_examples"]) for part in mixture] == [(files[0], 24), (files[1], 80)]
    record = read_json(run.evaluation)
    parts = record["sources"]
    mean = (24 * parts[files[0]]["tuned"]["nll"] + 40 * parts[files[1]]["tuned"]["nll"]) / 64
    assert mean == pytest.approx(record["tuned"]["nll"], abs=SAME)
    last = [line for line in run.read_metrics() if "eval_nll" in line][-1]
    assert mean == pytest.approx(last["eval_nll"], abs=SAME)
    assert last["eval_nll_by_source"].keys() == parts.keys()
    assert record["adapter"] == {"kind": "last", "steps": [last["step"]]}


@pytest.mark.slow
def test_recomputed_layers_change_nothing(bases: Callable[[str], Path], tmp_path: Path) -> None:
    once = train(class_recipe(bases("bert"), tmp_path / "once", train__recompute=0, train__epochs=1)).run
    again = train(class_recipe(bases("bert"), tmp_path / "again", train__recompute=2, train__epochs=1)).run
    assert distance(outcome(once), outcome(again)) < SAME


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in OFTEN else ()) for kind in sorted(KINDS)]
)
def test_every_architecture_trains_and_loads_in_peft(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """What is saved answers in stock transformers and PEFT as in the run, and the plan counts as PEFT does."""
    run = train(class_recipe(bases(kind), tmp_path, train__epochs=1, lora__targets="attention")).run
    plan, record = read_json(run.plan), read_json(run.evaluation)
    base = AutoModelForSequenceClassification.from_pretrained(bases(kind), num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    base.config.pad_token_id = tokenizer.pad_token_id
    stock = PeftModel.from_pretrained(base, run.adapter)
    counted = stock.get_nb_trainable_parameters()[1]
    assert counted == plan["parameters"]["total"]
    assert sum(t.numel() for t in load_file(run.adapter_weights).values()) == plan["parameters"]["trainable"]
    assert run.adapter_weights.stat().st_size - plan["parameters"]["adapter_bytes"] < 16_000
    logits = plain_logits(stock, [item["prompt"] for item in record["items"]], tokenizer)
    names = record["confusion"]["labels"]
    assert [names[i] for i in logits.argmax(-1).tolist()] == [item["tuned"]["text"] for item in record["items"]]
    labels = torch.tensor([names.index(item["reference"]) for item in record["items"]])
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(record["tuned"]["nll"], abs=SAME)
    assert record["base"] != record["tuned"]


def test_it_learns(finished: RunDir) -> None:
    record = read_json(finished.evaluation)
    assert record["tuned"]["accuracy"] > max(record["majority"]["accuracy"], record["base"]["accuracy"]) + 0.2
    assert record["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert "random" in record["note"]


def test_a_resumed_run_is_the_uninterrupted_one(finished: RunDir, tmp_path: Path) -> None:
    stopped = RunDir(shutil.copytree(finished.root, tmp_path / "stopped"))
    shutil.rmtree(stopped.adapter)
    for checkpoint in stopped.checkpoints.iterdir():
        if checkpoint.name != "100":
            shutil.rmtree(checkpoint)
    assert distance(outcome(resume(stopped.root).run), outcome(finished)) == 0


@pytest.mark.slow
def test_a_run_can_be_reproduced(finished: RunDir, tmp_path: Path) -> None:
    assert reproduce(finished.root, tmp_path / "again").equal


def test_bfloat16_keeps_the_head_in_float32(bases: Callable[[str], Path], tmp_path: Path) -> None:
    run = train(class_recipe(bases("bert-mlm"), tmp_path, model__dtype="bfloat16", train__epochs=1)).run
    assert {tensor.dtype for tensor in load_file(run.adapter_weights).values()} == {torch.float32}
    first = read_json(run.evaluation)
    assert evaluate(run.root).evaluation == {**first, "gates": []}


@pytest.mark.slow
def test_a_head_of_other_classes_is_made_anew(finished: RunDir, tmp_path: Path) -> None:
    merged = merge(finished.root, tmp_path / "merged").folder
    rows = [{**intent(n), "label": n % 2} for n in range(24)]
    data = str(write_rows(tmp_path / "two.jsonl", rows))
    prepared = prepare(class_recipe(merged, tmp_path, data__train=data, data__eval="none"), NoProgress())
    assert (2, 16) in prepared.adapter.parameters.whole_shapes
    assert any("head of its own" in warning for warning in prepared.notes.warnings)
    assert train(prepared.recipe).run.has_adapter


# ---- evaluation


def test_gates_hold_the_accuracy(finished: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(finished.root, tmp_path / "run"))
    record = evaluate(run.root, gates=("accuracy>=0.1", "f1>=0.999", "difference.accuracy.low>-1")).evaluation
    assert record is not None
    assert [gate["passed"] for gate in record["gates"]] == [True, record["tuned"]["f1"] >= 0.999, True]
    with pytest.raises(RecipeError, match="no number accuracies"):
        evaluate(run.root, gates=("accuracies>=0.1",))
    with pytest.raises(RecipeError, match="--harness is for models that generate text"):
        evaluate(run.root, harness=("arc",))


def test_the_page_and_the_card_speak_of_classes(finished: RunDir) -> None:
    page = finished.report.read_text()
    for words in ("Confusion matrix, fine-tuned", "majority class", "labeled texts of", "class weather", "F1 (macro)"):
        assert words in page
    card = (finished.adapter / "README.md").read_text()
    assert "AutoPeftModelForSequenceClassification" in card
    assert "text-classification" in card
    program = card.partition("```python\n")[2].partition("```")[0].replace("path/of/this/folder", str(finished.adapter))
    made: dict[str, Any] = {}
    exec(program, made)  # noqa: S102 - our own card
    assert isinstance(made["model"], PeftModel)


def test_every_setting_is_explained(finished: RunDir) -> None:
    recipe = Recipe.load(finished.recipe)
    found = {item.name: item for item in explain(recipe, prepare(recipe, NoProgress()), {})}
    assert found["model.task"].value == "sequence_classification"
    assert "label" in found["data.train_on"].effect
    pages = explain(recipe, prepare(recipe, NoProgress()), {}, ["lora.r", "lora.targets", "max_length", "optimizer"])
    assert all(page.alternatives for page in pages)


# ---- the loss


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen2"])
def test_losses_and_gradients_are_those_of_the_model_itself(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """A micro-batch of many lengths, of pairs where the model tells them apart, against the model's own forward with
    labels, one example at a time."""
    rows = [intent(number) for number in range(24)]
    if kind == "bert":
        rows = [
            {"sentence1": row["text"], "sentence2": intent(i)["text"], "label": i % 2} for i, row in enumerate(rows)
        ]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    run = train(class_recipe(bases(kind), tmp_path, data__train=data, data__eval="none", train__epochs=0.2)).run
    prepared = prepare(Recipe.load(run.recipe), NoProgress())
    model, loss = load_trained(prepared, run, NoProgress())
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    examples = [example for example in prepared.data.train[:9] if isinstance(example, LabeledExample)]
    loss.sum(collate(examples)).backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    total = float(loss.sum(collate(examples)).detach())
    model.zero_grad()
    model.get_base_model().set_attn_implementation("eager")
    plain = torch.zeros(())
    for example in examples:
        types = (
            {}
            if example.token_types is None
            else {"token_type_ids": torch.from_numpy(example.token_types)[None].long()}
        )
        ids = torch.from_numpy(example.input_ids)[None].long()
        plain = plain + model(input_ids=ids, labels=torch.tensor([example.label]), **types).loss
    plain.backward()  # type: ignore[no-untyped-call]
    assert total == pytest.approx(plain.item(), rel=1e-6)
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == fast.keys()
    assert any("modules_to_save" in name for name in own)
    largest = max(float((fast[name] - own[name]).abs().max() / own[name].abs().max().clamp(min=1e-3)) for name in own)
    assert largest < 1e-4


def test_the_adapter_is_peft_s_for_sequence_classification(finished: RunDir, bases: Callable[[str], Path]) -> None:
    """The same names and shapes as PEFT makes with TaskType.SEQ_CLS."""
    base = AutoModelForSequenceClassification.from_pretrained(bases("bert"), num_labels=3)
    stock = get_peft_model(base, LoraConfig(r=4, target_modules=["attention.self.query"], task_type=TaskType.SEQ_CLS))
    saved = load_file(finished.adapter_weights)
    wanted = {
        name.replace(".default", "").replace("modules_to_save.", ""): parameter.shape
        for name, parameter in stock.named_parameters()
        if parameter.requires_grad
    }
    assert wanted.items() <= {name: tensor.shape for name, tensor in saved.items()}.items()
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(finished.adapter, num_labels=3)
    assert json.loads((finished.adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert isinstance(loaded, PeftModel)
