"""The command line: reads arguments, prints results. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loratune.cli.options import (
    Address,
    AsJson,
    DeviceName,
    DevicesSpec,
    Engine,
    FieldsAndOverrides,
    Html,
    Interconnect,
    MaxFailures,
    OutFile,
    Overrides,
    Overwrite,
    OverwriteFile,
    Price,
    Processes,
    RealSteps,
    RecipeFile,
    ReportFile,
    RunFolder,
    RunFolders,
    Samples,
    Storage,
    Workers,
)
from loratune.cli.output import (
    add_cost,
    print_record,
    show_exported,
    show_plan,
    show_publication,
    show_result,
    show_service,
    write_page,
)
from loratune.cli.output import print_json as _print_json
from loratune.cli.shell import check_engine, command_context, start_processes
from loratune.cli.terminal import SafeConsole
from loratune.recipe.recipe import Recipe
from loratune.recipe.recipe import origins as load_origins
from loratune.run.errors import MachineError, RunError
from loratune.run.processes import is_main

if TYPE_CHECKING:
    from loratune.planning.preparation import Preparation
    from loratune.workflows.serve import Service

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="LoRA fine-tuning that can be trusted. Exit codes: 0 done, 1 failed while running, 2 wrong recipe or arguments, "
    "3 wrong data, 4 the machine cannot do it, 130 interrupted, 143 ended by SIGTERM.",
)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    samples: Samples = 3,
    html: Html = None,
    device: DeviceName = None,
    devices: DevicesSpec = None,
    interconnect: Interconnect = None,
    price_per_hour: Price = None,
    probe: RealSteps = False,
) -> None:
    """Show what would be trained: parameters, memory, time, data, trained tokens, advice. Loads no weights without --probe."""
    with command_context(as_json) as progress:
        loaded = Recipe.load(recipe, overrides or ())
        if probe:
            from loratune.workflows import plan as workflow

            prepared = workflow.plan(
                loaded, device=device, devices=devices, interconnect=interconnect or (), probe=True, progress=progress
            )
        else:
            from loratune.planning.hardware.cluster import find_machine
            from loratune.planning.prepare import prepare  # not the pipeline: planning needs no trainer

            named, cluster = find_machine(device, devices, interconnect or ())
            prepared = prepare(loaded, progress, named, cluster=cluster, weights=False)
        record = prepared.as_plan()
        if price_per_hour is not None:
            add_cost(record, price_per_hour)
        if html is not None:
            write_page(html, prepared, samples)
        if as_json:
            print_record("plan", {**record, "data_report": prepared.data.report})
        else:
            show_plan(prepared, record, SafeConsole(highlight=False), samples, whole=True)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
    processes: Processes = 1,
    engine: Engine = "torch",
    workers: Workers = None,
    address: Address = None,
    storage: Storage = None,
    max_failures: MaxFailures = None,
) -> None:
    """Plan, train, and evaluate base against tuned on held-out data."""
    on_ray = engine == "ray"
    if not on_ray:
        start_processes(processes)
    with command_context(as_json, together=not on_ray) as progress:
        options = {"--workers": workers, "--address": address, "--storage": storage, "--max-failures": max_failures}
        check_engine(engine, processes, options)
        loaded = Recipe.load(recipe, overrides or ())
        written = recipe.read_text(encoding="utf-8") if not overrides else loaded.to_yaml()
        if on_ray:
            from loratune.cli.ray import RayOptions, train_on_ray

            ray = RayOptions(workers=workers or 1, address=address, storage=storage, max_failures=max_failures or 0)
            result = train_on_ray(loaded, ray, written=written, overwrite=overwrite, progress=progress)
            show_result(result, as_json)
            return
        from loratune.workflows import train as workflow

        def show(prepared: Preparation) -> None:
            show_plan(prepared, prepared.as_plan(), progress.console, samples=1, whole=False)

        result = workflow.train(loaded, written=written, overwrite=overwrite, progress=progress, on_plan=show)
        if is_main():
            show_result(result, as_json)


@app.command()
def resume(run: RunFolder, as_json: AsJson = False, processes: Processes = 1) -> None:
    """Go on where a run stopped."""
    start_processes(processes)
    with command_context(as_json, together=True) as progress:
        from loratune.workflows import resume as workflow

        result = workflow.resume(run, progress=progress)
        if is_main():
            show_result(result, as_json)


@app.command()
def evaluate(
    run: RunFolder,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME>=NUMBER", help="Exit code 1 unless: json>=0.8, difference.nll.high<0. Repeatable."),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="FILE.py:FUNCTION", help="Your own metric, of answer and reference; 0 to 1.")
    ] = "",
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Of lm-evaluation-harness: a name, or a YAML file. Repeatable."),
    ] = None,
    allow_code: Annotated[bool, typer.Option(help="Let the code that --metric and --harness name run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure base against tuned on held-out data, again."""
    with command_context(as_json) as progress:
        from loratune.evaluation.gates import check_gates
        from loratune.workflows import evaluate as workflow

        tasks = tuple(task for word in harness or () for task in word.split(","))
        extras = workflow.Extras(metric=metric, harness=tasks, gates=tuple(gate or ()), allow_code=allow_code)
        result = workflow.evaluate(run, extras=extras, progress=progress)
        show_result(result, as_json)
        try:
            check_gates(result.evaluation or {})
        except RunError as failed:
            if not as_json:
                raise
            progress.warn(str(failed))  # stdout has the record, gates included
            raise SystemExit(failed.exit_code) from None


@app.command()
def bench(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each engine runs.")] = 2,
    steps: Annotated[int, typer.Option("--steps", min=3, help="Optimizer steps of a run; two are warm-up.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Time the fast engine against stock TRL on a recipe, in turns: tokens/s, memory, losses."""
    with command_context(as_json) as progress:
        loaded = Recipe.load(recipe, overrides or ())
        from loratune.workflows.bench import bench as run_bench
        from loratune.workflows.bench import bench_table

        record = run_bench(loaded, rounds=rounds, steps=steps, progress=progress)
        if as_json:
            _print_json(record)
            return
        SafeConsole(highlight=False).print(bench_table(record))


@app.command()
def init(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[DATA|NAME]", help="A data file, or a recipe's name: chat, quickstart, seed."),
    ] = None,
    out: OutFile = None,
    overwrite: OverwriteFile = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe to begin with, chosen by the data's format and by this machine."""
    with command_context(as_json) as progress:
        from loratune.workflows.guidance.init import init as write

        path, starter = write(what, out, overwrite=overwrite)
        if as_json:
            _print_json({"recipe": str(path), "title": starter.title, "settings": starter.as_dict()})
            return
        progress.line(f"{starter.title} Next: loratune plan {path}")
        sys.stdout.write(f"{path}\n")


@app.command()
def explain(recipe: RecipeFile, words: FieldsAndOverrides = None, as_json: AsJson = False) -> None:
    """Show every effective setting, where it came from, and what it does to this model; or one setting on a page."""
    with command_context(as_json) as progress:
        fields = [word for word in words or () if "=" not in word]
        overrides = [word for word in words or () if "=" in word]
        loaded, origins = Recipe.load(recipe, overrides), load_origins(recipe, overrides)
        from loratune.planning.prepare import prepare
        from loratune.workflows.guidance import explain as guide

        fields = [guide.full_name(field) for field in fields]  # before the data is read
        found = guide.explain(loaded, prepare(loaded, progress, weights=False), origins, fields)
        if as_json:
            _print_json([item.as_dict() for item in found])
            return
        console = SafeConsole(highlight=False)
        for part in [guide.explanation_page(item) for item in found] if fields else [guide.explanation_table(found)]:
            console.print(part)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can do, and the command that mends what is missing. Exit code 0: the quickstart can run."""
    with command_context(as_json):
        from loratune.workflows.guidance import doctor as workflow

        checks = workflow.doctor()
        missing = [check.name for check in checks if check.state == "missing"]
        if as_json:
            _print_json({"quickstart_can_run": not missing, "checks": [check.as_dict() for check in checks]})
        else:
            SafeConsole(highlight=False).print(workflow.diagnosis_table(checks))
        if missing:
            raise MachineError(
                f"the quickstart cannot run: {', '.join(missing)}", fix="the commands beside the crosses, above"
            )


@app.command()
def selftest(as_json: AsJson = False) -> None:
    """Prove on this machine, with a tiny model, that the shortcuts change nothing. Exit code 0: every check holds; 1: not."""
    with command_context(as_json) as progress:
        from loratune.workflows import selftest as tests

        checks = tests.selftest(progress)
        failed = [check.name for check in checks if not check.ok]
        if as_json:
            _print_json({"ok": not failed, "checks": [check.as_dict() for check in checks]})
            raise SystemExit(bool(failed))
        SafeConsole(highlight=False).print(tests.selftest_table(checks))
        if failed:
            raise tests.failure(failed)


@app.command()
def eject(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: OutFile = None,
    overwrite: OverwriteFile = False,
    as_json: AsJson = False,
) -> None:
    """Write the same run as one plain script on datasets, transformers, peft and trl alone."""
    with command_context(as_json) as progress:
        loaded = Recipe.load(recipe, overrides or ())
        from loratune.planning.prepare import prepare
        from loratune.workflows.guidance.eject import eject as write

        target = out or Path(f"{recipe.stem}.py")
        ejected = write(prepare(loaded, progress), target, overwrite=overwrite, progress=progress)
        if as_json:
            _print_json(ejected.as_dict())
            return
        if ejected.rows is not None:
            progress.warn(f"tokens and labels are in {ejected.rows}: {ejected.why_rows}")
        else:
            progress.line("the script reads your own rows: TRL makes the same tokens and labels of them, each compared")
        sys.stdout.write(f"{ejected.script}\n")


@app.command()
def diff(first: RunFolder, second: RunFolder, as_json: AsJson = False) -> None:
    """Show in what two runs differ: settings, model, template, data, mask, versions, results."""
    with command_context(as_json):
        from loratune.reporting import run_diff
        from loratune.run.directory import RunDir

        one, other = RunDir.open(first), RunDir.open(second)
        found = run_diff.diff(one, other)
        if as_json:
            _print_json([item.as_dict() for item in found])
        elif found:
            SafeConsole(highlight=False).print(run_diff.difference_table(found, one, other))
        else:
            sys.stdout.write("no difference\n")


@app.command()
def reproduce(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="The new run's directory; RUN-again when not given.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a finished run again from the same inputs. Exit code 0: the same adapter, bit for bit; 1: another one."""
    with command_context(as_json) as progress:
        from loratune.workflows import reproduce as workflow

        result = workflow.reproduce(run, out, overwrite=overwrite, progress=progress)
        if as_json:
            _print_json(result.as_dict())
        if not result.equal:
            raise result.as_error()
        progress.line(f"the same adapter, bit for bit: {result.run.adapter}")


@app.command()
def report(run: RunFolder, out: ReportFile = None, as_json: AsJson = False) -> None:
    """Write one HTML page about a run, also one that is still going or that died: RUN/report.html."""
    with command_context(as_json):
        from loratune.reporting.html import report

        _show_file("report", report(run, out), as_json)


@app.command()
def compare(runs: RunFolders, out: ReportFile = None, as_json: AsJson = False) -> None:
    """Write one HTML page about several runs: compare.html."""
    with command_context(as_json):
        from loratune.reporting.html import compare

        _show_file("comparison", compare(runs, out or "compare.html"), as_json)


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
    with command_context(as_json) as progress:
        from loratune.workflows import export as workflow

        show_exported(workflow.merge(run, out, dtype=dtype, progress=progress), as_json)


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
    with command_context(as_json) as progress:
        from loratune.workflows import export as workflow

        delivered = workflow.export(
            run, to=to, merged=merged, outtype=outtype, out=out, num_answers=answers, progress=progress
        )
        show_exported(delivered, as_json)


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
    with command_context(as_json=False) as progress:
        from loratune.workflows.chat import Sampling, converse, open_chat

        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)
        converse(
            open_chat(run, sampling, progress=progress, system=system), SafeConsole(highlight=False, soft_wrap=True)
        )


@app.command()
def serve(
    run: RunFolder,
    server: Annotated[
        Literal["auto", "vllm", "transformers"], typer.Option(help="auto: vLLM where it is installed.")
    ] = "auto",
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than this machine need a key.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="8000 if not given, or a free one.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORATUNE_API_KEY", help="What requests must bring; vLLM only.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve base and tuned by OpenAI's API (chat completions), until Ctrl-C."""
    with command_context(as_json) as progress:
        from loratune.workflows.serve import serve as start

        def ready(service: Service) -> None:
            show_service(service, as_json)

        start(run, server=server, host=host, port=port, api_key=api_key, progress=progress, on_ready=ready)


@app.command()
def push(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub, or NAME in your own name.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    with_report: Annotated[
        bool, typer.Option("--report/--no-report", help="The report shows prompts, answers and training examples.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Put adapter, card and report on the Hugging Face hub; private unless told otherwise."""
    with command_context(as_json) as progress:
        from loratune.workflows.push import push as send

        done = send(run, repo, public=public, dry_run=dry_run, with_report=with_report, progress=progress)
        show_publication(done, as_json)


@app.command()
def schema(
    verb: Annotated[
        str | None, typer.Argument(metavar="[VERB]", help="A verb, such as plan; a recipe if not given.")
    ] = None,
) -> None:
    """Print the JSON schema of a recipe, for editors; or of what a verb prints with --json."""
    with command_context(as_json=False):
        from loratune.run.records.schemas import schema_of

        _print_json(Recipe.model_json_schema() if verb is None else schema_of(verb))


def _show_file(name: str, path: Path, as_json: bool) -> None:
    if as_json:
        _print_json({name: str(path)})
    else:
        sys.stdout.write(f"{path}\n")


def main() -> None:
    """The `loratune` command."""
    # Libraries warn each other's developers; our users cannot act on it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app()
