"""The arguments and options of the verbs: their types, names and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; recipes/ holds complete examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Settings that replace those of the recipe: lora.r=32"),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run (its train.output_dir).")]
RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="The directories of two or more runs.")]
ReportFile = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The HTML file to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run that is in the output directory.")]
Processes = Annotated[
    int, typer.Option("--processes", min=1, help="On this machine, one for each GPU; torchrun starts them.")
]
Samples = Annotated[
    int, typer.Option("--samples", "--examples", min=0, help="How many examples to show token by token.")
]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the examples as one HTML page.")]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Plan for a GPU that is not here, such as h100-80gb, a100-80gb, l4."),
]
DevicesSpec = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="[NODESx]NUMBERxNAME",
        help="Plan for several GPUs, and show what each number of them makes: 8xh100-80gb; 2x8xh100-80gb is two nodes.",
    ),
]
Interconnect = Annotated[
    list[str] | None,
    typer.Option(
        "--interconnect",
        metavar="NAME",
        help="What joins --devices, where not the usual: nvlink4, pcie5, …; between nodes infiniband-ndr, ethernet-100g, … "
        "Repeatable.",
    ),
]
Price = Annotated[
    float | None,
    typer.Option(
        "--price-per-hour",
        min=0,
        help="Of the machine, with --devices of each device, in your currency; shows the cost.",
    ),
]
RealSteps = Annotated[
    bool,
    typer.Option("--probe", help="Load the weights, run three real steps of the longest batch, and promise by them."),
]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")]
OutFile = Annotated[Path | None, typer.Option("--out", help="The file to write; in the current folder when not given.")]
FieldsAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FIELD]... [SECTION.FIELD=VALUE]...",
        help="Settings to explain on a page each, such as lora.r; overrides.",
    ),
]
Engine = Annotated[
    Literal["torch", "ray"], typer.Option("--engine", help="Who starts the processes: torch's launchers, or Ray.")
]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Of Ray; one for each GPU of the cluster.")]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Of the Ray cluster; a new one on this machine without it and RAY_ADDRESS."),
]
Storage = Annotated[
    str | None, typer.Option("--storage", metavar="PATH_OR_URL", help="Where Ray keeps its record of the run.")
]
MaxFailures = Annotated[
    int | None, typer.Option("--max-failures", min=0, help="How often Ray starts the workers again after one was lost.")
]
