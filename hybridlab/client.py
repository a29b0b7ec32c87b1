"""An engine in a second process: `Client` has an engine's face, and a `worker` behind it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import cached_property
from typing import TYPE_CHECKING

from hybridlab.config import RuntimeConfig, Sampling
from hybridlab.counters import Counters
from hybridlab.frames import Build, Describe, Described, Done, Echo, Prepare, Ready, Seal, Settle
from hybridlab.handover import now_ns
from hybridlab.link import Link
from hybridlab.plan import Plan
from hybridlab.tokens import Seen, Step

if TYPE_CHECKING:
    from hybridlab.request import Request


class Client:
    """Has a worker build what `order` says, which is made once the worker watches over `folder`, see `Link`. `close`
    ends the worker, and so does dropping the last reference to this.

    `client_ms`: of the last request, by this process's clock, from the request leaving until its first id was here and
    then from one id to the next; `handover_ms`: from each id on the worker's host until it was here; `seen`: what the
    worker saw meanwhile.
    Raises: what building an engine raises, and what a `Link` raises.
    """

    def __init__(self, config: RuntimeConfig, order: Callable[[], Build], folder: str = "") -> None:
        self.config = config
        self.client_ms: list[float] = []
        self.handover_ms: list[float] = []
        self.seen: Seen | None = None
        self._device_ms: list[float] = []
        self.link = Link(folder, config.step_timeout_s)
        try:
            ready = self.link.ask(order(), config.work_timeout_s, "the model is not ready", Ready)
        except BaseException:
            self.link.close()
            raise
        self.device, self.dtype, self.max_len = ready.device, ready.dtype, ready.max_len
        self.buckets, self.fused = ready.buckets, ready.fused

    def serve(self, asked: Request) -> Generator[tuple[Step, float], None, None]:
        """The steps of one request with their milliseconds by the worker's clock. The worker gives them as fast as it
        can and the ring has room; the caller takes them."""
        self.client_ms, self.handover_ms, self._device_ms, self.seen = [], [], [], None
        before = now_ns()
        with self.link.request(ids=asked.ids, max_new_tokens=asked.max_new_tokens, sampling=asked.sampling,
                               stop=asked.stop):
            while not isinstance(found := self.link.token(), Done):
                given, way = found
                now = now_ns()
                self.client_ms.append((now - before) / 1e6)
                self.handover_ms.append((now - given.at_ns) / 1e6)
                before = now
                yield Step(given.id, way.path, way.reason), given.ms
            self._device_ms = found.device_ms
            self.seen = Seen(found.ended_ns, found.happenings, found.profiled)

    def device_ms(self, count: int) -> list[float]:
        """Of the last request's first `count` tokens, see `Output.device_ms`."""
        return self._device_ms[:count]

    def prepare(self, lengths: list[int], sampling: Sampling) -> None:
        """See `Engine.prepare`."""
        self.link.ask(Prepare(lengths=lengths, sampling=sampling), self.config.work_timeout_s, "captures are not done")

    @cached_property
    def plan(self) -> Plan:
        """See `Engine.plan`."""
        return Plan.from_json(self.link.ask(Describe(), self.config.work_timeout_s, "no plan came", Described).plan)

    @property
    def counters(self) -> Counters:
        """As of the worker's last token or answer."""
        return self.link.counters()[0]

    @property
    def capturing(self) -> bool:
        """As of the worker's last token or answer, whether a capture behind requests is asked for or under way."""
        return self.link.counters()[1]

    def settle(self) -> None:
        """See `Engine.settle`."""
        self.link.ask(Settle(), self.config.work_timeout_s, "captures are not done")

    def seal(self, closed: bool) -> None:
        """See `Engine.seal`. A worker that is gone captures nothing anyway."""
        if closed or self.link.there:
            self.link.ask(Seal(closed=closed), self.config.step_timeout_s, "no answer")

    def echo(self) -> None:
        """There and back, with nothing to do."""
        self.link.ask(Echo(), self.config.step_timeout_s, "no answer")

    def require_open(self) -> None:
        self.link.require_open()

    def close(self) -> None:
        """End the worker, within seconds, whatever it does; closing twice is fine."""
        self.link.close()
