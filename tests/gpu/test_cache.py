"""The graph cache on CUDA: memory that comes back, evictions in flight, captures that fail, and captures behind.

Skipped without a GPU: there is nothing here that a CPU could stand in for.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab import graphs, pools, selftest
from hybridlab.behind import WAYS
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed
from tests.helpers import by_hand, replayed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

WIDTH = 1024
BUCKETS = [16, 32, 64, 96, 128, 192, 256]
MIB = 2**20


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return hl.load("tiny")


def prompt(length: int) -> list[int]:
    return torch.randint(2, 2000, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def new(**settings: Any) -> GraphCache:
    return GraphCache(torch.device("cuda"), Counters(), **settings)


def job(key: str, rows: int = 8, scale: float = 0.01) -> Job:
    weight = torch.randn(WIDTH, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(ord(key)))
    x, out = torch.ones(rows, WIDTH, device="cuda"), torch.zeros(rows, WIDTH, device="cuda")
    return Job(key, lambda: out.copy_((x @ weight) * scale @ weight), [x, out])


def in_use() -> tuple[int, int]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.fixture
def baseline() -> Iterator[None]:
    """Whatever a test holds is back at the end, to the byte."""
    by_hand(job("a"))  # cuBLAS keeps a workspace for each stream
    with pytest.raises(CaptureFailed):  # and PyTorch the state of its generator
        new().capture(Job("bad", lambda: torch.ones(1, device="cuda").item(), []))
    before = in_use()
    yield
    assert in_use() == before


@pytest.mark.parametrize("policy", ["whole", "full", "piecewise"])
@pytest.mark.parametrize("behind", list(WAYS))
def test_tokens_stay_equal_while_graphs_come_and_go(tiny: torch.nn.Module, behind: str, policy: str) -> None:
    """A capture, an insertion or an eviction beside decoding that changes a token."""
    draw = random.Random(0)
    with hl.Runtime(tiny, arm="eager") as eager:
        want = {n: eager.generate(prompt(n), max_new_tokens=16, stop=[]).ids for n in range(1, 250, 6)}
    with hl.Runtime(tiny, policy=policy, behind=behind, buckets=BUCKETS, max_len=300, cache_graphs=3,
                    eviction="one", run_ahead=int(policy == "full")) as runtime:
        for _ in range(80):
            length = draw.choice(sorted(want))
            assert runtime.generate(prompt(length), max_new_tokens=16, stop=[]).ids == want[length], length
        runtime.settle()
        assert not runtime._executor.graphs.failed
        assert runtime.counters.evictions > 20
        assert runtime.counters.captures == runtime.counters.evictions + runtime.counters.graphs


@pytest.mark.usefixtures("baseline")
@pytest.mark.parametrize("pool", ["shared", "private"])
def test_memory_comes_back(pool: str) -> None:
    """A pool that outlives its graphs, or grows with every eviction."""
    held = new(pool=pool, most=3)
    sizes = []
    for _ in range(3):
        for key in "abcdef":
            held.capture(job(key, rows=64))
        sizes.append(in_use())
    assert sizes[1:] == [sizes[1]] * 2
    held.clear()
    assert held.counters.graph_bytes == 0


@pytest.mark.usefixtures("baseline")
def test_a_graph_is_evicted_only_when_its_replay_is_over() -> None:
    """Memory given back under a replay that is still on its way."""
    held, each = new(most=1, pool="private"), job("a")
    want = by_hand(each)
    held.capture(each)
    for _ in range(3):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second: the replay waits behind them
        each.buffers[1].fill_(-1)
        with held.lease("a") as replay:
            replay()
        held.capture(job("b"))
        assert "a" not in held
        torch.full((MIB,), float("nan"), device="cuda")
        assert torch.equal(each.buffers[1], want)
        held.capture(each)
    held.clear()


@pytest.mark.usefixtures("baseline")
@pytest.mark.parametrize("pool", ["shared", "private"])
def test_failed_captures_cost_no_memory(pool: str) -> None:
    """Half a graph that keeps its pool for the life of the process, or breaks those that were there."""
    held, good = new(pool=pool), job("a", rows=64)
    want = by_hand(good)
    held.capture(good)
    x = torch.ones(64, WIDTH, device="cuda")

    def reads_back() -> None:
        (x @ x.t()).sum().item()

    sizes = []
    for number in range(50):
        with pytest.raises(CaptureFailed, match="stream is capturing"):
            held.capture(Job("bad", reads_back, [x]))
        if number in (0, 49):
            sizes.append(in_use())
    assert sizes[0] == sizes[1]
    assert torch.equal(replayed(held, good), want)
    torch.randn(1, device="cuda")  # PyTorch's own generator refuses while it takes a capture to be under way
    held.capture(job("c"))
    held.clear()


def test_asking_for_the_size_of_a_pool_takes_no_reference() -> None:
    """Numbers of Python freed while they are in use, which ends the process some hundred captures later."""
    pool = graphs.new_pool(torch.device("cuda"))
    pool.handle = (0, int("123456789"))
    references = sys.getrefcount(pool.handle[1])
    for _ in range(10):
        pool.nbytes()
    assert sys.getrefcount(pool.handle[1]) >= references


def test_running_out_of_memory_is_one_failed_capture() -> None:
    """An error that ends the request, or a capture that takes memory from graphs in use."""
    held, good = new(), job("a")
    want = by_hand(good)
    held.capture(good)
    out = torch.zeros(1, device="cuda")
    grown = iter([1, 2**38, 2**38])

    def too_large() -> None:
        out.copy_(torch.ones(next(grown), device="cuda")[:1])

    with held.lease("a"), pytest.raises(CaptureFailed, match=r"out of memory.*lower cache_bytes"):
        held.capture(Job("huge", too_large, [out]))
    assert torch.equal(replayed(held, good), want)
    held.capture(job("c"))
    assert len(held) == 2


def test_graphs_of_one_pool_replay_in_every_order() -> None:
    """A value that one graph leaves where another one's intermediates lie."""
    held, jobs = new(), [job(key, rows) for key, rows in (("a", 64), ("b", 1), ("c", 16))]
    want = {each.key: by_hand(each) for each in jobs}
    for each in jobs:
        held.capture(each)
    for order in ([0, 1, 2], [2, 1, 0], [1, 1, 0, 2]):
        for index in order:
            assert torch.equal(replayed(held, jobs[index]), want[jobs[index].key])


def test_the_self_test_and_what_follows_from_it() -> None:
    """Graphs dropped one by one where that breaks others, or a self-test that crashes for a reason of its own."""
    problem = selftest.one_by_one("shared")
    assert problem == "" or "computes something else" in problem or "CUDA" in problem
    held, jobs = new(most=2, one_by_one=not problem), [job(key) for key in "abcd"]
    want = {each.key: by_hand(each) for each in jobs}
    for each in jobs * 3:
        held.capture(each) if each.key not in held else None
        assert torch.equal(replayed(held, each), want[each.key])


def test_pieces_share_the_pool(tiny: torch.nn.Module) -> None:
    """What crosses the cuts kept alive for each length: the memory of piecewise growing with the lengths captured."""
    sizes = {}
    for policy in ("whole", "piecewise"):
        with hl.Runtime(tiny, policy=policy, capture="sync", buckets=BUCKETS, max_len=300) as runtime:
            runtime.warm_up(BUCKETS)
            sizes[policy] = runtime._executor.graphs._pool_bytes
    assert sizes["piecewise"] <= 2 * sizes["whole"]


def test_a_workspace_that_graphs_write_into_is_given_to_nobody(tiny: torch.nn.Module) -> None:
    """Inductor's graphs give back cuBLAS's workspaces of all streams: replays would write into somebody's tensors, or,
    the memory gone, end the process with an illegal access."""
    with hl.Runtime(tiny, capture="sync", kernels="torch", max_len=128) as runtime:
        want = runtime.generate(prompt(64), max_new_tokens=8, stop=[]).ids
        held = pools.workspace_bytes()
        assert held > 0
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        assert pools.workspace_bytes() == held
        with torch.cuda.stream(graphs.capture_stream()):
            taken = [torch.full((8 * MIB,), 7.0, device="cuda") for _ in range(4)]
        torch.cuda.synchronize()
        found = runtime.generate(prompt(64), max_new_tokens=8, stop=[])
        assert (found.ids, set(found.paths)) == (want, {"graph"})
        assert all(bool((one == 7).all()) for one in taken)
        assert pools.workspace_bytes() == held
