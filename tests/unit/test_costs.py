"""What an operation costs, against closed formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hybridlab import costs, kernels, ops
from hybridlab.costs import Cost
from hybridlab.tape import Tape
from hybridlab.tracing import trace_lowered, trace_stock

assert kernels, ops
F32, I64 = 4, 8  # bytes an element


def costs_of(function: Callable[..., Any], *inputs: Tensor, mode: str = "symbolic") -> dict[str, Cost]:
    """The cost of every operation of a trace, by its short name; the last of those that share one."""
    nodes = make_fx(function, tracing_mode=mode)(*inputs).graph.nodes
    return {str(n.target).split(".")[1]: costs.of(n) for n in nodes if n.op == "call_function" and "." in str(n.target)}


def llama(**changes: Any) -> PreTrainedModel:
    config = LlamaConfig(**{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 101,
                            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
                            **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def weights(c: LlamaConfig) -> int:
    """Elements of all matrices that one Llama step multiplies with, by its published layer shapes."""
    kv = c.num_key_value_heads * c.head_dim
    layer = 2 * c.hidden_size**2 + 2 * c.hidden_size * kv + 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * layer + c.hidden_size * c.vocab_size


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_step_reads_and_multiplies_its_matrices_once(phase: str) -> None:
    """A weight counted twice, or not, moves every floor: bytes and FLOPs of matrix products are the config's."""
    model, length = llama(), 37
    c, found = model.config, []
    graph, _ = trace_lowered(model, phase, length)
    for node in graph.graph.nodes:
        if str(node.target) == "aten.mm.default":
            found.append((costs.of(node), node.args[0].meta["val"], node.meta["val"]))
    rows = 1 if phase == "decode" else length
    head = c.hidden_size * c.vocab_size  # only the last row meets the head
    assert sum(cost.flops for cost, _, _ in found) == 2 * (rows * (weights(c) - head) + head)
    activations = sum(x.numel() + y.numel() for _, x, y in found)
    assert sum(cost.bytes for cost, _, _ in found) == F32 * (weights(c) + activations)


def test_stock_and_lowered_attention_count_the_same_products() -> None:
    """Before and after lowering are compared: a decode step's query meets the same keys in both."""
    model, length = llama(), 37
    c = model.config
    stock = sum(costs.of(n).flops for n in trace_stock(model, "decode", length).nodes if "attention" in str(n.target))
    one_more = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim  # the stock cache has grown by this row
    lowered, _ = trace_lowered(model, "decode", length)
    attend = sum(costs.of(n).flops for n in lowered.graph.nodes if "attend" in str(n.target))
    assert stock in (attend, attend + one_more)
    assert attend == one_more * length


def attend(rows: int, span: int, window: int = 0, softcap: float = 0.0) -> Cost:
    heads, groups, dim, capacity = 6, 2, 16, 64
    q, k, v = torch.zeros(1, heads, rows, dim), torch.zeros(1, groups, rows, dim), torch.zeros(1, groups, rows, dim)
    cache, out = torch.zeros(1, groups, capacity, dim), torch.zeros(1, rows, heads, dim)
    call = torch.ops.hybridlab.attend.default

    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, out: Tensor) -> None:
        call(q, k, v, keys, values, positions, 0.25, span, window, softcap, out)

    return costs_of(step, q, k, v, cache, cache.clone(), torch.arange(rows), out, mode="fake")["attend"]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 20), span=st.integers(20, 64), window=st.integers(0, 64))
def test_attend_costs_the_rows_it_can_see(rows: int, span: int, window: int) -> None:
    """A window or a short span that costs the whole cache would hide what lowering saves."""
    cost = attend(rows, span, window)
    heads, groups, dim = 6, 2, 16
    assert cost.flops == 4 * heads * rows * dim * (min(span, window) if window else span)
    seen = min(span, window + rows - 1) if window else span
    new = rows * groups * dim * 2 * 2                      # keys and values, read and written
    assert cost.bytes == F32 * (2 * heads * rows * dim + new + seen * groups * dim * 2) + I64 * rows
    assert cost.shape == f"[1, {rows}, {heads}, {dim}]"


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_plain_attention_counts_as_many_launches_as_its_tape(softcap: float) -> None:
    """The launches of arm graph are those of the plain PyTorch that a graph records."""
    q, k, v = torch.randn(1, 6, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    caches, out = [torch.zeros(1, 2, 64, 16) for _ in range(2)], torch.zeros(1, 1, 6, 16)
    at = torch.tensor([3])
    tape = Tape(lambda: ops.attend(q, k, v, *caches, at, 0.25, 64, 0, softcap, out))
    constants = 1  # the columns, arange(span), which a tape keeps and eager PyTorch makes anew
    assert attend(1, 64, 0, softcap).launches == len(tape) + constants
    assert costs.jit_launches("attend") == costs.jit_launches("hybridlab.attend.default") == 2


def test_every_dynamic_operation_has_its_jit_launches() -> None:
    """An operation without a number would make the prediction of arm jit fail."""
    assert all(costs.jit_launches(name) >= 1 for name in ops.SCHEMAS)


def test_views_and_reserved_memory_cost_nothing() -> None:
    """A view that counted as a kernel would overstate what launching costs."""
    found = costs_of(lambda x: (x.t().unsqueeze(0).expand(7, 5, 3)[:, 1:], x.new_empty(9), x.detach()),
                     torch.zeros(3, 5))
    found |= costs_of(torch.nn.functional.linear, torch.zeros(1, 4, 5), torch.zeros(3, 5))
    assert found.pop("mm").launches == 1
    assert found.keys() >= {"t", "unsqueeze", "expand", "slice", "new_empty", "detach", "view", "_unsafe_view"}
    assert {(c.flops, c.bytes, c.launches) for c in found.values()} == {(0, 0, 0)}


def test_a_storage_is_read_once() -> None:
    """x * x and an expanded bias read what lies in memory, not what their shapes multiply to."""
    x, bias = torch.zeros(8, 6), torch.zeros(6)
    assert costs_of(lambda x: x * x, x, mode="fake")["mul"] == Cost("[8, 6]", 48, F32 * 96, 1)
    assert costs_of(lambda x, b: x + b.expand(8, 6), x, bias)["add"].bytes == F32 * (48 + 6 + 48)
    assert costs_of(lambda x, b: x[:, :1].expand(8, 6) + b, x, bias, mode="fake")["add"].bytes == F32 * (8 + 6 + 48)
    assert costs_of(lambda x: x + x.view(6, 8).t(), x, mode="fake")["add"].bytes == F32 * 96


def test_a_look_up_reads_the_rows_it_chooses() -> None:
    """A whole embedding table in the bytes of a token would be a tenth of a small model."""
    table, ids = torch.zeros(1000, 12), torch.tensor([3, 5])
    wanted = Cost("[2, 12]", 0, 2 * I64 + 2 * F32 * 24, 1)
    assert costs_of(lambda t, i: torch.embedding(t, i), table, ids, mode="fake")["embedding"] == wanted
    assert costs_of(lambda t, i: t[i], table, ids, mode="fake")["index"] == wanted
    assert costs_of(lambda t, i: t.index_select(0, i), table, ids, mode="fake")["index_select"] == wanted


def test_writing_in_place_costs_what_is_written() -> None:
    """A cache row written must not cost the cache, and a copy must not read what it overwrites."""
    cache, row, at = torch.zeros(1000, 12), torch.zeros(1, 12), torch.tensor([3])
    found = costs_of(lambda c, r, i: c.index_copy_(0, i, r), cache, row, at, mode="fake")["index_copy_"]
    assert (found.bytes, found.flops) == (I64 + 2 * F32 * 12, 0)
    assert costs_of(lambda c, d: c.copy_(d), cache, cache.clone(), mode="fake")["copy_"].bytes == 2 * F32 * 12000
    assert costs_of(lambda c: c.add_(1), cache, mode="fake")["add_"].bytes == 2 * F32 * 12000
    assert costs_of(lambda c: c.fill_(1), cache, mode="fake")["fill_"].bytes == F32 * 12000


def test_arithmetic_counts_elements_and_moves_count_none() -> None:
    """FLOPs follow the elements that are computed: of a reduction those it reads."""
    x = torch.zeros(4, 6)
    found = costs_of(lambda x: (torch.cat([x, x]), x.sum(), x.double(), x.tanh()), x, mode="fake")
    assert {name: cost.flops for name, cost in found.items()} == {"cat": 0, "sum": 24, "_to_copy": 0, "tanh": 24}
    assert found["_to_copy"].bytes == 24 * F32 + 24 * 8


def test_symbols_are_named_in_the_shape_and_counted_by_their_hint() -> None:
    """A growing dimension is shown as what it is, and costs what it is at the traced length."""
    past, new = torch.zeros(1, 2, 17, 4), torch.zeros(1, 2, 1, 4)
    cost = costs_of(lambda past, new: torch.cat([past, new], dim=2), past, new)["cat"]
    assert "s" in cost.shape
    assert cost.bytes == F32 * 2 * 4 * (17 + 1 + 18)


def test_experts_cost_the_rows_they_are_given() -> None:
    """A mixture reads at most one expert a row; all of them would be many times what a token needs."""
    rows, experts, wide, high = 3, 8, 16, 32
    x = torch.zeros(rows, wide, dtype=torch.bfloat16)
    w = torch.zeros(experts, wide, high, dtype=torch.bfloat16)
    ends = torch.zeros(experts, dtype=torch.int32)
    cost = costs_of(lambda x, w, o: torch._grouped_mm(x, w, o), x, w, ends, mode="fake")["_grouped_mm"]
    assert cost.flops == 2 * rows * wide * high
    assert cost.bytes == 2 * (rows * wide + rows * wide * high + rows * high) + 4 * experts


def test_what_is_no_tensor_operation_costs_nothing() -> None:
    """A trace holds placeholders, sizes and tuple items: none of them is a kernel."""
    graph = make_fx(lambda x: x.sort().values.view(x.shape[0] * x.shape[1]), tracing_mode="symbolic")(torch.ones(2, 3))
    others = [n for n in graph.graph.nodes if not isinstance(n.target, torch._ops.OpOverload)]
    assert len(others) > 3
    assert {costs.of(n) for n in others} == {Cost("", 0, 0, 0)}
