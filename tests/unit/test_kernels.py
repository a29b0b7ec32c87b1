"""The JIT kernels against their specification: Triton under its interpreter, Inductor for real."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hybridlab import kernels, ops
from hybridlab.errors import JITUnavailable
from hybridlab.kernels import attend, emit, inductor
from hybridlab.sampling import Controls
from tests.helpers import attended

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy on masked lanes of the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 1e-5, torch.float16: 2e-3}  # of the row's largest value; reference: IEEE half has 11 bits


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


ONE_ROW = [  # heads, kv_heads, dim, capacity, position, window, softcap, splits
    (6, 2, 32, 128, 0, 0, 0.0, 4),       # the first token: three parts are empty
    (6, 2, 32, 300, 299, 0, 0.0, 4),     # the last row of the cache
    (4, 4, 80, 300, 127, 0, 0.0, 2),     # parts of exactly one block; a head size that is no power of two
    (4, 4, 96, 300, 128, 0, 0.0, 2),     # the own row begins a block
    (8, 1, 128, 300, 200, 0, 0.0, 1),    # one part; one KV head for all
    (4, 1, 16, 300, 250, 100, 0.0, 4),   # a window that starts inside a block
    (4, 1, 16, 300, 250, 64, 0.0, 2),    # and one smaller than a part
    (4, 2, 16, 300, 50, 100, 0.0, 2),    # a window longer than the text
    (4, 2, 16, 300, 200, 1, 0.0, 16),    # itself only
    (40, 2, 16, 300, 150, 0, 5.0, 2),    # soft-capping; more heads of a group than a matrix unit's 16 rows
]


def one_row(heads: int, kv_heads: int, dim: int, capacity: int, position: int, dtype: torch.dtype) -> tuple[list, list]:
    """Arguments of one row, cache rows never written NaN, as memory may be; and in float64, those rows zero."""
    args = inputs(heads, kv_heads, 1, dim, capacity, position, dtype)
    exact = [a.double() if a.is_floating_point() else a.clone() for a in args]
    for cache, wide in zip(args[3:5], exact[3:5], strict=True):
        cache[:, :, position:], wide[:, :, position:] = float("nan"), 0.0
    return args, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", ONE_ROW)
def test_triton_attend_splits_the_context(case: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part forgotten or counted twice, an empty part that gives NaN, a row read that was never written."""
    *shape, window, softcap, splits = case
    monkeypatch.setattr(attend, "splits", lambda *_: splits)
    args, wide = one_row(*shape, dtype)
    exact = attended(ops.attend, *wide, 0.2, shape[3], window, softcap)
    got = attended(attend.attend, *args, 0.2, shape[3], window, softcap)
    assert (got.double() - exact).abs().max() <= 2 * EPS[dtype] * exact.abs().max()
    for cache, new in zip(args[3:5], args[1:3], strict=True):
        assert torch.equal(cache[:, :, shape[4]:shape[4] + 1], new)
        assert cache[:, :, shape[4] + 1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_triton_attend_with_extreme_scores(sign: int, dtype: torch.dtype) -> None:
    """exp() of a score of 10,000: infinity over infinity; or of -10,000 in every part: zero over zero.

    In float32 a whole part has scores of -infinity.
    """
    args, _ = one_row(4, 2, 16, 300, 200, dtype)
    args[0][:] = 50.0
    args[1][:] = args[3][:, :, :200] = sign * 12.5
    args[3][:, :, 100] += 1.0
    args[3][:, :, :64] = torch.finfo(dtype).min
    wide = [a.double().nan_to_num() if a.is_floating_point() else a.clone() for a in args]
    exact = attended(ops.attend, *wide, 1.0, 300, 0, 0.0)
    got = attended(attend.attend, *args, 1.0, 300, 0, 0.0)
    assert (got.double() - exact).abs().max() <= 2 * EPS[dtype] * exact.abs().max()


def test_triton_attend_of_one_row_stays_in_bounds() -> None:
    """A step launched ahead past the end of the cache that writes behind it, or rows from `span` on that are seen."""
    args = inputs(4, 2, 1, 16, 65, 64, torch.float32)
    whole = [cache.clone() for cache in args[3:5]]
    beyond = [*args[:3], *(cache[:, :, :64] for cache in whole), args[5]]
    inside = [*args[:3], *(cache[:, :, :64].clone() for cache in args[3:5]), args[5] - 1]
    assert torch.equal(attended(attend.attend, *beyond, 0.25, 64, 0, 0.0),
                       attended(attend.attend, *inside, 0.25, 64, 0, 0.0))
    assert all(torch.equal(a[:, :, 64], b[:, :, 64]) for a, b in zip(whole, args[3:5], strict=True))
    short = attended(attend.attend, *(a.clone() for a in args), 0.25, 4, 0, 0.0)
    torch.testing.assert_close(short, attended(ops.attend, *args, 0.25, 4, 0, 0.0), rtol=1e-5, atol=1e-5)


def test_splits_fill_the_machine() -> None:
    """Parts that are no power of two, which no kernel takes, or none for a model of many heads."""
    assert [attend.splits(torch.device("cpu"), heads) for heads in (1, 8, 32, 96, 1000)] == [16, 16, 8, 2, 1]


def work(parts: int = 16) -> torch.Tensor:
    return torch.zeros(3 + 16 * parts, dtype=torch.int64, device=DEVICE)


def controls(entries: int, seed: int, position: int, top_k: int | None = None, top_p: float | None = None) -> list:
    """What `sample` takes between logits and work."""
    values = ([seed], [position], [0.8], [min(top_k or entries, entries)], [top_p or 1.0])
    return [*(torch.tensor(value, device=DEVICE) for value in values), top_k is not None or top_p is not None]


def require_same(logits: torch.Tensor, space: torch.Tensor, *asked: Any) -> int:
    """The token that specification and kernel draw from `logits`: greedily, or as `controls` are `asked`."""
    name, given = ("sample", controls(len(logits), *asked)) if asked else ("greedy", [])
    tokens = [torch.full((1,), -7, device=DEVICE) for _ in range(2)]
    for table, token in zip((ops.REFERENCE, kernels.TRITON), tokens, strict=True):
        table[name](logits, *given, space, token)
    assert int(tokens[0]) == int(tokens[1])
    assert int(space[0]) == 0  # the next launch, or replay, counts from there
    return int(tokens[0])


FILTERS = [(1, None), (5, None), (None, 0.8), (50, 0.7)]


@pytest.mark.parametrize("entries", [1, 7, 512, 2000])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), *FILTERS])
def test_triton_sampler_draws_the_same_tokens(entries: int, top_k: int | None, top_p: float | None) -> None:
    """A threshold or a random number that differs from the specification by one bit."""
    torch.manual_seed(entries)
    logits, space = (torch.randn(entries) * 3).to(DEVICE), work()
    for seed in (1, 2**31 + 7, 2**63 - 1):  # a sign bit of either half
        require_same(logits, space, seed, seed % 999, top_k, top_p)
    require_same(logits, space)


@pytest.mark.parametrize("entries", [4096, 4097, 16389])
def test_triton_sampler_over_several_programs(entries: int) -> None:
    """A program whose entries are numbered from zero or that nobody waits for, work that is not ready for another."""
    torch.manual_seed(entries)
    logits, space = (torch.randn(entries) * 3).to(DEVICE), work()
    for position in range(4):
        require_same(logits, space)
        require_same(logits, space, 3, position)
        require_same(logits, space, 3, position, *FILTERS[position])
    require_same(logits, work(parts=2), 3, 5)


def test_triton_sampler_in_the_memory_of_a_runtime() -> None:
    """A work area too small for the programs of a vocabulary."""
    torch.manual_seed(3)
    logits, space = torch.randn(16389).to(DEVICE), Controls(torch.device(DEVICE), "hybridlab_jit").work
    require_same(logits, space, 7, 7, 1000, 0.9)


@pytest.mark.parametrize("step", [1, 4095, 4096])
def test_triton_gives_ties_to_the_lowest_index(step: int) -> None:
    """The program that happens to be last winning a tie; -0 taken to be below 0."""
    logits, space = torch.full((12289,), -1.0, device=DEVICE), work()
    logits[100 + step::step] = 0.0
    logits[100] = -0.0
    assert require_same(logits, space) == 100


@pytest.mark.parametrize(("top_k", "top_p"), [(2, None), (None, 0.5), (3, 0.3)])
def test_triton_thresholds_keep_ties(top_k: int | None, top_p: float | None) -> None:
    """Of equal entries at a threshold, some in another program, as many kept as top-k says, or a -0 dropped."""
    logits, space = torch.full((9000,), -50.0, device=DEVICE), work()
    logits[:9000:900], logits[1800] = 0.0, -0.0
    drawn = {require_same(logits, space, 5, position, top_k, top_p) for position in range(3)}
    assert len(drawn) > 1
    assert all(token % 900 == 0 for token in drawn)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 50, 4096, 9999])
def test_triton_gives_no_token_for_broken_logits(bad: float, at: int) -> None:
    """A maximum that skips NaN, as GPUs' do, or a program that alone has seen it."""
    logits, space = torch.zeros(10000, device=DEVICE), work()
    logits[at] = bad
    assert require_same(logits, space) == -1
    assert require_same(logits, space, 1, 2) == -1
    assert require_same(logits, space, 1, 2, 5, 0.5) == -1


def test_triton_takes_minus_infinity_for_what_it_is() -> None:
    """A token out of entries that are all impossible, none where one is possible, or an impossible one drawn."""
    logits, space = torch.full((9000,), -float("inf"), device=DEVICE), work()
    for asked in ((), (1, 2), (1, 2, 5, 0.5)):
        assert require_same(logits, space, *asked) == -1
    logits[8000] = -1e38
    for asked in ((), (1, 2), (1, 2, 5, 0.5), (1, 3, None, 0.9)):
        assert require_same(logits, space, *asked) == 8000


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
    logits, (work, plain, jit) = torch.randn(1500), (torch.zeros(1, dtype=torch.int64) for _ in range(3))
    for position in (0, 1, 77, 4095):
        controls = [torch.tensor(value) for value in ([seed], [position], [0.9], [40], [0.95])]
        for filtered in (False, True):
            torch.ops.hybridlab.sample.default(logits, *controls, filtered, work, plain)
            torch.ops.hybridlab_jit.sample.default(logits, *controls, filtered, work, jit)
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
    token = torch.zeros(1, dtype=torch.int64)
    worker = threading.Thread(target=torch.ops.hybridlab_jit.greedy.default, args=(torch.zeros(33), token, token))
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
        inductor.bind("greedy", (torch.zeros(31), *torch.zeros(2, 1, dtype=torch.int64)))


@pytest.mark.parametrize("how", ["triton", "inductor"])
def test_tokens_are_given_out_until_one_ends_the_request(how: str) -> None:
    """A token under the number of another, one too many, or one behind the end."""
    stops = torch.tensor([9, -2, -2, 300], device=DEVICE)
    asked = [(count, left, over, token) for count in (0, 6, 7, 2**31 - 2) for left in (0, 1, 5) for over in (0, 1)
             for token in (0, 8, 9, 300, -1, 151_935)]
    for count, left, over, token in asked:
        found = []
        for function in (ops.emit, None):
            state, ring = torch.tensor([count, left, over], device=DEVICE), torch.arange(7, device=DEVICE)
            args = (torch.tensor([token], device=DEVICE), stops, state, ring)
            if function is None and how == "inductor":
                kernels.bind("emit", args)()
            else:
                (function or emit.emit)(*args)
            found.append((state.tolist(), ring.tolist()))
        given = bool(left and not over)
        place = count % 7
        assert found[0] == found[1]
        assert found[0][0] == [count + given, left - given, int(over or (given and token in (9, 300, -1)))]
        assert found[0][1] == [*range(place), (count + 1 << 32) + token + 1 if given else place, *range(place + 1, 7)]
