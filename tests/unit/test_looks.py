"""One figure, two themes: what is written is readable in both, and colours mean the same."""

from __future__ import annotations

import copy
from pathlib import Path

import plotly.graph_objects as go
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from hybridlab import kernelviews, looks, plots, static
from hybridlab.errors import ConfigError
from hybridlab.kernellab import KernelResult

RUN = Path(__file__).resolve().parents[2] / "data" / "runs" / "h200" / "20261124-082824-4268"
WRITTEN = 4.5  # contrast that WCAG 2.2 asks of text, 3 of graphics


@pytest.fixture(scope="module")
def figure() -> go.Figure:
    result = KernelResult.open(RUN)
    return kernelviews.operations(result.rows, result.caption)


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
