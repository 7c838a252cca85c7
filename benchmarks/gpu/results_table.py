"""Turn results.jsonl into results.json, complete, and print what it says as tables.

python results_table.py RESULTS [--only-json]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Lines = list[dict[str, Any]]


def read(folder: Path) -> Lines:
    """Return all results; a line that a killed process left half-written is left out."""
    lines = []
    for text in filter(None, (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"left out a line that is cut off: {text[:80]}", file=sys.stderr)
    return lines


def having(lines: Lines, key: str) -> Lines:
    return [line for line in lines if key in line]


def table_of(*columns: str) -> Table:
    from rich.table import Table  # not before: most calls only write the file

    return Table(*columns)


def speeds(lines: Lines) -> Table:
    """Tokens per second of each case, its share of the measured product rate, and planned against measured memory."""
    rates = having(lines, "rates")
    peak = rates[0]["matmul_flops_per_second"] if rates else None
    table = table_of(
        "case", "tokens/s", "planned", "share of matmul", "peak GiB", "planned", "first step s", "examples"
    )
    for case in having(lines, "case"):
        share = f"{case['tokens_per_second'] * case['flops_per_token'] / peak:.0%}" if peak else "?"
        packing = case["packing"]
        table.add_row(
            case["case"],
            f"{case['tokens_per_second']:,.0f}",
            f"{case['planned_tokens_per_second']:,.0f}",
            share,
            f"{case['peak_bytes'] / 2**30:.2f}",
            f"{case['planned_peak_bytes'] / 2**30:.2f}",
            f"{case['first_step_seconds']:.1f}",
            "; ".join(filter(None, ("packed" if packing["packed"] else "not packed", *list(packing.values())[1:]))),
        )
    return table


def checks(lines: Lines) -> Table:
    """Every check, failures first."""
    table = table_of("check", "ok", "largest error", "")
    for check in sorted(having(lines, "ok"), key=lambda check: check["ok"] is True):
        errors = check.get("errors")
        worst = f"{max(map(abs, errors)):.2g}" if errors else ""
        table.add_row(check["what"], str(check["ok"]), worst, check.get("error", check.get("kernel", "")))
    return table


def kernels(lines: Lines) -> Table:
    """What was timed alone."""
    table = table_of("kernel", "ms", "TFLOP/s")
    for line in having(lines, "milliseconds"):
        name = f"attention {line['attention']} at {line['length']}" if "attention" in line else (
            f"loss, {line['chunk_rows']} rows, {'compiled' if line['compiled'] else 'eager'}"
        )  # fmt: skip
        table.add_row(name, f"{line['milliseconds']:.2f}", f"{line['flops_per_second'] / 1e12:.1f}")
    for line in having(lines, "profile"):
        for kind, micros in line["microseconds_per_token"].items():
            table.add_row(f"{line['profile']}: {kind}", f"{micros:.2f} µs a token", "")
        table.add_row(f"{line['profile']}: launches; share of the time that the device works", f"{line['launches']:,}",
                      f"{line['busy_share']:.0%}")  # fmt: skip
    return table


def main(folder: Path, *, only_json: bool) -> None:
    lines, here = read(folder), Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    result = {"commit": commit.stdout.strip() or None, "results": lines}
    unfinished = folder / "results.json.new"  # whatever ends this process, results.json is whole
    unfinished.write_text(json.dumps(result, indent=1), encoding="utf-8")
    unfinished.replace(folder / "results.json")
    if only_json:
        return
    from rich.console import Console

    console = Console(width=150)
    for table in (checks(lines), kernels(lines), speeds(lines)):
        console.print(table)
    failed = [step["step"] for step in having(lines, "step") if step["exit"] != "0"]
    wrong = [check["what"] for check in having(lines, "ok") if check["ok"] is False]
    console.print(f"steps that did not end well: {', '.join(failed) or 'none'}; checks that failed: {len(wrong)}")
    raise SystemExit(1 if failed or wrong else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), only_json="--only-json" in sys.argv)
