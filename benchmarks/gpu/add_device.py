"""Add a device to the plan's table of measured ones, from the results of run.sh there.

python add_device.py RESULTS/results.json DEVICE        # DEVICE: a name of `loratune plan --device`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loratune.planning.hardware.devices import find_device
from loratune.planning.hardware.measured import TABLE, from_results


def main(results: Path, name: str) -> None:
    device = find_device(name, option="DEVICE").name
    found = from_results(device, json.loads(results.read_text(encoding="utf-8")))
    with TABLE.open("a", encoding="utf-8") as table:
        table.write(found.as_line())
    print(f"{TABLE}: {found.as_line()}", end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
