"""The fused decode kernels against their specification in double precision, under Triton's interpreter on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridlab import fusedops
from hybridlab.kernels import attend_next, gemm, gemv
from hybridlab.tuning import LIBRARY, Tile

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy on masked lanes of the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
EPS = {torch.float32: 1e-5, torch.float16: 2e-3}  # of the largest value; IEEE half has 11 bits
TILES = [Tile(4, 64, 1), Tile(8, 32, 2)]


def noise(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def wide(args: tuple) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else
            a.clone() if isinstance(a, Tensor) else a for a in args]


def require_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert got.isfinite().all()
    worst = (got.double() - exact.double()).abs().max() / exact.abs().max()
    assert worst < EPS[dtype], float(worst)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("depth", "sizes", "biased"), [(64, (64, 32, 32), False), (100, (33, 7, 5), True),
                                                        (17, (1, 1, 1), True), (160, (130, 0, 0), False)])
def test_project(depth: int, sizes: tuple, biased: bool, tile: Tile, dtype: torch.dtype) -> None:
    """A row of one matrix taken for another's, the last columns forgotten, a bias, the norm or its eps left out."""
    torch.manual_seed(depth)
    weights = [noise(size, depth, scale=depth**-0.5, dtype=dtype) if size else None for size in sizes]
    biases = [noise(size, dtype=dtype) if biased and size else None for size in sizes]
    x = noise(depth, scale=2e-3 if biased else 3.0, dtype=dtype)
    args = (x, noise(depth, dtype=dtype), 1e-5, *weights, *biases, False)
    out, exact = (torch.full((sum(sizes),), float("nan"), device=DEVICE, dtype=d) for d in (dtype, torch.float64))
    gemv.project(*args, out, tile=tile)
    fusedops.project(*wide(args), exact)
    require_close(out, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("depth", "rows"), [(64, 160), (100, 33), (17, 1)])
def test_swiglu(depth: int, rows: int, tile: Tile, dtype: torch.dtype) -> None:
    """Gate and up exchanged, or SiLU of the wrong one."""
    torch.manual_seed(rows)
    gate, up = (noise(rows, depth, scale=depth**-0.5, dtype=dtype) for _ in range(2))
    x = noise(depth, scale=1e-3 if rows == 33 else 3.0, dtype=dtype)
    args = (x, noise(depth, dtype=dtype), 1e-6, gate, up, False)
    out, exact = (torch.full((rows,), float("nan"), device=DEVICE, dtype=d) for d in (dtype, torch.float64))
    fusedops.swiglu(*wide(args), exact)
    for matrices in ((gate, up), (torch.cat((gate, up)), None)):
        gemv.swiglu(*args[:3], *matrices, False, out.fill_(float("nan")), tile=tile)
        require_close(out, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("depth", "rows", "biased"), [(160, 64, False), (100, 33, True), (17, 1, False)])
def test_residual(depth: int, rows: int, biased: bool, tile: Tile, dtype: torch.dtype) -> None:
    """What was there overwritten, or added twice where two programs meet a row."""
    torch.manual_seed(rows)
    out = noise(rows, dtype=dtype)
    exact = out.double()
    args = (noise(depth, dtype=dtype), noise(rows, depth, scale=depth**-0.5, dtype=dtype),
            noise(rows, dtype=dtype) if biased else None, False)
    gemv.residual(*args, out, tile=tile)
    fusedops.residual(*wide(args), exact)
    require_close(out, exact, dtype)


TOKENS = [2, 16, 33, 65, 130]  # tiles of 16 and 64, with padding, and beyond what the kernels themselves multiply


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("sizes", "biased"), [((70, 33, 5), True), ((64, 64, 64), False), ((130, 0, 0), True)])
def test_project_of_several_tokens(sizes: tuple, biased: bool, tokens: int, dtype: torch.dtype) -> None:
    """A matrix written over its neighbour's columns, the norm of another token, a bias of another matrix."""
    torch.manual_seed(tokens)
    weights = [noise(size, 100, scale=0.1, dtype=dtype) if size else None for size in sizes]
    biases = [noise(size, dtype=dtype) if biased and size else None for size in sizes]
    x = noise(tokens, 100, scale=2e-3 if biased else 3.0, dtype=dtype)
    args = (x, noise(100, dtype=dtype), 1e-5, *weights, *biases, False)
    out, exact = (torch.full((tokens, sum(sizes)), float("nan"), device=DEVICE, dtype=d)
                  for d in (dtype, torch.float64))
    gemm.project(*args, out)
    fusedops.project(*wide(args), exact)
    require_close(out, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rows", [64, 33])
def test_swiglu_of_several_tokens(rows: int, tokens: int, dtype: torch.dtype) -> None:
    """Gate and up, which share a tile, taken for each other."""
    torch.manual_seed(tokens)
    gate, up = (noise(rows, 100, scale=0.1, dtype=dtype) for _ in range(2))
    args = (noise(tokens, 100, scale=3.0, dtype=dtype), noise(100, dtype=dtype), 1e-6, gate, up, False)
    out, exact = (torch.full((tokens, rows), float("nan"), device=DEVICE, dtype=d) for d in (dtype, torch.float64))
    fusedops.swiglu(*wide(args), exact)
    roomy = torch.full((tokens, 2 * rows), float("nan"), device=DEVICE, dtype=dtype)[:, :rows]
    for matrices in ((gate, up), (torch.cat((gate, up)), None)):
        for place in (out, roomy):
            gemm.swiglu(*args[:3], *matrices, False, place.fill_(float("nan")))
            require_close(place, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("biased", [False, True])
def test_residual_of_several_tokens(biased: bool, tokens: int, dtype: torch.dtype) -> None:
    """What was there overwritten."""
    torch.manual_seed(tokens)
    out = noise(tokens, 70, dtype=dtype)
    exact = out.double()
    args = (noise(tokens, 200, dtype=dtype)[:, :100], noise(70, 100, scale=0.1, dtype=dtype),
            noise(70, dtype=dtype) if biased else None, False)
    gemm.residual(*args, out)
    fusedops.residual(*wide(args), exact)
    require_close(out, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [LIBRARY, Tile(16, 16, 1, 2), Tile(64, 32, 4, 3)], ids=str)
def test_several_tokens_with_a_given_tile(tile: Tile, dtype: torch.dtype) -> None:
    """A table's choice that changes the result: the last chunk or the last rows of a matrix left out, or library and
    kernel of different minds about what `residual` adds to."""
    torch.manual_seed(0)
    x, gain, start = noise(16, 100, dtype=dtype), noise(100, dtype=dtype), noise(16, 70, dtype=dtype)
    first, second = (noise(70, 100, scale=0.1, dtype=dtype) for _ in range(2))
    for kernel, reference, args in (
            (gemm.project, fusedops.project, (x, gain, 1e-5, first, None, None, None, None, None, False)),
            (gemm.swiglu, fusedops.swiglu, (x, gain, 1e-5, first, second, False)),
            (gemm.residual, fusedops.residual, (x, first, gain[:70], False))):
        out, exact = start.clone(), start.double()
        kernel(*args, out, tile=tile)
        reference(*wide(args), exact)
        require_close(out, exact, dtype)


PROMPTS = [  # tokens, heads, kv_heads, dim, span, window, normed
    (2, 4, 4, 64, 64, 0, True),     # a bucket that the prompt does not fill
    (5, 4, 2, 32, 5, 0, False),     # one that it does
    (17, 6, 2, 24, 20, 0, True),    # a head size that is no power of two
    (70, 8, 1, 16, 70, 7, False),   # a window; more heads than one program turns
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PROMPTS)
def test_attend_next_of_several_tokens(case: tuple, dtype: torch.dtype) -> None:
    """Keys and values exchanged, a token that sees the next one, rows beyond a bucket's slice of the cache written."""
    tokens, heads, kv_heads, dim, span, window, normed = case
    torch.manual_seed(tokens)
    whole = [torch.full((1, kv_heads, span + 3, dim), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    angles = torch.outer(torch.arange(span), 1000.0 ** -(torch.arange(dim // 2) / (dim // 2))).repeat(1, 2)
    gains = [noise(dim, dtype=dtype) for _ in range(2)] if normed else [None, None]
    args = [noise(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype), angles.cos().to(dtype).to(DEVICE),
            angles.sin().to(dtype).to(DEVICE), *gains, 1e-6, *(cache[:, :, :span] for cache in whole),
            torch.arange(tokens, device=DEVICE), dim**-0.5, window, False,
            torch.zeros(heads, 0, dim + 2, device=DEVICE), torch.zeros(kv_heads, dtype=torch.int32, device=DEVICE),
            noise(tokens, heads * dim, dtype=dtype)]
    exact = wide(args)
    attend_next.attend_next(*args)
    fusedops.attend_next(*exact)
    require_close(args[-1], exact[-1], dtype)
    for cache, wanted in zip(whole, exact[6:8], strict=True):
        assert torch.allclose(cache[:, :, :tokens].double(), wanted[:, :, :tokens], atol=EPS[dtype] * 4)
        assert cache[:, :, tokens:].isnan().all()


CASES = [  # heads, kv_heads, dim, capacity, position, window, splits, normed
    (4, 4, 32, 128, 0, 0, 4, False),      # the first token: three parts are empty
    (4, 4, 32, 128, 127, 0, 4, False),    # the last row of the cache
    (6, 2, 32, 300, 63, 0, 1, False),     # one part; the edge of a block
    (6, 2, 32, 300, 64, 0, 2, False),
    (8, 1, 16, 300, 255, 0, 4, False),    # one KV head for all; parts of exactly one block
    (8, 1, 16, 300, 256, 0, 4, False),
    (4, 2, 24, 300, 200, 100, 2, False),  # a window that starts inside a block, a head size that is no power of two
    (4, 2, 32, 300, 50, 100, 2, False),   # a window longer than the text
    (4, 2, 32, 300, 200, 1, 2, False),    # itself only
    (4, 2, 32, 300, 299, 0, 2, True),     # heads normalised before they are rotated
]


def step(heads: int, kv_heads: int, dim: int, capacity: int, position: int, window: int, splits: int, normed: bool,
         dtype: torch.dtype, scale: float = 1.0) -> tuple[list, list]:
    """Arguments up to `pdl`, and what the kernel writes; rows that were never written hold NaN, as memory may."""
    torch.manual_seed(heads * 1000 + position)
    caches = [noise(1, kv_heads, capacity, dim, dtype=dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :, position:] = float("nan")
    angles = torch.outer(torch.arange(capacity), 1000.0 ** -(torch.arange(dim // 2) / (dim // 2))).repeat(1, 2)
    gains = [noise(dim, dtype=dtype) for _ in range(2)] if normed else [None, None]
    args = [noise((heads + 2 * kv_heads) * dim, scale=scale, dtype=dtype), angles.cos().to(dtype).to(DEVICE),
            angles.sin().to(dtype).to(DEVICE), *gains, 1e-6, *caches, torch.tensor([position], device=DEVICE),
            dim**-0.5, window, False]
    work: list[Any] = [torch.full((heads, splits, dim + 2), float("nan"), device=DEVICE),
                       torch.zeros(kv_heads, dtype=torch.int32, device=DEVICE),
                       torch.full((heads * dim,), float("nan"), dtype=dtype, device=DEVICE)]
    return args, work


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attend_next(case: tuple, dtype: torch.dtype) -> None:
    """A part forgotten or counted twice, the token's own row read before it is written, a head of another group."""
    args, work = step(*case, dtype)
    exact = wide((*args, *work))
    attend_next.attend_next(*args, *work)
    fusedops.attend_next(*exact)
    require_close(work[2], exact[-1], dtype)
    position = case[4]
    for cache in (6, 7):
        assert torch.allclose(args[cache][:, :, position].double(), exact[cache][:, :, position], atol=EPS[dtype] * 4)
    assert not work[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_next_with_extreme_scores(dtype: torch.dtype) -> None:
    """exp() of a large score: infinity over infinity."""
    args, work = step(4, 2, 32, 300, 200, 0, 2, False, dtype, scale=100.0)
    exact = wide((*args, *work))
    attend_next.attend_next(*args, *work)
    fusedops.attend_next(*exact)
    assert work[2].isfinite().all()
    if dtype == torch.float32:
        require_close(work[2], exact[-1], dtype)
