"""The JIT kernels against their specification: Triton under its interpreter, Inductor for real."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hybridlab import kernels, ops
from hybridlab.errors import JITUnavailable
from hybridlab.kernels import attend, inductor, sample

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy on masked lanes of the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 1e-5, torch.float16: 2e-3}  # of the row's largest value; reference: IEEE half has 11 bits


def attended(attend: Any, *args: Any) -> torch.Tensor:
    """What `attend` writes for these arguments into an output that holds NaN before."""
    q = args[0]
    out = torch.full((1, q.shape[2], q.shape[1], q.shape[3]), float("nan"), dtype=q.dtype, device=q.device)
    attend(*args, out)
    return out


def inputs(heads: int, kv_heads: int, rows: int, dim: int, capacity: int, start: int, dtype: torch.dtype,
           device: str = DEVICE) -> list:
    """q, k, v as the model hands them over (a transposed view), two caches of noise, and positions."""
    torch.manual_seed(heads * 1000 + rows)
    q, k, v = (torch.randn(1, rows, h, dim).transpose(1, 2).to(dtype) for h in (heads, kv_heads, kv_heads))
    caches = [torch.randn(1, kv_heads, capacity, dim).to(dtype) for _ in range(2)]
    return [t.to(device) for t in (q, k, v, *caches, torch.arange(start, start + rows))]


CASES = [  # heads, kv_heads, rows, dim, capacity, start, window, softcap
    (6, 2, 1, 32, 128, 0, 0, 0.0),       # the first token
    (6, 2, 1, 32, 128, 127, 0, 0.0),     # the last row of the cache
    (4, 4, 1, 64, 200, 63, 0, 0.0),      # the edge of a block of columns
    (4, 4, 1, 64, 200, 64, 0, 0.0),
    (6, 2, 33, 32, 128, 0, 0, 0.0),      # prefill, rows that fill no block
    (8, 2, 65, 80, 128, 0, 16, 0.0),     # a window, a head size that is no power of two
    (4, 1, 1, 16, 150, 100, 32, 0.0),    # one KV head for all
    (4, 2, 7, 24, 150, 100, 0, 5.0),     # soft-capping
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_triton_attend(case: tuple, dtype: torch.dtype) -> None:
    """A kernel that reads one column too many, forgets a row, or rounds more than its specification does."""
    *shape, window, softcap = case
    args = inputs(*shape, dtype)
    wide = [a.double() if a.is_floating_point() else a.clone() for a in args]
    exact = attended(ops.attend, *wide, 0.2, shape[4], window, softcap)
    plain = attended(ops.attend, *(a.clone() for a in args), 0.2, shape[4], window, softcap)
    got = attended(attend.attend, *args, 0.2, shape[4], window, softcap)
    top = exact.abs().max()
    error = ((got.double() - exact).abs().max() / top).item()
    assert error <= 2 * ((plain.double() - exact).abs().max() / top).item() + EPS[dtype]
    assert torch.equal(args[3][0, :, args[5]], args[1][0])


def test_triton_attend_stops_at_span() -> None:
    """A kernel that attends past the bound its program was built with."""
    args = inputs(4, 2, 8, 16, 64, 0, torch.float32)
    short = attended(attend.attend, *(a.clone() for a in args), 0.25, 4, 0, 0.0)
    plain = attended(ops.attend, *(a.clone() for a in args), 0.25, 4, 0, 0.0)
    torch.testing.assert_close(short, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entries", [7, 512, 2000])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (1, None), (5, None), (None, 0.8), (50, 0.7)])
def test_triton_sampler_draws_the_same_tokens(entries: int, top_k: int | None, top_p: float | None) -> None:
    """A threshold or a random number that differs from the specification by one bit."""
    torch.manual_seed(entries)
    logits = (torch.randn(entries) * 3).to(DEVICE)
    plain, jit = (torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2))
    for seed in (0, 1, 2**31 + 7, 2**40 + 5, 2**63 - 1):
        values = ([seed], [seed % 999], [0.8], [min(top_k or entries, entries)], [top_p or 1.0])
        controls = (torch.tensor(value, device=DEVICE) for value in values)
        args = (logits, *controls, top_k is not None or top_p is not None)
        ops.sample(*args, plain)
        sample.sample(*args, jit)
        assert int(plain) == int(jit)
    ops.greedy(logits, plain)
    sample.greedy(logits, jit)
    assert int(plain) == int(jit)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_triton_gives_no_token_for_broken_logits(bad: float) -> None:
    """A maximum that skips NaN, as GPUs' do."""
    logits, token = torch.zeros(100, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    logits[50] = bad
    sample.greedy(logits, token)
    assert int(token) == -1


def test_triton_inputs() -> None:
    """Padding or position handling that differs from the specification."""
    prompt, length, token = (t.to(DEVICE) for t in (torch.arange(100, 700), torch.tensor([300]), torch.tensor([77])))
    results = []
    for module in (ops.REFERENCE, kernels.TRITON):
        ids, last, positions, step = (torch.full(shape, 4, device=DEVICE) for shape in ((1, 512), (1,), (1,), (1, 1)))
        module["pad"](prompt, length, ids, last)
        module["advance"](token, step, positions)
        results.append((ids.tolist(), int(last), int(step), int(positions)))
    assert results[0] == results[1]


def test_inductor_attend_and_its_count() -> None:
    """A CPU kernel compiled for one shape and used for another, or a compilation that nobody counts."""
    args = inputs(4, 2, 3, 16, 40, 5, torch.float32, "cpu")
    before = kernels.compiles()
    for start in (5, 9):
        args[5] = torch.arange(start, start + 3)
        plain = attended(ops.attend, *(a.clone() for a in args), 0.25, 40, 0, 0.0)
        got = attended(torch.ops.hybridlab_jit.attend.default, *(a.clone() for a in args), 0.25, 40, 0, 0.0)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    assert kernels.compiles() == before + 1
    windowed = attended(torch.ops.hybridlab_jit.attend.default, *(a.clone() for a in args), 0.25, 40, 2, 0.0)
    torch.testing.assert_close(windowed, attended(ops.attend, *args, 0.25, 40, 2, 0.0), rtol=1e-5, atol=1e-5)
    assert kernels.compiles() == before + 2


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**32 - 5, 2**32, 2**63 - 1, 3735928559])
def test_inductor_draws_the_same_tokens_for_every_seed(seed: int) -> None:
    """Integer arithmetic that overflows in compiled C++ and not in PyTorch, for seeds that few tests use."""
    torch.manual_seed(1)
    logits, plain, jit = torch.randn(1500), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for position in (0, 1, 77, 4095):
        controls = [torch.tensor(value) for value in ([seed], [position], [0.9], [40], [0.95])]
        for filtered in (False, True):
            torch.ops.hybridlab.sample.default(logits, *controls, filtered, plain)
            torch.ops.hybridlab_jit.sample.default(logits, *controls, filtered, jit)
            assert int(plain) == int(jit)


def test_inductor_takes_views_of_a_larger_tensor() -> None:
    """A kernel compiled for a dense copy and handed the slice of a fused projection."""
    fused = torch.randn(1, 5, 3 * 4 * 16)
    q, k, v = (part.view(1, 5, 4, 16).transpose(1, 2) for part in fused.split(64, dim=-1))
    caches = [torch.zeros(1, 4, 8, 16) for _ in range(2)]
    got = attended(torch.ops.hybridlab_jit.attend.default, q, k, v, *caches, torch.arange(5), 0.25, 8, 0, 0.0)
    torch.testing.assert_close(got, attended(ops.attend, q, k, v, *caches, torch.arange(5), 0.25, 8, 0, 0.0))


def test_compilations_of_other_threads_are_not_ours() -> None:
    """A capture that fails for ever because another runtime happened to compile meanwhile."""
    before = kernels.compiles()
    logits, token = torch.zeros(33), torch.zeros(1, dtype=torch.int64)
    worker = threading.Thread(target=torch.ops.hybridlab_jit.greedy.default, args=(logits, token))
    worker.start()
    worker.join()
    assert kernels.compiles() == before


def test_compiling_leaves_the_callers_buffers_alone() -> None:
    """A compilation that writes the cache at the position it was traced with."""
    args = inputs(2, 2, 1, 16, 12, 3, torch.float32, "cpu")
    before = [a.clone() for a in args]
    out = torch.zeros(1, 1, 2, 16)
    inductor.bind("attend", (*args, 0.25, 12, 0, 0.0, out))
    assert not out.any()
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of Inductor's traceback in place of the one fact that helps."""
    monkeypatch.setattr(inductor.shutil, "which", lambda _: None)
    with pytest.raises(JITUnavailable, match=r"no C\+\+ compiler"):
        inductor.bind("greedy", (torch.zeros(31), torch.zeros(1, dtype=torch.int64)))
