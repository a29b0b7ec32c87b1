"""The second process, `python -m hybridlab.worker`: hosts an engine for the `client` that started it.

Orders and answers go over an inherited socket (`frames`), token ids through inherited memory (`handover`). It runs
ahead of its client by what the ring of ids holds, and lives as long as its client does. What serving needs is imported
once this process is tied to its parent's life: that takes seconds.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from hybridlab import children
from hybridlab.errors import HybridlabError, ProtocolError
from hybridlab.frames import (
    Build,
    Channel,
    Describe,
    Described,
    Done,
    Echo,
    Failed,
    Frame,
    Leave,
    Order,
    Prepare,
    Ready,
    Seal,
    Serve,
    Settle,
    Way,
)
from hybridlab.handover import FULL_S, Handover

if TYPE_CHECKING:
    from hybridlab.engine import Engine


def main(arguments: Sequence[str]) -> int:
    """Serve until the client says so or is gone; returns the exit code.

    Arguments: the process that started this one, and whether its main thread did; the inherited descriptors of socket,
    memory and bell; a directory with a model, or nothing, which is removed once that is loaded or this process ends.
    """
    parent, main_thread, control, memory, bell = map(int, arguments[:5])
    folder = arguments[5]

    def discard() -> None:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def make(order: Build) -> Engine:
        try:
            return build(order)
        finally:
            discard()
            if main_thread:
                children.die_with_parent()  # from now on there is nothing to remove before

    children.end_with(parent, discard)
    with closing(Channel(socket.socket(fileno=control), Order)) as channel:
        try:
            with closing(Handover(memory, bell)) as handover:
                serve(channel, handover, make)
        except EOFError:
            return 0  # the client is gone
        except BaseException as error:  # what state this process is in is not known: it leaves
            traceback.print_exc()
            with suppress(OSError, EOFError):
                channel.send(failure(error, fatal=True), timeout_s=1.0)
            sys.stderr.flush()
            os._exit(1)  # a broken device may hang in what runs at the end of a process
    return 0


def serve(channel: Channel, handover: Handover, make: Callable[[Build], Engine]) -> None:
    """Carry out orders until Leave. Raises what ends the process: EOFError, ProtocolError, and every error that is none
    of hybridlab's."""
    first = channel.receive()
    if not isinstance(first, Build):
        raise ProtocolError(f"the first order is {type(first).__name__}", "", "it must be Build")
    with closing(make(first)) as engine:
        _Host(channel, handover, engine).run()
    handover.publish(engine.counters, False)


def build(order: Build) -> Engine:
    """The engine that is asked for, over a model of its own."""
    import torch

    from hybridlab import models
    from hybridlab.engine import Engine

    gc.freeze()  # what was imported stays, and need not be looked through again
    model = models.load(order.model, device=order.config.device, dtype=order.dtype)
    model.name_or_path = order.name
    if model.device.type == "cpu":
        torch.set_num_threads(order.threads)
    return Engine(model, order.config)


class _Host:
    """One engine and its client's orders."""

    def __init__(self, channel: Channel, handover: Handover, engine: Engine) -> None:
        self.channel, self.handover, self.engine = channel, handover, engine
        self.ways: dict[tuple[str, str], int] = {}
        self.actions: dict[type[Frame], Callable[[Any], Frame]] = {
            Serve: self._serve, Prepare: self._prepare, Settle: self._settle, Seal: self._seal,
            Describe: lambda order: Described(plan=engine.plan.to_json()), Echo: lambda order: Done()}

    def run(self) -> None:
        engine = self.engine
        self._answer(Ready(device=str(engine.device), dtype=str(engine.model.dtype).removeprefix("torch."),
                           max_len=engine.max_len, buckets=list(engine.buckets), fused=engine.fused))
        while not isinstance(order := self.channel.receive(), Leave):
            if type(order) not in self.actions:
                raise ProtocolError(f"{type(order).__name__} came after the first order", "", "nothing was done")
            gc.disable()  # between requests only
            try:
                answer = self.actions[type(order)](order)
            except ProtocolError:
                raise
            except HybridlabError as error:
                answer = failure(error)
            self._answer(answer)
            gc.enable()

    def _answer(self, answer: Frame) -> None:
        self.handover.publish(self.engine.counters, self.engine.capturing)
        self.channel.send(answer)

    def _serve(self, order: Serve) -> Done:
        from hybridlab import ranges, tails

        vocabulary, count = self.engine.model.config.vocab_size, 0
        if max(order.ids) >= vocabulary or len(order.ids) + order.max_new_tokens > self.engine.max_len:
            raise ProtocolError("a request does not fit the model", f"ids up to {max(order.ids)} of {vocabulary}, "
                                f"{len(order.ids)} and {order.max_new_tokens} tokens of {self.engine.max_len}",
                                "the client has to refuse it")
        ended = list[int]()
        with tails.Watch() as watch, closing(self.engine.serve(order)) as steps:
            for step, ms in steps:
                ended.append(watch.sample())
                way = self._way(step.path, step.reason)
                if not self._room(order.number):
                    break
                self.handover.publish(self.engine.counters, self.engine.capturing)
                self.handover.put(step.id, way, ms)
                count += 1
        return Done(tokens=count, device_ms=self.engine.device_ms(count), ended_ns=ended[:count],
                    happenings=watch.happenings(), profiled=ranges.listening())

    def _way(self, path: str, reason: str) -> int:
        if (path, reason) not in self.ways:
            self.channel.send(Way(path=path, reason=reason))
            self.ways[path, reason] = len(self.ways)
        return self.ways[path, reason]

    def _room(self, number: int) -> bool:
        """Waits until the client has taken enough; False if it wants no more."""
        while not self.handover.cancelled(number):
            if self.handover.room():
                return True
            time.sleep(FULL_S)
        return False

    def _prepare(self, order: Prepare) -> Done:
        self.engine.prepare(order.lengths, order.sampling)
        return Done()

    def _settle(self, order: Settle) -> Done:
        self.engine.settle()
        return Done()

    def _seal(self, order: Seal) -> Done:
        self.engine.seal(order.closed)
        return Done()


def failure(error: BaseException, fatal: bool = False) -> Failed:
    """An error as a frame."""
    if isinstance(error, HybridlabError):
        return Failed(kind=type(error).__name__, fact=error.fact, context=error.context, remedy=error.remedy,
                      fatal=fatal)
    return Failed(kind=type(error).__name__, fact=str(error)[:1000], fatal=fatal)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
