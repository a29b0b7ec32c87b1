"""Figures about the paper from rows that are too few for them, and from the committed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

from hybridlab import committed, paperlab, paperviews, plots, records
from hybridlab.papertimes import row

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"
COMMITTED = [path for path in committed.committed_runs(RUNS) if records.kind(path) == paperlab.PaperResult.kind]


def panels(figure: go.Figure) -> dict[str, list[str]]:
    """For each pair of axes without a trace the words that stand inside."""
    drawn = {trace.xaxis or "x" for trace in figure.data}
    empty = {}
    for axis in figure.select_xaxes():
        name = axis.plotly_name.replace("axis", "")
        if name not in drawn:
            empty[name] = [note.text for note in figure.layout.annotations
                           if axis.domain[0] < note.x < axis.domain[1] and 0 < note.y < 1]
    return empty


def few(n: int, arms: tuple[str, ...] = ("eager", "graph", "jit", "hybrid")) -> pd.DataFrame:
    """Every part of a run with n values in each cell."""
    found: list[dict[str, Any]] = []
    for k in range(n):
        for arm in arms:
            common = {"arm": arm, "round": k, "request": k, "value": 1.0 + k / 100, "path": "eager"}
            found += [row("ttft", tokens=10, metric="ttft", **common),
                      *(row(part, tokens=2, index=1, metric="gap", **common) for part in ("cached", "recomputed")),
                      row("protocol", tokens=10, metric="first", **common)]
        found += [row("capture", arm=f"capture={policy}", request=k, metric="ttft", value=1.0)
                  for policy in ("never", "sync", "async")]
    return pd.DataFrame(found).assign(run_id="r1")


TAIL = {"x": "n = 367 a length; a p99 needs 368", "x2": "n = 367 a length; a p99 needs 368"}


@pytest.mark.parametrize(("n", "expected"), [
    (3, {"table1": {"x": "n = 3 a length; a median needs 6"},
         "table2": {panel: words.replace("367", "3") for panel, words in TAIL.items()},
         "by_position": {"x": "n = 3; a median needs 6", "x2": "n = 3; a median needs 6"},
         "ablations": {"x": "n = 3; a change of the mean needs 6"},
         "protocol": {"x2": "n = 3 a length; a median needs 6"}}),
    (367, {"table2": TAIL}), (368, {}),
])
def test_a_panel_without_values_says_why(n: int, expected: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """Axes around nothing, under a note that says they were measured."""
    for name, figure in paperviews.drawn(few(n), "run r1").items():
        why = expected.get(name, {})
        assert panels(figure) == {panel: [words] for panel, words in why.items()}, name
        for panel in why:
            up = figure.layout[panel.replace("x", "yaxis")]
            assert name == "ablations" or up.tickvals == (), "numbers of nothing"
        assert len(figure.layout.annotations) == 1 + len(why), "words over values"
        if why:
            assert plots.write(figure, tmp_path / name, ("svg",))[0].stat().st_size > 5000


def test_a_part_that_was_not_measured_leaves_words() -> None:
    """A notebook draws every figure, whatever parts were asked for."""
    rows = pd.DataFrame([row("memory", arm="hybrid", metric="weights", value=1.0)]).assign(run_id="r1")
    for name, (_, figure) in paperviews.FIGURES.items():
        found = panels(figure(rows, "run r1"))
        assert "x" in found
        assert {text for words in found.values() for text in words} <= {"not measured in this run",
                                                                        "nothing published"}, name
        assert all(len(words) == 1 for words in found.values()), name


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_panel_of_a_committed_figure_is_empty_without_words(path: Path) -> None:
    """A committed figure that shows nothing, as if nothing were what was found."""
    result = paperlab.PaperResult.open(path)
    for name, figure in paperviews.drawn(result.rows, result.caption).items():
        assert all(len(words) == 1 for words in panels(figure).values()), name


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_committed_run_holds_what_the_judges_read(path: Path) -> None:
    """A part whose rows no judge reads any more counts as not measured, for ever."""
    assert paperlab.PaperResult.open(path).lacks() == []
