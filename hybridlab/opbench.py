"""The operations of a decode step to be timed: their work on cold memory, and what stock PyTorch does for the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from hybridlab import fused, fusedops, kernels, ops, tiles
from hybridlab.cache import replaying
from hybridlab.errors import MeasureError
from hybridlab.kernels.attend import splits
from hybridlab.lowering import JIT
from hybridlab.sampling import Controls
from hybridlab.tiles import Product, Weights

assert kernels, ops  # both register the namespaces that are timed

CPU_CACHE = 64 * 2**20  # bytes; no core's share of a cache is more


class Case(NamedTuple):
    """One operation at one context (0: it sees none); `rows` of its result, `depth` of its input, and of one call the
    least bytes to read and write and the FLOPs of its products. `kind` is the name of the operation in `ops`."""

    op: str
    kind: str
    rows: int
    depth: int
    context: int
    bytes: int
    flops: int
    parts: tuple[int, ...] = ()  # rows of each matrix

    def __str__(self) -> str:
        return f"{self.op}, context {self.context:,}" if self.context else self.op


class Sizes(NamedTuple):
    """The dimensions of a Llama-like step. `window`: rows that the first layer attends, 0 for all; `normed`: whether
    queries and keys are, as in Qwen3."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    window: int
    normed: bool
    scale: float

    @classmethod
    def of(cls, bare: Any) -> Sizes:
        """Of a model or its skeleton. Raises `ConfigError` if its step cannot be fused."""
        fused.require(bare)
        layer, config = fused.Layer(bare.model.layers[0], bare.config), bare.config
        attention = bare.model.layers[0].self_attn
        dim, keys = attention.head_dim, len(attention.k_proj.weight)
        queries, hidden = attention.q_proj.weight.shape
        return cls(hidden, layer.gate.shape[0], queries // dim, keys // dim, dim, config.vocab_size, layer.window,
                   layer.q_gain is not None, layer.scale)


def seen(context: int, window: int) -> int:
    """Rows of the cache that the last of `context` tokens attends, with its own."""
    return min(context, window) if window else context


def cases(sizes: Sizes, lengths: Sequence[int], itemsize: int) -> list[Case]:
    """Every operation of a decode step, in the order of the step, then attention and draw as other arms have them.
    Biases are left out."""
    queries, keys = sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim
    projected = _product("project qkv", "project", (queries, keys, keys), sizes.hidden, itemsize)
    return [projected,
            *(_attention("attend_next", sizes, length, itemsize) for length in lengths),
            _product("residual output", "residual", (sizes.hidden,), queries, itemsize),
            _product("swiglu", "swiglu", (sizes.inner, sizes.inner), sizes.hidden, itemsize),
            _product("residual down", "residual", (sizes.hidden,), sizes.inner, itemsize),
            _product("project head", "project", (sizes.vocabulary,), sizes.hidden, itemsize),
            Case("greedy", "greedy", 1, sizes.vocabulary, 0, 4 * sizes.vocabulary + 8, 0),
            *(_attention("attend", sizes, length, itemsize) for length in lengths)]


def _product(op: str, kind: str, parts: tuple[int, ...], depth: int, itemsize: int) -> Case:
    rows = parts[0] if kind == "swiglu" else sum(parts)
    vectors = depth + 2 * rows if kind == "residual" else 2 * depth + rows  # a norm has its gain; a sum is read too
    return Case(op, kind, rows, depth, 0, (sum(parts) * depth + vectors) * itemsize, 2 * sum(parts) * depth, parts)


def _attention(kind: str, sizes: Sizes, context: int, itemsize: int) -> Case:
    """The token's own key and value come in with the queries and are written; earlier rows are read."""
    queries, row = sizes.heads * sizes.dim, 2 * sizes.kv_heads * sizes.dim
    rows = seen(context, sizes.window)
    values = queries + row + row * rows + queries
    if kind == "attend_next":  # it also rotates: cosines and sines of one position, and gains
        values += 2 * sizes.dim * (2 if sizes.normed else 1)
    return Case(kind, kind, queries, sizes.dim, context, values * itemsize + 8, 4 * queries * rows)


class Work:
    """The tensors of one case in `copies`, which calls take in turn, so that none finds its own in a cache. Kernels
    write `out`, stock PyTorch returns what it makes."""

    copies: int
    out: Tensor

    def call(self, variant: str, copy: int) -> Callable[[], Any]:
        raise NotImplementedError

    def exact(self) -> Tensor:
        """Of copy 0, as the specification has it."""
        raise NotImplementedError

    def result(self, variant: str) -> Tensor:
        """Of copy 0, in one dimension."""
        self.out.zero_()
        made = self.call(variant, 0)()
        parts = made if isinstance(made, list) else [self.out if made is None else made]
        return torch.cat([part.flatten() for part in parts])


class _Products(Work):
    """A product of the step: stock PyTorch does it as the modules of transformers write it."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        size = sum(case.parts) * case.depth * dtype.itemsize
        self.kind, self.copies = case.kind, tiles.copies_of(size, cache_bytes(device))
        self.weights = Weights(Product(case.kind, case.rows, case.depth, case.parts), dtype, device, self.copies, False)
        self.out = self.weights.out
        self.before = torch.zeros_like(self.weights.out)  # what `residual` adds to

    def call(self, variant: str, copy: int) -> Callable[[], Any]:
        matrices = self.weights.copies[copy]
        if variant == "torch":
            return partial(self._stock, *matrices)
        operation = getattr(getattr(torch.ops, JIT), self.kind).default
        return partial(operation, *self.weights.arguments(matrices, variant.endswith("pdl")))

    def _stock(self, *matrices: Tensor) -> Tensor | list[Tensor]:
        x = self.weights.x[None, None]
        if self.kind == "residual":
            return self.before[None, None] + linear(x, matrices[0])
        normed = _rms_norm(x, self.weights.gain)
        if self.kind == "swiglu":
            gate, up = matrices[0].chunk(2)
            return silu(linear(normed, gate)) * linear(normed, up)
        return [linear(normed, matrix) for matrix in matrices[0].split(self.weights.product.parts)]

    def exact(self) -> Tensor:
        return self.weights.exact


class _Attention(Work):
    """Attention of one token at one context, with what comes before it in `attend_next`. Copies are sections of one
    long cache, which on a CPU do not overlap, as its kernel reads all of the capacity."""

    def __init__(self, case: Case, sizes: Sizes, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        self.kind, self.sizes, self.context = case.kind, sizes, case.context
        step = capacity if device.type == "cpu" else case.context
        self.copies = tiles.copies_of(2 * sizes.kv_heads * sizes.dim * step * dtype.itemsize, cache_bytes(device))
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        whole = [noise(1, sizes.kv_heads, capacity + step * (self.copies - 1), sizes.dim) for _ in range(2)]
        self.caches = [[one[:, :, step * i:step * i + capacity] for one in whole] for i in range(self.copies)]
        self.qkv = noise((sizes.heads + 2 * sizes.kv_heads) * sizes.dim)
        angles = noise(capacity, sizes.dim // 2).float().repeat(1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.gains = [noise(sizes.dim), noise(sizes.dim)] if sizes.normed else [None, None]
        self.positions = torch.tensor([case.context - 1], device=device)
        self.query, self.key, self.value = self.qkv.view(1, 1, -1, sizes.dim).transpose(1, 2).split(
            [sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=1)
        self.partial = torch.zeros(sizes.heads, splits(device, sizes.kv_heads), sizes.dim + 2, device=device)
        self.arrived = torch.zeros(sizes.kv_heads, dtype=torch.int32, device=device)
        self.out = noise(sizes.heads * sizes.dim)
        self.turn = [table[case.context - 1][None, None] for table in (self.cos, self.sin)]  # stock: once a step

    def call(self, variant: str, copy: int) -> Callable[[], Any]:
        if variant == "torch":
            return partial(self._stock, *self.caches[copy])
        operation = getattr(getattr(torch.ops, JIT), self.kind).default
        return partial(operation, *self._arguments(copy, variant.endswith("pdl")))

    def _arguments(self, copy: int, pdl: bool) -> tuple[Any, ...]:
        scale, window, capacity = self.sizes.scale, self.sizes.window, len(self.cos)
        if self.kind == "attend":
            return (self.query, self.key, self.value, *self.caches[copy], self.positions, scale, capacity, window, 0.0,
                    self.out.view(1, 1, self.sizes.heads, self.sizes.dim))
        return (self.qkv, self.cos, self.sin, *self.gains, tiles.EPS, *self.caches[copy], self.positions, scale, window,
                pdl, self.partial, self.arrived, self.out)

    def _stock(self, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        query, key, (q_gain, k_gain) = self.query, self.key, self.gains
        if self.kind == "attend_next":
            if q_gain is not None and k_gain is not None:
                query, key = _rms_norm(query, q_gain), _rms_norm(key, k_gain)
            query, key = _rotated(query, *self.turn), _rotated(key, *self.turn)
        k_cache.index_copy_(2, self.positions, key)
        v_cache.index_copy_(2, self.positions, self.value)
        rows = slice(self.context - seen(self.context, self.sizes.window), self.context)
        mixed = scaled_dot_product_attention(query, k_cache[:, :, rows], v_cache[:, :, rows], scale=self.sizes.scale,
                                             enable_gqa=self.sizes.heads > self.sizes.kv_heads)
        return mixed.transpose(1, 2).contiguous()

    def exact(self) -> Tensor:
        ops.REFERENCE[self.kind](*self._arguments(0, False))
        return self.out.double()


class _Greedy(Work):
    def __init__(self, case: Case, device: torch.device) -> None:
        self.copies = tiles.copies_of(4 * case.depth, cache_bytes(device))
        self.logits = torch.randn(self.copies, case.depth, generator=torch.Generator(device).manual_seed(0),
                                  device=device)
        self.controls, self.positions = Controls(device, JIT), torch.zeros(1, dtype=torch.int64, device=device)
        self.out = self.controls.token

    def call(self, variant: str, copy: int) -> Callable[[], Any]:
        if variant == "torch":
            return partial(torch.argmax, self.logits[copy], dim=-1, keepdim=True)
        return partial(self.controls.draw, self.logits[copy], self.positions)

    def exact(self) -> Tensor:
        return self.logits[0].argmax().double()[None]


def work(case: Case, sizes: Sizes, capacity: int, device: torch.device, dtype: torch.dtype) -> Work:
    """The seeded random tensors of `case`, in as many copies as no cache holds, within reason (`tiles.copies_of`)."""
    if case.kind == "greedy":
        return _Greedy(case, device)
    if case.context:
        return _Attention(case, sizes, capacity, device, dtype)
    return _Products(case, device, dtype)


def variants(case: Case, wanted: Sequence[str]) -> list[str]:
    """Those of this operation: only fused ones start before the last one ends."""
    return [name for name in wanted if name != "kernel, pdl" or case.kind in fusedops.SCHEMAS]


def require_right(done: Work, variant: str) -> None:
    """Raise `MeasureError` if a variant computes something else: its time would be of other work."""
    exact, made = done.exact(), done.result(variant)
    if not made.is_floating_point():  # a token, of which none is nearly right
        if not torch.equal(made.double(), exact):
            raise MeasureError("wrong result", f"token {made.tolist()}, not {exact.tolist()}", "report this")
    elif not (off := tiles.off_by(made, exact)) < tiles.CLOSE:  # NaN is not below either
        raise MeasureError("wrong result", f"{off:.1%} of the largest value off", "report this")


def cache_bytes(device: torch.device) -> int:
    """Of the largest cache before memory: on a GPU its L2."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE


def reading(device: torch.device) -> tuple[Callable[[], Any], int]:
    """A reduction over memory that no cache holds, and how many float32 numbers it reads."""
    size = tiles.READ_BYTES if device.type == "cuda" else tiles.BEYOND_CACHE * CPU_CACHE
    values = torch.ones(size // 4, device=device)
    return partial(torch.sum, values, dim=0, out=torch.zeros((), device=device)), len(values)


def captured(calls: Sequence[Callable[[], Any]], device: torch.device) -> AbstractContextManager[Callable[[], None]]:
    """The replay of all calls as one graph. Raises `CaptureFailed`."""
    return replaying(partial(_each, calls), device)


def _each(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def calls(done: Work, variant: str) -> list[Callable[[], Any]]:
    """One of every copy, in turn, for at least `tiles.LAUNCHES`."""
    return [done.call(variant, copy) for copy in range(done.copies)] * math.ceil(tiles.LAUNCHES / done.copies)


def _rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """As `LlamaRMSNorm`."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + tiles.EPS)
    return gain * wide.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `apply_rotary_pos_emb`."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
