"""Traces as figures: one token on a time line, where its time goes on host and device, and how long the device idles.

Traces are tables of `events.tidy` by arm. Never imports torch; names from outside are escaped here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hybridlab import boxes, events, gaps, looks, panels, plots
from hybridlab.boxes import Box
from hybridlab.errors import StatisticsError, TraceError
from hybridlab.panels import Look


class Class(NamedTuple):
    """How events of a class look: name in the legend, colour, and where in the height of a lane (0 to 1) they lie."""

    name: str
    colour: str
    low: float = 0.1
    high: float = 0.9


CLASSES = {  # from the lowest layer to the highest; Okabe-Ito and greys
    "token": Class("the token", "#EAEAEA"), "other": Class("of another token", "#C4C4C4"),
    "range": Class("range in it", "#757575", 0.5), "op": Class("PyTorch operation", "#56B4E9", 0.1, 0.45),
    "sync": Class("waiting call", "#CC79A7"), "launch": Class("launch call", "#E69F00"),
    "python": Class("kernel launched by Python", "#D55E00"), "graph": Class("kernel in a graph", "#0072B2"),
    "copy": Class("copy", "#009E73")}
LANES = {"range": "Python", "op": "Python", "launch": "launches", "sync": "launches", "kernel": "device",
         "copy": "device"}
LANE, HEADER = 28, 1.1  # px of a lane; height of the line above an arm's lanes, in lanes
NAMES = 170               # px for those of arms and lanes
NEAR = 24                # px between two points that answer the pointer inside a long event
ON_DEVICE, ON_HOST = "on the device, from the first to the last work of the token", "on the host, in the token's range"
CLOCKS = {ON_DEVICE: {"busy_us": "kernels and copies", gaps.LATE: "idle: launched late",
                      gaps.DEVICE: "idle: launched in time",
                      gaps.INSIDE: "idle: inside a graph", gaps.UNKNOWN: "idle: launch unknown"},
          ON_HOST: {"launch_us": "launch calls", "sync_us": "waiting", "ops_us": "operations", "python_us": "Python"}}
WHAT = ("idle: no kernel of the token runs; launched late: the call began after the work before it had ended",
        "Python: the rest of the range, on a GPU with what PyTorch does before it launches")
PARTS = {"busy_us": boxes.Look("#0072B2", "", "#FFFFFF"), gaps.LATE: boxes.Look("#D55E00", "x", "#111111"),
         gaps.DEVICE: boxes.Look("#F0B48A", "/", "#111111"), gaps.INSIDE: boxes.Look("#C9DDEC", ".", "#111111"),
         gaps.UNKNOWN: boxes.Look("#D9D9D9", "", "#111111"), "launch_us": boxes.Look("#E69F00", "", "#111111"),
         "sync_us": boxes.Look("#CC79A7", "/", "#111111"), "ops_us": boxes.Look("#56B4E9", "", "#111111"),
         "python_us": boxes.Look("#8C8C8C", ".", "#111111")}
OTHERS = ("#CC79A7", "#D55E00", "#56B4E9", "#000000")  # of names that begin with no arm


def token(traces: Mapping[str, pd.DataFrame], caption: str = "", token: int | None = None) -> go.Figure:
    """What happened during one token of each arm, µs since it began on the host: Python, launches, the device.

    Without a number it is the decode token of median host time of each arm, the shorter one of two. What ran meanwhile
    for other tokens is grey. Raises `StatisticsError` without a decode token, `TraceError` without this token.
    """
    found = {arm: _seen(trace, token) for arm, trace in _given(traces).items()}
    every = pd.concat([seen for seen, _ in found.values()])
    lanes = [lane for lane in dict.fromkeys(LANES.values()) if lane in set(every["lane"])]
    each, end = len(lanes) + HEADER, float(every["end"].max())
    chosen = "the decode token of median host time of each arm" if token is None else f"token {token} of each arm"
    notes = [f"{chosen}; 0: where it begins on the host", "hover: name, time, and what started it"]
    figure = panels.frame("One token, event by event", caption, notes, round(LANE * each * len(found)))
    room = boxes.plot_px(figure.update_layout(margin_l=NAMES))
    panels.axes(figure, 1, [0, 1], [0, 1], y={"showgrid": False, "showline": False, "ticks": "", "range": [
        -each * len(found), 0], **_ticks(lanes, list(found))}, x={
        "title": {"text": "time since the token began on the host (µs)"}, "range": [-0.004 * end, 1.02 * end]})
    for place, (seen, line) in enumerate(found.values()):
        top = -each * place - HEADER
        seen["floor"] = [top - 1.0 - lanes.index(lane) for lane in seen["lane"]]
        boxes.label(figure, 0, top - 0.02, line)
        _name(figure, seen, room / end)
    figure.update_annotations(font={"size": 12, "color": "#222222"}, selector={"xref": "x", "yanchor": "bottom"})
    every = pd.concat([seen for seen, _ in found.values()])
    for key, look in CLASSES.items():
        _layer(figure, every[every["class"] == key], look, end * NEAR / room)
    return panels.legend(figure)


def shares(traces: Mapping[str, pd.DataFrame], caption: str) -> go.Figure:
    """Where a decode token's time goes: on the device's clock above, on the host's below, parts as medians over the
    decode tokens of each arm. Raises `StatisticsError` for an arm without decode tokens."""
    found = {arm: parts(trace) for arm, trace in _given(traces).items()}
    clocks = {clock: {arm: ms for arm, ms in found.items() if any(ms.get(key) for key in names)}
              for clock, names in CLOCKS.items()}
    clocks = {clock: own for clock, own in clocks.items() if own}
    lines = sum(len(own) + 1 for own in clocks.values())
    counts = sorted({int(ms["n"]) for ms in found.values()})
    n = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    note = f"medians of each part over n = {n} decode tokens an arm; the sum stands behind a bar"
    figure = boxes.frame("Where the time of a decode token goes", caption, [note, *WHAT[-len(clocks):]], 32 * lines,
                         NAMES, below=60)
    top = 1.1 * max(sum(ms.get(key, 0) for key in CLOCKS[clock]) for clock, own in clocks.items()
                    for ms in own.values())
    drawn, ticks, place = list[Box](), dict[float, str](), 0
    for clock, own in clocks.items():
        boxes.label(figure, 0, -place - 0.3, clock)
        for nth, (arm, ms) in enumerate(own.items(), place + 1):
            drawn += _bars(figure, -nth, f"{plots.escape(arm)}, {clock}", CLOCKS[clock], ms, top)
            ticks[-nth] = boxes.fit(arm, NAMES - 20, 12)
        place += len(own) + 1
    boxes.draw(figure, drawn, PARTS, 0.72)
    for trace in figure.data:
        trace.name = CLOCKS[ON_DEVICE].get(trace.name) or CLOCKS[ON_HOST][trace.name]
    figure.update_yaxes(tickvals=list(ticks), ticktext=list(ticks.values()), range=[0.5 - lines, 0.4], showgrid=False,
                        showline=False, ticks="")
    figure.update_xaxes(title_text="time of one decode token (ms)", range=[0, top])
    return panels.legend(figure)


def gap_histogram(traces: Mapping[str, pd.DataFrame], caption: str) -> go.Figure:
    """Distribution of the gaps in which the device has nothing to do, as the share that is no longer; a line an arm.

    Gaps are those of the whole trace, between tokens too. Where no trace has any the figure says so.
    """
    idle = {arm: np.sort(gaps.gaps(trace)["us"].to_numpy(float)) for arm, trace in _given(traces).items()}
    idle = {arm: us for arm, us in idle.items() if len(us)}
    if not idle:
        return panels.frame("Gaps between kernels", caption, ["none: these traces hold no work of a device"], 60)
    sizes = "; ".join(f"{arm}: {len(us):,}, {_three(us.sum() / 1e3)} ms" for arm, us in idle.items())
    figure = panels.frame("Gaps between kernels, in which the device idles", caption, [
        *textwrap.wrap(f"gaps of the whole trace and their sum: {sizes}", 130, max_lines=6),
        "short ones lie between kernels that were launched in time, long ones wait for the host"], 360)
    every = np.concatenate(list(idle.values()))
    panels.axes(figure, 1, [0, 1], [0, 1], y={"title": {"text": "gaps no longer than this (%)"}, "range": [0, 103]}, x={
        "title": {"text": "gap (µs, logarithmic)"}, **panels.log(float(every.min()), float(every.max()))})
    for number, (arm, us) in enumerate(idle.items()):
        colour = looks.COLOURS.get(arm.partition(" ")[0], OTHERS[number % len(OTHERS)])
        kept = np.unique(np.linspace(0, len(us) - 1, min(len(us), panels.POINTS)).round().astype(int))
        panels.line(figure, [float(us[0]), *us[kept].tolist()], [0.0, *(100 * (kept + 1) / len(us)).tolist()],
                    Look(colour, "circle", looks.dash(arm)), arm, 1, "%{y:.3g} % of gaps take %{x:.3g} µs or less",
                    listed=True)
    return panels.legend(figure)


def parts(trace: pd.DataFrame) -> dict[str, float]:
    """Medians over the decode tokens of a trace, ms: the parts of CLOCKS, on a GPU without ops_us,
    which spans launches; and n, the number of tokens."""
    table = _decode(trace)
    causes = [gaps.gaps(events.of_token(trace, int(number))).groupby("cause")["us"].sum() for number in table["token"]]
    on_gpu = bool(table[["launches", "kernels"]].any(axis=None))
    names = ["busy_us", "launch_us", "sync_us", "python_us", *["ops_us"] * (not on_gpu)]
    idle = {cause: float(np.median([own.get(cause, 0.0) for own in causes])) / 1e3 for cause in gaps.CAUSES}
    return {"n": len(table), **idle, **{name: float(table[name].median()) / 1e3 for name in names}}


def _bars(figure: go.Figure, y: float, where: str, names: Mapping[str, str], ms: Mapping[str, float],
          top: float) -> list[Box]:
    """The parts of a bar one behind the other, and behind them their sum."""
    found, x, scale = list[Box](), 0.0, boxes.plot_px(figure) / top
    for key, word in names.items():
        if ms.get(key):
            found.append(Box(key, x, ms[key], y, boxes.whole(_three(ms[key]), ms[key] * scale - 4),
                             f"{where}<br>{word}: {ms[key]:.4g} ms"))
            x += ms[key]
    figure.add_annotation(text=f"{_three(x)} ms", x=x, y=y, xref="x", yref="y", xanchor="left", yanchor="middle",
                          xshift=5, showarrow=False, font={"size": 12, "color": "#222222"})
    return found


def _three(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _given(traces: Mapping[str, pd.DataFrame]) -> Mapping[str, pd.DataFrame]:
    if not traces:
        raise StatisticsError("there is no trace to draw", "", "record one")
    return traces


def _decode(trace: pd.DataFrame) -> pd.DataFrame:
    table = gaps.by_token(trace)
    own = table[table["category"] == "decode"]
    if own.empty:
        raise StatisticsError("the trace has no decode token", f"{len(table)} tokens", "trace two tokens or more")
    return own


def _seen(trace: pd.DataFrame, number: int | None) -> tuple[pd.DataFrame, str]:
    """What to draw of one token, a row an event: start and end (µs since the token began), class, lane, name, text;
    and what the line above it says."""
    table = gaps.by_token(trace) if number is not None else _decode(trace)
    order = table.sort_values(["host_us", "token"])["token"]
    number = int(order.iloc[(len(order) - 1) // 2]) if number is None else number
    spans = events.tokens(trace)
    if number not in spans.index:
        raise TraceError(f"there is no token {number}", f"the trace has {len(spans)} tokens, counted from 0")
    own, line = spans.loc[number], table.set_index("token").loc[number]
    mine = (events.holders(trace, spans) == number).fillna(False).to_numpy(bool)
    last = max(int(own["end_ns"]), int(trace.loc[mine, "end_ns"].max()))
    meanwhile = (trace["end_ns"] > own["start_ns"]) & (trace["start_ns"] < last)
    here = (trace["thread"] == own["thread"]).fillna(False) | trace["kind"].isin(events.DEVICE)
    shown = (meanwhile & here).to_numpy(bool)
    seen = _outermost(trace[shown].assign(mine=mine[shown]))
    begun = events.launches(trace)
    calls = seen["correlation"].astype(object).map(begun["name"].to_dict()).astype(object).fillna("").astype(str)
    at = (seen["correlation"].map(begun["start_ns"]).astype("float64") - own["start_ns"]) / 1e3
    seen["class"] = _classes(seen, calls, (int(own["start_ns"]), int(own["end_ns"])))
    seen["lane"] = seen["kind"].map(LANES)
    for name in ("start", "end"):
        seen[name] = (seen[f"{name}_ns"].clip(own["start_ns"], last) - own["start_ns"]) / 1e3
    seen["text"] = [_about(row, call, since, int(own["start_ns"]))
                    for row, call, since in zip(seen.to_dict("records"), calls, at, strict=True)]
    return seen, _summary(line)


def _outermost(seen: pd.DataFrame) -> pd.DataFrame:
    """Without operations that another one called."""
    ops = seen[seen["kind"] == "op"]
    inside = ops["start_ns"] < ops["end_ns"].cummax().shift(fill_value=-1)
    return seen.drop(index=ops.index[inside])


def _classes(seen: pd.DataFrame, calls: pd.Series, span: tuple[int, int]) -> np.ndarray:
    """The key of CLASSES of each event; `span`: start and end of the token's range."""
    kernel, kind = seen["kind"] == "kernel", seen["kind"]
    replayed = seen["graph"].notna() | calls.str.contains("GraphLaunch")
    itself = (kind == "range") & (seen["start_ns"] == span[0]) & (seen["end_ns"] == span[1]) & (
        seen["category"].isin(events.TOKEN))
    return np.select([~seen["mine"] & (kind != "sync"), itself, kernel & replayed, kernel],
                     ["other", "token", "graph", "python"], kind.to_numpy(dtype=object))


def _about(row: dict[str, Any], call: str, since: float, origin: int) -> str:
    length, start = (row["end_ns"] - row["start_ns"]) / 1e3, (row["start_ns"] - origin) / 1e3
    lines = [_wrapped(row["name"]), f"{length:{',.0f' if length >= 1000 else '.4g'}} µs from {start:,.1f} µs on"]
    if row["kind"] in events.DEVICE:
        node = f"node {row['node']} of a graph, " if pd.notna(row["node"]) else ""
        lines.append(f"{node}started by {_wrapped(call)} at {since:,.1f} µs" if call else "its launch is not known")
    if pd.notna(row["payload"]):
        lines.append(f"{'position' if row['category'] in events.TOKEN else 'payload'} {row['payload']}")
    return "<br>".join(lines + ["of another token"] * (row["class"] == "other"))


@lru_cache(4096)
def _wrapped(text: str) -> str:
    return "<br>".join(boxes.wrap(text))


def _summary(line: pd.Series) -> str:
    host, at_work, span = (_three(line[name] / 1e3) for name in ("host_us", "busy_us", "device_us"))
    device = f" · device busy {at_work} of {span} ms · kernels: {line['kernels']:,} · launches: {line['launches']:,}"
    return f"{host} ms on the host{device if line['kernels'] else ''}"


def _ticks(lanes: list[str], arms: list[str]) -> dict[str, Any]:
    """Names of arms above those of their lanes; they stay where they are while a reader zooms in on a time."""
    steps = [HEADER - 0.26, *(HEADER + 0.5 + place for place in range(len(lanes)))]
    return {"tickvals": [-(len(lanes) + HEADER) * place - step for place in range(len(arms)) for step in steps],
            "ticktext": [name for arm in arms for name in (boxes.fit(arm, NAMES - 20, 12), *lanes)]}


def _name(figure: go.Figure, seen: pd.DataFrame, scale: float) -> None:
    """Names of ranges over them, where there is room; `scale` in px a µs."""
    middle = (CLASSES["range"].low + CLASSES["range"].high) / 2
    for row in seen[seen["class"] == "range"].itertuples():
        text = boxes.whole(str(row.name), (row.end - row.start) * scale - 8)
        if text:
            figure.add_annotation(text=text, x=(row.start + row.end) / 2, y=row.floor + middle, xref="x", yref="y",
                                  xanchor="center", yanchor="middle", showarrow=False,
                                  font={"size": 9, "color": "#FFFFFF"})


def _layer(figure: go.Figure, own: pd.DataFrame, look: Class, apart: float) -> None:
    """All events of a class as one filled path, points that answer the pointer every `apart` µs, and a legend entry."""
    if own.empty:
        return
    start, end, floor = (own[name].to_numpy(float) for name in ("start", "end", "floor"))
    low, high, nothing = floor + look.low, floor + look.high, np.full(len(own), np.nan)
    x = np.stack([start, start, end, end, nothing], axis=1).ravel()
    y = np.stack([low, high, high, low, nothing], axis=1).ravel()
    shared: dict[str, Any] = {"mode": "lines", "name": look.name, "legendgroup": look.name, "showlegend": False,
                              "line": {"color": look.colour, "width": 0}}
    figure.add_scatter(x=_gapped(x), y=_gapped(y), fill="toself", fillcolor=look.colour, hoverinfo="skip", **shared)
    times = np.maximum(1, np.ceil((end - start) / apart)).astype(int)
    nth = np.concatenate([np.arange(n) for n in times])
    every = np.repeat(start, times) + np.repeat((end - start) / times, times) * (nth + 0.5)
    figure.add_scatter(x=every.round(3).tolist(), y=np.repeat((low + high) / 2, times).tolist(), **shared,
                       customdata=np.repeat(own["text"].to_numpy(object), times).tolist(),
                       hovertemplate="%{customdata}<extra></extra>")
    figure.add_scatter(x=[None], y=[None], **shared | {"mode": "markers", "showlegend": True, "hoverinfo": "skip",
                       "marker": {"color": look.colour, "symbol": "square", "size": 10}})


def _gapped(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.round(3).tolist()]


FIGURES: dict[str, Callable[[Mapping[str, pd.DataFrame], str], go.Figure]] = {
    "token": token,
    "shares": shares,
    "gaps": gap_histogram,
}
