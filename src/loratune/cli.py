"""The command line: reads arguments, prints results. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loratune.errors import Interrupted, LoratuneError
from loratune.recipe import Recipe
from loratune.terminal import TerminalProgress

if TYPE_CHECKING:
    from loratune.delivery import Delivery
    from loratune.pipeline import RunResult
    from loratune.preparation import Preparation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="LoRA fine-tuning that can be trusted. Exit codes: 0 done, 1 failed while running, 2 wrong recipe or arguments, "
    "3 wrong data, 4 the machine cannot do it, 130 interrupted.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; recipes/ holds complete examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Settings that replace those of the recipe: lora.r=32"),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run (its train.output_dir).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run that is in the output directory.")]
Examples = Annotated[int, typer.Option("--examples", min=0, help="How many examples to show token by token.")]

GIB = 2**30


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, examples: Examples = 3) -> None:
    """Show what would be trained: parameters, memory, time, data, trained tokens. Loads no weights."""
    with _reporting(as_json) as progress:
        loaded = Recipe.load(recipe, overrides or ())
        from loratune.preparation import prepare  # not the pipeline: planning needs no trainer

        prepared = prepare(loaded, progress)
        if as_json:
            _print_json({**prepared.as_plan(), "data_report": prepared.data.report})
        else:
            show_plan(prepared, Console(highlight=False), examples)


@app.command()
def train(
    recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False, overwrite: Overwrite = False
) -> None:
    """Plan, train, and evaluate base against tuned on held-out data."""
    with _reporting(as_json) as progress:
        loaded = Recipe.load(recipe, overrides or ())
        from loratune import pipeline

        def show(prepared: Preparation) -> None:
            show_plan(prepared, progress.console, examples=1)

        written = recipe.read_text(encoding="utf-8") if not overrides else loaded.to_yaml()
        result = pipeline.train(loaded, written=written, overwrite=overwrite, progress=progress, on_plan=show)
        _show_result(result, as_json)


@app.command()
def resume(run: RunFolder, as_json: AsJson = False) -> None:
    """Go on where a run stopped."""
    with _reporting(as_json) as progress:
        from loratune import pipeline

        _show_result(pipeline.resume(run, progress=progress), as_json)


@app.command()
def evaluate(run: RunFolder, as_json: AsJson = False) -> None:
    """Measure base against tuned on held-out data, again."""
    with _reporting(as_json) as progress:
        from loratune import pipeline

        _show_result(pipeline.evaluate(run, progress=progress), as_json)


@app.command()
def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights. auto: as in the base's files; bfloat16 for a quantised GGUF file."),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one model, and prove that it is the same."""
    with _reporting(as_json) as progress:
        from loratune import delivery

        _show_delivery(delivery.merge(run, out, dtype=dtype, progress=progress), as_json)


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Literal["gguf", "ollama", "vllm"], typer.Option("--to", help="The program it is for.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model, not the adapter alone.")] = False,
    outtype: Annotated[
        Literal["f16", "bf16", "q8_0"] | None, typer.Option(help="Of a merged GGUF model; f16 if not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make; default RUN/exports/….")] = None,
    answers: Annotated[
        int, typer.Option(min=0, help="How many held-out prompts llama.cpp answers in full, to compare.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Write a run for llama.cpp (gguf), Ollama or vLLM, and prove that it is the same model."""
    with _reporting(as_json) as progress:
        from loratune import delivery

        delivered = delivery.export(
            run, to=to, merged=merged, outtype=outtype, out=out, num_answers=answers, progress=progress
        )
        _show_delivery(delivered, as_json)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, or a merged folder.")],
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0: from all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
) -> None:
    """Talk to base and tuned, with the template and stop tokens of training. /help lists what can be typed."""
    with _reporting(as_json=False) as progress:
        from loratune.chat import Sampling, converse, open_chat

        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)
        converse(open_chat(run, sampling, progress=progress, system=system), Console(highlight=False, soft_wrap=True))


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    _print_json(Recipe.model_json_schema())


def show_plan(prepared: Preparation, console: Console, examples: int) -> None:
    """Print what would be trained."""
    from loratune.data.preview import preview

    record = prepared.as_plan()
    parameters, memory, data, clock = record["parameters"], record["memory"], record["data"], record["time"]
    rows = {
        "base model": f"{prepared.recipe.model.name} → {prepared.base.path}",
        "trained": f"{parameters['trainable']:,} of {parameters['total']:,} parameters "
        f"({parameters['trainable'] / parameters['total']:.2%}): {parameters['targets']}",
        "adapter file": f"{parameters['adapter_bytes'] / 2**20:,.1f} MiB",
        "data": f"{data['num_examples']:,} examples, {data['num_tokens']:,} tokens, of which "
        f"{data['num_supervised_tokens']:,} carry loss; {data['num_eval_examples']:,} held out",
        "steps": f"{clock['num_steps']:,} of {prepared.recipe.train.batch_size} examples, "
        f"{prepared.recipe.train.epochs:g} epochs",
        "memory": f"about {memory['peak_bytes'] / GIB:.1f} GiB at the peak",
        "time": f"about {_duration(clock['train_seconds'])} of training, at "
        f"{clock['flops_per_second'] / 1e9:,.0f} GFLOP/s measured for a matrix product",
        "output": str(prepared.recipe.train.output_dir),
    }
    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    for name, choice in record["choices"].items():
        table.add_row(f"[dim]{name}: auto[/dim]", escape(f"{choice['value']} ({choice['reason']})"))
    console.print(table)
    for warning in record["warnings"]:
        console.print(f"[yellow]![/yellow] {escape(warning)}")
    if examples:
        console.print(preview(prepared.data.train, prepared.tokenizer, examples))


def _show_result(result: RunResult, as_json: bool) -> None:
    from loratune.evaluation.compare import evaluation_table, samples_table
    from loratune.run import read_json

    if as_json:
        plan_record = read_json(result.run.plan)
        _print_json({"run": str(result.run.root), "plan": plan_record, "evaluation": result.evaluation})
        return
    console = Console(highlight=False)
    if result.evaluation is not None:
        console.print(evaluation_table(result.evaluation))
        if result.evaluation["items"]:
            console.print(samples_table(result.evaluation, count=3))
    console.print(f"adapter: {escape(str(result.run.adapter))}", soft_wrap=True)


def _show_delivery(delivered: Delivery, as_json: bool) -> None:
    if as_json:
        _print_json(
            {"folder": str(delivered.folder), "certificate": delivered.certificate, "usage": list(delivered.usage)}
        )
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(escape(delivered.summary))
    for path in sorted(delivered.folder.iterdir()):
        console.print(f"  {escape(str(path))}  {path.stat().st_size / 2**20:,.1f} MiB")
    for command in delivered.usage:
        console.print(f"[bold]$[/bold] {escape(command)}")


def _print_json(record: Any) -> None:
    sys.stdout.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def _reporting(as_json: bool) -> Iterator[TerminalProgress]:
    """Turn our errors into a message and an exit code."""
    progress = TerminalProgress()
    try:
        yield progress
    except LoratuneError as error:
        if as_json:
            _print_json(error.as_dict())
        colour = "yellow" if isinstance(error, Interrupted) else "red"
        progress.console.print(f"[{colour}]{type(error).__name__}[/{colour}] {escape(str(error))}")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        progress.console.print("[yellow]Interrupted[/yellow] stopped at once")
        raise SystemExit(Interrupted.exit_code) from None


def main() -> None:
    """The `loratune` command."""
    # Libraries warn each other's developers; our users cannot act on it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app()
