"""Make changes of the source that tests once did not see, one at a time, and check that a test fails for each.

    python benchmarks/named_mutants.py

Works on a copy of the tree. Prints a table, and exits with 1 if a change goes unseen or its tests fail without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("src", "tests", "pyproject.toml", "README.md", "recipes", "docs", "examples", "benchmarks")

MUTANTS = (
    (
        "the slower dtype is chosen",
        ("model/device.py", "ratio >= FASTER else", "ratio < FASTER else"),
        ("tests/model/test_device.py",),
    ),
    (
        "tokens per second count supervised tokens only",
        ("training/callbacks.py", "step.num_tokens / seconds", "step.num_supervised_tokens / seconds"),
        ("tests/training/test_callbacks.py",),
    ),
    (
        "the disk check ignores the checkpoints",
        ("planning/checks.py", "needed = kept * checkpoint + parameters", "needed = parameters"),
        ("tests/planning/test_checks.py", "-k", "disk"),
    ),
    (
        "the planned loss has no working copies",
        ("planning/memory/memory.py", "chunk * 2 + chunk * model.dtype_bytes // 4", "chunk"),
        ("tests/planning/memory/test_memory.py", "-k", "vocabulary"),
    ),
    (
        "a run that never evaluates is planned without its last evaluation",
        ("planning/cost.py", 'evaluations += recipe.train.eval_every == "never"', "pass"),
        ("tests/planning/test_cost.py",),
    ),
    (
        "the start-up comparison accepts anything",
        ("training/loss.py", "tolerance, reason = TOLERANCE[loss_dtype(model)]", "tolerance, reason = 1e6"),
        ("tests/training/test_loss.py",),
    ),
    (
        "planned and actual are swapped in the report",
        (
            "reporting/plan_section.py",
            "as_duration(planned), as_duration(actual)",
            "as_duration(actual), as_duration(planned)",
        ),
        ("tests/reporting/test_run_page.py", "-k", "swapped"),
    ),
    (
        "a best adapter is recorded as the last",
        ("workflows/final_adapter.py", '"kind": "best"', '"kind": "last"'),
        ("tests/workflows/test_final_adapter.py",),
    ),
    (
        "missing stop tokens pass the certificate",
        ("exporting/certificate.py", "missing_stops=missing if stops_required else []", "missing_stops=[]"),
        ("tests/exporting/test_certificate.py",),
    ),
    (
        "files added to the model do not count as a change",
        ("planning/lock.py", "sorted({*old, *new}) if old", "sorted({*old}) if old"),
        ("tests/workflows/test_changed_inputs.py", "-k", "differences"),
    ),
    (
        "every step has the same dropout",
        ("model/kernels/dropout.py", "seed * _GOLDEN + step + 1", "seed * _GOLDEN + 1"),
        ("tests/model/kernels/test_dropout.py",),
    ),
    (
        "dropout masks depend on the place in the micro-batch",
        ("training/fast_trainer.py", "[share.numbers[i] for i in chosen] or [0]", "[*range(len(chosen))] or [0]"),
        ("tests/invariants/test_same_mathematics.py", "-k", "token_budget and complete and 64"),
    ),
    (
        "a stop token of several tokens is trained in part",
        ("data/masking/token_labels.py", "if ended and int(tokens.ids[last]) not in self._stops", "if False"),
        ("tests/data/masking/test_token_labels.py",),
    ),
)
"""What changes, (file under src/loratune, text, its replacement), and the tests that must fail."""


def passes(tree: Path, tests: tuple[str, ...]) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # neither passed nor failed: no tests, or an error outside of them
        raise SystemExit(f"{' '.join(tests)}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main() -> int:
    unseen = 0
    print("| change | tests | seen |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in PARTS:
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / part)
        for name, (file, text, replacement), tests in MUTANTS:
            path = tree / "src" / "loratune" / file
            original = path.read_text(encoding="utf-8")
            if original.count(text) != 1:
                raise SystemExit(f"{file}: {text!r} occurs {original.count(text)} times")
            sound = passes(tree, tests)
            path.write_text(original.replace(text, replacement), encoding="utf-8")
            seen = not passes(tree, tests)
            path.write_text(original, encoding="utf-8")
            verdict = "yes" if sound and seen else "NO" if sound else "the tests fail without it"
            unseen += verdict != "yes"
            print(f"| {name} | `{' '.join(tests)}` | {verdict} |", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
