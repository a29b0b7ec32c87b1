"""Figures: what is drawn is what the rows say, text from outside stays text, and files need no browser."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from matplotlib.colors import to_hex

from hybridlab import looks, plots, static, stats
from hybridlab.config import ARMS
from hybridlab.errors import HybridlabError, StatisticsError

ALL = (plots.ablation, plots.ttft_by_length, plots.itl_by_arm, plots.itl_by_position)
HOSTILE = '<img src=x onerror=alert(1)></script><script>alert(2)</script> $\\href{javascript:alert(3)}{x}$ \x1b[31m "\''


def rows(arms=ARMS, repeats=12, gaps=400, lengths=(10, 50), run_id="r1"):
    """Synthetic rows: arm k is k + 1 times as fast as the first, with a spread of a few percent."""
    rng, out = np.random.default_rng(0), []
    for k, arm in enumerate(arms):
        for length in lengths:
            for metric, count in (("ttft", repeats), ("itl", gaps // len(lengths))):
                for i in range(count):
                    index = 0 if metric == "ttft" else i + 1
                    out.append({"run_id": run_id, "round": i if metric == "ttft" else 0, "arm": arm, "metric": metric,
                                "prompt_tokens": length, "index": index, "position": length + index,
                                "ms": 12 / (k + 1) * (1 + length / 100) * rng.lognormal(0, 0.03)})
    return pd.DataFrame(out).sample(frac=1, random_state=1)  # in no order, as measured


@pytest.mark.parametrize("draw", ALL)
def test_each_figure_is_complete(draw):
    """A figure without units, run id or sample size cannot be judged by who sees it alone."""
    figure = draw(rows(), "run r1 · cpu-test · tiny · n = 96")
    layout = figure.to_dict()["layout"]
    assert "run r1" in layout["title"]["subtitle"]["text"]
    assert "(ms" in layout["yaxis"]["title"]["text"] + layout["xaxis"]["title"]["text"]
    assert [trace.name for trace in figure.data if trace.showlegend] == list(ARMS)
    assert {trace.name: (trace.line.color or trace.marker.color) for trace in figure.data if trace.showlegend} == {
        arm: looks.COLOURS[arm] for arm in ARMS}
    assert "95 %" in layout["annotations"][0]["text"]


def test_ttft_points_are_the_medians_with_their_intervals():
    """An error bar that is not the interval of the statistics would be decoration."""
    data = rows()
    trace = next(t for t in plots.ttft_by_length(data, "").data if t.name == "jit")
    for x, y, up, down in zip(trace.x, trace.y, trace.error_y.array, trace.error_y.arrayminus, strict=True):
        cell = data[(data["arm"] == "jit") & (data["metric"] == "ttft") & (data["prompt_tokens"] == x)]
        expected = stats.quantile(cell["ms"], 0.5)
        assert (y, y + up, y - down) == pytest.approx((expected.value, expected.high, expected.low))


def test_the_distribution_passes_through_its_own_quantiles():
    """A share counted from the wrong end would show the tail as the bulk."""
    figure = plots.itl_by_arm(rows(), "")
    curve = next(t for t in figure.data if t.name == "graph" and t.mode == "lines")
    marks = [t for t in figure.data if t.legendgroup == "graph" and t.mode == "markers"]
    assert [t.y[0] for t in marks] == pytest.approx([50, 1])
    for mark in marks:
        longer = [share for x, share in zip(curve.x, curve.y, strict=True) if x >= mark.x[0]]
        assert max(longer) == pytest.approx(mark.y[0], abs=0.6)


@pytest.mark.parametrize(("gaps", "shown"), [(366, False), (368, True)])
def test_no_figure_shows_a_p99_without_the_sample_for_it(gaps, shown):
    """The rule that binds the table binds the figure too."""
    data = rows(gaps=gaps)
    marks = [t for t in plots.itl_by_arm(data, "").data if t.mode == "markers" and t.y[0] < 49]
    assert len(marks) == (4 if shown else 0)
    figure = plots.ablation(data, "")
    assert any("p99: " in (t.hovertemplate or "") for t in figure.data) is shown
    assert ("p99 needs 368" in figure.layout.annotations[0].text) is not shown


def test_steps_a_launch_stand_behind_their_arm_in_lines_of_their_own():
    """"16" and "steps" on two lines, below the edge of the figure; lines that cannot be told apart; an arm far from
    the same arm with more steps."""
    data = rows(arms=("eager", "hybrid", "hybrid fused", "hybrid fused 16 steps", "hybrid 16 steps", "hybrid 4 steps"))
    figure = plots.ablation(data, "")
    names = [text.rpartition("<br>")[0] for text in figure.layout.xaxis2.ticktext]
    assert names == ["eager", "hybrid", "hybrid<br>4 steps", "hybrid<br>16 steps", "hybrid<br>fused",
                     "hybrid<br>fused<br>16 steps"]
    assert {trace.line.dash for trace in figure.data if trace.mode == "lines+markers"} == {
        "solid", "dashdot", "longdash"}
    assert "several steps a launch long-dashed" in figure.layout.annotations[0].text
    assert static.png(figure).startswith(b"\x89PNG")


def test_the_headline_shows_the_ratio_of_the_table():
    """The number under an arm is what people will quote."""
    data = rows()
    table = stats.summary(data, arms=ARMS)
    pooled = table[(table["prompt_tokens"] == "all") & (table["metric"] == "itl")]
    expected = [f"{cell.arm}<br>{cell.ratio_to_eager:.2f}×" for cell in pooled.itertuples()]
    assert list(plots.ablation(data, "").layout.xaxis2.ticktext) == expected


@pytest.mark.parametrize("data", [rows(arms=("hybrid",)), rows(repeats=3, gaps=4), rows(lengths=(10,), gaps=0)])
def test_small_and_partial_runs_are_drawn_truthfully(data):
    """A quick run of one arm or three repeats must give a figure, without intervals it has no data for."""
    figure = plots.ablation(data, "c")
    small = (data["metric"] == "ttft").sum() / data["arm"].nunique() / data["prompt_tokens"].nunique() < 6
    assert ("single values" in figure.layout.annotations[0].text) is bool(small)
    assert static.png(figure).startswith(b"\x89PNG")


def test_rows_that_cannot_be_one_figure_are_refused():
    """Two runs in one figure, an arm that does not exist, or no rows at all would be drawn as if they were fine."""
    with pytest.raises(StatisticsError, match="2 runs"):
        plots.ttft_by_length(pd.concat([rows(), rows(run_id="r2")]), "")
    with pytest.raises(HybridlabError, match="unknown"):
        plots.ttft_by_length(rows(arms=(HOSTILE,)), "")
    with pytest.raises(StatisticsError, match="no rows of metric"):
        plots.itl_by_arm(rows(gaps=0), "")


class Elements(HTMLParser):
    """Collects tags, and all attributes that could run something."""

    def __init__(self):
        super().__init__()
        self.tags, self.handlers = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def elements(path):
    parser = Elements()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.tags, parser.handlers


def test_hostile_text_adds_no_element_and_no_formula(tmp_path):
    """A model name from a stranger's run ends up in a page that is opened from disk."""
    tame, wild = plots.ablation(rows(), "harmless"), plots.ablation(rows(), HOSTILE * 2000)
    (plain,), (attacked,) = (plots.write(figure, tmp_path / name, ("html",))
                             for figure, name in ((tame, "tame"), (wild, "wild")))
    assert elements(attacked) == elements(plain)
    assert elements(attacked)[1] == []
    shown = wild.layout.title.subtitle.text
    assert "<" not in shown
    assert "$" not in shown
    assert "\x1b" not in shown
    assert len(shown) < 1000
    trees = [ElementTree.fromstring(static.svg(figure)) for figure in (tame, wild)]
    tags, wild_tags = ({element.tag for element in tree.iter()} for tree in trees)
    assert tags == wild_tags
    assert not any(name.startswith("on") for element in trees[1].iter() for name in element.attrib)
    drawn = static.render(wild)
    assert not any(text.get_parse_math() for text in drawn.texts)
    texts = [text.get_text() for text in drawn.texts]
    assert any("<img src=x onerror=alert(1)>" in text and "$" in text for text in texts)  # shown as it is written


def test_files_are_the_same_bytes_each_time_and_open_offline(tmp_path):
    """A figure in git that changes at every redraw hides real changes; a page that needs a network shows nothing."""
    data = rows()
    first = plots.write(plots.ablation(data, "c"), tmp_path / "a" / "figure")
    second = plots.write(plots.ablation(data, "c"), tmp_path / "b" / "figure")
    assert [path.name for path in first] == ["figure.html", "figure.svg", "figure.png", "figure.pdf"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    page = first[0].read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in page
    assert "https://cdn" not in page
    assert (tmp_path / "a" / "plotly.min.js").stat().st_size > 1_000_000


def test_the_static_view_shows_the_same_data():
    """Two renderings that differ would be two results."""
    figure = plots.ablation(rows(), "c")
    drawn = static.render(figure)
    left, right = drawn.axes
    lines = [line for line in left.get_lines() if line.get_marker() not in ("None", "none", "|", "_")]
    for trace, line in zip([t for t in figure.data if t.xaxis != "x2"], lines, strict=True):
        assert list(line.get_xdata()) == list(trace.x)
        assert list(line.get_ydata()) == list(trace.y)
        assert to_hex(line.get_color()).upper() == trace.line.color
    assert left.get_ylim() == tuple(figure.layout.yaxis.range)
    assert left.get_ylabel() == figure.layout.yaxis.title.text
    assert [label.get_text().split("\n")[0] for label in right.get_xticklabels()] == list(ARMS)
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == list(ARMS)


def test_a_logarithmic_axis_is_drawn_as_one():
    """A linear axis under logarithmic ticks would move every point."""
    (axes,) = static.render(plots.itl_by_arm(rows(), "c")).axes
    figure = plots.itl_by_arm(rows(), "c")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim() == pytest.approx([10**end for end in figure.layout.xaxis.range])


@pytest.mark.parametrize("change", [
    lambda f: f.add_bar(x=[1], y=[2]),
    lambda f: f.add_scatter(x=[1], y=[1], mode="markers+text"),
    lambda f: f.add_scatter(x=[1], y=[1], fill="tozeroy", line={"width": 1}),
    lambda f: f.update_xaxes(type="category"),
    lambda f: f.update_yaxes(autorange="reversed"),
    lambda f: f.update_layout(barmode="stack"),
    lambda f: f.add_annotation(text="x", x=1, y=1, xref="x", yref="y", font={"size": 9, "color": "#000000"}),
    lambda f: f.update_traces(marker_symbol="hourglass"),
    lambda f: f.update_layout(title_text="<b>bold</b>"),
    lambda f: f.update_layout(legend_orientation="v"),
])
def test_the_static_view_refuses_what_it_cannot_draw(change):
    """Left out in silence, a trace or a reversed axis would make a wrong figure."""
    figure = plots.ttft_by_length(rows(), "c")
    change(figure)
    with pytest.raises(static.FigureError):
        static.render(figure)


def test_a_figure_of_someone_else_is_refused_clearly():
    """A KeyError from the depths would not say that this renderer is for our figures."""
    with pytest.raises(HybridlabError):
        static.render(go.Figure(go.Scatter(x=[1], y=[1])))


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    """Half the files of a figure would look like all of them."""
    with pytest.raises(HybridlabError, match="svg"):
        plots.write(plots.ttft_by_length(rows(), "c"), tmp_path / "x", ("html", "svgg"))
    assert list(tmp_path.iterdir()) == []


def test_figures_serialise_and_need_no_torch():
    """Drawing committed rows must work where torch is not installed."""
    json.loads(plots.ablation(rows(), "c").to_json())
    subprocess.run([sys.executable, "-c", "import sys, hybridlab.plots; sys.exit('torch' in sys.modules)"], check=True)
