"""Figures of timed kernels: what is drawn is what rows say, a variant that was not timed is not drawn."""


import pandas as pd
import pytest

from hybridlab import kernelviews, plots, static
from hybridlab.errors import StatisticsError

ALL = [draw for _, draw in kernelviews.FIGURES.values()]


def bars(figure):
    """Label, start and length of the bars that are shown, in ms, from the top."""
    labels = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    return [(labels[trace.y[0]], trace.base[0], pytest.approx(trace.x[0])) for trace in figure.data
            if trace.type == "bar" and trace.visible is not False]


def without_early(rows):
    return rows[~rows["variant"].isin(["kernel, pdl", "fused, pdl"])]


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("n", [7, 3])
def test_each_figure_is_complete_and_needs_no_browser(draw, n, kernel_rows):
    """A figure without units, run or sample size cannot be judged; too few replays must neither fail nor show bars."""
    figure = draw(kernel_rows(n=n), "run r1 · cpu-test · tiny")
    layout = figure.to_dict()["layout"]
    assert "run r1" in layout["title"]["subtitle"]["text"]
    assert f"medians of n = {n} replays" in layout["annotations"][0]["text"]
    assert ("too few for intervals" in layout["annotations"][0]["text"]) == (n == 3)
    titles = " ".join(axis["title"]["text"] for name, axis in layout.items() if name[1:5] == "axis" and "title" in axis)
    assert any(unit in titles for unit in ("(µs)", "(ms)", "(GB/s)"))
    assert any(trace.to_plotly_json().get(f"error_{axis}") for trace in figure.data for axis in "xy") == (n == 7)
    assert static.png(figure).startswith(b"\x89PNG")
    assert static.svg(figure) == static.svg(figure)


def test_each_operation_is_marked_at_its_median(kernel_rows):
    """A mark over another operation, at a mean, or a floor of another context."""
    figure = kernelviews.operations(kernel_rows(), "")
    shown = [trace for trace in figure.data if trace.visible]
    marks = {trace.name: trace for trace in shown if trace.mode == "markers"}
    assert list(figure.layout.xaxis.ticktext) == ["project<br>qkv", "attend_next"]
    assert {name: list(trace.y) for name, trace in marks.items()} == {
        "torch": [40.0, 30.0], "kernel": [20.0, 20.0], "kernel, pdl": [16.0, 18.0]}  # the context shown is 64
    assert {name: [round(x) for x in trace.x] for name, trace in marks.items()} == {name: [0, 1] for name in marks}
    assert list(marks["kernel"].error_y.array) == list(marks["kernel"].error_y.arrayminus) == [3.0, 3.0]
    assert [trace.y[0] for trace in shown if trace.name == "floor"] == pytest.approx([8.0, 1.6])
    assert "× torch: 2.00 [" in marks["kernel"].customdata[0]


def test_the_step_falls_from_torch_to_the_floor(kernel_rows):
    """A saving that starts where its step does not end, a wrong sign, or the graph compared with other kernels."""
    figure = kernelviews.waterfall(kernel_rows(contexts={1: 0.0}), "")
    assert bars(figure) == [
        ("torch<br>5.00 [4.70, 5.30] ms", 0.0, 5.0), ("fusing kernels<br>−2.00 [−2.00, −2.00] ms", 3.0, 2.0),
        ("fused<br>3.00 [2.70, 3.30] ms", 0.0, 3.0), ("starting early<br>−0.500 [−0.500, −0.500] ms", 2.5, 0.5),
        ("fused, pdl<br>2.50 [2.20, 2.80] ms", 0.0, 2.5), ("beyond reading<br>0.500 ms", 2.0, 0.5),
        ("floor<br>2.00 ms", 0.0, 2.0), ("replaying as a graph<br>−5.50 [−5.50, −5.50] ms", 2.5, 5.5),
        ("fused, no graph<br>8.00 [7.70, 8.30] ms", 0.0, 8.0)]


def test_what_costs_time_is_drawn_as_a_cost(kernel_rows):
    """Fused kernels that are slower here, painted as a saving."""
    rows = kernel_rows(steps={"torch": (3000.0, 100), "fused": (5000.0, 20)}, contexts={1: 0.0})
    figure = kernelviews.waterfall(rows, "")
    assert bars(figure)[1] == ("fusing kernels<br>+2.00 [+2.00, +2.00] ms", 3.0, 2.0)
    assert figure.data[2].marker.color == kernelviews.MORE
    assert kernelviews.waterfall(kernel_rows(contexts={1: 0.0}), "").data[2].marker.color == kernelviews.LESS


def test_a_variant_that_was_not_timed_is_left_out(kernel_rows):
    """A bar or a line for what this device cannot run would be invented."""
    rows = without_early(kernel_rows(contexts={1: 0.0}))
    names = [label.partition("<br>")[0] for label, *_ in bars(kernelviews.waterfall(rows, ""))]
    assert names == ["torch", "fusing kernels", "fused", "beyond reading", "floor", "replaying as a graph",
                     "fused, no graph"]
    assert {trace.name for trace in kernelviews.operations(rows, "").data} == {"torch", "kernel", "floor"}
    assert [trace.name for trace in kernelviews.by_context(rows, "").data] == [
        "read rate", "torch", "fused, no graph", "fused"]
    only = kernel_rows(steps={"fused, no graph": (8000.0, 20)}, contexts={1: 0.0})
    assert [label.partition("<br>")[0] for label, *_ in bars(kernelviews.waterfall(only, ""))] == [
        "beyond reading", "floor", "fused, no graph"]


def test_the_rate_is_bytes_over_time(kernel_rows):
    """A rate of other bytes, an interval upside down, or contexts out of order."""
    lines = {trace.name: trace for trace in kernelviews.by_context(kernel_rows(), "").data}
    assert list(lines["fused"].x) == [1, 64]
    assert list(lines["fused"].y) == pytest.approx([8.0 / 3.0, 9.0 / 4.0])
    assert list(lines["read rate"].y) == pytest.approx([4.0, 5.0])
    assert lines["fused"].error_y.array[0] == pytest.approx(8.0 / 2.7 - 8.0 / 3.0)
    assert lines["fused"].error_y.arrayminus[0] == pytest.approx(8.0 / 3.0 - 8.0 / 3.3)
    assert "67 % of the read rate" in lines["fused"].customdata[0]


@pytest.mark.parametrize("draw", [kernelviews.operations, kernelviews.waterfall])
def test_the_switch_shows_each_context_alone(draw, kernel_rows):
    """A button that leaves marks of another context visible, or its labels, mixes two measurements in one picture."""
    figure = draw(kernel_rows(), "caption")
    menu = figure.layout.updatemenus[0]
    assert [button.label for button in menu.buttons] == ["context 1", "context 64"]
    shown = [button.args[0]["visible"] for button in menu.buttons]
    assert all(sum(column) == 1 for column in zip(*shown, strict=True))
    assert [trace.visible for trace in figure.data] == shown[menu.active]
    assert figure.layout.title.subtitle.text.startswith(menu.buttons[menu.active].label)
    if draw is kernelviews.waterfall:
        texts = [button.args[1]["yaxis.ticktext"] for button in menu.buttons]
        assert "torch<br>5.00 [4.70, 5.30] ms" in texts[0]
        assert "torch<br>6.00 [5.70, 6.30] ms" in texts[1]
        assert tuple(figure.layout.yaxis.ticktext) == tuple(texts[menu.active])


@pytest.mark.parametrize("draw", ALL)
def test_names_from_outside_stay_text(draw, kernel_rows, tmp_path, hostile, require_text):
    """The name of a model that comes from a config must not become markup in an exported page."""
    (page,) = plots.write(draw(kernel_rows(), hostile), tmp_path / "figure", ["html"])
    require_text(page)


@pytest.mark.parametrize(("draw", "metric"), [(draw, metric) for metric, draw in kernelviews.FIGURES.values()])
def test_what_is_not_there_is_refused(draw, metric, kernel_rows):
    """An empty picture looks like a result; two runs in one look like a comparison."""
    rows = kernel_rows()
    with pytest.raises(StatisticsError, match=f"metric '{metric}'"):
        draw(rows[rows["metric"] != metric], "")
    with pytest.raises(StatisticsError, match="2 runs"):
        draw(pd.concat([rows, kernel_rows(run_id="r2")]), "")
