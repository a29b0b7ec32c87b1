"""A step of a model as a trace of ATen operations, each with the module that ran it; tensors in it have no memory."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.traceback import annotate, preserve_node_meta
from transformers import DynamicCache, PreTrainedModel

from hybridlab import models, ops
from hybridlab.errors import ConfigError, LoweringError
from hybridlab.lowering import EAGER, PLAIN, Inputs, Program, StaticKV, lower, twin

assert ops  # registers hybridlab::*, which lowered programs call

PHASES = ("decode", "prefill")


class _StockStep(nn.Module):
    """One stock step as a function of tensors: token ids, positions, then the keys and values of every layer.

    The last argument is the number of tokens before this step, 0 in prefill.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, *past: Any) -> tuple[Tensor, ...]:
        *kv, before = past
        cache = DynamicCache(config=self.model.config)
        for layer, keys, values in zip(cache.layers, kv[::2], kv[1::2], strict=False):
            layer.keys, layer.values = keys, values  # update() would trace a concatenation that no step does
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
            if layer.is_sliding:
                layer.cumulative_length = before
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return (out.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))


def trace_stock(model: PreTrainedModel, phase: str, length: int) -> fx.Graph:
    """The stock step as ATen operations, with the KV length (decode) or the prompt length (prefill) as a symbol.

    Sizes that hold the symbol count as `length`, in tokens. No weight is read, and no tensor takes memory.
    Raises `ConfigError` for a length that a trace cannot tell from a size of the model: under 2, or where a sliding
    window fills.
    """
    if length < 2:
        raise ConfigError(f"length is {length}", "in tokens", "plan for 2 or more")
    with _weightless(model, length) as (fake, symbol):
        rows = 1 if phase == "decode" else symbol
        ids, positions = (torch.empty((1, rows), dtype=torch.int64, device=fake.device) for _ in range(2))
        past = (*_past(fake, symbol, length), symbol) if phase == "decode" else (0,)
        graph = _trace(fake, _StockStep(fake), ids, positions, *past).graph
    if symbol.node.maybe_as_int() is not None:
        raise ConfigError(f"length is {length}", "the step compares it with a size of its own, such as a window, and "
                          "finds it equal: no shape would seem to grow", "plan for a few tokens more or fewer")
    return graph


def trace_lowered(model: PreTrainedModel, phase: str, length: int) -> tuple[fx.GraphModule, Program]:
    """The lowered program as ATen operations and `hybridlab::attend`; its buffers appear as constants.

    Prefill has `length` rows, decode attends over `length` rows of the cache. No weight is read, no memory taken.
    Raises `LoweringError` for a model with a layer that does not call the lowered attention.
    """
    if length < 1:
        raise ConfigError(f"length is {length}", "in tokens", "plan for 1 or more")
    with _weightless(model, length) as (fake, _):
        rows = 1 if phase == "decode" else length
        kv = StaticKV(fake.config, length, fake.device, fake.dtype)
        logits = torch.zeros(fake.config.vocab_size, device=fake.device)
        program = Program(lower(fake, PLAIN), kv, logits, Inputs.of(rows, fake.device), length)
        traced = _trace(program.module, program)
    _require_attention(traced, program)
    return traced, program


def _require_attention(traced: fx.GraphModule, program: Program) -> None:
    """Raise `LoweringError` unless every layer attends once through the lowered attention."""
    calls = traced.graph.find_nodes(op="call_function", target=torch.ops.hybridlab.attend.default)
    caches = [getattr(traced, str(node.args[3].target)) for node in calls]
    layers = [keys for keys, _ in program.kv.layers]
    if sorted(map(id, caches)) != sorted(map(id, layers)):
        raise LoweringError(f"{type(program.module).__name__} attends otherwise than once a layer through "
                            "transformers' interface", f"{len(calls)} calls in {len(layers)} layers", EAGER)


@contextmanager
def _weightless(model: PreTrainedModel, length: int) -> Iterator[tuple[PreTrainedModel, SymInt]]:
    """A twin of `model` whose tensors are shapes alone, and a symbol that stands for `length`.

    While open, tensors that are made have no memory either. A model on the meta device is taken for one on the
    device that it would be loaded to, whose operations it then shows.
    """
    device = models.resolve_device() if model.device.type == "meta" else model.device
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    symbol = mode.from_tensor(torch.empty(max(2, length), device="meta"), symbolic_context=dynamic).shape[0]

    def shape(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty

    with mode, torch.no_grad():
        yield twin(model, shape), symbol


def _past(model: PreTrainedModel, symbol: SymInt, length: int) -> Iterator[Tensor]:
    """Keys and values of every layer after `symbol` tokens, in the shapes that the model itself gives them."""
    ids, positions = (torch.empty((1, 2), dtype=torch.int64, device=model.device) for _ in range(2))
    outputs = _trace(model, _StockStep(model), ids, positions, 0).graph.output_node().args[0][1:]
    layers = DynamicCache(config=model.config).layers
    for layer, *kv in zip(layers, outputs[::2], outputs[1::2], strict=True):
        full = layer.is_sliding and length >= layer.sliding_window
        for tensor in (node.meta["val"] for node in kv):
            yield tensor.new_empty((*tensor.shape[:2], layer.sliding_window - 1 if full else symbol, tensor.shape[3]))


def _trace(root: nn.Module, function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    with module_scopes(root, lambda name: annotate({"module": name})), preserve_node_meta():
        traced = make_fx(function, {torch.ops.aten._grouped_mm.default: _grouped_mm},
                         tracing_mode="symbolic" if inputs else "real")(*inputs)
    for node in traced.graph.find_nodes(op="get_attr"):
        node.meta["val"] = getattr(traced, str(node.target))
    return traced


def _grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor | None = None, *others: Any, **_: Any) -> Any:
    """Products of a mixture's experts as the operation that shows what runs: a loop that reads the offsets back.

    PyTorch has one kernel that does not, for bfloat16 on GPUs of compute capability 9 and 10 (`_grouped_mm_cuda` in
    aten/src/ATen/native/cuda/GroupedBlas.cpp).
    """
    if rows.dtype == torch.bfloat16 and rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= (9, 0):
        return NotImplemented
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)


@contextmanager
def module_scopes(root: nn.Module, scope: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """While open, each module of `root` runs inside `scope(its name)`."""
    scopes: list[ExitStack] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            scopes.append(ExitStack())
            scopes[-1].enter_context(scope(name))
        return hook

    def leave(*_: Any) -> None:
        scopes.pop().close()

    for name, module in root.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def where(root: nn.Module, error: BaseException) -> str:
    """The innermost module of `root` that raised, and its line: " in model.layers.0.mlp: for i in hit:"; else ""."""
    names: dict[int, str] = {}
    found = ""
    for frame in traceback.walk_tb(error.__traceback__):
        own = frame[0].f_locals.get("self")
        if isinstance(own, type(root)):  # a twin, most likely
            names = {id(module): name for name, module in own.named_modules() if name}
        name = names.get(id(own))
        if name is not None:
            found = f" in {name}: {linecache.getline(frame[0].f_code.co_filename, frame[1]).strip()}"
    return found
