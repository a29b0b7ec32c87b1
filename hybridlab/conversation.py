"""Asking a process of ours, line by line in JSON: one question, one answer, and its last words if it has died.

A `session` is no conversation: there one question has thousands of answers, taken by a thread as they come.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hybridlab import children
from hybridlab.errors import MeasureError

GRACE_S = 30.0  # for a process whose asker has gone, or that is told to end
DIED = "see its last words: often it ran out of memory, or a library does not fit"


class Conversation:
    """A process that answers, from its start to its end; a context manager.

    `command` runs a module that answers by `answering`; `environment` is added to ours.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._child, self._rest = children.Child(command, stdout=subprocess.PIPE, environment=environment), b""

    def ask(self, question: Any, within_s: float) -> Any:
        """The answer. Raises: MeasureError with the last words of a process that died or took longer, which is then
        ended."""
        if self._child.words:
            raise MeasureError("it died", self._child.words, DIED)
        try:
            return self._answer(json.dumps(question), within_s)
        except EOFError:
            raise MeasureError("it died", self._child.end(GRACE_S), DIED) from None
        except TimeoutError:
            raise MeasureError(f"it gave no answer within {within_s:g} s", self._child.end(), "see its last words, and "
                               "whether other work kept the machine busy") from None

    def only(self, question: str, within_s: float, what: str, remedy: str) -> Any:
        """The answer to the one question, a line of JSON, of a process that ends with it by itself.

        Raises: MeasureError if `what` fails, or takes longer, against which `remedy` helps.
        """
        try:
            answer = self._answer(question, within_s)
            words = self._child.end(GRACE_S)
        except EOFError:
            answer, words = None, self._child.end(GRACE_S)
        except TimeoutError:
            raise MeasureError(f"{what} took more than {within_s:g} s", self._child.end(), remedy) from None
        if answer is None or self._child.code:
            raise MeasureError(f"{what} failed", words, "see what the process said")
        return answer

    def close(self) -> str:
        """Let it end by itself, and end it if it does not; its exit code and its last words."""
        return self._child.leave(GRACE_S)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, question: str, within_s: float) -> Any:
        until = time.monotonic() + within_s
        self._child.tell(question.encode(), within_s)
        return json.loads(self._line(until))

    def _line(self, until: float) -> bytes:
        ready = select.poll()
        ready.register(self._child.stdout, select.POLLIN)
        while b"\n" not in self._rest:
            if not ready.poll(max(0.0, until - time.monotonic()) * 1e3):
                raise TimeoutError
            more = os.read(self._child.stdout.fileno(), 1 << 16)
            if not more:
                raise EOFError
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def answering(grace_s: float = GRACE_S) -> tuple[Iterator[dict[str, Any]], Callable[[Any], None]]:
    """In the process that is asked: its questions, and what answers one. Called before anything else.

    What a library prints goes to standard error from here on. Questions end when the asker has closed them or has gone;
    a process that is busy then, and stays so for `grace_s`, is ended with all that it started.
    """
    answers = os.fdopen(children.channel(), "w", encoding="utf-8")
    children.end_with(os.getppid(), lambda: time.sleep(grace_s))

    def answer(found: Any) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    return map(json.loads, sys.stdin), answer
