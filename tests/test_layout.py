"""The house rules: how large things may be, what they may be called, and which way imports point.

`python tests/test_layout.py` prints the longest import chain and everything that breaks a rule.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "loratune"

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_IMPORT_CHAIN = 12  # may only shrink
MAX_EXCEPTIONS = 10

ROOMS = {
    *("cli", "workflows", "planning", "evaluation", "exporting", "training"),
    *("reporting", "model", "data", "recipe", "run"),
}
ROOT_FILES = {"__init__.py", "__main__.py", "py.typed"}
CONTRACT = [
    "loratune.__main__",
    "loratune.cli",
    "loratune.workflows",
    "loratune.planning",
    "loratune.evaluation | loratune.exporting",
    "loratune.training | loratune.reporting",
    "loratune.model | loratune.data",
    "loratune.recipe",
    "loratune.run",
]

# A name that breaks a rule, one a line. Lines are only ever deleted: one that is no longer needed fails the test.
EXCEPTIONS: set[str] = set()

# Their functions are typer commands: a parameter is an option of the command line, and the name is the verb's, as
# that of the function that does the work. Only `__main__` imports them.
COMMANDS = {f"loratune.cli.{name}" for name in ("before_training", "training", "after_training", "adapter")}
FOREIGN_SIGNATURES = {"loratune.model.kernels", *COMMANDS}  # operators have the signatures of torch and transformers


@cache
def modules() -> dict[str, Path]:
    """Module name → file."""
    return {
        ".".join(("loratune", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions and methods of a module, those within others too, with their dotted names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.ClassDef):
                yield prefix + node.name, node
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def public_names(module: str, tree: ast.Module) -> Iterator[str]:
    """The classes and functions that a module defines for others."""
    for node in tree.body:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        counts = isinstance(node, ast.ClassDef) or (is_function and module not in COMMANDS)
        if counts and not node.name.startswith("_"):
            yield node.name


def long_modules() -> dict[str, str]:
    counts = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    return {name: f"{count} lines" for name, count in counts.items() if count > MAX_MODULE_LINES}


def long_functions() -> dict[str, str]:
    """Those with too many lines, from `def` to the end, docstring and comments included."""
    found = {}
    for module, path in modules().items():
        for name, node in functions(tree_of(path)):
            assert node.end_lineno is not None
            count = node.end_lineno - node.lineno + 1
            if count > MAX_FUNCTION_LINES:
                found[f"{module}.{name}"] = f"{count} lines"
    return found


def functions_with_many_parameters() -> dict[str, str]:
    found = {}
    for module, path in modules().items():
        if any(module == free or module.startswith(f"{free}.") for free in FOREIGN_SIGNATURES):
            continue
        for name, node in functions(tree_of(path)):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([arg for arg in every if arg.arg not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                found[f"{module}.{name}"] = f"{count} parameters"
    return found


def names_defined_twice() -> dict[str, str]:
    places: dict[str, list[str]] = {}
    for module, path in modules().items():
        for name in public_names(module, tree_of(path)):
            places.setdefault(name, []).append(module)
    return {name: ", ".join(found) for name, found in places.items() if len(found) > 1}


def modules_without_a_test() -> dict[str, str]:
    """Those that no test names, in an import or in a string such as the target of `monkeypatch.setattr`."""
    named: set[str] = set()
    for path in set((ROOT / "tests").rglob("*.py")) - {Path(__file__)}:  # this file names modules without testing them
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                named.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                named.add(node.module)
                named.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("loratune."):
                parts = node.value.split(".")
                named.update(".".join(parts[:end]) for end in range(2, len(parts) + 1))
    empty = {name for name, path in modules().items() if not any(statements(tree_of(path)))}
    return {name: "no test names it" for name in modules() if name not in named | empty}


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a module beside its docstring and imports."""
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_docstring and not isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def strangers_at_the_root() -> dict[str, str]:
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    return {
        **dict.fromkeys(sorted(found - ROOMS - ROOT_FILES), "not expected at the root"),
        **dict.fromkeys(sorted((ROOMS | ROOT_FILES) - found), "missing at the root"),
    }


@cache
def longest_import_chain() -> list[str]:
    """The longest way along imports, those within functions too, those for type checkers not.

    Raises:
        AssertionError: Imports go round in a circle.
    """
    graph = grimp.build_graph("loratune", exclude_type_checking_imports=True, cache_dir=None)
    below: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...]) -> list[str]:
        assert module not in above, f"a circle of imports: {' → '.join((*above[above.index(module) :], module))}"
        if module not in below:
            imported = sorted(graph.find_modules_directly_imported_by(module))
            below[module] = [module, *max((chain(name, (*above, module)) for name in imported), key=len, default=[])]
        return below[module]

    return max((chain(module, ()) for module in sorted(graph.modules)), key=len)


def long_import_chain() -> dict[str, str]:
    length = len(longest_import_chain())
    return {"import chain": f"{length} modules"} if length > MAX_IMPORT_CHAIN else {}


RULES: dict[str, Callable[[], dict[str, str]]] = {
    f"a module has at most {MAX_MODULE_LINES} lines": long_modules,
    f"a function has at most {MAX_FUNCTION_LINES} lines": long_functions,
    f"a function has at most {MAX_PARAMETERS} parameters": functions_with_many_parameters,
    "a public name is defined once": names_defined_twice,
    "a test names every module": modules_without_a_test,
    "the root holds the rooms": strangers_at_the_root,
    f"an import chain has at most {MAX_IMPORT_CHAIN} modules": long_import_chain,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule: str) -> None:
    broken = {what: why for what, why in RULES[rule]().items() if what not in EXCEPTIONS}
    assert not broken, f"{rule}; these do not: " + "; ".join(f"{what} ({why})" for what, why in broken.items())


def test_each_rule_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "def long():\n" + "    pass\n" * MAX_FUNCTION_LINES
    many = f"def many(*, {', '.join(f'p{i}' for i in range(MAX_PARAMETERS + 1))}): ...\n"
    (tmp_path / "one.py").write_text(long + many + "\n" * MAX_MODULE_LINES)
    (tmp_path / "two.py").write_text("class long: ...\n")
    here = sys.modules[__name__]
    monkeypatch.setattr(
        here, "modules", lambda: {f"loratune.{name}": tmp_path / f"{name}.py" for name in ("one", "two")}
    )
    monkeypatch.setattr(here, "PACKAGE", tmp_path)
    monkeypatch.setattr(here, "longest_import_chain", lambda: ["loratune.one"] * (MAX_IMPORT_CHAIN + 1))
    assert all(check() for check in RULES.values())
    assert long_modules().keys() == {"loratune.one"}
    assert long_functions().keys() == {"loratune.one.long"}
    assert functions_with_many_parameters().keys() == {"loratune.one.many"}
    assert names_defined_twice().keys() == {"long"}
    assert modules_without_a_test().keys() == {"loratune.one", "loratune.two"}
    assert {"one.py", "two.py", *ROOMS} < strangers_at_the_root().keys()


def test_exceptions_only_shrink() -> None:
    assert len(EXCEPTIONS) <= MAX_EXCEPTIONS
    needed = {what for broken in RULES.values() for what in broken()}
    assert needed >= EXCEPTIONS, f"delete what is no longer needed: {sorted(EXCEPTIONS - needed)}"


def test_imports_point_one_way() -> None:
    """`lint-imports` holds the contract; here that it is still the whole one."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = settings["contracts"]
    assert contract["layers"] == CONTRACT
    assert contract.keys() == {"name", "type", "layers"}, "no ignored imports"
    assert settings.keys() == {"root_package", "contracts"}, "no external or type-checking imports left out"


def test_lines_have_at_most_120_columns() -> None:
    """`ruff check` counts them; here that it is told to."""
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert ruff["line-length"] == 120
    assert not any(
        "E501" in ignored for ignored in (ruff["lint"]["ignore"], *ruff["lint"]["per-file-ignores"].values())
    )


def main() -> int:
    chain = longest_import_chain()
    print(f"longest import chain: {len(chain)} of at most {MAX_IMPORT_CHAIN} modules")  # noqa: T201
    print("  " + " → ".join(name.removeprefix("loratune.") for name in chain))  # noqa: T201
    broken = 0
    for rule, check in RULES.items():
        for what, why in check().items():
            if what not in EXCEPTIONS:
                broken += 1
                print(f"{rule}: {what} ({why})")  # noqa: T201
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
