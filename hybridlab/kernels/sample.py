"""Triton: greedy and keyed sampling, the whole vocabulary in the registers of one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _greedy(logits, token, count, block: tl.constexpr):
    entry = tl.arange(0, block)
    score = tl.load(logits + entry, mask=entry < count, other=float("-inf")).to(tl.float32)
    tl.store(token, _winner(score))


@triton.jit
def _winner(score):
    """Index of the largest score; -1 when any is NaN or +infinity, or none is finite."""
    bad = (score != score) | (score == float("inf"))
    broken = (tl.max(bad.to(tl.int32), 0) > 0) | (tl.max(score, 0) == float("-inf"))
    return tl.where(broken, -1, tl.argmax(score, 0)).to(tl.int64)


@triton.jit
def _ordered(score):
    """int32 keys in the order of float32 scores."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(key, mass, limit):
    """The smallest key x such that the mass of entries above x is below `limit`; found by 32 halvings."""
    low = tl.full([], -2147483648, dtype=tl.int64)
    high = tl.full([], 2147483647, dtype=tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = tl.sum(tl.where(key > middle, mass, 0.0), 0) < limit
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


@triton.jit
def _sample(logits, seed, positions, temperature, top_k, top_p, token, count,
            filtered: tl.constexpr, block: tl.constexpr):
    entry = tl.arange(0, block)
    inside = entry < count
    score = tl.load(logits + entry, mask=inside, other=float("-inf")).to(tl.float32) / tl.load(temperature)
    if filtered:
        key = _ordered(score).to(tl.int64)
        ones = tl.where(inside, 1.0, 0.0)
        score = tl.where(key >= _threshold(key, ones, tl.load(top_k).to(tl.float32)), score, float("-inf"))
        chance = tl.exp(score - tl.max(score, 0))
        chance = chance / tl.sum(chance, 0)
        score = tl.where(key >= _threshold(key, chance, tl.load(top_p)), score, float("-inf"))
    zero = tl.zeros([block], dtype=tl.int32)
    position = zero + tl.load(positions).to(tl.int32)
    bits, _, _, _ = tl.philox(tl.load(seed), entry, position, zero, zero)
    uniform = (bits.to(tl.uint32, bitcast=True) >> 9).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08
    tl.store(token, _winner(score - tl.log(-tl.log(uniform))))


def greedy(logits: Tensor, token: Tensor) -> None:
    """`hybridlab.ops.greedy` in one launch."""
    block = triton.next_power_of_2(logits.shape[0])
    _greedy[(1,)](logits, token, logits.shape[0], block, num_warps=_warps(block))


def sample(logits: Tensor, seed: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
           filtered: bool, token: Tensor) -> None:
    """`hybridlab.ops.sample` in one launch; thresholds are found by halving instead of a sort, ties stay as there."""
    block = triton.next_power_of_2(logits.shape[0])
    _sample[(1,)](logits, seed, positions, temperature, top_k, top_p, token, logits.shape[0], filtered, block,
                  num_warps=_warps(block))


def _warps(block: int) -> int:
    return min(32, max(4, block // 1024))
