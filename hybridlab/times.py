"""Predicted and measured times of arms and policies side by side: as a table, as the panel of a figure, in words.

Never imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from hybridlab import limits, looks, plots, stats
from hybridlab.config import ARMS
from hybridlab.errors import ConfigError, choose

PREDICTED, DASH = "#222222", 26  # colour, and width in px, of a predicted time
COLUMNS = ["arm", "policy", "launches", "predicted_ms", "measured_ms", "low", "high", "n", "error", "limit_ms",
           "of_limit"]


def side_by_side(predicted: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """A row an arm and policy: what was predicted beside the median gap between tokens of one run.

    `predicted` is a table of `hybridlab.predict`; `rows` are those of a run. low and high are the 95 % interval of
    measured_ms, missing where n does not allow one; error is predicted_ms / measured_ms - 1; limit_ms is the least that
    the step's bytes and FLOPs allow on the machine, of_limit its share of measured_ms. Raises `StatisticsError` for
    rows of several runs.
    """
    stats.one_run(rows)
    itl = rows[rows["metric"] == "itl"]
    found = []
    for row in predicted.itertuples():
        own = itl[itl["arm"].isin([row.arm, f"{row.arm} {row.policy}"])]
        if row.policy:
            own = own[own["policy"] == row.policy]
        found.append({"arm": row.arm, "policy": row.policy or None, "launches": row.launches,
                      "predicted_ms": row.predicted_ms, "limit_ms": row.floor_ms, **_median(stats.at(own, 0.5))})
    table = pd.DataFrame(found).reindex(columns=COLUMNS)
    table["error"] = stats.error(table["predicted_ms"], table["measured_ms"])
    table["of_limit"] = table["limit_ms"] / table["measured_ms"]
    return table


def _median(found: stats.Estimate) -> dict[str, Any]:
    return {"measured_ms": found.value, "low": found.low, "high": found.high, "n": found.n}


def reading(table: pd.DataFrame) -> str:
    """What a table of `side_by_side` says, in words; every number comes from it."""
    known = table.dropna(subset=["measured_ms"])
    if known.empty:
        return "Nothing was measured."
    best, slowest = known.loc[known["measured_ms"].idxmin()], known.loc[known["measured_ms"].idxmax()]
    close = known[(known["low"] <= best["high"]) & (known.index != best.name)]
    tied = f" (not told apart from it: {'; '.join(_name(row) for _, row in close.iterrows())})" if len(close) else ""
    off = known["error"].abs()
    worst, chosen = known.loc[off.idxmax()], known.loc[known["predicted_ms"].idxmin()]
    agrees = "too" if chosen.name == best.name else f"and not {_name(best)}"
    return (f"The shortest step was {_cell(best)}{tied}, the longest {_cell(slowest)}. Predictions were off by "
            f"{100 * off.median():.0f} % at the median and by {100 * off.max():.0f} % at the worst: "
            f"{worst['predicted_ms']:.3g} ms predicted, {worst['measured_ms']:.3g} ms measured for {_name(worst)}. "
            f"The shortest step predicted was that of {_name(chosen)} {agrees}.")


def _name(row: pd.Series) -> str:
    return f"{row['arm']} {row['policy']}" if isinstance(row["policy"], str) else str(row["arm"])


def _cell(row: pd.Series) -> str:
    interval = f" [{row['low']:.3g}, {row['high']:.3g}]" if pd.notna(row["low"]) else ""
    launches = f"{row['launches']:,} launch{'es' if row['launches'] != 1 else ''}"
    return f"{_name(row)} at {row['measured_ms']:.3g} ms{interval} and {launches} of the host"


class Times:
    """A panel of a table with a row an arm and policy.

    Columns: arm, policy (missing or "": the row counts for every policy), launches (a step, from the host),
    predicted_ms, measured_ms and limit_ms (ms a token), low and high (95 % interval of measured_ms), n (gaps). All but
    arm and policy may be absent or missing. Raises `ConfigError` for a table without these two, or an arm that there is
    not.
    """

    def __init__(self, table: pd.DataFrame, policies: Sequence[str]) -> None:
        if absent := {"arm", "policy"} - set(table.columns):
            raise ConfigError(f"the times have no column {min(absent)!r}", f"they have {', '.join(table.columns)}",
                              "give a row an arm and policy")
        for arm in table["arm"]:
            choose("arm", arm, ARMS)
        table = table.assign(policy=table["policy"].replace("", None))
        shown = table[table["policy"].isin(list(policies)) | table["policy"].isna()]
        self._table = shown.reindex(columns=COLUMNS)
        self._arms = [arm for arm in ARMS if arm in set(shown["arm"])]

    @property
    def note(self) -> str:
        """How to read the panel."""
        counts = self._table["n"].dropna()
        least, most = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
        sizes = f" of n = {least:,}{f' to {most:,}' if most != least else ''} gaps" if most else ""
        measured = f"; markers: measured medians{sizes}, bars: 95 % intervals" if self._has("measured_ms") else ""
        limit = "; dotted: the least that bytes and FLOPs allow here" if self._has("limit_ms") else ""
        return f"right: dashes: predicted{measured}{limit}"

    def draw(self, figure: go.Figure, policy: str) -> None:
        """Add the traces of one policy to the second pair of axes."""
        own = self._of(policy)
        dashes = [(place, row.predicted_ms) for place, row in own if pd.notna(row.predicted_ms)]
        figure.add_scatter(x=[place for place, _ in dashes], y=[ms for _, ms in dashes], xaxis="x2", yaxis="y2",
                           mode="markers", showlegend=False, hovertemplate="predicted: %{y:.3g} ms<extra></extra>",
                           marker={"color": PREDICTED, "symbol": "line-ew-open", "size": DASH, "line": {"width": 2}})
        for place, row in own:
            if pd.notna(row.measured_ms):
                _measured(figure, place, row)
        least = [(place, row.limit_ms) for place, row in own if pd.notna(row.limit_ms)]
        figure.add_scatter(x=[place for place, _ in least], y=[ms for _, ms in least], xaxis="x2", yaxis="y2",
                           mode="lines", showlegend=False, line={"color": limits.INK, "width": 1.5, "dash": "dot"},
                           hovertemplate="limit: %{y:.3g} ms<extra></extra>")

    def axes(self, figure: go.Figure, policy: str, share: float) -> None:
        """Two pairs of axes side by side, the left one `share` of the width; one scale for all policies."""
        top = max((float(self._table[name].max()) for name in ("predicted_ms", "measured_ms", "high")
                   if self._has(name)), default=1.0)
        figure.update_layout(
            xaxis_domain=[0, share],
            xaxis2={"domain": [share + 0.09, 1], "anchor": "y2", **plots.AXIS, "showgrid": False,
                    "title": {"text": "launches a step under each arm" if self._has("launches") else ""},
                    "tickvals": list(range(len(self._arms))), "range": [-0.6, len(self._arms) - 0.4],
                    "ticktext": self._names(policy)},
            yaxis2={"anchor": "x2", **plots.AXIS, "range": [0, 1.12 * top], "title": {"text": "time of a token (ms)"}})

    def layout(self, policy: str) -> dict[str, Any]:
        """What a switch to this policy changes in the axes."""
        return {"xaxis2.ticktext": self._names(policy)}

    def _of(self, policy: str) -> list[tuple[int, Any]]:
        own = self._table[(self._table["policy"] == policy) | self._table["policy"].isna()]
        return [(self._arms.index(row.arm), row) for row in own.itertuples()]

    def _names(self, policy: str) -> list[str]:
        launches = {place: row.launches for place, row in self._of(policy)}
        return [arm + (f"<br>{int(launches[place]):,}" if pd.notna(launches.get(place)) else "")
                for place, arm in enumerate(self._arms)]

    def _has(self, column: str) -> bool:
        return bool(self._table[column].notna().any())


def _measured(figure: go.Figure, place: int, row: Any) -> None:
    whole = f" [{row.low:.3g}, {row.high:.3g}]" if pd.notna(row.low) and pd.notna(row.high) else ""
    whole += f", n = {int(row.n)}" if pd.notna(row.n) else ""
    bars = plots.bars([row.measured_ms], [row.low], [row.high], looks.COLOURS[row.arm]) if "[" in whole else None
    figure.add_scatter(x=[place], y=[row.measured_ms], xaxis="x2", yaxis="y2", mode="markers", showlegend=False,
                       marker={"color": looks.COLOURS[row.arm], "symbol": looks.SYMBOLS[row.arm], "size": 10},
                       **({"error_y": bars} if bars else {}),
                       hovertemplate=f"{row.arm}, measured: %{{y:.3g}} ms{whole}<extra></extra>")
