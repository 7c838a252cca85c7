"""The parts of preferences: losses against their formulas, pairs as batches, and pages."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel

from loratune.data.batch import collate, num_supervised, num_terms
from loratune.data.examples import Example, PairExample
from loratune.data.rows.row import Origin
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.targets import resolve_targets
from loratune.planning.lock import examples_fingerprint
from loratune.recipe.recipe import LoraSection
from loratune.recipe.sections.preference import DEFAULT_BETA, WITH_REFERENCE, PreferenceSection
from loratune.reporting.preference_section import PAIR_MEASURES, preference
from loratune.run.records.evaluation import EvaluationRecord
from loratune.training.loss import SupervisedLoss
from loratune.workflows.tasks.preference.loss import PreferenceLoss
from loratune.workflows.tasks.preference.measures import MEASURES, add_pair_measures, preference_table
from loratune.workflows.tasks.preference.objective import Answers, beta_choice, beta_of, pair_losses
from loratune.workflows.tasks.preference.trl_trainer import LOSS_TYPES, padded_pairs, rows_of_pairs
from tests.model.adapter.test_attach import tiny

ORIGIN = Origin(file="pairs.jsonl", line=1)


def answers(*, seed: int = 0) -> Answers:
    torch.manual_seed(seed)
    lengths = torch.tensor([[3.0, 5.0], [8.0, 2.0], [4.0, 4.0]], dtype=torch.float64)
    logps = (-torch.rand(3, 2, dtype=torch.float64) * 2 * lengths).requires_grad_()
    return Answers(logps, lengths, -torch.rand(3, 2, dtype=torch.float64) * 2 * lengths)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(section: PreferenceSection, given: Answers) -> list[float]:
    """The formulas of the papers, with plain numbers and without log-space tricks."""
    assert given.reference_PA is not None
    found = []
    rows = zip(given.logps_PA.tolist(), given.lengths_PA.tolist(), given.reference_PA.tolist(), strict=True)
    for (c, r), (n, m), (ref_c, ref_r) in rows:
        beta, epsilon = beta_of(section), section.label_smoothing
        delta = (c - ref_c) - (r - ref_r)
        p, q = math.exp(c / n), math.exp(r / m)
        odds_ratio = (p / (1 - p)) / (q / (1 - q))
        loss = {
            "dpo": -(1 - epsilon) * math.log(sigmoid(beta * delta)) - epsilon * math.log(sigmoid(-beta * delta)),
            "ipo": ((c - ref_c) / n - (r - ref_r) / m - 1 / (2 * beta)) ** 2,
            "orpo": -math.log(p) - beta * math.log(sigmoid(math.log(odds_ratio))),
            "simpo": -math.log(sigmoid(beta / n * c - beta / m * r - section.target_margin)),
        }[section.loss]
        found.append(loss - section.sft_weight * c / n)
    return found


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize(
    "settings",
    [
        *({"loss": loss} for loss in DEFAULT_BETA if loss != "kto"),
        {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.2},
        {"loss": "simpo", "target_margin": 0.3},
    ],
)
def test_losses_and_gradients_are_those_of_the_papers(settings: dict[str, object], sft_weight: float) -> None:
    section = PreferenceSection.model_validate({**settings, "sft_weight": sft_weight})
    given = answers()
    losses = pair_losses(section, given)
    assert losses.tolist() == pytest.approx(by_hand(section, given), rel=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), given.logps_PA)
    step = 1e-6
    for place in ((0, 0), (1, 1), (2, 0)):
        values = given.logps_PA.detach().clone()
        values[place] += step
        moved = sum(by_hand(section, given._replace(logps_PA=values)))
        slope = (moved - sum(by_hand(section, given))) / step
        assert float(gradient[place]) == pytest.approx(slope, abs=1e-4)


def test_the_odds_ratio_is_finite_where_an_answer_is_certain() -> None:
    given = Answers(torch.zeros(1, 2, dtype=torch.float64, requires_grad=True), torch.ones(1, 2).double(), None)
    loss = pair_losses(PreferenceSection(loss="orpo"), given)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert given.logps_PA.grad is not None
    assert torch.isfinite(given.logps_PA.grad).all()


def test_beta_is_that_of_the_paper_unless_it_is_given() -> None:
    assert beta_choice(PreferenceSection(loss="simpo"))["preference.beta"].value == "2"
    assert beta_choice(PreferenceSection(beta=0.3)) == {}
    assert beta_of(PreferenceSection(beta=0.3)) == 0.3


# ---- batches


def sequence(ids: list[int], num_trained: int) -> Example:
    supervised = np.zeros(len(ids), dtype=bool)
    supervised[len(ids) - num_trained :] = True
    return Example(input_ids=np.array(ids, dtype=np.int32), supervised=supervised, origin=ORIGIN)


def pair_example() -> PairExample:
    return PairExample.of(sequence([1, 2, 3, 4], 2), sequence([1, 2, 9], 1), ORIGIN)


def test_a_pair_is_two_sequences_that_do_not_see_each_other_and_one_term_of_the_loss() -> None:
    pair = pair_example()
    batch = collate([pair, PairExample.of(sequence([5, 6], 1), sequence([5, 7], 1), ORIGIN)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 9, 5, 6, 5, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1]]
    assert batch.boundaries.tolist() == [0, 4, 7, 9, 11]
    assert batch.max_length == 4
    assert batch.targets.tolist() == [3, 4, 9, 6, 7]
    assert batch.answer_tokens == (2, 1, 1, 1)
    assert batch.reference is None
    assert (num_supervised(pair), num_terms(pair)) == (3, 1)
    one, other = pair.sequences
    assert one.input_ids.tolist() == [1, 2, 3, 4]
    assert other.supervised.tolist() == [False, False, True]
    assert (num_supervised(one), num_terms(one)) == (2, 2)


def test_a_rejected_answer_without_a_prompt_is_not_predicted_from_the_chosen_one() -> None:
    pair = PairExample.of(sequence([1, 2], 2), sequence([3, 4], 2), ORIGIN)
    assert pair.supervised.tolist() == [False, True, False, True]


def test_the_fingerprint_tells_where_a_pair_is_divided() -> None:
    one = PairExample.of(sequence([1, 2, 3, 4], 1), sequence([5, 6], 1), ORIGIN)
    other = PairExample.of(sequence([1, 2], 1), sequence([3, 4, 5, 6], 1), ORIGIN)
    assert examples_fingerprint([one])["tokens"] != examples_fingerprint([other])["tokens"]
    plain = Example(input_ids=one.input_ids, supervised=one.supervised, origin=ORIGIN)
    assert examples_fingerprint([one])["tokens"] != examples_fingerprint([plain])["tokens"]


# ---- measures


def measured(reference: bool = True) -> dict[str, object]:
    pairs = [pair_example(), PairExample.of(sequence([1, 2], 1), sequence([1, 3, 4, 5], 3), ORIGIN)]
    base, tuned = np.array([[-4.0, -3.0], [-1.0, -9.0]]), np.array([[-2.0, -5.0], [-1.0, -1.0]])
    answer = {"text": "a", "score": None, "num_tokens": 6, "stopped": True}
    item = {"file": "f", "line": 1, "prompt": "p", "question": "q", "reference": "r", "base": answer}
    record: dict[str, object] = {
        "metric": "none",
        "num_examples": 2,
        "base": {"nll": 1.0},
        "tuned": {"nll": 1.0},
        "difference": {"nll": {"value": 0.0, "low": 0.0, "high": 0.0}},
        "interval": {"level": 0.95, "method": "paired bootstrap", "resamples": 10_000},
        "items": [{**item, "tuned": {**answer, "num_tokens": 8}}],
        "adapter": {"kind": "last", "steps": [1]},
    }
    section = PreferenceSection(beta=0.5)
    add_pair_measures(record, section, pairs, base=base, tuned=tuned, reference=base if reference else None)
    return record


def evaluation(record: dict[str, object]) -> EvaluationRecord:
    return EvaluationRecord.model_validate_json(json.dumps(record))


def test_measures_of_pairs_are_those_of_the_numbers() -> None:
    record = measured()
    evaluation(record)
    assert MEASURES == PAIR_MEASURES
    base, tuned, found = record["base"], record["tuned"], record["preference"]
    assert isinstance(base, dict)
    assert isinstance(tuned, dict)
    assert isinstance(found, dict)
    assert (base["pair_accuracy"], tuned["pair_accuracy"]) == (0.5, 0.75)  # a tie counts half
    # per token: -4/2 > -3/1 and -1/1 > -9/3 | -2/2 > -5/1 and -1/1 < -1/3
    assert (base["pair_accuracy_per_token"], tuned["pair_accuracy_per_token"]) == (1.0, 0.5)
    assert (base["pair_margin"], tuned["pair_margin"]) == (3.5, 1.5)
    rewards = found["rewards"]
    assert rewards["chosen"] == 0.5 * (2.0 + 0.0) / 2
    assert rewards["rejected"] == 0.5 * (-2.0 + 8.0) / 2
    assert rewards["margin"]["value"] == 0.5 * (4.0 - 8.0) / 2
    assert rewards["accuracy"]["value"] == 0.5
    lengths = found["lengths"]
    assert (lengths["chosen"], lengths["rejected"], lengths["base"], lengths["tuned"]) == (1.5, 2.0, 6.0, 8.0)
    assert lengths["num_chosen_shorter"] == 1
    assert (lengths["base_accuracy_where_shorter"], lengths["tuned_accuracy_where_shorter"]) == (1.0, 0.5)
    assert preference_table(record).row_count == 5
    assert preference_table(measured(reference=False)).row_count == 3


def test_the_page_says_what_was_learned_and_whether_it_was_length() -> None:
    blocks = list(preference(evaluation(measured())))
    text = " ".join(map(str, blocks))
    assert "reward margin" in text
    assert "Where the chosen answer is the shorter one (1 pair)" in text
    assert "own answers of the fine-tuned model" in text
    without = " ".join(map(str, preference(evaluation(measured(reference=False)))))
    assert "reward" not in without


# ---- the loss on a model


def adapted() -> PeftModel:
    """A tiny model with an adapter that changes it, without dropout."""
    base = tiny(2)
    section = LoraSection(r=4, dropout=0.0)
    model = attach_adapter(base, section, resolve_targets(base, "balanced"), base_name="tiny", seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return model


def random_pairs() -> list[PairExample]:
    draw = np.random.default_rng(0)

    def ids(*lengths: int) -> list[list[int]]:
        return [draw.integers(3, 59, size=length).tolist() for length in lengths]

    found = []
    for prompt, chosen, rejected in (ids(7, 4, 6), ids(5, 9, 3), ids(8, 5, 5)):
        pair = PairExample.of(
            sequence(prompt + chosen, len(chosen)), sequence(prompt + rejected, len(rejected)), ORIGIN
        )
        found.append(replace(pair, reference=(-4.0 * len(chosen), -4.1 * len(rejected))))
    return found


def in_plain_torch(model: PeftModel, pairs: list[PairExample], beta: float) -> torch.Tensor:
    """DPO with full logits, one sequence at a time, by the model's own forward."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        logps = []
        for part in pair.sequences:
            ids = torch.from_numpy(part.input_ids).long()
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
            each = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
            logps.append(each[torch.from_numpy(part.supervised[1:])].sum())
        assert pair.reference is not None
        delta = logps[0] - pair.reference[0] - logps[1] + pair.reference[1]
        total = total - torch.nn.functional.logsigmoid(beta * delta)
    return total


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_and_every_gradient_equal_plain_torch(packed: bool) -> None:
    pairs = random_pairs()
    plain = adapted()
    expected = in_plain_torch(plain, pairs, 0.3)
    expected.backward()
    model = adapted()
    loss = PreferenceLoss(model, packed=packed)
    loss.section = PreferenceSection(beta=0.3)
    each = torch.empty(3)
    total = loss.sum(collate(pairs), each)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert each.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.per_token(collate(pairs)).tolist() == pytest.approx(each.tolist())
    theirs = dict(plain.named_parameters())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


def test_examples_without_pairs_have_the_usual_loss() -> None:
    model = adapted()
    plain = [sequence([5, 6, 7, 8], 2), sequence([9, 3, 4], 1)]
    mine, usual = PreferenceLoss(model, packed=True), SupervisedLoss(model, packed=True)
    assert mine.per_token(collate(plain)).tolist() == usual.per_token(collate(plain)).tolist()
    assert mine.sum(collate(plain)).item() == usual.sum(collate(plain)).item()


def test_the_referee_gets_the_same_tokens_and_masks() -> None:
    pairs = [pair_example(), PairExample.of(sequence([5, 6], 1), sequence([5, 7, 8], 2), ORIGIN)]
    batch = padded_pairs([*rows_of_pairs(pairs)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [1, 2, 9, 0], [5, 7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]]
    assert {*LOSS_TYPES, "kto"} == set(WITH_REFERENCE)
