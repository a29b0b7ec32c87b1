"""Programmatic dependent launch on CUDA: kernels start early in the graph, and wait for what the one before writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import hybridlab as hl
from hybridlab import fused, graphs, opbench
from hybridlab.kernels.prime import Primer

if torch.cuda.is_available():
    from triton.language.extra.cuda import gdc_launch_dependents, globaltimer

CUDA = torch.device("cuda")
EARLY = torch.cuda.is_available() and fused.starts_early(CUDA)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not EARLY, reason="needs a CUDA GPU that can start kernels early")]

SIZES = opbench.Sizes(512, 1100, 8, 4, 64, 3000, 0, False, 0.125)
CASES = opbench.cases(SIZES, [1, 300], 2)
LATE_NS = 2_000_000


@triton.jit
def _late(source, target, count, wait_ns, block: tl.constexpr):
    """Lets the next kernel start at once, and writes what that one reads only much later."""
    gdc_launch_dependents()
    start = globaltimer()
    while globaltimer() - start < wait_ns:
        pass
    for first in range(0, count, block):
        at = first + tl.arange(0, block)
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


def written_before(work: Any) -> list[torch.Tensor]:
    """What the kernel before writes."""
    if isinstance(work, opbench._Attention):
        return [work.qkv]
    return [work.weights.x, *([work.out] if work.kind == "residual" else [])]


@pytest.mark.parametrize("case", [case for case in CASES if case.kind in ("project", "residual", "swiglu",
                                                                         "attend_next")], ids=str)
def test_what_the_kernel_before_writes_last_is_what_is_read(case: opbench.Case) -> None:
    """A read before the wait, which an idle GPU hides: here the kernel before takes 2 ms after it has let go."""
    work: Any = opbench.work(case, SIZES, 512, CUDA, torch.float16)
    one = torch.zeros(1, device=CUDA)
    _late[(1,)](one.half(), one.half(), 1, 0, 1024)
    for tensor in written_before(work):
        right, wrong = torch.randn_like(tensor), torch.full_like(tensor, 7.0)
        found = []
        for variant in ("kernel", "kernel, pdl"):
            call = work.call(variant, 0)
            call()  # compiles: nothing may stand between the two launches below
            work.out.zero_()
            tensor.copy_(right)
            if variant == "kernel, pdl":
                tensor.copy_(wrong)
                _late[(1,)](right, tensor, tensor.numel(), LATE_NS, 1024)
            call()
            found.append(work.out.clone())
        assert torch.equal(*found)


@pytest.mark.parametrize("pdl", [True, False])
def test_the_graph_of_a_step_keeps_early_starts(pdl: bool) -> None:
    """A capture that turns early starts into full waits, so that nothing overlaps and every figure is of something
    else."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="package cuda-bindings reads the edges of a graph")
    model = hl.load("random:tiny-llama-2-7b", device="cuda", dtype="float16")
    with hl.Runtime(model, kernels="fused", policy="full", capture="sync", max_len=64, buckets=[32], pdl=pdl) as rt:
        rt.generate([5, 6, 7], max_new_tokens=2)
        job = rt._executor.job("decode", 1)
        made: Any = graphs.CudaGraph(job.function, graphs.new_pool(CUDA), state=rt._executor.ring.state)
        graph = driver.CUgraph(made._pieces.captured[0].raw_cuda_graph())
        _, _, _, _, count = driver.cuGraphGetEdges(graph)
        _, _, _, data, _ = driver.cuGraphGetEdges(graph, count)
        early = sum(edge.type == 1 for edge in data)  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
        layers = model.config.num_hidden_layers
        assert early == (5 * layers + 1 if pdl else 0)
        made.reset()


@pytest.mark.parametrize(("policy", "launches"), [("full", 1), ("whole", 6)])
@pytest.mark.parametrize("arm", ["graph", "hybrid"])
def test_a_kernel_that_starts_early_before_a_graph_changes_no_bit(arm: str, policy: str, launches: int,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of plain kernels that does not wait for the work before it, or that is never primed."""
    model = hl.load("random:tiny-llama-2-7b", device="cuda", dtype="float16")
    launch, seen, found = Primer.launch, list[int](), list[Any]()
    monkeypatch.setattr(Primer, "launch", lambda self: [seen.append(1), launch(self)])
    for pdl in (False, True):
        with hl.Runtime(model, arm=arm, kernels="torch", policy=policy, capture="sync", max_len=64, buckets=[32],
                        pdl=pdl) as rt:
            rt.warm_up([3])
            seen.clear()
            ids = rt.generate([5, 6, 7], max_new_tokens=6, stop=[]).ids
            found.append((ids, rt._executor.logits.clone()))
            assert len(seen) == (launches if pdl else 0)
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
