"""Change the source in small ways and count how many changes the tests see.

    python benchmarks/mutation.py data.steps --sample 40 --seed 0

Each mutant is compiled in memory and put in the module's place by an import hook; no file is written. It runs in a fork
of this process, which has imported torch and transformers already. mutmut forks too, but after a run of the tests, and
torch's autograd does not survive that; cosmic-ray imports everything again for each mutant, 15 s on a slow core.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BEFORE_FORK = ("loratune", "torch", "transformers.models.llama.modeling_llama", "peft", "trl", "pyarrow.json")
MASKS = ["tests/data/masking/test_spans.py", "tests/data/masking/test_render.py"]
MEMORY = ["tests/planning/memory"]
TESTS = {
    "data.masking.spans_by_substitution": [
        *MASKS,
        "tests/data/masking/test_render_refusals.py",
        "tests/data/masking/test_roles.py",
    ],
    "data.masking.spans_by_prompting": [*MASKS, "tests/data/masking/test_render_refusals.py"],
    "data.masking.token_labels": ["tests/data/masking/test_token_labels.py", *MASKS],
    "data.steps": ["tests/data/test_steps_values.py", "tests/data/test_steps.py"],
    "training.loss": ["tests/training/test_loss.py"],
    "model.kernels.cross_entropy": ["tests/model/kernels/test_cross_entropy.py"],
    "training.checkpoint": [
        "tests/training/test_checkpoint_values.py",
        "tests/training/test_checkpoint.py",
        "tests/workflows/test_extend.py",
    ],
    **{f"planning.memory.{name}": MEMORY for name in ("memory", "adapter", "encoder", "optimizer", "quantized")},
    "planning.speed": ["tests/planning/test_speed_values.py", "tests/planning/test_speed.py"],
    "planning.cost": ["tests/planning/test_cost.py", "tests/planning/test_cost_values.py"],
    "exporting.certificate": ["tests/exporting/test_certificate.py", "tests/workflows/test_certify_endpoint.py"],
    "exporting.verdict": ["tests/exporting/test_verdict.py", "tests/exporting/test_certificate.py"],
    "exporting.weights_proof": ["tests/exporting/test_weights_proof.py", "tests/workflows/adapters/test_proofs.py"],
    "model.kernels.dropout": ["tests/model/kernels/test_dropout.py"],
}
"""Module → the tests that are meant to see its changes, the quickest first."""

SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Pow: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
}
for _pair in ("Eq NotEq", "In NotIn", "Is IsNot", "And Or", "Add Sub", "Mult Div", "BitOr BitAnd"):
    _one, _other = (getattr(ast, name) for name in _pair.split())
    SWAPS |= {_one: (_other,), _other: (_one,)}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Compare(left, [op], right):
            yield from (ast.Compare(left, [new()], right) for new in SWAPS[type(op)])
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield from (ast.BinOp(left, new(), right) for new in SWAPS[type(op)])
        case ast.BoolOp(op, values):
            yield from (ast.BoolOp(new(), values) for new in SWAPS[type(op)])
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Call(ast.Name(name), arguments, keywords) if name in NAMES:
            yield ast.Call(ast.Name(NAMES[name], ast.Load()), arguments, keywords)
        case ast.Slice(lower, upper, step):
            yield from [ast.Slice(None, upper, step)] if lower else []
            yield from [ast.Slice(lower, None, step)] if upper else []
        case ast.IfExp(_, body, orelse):
            yield from (body, orelse)
        case ast.If(test, body, orelse):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()


def mutants(source: str) -> Iterator[tuple[str, ast.Module]]:
    """All mutants of a module, described; annotations, decorators and the texts of messages stay as they are."""
    tree = ast.parse(source)

    def visit(parent: ast.AST) -> Iterator[tuple[str, ast.Module]]:
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list") or isinstance(parent, ast.Raise | ast.JoinedStr):
                continue
            for place, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or (isinstance(child, ast.If) and is_for_types(child)):
                    continue
                for new in changes(child):
                    ast.copy_location(new, child)
                    before, after = (" ".join(ast.unparse(n).split())[:70] for n in (child, new))
                    write(parent, field, place, new)
                    yield f"{getattr(child, 'lineno', 0)}: {before} ⇒ {after}", ast.fix_missing_locations(tree)
                    write(parent, field, place, child)
                yield from visit(child)

    return visit(tree)


def is_for_types(node: ast.If) -> bool:
    """Whether a type checker alone reads a block."""
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def write(parent: ast.AST, field: str, place: int, node: ast.AST) -> None:
    value = getattr(parent, field)
    if isinstance(value, list):
        value[place] = node
    else:
        setattr(parent, field, node)


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads one module from code in memory."""

    def __init__(self, name: str, file: Path, code: object) -> None:
        self.name, self.file, self.code = name, file, code

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:  # noqa: ARG002
        return importlib.util.spec_from_file_location(name, self.file, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> object:  # noqa: ARG002
        return self.code

    def get_source(self, fullname: str) -> str:  # noqa: ARG002
        return self.file.read_text(encoding="utf-8")


def run(name: str, file: Path, tree: ast.Module, tests: list[str], limit: float) -> str:
    """Run the tests on a mutant in a fork; how it ended: `survived`, `killed`, `timeout`."""
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        sys.meta_path.insert(0, Mutated(name, file, compile(tree, file, "exec")))
        # pytest warns of plugins that were imported before the fork, such as anyio: it cannot rewrite their assertions.
        quiet_warning = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        try:
            os._exit(pytest.main(["-x", "-q", *quiet_warning, *tests]))
        finally:
            os._exit(1)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "survived" if status == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=[*TESTS])
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", type=int, default=None, help="numbers of mutants")
    options = parser.parse_args()
    for library in BEFORE_FORK:
        importlib.import_module(library)
    os.chdir(ROOT)
    for name in options.modules:
        file = ROOT / "src" / "loratune" / f"{name.replace('.', '/')}.py"
        source, tests = file.read_text(encoding="utf-8"), TESTS[name]
        count = sum(1 for _ in mutants(source))
        chosen = options.only or sorted(random.Random(options.seed).sample(range(count), min(options.sample, count)))
        started = time.monotonic()
        if run(f"loratune.{name}", file, ast.parse(source), tests, 600) != "survived":
            sys.exit(f"{name}: the tests fail without a change")
        limit = 20 + 3 * (time.monotonic() - started)
        killed = 0
        for number, (what, tree) in enumerate(mutants(source)):
            if number in chosen:
                ended = run(f"loratune.{name}", file, tree, tests, limit)
                killed += ended != "survived"
                print(f"{name} {number} {ended} {what}", flush=True)
        print(f"{name}: {killed} of {len(chosen)} killed, of {count}; tests take {(limit - 20) / 3:.1f} s", flush=True)


if __name__ == "__main__":
    main()
