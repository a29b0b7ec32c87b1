"""Asking a process of ours, line by line in JSON: one question, one answer, and its last words if it has died."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hybridlab import records, restarts
from hybridlab.errors import MeasureError

GRACE_S = 30.0  # for a process whose asker has gone, or that is told to end


class Conversation:
    """A process that answers, from its start to its end; a context manager. `said`: a file for what it says beside.

    `command` runs a module that answers by `answering`.
    """

    def __init__(self, command: Sequence[str], said: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != records.RUN_VARIABLE}
        self._stack, self._rest = ExitStack(), b""
        self._said = self._stack.enter_context(said.open("w+", encoding="utf-8", errors="replace"))
        self._child = self._stack.enter_context(
            restarts.child(list(command), self._said, environment, stdout=subprocess.PIPE))

    def ask(self, question: Mapping[str, Any], within_s: float) -> dict[str, Any]:
        """The answer. Raises: MeasureError with the last words of a process that died or took longer, which is then
        ended."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(question).encode() + b"\n")
            self._child.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(time.monotonic() + within_s))
        except (BrokenPipeError, EOFError):
            self._child.wait(GRACE_S)
            raise MeasureError("it died", restarts.last_words(self._child, self._said)) from None
        except TimeoutError:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            raise MeasureError(f"it gave no answer within {within_s:g} s",
                               restarts.last_words(self._child, self._said)) from None
        return answer

    def close(self) -> None:
        """Let it end by itself, and end it if it does not."""
        if self._child.poll() is None and self._child.stdin is not None:
            try:
                self._child.stdin.close()
                self._child.wait(GRACE_S)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                pass
        self._stack.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, until: float) -> bytes:
        assert self._child.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not ready.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                more = os.read(self._child.stdout.fileno(), 1 << 16)
                if not more:
                    raise EOFError
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def answering() -> tuple[Iterator[dict[str, Any]], Callable[[Mapping[str, Any]], None]]:
    """In the process that is asked: its questions, and what answers one. Called before anything else.

    What a library prints goes to standard error from here on. Questions end when the asker has closed them or has gone;
    a process that is busy then, and stays so, is ended with all that it started.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines = SimpleQueue[str | None]()

    def follow() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        time.sleep(GRACE_S)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    def answer(found: Mapping[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    threading.Thread(target=follow, daemon=True).start()
    return map(json.loads, iter(lines.get, None)), answer
