"""The protocol of captures: rows that say what was measured, failures that are told, tokens that stay the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

import hybridlab as hl
from hybridlab import capturing
from hybridlab.config import CacheConfig
from hybridlab.disturbing import WAYS
from hybridlab.errors import ConfigError, MeasureError, RunError
from hybridlab.schemas import CACHE

Part = Callable[..., Any]


def say_nothing(what: str, done: int, total: int) -> None:
    assert 0 <= done < total


def measured(part: Part, model: PreTrainedModel, report: Any = say_nothing, **config: Any) -> pd.DataFrame:
    found = list(part(model, CacheConfig(**config), report))
    return pd.DataFrame([row for rows in found for row in rows])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("random:tiny-llama-3", device="cpu")


class Trouble:
    """A model that computes something else, or reads a value back, from the moment on when `report` names it."""

    def __init__(self, when: str, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.model, self.when, self.on = hl.load("random:tiny-llama-3", device="cpu"), when, False
        self.model.lm_head.register_forward_hook(lambda module, args, out: act(out) if self.on else None)

    def report(self, what: str, done: int, total: int) -> None:
        self.on = self.when in what


def read_back(logits: torch.Tensor) -> torch.Tensor:
    return logits + logits.sum().item() * 0


# --- cost ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cost_rows(model: PreTrainedModel) -> pd.DataFrame:
    return measured(capturing.cost, model, cost_lengths=(8, 32, 8), cost_repeats=2)


def test_a_capture_is_timed_in_all_its_parts(cost_rows: pd.DataFrame) -> None:
    """A time without which nobody can say when a capture pays, or one that stands for two."""
    counts = cost_rows.groupby(["setting", "round", "prompt_tokens", "metric"]).size().unstack()
    assert list(counts.index.get_level_values("setting").unique()) == ["private", "shared"]
    assert len(counts) == 2 * 2 * 2
    once = ["rehearse", "capture", "instantiate", "first_replay"]
    assert (counts[once] == 1).all(axis=None)
    assert (counts[["replay", "jit"]] == capturing.REPLAYS).all(axis=None)
    assert (cost_rows["ms"] > 0).all()
    assert cost_rows.groupby("metric")["path"].unique().map(list).to_dict() == {
        **{name: [""] for name in ("rehearse", "capture", "instantiate")}, "first_replay": ["graph"],
        "replay": ["graph"], "jit": ["jit"]}
    captures = cost_rows[cost_rows["metric"] == "capture"]
    assert (captures["captures"] == 1).all()
    assert (captures["capture_ms"] >= captures["ms"]).all()


def test_bytes_are_those_of_one_graph(cost_rows: pd.DataFrame) -> None:
    """A shared pool counted once for each graph in it, or the bytes of all graphs as those of one."""
    held = cost_rows[cost_rows["metric"] == "replay"].groupby(["setting", "prompt_tokens"])["graph_bytes"].unique()
    assert all(len(values) == 1 for values in held)
    held = held.map(lambda values: int(values[0]))
    assert held["shared", 8] == 0
    assert held["shared", 32] == held["private", 32] > held["private", 8] > 0
    assert cost_rows.groupby(["setting", "prompt_tokens"])["graphs"].max().to_dict() == {
        ("private", 8): 2, ("private", 32): 1, ("shared", 8): 2, ("shared", 32): 1}


def test_rows_have_the_columns_of_the_schema(cost_rows: pd.DataFrame, model: PreTrainedModel) -> None:
    """Rows that are measured for an hour and then cannot be written."""
    disturbed = measured(capturing.disturb, model, disturb=("sync",), disturb_captures=1, repeats=1)
    for rows in (cost_rows, disturbed):
        assert set(rows) == set(CACHE.names) - {"run_id", "profiled"}
        assert all(field.nullable or rows[field.name].notna().all() for field in CACHE if field.name in rows)


@pytest.mark.parametrize(("arm", "policy", "path"), [("graph", "whole", "eager"), ("hybrid", "full", "jit"),
                                                     ("hybrid", "piecewise", "jit")])
def test_every_arm_and_policy_that_replays_is_timed(model: PreTrainedModel, arm: str, policy: str, path: str) -> None:
    """A launch from Python under the name of another path; a graph in pieces that is timed as if it were one."""
    rows = measured(capturing.cost, model, cost_lengths=(8,), cost_repeats=1, arm=arm, policy=policy)
    assert set(rows.loc[rows["metric"] == "jit", "path"]) == {path}
    assert not rows["failures"].any()


def test_a_failed_capture_is_a_row_with_its_reason() -> None:
    """A run lost to one capture, or a failure that nobody hears of."""
    trouble = Trouble("capture costs", read_back)
    rows = measured(capturing.cost, trouble.model, trouble.report, cost_lengths=(8,), cost_repeats=1)
    failed = rows[rows["metric"] == "capture"]
    assert list(failed["failures"]) == [1, 1]
    assert failed["reason"].str.contains("reads a value back").all()
    assert set(rows["metric"]) == {"rehearse", "capture"}


def test_a_replay_with_other_logits_is_refused() -> None:
    """Times of graphs that compute something else than what they are compared with."""
    calls = iter(range(1, 1000))
    trouble = Trouble("capture costs", lambda logits: logits + next(calls))
    with pytest.raises(MeasureError, match="other logits"):
        measured(capturing.cost, trouble.model, trouble.report, cost_lengths=(8,), cost_repeats=1)


def test_lengths_beyond_the_context_are_refused(model: PreTrainedModel) -> None:
    """A prompt cut to what fits, under the name of its length."""
    with pytest.raises(ConfigError, match="max_len"):
        measured(capturing.cost, model, cost_lengths=(8, 10**6))


# --- disturb -------------------------------------------------------------------------------------------------------

HERE = ("thread", "cooperative", "sync", "request")  # and on every device


@pytest.fixture(scope="module")
def disturbed(model: PreTrainedModel) -> pd.DataFrame:
    before = set(threading.enumerate())
    rows = measured(capturing.disturb, model, disturb=HERE, disturb_captures=3, repeats=2)
    rows.attrs["threads"] = [thread.name for thread in threading.enumerate() if thread not in before]
    return rows


def test_every_way_captures_as_often_as_asked(disturbed: pd.DataFrame) -> None:
    """Ways compared after unequal work, or a reference in which something was captured."""
    made = disturbed[disturbed["metric"] == "capture"]
    assert made.groupby(["setting", "round"]).size().to_dict() == {(way, n): 3 for way in sorted(HERE) for n in (0, 1)}
    assert (made["captures"] == 1).all()
    assert not made["failures"].any()
    assert (made["ms"] > 0).all()
    assert set(made["prompt_tokens"]) == {capturing.BUCKET}
    quiet = disturbed[disturbed["setting"] == "quiet"]
    assert set(quiet["metric"]) == {"itl", "after"}
    assert not quiet["capturing"].any()
    assert not quiet["captures"].any()


def test_decoding_runs_ahead_as_asked(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap that is said to be one with steps launched ahead, and was measured without."""
    launched = list[int]()

    class Looking(capturing.Decoding):
        def _request(self, name: str) -> list[capturing.Row]:
            found = super()._request(name)
            launched.append(self.runtime._executor.tokens.depth)
            return found

    monkeypatch.setattr(capturing, "Decoding", Looking)
    rows = measured(capturing.disturb, model, disturb=("thread",), disturb_captures=1, repeats=1, disturb_run_ahead=2)
    assert set(launched) == {3}
    assert (rows[rows["metric"] == "capture"]["captures"] == 1).all()


def test_the_reference_comes_first_in_every_round(disturbed: pd.DataFrame) -> None:
    """A machine that warms up between reference and what is compared with it."""
    order = disturbed.groupby("round")["setting"].unique().map(list)
    assert all(names[0] == "quiet" and sorted(names[1:]) == sorted(HERE) for names in order)


def test_gaps_say_whether_a_capture_was_under_way(disturbed: pd.DataFrame) -> None:
    """Undisturbed gaps among the disturbed, or captures in gaps that count as quiet."""
    gaps = disturbed[disturbed["metric"] == "itl"]
    assert not gaps.loc[~gaps["capturing"], "captures"].any()
    told = gaps.groupby("setting")["capturing"].agg(["any", "all"])
    assert told["any"].to_dict() == {"quiet": False, "request": False, **dict.fromkeys(HERE[:3], True)}
    assert not told.loc[["sync", "cooperative"], "all"].any()
    assert set(gaps["path"]) == {"graph"}
    assert (gaps["hits"] == 1).all()
    happened = disturbed[disturbed["metric"].isin(["itl", "after"])].groupby(["setting", "round"])["captures"].sum()
    assert (happened.drop(["quiet", "thread"]) == 3).all()
    assert happened["thread"].between(1, 3).all()  # one may end between two requests, in no interval
    after = disturbed[(disturbed["metric"] == "after") & (disturbed["setting"] == "request")]
    assert (after["captures"] == 1).all()


def test_no_thread_is_left(disturbed: pd.DataFrame) -> None:
    """A thread that goes on capturing, or holds a model, after its measurement."""
    assert disturbed.attrs["threads"] == []


def test_failed_captures_are_counted_and_decoding_goes_on() -> None:
    """A failure rate of zero because a thread swallowed its errors."""
    trouble = Trouble("thread", read_back)
    rows = measured(capturing.disturb, trouble.model, trouble.report, disturb=("thread",), disturb_captures=2,
                    repeats=1)
    made = rows[rows["metric"] == "capture"]
    assert list(made["failures"]) == [1, 1]
    assert list(made["captures"]) == [0, 0]
    assert made["reason"].str.contains("reads a value back").all()
    assert (rows["metric"] == "itl").sum() > capturing.NEW


def test_a_token_that_changes_ends_the_run() -> None:
    """Quick decoding of the wrong text."""
    trouble = Trouble("sync", lambda logits: -logits)
    with pytest.raises(RunError, match="token 0 changed"):
        measured(capturing.disturb, trouble.model, trouble.report, disturb=("sync",), disturb_captures=1, repeats=1)


@pytest.mark.parametrize(("ways", "message"), [(("thred",), "did you mean 'thread'"), (("thread global",), "CUDA's"),
                                               (("thread", "thread flush"), "runs on cpu")])
def test_ways_are_checked_before_any_work(model: PreTrainedModel, ways: tuple[str, ...], message: str) -> None:
    """A misspelt way found after an hour; a capture mode that a device does not have, measured as another."""
    with pytest.raises(ConfigError, match=message):
        capturing.disturb(model, CacheConfig(disturb=ways), say_nothing)


def test_a_forward_in_pieces_is_not_captured_behind_decoding(model: PreTrainedModel) -> None:
    """Pieces that run while they are captured, over the cache of the request that decodes."""
    with pytest.raises(ConfigError, match="one graph"):
        measured(capturing.disturb, model, disturb=("thread",), policy="piecewise")


def test_every_way_can_be_named() -> None:
    """A way in the documentation that nobody can ask for."""
    assert set(WAYS) == {"quiet", "request", "sync", "thread", "cooperative", "thread relaxed", "thread global",
                         "thread flush"}
