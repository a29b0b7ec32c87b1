"""Figures of traces: what is drawn is what the table says, names stay text, and files need no browser."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

from hybridlab import boxes, events, gaps, plots, static, traceviews
from hybridlab.errors import StatisticsError, TraceError

US = 1000
HOSTILE = '<img src=x onerror=alert(1)></script><script>alert(2)</script> $\\href{javascript:alert(3)}{x}$'
ALL = list(traceviews.FIGURES.values())


def event(kind: str, name: str, start: float, end: float, **more: Any) -> dict[str, Any]:
    thread = {} if kind in events.DEVICE else {"thread": 1}
    return {"kind": kind, "name": name, "start_ns": round(start * US), "end_ns": round(end * US), **thread, **more}


def step(at: float, number: int, more: float = 0.0, kernel: str = "gemm") -> list[dict[str, Any]]:
    """A decode token of 100 µs and `more` on the host: one kernel from Python, two kernels and a copy from a graph."""
    first, second = 10 * number + 1, 10 * number + 2
    device = {"stream": 7, "correlation": second, "graph": 5}
    return [event("range", "decode", at, at + 100 + more, category="decode", payload=16 + number),
            event("range", "replay", at + 10, at + 90, category="replay"),
            event("op", "aten::mm", at + 12, at + 30), event("op", "aten::t", at + 13, at + 14),
            event("launch", "cudaLaunchKernel", at + 15, at + 20, correlation=first),
            event("kernel", kernel, at + 30, at + 40, stream=7, correlation=first),
            event("launch", "cudaGraphLaunch", at + 42, at + 50, correlation=second),
            event("kernel", "fused", at + 55, at + 65, node=1, **device),
            event("kernel", "fused", at + 67, at + 77, node=2, **device),
            event("copy", "Memcpy DtoH", at + 78, at + 80, node=3, **device)]


def trace(kernel: str = "gemm", more: tuple[float, ...] = (0, 50, 10)) -> pd.DataFrame:
    """A prefill, then three decode tokens; the median one by host time is the third, 110 µs."""
    prefill = [event("range", "prefill", 0, 500, category="prefill", payload=16)]
    tokens = (step(1000 * number, number, extra, kernel) for number, extra in enumerate(more, 1))
    return events.tidy(prefill + [row for rows in tokens for row in rows])


def on_cpu() -> pd.DataFrame:
    rows = [event("range", "decode", 50, 150, category="decode"), event("op", "aten::mm", 60, 100),
            event("op", "aten::t", 61, 70), event("op", "aten::add", 100, 110)]
    return events.tidy(rows)


def spans(figure: go.Figure, name: str) -> list[tuple[float, float, float]]:
    """Start, end and middle height of each rectangle of a class."""
    drawn = next(trace for trace in figure.data if trace.name == name and trace.fill)
    x, y = list(drawn.x), list(drawn.y)
    assert x[4::5] == y[4::5] == [None] * (len(x) // 5)
    return [(x[i], x[i + 2], round((y[i] + y[i + 1]) / 2, 2)) for i in range(0, len(x), 5)]


def lane(figure: go.Figure, height: float) -> str:
    ticks = zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True)
    return str(min(ticks, key=lambda tick: abs(tick[0] - height))[1])


def hovers(figure: go.Figure) -> str:
    return "\n".join(text for drawn in figure.data if drawn.customdata is not None for text in drawn.customdata)


@pytest.mark.parametrize("draw", ALL)
def test_each_figure_is_complete_and_needs_no_browser(draw: Any) -> None:
    """A figure without unit, run or rule cannot be judged, and one that only a browser draws is in no README."""
    figure = draw({"eager": trace(), "hybrid full": trace()}, "run r1 · cpu-test")
    layout = figure.to_dict()["layout"]
    assert "run r1" in layout["title"]["subtitle"]["text"]
    assert any(unit in layout["xaxis"]["title"]["text"] for unit in ("(µs", "(ms"))
    assert layout["annotations"][0]["text"]
    assert static.png(figure).startswith(b"\x89PNG")
    assert static.svg(figure) == static.svg(figure)


def test_a_token_starts_at_zero_in_every_arm() -> None:
    """Arms on different clocks would show the later one as the slower one."""
    figure = traceviews.token({"eager": trace(), "hybrid": trace(more=(20, 20, 20))})
    (first, second), kernels = spans(figure, "the token"), spans(figure, "kernel launched by Python")
    assert (first[:2], second[:2]) == ((0, 110), (0, 120))
    assert [span[:2] for span in kernels] == [(30, 40), (30, 40)]
    assert first[2] > second[2]


def test_each_event_lies_in_its_lane_and_class() -> None:
    """A kernel of a graph shown as launched by Python would turn the comparison round."""
    figure = traceviews.token({"hybrid": trace()})
    found = {name: [(start, end, lane(figure, y)) for start, end, y in spans(figure, name)]
             for name in {drawn.name for drawn in figure.data}}
    assert found == {
        "the token": [(0, 110, "Python")], "range in it": [(10, 90, "Python")],
        "PyTorch operation": [(12, 30, "Python")],  # the one that called the other
        "launch call": [(15, 20, "launches"), (42, 50, "launches")],
        "kernel launched by Python": [(30, 40, "device")],
        "kernel in a graph": [(55, 65, "device"), (67, 77, "device")], "copy": [(78, 80, "device")]}
    assert list(figure.layout.yaxis.ticktext) == ["hybrid", "Python", "launches", "device"]


def test_hover_says_what_started_a_kernel_and_when() -> None:
    """A kernel with another's launch would send the reader to the wrong line of Python."""
    text = hovers(traceviews.token({"hybrid": trace()}))
    assert "gemm<br>10 µs from 30.0 µs on<br>started by cudaLaunchKernel at 15.0 µs" in text
    assert "fused<br>10 µs from 67.0 µs on<br>node 2 of a graph, started by cudaGraphLaunch at 42.0 µs" in text
    assert "position 19" in text
    long = traceviews.token({"eager": trace(more=(61_999.6,))})
    assert "decode<br>62,100 µs from 0.0 µs on" in hovers(long)


def test_a_kernel_whose_launch_is_missing_is_kept() -> None:
    """Device work that vanishes because its call is not in the trace would look like idling."""
    table = trace()
    lost = events.tidy([*table.to_dict("records"), event("kernel", "stray", 3045, 3050, stream=7)])
    figure = traceviews.token({"hybrid": lost})
    assert [span[:2] for span in spans(figure, "of another token")] == [(45, 50)]
    assert "stray<br>5 µs from 45.0 µs on<br>its launch is not known<br>of another token" in hovers(figure)


def test_what_ran_for_another_token_is_not_shown_as_this_ones() -> None:
    """Run ahead, the device works on the token before: its kernels would count for this one, or look like idling."""
    ahead = events.tidy([
        event("range", "decode", 0, 10, category="decode"), event("range", "decode", 20, 31, category="decode"),
        event("launch", "cudaGraphLaunch", 2, 8, correlation=1),
        event("launch", "cudaGraphLaunch", 22, 28, correlation=2),
        event("kernel", "one", 12, 50, stream=7, correlation=1),
        event("kernel", "two", 50, 90, stream=7, correlation=2),
        event("sync", "cudaEventSynchronize", 40, 91)])
    figure = traceviews.token({"hybrid": ahead}, token=1)
    assert [span[:2] for span in spans(figure, "of another token")] == [(0, 30)]
    assert [span[:2] for span in spans(figure, "kernel in a graph")] == [(30, 70)]  # also without a graph's number
    assert [span[:2] for span in spans(figure, "waiting call")] == [(20, 70)]  # cut at the last work


@pytest.mark.parametrize(("more", "length"), [((0, 50, 10), 110), ((0, 50, 10, 20), 110), ((7,), 107)])
def test_the_token_shown_is_the_median_one(more: tuple[float, ...], length: float) -> None:
    """The first token, or the fastest, would stand for all of them; a prefill is no decode token."""
    assert spans(traceviews.token({"hybrid": trace(more=more)}), "the token")[0][:2] == (0, length)
    assert spans(traceviews.token({"hybrid": trace(more=more)}, token=0), "the token")[0][:2] == (0, 500)


def test_a_trace_of_a_cpu_has_one_lane() -> None:
    """Empty lanes for a device that is not there would look like one that does nothing."""
    figure = traceviews.token({"eager": on_cpu()})
    assert list(figure.layout.yaxis.ticktext) == ["eager", "Python"]
    assert [span[:2] for span in spans(figure, "PyTorch operation")] == [(10, 50), (50, 60)]
    ms = traceviews.parts(on_cpu())
    assert (ms["ops_us"], ms["python_us"], ms["busy_us"], ms["n"]) == pytest.approx((0.05, 0.05, 0, 1))
    assert {drawn.name for drawn in traceviews.shares({"eager": on_cpu()}, "").data} == {"operations", "Python"}


def test_thousands_of_kernels_are_a_few_traces() -> None:
    """An element of the page for each kernel would make zooming take seconds."""
    many = [event("range", "decode", 0, 50_000, category="decode")]
    for n in range(3000):
        many += [event("launch", "cudaLaunchKernel", 16 * n, 16 * n + 5, correlation=n),
                 event("kernel", "gemm", 16 * n + 8, 16 * n + 10, stream=7, correlation=n)]
    figure = traceviews.token({"eager": events.tidy(many)})
    assert len(figure.data) == 3 * 3
    assert len(spans(figure, "kernel launched by Python")) == 3000


def test_a_long_event_answers_the_pointer_everywhere() -> None:
    """Points at the ends alone would leave the middle of a long wait without a text."""
    figure = traceviews.token({"hybrid": trace()})
    points = next(drawn for drawn in figure.data if drawn.name == "the token" and drawn.customdata is not None)
    px = boxes.plot_px(figure) / 110
    assert max(b - a for a, b in zip(points.x, points.x[1:], strict=False)) * px <= traceviews.NEAR
    assert len(points.x) == len(points.y) == len(points.customdata)


def test_shares_are_medians_and_add_up() -> None:
    """A mean would follow one slow token, and a part of another clock would not add up."""
    ms = traceviews.parts(trace())
    assert ms == pytest.approx({"n": 3, "busy_us": 0.032, gaps.LATE: 0.015, gaps.INSIDE: 0.003, gaps.DEVICE: 0.0,
                                gaps.UNKNOWN: 0.0, "launch_us": 0.013, "sync_us": 0.0, "python_us": 0.097})
    figure = traceviews.shares({"eager": trace(), "hybrid": trace(more=(0, 0, 0))}, "")
    drawn = {bar.name: [(round(base, 6), round(base + x, 6)) for base, x in zip(bar.base, bar.x, strict=True)]
             for bar in figure.data}
    assert drawn == {"kernels and copies": [(0, 0.032)] * 2, "idle: launched late": [(0.032, 0.047)] * 2,
                     "idle: inside a graph": [(0.047, 0.05)] * 2, "launch calls": [(0, 0.013)] * 2,
                     "Python": [(0.013, 0.11), (0.013, 0.1)]}
    assert "n = 3 decode tokens" in figure.layout.annotations[0].text
    assert list(figure.layout.yaxis.ticktext) == ["eager", "hybrid"] * 2
    uneven = traceviews.shares({"eager": trace(), "hybrid": trace(more=(0,))}, "")
    assert "n = 1 to 3 decode tokens" in uneven.layout.annotations[0].text


def test_gaps_rise_to_all_of_them() -> None:
    """A share counted from the wrong end would show short gaps as rare."""
    table = trace(more=(0,))
    (line,) = traceviews.gap_histogram({"hybrid": table}, "").data
    assert sorted(gaps.gaps(table)["us"]) == [1, 2, 15]
    assert (list(line.x), list(line.y)) == ([1, 1, 2, 15], pytest.approx([0, 100 / 3, 200 / 3, 100]))


def test_arms_that_are_not_ours_have_a_look_too() -> None:
    """A trace of another engine under a name of its own would fail, or be drawn as one of our arms."""
    figure = traceviews.gap_histogram({"hybrid": trace(), "vLLM <1>": trace()}, "")
    assert [line.name for line in figure.data] == ["hybrid", "vLLM &lt;1&gt;"]
    assert len({line.line.color for line in figure.data}) == 2


@pytest.mark.parametrize("draw", ALL)
def test_names_from_a_trace_stay_text(draw: Any) -> None:
    """A kernel, an arm or a range may be called anything; markup in it would run in whoever opens the page."""
    table = trace(kernel=HOSTILE)
    table.loc[table["name"] == "replay", "name"] = HOSTILE
    figure = draw({HOSTILE: table}, HOSTILE)
    assert "<img" not in json.dumps(figure.to_dict(), default=str)
    assert "<script" not in json.dumps(figure.to_dict(), default=str)
    assert static.svg(figure)


def test_a_page_with_hostile_names_can_be_written(tmp_path: Any) -> None:
    """The files are what others open."""
    page = plots.write(traceviews.token({"a": trace(kernel=HOSTILE)}), tmp_path / "token", ["html"])[0].read_text()
    assert "<img src=x" not in page
    assert "<script>alert(2)" not in page


def test_what_cannot_be_drawn_is_refused_with_its_reason() -> None:
    """An empty figure would be taken for a device that never idles or a token that takes no time."""
    for draw in ALL:
        with pytest.raises(StatisticsError, match="no trace"):
            draw({}, "")
    with pytest.raises(StatisticsError, match="no decode token"):
        traceviews.token({"eager": events.tidy([])})
    with pytest.raises(StatisticsError, match="no decode token"):
        traceviews.shares({"eager": trace(more=())}, "")
    with pytest.raises(TraceError, match="no token 9"):
        traceviews.token({"eager": trace()}, token=9)


def test_a_trace_without_a_device_says_so_instead_of_gaps() -> None:
    """The notebook shows this figure on every machine; without a device an error would end it."""
    figure = traceviews.gap_histogram({"eager": on_cpu()}, "")
    assert not figure.data
    assert "no work of a device" in figure.to_json()


def test_no_figure_needs_torch() -> None:
    """A notebook that only shows a trace would wait for torch, and need it."""
    code = "import sys; from hybridlab import traceviews, perfetto; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
