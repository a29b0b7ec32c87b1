"""The reference operations in plain PyTorch, registered as `hybridlab::*` custom ops: the specification.

They are the dynamic part of a decoder step: whatever changes from token to token is read from device memory, never
from a shape or a Python value, so a graph can hold every one of them. `hybridlab.kernels` offers the same
signatures, JIT-compiled. No op reads anything back to the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hybridlab import fusedops

SCHEMAS = {
    "attend": "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
    "float scale, int span, int window, float softcap, Tensor(c!) out) -> ()",
    "pad": "(Tensor prompt, Tensor length, Tensor(a!) ids, Tensor(b!) last) -> ()",
    "advance": "(Tensor token, Tensor(a!) ids, Tensor(b!) positions) -> ()",
    "greedy": "(Tensor logits, Tensor(a!) work, Tensor(b!) token) -> ()",
    "sample": "(Tensor logits, Tensor seed, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, "
    "bool filtered, Tensor(a!) work, Tensor(b!) token) -> ()",
    "emit": "(Tensor token, Tensor stops, Tensor(a!) state, Tensor(b!) ring) -> ()",
    **fusedops.SCHEMAS,
}

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
           scale: float, span: int, window: int, softcap: float, out: Tensor) -> None:
    """Write T new rows into a static KV cache and attend from them, each up to its own position.

    q: [1, heads, T, dim]; k, v: [1, kv_heads, T, dim]; k_cache, v_cache: [1, kv_heads, capacity, dim];
    positions: int64 [T], ascending, read on the device. Rows `span` and beyond are never attended (a bound known
    when the program is built: the bucket, or the capacity). `scale` is above 0. `window` > 0 keeps the last
    `window` positions, `softcap` > 0 bends the scores. out: [1, T, heads, dim] in q's dtype, written.
    """
    k_cache.index_copy_(2, positions, k)
    v_cache.index_copy_(2, positions, v)
    columns = torch.arange(span, device=q.device)
    visible = columns <= positions[:, None]
    if window > 0:
        visible = visible & (columns > positions[:, None] - window)
    keys, values = k_cache[:, :, :span], v_cache[:, :, :span]
    if q.shape[2] == 1 or softcap > 0:
        mixed = _by_group(q, keys, values, visible, scale, softcap)
    else:
        mixed = scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=scale, enable_gqa=True)
    out.copy_(mixed.transpose(1, 2))


def _by_group(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention by its definition, the query heads of a KV head as rows of one matrix product.

    For one row it is faster than the library's attention, which would copy the keys for every query head; and the
    library offers no bent scores, softcap * tanh(scores / softcap).
    """
    _, heads, rows, dim = q.shape
    groups, span = keys.shape[1:3]
    scores = torch.bmm(q.reshape(groups, heads // groups * rows, dim), keys[0].transpose(1, 2)).float() * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(groups, heads // groups, rows, span).masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    return torch.bmm(weights.view(groups, -1, span), values[0]).view(1, heads, rows, dim)


def pad(prompt: Tensor, length: Tensor, ids: Tensor, last: Tensor) -> None:
    """Right-pad a prompt into its bucket: ids [1, bucket] <- prompt[:length] then zeros; last [1] <- length - 1.

    prompt: int64 [capacity], of which the first `length` (int64 [1]) entries are the prompt. `last` stays inside the
    bucket whatever `length` is: a capture may rehearse a bucket while a longer prompt is there.
    """
    bucket = ids.shape[1]
    inside = torch.arange(bucket, device=ids.device) < length
    ids.copy_(torch.where(inside, prompt[:bucket], 0)[None])
    last.copy_((length - 1).clamp_(max=bucket - 1))


def advance(token: Tensor, ids: Tensor, positions: Tensor) -> None:
    """The next decode step's input: ids [1, 1] <- token [1], positions [1] <- positions + 1.

    A token of -1, drawn from logits that are not finite, is fed as 0: the host may have launched ahead of reading it,
    and an index outside the embedding would end the process on a GPU.
    """
    ids.copy_(token.clamp(min=0)[None])
    positions.add_(1)


def greedy(logits: Tensor, work: Tensor, token: Tensor) -> None:
    """token [1] <- index of the largest of logits [vocabulary], the lowest of equals; -1 if any is NaN or +infinity.

    work: int64 [3 + 16 * parts], zeros at first, is work space of the kernel, which spreads the vocabulary over at most
    `parts` programs: how many of them have arrived, which is zero again afterwards, the thresholds of top-k and top-p
    as far as they are known, and what each program has found.
    """
    top, index = torch.max(logits, dim=0)
    token.copy_(torch.where(torch.isfinite(top), index, -1)[None])


def sample(logits: Tensor, seed: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
           filtered: bool, work: Tensor, token: Tensor) -> None:
    """token [1] <- a draw from softmax(logits / temperature), keyed by (seed, position); -1 as in `greedy`.

    Gumbel-max: the largest of logits / temperature + noise, with one Philox number for each (seed, position, entry).
    Two arms whose logits differ by rounding draw the same token unless two scores are that close, which inverting a
    cumulative sum over the vocabulary does not give. With `filtered`, top-k then top-p, as in transformers: entries
    below the k-th largest are dropped, then all outside the smallest set with probability `top_p`; ties stay.

    logits: [vocabulary]; seed, positions, top_k: int64 [1]; temperature > 0, top_p: float32 [1]; work as in `greedy`.
    """
    scores = logits.float() / temperature
    if filtered:
        ordered = torch.sort(scores, descending=True).values
        inside = torch.arange(ordered.shape[0], device=ordered.device) < top_k
        ordered = ordered.masked_fill(~inside, float("-inf"))
        chance = torch.softmax(ordered, dim=0)
        kept = (torch.cumsum(chance, dim=0) - chance < top_p).sum().clamp(min=1)
        threshold = torch.gather(ordered, 0, torch.minimum(kept, top_k) - 1)
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    top, index = torch.max(scores + gumbel(seed, positions, scores.shape[0]), dim=0)
    token.copy_(torch.where(torch.isfinite(top), index, -1)[None])


def emit(token: Tensor, stops: Tensor, state: Tensor, ring: Tensor) -> None:
    """Give out `token` [1] in the middle of a launch, if one is still wanted.

    state: int64 [3]: how many tokens were given out, how many more this launch shall give out, and whether the request
    is over, which it is after a token in `stops` or one of -1. ring: int64 [depth], of which entry number % depth <-
    (number + 1) * 2**32 + token + 1, on the host or on the device.
    """
    count, left, over = state.split(1)
    wanted = (left > 0) & (over == 0)
    place = count % ring.shape[0]
    ring.index_copy_(0, place, torch.where(wanted, ((count + 1) << 32) + token + 1, ring.index_select(0, place)))
    ends = wanted & ((token < 0) | (stops == token).any())
    state.copy_(torch.cat([count + wanted, left - wanted.long(), torch.where(ends, 1, over)]))


def gumbel(seed: Tensor, positions: Tensor, count: int) -> Tensor:
    """float32 [count] standard Gumbel noise of Philox counters (entry, position), key seed."""
    bits = philox(seed, positions, count)
    uniform = (bits >> 9).float() * 2.0**-23 + 2.0**-24  # 2**-24 to 1 - 2**-24, each exact in float32: never 0 or 1
    return -torch.log(-torch.log(uniform))


def philox(seed: Tensor, positions: Tensor, count: int) -> Tensor:
    """First 32-bit word of Philox4x32-10 (Salmon et al., SC 2011) as int64 [count].

    Counter (entry, position, 0, 0), key the two halves of seed: what `tl.philox(seed, entry, position, 0, 0)` gives.
    """
    x0 = torch.arange(count, device=seed.device)
    x1 = (positions & _MASK).expand(count)
    x2 = x3 = torch.zeros_like(x0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        (high0, low0), (high1, low1) = (_wide_product(m, x) for m, x in zip(_PHILOX_MULTIPLIERS, (x0, x2), strict=True))
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK, (k1 + _PHILOX_WEYL[1]) & _MASK
    return x0


def _wide_product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * x, both below 2^32 in int64, without a sum that could overflow."""
    upper, lower = (factor >> 16) * x, (factor & 0xFFFF) * x
    return (upper + (lower >> 16)) >> 16, (lower + ((upper & 0xFFFF) << 16)) & _MASK


REFERENCE: dict[str, Callable[..., None]] = {
    "attend": attend, "pad": pad, "advance": advance, "greedy": greedy, "sample": sample, "emit": emit,
    **fusedops.REFERENCE,
}


def register(namespace: str, table: dict[str, Callable[..., None]]) -> torch.library.Library:
    """Register `table` under `namespace` with the schemas above; the caller keeps the library alive."""
    library = torch.library.Library(namespace, "DEF")
    for name, function in table.items():
        library.define(name + SCHEMAS[name])
        library.impl(name, function, "CompositeExplicitAutograd")
    for name in table:
        torch.library.register_fake(f"{namespace}::{name}", lambda *_: None, lib=library)
    return library


_LIBRARY = register("hybridlab", REFERENCE)
