"""Policies as they execute: what is launched for a token, tokens that stay the same, and steps launched ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hybridlab as hl
from hybridlab import lowered
from hybridlab.errors import ConfigError, NonFinite, PlanError
from hybridlab.kernels.prime import Primer

LAYERS = 2
PROMPT = list(range(3, 23))
POLICIES: dict[Any, int] = {  # policy: graphs launched for one token of a model of two layers
    "whole": 1, "full": 1, "piecewise": LAYERS + 1,
    hl.Policy(("attention", "lm_head")): LAYERS + 2,
    hl.Policy(("mlp", "sample")): LAYERS + 1,
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("random:tiny-llama-3", device="cpu")


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel) -> list[int]:
    given = torch.tensor([PROMPT])
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=40, do_sample=False,
                         eos_token_id=None)
    return out[0, len(PROMPT):].tolist()


def runtime(model: PreTrainedModel, **settings: Any) -> hl.Runtime:
    return hl.Runtime(model, **{"capture": "sync", "max_len": 96, "buckets": [32], **settings})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("arm", ["graph", "hybrid"])
def test_each_policy_launches_its_graphs_and_no_others(model: PreTrainedModel, reference: list[int], arm: str,
                                                       policy: Any) -> None:
    """A policy that is a label only: the number of graphs launched for a token, the plan's graph segments, and the
    tokens must all agree. A rehearsal inside a request that writes the keys of another token into a row that later
    tokens attend."""
    with runtime(model, arm=arm, policy=policy) as rt:
        out = rt.generate(PROMPT, max_new_tokens=40, stop=[])
        assert out.ids == reference
        assert set(out.paths) == {"graph"}
        assert all(("in pieces" in reason) == (POLICIES[policy] > 1) for reason in out.reasons)
        assert rt.counters.replays == 40 * POLICIES[policy]
        assert sum(s.path == "graph" for s in rt.plan.segments) == POLICIES[policy]
        assert (rt.counters.captures, rt.counters.failures) == (2, 0)


@pytest.mark.parametrize(("settings", "kind"), [({}, "random"), ({"top_k": 20, "top_p": 0.9}, "filtered")])
@pytest.mark.parametrize("policy", ["full", "piecewise"])
def test_sampling_inside_a_graph_draws_what_eager_draws(model: PreTrainedModel, policy: str, settings: dict[str, Any],
                                                        kind: str) -> None:
    """A graph that bakes in seed, position, temperature or the way of drawing: all are read from device memory, and
    greedy and drawn tokens have graphs of their own."""
    with hl.Runtime(model, arm="eager") as eager, runtime(model, arm="hybrid", policy=policy) as rt:
        for seed, temperature in ((0, 0.7), (5, 1.3), (0, 0.0), (5, 0.7)):
            asked = {"max_new_tokens": 12, "seed": seed, "temperature": temperature, "stop": [], **settings}
            assert rt.generate(PROMPT, **asked).ids == eager.generate(PROMPT, **asked).ids
        draws = {key.draw for key in rt._executor.graphs}
        assert draws == ({"greedy", kind} if policy == "full" else {""})


@pytest.mark.parametrize("policy", ["full", "whole", "piecewise"])
@pytest.mark.parametrize("ahead", [0, 1, 4, 64])
def test_running_ahead_loses_and_adds_no_token(model: PreTrainedModel, reference: list[int], policy: str,
                                               ahead: int) -> None:
    """Steps launched beyond a stop token that reach the caller, or a stop token read too late; the next request
    started from where the discarded steps left off."""
    with runtime(model, policy=policy, run_ahead=ahead) as rt:
        for new in (1, 2, 40):
            assert rt.generate(PROMPT, max_new_tokens=new, stop=[]).ids == reference[:new]
        assert rt.counters.discarded == 0
        for stop in (reference[0], reference[7], reference[38]):
            want = reference[:reference.index(stop) + 1]
            assert rt.generate(PROMPT, max_new_tokens=40, stop=[stop]).ids == want
        assert (rt.counters.discarded > 0) == (ahead > 0)
        stream = rt.stream(PROMPT, max_new_tokens=40, stop=[])
        assert [next(stream).id for _ in range(3)] == reference[:3]
        stream.close()
        assert rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids == reference


def test_decode_that_is_one_call_begins_before_the_first_token_is_read(
        model: PreTrainedModel, reference: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that idles between prefill and decode, for as long as the host takes to read one token and launch; or a
    CPU, where launching is running, that has to decode before it gives the first token out."""
    stop = {"max_new_tokens": 40, "stop": [reference[0]]}
    with runtime(model, policy="full", run_ahead=2) as rt:
        rt.warm_up([len(PROMPT)])
        assert rt.generate(PROMPT, **stop).ids == reference[:1]
        assert rt.counters.discarded == 0
        monkeypatch.setattr(type(rt._executor), "quick", True)
        assert rt.generate(PROMPT, **stop).ids == reference[:1]
        assert rt.counters.discarded == 2
        for new in (1, 2, 40):
            assert rt.generate(PROMPT, max_new_tokens=new, stop=[]).ids == reference[:new]
        assert rt.counters.discarded == 2


@pytest.mark.parametrize("arm", ["eager", "jit"])
def test_arms_without_graphs_run_ahead_too(model: PreTrainedModel, reference: list[int], arm: str) -> None:
    """A setting that one arm ignores: arms would be compared under different protocols."""
    with runtime(model, arm=arm, run_ahead=3) as rt:
        assert rt.generate(PROMPT, max_new_tokens=40, stop=[reference[5]]).ids == reference[:6]
        assert rt.counters.discarded == 3


def test_running_ahead_stays_inside_the_cache(model: PreTrainedModel) -> None:
    """Steps launched beyond the tokens asked for, which would write past the last row of the KV cache."""
    with runtime(model, policy="full", run_ahead=8, max_len=24, buckets=[20]) as rt:
        out = rt.generate(PROMPT, max_new_tokens=4, stop=[])
        assert len(out.ids) == 4
        assert int(rt._executor.positions) == 22  # the row of the last token that was fed
        assert rt.counters.discarded == 0


@pytest.mark.parametrize("policy", ["full", "piecewise"])
def test_a_capture_behind_a_full_cache_changes_nothing(model: PreTrainedModel, reference: list[int],
                                                       policy: str) -> None:
    """A rehearsal of the decode step at the end of the cache that writes beyond it, or that moves the position on."""
    with runtime(model, policy=policy, capture="async", max_len=60) as rt:
        first = rt.generate(PROMPT, max_new_tokens=40, stop=[])
        assert set(first.paths) == {"jit"}
        assert int(rt._executor.positions) == 58
        second = rt.generate(PROMPT, max_new_tokens=40, stop=[])
        assert set(second.paths) == {"graph"}
        assert first.ids == second.ids == reference


@pytest.mark.parametrize("ahead", [0, 3])
def test_broken_logits_are_raised_and_not_fed_back(ahead: int) -> None:
    """The token -1 of logits that are not finite looked up in the embedding by a step launched ahead: on a GPU that
    ends the process."""
    model = hl.load("random:tiny-llama-3", device="cpu")
    with runtime(model, policy="full", run_ahead=ahead) as rt:
        assert rt.generate(PROMPT, max_new_tokens=8, stop=[]).ids
        model.lm_head.weight[3, 3] = float("nan")
        with pytest.raises(NonFinite, match="new token 0"):
            rt.generate(PROMPT, max_new_tokens=8)
        rt._executor.controls.token.fill_(-1)
        with torch.no_grad():
            rt._executor._prepare("decode", rt._executor.program("decode", 1))
        assert int(rt._executor.program("decode", 1).inputs.ids) == 0


def test_a_bucket_of_one_row_is_cut_too(model: PreTrainedModel, reference: list[int]) -> None:
    """A prompt of one token refused because a trace of one row is special."""
    with hl.Runtime(model, arm="eager") as eager:
        want = eager.generate([5], max_new_tokens=8, stop=[]).ids
    for policy in ("piecewise", hl.Policy(("device-dynamic",))):
        with runtime(model, policy=policy, buckets=[1, 32]) as rt:
            out = rt.generate([5], max_new_tokens=8, stop=[])
            assert (out.ids, out.bucket, set(out.paths)) == (want, 1, {"graph"})
            assert rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids == reference


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"policy": "pieces"}, ConfigError, "did you mean 'piecewise'"),
    ({"policy": hl.Policy(("atention",))}, PlanError, "did you mean 'attention'"),
    ({"policy": hl.Policy(("static", "device-dynamic"))}, PlanError, "leaves nothing for a graph"),
    ({"run_ahead": -1}, ConfigError, "run_ahead"), ({"run_ahead": 65}, ConfigError, "run_ahead"),
])
def test_bad_policies_are_refused(model: PreTrainedModel, settings: dict[str, Any], error: type[Exception],
                                  message: str) -> None:
    """A policy found impossible in the middle of a request."""
    with pytest.raises(error, match=message):
        runtime(model, **settings)


@pytest.mark.parametrize(("policy", "drawn"), [("whole", False), ("piecewise", False), ("full", True)])
def test_a_graph_samples_only_where_its_policy_says_so(model: PreTrainedModel, policy: str, drawn: bool) -> None:
    """Tokens drawn twice, inside the graph and again outside: the same token, and launches that nobody counts."""
    with runtime(model, policy=policy) as rt:
        rt.generate(PROMPT, max_new_tokens=3, stop=[])
        executor = rt._executor
        key = next(key for key in executor.graphs if key.phase == "decode")
        executor.controls.token.fill_(7)
        with executor.graphs.lease(key) as replay:
            replay()
        assert (int(executor.controls.token) != 7) == drawn


@pytest.mark.parametrize(("settings", "primed"), [
    ({"policy": "full"}, [0, 4]), ({"policy": "whole"}, list(range(8))), ({"policy": "full", "arm": "graph"}, [0, 4]),
    ({"policy": "full", "steps": 2, "buckets": [8]}, [0, 1, 2, 3]),  # of a prompt there is no graph
], ids=str)
def test_graphs_of_plain_kernels_are_primed_where_it_was_undone(model: PreTrainedModel, reference: list[int],
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                settings: dict[str, Any], primed: list[int]) -> None:
    """A kernel that starts early behind each graph where one is enough, at none of a later request, or after the graph.
    """
    monkeypatch.setattr(lowered, "starts_early", lambda device: True)
    monkeypatch.setattr(Primer, "launch", lambda self: None)
    with runtime(model, **settings) as rt:
        rt.warm_up([len(PROMPT)])
        before, seen = rt.counters.replays, list[int]()
        monkeypatch.setattr(Primer, "launch", lambda self: seen.append(rt.counters.replays - before))
        for _ in range(2):
            assert rt.generate(PROMPT, max_new_tokens=4, stop=[]).ids == reference[:4]
        assert seen == primed


@pytest.mark.parametrize(("settings", "wanted"), [
    ({}, True), ({"policy": "piecewise"}, False), ({"pdl": False}, False), ({"kernels": "fused"}, False),
    ({"arm": "jit"}, False),
], ids=str)
def test_what_is_no_graph_of_plain_kernels_is_not_primed(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch,
                                                         settings: dict[str, Any], wanted: bool) -> None:
    """A kernel launched for nothing, or against the wish of who asked for none."""
    monkeypatch.setattr(lowered, "starts_early", lambda device: True)
    monkeypatch.setattr(Primer, "launch", lambda self: None)
    with runtime(model, **{"policy": "full", **settings}) as rt:
        assert rt._executor.primer.wanted == wanted


def test_where_triton_cannot_launch_graphs_are_replayed_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Arm `graph`, which needs no Triton, refused for want of a C compiler, for a kernel that only makes it faster."""
    primer = Primer(torch.device("cpu"), wanted=True, again=True)
    assert "unprimed" in caplog.text
    primer.start()
    primer()
