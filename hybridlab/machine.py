"""A machine as the numbers that a step's time is predicted from, given or measured here in a few seconds."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, fx
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from hybridlab import costs, environment, kernels, ops
from hybridlab.config import DTYPES
from hybridlab.counters import Counters
from hybridlab.errors import ConfigError, choose
from hybridlab.graphs import GraphCache
from hybridlab.lowering import JIT, PLAIN, Inputs, Program, StaticKV, lower
from hybridlab.models import resolve_device
from hybridlab.readback import Readback
from hybridlab.tracing import trace_lowered, trace_stock

assert kernels, ops  # both register the namespaces that are timed

Positive = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Count = Annotated[int, Meta(ge=1)]


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GB/s at which a working set of `bytes` is read when it is read again and again, as a step reads its weights: by
    one reduction at a time, and by matrix-vector products, which is what decoding consists of."""

    bytes: Count
    read_gbs: Positive
    gemv_gbs: Positive


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What launching, computing and reading cost. Times in µs; `measure` says how each is found.

    On a CPU a call also does its work, so launch costs hold the time of a kernel that has next to nothing to do. On a
    GPU they are what the host spends until it can go on.
    """

    name: str
    device: Literal["cpu", "cuda"]
    dtype: str
    threads: Count
    rates: Annotated[tuple[Rate, ...], Meta(min_length=1)]  # by ascending working set
    matmul_tflops: Positive          # of a large matrix product
    forward_us: NotNegative          # host, a call of a stock decoder beside its launches: arguments, masks, outputs
    eager_op_us: NotNegative         # host, a kernel launched from Python, with the modules and views around it
    jit_launch_us: NotNegative       # host, a JIT kernel launched from Python
    graph_launch_us: NotNegative     # host, one replay through the graph cache
    graph_node_us: NotNegative       # device, a kernel in a graph
    graph_jit_us: NotNegative        # device, a JIT kernel in a graph
    plain_attend_gbs: Positive       # attention in plain PyTorch: bytes of cache it reads over all the time it takes
    jit_attend_gbs: Positive         # the same of the JIT kernel
    read_back_us: NotNegative        # a token id from the device to the host, the wait included

    @property
    def read_gbs(self) -> float:
        """GB/s of a streaming read of the largest working set that was measured."""
        return self.rates[-1].read_gbs

    def gemv_gbs(self, working_set: int) -> float:
        """GB/s at which matrix-vector products read `working_set` bytes."""
        return _between(working_set, [(r.bytes, r.gemv_gbs) for r in self.rates])

    def peak_gbs(self, working_set: int) -> float:
        """GB/s at which `working_set` bytes are read at best, by whichever kernel is quicker."""
        return _between(working_set, [(r.bytes, max(r.read_gbs, r.gemv_gbs)) for r in self.rates])

    def jit_kernels(self, op: str) -> int:
        """Kernels of a JIT operation: Triton's launches on a GPU, one compiled call on a CPU."""
        return costs.jit_launches(op) if self.device == "cuda" else 1

    def to_json(self) -> str:
        """The machine as text that `from_json` turns back into an equal one."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Machine:
        """A machine from its JSON. Raises `ConfigError` for text that is none."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError("this text is no machine", str(error), "give what Machine.to_json() returned") from None


def _between(at: int, points: list[tuple[int, float]]) -> float:
    """Linear in the logarithm of the size between the measured points, constant beyond them."""
    if at <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in pairwise(points):
        if at <= high:
            return before + (after - before) * math.log(at / low) / math.log(high / low)
    return points[-1][1]


def measure(device: str = "auto", dtype: str | None = None, threads: int | None = None) -> Machine:
    """This machine, by micro-benchmarks that take seconds; the first time, two kernels are compiled.

    `device`: "auto", "cpu" or "cuda"; `dtype`: float32 on a CPU, else float16, if None; `threads`: of a CPU, as PyTorch
    has them if None, and put back afterwards. Raises `ConfigError` for a value that is none of these.

    `rates`: matrices of as many bytes in all, one after the other. Launch costs are what a layer adds to a Llama, less
    the time to read its matrices, over the launches that its trace counts: `eager_op_us` of the stock modules, of which
    `forward_us` is left for no layer at all; `graph_node_us` of the captured lowered step; `jit_launch_us` and
    `graph_jit_us` of the attention where JIT takes the place of plain PyTorch. The `attend_gbs` are the bytes of cache
    that a longer context adds over the time that it adds. `graph_launch_us` is a graph of one kernel. A layer is larger
    than a core's own cache, as in any model: with everything at hand a launch would be quicker than it ever is.
    """
    where = resolve_device(device)
    kind = choose("dtype", dtype or ("float32" if where.type == "cpu" else "float16"), DTYPES)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ConfigError(f"threads is {threads!r}", "it counts CPU threads", "give a whole number from 1 on")
    with _threads(threads), torch.no_grad():
        bench = _Bench(where, getattr(torch, kind))
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else environment.report()["cpu"]
        return Machine(name=name or platform.machine(), device=where.type, dtype=kind, threads=torch.get_num_threads(),
                       rates=bench.rates, matmul_tflops=bench.matmul(), graph_launch_us=bench.graph_launch(),
                       read_back_us=bench.read_back(), **bench.layers())


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_REPEATS = 11
_DEPTHS = (1, 5)      # layers of the two decoders
_LENGTHS = (16, 512)  # rows of their KV caches
_SIZES = {"cpu": (1024, (1, 4, 16, 64, 256)), "cuda": (4096, (32, 128, 512, 2048))}  # matrix side; working sets, MiB


class _Layer(NamedTuple):
    """What a layer adds to a traced decode step, counted at two depths: launches, bytes, launches of its attention and
    bytes of a cache row. `outside`: launches outside layers; `held`: bytes of the deeper step."""

    launches: float
    bytes: float
    attend: float
    row: float
    outside: float
    held: int

    @classmethod
    def of(cls, graphs: list[fx.Graph]) -> _Layer:
        found = [[costs.of(node) for node in graph.nodes] for graph in graphs]
        launches, held = ([sum(getattr(c, what) for c in cost) for cost in found] for what in ("launches", "bytes"))
        attends = [n for n in graphs[0].nodes if n.target is torch.ops.hybridlab.attend.default]
        caches = [cache.meta["val"] for n in attends for cache in n.args[3:5]]
        each = (launches[1] - launches[0]) / (_DEPTHS[1] - _DEPTHS[0])
        return cls(each, (held[1] - held[0]) / (_DEPTHS[1] - _DEPTHS[0]),
                   sum(costs.of(n).launches for n in attends) / _DEPTHS[0],
                   sum(t.shape[1] * t.shape[3] * t.element_size() for t in caches) / _DEPTHS[0],
                   launches[0] - _DEPTHS[0] * each, held[1])


class _Bench:
    """The micro-benchmarks on one device, in one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.cuda = device, dtype, device.type == "cuda"
        self.rates = tuple(self._rate(size * 2**20) for size in _SIZES[device.type][1])

    def seconds(self, *functions: Callable[[], Any], calls: int = 1, wait: bool = True) -> list[float]:
        """Seconds of one call of each function, `calls` in a row; with `wait` until the device has done them.

        The functions take turns, so that a machine that changes its pace changes it for all. Medians.
        """
        taken: list[list[float]] = [[] for _ in functions]
        for _ in range(_REPEATS + 1):
            for function, times in zip(functions, taken, strict=True):
                self._synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                if wait:
                    self._synchronize()
                times.append((time.perf_counter() - start) / calls)
        return [statistics.median(times[1:]) for times in taken]

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def ones(self, *shape: int) -> Tensor:
        """Memory that was written: of zeros a CPU would hold, and read, one page."""
        return torch.ones(shape, device=self.device, dtype=self.dtype)

    def _rate(self, size: int) -> Rate:
        side = min(_SIZES[self.device.type][0], math.isqrt(size // self.dtype.itemsize))
        count = size // (side * side * self.dtype.itemsize)
        matrices, row, out = self.ones(count, side, side), self.ones(1, side), self.ones(1, side)

        def gemv() -> None:
            for matrix in matrices:
                torch.mm(row, matrix.t(), out=out)

        read, multiplied = self.seconds(matrices.sum, gemv, calls=max(1, 8 // count))
        return Rate(matrices.nbytes, matrices.nbytes / read / 1e9, matrices.nbytes / multiplied / 1e9)

    def matmul(self) -> float:
        side = _SIZES[self.device.type][0]
        a, b = self.ones(side, side), self.ones(side, side)
        return 2 * side**3 / self.seconds(lambda: torch.mm(a, b))[0] / 1e12

    def read_back(self) -> float:
        readback = Readback(torch.zeros(1, dtype=torch.int64, device=self.device), 1)
        return 1e6 * self.seconds(lambda: readback.read(readback.send()), calls=20)[0]

    def graph_launch(self) -> float:
        tick = self.ones(1)
        with self._captured(lambda: tick.add_(1)) as replay:
            return 1e6 * self.seconds(replay, calls=20, wait=False)[0]

    def layers(self) -> dict[str, float]:
        """The time that a layer takes in every way to run it, and what follows from it; see `measure`."""
        models = [self._decoder(depth) for depth in _DEPTHS]
        stock = _Layer.of([trace_stock(m, "decode", _LENGTHS[0]) for m in models])
        lowered = _Layer.of([trace_lowered(m, "decode", _LENGTHS[0])[0].graph for m in models])
        static, jits = lowered.launches - lowered.attend, costs.jit_launches("attend") if self.cuda else 1
        reads = lowered.bytes / _between(lowered.held, [(r.bytes, r.gemv_gbs) for r in self.rates]) / 1e3
        called = 0.0 if self.cuda else reads  # of which the host sees nothing on a GPU
        eager, rest = self._added([self._stock(m) for m in models], wait=False)
        jit, _ = self._added([self._program(m, JIT, _LENGTHS[0]) for m in models], wait=False)
        (plain, plain_long), (graph_jit, jit_long) = (
            [self._replayed([self._program(m, space, length) for m in models]) for length in _LENGTHS]
            for space in (PLAIN, JIT))
        op, node = max(0.0, eager - called) / stock.launches, max(0.0, plain - reads) / lowered.launches
        more = lowered.row * (_LENGTHS[1] - _LENGTHS[0]) / 1e3
        return {"eager_op_us": op, "forward_us": max(0.0, rest - stock.outside * op), "graph_node_us": node,
                "jit_launch_us": max(0.0, jit - called - static * op) / jits,
                "graph_jit_us": max(0.0, graph_jit - reads - static * node) / jits,
                "plain_attend_gbs": more / max(plain_long - plain, 0.01 * plain),
                "jit_attend_gbs": more / max(jit_long - graph_jit, 0.01 * graph_jit)}

    def _decoder(self, depth: int) -> PreTrainedModel:
        config = LlamaConfig(num_hidden_layers=depth, hidden_size=512, intermediate_size=512, num_attention_heads=8,
                             num_key_value_heads=4, vocab_size=256, max_position_embeddings=_LENGTHS[1])
        with torch.random.fork_rng():
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
        return Program(lower(model, space), kv, torch.zeros(model.config.vocab_size, device=self.device), inputs, length)

    def _added(self, steps: list[Callable[[], Any]], wait: bool = True) -> tuple[float, float]:
        """µs that a layer adds, and µs that are left for none, of steps at the two depths."""
        low, high = (1e6 * s for s in self.seconds(*steps, calls=4, wait=wait))
        each = (high - low) / (_DEPTHS[1] - _DEPTHS[0])
        return each, low - _DEPTHS[0] * each

    def _replayed(self, steps: list[Callable[[], Any]]) -> float:
        """µs that a layer adds to a replay."""
        with ExitStack() as stack:
            return self._added([stack.enter_context(self._captured(step)) for step in steps])[0]

    @contextmanager
    def _captured(self, function: Callable[[], Any]) -> Iterator[Callable[[], None]]:
        """The replay of `function`, through a graph cache."""
        cache = GraphCache(self.device, None, Counters())
        cache.capture("bench", function, [])
        with cache.lease("bench") as replay:
            yield replay
        cache.clear()
