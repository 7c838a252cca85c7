"""The arguments and options that several verbs share: their types, names and help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from loratune.run.errors import RecipeError

USUAL_BUDGET = "15m"
"""Time that `tune` takes if none is given."""
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML; `loratune init` writes one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.FIELD=VALUE", help="Settings that override the recipe, such as lora.r=32."),
]
NoOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.FIELD=VALUE", help="Not possible here: a run is resumed as planned; see `loratune extend`."
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory (its train.output_dir).")]
RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Two or more run directories.")]
ServedFolders = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN [RUN|ADAPTER]...",
        help="A run directory; or several runs and adapters of one base, each as FOLDER or NAME=FOLDER.",
    ),
]
ReportFile = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="The HTML file to write; default: compare.html.")
]
SameAsOut = Annotated[Path | None, typer.Option("--out", help="Same as OUT.")]
RunsFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The folder to search for runs, including its subfolders.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output directory first.")]
Processes = Annotated[
    int,
    typer.Option("--processes", min=1, help="Number of processes on this machine, one per GPU; started by torchrun."),
]
Samples = Annotated[
    int, typer.Option("--samples", "--examples", min=0, help="Number of examples to show token by token.")
]
EveryTable = Annotated[
    bool, typer.Option("--all", help="Also show memory by component, matrices by shape, presets and data.")
]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the examples as an HTML page.")]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Plan for another GPU, such as h100-80gb, a100-80gb or l4."),
]
DevicesSpec = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="[NODESx]NUMBERxNAME",
        help="Plan for 1, 2, 4, … up to this many GPUs: 8xh100-80gb; 2x8xh100-80gb is two nodes of eight.",
    ),
]
Interconnect = Annotated[
    list[str] | None,
    typer.Option(
        "--interconnect",
        metavar="NAME",
        help="Links between --devices, if not the usual ones: nvlink4, pcie5, … within a node; infiniband-ndr, "
        "ethernet-100g, … between nodes. Repeatable.",
    ),
]
Price = Annotated[
    float | None,
    typer.Option(
        "--price-per-hour",
        min=0,
        help="Hourly price of the machine, or of each device with --devices; adds the cost.",
    ),
]
RealSteps = Annotated[
    bool,
    typer.Option(
        "--probe", help="Load the weights, run three real steps of the longest batch, and base the estimate on them."
    ),
]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing file.")]
OutFile = Annotated[Path | None, typer.Option("--out", help="The file to write; default: one in the current folder.")]
FieldsAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FIELD]... [SECTION.FIELD=VALUE]...",
        help="Settings to explain in detail, such as lora.r; and settings that override the recipe.",
    ),
]
Engine = Annotated[
    Literal["torch", "ray"],
    typer.Option("--engine", help="What starts the processes: torch's launchers, or Ray Train."),
]
SearchEngine = Annotated[
    Literal["ray"] | None,
    typer.Option("--engine", help="Let Ray workers take the trials, several at once; default: one after the other."),
]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Number of Ray workers, one per GPU.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Address of the Ray cluster; default: RAY_ADDRESS, or a new cluster on this machine."
    ),
]
Storage = Annotated[
    str | None, typer.Option("--storage", metavar="PATH_OR_URL", help="Where Ray keeps its own record of the run.")
]
MaxFailures = Annotated[
    int | None, typer.Option("--max-failures", min=0, help="How often Ray restarts the workers after losing one.")
]
SweptSettings = Annotated[
    list[str],
    typer.Argument(
        metavar="SECTION.FIELD=VALUE,VALUE...",
        help="Settings to vary: lists such as lora.r=8,32, or ranges such as train.learning_rate=1e-5..1e-3; a setting "
        "with one value overrides the recipe.",
    ),
]
OutTypes = Annotated[
    str | None,
    typer.Option(
        "--outtype",
        metavar="TYPE[,TYPE...]",
        help="Types of the merged GGUF model, such as q4_k_m,q6_k,q8_0; default: f16. Each type gets a folder.",
    ),
]
FitSize = Annotated[
    str | None, typer.Option("--fit", metavar="SIZE", help="Keep only the largest file up to this size, such as 4GB.")
]
KeepGate = Annotated[
    str | None,
    typer.Option(
        "--keep", metavar="GATE", help="Keep only the smallest file whose answers pass this gate, such as json>=0.78."
    ),
]
LlamaCppCheckout = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp",
        metavar="DIR",
        help="A checkout of llama.cpp. Its converter is run to write the GGUF files; it supports more model families.",
    ),
]
Answers = Annotated[
    int | None,
    typer.Option(
        "--answers",
        min=0,
        help="Number of held-out prompts that llama.cpp answers in full; default: 20, or 200 for types such as q4_k_m.",
    ),
]
Budget = Annotated[
    str, typer.Option("--budget", metavar="TIME", help="Time for all trials together, such as 90s, 30m or 2h.")
]
BudgetIfAny = Annotated[
    str | None, typer.Option("--budget", metavar="TIME", help="Time for all trials together, such as 90s, 30m or 2h.")
]
OverwriteSweep = Annotated[bool, typer.Option("--overwrite", help="Delete the trials of an earlier search first.")]


def one_out(position: Path | None, option: Path | None) -> Path | None:
    """Return OUT, which may be given by its position or as `--out`.

    Raises:
        RecipeError: Both were given.
    """
    if position is not None and option is not None:
        raise RecipeError(f"OUT is {position}, and --out is {option}", fix="leave one of them out")
    return position if position is not None else option


def as_seconds(text: str) -> float:
    """Return a time such as 90s, 30m or 2h in seconds.

    Raises:
        RecipeError: It has another form.
    """
    found = re.fullmatch(r"(\d+\.?\d*)\s*(s|m|min|h)", text.strip())
    if found is None or not float(found[1]):
        raise RecipeError(f"--budget {text}: not a time", fix="a number with its unit: 90s, 30m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]
