"""The result of a verb, on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from loratune.cli.terminal import SafeConsole
from loratune.run.errors import MachineError, plural

if TYPE_CHECKING:
    from loratune.planning.preparation import Preparation
    from loratune.recipe.recipe import Recipe
    from loratune.run.directory import Record
    from loratune.run.records.outputs import SampleOutput
    from loratune.run.records.sweep import SweepRecord, TuneRecord
    from loratune.workflows.certify import Exported
    from loratune.workflows.export_types import ExportedTypes
    from loratune.workflows.push import Publication
    from loratune.workflows.result import RunResult
    from loratune.workflows.serving.listening import Service


def show_plan(prepared: Preparation, record: Record, console: Console, samples: int, *, full: bool) -> None:
    """Print what would be trained: examples, warnings and advice, what it costs; with `full` every table."""
    from loratune.cli import plan_tables
    from loratune.data.preview import preview

    recipe = prepared.recipe
    shown = with_recipe(record, recipe)
    if samples:
        console.print(preview(prepared.data.train, prepared.model.tokenizer, samples))
    for note in plan_tables.notes(shown):
        console.print(note, soft_wrap=not console.is_terminal)  # one line per note where a program reads it
    console.print(plan_tables.summary_table(shown, model=f"{recipe.model.name} → {prepared.model.base.path}"))
    if record["scaling"]:
        console.print(*plan_tables.scaling_tables(shown), sep="\n")
        for line in plan_tables.scaling_lines(shown):
            console.print(line, soft_wrap=True)
    if full:
        console.print(
            plan_tables.memory_table(shown),
            plan_tables.modules_table(shown),
            plan_tables.presets_table(shown),
            sep="\n",
        )
        console.print(plan_tables.data_table(prepared.data.report))


def with_recipe(record: Record, recipe: Recipe) -> Record:
    """Return the plan with the settings of the recipe that its tables show."""
    return {
        **record,
        "recipe": {
            "batch_size": recipe.train.batch_size,
            "epochs": recipe.train.epochs,
            "output_dir": recipe.train.output_dir,
            "r": recipe.lora.r,
        },
    }


def add_cost(record: Record, price_per_hour: float) -> None:
    """Add the cost of the run to its record; with several devices, the cost for each number of devices.

    Args:
        record: `plan.json`.
        price_per_hour: Price of one device for one hour, in any currency.
    """
    if record["scaling"]:
        for row in record["scaling"]["rows"]:
            row["cost"] = row["total_seconds"] / 3600 * row["devices"] * price_per_hour
        cost = record["scaling"]["rows"][-1]["cost"]
    else:
        cost = record["time"]["total_seconds"] / 3600 * price_per_hour
    record["cost"] = {"price_per_hour": price_per_hour, "cost": cost}


def write_page(path: Path, prepared: Preparation, samples: int) -> None:
    """Write the examples, token by token, as one HTML page."""
    from loratune.data.preview import preview

    page = preview(prepared.data.train, prepared.model.tokenizer, samples).html(title=prepared.recipe.model.name)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write: {error.strerror}", file=path, fix="choose another --html FILE") from None


def show_result(result: RunResult, as_json: bool) -> None:
    """Print the evaluation, planned vs. actual time, speed and memory, the verdict, and what to do next."""
    from loratune.cli.next_steps import next_commands
    from loratune.cli.plan_tables import measured_line
    from loratune.run.directory import read_json
    from loratune.workflows.finished import recipe_of
    from loratune.workflows.tasks.task import task_of

    if as_json:
        values = {"run": str(result.run.root), "verdict": result.verdict, "evaluation": result.evaluation}
        print_record("train", {**values, "plan": read_json(result.run.plan)})
        return
    console = SafeConsole(highlight=False)
    recipe = recipe_of(result.run)
    if result.evaluation is not None:
        console.print(*task_of(recipe).tables(result.evaluation), sep="\n")
    console.print(measured_line(read_json(result.run.plan)), soft_wrap=True)
    console.print(f"adapter: {escape(str(result.run.adapter))}", soft_wrap=True)
    console.print(escape(result.verdict), style="bold", soft_wrap=True)
    steps = next_commands(result.run, recipe)
    width = max(len(line) for line, _ in steps)
    for line, what in steps:
        console.print(f"[bold]$[/bold] {escape(line):{width}}  [dim]# {escape(what)}[/dim]", soft_wrap=True)


def show_sweep(record: SweepRecord, as_json: bool) -> None:
    """Print the ranked trials, the result in words, and what to do next."""
    from loratune.reporting.sweep_page import next_lines, trial_table

    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    console = SafeConsole(highlight=False)
    console.print(trial_table(record))
    for sentence in record.sentences:
        console.print(escape(sentence), soft_wrap=True)
    console.print(f"page: {escape(record.page)}", soft_wrap=True)
    best = next(trial for trial in record.trials if trial.number == record.best)
    for line in next_lines(record, best):
        console.print(f"[bold]$[/bold] {escape(line)}", soft_wrap=True)


def show_tuned(record: TuneRecord, as_json: bool) -> None:
    """Print both comparisons, what was chosen and why, and what to do next."""
    from loratune.reporting.sweep_page import trial_table

    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    console = SafeConsole(highlight=False)
    for part in (record.rates, record.shapes):
        if part is not None:
            console.print(trial_table(part))
    for reason in record.reasons:
        console.print(escape(reason), soft_wrap=True)
    console.print(f"[bold]$[/bold] loratune train {escape(record.recipe)}", soft_wrap=True)


def show_exported(exported: Exported, as_json: bool) -> None:
    """Print the certificate, the files, and the commands that use them."""
    if as_json:
        certificate, usage = exported.certificate, list(exported.usage)
        print_record("export", {"folder": str(exported.folder), "certificate": certificate, "usage": usage})
        return
    console = SafeConsole(highlight=False, soft_wrap=True)
    console.print(escape(exported.summary))
    for path in sorted(exported.folder.iterdir()):
        console.print(f"  {escape(str(path))}  {path.stat().st_size / 2**20:,.1f} MiB")
    for command in exported.usage:
        console.print(f"[bold]$[/bold] {escape(command)}")


def show_types(found: ExportedTypes, as_json: bool) -> None:
    """Print the result for each type, and the commands that use the files that were kept."""
    from rich.table import Table

    from loratune.exporting.certificate import score_in_words
    from loratune.reporting.units import as_bytes

    usage = [command for one in found.kept for command in one.usage]
    if as_json:
        first = found.kept[0]
        record = {"folder": str(found.folder), "certificate": first.certificate, "usage": usage, "types": found.rows}
        print_record("export", record)
        return
    table = Table("type", "size", "tokens/s", "mean KL", "metric (minus the run's own)", "verdict", "")
    for row in found.rows:
        speed, kl = row.get("tokens_per_second"), row.get("mean_kl")
        table.add_row(
            row["outtype"],
            as_bytes(row["file_bytes"]),
            "" if speed is None else f"{speed:.1f}",
            "" if kl is None else f"{kl:.2g}",
            score_in_words(row) if row.get("scores") else "",
            row.get("verdict", "too large"),
            "kept" if row["kept"] else "",
        )
    console = SafeConsole(highlight=False, soft_wrap=True)
    console.print(table)
    for command in usage:
        console.print(f"[bold]$[/bold] {escape(command)}")


def show_certificate(certificate: Record, as_json: bool) -> None:
    """Print the certificate of files that were compared with a run, with what each proof measured."""
    from loratune.exporting.certificate import summary

    if as_json:
        print_record("certify", certificate)
        return
    console = SafeConsole(highlight=False, soft_wrap=True)
    console.print(escape(summary(certificate)))
    if certificate["verdict"] != "same":
        console.print(f"[yellow]{certificate['verdict']}[/yellow] {escape(certificate['reason'])}")
        console.print(f"  fix: {escape(certificate['fix'])}")
    weights, found = certificate["weights"], certificate["distributions"]
    if weights is not None:
        console.print(
            f"  weights: {weights['kept']:.1%} of the update kept ({weights['least_kept']:.1%} in "
            f"{escape(str(weights['least_kept_tensor']))}), relative error {weights['relative_error']:.2g}, in "
            f"{weights['num_changed']} of {weights['num_changed'] + weights['num_unchanged']} tensors"
        )
    if found is None or certificate.get("served"):
        return
    kl = "not finite" if found["mean_kl"] is None else f"{found['mean_kl']:.2g} nats"
    console.print(
        f"  outputs: mean KL from the trained model {kl}; by rounding alone {found['rounding_kl']:.2g}; the base "
        f"without the adapter {found['base_kl']:.2g}"
    )


def show_service(service: Service, as_json: bool) -> None:
    """Print where a server listens, and how to call it."""
    if as_json:
        print_json({"url": service.url, "server": service.server, "models": list(service.models)})
    else:
        base, *tuned = service.models
        names = ", ".join(tuned)
        sys.stdout.write(f"{service.url} serves {names} and {base} with {service.server}; stop with Ctrl-C\n")
        sys.stdout.write(f"$ {service.curl}\n>>> {service.python}\n")
    sys.stdout.flush()


def show_publication(done: Publication, as_json: bool) -> None:
    """Print path, size and hash of what was or would be uploaded."""
    if as_json:
        files = [file.as_dict() for file in done.files]
        print_json({"repo": done.repo, "url": done.url, "private": done.private, "files": files})
        return
    for file in done.files:
        sys.stdout.write(f"{file.sha256}  {file.num_bytes:>12,}  {file.path}\n")
    kind = "private" if done.private else "public"
    sys.stdout.write(f"{done.url or f'dry run: nothing was uploaded to {done.repo}'} ({kind})\n")


def print_record(verb: str, values: Record) -> None:
    """Print what a verb prints with `--json`, which is what `loratune schema VERB` describes."""
    from loratune.run.records.base import as_json, parse
    from loratune.run.records.schemas import OUTPUTS

    print_json(as_json(parse(OUTPUTS[verb], values)))


def show_sample(drawn: SampleOutput, as_json: bool) -> None:
    """Print how good the answers were, what became of them, and what to do with the file."""
    if as_json:
        print_json(drawn.model_dump(mode="json"))
        return
    lines = [
        f"{plural(drawn.num_answers, 'answer')} to {plural(drawn.num_prompts, 'prompt')}: "
        f"mean {drawn.metric} {drawn.mean_score:.1%}; "
        f"{drawn.solved:.1%} of the prompts have a good answer",
        *(f"no row: {plural(count, 'prompt')}, {reason}" for reason, count in drawn.left_out.items()),
        *(f"not used: {plural(count, 'answer')}, {reason}" for reason, count in drawn.unusable.items()),
        f"{drawn.file}: {plural(drawn.num_rows, 'row')}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def print_json(record: Any) -> None:
    """Print a record as JSON."""
    any_character = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(record, indent=2, ensure_ascii=not any_character) + "\n")
