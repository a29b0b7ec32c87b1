"""Floors beside what was measured: each row has its own, shares are row by row, and lines are where floors are."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hybridlab import limits, plots, static, stats

COLUMNS = ["metric", "prompt_tokens", "position", "ms", "bound"]


def floors(*entries: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(entries, columns=COLUMNS).astype({"position": "Int64"})


FLOORS = floors(("ttft", 10, None, 2.0, "memory"), ("ttft", 50, None, 6.0, "arithmetic"),
                ("itl", 10, None, 1.5, "memory"), ("itl", 10, 11, 1.0, "memory"), ("itl", 10, 31, 2.0, "memory"),
                ("itl", 50, None, 3.5, "memory"), ("itl", 50, 51, 3.0, "memory"), ("itl", 50, 71, 4.0, "memory"))


def rows(metric: str, *times: tuple[int, int, float], arm: str = "eager") -> pd.DataFrame:
    """Of prompt length, index and ms."""
    return pd.DataFrame([{"run_id": "r1", "arm": arm, "metric": metric, "prompt_tokens": length, "index": index,
                          "position": length + index, "ms": ms, "round": n}
                         for n, (length, index, ms) in enumerate(times)])


def test_each_row_has_the_floor_of_its_own_step() -> None:
    """A gap with the floor of a first token, or of another position; a row that has none with that of its neighbour."""
    both = pd.concat([rows("ttft", (10, 0, 9.0), (50, 0, 9.0), (99, 0, 9.0)),
                      rows("itl", (10, 1, 9.0), (10, 11, 9.0), (50, 21, 9.0), (50, 22, 9.0))])
    found = limits.of_rows(both.reset_index(drop=True), FLOORS).tolist()
    np.testing.assert_equal(found, [2.0, 6.0, np.nan, 1.0, 1.5, 4.0, np.nan])
    first = limits.of_rows(both.reset_index(drop=True), FLOORS[FLOORS["metric"] == "ttft"])
    assert first.notna().sum() == 2


def test_rows_may_have_any_index() -> None:
    """Floors that land on other rows as rows of an arm keep their numbers."""
    own = rows("itl", (10, 1, 2.0), (10, 21, 4.0)).set_axis([7, 3])
    assert limits.of_rows(own, FLOORS).to_dict() == {7: 1.0, 3: 2.0}


def test_a_share_is_taken_row_by_row() -> None:
    """The ratio of two medians, of which one is of short prompts and the other of long ones; time over floor."""
    own = rows("ttft", *[(10, 0, 4.0)] * 7, *[(50, 0, 60.0)] * 6)
    found = limits.share(own, FLOORS)
    assert found == stats.quantile([0.5] * 7 + [0.1] * 6, 0.5)
    assert found is not None
    assert (found.value, found.n) == (0.5, 13)
    assert limits.floor(own, FLOORS) == 2.0
    assert limits.share(own.iloc[:5], FLOORS) is None  # no interval
    assert limits.floor(rows("ttft", (99, 0, 1.0)), FLOORS) is None


def test_a_table_has_the_limit_of_each_line() -> None:
    """A pooled limit in the line of one prompt length, a share of another arm, or one without an interval."""
    own = pd.concat([rows("ttft", *[(10, 0, 4.0)] * 7, *[(50, 0, 60.0)] * 6),
                     rows("ttft", *[(10, 0, 2.0)] * 7, arm="hybrid")])
    table = limits.beside(stats.summary(own), own, FLOORS)
    found = table.set_index(["arm", "prompt_tokens"])[["limit", "of_limit"]]
    assert found.loc[("eager", 10)].tolist() == [2.0, 0.5]
    assert found.loc[("eager", 50)].tolist() == [6.0, 0.1]
    assert found.loc[("eager", "all")].tolist() == [2.0, 0.5]
    assert found.loc[("hybrid", "all")].tolist() == [2.0, 1.0]
    few = limits.beside(stats.summary(own.iloc[:5]), own.iloc[:5], FLOORS)
    assert few[["limit", "of_limit", "of_limit_low"]].iloc[0].tolist() == [2.0, None, None]


def data(scale: float = 1.0) -> pd.DataFrame:
    return pd.concat([rows(metric, *[(length, index, scale * (8 + n % 5)) for n in range(8) for length in (10, 50)
                                     for index in indices], arm=arm)
                      for metric, indices in (("ttft", [0]), ("itl", [1, 11, 21])) for arm in ("eager", "hybrid")])


def lines(figure: Any) -> dict[str, Any]:
    return {trace.yaxis or "y": trace for trace in figure.data if (trace.name or "").startswith("limit")}


def test_figures_show_floors_where_they_are() -> None:
    """A line at the floor of something else, in another panel, or upside down."""
    line = lines(plots.ttft_by_length(data(), "", FLOORS))["y"]
    assert (list(line.x), list(line.y), line.name) == ([10, 50], [2.0, 6.0], "limit (read or matrix rate)")
    line = lines(plots.itl_by_position(data(), "", FLOORS))["y"]
    assert (list(line.x), list(line.y), line.name) == ([11, 31, 51, 71], [1.0, 2.0, 3.0, 4.0], "limit (read rate)")
    line = lines(plots.itl_by_arm(data(), "", FLOORS))["y"]
    assert (list(line.x), line.name) == ([2.5, 2.5], "limit (read rate)")  # of 1, 1.5, 2, 3, 3.5 and 4
    both = lines(plots.ablation(data(), "", FLOORS))
    assert (list(both["y"].x), list(both["y"].y)) == ([10, 50], [2.0, 6.0])
    assert (list(both["y2"].y), both["y2"].showlegend) == ([2.5, 2.5], False)


def test_the_legend_names_the_limit_once_and_for_both_panels() -> None:
    """A line that is named twice, or a gap's read rate under the name of a matrix rate alone."""
    bound = FLOORS.assign(bound=FLOORS["bound"].where(FLOORS["metric"] == "itl", "arithmetic"))
    figure = plots.ablation(data(), "", bound)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["eager", "hybrid",
                                                                          "limit (read or matrix rate)"]
    assert lines(plots.ttft_by_length(data(), "", bound))["y"].name == "limit (matrix rate)"


@pytest.mark.parametrize("draw", [plots.ablation, plots.ttft_by_length, plots.itl_by_arm, plots.itl_by_position])
@pytest.mark.parametrize("scale", [1.0, 0.1, 100.0])
def test_a_floor_is_inside_its_figure(draw: Any, scale: float) -> None:
    """A limit that was passed, or is far below, outside the axes, as if there were none."""
    figure = draw(data(scale), "", FLOORS)
    for name, line in lines(figure).items():
        axis = figure.layout["yaxis" + name[1:]]
        low, high = axis.range
        inside = [low <= (np.log10(y) if axis.type == "log" else y) <= high for y in line.y]
        assert all(inside)
        across = figure.layout["xaxis" + name[1:]]
        if across.type == "log":
            assert across.range[0] < np.log10(line.x[0]) < across.range[1]
    assert lines(figure)
    assert static.png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", [plots.ablation, plots.ttft_by_length, plots.itl_by_arm, plots.itl_by_position])
def test_a_run_without_floors_is_drawn_as_before(draw: Any) -> None:
    """Figures of older runs that change, or a line at nothing."""
    assert draw(data(), "", None).to_json() == draw(data(), "").to_json() == draw(data(), "", FLOORS.iloc[:0]).to_json()
    assert not lines(draw(data(), ""))


def test_floors_are_shown_without_torch() -> None:
    """Committed rows must be drawn where torch is not installed."""
    subprocess.run([sys.executable, "-c", "import sys, hybridlab.limits; sys.exit('torch' in sys.modules)"], check=True)
