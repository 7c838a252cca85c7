"""A sandbox for chat templates, which come from strangers: jinja2's own, with limits on time, memory and numbers.

Three limits, because no single one stops every hostile template:

- Loops: a watchdog thread raises in the rendering thread once a rendering takes too long.
- Growth (a text doubled over and over): the same watchdog checks the memory of the process.
- Single operations that the watchdog cannot interrupt (`'a' * 10**10`, `10**10**10`, `center(10**10)`): the environment
  checks numbers and sizes before it runs them, and does not fold them into constants at compile time.

The environment is one object of transformers' own for chat templates, with its class replaced by a subclass.
"""

from __future__ import annotations

import ctypes
import operator
import re
import threading
import time
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils as transformers_templates

from loratune.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jinja2 import Template

T = TypeVar("T")

TIME_LIMIT_SECONDS = 5.0
"""Time limit for one conversation; a typical one takes 0.1 ms, one of 10 MB some milliseconds."""
MEMORY_LIMIT_BYTES = 2**30
"""How much the process may grow while one conversation is rendered, from the watchdog's first look on."""
SOURCE_LIMIT = 2**20
"""Maximum characters of a template; the longest that TRL bundles has 17,000."""
NUMBER_LIMIT = 10**6
"""The largest number that a template may compute by multiplication, or pass to a function or filter."""
TEXT_LIMIT = 2**27
"""Maximum characters that one operation of a template may produce."""

_LOOK_SECONDS, _IDLE_SECONDS = 0.1, 2.0
_AGAIN_SECONDS = 1.0
"""Time until the watchdog raises again: Python ignores exceptions in destructors and garbage-collector callbacks."""
_WIDE = re.compile(r"\d{7}")
"""A field width of seven digits or more in a format."""


class _StopRenderingError(BaseException):
    """Raised in the rendering thread by the watchdog. Not an `Exception`: jinja2 swallows those while it compiles."""


def compile_template(source: str) -> Template:
    """Compile a chat template in transformers' environment, with limits.

    Raises:
        DataError: It is not a template, or compiling it takes too long.
    """
    if len(source) > SOURCE_LIMIT:
        raise DataError(f"the chat template has {len(source):,} characters", fix="use another model's tokenizer")
    try:
        return limited(lambda: _compile(source))
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - foreign code, and Python's compiler fails in many ways
        raise DataError(f"the chat template does not compile: {describe(error)}", fix="correct the template") from None


def render_template(
    template: Template,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    *,
    marked: bool = False,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation as transformers does.

    Args:
        template: A template from `compile_template`.
        messages: The messages.
        tools: Function schemas.
        marked: Whether to return the spans between `{% generation %}` markers, too. Not thread-safe.
        variables: Other variables that the template may read.

    Returns:
        The text, and the marked character spans.

    Raises:
        DataError: It takes too long, or too much memory.
        Exception: Whatever the template raises.
    """
    known = {
        "messages": _alias(_plain(list(messages))),
        "tools": _plain(list(tools)) if tools else None,
        "documents": None,
        **variables,
    }
    if marked:
        return limited(lambda: _render_marked(compiled_template=template, **known))
    return limited(lambda: template.render(known)), []


def describe(error: Exception) -> str:
    """Describe an error of a template in one line; its message may contain the full conversation."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


_plain: Callable[[Any], Any] = transformers_templates._plain_template_data
_alias: Callable[[Any], Any] = transformers_templates._alias_reasoning_fields
_render_marked: Callable[..., tuple[str, list[tuple[int, int]]]] = transformers_templates._render_with_assistant_indices


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    environment = transformers_templates._cached_compile_jinja_template("").environment  # a new one at each call
    environment.__class__ = LimitedEnvironment
    environment.filters = {name: _limited_filter(name, function) for name, function in environment.filters.items()}
    template: Template = environment.from_string(source)
    return template


# ---- single operations


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, which also refuses single operations that would take unbounded time or memory."""

    # Not folded into constants at compile time, and checked at run time. `+` and `~` can at most double what exists.
    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ARG002 - jinja2's
        """Check and run a multiplication, power or format."""
        if operator == "%":
            if isinstance(left, str):
                _check_format(left)
                _check_numbers(right if isinstance(right, tuple) else (right,), {})
            return left % right
        if operator == "**":
            return _power(left, right)
        return _product(left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """Return the sandbox's own `str.format`, after refusing wide fields."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(str(value.__self__))
        return wrapped

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments of a call and run it."""
        if args or kwargs:
            owner = getattr(function, "__self__", None)
            if isinstance(owner, str):
                _check_text_call(function.__name__, owner, args)
            _check_numbers(args, kwargs)
        return super().call(context, function, *args, **kwargs)


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Filters that need the context or the environment get it as first argument, before the value.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def limited_filter(*args: Any, **kwargs: Any) -> Any:
        if len(args) > first + 1 or kwargs:
            _check_numbers(args[first + 1 :], kwargs)
            if isinstance(args[first], str):
                _check_text_call(name, args[first], args[first + 1 :])
            elif name == "join" and isinstance(args[first], list | tuple):
                _check_size(len(args[first]) * len(str(args[first + 1])) if len(args) > first + 1 else 0)
        return function(*args, **kwargs)

    return limited_filter


def _check_numbers(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int | float) and not -NUMBER_LIMIT <= value <= NUMBER_LIMIT:
            raise SecurityError(f"a chat template may not use a number like {value:.3g}")


def _check_text_call(name: str, text: str, args: Sequence[Any]) -> None:
    if name == "format":
        _check_format(text)
    elif name == "replace" and len(args) >= 2 and isinstance(args[1], str) and len(text) * len(args[1]) > TEXT_LIMIT:
        _check_size(len(text) + text.count(str(args[0])) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check_size(len(text) * len(args[0]))


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise SecurityError("a chat template may not format with wide fields")


def _check_size(size: int) -> None:
    if size > TEXT_LIMIT:
        raise SecurityError(f"a chat template may not make a text of {size:,} characters")


def _product(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and hasattr(other, "__len__"):
            _check_size(one * len(other))
    if isinstance(left, int | float) and isinstance(right, int | float):
        _check_numbers((left, right), {})
    return operator.mul(left, right)


def _power(left: Any, right: Any) -> Any:
    if not isinstance(left, int | float) or not isinstance(right, int | float) or abs(left) > 1000 or abs(right) > 20:
        raise SecurityError(f"a chat template may not raise {left!r:.20} to the power {right!r:.20}")
    return left**right


# ---- time and memory


class _Work:
    """One rendering in progress."""

    __slots__ = ("looks", "memory", "raised", "reason", "started", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.started = time.monotonic()
        self.looks = 0
        self.memory = 0
        self.raised = 0.0
        self.reason = ""


class _Watchdog:
    """Watches the renderings in progress, from a thread that ends after a while without any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: dict[int, _Work] = {}
        self._thread: threading.Thread | None = None

    def start(self, work: _Work) -> None:
        self._works[work.thread] = work
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._watch, daemon=True, name="template watchdog")
                    self._thread.start()

    def stop(self, work: _Work) -> None:
        """End a rendering; no exception for it is raised after this returns."""
        with self._lock:
            if self._works.pop(work.thread, None) is not None and work.reason:
                _raise_in(work.thread, None)  # scheduled, but too late: take it back

    def _watch(self) -> None:
        process = psutil.Process()
        idle_since = time.monotonic()
        while True:
            time.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            with self._lock:
                if self._works:
                    idle_since = now
                elif now - idle_since > _IDLE_SECONDS:
                    self._thread = None
                    return
                for work in list(self._works.values()):
                    self._look(work, now, process)

    def _look(self, work: _Work, now: float, process: psutil.Process) -> None:
        if work.reason:
            if now - work.raised > _AGAIN_SECONDS:
                self._raise(work, now)
            return
        memory = process.memory_info().rss
        if not work.looks:
            work.memory = memory
        work.looks += 1
        if now - work.started > TIME_LIMIT_SECONDS:
            work.reason = f"takes longer than {TIME_LIMIT_SECONDS:g} seconds"
        elif memory - work.memory > MEMORY_LIMIT_BYTES:
            work.reason = f"takes more than {MEMORY_LIMIT_BYTES / 2**30:g} GiB of memory"
        if work.reason:
            self._raise(work, now)

    def _raise(self, work: _Work, now: float) -> None:
        work.raised = now
        _raise_in(work.thread, _StopRenderingError)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Make a thread raise at its next instruction; None takes back an exception not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


_WATCHDOG = _Watchdog()


def limited(work: Callable[[], T]) -> T:
    """Return what `work` returns, within the limits of time and memory.

    Raises:
        DataError: It exceeds them.
    """
    watched = _Work()
    try:
        _WATCHDOG.start(watched)
        try:
            return work()
        except MemoryError:
            raise _too_much("takes more memory than available") from None
        finally:
            _WATCHDOG.stop(watched)
    except _StopRenderingError:
        _WATCHDOG.stop(watched)
        raise _too_much(watched.reason) from None


def _too_much(reason: str) -> DataError:
    return DataError(
        f"the chat template {reason} for one conversation",
        fix="the template is broken or hostile: get the model from its original source, or correct its chat template",
    )
