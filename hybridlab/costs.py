"""What one traced operation costs a machine: arithmetic, memory traffic and kernel launches, from its shapes alone.

Sizes that are symbols count as their hints, the sizes the trace was made at. Kernel launches are those of eager
PyTorch on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from hybridlab import ops

_FREE = {  # no kernel and no bytes: memory is only reserved, or read under another shape
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh_copy",
}
_MOVES = {  # bytes without arithmetic
    "copy_", "clone", "_to_copy", "cat", "stack", "repeat", "flip", "roll", "constant_pad_nd", "embedding", "index",
    "index_select", "gather", "take", "index_copy", "index_copy_", "index_put", "index_put_", "scatter", "scatter_",
    "slice_scatter", "select_scatter", "arange", "full", "full_like", "fill", "fill_", "zero_", "zeros", "zeros_like",
    "new_zeros", "new_full", "new_ones", "ones", "ones_like", "scalar_tensor", "_local_scalar_dense", "pad", "advance",
}
_ROW_READERS = {"embedding", "index", "index_select", "gather", "take"}   # of their first tensor, only the chosen rows
_ROW_WRITERS = {"index_copy_", "index_put_", "scatter_"}                  # of their first tensor, only the given rows
_OVERWRITERS = {"copy_", "fill_", "zero_", "pad", "greedy", "sample"}     # read nothing of what they write
_GROUPED = {"_grouped_mm", "grouped_mm_fallback"}                         # rows x experts, each row with its own expert
_SEVERAL = {"sort": 2, "topk": 2, "cumsum": 2, "nonzero": 3, "multinomial": 4, "index_put": 2}  # approximate
_JIT = {"attend": 2, "pad": 1, "advance": 1, "greedy": 1, "sample": 1, "emit": 1,
        "project": 1, "swiglu": 1, "residual": 1, "attend_next": 1}


@dataclass(frozen=True)
class Cost:
    """`shape` of the (first) result as the trace has it, FLOPs, bytes read and written, and kernels started."""

    shape: str
    flops: int
    bytes: int
    launches: int


@dataclass(frozen=True)
class _Call:
    """One operation with the tensors that a trace stands for."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def name(self) -> str:
        return self.op._schema.name.split("::")[1]

    @property
    def inputs(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def written(self) -> list[Tensor]:
        """The arguments that the operation changes in place."""
        schema = [a for a in self.op._schema.arguments if not a.kwarg_only]
        given = [*zip(schema, self.args, strict=False),
                 *((a, self.kwargs[a.name]) for a in self.op._schema.arguments if a.name in self.kwargs)]
        return _tensors([value for a, value in given if a.alias_info is not None and a.alias_info.is_write])

    @property
    def fresh(self) -> list[Tensor]:
        """The results that are no argument and no view of one."""
        outs = self.out if isinstance(self.out, (tuple, list)) else [self.out]
        returns = self.op._schema.returns
        if len(returns) == 1:  # one tensor, or one list of tensors
            returns = returns * len(outs)
        return _tensors([out for out, r in zip(outs, returns, strict=False) if r.alias_info is None])

    @property
    def starts_nothing(self) -> bool:
        return self.name in _FREE or not (self.fresh or self.written or self.name == "_local_scalar_dense")


def of(node: fx.Node) -> Cost:
    """The cost of one node of a trace by `make_fx`; all zero for a node that is no tensor operation.

    FLOPs: 2·m·n·k for a matrix product, the two products of every query with every key for an attention, counted in
    full where a causal mask hides half (with a window, `window` keys a row), one an element for other arithmetic, none
    for moves and views. Bytes: what a kernel must read and write, each storage once, views nothing, a table looked up
    only the rows chosen; an attention over a static cache `span` rows, or those that a window leaves.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return Cost("", 0, 0, 0)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    call = _Call(node.target, tuple(args), dict(kwargs), node.meta.get("val"))
    shape = next((str(list(t.shape)) for t in (*_tensors(call.out), *reversed(call.written))), "")
    if call.starts_nothing:
        return Cost(shape, 0, 0, 0)
    return Cost(shape, _flops(call), _bytes(call), _launches(call))


def jit_launches(op: str) -> int:
    """Kernels that a hybridlab operation ("attend" or "hybridlab.attend.default") starts as a Triton kernel."""
    return _JIT[op.split(".")[1] if "." in op else op]


def plain_launches(name: str, *args: Any) -> int:
    """Kernels that a hybridlab operation ("attend") starts as plain PyTorch: those of the operations it consists of."""
    return _plain(name, tuple((_sizes(a), a.dtype) if isinstance(a, Tensor) else a for a in args))


def _flops(call: _Call) -> int:
    name, sizes = call.name, [_sizes(t) for t in call.inputs]
    if name in _MOVES:
        return 0
    if name == "attend":
        return 4 * math.prod(sizes[0]) * _keys(call, rows=1)
    if name.startswith("_scaled_dot_product") or name == "scaled_dot_product_attention":
        query, key, value = sizes[:3]
        return 2 * math.prod(query[:-1]) * key[-2] * (key[-1] + value[-1])
    if name in _GROUPED:
        return 2 * sum(map(_count, call.fresh)) * sizes[0][-1]
    if call.op.overloadpacket in flop_registry:
        args, kwargs, out = tree_map_only(Tensor, _sizes, (call.args, call.kwargs, call.out))
        return int(flop_registry[call.op.overloadpacket](*args, **kwargs, out_val=out))
    return max(map(_count, chain(call.inputs, call.fresh)), default=0)


def _keys(call: _Call, rows: int) -> int:
    """Cache rows that `rows` query rows of an `attend` see together."""
    span, window = (_int(call.args[i]) for i in (7, 8))
    return min(span, window + rows - 1) if window else span


def _bytes(call: _Call) -> int:
    name, inputs, fresh, written = call.name, call.inputs, call.fresh, call.written
    if name == "attend":
        query, keys, values, k_cache, v_cache, positions = inputs[:6]
        row = sum(_dense(t) // t.shape[2] for t in (k_cache, v_cache))
        seen = _keys(call, rows=_int(query.shape[2]))
        return sum(map(_dense, (query, keys, values, keys, values, positions, *written[2:]))) + row * seen
    writes = sum(map(_dense, fresh + written))
    if name in _ROW_READERS:
        return _storages(inputs[1:]) + 2 * writes
    if name in _ROW_WRITERS:
        return _storages(inputs[1:]) + _count(inputs[-1]) * inputs[0].element_size()
    if name in _GROUPED:  # at most one expert a row is read
        rows, experts = _sizes(inputs[0])[0], _sizes(inputs[1])[0]
        unread = _dense(inputs[1]) // experts * max(0, experts - rows)
        return _storages(inputs) - unread + writes
    mine = {id(t) for t in written} if name in _OVERWRITERS or call.op._overloadname == "out" else set()
    return _storages([t for t in inputs if id(t) not in mine]) + writes


def _launches(call: _Call) -> int:
    name = call.name
    if call.op.namespace == "hybridlab":
        return plain_launches(name, *call.args)
    if name == "grouped_mm_fallback":  # a matrix product an expert that has rows, and its row counts to the host
        return 1 + min(_sizes(call.inputs[0])[0], _sizes(call.inputs[1])[0])
    return _SEVERAL.get(name.removesuffix("_"), 1)


@lru_cache(maxsize=256)
def _plain(name: str, args: tuple[Any, ...]) -> int:
    with torch.no_grad(), _Count() as counted:
        ops.REFERENCE[name](*(torch.empty(a[0], dtype=a[1], device="meta") if isinstance(a, tuple) else a
                              for a in args))
    return counted.launches


class _Count(TorchDispatchMode):
    """Adds up the launches of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = _Call(func, args, kwargs or {}, out)
        self.launches += 0 if call.starts_nothing else _launches(call)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_iter(tree) if isinstance(t, Tensor)]


def _int(size: Any) -> int:
    """A size as a number: of a symbol its hint, 0 for one that only a run would know. No guard is made."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _sizes(tensor: Tensor) -> torch.Size:
    return torch.Size(map(_int, tensor.shape))


def _count(tensor: Tensor) -> int:
    return math.prod(_sizes(tensor))


def _dense(tensor: Tensor) -> int:
    """Bytes that a tensor holds in memory: a dimension that was expanded, of stride 0, lies there once."""
    sizes = _sizes(tensor)
    lying = (size for size, stride in zip(sizes, tensor.stride(), strict=True) if _int(stride) or not size)
    return math.prod(lying) * tensor.element_size()


def _storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of what the tensors hold, a storage that several of them lie in counted once at most."""
    views: dict[int, dict[Sequence[Any], Tensor]] = {}
    for t in tensors:
        where = (_int(t.storage_offset()), _sizes(t), tuple(map(_int, t.stride())))
        views.setdefault(t.untyped_storage()._cdata, {})[where] = t
    return sum(min(sum(map(_dense, found.values())), _int(next(iter(found.values())).untyped_storage().nbytes()))
               for found in views.values())
