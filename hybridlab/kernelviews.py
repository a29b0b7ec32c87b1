"""Timed kernels of a decode step as figures: each operation, what each change buys, how fast memory is read.

Rows are those of `schemas.KERNELS`; a variant that was not timed is left out. Never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from hybridlab import kerneltables, panels, plots, stats
from hybridlab.errors import StatisticsError
from hybridlab.panels import Look
from hybridlab.report import interval, number

LOOKS = {"torch": Look("#808080", "circle"), "kernel": Look("#0072B2", "square"),
         "kernel, pdl": Look("#009E73", "triangle-up"), "fused, no graph": Look("#E69F00", "diamond", "dash"),
         "fused": Look("#0072B2", "square"), "fused, pdl": Look("#009E73", "triangle-up")}
FLOOR = Look("#222222", "circle", "dot")
LESS, MORE = "#8FD0B8", "#D55E00"  # what a change saves, and what it costs
CHANGES = (("", "torch", ""), ("torch", "fused", "fusing kernels"), ("fused", "fused, pdl", "starting early"))
APART, WIDE = 0.22, 0.34  # between two variants of one operation, and half of its floor
BAR, ROW = 0.62, 44       # height of a bar, in rows, and of a row, in px


def operations(rows: pd.DataFrame, caption: str) -> go.Figure:
    """Time of one call of each operation, in the order of the step, a mark a variant, and the floor as a line; a switch
    between contexts. Raises `StatisticsError` for rows of several runs, or without operations."""
    table = _found(rows, "op")
    ops, contexts = list(dict.fromkeys(table["op"])), _contexts(table) or [0]
    there = [name for name in LOOKS if name in set(table["variant"])]
    figure = panels.frame("Operations of a decode step, time of one call", caption, ["", ""], 360,
                          40 if len(contexts) > 1 else 0)
    top = float(table[["us", "us_high", "floor_us"]].astype(float).max(axis=None))
    panels.axes(figure, 1, [0, 1], [0, 1], y={"title": {"text": "time of one call (µs)"}, "range": [0, top * 1.08]}, x={
        "showgrid": False, "range": [-0.5, len(ops) - 0.5], "tickvals": list(range(len(ops))),
        "ticktext": [plots.escape(op).replace(" ", "<br>") for op in ops]})
    owners, layouts = list[str](), dict[str, dict[str, object]]()
    for context in contexts:
        name, shown = f"context {context:,}", table[table["context"].isin([0, context])]
        for place, variant in enumerate(there):
            _marks(figure, ops, shown[shown["variant"] == variant], variant, APART * (place - (len(there) - 1) / 2))
        for nth, line in enumerate(shown.drop_duplicates("op").to_dict("records")):
            figure.add_scatter(
                x=[ops.index(line["op"]) + aside for aside in (-WIDE, WIDE)], y=[line["floor_us"]] * 2, mode="lines",
                line={"color": FLOOR.colour, "width": 2}, name="floor", legendgroup="floor", showlegend=not nth,
                hovertemplate=f"floor %{{y:.3g}} µs: {_read(line)}<extra></extra>")
        owners += [name] * (len(figure.data) - len(owners))
        layouts[name] = {"title.subtitle.text": plots.escape(f"{name} · {caption}"), "annotations[0].text": (
            "floor: the least bytes of a call at the read rate measured beside it; in memory that no cache holds<br>"
            f"{_sizes(shown)}")}
    panels.switch(figure, owners, layouts, f"context {contexts[-1]:,}")
    return figure


def waterfall(rows: pd.DataFrame, caption: str) -> go.Figure:
    """The whole step from stock PyTorch to the floor: what fusing its kernels saves, starting them early, replaying
    them as a graph, and what is left; a switch between contexts. Raises as `operations`."""
    table = _found(rows, "step")
    bars = {f"context {context:,}": _bars(rows, table[table["context"] == context]) for context in _contexts(table)}
    count, room = max(map(len, bars.values())), 40 * (len(bars) > 1)
    figure = panels.frame("One decode step, and what each change of it saves", caption, ["", ""], ROW * count, room)
    end = 1.04 * float(table[["us", "us_high"]].astype(float).max(axis=None)) / 1e3
    panels.axes(figure, 1, [0, 1], [0, 1], x={"title": {"text": "time of one step (ms)"}, "range": [0, end]},
                y={"showgrid": False, "range": [0.5 - count, 0.5], "tickfont": {"size": 12}})
    figure.update_layout(margin_l=225, barmode="overlay", showlegend=False)
    owners, layouts = list[str](), dict[str, dict[str, object]]()
    for name, found in bars.items():
        for place, bar in enumerate(found):
            _bar(figure, -place, bar)
        owners += [name] * (len(figure.data) - len(owners))
        ticks = {"tickvals": [-place for place in range(len(found))], "ticktext": [bar["label"] for bar in found]}
        layouts[name] = {"title.subtitle.text": plots.escape(f"{name} · {caption}"), "annotations[0].text": (
            f"from 0: whole steps; between: differences, medians of those of each round<br>{_sizes(table)}"),
            **{f"yaxis.{key}": value for key, value in ticks.items()}}
    figure.update_yaxes(**ticks)
    panels.switch(figure, owners, layouts, name)
    return figure


def by_context(rows: pd.DataFrame, caption: str) -> go.Figure:
    """Bytes that a step must read over the time it takes, by length of context, beside the rate of a mere read. Raises
    as `operations`."""
    table = _found(rows, "step")
    contexts = _contexts(table)
    figure = panels.frame("How fast a decode step reads its weights and cache", caption, [
        "least bytes of a step over its median time; read rate: a reduction over memory that no cache holds, beside it",
        _sizes(table)], 360)
    top = float(table[["gbs", "read_gbs"]].max(axis=None))
    panels.axes(figure, 1, [0, 1], [0, 1], y={"title": {"text": "achieved (GB/s)"}, "range": [0, 1.12 * top]}, x={
        "title": {"text": "context (tokens, logarithmic)"}, "type": "log", "tickvals": contexts,
        "range": [math.log10(contexts[0] / 1.3), math.log10(contexts[-1] * 1.3)],
        "ticktext": [f"{context:,}" for context in contexts]})
    reads = table.drop_duplicates("context").assign(gbs=lambda own: own["read_gbs"], us_low=None)
    for variant in ("read rate", *dict.fromkeys(table["variant"])):
        look = LOOKS.get(variant, FLOOR)
        own = (reads if look is FLOOR else table[table["variant"] == variant]).sort_values("context")
        figure.add_scatter(
            x=own["context"].tolist(), y=own["gbs"].tolist(), mode="lines" if look is FLOOR else "lines+markers",
            name=variant, line={"color": look.colour, "width": look.width, "dash": look.dash},
            marker={"color": look.colour, "symbol": look.symbol, "size": 8},
            **_error(own["gbs"], own["bytes"] / own["us_high"] / 1e3, own["bytes"] / own["us_low"] / 1e3, look),
            customdata=["" if look is FLOOR else f", {100 * line['share']:.0f} % of the read rate; {_ms(line)}"
                        for line in own.to_dict("records")],
            hovertemplate=f"{variant}, context %{{x:,}}: %{{y:.4g}} GB/s%{{customdata}}<extra></extra>")
    return panels.legend(figure)


def _bars(rows: pd.DataFrame, own: pd.DataFrame) -> list[dict[str, Any]]:
    """The bars of one context from the top: whole steps, and between two of them what the change saves; in ms."""
    lines = {line["variant"]: line for line in own.to_dict("records")}
    context, found = int(own["context"].iloc[0]), list[dict[str, Any]]()
    for base, variant, word in CHANGES:
        if variant in lines:
            found += _change(rows, context, lines, base, variant, word)
            found.append(_whole(lines[variant]))
    best = next((name for name in ("fused, pdl", "fused", "torch") if name in lines), "fused, no graph")
    floor, line = float(own["floor_us"].iloc[0]) / 1e3, lines[best]
    beyond = line["us"] / 1e3 - floor
    found.append({"label": f"beyond reading<br>{number(beyond)} ms", "base": floor, "ms": beyond, "colour": "#C9C9C9",
                  "hover": f"{best}: {number(line['lost_us'])} µs at each of {line['kernels']:,} launches"})
    found.append({"label": f"floor<br>{number(floor)} ms", "base": 0.0, "ms": floor, "colour": FLOOR.colour,
                  "hover": _read(line)})
    if "fused, no graph" in lines:
        found += _change(rows, context, lines, "fused, no graph", best, "replaying as a graph")
        found.append(_whole(lines["fused, no graph"]))
    return found


def _whole(line: dict[str, Any]) -> dict[str, Any]:
    hover = (f"{line['variant']}: {_ms(line)}, {line['kernels']:,} launches, {100 * line['share']:.0f} % of the read "
             f"rate, n = {line['n']}")
    return {"label": f"{line['variant']}<br>{_ms(line)}", "base": 0.0, "ms": line["us"] / 1e3, "hover": hover,
            "colour": LOOKS[line["variant"]].colour, "whole": kerneltables.in_ms(line)}


def _change(rows: pd.DataFrame, context: int, lines: dict[str, Any], base: str, variant: str,
            word: str) -> list[dict[str, Any]]:
    """The bar between two steps, with its interval in the label; none where one of them was not timed."""
    found = kerneltables.compared(rows, "step", context, base, variant)
    if found is None or base == variant:
        return []
    saved = found.saved
    value, *sure = (f"{'−' if us > 0 else '+'}{number(abs(us) / 1e3)}" for us in (saved.value, saved.high, saved.low)
                    if math.isfinite(us))
    text = f"{value} [{', '.join(sure)}] ms" if sure else f"{value} ms"
    ends = sorted(lines[name]["us"] / 1e3 for name in (base, variant))
    times = f", {number(found.ratio.value)} times as fast" if found.ratio else ""
    return [{"label": f"{word}<br>{text}", "base": ends[0], "ms": ends[1] - ends[0],
             "hover": f"{variant} against {base}: {text}{times}, n = {saved.n} rounds",
             "colour": LESS if saved.value >= 0 else MORE}]


def _bar(figure: go.Figure, place: int, bar: dict[str, Any]) -> None:
    figure.add_bar(x=[bar["ms"]], y=[place], base=[bar["base"]], width=[BAR], orientation="h", text=[""],
                   name=bar["label"].partition("<br>")[0], hovertemplate=f"{bar['hover']}<extra></extra>",
                   marker={"color": bar["colour"], "line": {"color": bar["colour"], "width": 0},
                           "pattern": {"shape": ""}}, textfont={"size": 12, "color": FLOOR.colour})
    ms = bar.get("whole", {})
    if pd.notna(ms.get("ms_low")):
        figure.add_scatter(x=[ms["ms"]], y=[place], mode="markers", showlegend=False, hoverinfo="skip",
                           marker={"color": FLOOR.colour, "symbol": "circle", "size": 4},
                           error_x=plots.bars([ms["ms"]], [ms["ms_low"]], [ms["ms_high"]], FLOOR.colour))


def _marks(figure: go.Figure, ops: list[str], own: pd.DataFrame, variant: str, aside: float) -> None:
    look = LOOKS[variant]
    figure.add_scatter(
        x=[ops.index(op) + aside for op in own["op"]], y=own["us"].tolist(), mode="markers", name=variant,
        marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        **_error(own["us"], own["us_low"], own["us_high"], look),
        customdata=[f"{line['op']}, {variant}: {interval(line, 'us')} µs, {100 * line['share']:.0f} % of the read rate"
                    f"{'' if variant == 'torch' else ', × torch: ' + interval(line, 'ratio')}, n = {line['n']}"
                    for line in own.to_dict("records")], hovertemplate="%{customdata}<extra></extra>")


def _found(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    stats.one_run(rows)
    table = kerneltables.table(rows) if metric == "op" else kerneltables.steps(rows)
    if table.empty:
        raise StatisticsError(f"there are no rows of metric {metric!r}", f"{len(rows)} rows", "time a model first")
    return table


def _contexts(table: pd.DataFrame) -> list[int]:
    return sorted({int(context) for context in table["context"]} - {0})


def _error(values: pd.Series, low: pd.Series, high: pd.Series, look: Look) -> dict[str, Any]:
    """Bars of the intervals, where there are any."""
    if low.isna().any() or high.isna().any():
        return {}
    return {"error_y": plots.bars(values.tolist(), low.tolist(), high.tolist(), look.colour)}


def _sizes(own: pd.DataFrame) -> str:
    least, most = int(own["n"].min()), int(own["n"].max())
    ends = "; bars: 95 % intervals" if least >= stats.needed(0.5) else ": too few for intervals"
    return f"medians of n = {least:,}{f' to {most:,}' if most != least else ''} replays{ends}"


def _read(line: dict[str, Any]) -> str:
    return f"{number(line['bytes'] / 1e6)} MB at {number(line['read_gbs'])} GB/s"


def _ms(line: dict[str, Any]) -> str:
    return f"{interval(kerneltables.in_ms(line), 'ms')} ms"


FIGURES: dict[str, tuple[str, Callable[[pd.DataFrame, str], go.Figure]]] = {  # the metric that each is made of
    "operations": ("op", operations),
    "waterfall": ("step", waterfall),
    "by_context": ("step", by_context),
}
