"""The protocol of a request stream: one pass over it in order, one request at a time, a row an interval."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridlab import tails
from hybridlab.errors import MeasureError, RunError
from hybridlab.measure import explained, frozen_heap, quiet_collector
from hybridlab.workload import Asked

if TYPE_CHECKING:
    from hybridlab.runtime import Runtime
    from hybridlab.telemetry import Telemetry
    from hybridlab.tokens import Token

Row = dict[str, Any]
HAPPENED = ("hits", "misses", "captures", "evictions", "failures", "capture_ms")  # in an interval
HELD = ("graphs", "graph_bytes")                                                  # at its end


class Served(NamedTuple):
    """One request's rows and its new token ids."""

    rows: list[Row]
    ids: list[int]


class Proof:
    """That a request has the same tokens whoever answers it: every setting, in every round, and arm eager.

    Only in float32 (`exact`): in half precision a near-tie may fall either way.
    """

    def __init__(self, requests: Sequence[Asked], exact: bool) -> None:
        self.requests, self.exact = requests, exact
        self._first: dict[int, tuple[str, list[int]]] = {}

    @property
    def count(self) -> int:
        """Requests whose tokens were compared."""
        return len(self._first)

    def few(self) -> list[int]:
        """Requests to compare with a slow reference: of the shortest, a middle and the longest prompt."""
        order = sorted(range(len(self.requests)), key=lambda number: self.requests[number].prompt_tokens)
        return sorted({order[0], order[len(order) // 2], order[-1]}) if self.exact else []

    def require_equal(self, request: int, who: str, ids: list[int]) -> None:
        """Raises: RunError if `who` has other tokens for this request than whoever answered it first."""
        if not self.exact:
            return
        first, known = self._first.setdefault(request, (who, ids))
        if ids != known:
            raise RunError(f"tokens of request {request} with {who} differ from those with {first}",
                           f"prompt of {self.requests[request].prompt_tokens} tokens",
                           "report this: their times compare nothing")


class Meter:
    """What a runtime's counters say of the intervals between two readings, with next to nothing done at a reading.

    The first interval begins where the counters began: what a runtime did while it was built belongs to it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._last: tuple[float, ...] = (0,) * len(HAPPENED)
        self._capturing = False

    def read(self) -> tuple[Any, ...]:
        """All counters and whether a capture behind is under way, now."""
        counters = self.runtime.counters
        return tuple([getattr(counters, name) for name in (*HAPPENED, *HELD)]), self.runtime.capturing

    def columns(self, reading: tuple[Any, ...]) -> Row:
        """The counters' columns of the interval from the reading given last to this one."""
        numbers, capturing = reading
        happened = [now - before for now, before in zip(numbers[:len(HAPPENED)], self._last, strict=True)]
        row = dict(zip((*HAPPENED, *HELD), (*happened, *numbers[len(HAPPENED):]), strict=True))
        row["capture_ms"] = max(0.0, float(row["capture_ms"]))
        row["capturing"] = bool(capturing or self._capturing)
        self._last, self._capturing = numbers[:len(HAPPENED)], capturing
        return row


def serve(runtime: Runtime, requests: Sequence[Asked], prompts: Mapping[int, list[int]], *, setting: str = "default",
          round_: int = 0, built_ms: float = 0.0, pause_ms: float = 0.0,
          telemetry: Telemetry | None = None) -> Iterator[Served]:
    """Serves the requests once, greedily and never stopping early; yields each one as it is done.

    A closed loop: a request begins when the runtime is free and `pause_ms` have passed. Inside the clock, which is the
    runtime's own: token ids on the host to the first new id on the host ("ttft"), from each id to the next ("itl"),
    and from the last id until the runtime is free ("after"), where captures after the request lie. Outside: the
    pause, decoding to text, garbage collection (done before each request, off during it), and making rows. Counters
    are read between tokens; what a pause changed counts in the "ttft" that follows. Each interval of a request says
    what happened in it, see `tails.KINDS`; clocks are read between requests.

    A pass is framed by a row "start" (`built_ms`, and what building the runtime captured) and a row "settle", until
    every capture behind is done; neither belongs to a request. Rows are those of `schemas.CACHE` without `run_id`.
    Raises: MeasureError when a request gets fewer or more tokens than it asked for.
    """
    common = {"part": "stream", "round": round_, "setting": setting}
    none = {"request": None, "prompt_tokens": 0, "bucket": None, "index": -1, "path": "", "reason": "",
            "ended_ns": None, "happened": None, "happened_ms": None}
    meter = Meter(runtime)
    yield Served([common | none | {"metric": "start", "ms": built_ms} | meter.columns(meter.read())], [])
    with frozen_heap(), tails.Watch() as watch:
        for number, asked in enumerate(requests):
            if number and pause_ms:
                time.sleep(pause_ms / 1e3)
            with quiet_collector():
                watch.sample()
                tokens, readings, ended, after_ms = _request(runtime, prompts[asked.prompt_tokens], asked.new_tokens,
                                                             meter, watch)
            own = common | {"request": number, "prompt_tokens": asked.prompt_tokens,
                            "bucket": runtime.bucket_for(asked.prompt_tokens)}
            rows = [own | {"index": index, "metric": "itl" if index else "ttft", "ms": token.ms, "path": token.path,
                           "reason": token.reason or "", "ended_ns": ended[index]} | meter.columns(readings[index])
                    for index, token in enumerate(tokens)]
            rows.append(own | {"index": -1, "metric": "after", "ms": after_ms, "path": "", "reason": "",
                               "ended_ns": ended[-1]} | meter.columns(readings[-1]))
            if telemetry is not None:
                telemetry.sample()
            yield Served(explained(rows, watch, telemetry), [token.id for token in tokens])
    start = time.perf_counter_ns()
    runtime.settle()
    ms = (time.perf_counter_ns() - start) / 1e6
    yield Served([common | none | {"metric": "settle", "ms": ms} | meter.columns(meter.read())], [])


def _request(runtime: Runtime, ids: list[int], count: int, meter: Meter, watch: tails.Watch
             ) -> tuple[list[Token], list[Any], list[int], float]:
    """The tokens of one request; a reading of the meter and a stamp after each and at its end; the ms after the last.
    """
    stream = runtime.stream(ids, max_new_tokens=count, stop=[])
    tokens: list[Token] = []
    readings, ended = list[Any](), list[int]()
    for token in stream:
        ended.append(watch.sample())
        tokens.append(token)
        readings.append(meter.read())
        if len(tokens) == count:
            break
    start = time.perf_counter_ns()
    more = next(stream, None)  # lets the runtime finish the request
    ended.append(watch.sample())
    readings.append(meter.read())
    if more is not None or len(tokens) != count:
        raise MeasureError(f"{count} tokens were asked for, the runtime answered with "
                           f"{len(tokens) if more is None else 'more'}", f"prompt of {len(ids)} tokens",
                           "a request that ends early cannot be compared; report this as a fault of the runtime")
    return tokens, readings, ended, (ended[-1] - start) / 1e6
