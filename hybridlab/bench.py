"""Micro-benchmarks: how fast a device reads, and what launching costs in every way to run a decoder layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, fx
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from hybridlab import clocks, costs, kernels, ops
from hybridlab.cache import replaying
from hybridlab.lowering import JIT, PLAIN, Inputs, Program, StaticKV, lower
from hybridlab.readback import Readback
from hybridlab.tracing import trace_lowered, trace_stock

assert kernels, ops  # both register the namespaces that are timed

Positive = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Count = Annotated[int, Meta(ge=1)]


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GB/s at which a working set of `bytes` is read when it is read again and again, as a step reads its weights: by
    one reduction, and by matrix-vector products, which is what decoding consists of."""

    bytes: Count
    read_gbs: Positive
    gemv_gbs: Positive


class Launching(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What launching costs in a step that reads `bytes`: the more it reads, the less of the rest stays in a cache.

    Times in µs. On a CPU a call also does its work, so they hold the time of a kernel that has next to nothing to do.
    On a GPU those of the host are what it spends until it can go on.
    """

    bytes: Count
    forward_us: NotNegative     # host, a call of a stock decoder beside its launches: arguments, masks, outputs
    eager_op_us: NotNegative    # host, a kernel launched from Python, with the modules and views around it
    jit_launch_us: NotNegative  # host, a JIT kernel launched from Python
    graph_node_us: NotNegative  # device, a kernel in a graph
    graph_jit_us: NotNegative   # device, a JIT kernel in a graph
    plain_attend_gbs: Positive  # attention in plain PyTorch: bytes of cache it reads over all the time it takes
    jit_attend_gbs: Positive    # the same of the JIT kernel
    plain_row_us: NotNegative   # attention in plain PyTorch: each row of context, in each layer
    jit_row_us: NotNegative     # the same of the JIT kernel


_TURNS, _CALLS = 12, 4
_DEPTHS = (1, 5)      # layers of the decoders that are timed
_WIDTHS = {"cpu": (64, 512), "cuda": (512,)}  # of their layers; a CPU's own cache holds the narrow one
_LENGTHS = (16, 512)  # rows of their KV caches
_SIZES = {  # side of a matrix; working sets in MiB
    "cpu": (1024, (1, 4, 16, 64, 128, 256)),
    "cuda": (4096, (32, 128, 512, 2048)),
}
_BEYOND_CACHES = {"cpu": 256, "cuda": 512}  # MiB, for one quick reading: no core's share of a cache holds them


class Bench:
    """The micro-benchmarks on one device, in one dtype. Each number is of the quickest of several turns: whatever else
    a machine does adds to a time and never takes from it. Those that give every turn say so."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.cuda = device, dtype, device.type == "cuda"
        self.beyond_caches = _SIZES[device.type][1][-1] * 2**20  # bytes

    def seconds(self, *functions: Callable[[], Any], calls: int = 1, wait: bool = True,
                turns: int = _TURNS) -> list[float]:
        """Of one call of each function, the quickest of `turns` as `turns_of` takes them."""
        return [min(times) for times in self.turns_of(*functions, calls=calls, wait=wait, turns=turns)]

    def turns_of(self, *functions: Callable[[], Any], calls: int = 1, wait: bool = True,
                 turns: int = _TURNS) -> list[list[float]]:
        """Seconds of one call of each function, `calls` in a row, in every turn but the first; with `wait` until the
        device has done them.

        The functions take turns, so that a machine that changes its pace changes it for all.
        """
        taken: list[list[float]] = [[] for _ in functions]
        for _ in range(turns):
            for function, times in zip(functions, taken, strict=True):
                clocks.finish(self.device)
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                if wait:
                    clocks.finish(self.device)
                times.append((time.perf_counter() - start) / calls)
        return [times[1:] for times in taken]

    def ones(self, *shape: int) -> Tensor:
        """Memory that was written: of zeros a CPU would hold, and read, one page."""
        return torch.ones(shape, device=self.device, dtype=self.dtype)

    def readings(self) -> tuple[Reading, ...]:
        """Of matrices of as many bytes in all, one after the other."""
        return tuple(self._reading(size * 2**20) for size in _SIZES[self.device.type][1])

    def _reading(self, size: int) -> Reading:
        matrices, gemv = self._products(size)
        with self._captured(gemv) as replay:  # launched from Python, small products would show the host's pace
            read, multiplied = self.seconds(matrices.sum, replay, calls=max(1, 8 // len(matrices)))
        return Reading(matrices.nbytes, matrices.nbytes / read / 1e9, matrices.nbytes / multiplied / 1e9)

    def _products(self, size: int) -> tuple[Tensor, Callable[[], None]]:
        """Matrices of `size` bytes in all, and what multiplies one row by each of them."""
        side = min(_SIZES[self.device.type][0], math.isqrt(size // self.dtype.itemsize))
        count = size // (side * side * self.dtype.itemsize)
        matrices, row, out = self.ones(count, side, side), self.ones(1, side), self.ones(1, side)

        def gemv() -> None:
            for matrix in matrices:
                torch.mm(row, matrix.t(), out=out)

        return matrices, gemv

    def rates(self, size: int | None = None) -> dict[str, list[float]]:
        """What bounds a step that reads `size` bytes (None: more than caches hold), in every turn: GB/s read by a
        reduction ("read") and by matrix-vector products ("gemv"), GB/s read and written by a copy ("copy"), and
        TFLOP/s of one large product in the dtype ("matmul")."""
        matrices, gemv = self._products(size or self.beyond_caches)
        flat = matrices.flatten()
        target, source = flat[:len(flat) // 2 * 2].chunk(2)  # an odd number of values has no two halves
        side = _SIZES[self.device.type][0]
        calls = 8 if self.cuda else max(1, 8 // len(matrices))  # on a GPU waiting for the last one is nothing beside 8
        a, b = self.ones(side, side), self.ones(side, side)
        with self._captured(gemv) as replay:
            read, multiplied, copied, product = self.turns_of(
                matrices.sum, replay, lambda: target.copy_(source), lambda: torch.mm(a, b), calls=calls)
        moved, flops = matrices.nbytes / 1e9, 2 * side**3 / 1e12
        return {"read": [moved / s for s in read], "gemv": [moved / s for s in multiplied],
                "copy": [(target.nbytes + source.nbytes) / 1e9 / s for s in copied],
                "matmul": [flops / s for s in product]}

    def ridge(self) -> float:
        """Rows at which a layer's arithmetic takes as long as reading its weights; in a fraction of a second.

        Its matrices are more than caches hold and are multiplied one after the other, so that each is read anew, by
        launches from a graph, which do not wait for the host.
        """
        matrices, gemv = self._products(_BEYOND_CACHES[self.device.type] * 2**20)
        many = self.ones(_SIZES[self.device.type][0] // 2, matrices.shape[1])
        with self._captured(gemv) as replay:
            read, multiplied = self.seconds(replay, lambda: torch.mm(many, matrices[0].t()), turns=4)
        bytes_a_second, flops_a_second = matrices.nbytes / read, 2 * len(many) * matrices[0].numel() / multiplied
        return flops_a_second * self.dtype.itemsize / (2 * bytes_a_second)

    def matmul_tflops(self) -> float:
        """Of one large square product."""
        side = _SIZES[self.device.type][0]
        a, b = self.ones(side, side), self.ones(side, side)
        return 2 * side**3 / self.seconds(lambda: torch.mm(a, b))[0] / 1e12

    def read_back_us(self) -> float:
        readback = Readback(torch.zeros(1, dtype=torch.int64, device=self.device), 1)
        return 1e6 * self.seconds(lambda: readback.read(readback.send()), calls=20)[0]

    def graph_launch_us(self) -> float:
        """Of a graph of one kernel, through the graph cache."""
        tick = self.ones(1)
        with self._captured(lambda: tick.add_(1)) as replay:
            return 1e6 * self.seconds(replay, calls=20, wait=False)[0]

    def launchings(self, gemv_gbs: Callable[[int], float], graph_launch_us: float) -> tuple[Launching, ...]:
        """Of a narrow and a wide decoder, each less the time to read its matrices, at `gemv_gbs` of a working set."""
        return tuple(self._launching(width, gemv_gbs, graph_launch_us) for width in _WIDTHS[self.device.type])

    def _launching(self, width: int, gemv_gbs: Callable[[int], float], graph_launch_us: float) -> Launching:
        """The stock step gives the cost of a launch and, by its depth, of the call; the lowered step, replayed, that of
        a node; JIT attention in place of plain that of a JIT kernel, and left outside the graphs that of its launch; a
        longer context the rate of attention."""
        shallow, deep = (self._decoder(depth, width) for depth in _DEPTHS)
        few, many = (_Counted.of(trace_stock(m, "decode", _LENGTHS[0])) for m in (shallow, deep))
        lowered = _Counted.of(trace_lowered(deep, "decode", _LENGTHS[0])[0].graph)
        reading = lowered.bytes / gemv_gbs(lowered.bytes) / 1e3
        seen = 0.0 if self.cuda else reading  # by the host
        rehearsed = self._stock(shallow)
        for _ in range(_TURNS * _CALLS):  # cuDNN plans attention for each length of the cache that it has not seen
            rehearsed()
        low, high = self._microseconds([self._stock(shallow), self._stock(deep)], wait=False)
        with ExitStack() as stack:
            replays = [
                stack.enter_context(self._captured(self._program(deep, space, length)))
                for space in (PLAIN, JIT) for length in _LENGTHS]
            cut = stack.enter_context(self._captured(self._program(deep, JIT, _LENGTHS[0]), outside="attend"))
            plain, plain_long, jit, jit_long = self._microseconds(replays)
            inside, outside = self._microseconds([replays[2], cut], wait=not self.cuda)
        deeper = high - low - seen * (1 - few.bytes / many.bytes)
        op, node = max(0.0, deeper) / (many.launches - few.launches), max(0.0, plain - reading) / lowered.launches
        kernels = _DEPTHS[1] * (costs.jit_launches("attend") if self.cuda else 1)
        node_jit = max(0.0, jit - reading - (lowered.launches - lowered.attend) * node) / kernels
        launched = (outside - inside - _DEPTHS[1] * graph_launch_us) / kernels + (0.0 if self.cuda else node_jit)
        more = lowered.row * (_LENGTHS[1] - _LENGTHS[0]) / 1e3
        rows = (_LENGTHS[1] - _LENGTHS[0]) * _DEPTHS[1]
        return Launching(
            bytes=lowered.bytes, forward_us=max(0.0, high - seen - many.launches * op), eager_op_us=op,
            jit_launch_us=max(0.0, launched), graph_node_us=node, graph_jit_us=node_jit,
            plain_attend_gbs=more / max(plain_long - plain, 0.01 * plain),
            jit_attend_gbs=more / max(jit_long - jit, 0.01 * jit),
            plain_row_us=max(0.0, plain_long - plain) / rows, jit_row_us=max(0.0, jit_long - jit) / rows)

    def _microseconds(self, steps: list[Callable[[], Any]], wait: bool = True) -> list[float]:
        return [1e6 * s for s in self.seconds(*steps, calls=_CALLS, wait=wait)]

    def _decoder(self, depth: int, width: int) -> PreTrainedModel:
        config = LlamaConfig(num_hidden_layers=depth, hidden_size=width, intermediate_size=width, head_dim=64,
                             num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
                             max_position_embeddings=_LENGTHS[1])
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        return model.to(self.device).eval()

    def _stock(self, model: PreTrainedModel) -> Callable[[], Any]:
        ids = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        cache = DynamicCache(config=model.config)
        return lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _program(self, model: PreTrainedModel, space: str, length: int) -> Program:
        inputs = Inputs.of(1, self.device)
        inputs.positions.fill_(length - 1)
        kv = StaticKV(model.config, length, self.device, self.dtype)
        logits = torch.zeros(model.config.vocab_size, device=self.device)
        return Program(lower(model, space), kv, logits, inputs, length)

    def _captured(self, function: Callable[[], Any], outside: str = "") -> AbstractContextManager[Callable[[], None]]:
        """The replay of `function`, through a graph cache; operations of the name `outside` are between its graphs."""
        def cut() -> AbstractContextManager[Callable[[Any], bool]]:
            return nullcontext(lambda called: called._schema.name.endswith(f"::{outside}"))

        return replaying(function, self.device, cut if outside else None)


class _Counted(NamedTuple):
    """Sums over a traced step: launches, bytes, the launches of its attention, bytes of a cache row of all layers."""

    launches: int
    bytes: int
    attend: int
    row: int

    @classmethod
    def of(cls, graph: fx.Graph) -> _Counted:
        found = [(node, costs.of(node)) for node in graph.nodes]
        attends = [(node, cost) for node, cost in found if node.target is torch.ops.hybridlab.attend.default]
        caches = [cache.meta["val"] for node, _ in attends for cache in node.args[3:5]]
        return cls(sum(c.launches for _, c in found), sum(c.bytes for _, c in found),
                   sum(c.launches for _, c in attends),
                   sum(t.shape[1] * t.shape[3] * t.element_size() for t in caches))
