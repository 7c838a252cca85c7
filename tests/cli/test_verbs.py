"""The verbs are listed once, in order, and each of their options explains itself."""

from __future__ import annotations

import inspect

import pytest
import typer

from loratune.__main__ import VERBS, app
from loratune.cli import after_training, before_training, options, training

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]


def test_every_function_of_the_verb_modules_is_a_command() -> None:
    listed = [verb for verbs in VERBS.values() for verb in verbs]
    assert len(set(listed)) == len(listed)
    for module in (before_training, training, after_training):
        own = [f for name, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
        assert {f for f in own if not f.__name__.startswith("_")} <= set(listed)
    assert list(COMMANDS) == [*(verb.__name__ for verb in listed), "adapter"]  # a group of its own


@pytest.mark.parametrize("name", COMMANDS)
def test_every_verb_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert command.help.split("\n")[0].endswith((".", "RUN/report.html.", "compare.html."))
    for parameter in command.params:
        assert parameter.help, parameter.name


def test_shared_options_are_used() -> None:
    used = {id(parameter.annotation) for verbs in VERBS.values() for verb in verbs for parameter in _parameters(verb)}
    shared = {name: value for name, value in vars(options).items() if hasattr(value, "__metadata__")}
    assert shared
    assert [name for name, value in shared.items() if id(value) not in used] == []


def _parameters(verb: object) -> list[inspect.Parameter]:
    return list(inspect.signature(verb, eval_str=True).parameters.values())  # type: ignore[arg-type]
