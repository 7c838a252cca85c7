"""The commands that the studio starts: separate processes, which continue when the page or the studio is closed.

    FOLDER/.loratune_studio/ID.json   the command and its process     ID.log   what it prints
    FOLDER/.loratune_studio/ID.code   its exit code                   KEY.lock  held while it runs

The lock is the operating system's, on a file that is handed to the process: two pages, or two studios, cannot start one
run twice, and however the process ends, nothing is left locked.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from loratune.run.directory import IN_USE, RunDir, write_text
from loratune.run.errors import MachineError, RecipeError, RunError
from loratune.run.locks import lock_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loratune.cli.studio.places import StudioFolder

TAIL = 20_000
"""Bytes at the end of a command's output that a page shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command that was started.

    Attributes:
        id: Its name among the studio's files.
        words: The command's words after `loratune`.
        about: The folder of the run or search, relative to the studio's.
        source: The recipe of a training or search; else empty.
        started: When, in seconds since 1970.
        pid: Its process.
        code: Its exit code; None while it runs, or if the studio was closed before it ended.
        is_running: Whether it still runs.
    """

    id: str
    words: tuple[str, ...]
    about: str
    source: str
    started: float
    pid: int
    code: int | None = None
    is_running: bool = False

    @property
    def line(self) -> str:
        """The command line, to be pasted."""
        return shlex.join(("loratune", *self.words))

    @property
    def page(self) -> str:
        """The page that shows what the command works on."""
        return f"/{self.words[0]}" if self.words[0] in ("sweep", "tune") else "/run"

    @property
    def state(self) -> str:
        """What became of it, in a word or two."""
        if self.is_running:
            return "running"
        return "ended" if self.code is None else "done" if self.code == 0 else f"failed (exit code {self.code})"


class Jobs:
    """The commands started in a folder."""

    def __init__(self, places: StudioFolder) -> None:
        self._places = places

    def start(self, words: Sequence[str], *, about: str, key: str | None = None, source: str = "") -> Job:
        """Start `loratune WORDS` in the studio's folder.

        Args:
            words: The command's words.
            about: The folder of the run or search, relative to the studio's.
            key: What must not be done twice at a time; by default any work in that folder.
            source: The recipe, for a training or search.

        Raises:
            RecipeError: The same is being done already.
            MachineError: The folder cannot be written.
        """
        own = self._places.own
        lock = own / f"{hashlib.sha256((key or about).encode()).hexdigest()[:20]}.lock"
        try:
            own.mkdir(exist_ok=True)
            stream = lock.open("a+")
        except OSError as error:
            raise MachineError(f"cannot write: {error.strerror}", file=own, fix="start in another folder") from error
        with stream:
            try:
                lock_file(stream)
            except OSError:
                raise RecipeError(f"already running: {key or about}", fix="its page shows how far it is") from None
            if key is None and RunDir.at(self._places.root / about).is_in_use:
                raise RecipeError(f"another command is working on {about}", fix="wait for it, or stop it")
            name = f"{time.time():.3f}-{secrets.token_hex(3)}"
            stream.truncate(0)
            stream.write(name)
            stream.flush()
            job = Job(id=name, words=tuple(words), about=about, source=source, started=time.time(), pid=0)
            return self._spawn(job, lock.name, stream.fileno())

    def _spawn(self, job: Job, lock: str, descriptor: int) -> Job:
        own = self._places.own
        # -P: a file of the folder that is named like a module must not be imported.
        command = [sys.executable, "-P", "-m", "loratune", *job.words]
        with (own / f"{job.id}.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own program, no shell
                command,
                cwd=self._places.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(descriptor,),
                env={**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "100"},
            )
        started = replace(job, pid=process.pid, is_running=True)
        kept = {key: value for key, value in asdict(started).items() if key not in ("code", "is_running")}
        write_text(own / f"{job.id}.json", json.dumps({**kept, "lock": lock}))
        threading.Thread(target=self._wait, args=(process, job.id), daemon=True).start()
        return started

    def _wait(self, process: subprocess.Popen[bytes], name: str) -> None:
        code = process.wait()
        with suppress(MachineError):  # a full disk, or a folder that was deleted: the page then says `ended`
            write_text(self._places.own / f"{name}.code", str(code))

    def all(self, about: str | None = None) -> list[Job]:
        """Return the commands, the most recent first: all of them, or those about one run."""
        found = [self._read(path) for path in self._places.own.glob("*.json")]
        jobs = [job for job in found if job is not None and about in (None, job.about)]
        return sorted(jobs, key=lambda job: -job.started)

    def latest(self, about: str) -> Job | None:
        """Return the command that was started here last about a folder."""
        return next(iter(self.all(about)), None)

    def get(self, name: str) -> Job:
        """Return a command by its id.

        Raises:
            RecipeError: There is none.
        """
        job = next((job for job in self.all() if job.id == name), None)
        if job is None:
            raise RecipeError(f"no command {name!r} was started here", fix="go back to the runs")
        return job

    def _read(self, path: Path) -> Job | None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            lock = values.pop("lock")
            job = Job(**{**values, "words": tuple(values["words"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        code = _read_code(path.with_name(f"{job.id}.code"))
        running = code is None and _holds(self._places.own / lock, job.id)
        return replace(job, code=code, is_running=running)

    def output(self, job: Job) -> str:
        """Return the end of what a command printed."""
        try:
            with (self._places.own / f"{job.id}.log").open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - TAIL))
                return stream.read().decode(errors="replace")
        except OSError:
            return ""

    def stop(self, run: RunDir) -> None:
        """Do what Ctrl-C does in the terminal of a run.

        Raises:
            RunError: Nothing works on the run.
        """
        pid = self._working_on(run)
        if pid is None:
            raise RunError("nothing is running here", file=run.root, fix="reload the page")
        os.kill(pid, signal.SIGINT)

    def _working_on(self, run: RunDir) -> int | None:
        if run.is_in_use:  # also by a command that another shell started
            text = (run.root / IN_USE).read_text(encoding="utf-8").strip()
            if text.isdigit():
                return int(text)
        about = self._places.short(run.root)
        return next((job.pid for job in self.all(about) if job.is_running), None)


def _holds(lock: Path, name: str) -> bool:
    """Return whether the process of this command still holds its lock."""
    try:
        with lock.open("r+") as stream:
            if stream.read().strip() != name:
                return False
            lock_file(stream, shared=True)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _read_code(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
