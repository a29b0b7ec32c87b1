"""Triton: write new rows into a static KV cache, then attend up to positions read on the device.

Of one row the context is split, so that all of a GPU works at batch 1, and a second launch puts the parts together.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.ahead import Launched

BLOCK_COLUMNS = 64
PROGRAMS = 132   # that attention is split into where the number of multiprocessors is not known
MOST_SPLITS = 16
STAGES = 2       # blocks of keys and values under way, of heads up to 256 bytes
WAVES = 2        # programs of attention for each multiprocessor


@Launched
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
def _fold(query, k_cache, v_cache, base, cache_row, first, last, position, window, scale, softcap, top, total, mixed,
          dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, masked: tl.constexpr, capped: tl.constexpr):
    """One block of keys and values into the running softmax of base 2. Unmasked, every row sees all of the block."""
    row, column = first + tl.arange(0, block), tl.arange(0, padded)
    inside = (column < dim)[None, :]
    if masked:
        inside = inside & (row < last)[:, None]
    at = base + row.to(tl.int64)[:, None] * cache_row + column[None, :]
    key = tl.load(k_cache + at, mask=inside, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    factor = scale * 1.4426950408889634
    if capped:
        scores = (1 - 2 / (tl.exp(2 * (scores * scale / softcap)) + 1)) * softcap
        factor = 1.4426950408889634
    if masked:
        visible = (row < last)[None, :] & (row[None, :] <= position[:, None])
        if window > 0:
            visible = visible & (row[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * factor)
    safe = higher
    if masked:
        safe = tl.where(higher == float("-inf"), 0.0, higher)
    kept, weight = tl.exp2(top - safe), tl.exp2(scores * factor - safe[:, None])
    value = tl.load(v_cache + at, mask=inside, other=0.0)
    mixed = mixed * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return higher, total * kept + tl.sum(weight, 1), mixed


@Launched
@triton.jit
def _attend(q, k_cache, v_cache, positions, out, q_head, q_row, cache_head, cache_row, out_row, out_head,
            rows, group, span, window, scale, softcap,
            dim: tl.constexpr, padded: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
            stages: tl.constexpr, capped: tl.constexpr):
    """One program holds `block_rows` query rows of one KV head; a row is a (token, query head of the group) pair.

    Online softmax over blocks of cache rows, from the first that a window leaves visible to the last position; of
    blocks that every row sees whole nothing is masked. The longest programs begin first.
    """
    kv_head = tl.program_id(0)
    packed = (tl.num_programs(1) - 1 - tl.program_id(1)) * block_rows + tl.arange(0, block_rows)
    token, head = packed // group, kv_head * group + packed % group
    valid = token < rows
    position = tl.load(positions + token, mask=valid, other=0).to(tl.int32)
    column = tl.arange(0, padded)
    inside = column < dim
    query = tl.load(q + head[:, None] * q_head + token[:, None] * q_row + column[None, :],
                    mask=valid[:, None] & inside[None, :], other=0.0)
    base = kv_head.to(tl.int64) * cache_head
    last, begin = tl.minimum(tl.max(position, 0) + 1, span), 0
    earliest = tl.min(tl.where(valid, position, 2147483647), 0)
    whole = tl.minimum(earliest + 1, span) // block_columns * block_columns
    if window > 0:
        begin = tl.maximum(earliest - window + 1, 0) // block_columns * block_columns
        whole = begin
    top = tl.full([block_rows], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_rows], dtype=tl.float32)
    mixed = tl.zeros([block_rows, padded], dtype=tl.float32)
    for first in tl.range(0, whole if window == 0 else 0, block_columns, num_stages=stages):
        top, total, mixed = _fold(query, k_cache, v_cache, base, cache_row, first, last, position, window, scale,
                                  softcap, top, total, mixed, dim, padded, block_columns, False, capped)
    for first in tl.range(whole, last, block_columns, num_stages=stages):
        top, total, mixed = _fold(query, k_cache, v_cache, base, cache_row, first, last, position, window, scale,
                                  softcap, top, total, mixed, dim, padded, block_columns, True, capped)
    result = mixed / total[:, None]
    target = token[:, None] * out_row + head[:, None] * out_head + column[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def _rows(new, stored, base, cache_row, first, last, position, dim: tl.constexpr, padded: tl.constexpr,
          block: tl.constexpr):
    """Cache rows `first` to `last`, `block` at most; that of `position`, on its way into the cache, is `new`."""
    at, column = first + tl.arange(0, block), tl.arange(0, padded)
    there = (at < last) & (at != position)
    rows = tl.load(stored + base + at.to(tl.int64)[:, None] * cache_row + column[None, :],
                   mask=there[:, None] & (column < dim)[None, :], other=0.0)
    return tl.where((at == position)[:, None], new[None, :], rows)


@Launched
@triton.jit
def _attend_part(q, k, v, k_cache, v_cache, positions, partial, q_head, k_head, v_head, cache_head, cache_row,
                 capacity, group, span, window, scale, softcap,
                 dim: tl.constexpr, padded: tl.constexpr, block_heads: tl.constexpr, block: tl.constexpr,
                 splits: tl.constexpr):
    """One program: the `group` query heads of one KV head over one part of the context, by online softmax.

    It leaves sums of weighted values and of weights, and the top score: -infinity for a part without rows.
    """
    kv_head, split = tl.program_id(0), tl.program_id(1)
    column, member = tl.arange(0, padded), tl.arange(0, block_heads)
    valid = (member < group)[:, None] & (column < dim)[None, :]
    head = kv_head * group + member
    base = kv_head.to(tl.int64) * cache_head
    position = tl.minimum(tl.load(positions), capacity - 1).to(tl.int32)
    query = tl.load(q + head[:, None] * q_head + column[None, :], mask=valid, other=0.0)
    key = tl.load(k + kv_head * k_head + column, mask=column < dim, other=0.0)
    value = tl.load(v + kv_head * v_head + column, mask=column < dim, other=0.0)
    if split == 0:
        row = base + position.to(tl.int64) * cache_row + column
        tl.store(k_cache + row, key, mask=column < dim)
        tl.store(v_cache + row, value, mask=column < dim)
    earliest = 0
    if window > 0:
        earliest = tl.maximum(position - window + 1, 0)
    end = tl.minimum(position + 1, span)
    share = tl.cdiv(tl.cdiv(end - earliest, splits), block) * block
    first = earliest + split * share
    last = tl.minimum(first + share, end)
    top = tl.full([block_heads], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_heads], dtype=tl.float32)
    mixed = tl.zeros([block_heads, padded], dtype=tl.float32)
    while first < last:
        keys = _rows(key, k_cache, base, cache_row, first, last, position, dim, padded, block)
        values = _rows(value, v_cache, base, cache_row, first, last, position, dim, padded, block)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if softcap > 0:
            scores = (1 - 2 / (tl.exp(2 * (scores / softcap)) + 1)) * softcap
        scores = tl.where((first + tl.arange(0, block) < last)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        kept, weight = tl.exp(top - safe), tl.exp(scores - safe[:, None])
        mixed = mixed * kept[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        top = higher
        first += block
    slot = partial + (head * splits + split) * (dim + 2)
    tl.store(slot[:, None] + column[None, :], mixed, mask=valid)
    tl.store(slot + dim, total, mask=member < group)
    tl.store(slot + dim + 1, top, mask=member < group)


@Launched
@triton.jit
def _combine(partial, out, out_head, dim: tl.constexpr, padded: tl.constexpr, splits: tl.constexpr):
    """One program puts the parts of one query head together."""
    head, column = tl.program_id(0), tl.arange(0, padded)
    slot = partial + (head * splits + tl.arange(0, splits)) * (dim + 2)
    inside = column < dim
    mixed = tl.load(slot[:, None] + column[None, :], mask=inside[None, :], other=0.0)
    total, top = tl.load(slot + dim), tl.load(slot + dim + 1)
    factor = tl.where(top == float("-inf"), 0.0, tl.exp(top - tl.max(top, 0)))
    result = tl.sum(factor[:, None] * mixed, 0) / tl.sum(factor * total, 0)
    tl.store(out + head * out_head + column, result.to(out.dtype.element_ty), mask=inside)


@cache
def splits(device: torch.device, kv_heads: int) -> int:
    """Parts of the context, so that all multiprocessors have one: a power of two."""
    programs = PROGRAMS
    if device.type == "cuda":
        programs = torch.cuda.get_device_properties(device).multi_processor_count
    return 1 << min(MOST_SPLITS, max(1, WAVES * programs // kv_heads)).bit_length() - 1


def attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
           scale: float, span: int, window: int, softcap: float, out: Tensor) -> None:
    """`hybridlab.ops.attend` in two launches. Scores and sums are float32; weights take v's dtype, as there.

    The cost follows the device-side position, not `span`, so one capture serves every context length.
    """
    rows, dim = q.shape[2:]
    kv_heads = k_cache.shape[1]
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    padded = max(16, triton.next_power_of_2(dim))
    if rows == 1:
        _attend_one(q, k, v, k_cache, v_cache, positions, scale, span, window, softcap, padded, out)
        return
    _write[(rows, kv_heads)](k, v, k_cache, v_cache, positions, k.stride(1), k.stride(2), v.stride(1), v.stride(2),
                             k_cache.stride(1), k_cache.stride(2), dim, padded)
    forward(q, k_cache, v_cache, positions, scale, span, window, softcap, out)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float,
                span: int, window: int, softcap: float, padded: int, out: Tensor) -> None:
    heads, _, dim = q.shape[1:]
    kv_heads, capacity = k_cache.shape[1:3]
    group, parts = heads // kv_heads, splits(q.device, kv_heads)
    wide = q.element_size() > 2
    block = BLOCK_COLUMNS // 2 if wide and padded > 128 else BLOCK_COLUMNS  # as shared memory allows
    partial = q.new_empty((heads, parts, dim + 2), dtype=torch.float32)
    _attend_part[(kv_heads, parts)](
        q, k, v, k_cache, v_cache, positions, partial, q.stride(1), k.stride(1), v.stride(1), k_cache.stride(1),
        k_cache.stride(2), capacity, group, span, window, scale, softcap, dim, padded,
        max(16, triton.next_power_of_2(group)), block, parts,  # 16 is the least a matrix unit takes
        num_warps=8 if wide else 4)
    _combine[(heads,)](partial, out, out.stride(2), dim, padded, parts)


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float, span: int, window: int,
            softcap: float, out: Tensor) -> None:
    """The attention of `attend` of several rows that are in the cache. `out` may be the memory of q."""
    heads, rows, dim = q.shape[1:]
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    block_rows, padded = 128 // q.element_size(), max(16, triton.next_power_of_2(dim))
    grid = (kv_heads, triton.cdiv(rows * group, block_rows))
    _attend[grid](q, k_cache, v_cache, positions, out, q.stride(1), q.stride(2), k_cache.stride(1), k_cache.stride(2),
                  out.stride(1), out.stride(2), rows, group, span, window, scale, softcap,
                  dim, padded, block_rows, BLOCK_COLUMNS, STAGES if padded * q.element_size() <= 256 else 1,
                  softcap > 0)
