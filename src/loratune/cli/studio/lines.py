"""A helper process of the studio: it does what needs torch, and may be ended at any time.

Started by `helper.py`. Every line on stdin is a request as JSON, `{"do": NAME, …}`. It is answered by lines on stdout:
any number of `{"piece": …}`, then one `{"result": …}` or `{"error": …}`. Ctrl-C ends the answer of a model.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loratune.run.errors import LoratuneError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TextIO

    Do = Callable[[dict[str, Any], Callable[[Any], None]], Any]


def answer_lines(things: Mapping[str, Do], source: TextIO, target: TextIO) -> None:
    """Answer requests until the input ends.

    Args:
        things: Name of what can be asked for → the function that does it, of the request and a function for pieces.
        source: Where requests come from, a line each.
        target: Where answers go.
    """

    def write(kind: str, value: Any) -> None:
        target.write(json.dumps({kind: value}) + "\n")
        target.flush()

    for line in source:
        request = json.loads(line)
        try:
            write("result", things[request["do"]](request, lambda piece: write("piece", piece)))
        except LoratuneError as error:
            write("error", error.as_dict())
        except KeyboardInterrupt:
            write("error", {"problem": "stopped", "fix": ""})
        except Exception as error:  # noqa: BLE001 - the page shows it, and the next request may be a good one
            write("error", {"problem": printable(f"{type(error).__name__}: {error}"), "fix": ""})


def serve_stdin(things: Mapping[str, Do]) -> None:
    """Answer requests on this process's own stdin and stdout, which nothing else can write to then."""
    target = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print do not get between the lines
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries; nobody here can act on them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(KeyboardInterrupt, BrokenPipeError):
        answer_lines(things, sys.stdin, target)
