"""How an arm, a policy of it, or another engine looks in figures: colour, symbol, line, and one entry in the legend."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

COLOURS = {"eager": "#4D4D4D", "graph": "#0072B2", "jit": "#E69F00", "hybrid": "#009E73",  # Okabe-Ito and a grey
           "hf-generate": "#8A8A8A", "hf-compile": "#CC79A7", "hf-compile-prefill": "#882255", "vllm": "#D55E00",
           "tensorrt-llm": "#56B4E9"}
SYMBOLS = {"eager": "circle", "graph": "square", "jit": "diamond", "hybrid": "triangle-up",  # also without colour
           "hf-generate": "triangle-down", "hf-compile": "cross", "hf-compile-prefill": "x", "vllm": "star",
           "tensorrt-llm": "hexagon"}
DASHES = {"piecewise": "dot", "full": "dash", "fused": "dashdot", "steps": "longdash"}  # by last word


def colour(arm: str) -> str:
    return COLOURS[arm.partition(" ")[0]]


def symbol(arm: str) -> str:
    return SYMBOLS[arm.partition(" ")[0]]


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
