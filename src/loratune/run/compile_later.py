"""Compile the functions of bitsandbytes at their first call instead of at its import.

PEFT imports bitsandbytes wherever it is installed. Four of its functions are decorated with `torch.compile`, which
loads torch's whole compiler, seconds of every command, although most runs never call them.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

DECORATED = "bitsandbytes.backends.default.ops"


class CompileAtFirstCall(MetaPathFinder):
    """Finds one module as usual; what it decorates with `torch.compile` is compiled when it is first called.

    Args:
        module: Full name of the module.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec with a loader that defers `torch.compile`; None for every other module."""
        if fullname != self._module:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(_execute, loader.exec_module)
        return spec


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    import torch

    library: Any = torch
    compile_now = library.compile
    library.compile = functools.partial(_decorate, compile_now)
    try:
        execute(module)
    finally:
        library.compile = compile_now


def _decorate(
    compile_now: Callable[..., Callable[..., Any]], function: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    @functools.cache
    def compiled() -> Callable[..., Any]:
        return compile_now(function, **options)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call


def install() -> None:
    """Do so for bitsandbytes, from its next import on."""
    if DECORATED not in sys.modules:
        sys.meta_path.insert(0, CompileAtFirstCall(DECORATED))
