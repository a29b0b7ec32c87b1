"""The graph cache: what is kept, what is evicted, what a failed capture leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridlab import cache as module
from hybridlab import graphs
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureClosed, CaptureFailed, StaleAddress

SIZE = 1024  # floats: each graph below needs 8 KiB for its two intermediates
BYTES = 2 * 4 * SIZE


def new(**settings: Any) -> GraphCache:
    return GraphCache(torch.device("cpu"), Counters(), **{"pool": "private", **settings})


def job(key: str, size: int = SIZE, pin: bool = False) -> Job:
    x, out = torch.full((size,), float(ord(key))), torch.zeros(size)
    return Job(key, lambda: out.copy_(x * 2 + 1), [x, out], pin=pin)


def filled(keys: str, **settings: Any) -> tuple[GraphCache, dict[str, Job]]:
    held, jobs = new(**settings), {key: job(key) for key in keys}
    for each in jobs.values():
        held.capture(each)
    return held, jobs


def replay(held: GraphCache, key: str) -> None:
    with held.lease(key) as launch:
        launch()


def test_a_graph_by_itself_is_freed_when_its_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a graph kept by a benchmark that went on without it."""
    cleared: list[GraphCache] = []
    monkeypatch.setattr(GraphCache, "clear", lambda self: cleared.append(self))
    def use() -> None:
        with module.replaying(job("a").function, torch.device("cpu")) as launch:
            launch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert [held.counters.replays for held in cleared] == [1]


def there(held: GraphCache, keys: str) -> str:
    return "".join(key for key in keys if key in held)


@pytest.mark.parametrize("limit", [{"budget": 2 * BYTES}, {"most": 2}])
def test_least_recently_used_goes_first(limit: dict[str, int]) -> None:
    """Eviction by age of capture, or of the graph just captured."""
    held, _ = filled("ab", **limit)
    replay(held, "a")
    gone: list[Any] = []
    held.on_evict = gone.append
    held.capture(job("c"))
    assert (there(held, "abc"), gone, held.counters.evictions) == ("ac", ["b"], 1)
    assert (held.counters.graph_bytes, held.counters.graphs) == (2 * BYTES, 2)


def test_nothing_leased_is_evicted() -> None:
    """Memory of a graph in flight given to another; or a lease that ends with the first of two holders."""
    held, _ = filled("a", most=1)
    with held.lease("a") as launch:
        with held.lease("a"):
            pass
        held.capture(job("b"))
        assert there(held, "ab") == "ab"
        launch()
    held.capture(job("c"))
    assert there(held, "abc") == "c"


def test_what_is_pinned_stays() -> None:
    """A graph that every token needs evicted for one that is needed once."""
    held = new(budget=1)
    for each in (job("a", pin=True), job("b"), job("c")):
        held.capture(each)
    assert there(held, "abc") == "ac"


def test_counters_add_up() -> None:
    """A replay, a graph or a byte that nobody counted."""
    held, jobs = filled("abc")
    for key in "aab":
        replay(held, key)
    x, out = jobs["a"].buffers
    assert torch.equal(out, x * 2 + 1)
    counted = held.counters
    assert (counted.captures, counted.replays, counted.evictions, counted.graphs, len(held)) == (3, 3, 0, 3, 3)
    assert counted.graph_bytes == 3 * BYTES
    held.clear()
    assert (counted.graph_bytes, counted.graphs, len(held)) == (0, 0, 0)


def test_a_shared_pool_is_as_large_as_the_largest_and_goes_with_the_last() -> None:
    """A pool that grows with every graph, is counted for each, or outlives them all."""
    held = new(pool="shared", most=2)
    sizes = []
    for key, size in (("a", SIZE), ("b", SIZE // 2), ("c", SIZE), ("d", 2 * SIZE)):
        held.capture(job(key, size))
        sizes.append(held.counters.graph_bytes)
    assert sizes == [BYTES, BYTES, BYTES, BYTES + 2 * BYTES]
    for key in "cd":
        replay(held, key)
    held.clear()
    assert held.counters.graph_bytes == 0
    held.capture(job("e"))
    assert held.counters.graph_bytes == BYTES


def test_graphs_of_one_pool_give_equal_results_in_every_order() -> None:
    """A value that one graph leaves in the pool for another's replay, or for its own next one."""
    held, jobs = filled("abc", pool="shared")
    for order in ("abc", "cba", "bbac"):
        for key in order:
            x, out = jobs[key].buffers
            x.add_(1)
            out.fill_(-1)
            replay(held, key)
            assert torch.equal(out, x * 2 + 1)


def test_all_go_where_one_by_one_is_not_safe() -> None:
    """A graph reset while others live that share something with it; the newest not there after its capture."""
    held, jobs = filled("abc", most=2, one_by_one=False)
    assert (there(held, "abc"), held.counters.evictions, held.counters.captures) == ("c", 3, 4)
    replay(held, "c")
    held.capture(jobs["a"])
    assert there(held, "abc") == "ac"


def test_all_stay_while_one_is_in_flight() -> None:
    """All evicted under a replay that is on its way."""
    held, _ = filled("ab", most=2, one_by_one=False)
    with held.lease("a"):
        held.capture(job("c"))
        assert there(held, "abc") == "abc"


def test_a_failed_capture_leaves_the_cache_as_it_was() -> None:
    """Half a graph in the cache, a key tried for ever, or a reason that is lost."""
    held, _ = filled("a")
    x = torch.ones(3)
    for _ in range(50):
        with pytest.raises(CaptureFailed, match="reads a value back"):
            held.capture(Job("bad", lambda: x.mul_(x.sum().item()), [x], state=[x]))
    assert torch.equal(x, torch.ones(3))
    assert "reads a value back" in held.failed["bad"]
    assert (held.counters.captures, held.counters.failures, held.counters.graph_bytes, len(held)) == (1, 50, BYTES, 1)
    replay(held, "a")


def test_recording_changes_nothing_outside() -> None:
    """A capture behind a request that moves on the position of the token being made."""
    held, state, out = new(), torch.zeros(4), torch.zeros(2)

    def step() -> None:
        state.add_(1)
        out.copy_(state[1:3] * 10)

    made = Job("key", step, [state, out])
    graph, ms = held.record(made)
    assert (state.sum().item(), out.sum().item(), len(held)) == (0, 0, 0)
    held.adopt(made, graph, ms)
    for times in (1, 2):
        replay(held, "key")
        assert (state.tolist(), out.tolist()) == ([times] * 4, [10 * times] * 2)


def test_what_was_captured_twice_is_kept_once() -> None:
    """A graph that nobody holds and nobody resets, its bytes counted for ever."""
    held, jobs = filled("a")
    held.adopt(jobs["a"], *held.record(jobs["a"]))
    assert (held.counters.captures, held.counters.graph_bytes) == (1, BYTES)


def test_room_is_made_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture given up while graphs that nobody needs hold the memory; or one that never gives up."""
    held, _ = filled("ab")
    record, refused = graphs.record, []

    def full(*args: Any, **kwargs: Any) -> Any:
        if len(held):
            refused.append(len(held))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(*args, **kwargs)

    monkeypatch.setattr(module.graphs, "record", full)
    held.capture(job("c"))
    assert (there(held, "abc"), refused, held.counters.evictions) == ("c", [2], 2)
    with held.lease("c"), pytest.raises(CaptureFailed, match=r"out of memory · lower cache_bytes"):
        held.capture(job("d"))
    assert "c" in held


def test_a_moved_buffer_is_refused() -> None:
    """A replay that reads memory which is no longer the buffer's."""
    held, jobs = filled("a")
    x, out = jobs["a"].buffers
    x.set_(torch.zeros(SIZE))
    out.fill_(-1)
    with pytest.raises(StaleAddress, match="moved since capture"):
        replay(held, "a")
    assert out.eq(-1).all()


def test_captures_can_be_closed() -> None:
    """A capture in the middle of a timed region."""
    held = new()
    held.closed = True
    for capture in (held.capture, held.record):
        with pytest.raises(CaptureClosed, match="timed region"):
            capture(job("a"))


def test_a_kernel_compiled_during_capture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up that ran another program than the one captured, and an error that leaves it to be guessed which."""
    compiled: list[str] = ["earlier"]
    monkeypatch.setattr(module.kernels, "compiled", lambda: list(compiled))
    held, asked, runs = new(), job("a"), iter([[], ["attend"]])

    def compiles_late() -> None:
        compiled.extend(next(runs))
        asked.function()

    with pytest.raises(CaptureFailed, match="kernel attend was compiled during capture"):
        held.capture(asked._replace(function=compiles_late))
    assert "a" not in held
