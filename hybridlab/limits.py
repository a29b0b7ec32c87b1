"""The least time that a machine allows, beside what was measured: of each row, the share reached, a line in figures.

Floors are those of `roofline.floors`. Never imports torch.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hybridlab import stats
from hybridlab.stats import Estimate

INK = "#222222"
RATES = {"memory": "read", "arithmetic": "matrix"}


def of_rows(rows: pd.DataFrame, floors: pd.DataFrame) -> pd.Series:
    """The floor of each row in ms: a first token's by its prompt length, a gap's by its position, on the line between
    the positions that have one. NaN where there is none."""
    first = _whole(floors, "ttft").set_index("prompt_tokens")["ms"].astype(float)
    found = rows["prompt_tokens"].map(first).astype(float).where(rows["metric"] == "ttft")
    steps = _positions(floors)
    if steps.empty or not (rows["metric"] == "itl").any():
        return found
    at = np.interp(rows["position"].to_numpy(float), steps["position"].to_numpy(float), steps["ms"].to_numpy(float),
                   left=math.nan, right=math.nan)
    return found.where(rows["metric"] != "itl", pd.Series(at, index=rows.index))


def floor(rows: pd.DataFrame, floors: pd.DataFrame) -> float | None:
    """The median floor of the rows in ms; None where none has one."""
    found = of_rows(rows, floors).dropna()
    return float(found.median()) if len(found) else None


def share(rows: pd.DataFrame, floors: pd.DataFrame) -> Estimate | None:
    """The median, row by row, of the floor over the time, with its interval: 1 where the limit is reached; None where
    there are too few."""
    return stats.of(rows.assign(share=of_rows(rows, floors) / rows["ms"]).dropna(subset="share"), 0.5, "share")


def cells(rows: pd.DataFrame, floors: pd.DataFrame | None) -> dict[str, float | None]:
    """Of these rows limit (`floor`, ms), of_limit, of_limit_low and of_limit_high (`share`), None where there is none;
    nothing without floors."""
    if floors is None:
        return {}
    found = share(rows, floors)
    value, low, high = (found.value, found.low, found.high) if found else (None, None, None)
    return {"limit": floor(rows, floors), "of_limit": value, "of_limit_low": low, "of_limit_high": high}


def beside(table: pd.DataFrame, rows: pd.DataFrame, floors: pd.DataFrame) -> pd.DataFrame:
    """A table of `stats.summary` over these rows with the columns of `cells`."""
    lines = []
    for line in table.itertuples():
        own = rows[(rows["arm"] == line.arm) & (rows["metric"] == line.metric)]
        own = own if line.prompt_tokens == "all" else own[own["prompt_tokens"] == line.prompt_tokens]
        lines.append(cells(own, floors))
    return table.join(pd.DataFrame(lines, index=table.index, dtype=object))


def by_length(figure: go.Figure, floors: pd.DataFrame | None, *others: str) -> None:
    """The floors of first tokens as a line over the prompt length, in the first panel; its name also holds for the
    metrics of `others`."""
    if floors is not None and len(own := _whole(floors, "ttft").sort_values("prompt_tokens")):
        bounds = {*own["bound"], *floors.loc[floors["metric"].isin(others), "bound"]}
        _line(figure, own["prompt_tokens"].tolist(), own["ms"].tolist(), bounds, "%{x} prompt tokens: %{y:.3g} ms")


def by_position(figure: go.Figure, floors: pd.DataFrame | None) -> None:
    """The floors of gaps as a line over the position, in the first panel."""
    if floors is not None and len(own := _positions(floors)):
        _line(figure, own["position"].tolist(), own["ms"].tolist(), {*own["bound"]}, "position %{x}: %{y:.3g} ms")


def across(figure: go.Figure, gaps: pd.DataFrame, floors: pd.DataFrame | None) -> None:
    """The median floor of the gaps through the second panel, from left to right; named by the first panel's line."""
    if floors is not None and (ms := floor(gaps, floors)) is not None:
        _line(figure, list(figure.layout.xaxis2.range), [ms, ms], {*_positions(floors)["bound"]}, "%{y:.3g} ms", "2")


def upright(figure: go.Figure, rows: pd.DataFrame, floors: pd.DataFrame | None, low: float, high: float,
            panel: str = "") -> list[float]:
    """The median floor of the rows from `low` to `high` in a panel; where it stands, if anywhere."""
    found = stands(rows, floors)
    if floors is not None and found:
        bounds = {*floors.loc[floors["metric"].isin(rows["metric"].unique()), "bound"]}
        _line(figure, found * 2, [low, high], bounds, "%{x:.3g} ms", panel)
    return found


def stands(rows: pd.DataFrame, floors: pd.DataFrame | None) -> list[float]:
    """The median floor of the rows in ms, if there is one."""
    ms = None if floors is None else floor(rows, floors)
    return [] if ms is None else [ms]


def by_request(figure: go.Figure, requests: pd.DataFrame, floors: pd.DataFrame | None, window: int, panel: str) -> None:
    """The floors of first tokens over the requests of a stream, which are in order: medians of the last `window`."""
    if floors is not None and len(requests):
        first = requests.assign(metric="ttft")
        ms = of_rows(first, floors).rolling(window, min_periods=1).median()
        _line(figure, [int(number) + 1 for number in first["request"]], ms.tolist(), {*_whole(floors, "ttft")["bound"]},
              "request %{x}: %{y:.3g} ms", panel, listed=True)


def _line(figure: go.Figure, x: list[float], y: list[float], bounds: set[str], hover: str, panel: str = "",
          listed: bool = False) -> None:
    name = f"limit ({' or '.join(word for bound, word in RATES.items() if bound in bounds)} rate)"
    figure.add_scatter(x=x, y=y, mode="lines", line={"color": INK, "width": 2, "dash": "dash"}, name=name,
                       legendgroup="limit", showlegend=listed or not panel, xaxis=f"x{panel}", yaxis=f"y{panel}",
                       hovertemplate=f"{name}, {hover}<extra></extra>")
    axis = figure.layout[f"yaxis{panel}"]
    if axis.range is not None and axis.type != "log":  # a floor above what was measured is to be seen
        axis.range = [axis.range[0], max(axis.range[1], 1.05 * max(y))]


def _whole(floors: pd.DataFrame, metric: str) -> pd.DataFrame:
    return floors[(floors["metric"] == metric) & floors["position"].isna()]


def _positions(floors: pd.DataFrame) -> pd.DataFrame:
    """Of gaps, one line a position in ascending order: a step's work depends on nothing else."""
    own = floors[(floors["metric"] == "itl") & floors["position"].notna()]
    return own.sort_values("position").drop_duplicates("position")
