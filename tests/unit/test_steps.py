"""Several decode steps in one launch: the same tokens, from fewer launches, and none that was not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hybridlab as hl
from hybridlab import loop
from hybridlab.errors import ConfigError, HybridlabError, NonFinite
from hybridlab.readback import STOPS, Ring

PROMPT = list(range(3, 23))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("random:tiny-llama-3", device="cpu")


def runtime(model: PreTrainedModel, **settings: Any) -> hl.Runtime:
    return hl.Runtime(model, **{"policy": "full", "capture": "sync", "max_len": 96, "buckets": [32], **settings})


@pytest.mark.parametrize("repeat", ["unrolled", "while"])
@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize(("draw", "run_ahead"), [
    ({}, 0), ({}, 2), ({"temperature": 1.0, "seed": 5}, 2), ({"temperature": 0.8, "top_k": 40, "seed": 5}, 0)])
def test_tokens_do_not_depend_on_how_many_steps_are_launched(model: PreTrainedModel, draw: dict[str, Any],
                                                             run_ahead: int, kernels: str, repeat: str) -> None:
    """A token drawn at the wrong position, fed to the wrong step, or read from another one's place."""
    answers = {}
    for steps in (1, 4, 7):
        with runtime(model, steps=steps, run_ahead=run_ahead, kernels=kernels,
                     repeat=repeat if steps > 1 else "auto") as rt:
            answers[steps] = [rt.generate(PROMPT, max_new_tokens=count, stop=[], **draw).ids
                              for count in (30, 1, 2, 5, 8, 30)]
    assert answers[1] == answers[4] == answers[7]


def test_fewer_launches_and_no_step_beyond_the_last(model: PreTrainedModel) -> None:
    """A setting that is a label only; a last launch that writes beyond the cache."""
    # prefill, eight at a time, and of the last three each by itself, or all in one loop
    for repeat, launches, several in (("unrolled", 1 + 9 + 3, 72), ("while", 1 + 9 + 1, 75)):
        with runtime(model, steps=8, repeat=repeat) as rt:
            rt.warm_up([len(PROMPT)])
            before = rt.counters.replays
            out = rt.generate(PROMPT, max_new_tokens=96 - len(PROMPT), stop=[])
            assert len(out.ids) == 76
            assert rt.counters.replays - before == launches
            assert rt.counters.discarded == 0
            assert sum("steps a launch" in reason for reason in out.reasons) == several
            assert all("in a loop" in reason for reason in out.reasons if "steps a launch" in reason) == (
                repeat == "while")


@pytest.mark.parametrize("run_ahead", [0, 3])
def test_a_loop_runs_no_step_behind_a_stop(model: PreTrainedModel, run_ahead: int) -> None:
    """A stop token that the device does not see, or that ends the next request as well."""
    with runtime(model, steps=8, repeat="while", run_ahead=run_ahead) as rt:
        ids = rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids
        place = next(n for n in range(10, 40) if ids[n] not in ids[:n] and n % 8 == 3)
        for _ in range(2):
            assert rt.generate(PROMPT, max_new_tokens=40, stop=[511, ids[place]]).ids == ids[:place + 1]
            executor: Any = rt._executor
            assert int(executor.positions) == len(PROMPT) + place - 1  # of the last token that was fed
            assert rt.counters.discarded == 0
        assert rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids == ids


def test_more_stops_than_the_device_holds_end_a_request_all_the_same(model: PreTrainedModel) -> None:
    """A list that is cut off."""
    with runtime(model, steps=8, repeat="while") as rt:
        ids = rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids
        many = sorted(set(range(512)) - set(ids[:12]))
        assert len(many) > STOPS
        ended = rt.generate(PROMPT, max_new_tokens=40, stop=many).ids
        assert ended == ids[:len(ended)]
        assert next(n for n, token in enumerate(ids) if token in many) == len(ended) - 1


def test_a_consumer_that_leaves_early_spoils_nothing_for_the_next(model: PreTrainedModel) -> None:
    """Tokens of one request read as those of the next."""
    for repeat in ("unrolled", "while"):
        with runtime(model, steps=8, repeat=repeat, run_ahead=2) as rt:
            ids = rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids
            for taken in (2, 5, 12):
                stream = rt.stream(PROMPT, max_new_tokens=40, stop=[])
                assert [next(stream).id for _ in range(taken)] == ids[:taken]
                stream.close()
                assert rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids == ids


def test_a_token_that_never_comes_is_an_error_and_no_endless_wait() -> None:
    """A launch that ends without giving out what it was to give out."""
    token = torch.zeros(1, dtype=torch.int64)
    ring = Ring(token, 4)
    ring.start([7])
    numbers = ring.expect(3)
    for value in (5, 7, 6):  # the second ends the request
        token.fill_(value)
        ring.emit()
    assert [ring.read(number) for number in numbers[:2]] == [5, 7]
    with pytest.raises(HybridlabError, match="token 2 was not given out"):
        ring.read(numbers[2])


def test_a_loop_asks_before_its_first_round() -> None:
    """A launch ahead of a stop token that runs one step too many."""
    state = torch.zeros(3, dtype=torch.int64)
    for left, over, more in ((0, 0, False), (3, 0, True), (3, 1, False)):
        state[1], state[2] = left, over
        assert loop.going(state) is more


def test_a_stop_ends_the_request_inside_a_launch(model: PreTrainedModel) -> None:
    """Tokens after the end given out, or steps that were launched in vain not counted."""
    with runtime(model, steps=8, repeat="unrolled") as rt:
        ids = rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids
        place = next(n for n in range(10, 40) if ids[n] not in ids[:n])
        out = rt.generate(PROMPT, max_new_tokens=40, stop=[ids[place]])
        assert out.ids == ids[:place + 1]
        assert rt.counters.discarded == (8 - place % 8) % 8
        assert rt.generate(PROMPT, max_new_tokens=40, stop=[]).ids == ids


@pytest.mark.parametrize("behind", ["request", "thread", "cooperative"])
def test_captured_behind_steps_are_launched_one_by_one(model: PreTrainedModel, behind: str) -> None:
    """A capture that a token waits for, or one that never comes."""
    with runtime(model, steps=4, repeat="unrolled", capture="async", behind=behind) as rt:
        first = rt.generate(PROMPT, max_new_tokens=20, stop=[])
        rt.settle()
        rt.generate(PROMPT, max_new_tokens=20, stop=[])
        rt.settle()
        later = rt.generate(PROMPT, max_new_tokens=20, stop=[])
    assert first.ids == later.ids
    assert not any("steps a launch" in reason for reason in first.reasons)
    assert sum("4 steps a launch" in reason for reason in later.reasons) == 16


@pytest.mark.parametrize("repeat", ["unrolled", "while"])
def test_logits_that_are_not_finite_end_the_request_inside_a_launch(model: PreTrainedModel, repeat: str) -> None:
    """A token of -1 fed on through the rest of the launch, or given out."""
    with runtime(model, steps=8, repeat=repeat) as rt:
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


def test_a_repeat_of_one_step_is_refused(model: PreTrainedModel) -> None:
    """A setting that is silently ignored."""
    with pytest.raises(ConfigError, match=r"repeat is 'while'.*nothing to repeat"):
        runtime(model, repeat="while")
