"""Triton: greedy and keyed sampling, the vocabulary spread over programs that meet in `work`.

`work` begins with how many programs have arrived and the thresholds of top-k and top-p; then come what programs found.
Whichever program of a launch arrives last puts that together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.ahead import Launched

BLOCK = 4096  # entries of a program, of a vocabulary that `work` has enough parts for
HEAD = 3      # numbers before those of the parts
BITS = 4      # of the 32 of a threshold, found by one launch
WAYS = 1 << BITS


@triton.jit
def _ordered(score):
    """int32 keys in the order of float32 scores, -0 as 0, and NaN as +infinity, which no threshold drops."""
    score = tl.where(score == 0, 0.0, tl.where(score != score, float("inf"), score))
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _last(work, parts):
    """Whether this program is the last of `parts` to arrive, and may read what all of them have stored."""
    tl.debug_barrier()  # every thread has stored before one of them reports it
    last = tl.atomic_add(work, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(work, 0)
    return last


@triton.jit
def _uniform(seed, position, entry):
    """float32 of Philox counters (entry, position), from 2**-24 to 1 - 2**-24."""
    zero = tl.zeros(entry.shape, dtype=tl.int32)
    bits, _, _, _ = tl.philox(seed, entry, zero + position.to(tl.int32), zero, zero)
    return (bits.to(tl.uint32, bitcast=True) >> 9).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08


@Launched
@triton.jit
def _draw(logits, seed, positions, temperature, work, token, count, parts,
          random: tl.constexpr, filtered: tl.constexpr, head: tl.constexpr, block: tl.constexpr, width: tl.constexpr):
    """One program leaves its best entry as one number: the higher score is larger, then the lower index."""
    part = tl.program_id(0)
    entry = part * block + tl.arange(0, block)
    score = tl.load(logits + entry, mask=entry < count, other=float("-inf")).to(tl.float32)
    if random:
        score = tl.div_rn(score, tl.load(temperature))
        if filtered:
            score = tl.where(_ordered(score) >= tl.load(work + head - 1), score, float("-inf"))
        score -= tl.log(-tl.log(_uniform(tl.load(seed), tl.load(positions), entry)))
    tl.store(work + head + part, tl.max((_ordered(score).to(tl.int64) << 32) + (2147483647 - entry), 0))
    if _last(work, parts):
        each = tl.arange(0, width)
        best = tl.max(tl.load(work + head + tl.where(each < parts, each, 0), cache_modifier=".cg"), 0)
        key, index = best >> 32, 2147483647 - (best & 0xFFFFFFFF)
        finite = (key > -2139095041) & (key < 2139095040)  # the keys of the infinities
        tl.store(token, tl.where(finite, index, -1))


@Launched
@triton.jit(do_not_specialize=["shift"])
def _narrow(logits, temperature, token, limit, work, count, parts, shift,
            by_mass: tl.constexpr, head: tl.constexpr, ways: tl.constexpr, block: tl.constexpr, width: tl.constexpr):
    """The bits at `shift` of a threshold: the smallest key x such that the mass of entries above x is below `limit`.

    By top-k an entry's mass is 1. By top-p it is its chance among those that top-k keeps, times one factor for all,
    and `limit` is a part of all mass. Sums have a fixed order, so that equal masses compare as equal.
    """
    part = tl.program_id(0)
    entry = part * block + tl.arange(0, block)
    heat = tl.load(temperature)
    score = tl.div_rn(tl.load(logits + entry, mask=entry < count, other=float("-inf")).to(tl.float32), heat)
    key = _ordered(score)
    mass = tl.full([block], 1.0, dtype=tl.float32)  # lanes past the end are below every threshold that matters
    if by_mass:
        top = tl.div_rn(tl.load(logits + tl.maximum(tl.load(token), 0)).to(tl.float32), heat)
        mass = tl.where(key >= tl.load(work + 1), tl.exp(score - top), 0.0)
    kept = work + 1 + by_mass
    low = tl.load(kept).to(tl.int32)
    if shift == 28:  # the first launch of a threshold
        low = tl.full([], -2147483648, dtype=tl.int32)
    slot = work + head + part * ways
    tl.store(slot, tl.sum(mass, 0).to(tl.int32, bitcast=True).to(tl.int64))
    for way in tl.static_range(1, ways):
        above = tl.sum(tl.where(key >= low + (way << shift), mass, 0.0), 0)
        tl.store(slot + way, above.to(tl.int32, bitcast=True).to(tl.int64))
    if _last(work, parts):
        each, column = tl.arange(0, width)[:, None], tl.arange(0, ways)
        found = tl.load(work + head + each * ways + column[None, :], mask=each < parts, other=0, cache_modifier=".cg")
        masses = tl.sum(found.to(tl.int32).to(tl.float32, bitcast=True), 0)
        bound = tl.load(limit).to(tl.float32)
        if by_mass:
            bound *= tl.sum(tl.where(column == 0, masses, 0.0), 0)
        tl.store(kept, low + (tl.sum(((masses >= bound) & (column > 0)).to(tl.int32), 0) << shift))


def greedy(logits: Tensor, work: Tensor, token: Tensor) -> None:
    """`hybridlab.ops.greedy` in one launch."""
    _launch(logits, logits, logits, logits, work, token, False, False)


def sample(logits: Tensor, seed: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
           filtered: bool, work: Tensor, token: Tensor) -> None:
    """`hybridlab.ops.sample` in one launch; with filters in 18, which find thresholds 4 bits at a time without a sort.

    The first of the 18 draws greedily: `token` says where the largest entry is until the last has drawn.
    """
    if filtered:
        greedy(logits, work, token)
        parts, block, warps = _shape(logits, work)
        for limit, by_mass in ((top_k, False), (top_p, True)):
            for shift in range(32 - BITS, -1, -BITS):
                _narrow[(parts,)](logits, temperature, token, limit, work, logits.shape[0], parts, shift, by_mass,
                                  HEAD, WAYS, block, triton.next_power_of_2(parts), num_warps=warps)
    _launch(logits, seed, positions, temperature, work, token, True, filtered)


def _launch(logits: Tensor, seed: Tensor, positions: Tensor, temperature: Tensor, work: Tensor, token: Tensor,
            random: bool, filtered: bool) -> None:
    parts, block, warps = _shape(logits, work)
    _draw[(parts,)](logits, seed, positions, temperature, work, token, logits.shape[0], parts, random, filtered,
                    HEAD, block, triton.next_power_of_2(parts), num_warps=warps)


def _shape(logits: Tensor, work: Tensor) -> tuple[int, int, int]:
    """Programs, entries of each, and warps of each."""
    count, most = logits.shape[0], (work.shape[0] - HEAD) // WAYS
    block = max(BLOCK, triton.next_power_of_2(triton.cdiv(count, most)))
    return triton.cdiv(count, block), block, min(32, block // 512)
