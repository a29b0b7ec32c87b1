"""A graph for the CPU: concrete ATen calls over fixed tensors, recorded once, replayed without Python model code.

Like a CUDA graph it bakes in shapes, addresses and Python values: a value read on the host during recording raises, a
changed number is not seen by a replay. Instantiating gives intermediates a place in one arena, reused once none reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from hybridlab import kernels, ops
from hybridlab.errors import CaptureFailed
from hybridlab.ranges import span

ALIGNMENT = 64  # bytes; a cache line, and what the CPU allocator gives
_HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def reads_back(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host must wait for a value: to have it (`.item()`), or to know a shape that depends on it."""
    if function is torch.ops.aten.index.Tensor:  # tagged for masks only; integer indices have a known shape
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(_HOST_READS & set(function.tags))


@dataclass
class _Call:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    outside: bool = False

    @property
    def inputs(self) -> Iterator[Tensor]:
        return (t for t in tree_iter((self.args, self.kwargs)) if isinstance(t, Tensor))

    @property
    def mutates(self) -> bool:
        return bool(self.function._schema.is_mutable)

    @property
    def outputs(self) -> list[Tensor]:
        return [t for t in tree_iter(self.out) if isinstance(t, Tensor)]


class Pool:
    """Memory that tapes share which never run at the same time: as much as the largest of them needs."""

    def __init__(self) -> None:
        self._largest = _block(0)

    def reserve(self, nbytes: int) -> tuple[torch.UntypedStorage, int]:
        """A block of at least `nbytes`, and by how much the pool has grown for it. Tapes made before keep theirs."""
        if nbytes <= self._largest.nbytes():
            return self._largest, 0
        self._largest = _block(nbytes)
        return self._largest, nbytes


def _block(nbytes: int) -> torch.UntypedStorage:
    return torch.zeros(nbytes, dtype=torch.uint8).untyped_storage()


class _Copies:
    """Stand-ins for given tensors: operations run on them, and what was recorded is about the tensors themselves."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        own = {storage(t): t.untyped_storage() for t in tensors}
        self.copy = {address: whole.clone() for address, whole in own.items()}
        self.origin = {self.copy[address].data_ptr(): whole for address, whole in own.items()}

    def instead(self, tensor: Tensor) -> Tensor:
        return over(self.copy[storage(tensor)], tensor) if storage(tensor) in self.copy else tensor

    def original(self, tensor: Tensor) -> Tensor:
        return over(self.origin[storage(tensor)], tensor) if storage(tensor) in self.origin else tensor


def over(whole: torch.UntypedStorage, like: Tensor, offset: int | None = None) -> Tensor:
    """A tensor like another over other memory, at `offset` elements, or at its own."""
    at = like.storage_offset() if offset is None else offset
    return torch.empty(0, dtype=like.dtype).set_(whole, at, like.shape, like.stride())


class _Recorder(TorchDispatchMode):
    """Runs every operation and keeps it. The specification ops are recorded as the plain PyTorch they consist of."""

    def __init__(self, leave_outside: Callable[[Any], bool], copies: _Copies) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.leave_outside, self.copies = leave_outside, copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self.copies.instead, (args, kwargs or {}))
        outside = self.leave_outside(func)
        if func.namespace == "hybridlab" and not outside:
            with self:
                return ops.REFERENCE[func._schema.name.split("::")[1]](*args, **kwargs)
        if reads_back(func, args):
            raise CaptureFailed(f"{func} reads a value back to the host", "no graph can hold that",
                                "keep the value in device memory, or leave this step outside the graph")
        out = func(*args, **kwargs)
        self.calls.append(_Call(func, args, kwargs, out, outside))
        return out


class Tape:
    """A recorded launch sequence. `replay` runs it over the tensors it was recorded with.

    Operations that `leave_outside` names are no part of a graph: between the graphs they run through the dispatcher.
    `graphs` counts the graphs of one replay. The tensors in `private` keep their values while it is recorded. Its
    intermediates lie in `pool`, or in memory of its own: `nbytes`.
    """

    def __init__(self, function: Callable[[], None], leave_outside: Callable[[Any], bool] | None = None,
                 pool: Pool | None = None, private: Sequence[Tensor] = ()) -> None:
        start = time.perf_counter()
        copies = _Copies(private)
        recorder = _Recorder(leave_outside or (lambda _: False), copies)
        with torch.no_grad(), recorder:
            function()
        recorded = time.perf_counter()
        with torch.no_grad():
            grown, launches = _instantiate(recorder.calls, copies, pool or Pool())
        self.nbytes, self.pool_bytes = (grown, 0) if pool is None else (0, grown)
        self.capture_ms, self.instantiate_ms = (recorded - start) * 1e3, (time.perf_counter() - recorded) * 1e3
        parts = [(outside, [call for call, _ in part]) for outside, part in groupby(launches, lambda pair: pair[1])]
        self.graphs, self._parts = sum(not outside for outside, _ in parts), [part for _, part in parts]

    def replay(self) -> None:
        with torch.no_grad():
            for number, part in enumerate(self._parts):
                with span("segment", number) if len(self._parts) > 1 else nullcontext():
                    for call in part:
                        call()

    def reset(self) -> None:
        self._parts = []

    def __len__(self) -> int:  # launches in one replay
        return sum(map(len, self._parts))


def launches_nothing(function: Any) -> bool:
    """Whether an operation only looks at memory in another way, or takes some, without writing any."""
    return bool(function.is_view) or any(name in function._schema.name for name in ("empty", "_unsafe_view", "alias"))


def fresh(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Tensor]:
    """The tensors that a call made, in order: no views of its arguments and not the arguments that it wrote."""
    given = {storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
    return [t for t in tree_iter(out) if isinstance(t, Tensor) and storage(t) not in given]


def storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor looks at."""
    return tensor.untyped_storage().data_ptr()


def _instantiate(calls: list[_Call], copies: _Copies,
                 pool: Pool) -> tuple[int, list[tuple[Callable[[], Any], bool]]]:
    """Bytes by which `pool` grew, and the calls over tensors in it, each with whether it is outside.

    Dropped are views, whose addresses are fixed, and constants, whose values are.
    """
    calls = _without_constants(calls)
    births, deaths, sizes = _lifetimes(calls)
    offsets, total = _place(births, deaths, sizes)
    arena, grown = pool.reserve(total)
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        offset = offsets.get(storage(tensor))
        if offset is None:
            return copies.original(tensor)
        if id(tensor) not in moved:
            moved[id(tensor)] = over(arena, tensor, offset // tensor.element_size() + tensor.storage_offset())
        return moved[id(tensor)]

    launches = []
    for index, call in enumerate(calls):
        made = [t for t in call.outputs if births.get(storage(t)) == index]
        if made or call.mutates:
            args, kwargs = tree_map_only(Tensor, move, (call.args, call.kwargs))
            if call.function.namespace == "hybridlab_jit" and not call.outside:
                launch = kernels.bind(call.function._schema.name.split("::")[1], args)
            else:
                launch = again(call.function, args, kwargs, [move(t) for t in made], (call.args, call.kwargs, made))
            launches.append((launch, call.outside))
    return grown, launches


def _without_constants(calls: list[_Call]) -> list[_Call]:
    """The calls less those that make the same tensor at every replay: from nothing, and written by nobody after."""
    written = {storage(t) for call in calls if call.mutates for t in call.inputs}
    return [call for call in calls
            if call.mutates or any(True for _ in call.inputs) or torch.Tag.nondeterministic_seeded in call.function.tags
            or any(storage(t) in written for t in call.outputs)]


def _lifetimes(calls: list[_Call]) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """First and last call of every storage that the recording made, and its bytes. All recorded tensors are alive,
    so an address names one storage; what existed before the recording (weights, buffers) is not in the result."""
    births: dict[int, int] = {}
    deaths: dict[int, int] = {}
    sizes: dict[int, int] = {}
    outside: set[int] = set()
    for index, call in enumerate(calls):
        read = {storage(t) for t in call.inputs}
        outside |= read - births.keys()
        for tensor in call.outputs:
            where = storage(tensor)
            if where not in births and where not in outside and tensor.numel():
                births[where], sizes[where] = index, tensor.untyped_storage().nbytes()
        for where in read | {storage(t) for t in call.outputs}:
            if where in births:
                deaths[where] = index
    return births, deaths, sizes


def _place(births: dict[int, int], deaths: dict[int, int], sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """Byte offsets such that storages alive at the same call never overlap (first fit by birth), and the arena size."""
    offsets: dict[int, int] = {}
    live: list[tuple[int, int, int]] = []  # (offset, end, death), by offset
    total = 0
    for where in sorted(births, key=lambda w: births[w]):
        live = [block for block in live if block[2] >= births[where]]
        need, offset = -(-sizes[where] // ALIGNMENT) * ALIGNMENT, 0
        for start, end, _ in sorted(live):
            if start - offset >= need:
                break
            offset = max(offset, end)
        offsets[where] = offset
        live.append((offset, offset + need, deaths[where]))
        total = max(total, offset + need)
    return offsets, total


def again(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fresh: list[Tensor],
          first: tuple[Any, Any, list[Tensor]] | None = None) -> Callable[[], Any]:
    """The same call, its results written into `fresh`.

    `first` is what the call had when it first ran, and made, if these are other tensors now: their values are valid.
    """
    if function is torch.ops.aten._to_copy.default:
        return partial(fresh[0].copy_, args[0])
    if fresh:
        variant = _out_variant(function)
        if variant is not None:
            outs = [a.name for a in variant._schema.arguments if a.is_out]
            own_args, own_kwargs, made = first or (args, kwargs, fresh)
            called = _variant(variant, own_args, own_kwargs | dict(zip(outs, made, strict=True)))
            return partial(called, *args, **kwargs, **dict(zip(outs, fresh, strict=True)))
    launch = partial(function, *args, **kwargs) if args or kwargs else function
    return partial(_copy_out, launch, fresh) if fresh else launch


def _variant(variant: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """PyTorch's own Python function where that takes these arguments, else the operator.

    The function parses its arguments faster, and a small operation takes no longer than that. The trial call writes
    the results that the first one made.
    """
    function = getattr(torch, variant._schema.name.split("::")[1], None)
    if function is not None:
        with suppress(TypeError):
            function(*args, **kwargs)
            return function
    return variant


def _copy_out(launch: Callable[[], Any], fresh: list[Tensor]) -> None:
    results = [t for t in tree_iter(launch()) if isinstance(t, Tensor)]
    for target, result in zip(fresh, results, strict=True):
        target.copy_(result)


def _out_variant(function: Any) -> Any:
    """The overload of the same operation that writes into given tensors, or None."""
    wanted = [(a.name, str(a.type)) for a in function._schema.arguments]
    packet = function.overloadpacket
    for name in packet.overloads():
        schema = getattr(packet, name)._schema
        given = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
        outs = [a for a in schema.arguments if a.is_out]
        if given == wanted and outs and len(outs) == len(function._schema.returns):
            return getattr(packet, name)
    return None
