"""A model step → symbolic trace → a label with its reason for every operation → a Plan."""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.traceback import annotate, preserve_node_meta
from transformers import DynamicCache, PreTrainedModel

from hybridlab import models, ops
from hybridlab.config import POLICIES
from hybridlab.errors import LoweringError, choose
from hybridlab.lowering import EAGER, PLAIN, Inputs, Program, StaticKV, lower
from hybridlab.verify import verify_lowered

assert ops  # registers hybridlab::*, which lowered programs call

KINDS = ("static", "device-dynamic", "host-dynamic")
PHASES = ("decode", "prefill")
TRACE_ROWS = 17  # any prompt length or KV length that is not 0 or 1, which a symbolic trace would bake in


@dataclass(frozen=True)
class Op:
    """One operation of a traced step. `layer` is None outside the decoder layers, `path` says how it would run."""

    name: str
    op: str
    layer: int | None
    module: str
    kind: str
    reason: str
    segment: str = ""
    path: str = "eager"


@dataclass(frozen=True)
class Segment:
    """A run of operations executed one way, and why."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The partition of one program: labelled operations and the segments that execute them, in order."""

    model: str
    phase: str
    policy: str | None
    ops: tuple[Op, ...]
    segments: tuple[Segment, ...]

    def table(self) -> pd.DataFrame:
        """One row an operation: op, layer, kind, reason, segment, path."""
        rows = [{"op": o.op, "layer": o.layer, "kind": o.kind, "reason": o.reason, "segment": o.segment,
                 "path": o.path, "module": o.module, "name": o.name} for o in self.ops]
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    @property
    def counts(self) -> dict[str, int]:
        """Operations of each kind, all three always present."""
        found = Counter(o.kind for o in self.ops)
        return {kind: found[kind] for kind in KINDS}

    def for_arm(self, arm: str) -> Plan:
        """The same operations as `arm` runs them: replay and JIT become eager where the arm leaves them out."""
        replays, jits = arm in ("graph", "hybrid"), arm in ("jit", "hybrid")

        def path(planned: str, dynamic: bool) -> str:
            if planned == "graph" and replays:
                return "graph"
            return "jit" if dynamic and jits else "eager"

        return replace(
            self,
            ops=tuple(replace(o, path=path(o.path, o.op.startswith("hybridlab."))) for o in self.ops),
            segments=tuple(replace(s, path=path(s.path, True)) for s in self.segments),
        )


_ATTEND = "hybridlab.attend.default"
_OUTSIDE = {
    "decode": ("hybridlab.advance.default", "copies the drawn token and moves the position on, both in device memory"),
    "prefill": ("hybridlab.pad.default", "pads the prompt to its bucket by a length read from device memory"),
}


def partition(model: Any, policy: str | None = "whole", phase: str = "decode") -> Plan:
    """Label every operation of one step of `model` (anything `hybridlab.load` takes).

    policy=None labels the stock step and lowers nothing. A policy lowers it first and says what each segment holds;
    `LoweringError` names any operation that still depends on a shape or value the host would have to know.
    """
    choose("phase", phase, PHASES)
    if policy is not None:
        choose("policy", policy, POLICIES)
    model = models.load(model)
    cached = _PLANS.setdefault(model, {})
    if (policy, phase) not in cached:
        cached[policy, phase] = _stock(model, phase) if policy is None else _lowered(model, policy, phase)
    return cached[policy, phase]


_PLANS: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str | None, str], Plan]] = weakref.WeakKeyDictionary()


def _stock(model: PreTrainedModel, phase: str) -> Plan:
    try:
        graph = trace_stock(model, phase)
    except (RuntimeError, TypeError, ValueError) as error:
        raise LoweringError(f"a step of {type(model).__name__} could not be traced", _first_line(error)) from error
    controls = dict(zip(graph.find_nodes(op="placeholder"), ("token id", "position"), strict=False))
    labelled = tuple(_label(graph, controls, "the KV length" if phase == "decode" else "the prompt length"))
    return Plan(model.name_or_path, phase, None, labelled, (Segment("step", "eager", "nothing is lowered"),))


def _lowered(model: PreTrainedModel, policy: str, phase: str) -> Plan:
    try:
        verify_lowered(model)
        graph_module, program = trace_lowered(model, phase)
    except (RuntimeError, TypeError, ValueError) as error:  # whatever a family's own code makes of our attention
        raise LoweringError(f"{type(model).__name__} could not be lowered", _first_line(error), EAGER) from error
    fixed = dict(zip(map(id, program.inputs), ("token id", "position", "last row"), strict=True))
    controls = {
        node: fixed[id(getattr(graph_module, str(node.target)))]
        for node in graph_module.graph.find_nodes(op="get_attr")
        if id(getattr(graph_module, str(node.target))) in fixed
    }
    forward = [replace(o, segment="forward", path="graph") for o in _label(graph_module.graph, controls, "a length")]
    left = [o for o in forward if o.kind == "host-dynamic"]
    if left:
        raise LoweringError(f"{len(left)} host-dynamic operations are left in {model.name_or_path}",
                            f"the first is {left[0].op}: {left[0].reason}", EAGER)
    if not any(o.op == _ATTEND for o in forward):
        raise LoweringError(f"{model.name_or_path} never called the lowered attention", f"policy {policy!r}", EAGER)
    prepare, reason = _OUTSIDE[phase]
    before = Op("prepare", prepare, None, "", "device-dynamic", reason, "prepare", "jit")
    after = Op("sample", "hybridlab.sample.default", None, "", "device-dynamic",
               "draws by seed and position, both read from device memory", "sample", "jit")
    segments = (
        Segment("prepare", "jit", "policy 'whole' keeps the preparation of inputs outside the graph"),
        Segment("forward", "graph", "no shape or value in it depends on the host, so one capture serves every step"),
        Segment("sample", "jit", "policy 'whole' keeps sampling outside the graph"),
    )
    return Plan(model.name_or_path, phase, policy, (before, *forward, after), segments)


class _StockStep(nn.Module):
    """One stock step as a function of tensors: token ids, positions, and the keys and values of every layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(config=self.model.config)
        for layer, keys, values in zip(cache.layers, kv[::2], kv[1::2], strict=False):
            layer.keys, layer.values = keys, values  # update() would trace a concatenation that no step does
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return (out.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))


def trace_stock(model: PreTrainedModel, phase: str) -> fx.Graph:
    """The stock step as ATen operations, the KV length (decode) or the prompt length (prefill) as a symbol."""
    device = model.device
    rows = 1 if phase == "decode" else TRACE_ROWS
    ids = torch.ones((1, rows), dtype=torch.int64, device=device)
    positions = torch.arange(rows, device=device)[None]
    past = StaticKV(model.config, TRACE_ROWS, device, model.dtype).tensors if phase == "decode" else []
    return _trace(model, _StockStep(model), ids, positions, *past).graph


def trace_lowered(model: PreTrainedModel, phase: str) -> tuple[fx.GraphModule, Program]:
    """The lowered program as ATen operations and `hybridlab::attend`; its buffers appear as constants."""
    rows = 1 if phase == "decode" else TRACE_ROWS
    kv = StaticKV(model.config, 2 * TRACE_ROWS, model.device, model.dtype)
    logits = torch.zeros(model.config.vocab_size, device=model.device)
    inputs = Inputs.of(rows, model.device)
    program = Program(lower(model, PLAIN), kv, logits, inputs, kv.capacity if phase == "decode" else rows)
    return _trace(program.module, program), program


def _trace(root: nn.Module, function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    with torch.no_grad(), _module_names(root), preserve_node_meta():
        return make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)


@contextmanager
def _module_names(root: nn.Module) -> Iterator[None]:
    """While open, every traced node carries the name of the module that ran it."""
    scopes: list[ExitStack] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            scopes.append(ExitStack())
            scopes[-1].enter_context(annotate({"module": name}))
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


def _label(graph: fx.Graph, controls: dict[fx.Node, str], length: str) -> Iterator[Op]:
    """Kind and reason of every operation, in order.

    host-dynamic: a free symbol stands in a shape of its output or an input. device-dynamic: it consumes a control
    value, one computed from ids, positions or the last row, and constants, alone. Otherwise static.
    """
    control = dict(controls)
    data = set(graph.find_nodes(op="placeholder")) - control.keys()
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        sources = [n for n in node.all_input_nodes if n in control]
        looks_up = str(node.target) == _ATTEND or "embedding" in str(node.target)
        if any(n in data for n in node.all_input_nodes) or (sources and looks_up):
            data.add(node)
        elif sources:
            control[node] = control[sources[0]]
        kind, reason = _kind(node, [control[n] for n in sources], length)
        module = str((node.meta.get("custom") or {}).get("module", ""))
        yield Op(node.name, str(node.target), _layer(module), module, kind, reason)


def _kind(node: fx.Node, sources: list[str], length: str) -> tuple[str, str]:
    name = str(node.target)
    if any(_has_symbol(n) for n in (node, *node.all_input_nodes)):
        why = ("it concatenates onto the cache" if "cat" in name and length == "the KV length"
               else "it attends over that many rows" if "attention" in name else "an input has it")
        return "host-dynamic", f"shape holds S, {length}, because {why}"
    if sources:
        return "device-dynamic", f"reads the {' and the '.join(dict.fromkeys(sources))} from device memory"
    return "static", "same shapes and addresses at every step"


def _has_symbol(node: fx.Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    return any(free_symbols(part) for part in parts if part is not None)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _layer(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if part.isdigit()), None)
