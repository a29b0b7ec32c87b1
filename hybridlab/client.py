"""An engine in a second process: `Client` has an engine's face and a `worker` behind it.

Whatever ends the worker is an event here: it is noticed while an answer is waited for, no answer is waited for without
a deadline, and every later call says the same again. The worker's end leaves no process, file or memory.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Generator
from contextlib import suppress
from functools import cached_property
from typing import Any, NoReturn

from hybridlab import children, errors
from hybridlab.config import Sampling
from hybridlab.counters import Counters
from hybridlab.engine import exclusive
from hybridlab.errors import HybridlabError, ProtocolError, RuntimeClosed, WorkerDied, WorkerTimeout
from hybridlab.frames import (
    Answer,
    Build,
    Channel,
    Describe,
    Described,
    Done,
    Echo,
    Failed,
    Frame,
    Leave,
    Prepare,
    Ready,
    Seal,
    Serve,
    Settle,
    Way,
)
from hybridlab.handover import Given, Handover, now_ns, pair
from hybridlab.plan import Plan
from hybridlab.request import Request
from hybridlab.tokens import Step

LOOK_S = 0.25    # between two looks at the process: a child of its may hold its socket open
LEAVE_S = 5.0    # for a worker to leave by itself
REMEDY = "make a new Runtime"
MODULE = "hybridlab.worker"
KNOWN = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, HybridlabError)}


class Client:
    """Starts a worker and has it build what `order` says. `close` ends it, and so does dropping the last reference.

    `client_ms`: of the last request, by this process's clock, from the request leaving until its first id was here and
    then from one id to the next; `handover_ms`: from each id on the worker's host until it was here.
    Raises: what building an engine raises; WorkerDied; WorkerTimeout, after `config.work_timeout_s`.
    """

    def __init__(self, order: Build) -> None:
        self.config, self.closed = order.config, False
        self.client_ms: list[float] = []
        self.handover_ms: list[float] = []
        self._device_ms: list[float] = []
        self._busy = threading.Lock()
        self._dead: HybridlabError | None = None
        self._ways: list[Way] = []
        self._answer: Frame | None = None
        self._requests = 0
        self._last = Counters(), False
        self._start()
        try:
            ready = self._ask(order, self.config.work_timeout_s, "the model is not ready")
        except BaseException:
            self.close()
            raise
        self.device, self.dtype, self.max_len = ready.device, ready.dtype, ready.max_len
        self.buckets, self.fused = ready.buckets, ready.fused

    def _start(self) -> None:
        handover, (memory, bell) = pair()
        ours, theirs = socket.socketpair()
        main_thread = threading.current_thread() is threading.main_thread()
        try:
            self._child = children.Child(MODULE, os.getpid(), int(main_thread), theirs.fileno(), memory, bell,
                                         fds=(theirs.fileno(), memory, bell), HF_HUB_OFFLINE="1")
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

    # --- what an engine does

    def serve(self, asked: Request) -> Generator[tuple[Step, float], None, None]:
        """The steps of one request with their milliseconds by the worker's clock. The worker gives them as fast as it
        can; the caller takes them."""
        with exclusive(self._busy):
            self._require_alive()
            self._requests += 1
            self.client_ms, self.handover_ms, self._device_ms = [], [], []
            over, before = False, now_ns()
            self._say(Serve(number=self._requests, ids=asked.ids, max_new_tokens=asked.max_new_tokens,
                            sampling=asked.sampling, stop=sorted(asked.stop)))
            try:
                while (given := self._next()) is not None:
                    now = now_ns()
                    self.client_ms.append((now - before) / 1e6)
                    self.handover_ms.append((now - given.at_ns) / 1e6)
                    before, way = now, self._ways[given.way]
                    yield Step(given.id, way.path, way.reason), given.ms
                    self.require_open()
                over = True
            finally:
                if not over and not self.closed and self._dead is None:
                    self._abandon()
                if self.closed:
                    self._release()

    def device_ms(self, count: int) -> list[float]:
        """Of the last request's first `count` tokens, see `Output.device_ms`."""
        return self._device_ms[:count]

    def prepare(self, lengths: list[int], sampling: Sampling) -> None:
        """As an engine's, length by length: each may take as long as work may."""
        for length in lengths[::-1] or [[]]:
            self._ask(Prepare(lengths=[length] if length else [], sampling=sampling), self.config.work_timeout_s,
                      "captures are not done")

    @cached_property
    def plan(self) -> Plan:
        """See `Engine.plan`."""
        answer = self._ask(Describe(), self.config.work_timeout_s, "no plan came", Described)
        return Plan.from_json(answer.plan)

    @property
    def counters(self) -> Counters:
        """As of the worker's last token or answer."""
        return self._seen()[0]

    @property
    def capturing(self) -> bool:
        """As of the worker's last token or answer, whether a capture behind requests is asked for or under way."""
        return self._seen()[1]

    def settle(self) -> None:
        """See `Engine.settle`."""
        self._ask(Settle(), self.config.work_timeout_s, "captures are not done")

    def seal(self, closed: bool) -> None:
        """See `Engine.seal`; a worker that is gone captures nothing anyway."""
        if not closed and (self.closed or self._dead is not None):
            return
        self._ask(Seal(closed=closed), self.config.step_timeout_s, "no answer")

    def echo(self) -> None:
        """There and back."""
        self._ask(Echo(), self.config.step_timeout_s, "no answer")

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
        self._last = self._handover.counters()
        if self._busy.acquire(blocking=False):  # else the request that has it lets go of what it waits on
            self._release()
            self._busy.release()

    # --- talking

    def _ask(self, order: Frame, timeout_s: float, late: str, expected: type[Frame] | None = None) -> Any:
        with exclusive(self._busy):
            self._require_alive()
            self._say(order)
            deadline = time.monotonic() + timeout_s
            while self._answer is None:
                self._wait(deadline, timeout_s, late)
            return self._final(expected or (Ready if isinstance(order, Build) else Done))

    def _say(self, order: Frame) -> None:
        self._answer = None
        try:
            self._channel.send(order, self.config.step_timeout_s)
        except EOFError:
            self._died()
        except TimeoutError:
            self._late("it does not listen", self.config.step_timeout_s)

    def _next(self) -> Given | None:
        """The next token; None when the request is over."""
        timeout_s = self.config.step_timeout_s
        deadline = time.monotonic() + timeout_s
        while not (self._handover.rung > self._handover.taken or self._handover.listen()):
            if self._answer is not None:
                done = self._final(Done)
                self._device_ms = done.device_ms
                if done.tokens != len(self.client_ms):
                    self._untrusted(ProtocolError(f"{done.tokens} tokens were announced",
                                                  f"{len(self.client_ms)} came", REMEDY))
                return None
            self._wait(deadline, timeout_s, "no token came")
        try:
            given = self._handover.take()
        except ProtocolError as error:
            self._untrusted(error)
        while given.way >= len(self._ways):
            if self._answer is not None:
                self._untrusted(ProtocolError(f"way {given.way} is not known", f"of {len(self._ways)}", REMEDY))
            self._wait(deadline, timeout_s, "the path of a token did not come")
        return given

    def _wait(self, deadline: float, timeout_s: float, late: str) -> None:
        """Until there is something from the worker, or for `LOOK_S`."""
        self.require_open()
        left = deadline - time.monotonic()
        if left <= 0:
            self._late(late, timeout_s)
        found = dict(self._poll.poll(1e3 * min(LOOK_S, left)))
        if self._channel.fileno() in found:
            self._hear(timeout_s, late)
        elif not found and not self._child.running():
            self._died()

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
            self._answer = frame

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

    def _abandon(self) -> None:
        """Ends a request whose tokens nobody wants; what goes wrong is kept for the next call."""
        self._handover.cancel(self._requests)
        timeout_s = self.config.step_timeout_s
        deadline = time.monotonic() + timeout_s
        with suppress(HybridlabError):
            while self._answer is None:
                self._handover.drop(self._handover.listen())
                self._wait(deadline, timeout_s, "a request that was abandoned does not end")
        self._handover.drop(self._handover.listen())
        self._answer = None

    def _seen(self) -> tuple[Counters, bool]:
        return self._last if self.closed else self._handover.counters()

    # --- endings

    def _require_alive(self) -> None:
        self.require_open()
        if self._dead is not None:
            raise type(self._dead)(self._dead.fact, self._dead.context, self._dead.remedy)

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


def _release(child: children.Child, channel: Channel, handover: Handover) -> None:
    child.end()
    channel.close()
    handover.close()
