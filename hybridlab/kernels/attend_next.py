"""Triton: the attention of one decode step, from projected queries, keys and values to the mixed values.

The context is split, so that all of a GPU works at batch 1; whichever program of a KV head finishes last combines the
parts. With programmatic dependent launch the position and the first cache rows of a part are read before the wait for
the projection: earlier steps wrote them, and a step begins with kernels that start only when all before have ended.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels import attend
from hybridlab.kernels.ahead import Launched
from hybridlab.kernels.gemv import _launch, _start

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK_COLUMNS, WARPS = 64, 4
TURNED_HEADS = 16  # of one token by one program


@triton.jit
def _half(x, gain, cos, sin, at, inside, dim: tl.constexpr, normed: tl.constexpr, eps):
    """Rows of heads at addresses `at` (of their first half), normalised and rotated: both halves, in float32."""
    half: tl.constexpr = dim // 2
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    if normed:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / dim + eps)[:, None]
        column = tl.arange(0, first.shape[1])
        first *= scale * tl.load(gain + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(gain + half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rows(k_cache, v_cache, base, first, last, dim: tl.constexpr, padded: tl.constexpr, halved: tl.constexpr,
          block: tl.constexpr):
    """Rows `first` to `last`, `block` at most, of a head's keys, in halves as they are rotated, and of its values."""
    half: tl.constexpr = dim // 2
    at = first + tl.arange(0, block)
    fold, column = tl.arange(0, halved), tl.arange(0, padded)
    row = base + at.to(tl.int64)[:, None] * dim
    inside = (at < last)[:, None] & (fold < half)[None, :]
    low = tl.load(k_cache + row + fold[None, :], mask=inside, other=0.0)
    high = tl.load(k_cache + row + half + fold[None, :], mask=inside, other=0.0)
    values = tl.load(v_cache + row + column[None, :], mask=(at < last)[:, None] & (column < dim)[None, :], other=0.0)
    return low, high, values


@Launched
@triton.jit
def _attend_next(qkv, cos, sin, q_gain, k_gain, eps, k_cache, v_cache, positions, partial, arrived, out,
                 cache_head, capacity, group, heads, kv_heads, scale, window,
                 dim: tl.constexpr, padded: tl.constexpr, halved: tl.constexpr, block_heads: tl.constexpr,
                 block: tl.constexpr, splits: tl.constexpr, normed: tl.constexpr, pdl: tl.constexpr):
    """One program: the `group` query heads of one KV head over one part of the context, by online softmax."""
    if pdl:
        gdc_launch_dependents()
    kv_head, split = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = dim // 2
    dtype = k_cache.dtype.element_ty
    base = kv_head.to(tl.int64) * cache_head
    position = tl.minimum(tl.load(positions), capacity - 1).to(tl.int32)
    earliest = 0
    if window > 0:
        earliest = tl.maximum(position - window + 1, 0)
    share = tl.cdiv(tl.cdiv(position + 1 - earliest, splits), block) * block
    parts = tl.cdiv(position + 1 - earliest, share)  # those that have a row
    first = earliest + split * share
    last = tl.minimum(first + share, position + 1)
    fold, column, member = tl.arange(0, halved), tl.arange(0, padded), tl.arange(0, block_heads)
    turn_cos = tl.load(cos + position * dim + fold, mask=fold < half, other=0.0).to(tl.float32)[None, :]
    turn_sin = tl.load(sin + position * dim + fold, mask=fold < half, other=0.0).to(tl.float32)[None, :]
    stored = tl.minimum(last, position)  # the row of the token itself is on its way into the cache
    keys, keys_high, values = _rows(k_cache, v_cache, base, first, stored, dim, padded, halved, block)
    if pdl:
        gdc_wait()
    head = kv_head * group + member
    query, query_high = _half(qkv, q_gain, turn_cos, turn_sin, head[:, None] * dim + fold[None, :],
                              (member < group)[:, None] & (fold < half)[None, :], dim, normed, eps)
    query, query_high = query.to(dtype), query_high.to(dtype)
    one = tl.zeros([1], dtype=tl.int32)
    key_at = (heads + kv_head + one)[:, None] * dim + fold[None, :]
    key, key_high = _half(qkv, k_gain, turn_cos, turn_sin, key_at, (fold < half)[None, :], dim, normed, eps)
    key, key_high = key.to(dtype), key_high.to(dtype)
    value = tl.load(qkv + (heads + kv_heads + kv_head) * dim + column, mask=column < dim, other=0.0)
    if split == 0:
        row = base + position * dim
        tl.store(k_cache + row + fold[None, :], key, mask=(fold < half)[None, :])
        tl.store(k_cache + row + half + fold[None, :], key_high, mask=(fold < half)[None, :])
        tl.store(v_cache + row + column, value, mask=column < dim)
    top = tl.full([block_heads], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_heads], dtype=tl.float32)
    mixed = tl.zeros([block_heads, padded], dtype=tl.float32)
    while first < last:
        at = first + tl.arange(0, block)
        own = (at == position)[:, None]
        keys, keys_high = tl.where(own, key, keys), tl.where(own, key_high, keys_high)
        values = tl.where(own, value[None, :], values)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        scores += tl.dot(query_high, tl.trans(keys_high), input_precision="ieee")
        scores = tl.where((at < last)[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        kept, weight = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        mixed = mixed * kept[:, None] + tl.dot(weight.to(dtype), values, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        top = higher
        first += block
        keys, keys_high, values = _rows(k_cache, v_cache, base, first, stored, dim, padded, halved, block)
    if split < parts:
        _combine(partial, arrived, out, mixed, total, top, head, member < group, kv_head, split, parts,
                 dim, padded, splits)


@triton.jit
def _combine(partial, arrived, out, mixed, total, top, head, valid, kv_head, split, parts,
             dim: tl.constexpr, padded: tl.constexpr, splits: tl.constexpr):
    """Leave this part for the last program of the head, or, if this is it, put all parts together."""
    column = tl.arange(0, padded)
    inside = valid[:, None] & (column < dim)[None, :]
    target = out + head[:, None] * dim + column[None, :]
    if parts == 1:
        tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        slot = partial + (head * splits + split) * (dim + 2)
        tl.store(slot[:, None] + column[None, :], mixed, mask=inside)
        tl.store(slot + dim, total, mask=valid)
        tl.store(slot + dim + 1, top, mask=valid)
        tl.debug_barrier()  # every thread has stored before one of them reports it
        if tl.atomic_add(arrived + kv_head, 1, sem="acq_rel") == parts - 1:
            tl.store(arrived + kv_head, 0)
            slot = partial + head * splits * (dim + 2)
            highest = tl.full(top.shape, float("-inf"), dtype=tl.float32)
            for part in tl.static_range(splits):
                highest = tl.maximum(highest, tl.load(slot + part * (dim + 2) + dim + 1, mask=valid & (part < parts),
                                                      other=float("-inf"), cache_modifier=".cg"))
            result, weights = tl.zeros(mixed.shape, dtype=tl.float32), tl.zeros(top.shape, dtype=tl.float32)
            for part in tl.static_range(splits):
                here, there = slot + part * (dim + 2), valid & (part < parts)
                tops = tl.load(here + dim + 1, mask=there, other=float("-inf"), cache_modifier=".cg")
                factor = tl.exp(tl.where(there, tops - highest, float("-inf")))
                result += factor[:, None] * tl.load(here[:, None] + column[None, :], mask=inside & (part < parts),
                                                    other=0.0, cache_modifier=".cg")
                weights += factor * tl.load(here + dim, mask=there, other=0.0, cache_modifier=".cg")
            result = result / tl.where(valid, weights, 1.0)[:, None]
            tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def _turn(qkv, cos, sin, q_gain, k_gain, eps, k_cache, v_cache, positions, out, cache_head, capacity, heads, kv_heads,
          dim: tl.constexpr, halved: tl.constexpr, block_heads: tl.constexpr, normed: tl.constexpr, pdl: tl.constexpr):
    """Some heads of one of several tokens: queries rotated into `out`, keys rotated and values as they are into the
    cache."""
    _start(pdl)
    token, head = tl.program_id(0), tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    half: tl.constexpr = dim // 2
    fold = tl.arange(0, halved)
    position = tl.minimum(tl.load(positions + token), capacity - 1)
    inside = (head < heads + 2 * kv_heads)[:, None] & (fold < half)[None, :]
    at = (token * (heads + 2 * kv_heads) + head)[:, None] * dim + fold[None, :]
    turn_cos = tl.load(cos + position * dim + fold, mask=fold < half, other=0.0).to(tl.float32)[None, :]
    turn_sin = tl.load(sin + position * dim + fold, mask=fold < half, other=0.0).to(tl.float32)[None, :]
    low, high = _half(qkv, q_gain, turn_cos, turn_sin, at, inside, dim, normed, eps)
    target = out + (token * heads + head)[:, None] * dim + fold[None, :]
    is_query = inside & (head < heads)[:, None]
    tl.store(target, low.to(out.dtype.element_ty), mask=is_query)
    tl.store(target + half, high.to(out.dtype.element_ty), mask=is_query)
    if normed:
        low, high = _half(qkv, k_gain, turn_cos, turn_sin, at, inside, dim, normed, eps)
    row = (head - heads).to(tl.int64)[:, None] * cache_head + position * dim + fold[None, :]
    is_key = inside & (head >= heads)[:, None] & (head < heads + kv_heads)[:, None]
    tl.store(k_cache + row, low.to(k_cache.dtype.element_ty), mask=is_key)
    tl.store(k_cache + row + half, high.to(k_cache.dtype.element_ty), mask=is_key)
    row -= kv_heads * cache_head
    is_value = inside & (head >= heads + kv_heads)[:, None]
    tl.store(v_cache + row, tl.load(qkv + at, mask=is_value), mask=is_value)
    tl.store(v_cache + row + half, tl.load(qkv + at + half, mask=is_value), mask=is_value)


def attend_next(qkv: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, eps: float,
                k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float, window: int, pdl: bool,
                partial: Tensor, arrived: Tensor, out: Tensor) -> None:
    """`hybridlab.fusedops.attend_next`, in one launch for one token and in two for several.

    The weights of a part take v's dtype before they meet it.
    """
    kv_heads, capacity, dim = k_cache.shape[1:]
    heads, splits = partial.shape[:2]
    normed, early = q_gain is not None, _launch(pdl)
    given = (qkv, cos, sin, qkv if q_gain is None else q_gain, qkv if k_gain is None else k_gain, eps, k_cache,
             v_cache, positions)
    halved = max(16, triton.next_power_of_2(dim // 2))
    if positions.numel() > 1:
        _turn[(positions.numel(), triton.cdiv(heads + 2 * kv_heads, TURNED_HEADS))](
            *given, out, k_cache.stride(1), capacity, heads, kv_heads, dim, halved, TURNED_HEADS, normed, pdl, **early)
        attend.forward(out.view(1, -1, heads, dim).transpose(1, 2), k_cache, v_cache, positions, scale, capacity,
                       window, 0.0, out.view(1, -1, heads, dim))
        return
    _attend_next[(kv_heads, splits)](
        *given, partial, arrived, out, k_cache.stride(1), capacity, heads // kv_heads, heads, kv_heads, scale,
        window, dim, max(16, triton.next_power_of_2(dim)), halved,
        max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_COLUMNS, splits, normed, pdl,
        num_warps=WARPS, **early)
