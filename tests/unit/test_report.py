"""Tables of a run with floors: columns of the limit and the share reached; without them the tables of before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from hybridlab import limits, report, stats
from hybridlab.config import RunConfig

FLOORS = pd.DataFrame([("ttft", 10, None, 2.0, "memory"), ("ttft", 50, None, 6.0, "arithmetic"),
                       ("itl", 10, None, 1.0, "memory"), ("itl", 10, 11, 1.0, "memory"),
                       ("itl", 50, None, 3.0, "memory"), ("itl", 50, 51, 3.0, "memory")],
                      columns=["metric", "prompt_tokens", "position", "ms", "bound"]).astype({"position": "Int64"})
SPEED = {"eager": 1, "hybrid": 4}


def result(floors: pd.DataFrame | None, rounds: int = 9) -> Any:
    """Eager takes 8 times the floor, hybrid twice; half of the rows are of 10 prompt tokens."""
    times = {("ttft", 10): 16.0, ("ttft", 50): 48.0, ("itl", 10): 8.0, ("itl", 50): 24.0}
    rows = pd.DataFrame([{"run_id": "r1", "round": n, "arm": arm, "metric": metric, "prompt_tokens": length,
                          "index": int(metric == "itl"), "position": length + (metric == "itl"), "ms": ms / speed}
                         for n in range(rounds) for arm, speed in SPEED.items()
                         for (metric, length), ms in times.items()])
    def table(which: Any = "both") -> pd.DataFrame:
        found = stats.summary(rows, arms=list(SPEED), which=which)
        return found if floors is None else limits.beside(found, rows, floors)

    return SimpleNamespace(rows=rows, floors=floors, caption="run r1", config=RunConfig(arms=tuple(SPEED)),
                           table=table)


def test_the_limit_and_the_share_of_it_stand_beside_each_metric() -> None:
    """A share above an arm that it is not of, of the other metric, or of pooled medians."""
    grid = report.ablation(result(FLOORS))
    assert grid.header == ["arm", "TTFT p50, ms", "TTFT p99, ms", "× eager", "limit, ms", "of limit",
                           "ITL p50, ms", "ITL p99, ms", "× eager", "limit, ms", "of limit"]
    assert [[line[0], *line[4:6], *line[9:]] for line in grid.rows] == [
        ["eager", "4.00", "12% [12%, 12%]", "2.00", "12% [12%, 12%]"],
        ["hybrid", "4.00", "50% [50%, 50%]", "2.00", "50% [50%, 50%]"]]
    assert "Limit: the least time" in grid.note


def test_each_prompt_length_has_its_limit_and_each_arm_its_share() -> None:
    """The pooled limit in every line, or a share of eager's in another arm's column."""
    grid = report.by_length(result(FLOORS), "ttft")
    assert grid.header == ["prompt tokens", "limit, ms", "eager, ms", "hybrid, ms"]
    assert grid.rows == [["10", "2.00", "16.0 [16.0, 16.0], 12%", "4.00 [4.00, 4.00] 4.00×, 50%"],
                         ["50", "6.00", "48.0 [48.0, 48.0], 12%", "12.0 [12.0, 12.0] 4.00×, 50%"]]
    assert [line[1] for line in report.by_length(result(FLOORS), "itl").rows] == ["1.00", "3.00"]


def test_too_few_rows_and_missing_floors_show_dashes() -> None:
    """A share without an interval, as if it had one; a nan in a table."""
    grid = report.ablation(result(FLOORS, rounds=2))
    assert all((line[5], line[10]) == (report.NONE, report.NONE) for line in grid.rows)
    grid = report.ablation(result(FLOORS[FLOORS["metric"] == "ttft"]))
    assert all((line[9], line[10]) == (report.NONE, report.NONE) for line in grid.rows)
    assert report.by_length(result(FLOORS[FLOORS["metric"] == "ttft"]), "itl").rows[0][1] == report.NONE


def test_a_run_without_floors_has_the_tables_of_before() -> None:
    """Committed tables that change as newer runs hold more."""
    grids = [build(result(None)) for build in report.GRIDS.values()]
    assert grids[0].header == ["arm", "TTFT p50, ms", "TTFT p99, ms", "× eager",
                               "ITL p50, ms", "ITL p99, ms", "× eager"]
    assert grids[0].rows[1] == ["hybrid", "8.00 [4.00, 12.0]", "–", "4.00 [4.00, 4.00]",
                                "4.00 [2.00, 6.00]", "–", "4.00 [4.00, 4.00]"]
    assert grids[1].header == ["prompt tokens", "eager, ms", "hybrid, ms"]
    assert not any("imit" in grid.note for grid in grids)


@pytest.mark.parametrize("floors", [None, FLOORS])
def test_figures_are_drawn_with_the_floors_of_their_run(floors: pd.DataFrame | None, tmp_path: Path) -> None:
    """Floors that reach the tables and not the figures."""
    files = list(report.draw(result(floors), tmp_path, ("html",)))
    assert len(files) == len(report.FIGURES)
    for file in files:
        assert ("limit (" in file.read_text(encoding="utf-8")) is (floors is not None)
