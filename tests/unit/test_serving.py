"""One pass over a request stream: every interval in a row, every count in one interval, nothing timed that is ours."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from hybridlab import schemas, serving
from hybridlab.counters import Counters
from hybridlab.errors import MeasureError, RunError
from hybridlab.tokens import Happening
from hybridlab.workload import Asked

REQUESTS = [Asked(4, 3), Asked(9, 1), Asked(4, 2)]
PROMPTS = {4: [1, 2, 3, 4], 9: list(range(9))}


class Runtime:
    """Captures two graphs while it is built, one after each request, and one more when it settles."""

    def __init__(self, short: int = 0) -> None:
        self.counters = Counters(captures=2, capture_ms=8.0, graphs=2, graph_bytes=200)
        self.short, self.asked, self.capturing = short, list[tuple[int, int]](), False
        self.collecting: list[bool] = []

    def stream(self, ids: list[int], max_new_tokens: int, stop: list[int]) -> Iterator[Any]:
        assert stop == []
        self.asked.append((len(ids), max_new_tokens))
        for index in range(max_new_tokens - self.short):
            self.collecting.append(gc.isenabled())
            hit = index > 0
            self.counters.hits += hit
            self.counters.misses += not hit
            self.capturing = True
            yield SimpleNamespace(id=len(ids) + index, ms=1.5 + index, path="graph" if hit else "jit", reason="why")
        self._capture()

    def _capture(self) -> None:
        self.counters.captures += 1
        self.counters.capture_ms += 2.5
        self.counters.graphs += 1
        self.counters.graph_bytes += 50
        self.capturing = False

    def settle(self) -> None:
        self._capture()

    def bucket_for(self, length: int) -> int | None:
        return 8 if length <= 8 else None


def test_every_interval_has_a_row_and_every_count_an_interval() -> None:
    """Captures that no row counts, or that two count, would make the cost of a policy look other than it is."""
    runtime = Runtime()
    served = list(serving.serve(runtime, REQUESTS, PROMPTS, setting="s", round_=5, built_ms=7.0))
    rows = [row for one in served for row in one.rows]
    assert [(row["request"], row["metric"], row["index"]) for row in rows] == [
        (None, "start", -1), (0, "ttft", 0), (0, "itl", 1), (0, "itl", 2), (0, "after", -1), (1, "ttft", 0),
        (1, "after", -1), (2, "ttft", 0), (2, "itl", 1), (2, "after", -1), (None, "settle", -1)]
    assert [one.ids for one in served] == [[], [4, 5, 6], [9], [4, 5], []]
    for name in serving.HAPPENED:
        assert sum(row[name] for row in rows) == runtime.counters[name], name
    assert [row["captures"] for row in rows] == [2, 0, 0, 0, 1, 0, 1, 0, 0, 1, 1]
    assert [row["graphs"] for row in rows] == [2, 2, 2, 2, 3, 3, 4, 4, 4, 5, 6]
    assert [row["capturing"] for row in rows] == [False, True, True, True, True, True, True, True, True, True, False]
    assert [row["misses"] for row in rows] == [0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0]
    assert [row["bucket"] for row in rows if row["metric"] == "ttft"] == [8, None, 8]
    assert [row["ms"] for row in rows if row["request"] == 0][:3] == [1.5, 2.5, 3.5]
    assert rows[0]["ms"] == 7.0
    assert {(row["part"], row["setting"], row["round"]) for row in rows} == {("stream", "s", 5)}
    table = pa.Table.from_pylist([row | {"run_id": "x", "profiled": False} for row in rows], schema=schemas.CACHE)
    table.validate(full=True)
    assert set(rows[0]) == set(schemas.CACHE.names) - {"run_id", "profiled"}
    ended = [row["ended_ns"] for row in rows if row["request"] is not None]
    assert ended == sorted(ended)
    assert all((row["ended_ns"] is None) == (row["happened"] is None) == (row["request"] is None) for row in rows)


def test_each_interval_says_what_happened_in_it() -> None:
    """A first token that waited for a capture or an eviction, under `unexplained`, or laid to its neighbour."""
    class Evicting(Runtime):
        def stream(self, ids: list[int], max_new_tokens: int, stop: list[int]) -> Iterator[Any]:
            for token in super().stream(ids, max_new_tokens, stop):
                token.ms = 1e-4
                if len(ids) == 9:
                    self.counters.evictions += 1
                    gc.collect()
                    token.ms = 0.5
                self.capturing = False
                yield token

    asked: list[int] = []

    class Clocks:
        def sample(self) -> None:
            asked.append(1)

        def clock_changes(self, since_ns: int) -> list[Happening]:
            return []

    clocks: Any = Clocks()
    rows = [row for one in serving.serve(Evicting(), REQUESTS, PROMPTS, telemetry=clocks) for row in one.rows]
    found = {(row["request"], row["metric"], row["index"]): row["happened"] for row in rows if row["happened"]}
    seen = {key: set(what.split(", ")) - {"preemption"} for key, what in found.items()}
    assert {key: kinds for key, kinds in seen.items() if kinds} == {
        (0, "after", -1): {"capture"}, (1, "ttft", 0): {"garbage collection", "eviction"},
        (1, "after", -1): {"capture"}, (2, "after", -1): {"capture"}}
    assert len(asked) == len(REQUESTS)


def test_the_collector_is_off_inside_requests_and_as_it_was_afterwards() -> None:
    """A collection inside a request of a millisecond would become its p99."""
    runtime = Runtime()
    assert gc.isenabled()
    list(serving.serve(runtime, REQUESTS, PROMPTS))
    assert runtime.collecting == [False] * 6
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_request_that_ends_early_is_no_measurement() -> None:
    """Fewer tokens take less time: such a row would flatter a setting."""
    with pytest.raises(MeasureError, match="3 tokens were asked for, the runtime answered with 2"):
        list(serving.serve(Runtime(short=1), REQUESTS, PROMPTS))


def test_other_tokens_are_noticed_in_float32_only() -> None:
    """A setting that is fast because it computes something else; in half precision a near-tie may fall either way."""
    proof = serving.Proof(REQUESTS, exact=True)
    proof.require_equal(0, "a", [1, 2, 3])
    proof.require_equal(0, "b", [1, 2, 3])
    with pytest.raises(RunError, match="request 0 with b differ from those with a"):
        proof.require_equal(0, "b", [1, 2, 4])
    assert proof.few() == [0, 1, 2]
    assert proof.count == 1
    loose = serving.Proof(REQUESTS, exact=False)
    loose.require_equal(0, "a", [1])
    loose.require_equal(0, "b", [2])
    assert (loose.few(), loose.count) == ([], 0)
