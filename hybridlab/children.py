"""Processes of our own code: in a session of their own, none of it left behind, ended with their parent."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

LAST = 5           # lines of what a process said before it ended
SAID = 16384       # bytes of them at most
GONE_S = 10.0      # until a killed process must have been reaped
LOOK_S = 1.0       # between two looks at whether the parent is still there
PR_SET_PDEATHSIG = 1


class Child:
    """`python -m module arguments`, of the same package as this process, with `fds` inherited.

    Its stdin is the line it lives on: nothing is written there, and its end is the end of the parent.
    """

    def __init__(self, module: str, *arguments: object, fds: Iterable[int] = (), **environment: str) -> None:
        package = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=self._said, env=os.environ | {"PYTHONPATH": path} | environment, pass_fds=tuple(fds),
            start_new_session=True)
        self.pid, self._owner = self._process.pid, os.getpid()
        self.words = ""

    def running(self, wait_s: float = 0.0) -> bool:
        """Whether it still runs after at most `wait_s`."""
        if wait_s and self._process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
        return self._process.poll() is None

    def end(self, patience_s: float = 0.0) -> str:
        """Give it `patience_s` to leave by itself, then kill what is left of its session; returns its exit code and its
        last words. Doing so twice is fine."""
        if not self._said.closed and os.getpid() == self._owner:  # else a fork of the parent drops its copy
            self.running(patience_s)
            with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
                os.killpg(self.pid, signal.SIGKILL)
            self.running(GONE_S)
            if self._process.stdin is not None:
                self._process.stdin.close()
            self.words = self._ending()
            self._said.close()
        return self.words

    def _ending(self) -> str:
        code = self._process.returncode
        size = os.fstat(self._said.fileno()).st_size
        text = os.pread(self._said.fileno(), SAID, max(0, size - SAID)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()][-LAST:]
        name = f" ({signal.Signals(-code).name})" if code is not None and code < 0 else ""
        how = f"process {self.pid} does not go" if code is None else f"exit code {code}{name}"
        return how + (f": {' | '.join(lines)}" if lines else "")


def end_with(parent: int, leaving: Callable[[], object] = lambda: None) -> None:
    """From now on this process ends when its stdin does, or when its parent is another than `parent`; it calls
    `leaving` before."""
    line = select.poll()
    line.register(0, select.POLLIN | select.POLLHUP)

    def watch() -> None:
        while os.getppid() == parent:
            if line.poll(LOOK_S * 1e3) and not os.read(0, 1):
                break
        try:
            leaving()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # at once, whatever the other threads hold

    threading.Thread(target=watch, name="hybridlab-line", daemon=True).start()


def die_with_parent() -> None:
    """Also when this process is stopped, or hangs in native code: the kernel ends it. Linux only.

    For a parent that started us from its main thread: the kernel takes the end of that thread for the parent's.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
