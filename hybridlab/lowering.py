"""Host-dynamic patterns become device-dynamic ops over fixed buffers, through transformers' own extension points.

The stock decoder step concatenates onto a growing KV cache and attends over its length, both shapes on the host. A
lowered module is the same modules and the same weight tensors with one change: attention calls
`hybridlab::attend`, which writes into a static cache and masks by positions read on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from hybridlab import experts
from hybridlab.errors import LoweringError

EAGER = "run it with arm='eager'"
ATTENTION = {"full_attention", "sliding_attention"}
IGNORED = {"position_ids"}  # tensors that some families hand to attention: `Binding.positions` has the same
PLAIN, JIT = "hybridlab", "hybridlab_jit"  # namespaces of `attend`: the specification, and its JIT kernels


class Binding(NamedTuple):
    """What attention needs beyond q, k, v: the static cache, the rows' positions and how far to attend."""

    layers: list[tuple[Tensor, Tensor]]
    positions: Tensor
    span: int


_BOUND: ContextVar[Binding] = ContextVar("bound")  # of the program that runs now: families pass no keyword so far down


class StaticKV:
    """Keys and values of one request at fixed addresses: for each layer two of [1, kv_heads, capacity, head_dim].

    Rows beyond the current position are never attended, so a new request needs no clearing.
    """

    def __init__(self, config: Any, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = (1, kv_heads, capacity, dim)
        self.capacity = capacity
        self.layers = [
            (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def tensors(self) -> list[Tensor]:
        return [*chain.from_iterable(self.layers)]


class Inputs(NamedTuple):
    """What a program of one shape reads, at fixed addresses.

    ids: int64 [1, rows]; positions: int64 [rows]; last: int64 [1], the row whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    last: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> Inputs:
        return cls(torch.zeros((1, rows), dtype=torch.int64, device=device), torch.arange(rows, device=device),
                   torch.zeros(1, dtype=torch.int64, device=device))


class Program:
    """The lowered forward at one fixed shape: reads `inputs`, writes one row of `logits`, float32 [vocabulary].

    Attention sees the first `span` rows of the cache. Every address is fixed for life, so the call can be captured.
    """

    def __init__(self, module: nn.Module, kv: StaticKV, logits: Tensor, inputs: Inputs, span: int) -> None:
        self.module, self.kv, self.logits, self.inputs = module, kv, logits, inputs
        self.rows = inputs.ids.shape[1]
        self.binding = Binding(kv.layers, inputs.positions, span)

    def __call__(self) -> None:
        row = self.inputs.last if self.rows > 1 else 1
        token = _BOUND.set(self.binding)
        try:
            out = self.module(input_ids=self.inputs.ids, position_ids=self.inputs.positions[None], use_cache=False,
                              logits_to_keep=row)
        finally:
            _BOUND.reset(token)
        self.logits.copy_(out.logits[0, -1])

    @property
    def buffers(self) -> list[Tensor]:
        """What a captured graph of this program reads and writes beside the weights."""
        return [*self.inputs, self.logits, *self.kv.tensors]


def _attention(namespace: str) -> Callable[..., tuple[Tensor, None]]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                  *, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
                  **others: Any) -> tuple[Tensor, None]:
        _require_known(module, {"attention_mask": attention_mask, **others})
        bound = _BOUND.get()
        k_cache, v_cache = bound.layers[module.layer_idx]
        _require_fit(module, k_cache, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        _, heads, rows, dim = query.shape
        out = query.new_empty((1, rows, heads, dim))
        attend = getattr(torch.ops, namespace).attend.default
        attend(query, key, value, k_cache, v_cache, bound.positions, scale, bound.span,
               sliding_window or 0, softcap or 0.0, out)
        return out, None

    return attention


def _require_fixed_positions(model: PreTrainedModel) -> None:
    """Raise `LoweringError` for rotary embeddings that the host recomputes when the text grows beyond a length."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", "")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind == "longrope" or "dynamic" in kind:
                raise LoweringError(f"{type(model).__name__} rotates by positions of kind {kind!r}",
                                    "its angles change with the length of the text", EAGER)


def _require_fit(module: nn.Module, cache: Tensor, *new: Tensor) -> None:
    """Raise `LoweringError` for keys or values whose heads are not those of the cache, as compressed ones are not."""
    shapes = [f"{t.shape[1]} heads of {t.shape[3]}" for t in (cache, *new)]
    if len(set(shapes)) > 1:
        raise LoweringError(f"{type(module).__name__} has keys of {shapes[1]} and values of {shapes[2]}",
                            f"the static cache has {shapes[0]}", EAGER)


def _require_known(module: nn.Module, keywords: dict[str, Any]) -> None:
    """Raise `LoweringError` for a tensor that attention is given and would not use: sinks, a bias, a mask."""
    for name, value in keywords.items():
        if isinstance(value, Tensor) and name not in IGNORED:
            raise LoweringError(f"{type(module).__name__} attends with {name!r}",
                                "the lowered attention knows masks by position, windows and soft-capping only", EAGER)


for _namespace in (PLAIN, JIT):
    # No mask function is registered under these names: transformers then builds no mask, and `attend` needs none.
    AttentionInterface.register(_namespace, _attention(_namespace))


def twin(model: PreTrainedModel, tensor: Callable[[Tensor], Tensor] = lambda t: t) -> PreTrainedModel:
    """A second module tree over the same weight tensors, or over what `tensor` makes of each, in eval mode.

    It has a config of its own.
    """
    tensors = {id(t): tensor(t) for t in (*model.parameters(), *model.buffers())}
    tokenizer = getattr(model, "tokenizer", None)
    return copy.deepcopy(model, {id(tokenizer): tokenizer, **tensors}).eval()


def lower(model: PreTrainedModel, namespace: str) -> PreTrainedModel:
    """A twin of `model` that attends through `namespace`; weights are shared, the model itself is not touched.

    Raises `LoweringError` for layers that are known not to attend, or to attend otherwise. One that uses the lowered
    attention wrongly is found by `verify_lowered`, one that never calls it there or by `trace_lowered`.
    """
    require(model)
    return lowered(twin(model), namespace)


def require(model: PreTrainedModel) -> None:
    """Raise `LoweringError` for a model that says itself that it cannot be lowered."""
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise LoweringError(f"{name} keeps a state that is no KV cache", model.name_or_path,
                            "hybridlab serves decoders whose only state is keys and values")
    _require_fixed_positions(model)
    others = set(getattr(model.config, "layer_types", None) or ()) - ATTENTION
    if others:
        raise LoweringError(f"{name} has layers of kind {', '.join(sorted(others))}",
                            f"only {' and '.join(sorted(ATTENTION))} can be lowered", EAGER)


def lowered(model: PreTrainedModel, namespace: str) -> PreTrainedModel:
    """`model` itself, which attends through `namespace` from now on: for a twin that nobody else has."""
    model.set_attn_implementation(namespace)
    model.set_experts_implementation(experts.NAME)
    # With a padding token some families look for it among the ids, which only the host can. Set behind the config's
    # back, as a few of them insist on a number.
    vars(model.config)["pad_token_id"] = None
    if model.config._attn_implementation != namespace:
        raise LoweringError(f"{type(model).__name__} does not use transformers' attention interface",
                            "its attention cannot be replaced by one that a graph can hold", EAGER)
    return model
