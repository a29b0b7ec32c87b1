"""Several decode steps in one launch: the same tokens, from fewer launches, and none that was not asked for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

import hybridlab as hl
from hybridlab.errors import ConfigError, NonFinite

PROMPT = list(range(3, 23))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("random:tiny-llama-3", device="cpu")


def runtime(model: PreTrainedModel, **settings: Any) -> hl.Runtime:
    return hl.Runtime(model, **{"policy": "full", "capture": "sync", "max_len": 96, "buckets": [32], **settings})


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize("draw", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.8, "top_k": 40, "seed": 5}])
def test_tokens_do_not_depend_on_how_many_steps_are_launched(model: PreTrainedModel, draw: dict[str, Any],
                                                             run_ahead: int, kernels: str) -> None:
    """A token drawn at the wrong position, fed to the wrong step, or read from another one's place."""
    answers = {}
    for steps in (1, 4, 7):
        with runtime(model, steps=steps, run_ahead=run_ahead, kernels=kernels) as rt:
            answers[steps] = [rt.generate(PROMPT, max_new_tokens=count, stop=[], **draw).ids
                              for count in (30, 1, 2, 5, 8, 30)]
    assert answers[1] == answers[4] == answers[7]


def test_fewer_launches_and_no_step_beyond_the_last(model: PreTrainedModel) -> None:
    """A setting that is a label only; a last launch that writes beyond the cache."""
    with runtime(model, steps=8) as rt:
        rt.warm_up([len(PROMPT)])
        before = rt.counters.replays
        out = rt.generate(PROMPT, max_new_tokens=96 - len(PROMPT), stop=[])
        assert len(out.ids) == 76
        assert rt.counters.replays - before == 1 + 75 // 8 + 75 % 8  # prefill, eight at a time, the rest one by one
        assert rt.counters.discarded == 0
        assert sum("8 steps a launch" in reason for reason in out.reasons) == 72


def test_a_stop_ends_the_request_inside_a_launch(model: PreTrainedModel) -> None:
    """Tokens after the end given out, or steps that were launched in vain not counted."""
    with runtime(model, steps=8) as rt:
        ids = rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids
        place = next(n for n in range(10, 40) if ids[n] not in ids[:n])
        out = rt.generate(PROMPT, max_new_tokens=40, stop=[ids[place]])
        assert out.ids == ids[:place + 1]
        assert rt.counters.discarded == (8 - place % 8) % 8
        assert rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids == ids


@pytest.mark.parametrize("behind", ["request", "thread", "cooperative"])
def test_captured_behind_steps_are_launched_one_by_one(model: PreTrainedModel, behind: str) -> None:
    """A capture that a token waits for, or one that never comes."""
    with runtime(model, steps=4, capture="async", behind=behind) as rt:
        first = rt.generate(PROMPT, max_new_tokens=20, stop=[])
        rt.settle()
        rt.generate(PROMPT, max_new_tokens=20, stop=[])
        rt.settle()
        later = rt.generate(PROMPT, max_new_tokens=20, stop=[])
    assert first.ids == later.ids
    assert not any("steps a launch" in reason for reason in first.reasons)
    assert sum("4 steps a launch" in reason for reason in later.reasons) == 16


def test_logits_that_are_not_finite_end_the_request_inside_a_launch(model: PreTrainedModel) -> None:
    """A token of -1 fed on through the rest of the launch, or given out."""
    with runtime(model, steps=8) as rt:
        rt.warm_up([len(PROMPT)])
        weight = rt.model.lm_head.weight
        kept = weight.detach().clone()
        try:
            stream = rt.stream(PROMPT, max_new_tokens=30, stop=[])
            next(stream)
            weight.data.fill_(float("nan"))
            with pytest.raises(NonFinite, match="new token 1 "):
                list(stream)
        finally:
            weight.data.copy_(kept)


@pytest.mark.parametrize("settings", [{"policy": "whole"}, {"arm": "jit"}, {"arm": "eager"}])
def test_several_steps_are_refused_where_no_graph_could_hold_them(model: PreTrainedModel,
                                                                  settings: dict[str, Any]) -> None:
    """A setting that is silently ignored."""
    with pytest.raises(ConfigError, match="steps is 4"):
        runtime(model, steps=4, **settings)
