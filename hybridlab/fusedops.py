"""The fused operations of a Llama-like model's step in plain PyTorch: the specification of their kernels.

Five of them make a layer: `project` (norm, queries, keys and values), `attend_next`, `residual` (output projection),
`swiglu` (norm, gate and up) and `residual` again (down); `project` ends the step with the head. A step has one token,
and its vectors one dimension, or the rows of a prompt, and then `[tokens]` comes first. Each operation reads what
changes from token to token from device memory. Sums are float32, and each result is rounded to its buffer's dtype once,
where the modules of transformers round after every operation; of several tokens the normed ones are rounded too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

SCHEMAS = {
    "project": "(Tensor x, Tensor gain, float eps, Tensor a, Tensor? b, Tensor? c, Tensor? a_bias, Tensor? b_bias, "
    "Tensor? c_bias, bool pdl, Tensor(a!) out) -> ()",
    "swiglu": "(Tensor x, Tensor gain, float eps, Tensor gate, Tensor? up, bool pdl, Tensor(a!) out) -> ()",
    "residual": "(Tensor x, Tensor weight, Tensor? bias, bool pdl, Tensor(a!) out) -> ()",
    "attend_next": "(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_gain, Tensor? k_gain, float eps, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, float scale, int window, bool pdl, "
    "Tensor(c!) partial, Tensor(d!) arrived, Tensor(e!) out) -> ()",
}


def project(x: Tensor, gain: Tensor, eps: float, a: Tensor, b: Tensor | None, c: Tensor | None, a_bias: Tensor | None,
            b_bias: Tensor | None, c_bias: Tensor | None, pdl: bool, out: Tensor) -> None:
    """out <- the rows of a, b and c times RMSNorm(x), plus their biases.

    x, gain: [depth]; a, b, c: [rows of each, depth]; out: [rows of all], in x's dtype or float32, which then holds
    values of x's dtype, as logits of transformers do. `pdl` changes how kernels are launched and nothing else.
    """
    normed = _normed(x, gain, eps)
    parts = []
    for weight, bias in ((a, a_bias), (b, b_bias), (c, c_bias)):
        if weight is not None:
            part = _times(weight, normed)
            parts.append(part if bias is None else part + _wide(bias))
    out.copy_(torch.cat(parts, dim=-1).to(x.dtype))


def swiglu(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor | None, pdl: bool, out: Tensor) -> None:
    """out <- SiLU(gate @ RMSNorm(x)) * (up @ RMSNorm(x)). x, gain: [depth]; gate, up: [rows, depth]; out: [rows].

    Without `up`, `gate` holds both, one below the other. Of several tokens, what lies between the rows of `out` may be
    written over."""
    gate, up = halves(gate, up)
    normed = _normed(x, gain, eps)
    out.copy_(silu(_times(gate, normed)) * _times(up, normed))


def residual(x: Tensor, weight: Tensor, bias: Tensor | None, pdl: bool, out: Tensor) -> None:
    """out <- out + weight @ x (+ bias). x: [depth]; weight: [rows, depth]; out: [rows]."""
    added = _times(weight, _wide(x))
    out.copy_(_wide(out) + (added if bias is None else added + _wide(bias)))


def attend_next(qkv: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, eps: float,
                k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float, window: int, pdl: bool,
                partial: Tensor, arrived: Tensor, out: Tensor) -> None:
    """Rotate queries and keys to their tokens' positions, write keys and values into the cache, attend up to there.

    qkv: [(heads + 2 * kv_heads) * dim] a token, queries first, keys and values as projected; cos, sin: [capacity, dim],
    of every position, the second half like the first. q_gain, k_gain: [dim], of an RMSNorm over each head before the
    rotation, or None. k_cache, v_cache: [1, kv_heads, capacity, dim]; positions: int64, one a token, ascending, read on
    the device, below the capacity. `window` > 0 keeps the last `window` positions. out: [heads * dim] a token.

    partial: float32 [heads, splits, dim + 2] and arrived: int32 [kv_heads], zeros, are work space of the kernel for one
    token, which splits the context; arrived is zero again afterwards.
    """
    kv_heads, capacity, dim = k_cache.shape[1:]
    tokens = positions.numel()
    heads = qkv.numel() // (tokens * dim) - 2 * kv_heads
    query, key, value = qkv.view(tokens, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    at = torch.minimum(positions, positions.new_tensor(capacity - 1))
    turn_cos, turn_sin = _wide(cos[at])[:, None], _wide(sin[at])[:, None]
    query = _rotated(query if q_gain is None else _normed(query, q_gain, eps), turn_cos, turn_sin).to(qkv.dtype)
    key = _rotated(key if k_gain is None else _normed(key, k_gain, eps), turn_cos, turn_sin).to(qkv.dtype)
    k_cache.index_copy_(2, at, key.transpose(0, 1)[None])
    v_cache.index_copy_(2, at, value.transpose(0, 1)[None])
    columns = torch.arange(capacity, device=qkv.device)
    visible = columns <= at[:, None]
    if window > 0:
        visible = visible & (columns > at[:, None] - window)
    grouped = _wide(query.view(tokens, kv_heads, -1, dim)).permute(1, 2, 0, 3)
    scores = grouped @ _wide(k_cache[0])[:, None].transpose(2, 3) * scale
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    values = torch.where(visible.any(0)[:, None], _wide(v_cache[0]), 0)  # rows never written may hold anything
    out.copy_((weights @ values[:, None]).permute(2, 0, 1, 3).reshape(out.shape))


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two matrices of `swiglu`."""
    first, second = gate.chunk(2) if up is None else (gate, up)
    return first, second


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return _wide(weight) @ x if x.dim() == 1 else x @ _wide(weight).t()


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(gain)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = _wide(x)
    first, second = wide.chunk(2, dim=-1)
    return wide * cos + torch.cat((-second, first), dim=-1) * sin


REFERENCE: dict[str, Callable[..., None]] = {
    "project": project, "swiglu": swiglu, "residual": residual, "attend_next": attend_next,
}
