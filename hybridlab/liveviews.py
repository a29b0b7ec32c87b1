"""Rows of a run that is still going on, as a figure, a table and words: each drawn anew as rows come.

Rows are those of `Session.frame`. Never imports torch.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hybridlab import limits, looks, panels, plots, stats
from hybridlab.report import interval, number
from hybridlab.session import Row
from hybridlab.stats import Estimate

POINTS = 1000  # of one line
NONE = "–"
STYLE = "<style>.hl-table td, .hl-table th { padding: 2px 14px 2px 0; text-align: left; }</style>"
RATIO = ("<div>× eager: the median of eager's requests over that of the arm's, each request counted as its median gap; "
         "paired by round, n = {n} rounds</div>")
NOTES = ("lines: {lines}, bands and bars: 95 % intervals, where n allows them",
         "left: gaps of all requests in a row, first tokens left out; click one for its path and reason")


def figure(rows: pd.DataFrame, caption: str, arms: Sequence[str], floors: pd.DataFrame | None = None,
           percentile: float = 99.0, theme: str = "light") -> go.Figure:
    """Gaps between tokens in the order they came, and their distribution, an arm a colour; the median and a percentile
    of your choice as lines, each with its interval, and the least time that the machine allows.

    Each arm has the same traces whether or not it has rows yet, so that a widget can be given new values by `refresh`.
    """
    made = panels.frame("Gap between two tokens, as they come", caption, ["", ""], 340)
    panels.axes(made, 1, [0, 0.56], [0, 1], x={"title": {"text": "token (number, in the order of arrival)"}},
                y={"title": {"text": "gap between two tokens (ms, logarithmic)"}})
    panels.axes(made, 2, [0.66, 1], [0, 1], x={"title": {"text": "gap (ms, logarithmic)"}},
                y={"title": {"text": "gaps up to this long (%)"}})
    made.add_traces(_traces(rows, arms, floors, percentile))
    made.update_layout(_layout(rows, caption, floors, percentile))
    return looks.themed(made, theme)


def refresh(shown: go.Figure, rows: pd.DataFrame, caption: str, arms: Sequence[str],
            floors: pd.DataFrame | None = None, percentile: float = 99.0, theme: str = "light") -> None:
    """New values for a figure of the same arms and theme, in one message to the page."""
    fresh = looks.themed(go.Figure(_traces(rows, arms, floors, percentile)), theme).data
    with shown.batch_update():
        for trace, new in zip(shown.data, fresh, strict=True):
            trace.update(new)
        shown.update_layout(_layout(rows, caption, floors, percentile))


def ratios(rows: pd.DataFrame, arms: Sequence[str]) -> dict[str, Estimate]:
    """How many times faster than eager the arms are that have enough rounds: the median of eager's requests over that
    of the arm's, each request counted as the median of its gaps, and only if it came whole; resampled in pairs, one a
    round. Gaps of one request are not independent, and a bootstrap over all of them takes a minute; rounds are few."""
    requests = rows[rows["metric"] == "itl"].groupby(["arm", "round"])["ms"].agg(["median", "size"])
    medians = requests.loc[requests["size"] == requests["size"].max(), "median"].unstack("arm")
    found = {}
    for arm in arms:
        if {arm, "eager"} <= set(medians.columns):
            own, eager = medians[medians[arm].notna() & medians["eager"].notna()][[arm, "eager"]].to_numpy(float).T
            if len(own) >= stats.needed(0.5):
                found[arm] = stats.ratio(own, eager, paired=True)
    return found


def table(rows: pd.DataFrame, arms: Sequence[str], floors: pd.DataFrame | None, percentile: float,
          compared: Mapping[str, Estimate] = MappingProxyType({})) -> str:
    """HTML: medians and the percentile of each arm with intervals, and what it is `compared` with eager (`ratios`)."""
    found = []
    for arm in arms:
        own = rows[rows["arm"] == arm]
        gaps, first = (own[own["metric"] == metric] for metric in ("itl", "ttft"))
        line = {"arm": arm, "first tokens": f"{len(first):,}", "TTFT p50, ms": _cell(first, 50),
                "gaps": f"{len(gaps):,}", "ITL p50, ms": _cell(gaps, 50)}
        if percentile != 50:
            line[f"ITL p{percentile:g}, ms"] = _cell(gaps, percentile)
        if compared:
            line["× eager"] = _ratio(compared[arm]) if arm in compared else NONE
        if floors is not None:
            share = limits.share(gaps, floors)
            line["of limit"] = NONE if share is None else f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
        found.append(line)
    note = RATIO.format(n=" or ".join(f"{n:,}" for n in sorted({at.n for at in compared.values()}))) if compared else ""
    return STYLE + pd.DataFrame(found).to_html(index=False, escape=True, border=0, classes="hl-table") + note


def about(row: Row, text: str | None) -> str:
    """HTML: one token, the path that made it, and why."""
    said = "" if text is None else f"{text!r}, "
    what = "first token" if row.index == 0 else f"token {row.index + 1}"
    head = (f"{row.arm}, request {row.request + 1}, {what}: {said}id {row.id}, position {row.position}, "
            f"{number(row.ms)} ms")
    colour = looks.COLOURS.get(row.path, "#808080")
    return (f'<b style="border-bottom: 3px solid {colour}">{html.escape(row.path)}</b> · {html.escape(head)}<br>'
            f'{html.escape(row.reason or "no reason was given")}')


def _traces(rows: pd.DataFrame, arms: Sequence[str], floors: pd.DataFrame | None,
            percentile: float) -> list[go.Scatter]:
    gaps = rows[rows["metric"] == "itl"]
    longest = int(gaps.groupby("arm").size().max()) if len(gaps) else 1
    found = [go.Scatter(each) for arm in arms for each in _arm(arm, gaps[gaps["arm"] == arm], longest, percentile)]
    ms = limits.floor(gaps, floors) if floors is not None and len(gaps) else None
    where = {"": ([0, longest], [ms, ms]), "2": ([ms, ms], [0, 100])}
    for panel, (x, y) in where.items():
        found.append(go.Scatter(
            x=x if ms else [], y=y if ms else [], mode="lines", xaxis=f"x{panel}", yaxis=f"y{panel}", name="limit",
            legendgroup="limit", showlegend=not panel and ms is not None,
            line={"color": limits.INK, "width": 2, "dash": "dash"},
            hovertemplate="limit: the least time for the bytes and FLOPs of a step<extra></extra>"))
    return found


def _arm(arm: str, own: pd.DataFrame, longest: int, percentile: float) -> list[dict[str, Any]]:
    """Gaps, the two lines and bands, the distribution, and the marks on it."""
    ms, colour = own["ms"].to_numpy(float), looks.colour(arm)
    kept = np.unique(np.linspace(0, len(ms) - 1, min(len(ms), POINTS)).round().astype(int)) if len(ms) else []
    found: list[dict[str, Any]] = [{
        "x": [int(i) + 1 for i in kept], "y": [float(ms[i]) for i in kept], "mode": "lines+markers", "name": arm,
        "legendgroup": arm, "showlegend": True, "opacity": 0.55, "line": {"color": colour, "width": 1},
        "marker": {"color": colour, "symbol": looks.symbol(arm), "size": 5},
        "customdata": [int(own.index[i]) for i in kept], "hovertemplate": f"{arm}: %{{y:.3g}} ms<extra></extra>"}]
    sure = {q: at for q in sorted({50.0, percentile}) if (at := stats.of(own, q / 100)) is not None}
    for q, dash in ((50.0, "solid"), (percentile, "dot")):
        band = sure.get(q)
        found += [
            {"x": [0, longest, longest, 0] if band else [],
             "y": [band.low, band.low, band.high, band.high] if band else [],
             "mode": "lines", "fill": "toself", "fillcolor": colour, "line": {"color": colour, "width": 0},
             "opacity": 0.2, "hoverinfo": "skip", **looks.unlisted(arm)},
            {"x": [0, longest] if band else [], "y": [band.value, band.value] if band else [], "mode": "lines",
             "line": {"color": colour, "width": 2, "dash": dash}, **looks.unlisted(arm),
             "hovertemplate": f"{arm} p{q:g}: %{{y:.3g}} ms<extra></extra>"}]
    order = np.sort(ms)
    found.append({"x": [float(order[i]) for i in kept], "y": [100 * (int(i) + 1) / len(ms) for i in kept],
                  "mode": "lines", "xaxis": "x2", "yaxis": "y2",
                  "line": {"color": colour, "width": 2, "shape": "hv", "dash": "solid"}, **looks.unlisted(arm),
                  "hovertemplate": f"{arm}: %{{y:.3g}} % take up to %{{x:.3g}} ms<extra></extra>"})
    values, lows, highs = ([getattr(at, name) for at in sure.values()] for name in ("value", "low", "high"))
    found.append({"x": values, "y": list(sure), "mode": "markers", "xaxis": "x2", "yaxis": "y2",
                  "marker": {"color": colour, "symbol": looks.symbol(arm), "size": 9},
                  "error_x": plots.bars(values, lows, highs, colour), **looks.unlisted(arm),
                  "hovertemplate": f"{arm} p%{{y:g}}: %{{x:.3g}} ms<extra></extra>"})
    return found


def _layout(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None, percentile: float) -> dict[str, Any]:
    gaps, low, high, longest = rows[rows["metric"] == "itl"], 0.1, 10.0, 100
    words = " and ".join(f"p{q:g}" for q in sorted({50.0, percentile}))
    found: dict[str, Any] = {"title.subtitle.text": plots.escape(caption),
                             "annotations[0].text": "<br>".join(NOTES).format(lines=words), "yaxis2.range": [0, 101]}
    if len(gaps):
        ms = limits.floor(gaps, floors) if floors is not None else None
        every = [*gaps["ms"].agg(["min", "max"]), *([ms] if ms is not None else [])]
        low, high, longest = min(every), max(every), int(gaps.groupby("arm").size().max())
    found |= {f"{axis}.{name}": value for axis in ("yaxis", "xaxis2") for name, value in panels.log(low, high).items()}
    return found | {"xaxis.range": [0, 1.02 * longest]}


def _cell(own: pd.DataFrame, q: float) -> str:
    if (at := stats.of(own, q / 100)) is None:
        return NONE
    return interval({"ms": at.value, "ms_low": at.low, "ms_high": at.high}, "ms")


def _ratio(at: Estimate) -> str:
    return f"{at.value:.2f} [{at.low:.2f}, {at.high:.2f}]"
