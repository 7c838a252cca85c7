"""`loratune adapter`: verbs for adapters in PEFT's format, whoever made them.

Typer reads a command's options from its parameters, so the limit on the number of parameters does not apply to verbs.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Column, Table

from loratune.cli.options import AsJson
from loratune.cli.output import print_record
from loratune.cli.shell import command_context
from loratune.cli.terminal import SafeConsole
from loratune.cli.verb import Verb, as_verb
from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from loratune.run.directory import Record

AdapterFolder = Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder in PEFT's format.")]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.")]
Base = Annotated[
    Path | None, typer.Option("--base", help="The base model's folder; default: the one that the adapter names.")
]
Rank = Annotated[int | None, typer.Option("--rank", help="The maximum rank of the result.")]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy", help="Share of each update's squared norm to keep, 0 to 1; each matrix gets the rank it needs."
    ),
]

app = typer.Typer(no_args_is_help=True, help="Inspect, combine, resize, extract, convert, merge and compare adapters.")


def inspect(
    adapter: AdapterFolder,
    base: Base = None,
    every: Annotated[bool, typer.Option("--all", help="One line per module, instead of one per name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is: type, base, and rank, norm and effective rank of the updates."""
    with command_context(as_json):
        from loratune.workflows.adapters.compare import inspect_adapter

        record = inspect_adapter(adapter, base=base)
        if as_json:
            print_record("adapter inspect", record)
            return
        console = SafeConsole(highlight=False, soft_wrap=True)
        console.print(f"{escape(record['adapter'])}: {record['kind']}, {record['num_parameters']:,} parameters")
        console.print(f"base: {escape(record['base'] or 'none named')}")
        console.print(_matrices_table(record["matrices"], every=every))
        if record["other"]:
            console.print(f"and {escape(', '.join(record['other']))}")


def _matrices_table(matrices: list[Record], *, every: bool) -> Table:
    """Return a table with a row for each module, or for the modules whose names differ in numbers alone."""
    rows: dict[str, list[Record]] = {}
    for matrix in sorted(matrices, key=lambda one: [int(n) for n in re.findall(r"\d+", one["name"])]):
        rows.setdefault(matrix["name"] if every else re.sub(r"\d+", "*", matrix["name"]), []).append(matrix)
    names = ("rank", "scale", "norm", "effective rank", "rank of 99 %")
    table = Table(Column("module", overflow="fold"), *(Column(name, no_wrap=True) for name in names))
    columns = {"rank": "d", "scale": ".4g", "norm": ".4g", "effective_rank": ".1f", "rank_of_99_percent": "d"}
    for name, found in rows.items():
        shown = []
        for column, style in columns.items():
            low, high = (format(end(one[column] for one in found), style) for end in (min, max))
            shown.append(low if low == high else f"{low} to {high}")
        table.add_row(escape(name if len(found) == 1 else f"{name} ({len(found)})"), *shown)
    return table


def combine(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER... OUT", help="Adapters of the same base, and the folder to create."),
    ],
    weights: Annotated[str, typer.Option(metavar="W,W,…", help="A factor for each adapter; default: 1 for each.")] = "",
    method: Annotated[
        Literal["concat", "svd", "linear", "ties", "dare_linear", "dare_ties"],
        typer.Option(help="concat: the exact sum, whose rank is the sum of the ranks. The others approximate it."),
    ] = "concat",
    rank: Rank = None,
    density: Annotated[
        float | None, typer.Option(help="Share of elements that ties and dare keep; default: 0.5.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for what dare drops; default: 0.")] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Add adapters of the same base, with weights, into one adapter, and verify the result."""
    with command_context(as_json) as progress:
        from loratune.exporting.adapters.combine import Method
        from loratune.workflows.adapters.make import combine_adapters

        *adapters, out = folders
        if not adapters:
            raise RecipeError("nothing to combine", fix="loratune adapter combine ADAPTER ADAPTER OUT")
        record = combine_adapters(
            adapters,
            out,
            weights=_numbers(weights),
            method=Method(name=method, rank=rank, density=density, seed=seed),
            base=base,
            progress=progress,
        )
        _show_written("adapter combine", record, as_json)


def resize(
    adapter: AdapterFolder,
    out: NewFolder,
    rank: Rank = None,
    energy: Energy = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Write the best lower-rank approximation of an adapter, and show what it discards."""
    with command_context(as_json) as progress:
        from loratune.workflows.adapters.make import resize_adapter

        record = resize_adapter(adapter, out, rank=rank, energy=energy, base=base, progress=progress)
        _show_written("adapter resize", record, as_json)


def extract(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="A fully fine-tuned model's folder.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The folder of its base model.")],
    out: NewFolder,
    rank: Rank = None,
    energy: Energy = None,
    as_json: AsJson = False,
) -> None:
    """Extract an adapter from a full fine-tune, by SVD of what changed in each matrix of its base."""
    with command_context(as_json) as progress:
        from loratune.workflows.adapters.make import extract_adapter

        record = extract_adapter(tuned, base, out, rank=rank, energy=energy, progress=progress)
        _show_written("adapter extract", record, as_json)


def convert(adapter: AdapterFolder, out: NewFolder, base: Base = None, as_json: AsJson = False) -> None:
    """Write an adapter as plain LoRA of scale 1, for programs that do not support its variant or patterns."""
    with command_context(as_json) as progress:
        from loratune.workflows.adapters.make import convert_adapter

        _show_written("adapter convert", convert_adapter(adapter, out, base=base, progress=progress), as_json)


def merge(
    adapter: AdapterFolder,
    out: NewFolder,
    base: Base = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights. auto: the base's.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, and verify the written weights."""
    with command_context(as_json) as progress:
        from loratune.workflows.adapters.compare import merge_adapter

        record = merge_adapter(adapter, out, base=base, dtype=dtype, progress=progress)
        _show_proof("adapter merge", record, as_json)


def certify(
    adapter: AdapterFolder,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A merged folder, or another adapter's folder.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Compare a merged model, or another adapter, with an adapter on its base, tensor by tensor.

    Exits with 0 only if they are the same.
    """
    with command_context(as_json) as progress:
        from loratune.workflows.adapters.compare import certify_adapter

        record = certify_adapter(adapter, target, base=base, progress=progress)
        _show_proof("adapter certify", record, as_json)
        if record["verdict"] != "same":
            raise SystemExit(1)


def diff(
    adapter: AdapterFolder,
    other: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The other adapter's folder.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Show how far apart the updates of two adapters are, in size and in direction."""
    with command_context(as_json):
        from loratune.workflows.adapters.compare import diff_adapters

        record = diff_adapters(adapter, other, base=base)
        if as_json:
            print_record("adapter diff", record)
            return
        console = SafeConsole(highlight=False, soft_wrap=True)
        table = Table("module", "relative difference", "cosine")
        for row in [*_largest_first(record["matrices"]), {"name": "all", **record}, *_largest_first(record["others"])]:
            off = row["relative_difference"]
            shown = "the first is zero" if off is None else f"{off:.4g}"
            table.add_row(escape(row["name"]), shown, f"{row['cosine']:.4f}")
        console.print(table)
        for side in ("first", "second"):
            if record[f"only_{side}"]:
                console.print(f"only the {side} has {escape(', '.join(record[f'only_{side}']))}")


def _largest_first(rows: list[Record]) -> list[Record]:
    """Return rows by their relative differences; those of a matrix that is zero in the first adapter first."""
    return sorted(
        rows, key=lambda row: -math.inf if row["relative_difference"] is None else -row["relative_difference"]
    )


for _verb in (inspect, combine, resize, extract, convert, merge, certify, diff):
    app.command(cls=Verb)(as_verb(_verb))


def _numbers(text: str) -> list[float]:
    """Read the factors of `--weights`."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RecipeError(f"--weights {text} are not numbers", fix="--weights 0.7,0.3") from None


def _show_written(verb: str, record: Record, as_json: bool) -> None:
    """Print what was written, what it discards, and the proof."""
    if as_json:
        print_record(verb, record)
        return
    console = SafeConsole(highlight=False, soft_wrap=True)
    lowest, highest = record["ranks"]
    ranks = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"
    console.print(f"{escape(record['folder'])}: {ranks}, {record['num_parameters']:,} parameters")
    if record["worst_matrix"] is not None:
        console.print(
            f"discarded: {record['discarded_share']:.3%} of the squared norm; at most {record['worst_share']:.3%}, in "
            f"{escape(record['worst_matrix'])}"
        )
    check = record["check"]
    console.print(f"updates: {check['relative_error']:.2g} off the closed form (relative)")
    if check["logits_difference"] is not None:
        console.print(
            f"as PEFT loads it: updates {check['peft_error']:.2g} off; logits {check['logits_difference']:.2g} of the "
            f"largest off, which the adapter changes by {check['logits_change']:.2g}"
        )
    if record["seed"] is not None:
        console.print(f"seed of what was dropped: {record['seed']}")


def _show_proof(verb: str, record: Record, as_json: bool) -> None:
    """Print whether files are those of base and adapter."""
    if as_json:
        print_record(verb, record)
        return
    console = SafeConsole(highlight=False, soft_wrap=True)
    console.print(f"{escape(record['folder'])}: [bold]{record['verdict']}[/bold]")
    for problem in record["problems"]:
        console.print(f"  {escape(problem)}")
    console.print(f"  {record['kept']:.1%} of the update kept, in {', '.join(record['types'])}")
