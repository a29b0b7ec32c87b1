"""Triton: write new rows into a static KV cache, then attend up to positions read on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 64


@triton.jit
def _write(k, v, k_cache, v_cache, positions, k_head, k_row, v_head, v_row, cache_head, cache_row,
           dim: tl.constexpr, padded: tl.constexpr):
    """One program copies one row of one head into the cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, padded)
    inside = column < dim
    target = head * cache_head + tl.load(positions + row) * cache_row + column
    tl.store(k_cache + target, tl.load(k + head * k_head + row * k_row + column, mask=inside), mask=inside)
    tl.store(v_cache + target, tl.load(v + head * v_head + row * v_row + column, mask=inside), mask=inside)


@triton.jit
def _attend(q, k_cache, v_cache, positions, out, q_head, q_row, cache_head, cache_row, out_row, out_head,
            rows, group, span, window, scale, softcap,
            dim: tl.constexpr, padded: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """One program holds `block_rows` query rows of one KV head; a row is a (token, query head of the group) pair.

    Online softmax over blocks of cache rows, from the first that a window leaves visible to the last position.
    """
    kv_head = tl.program_id(0)
    packed = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    token, head = packed // group, kv_head * group + packed % group
    valid = token < rows
    position = tl.load(positions + token, mask=valid, other=0)
    column = tl.arange(0, padded)
    inside = column < dim
    query = tl.load(q + head[:, None] * q_head + token[:, None] * q_row + column[None, :],
                    mask=valid[:, None] & inside[None, :], other=0.0)
    last = tl.minimum(tl.max(position, 0) + 1, span)
    first = tl.zeros([], dtype=tl.int64)
    if window > 0:
        earliest = tl.min(tl.where(valid, position, 9223372036854775807), 0) - window + 1
        first = tl.maximum(earliest, 0) // block_columns * block_columns
    top = tl.full([block_rows], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_rows], dtype=tl.float32)
    mixed = tl.zeros([block_rows, padded], dtype=tl.float32)
    while first < last:
        key_row = first + tl.arange(0, block_columns)
        there = key_row < last
        at = kv_head * cache_head + key_row[:, None] * cache_row + column[None, :]
        key = tl.load(k_cache + at, mask=there[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if softcap > 0:
            bent = scores / softcap
            scores = (1 - 2 / (tl.exp(2 * bent) + 1)) * softcap
        visible = there[None, :] & (key_row[None, :] <= position[:, None])
        if window > 0:
            visible = visible & (key_row[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp(top - safe)
        weight = tl.exp(scores - safe[:, None])
        value = tl.load(v_cache + at, mask=there[:, None] & inside[None, :], other=0.0)
        mixed = mixed * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        top = higher
        first += block_columns
    result = mixed / total[:, None]
    target = token[:, None] * out_row + head[:, None] * out_head + column[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])


def attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
           scale: float, span: int, window: int, softcap: float, out: Tensor) -> None:
    """`hybridlab.ops.attend` in two launches. Scores and sums are float32; weights take v's dtype, as there.

    The cost follows the device-side position, not `span`, so one capture serves every context length.
    """
    rows, dim = q.shape[2:]
    kv_heads = k_cache.shape[1]
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    padded = max(16, triton.next_power_of_2(dim))
    _write[(rows, kv_heads)](k, v, k_cache, v_cache, positions, k.stride(1), k.stride(2), v.stride(1), v.stride(2),
                             k_cache.stride(1), k_cache.stride(2), dim, padded)
    forward(q, k_cache, v_cache, positions, scale, span, window, softcap, out)


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float, span: int, window: int,
            softcap: float, out: Tensor) -> None:
    """The attention of `attend`, of rows that are in the cache. `out` may be the memory of q."""
    heads, rows, dim = q.shape[1:]
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    block_rows = 16 if rows == 1 else 128 // q.element_size()  # 16 is the least a matrix unit takes
    grid = (kv_heads, triton.cdiv(rows * group, block_rows))
    _attend[grid](q, k_cache, v_cache, positions, out, q.stride(1), q.stride(2), k_cache.stride(1), k_cache.stride(2),
                  out.stride(1), out.stride(2), rows, group, span, window, scale, softcap,
                  dim, max(16, triton.next_power_of_2(dim)), block_rows, BLOCK_COLUMNS)
