"""The studio's end of its helper processes: requests out, answers in, one after the other."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loratune.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

_LONGEST_LINE = 64 * 2**20
"""Bytes of an answer; a plan with all its matrices has some hundred kilobytes."""
MOST_CHATS = 2
"""Models that are held in memory for chats; beyond, the one used longest ago is ended."""


class Helper:
    """A helper process, started when it is first asked something, and again if it ended.

    Args:
        module: The module of `loratune.cli.studio` that it runs.
        folder: Where it runs.
        arguments: What it is given.
    """

    def __init__(self, module: str, folder: Path, arguments: tuple[str, ...] = ()) -> None:
        # -P: a file of the folder that is named like a module must not be imported.
        self._command = (sys.executable, "-P", "-m", f"loratune.cli.studio.{module}", *arguments)
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def wake(self) -> None:
        """Start the process, so that it imports what it needs before it is asked."""
        async with self._turn:
            await self._started()

    async def ask(self, do: str, **request: Any) -> Any:
        """Return the result of a request.

        Raises:
            RunError: It failed; the text says why.
        """
        result: Any = None
        async for kind, value in self.stream(do, **request):
            if kind == "result":
                result = value
        return result

    async def stream(self, do: str, **request: Any) -> AsyncGenerator[tuple[str, Any]]:
        """Yield the pieces of an answer, then its result.

        Raises:
            RunError: It failed; the text says why.
        """
        async with self._turn:
            process = await self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            finished = False
            try:
                await process.stdin.drain()
                while line := await process.stdout.readline():
                    ((kind, value),) = json.loads(line).items()
                    finished = kind != "piece"
                    if kind == "error":
                        raise RunError(_in_words(value), fix=value["fix"])
                    yield kind, value
                    if finished:
                        return
                raise RunError("the helper process ended", fix="look at the terminal of `loratune studio`")
            except (ConnectionError, BrokenPipeError) as error:
                raise RunError(f"the helper process ended: {error}", fix="try again") from None
            finally:
                if not finished:  # nobody reads on: what it still says would answer the next request
                    await self._interrupt(process)

    async def _interrupt(self, process: asyncio.subprocess.Process) -> None:
        """Do what Ctrl-C does to an answer, and read its rest."""
        assert process.stdout is not None
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(10):
                while line := await process.stdout.readline():
                    if b'{"piece"' not in line[:10]:
                        return
        except TimeoutError:
            await self.close()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=self._folder,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LONGEST_LINE,
                start_new_session=True,  # Ctrl-C in the terminal is for the studio, which then ends its helpers
            )
        return self._process

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class Helpers:
    """All helper processes of a studio: one that prepares runs, and one for each chat.

    Args:
        folder: The studio's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.guide = Helper("guide_process", folder)
        self._chats: OrderedDict[str, Helper] = OrderedDict()

    async def chat(self, run: str) -> Helper:
        """Return the process that holds the model of a run."""
        if run not in self._chats:
            while len(self._chats) >= MOST_CHATS:
                await self._chats.popitem(last=False)[1].close()
            self._chats[run] = Helper("chat_process", self._folder, (run,))
        self._chats.move_to_end(run)
        return self._chats[run]

    async def close(self) -> None:
        """End all of them."""
        for helper in (self.guide, *self._chats.values()):
            await helper.close()


def _in_words(error: dict[str, Any]) -> str:
    place = ":".join(str(part) for part in (error.get("file"), error.get("line")) if part is not None)
    return f"{place}: {error['problem']}" if place else str(error["problem"])
