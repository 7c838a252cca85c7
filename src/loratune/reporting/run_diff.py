"""`diff`: what two runs have in common and what not, from their files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from loratune.run.directory import Record, RunDir, read_json

GROUPS = ("settings", "model", "template", "data", "mask", "adapter", "versions", "machine", "results")
RESULTS = "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One value that two runs do not share.

    Attributes:
        group: Of `GROUPS`.
        name: Inside the group, such as `lora.r`.
        first, second: The values; None where a run has none.
    """

    group: str
    name: str
    first: Any
    second: Any

    def as_dict(self) -> Record:
        """For `--json`."""
        return asdict(self)


def diff(first: RunDir, second: RunDir) -> list[Difference]:
    """Everything in which two runs differ, group by group.

    Raises:
        RunError: A record of a run is missing or damaged.
    """
    one, other = facts(first), facts(second)
    return [
        Difference(group=group, name=name, first=one[group].get(name), second=other[group].get(name))
        for group in GROUPS
        for name in dict.fromkeys([*one[group], *other[group]])
        if one[group].get(name) != other[group].get(name)
    ]


def facts(run: RunDir) -> dict[str, dict[str, Any]]:
    """What is known of a run: group → name → value."""
    lock, data = read_json(run.lock), read_json(run.data)
    settings = dict(_flat(lock["recipe"]))
    settings.pop("train.output_dir", None)  # no two runs share it
    inputs = lock["inputs"]
    tokens = {side: inputs[side]["tokens"] for side in ("train", "eval")}
    mask = {side: inputs[side]["mask"] for side in ("train", "eval")}
    classes = {f"{side} classes": inputs[side]["classes"] for side in ("train", "eval") if "classes" in inputs[side]}
    if "labels" in inputs:
        classes["classes"] = ", ".join(inputs["labels"])
    return {
        "settings": settings,
        "model": inputs["model"],
        "template": {"chat template": inputs["template"]},
        "data": {**_data_facts(data), **{f"{side} tokens": value for side, value in tokens.items()}},
        "mask": {
            "method": data["mask"]["method"],
            **{f"{side} mask": value for side, value in mask.items()},
            **classes,
        },
        "adapter": lock["adapter"],
        "versions": lock["versions"],
        "machine": lock["machine"],
        RESULTS: _results(run),
    }


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _data_facts(data: Record) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for side in ("train", "eval"):
        part = data[side]
        if part is None:
            continue
        for name in ("rows", "conversations", "tokens", "supervised_tokens", "truncated", "dropped", "num_rejected"):
            facts[f"{side} {name}"] = part[name]
        for source in part["sources"]:
            facts.update({f"{side} file {file}": digest for file, digest in source.get("sha256", {}).items()})
    return facts


def _results(run: RunDir) -> dict[str, Any]:
    results: dict[str, Any] = {}
    metrics = run.read_metrics()
    losses = [record["loss"] for record in metrics if "loss" in record]
    held_out = [record["eval_nll"] for record in metrics if "eval_nll" in record]
    results["steps"] = len(losses)
    results["finished"] = run.has_adapter
    if losses:
        results["loss of the last step"] = losses[-1]
    if held_out:
        results["held-out loss at the end"] = held_out[-1]
        results["lowest held-out loss"] = min(held_out)
    if run.evaluation.is_file():
        evaluation = read_json(run.evaluation)
        for side in ("base", "tuned"):
            results.update({f"{side} {name}": value for name, value in evaluation[side].items()})
    measured = read_json(run.plan).get("measured", {})
    results.update({f"measured {name}": value for name, value in measured.items()})
    return results


def difference_table(differences: list[Difference], first: RunDir, second: RunDir) -> Table:
    """A row a difference; hashes are cut to what tells them apart."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", first.root.name, second.root.name, "change"):
        table.add_column(column, overflow="fold")
    for group in GROUPS:
        rows = [item for item in differences if item.group == group]
        if not rows:
            continue
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]")
        for item in rows:
            change = _change(item.first, item.second)
            table.add_row(*(escape(text) for text in (item.name, _shown(item.first), _shown(item.second), change)))
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return f"{value[:12]}…"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _change(first: Any, second: Any) -> str:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    return f"{second - first:+.4g} ({second / first - 1:+.1%})" if numbers and first else ""
