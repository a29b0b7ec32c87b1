"""Triton: the preparation of a step's inputs, padding a prompt and moving decode on by one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.ahead import Launched

BLOCK = 256


@Launched
@triton.jit
def _pad(prompt, length, ids, last, bucket, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    count = tl.load(length)
    tl.store(ids + at, tl.load(prompt + at, mask=(at < count) & (at < bucket), other=0), mask=at < bucket)
    if tl.program_id(0) == 0:
        tl.store(last, tl.minimum(count, bucket) - 1)


@Launched
@triton.jit
def _advance(token, ids, positions):
    tl.store(ids, tl.maximum(tl.load(token), 0))
    tl.store(positions, tl.load(positions) + 1)


def pad(prompt: Tensor, length: Tensor, ids: Tensor, last: Tensor) -> None:
    """`hybridlab.ops.pad` in one launch."""
    bucket = ids.shape[1]
    _pad[(triton.cdiv(bucket, BLOCK),)](prompt, length, ids, last, bucket, BLOCK)


def advance(token: Tensor, ids: Tensor, positions: Tensor) -> None:
    """`hybridlab.ops.advance` in one launch."""
    _advance[(1,)](token, ids, positions)
