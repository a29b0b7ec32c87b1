"""A model step → symbolic trace → a label with its reason for every operation → a Plan by a policy."""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from transformers import PreTrainedModel

from hybridlab import costs, models
from hybridlab.config import Policy
from hybridlab.config import policy as named_policy
from hybridlab.errors import HybridlabError, LoweringError, PlanError, choose
from hybridlab.lowering import EAGER
from hybridlab.plan import Op, Plan, Segment
from hybridlab.policies import assign
from hybridlab.tape import reads_back
from hybridlab.tracing import PHASES, trace_lowered, trace_stock, where
from hybridlab.verify import verify_lowered

LENGTH = 512  # tokens that a plan's costs are for, unless asked otherwise


def partition(model: Any, policy: str | Policy | None = "whole", phase: str = "decode", length: int = LENGTH) -> Plan:
    """Label every operation of one step of `model` (anything `hybridlab.load` takes).

    policy=None labels the stock step and lowers nothing. A policy lowers it first and says what each segment holds.
    `length` is the KV length (decode) or the prompt length (prefill), in tokens, that costs are counted for.
    A model given by name is planned from its config alone, no weight is made or read; one given as an instance is
    compared with itself first, stock against lowered. Raises `LoweringError`, naming any operation that still depends
    on a shape or value the host would have to know, and `PlanError` for a policy that names nothing of the model.
    """
    choose("phase", phase, PHASES)
    least = 1 if policy is not None else 2  # a symbolic trace treats 0 and 1 as constants
    if not isinstance(length, int) or isinstance(length, bool) or length < least:
        raise PlanError(f"length is {length!r}", "it counts tokens", f"give a whole number from {least} on")
    wanted = None if policy is None else named_policy(policy)
    model = models.skeleton(model)
    cached = _PLANS.setdefault(model, {})
    labels = (wanted is None, phase, length, _state(model))
    if labels not in cached:
        cached[labels] = tuple((_stock if wanted is None else _lowered)(model, phase, length))
    if wanted is None:
        return Plan(model.name_or_path, phase, None, length,
                    tuple(replace(o, segment="step") for o in cached[labels]),
                    (Segment("step", "eager", "nothing is lowered"),))
    return Plan(model.name_or_path, phase, wanted, length, *assign(cached[labels], wanted))


def plain(model: PreTrainedModel) -> bool:
    """Whether verification alone, which takes a tenth of a trace's time, shows what a trace of the decode step would:
    that all of it can be in one graph. What a trace would refuse is refused for its reasons."""
    try:
        with _refusing(model, f"{type(model).__name__} could not be lowered", EAGER):
            return _verified(model)
    except LoweringError:
        partition(model)
        raise


def _verified(model: PreTrainedModel) -> bool:
    """What `verify_lowered` gives, once for a model as it is now."""
    known = _VERIFIED.setdefault(model, {})
    state = _state(model)
    if state not in known:
        known[state] = verify_lowered(model)
    return known[state]


def _state(model: PreTrainedModel) -> tuple[Any, ...]:
    """What labels depend on beside the model's class and config."""
    return (model.dtype, model.device, model.config._attn_implementation,
            getattr(model.config, "_experts_implementation", None))


_PLANS: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], tuple[Op, ...]]] = (
    weakref.WeakKeyDictionary())
_VERIFIED: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()


def _stock(model: PreTrainedModel, phase: str, length: int) -> Iterator[Op]:
    with _refusing(model, f"a step of {type(model).__name__} could not be traced", ""):
        graph = trace_stock(model, phase, length)
    controls = dict(zip(graph.find_nodes(op="placeholder"), ("token id", "position"), strict=False))
    return label(graph, controls, "the KV length" if phase == "decode" else "the prompt length")


def _lowered(model: PreTrainedModel, phase: str, length: int) -> Iterator[Op]:
    """The lowered forward, between the operation that prepares its inputs and the one that samples."""
    with _refusing(model, f"{type(model).__name__} could not be lowered", EAGER):
        graph_module, program = trace_lowered(model, phase, length)
        if model.device.type != "meta":
            _verified(model)
    fixed = dict(zip(map(id, program.inputs), ("token id", "position", "last row"), strict=True))
    controls = {
        node: fixed[id(getattr(graph_module, str(node.target)))]
        for node in graph_module.graph.find_nodes(op="get_attr")
        if id(getattr(graph_module, str(node.target))) in fixed
    }
    yield Op("prepare", *_PREPARE[phase], launches=1)
    yield from label(graph_module.graph, controls, "a length")
    yield Op("sample", "hybridlab.sample.default", None, "", "device-dynamic",
             "draws a random number keyed by seed and position, both read from device memory", launches=1)


_PREPARE = {
    "decode": ("hybridlab.advance.default", None, "", "device-dynamic",
               "copies the drawn token and moves the position on, both in device memory"),
    "prefill": ("hybridlab.pad.default", None, "", "device-dynamic",
                "pads the prompt to its bucket by a length read from device memory"),
}


def label(graph: fx.Graph, controls: dict[fx.Node, str], length: str) -> Iterator[Op]:
    """Kind, reason and cost of every operation, in order.

    host-dynamic: a free symbol stands in a shape of its output or an input, or the host reads a value back.
    device-dynamic: it consumes a control value, one computed from ids, positions or the last row, and constants,
    alone, or chooses rows by an index that was computed. A cache that comes in at a new address is host-dynamic too.
    Otherwise static. `controls` names the inputs that are such values, `length` what a symbol stands for.
    """
    control = dict(controls)
    data = set(graph.find_nodes(op="placeholder")) - control.keys()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        sources = [n for n in node.all_input_nodes if n in control]
        looks_up = "attend" in str(node.target) or "embedding" in str(node.target)
        if any(n in data for n in node.all_input_nodes) or (sources and looks_up):
            data.add(node)
        elif sources:
            control[node] = control[sources[0]]
        if node.target is operator.getitem or isinstance(node.meta.get("val"), _NUMBERS):
            continue  # a part of a result, or arithmetic of the host on sizes: no operation of the device
        kind, reason = _kind(node, [control[n] for n in sources], length)
        if kind == "static" and any(n.op == "placeholder" and n in data for n in node.all_input_nodes):
            kind, reason = "host-dynamic", "reads the cache at an address that is new at every step"
        if kind == "static" and _chooses(node, data):
            kind, reason = "device-dynamic", "chooses rows by an index in device memory"
        module = str((node.meta.get("custom") or {}).get("module", ""))
        cost = costs.of(node)
        shape = re.sub(r"\bs\d+\b", "S", cost.shape)
        yield Op(node.name, str(node.target), _layer(module), module, kind, reason, shape, cost.flops, cost.bytes,
                 cost.launches)


def _kind(node: fx.Node, sources: list[str], length: str) -> tuple[str, str]:
    name = str(node.target)
    if name in _READS_BACK:
        return "host-dynamic", _READS_BACK[name]
    if isinstance(node.target, torch._ops.OpOverload) and reads_back(node.target, _values(node.args)):
        return "host-dynamic", "the host reads a value back, to know it or a shape that depends on it"
    grows = [n for n in (node, *node.all_input_nodes) if _has_symbol(n)]
    if grows and all(isinstance(n.meta["val"], _NUMBERS) for n in grows):
        return "host-dynamic", f"takes a number from the host, computed from S, {length}"
    if grows:
        why = ("it concatenates onto the cache" if "cat" in name and length == "the KV length"
               else "it attends over that many rows" if "attention" in name else "an input has it")
        return "host-dynamic", f"shape holds S, {length}, because {why}"
    if sources:
        return "device-dynamic", f"reads the {' and the '.join(dict.fromkeys(sources))} from device memory"
    if (isinstance(node.target, torch._ops.OpOverload) and "scaled_dot_product" not in name  # without dropout
            and torch.Tag.nondeterministic_seeded in node.target.tags):
        return "device-dynamic", "draws random numbers"
    return "static", "same shapes and addresses at every step"


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
_READS_BACK = {
    "transformers.grouped_mm_fallback.default":
        "the host reads back how many rows each expert gets, and loops over them",
}


def _chooses(node: fx.Node, data: set[fx.Node]) -> bool:
    """Whether an operation takes or writes the rows that an integer tensor computed from data names."""
    if not any(word in str(node.target) for word in ("index", "gather", "scatter")):
        return False
    values = [n.meta.get("val") for n in node.all_input_nodes if n in data]
    return any(isinstance(v, torch.Tensor) and not v.is_floating_point() for v in values)


def _values(args: Any) -> Any:
    return fx.map_arg(args, lambda node: node.meta.get("val"))


def _has_symbol(node: fx.Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    return any(free_symbols(part) for part in parts if part is not None)


@contextmanager
def _refusing(model: PreTrainedModel, fact: str, remedy: str) -> Iterator[None]:
    """Whatever a family's own code makes of shapes without values, or of our attention, as a `LoweringError`."""
    try:
        yield
    except HybridlabError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}{where(model, error)}: {str(error).strip().partition(chr(10))[0]}"
        raise LoweringError(fact, cause, remedy) from error


def _layer(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if part.isdigit()), None)
