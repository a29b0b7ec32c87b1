"""The soak itself: a short one for real, and that it notices what it is there to notice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from typer.testing import CliRunner

from hybridlab import cli, growth, records, soak
from hybridlab.config import SoakConfig
from hybridlab.errors import ConfigError, RunError, StatisticsError

SHORT = {"minutes": 0.3, "arm": "graph", "cache_graphs": 2, "device": "cpu"}  # eight lengths, of which two are held


@pytest.fixture(autouse=True)
def _own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)


def test_a_worker_is_stopped_and_killed_and_every_canary_stays_right(tmp_path: Any) -> None:
    """A token that changes once graphs come and go, a worker that does not come back, a process or file left open."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    result = soak.run(SHORT, root=tmp_path, progress=False)
    rows = result.rows
    assert (rows["canary"].sum() > 5, rows["evictions"].sum() > 20, rows["request"].is_unique) == (True, True, True)
    assert {"stop", "kill"} <= set(",".join(rows["event"]).split(","))
    assert rows["recovery_ms"].notna().sum() == 1
    assert set(rows["path"]) <= {"graph", "eager"}
    slopes = {quantity.column: found for quantity, found in result.slopes().items()}
    assert set(slopes) == {"rss_bytes", "files", "threads", "itl_ms"}
    assert not any(found.grows(quantity) for quantity, found in result.slopes().items()
                   if quantity.column in ("files", "threads"))
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert "killed 1 times" in result.reading()
    assert len(result.grid().rows) == 4


def test_a_wrong_canary_ends_the_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of requests whose tokens nobody compares with anything."""
    answer, count = soak._Soak._answer, [0]

    def wrong_later(self: Any, length: int) -> Any:
        out = answer(self, length)
        count[0] += 1
        if count[0] > 20:
            out.ids[-1] += 1
        return out

    monkeypatch.setattr(soak._Soak, "_answer", wrong_later)
    with pytest.raises(RunError, match=r"tokens of a canary of \d+ tokens changed"):
        soak.run(SHORT | {"process": "here", "minutes": 0.05}, root=tmp_path, progress=False)
    (config,) = tmp_path.glob("*/*/config.json")
    found = records.read(config.parent)
    assert (found.kind, found.status) == ("soak", "failed")
    assert "canary" in found.reason


def rows(count: int = 400, **planted: Any) -> pd.DataFrame:
    draw = np.random.default_rng(3)
    steady = {"at_s": np.linspace(0, 600, count), "rss_bytes": 9e8 + draw.normal(0, 1e6, count), "gpu_bytes": None,
              "files": draw.integers(30, 33, count), "threads": 12, "itl_ms": draw.lognormal(0.5, 0.2, count),
              "event": ""}
    return pd.DataFrame(steady | planted)


def test_what_is_steady_is_called_so() -> None:
    """A soak that fails for noise would be ignored when it fails for a leak."""
    assert soak.verdict(rows()) == []
    late = np.where(np.arange(400) < 30, 3e8, 9e8)
    assert soak.verdict(rows(rss_bytes=late)) == [], "what fills in the first tenth is no leak"


@pytest.mark.parametrize(("column", "leak"), [
    ("rss_bytes", 9e8 + np.linspace(0, 1e8, 400)), ("files", 30 + np.arange(400) // 40),
    ("threads", 12 + np.arange(400) // 100), ("itl_ms", np.linspace(1.5, 1.7, 400)),
    ("gpu_bytes", 2e9 + np.linspace(0, 1e9, 400)),
])
def test_a_planted_leak_is_named(column: str, leak: Any) -> None:
    """A verdict that is "steady" whatever the rows say."""
    (problem,) = soak.verdict(rows(**{column: leak}))
    words = next(quantity.words for quantity in growth.WATCHED if quantity.column == column)
    assert problem.startswith(f"{words} grows by")


def test_too_few_rows_say_nothing() -> None:
    """A slope over ten values, shown as a result."""
    with pytest.raises(StatisticsError, match="needs n >= 96"):
        soak.verdict(rows(40))


def test_gaps_of_requests_whose_worker_was_hit_are_left_out() -> None:
    """The time that a worker was stopped taken for a decode that becomes slower."""
    hit = np.arange(400) > 200
    frame = rows(itl_ms=np.where(hit, 300.0, 1.5), event=np.where(hit, "stop", ""))
    assert soak.verdict(frame) == []


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory for a soak that cannot be."""
    for wrong in ({"minutes": 0}, {"arm": "eager"}, {"process": "elsewhere"}, {"trace": "zip"}, {"minuets": 3},
                  {"cache_graphs": 65}):
        with pytest.raises(ConfigError):
            soak.run(SHORT | wrong, root=tmp_path)
    monkeypatch.setattr(soak.names, "context", lambda model: 15)
    with pytest.raises(ConfigError, match="do not fit into the 7 tokens"):
        soak.run(SHORT, root=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(soak.names, "context", lambda model: 24)
    assert soak.keys(SoakConfig(cache_graphs=2)) == (2, 4, 6, 8, 10, 12, 14, 16)


@pytest.mark.parametrize(("status", "code"), [("complete", 0), ("failed", 1)])
def test_the_command_hands_its_options_over_and_says_the_verdict(status: str, code: int, tmp_path: Any,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 after a leak."""
    asked: list[SoakConfig] = []

    def fake(config: SoakConfig, root: Any) -> soak.SoakResult:
        asked.append(config)
        run = records.Run.create(config, tmp_path)
        run.finish(status, "" if status == "complete" else "threads grows by 3")
        monkeypatch.setattr(soak.SoakResult, "slopes", lambda self: {})
        return soak.SoakResult.open(run.path)

    monkeypatch.setattr(soak, "run", fake)
    done = CliRunner().invoke(cli.app, ["soak", "--minutes", "2", "--process", "here", "--cache-graphs", "3"])
    assert done.exit_code == code, done.output
    assert (asked[0].minutes, asked[0].process, asked[0].cache_graphs) == (2.0, "here", 3)
