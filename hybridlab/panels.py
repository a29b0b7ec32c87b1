"""Parts of figures with several panels: frame, axes, a switch that lives in the page, distributions, long legends.

Never imports torch. Names that come from outside are escaped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hybridlab import plots, stats
from hybridlab.looks import logarithmic

HEAD, FOOT, LINE = 115, 71, 20  # px: above the plot, from it to the notes, and of one note
POINTS = 800                    # of one distribution line


class Look(NamedTuple):
    """Colour, and what tells things apart without it: the symbol of markers, the dash of lines."""

    colour: str
    symbol: str
    dash: str = "solid"
    width: float = 2.0  # px


def frame(title: str, caption: str, notes: Sequence[str], height: int, above: int = 0) -> go.Figure:
    """The house frame around a plot of `height` px with `above` px between title and plot; each note is a line."""
    figure = plots.frame(title, caption, "")
    whole = HEAD + above + height + FOOT + LINE * len(notes) + 10
    figure.update_layout(height=whole, margin={"l": 75, "t": HEAD + above, "b": whole - HEAD - above - height},
                         title_y=1 - 22 / whole, font_size=12)
    figure.update_annotations(y=-55 / height, text="<br>".join(map(plots.escape, notes)), align="left")
    return figure


def no(number: int) -> str:
    """What the axes of panel `number`, counted from 1, have behind their letter."""
    return str(number) if number > 1 else ""


def axes(figure: go.Figure, number: int, across: list[float], up: list[float], *, x: Mapping[str, Any] | None = None,
          y: Mapping[str, Any] | None = None) -> None:
    """Panel `number` of a figure, in paper coordinates."""
    end = no(number)
    figure.update_layout({f"xaxis{end}": {**plots.AXIS, "anchor": f"y{end}", "domain": across, **(x or {})},
                          f"yaxis{end}": {**plots.AXIS, "anchor": f"x{end}", "domain": up, **(y or {})}})


def empty(figure: go.Figure, number: int, words: str) -> None:
    """Say in panel `number` why nothing is drawn there; its axes lose the numbers, which would belong to no value."""
    across, up = (figure.layout[f"{letter}axis{no(number)}"] for letter in "xy")
    figure.add_annotation(text=plots.escape(words), x=sum(across.domain) / 2, y=sum(up.domain) / 2, xref="paper",
                          yref="paper", xanchor="center", yanchor="middle", showarrow=False,
                          font={"size": 12, "color": figure.layout.annotations[0].font.color})
    for axis in (across, up):
        if axis.ticktext is None:
            axis.tickvals, axis.ticktext = [], []


def switch(figure: go.Figure, owners: Sequence[str], layouts: Mapping[str, Mapping[str, object]], first: str) -> None:
    """Buttons, a menu where their names need more than a line; each shows the traces it owns, `first` at once."""
    figure.update_layout(title_subtitle_text=layouts[first]["title.subtitle.text"])
    figure.layout.annotations[0].text = layouts[first]["annotations[0].text"]
    for trace, owner in zip(figure.data, owners, strict=True):
        trace.visible = owner == first
    kind = ("buttons", "right") if sum(len(name) + 4 for name in layouts) <= 120 else ("dropdown", "down")
    if len(layouts) > 1:
        figure.update_layout(updatemenus=[{
            "type": kind[0], "direction": kind[1], "showactive": True, "active": list(layouts).index(first),
            "font": {"size": 12}, "pad": {"b": 34}, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "buttons": [
                {"label": plots.escape(name), "method": "update",
                 "args": [{"visible": [owner == name for owner in owners]}, dict(layout)]}
                for name, layout in layouts.items()]}])


def tails(figure: go.Figure, samples: Mapping[str, pd.DataFrame], looks: Mapping[str, Look], number: int, what: str,
           span: tuple[float, float, int] | None = None) -> None:
    """A panel of distributions: the share of values that is larger, with p50 and p99 where they have intervals.
    `samples`: rows by name, values in ms.

    `span`: smallest and largest value, and size of the largest sample, of all panels that stand side by side.
    """
    for name, look in looks.items():
        values = np.sort(samples[name]["ms"].to_numpy(float)) if name in samples else np.empty(0)
        if not len(values):
            continue
        kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), POINTS)).round().astype(int))
        new = plots.escape(name) not in {trace.name for trace in figure.data}  # some have values in one panel only
        line(figure, values[kept].tolist(), (100 * (1 - kept / len(values))).tolist(), look, name, number,
              "%{y:.3g} % take %{x:.3g} ms or longer", listed=new)
        for q in (0.5, 0.99):
            if (sure := stats.of(samples[name], q)) is not None:
                figure.add_scatter(
                    x=[sure.value], y=[100 * (1 - q)], mode="markers", showlegend=False, legendgroup=plots.escape(name),
                    xaxis=f"x{no(number)}", yaxis=f"y{no(number)}",
                    marker={"color": look.colour, "symbol": look.symbol, "size": 9},
                    error_x=plots.bars([sure.value], [sure.low], [sure.high], look.colour),
                    hovertemplate=f"{plots.escape(name)} p{100 * q:g}: %{{x:.3g}} ms [{sure.low:.3g}, "
                                  f"{sure.high:.3g}], n = {sure.n:,}<extra></extra>")
    every = np.concatenate([own["ms"] for own in samples.values()])
    low, high, most = span or (every.min(), every.max(), max(map(len, samples.values())))
    end = no(number)
    figure.update_layout({f"xaxis{end}": {"title": {"text": f"{what} (ms, logarithmic)"}, **log(low, high)},
                          f"yaxis{end}": {"title": {"text": "take this long or longer (%)" if number == 1 else ""},
                                         **log(*shares(most), (1,), (50,))}})


def shares(count: int) -> tuple[float, float]:
    """The least and the most that the axis of a distribution of so many values shows, %."""
    return 80 / count, 100.0


def log(low: float, high: float, steps: tuple[int, ...] = (1, 2, 5), more: tuple[float, ...] = ()) -> dict[str, Any]:
    """A logarithmic axis that shows `low` to `high` with room beside them, see `looks.logarithmic`."""
    return logarithmic(low * 0.93, high * 1.1, steps, more, most=8)


def line(figure: go.Figure, x: list[Any], y: list[float], look: Look, name: str, number: int, hover: str, *,
          listed: bool) -> None:
    """A line of steps in panel `number`; `hover` says what its x and y are."""
    shown = plots.escape(name)
    figure.add_scatter(x=x, y=y, mode="lines", xaxis=f"x{no(number)}", yaxis=f"y{no(number)}", name=shown,
                       line={"color": look.colour, "width": look.width, "shape": "hv", "dash": look.dash},
                       legendgroup=shown, showlegend=listed, hovertemplate=f"{shown}, {hover}<extra></extra>")


def legend(figure: go.Figure) -> go.Figure:
    """The figure with room above the plot for a legend of several lines, where names are long."""
    wide = sum(45 + 7.5 * len(trace.name) for trace in figure.data if trace.showlegend)
    more = LINE * int(wide // (figure.layout.width - 100))
    figure.update_layout(height=figure.layout.height + more, margin_t=figure.layout.margin.t + more,
                         title_y=1 - 22 / (figure.layout.height + more))
    return figure
