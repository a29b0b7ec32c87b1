"""A Llama-like model's step in five fused operations a layer, over the weights of the loaded model: none is copied.

Every operation reads positions and tokens from device memory, so one program of one token, and one graph, serves every
context length, and one of each bucket every prompt that fits it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridlab.errors import ConfigError
from hybridlab.kernels.attend import splits as splits_of
from hybridlab.layout import joined
from hybridlab.lowering import Inputs, Program, StaticKV

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PDL_SINCE = (9, 0)  # compute capability


def refusal(model: PreTrainedModel) -> str | None:
    """Why the steps of `model` cannot be fused, or None."""
    config, kind = model.config, model.config.model_type
    if kind not in FAMILIES:
        return f"{kind} is none of {', '.join(FAMILIES)}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act}"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks, which fused kernels would pass by"
        matrix = name.endswith(("_proj", "lm_head"))
        if matrix and not (type(module) is nn.Linear and module.weight.is_contiguous()):
            return f"{name} is no plain matrix"
        if name.endswith(("gate_proj", "up_proj")) and module.bias is not None:
            return f"{name} has a bias"
    return None


def starts_early(device: torch.device) -> bool:
    """Whether kernels on `device` can start before the one before them ends (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= PDL_SINCE


def require(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if the steps of `model` cannot be fused."""
    if reason := refusal(model):
        raise ConfigError(f"the steps of {model.name_or_path} cannot be fused", reason,
                          f"give a model of the families {', '.join(FAMILIES)}")


class Layer:
    """The weights of one layer, and what is fixed about its attention."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = [p.weight for p in projections]
        self.biases = [p.bias for p in projections]
        whole, bias = joined(tuple(self.qkv)), joined(tuple(self.biases))
        if whole is not None and (bias is not None or all(one is None for one in self.biases)):
            self.qkv, self.biases = [whole, None, None], [bias, None, None]  # one product serves all three
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.q_gain, self.k_gain = (getattr(getattr(attention, name, None), "weight", None)
                                    for name in ("q_norm", "k_norm"))
        self.output, self.down = attention.o_proj, mlp.down_proj
        self.gate, self.up = mlp.gate_proj.weight, mlp.up_proj.weight
        if (both := joined((self.gate, self.up))) is not None:
            self.gate, self.up = both, None
        self.scale = float(attention.scaling)
        own = getattr(attention, "sliding_window", None)
        self.window = int((own if hasattr(attention, "sliding_window") else getattr(config, "sliding_window", 0)) or 0)


class _Work(NamedTuple):
    """What one step writes on its way: of one token vectors, of several `[tokens, ...]`."""

    hidden: Tensor
    qkv: Tensor
    mixed: Tensor
    opened: Tensor


class FusedStep(Program):
    """A step of a lowered `module` through the fused operations of `namespace`. `model` must pass `refusal`.

    `pdl`: each kernel starts while the one before it still runs, where the GPU can.
    """

    def __init__(self, module: PreTrainedModel, namespace: str, kv: StaticKV, logits: Tensor, inputs: Inputs,
                 span: int, pdl: bool = True) -> None:
        super().__init__(module, kv, logits, inputs, span)
        self.ops, body, config = getattr(torch.ops, namespace), module.model, module.config
        self.layers = [Layer(layer, config) for layer in body.layers]
        self.table, self.norm, self.head = body.embed_tokens.weight, body.norm, module.lm_head
        self.pdl = pdl and starts_early(logits.device)
        self.caches = [(k[:, :, :span], v[:, :, :span]) for k, v in kv.layers]
        _, kv_heads, _, self.dim = kv.layers[0][0].shape
        self.heads, self.kv_heads, self.inner = config.num_attention_heads, kv_heads, config.intermediate_size
        device = logits.device
        with torch.no_grad():
            every = torch.arange(span, device=device)[None]
            self.cos, self.sin = (t[0].contiguous() for t in body.rotary_emb(self.table[:1, None], every))
        splits = splits_of(device, kv_heads) if self.rows == 1 else 0
        self.partial = torch.zeros(self.heads, splits, self.dim + 2, device=device)
        self.arrived = torch.zeros(kv_heads, device=device, dtype=torch.int32)
        self.work = self._work() if self.rows == 1 else None  # a prompt's would be held by every bucket

    def _work(self) -> _Work:
        rows, (hidden, qkv, mixed) = self.rows, (self.table.shape[1], (self.heads + 2 * self.kv_heads) * self.dim,
                                                 self.heads * self.dim)
        if rows == 1:
            return _Work(*(self.table.new_empty(size) for size in (hidden, qkv, mixed, self.inner)))
        # When the gate opens, attention is over: both take the same memory, the gate with what it lets through.
        shared = self.table.new_empty(rows * max(qkv + mixed, 2 * self.inner))
        return _Work(self.table.new_empty((rows, hidden)), shared[:rows * qkv].view(rows, qkv),
                     shared[rows * qkv:rows * (qkv + mixed)].view(rows, mixed),
                     shared[:rows * 2 * self.inner].view(rows, -1)[:, :self.inner])

    def __call__(self) -> None:
        work = self.work or self._work()
        torch.index_select(self.table, 0, self.inputs.ids[0], out=work.hidden.view(self.rows, -1))
        for layer, cache in zip(self.layers, self.caches, strict=True):
            self._attention(layer, cache, work)
            if self.rows > 1 and layer is self.layers[-1]:  # of which only keys and values of other rows are needed
                work = self._last_row(work)
            self._rest(layer, work)
        norm, head = self.norm, self.head
        self.ops.project.default(work.hidden, norm.weight, norm.variance_epsilon, head.weight, None, None, head.bias,
                                 None, None, self.pdl, self.logits)

    def _attention(self, layer: Layer, cache: tuple[Tensor, Tensor], work: _Work) -> None:
        norm = layer.norms[0]
        self.ops.project.default(work.hidden, norm.weight, norm.variance_epsilon, *layer.qkv, *layer.biases, self.pdl,
                                 work.qkv)
        self.ops.attend_next.default(work.qkv, self.cos, self.sin, layer.q_gain, layer.k_gain, norm.variance_epsilon,
                                     *cache, self.inputs.positions, layer.scale, layer.window, self.pdl,
                                     self.partial, self.arrived, work.mixed)

    def _last_row(self, work: _Work) -> _Work:
        """That of the last token, whose logits are wanted, as of a step of one token."""
        hidden, mixed = (rows.index_select(0, self.inputs.last)[0] for rows in (work.hidden, work.mixed))
        return _Work(hidden, work.qkv[0], mixed, work.opened[0])

    def _rest(self, layer: Layer, work: _Work) -> None:
        """Of a layer, what each token does by itself."""
        self.ops.residual.default(work.mixed, layer.output.weight, layer.output.bias, self.pdl, work.hidden)
        norm = layer.norms[1]
        self.ops.swiglu.default(work.hidden, norm.weight, norm.variance_epsilon, layer.gate, layer.up, self.pdl,
                                work.opened)
        self.ops.residual.default(work.opened, layer.down.weight, layer.down.bias, self.pdl, work.hidden)

    @property
    def buffers(self) -> list[Tensor]:
        return [*super().buffers, *(self.work or ()), self.partial, self.arrived]
