"""Figures of cache runs: what is drawn is what rows say, names stay text, the switch shows one setting at a time."""

import math

import pandas as pd
import pytest

from hybridlab import panels, plots, static, tallies, timeline
from hybridlab.errors import ConfigError, StatisticsError

ALL = (timeline.stream, timeline.over_time, timeline.first_tokens, timeline.costs, timeline.disturbed)


@pytest.mark.parametrize("draw", ALL)
def test_each_figure_is_complete_and_needs_no_browser(draw, cache_rows):
    """A figure without units, run id or sample size cannot be judged by who sees it alone."""
    figure = draw(cache_rows(requests=20, gaps=40), "run r1 · cpu-test · tiny")
    layout = figure.to_dict()["layout"]
    assert "run r1" in layout["title"]["subtitle"]["text"]
    assert "n = " in layout["annotations"][0]["text"]
    titles = " ".join(axis["title"]["text"] for name, axis in layout.items() if name[1:5] == "axis" and "title" in axis)
    assert "(ms" in titles or "(tokens)" in titles
    assert static.png(figure).startswith(b"\x89PNG")
    assert static.svg(figure) == static.svg(figure)


def test_each_request_is_one_mark_under_what_served_it(cache_rows):
    """A request that is missing, drawn twice or called a hit when its graph was captured first would be a lie."""
    rows = cache_rows(requests=40)
    table = tallies.requests(rows)
    for name in tallies.settings(table):
        own = table[(table["setting"] == name) & (table["round"] == 0)]
        figure = timeline.stream(rows, "", setting=name)
        marks = {trace.name: sorted(trace.x) for trace in figure.data if trace.name in timeline.OUTCOMES}
        assert marks == {str(outcome): sorted(part["request"] + 1) for outcome, part in own.groupby("outcome")}
        assert sum(map(len, marks.values())) == 40
        captured = next(trace for trace in figure.data if trace.name == "captured")
        assert sum(captured.customdata) == own["captures"].sum()
        held = next(trace for trace in figure.data if trace.name == "graphs")
        assert list(held.y) == own["graphs"].tolist()
    assert not table.loc[table["setting"] == "capture=never", "hit"].any()
    sync = table[table["setting"] == "capture=sync"]
    assert set(sync["outcome"]) == {"replayed (hit)", "captured, then replayed"}


def test_rows_of_no_request_do_not_count(cache_rows):
    """Building a runtime and settling captures have rows too; as requests they would shift every share."""
    rows = cache_rows(requests=20)
    extra = rows[rows["part"] == "stream"].iloc[:2].assign(metric=["start", "settle"], request=None, captures=50)
    both = pd.concat([rows, extra.astype({"request": "Int64"})])
    pd.testing.assert_frame_equal(tallies.requests(both), tallies.requests(rows))


def test_the_switch_shows_each_setting_alone(cache_rows):
    """A button that leaves marks of another setting visible mixes two experiments in one picture."""
    figure = timeline.stream(cache_rows(requests=20), "caption")
    menu = figure.layout.updatemenus[0]
    names = [button.label for button in menu.buttons]
    assert names == ["capture=never", "capture=async", "capture=async, cache_graphs=5", "capture=sync"]
    shown = [button.args[0]["visible"] for button in menu.buttons]
    assert all(sum(column) == 1 for column in zip(*shown, strict=True))
    assert [trace.visible for trace in figure.data] == shown[menu.active]
    assert figure.layout.title.subtitle.text.startswith(names[menu.active])


@pytest.mark.parametrize("draw", ALL)
def test_names_from_outside_stay_text(draw, cache_rows, tmp_path, hostile, require_text):
    """A setting or a reason that comes from a config or a driver must not become markup in an exported page."""
    rows = cache_rows(requests=12, gaps=40)
    rows["setting"] = rows["setting"].where(rows["setting"] == "quiet", rows["setting"] + hostile)
    rows["reason"] = hostile
    (page,) = plots.write(draw(rows, hostile), tmp_path / "figure", ["html"])
    require_text(page)


def test_a_way_whose_captures_failed_says_so_and_each_way_is_listed_once(cache_rows):
    """A way that captured nothing disturbs least, and would look best; one seen in one panel would have no name."""
    rows = cache_rows(failing_way="thread")
    rows = rows[~((rows["setting"] == "cooperative") & (rows["metric"] == "itl") & rows["capturing"])]
    listed = [trace.name for trace in timeline.disturbed(rows, "").data if trace.showlegend]
    assert sorted(listed) == ["cooperative", "quiet", "sync", "thread (57 of 60 captured)", "thread flush"]


def test_break_even_is_cost_over_saving(cache_rows):
    """The number of reuses decides what is captured: it must be what a capture cost over what it saves."""
    rows = cache_rows(cost=("shared",), lengths=(64,))
    cost = rows[rows["part"] == "cost"]
    each = []
    for _, cell in cost.groupby("round"):
        medians = cell.groupby("metric")["ms"].median()
        each.append(medians[["rehearse", "capture", "instantiate"]].sum() / (medians["jit"] - medians["replay"]))
    (line,) = tallies.break_even(rows).itertuples()
    assert line.reuses == pytest.approx(pd.Series(each).median())
    assert line.low <= line.reuses <= line.high
    assert line.n == 8


def test_a_replay_that_saves_nothing_never_pays(cache_rows):
    """A negative quotient would read as a capture that is repaid before it was made."""
    rows = cache_rows(cost=("shared",), lengths=(64,))
    rows.loc[rows["metric"] == "replay", "ms"] = 1000.0
    (line,) = tallies.break_even(rows).itertuples()
    assert line.reuses == math.inf
    assert math.isnan(line.low)
    assert static.png(timeline.costs(rows, "")).startswith(b"\x89PNG")


def test_what_is_not_there_is_refused(cache_rows):
    """An empty picture looks like a result; two runs in one look like a comparison."""
    rows = cache_rows(requests=10)
    with pytest.raises(ConfigError, match="did you mean 'capture=sync'"):
        timeline.stream(rows, "", setting="capture=sink")
    with pytest.raises(StatisticsError, match="cost_lengths"):
        timeline.costs(rows[rows["part"] != "cost"], "")
    with pytest.raises(StatisticsError, match="2 runs"):
        timeline.over_time(pd.concat([rows, rows.assign(run_id="r2")]), "")


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (1.7, 4.45, [2, 3, 4]), (0.5, 80, [0.5, 1, 2, 5, 10, 20, 50]), (0.02, 900, [0.1, 1, 10, 100]),
    (1e-3, 1e6, [10.0**power for power in range(-3, 7)]),
])
def test_a_logarithmic_axis_has_ticks_to_read_it_by(low: float, high: float, ticks: list[float]) -> None:
    """Times between 2 and 4 ms over an axis that says 2; ten powers of ten that are looked for without end."""
    assert panels.log(low, high)["tickvals"] == ticks


def test_a_long_legend_gets_lines(cache_rows):
    """Names of settings are long: in one line they would run out of the picture."""
    names = {f"capture=async, behind=thread, cache_graphs={n}": ("async", n) for n in (5, 10, 20, 40)}
    figure = timeline.over_time(cache_rows(names, requests=12), "")
    assert figure.layout.margin.t > panels.HEAD
    legend = static.render(figure).legends[0]
    assert legend.get_window_extent().x1 <= figure.layout.width


FLOORS = pd.DataFrame([("ttft", length, None, length / 100, "memory") for length in range(1, 401)]
                      + [("itl", 1, at, 0.5, "memory") for at in (1, 500)],
                      columns=["metric", "prompt_tokens", "position", "ms", "bound"]).astype({"position": "Int64"})


@pytest.mark.parametrize("draw", [timeline.over_time, timeline.first_tokens, timeline.disturbed])
def test_latencies_stand_beside_the_limit(draw, cache_rows):
    """A stream that a better cache could serve no faster looks slow without the least that the machine allows."""
    rows = cache_rows(requests=20, gaps=40)
    figure = draw(rows, "", FLOORS)
    drawn = [trace for trace in figure.data if (trace.name or "").startswith("limit")]
    assert [trace.showlegend for trace in drawn] == [True, False][:len(drawn)]
    table = tallies.requests(rows).drop_duplicates("request").sort_values("request")
    for trace in drawn:
        across, up = (figure.layout[f"{name}axis{getattr(trace, name + 'axis')[1:]}"] for name in "xy")
        if draw is timeline.over_time:
            assert list(trace.x) == list(range(1, 21))
            assert trace.y[0] == table["prompt_tokens"].iloc[0] / 100
            assert trace.y[-1] == table["prompt_tokens"].iloc[-5:].median() / 100
            assert max(trace.y) <= up.range[1]
        else:
            ms = tallies.requests(rows)["prompt_tokens"].median() / 100 if draw is timeline.first_tokens else 0.5
            assert list(trace.x) == pytest.approx([ms, ms])
            assert across.range[0] < math.log10(ms) < across.range[1]
    assert len(drawn) == (2 if draw is timeline.disturbed else 1)
    assert static.png(figure).startswith(b"\x89PNG")
