"""Verbs for a run that has been trained: read it, chat with it, export it.

Typer reads a command's options from its parameters, so the limit on the number of parameters does not apply to verbs.
"""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loratune.cli.options import (
    Answers,
    AsJson,
    FitSize,
    KeepGate,
    LlamaCppCheckout,
    OutTypes,
    OverwriteFile,
    ReportFile,
    RunFolder,
    RunFolders,
    SameAsOut,
    ServedFolders,
    one_out,
)
from loratune.cli.output import (
    print_json,
    show_certificate,
    show_exported,
    show_publication,
    show_sample,
    show_service,
    show_types,
)
from loratune.cli.shell import command_context
from loratune.cli.terminal import SafeConsole
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from loratune.run.directory import Record
    from loratune.workflows.serving.listening import Service


def report(
    run: RunFolder,
    file: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The HTML file to write; default: RUN/report.html.")
    ] = None,
    out: SameAsOut = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an HTML page about a run, whether it has finished, failed, or is still in progress."""
    with command_context(as_json) as progress:
        from loratune.reporting.html import report

        page = report(run, one_out(file, out))
        _show_file("report", page, as_json)
        if show and not webbrowser.open(page.resolve().as_uri()):
            progress.warn("no browser was found on this machine; copy the file to a machine with one")


def compare(runs: RunFolders, out: ReportFile = None, as_json: AsJson = False) -> None:
    """Compare several runs in a ranked table and on an HTML page."""
    with command_context(as_json):
        from loratune.reporting.html import compare
        from loratune.reporting.run_list import ranked_table

        page = compare(runs, out or "compare.html")
        if not as_json:
            SafeConsole(highlight=False).print(ranked_table(runs))
        _show_file("comparison", page, as_json)


def diff(first: RunFolder, second: RunFolder, as_json: AsJson = False) -> None:
    """Show how two runs differ: settings, model, template, data, trained tokens, versions, results."""
    with command_context(as_json):
        from loratune.reporting import run_diff
        from loratune.run.directory import RunDir

        one, other = RunDir.open(first), RunDir.open(second)
        found = run_diff.diff(one, other)
        if as_json:
            print_json([item.as_dict() for item in found])
        elif found:
            SafeConsole(highlight=False).print(run_diff.difference_table(found, one, other))
        else:
            sys.stdout.write("no difference\n")


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a merged folder.")],
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: always the likeliest token.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens with this total probability.")
    ] = 1,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many likeliest tokens; 0: from all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Sampling seed.")] = 0,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
) -> None:
    """Chat with the base and the fine-tuned model, with the template and stop tokens of training.

    Type /help for a list of commands.
    """
    with command_context(as_json=False) as progress:
        from loratune.evaluation.sampling import Sampling
        from loratune.workflows.chat import converse, open_chat

        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed)
        converse(
            open_chat(run, sampling, progress=progress, system=system), SafeConsole(highlight=False, soft_wrap=True)
        )


def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Data type of the weights. auto: as in the base's files, or bfloat16 for a quantized GGUF file."
        ),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Merge the adapter into the base model, and verify that the result is the same model."""
    with command_context(as_json) as progress:
        from loratune.workflows import export as workflow

        exported = workflow.merge(run, out, dtype=dtype, progress=progress)
        show_exported(exported, as_json)
        _require_same(exported.certificate)


def export(
    run: RunFolder,
    folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to create; default: RUN/exports/….")
    ] = None,
    to: Annotated[
        Literal["gguf", "ollama", "vllm", "mlx"] | None,
        typer.Option("--to", help="The format or program to export for; default: gguf if the base is a GGUF file."),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Export the full model instead of the adapter alone.")
    ] = False,
    outtype: OutTypes = None,
    fit: FitSize = None,
    keep: KeepGate = None,
    llama_cpp: LlamaCppCheckout = None,
    out: SameAsOut = None,
    answers: Answers = None,
    as_json: AsJson = False,
) -> None:
    """Export a run for llama.cpp (gguf), Ollama, vLLM or MLX, and verify that the result is the same model."""
    with command_context(as_json) as progress:
        from loratune.workflows import export as workflow

        target = one_out(folder, out)
        outtypes = [name.strip().lower() for name in outtype.split(",")] if outtype else []
        if len(outtypes) > 1 or fit or keep:
            if llama_cpp is not None:
                raise RecipeError(
                    "--llama-cpp writes one --outtype at a time, without --fit and --keep",
                    fix="one command for each type, each with its own --out",
                )
            from loratune.workflows.export_types import export_types

            found = export_types(
                run, outtypes, to=to, fit=fit, keep=keep, out=target, num_answers=answers, progress=progress
            )
            show_types(found, as_json)
            for one in found.kept:
                _require_same(one.certificate)
            return
        first = outtypes[0] if outtypes else None
        exported = workflow.export(
            run,
            to=to,
            merged=merged,
            outtype=first,
            out=target,
            num_answers=answers,
            llama_cpp=llama_cpp,
            progress=progress,
        )
        show_exported(exported, as_json)
        _require_same(exported.certificate)


def certify(
    run: RunFolder,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A merged folder, a GGUF file, an adapter's folder, or the URL of a server."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name on a server; default: the run's name, or the only model."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LORATUNE_API_KEY", help="The API key of a server.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare exported files or a running server, whoever made them, with the trained model.

    The verdict is same, different or undecided. A server is queried through its OpenAI-compatible API.

    Exits with 0 only if the verdict is same.
    """
    with command_context(as_json) as progress:
        from loratune.workflows.certify_target import certify_target

        certificate = certify_target(run, target, model=model, api_key=api_key, progress=progress)
        show_certificate(certificate, as_json)
        _require_same(certificate)


def serve(
    models: ServedFolders,
    server: Annotated[
        Literal["auto", "vllm", "transformers", "loratune"],
        typer.Option(help="The server of one run. auto: vLLM if it is installed. Several models: loratune's own."),
    ] = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen on; if other machines can reach it, a key is required.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; default: 8000, or a free one.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORATUNE_API_KEY", help="Key that requests must send; not with transformers.")
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that loratune's own server answers at the same time; default: 16."),
    ] = None,
    queue: Annotated[
        int | None,
        typer.Option(min=0, help="Further requests that wait in loratune's own server; default: 64. More: status 503."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve base and fine-tuned models through an OpenAI-compatible API (chat completions), until Ctrl-C."""
    with command_context(as_json) as progress:
        from loratune.workflows.serve import choose_server
        from loratune.workflows.serve import serve as start

        def ready(service: Service) -> None:
            show_service(service, as_json)

        capacity = {name: value for name, value in (("at_once", at_once), ("queue", queue)) if value is not None}
        if len(models) == 1 and server != "loratune":
            if capacity:
                raise RecipeError(
                    f"--{next(iter(capacity)).replace('_', '-')} is an option of loratune's own server",
                    fix="--server loratune, or leave it out",
                )
            start(
                Path(models[0]), server=server, host=host, port=port, api_key=api_key, progress=progress, on_ready=ready
            )
            return
        choose_server("loratune" if server == "auto" else server, several=True)
        from loratune.workflows.serving.engine import Capacity
        from loratune.workflows.serving.server import serve_adapters

        serve_adapters(
            models,
            host=host,
            port=port,
            api_key=api_key,
            capacity=Capacity(**capacity),
            progress=progress,
            on_ready=ready,
        )


def push(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub, or NAME under your own account.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
    with_report: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Include the report, which shows prompts, answers and examples."),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Upload adapter, model card and report to the Hugging Face Hub; private unless --public is given."""
    with command_context(as_json) as progress:
        from loratune.workflows.push import push as send

        done = send(run, repo, public=public, dry_run=dry_run, with_report=with_report, progress=progress)
        show_publication(done, as_json)


def sample(
    run: RunFolder,
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="Rows with reference answers: a file, a folder or a Hub dataset.")
    ],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The file to write; default: RUN-pairs.jsonl or RUN-best.jsonl."),
    ] = None,
    out: SameAsOut = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of answers per prompt.")] = 8,
    keep: Annotated[
        Literal["best,worst", "best"],
        typer.Option(help="best,worst: pairs for preference training; best: conversations for supervised fine-tuning."),
    ] = "best,worst",
    metric: Annotated[
        str, typer.Option(metavar="NAME|FILE.py:FUNCTION", help="The metric that scores answers; default: the run's.")
    ] = "",
    at_least: Annotated[float, typer.Option(min=0, max=1, help="The minimum score of the best answer.")] = 1.0,
    with_reference: Annotated[
        bool, typer.Option("--with-reference", help="Use the data's own answer if no drawn answer is good enough.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens with this total probability.")
    ] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum answer length, in tokens; default: as in the run's evaluation.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Sampling seed.")] = 0,
    allow_code: Annotated[bool, typer.Option(help="Allow running the code that --metric names.")] = False,
    overwrite: OverwriteFile = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts several times, and write the best answers, or pairs of best and worst, as rows to train on."""
    with command_context(as_json) as progress:
        from loratune.workflows import sample as workflow

        settings = workflow.SampleSettings(
            n=n,
            keep=keep,
            at_least=at_least,
            with_reference=with_reference,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        kind = "pairs" if keep == "best,worst" else "best"
        drawn = workflow.sample(
            run,
            prompts,
            one_out(file, out) or f"{run.resolve().name}-{kind}.jsonl",
            settings=settings,
            metric=metric,
            allow_code=allow_code,
            overwrite=overwrite,
            progress=progress,
        )
        show_sample(drawn, as_json)


def _require_same(certificate: Record) -> None:
    """Exit with 1 unless the verdict is `same`."""
    if certificate["verdict"] != "same":
        raise SystemExit(1)


def _show_file(name: str, path: Path, as_json: bool) -> None:
    if as_json:
        print_json({name: str(path)})
    else:
        sys.stdout.write(f"{path}\n")
