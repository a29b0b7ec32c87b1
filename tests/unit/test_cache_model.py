"""The graph cache against a simple model of it, over random histories on the tape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybridlab import graphs
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureClosed, CaptureFailed, StaleAddress

CPU = torch.device("cpu")
KEYS = st.integers(0, 6)
PINS = st.sampled_from([False, False, False, False, False, True])
STEPS = settings(max_examples=75, stateful_step_count=40, deadline=None)


class Cell:
    """What one key computes, and on which tensors: the more rows, the more memory a graph of it holds."""

    def __init__(self, key: int) -> None:
        self.factor = key + 2
        self.x, self.out = torch.zeros(64 * (key + 1)), torch.zeros(64 * (key + 1))
        self.runs = torch.zeros(1)

    def __call__(self) -> None:
        self.out.copy_(self.x * self.factor + 1)
        self.runs += 1

    @property
    def bytes(self) -> int:
        return graphs.record(self, CPU, private=[self.x, self.out, self.runs]).nbytes


class Entry(NamedTuple):
    key: int
    pinned: bool


def never_read(cell: Cell) -> Callable[[], None]:
    return lambda: cell.x.mul_(cell.x.sum().item())


class CacheModel(RuleBasedStateMachine):
    """Entries from least to most recently used; open leases by key; what the counters must say.

    With private pools the bytes of a cache are a sum over what it holds, so that a model can know them.
    """

    one_by_one = True

    @initialize(budget=st.sampled_from([None, 1, 2000, 6000]), most=st.sampled_from([None, 1, 2, 4]))
    def start(self, budget: int | None, most: int | None) -> None:
        self.counters = Counters()
        self.cache = GraphCache(CPU, self.counters, budget, most, pool="private", one_by_one=self.one_by_one)
        self.cells = {key: Cell(key) for key in range(7)}
        self.sizes = {key: cell.bytes for key, cell in self.cells.items()}
        assert all(self.sizes.values())
        self.entries: list[Entry] = []
        self.leases: list[tuple[int, AbstractContextManager[Callable[[], None]], Callable[[], None]]] = []
        self.captures = self.evictions = self.cleared = self.failures = self.replays = 0

    # --- what the cache should do, in the plainest words -----------------------------------------------------------

    def full(self) -> bool:
        held = [e.key for e in self.entries]
        budget, most = self.cache.budget, self.cache.most
        return ((budget is not None and sum(self.sizes[k] for k in held) > budget)
                or (most is not None and len(held) > most))

    def leased(self, key: int) -> bool:
        return any(key == other for other, _, _ in self.leases)

    def taken_in(self, key: int, pin: bool) -> None:
        self.entries.append(Entry(key, pin))
        self.captures += 1
        if self.one_by_one:
            while self.full():
                free = [e for e in self.entries if not (e.pinned or e.key == key or self.leased(e.key))]
                if not free:
                    return
                self.entries.remove(free[0])
                self.evictions += 1
        elif self.full() and len(self.entries) > 1 and not self.leases:
            self.evictions += len(self.entries)
            self.entries = [Entry(key, pin)]
            self.captures += 1

    def used(self, key: int) -> None:
        entry = next(e for e in self.entries if e.key == key)
        self.entries.remove(entry)
        self.entries.append(entry)

    def job(self, key: int, pin: bool = False) -> Job:
        cell = self.cells[key]
        return Job(key, cell, [cell.x, cell.out, cell.runs], state=[cell.runs], pin=pin)

    def held(self, key: int) -> bool:
        return any(e.key == key for e in self.entries)

    def computes(self, key: int, launch: Callable[[], None], value: float) -> None:
        """A replay reads what is in its buffers now, and writes what the function would."""
        cell = self.cells[key]
        cell.x.fill_(value)
        cell.out.fill_(-1)
        launch()
        self.replays += 1
        assert cell.out.eq(value * cell.factor + 1).all()

    # --- what can happen -------------------------------------------------------------------------------------------

    @rule(key=KEYS, pin=PINS, rehearse=st.booleans())
    def capture(self, key: int, pin: bool, rehearse: bool) -> None:
        if not self.held(key):
            before = self.cells[key].runs.clone()
            self.cache.capture(self.job(key, pin), rehearse=rehearse)
            assert torch.equal(self.cells[key].runs, before)
            self.taken_in(key, pin)

    @rule(key=KEYS, pin=PINS)
    def adopt(self, key: int, pin: bool) -> None:
        """Made elsewhere: what is there already stays, and the second graph is dropped."""
        job = self.job(key, pin)
        graph, ms = self.cache.record(job)
        self.cache.adopt(job, graph, ms)
        if not self.held(key):
            self.taken_in(key, pin)

    @rule(key=KEYS, number=st.integers(0, 3), elsewhere=st.booleans())
    def fail(self, key: int, number: int, elsewhere: bool) -> None:
        cell = self.cells[key]
        job = Job(("bad", number), never_read(cell), [cell.x], state=[cell.x])
        before = cell.x.fill_(2).clone()
        with pytest.raises(CaptureFailed, match="reads a value back"):
            self.cache.record(job) if elsewhere else self.cache.capture(job)
        assert torch.equal(cell.x, before)
        if not elsewhere:
            assert "reads a value back" in self.cache.failed[job.key]
            self.failures += 1

    @rule(key=KEYS)
    def refuse_while_closed(self, key: int) -> None:
        self.cache.closed = True
        with pytest.raises(CaptureClosed):
            self.cache.capture(self.job(key))
        self.cache.closed = False

    @rule(key=KEYS, value=st.integers(-9, 9))
    def replay(self, key: int, value: int) -> None:
        if self.held(key):
            with self.cache.lease(key) as launch:
                self.computes(key, launch, value)
            self.used(key)
        else:
            with pytest.raises(KeyError), self.cache.lease(key):
                pass

    @rule(key=KEYS)
    def lease(self, key: int) -> None:
        if self.held(key):
            opened = self.cache.lease(key)
            self.leases.append((key, opened, opened.__enter__()))
            self.used(key)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), value=st.integers(-9, 9))
    def replay_leased(self, data: st.DataObject, value: int) -> None:
        key, _, launch = data.draw(st.sampled_from(self.leases))
        self.computes(key, launch, value)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, opened, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        opened.__exit__(None, None, None)

    @rule(key=KEYS)
    def move_a_buffer(self, key: int) -> None:
        if self.held(key):
            cell = self.cells[key]
            there, cell.x.data = cell.x.data, cell.x.clone()
            with self.cache.lease(key) as launch, pytest.raises(StaleAddress):
                launch()
            cell.x.data = there
            self.used(key)

    @precondition(lambda self: not self.leases)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.cleared += len(self.entries)
        self.entries = []

    # --- what must hold after anything -----------------------------------------------------------------------------

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert [key in self.cache for key in range(7)] == [self.held(key) for key in range(7)]
        assert len(self.cache) == len(self.entries) == self.counters.graphs
        assert self.counters.graph_bytes == sum(self.sizes[e.key] for e in self.entries)
        assert all(self.held(key) for key, _, _ in self.leases)

    @invariant()
    def counters_add_up(self) -> None:
        counted = self.counters
        assert counted.captures == counted.graphs + counted.evictions + self.cleared
        assert (counted.captures, counted.evictions) == (self.captures, self.evictions)
        assert (counted.failures, counted.replays) == (self.failures, self.replays)
        assert (counted.capture_ms > 0) == (counted.captures > 0)

    def teardown(self) -> None:
        for _, opened, _ in getattr(self, "leases", ()):
            opened.__exit__(None, None, None)


class AllOrNothing(CacheModel):
    """The same where no graph can be dropped alone: all go, pinned ones too, and the newest is captured again."""

    one_by_one = False


TestOneByOne = CacheModel.TestCase
TestAllOrNothing = AllOrNothing.TestCase
TestOneByOne.settings = TestAllOrNothing.settings = STEPS


class SharedPool(CacheModel):
    """With a shared pool graphs lie in each other's memory: bytes are those of the largest, values stay right."""

    @initialize(most=st.sampled_from([None, 1, 2, 4]))
    def start(self, most: int | None) -> None:
        super().start(None, most)
        self.cache = GraphCache(CPU, self.counters, None, most, pool="shared")

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert [key in self.cache for key in range(7)] == [self.held(key) for key in range(7)]
        assert len(self.cache) == len(self.entries) == self.counters.graphs
        largest = max((self.sizes[e.key] for e in self.entries), default=0)
        assert self.counters.graph_bytes >= largest
        assert bool(self.counters.graph_bytes) == bool(self.entries)


TestSharedPool = SharedPool.TestCase
TestSharedPool.settings = STEPS
