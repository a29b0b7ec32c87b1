"""Which graph serves a step: every kind that a request may need, at its own length, drawn as that request asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hybridlab as hl
from hybridlab.errors import CaptureFailed


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("random:tiny-llama-3", device="cpu")


def prompt(length: int) -> list[int]:
    return torch.randint(2, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def runtime(model: PreTrainedModel, **settings: Any) -> hl.Runtime:
    return hl.Runtime(model, **{"arm": "graph", "max_len": 64, **settings})


def test_exact_lengths_are_captured_ahead_as_published(model: PreTrainedModel) -> None:
    """Lengths 1 to 50 padded after all, or a start that captures every length there is."""
    with runtime(model, buckets="exact", capture="ahead") as rt:
        assert rt.counters.captures == 51
        for length in (1, 7, 50):
            out = rt.generate(prompt(length), max_new_tokens=2, stop=[])
            assert (out.bucket, out.paths) == (length, ["graph"] * 2)
        assert rt.counters.misses == 0
        assert rt.generate(prompt(51), max_new_tokens=1, stop=[]).bucket == 51
        assert rt.counters.captures == 52


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 9}])
def test_graphs_that_draw_are_captured_ahead_for_every_draw(model: PreTrainedModel, draw: dict[str, Any]) -> None:
    """The first sampled request waits for captures although they were to be made before serving."""
    with runtime(model, buckets=[8, 64], capture="ahead", policy="full") as rt:
        before = rt.counters.captures
        rt.generate(prompt(8), max_new_tokens=3, stop=[], **draw)
        assert (before, rt.counters.captures, rt.counters.misses) == (9, 9, 0)


@pytest.mark.parametrize("behind", ["request", "thread", "cooperative"])
def test_a_graph_draws_as_its_request_asked(model: PreTrainedModel, behind: str) -> None:
    """A capture behind that bakes in how the next request draws: greedy tokens from a graph kept for sampling."""
    draws: list[dict[str, Any]] = [{"temperature": 0.8}, {}, {"temperature": 0.8, "top_p": 0.7}] * 6
    with runtime(model, arm="eager") as eager, runtime(model, policy="full", behind=behind, buckets=[8, 16]) as rt:
        for number, draw in enumerate(draws):
            asked = {"max_new_tokens": 1 + number % 4, "stop": [], "seed": number, **draw}
            ids = prompt(3 + number % 11)
            assert rt.generate(ids, **asked).ids == eager.generate(ids, **asked).ids
        rt.settle()
        assert {key.draw for key in rt._executor.graphs} == {"greedy", "random", "filtered"}
        assert rt.counters.failures == 0


def test_a_miss_raises_if_it_shall_and_the_next_request_is_served(model: PreTrainedModel) -> None:
    """A key that stays asked for by a request that was refused."""
    with runtime(model, buckets=[8], fallback="raise") as rt:
        with pytest.raises(CaptureFailed, match="no graph to replay"):
            rt.generate(prompt(8), max_new_tokens=2)
        assert not rt.capturing
        rt.warm_up([8])
        assert rt.generate(prompt(8), max_new_tokens=2, stop=[]).paths == ["graph"] * 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"behind": "treads"}, "did you mean 'thread'"), ({"pool": "sharde"}, "did you mean 'shared'"),
    ({"admission": "pay"}, "did you mean 'pays'"), ({"eviction": "each"}, "auto, one, all"),
    ({"cache_graphs": 0}, "cache_graphs"), ({"buckets": "exakt"}, "buckets"), ({"cache_size": 3}, "cache_bytes"),
])
def test_bad_settings_of_the_cache_are_refused(model: PreTrainedModel, settings: dict[str, Any], message: str) -> None:
    """A misspelt setting that silently measures something else."""
    with pytest.raises(hl.errors.ConfigError, match=message):
        runtime(model, **settings)


def test_a_step_says_that_it_waited_for_its_capture(model: PreTrainedModel) -> None:
    """A first token many times slower than the next, both for the reason that a graph was replayed."""
    with runtime(model, buckets=[8], capture="sync") as rt:
        waited = [["waited" in reason for reason in rt.generate(prompt(8), max_new_tokens=3, stop=[]).reasons]
                  for _ in range(2)]
    assert waited == [[True, True, False], [False] * 3]


def test_admission_sees_times_of_hits_and_misses_only(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first token that waited for its capture taken for a hit: hits would seem to save nothing."""
    seen: list[tuple[int, str]] = []
    for capture, wanted in (("sync", [(8, "graph")]), ("async", [(8, "eager"), (8, "graph")])):
        with runtime(model, buckets=[8], capture=capture) as rt:
            monkeypatch.setattr(rt._executor.lookup.admission, "saw", lambda rows, path, ms: seen.append((rows, path)))
            for _ in range(2):
                rt.generate(prompt(8), max_new_tokens=3, stop=[])
            rt.generate(prompt(9), max_new_tokens=3, stop=[])
        assert seen == wanted
        seen.clear()
