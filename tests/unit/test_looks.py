"""One figure, two themes: what is written is readable in both, and colours mean the same."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from hybridlab import kernelviews, looks, plots, static
from hybridlab.config import ARMS
from hybridlab.engines import ENGINES
from hybridlab.errors import ConfigError
from hybridlab.kernellab import KernelResult

RUN = Path(__file__).resolve().parents[2] / "data" / "runs" / "h200" / "20261124-082824-4268"
WRITTEN = 4.5  # contrast that WCAG 2.2 asks of text, 3 of graphics
APART = 20.0   # in CIELAB (1976); about 2.3 can just be told from each other side by side
# Machado, Oliveira and Fernandes (2009), "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# table 1: the full deficiency, over linear RGB.
SEEN = {"all three cones": np.eye(3),
        "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                                [-0.003882, -0.048116, 1.051998]]),
        "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                                  [-0.011820, 0.042940, 0.968881]])}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041]])  # of linear sRGB, D65


@pytest.fixture(scope="module")
def figure() -> go.Figure:
    result = KernelResult.open(RUN)
    return kernelviews.operations(result.rows, result.caption)


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """L*, a*, b* of a colour as an eye sees it."""
    parts = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    ratios = XYZ @ np.clip(seen @ linear, 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def apart(one: str, other: str, eye: str) -> float:
    return float(np.linalg.norm(lab(one, SEEN[eye]) - lab(other, SEEN[eye])))


@pytest.mark.parametrize("eye", SEEN)
def test_no_two_systems_look_alike(eye: str) -> None:
    """Peers stand in one figure with any arm: to one man in twelve two of the lines would be one."""
    assert set(looks.COLOURS) == set(looks.SYMBOLS) == {*ARMS, *ENGINES}
    near = {(one, other): round(found, 1) for one, other in combinations(looks.COLOURS, 2)
            if (found := apart(looks.COLOURS[one], looks.COLOURS[other], eye)) < APART}
    assert near == {}


def test_the_simulation_sees_what_is_known() -> None:
    """A matrix that is mistyped, or that changes nothing, would find any colours apart. Distances of sRGB's primaries
    by CIE's formula; a red and a green of equal lightness, which the deficiencies take for one; greys stay grey."""
    assert apart("#000000", "#FFFFFF", "all three cones") == pytest.approx(100.0, abs=0.01)
    assert apart("#FF0000", "#00FF00", "all three cones") == pytest.approx(170.6, abs=0.1)
    for eye in ("protanopia", "deuteranopia"):
        assert np.abs(lab("#808080", SEEN[eye])[1:]).max() < 0.1
        assert apart("#FF0000", "#00FF00", eye) < 100
    assert apart("#009E73", "#CC6677", "all three cones") > 70
    assert apart("#009E73", "#CC6677", "deuteranopia") < 6
    assert len(set(looks.SYMBOLS.values())) == len(looks.SYMBOLS), "and without any colour"


def test_light_is_the_figure_itself(figure: go.Figure) -> None:
    """Committed figures change when a theme touches them."""
    assert looks.themed(figure, "light") is figure


def test_dark_changes_nothing_but_colours(figure: go.Figure) -> None:
    """A theme that loses a value, or changes the figure it was given, shows another result."""
    before = copy.deepcopy(figure.to_dict())
    dark = looks.themed(figure, "dark")
    assert figure.to_dict() == before
    for one, other in zip(figure.data, dark.data, strict=True):
        assert (one.name, list(one.x), list(one.y), one.hovertemplate) == (
            other.name, list(other.x), list(other.y), other.hovertemplate)
    assert dark.layout.title.text == figure.layout.title.text


def test_what_is_written_is_readable_in_the_dark(figure: go.Figure) -> None:
    """Dark letters on dark paper, as on the buttons of a switch, which take their ground from the paper."""
    layout = looks.themed(figure, "dark").layout
    paper = layout.paper_bgcolor
    written = [layout.font.color, layout.title.subtitle.font.color, *(note.font.color for note in layout.annotations)]
    assert all(looks.contrast(ink, paper) >= WRITTEN for ink in written)
    (menu,) = layout.updatemenus
    assert looks.contrast(menu.font.color, menu.bgcolor) >= WRITTEN
    assert all(looks.contrast(colour, paper) >= 3 for name, colour in looks.COLOURS.items() if name != "eager")
    grey = looks.themed(go.Figure(go.Scatter(line={"color": looks.COLOURS["eager"]})), "dark").data[0].line.color
    assert looks.contrast(grey, paper) >= 3


def test_nothing_is_written_dark_without_a_browser(figure: go.Figure) -> None:
    """matplotlib's own black where nobody named a colour: a legend that cannot be seen."""
    canvas = static.render(looks.themed(figure, "dark"))
    written = [text for text in canvas.findobj(Text) if text.get_text().strip()]
    assert len(written) > 20
    for text in written:
        assert looks.contrast(to_hex(text.get_color()), "#141414") >= WRITTEN, text.get_text()


def test_greys_are_mirrored_and_colours_and_texts_are_not() -> None:
    """A model called #FFFFFF must keep its name, and the hybrid arm its green."""
    plain = go.Figure(go.Scatter(name="#FFFFFF", text=["#000000"], marker={"color": looks.COLOURS["hybrid"]}))
    trace = looks.themed(plain, "dark").data[0]
    assert (trace.name, trace.text, trace.marker.color) == ("#FFFFFF", ("#000000",), looks.COLOURS["hybrid"])


def test_text_in_a_box_takes_the_ink_that_reads_on_it() -> None:
    """Light letters on a light blue box."""
    bars = [go.Bar(x=[1], y=[0], marker={"color": fill}, textfont={"color": "#222222"}) for fill in (
        "#C9DDEC", "#0072B2", "#F0F0F0", "#CC79A7")]
    for bar in looks.themed(go.Figure(bars), "dark").data:
        assert looks.contrast(bar.textfont.color, bar.marker.color) >= WRITTEN


def test_every_format_takes_the_theme(figure: go.Figure, tmp_path: Path) -> None:
    """A PDF that stays light beside a dark page."""
    found = {theme: plots.write(figure, tmp_path / theme / "f", theme=theme) for theme in looks.THEMES}
    for light, dark in zip(*found.values(), strict=True):
        assert light.name == dark.name
        assert light.read_bytes() != dark.read_bytes()
    assert 'background: #141414' in (tmp_path / "dark" / "f.html").read_text()
    with pytest.raises(ConfigError, match="did you mean 'dark'"):
        plots.write(figure, tmp_path / "f", theme="drak")


def test_a_pdf_holds_its_text_as_text(figure: go.Figure) -> None:
    """Outlines cannot be searched, and publishers refuse fonts of type 3."""
    found = static.pdf(figure)
    assert found.startswith(b"%PDF")
    assert found == static.pdf(figure)
    assert b"/Type3" not in found
    assert b"/FontFile2" in found
