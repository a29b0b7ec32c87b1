"""How operations look in a figure: boxes with a colour, a pattern, a short name and a hover text, in the house frame.

Never imports torch. Every text from a plan is escaped here.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from hybridlab import looks, plots
from hybridlab.config import policy_name
from hybridlab.errors import choose
from hybridlab.plan import KINDS, Op, Plan


class Look(NamedTuple):
    """Fill, pattern (so that it reads without colour) and text colour of a box."""

    colour: str
    pattern: str
    ink: str


class Box(NamedTuple):
    """A rectangle to the right of x, around y; `key` names its look. `text` and `hover` are escaped already."""

    key: str
    x: float
    width: float
    y: float
    text: str
    hover: str


KIND_LOOKS = {"static": Look("#C9DDEC", "", "#222222"), "device-dynamic": Look("#CC79A7", "/", "#111111"),
              "host-dynamic": Look("#D55E00", "x", "#111111")}
PATH_LOOKS = {"graph": Look(looks.COLOURS["graph"], "", "#FFFFFF"), "jit": Look(looks.COLOURS["jit"], "/", "#111111"),
              "eager": Look(looks.COLOURS["eager"], ".", "#FFFFFF")}
NAMES = {"scaled_dot_product": "sdpa", "layer_norm": "norm", "rms_norm": "norm"}  # for part of a long name
TOP, RIGHT = 115, 25  # margins, px
SMALL = 11                       # px, letters in and above boxes
GLYPH = 0.62                     # width of a letter in font sizes
WRAP = 70                        # letters of one line of hover text


def draw(figure: go.Figure, boxes: Iterable[Box], styles: Mapping[str, Look], height: float) -> None:
    """One trace for all boxes of a key, in the order of `styles`; `height` in units of y.

    Raises `ConfigError` for a key without a look: a plan from a file may call a kind or a path anything.
    """
    boxes = list(boxes)
    for box in boxes:
        choose("kind or path", box.key, styles)
    for key, look in styles.items():
        own = [box for box in boxes if box.key == key]
        if own:
            figure.add_bar(
                orientation="h", base=[b.x for b in own], x=[b.width for b in own], y=[b.y for b in own], width=height,
                name=key, showlegend=True, text=[b.text for b in own], textposition="inside", textangle=0,
                insidetextanchor="middle", constraintext="none", textfont={"size": SMALL, "color": look.ink},
                customdata=[b.hover for b in own], hovertemplate="%{customdata}<extra></extra>",
                marker={"color": look.colour, "line": {"color": "#FFFFFF", "width": 1},
                        "pattern": {"shape": look.pattern, "fillmode": "overlay", "fgcolor": look.ink,
                                    "fgopacity": 0.22, "size": 6}})


def frame(title: str, caption: str, notes: Sequence[str], height: float, left: int, above: int = 0,
          below: int = 30) -> go.Figure:
    """The house frame around a plot area of `height` px.

    `above` and `below` are px between title and plot, and between plot and notes; each note is a line.
    """
    figure = plots.frame(title, caption, "")
    margin = {"l": left, "r": RIGHT, "t": TOP + above, "b": below + 20 * len(notes) + 10}
    whole = height + margin["t"] + margin["b"]
    figure.update_layout(height=whole, margin=margin, barmode="overlay", font_size=12, title_y=1 - 22 / whole)
    figure.update_annotations(y=-below / height, text="<br>".join(map(plots.escape, notes)), align="left")
    return figure


def grid(figure: go.Figure, ticks: Mapping[float, str], lines: float) -> None:
    """Names of the lines on the left and no scale below: a place in the picture is an order, not a quantity."""
    figure.update_yaxes(tickvals=list(ticks), ticktext=[fit(text, figure.layout.margin.l - 20, 12)
                                                        for text in ticks.values()],
                        range=[-lines - 0.5, 0.75], showgrid=False, showline=False, ticks="")
    figure.update_xaxes(tickvals=[], ticktext=[], showgrid=False, showline=False, ticks="")


def label(figure: go.Figure, x: float, y: float, text: str) -> None:
    """Small text whose lower left corner is at (x, y); `text` is escaped already."""
    if text:
        figure.add_annotation(text=text, x=x, y=y, xref="x", yref="y", xanchor="left", yanchor="bottom",
                              showarrow=False, font={"size": SMALL - 1, "color": "#666666"})


def plot_px(figure: go.Figure) -> float:
    """Width of the plot area."""
    return float(figure.layout.width - figure.layout.margin.l - figure.layout.margin.r)


def fit(text: str, px: float, size: int = SMALL) -> str:
    """As much of `text`, escaped, as `px` have room for; "" when that would be less than three letters of more."""
    room = int(px / (size * GLYPH))
    if len(text) > room:
        text = text[:room - 1] + "…" if room > 3 else ""
    return plots.escape(text)


def whole(text: str, px: float) -> str:
    """`text`, escaped, where `px` have room for all of it, else ""."""
    return plots.escape(text) if len(text) * SMALL * GLYPH <= px else ""


def short(op: Op) -> str:
    """The name that fits into a box."""
    return next((name for part, name in NAMES.items() if part in op.short), op.short.strip("_"))


def about(op: Op) -> str:
    """Hover text: the operation, where it is, why it is what it is, what it costs, what runs it."""
    where = f"{op.module or 'outside the model'} {op.shape}"
    return "<br>".join([f"<b>{plots.escape(op.op)}</b>", *wrap(where), f"{op.kind}:", *wrap(op.reason),
                        costs([op]), plots.escape(f"in segment {op.segment}, runs {op.path}")])


def summary(ops: Sequence[Op]) -> str:
    """Hover text of several operations drawn as one box."""
    kinds = Counter(op.kind for op in ops)
    return "<br>".join([f"<b>{len(ops)} operations</b>", *wrap(listed(Counter(short(op) for op in ops))),
                        listed({kind: kinds[kind] for kind in KINDS if kinds[kind]}), costs(ops)])


def costs(ops: Sequence[Op]) -> str:
    """Launches, FLOPs and bytes of all of them."""
    launches, flops, moved = (sum(getattr(op, what) for op in ops) for what in ("launches", "flops", "bytes"))
    plural = "es" if launches != 1 else ""
    return f"{launches:,} launch{plural} when eager · {si(flops)}FLOP · {si(moved)}B read and written"


def wrap(text: str) -> list[str]:
    """Escaped lines short enough for a hover box; not endless."""
    return [plots.escape(line) for line in textwrap.wrap(text, WRAP, max_lines=5, placeholder=" …")]


def listed(counts: Mapping[str, int]) -> str:
    """"3 static, 1 host-dynamic" of counts."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def si(value: float) -> str:
    """Three digits and a decimal prefix: "73.7 k"."""
    power = min(int(math.log10(value) // 3), 4) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {' kMGT'[power].strip()}"


def describe(plan: Plan) -> str:
    """Model, phase, policy and length: what every figure says under its title."""
    return f"{plan.model} · {plan.phase} at {plan.length} tokens · {policy(plan)}"


def policy(plan: Plan) -> str:
    """The policy in words."""
    return "stock, nothing lowered" if plan.policy is None else f"policy {policy_name(plan.policy)}"


