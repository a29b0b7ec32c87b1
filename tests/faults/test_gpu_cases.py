"""Cases of captures, replays and evictions that only a GPU can show; those of eviction are in tests/gpu/test_cache.py.

Each of them leaves the device usable: what would spoil it for the process runs in one of its own.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch

import hybridlab as hl
from hybridlab import graphs, kernels, pools
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed, StaleAddress
from tests.helpers import by_hand, replayed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

WIDTH = 256


def new() -> GraphCache:
    return GraphCache(torch.device("cuda"), Counters())


def job(key: str, rows: int = 8) -> Job:
    weight = torch.randn(WIDTH, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(ord(key)))
    x, out = torch.ones(rows, WIDTH, device="cuda"), torch.zeros(rows, WIDTH, device="cuda")
    return Job(key, lambda: out.copy_(x @ weight), [x, out])


def test_case_04_a_kernel_first_used_inside_a_capture_is_named() -> None:
    """A module loaded while a stream is captured, which CUDA forbids or, worse, allows now and then."""
    dim = 48  # a head size that no model of these tests has, so that its kernel is compiled here first
    q, k, v = (torch.randn(1, heads, 1, dim, device="cuda") for heads in (6, 2, 2))
    keys, values = (torch.zeros(1, 2, 64, dim, device="cuda") for _ in range(2))
    position, out = torch.tensor([3], device="cuda"), torch.zeros(1, 1, 6, dim, device="cuda")

    def step() -> None:
        kernels.TRITON["attend"](q, k, v, keys, values, position, 0.125, 64, 0, 0.0, out)

    held, good = new(), job("a")
    want = by_hand(good)
    held.capture(good)
    asked = Job("cold", step, [q, k, v, keys, values, position, out])
    with pytest.raises(CaptureFailed):  # by CUDA, or because something was compiled
        held.capture(asked, rehearse=False)
    assert "cold" not in held
    assert torch.equal(replayed(held, good), want)
    held.failed.clear()
    held.capture(asked)  # with a rehearsal of the same callable nothing is left to compile
    assert "cold" in held


def test_case_05_what_is_dropped_during_a_capture_does_not_end_it() -> None:
    """A graph in a cycle of garbage, or one dropped by name, that is destroyed while another is captured."""
    held, good = new(), job("a")
    want = by_hand(good)

    def garbage() -> None:
        other = graphs.record(job("x").function, torch.device("cuda"))
        cycle: list[object] = [other]
        cycle.append(cycle)

    step = good.function

    def collecting() -> None:
        assert not gc.isenabled()
        step()

    step()
    garbage()
    gc.set_threshold(1)  # as eager as it can be
    try:
        held.capture(good._replace(function=collecting), rehearse=False)
    finally:
        gc.set_threshold(700, 10, 10)
    assert torch.equal(replayed(held, good), want)


@pytest.mark.parametrize(("mode", "fails"), [("global", True), ("thread_local", False)])
def test_case_07_work_of_another_thread_ends_a_global_capture_loudly(mode: str, fails: bool) -> None:
    """A capture that keeps half of what another thread did; or one that a bystander's allocation ends for nothing."""
    held, each = new(), job("a")
    want, step = by_hand(each), each.function
    begun, over = threading.Event(), threading.Event()

    def bystander() -> None:
        assert begun.wait(60)
        torch.empty(64 << 20, device="cuda")  # a cudaMalloc, which CUDA counts as unsafe beside a global capture
        over.set()

    def disturbed() -> None:
        begun.set()
        assert over.wait(60)
        step()

    torch.cuda.empty_cache()
    thread = threading.Thread(target=_swallowing(bystander, over))
    thread.start()
    asked = each._replace(function=disturbed)
    try:
        if fails:
            with pytest.raises(CaptureFailed, match="could not be captured · CUDA error"):  # whoever meets it first
                held.record(asked, mode=mode)
        else:
            held.adopt(asked, *held.record(asked, mode=mode))
    finally:
        thread.join(60)
    if fails:
        assert "a" not in held
        held.capture(each)  # once the other thread is quiet
    assert torch.equal(replayed(held, each), want)


def _swallowing(work: Callable[[], None], over: threading.Event) -> Callable[[], None]:
    """In global mode it is the bystander's own call that is refused first."""
    def run() -> None:
        try:
            work()
        except RuntimeError:
            over.set()

    return run


def test_case_09_a_buffer_that_moved_is_refused_before_the_device_reads_it() -> None:
    """A replay that reads memory which another tensor has now: a wrong token and no word about it."""
    held, each = new(), job("a")
    each.function()
    held.capture(each)
    x, out = each.buffers
    x.set_(torch.zeros_like(x))
    out.fill_(-1)
    with pytest.raises(StaleAddress, match="moved since capture"):
        replayed(held, each)
    assert bool(out.eq(-1).all())


def test_case_03_failed_captures_leave_no_memory_that_cannot_be_had_back() -> None:
    """A process that loses memory with each failed capture and does not know it."""
    x = torch.ones(64, WIDTH, device="cuda")
    held = new()
    for number in range(50):
        with pytest.raises(CaptureFailed):
            held.capture(Job(f"bad {number}", lambda: (x @ x.t()).sum().item(), [x]))
    held.clear()
    lost = pools.lost()
    assert lost == "" or f"PyTorch {torch.__version__}" in lost
    if not lost:
        assert not pools.SPOILED


@pytest.mark.parametrize("policy", ["whole", "piecewise"])
def test_case_15_replays_are_bit_equal_in_every_bucket(policy: str) -> None:
    """A prefill graph of one bucket whose logits differ from the same kernels launched one by one."""
    model, buckets = hl.load("tiny"), [16, 64, 128, 256]
    with hl.Runtime(model, policy=policy, capture="sync", buckets=buckets, max_len=300) as runtime:
        runtime.warm_up(buckets)
        for rows in buckets:
            for seed in range(3):
                ids = torch.randint(2, 2000, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
                assert runtime.generate(ids, max_new_tokens=1, stop=[]).paths == ["graph"]
                executor = runtime._executor
                replayed = executor.logits.clone()
                with torch.no_grad():
                    executor.program("prefill", rows)()
                assert torch.equal(executor.logits, replayed), (rows, seed)
