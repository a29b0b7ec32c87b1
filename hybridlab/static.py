"""Draws our Plotly figures with matplotlib: SVG, PNG and PDF need no browser, and a figure is defined once.

Knows the vocabulary of `plots` and refuses everything else, because a figure drawn wrongly is worse than none.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import Any

import matplotlib
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from hybridlab.errors import FigureError

DPI = 100      # one pixel of Plotly is 1/100 inch here
SCALE = 2      # of the PNG
POINT = 72 / DPI
SETTINGS = {"svg.hashsalt": "hybridlab", "svg.fonttype": "path", "pdf.fonttype": 42,
            "font.family": "DejaVu Sans", "path.simplify": False}
DASHES: dict[Any, Any] = {None: "-", "solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (9, 3))}
SYMBOLS = {None: "o", "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v",
           "x": "X", "cross": "P", "star": "*", "hexagon": "h", "line-ew-open": "_"}
PANELS = ("", "2", "3", "4")  # pairs of axes that a figure may have
HATCHES = {"": "", "/": "////", "x": "xxxx", ".": "..."}
HORIZONTAL = {None: "center", "auto": "center", "left": "left", "center": "center", "right": "right"}
VERTICAL = {None: "center", "auto": "center", "top": "top", "middle": "center", "bottom": "bottom"}
DRAWN = {  # what is drawn; the second set exists on screen only and is left out on purpose
    "layout": ({"title", "font", "width", "height", "margin", "paper_bgcolor", "plot_bgcolor", "legend", "annotations",
                "showlegend", "barmode", *(f"{name}axis{number}" for name in "xy" for number in PANELS)},
               {"template", "hovermode", "updatemenus"}),
    "axis": ({"anchor", "domain", "showgrid", "gridcolor", "showline", "linecolor", "zeroline", "ticks", "title",
              "type", "range", "tickvals", "ticktext", "tickfont", "showticklabels"}, {"matches", "tickangle"}),
    "trace": ({"type", "x", "y", "xaxis", "yaxis", "mode", "line", "marker", "opacity", "error_x", "error_y", "name",
               "showlegend", "legendgroup", "fill", "fillcolor", "visible"},
              {"customdata", "hovertemplate", "hoverinfo", "meta"}),
    "bar": ({"type", "x", "y", "base", "width", "orientation", "marker", "name", "showlegend", "visible", "text",
             "textposition", "textfont", "textangle", "insidetextanchor", "constraintext"},
            {"customdata", "hovertemplate"}),
    "line": ({"color", "width", "shape", "dash"}, set()),
    "marker": ({"color", "symbol", "size", "pattern", "line"}, set()),
    "error": ({"type", "symmetric", "color", "thickness", "width", "array", "arrayminus"}, set()),
    "annotation": ({"text", "x", "y", "xref", "yref", "xanchor", "yanchor", "xshift", "showarrow", "font"}, {"align"}),
    "legend": ({"orientation", "x", "xanchor", "y", "yanchor", "font"}, set()),
    "title": ({"text", "x", "xref", "xanchor", "y", "yanchor", "font", "subtitle"}, set()),
}


def svg(figure: go.Figure) -> bytes:
    """The figure as SVG, text as outlines; the same bytes each time."""
    return _save(figure, "svg", metadata={"Date": None, "Creator": None})


def png(figure: go.Figure) -> bytes:
    """The figure as PNG at twice its size in pixels; the same bytes each time."""
    return _save(figure, "png", dpi=DPI * SCALE, metadata={"Software": None})


def pdf(figure: go.Figure) -> bytes:
    """The figure as PDF, text as text in an embedded TrueType font, as publishers ask; the same bytes each time."""
    return _save(figure, "pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def render(figure: go.Figure) -> Figure:
    """The matplotlib figure. Raises: FigureError naming the first part that cannot be drawn."""
    try:
        return _render(figure)
    except KeyError as error:
        raise FigureError(f"a figure without {error} cannot be drawn without a browser",
                          "sizes, colours and texts are read from the figure", "draw it with hybridlab.plots") from None


def _render(figure: go.Figure) -> Figure:
    plain = figure.to_dict()
    layout = _only("layout", plain["layout"])
    width, height = layout["width"], layout["height"]
    canvas = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=layout["paper_bgcolor"])
    FigureCanvasAgg(canvas)
    axes = {}
    for number in PANELS:
        if f"xaxis{number}" in layout:
            axes[f"x{number}", f"y{number}"] = _axes(canvas, layout, number)
    handles: dict[str, Any] = {}
    _one_of("barmode", layout.get("barmode"), {None: "none", "overlay": "boxes where they are"})
    for trace in plain["data"]:
        if trace.get("visible", True) is True:
            _trace(axes, trace, handles)
    for key, drawn in axes.items():  # after the data, which would move the limits
        _limits(drawn, layout, key[0][1:])
    _texts(canvas, axes, layout)
    _legend(canvas, layout, handles)
    return canvas


def _save(figure: go.Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a model name may hold any script
        render(figure).savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _only(kind: str, part: dict[str, Any]) -> dict[str, Any]:
    drawn, ignored = DRAWN[kind]
    unknown = set(part) - drawn - ignored
    if unknown:
        raise FigureError(f"{kind} property {min(unknown)!r} cannot be drawn without a browser",
                          f"known: {', '.join(sorted(drawn))}", "leave it out, or teach it to hybridlab.static")
    return part


def _one_of(name: str, value: Any, known: dict[Any, str]) -> str:
    if value not in known:
        raise FigureError(f"{name} {value!r} cannot be drawn without a browser",
                          f"known: {', '.join(str(key) for key in known if key)}")
    return known[value]


def _plain(text: str) -> str:
    text = text.replace("<br>", "\n")
    if re.search(r"<\s*[a-zA-Z/!]", text):
        raise FigureError("markup in a text cannot be drawn without a browser", text[:80], "escape it")
    return html.unescape(text)


def _axes(canvas: Figure, layout: dict[str, Any], number: str) -> Axes:
    across, up = _only("axis", layout[f"xaxis{number}"]), _only("axis", layout[f"yaxis{number}"])
    left, right = across.get("domain", (0, 1))
    low, high = up.get("domain", (0, 1))
    x, y = _place(layout, left, low)
    drawn = canvas.add_axes((x, y, *(b - a for a, b in zip((x, y), _place(layout, right, high), strict=True))))
    drawn.set_facecolor(layout["plot_bgcolor"])
    drawn.set_axisbelow(True)
    for name in ("top", "right"):
        drawn.spines[name].set_visible(False)
    size = layout["font"]["size"] * POINT
    for axis, settings, spine in ((drawn.xaxis, across, "bottom"), (drawn.yaxis, up, "left")):
        drawn.spines[spine].set_visible(bool(settings.get("showline")))
        drawn.spines[spine].set_color(settings.get("linecolor", "#000000"))
        if settings.get("showgrid"):
            axis.grid(True, color=settings.get("gridcolor", "#E6E6E6"), linewidth=0.8)
        ticks = settings["tickfont"]["size"] * POINT if "tickfont" in settings else size * 0.86
        axis.set_tick_params(labelsize=ticks, colors=layout["font"]["color"], length=3.5)
        if not settings.get("showticklabels", True):
            axis.set_tick_params(labelbottom=False, labelleft=False)
        if settings.get("type", "linear") not in ("linear", "log", "-"):
            raise FigureError(f"axis type {settings['type']!r} cannot be drawn without a browser")
        label = axis.set_label_text(_plain(settings.get("title", {}).get("text", "")), fontsize=size,
                                    color=layout["font"]["color"])
        label.set_parse_math(False)
    drawn.set_xscale("log" if across.get("type") == "log" else "linear")
    drawn.set_yscale("log" if up.get("type") == "log" else "linear")
    return drawn


def _place(layout: dict[str, Any], x: float, y: float) -> tuple[float, float]:
    """Plotly's paper coordinates (0 to 1 over the plot area) as fractions of the whole figure."""
    width, height, margin = layout["width"], layout["height"], layout["margin"]
    return ((margin["l"] + x * (width - margin["l"] - margin["r"])) / width,
            (margin["b"] + y * (height - margin["t"] - margin["b"])) / height)


def _limits(drawn: Axes, layout: dict[str, Any], number: str) -> None:
    for name, axis, set_limits in (("x", drawn.xaxis, drawn.set_xlim), ("y", drawn.yaxis, drawn.set_ylim)):
        settings = layout[f"{name}axis{number}"]
        if "range" in settings:
            power = settings.get("type") == "log"
            set_limits(*(10**end if power else end for end in settings["range"]))
        if "tickvals" in settings:
            limits = axis.get_view_interval()
            ticks = [(value, text) for value, text in zip(settings["tickvals"], settings["ticktext"], strict=True)
                     if limits[0] <= value <= limits[1]]
            axis.set_major_locator(FixedLocator([value for value, _ in ticks]))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
            axis.set_ticklabels([_plain(text) for _, text in ticks])


def _trace(axes: dict[tuple[str, str], Axes], trace: dict[str, Any], handles: dict[str, Any]) -> None:
    if trace["type"] == "bar":
        _boxes(axes["x", "y"], _only("bar", trace), handles)
        return
    if trace["type"] != "scatter":
        raise FigureError(f"trace type {trace['type']!r} cannot be drawn without a browser", "", "use scatter or bar")
    _only("trace", trace)
    drawn = axes[trace.get("xaxis", "x"), trace.get("yaxis", "y")]
    modes = set(trace.get("mode", "lines").split("+"))
    if not modes <= {"lines", "markers"}:
        raise FigureError(f"trace mode {trace['mode']!r} cannot be drawn without a browser", "", "lines, markers")
    x, y = list(trace["x"]), list(trace["y"])
    style = _style(trace, modes)
    if trace.get("fill") is not None:
        if trace["fill"] != "toself":
            raise FigureError(f"fill {trace['fill']!r} cannot be drawn without a browser", "", "use toself")
        drawn.fill(x, y, facecolor=trace["fillcolor"], linewidth=0, alpha=style["alpha"])
    (line,) = drawn.plot(x, y, **style)
    for axis in ("x", "y"):
        bars = trace.get(f"error_{axis}")
        if bars is not None:
            _only("error", bars)
            sizes = [bars["arrayminus"], bars["array"]]
            drawn.errorbar(x, y, **{f"{axis}err": sizes}, fmt="none", ecolor=bars["color"], alpha=style["alpha"],
                           elinewidth=bars["thickness"] * POINT, capsize=bars["width"] * POINT)
    if trace.get("showlegend", True):
        handles.setdefault(_plain(trace["name"]), line)


def _boxes(drawn: Axes, trace: dict[str, Any], handles: dict[str, Any]) -> None:
    """Bars that lie anywhere, with text inside: what `views` makes of operations."""
    if trace.get("orientation") != "h" or "base" not in trace:
        raise FigureError("only horizontal bars with a base can be drawn without a browser")
    look, ink = trace["marker"], trace["textfont"]
    bars = drawn.barh(trace["y"], trace["x"], trace["width"], trace["base"], facecolor=look["color"],
                      edgecolor=look["line"]["color"], linewidth=look["line"]["width"] * POINT)
    for bar, text in zip(bars, trace["text"], strict=True):
        if look["pattern"]["shape"]:
            drawn.add_patch(Rectangle(bar.get_xy(), bar.get_width(), bar.get_height(), fill=False, linewidth=0,
                                      hatch=_one_of("pattern", look["pattern"]["shape"], HATCHES),
                                      edgecolor=look["pattern"]["fgcolor"], alpha=look["pattern"]["fgopacity"]))
        _write(drawn.text(bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2, _plain(text),
                          ha="center", va="center", fontsize=ink["size"] * POINT, color=ink["color"]))
    if trace.get("showlegend", True):
        handles.setdefault(_plain(trace["name"]), bars)


def _style(trace: dict[str, Any], modes: set[str]) -> dict[str, Any]:
    line, marker = _only("line", trace.get("line", {})), _only("marker", trace.get("marker", {}))
    style: dict[str, Any] = {"alpha": trace.get("opacity", 1.0), "linestyle": "none", "marker": "none",
                             "color": line.get("color", marker.get("color"))}
    if "lines" in modes:
        style |= {"linestyle": _one_of("line dash", line.get("dash"), DASHES), "linewidth": line["width"] * POINT}
        style["drawstyle"] = _one_of("line shape", line.get("shape"),
                                     {None: "default", "linear": "default", "hv": "steps-post"})
    if "markers" in modes:
        style |= {"marker": _one_of("marker symbol", marker.get("symbol"), SYMBOLS),
                  "markersize": marker["size"] * POINT, "markerfacecolor": marker["color"],
                  "markeredgecolor": marker["color"],
                  "markeredgewidth": 2.0 if marker.get("symbol") == "line-ew-open" else 0.0}
    return style


def _texts(canvas: Figure, axes: dict[tuple[str, str], Axes], layout: dict[str, Any]) -> None:
    title = _only("title", layout["title"])
    x, _ = _place(layout, title["x"], 0)
    _write(canvas.text(x, title["y"], _plain(title["text"]), va="top", fontsize=title["font"]["size"] * POINT,
                       color=layout["font"]["color"]))
    subtitle = title["subtitle"]
    below = title["y"] - 1.5 * title["font"]["size"] / layout["height"]
    _write(canvas.text(x, below, _plain(subtitle["text"]), va="top", fontsize=subtitle["font"]["size"] * POINT,
                       color=subtitle["font"]["color"]))
    for annotation in layout.get("annotations", []):
        _annotation(canvas, axes, layout, _only("annotation", annotation))


def _annotation(canvas: Figure, axes: dict[tuple[str, str], Axes], layout: dict[str, Any],
                given: dict[str, Any]) -> None:
    if given.get("showarrow", True):
        raise FigureError("an arrow cannot be drawn without a browser", given["text"][:80], "set showarrow=False")
    looks = {"fontsize": given["font"]["size"] * POINT, "color": given["font"]["color"],
             "ha": _one_of("xanchor", given.get("xanchor"), HORIZONTAL),
             "va": _one_of("yanchor", given.get("yanchor"), VERTICAL)}
    if given["xref"] == given["yref"] == "paper":
        _write(canvas.text(*_place(layout, given["x"], given["y"]), _plain(given["text"]), **looks))
    else:
        drawn = axes[given["xref"], given["yref"]]
        _write(drawn.annotate(_plain(given["text"]), (given["x"], given["y"]), (given.get("xshift", 0) * POINT, 0),
                              textcoords="offset points", **looks))


def _write(text: Text) -> None:
    text.set_parse_math(False)  # a "$" in a model name is a dollar sign


def _legend(canvas: Figure, layout: dict[str, Any], handles: dict[str, Any]) -> None:
    given = _only("legend", layout["legend"])
    if (given["orientation"], given["xanchor"], given["yanchor"]) != ("h", "left", "bottom"):
        raise FigureError("only a horizontal legend placed by its lower left corner can be drawn without a browser")
    for columns in range(len(handles) if layout["showlegend"] else 0, 0, -1):  # as many as fit side by side
        drawn = canvas.legend(list(handles.values()), list(handles), loc="lower left", ncols=columns,
                              bbox_to_anchor=_place(layout, given["x"], given["y"]), frameon=False, borderpad=0,
                              borderaxespad=0.2, fontsize=layout["font"]["size"] * POINT)
        for text in drawn.get_texts():
            _write(text)
            text.set_color(given.get("font", {}).get("color", "#000000"))
        if columns == 1 or drawn.get_window_extent().x1 <= layout["width"]:
            return
        drawn.remove()
