"""Building a runtime: no trace where a policy leaves the forward whole, and what a trace would refuse is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import hybridlab as hl
from hybridlab import tracing
from hybridlab.errors import LoweringError, PlanError
from hybridlab.plan import ROLES
from hybridlab.policies import left_out
from tests.helpers import MAX_LEN, NARROW, VOCABULARY

WHOLE: tuple[Any, ...] = ("whole", "full", hl.Policy(("prepare",)), hl.Policy(("sample",)))
CUT: tuple[Any, ...] = ("piecewise", hl.Policy(("device-dynamic",)), hl.Policy(("mlp", "sample")),
                        hl.Policy(("advance",)))
PROMPT = list(range(3, 13))


def small() -> PreTrainedModel:
    """A model of its own: nothing is known about it yet."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(
        **NARROW, vocab_size=VOCABULARY, num_hidden_layers=2, num_key_value_heads=2)).eval()


def runtime(model: PreTrainedModel, **settings: Any) -> hl.Runtime:
    return hl.Runtime(model, **{"arm": "graph", "policy": "full", "capture": "sync", "max_len": MAX_LEN,
                                "buckets": [MAX_LEN], **settings})


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is traced all the same."""
    seen: list[str] = []
    trace = tracing.make_fx
    monkeypatch.setattr(tracing, "make_fx", lambda f, *args, **kwargs: seen.append(type(f).__name__) or trace(
        f, *args, **kwargs))
    return seen


@pytest.mark.parametrize("settings", [
    *({"policy": policy} for policy in WHOLE), {"kernels": "fused", "arm": "hybrid"}, {"arm": "jit"},
    {"capture": "ahead"}, {"capture": "ahead", "arm": "eager"},
], ids=str)
def test_a_forward_left_whole_is_not_traced(untraced: list[str], settings: dict[str, Any]) -> None:
    """Seconds before the first token, to learn of every operation that no graph is cut there."""
    with runtime(small(), **settings) as rt:
        out = rt.generate(PROMPT, max_new_tokens=3, stop=[])
        assert len(out.ids) == 3
        assert untraced == []
        assert rt.plan.ops
        assert rt.plan is rt.plan
    assert len(untraced) > 0


@pytest.mark.parametrize("policy", CUT[:3], ids=str)
def test_a_cut_is_planned_when_the_runtime_is_built(untraced: list[str], policy: Any) -> None:
    """A policy that fits nothing, found by the first request."""
    with runtime(small(), policy=policy):
        assert untraced


@pytest.mark.parametrize("arm", ["graph", "jit", "hybrid"])
@pytest.mark.parametrize("policy", WHOLE + CUT, ids=str)
def test_what_stays_outside_is_what_the_plan_says(policy: Any, arm: str) -> None:
    """A step that draws twice, or not at all, as two places disagree on what its graph holds."""
    model = small()
    plan = hl.partition(model, policy).for_arm(arm)
    ends = {o.role for o in plan.ops if o.path != "graph"} & {"prepare", "sample"}
    assert plan.policy is not None
    assert left_out(plan.policy, arm, lambda: plan) == ends
    assert {"prepare", "sample"} <= set(ROLES.values())


def test_arm_eager_leaves_everything_out() -> None:
    """A stock plan, which holds no draw, asked for what a graph draws."""
    assert left_out(hl.Policy(()), "eager", lambda: pytest.fail("planned")) == {"prepare", "sample"}


def branches(self: LlamaMLP, y: torch.Tensor) -> torch.Tensor:
    return y * 2 if y.sum() > 0 else y + y


def counts(self: LlamaMLP, y: torch.Tensor) -> torch.Tensor:
    return y[:, torch.nonzero(torch.ones_like(y[0, :, 0]))[:, 0]]


def lists(self: LlamaMLP, y: torch.Tensor) -> torch.Tensor:
    return y + torch.tensor(y.detach()[0, 0].tolist()).sum() * 0


def goes_by_numpy(self: LlamaMLP, y: torch.Tensor) -> torch.Tensor:
    return y + float(y.detach().numpy()[0, 0, 0]) * 0


@pytest.mark.parametrize("arm", ["graph", "jit", "hybrid"])
@pytest.mark.parametrize("ending", [branches, counts, lists, goes_by_numpy])
def test_a_step_that_needs_the_host_is_refused(arm: str, ending: Callable[..., torch.Tensor]) -> None:
    """A value of the first token, read back while the model was verified and baked into every later one."""
    model = small()
    mlp = model.model.layers[1].mlp

    class Reading(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ending(self, super().forward(x))

    mlp.__class__ = Reading
    with pytest.raises((LoweringError, PlanError), match=r"model\.layers\.1\.mlp"):
        runtime(model, arm=arm)


def test_attention_asked_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of which verification sees the right logits, and of which nobody knows what its second call is for."""
    stock = LlamaAttention.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        stock(*args, **kwargs)
        return stock(*args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", twice)
    with pytest.raises(LoweringError, match=r"attends otherwise than once a layer .* 4 calls in 2 layers"):
        runtime(small())


def test_what_a_trace_says_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that differ, where the reason is that a layer never calls the lowered attention."""
    stock = LlamaAttention.forward

    def deaf(self: LlamaAttention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 1 and self.config._attn_implementation.startswith("hybridlab"):
            return hidden_states, None
        return stock(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", deaf)
    with pytest.raises(LoweringError, match="1 calls in 2 layers"):
        runtime(small())


def test_one_model_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve runtimes of an ablation that each run the model four times before they serve."""
    model, seen = small(), []
    with runtime(model):
        monkeypatch.setattr(type(model), "forward", lambda *_, **__: seen.append(1) or pytest.fail("verified again"))
        for settings in ({}, {"arm": "jit"}, {"policy": "whole"}):
            runtime(model, **settings).close()
        assert seen == []
        model.to(torch.bfloat16)
        with pytest.raises(BaseException, match="verified again"):
            runtime(model)


def test_serving_imports_nothing_that_only_a_plan_needs() -> None:
    """A second or two of imports before the first token, for tables and traces that nobody has asked for."""
    code = ("import sys, hybridlab as hl\n"
            "with hl.Runtime('tiny', arm='graph', policy='full', capture='never', device='cpu') as runtime:\n"
            "    assert runtime.generate([5], max_new_tokens=1).ids\n"
            "print([m for m in ('pandas', 'networkx', 'plotly') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
