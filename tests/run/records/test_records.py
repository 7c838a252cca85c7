"""Every file of runs of several kinds is what the records say, and nothing else is written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import Interrupted, RunError
from loratune.run.progress import NO_PROGRESS, NoProgress
from loratune.run.records.base import Part, as_json, parse, read_valid_parts
from loratune.run.records.certificate import Certificates
from loratune.run.records.data import DataRecord
from loratune.run.records.evaluation import EvaluationRecord, Harness
from loratune.run.records.files import read_record, write_record
from loratune.run.records.lock import Fingerprints, LockRecord, StreamFingerprints
from loratune.run.records.metrics import EvaluationLine, EventLine, StepLine, parse_metrics_line
from loratune.run.records.plan import Memory, PlanRecord
from loratune.run.records.preview import PreviewRecord
from loratune.training.event_log import EventLog
from loratune.workflows.evaluate import evaluate
from loratune.workflows.export import merge
from loratune.workflows.resume import resume
from loratune.workflows.train import train
from tests.classifiers import bases, class_recipe
from tests.conftest import conversation, write_jsonl

__all__ = ["bases"]

MakeRecipe = Callable[..., Recipe]
FILES: dict[str, type[BaseModel]] = {
    "data.json": DataRecord,
    "plan.json": PlanRecord,
    "lock.json": LockRecord,
    "evaluation.json": EvaluationRecord,
    "preview.json": PreviewRecord,
    "parity.json": Certificates,
}


def check_files(run: RunDir, *missing: str) -> None:
    """Every file holds exactly what its model declares."""
    for name, model in FILES.items():
        path = run.root / name
        assert path.exists() == (name not in missing), name
        if path.exists():
            values = read_json(path)
            assert as_json(parse(model, values)) == values
            assert all(value["schema_version"] == 1 for value in (values if isinstance(values, list) else [values]))
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    assert lines
    for line in lines:
        assert as_json(parse_metrics_line(line)) == json.loads(line)


def test_a_text_run_with_its_best_adapter_gates_and_a_merge(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    often = {"train__save_every": 1, "train__eval_every": 1, "train__final_adapter": "best"}
    run = train(tiny_recipe(evaluate__metric="exact_match", evaluate__max_new_tokens=4, **often)).run
    check_files(run, "parity.json")
    assert read_record(run.evaluation, EvaluationRecord).adapter.kind == "best"
    kinds = [type(parse_metrics_line(line)) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert kinds.count(StepLine) == kinds.count(EvaluationLine) == 6
    evaluate(run.root, gates=("nll<=50",))
    merge(run.root, tmp_path / "merged")
    check_files(run)
    evaluation = read_record(run.evaluation, EvaluationRecord)
    assert evaluation.gates is not None
    assert [gate.passed for gate in evaluation.gates] == [True]


def test_several_sources_other_data_and_a_resumed_run(
    tiny_recipe: MakeRecipe, chat_files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [conversation(number) for number in range(20, 40)])
    recipe = tiny_recipe(
        data__train=[str(chat_files[0]), {"name": str(other), "weight": 0.5}],
        data__eval=0.2,
        evaluate__metric="none",
        evaluate__forgetting=str(chat_files[1]),
        train__save_every=1,
    )

    class StopAfterTwo(NoProgress):
        def metrics(self, record: dict[str, Any]) -> None:
            if record["step"] == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 2"):
        train(recipe, progress=StopAfterTwo())
    run = RunDir.open(recipe.train.output_dir)
    check_files(run, "parity.json", "evaluation.json")
    assert read_record(run.plan, PlanRecord).so_far is not None
    resume(run.root)
    check_files(run, "parity.json")
    evaluation = read_record(run.evaluation, EvaluationRecord)
    assert evaluation.sources is not None
    assert evaluation.forgetting is not None
    assert len(evaluation.sources) == 2
    plan = read_record(run.plan, PlanRecord)
    assert plan.measured is not None
    assert plan.so_far is None


def test_a_streamed_run_without_held_out_data(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [conversation(number) for number in range(60)])
    streamed = {"data__train": str(rows), "data__eval": "none", "data__streaming": True}
    run = train(tiny_recipe(**streamed, train__epochs=1)).run
    check_files(run, "parity.json", "evaluation.json")
    lock = read_record(run.lock, LockRecord)
    assert isinstance(lock.inputs.train, StreamFingerprints)
    assert lock.inputs.train.rows == 60
    assert lock.inputs.train.model_extra is not None
    assert list(lock.inputs.train.model_extra) == [str(rows)]
    assert read_record(run.data, DataRecord).streamed is not None


def test_a_classifier_and_its_merge(bases: Callable[[str], Path], tmp_path: Path) -> None:
    run = train(class_recipe(bases("bert"), tmp_path / "run", train__epochs=1)).run
    merge(run.root, tmp_path / "merged")
    check_files(run)
    lock = read_record(run.lock, LockRecord)
    assert isinstance(lock.inputs.train, Fingerprints)
    assert lock.inputs.train.classes
    assert lock.inputs.labels == read_record(run.data, DataRecord).labels == ("music", "timer", "weather")


def parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Part]]:
    """All parts of a record with their places; of lists the first entry only."""
    if isinstance(value, Part):
        yield path, value
        for name, field in type(value).model_fields.items():
            if name in value.model_fields_set:
                yield from parts(getattr(value, name), (*path, field.alias or name))
    elif isinstance(value, dict):
        for key, inner in list(value.items())[:1]:
            yield from parts(inner, (*path, key))
    elif isinstance(value, tuple):
        for number, inner in enumerate(value[:1]):
            yield from parts(inner, (*path, number))


@pytest.mark.parametrize("name", [name for name in FILES if name != "parity.json"])
def test_a_field_that_is_missing_unknown_or_of_another_type_is_not_written(
    name: str, finished_run: RunDir, tmp_path: Path
) -> None:
    text, model = (finished_run.root / name).read_text(encoding="utf-8"), FILES[name]

    def refused(place: tuple[Any, ...], change: Callable[[dict[str, Any]], Any]) -> None:
        values = inner = json.loads(text)
        for key in place:
            inner = inner[key]
        change(inner)
        with pytest.raises(ValidationError):
            write_record(tmp_path / name, model, values)
        assert not (tmp_path / name).exists()

    tried = 0
    for place, part in parts(parse(model, json.loads(text))):
        if type(part).model_config["extra"] == "forbid":  # else a task may add entries
            refused(place, lambda values: values.update(unknown=1))
        for field, info in type(part).model_fields.items():
            if field not in part.model_fields_set:
                continue
            if info.is_required():
                refused(place, lambda values, key=info.alias or field: values.pop(key))
            refused(place, lambda values, key=info.alias or field: values.update({key: {"of": ["another type"]}}))
            tried += 1
            if isinstance(getattr(part, field), int | float):
                refused(place, lambda values, key=info.alias or field: values.update({key: str(values[key])}))
    assert tried >= 3
    write_record(tmp_path / name, model, json.loads(text))


def test_a_line_of_metrics_that_no_record_knows_is_not_written(finished_run: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    step = json.loads(finished_run.metrics.read_text(encoding="utf-8").splitlines()[0])
    for wrong in ({**step, "speed": 1}, {**step, "loss": "1"}, {key: step[key] for key in step if key != "num_tokens"}):
        with pytest.raises(ValidationError):
            run.append_metrics(wrong)
    assert not run.metrics.exists()
    run.append_metrics(step)
    EventLog(run, NO_PROGRESS).emit("out_of_memory", "smaller from here on", token_budget=7)
    assert isinstance(parse_metrics_line(run.metrics.read_text(encoding="utf-8").splitlines()[1]), EventLine)


def test_the_tasks_of_the_harness_may_have_no_interval() -> None:
    measure = {"base": 0.5, "tuned": 1, "difference": {"value": 0.5}}
    harness = parse(Harness, {"version": "0.4", "chat_template": True, "tasks": {"colors": {"acc": measure}}})
    assert harness.tasks["colors"]["acc"].difference.low is None


def test_valid_parts_of_a_damaged_record_are_read_and_others_are_no_defaults(finished_run: RunDir) -> None:
    values = read_json(finished_run.plan)
    peak = values["memory"]["peak_bytes"]
    values["memory"]["token_budget"] = "many"
    values["measured"] = 3
    values["of another version"] = 1
    del values["time"]
    plan = read_valid_parts(PlanRecord, values)
    assert plan.memory.peak_bytes == peak
    assert plan.parameters.trainable == values["parameters"]["trainable"]
    for read in (lambda: plan.memory.token_budget, lambda: plan.measured, lambda: plan.time):
        with pytest.raises(AttributeError):
            read()


def test_a_file_that_holds_something_else_is_named_with_the_field(finished_run: RunDir, tmp_path: Path) -> None:
    values = read_json(finished_run.plan)
    values["memory"]["of another version"] = 1
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert isinstance(read_record(path, PlanRecord).memory, Memory)
    del values["memory"]["peak_bytes"]
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(RunError, match=r"memory\.peak_bytes"):
        read_record(path, PlanRecord)
