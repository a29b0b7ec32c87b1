"""The partition: which operations are labelled what, why, and that lowering leaves nothing to the host."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hybridlab as hl
from hybridlab import lowering, partitioning, tracing
from hybridlab.errors import ConfigError, LoweringError, PlanError


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("random:tiny-llama-3", device="cpu")


def test_stock_step_labels_cache_and_attention(model: PreTrainedModel) -> None:
    """A label that misses a growing shape, or calls everything dynamic: in a stock 2-layer Llama only the two KV
    concatenations and the attention of each layer depend on the KV length."""
    plan = hl.partition(model, policy=None)
    dynamic = [op for op in plan.ops if op.kind == "host-dynamic"]
    names = Counter("cat" if "cat" in op.op else "attention" if "attention" in op.op else op.op for op in dynamic)
    assert names == {"cat": 4, "attention": 2}
    assert Counter(op.layer for op in dynamic) == {0: 3, 1: 3}
    assert all("the KV length" in op.reason for op in dynamic)
    assert all("concatenates onto the cache" in op.reason for op in dynamic if "cat" in op.op)


def test_lowering_leaves_nothing_to_the_host(model: PreTrainedModel) -> None:
    """An operation that a graph would freeze at its captured length."""
    for phase in ("decode", "prefill"):
        plan = hl.partition(model, phase=phase)
        assert plan.counts["host-dynamic"] == 0
        assert sum(op.op == "hybridlab.attend.default" for op in plan.ops) == 2
        assert not any("scaled_dot_product" in op.op for op in plan.ops)
        assert [s.path for s in plan.segments] == ["jit", "graph", "jit"]
    assert hl.partition(model, policy=None, phase="prefill").counts["host-dynamic"] > 50


def test_what_reads_the_position_says_so(model: PreTrainedModel) -> None:
    """A rotation labelled static although its angle changes with every token."""
    table = hl.partition(model).table()
    assert {"op", "layer", "kind", "reason", "segment", "path"} <= set(table.columns)
    for name, source in (("aten.cos.default", "position"), ("aten.embedding.default", "token id"),
                         ("hybridlab.attend.default", "position")):
        rows = table[table["op"] == name]
        assert len(rows)
        assert set(rows["kind"]) == {"device-dynamic"}
        assert rows["reason"].str.contains(source).all()
    assert set(table.loc[table["op"] == "aten.mm.default", "kind"]) == {"static"}


@pytest.mark.parametrize(("arm", "paths"), [
    ("graph", ["eager", "graph", "eager"]), ("jit", ["jit", "jit", "jit"]), ("hybrid", ["jit", "graph", "jit"]),
])
def test_arms_differ_in_what_executes(model: PreTrainedModel, arm: str, paths: list[str]) -> None:
    """An arm whose plan says what another arm does."""
    plan = hl.partition(model).for_arm(arm)
    assert [segment.path for segment in plan.segments] == paths
    matrix_products = {op.path for op in plan.ops if op.op == "aten.mm.default"}
    assert matrix_products == {"eager" if arm == "jit" else "graph"}


def test_a_full_window_comes_in_at_a_new_address() -> None:
    """A cache that no longer grows called static: its tensor is made anew at every step, and a graph would read the
    one it was captured with. Nor does attention without dropout draw random numbers."""
    plan = hl.partition("random:tiny-mistral", policy=None, length=100)
    dynamic = [o for o in plan.ops if o.kind == "host-dynamic"]
    assert Counter(o.short for o in dynamic if "at an address that is new at every step" in o.reason) == {"cat": 4}
    assert all("takes a number from the host" in o.reason for o in dynamic if o.short != "cat")  # of its mask
    assert all(o.op.startswith("aten.") for o in plan.ops)
    assert not any("random" in o.reason for o in plan.ops)


def test_rows_chosen_by_a_computed_index_say_so() -> None:
    """The routing of a mixture of experts called static although every token takes other rows."""
    config = AutoConfig.for_model("mixtral", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    plan = hl.partition(AutoModelForCausalLM.from_config(config))
    chosen = [o for o in plan.ops if o.reason == "chooses rows by an index in device memory"]
    assert chosen
    assert {o.kind for o in chosen} == {"device-dynamic"}
    assert all("experts" in o.module for o in chosen)
    assert not any(o.reason.startswith("chooses") for o in hl.partition("random:tiny-llama-3").ops)


def test_a_model_that_changed_is_planned_anew() -> None:
    """The labels and costs of a model as it was before it was moved, cast, or given another attention."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    before = hl.partition(model, policy=None)
    model.to(torch.bfloat16)
    half = hl.partition(model, policy=None)
    assert sum(o.bytes for o in half.ops) < sum(o.bytes for o in before.ops)
    model.set_attn_implementation("eager")
    assert hl.partition(model, policy=None).counts["host-dynamic"] > half.counts["host-dynamic"]


def test_a_refusal_names_the_module_and_its_line() -> None:
    """A branch on a value found by reading all of a family's code: the refusal names where it is."""
    model = hl.load("random:tiny-llama-2", device="cpu")
    mlp = model.model.layers[1].mlp

    class Branching(type(mlp)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y * 2 if y.sum() > 0 else y

    mlp.__class__ = Branching
    for policy in (None, "whole"):
        with pytest.raises(LoweringError, match=r"in model.layers.1.mlp: return y \* 2 if y.sum\(\) > 0 else y"):
            hl.partition(model, policy)


def test_the_model_is_not_touched(model: PreTrainedModel) -> None:
    """A user's model left with our attention in it, or its weights copied."""
    before = model.config._attn_implementation
    memory = {p.data_ptr() for p in model.parameters()}
    lowered = lowering.lower(model, lowering.PLAIN)
    assert model.config._attn_implementation == before
    assert lowered.config._attn_implementation == lowering.PLAIN
    assert {p.data_ptr() for p in lowered.parameters()} == memory


def test_an_operation_left_to_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowered program that still reads a value back being captured all the same."""
    model = hl.load("random:tiny-llama-3", device="cpu")

    def reads_back(self: tracing.Program) -> None:
        count = torch.nonzero(self.inputs.ids).shape[0]
        self.logits.copy_(torch.ones(count).sum())

    monkeypatch.setattr(partitioning, "verify_lowered", lambda _: None)
    monkeypatch.setattr(tracing, "_require_attention", lambda *_: None)
    monkeypatch.setattr(tracing.Program, "__call__", reads_back)
    with pytest.raises(PlanError, match=r"no graph can hold nonzero .*reads a value back.*arm='eager'"):
        hl.partition(model)


@pytest.mark.parametrize(("values", "message"), [({"policy": "hole"}, "whole"), ({"phase": "decoding"}, "decode")])
def test_wrong_names_are_refused(model: PreTrainedModel, values: dict[str, str], message: str) -> None:
    """A misspelt policy that silently labels something else."""
    with pytest.raises(ConfigError, match=f"did you mean '{message}'"):
        hl.partition(model, **values)


def test_multi_head_and_untied_models_are_lowered_too() -> None:
    """A lowering that only knows grouped queries, tied embeddings, or one head size."""
    config = LlamaConfig(vocab_size=128, hidden_size=48, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=3, num_key_value_heads=3, head_dim=24, tie_word_embeddings=False)
    assert isinstance(AutoModelForCausalLM.from_config(config), LlamaForCausalLM)
    assert hl.partition(AutoModelForCausalLM.from_config(config)).counts["host-dynamic"] == 0
