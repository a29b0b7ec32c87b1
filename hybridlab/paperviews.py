"""A reproduction of the paper as figures: what was measured, and published numbers in panels of their own.

Rows are those of `schemas.PAPER`, of one run. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from hybridlab import limits, looks, panels, papertables, plots, published, stats
from hybridlab.papersamples import NOT_MEASURED, TIMED, by_length, few, needs, served_as
from hybridlab.stats import Estimate

PUBLISHED = {"Hybrid": "triangle-down", "TensorRT-LLM": "x", "HuggingFace eager": "cross"}  # no arm has these symbols
UNPUBLISHED = "nothing published"
INK, HEIGHT = "#7A3E9D", 330                                                               # px


def table1(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """Table I as curves: measured TTFT by prompt length, with floors the limit, and the published points beside them.
    """
    figure = _frame("Table I: time to first token by prompt length", caption, [[0, 0.62], [0.72, 1]],
                    ["Left: measured in this run, medians with 95 % intervals."])
    _lines(figure, by_length(rows, "ttft", "median"), 1)
    limits.by_length(figure, floors)
    _points(figure, "table1", 2)
    _titles(figure, ["measured here: TTFT, median (ms)", "published: TTFT (ms)"], "prompt tokens")
    return _done(figure, [few(rows, "ttft", "median"), UNPUBLISHED])


def table2(rows: pd.DataFrame, caption: str) -> go.Figure:
    """Table II as curves: measured P99 per token by generation length, with a KV cache, with the whole sequence
    recomputed, and the published points beside them."""
    note = (f"Left and middle: of this run, P99 of the gaps of so many first tokens where n ≥ {stats.needed(0.99)}; "
            "bars: 95 % intervals where requests allow them.")
    figure = _frame("Table II: P99 per token by generation length", caption, [[0, 0.27], [0.365, 0.635], [0.73, 1]],
                    [note])
    for number, part in enumerate(papertables.PARTS, 1):
        _lines(figure, by_length(rows, part, "p99"), number)
    _points(figure, "table2", 3)
    _titles(figure, ["KV cache: P99 (ms)", "whole sequence: P99 (ms)", "published: P99 (ms)"], "new tokens")
    return _done(figure, [*(few(rows, part, "p99") for part in papertables.PARTS), UNPUBLISHED])


def by_position(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """Gaps by position: with a KV cache, with floors beside the limit, and with the whole sequence computed again for
    every token."""
    figure = _frame("Gap between two tokens by position", caption, [[0, 0.44], [0.56, 1]],
                    ["Medians over 32 positions in a row; bars: 95 % intervals where requests allow them."])
    for number, part in enumerate(papertables.PARTS, 1):
        table = papertables.by_position(rows, part)
        _lines(figure, [(one.arm, one.position, Estimate(one.p50, one.p50_low, one.p50_high, one.n))
                        for one in table.itertuples()], number)
    if floors is not None:
        limits.by_position(figure, floors[floors["position"].isna() | (floors["position"] <= rows["position"].max())])
    _titles(figure, ["KV cache: median (ms)", "whole sequence: median (ms)"], "position of the token")
    return _done(figure, [needs(_most(rows[rows["part"] == part]), "median") for part in papertables.PARTS])


def ablations(rows: pd.DataFrame, caption: str) -> go.Figure:
    """What leaving out a part costs, measured, and the published increases in a panel of their own."""
    table = papertables.effects(rows)
    figure = _frame("Ablations: how much longer without it", caption, [[0, 0.62], [0.72, 1]],
                    ["Left: increase of the mean, measured in this run, with 95 % intervals."], left=235)
    for place, one in enumerate(table.itertuples()):
        if one.mean is not None:
            _effect(figure, place, one.mean, one.what)
        if one.published is not None:
            figure.add_scatter(x=[100 * one.published], y=[place], mode="markers", **_panel(2), showlegend=True,
                               name=f"published ({one.source})", marker={"color": INK, "symbol": "x", "size": 11},
                               hovertemplate=f"{one.what}, published: %{{x:.3g}} %<extra></extra>")
    ticks = {"tickvals": list(range(len(table))), "range": [-0.6, max(len(table), 1) - 0.4]}
    figure.update_layout(yaxis={**ticks, "ticktext": list(table["what"])},
                         yaxis2={**ticks, "ticktext": [""] * len(table)},
                         xaxis_title_text="measured here: increase of the mean (%)",
                         xaxis2={"title": {"text": "published: increase (%)"}, "range": [0, 33]})
    return _done(figure, [needs(int(table["n"].max()) if len(table) else 0, "change of the mean"), UNPUBLISHED])


def protocol(rows: pd.DataFrame, caption: str) -> go.Figure:
    """First calls in a fresh process, mean ± std as published, beside warm interleaved medians of the same arms."""
    figure = _frame("The published protocol and a sound one", caption, [[0, 0.44], [0.56, 1]],
                    ["Left: mean of five first calls in a fresh process, bars: ± one standard deviation.",
                     "Right: warm, interleaved, medians with 95 % intervals."])
    own = rows[(rows["part"] == "protocol") & (rows["metric"] == "first")]
    cold = [(served_as(system, cell)[0], tokens, _spread(cell["value"]))
            for (system, tokens), cell in own.groupby(["arm", "tokens"], sort=False)]
    _lines(figure, cold, 1)
    arms = {arm for arm, _, _ in cold}
    _lines(figure, [line for line in by_length(rows, "ttft", "median") if line[0] in arms], 2)
    _titles(figure, ["five first calls: mean (ms, logarithmic)", "warm: median (ms)"], "prompt tokens")
    if cold:
        values = [found.value for _, _, found in cold]
        figure.update_layout(yaxis=panels.log(min(values), max(found.high for _, _, found in cold)))
    return _done(figure, [NOT_MEASURED, few(rows[rows["arm"].isin(arms)], "ttft", "median")])


def _spread(values: pd.Series) -> Estimate:
    """Mean ± one standard deviation, as published."""
    mean, std = values.mean(), values.std()
    return Estimate(mean, max(0.0, mean - std), mean + std, len(values))


LIMITED = ("table1", "by_position")  # figures of latencies that have a limit
FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., go.Figure]]] = {  # name: (parts, how)
    "table1": (("ttft",), table1), "table2": (("cached", "recomputed"), table2),
    "by_position": (("cached", "recomputed"), by_position), "ablations": (("capture", "cached"), ablations),
    "protocol": (("protocol", "ttft"), protocol)}


def drawn(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> dict[str, go.Figure]:
    """Every figure whose parts the rows hold, by its name."""
    there = set(rows["part"])
    return {name: figure(rows, caption, *([floors] if name in LIMITED else []))
            for name, (parts, figure) in FIGURES.items() if there >= set(parts)}


def _frame(title: str, caption: str, domains: Sequence[list[float]], notes: Sequence[str], left: int = 75) -> go.Figure:
    figure = panels.frame(title, caption, notes, HEIGHT)
    figure.update_layout(margin_l=left)
    for number, across in enumerate(domains, 1):
        panels.axes(figure, number, across, [0, 1])
    return figure


def _lines(figure: go.Figure, cells: Sequence[tuple[str, Any, Estimate]], number: int) -> None:
    """One line an arm in one panel; its entry in the legend is that of all panels."""
    for arm in dict.fromkeys(arm for arm, _, _ in cells):
        own = [(x, found) for name, x, found in cells if name == arm]
        values, lows, highs = ([getattr(found, name) for _, found in own] for name in ("value", "low", "high"))
        figure.add_scatter(
            x=[x for x, _ in own], y=values, mode="lines+markers", **looks.legend(arm), **_panel(number),
            line={"color": looks.colour(arm), "width": 2, "dash": looks.dash(arm)},
            marker={"color": looks.colour(arm), "symbol": looks.symbol(arm), "size": 7},
            error_y=plots.bars(values, lows, highs, looks.colour(arm)),
            customdata=[f"[{low:.3g}, {high:.3g}]" if low <= high else "(no interval)"
                        for low, high in zip(lows, highs, strict=True)],
            hovertemplate=f"{arm}, %{{x}} tokens: %{{y:.3g}} ms %{{customdata}}<extra></extra>")


def _points(figure: go.Figure, table: str, number: int) -> None:
    """Published points, never joined by a line: between them nothing is known."""
    cells = published.table(table).dropna(subset=["value"])
    for system, own in cells.groupby("system", sort=False):
        sources = ", ".join(sorted({word for text in own["source"] for word in text.split()}))
        figure.add_scatter(
            x=own["tokens"].tolist(), y=own["value"].tolist(), mode="markers", **_panel(number),
            name=f"published: {system} ({sources})", showlegend=True,
            marker={"color": INK, "symbol": PUBLISHED[str(system)], "size": 10}, customdata=own["source"].tolist(),
            hovertemplate=f"published, {system}, %{{x}} tokens: %{{y}} ms (%{{customdata}})<extra></extra>")


def _most(own: pd.DataFrame) -> int:
    """The most timed values of an arm."""
    return int(own.loc[own["metric"].isin(TIMED), "arm"].value_counts().max()) if len(own) else 0


def _effect(figure: go.Figure, place: int, found: Estimate, what: str) -> None:
    value, low, high = 100 * found.value, 100 * found.low, 100 * found.high
    figure.add_scatter(x=[value], y=[place], mode="markers", name="measured here", legendgroup="measured",
                       showlegend=not any(trace.name == "measured here" for trace in figure.data),
                       marker={"color": looks.COLOURS["hybrid"], "symbol": "circle", "size": 9},
                       error_x=plots.bars([value], [low], [high], looks.COLOURS["hybrid"]),
                       hovertemplate=f"{what}: %{{x:+.3g}} % [{low:+.3g}, {high:+.3g}]<extra></extra>")


def _panel(number: int) -> dict[str, str]:
    return {"xaxis": f"x{panels.no(number)}", "yaxis": f"y{panels.no(number)}"}


def _titles(figure: go.Figure, up: Sequence[str], across: str) -> None:
    """Titles of the axes, and ranges that begin at 0, the same across all panels."""
    longest = max((x for trace in figure.data for x in trace.x), default=1)
    for number, title in enumerate(up, 1):
        tops = [value + (trace.error_y.array[i] if trace.error_y.array else 0) for trace in figure.data
                if trace.yaxis == _panel(number)["yaxis"] for i, value in enumerate(trace.y)]
        end = panels.no(number)
        figure.update_layout({f"xaxis{end}": {"title": {"text": across}, "range": [0, 1.04 * longest]},
                              f"yaxis{end}": {"title": {"text": title}, "range": [0, 1.1 * max(tops, default=1.0)]}})


def _done(figure: go.Figure, why: Sequence[str]) -> go.Figure:
    """The finished figure; a panel without values says why, in the words given for it, and its axes have no numbers."""
    for number, words in enumerate(why, 1):
        if all((trace.yaxis or "y") != _panel(number)["yaxis"] for trace in figure.data):
            panels.empty(figure, number, words)
    return panels.legend(looks.one_entry_an_arm(figure))
