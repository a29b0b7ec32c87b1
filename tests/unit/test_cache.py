"""The graph cache: what is kept, what is evicted, what a failed capture leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hybridlab import graphs
from hybridlab.counters import Counters
from hybridlab.errors import CaptureClosed, CaptureFailed, StaleAddress
from hybridlab.graphs import GraphCache

SIZE = 1024  # floats: each captured graph below needs 4 KiB for its one intermediate


def cache(budget: int | None = None) -> GraphCache:
    return GraphCache(torch.device("cpu"), budget, Counters())


def doubler(x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    return lambda: out.copy_(x * 2 + 1)


def filled(budget: int | None, keys: str) -> tuple[GraphCache, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    held, tensors = cache(budget), {}
    for key in keys:
        tensors[key] = torch.full((SIZE,), float(ord(key))), torch.zeros(SIZE)
        held.capture(key, doubler(*tensors[key]), list(tensors[key]))
    return held, tensors


def replay(held: GraphCache, key: str) -> None:
    with held.lease(key) as launch:
        launch()


def test_least_recently_used_goes_first() -> None:
    """Eviction by age of capture, or of the graph just captured."""
    held, tensors = filled(None, "ab")
    one = held.counters.graph_bytes // 2
    held.budget = 2 * one
    replay(held, "a")
    tensors["c"] = torch.ones(SIZE), torch.zeros(SIZE)
    held.capture("c", doubler(*tensors["c"]), [])
    assert [key in held for key in "abc"] == [True, False, True]
    assert held.counters.evictions == 1
    assert held.counters.graph_bytes == 2 * one


def test_nothing_leased_is_evicted() -> None:
    """Memory of a graph in flight given to another."""
    held, _ = filled(None, "a")
    held.budget = 1
    with held.lease("a") as launch:
        x, out = torch.ones(SIZE), torch.zeros(SIZE)
        held.capture("b", doubler(x, out), [])
        assert "a" in held
        launch()
    assert held.counters.evictions == 0


def test_what_is_pinned_stays() -> None:
    """A graph that every token needs evicted for one that is needed once."""
    held, _ = filled(None, "")
    x, out = torch.ones(SIZE), torch.zeros(SIZE)
    held.capture("a", doubler(x, out), [], pin=True)
    held.budget = 1
    held.capture("b", doubler(x, out), [])
    held.capture("c", doubler(x, out), [])
    assert [key in held for key in "abc"] == [True, False, True]


def test_counters_add_up() -> None:
    """A replay or a byte that nobody counted."""
    held, tensors = filled(None, "abc")
    for key in "aab":
        replay(held, key)
    assert torch.equal(tensors["a"][1], tensors["a"][0] * 2 + 1)
    counted = held.counters
    assert (counted.captures, counted.replays, counted.evictions, len(held)) == (3, 3, 0, 3)
    held.clear()
    assert (counted.graph_bytes, len(held)) == (0, 0)


def test_a_failed_capture_leaves_the_cache_as_it_was() -> None:
    """Half a graph in the cache, a key tried for ever, or a reason that is lost."""
    held, _ = filled(None, "a")
    before = held.counters.graph_bytes
    x = torch.ones(3)
    with pytest.raises(CaptureFailed, match="reads a value back"):
        held.capture("bad", lambda: x.mul_(x.sum().item()), [x])
    assert "bad" not in held
    assert "reads a value back" in held.failed["bad"]
    assert (held.counters.captures, held.counters.failures, held.counters.graph_bytes) == (1, 1, before)
    replay(held, "a")


def test_a_moved_buffer_is_refused() -> None:
    """A replay that reads memory which is no longer the buffer's."""
    held, tensors = filled(None, "a")
    x, out = tensors["a"]
    x.set_(torch.zeros(SIZE))
    out.fill_(-1)
    with pytest.raises(StaleAddress, match="moved since capture"):
        replay(held, "a")
    assert out.eq(-1).all()


def test_captures_can_be_closed() -> None:
    """A capture in the middle of a timed region."""
    held = cache()
    held.closed = True
    with pytest.raises(CaptureClosed, match="timed region"):
        held.capture("a", lambda: None, [])


def test_a_kernel_compiled_during_capture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up that ran another program than the one captured."""
    counts = iter([0, 1])
    monkeypatch.setattr(graphs.kernels, "compiles", lambda: next(counts))
    held = cache()
    with pytest.raises(CaptureFailed, match="compiled during capture"):
        held.capture("a", doubler(torch.ones(4), torch.zeros(4)), [])
    assert "a" not in held
