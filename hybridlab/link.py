"""A worker process as its client talks to it: orders and answers, tokens, and every way in which it can end.

Whatever ends a worker is an event here: it is noticed while something is waited for, nothing is waited for without a
deadline, and every later call says the same again. The end leaves no process, file or memory.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from hybridlab import children, errors
from hybridlab.counters import Counters
from hybridlab.errors import EngineBusy, HybridlabError, ProtocolError, RuntimeClosed, WorkerDied, WorkerTimeout
from hybridlab.frames import Answer, Channel, Done, Failed, Frame, Leave, Serve, Way
from hybridlab.handover import Given, Handover, pair

LOOK_S = 0.25    # between two looks at the process: a child of its may hold its socket open
STOPPED_S = 2.0  # that a worker may rest which somebody stopped; a long step looks otherwise, and has its own limit
LEAVE_S = 5.0    # for a worker to leave by itself
REMEDY = "make a new Runtime"
MODULE = "hybridlab.worker"
KNOWN = {name: kind for name, kind in vars(errors).items()
         if isinstance(kind, type) and issubclass(kind, HybridlabError)}


class Link:
    """Starts a worker, which removes `folder` once its model is loaded, or when this process is gone.

    One order at a time. A worker that does not answer in time, or not as agreed, is ended. Raises: WorkerDied,
    WorkerTimeout or ProtocolError, from then on each time; RuntimeClosed; and what the worker says went wrong.
    """

    def __init__(self, folder: str, step_timeout_s: float) -> None:
        self.closed = False
        self.step_timeout_s = step_timeout_s
        self._busy = threading.Lock()
        self._dead: HybridlabError | None = None
        self._ways: list[Way] = []
        self._answer: Frame | None = None
        self._owed = False  # an answer
        self._requests = self._before = self._looks = 0
        self._last = Counters(), False
        self._start(folder)

    def _start(self, folder: str) -> None:
        handover, (memory, bell) = pair()
        ours, theirs = socket.socketpair()
        main_thread = threading.current_thread() is threading.main_thread()
        try:
            command = children.module(MODULE, os.getpid(), int(main_thread), theirs.fileno(), memory, bell, folder)
            self._child = children.Child(command, (theirs.fileno(), memory, bell),
                                         environment={"HF_HUB_OFFLINE": "1"})
        except BaseException:
            ours.close()
            handover.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
            os.close(bell)
        self.pid = self._child.pid
        self._handover, self._channel = handover, Channel(ours, Answer)
        self._poll = select.poll()
        for end in (self._handover, self._channel):
            self._poll.register(end, select.POLLIN)
        self._release = weakref.finalize(self, _release, self._child, self._channel, self._handover)

    # --- orders

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Exclusive use of a worker that is there; raises `EngineBusy` where another request has it."""
        with exclusive(self._busy):
            self.require_open()
            if self._dead is not None:
                raise type(self._dead)(self._dead.fact, self._dead.context, self._dead.remedy)
            if self._owed:  # to one who was interrupted
                self._abandon(10 * self.step_timeout_s)
            try:
                yield
            finally:
                if self.closed:
                    self._release()

    def ask(self, order: Frame, timeout_s: float, late: str, expected: type[Frame] = Done) -> Any:
        """The answer to an order, within `timeout_s`; `late`: what to say else."""
        with self.owned():
            self._say(order)
            deadline = time.monotonic() + timeout_s
            while self._owed:
                self._wait(deadline, timeout_s, late)
            return self._final(expected)

    @contextmanager
    def request(self, **asked: Any) -> Iterator[None]:
        """A block in which `token` gives the tokens of one request; leaving it early ends the request."""
        with self.owned():
            self._requests, self._before = self._requests + 1, self._handover.taken
            self._say(Serve(number=self._requests, **asked))
            try:
                yield
            finally:
                if self._owed and not self.closed and self._dead is None:
                    with suppress(HybridlabError):  # kept for the next call
                        self._abandon(self.step_timeout_s)

    def token(self) -> tuple[Given, Way] | Done:
        """The next token of the request and the way it took, or what ends the request."""
        self.require_open()
        deadline = time.monotonic() + self.step_timeout_s
        while not (self._handover.rung > self._handover.taken or self._handover.listen()):
            if not self._owed:
                return self._over()
            self._wait(deadline, self.step_timeout_s, "no token came", tokens_first=True)
        try:
            given = self._handover.take()
        except ProtocolError as error:
            self._untrusted(error)
        while given.way >= len(self._ways):
            if not self._owed:
                self._untrusted(ProtocolError(f"way {given.way} is not known", f"of {len(self._ways)}", REMEDY))
            self._wait(deadline, self.step_timeout_s, "the way of a token did not come")
        return given, self._ways[given.way]

    def _over(self) -> Done:
        done: Done = self._final(Done)
        came = self._handover.taken - self._before
        if done.tokens != came:
            self._untrusted(ProtocolError(f"{done.tokens} tokens were announced", f"{came} came", REMEDY))
        return done

    def counters(self) -> tuple[Counters, bool]:
        """As of the worker's last token or answer; and whether a capture was asked for or under way."""
        return self._last if self.closed else self._handover.counters()

    def _say(self, order: Frame) -> None:
        self._owed = True
        try:
            self._channel.send(order, self.step_timeout_s)
        except EOFError:
            self._died()
        except TimeoutError:
            self._late("it does not listen", self.step_timeout_s)

    def _wait(self, deadline: float, timeout_s: float, late: str, tokens_first: bool = False) -> None:
        """Until there is something from the worker, or for `LOOK_S`. `tokens_first`: tokens that are there are taken
        before its words are heard, which may be its last."""
        self.require_open()
        left = deadline - time.monotonic()
        if left <= 0:
            self._late(late, timeout_s)
        found = dict(self._poll.poll(1e3 * min(LOOK_S, left)))
        if tokens_first and found.get(self._handover.fileno(), 0) & select.POLLIN:
            return
        if self._channel.fileno() in found:
            self._hear(timeout_s, late)
        elif not found:
            self._look()

    def _look(self) -> None:
        """At a worker of which nothing was heard for `LOOK_S`. One that is stopped says nothing however long it is
        waited for; looks are counted, as this process may have been stopped with it."""
        if not self._child.running():
            self._died()
        self._looks = self._looks + 1 if self._child.stopped() else 0
        if self._looks * LOOK_S >= STOPPED_S:
            self._late("somebody stopped it (SIGSTOP) and nobody lets it go on", STOPPED_S)

    def _hear(self, timeout_s: float, late: str) -> None:
        try:
            frame = self._channel.receive(timeout_s)
        except EOFError:
            self._died()
        except TimeoutError:
            self._late(late, timeout_s)
        except ProtocolError as error:
            if not self._child.running(LOOK_S):  # it was ended while it spoke
                self._died()
            self._untrusted(error)
        if isinstance(frame, Way):
            self._ways.append(frame)
        else:
            self._handover.listen()  # every token was put before
            self._answer, self._owed = frame, False

    def _final(self, expected: type[Frame]) -> Any:
        answer, self._answer = self._answer, None
        if isinstance(answer, Failed):
            kind = KNOWN.get(answer.kind)
            if kind is None:
                self._died(f"{answer.kind}: {answer.fact}; ")
            error = kind(answer.fact, answer.context, answer.remedy)
            if answer.fatal:
                self._untrusted(error)
            raise error
        if not isinstance(answer, expected):
            self._untrusted(ProtocolError(f"{type(answer).__name__} came", f"{expected.__name__} was expected", REMEDY))
        return answer

    def _abandon(self, timeout_s: float) -> None:
        """Ends what nobody waits for any more."""
        self._handover.cancel(self._requests)
        deadline = time.monotonic() + timeout_s
        while self._owed:
            self._handover.drop(self._handover.listen())
            self._wait(deadline, timeout_s, "what was abandoned does not end")
        self._handover.drop(self._handover.listen())
        self._answer = None

    # --- endings

    def _died(self, said: str = "") -> NoReturn:
        self._end(lambda how: WorkerDied("the worker died", f"{said}{how}", REMEDY), LOOK_S)

    def _late(self, what: str, timeout_s: float) -> NoReturn:
        self._end(lambda how: WorkerTimeout(f"the worker did not answer within {timeout_s:g} s",
                                            f"{what}; it was ended, {how}", f"{REMEDY}, or allow it more time"))

    def _untrusted(self, error: HybridlabError) -> NoReturn:
        self._end(lambda how: error)

    def _end(self, error: Any, patience_s: float = 0.0) -> NoReturn:
        self._dead = error(self._child.end(patience_s))
        raise self._dead

    @property
    def there(self) -> bool:
        """Whether orders can be given."""
        return not self.closed and self._dead is None

    def require_open(self) -> None:
        if self.closed:
            raise RuntimeClosed("this runtime was closed", "", "make a new Runtime")

    def close(self) -> None:
        """End the worker, within seconds, whatever it does."""
        if self.closed:
            return
        self.closed = True
        self._handover.cancel(self._requests)
        if self._dead is None and self._child.running():
            with suppress(EOFError, OSError, ProtocolError):
                self._channel.send(Leave(), timeout_s=1.0)
                self._child.running(LEAVE_S)
        self._child.end()
        self._last = self._handover.counters()
        if self._busy.acquire(blocking=False):  # else the request that has it lets go of what it waits on
            self._release()
            self._busy.release()


@contextmanager
def exclusive(lock: threading.Lock) -> Iterator[None]:
    """Holds `lock`; raises `EngineBusy` where it is held."""
    if not lock.acquire(blocking=False):
        raise EngineBusy("this runtime is serving another request", "a runtime serves one at a time",
                         "finish or close the other stream first, or make another Runtime")
    try:
        yield
    finally:
        lock.release()


def _release(child: children.Child, channel: Channel, handover: Handover) -> None:
    child.end()
    channel.close()
    handover.close()
