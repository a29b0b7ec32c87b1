"""Triton: a token given out to the host in the middle of a launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.ahead import Launched


@Launched
@triton.jit
def _emit(token, stops, state, ring, depth, width: tl.constexpr):
    """One store of eight bytes carries a token and its number, so that the host never sees one without the other."""
    drawn, count = tl.load(token), tl.load(state)
    left, over = tl.load(state + 1), tl.load(state + 2)
    if (left > 0) & (over == 0):
        stopping = tl.sum((tl.load(stops + tl.arange(0, width)) == drawn).to(tl.int32), 0) > 0
        tl.store(state, count + 1)
        tl.store(state + 1, left - 1)
        tl.store(state + 2, (stopping | (drawn < 0)).to(tl.int64))
        tl.atomic_xchg(ring + count % depth, ((count + 1) << 32) + (drawn + 1), sem="release", scope="sys")


def emit(token: Tensor, stops: Tensor, state: Tensor, ring: Tensor) -> None:
    """`hybridlab.ops.emit` in one launch; `ring` may lie in pinned memory of the host."""
    _emit[(1,)](token, stops, state, ring, ring.shape[0], stops.shape[0], num_warps=1)
