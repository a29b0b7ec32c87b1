"""The soak itself: a short one for real, and that it notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import scipy
from typer.testing import CliRunner

from hybridlab import cli, committed, growth, records, soak
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
    assert list(rows["life"].unique()) == [1, 2]
    assert [quantity.column for quantity in result.slopes() if not quantity.words.endswith(growth.LIFE)] == [
        "rss_bytes", "files", "threads", "itl_ms"]
    assert not any(found.grows(quantity) for quantity, found in result.slopes().items()
                   if quantity.column in ("files", "threads"))
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert len(result.grid().rows) == len(result.slopes())
    assert "stopped 1 and killed 1 times" in result.grid().note


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


def test_a_process_that_stays_fails_the_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete soak after which a process goes on running."""
    started: list[subprocess.Popen[bytes]] = []

    class Leaving(nullcontext[Any]):
        def __init__(self, *_: Any) -> None:
            super().__init__(self)

        def rows(self, report: Any) -> Any:
            started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
            yield []

    monkeypatch.setattr(soak, "_Soak", Leaving)
    monkeypatch.setattr(soak, "verdict", lambda rows: [])
    try:
        result = soak.run(SHORT, root=tmp_path, progress=False)
    finally:
        started[0].kill()
        started[0].wait(60)
    assert (result.status, result.reason) == ("failed", "1 processes were left behind")


def rows(count: int = 400, **planted: Any) -> pd.DataFrame:
    draw = np.random.default_rng(3)
    steady = {"at_s": np.linspace(0, 600, count), "rss_bytes": 9e8 + draw.normal(0, 1e6, count), "gpu_bytes": None,
              "files": draw.integers(30, 33, count), "threads": 12, "itl_ms": draw.lognormal(0.5, 0.2, count),
              "event": "", "life": 1}
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


@pytest.mark.parametrize("seconds", [60, 600, 3600])
@pytest.mark.parametrize(("column", "leak"), [("rss_bytes", 500 * growth.MIB), ("files", 40), ("threads", 10),
                                              ("itl_ms", 0.8)])
def test_a_leak_that_each_kill_hides_is_named(column: str, leak: float, seconds: int) -> None:
    """A saw: what a worker gathers until it is killed and the next one begins anew, which no slope over all shows."""
    lives = max(1, seconds // 120) + 1
    at_s = np.linspace(0, seconds, 400 * lives)
    through = at_s / seconds * lives
    life, part = np.minimum(through.astype(int), lives - 1) + 1, through % 1
    calm = rows(400 * lives, at_s=at_s, life=life)
    assert soak.verdict(calm) == []
    problems = soak.verdict(calm.assign(**{column: calm[column] + leak * part}))
    words = next(quantity.words for quantity in growth.WATCHED if quantity.column == column)
    assert problems[-1].startswith(f"{words}{growth.LIFE} grows by")


def test_the_slope_is_that_of_theil_and_sen() -> None:
    """An estimate of our own that is another one, where SciPy has it for a single life."""
    at_s, values = np.arange(240.0), np.random.default_rng(1).normal(0, 1, 240) + np.arange(240) / 500
    found = growth.slope(at_s, values)
    blocks = [np.median(block) for block in np.array_split(values[24:], growth.BLOCKS)]
    hours = [np.median(block) / 3600 for block in np.array_split(at_s[24:], growth.BLOCKS)]
    expected = scipy.stats.theilslopes(blocks, hours, 0.95)
    assert (found.per_hour, found.low, found.high) == pytest.approx((expected[0], expected[2], expected[3]))


def test_a_life_too_short_to_judge_is_left_out() -> None:
    """A worker that was killed while its caches filled, taken for one that leaks; or a soak of such ones refused."""
    life = np.where(np.arange(400) < 370, 1, 2)
    filling = np.where(life == 2, np.linspace(3e8, 9e8, 400), 9e8)
    assert soak.verdict(rows(life=life, rss_bytes=filling)) == []
    short = rows(400, life=np.arange(400) // 30)
    assert set(growth.slopes(short)) <= set(growth.WATCHED)


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


def test_a_soak_can_be_published_and_stands_in_readme(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of endurance that nobody can show, or a table of it that differs from its rows and passes."""
    run = records.Run.create(SoakConfig(device="cpu"), tmp_path / "own" / "runs")
    life = np.arange(400) // 200 + 1
    found = rows(life=life, request=np.arange(400), prompt_tokens=8, canary=np.arange(400) % 10 == 0, ttft_ms=2.0,
                 path="graph", captures=1, evictions=1, graphs=2)
    found["rss_bytes"] = found["rss_bytes"].astype(int)
    lines = found.astype(object).assign(recovery_ms=None).to_dict("records")
    lines[100] |= {"event": "stop"}
    lines[200] |= {"event": "kill", "recovery_ms": 1500.0}
    run.append(lines)
    run.finish("complete")
    target = committed.publish(run.path, tmp_path)
    readme, name = tmp_path / "README.md", target.relative_to(tmp_path / "data" / "runs").as_posix()
    readme.write_text(f"<!-- table: soak run={name} -->\n<!-- /table -->\n")
    assert len(committed.check(tmp_path, write=True).written) == 1
    text = readme.read_text()
    for said in ("| threads, in a worker's life |", "| steady |", "400 requests in 10.0 minutes, 400 evictions;",
                 "stopped 1 and killed 1 times; another one served after 1.5 s"):
        assert said in text
    assert committed.check(tmp_path).wrong == []
    readme.write_text(text.replace("| steady |", "| grows |", 1))
    assert "differs from its rows" in committed.check(tmp_path).wrong[0]
