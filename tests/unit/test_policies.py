"""Policies as data: what a name leaves outside graphs, which segments that gives, and which policy is impossible."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hybridlab as hl
from hybridlab.cells import cells
from hybridlab.config import POLICIES, Policy, RunConfig, RuntimeConfig, as_dict, build
from hybridlab.errors import ConfigError, PlanError
from hybridlab.plan import KINDS, Op, Plan
from hybridlab.policies import assign, places, refusal

STEP = (
    Op("prepare", "hybridlab.advance.default", None, "", "device-dynamic", "", launches=1),
    Op("embedding", "aten.embedding.default", None, "model.embed_tokens", "device-dynamic", "", launches=1),
    Op("mm", "aten.mm.default", 0, "model.layers.0.self_attn.q_proj", "static", "", launches=1),
    Op("view", "aten.view.default", 0, "model.layers.0.self_attn", "static", ""),
    Op("attend", "hybridlab.attend.default", 0, "model.layers.0.self_attn", "device-dynamic", "", launches=2),
    Op("view_1", "aten.view.default", 0, "model.layers.0.self_attn", "static", ""),
    Op("mm_1", "aten.mm.default", 0, "model.layers.0.self_attn.o_proj", "static", "", launches=1),
    Op("mm_2", "aten.mm.default", None, "lm_head", "static", "", launches=1),
    Op("sample", "hybridlab.sample.default", None, "", "device-dynamic", "", launches=1),
)


def outside(*names: str) -> set[str]:
    ops, _ = assign(STEP, Policy(names))
    return {o.name for o in ops if o.path != "graph"}


@pytest.mark.parametrize(("names", "left"), [
    ((), set()),
    (("attention",), {"attend"}),
    (("prepare", "sample"), {"prepare", "sample"}),
    (("lm_head",), {"mm_2"}),
    (("mm",), {"mm", "mm_1", "mm_2"}),
    (("aten.mm",), {"mm", "mm_1", "mm_2"}),
    (("aten.mm.default",), {"mm", "mm_1", "mm_2"}),
    (("self_attn",), {"mm", "view", "attend", "view_1", "mm_1"}),
    (("layers.0.self_attn",), {"mm", "view", "attend", "view_1", "mm_1"}),
    (("device-dynamic",), {"prepare", "embedding", "attend", "sample"}),
])
def test_a_name_leaves_what_it_says(names: tuple[str, ...], left: set[str]) -> None:
    """A policy that leaves more or less outside than its name."""
    assert outside(*names) == left


def test_segments_are_the_runs_of_operations_in_order() -> None:
    """A piecewise plan that does not alternate, loses an operation, or promises a graph that would be empty."""
    ops, segments = assign(STEP, POLICIES["piecewise"])
    assert [(s.name, s.path) for s in segments] == [
        ("prepare", "jit"), ("graph 0", "graph"), ("attention", "jit"), ("graph 1", "graph"), ("sample", "jit")]
    assert [o.name for o in ops] == [o.name for o in STEP]
    _, between = assign(STEP, Policy(("attention", "o_proj")))
    assert [s.name for s in between] == ["graph 0", "attention", "o_proj", "graph 1"]  # the view launches nothing


@pytest.mark.parametrize(("names", "message"), [
    (("atention",), "did you mean 'attention'"), (("lm_haed",), "did you mean 'lm_head'"),
    (("static", "device-dynamic"), "leaves nothing for a graph"),
])
def test_an_impossible_policy_is_refused(names: tuple[str, ...], message: str) -> None:
    """A misspelt name that silently leaves nothing outside, or a policy without anything to replay."""
    with pytest.raises(PlanError, match=message):
        assign(STEP, Policy(names))
    assert re.search(message, refusal(STEP, Policy(names)))
    assert refusal(STEP, Policy()) == ""


@pytest.mark.parametrize("names", [(), ("experts",)])
def test_a_host_dynamic_operation_makes_every_policy_impossible(names: tuple[str, ...]) -> None:
    """A loop over what the host read back, replayed for other rows than it was recorded with."""
    routed = Op("nonzero", "aten.nonzero.default", 0, "model.layers.0.mlp.experts", "host-dynamic", "reads back",
                launches=1)
    with pytest.raises(PlanError, match=r"impossible.*nonzero \(aten.nonzero.default\).*experts: reads back.*eager"):
        assign((*STEP, routed), Policy(names))


def test_places_tell_equal_operations_apart() -> None:
    """Two products of one module cut as one."""
    twice = (STEP[2], STEP[2])
    assert [p.nth for p in places(twice)] == [0, 1]


def test_configs_take_policies_by_name_and_as_data() -> None:
    """A policy that a run's config.json cannot hold or give back."""
    assert build(RuntimeConfig, {"policy": {"outside": ["lm_head"]}}).policy == Policy(("lm_head",))
    config = build(RunConfig, {"policy": ["whole", {"outside": ["mlp"]}], "arms": ["eager", "jit", "hybrid"]})
    assert build(RunConfig, as_dict(config)) == config
    assert list(cells(config)) == ["eager", "jit", "hybrid whole", "hybrid outside mlp"]
    assert list(cells(build(RunConfig, {"policy": "full"}))) == ["eager", "graph", "jit", "hybrid"]
    with pytest.raises(ConfigError, match="did you mean 'whole'"):
        build(RunConfig, {"policy": ["full", "hole"]})


def test_runs_compare_kernels_where_they_are_compiled() -> None:
    """Two cells of one name, so that one is measured and the other forgotten; fused kernels asked of arm eager."""
    config = build(RunConfig, {"policy": ["whole", "full"], "kernels": ["torch", "fused"]})
    assert build(RunConfig, as_dict(config)) == config
    assert {name: cell.kernels for name, cell in cells(config).items()} == {
        "eager": "auto", "graph whole": "auto", "graph full": "auto", "jit": "torch", "jit fused": "fused",
        "hybrid whole": "torch", "hybrid whole fused": "fused", "hybrid full": "torch", "hybrid full fused": "fused"}
    assert list(cells(build(RunConfig, {"kernels": "fused"}))) == ["eager", "graph", "jit", "hybrid"]
    cut = build(RunConfig, {"policy": ["piecewise", "full"], "kernels": ["torch", "fused"], "arms": ["jit", "hybrid"]})
    assert list(cells(cut)) == ["jit", "jit fused", "hybrid piecewise", "hybrid full", "hybrid full fused"]


def test_runs_compare_numbers_of_steps_where_whole_steps_are_replayed() -> None:
    """A cell that says it launches several steps and launches one; two cells of one name."""
    config = build(RunConfig, {"policy": ["whole", "full"], "steps": [1, 8], "arms": ["jit", "graph", "hybrid"]})
    assert build(RunConfig, as_dict(config)) == config
    assert {name: cell.steps for name, cell in cells(config).items()} == {
        "jit": 1, "graph whole": 1, "graph full": 1, "graph full 8 steps": 8, "hybrid whole": 1, "hybrid full": 1,
        "hybrid full 8 steps": 8}
    assert {name: cell.steps for name, cell in cells(build(RunConfig, {"policy": "full", "steps": 4})).items()} == {
        "eager": 1, "graph": 4, "jit": 1, "hybrid": 4}


def test_one_arm_is_not_taken_for_its_letters() -> None:
    """"arm 'h' is unknown", said to somebody who wrote arm 'hybrid'."""
    with pytest.raises(ConfigError, match="arms is 'hybrid'"):
        build(RunConfig, {"arms": "hybrid"})


def test_policies_are_data_however_they_are_written() -> None:
    """The same policy from a list that cannot be hashed or compared, or a text taken for a list of letters."""
    written = Policy(outside=["prepare", "sample"])
    assert written == POLICIES["whole"]
    assert hash(written) == hash(POLICIES["whole"])
    plan = hl.partition("random:tiny-llama-3", {"outside": ["lm_head"]})
    assert Plan.from_json(plan.to_json()) == plan
    for wrong in ("attention", [1], [""]):
        with pytest.raises(ConfigError, match="outside is"):
            Policy(outside=wrong)


def test_explain_and_diff_say_what_changed() -> None:
    """A table that must be read row by row to learn what lowering did."""
    model = hl.load("random:tiny-llama-3", device="cpu")
    stock, whole = hl.partition(model, policy=None), hl.partition(model)
    text = stock.explain(next(o.name for o in stock.ops if o.short == "cat" and "cache" in o.reason))
    for part in ("layer 0", "host-dynamic", "the KV length", "concatenates onto the cache", "FLOPs", "bytes"):
        assert part in text
    changes = stock.diff(whole).set_index("op")
    assert (changes.loc["hybridlab.attend.default", "before"] == 0).all()
    assert (changes.loc["hybridlab.attend.default", "after"] == 1).all()
    assert stock.diff(stock).empty
    with pytest.raises(PlanError, match="did you mean"):
        whole.explain("sampel")
    with pytest.raises(PlanError, match="there is no operation 10000"):
        whole.explain(10000)
    with pytest.raises(PlanError, match=r"1\.5 is no operation"):
        whole.explain(1.5)


@pytest.mark.parametrize("policy", [None, "piecewise", Policy(("lm_head",))])
def test_plans_survive_json(policy: str | Policy | None) -> None:
    """A saved plan that comes back with other labels, or a text that is none taken for one."""
    plan = hl.partition(hl.load("random:tiny-llama-3", device="cpu"), policy)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="no plan"):
        Plan.from_json("{}")


@given(st.lists(st.sampled_from([None, "a", "b"]), min_size=1, max_size=30), st.data())
def test_every_operation_is_in_exactly_one_segment(names: list[str | None], data: st.DataObject) -> None:
    """An operation that no segment runs, or segments out of order, for whatever mix a policy makes."""
    ops = tuple(Op(f"op{i}", "aten.mm.default", None, name or "", "static", "", launches=data.draw(st.integers(0, 1)))
                for i, name in enumerate(names))
    policy = Policy(tuple({name for name in names if name}))
    try:
        placed, segments = assign(ops, policy)
    except PlanError:
        assert not any(o.launches for o, name in zip(ops, names, strict=True) if name is None)
        return
    assert [o.name for o in placed] == [o.name for o in ops]
    assert list(dict.fromkeys(o.segment for o in placed)) == [s.name for s in segments]
    assert all(any(o.launches for o in placed if o.segment == s.name) for s in segments if s.path == "graph")
    assert {o.kind for o in placed} <= set(KINDS)
