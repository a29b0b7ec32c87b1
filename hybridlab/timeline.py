"""A cache run as interactive figures: its request stream, hit rate and bytes over time, what captures cost and disturb.

Rows are those of `schemas.CACHE`. Never imports torch.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hybridlab import limits, panels, plots, stats, tallies
from hybridlab.errors import choose
from hybridlab.panels import Look

MARKED = stats.needed(0.5)      # values from which a median has an interval


EVENTS = {"failures": ("failed", Look("#000000", "x")), "evictions": ("evicted", Look("#D55E00", "triangle-down")),
          "captures": ("captured", Look("#009E73", "triangle-up"))}  # from the lowest line to the highest
OUTCOMES = dict(zip(tallies.OUTCOMES, (Look("#0072B2", "circle"), Look("#CC79A7", "square"), Look("#E69F00", "diamond"),
                                       Look("#4D4D4D", "triangle-up")), strict=True))
LOOKS = tuple(Look(colour, symbol, dash) for dash in ("solid", "dash", "dot") for colour, symbol in zip(
    ("#4D4D4D", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"),  # a grey and Okabe-Ito
    ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x"), strict=True))
WAYS = (*LOOKS[1:7], *LOOKS[8:14])  # without greys, which are what nothing disturbs
JIT, REPLAY = Look("#E69F00", "diamond", "dash"), Look("#0072B2", "circle", "dot")


def stream(rows: pd.DataFrame, caption: str, setting: str | None = None) -> go.Figure:
    """The first pass of each setting, request by request: what served it, captures and evictions, what is held.

    A switch between settings is part of the figure, so that it works in an exported page; `setting` shows one alone.
    Raises `ConfigError` for a setting that is not there.
    """
    table = tallies.requests(rows)
    names = tallies.settings(table) if setting is None else [choose("setting", setting, tallies.settings(table))]
    count, most = int(table["request"].max()) + 1, tallies.binary(table["graph_bytes"].max())
    figure = panels.frame("Request stream, one mark a request", "", ["", ""], 480, 40 if len(names) > 1 else 0)
    heights, axes = ([0.46, 1], [0.31, 0.42], [0.16, 0.27], [0.0, 0.11]), ("y", "y2", "y3", "y4")
    titles = ("prompt length (tokens)", "", f"held ({most[1]})", "graphs")
    for number, (domain, title) in enumerate(zip(heights, titles, strict=True), 1):
        panels.axes(figure, number, [0, 1], domain, x={"range": [0, count + 1], **(
            {"showticklabels": False, "matches": "x4"} if number < 4 else {"title": {"text": "request"}})},
            y={"title": {"text": title}})
    figure.update_yaxes(tickvals=[0, 1, 2], ticktext=[word for word, _ in EVENTS.values()], range=[-0.7, 2.7],
                        showgrid=False, selector={"anchor": "x2"})
    tops = (table["prompt_tokens"].max(), None, table["graph_bytes"].max() / most[0], table["graphs"].max())
    for axis, top in zip(axes, tops, strict=True):
        if top is not None:
            figure.update_yaxes(range=[0, float(top) * 1.12 or 1], selector={"anchor": axis.replace("y", "x")})
    owners: list[str] = []
    layouts: dict[str, dict[str, object]] = {}
    for name in names:
        own = table[table["setting"] == name]
        own = own[own["round"] == own["round"].min()]
        _stream(figure, own, most[0])
        owners += [name] * (len(figure.data) - len(owners))
        passes = table.loc[table["setting"] == name, "round"].nunique()
        layouts[name] = {"title.subtitle.text": plots.escape(f"{name} · {caption}"),
                         "annotations[0].text": _stream_note(own, passes)}
    changes = table.groupby("setting")[tallies.HAPPENED].sum().sum(axis=1)  # shown first: where most happens
    panels.switch(figure, owners, layouts, max(names, key=lambda name: float(changes[name])))
    return figure


def over_time(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """Hit rate, time to first token and memory over the requests of the stream, a line a setting, all passes."""
    table = tallies.requests(rows)
    count = int(table["request"].max()) + 1
    window, most = max(5, count // 10), tallies.binary(table["graph_bytes"].max())
    figure = panels.frame("From a cold cache: hit rate, first tokens and memory over the stream", caption, [
        f"hit rate and median: of the last {window} requests, fewer at the start; memory: mean of passes",
        f"{tallies.passes(table)} a setting, n = {count:,} requests a pass"], 520)
    for number, (domain, title) in enumerate(zip(([0.7, 1], [0.35, 0.63], [0, 0.28]), (
            "replayed (%)", "first token (ms)", f"held ({most[1]})"), strict=True), 1):
        panels.axes(figure, number, [0, 1], domain, y={"title": {"text": title}}, x={"range": [0, count + 1], **(
            {"showticklabels": False, "matches": "x3"} if number < 3 else {"title": {"text": "request"}})})
    tops = [100.0, 0.0, 0.0]
    for look, name in zip(_cycle(table), tallies.settings(table), strict=True):
        own = table[table["setting"] == name]
        hits = own.groupby("request")["hit"].mean().rolling(window, min_periods=1).mean() * 100
        wide = own.pivot_table(index="request", columns="round", values="ms").sort_index()
        medians = [float(np.nanmedian(wide.to_numpy()[max(0, i + 1 - window):i + 1])) for i in range(len(wide))]
        held = own.groupby("request")["graph_bytes"].mean() / most[0]
        for number, (values, unit) in enumerate(((hits.tolist(), "% replayed"), (medians, "ms"),
                                                 (held.tolist(), most[1])), 1):
            panels.line(figure, [r + 1 for r in wide.index], values, look, name, number,
                  f"request %{{x}}: %{{y:.3g}} {unit}", listed=number == 1)
            tops[number - 1] = max(tops[number - 1], *values)
    for number, top in enumerate(tops, 1):
        figure.update_layout({f"yaxis{panels.no(number)}.range": [0, top * 1.08 or 1]})
    limits.by_request(figure, table.drop_duplicates("request").sort_values("request"), floors, window, "2")
    return panels.legend(figure)


def first_tokens(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """Distribution of the time to first token under each setting as the share that takes longer: the tail."""
    table = tallies.requests(rows)
    figure = panels.frame("Time to first token over the stream, by setting", caption, [
        f"markers: p50, and p99 from {stats.needed(0.99)} values on; bars: 95 % intervals",
        tallies.sizes(table, "first tokens a setting")], 330)
    first, most = table.assign(metric="ttft"), int(table.groupby("setting").size().max())
    times = [*table["ms"], *limits.stands(first, floors)]
    panels.tails(figure, dict(iter(table.groupby("setting"))), dict(
        zip(tallies.settings(table), LOOKS * len(table), strict=False)), 1, "time to first token",
        (min(times), max(times), most))
    limits.upright(figure, first, floors, *panels.shares(most))
    return panels.legend(figure)


def costs(rows: pd.DataFrame, caption: str) -> go.Figure:
    """By prompt length: what a capture costs, what a replay saves, what a graph holds, how many reuses repay it."""
    table = tallies.break_even(rows)
    most = tallies.binary(table["graph_bytes"].max())
    figure = panels.frame("What a captured graph costs, and when it pays", caption, [
        "cost: rehearsal, capture and instantiation; reuses: cost / (JIT − replay); memory: what this graph added",
        f"points: medians of {tallies.sizes(table, 'captures', table['n'])}; bars: 95 % intervals"], 480)
    titles = ("one capture (ms)", "one first token (ms)", f"one graph ({most[1]})", "reuses that repay it")
    low, high = table["prompt_tokens"].min(), table["prompt_tokens"].max()
    columns = ("cost_ms", "", "graph_bytes", "reuses")
    for number, title in enumerate(titles, 1):
        across, up = [0.0, 0.45] if number % 2 else [0.56, 1.0], [0.57, 1.0] if number < 3 else [0.0, 0.43]
        lengths = sorted(table["prompt_tokens"].unique())
        panels.axes(figure, number, across, up, y={"title": {"text": title}}, x={
            "type": "log", "range": [math.log10(low / 1.3), math.log10(high * 1.3)], "tickvals": lengths,
            "ticktext": [f"{length}" for length in lengths], "title": {"text": "prompt (tokens)" * (number > 2)}})
    scales = {"cost_ms": 1.0, "graph_bytes": most[0], "reuses": 1.0}
    for look, name in zip(_cycle(table, skip=3), tallies.settings(table), strict=True):
        own = table[table["setting"] == name]
        for number, column in enumerate(columns, 1):
            known = own[np.isfinite(own[column])] if column else own.iloc[:0]
            _points(figure, known["prompt_tokens"], known.get(column, known["n"]) / scales.get(column, 1.0), look,
                    name, number, known if column == "reuses" else None)
    for look, column, name in ((JIT, "jit_ms", "launched by JIT"), (REPLAY, "replay_ms", "replayed")):
        middle = table.groupby("prompt_tokens")[column].median()
        _points(figure, middle.index.to_series(), middle, look, name, 2, None)
    peaks = (table["cost_ms"], table[["jit_ms", "replay_ms"]].max(axis=1), table["graph_bytes"] / most[0],
             table[["reuses", "high"]].replace(math.inf, math.nan).max(axis=1))
    for number, peak in enumerate(peaks, 1):
        figure.update_layout({f"yaxis{panels.no(number)}.range": [0, float(np.nan_to_num(peak.max())) * 1.12 or 1]})
    return panels.legend(figure)


def disturbed(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """Distribution of the gaps between decode tokens by way of capturing; left those in which a capture was under way,
    beside the gaps of decoding without any."""
    own = tallies.part(rows, "disturb")
    made = own[own["metric"] == "capture"].groupby("setting")[["captures", "failures"]].sum()
    labels = {name: f"{name} ({line.captures} of {line.captures + line.failures} captured)"
              for name, line in made.iterrows() if line.failures}  # what captures nothing disturbs little
    gaps = own[own["metric"] == "itl"].replace({"setting": labels})
    ways = [way for way in tallies.settings(gaps) if way != "quiet"]
    names = {"quiet": LOOKS[0], **dict(zip(ways, WAYS * len(ways), strict=False))}
    under_way = gaps["capturing"].astype(bool)
    figure = panels.frame("Gap between two tokens while graphs are captured behind", caption, [
        f"markers: p50, and p99 from {stats.needed(0.99)} values on; bars: 95 % intervals; quiet: no capture at all",
        "; ".join([tallies.sizes(gaps[under_way], "gaps a way while a capture is under way"),
                   tallies.sizes(gaps[~under_way], "otherwise")])], 330)
    quiet = gaps[gaps["setting"] == "quiet"]
    sides = pd.concat([quiet, gaps[under_way]]), gaps[~under_way]
    placed = gaps.assign(position=gaps["prompt_tokens"] + gaps["index"])
    times, most = [*gaps["ms"], *limits.stands(placed, floors)], int(gaps.groupby("setting").size().max())
    for number, (side, words) in enumerate(zip(sides, ("while a capture is under way", "otherwise"), strict=True), 1):
        panels.axes(figure, number, [[0, 0.46], [0.56, 1]][number - 1], [0, 1])
        panels.tails(figure, dict(iter(side.groupby("setting"))), names, number,
               f"gap {words}", (min(times), max(times), most))
        limits.upright(figure, placed, floors, *panels.shares(most), panels.no(number))
    return panels.legend(figure)


def _stream(figure: go.Figure, own: pd.DataFrame, scale: float) -> None:
    """The traces of one pass: requests, events, bytes and graphs held."""
    for outcome, look in OUTCOMES.items():
        some = own[own["outcome"] == outcome]
        if len(some):
            figure.add_scatter(x=(some["request"] + 1).tolist(), y=some["prompt_tokens"].tolist(), mode="markers",
                               marker={"color": look.colour, "symbol": look.symbol, "size": 8}, name=outcome,
                               customdata=[_about(row) for row in some.itertuples()],
                               hovertemplate="%{customdata}<extra></extra>")
    for height, (column, (word, look)) in enumerate(EVENTS.items()):
        some = own[own[column] > 0]
        figure.add_scatter(x=(some["request"] + 1).tolist(), y=[height] * len(some), xaxis="x2", yaxis="y2",
                           mode="markers", marker={"color": look.colour, "symbol": look.symbol, "size": 8},
                           name=word, showlegend=False, customdata=some[column].tolist(),
                           hovertemplate=f"request %{{x}}: %{{customdata}} {word}<extra></extra>")
    for number, column, unit in ((3, "graph_bytes", scale), (4, "graphs", 1.0)):
        panels.line(figure, (own["request"] + 1).tolist(), (own[column] / unit).tolist(), LOOKS[0], column,
                    number, "request %{x}: %{y:.4g}", listed=False)


def _about(row: Any) -> str:
    bucket = f", bucket {int(row.bucket)}" if pd.notna(row.bucket) else ""
    lines = [f"<b>request {row.request + 1}</b>: {row.prompt_tokens} tokens{bucket}",
             f"first token after {row.ms:.3g} ms, path: {plots.escape(str(row.path))}",
             *(plots.escape(line) for line in textwrap.wrap(str(row.reason), 70)[:4])]
    return "<br>".join(lines)


def _stream_note(own: pd.DataFrame, passes: int) -> str:
    done = ", ".join(f"{int(own[column].sum()):,} {word}" for column, (word, _) in reversed(EVENTS.items()))
    hits = f"{100 * own['hit'].mean():.3g} % replayed"
    lines = (f"pass 1 of {passes}, from a cold cache; n = {len(own):,} requests, {hits}; graphs: {done}",
             "decoding needs one graph, prompts one a bucket; hover: length, bucket, time, reason")
    return "<br>".join(map(plots.escape, lines))


def _points(figure: go.Figure, x: pd.Series, y: pd.Series, look: Look, name: str, number: int,
            bars: pd.DataFrame | None) -> None:
    """Medians by prompt length, joined by a line; `bars` has columns low and high, missing where unknown."""
    error: dict[str, Any] = {}
    if bars is not None and bars["low"].notna().any():
        error = {"error_y": plots.bars(y.tolist(), bars["low"].fillna(y).tolist(), bars["high"].fillna(y).tolist(),
                                       look.colour)}
    figure.add_scatter(x=x.tolist(), y=y.tolist(), mode="lines+markers", xaxis=f"x{panels.no(number)}",
                       yaxis=f"y{panels.no(number)}", name=plots.escape(name), legendgroup=plots.escape(name),
                       showlegend=number == 1 or look in (JIT, REPLAY), **error,
                       line={"color": look.colour, "width": look.width, "dash": look.dash},
                       marker={"color": look.colour, "symbol": look.symbol, "size": 7},
                       hovertemplate=f"{plots.escape(name)}, %{{x}} tokens: %{{y:.3g}}<extra></extra>")


def _cycle(rows: pd.DataFrame, skip: int = 0) -> list[Look]:
    """A look for each setting, thinner and thinner, so that a line over an equal one leaves both to be seen."""
    count = len(tallies.settings(rows))
    widths = [1.6 + 3.4 * (count - 1 - i) / max(count - 1, 3) for i in range(count)]
    return [LOOKS[(i + skip) % len(LOOKS)]._replace(width=width) for i, width in enumerate(widths)]


FIGURES: dict[str, tuple[str, Callable[..., go.Figure]]] = {  # the part of a run that each is made of
    "over_time": ("stream", over_time),
    "first_tokens": ("stream", first_tokens),
    "costs": ("cost", costs),
    "disturbed": ("disturb", disturbed),
}
