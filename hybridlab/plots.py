"""Rows of one run as interactive Plotly figures, also as files without a browser. Never imports torch.

`floors`, those of `roofline.floors`, add the least time that the machine allows, as a dashed line.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from hybridlab import limits, looks, static, stats
from hybridlab.config import ARMS, POLICIES
from hybridlab.engines import ENGINES
from hybridlab.errors import ConfigError, StatisticsError, choose
from hybridlab.files import atomic_write

FORMATS = ("html", "svg", "png", "pdf")
WIDTH, HEIGHT = 1000, 500   # px
LONGEST = 160               # characters of a text from outside
POINTS = 1000               # of one distribution line; more cannot be told apart at this size
TOGETHER = 32               # positions that share one median
MEDIAN_NEEDS = stats.needed(0.5)


def ttft_by_length(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """Median time to first token over the prompt length, a line an arm, bars: 95 % intervals."""
    figure = frame("Time to first token by prompt length", caption,
                     "points: medians; " + _n_note(rows, "ttft", "a point"))
    _ttft(figure, _metric(rows, "ttft"))
    limits.by_length(figure, floors)
    return looks.one_entry_an_arm(figure)


def itl_by_arm(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """Distribution of the gaps for each arm as the share that is longer, which shows the tail; p50, p99, intervals."""
    own = _metric(rows, "itl")
    figure = frame("Gap between two tokens, all prompt lengths pooled", caption,
                     f"markers: p50 and p99; {_n_note(rows, 'itl', 'an arm')}")
    for arm in _arms(own):
        sample = own.loc[own["arm"] == arm, "ms"].sort_values().tolist()
        ranks = _spread(len(sample), POINTS)
        figure.add_scatter(x=[sample[i] for i in ranks], y=[100 * (1 - i / len(sample)) for i in ranks], mode="lines",
                           line={"color": looks.colour(arm), "width": 2, "shape": "hv", "dash": looks.dash(arm)},
                           **looks.legend(arm),
                           hovertemplate=f"{arm}: %{{y:.3g}} % take %{{x:.3g}} ms or longer<extra></extra>")
        for q in (0.5, 0.99):
            if (found := stats.of(own[own["arm"] == arm], q)) is not None:
                _mark(figure, arm, found, q)
    least = 100 / own.groupby("arm").size().max()
    times = [float(own["ms"].min()), float(own["ms"].max()), *limits.upright(figure, own, floors, least * 0.8, 120)]
    _log_axis(figure.update_xaxes, "gap between two tokens (ms, logarithmic)", min(times), max(times), (1, 2, 5))
    _log_axis(figure.update_yaxes, "gaps that take this long or longer (%)", least * 0.8, 120, (1,), (50,))
    return looks.one_entry_an_arm(figure)


def itl_by_position(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """Gaps over the position of their token: single gaps as dots, and a line of medians of 32 gaps in a row."""
    own = _metric(rows, "itl")
    top = _top(own["ms"].quantile(0.995))
    beyond = int((own["ms"] > top).sum())
    figure = frame("Gap between two tokens by position in the sequence", caption,
                     f"dots: single gaps{f' ({beyond} above {top:.3g} ms are not shown)' if beyond else ''}; lines: "
                     f"medians over {TOGETHER} positions of one prompt length, bars: 95 % intervals where requests "
                     "allow them")
    for arm in _arms(own):
        mine = own[own["arm"] == arm]
        kept = mine.iloc[_spread(len(mine), POINTS)]
        figure.add_scatter(x=kept["position"].tolist(), y=kept["ms"].tolist(), mode="markers", opacity=0.18,
                           marker={"color": looks.colour(arm), "size": 4}, **looks.unlisted(arm), hoverinfo="skip")
        groups = [part for _, part in mine.groupby([mine["prompt_tokens"], (mine["index"] - 1) // TOGETHER])]
        bins = sorted(((float(part["position"].median()), stats.at(part, 0.5)) for part in groups
                       if len(part) >= MEDIAN_NEEDS), key=lambda found: found[0])
        _line(figure, arm, [x for x, _ in bins], [estimate for _, estimate in bins], "position %{x:.0f}")
    figure.update_xaxes(title_text="position of the token (tokens from the start of the prompt)")
    figure.update_yaxes(title_text="gap between two tokens (ms)", range=[0, top])
    limits.by_position(figure, floors)
    return looks.one_entry_an_arm(figure)


def ablation(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> go.Figure:
    """The four arms side by side: TTFT by prompt length on the left, gaps between tokens on the right."""
    has_itl = (rows["metric"] == "itl").any()
    note = "markers: medians; " + _n_note(rows, "ttft", "a point on the left")
    if has_itl:
        note += f"; right: {_n_note(rows, 'itl', 'an arm', intervals=False)}"
    figure = frame("Time to first token, and gap between the following tokens", caption, note)
    left = 0.56 if rows["arm"].nunique() <= len(ARMS) else 0.4
    figure.update_layout(xaxis_domain=[0, left], xaxis2={"domain": [left + 0.12, 1], "anchor": "y2", **AXIS},
                         yaxis2={"anchor": "x2", **AXIS})
    _ttft(figure, _metric(rows, "ttft"))
    limits.by_length(figure, floors, *(["itl"] if has_itl else []))
    if has_itl:
        _itl_panel(figure, _metric(rows, "itl"))
        limits.across(figure, _metric(rows, "itl"), floors)
    return looks.one_entry_an_arm(figure)


def write(figure: go.Figure, stem: Path, formats: Sequence[str] = FORMATS, theme: str = "light") -> list[Path]:
    """Writes stem.html (interactive, opens offline with plotly.min.js beside it), stem.svg, stem.png and stem.pdf.

    `theme`: "light" or "dark", see `looks.themed`. All but the page come from `static`, the same bytes each time.
    """
    figure = looks.themed(figure, theme)
    for name in formats:
        choose("format", name, FORMATS)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for name in formats:
        path = stem.with_name(f"{stem.name}.{name}")
        if name == "html":
            atomic_write(path, _page(figure, stem.name))
            script = get_plotlyjs().encode()
            library = stem.parent / "plotly.min.js"
            if not library.exists() or library.stat().st_size != len(script):
                atomic_write(library, script)
        else:
            atomic_write(path, getattr(static, name)(figure))
        written.append(path)
    return written


def escape(text: str) -> str:
    """Text from outside as plain text in a figure: no markup, no formula, no control characters, not endless."""
    shown = "".join(c if c.isprintable() else " " for c in text[:LONGEST + 1])
    shown = shown if len(shown) <= LONGEST else shown[:LONGEST - 1] + "…"
    return html.escape(shown).replace("$", "&#36;")


AXIS: dict[str, Any] = {"showgrid": True, "gridcolor": "#E6E6E6", "showline": True, "linecolor": "#4D4D4D",
                         "zeroline": False, "ticks": "outside"}


def frame(title: str, caption: str, note: str) -> go.Figure:
    """An empty figure in the house style; the caption stands under the title, the note under the plot."""
    figure = go.Figure()
    figure.update_layout(
        template="none", width=WIDTH, height=HEIGHT, margin={"l": 70, "r": 25, "t": 115, "b": 100}, showlegend=True,
        font={"family": "DejaVu Sans, Verdana, sans-serif", "size": 14, "color": "#222222"},
        paper_bgcolor="#FFFFFF", plot_bgcolor="#FFFFFF", hovermode="closest",
        title={"text": html.escape(title), "x": 0.0, "xref": "paper", "xanchor": "left", "y": 0.955,
               "yanchor": "top", "font": {"size": 19},
               "subtitle": {"text": escape(caption), "font": {"size": 13, "color": "#666666"}}},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom"},
        xaxis={"anchor": "y", "domain": [0, 1], **AXIS}, yaxis={"anchor": "x", **AXIS})
    figure.add_annotation(text=html.escape(note), xref="paper", yref="paper", x=0, y=-0.25, xanchor="left",
                          yanchor="top", showarrow=False, font={"size": 12, "color": "#666666"})
    return figure


def _page(figure: go.Figure, name: str) -> str:
    page = pio.to_html(figure, include_plotlyjs="directory", include_mathjax=False, full_html=True,
                       div_id=f"figure-{html.escape(name, quote=True)}", config={"displaylogo": False})
    return page.replace("<body>", f'<body style="background: {figure.layout.paper_bgcolor}">', 1)


def _metric(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    stats.one_run(rows)
    own = rows[rows["metric"] == metric]
    if own.empty:
        raise StatisticsError(f"there are no rows of metric {metric!r}", f"{len(rows)} rows",
                              "set itl_repeats and new_tokens above 1" if metric == "itl" else "measure a run first")
    return own


def _arms(rows: pd.DataFrame) -> list[str]:
    """The names in the rows, in the order of the ablation: an arm, its policy, kernels and steps a launch
    ("hybrid full fused 8 steps"); then those of other engines."""
    known = (*ARMS, *ENGINES)
    there = [str(name) for name in rows["arm"].unique()]
    for name in there:
        choose("arm", name.partition(" ")[0], known)
    plain = [*ARMS, *(f"{arm} {policy}" for arm in ARMS for policy in POLICIES)]
    order = [each for name in plain for each in (name, f"{name} fused")]

    def place(name: str) -> tuple[int, int, int]:
        base, count = re.fullmatch(r"(.*?)(?: (\d+) steps)?", name).groups()  # type: ignore[union-attr]
        return known.index(name.partition(" ")[0]), order.index(base) if base in order else len(order), int(count or 1)

    return sorted(sorted(there), key=place)


def _ttft(figure: go.Figure, own: pd.DataFrame) -> None:
    top = 0.0
    for arm in _arms(own):
        mine = own[own["arm"] == arm]
        cells = [(int(length), stats.of(part, 0.5)) for length, part in mine.groupby("prompt_tokens")]
        known = [(length, found) for length, found in cells if found is not None]
        if known:
            _line(figure, arm, [x for x, _ in known], [estimate for _, estimate in known], "%{x} prompt tokens")
        else:  # too few for a median with an interval: show what there is, value by value
            figure.add_scatter(x=mine["prompt_tokens"].tolist(), y=mine["ms"].tolist(), mode="markers",
                               marker={"color": looks.colour(arm), "symbol": looks.symbol(arm), "size": 6},
                               **looks.legend(arm))
        top = max([top, *(estimate.high for _, estimate in known)] if known else [top, float(mine["ms"].max())])
    figure.update_xaxes(title_text="prompt length (tokens)", selector={"anchor": "y"})
    figure.update_yaxes(title_text="time to first token (ms)", range=[0, _top(top)], selector={"anchor": "x"})


def _itl_panel(figure: go.Figure, own: pd.DataFrame) -> None:
    """p50 and p99 of each arm side by side; how many times faster than eager stands under the arm's name."""
    table = stats.summary(own, arms=_arms(own), which="pooled")
    cells = [cell for cell in table.itertuples() if cell.p50 is not None]
    has_p99 = any(cell.p99 is not None for cell in cells)
    for place, cell in enumerate(cells):
        aside = 0.16 if cell.p99 is not None else 0.0
        _dot(figure, place - aside, (cell.p50, cell.p50_low, cell.p50_high), cell.arm, "p50", 10)
        if cell.p99 is not None:
            _dot(figure, place + aside, (cell.p99, cell.p99_low, cell.p99_high), cell.arm, "p99", 14)
    compared = any(cell.ratio_to_eager is not None and cell.arm != "eager" for cell in cells)
    many = len(cells) > len(ARMS)
    names = [looks.stacked(cell.arm, many) + (f"<br>{cell.ratio_to_eager:.2f}×" if compared and
             cell.ratio_to_eager is not None else "") for cell in cells]
    if compared:  # in the note: under names of several lines there is no room for the title of an axis
        figure.layout.annotations[0].text += "; ×: times as fast as eager, p50"
    heights = [value for cell in cells for value in (cell.p50_high, cell.p99_high) if value is not None]
    figure.update_layout(
        xaxis2={"tickvals": list(range(len(cells))), "ticktext": names,
                "tickfont": {"size": 11 if many else 14}, "tickangle": 0, "range": [-0.6, max(len(cells), 1) - 0.4]},
        yaxis2={"title": {"text": f"gap (ms): p50{', –: p99' if has_p99 else ''}"},
                "range": [0, _top(max(heights, default=1))]})


def _dot(figure: go.Figure, place: float, three: tuple[float, float, float], arm: str, name: str, size: int) -> None:
    value, low, high = three
    symbol = looks.symbol(arm) if name == "p50" else "line-ew-open"
    figure.add_scatter(x=[place], y=[value], xaxis="x2", yaxis="y2", mode="markers", **looks.unlisted(arm),
                       marker={"color": looks.colour(arm), "symbol": symbol, "size": size},
                       error_y=bars([value], [low], [high], looks.colour(arm)),
                       hovertemplate=f"{arm} {name}: %{{y:.3f}} ms [{low:.3f}, {high:.3f}]<extra></extra>")


def _line(figure: go.Figure, arm: str, x: list[Any], estimates: list[stats.Estimate], where: str) -> None:
    values, lows, highs = ([getattr(at, end) for at in estimates] for end in ("value", "low", "high"))
    colour = looks.colour(arm)
    figure.add_scatter(
        x=x, y=values, mode="lines+markers", line={"color": colour, "width": 2, "dash": looks.dash(arm)},
        marker={"color": colour, "symbol": looks.symbol(arm), "size": 7}, **looks.legend(arm),
        error_y=bars(values, lows, highs, colour),
        customdata=[[f"[{at.low:.3f}, {at.high:.3f}]" if at.low <= at.high else "(no interval)", at.n]
                    for at in estimates],
        hovertemplate=f"{arm}, {where}: %{{y:.3f}} ms %{{customdata[0]}}, n = %{{customdata[1]}}<extra></extra>")


def _mark(figure: go.Figure, arm: str, estimate: stats.Estimate, q: float) -> None:
    figure.add_scatter(x=[estimate.value], y=[100 * (1 - q)], mode="markers", **looks.unlisted(arm),
                       marker={"color": looks.colour(arm), "symbol": looks.symbol(arm), "size": 9},
                       error_x=bars([estimate.value], [estimate.low], [estimate.high], looks.colour(arm)),
                       hovertemplate=f"{arm} p{100 * q:g}: %{{x:.3f}} ms [{estimate.low:.3f}, {estimate.high:.3f}], "
                                     f"n = {estimate.n}<extra></extra>")


def bars(values: list[float], lows: list[float], highs: list[float], colour: str) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 4,
            "array": [max(0.0, high - value) for value, high in zip(values, highs, strict=True)],
            "arrayminus": [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]}


def _n_note(rows: pd.DataFrame, metric: str, unit: str, intervals: bool = True) -> str:
    own = rows[rows["metric"] == metric]
    keys = ["arm", "prompt_tokens"] if metric == "ttft" else ["arm"]
    counts = own.groupby(keys).size()
    if counts.empty:
        return ""
    least, most = int(counts.min()), int(counts.max())
    note = f"n = {least:,}{f' to {most:,}' if most != least else ''} {unit}"
    if metric == "itl" and least < stats.needed(0.99):
        note += f", p99 needs {stats.needed(0.99)}"
    if least < MEDIAN_NEEDS:
        return f"{note}: too few for intervals, single values are shown"
    return f"{note}; bars: 95 % intervals" if intervals else note


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices over range(count), evenly, with both ends."""
    return list(range(count)) if count <= most else sorted(
        {round(i * (count - 1) / (most - 1)) for i in range(most)})


def _top(value: float) -> float:
    return float(value) * 1.12 or 1.0


def _log_axis(update: Any, title: str, low: float, high: float, steps: Sequence[int],
              more: Sequence[float] = ()) -> None:
    if not 0 < low <= high:
        raise ConfigError(f"a logarithmic axis cannot show {low:g}", "times must be positive")
    update(title_text=title, **looks.logarithmic(low * 0.95, high * 1.05, steps, more, most=20))
