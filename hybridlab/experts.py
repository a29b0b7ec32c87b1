"""Mixture-of-experts layers whose routing stays in device memory, through transformers' own experts interface.

The library's default sorts the rows by expert and multiplies group by group; most machines loop over the groups on
the host, which reads back how many rows each expert got. No graph can hold that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

NAME = "hybridlab"


def experts(module: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each row's chosen experts.

    hidden: [rows, width]; chosen: int64 [rows, k], weights: [rows, k]. One row gathers the weights of its k experts,
    a copy. More rows go through every expert, and those that were not chosen count zero: k copies a row would be
    larger than the weights themselves.
    """
    if hidden.shape[0] == 1:
        return batched_mm_experts_forward(module, hidden, chosen, weights)
    outputs = _all(module, hidden)
    share = weights.new_zeros((hidden.shape[0], outputs.shape[0])).scatter_(1, chosen, weights)
    return (outputs * share.t()[:, :, None]).sum(dim=0).to(hidden.dtype)


def _all(module: nn.Module, hidden: Tensor) -> Tensor:
    """[experts, rows, width]: every expert's output for every row."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, up, hidden.expand(module.num_experts, *hidden.shape))
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = _linear(module, "down_proj", inner)
    return module.post_expert_norm(outputs) if getattr(module, "has_post_expert_norm", False) else outputs


def _linear(module: nn.Module, name: str, rows: Tensor) -> Tensor:
    weight = getattr(module, name)
    out = torch.bmm(rows, weight if module.is_transposed else weight.transpose(1, 2))
    return out + getattr(module, f"{name}_bias")[:, None] if module.has_bias else out


ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
