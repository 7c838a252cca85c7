"""Answers with a label (KTO), on a tiny model: rows, the loss and its baseline, and stock KTOTrainer as the referee."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from loratune.__main__ import app
from loratune.data.batch import collate, num_terms
from loratune.data.examples import JudgedExample
from loratune.data.preview import preview
from loratune.data.rows.row import Row
from loratune.planning import cost
from loratune.planning.lock import examples_fingerprint
from loratune.recipe.recipe import DataSection, PreferenceSection, Recipe
from loratune.reporting.verdict import verdict_on
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import DataError, RecipeError
from loratune.run.progress import NoProgress
from loratune.run.records.evaluation import EvaluationRecord
from loratune.workflows.guidance.eject_support import check_supported
from loratune.workflows.guidance.init import init
from loratune.workflows.plan import plan
from loratune.workflows.resume import resume
from loratune.workflows.tasks.preference import baseline, compare, reference
from loratune.workflows.tasks.preference.baseline import Baseline, mismatched, mismatches
from loratune.workflows.tasks.preference.data import prepare_preferences
from loratune.workflows.tasks.preference.judged_measures import add_measures, good_nll, judged_table
from loratune.workflows.tasks.preference.judged_rows import to_judged
from loratune.workflows.tasks.preference.log_probs import answers_of
from loratune.workflows.tasks.preference.loss import JudgedLoss
from loratune.workflows.tasks.preference.objective import Answers, judged_losses
from loratune.workflows.tasks.preference.trl_judged_trainer import PaddedAnswers, rows_of_answers
from loratune.workflows.train import train
from tests.conftest import write_jsonl
from tests.invariants.test_processes import trained
from tests.workflows.tasks.test_preference import StopAfter, adapter, assert_close, losses
from tests.workflows.tasks.test_preference_data import ASKED, BAD, CHOSEN, GOOD, TALK, USER, gpt, human, said
from tests.workflows.tasks.test_preference_parts import ORIGIN, adapted, random_pairs

MakeRecipe = Callable[..., Recipe]
COLORS = ("red", "blue", "green", "white", "black", "brown")
KTO = PreferenceSection(loss="kto")


def judged_row(number: int) -> dict[str, Any]:
    prompt, color = f"Which color has box {number}?", COLORS[number % len(COLORS)]
    if number % 2:
        return {"prompt": prompt, "completion": "I do not know." + " Sorry." * (number % 4), "label": False}
    return {"prompt": prompt, "completion": f"It is {color}." + " Really." * (number % 3), "label": True}


@pytest.fixture(scope="module")
def judged_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("judged")
    return (
        write_jsonl(folder / "train.jsonl", [judged_row(i) for i in range(18)]),
        write_jsonl(folder / "eval.jsonl", [judged_row(i) for i in range(100, 106)]),
    )


@pytest.fixture
def make(tiny_recipe: MakeRecipe, judged_files: tuple[Path, Path]) -> MakeRecipe:
    """Makes recipes of judged answers on the tiny model; settings as `train__epochs=1`."""

    def recipe(**settings: object) -> Recipe:
        own: dict[str, object] = {
            "model__task": "preference",
            "preference__loss": "kto",
            "data__train": str(judged_files[0]),
            "data__eval": str(judged_files[1]),
            "evaluate__samples": 0,
        }
        return tiny_recipe(**{**own, **settings})

    return recipe


# ---- rows

SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASKED, CHOSEN], "label": True},
    "prompt and completion": {"prompt": USER, "completion": GOOD, "label": True},
    "TRL, as messages": {"prompt": [ASKED], "completion": [CHOSEN], "label": True},
    "LLaMA-Factory": {"conversations": [human(USER), gpt(GOOD)], "kto_tag": True},
    "LLaMA-Factory, Alpaca": {"instruction": USER, "input": "", "output": GOOD, "kto_tag": "true"},
    "a table": {"question": USER, "answer": GOOD, "label": "True "},
    "numbers": {"prompt": USER, "completion": GOOD, "label": 1},
    "both names": {"prompt": USER, "completion": GOOD, "label": True, "kto_tag": 1.0},
}


def read(value: Any) -> Any:
    found = to_judged([Row(file="a.jsonl", line=1, value=value)])
    return found.items[0] if found.items else found.rejected[0].reason


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_good_answer(shape: str) -> None:
    judged = read(SHAPES[shape])
    assert [*judged.conversation.messages] == [ASKED, CHOSEN]
    assert judged.label == 1
    assert judged.key == read(SHAPES["messages"]).key
    bad = {name: False if name in ("label", "kto_tag") else part for name, part in SHAPES[shape].items()}
    assert read(bad).label == 0
    assert read(bad).key != judged.key


def test_only_what_follows_the_last_message_of_the_user_is_judged() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    turns = [*TALK, call, {"role": "tool", "content": "rain"}, CHOSEN]
    judged = read({"messages": turns, "label": True})
    assert judged.conversation.given == judged.conversation.excluded == (1,)
    started = read({"prompt": [ASKED, said("assistant", "Well, ")], "completion": GOOD, "label": False})
    assert started.conversation.started == (1, "Well, ")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, "preference.loss=dpo learns from pairs"),
        ({"prompt": USER, "chosen": GOOD, "rejected": BAD, "label": True}, "preference.loss=dpo learns from pairs"),
        ({"messages": TALK}, "no label among fields messages"),
        ({"prompt": USER, "completion": GOOD, "label": "good"}, 'label is str "good", neither true'),
        ({"prompt": USER, "completion": GOOD, "label": 0.5}, "label is float 0.5, neither true"),
        ({"prompt": USER, "completion": GOOD, "label": [1]}, "neither true"),
        ({"prompt": USER, "completion": GOOD, "label": True, "kto_tag": False}, "label and kto_tag say different"),
        ({"messages": [ASKED], "label": True}, "no answer after the last message of the user"),
        ({"messages": [ASKED, said("assistant", " ")], "label": True}, "is empty: nothing to train"),
        ({"messages": [CHOSEN], "label": True}, "no message of the user"),
        ({"text": "fine", "label": True}, "task=sequence_classification"),
        ({"note": "fine", "label": True}, "no prompt with an answer among fields note"),
        ("text", "a row must be an object"),
    ],
)
def test_what_is_no_judged_answer_is_refused_with_the_reason(row: Any, reason: str) -> None:
    assert reason in read(row)


def prepared(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], **settings: Any) -> Any:
    file = write_jsonl(folder / "judged.jsonl", rows)
    data = DataSection.model_validate({"train": str(file), "eval": "none", **settings})
    return prepare_preferences(KTO, data, tokenizer, max_length=400, seed=1)


def test_the_answer_is_trained_with_its_stop_token_and_both_labels_are_needed(
    tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [*([SHAPES["messages"]] * 3), {"prompt": TALK, "completion": BAD, "label": False}]
    data = prepared(tmp_path, smollm2_tokenizer, rows)
    said_by = [str(smollm2_tokenizer.decode(example.input_ids[example.supervised])) for example in data.train]
    assert said_by == [*[f"{GOOD}<|im_end|>"] * 3, f"{BAD}<|im_end|>"]
    assert [example.label for example in data.train] == [1, 1, 1, 0]
    counts = data.report["train"]["judged"]
    assert (counts["good"], counts["bad"], data.report["train"]["duplicates"]) == (3, 1, 2)
    (advice,) = [notice for notice in data.report["notices"] if "paper of KTO" in notice]
    assert "weighted 3 to 1" in advice
    assert "preference.undesirable_weight=3" in advice
    shown = preview(data.train, smollm2_tokenizer, 4)
    assert len(shown.titles) == 4
    other = [*data.train[:3], JudgedExample(**{**_fields(data.train[3]), "label": 1})]
    assert examples_fingerprint(data.train) != examples_fingerprint(other)
    for fraction in (0.01, 0.5):  # of each label, also where it rounds to none
        held_out = prepared(tmp_path, smollm2_tokenizer, [judged_row(i) for i in range(12)], eval=fraction)
        assert sorted(example.label for example in held_out.eval) == ([0, 1] if fraction < 0.5 else [0, 0, 0, 1, 1, 1])
        assert len(held_out.train) + len(held_out.eval) == 12
        assert len(held_out.eval_conversations) == len(held_out.eval) / 2
    with pytest.raises(DataError, match="1 distinct bad conversation: nothing can be held out"):
        prepared(tmp_path, smollm2_tokenizer, [judged_row(i) for i in (0, 1, 2, 4)], eval=0.5)
    with pytest.raises(DataError, match="none of 3 answers is bad"):
        prepared(tmp_path, smollm2_tokenizer, rows[:3])
    with pytest.raises(DataError, match=r"preference\.loss=dpo learns from pairs"):
        prepared(tmp_path, smollm2_tokenizer, [*rows, {"prompt": USER, "chosen": GOOD, "rejected": BAD}])


def _fields(example: JudgedExample) -> dict[str, Any]:
    return {"input_ids": example.input_ids, "supervised": example.supervised, "origin": example.origin}


def test_init_writes_a_recipe_for_labels_of_both_kinds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "mine.jsonl", [judged_row(i) for i in range(30)])
    path, starter = init("mine.jsonl", overwrite=True)
    recipe = Recipe.load(path)
    assert (recipe.model.task, recipe.preference.loss) == ("preference", "kto")
    assert "30 answers" in starter.title
    write_jsonl(tmp_path / "good.jsonl", [judged_row(2 * i) for i in range(30)])
    assert Recipe.load(init("good.jsonl")[0]).model.task == "causal_lm"


# ---- the loss


def test_the_loss_and_its_gradient_are_those_of_the_paper() -> None:
    section = PreferenceSection(loss="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    given = torch.tensor([[-4.0], [-9.5], [-2.0]], dtype=torch.float64, requires_grad=True)
    answers = Answers(given, torch.ones(3, 1), torch.tensor([[-5.0], [-7.0], [-8.0]], dtype=torch.float64))
    good, z = torch.tensor([1, 0, 0]), 0.8
    losses = judged_losses(section, answers, good, z)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    by_hand = [
        1.3 * (1 - sigmoid(0.3 * (1.0 - z))),
        0.7 * (1 - sigmoid(0.3 * (z - -2.5))),
        0.7 * (1 - sigmoid(0.3 * (z - 6.0))),
    ]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), given)
    sides = zip((1.0, -2.5, 6.0), (1, -1, -1), (1.3, 0.7, 0.7), strict=True)
    slopes = [-weight * sign * 0.3 * sigmoid(0.3 * (r - z)) * (1 - sigmoid(0.3 * (r - z))) for r, sign, weight in sides]
    assert gradient[:, 0].tolist() == pytest.approx(slopes, rel=1e-12)


def judged_examples() -> list[JudgedExample]:
    return [
        JudgedExample(
            input_ids=part.input_ids,
            supervised=part.supervised,
            origin=ORIGIN,
            label=int(number % 2 == 0),
            reference=(-3.9 * int(part.supervised.sum()),),
        )
        for number, part in enumerate(part for pair in random_pairs() for part in pair.sequences)
    ]


def test_a_judged_answer_is_one_term_with_its_label_in_the_batch() -> None:
    examples = judged_examples()
    batch = collate(examples)
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert batch.answer_tokens == tuple(int(example.supervised.sum()) for example in examples)
    assert batch.reference is not None
    assert batch.reference.tolist() == [example.reference[0] for example in examples if example.reference]
    assert [num_terms(example) for example in examples] == [1] * 6


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_and_every_gradient_equal_plain_torch(packed: bool) -> None:
    examples, z = judged_examples(), 1.7
    plain, model = adapted(), adapted()
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()
        logps = torch.log_softmax(plain(input_ids=ids[None]).logits[0, :-1].double(), -1)
        logp = logps.gather(1, ids[1:, None])[:, 0][torch.from_numpy(example.supervised[1:])].sum()
        assert example.reference is not None
        reward = 0.1 * (logp - example.reference[0] - z)
        total = total + 1 - torch.sigmoid(reward if example.label else -reward)
    total.backward()
    loss = JudgedLoss(model, packed=packed)
    loss.section, loss.z = KTO, z
    each = torch.empty(len(examples))
    found = loss.sum(collate(examples), each)
    found.backward()
    assert found.item() == pytest.approx(total.item(), rel=1e-5)
    assert each.sum().item() == pytest.approx(total.item(), rel=1e-5)
    assert loss.per_token(collate(examples)).tolist() != pytest.approx(each.tolist(), rel=1e-4)  # measured with z = 0
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


def test_a_mismatch_is_a_prompt_with_the_answer_of_the_example_before_it() -> None:
    one, other = judged_examples()[:2]
    start, first = int(one.supervised.argmax()), int(other.supervised.argmax())
    found = mismatched(one, other, 400)
    assert found.input_ids.tolist() == [*one.input_ids[:start].tolist(), *other.input_ids[first:].tolist()]
    assert found.supervised.tolist() == [False] * start + [True] * (len(other.input_ids) - first)
    assert len(mismatched(one, other, start + 1).input_ids) == start + 1
    three = judged_examples()[:3]
    answers = [example.input_ids[int(example.supervised.argmax()) :].tolist() for example in three]
    for example, answer in zip(mismatches(three, 400), answers[-1:] + answers, strict=False):
        assert example.input_ids[int(example.supervised.argmax()) :].tolist() == answer


class Budget:
    """As a `TokenBudget` that puts everything into one micro-batch."""

    def micro_batches(self, examples: Any, numbers: Any, **_: Any) -> list[tuple[int, ...]]:
        return [tuple(numbers)]

    def retry(self, work: Callable[[], Any], undo: Any) -> Any:
        return work()


def test_the_baseline_is_the_mean_over_the_steps_mismatches_clamped_at_zero() -> None:
    examples, loss = judged_examples(), JudgedLoss(adapted())
    own = Baseline(examples, batch_size=4, seed=3, max_length=400)
    budget: Any = Budget()
    values = own.measure(4, loss, budget, NoProgress())
    assert values.shape == (12, 1)  # two epochs of a step of four and one of two
    own.reference = values - 0.5
    for step in range(4):
        assert own.of_step(step, loss, budget) == pytest.approx(0.5, abs=1e-6)
    own.reference = values + 0.5
    assert own.of_step(1, loss, budget) == 0.0
    assert not np.allclose(values[:6], values[6:]), "another epoch has other mismatches"


def test_the_referee_gets_the_same_tokens_masks_and_mismatches() -> None:
    examples = judged_examples()[:2]
    batch = PaddedAnswers(400)([*rows_of_answers(examples)])
    assert batch["label"].tolist() == [True, False]
    for prefix, part in (("", examples), ("KL_", mismatches(examples, 400))):
        for row, example in enumerate(part):
            length = len(example.input_ids)
            assert batch[f"{prefix}input_ids"][row, :length].tolist() == example.input_ids.tolist()
            assert batch[f"{prefix}completion_mask"][row, :length].tolist() == example.supervised.tolist()
            assert batch[f"{prefix}attention_mask"][row].sum() == length


def test_measures_of_judged_answers_are_those_of_the_numbers() -> None:
    examples = judged_examples()[:3]  # good, bad, good
    lengths = [int(example.supervised.sum()) for example in examples]
    base, tuned = np.array([[-4.0], [-3.0], [-8.0]]), np.array([[-2.0], [-1.0], [-9.0]])
    items = [{"base": {"num_tokens": 6}, "tuned": {"num_tokens": 8}}]
    record: dict[str, Any] = {"base": {}, "tuned": {}, "difference": {}, "items": items, "num_examples": 3}
    add_measures(record, KTO, examples, base=base, tuned=tuned, reference=base)
    before = (-4.0 / lengths[0] - 8.0 / lengths[2]) / 2 + 3.0 / lengths[1]
    after = (-2.0 / lengths[0] - 9.0 / lengths[2]) / 2 + 1.0 / lengths[1]
    assert record["base"]["label_margin"] == pytest.approx(before)
    assert record["difference"]["label_margin"]["value"] == pytest.approx(after - before)
    rewards = record["preference"]["rewards"]
    assert (rewards["chosen"], rewards["rejected"]) == pytest.approx((0.1 * (2 - 1) / 2, 0.1 * 2))
    assert rewards["margin"]["value"] == pytest.approx(0.05 - 0.2)
    assert rewards["accuracy"]["value"] == pytest.approx(1 / 3)  # the first alone moved as its label says
    assert good_nll(examples, base) == [(4.0, lengths[0]), (0.0, 0), (8.0, lengths[2])]
    assert judged_table(record | {"before": "base"}).row_count == 3
    add_measures(record, KTO, examples, base=base, tuned=tuned, reference=None)
    assert judged_table(record | {"before": "base"}).row_count == 1


# ---- runs


@pytest.mark.parametrize("kind", ["weighted", pytest.param("plain", marks=pytest.mark.slow)])
def test_the_fast_engine_trains_as_stock_kto_trainer(
    make: MakeRecipe, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 18 answers, the last step of an epoch has 2. Where bad answers weigh little, the baseline is above zero."""
    settings: dict[str, object] = {"train__epochs": 2}
    if kind == "weighted":
        settings |= {"preference__desirable_weight": 1.3, "preference__undesirable_weight": 0.1}
        settings["preference__beta"] = 0.2
    baselines: list[float] = []
    of_step = Baseline.of_step
    monkeypatch.setattr(Baseline, "of_step", lambda *args: baselines.append(of_step(*args)) or baselines[-1])
    runs = {}
    for engine in ("fast", "trl"):
        recipe = make(train__engine=engine, train__output_dir=str(tmp_path / engine), **settings)
        runs[engine] = train(recipe).run
    assert_close(runs["fast"], runs["trl"])
    assert len(baselines) == 6
    fast, trl = (read_json(run.evaluation) for run in runs.values())
    assert fast["tuned"]["label_margin"] == pytest.approx(trl["tuned"]["label_margin"], abs=1e-4)
    rewards = fast["preference"]["rewards"]
    assert fast["num_examples"] == 6
    assert rewards["margin"]["value"] == pytest.approx(rewards["chosen"] - rewards["rejected"])
    if kind == "weighted":
        assert max(baselines) > 0.01
        assert rewards["chosen"] > 0
        return
    assert losses(runs["fast"])[0] == pytest.approx(0.5, abs=1e-6)
    assert fast["tuned"]["label_margin"] > fast["base"]["label_margin"] + 0.05  # something was learned
    assert rewards["chosen"] > 0 > rewards["rejected"]
    assert rewards["accuracy"]["value"] == 1.0
    _check_pages(runs["fast"], fast)


def _check_pages(run: RunDir, record: dict[str, Any]) -> None:
    page = run.report.read_text(encoding="utf-8")
    assert "reward of good answers" in page
    assert "which answers are good and which are bad (kto, beta 0.1)" in page
    verdict = verdict_on(EvaluationRecord.model_validate_json(json.dumps(record)))
    assert verdict.outcome == "better"
    assert "log p per token, good minus bad answers" in verdict.sentence
    shown = CliRunner().invoke(app, ["evaluate", str(run.root), "--gate", "label_margin>=0"])
    assert shown.exit_code == 0, shown.output
    assert "good minus bad" in shown.stdout


@pytest.mark.slow
def test_the_step_does_not_depend_on_micro_batches_or_processes(make: MakeRecipe, tmp_path: Path) -> None:
    packed = train(make(train__epochs=1, train__output_dir=str(tmp_path / "packed"))).run
    alone = train(make(train__epochs=1, train__token_budget=1, train__output_dir=str(tmp_path / "alone"))).run
    assert_close(packed, alone)
    assert_close(packed, trained(2, make(train__epochs=1), tmp_path))


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit_and_needs_no_reference_pass(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    settings = {"train__save_every": 3, "train__eval_every": "never", "lora__dropout": 0.1}
    whole = train(make(train__output_dir=str(tmp_path / "whole"), **settings)).run
    with pytest.raises(BaseException):  # noqa: B017, PT011 - KeyboardInterrupt, or what is made of it
        train(make(train__output_dir=str(tmp_path / "stopped"), **settings), progress=StopAfter())
    for path in (tmp_path / "cache" / "reference").iterdir():
        path.unlink()
    passes: list[str] = []
    for module in (reference, compare, baseline):
        real = module.log_probs
        monkeypatch.setattr(module, "log_probs", lambda *args, real=real: passes.append(args[-1]) or real(*args))
    run = resume(tmp_path / "stopped").run
    assert {name for name in passes if "reference" in name} == set()
    assert "baseline" in passes
    assert losses(run) == losses(whole)
    one, other = adapter(whole), adapter(run)
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_the_plan_counts_answers_and_the_passes_of_the_reference(make: MakeRecipe) -> None:
    found = plan(make())
    assert found.as_plan()["data"]["num_examples"] == 18
    train_tokens, eval_tokens = (
        sum(len(example.input_ids) for example in answers_of(side)) for side in (found.data.train, found.data.eval)
    )
    passes = cost._reference_pass(make(), found.data, 2)
    assert passes["reference_tokens"] == 5 * train_tokens + eval_tokens


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"preference__sft_weight": 0.1}, "which is for dpo, ipo, orpo, simpo"),
        ({"preference__label_smoothing": 0.1}, "which is for dpo"),
        ({"preference__loss": "dpo", "preference__desirable_weight": 1.2}, "which is for kto"),
        ({"train__batch_size": 1}, "kto compares the answers of a step"),
        ({"data__columns": {"chosen": "x"}}, "judged answers have messages"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_recipe_is_read(
    make: MakeRecipe, settings: dict[str, object], problem: str
) -> None:
    with pytest.raises(RecipeError, match=problem):
        make(**settings)


def test_eject_says_what_trains_judged_answers_with_stock_libraries(make: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"preference\.loss is kto, which a plain TRL") as refused:
        check_supported(make())
    assert "train.engine=trl" in refused.value.fix
