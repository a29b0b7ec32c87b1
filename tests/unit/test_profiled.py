"""Times under a profiler are none: whatever makes a statistic of rows refuses them, whatever the rows are of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab import (
    cachelab,
    growth,
    judging,
    kernellab,
    kerneltables,
    looking,
    measure,
    papertables,
    peerlab,
    peers,
    plots,
    ranges,
    records,
    schemas,
    soundness,
    stats,
    store,
    systemlab,
    tails,
    tallies,
)
from hybridlab.config import SoakConfig, SystemConfig, build
from hybridlab.engines import PeersConfig
from hybridlab.errors import StatisticsError
from tests.unit.test_measure import CONFIG, PROMPTS, fakes
from tests.unit.test_peers import synthetic

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"
COMMITTED = {"ablation": "h200/20261128-124256-c2c6", "cache": "h200/20261124-000008-d886",
             "kernels": "h200/20261124-082824-4268", "paper": "cpu-epyc/20261128-154220-b293"}
Statistic = Callable[[records.Recorded], Any]


def of(take: Callable[[pd.DataFrame], Any]) -> Statistic:
    return lambda run: take(run.rows)


STATISTICS: dict[str, list[Statistic]] = {
    "ablation": [*map(of, (stats.summary, stats.one_run, soundness.steady, soundness.slow, soundness.clocks,
                           soundness.processes, soundness.quantiles, soundness.by_generation, soundness.words,
                           lambda rows: plots.ablation(rows, ""),
                           lambda rows: looking.table(rows.assign(round=0), [0]))), store.headlines],
    "cache": [of(lambda rows: tallies.part(rows, "stream")), lambda run: cachelab.CacheResult(run).table(),
              store.headlines],
    "kernels": [of(kerneltables.table), of(kerneltables.steps), lambda run: kernellab.KernelResult(run).table(),
                of(lambda rows: kerneltables.compared(rows, "step", 1, "torch", "fused")), store.headlines],
    "system": [lambda run: systemlab.SystemResult(run).table(), lambda run: systemlab.SystemResult(run).reading(),
               store.headlines],
    "paper": [of(lambda rows: judging.by_length(rows, "ttft", "median")), of(papertables.effects),
              of(lambda rows: papertables.by_position(rows, "cached")),
              *(of(lambda rows, grid=grid: grid(rows, "")) for grid in papertables.GRIDS.values())],
}


def recorded(kind: str) -> records.Recorded:
    """A committed run; of a system none is kept."""
    if kind != "system":
        return records.read(RUNS / COMMITTED[kind])
    rows = pd.DataFrame([{"run_id": "r", "part": "memory", "setting": "", "round": number, "step": "weights",
                          "value": 1.0, "unit": "MiB"} for number in range(3)])
    return records.Recorded(Path("r"), "r", "system", SystemConfig(), {}, "complete", "", rows, {})


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, own in STATISTICS.items()
                                             for place in range(len(own))])
def test_no_statistic_takes_a_row_under_a_profiler(kind: str, place: int) -> None:
    """A profiler doubles a launch; mixed in, it would double a median."""
    run = recorded(kind)
    marked = run.rows.assign(profiled=pd.array([True, None] + [False] * (len(run.rows) - 2), dtype="boolean"))
    with pytest.raises(StatisticsError, match=f"1 of {len(marked)} rows were taken while a profiler listened"):
        STATISTICS[kind][place](replace(run, rows=marked))


def test_no_slope_takes_one_and_every_kind_can_say_so(tmp_path: Path) -> None:
    """Memory that a profiler takes is no leak; a kind of rows without the column loses what its recorder knew."""
    columns = {name: [0] for name in schemas.SOAK.names} | {"profiled": [True]}
    with pytest.raises(StatisticsError, match="1 of 1 rows"):
        growth.slopes(pd.DataFrame(columns))
    assert all("profiled" in schema.names for kind, (_, schema) in records.KINDS.items() if kind != "trace")
    run = records.Run.create(build(SoakConfig, {}), tmp_path)
    row = {name: None if name in ("gpu_bytes", "recovery_ms") else "" if name in ("path", "event") else
           False if name == "canary" else 1 for name in schemas.SOAK.names if name not in ("run_id", "profiled")}
    with ranges.recorded(lambda name: nullcontext()):
        run.append([row])
    run.append([row])
    assert records.read(run.path).rows["profiled"].tolist() == [True, False]


def test_rows_without_the_column_or_the_answer_are_taken() -> None:
    """Runs that were recorded before rows said it would all be refused."""
    rows = pd.DataFrame({"run_id": ["r"] * 2, "profiled": pd.array([None, False], dtype="boolean")})
    assert stats.unprofiled(rows) is rows
    assert len(stats.unprofiled(rows.drop(columns="profiled"))) == 2
    assert stats.unprofiled(rows.iloc[:0]).empty


def test_a_profiler_that_is_started_in_the_middle_marks_the_rounds_after_it() -> None:
    """Asked once before the rounds, a profiler that somebody started later went unseen."""
    runtimes, log = fakes()
    rounds = measure.rounds(runtimes, PROMPTS, CONFIG)
    first = next(rounds)
    with ranges.recorded(lambda name: nullcontext()):
        second = next(rounds)
    third = next(rounds)
    assert [{row["profiled"] for row in rows} for rows in (first, second, third)] == [{False}, {True}, {False}]
    assert log


def test_a_system_of_a_comparison_says_whether_a_profiler_listens_to_it(tmp_path: Path) -> None:
    """The asker cannot know what listens to another process, and said that nothing does."""
    class Fixed(peers.Peer):
        def run(self, ids: list[int], count: int, give: peers.Give) -> None:
            for number in range(count):
                give(number)

    with tails.Watch() as watch:
        serving = peers.Serving(Fixed(), build(PeersConfig, {"new_tokens": 3, "warmup": 1}), watch)
        assert [row["profiled"] for row in serving.rows([1, 2], "itl")["rows"]] == [False, False]
        with ranges.recorded(lambda name: nullcontext()):
            assert [row["profiled"] for row in serving.rows([1, 2], "itl")["rows"]] == [True, True]
    result = peerlab.PeersResult.open(synthetic(tmp_path))
    marked = result.rows.assign(profiled=True)
    with pytest.raises(StatisticsError, match="a profiler listened"):
        peerlab.PeersResult(replace(result.recorded, rows=marked)).table()
