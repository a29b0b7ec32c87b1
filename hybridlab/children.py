"""Processes of our own code: in a session of their own, none of it left behind, ended with their parent.

A `Child` is the parent's side; `end_with`, `asked`, `told` and `channel` are the process's own. What the two say is
theirs: frames over a socket (`link`), questions and answers in JSON (`conversation`), a run told as it goes
(`session`), or files in the run store (`jobs`, `restarts`).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, Self

from hybridlab import paths

LAST = 5           # lines of what a process said before it ended
SAID = 16384       # bytes of them at most
GONE_S = 10.0      # until a killed process must have been reaped
LISTEN_S = 60.0    # until a process must have taken what it is told
LOOK_S = 1.0       # between two looks at whether the parent is still there
PR_SET_PDEATHSIG = 1

_leaving: list[Callable[[], object]] = []


def module(name: str, *arguments: object) -> list[str]:
    """The command `python -m name arguments`."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def tied(name: str, *arguments: object) -> list[str]:
    """The same for a module that imports for seconds: its process ends with its parent meanwhile too, see `started`."""
    return module("hybridlab.started", name, *arguments)


class Child:
    """A process that imports this package and belongs to no run, from its start to its end; a context manager.

    It inherits the open files `fds`; `stdout` is a file or PIPE; `environment` is added to ours. Its stdin is the line
    it lives on: what it is told comes there, and its end is that of the parent. Raises: OSError if it does not start.
    """

    def __init__(self, command: Sequence[str], fds: Iterable[int] = (), stdout: int | IO[Any] = subprocess.DEVNULL,
                 environment: Mapping[str, str] | None = None) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._line = threading.Lock()  # one thread may tell while another ends it
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=stdout, stderr=self._said,
                env=paths.importing() | dict(environment or {}), pass_fds=tuple(fds), start_new_session=True)
        except BaseException:
            self._said.close()
            raise
        self.pid, self._owner = self._process.pid, os.getpid()
        self.last: list[str] = []  # lines that it said, of a process that has ended
        self.words = ""

    @property
    def code(self) -> int | None:
        """The exit code of a process that is known to have ended."""
        return self._process.returncode

    @property
    def stdout(self) -> IO[bytes]:
        """What it says, of a process that was given a pipe for it."""
        assert self._process.stdout is not None
        return self._process.stdout

    def tell(self, line: bytes, within_s: float = LISTEN_S) -> None:
        """One line on its stdin. One that is gone hears nothing, which is for its end to explain. Raises: TimeoutError
        for one that does not listen."""
        assert self._process.stdin is not None
        with self._line:
            if self._process.stdin.closed:
                return
            stdin, left, deadline = self._process.stdin.fileno(), line + b"\n", time.monotonic() + within_s
            os.set_blocking(stdin, False)
            ready = select.poll()
            ready.register(stdin, select.POLLOUT)
            with suppress(BrokenPipeError):
                while left:
                    if not ready.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                        raise TimeoutError
                    left = left[os.write(stdin, left):]

    def running(self, wait_s: float = 0.0) -> bool:
        """Whether it still runs after at most `wait_s`."""
        if wait_s and self._process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
        return self._process.poll() is None

    def stopped(self) -> bool:
        """Whether somebody has stopped it, as Ctrl-Z does; one that a debugger holds is not."""
        import psutil  # here: as in `_end`

        with suppress(psutil.Error):
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        return False

    def interrupt(self, patience_s: float) -> None:
        """As Ctrl-C would, and wait for what it does then."""
        self._process.send_signal(signal.SIGINT)
        self.running(patience_s)

    def leave(self, patience_s: float) -> str:
        """As `end`, for one that leaves by itself when it is told nothing more."""
        if self._process.stdin is not None and os.getpid() == self._owner:
            self._process.stdin.close()
        return self.end(patience_s)

    def kill(self) -> None:
        """End it and all that it started, at once; `end` is still to be called."""
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            os.killpg(self.pid, signal.SIGKILL)

    def end(self, patience_s: float = 0.0) -> str:
        """Give it `patience_s` to leave by itself, then kill what is left of its session; returns its exit code and its
        last words. Doing so twice is fine."""
        if not self._said.closed and os.getpid() == self._owner:  # else a fork of the parent drops its copy
            self.running(patience_s)
            self.kill()
            self.running(GONE_S)
            with self._line:
                for pipe in filter(None, (self._process.stdin, self._process.stdout)):
                    pipe.close()
            self.words = self._ending()
            self._said.close()
        return self.words

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _ending(self) -> str:
        code = self._process.returncode
        size = os.fstat(self._said.fileno()).st_size
        text = os.pread(self._said.fileno(), SAID, max(0, size - SAID)).decode(errors="replace")
        self.last = [line.strip() for line in text.splitlines() if line.strip()][-LAST:]
        name = f" ({signal.Signals(-code).name})" if code is not None and code < 0 else ""
        how = f"process {self.pid} does not go" if code is None else f"exit code {code}{name}"
        return how + (f": {' | '.join(self.last)}" if self.last else "")


def end_with(parent: int, leaving: Callable[[], object] = lambda: None) -> None:
    """From now on this process ends, with all that it started, when its stdin does, or when its parent is another than
    `parent`; it calls `leaving` before. Called again, it has one more to call."""
    _leaving.append(leaving)
    if len(_leaving) > 1:
        return
    line = select.poll()
    line.register(0, 0)  # its end is told unasked, and what comes there is left for who reads it

    def watch() -> None:
        while os.getppid() == parent and not line.poll(LOOK_S * 1e3):
            pass
        try:
            for each in _leaving:
                each()
        finally:
            _end()

    threading.Thread(target=watch, name="hybridlab-line", daemon=True).start()


def _end() -> None:
    """At once, whatever other threads hold: what this process started, in other sessions too, its session, itself."""
    try:
        import psutil  # here: a process that is timed from its start has no use for it

        for below in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                below.kill()
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(1)


def die_with_parent() -> None:
    """Also when this process is stopped, or hangs in native code: the kernel ends it. Linux only.

    For a parent that started us from its main thread: the kernel takes the end of that thread for the parent's.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def asked(decode: Callable[[str], Any]) -> Any:
    """What the first line of stdin asks this process for; from now on it ends with its parent."""
    end_with(os.getppid())
    return decode(sys.stdin.readline())


def told(within_s: float) -> bool:
    """Whether a further line comes on stdin in time. It says no more than that it came."""
    line = select.poll()
    line.register(0, select.POLLIN)
    return bool(line.poll(within_s * 1e3)) and sys.stdin.readline() != ""


def channel() -> int:
    """What was stdout, where nothing else can write from now on: what a library prints goes to standard error."""
    found = os.dup(1)
    os.dup2(2, 1)
    return found
