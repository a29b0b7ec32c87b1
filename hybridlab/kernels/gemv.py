"""Triton: products of weight matrices with one vector, with the norm before and what follows fused in.

A decode step is these products, and they take as long as reading the weights. One program reads `block_rows` rows in
chunks of `block` columns. With programmatic dependent launch (`pdl`) it starts while the kernel before still runs, and
has its first chunk of weights, which nothing writes, on the way when it comes to wait for that kernel's result. All
else is touched after the wait.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybridlab import tuning
from hybridlab.fusedops import halves
from hybridlab.kernels.ahead import Launched
from hybridlab.tuning import Tile

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _start(pdl: tl.constexpr):
    """The next kernel may start, and this one waits for all that came before to be finished and seen."""
    if pdl:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _chunk(weight, row, rows, start, depth: tl.constexpr, block: tl.constexpr):
    column = start + tl.arange(0, block)
    return tl.load(weight + row.to(tl.int64)[:, None] * depth + column[None, :],
                   mask=(row < rows)[:, None] & (column < depth)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _vector(x, gain, start, depth: tl.constexpr, block: tl.constexpr, normed: tl.constexpr):
    """A chunk of x, times the norm's gain, and its squares; x and gain are read by every program, from the L2 cache."""
    column = start + tl.arange(0, block)
    plain = tl.load(x + column, mask=column < depth, other=0.0).to(tl.float32)
    scaled = plain
    if normed:
        scaled = plain * tl.load(gain + column, mask=column < depth, other=0.0).to(tl.float32)
    return scaled, plain * plain


@Launched
@triton.jit
def _project(x, gain, eps, a, b, c, a_bias, b_bias, c_bias, out, a_rows, b_rows, c_rows,
             depth: tl.constexpr, normed: tl.constexpr, biased: tl.constexpr, added: tl.constexpr, pdl: tl.constexpr,
             block_rows: tl.constexpr, block: tl.constexpr):
    """Rows of up to three matrices, laid out one after the other in `out`; `added` to it, or written over it."""
    tile = tl.program_id(0)
    weight, bias, rows, base = a, a_bias, a_rows, 0
    a_tiles, b_tiles = tl.cdiv(a_rows, block_rows), tl.cdiv(b_rows, block_rows)
    if tile >= a_tiles + b_tiles:
        weight, bias, rows, base = c, c_bias, c_rows, a_rows + b_rows
        tile -= a_tiles + b_tiles
    elif tile >= a_tiles:
        weight, bias, rows, base = b, b_bias, b_rows, a_rows
        tile -= a_tiles
    row = tile * block_rows + tl.arange(0, block_rows)
    chunk = _chunk(weight, row, rows, 0, depth, block)
    _start(pdl)
    total = tl.zeros([block_rows, block], dtype=tl.float32)
    squares = tl.zeros([block], dtype=tl.float32)
    for start in tl.static_range(0, depth, block):
        current = chunk
        if start + block < depth:
            chunk = _chunk(weight, row, rows, start + block, depth, block)
        part, squared = _vector(x, gain, start, depth, block, normed)
        total += current.to(tl.float32) * part[None, :]
        squares += squared
    result = tl.sum(total, 1)
    if normed:
        result *= tl.rsqrt(tl.sum(squares, 0) / depth + eps)
    if biased:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    if added:
        result += tl.load(out + base + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + base + row, result.to(x.dtype.element_ty).to(out.dtype.element_ty), mask=row < rows)


@Launched
@triton.jit
def _swiglu(x, gain, eps, gate, up, out, rows, depth: tl.constexpr, pdl: tl.constexpr,
            block_rows: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    gate_chunk = _chunk(gate, row, rows, 0, depth, block)
    up_chunk = _chunk(up, row, rows, 0, depth, block)
    _start(pdl)
    gates = tl.zeros([block_rows, block], dtype=tl.float32)
    ups = tl.zeros([block_rows, block], dtype=tl.float32)
    squares = tl.zeros([block], dtype=tl.float32)
    for start in tl.static_range(0, depth, block):
        gate_now, up_now = gate_chunk, up_chunk
        if start + block < depth:
            gate_chunk = _chunk(gate, row, rows, start + block, depth, block)
            up_chunk = _chunk(up, row, rows, start + block, depth, block)
        part, squared = _vector(x, gain, start, depth, block, True)
        gates += gate_now.to(tl.float32) * part[None, :]
        ups += up_now.to(tl.float32) * part[None, :]
        squares += squared
    scale = tl.rsqrt(tl.sum(squares, 0) / depth + eps)
    opened = tl.sum(gates, 1) * scale
    result = opened / (1 + tl.exp(-opened)) * (tl.sum(ups, 1) * scale)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)


def project(x: Tensor, gain: Tensor, eps: float, a: Tensor, b: Tensor | None, c: Tensor | None, a_bias: Tensor | None,
            b_bias: Tensor | None, c_bias: Tensor | None, pdl: bool, out: Tensor, tile: Tile | None = None) -> None:
    """`hybridlab.fusedops.project` of one token in one launch; biases are given for all matrices or for none."""
    sizes = [0 if weight is None else weight.shape[0] for weight in (a, b, c)]
    tile = tile or _tuned("project", 1, sum(sizes), a)
    grid = (sum(triton.cdiv(size, tile.rows) for size in sizes),)
    biased = a_bias is not None
    biases = [bias if bias is not None else x for bias in (a_bias, b_bias, c_bias)]
    _project[grid](x, gain, eps, a, a if b is None else b, a if c is None else c, *biases, out, *sizes,
                   x.shape[0], True, biased, False, pdl, tile.rows, tile.columns, **_launch(pdl, tile))


def residual(x: Tensor, weight: Tensor, bias: Tensor | None, pdl: bool, out: Tensor, tile: Tile | None = None) -> None:
    """`hybridlab.fusedops.residual` of one token in one launch."""
    rows, depth = weight.shape
    tile = tile or _tuned("residual", 1, rows, weight)
    given = x if bias is None else bias
    _project[(triton.cdiv(rows, tile.rows),)](x, x, 0.0, weight, weight, weight, given, given, given, out, rows, 0, 0,
                                              depth, False, bias is not None, True, pdl, tile.rows, tile.columns,
                                              **_launch(pdl, tile))


def swiglu(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor | None, pdl: bool, out: Tensor,
           tile: Tile | None = None) -> None:
    """`hybridlab.fusedops.swiglu` of one token in one launch."""
    gate, up = halves(gate, up)
    rows, depth = gate.shape
    tile = tile or _tuned("swiglu", 1, rows, gate)
    _swiglu[(triton.cdiv(rows, tile.rows),)](x, gain, eps, gate, up, out, rows, depth, pdl, tile.rows, tile.columns,
                                             **_launch(pdl, tile))


def _tuned(op: str, tokens: int, rows: int, weight: Tensor) -> Tile:
    device = weight.device.index if weight.is_cuda else None
    return tuning.tile(op, tokens, rows, weight.shape[1], str(weight.dtype).removeprefix("torch."), device)


def _launch(pdl: bool, tile: Tile | None = None) -> dict[str, object]:
    return {**({"num_warps": tile.warps} if tile else {}), **({"launch_pdl": True} if pdl else {})}
