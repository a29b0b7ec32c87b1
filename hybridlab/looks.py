"""How an arm, a policy of it, or another engine looks in figures: colour, symbol, line, legend; axes; dark figures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from hybridlab.errors import choose

COLOURS = {"eager": "#4D4D4D", "graph": "#0072B2", "jit": "#E69F00", "hybrid": "#009E73",  # Okabe-Ito and a grey
           "hf-generate": "#AAAABB", "hf-compile": "#CC55FF", "hf-compile-prefill": "#8811FF", "vllm": "#EE1133",
           "tensorrt-llm": "#56B4E9"}  # chosen to be apart from those and each other in red- and green-blindness too
SYMBOLS = {"eager": "circle", "graph": "square", "jit": "diamond", "hybrid": "triangle-up",  # also without colour
           "hf-generate": "triangle-down", "hf-compile": "cross", "hf-compile-prefill": "x", "vllm": "star",
           "tensorrt-llm": "hexagon"}
DASHES = {"piecewise": "dot", "full": "dash", "fused": "dashdot", "steps": "longdash"}  # by last word

THEMES = ("light", "dark")
PAPER, INK = 0x14, 0xF2  # of the dark theme: the greys that white and black become
GREY = re.compile(r"#([0-9A-Fa-f]{2})\1\1")


def colour(arm: str) -> str:
    return COLOURS[arm.partition(" ")[0]]


def symbol(arm: str) -> str:
    return SYMBOLS[arm.partition(" ")[0]]


def logarithmic(low: float, high: float, steps: Iterable[int], more: Iterable[float], most: int) -> dict[str, Any]:
    """A logarithmic axis from `low` to `high` with ticks at `steps` of each power of ten, and `more`; at fewer steps if
    that would be more than `most` ticks, at all nine if it would be fewer than three."""
    def ticks(at: Iterable[int]) -> list[float]:
        every = {*(float(f"{step}e{power}") for power in range(-9, 9) for step in at), *more}
        return sorted(tick for tick in every if low <= tick <= high)

    shown = ticks(steps)
    if len(shown) > most:
        shown = ticks((1,))
    elif len(shown) < 3:
        shown = ticks({*steps, *range(1, 10)})
    return {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": shown,
            "ticktext": [f"{tick:g}" for tick in shown]}


def dash(arm: str) -> str:
    """Policies, kernels and steps a launch of one arm share its colour and differ in their lines."""
    return DASHES.get(arm.rpartition(" ")[2], "solid")


def legend(arm: str) -> dict[str, Any]:
    """An entry in the legend."""
    name, _, policy = arm.partition(" ")
    return {"name": name, "legendgroup": name, "showlegend": True, "meta": policy}


def unlisted(arm: str) -> dict[str, Any]:
    """No entry of its own: it is shown and hidden with its arm."""
    return {"legendgroup": arm.partition(" ")[0], "showlegend": False}


def stacked(arm: str, narrow: bool) -> str:
    """The words of an arm's name below each other; where it is narrow, the longest in two."""
    return re.sub(" (?!steps)", "<br>", arm.replace("piecewise", "piece- wise") if narrow else arm)


def one_entry_an_arm(figure: go.Figure) -> go.Figure:
    """The legend names each arm once; where policies or kernels are compared, the note says how lines differ."""
    named = [trace for trace in figure.data if trace.showlegend]
    for number, trace in enumerate(named):
        trace.showlegend = trace.name not in [earlier.name for earlier in named[:number]]
    if any(trace.meta for trace in named):
        names = {"piecewise": "piecewise dotted", "full": "full dashed", "fused": "fused dash-dotted",
                 "steps": "several steps a launch long-dashed"}
        used = {str(trace.meta).rpartition(" ")[2] for trace in named}
        lines = [line for name, line in names.items() if name in used]
        note = figure.layout.annotations[0]
        note.update(text=f"{note.text}<br>lines: {', '.join([*lines, 'others solid'])}", y=note.y + 0.02)
    return figure


def themed(figure: go.Figure, theme: str) -> go.Figure:
    """The figure as it is ("light"), or with every grey mirrored ("dark"): paper becomes ink, colours stay, and text in
    a box takes the ink that reads on it. Raises `ConfigError` for another theme."""
    if choose("theme", theme, THEMES) == "light":
        return figure
    plain = _mirrored(figure.to_dict())
    for trace in plain["data"]:
        if trace["type"] == "bar" and "textfont" in trace:
            trace["textfont"]["color"] = readable(trace["marker"]["color"])
    if "legend" in plain["layout"]:
        plain["layout"]["legend"]["font"] = {"color": plain["layout"]["font"]["color"]}
    for menu in plain["layout"].get("updatemenus", ()):
        menu["bgcolor"], menu["font"]["color"] = "#D0D0D0", "#222222"  # a pressed button is light in any case
    return go.Figure(plain)


def readable(fill: str) -> str:
    """Near black or near white, whichever contrasts more with `fill`."""
    return max(("#111111", "#FFFFFF"), key=lambda ink: contrast(ink, fill))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2, relative luminance of sRGB)."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _mirrored(part: Any, name: str = "") -> Any:
    """Plain data with each grey that is a colour, and not a text, mirrored."""
    if isinstance(part, dict):
        return {key: _mirrored(value, key) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_mirrored(value, name) for value in part]
    if name.endswith("color") and isinstance(part, str) and (grey := GREY.fullmatch(part)):
        return "#" + 3 * f"{round(INK + (PAPER - INK) * int(grey[1], 16) / 255):02X}"
    return part
