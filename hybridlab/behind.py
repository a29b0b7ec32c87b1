"""Captures that stay behind the requests which asked for them, in one of three ways.

`AfterRequest` captures once the request is over. `OnThread` captures on a second thread and stream while requests are
served, and `Cooperative` on the owner's thread, module by module, while the host waits for a token. The last two
capture what has run already and is one graph; a graph in pieces, which runs while it is captured, and one that a
disturbance from outside has ended, are captured after the request.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from hybridlab.cache import GraphCache, Job
from hybridlab.errors import CaptureFailed
from hybridlab.graphs import Graph

PATIENCE_S = 120.0  # for captures on the thread; the largest model takes well under a second for one


class AfterRequest:
    """Captures what was asked for once the request is over; and the base of the other ways."""

    def __init__(self, cache: GraphCache) -> None:
        self.cache = cache
        self._asked: set[Hashable] = set()
        self._later: deque[Job] = deque()

    @property
    def busy(self) -> bool:
        """Whether a capture is asked for or under way."""
        return bool(self._asked)

    def ask(self, job: Job, has_run: bool = True) -> None:
        """Have `job` captured, once however often it is asked for. `has_run`: this very program ran before."""
        if job.key not in self._asked:
            self._asked.add(job.key)
            if has_run and job.cut is None:
                self._accept(job)
            else:
                self._later.append(job)

    def step(self, waiting: Callable[[], bool]) -> None:
        """Called between a step's launch and the reading of its token: `waiting` says whether it is still to come."""

    def idle(self) -> None:
        """Called when a request is over."""
        while self._later:
            job = self._later.popleft()
            self._asked.discard(job.key)
            try:
                self.cache.capture(job)
            except CaptureFailed:
                continue  # the cache keeps the reason

    def settle(self) -> None:
        """Return when all that was asked for is in the cache or has failed."""
        self.idle()

    def close(self) -> None:
        """Give up what was asked for."""
        self._later.clear()
        self._asked.clear()

    def _accept(self, job: Job) -> None:
        self._later.append(job)

    def _adopt(self, job: Job, graph: Graph, ms: float) -> None:
        self._asked.discard(job.key)
        try:
            self.cache.adopt(job, graph, ms)
        except CaptureFailed:
            return  # in making room for it; the cache keeps the reason


class _Made(NamedTuple):
    job: Job
    graph: Graph | None
    ms: float


class OnThread(AfterRequest):
    """Captures on a thread and a stream of its own. Graphs enter the cache on the owner's thread, between steps."""

    def __init__(self, cache: GraphCache) -> None:
        super().__init__(cache)
        self._orders: queue.SimpleQueue[tuple[Job, int] | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[_Made] = queue.SimpleQueue()
        self._under_way = 0
        self._end: weakref.finalize[..., OnThread] | None = None  # of the thread, if it runs

    def step(self, waiting: Callable[[], bool]) -> None:
        while self._under_way:
            try:
                self._take(self._made.get_nowait())
            except queue.Empty:
                return

    def idle(self) -> None:
        self.step(lambda: False)
        super().idle()

    def settle(self) -> None:
        """Raises `CaptureFailed` after two minutes without a result: the thread hangs then."""
        while self._under_way:
            try:
                self._take(self._made.get(timeout=PATIENCE_S))
            except queue.Empty:
                raise CaptureFailed("a capture on the thread does not end", f"after {PATIENCE_S:g} s",
                                    "choose behind='request', and report this") from None
        super().idle()

    def close(self) -> None:
        super().close()
        if self._end is not None:
            self._end()
            self._end = None
        while self._under_way:
            try:
                made = self._made.get(timeout=PATIENCE_S)
            except queue.Empty:  # the thread hangs, and is a daemon: what it holds goes with the process
                return
            self._under_way -= 1
            if made.graph is not None:
                made.graph.reset()

    def _accept(self, job: Job) -> None:
        if self._end is None:
            thread = threading.Thread(target=self._work, name="hybridlab-capture", daemon=True)
            thread.start()
            # Python ends a daemon in the middle of what it does, and CUDA then ends the process by a signal.
            self._end = weakref.finalize(self, _finish, thread, self._orders)
        self._under_way += 1
        self._orders.put((job, torch.get_num_threads()))

    def _take(self, made: _Made) -> None:
        self._under_way -= 1
        if made.graph is not None:
            self._adopt(made.job, made.graph, made.ms)
        else:
            self._later.append(made.job)

    def _work(self) -> None:
        if self.cache.device.type == "cuda":
            torch.cuda.set_device(self.cache.device)
        with torch.no_grad():
            while (order := self._orders.get()) is not None:
                job, threads = order
                if torch.get_num_threads() != threads:  # CPU kernels are compiled for a number of threads
                    torch.set_num_threads(threads)
                try:
                    made = _Made(job, *self.cache.record(job))
                except Exception:  # whatever ended it: it is tried once more after the request, which tells the reason
                    made = _Made(job, None, 0.0)
                self._made.put(made)


def _finish(thread: threading.Thread, orders: queue.SimpleQueue[Any]) -> None:
    """Ends the thread once it has done what was ordered."""
    orders.put(None)
    thread.join(PATIENCE_S)


class Cooperative(AfterRequest):
    """Captures on the owner's thread while the host waits for a token, and stops before the next module once it is
    there. At least one module a step, so that a capture ends also where the host never waits. What is left when the
    request is over is done then."""

    def __init__(self, cache: GraphCache) -> None:
        super().__init__(cache)
        self._jobs: deque[Job] = deque()
        self._capture: _Slices | None = None

    def step(self, waiting: Callable[[], bool]) -> None:
        while self._capture or self._jobs:
            if self._capture is None:
                self._capture = _Slices(self.cache, self._jobs.popleft())
            if self._capture.go_on(waiting):
                done, self._capture = self._capture, None
                if done.graph is not None:
                    self._adopt(done.job, done.graph, done.ms)
                else:
                    self._later.append(done.job)
            if not waiting():
                return

    def idle(self) -> None:
        self.step(lambda: True)
        super().idle()

    def close(self) -> None:
        super().close()
        self._jobs.clear()
        if self._capture is not None:
            self._capture.abandon()
            self._capture = None

    def _accept(self, job: Job) -> None:
        self._jobs.append(job)


class _Slices:
    """One capture as a coroutine that pauses before a module."""

    def __init__(self, cache: GraphCache, job: Job) -> None:
        self.job, self.cache = job, cache
        self.graph: Graph | None = None
        self.ms = 0.0
        self._waiting: Callable[[], bool] = lambda: True
        self._task = greenlet(self._run)

    def go_on(self, waiting: Callable[[], bool]) -> bool:
        """Capture on while `waiting()`; True when the capture is over."""
        self._waiting = waiting
        start = time.perf_counter()
        self._task.parent = getcurrent()
        with _apart():
            self._task.switch()
        self.ms += (time.perf_counter() - start) * 1e3
        return bool(self._task.dead)

    def abandon(self) -> None:
        """End the capture; whatever it held is given back."""
        self._task.parent = getcurrent()
        with _apart():
            self._task.throw(GreenletExit)
        if self.graph is not None:
            self.graph.reset()

    def _run(self) -> None:
        hook = register_module_forward_pre_hook(self._pause)  # of all modules: a part of what runs here is enough
        try:
            # Relaxed, as the thread goes on launching and waiting between two slices; these touch no capture.
            self.graph, _ = self.cache.record(self.job, mode="relaxed")
        except Exception:  # as in OnThread: tried once more after the request
            self.graph = None
        finally:
            hook.remove()

    def _pause(self, *_: object) -> None:
        if getcurrent() is self._task and not self._waiting():
            with _apart():
                self._task.parent.switch()


@contextmanager
def _apart() -> Iterator[None]:
    """What PyTorch keeps for the thread is afterwards as it was, whatever another coroutine made of it meanwhile."""
    grad = torch.is_grad_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    with _disable_current_modes():
        yield
    torch.set_grad_enabled(grad)
    if stream is not None:
        torch.cuda.set_stream(stream)


WAYS: dict[str, type[AfterRequest]] = {"request": AfterRequest, "thread": OnThread, "cooperative": Cooperative}


def way(name: str, device: torch.device) -> type[AfterRequest]:
    """The way of that name. "auto": on the thread where a GPU works meanwhile; on a CPU, whose cores and whose Python
    lock a thread would take from the request, after it."""
    return WAYS["thread" if device.type == "cuda" else "request"] if name == "auto" else WAYS[name]
