"""The Explorer's page: what it shows of a run that is going on, escaped; what it keeps and gives back."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ipywidgets.widgets import widget

from hybridlab import explorer as page
from hybridlab import liveviews, looking, session, static
from hybridlab.errors import MeasureError
from hybridlab.explorer import UNSAID, Explorer, TokenStream
from hybridlab.session import Session

HOSTILE = "<script>alert(1)</script>$x$"
FLOORS = [{"metric": "itl", "prompt_tokens": 4, "position": at, "bytes": 1, "flops": 1, "ms": 0.5, "bound": "memory"}
          for at in (5, 12)]
PROGRAM = """
import json, sys, time
asked = json.loads(sys.stdin.readline())
config = asked["config"]
def say(*words):
    sys.stdout.write(json.dumps(words) + chr(10))
say("progress", "loading " + config["model"], 0, 1)
say("floors", {{"read_gbs": 1.0}}, {floors})
for arm in config["arms"]:
    say("texts", arm, list(range(config["new_tokens"])), {pieces} * config["new_tokens"])
request = 0
for number in range(config["repeats"]):
    for arm in config["arms"]:
        for index in range(config["new_tokens"]):
            path = {{"eager": "eager", "hybrid": "graph"}}[arm]
            ms = (1.0 if arm == "hybrid" else 2.0) + 0.001 * ((7 * index + number) % 13)
            say("row", arm, number, request, index, 4 + index, index, ms, path, "why {hostile}")
        request += 1
say("done", "cpu-of-{hostile}")
"""


@pytest.fixture
def explorer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An explorer whose process says made-up rows at once: only what the page makes of rows is looked at here."""
    program = PROGRAM.format(floors=FLOORS, pieces=[HOSTILE], hostile=HOSTILE).replace("'", '"')
    monkeypatch.setattr(session, "COMMAND", (sys.executable, "-c", program))
    made = Explorer({"repeats": 6, "new_tokens": 16, "device": "cpu"})
    yield made
    made.close()


def finished(explorer: Explorer) -> Explorer:
    assert explorer.start(), explorer.status.value
    explorer.wait()
    return explorer


def test_showing_it_runs_nothing(explorer: Explorer) -> None:
    """A notebook that is executed without a person must not measure what nobody asked for."""
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == UNSAID
    assert explorer.session is None
    assert explorer.rows.empty


def test_a_run_fills_the_page(explorer: Explorer) -> None:
    """Figure, lanes, bar and table must all show the same rows."""
    finished(explorer)
    assert explorer.bar.value == 1
    assert len(explorer.rows) == 2 * 6 * 16
    assert [(lane["arm"], lane["request"], len(lane["tokens"])) for lane in explorer.stream.lanes] == [
        ("eager", 10, 16), ("hybrid", 11, 16)]
    assert {path for lane in explorer.stream.lanes for _, path in lane["tokens"]} == {"eager", "graph"}
    drawn = {trace.name: trace for trace in explorer.figure.data if trace.name}
    assert len(drawn["hybrid"].x) == len(drawn["eager"].x) == 6 * 15
    assert set(drawn["limit"].y) == {0.5, 0, 100} & set(drawn["limit"].y)
    assert "1.00 [1.00, 1.00]" in explorer.table.value
    assert "1.99 [1.99, 1.99]" in explorer.table.value
    assert "n = 6 rounds" in explorer.table.value
    assert not explorer.run_button.disabled
    assert explorer.stop_button.disabled


def test_a_token_says_its_path_and_reason(explorer: Explorer) -> None:
    """A colour alone does not say why a token was not replayed."""
    finished(explorer)
    explorer.stream.chosen = ["hybrid", 5, 3]
    assert "graph" in explorer.detail.value
    assert "hybrid, request 6, token 4" in explorer.detail.value
    assert "why &lt;script&gt;" in explorer.detail.value
    before = explorer.detail.value
    explorer.stream.chosen = ["hybrid", 99, 3]
    assert explorer.detail.value == before


def test_a_point_says_the_same(explorer: Explorer) -> None:
    """Points and rows are numbered apart; one off, and a slow point gets the reason of its neighbour."""
    finished(explorer)
    trace = next(trace for trace in explorer.figure.data if trace.name == "hybrid")

    explorer._point_chosen(trace, SimpleNamespace(point_inds=[17]), None)
    rows = explorer.rows
    gaps = rows[(rows["arm"] == "hybrid") & (rows["metric"] == "itl")].iloc[17]
    assert f"request {gaps['request'] + 1}, token {gaps['index'] + 1}:" in explorer.detail.value


def test_texts_from_outside_are_escaped(explorer: Explorer) -> None:
    """A model, a machine, a token or a reason that brings markup would run it in the reader's page."""
    explorer.controls["prompt"].value = HOSTILE
    finished(explorer)
    explorer.stream.chosen = ["hybrid", 5, 3]
    shown = [explorer.status.value, explorer.detail.value, explorer.table.value, explorer.figure.to_json()]
    assert not any("<script>" in text for text in shown)
    explorer.controls["model"].value = HOSTILE
    assert explorer.start() is False
    assert "&lt;script&gt;" in explorer.status.value
    assert "<script>" not in explorer.status.value


def test_the_page_sets_text_and_never_markup() -> None:
    """One innerHTML in the page's script, and a token of a hostile tokenizer runs in it."""
    script = Path(str(TokenStream._esm)).read_text() if isinstance(TokenStream._esm, Path) else str(TokenStream._esm)
    assert "textContent" in script
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval", "new Function"):
        assert sink not in script


def test_a_dark_explorer_stays_dark(explorer: Explorer) -> None:
    """New values that bring the colours of the light figure back."""
    dark = Explorer({"repeats": 2, "new_tokens": 8, "device": "cpu"}, theme="dark")
    before = [(trace.line.color, trace.marker.color) for trace in dark.figure.data]
    finished(dark)
    assert dark.figure.layout.paper_bgcolor == "#141414"
    assert [(trace.line.color, trace.marker.color) for trace in dark.figure.data] == before
    assert before != [(trace.line.color, trace.marker.color) for trace in explorer.figure.data]
    dark.close()


def test_the_slider_moves_the_percentile(explorer: Explorer) -> None:
    """A control that changes nothing in the figure."""
    finished(explorer)
    before, note = explorer.figure.to_json(), explorer.figure.layout.annotations[0].text
    explorer.percentile.value = 75
    assert explorer.figure.to_json() != before
    assert "p75" in explorer.figure.layout.annotations[0].text != note
    assert "ITL p75" in explorer.table.value


def test_what_changes_nothing_is_greyed_out(explorer: Explorer) -> None:
    """A policy for an arm that replays nothing, and kernels for one that compiles none."""
    for arm, box in explorer.arms.items():
        box.value = arm == "eager"
    assert explorer.controls["policy"].disabled
    assert explorer.controls["kernels"].disabled
    explorer.arms["graph"].value = True
    assert not explorer.controls["policy"].disabled


@pytest.mark.parametrize(("control", "value", "says"), [("model", "tinny", "did you mean"), ("length", 512, "")])
def test_a_wrong_setting_is_said_and_nothing_starts(control: str, value: Any, says: str, explorer: Explorer) -> None:
    """An exception in a callback disappears in a log."""
    for box in explorer.arms.values():
        box.value = control == "model"
    explorer.controls[control].value = value
    assert explorer.start() is False
    assert says in explorer.status.value
    assert explorer.session is None


def test_rates_are_measured_once(explorer: Explorer) -> None:
    """The limit takes ten seconds to measure; a second run of the same model must not wait for it again."""
    finished(explorer)
    finished(explorer)
    assert explorer.session is not None
    assert explorer.session.asked.rates == {"read_gbs": 1.0}
    explorer.controls["model"].value = "random:tiny-llama-2"
    finished(explorer)
    assert explorer.session.asked.rates is None


def test_stop_keeps_what_was_said(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped run whose rows are lost has to be waited for again."""
    row = '["row", "eager", 0, 0, 0, 4, 5, 1.5, "eager", ""]'
    program = f"import time\nprint('{row}', flush=True)\ntime.sleep(60)"
    monkeypatch.setattr(session, "COMMAND", (sys.executable, "-c", program))
    assert explorer.start()
    assert explorer.session is not None
    deadline = threading.Event()
    while not explorer.session.rows:
        assert not deadline.wait(0.02)
    explorer.stop_button.click()
    assert "stopped; 1 of 192 tokens" in explorer.status.value
    assert not psutil.pid_exists(explorer.session.pid)
    assert explorer.run_button.disabled is False


def test_the_end_of_a_long_run_costs_by_rounds(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bootstrap over all tokens takes a minute, in which the page holds still and Stop gives up."""
    samples, free = list[int](), list[bool]()

    def look() -> None:
        free.append(explorer._lock.acquire(timeout=20))
        explorer._lock.release()

    def counted(sample: Any, base: Any, **options: Any) -> Any:
        samples.append(len(sample))
        other = threading.Thread(target=look)
        other.start()
        other.join()
        return ratio(sample, base, **options)

    ratio = liveviews.stats.ratio
    monkeypatch.setattr(liveviews.stats, "ratio", counted)
    explorer.controls["repeats"].value, explorer.controls["new_tokens"].value = 200, 256
    finished(explorer)
    assert len(explorer.rows) == 2 * 200 * 256
    assert samples == [200, 200]
    assert free == [True, True]
    assert max(len(trace.x) for trace in explorer.figure.data) == liveviews.POINTS
    explorer.percentile.value = 75
    assert "1.99 [1.99, 1.99]" in explorer.table.value
    assert samples == [200, 200]


def test_a_stopped_run_compares_whole_requests(explorer: Explorer) -> None:
    """Half a request has the gaps of early positions only, and a round of one arm nothing to be paired with."""
    rows = finished(explorer).rows
    whole = liveviews.ratios(rows, ["eager", "hybrid"])
    assert {arm: at.n for arm, at in whole.items()} == {"eager": 6, "hybrid": 6}
    last = rows["request"] == rows["request"].max()
    assert liveviews.ratios(rows[~last | (rows["index"] < 8)], ["eager", "hybrid"]).keys() == {"eager"}
    assert liveviews.ratios(rows[rows["arm"] == "hybrid"], ["eager", "hybrid"]) == {}
    assert liveviews.ratios(rows[rows["index"] == 0], ["eager", "hybrid"]) == {}


def test_stop_raises_nothing_however_slow_the_page_is(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a callback disappears in a log; and a page that is late must not paint over the next run."""
    painting, go_on, paint = threading.Event(), threading.Event(), explorer._paint

    def slow(shown: Session | None) -> None:
        painting.set()
        assert go_on.wait(60)
        paint(shown)

    monkeypatch.setattr(explorer, "_paint", slow)
    monkeypatch.setattr(page, "PATIENCE_S", 0.05)
    assert explorer.start()
    assert painting.wait(60)
    late = explorer._painter
    explorer.stop_button.click()
    monkeypatch.setattr(explorer, "_paint", paint)
    explorer.controls["repeats"].value = 7
    assert explorer.start()
    explorer.wait()
    go_on.set()
    assert late is not None
    late.join(60)
    assert "done: 224 of 224 tokens" in explorer.status.value
    assert explorer.stop_button.disabled


def test_a_long_paint_is_followed_by_a_longer_rest(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Painting as often as it can takes half a core from what is measured."""
    clock, waits = iter(range(0, 1000, 3)), list[float]()

    def called(timeout_s: float) -> bool:
        waits.append(timeout_s)
        fake.rows.append(None)
        fake.over.set() if len(waits) == 4 else None
        return False

    fake = SimpleNamespace(rows=[], progress=None, over=threading.Event(), called=called,
                           asked=SimpleNamespace(config=SimpleNamespace(seed=0)))
    monkeypatch.setattr(page.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(explorer, "_paint", lambda shown: None)
    explorer._keep_up(fake)  # type: ignore[arg-type]
    assert waits == [page.EVERY_S, 12, 12, 12]


def test_runs_leave_no_process_thread_or_memory(explorer: Explorer) -> None:
    """A page that is used for an afternoon must not fill the machine."""
    explorer.controls["repeats"].value = 100
    finished(explorer)
    finished(explorer)
    gc.collect()
    me = psutil.Process()
    before = (me.num_fds(), threading.active_count(), len(me.children(recursive=True)), len(widget._instances))
    memory = me.memory_info().rss
    for _ in range(4):
        finished(explorer)
    gc.collect()
    assert (me.num_fds(), threading.active_count(), len(me.children(recursive=True)), len(widget._instances)) == before
    assert me.memory_info().rss - memory < 40 * 2**20


def test_the_figure_is_drawn_without_a_page(explorer: Explorer) -> None:
    """What is seen live must be exportable as it is: one function from rows."""
    finished(explorer)
    floors = explorer.session.floor_table() if explorer.session else None
    figure = liveviews.figure(explorer.rows, explorer.caption, ["eager", "hybrid"], floors, 90.0)
    assert static.svg(figure).startswith(b"<?xml")
    assert len(explorer.figure.data) == 2 * (len(figure.data) - 2) + 2  # all four arms, and the limit in two panels
    assert [trace.to_plotly_json()["y"] for trace in figure.data if trace.name == "hybrid"] == [
        list(trace.y) for trace in explorer.figure.data if trace.name == "hybrid"]


def test_no_rows_are_a_figure_too() -> None:
    """The page is drawn before the first row is there."""
    static.svg(liveviews.figure(Session.nothing(), "none", ["eager", "jit"], None, 99.0))


def test_looking_on_can_be_compared_with_not_looking(explorer: Explorer) -> None:
    """A comparison that mixes the rounds up, or counts first tokens, would find no difference where there is one."""
    explorer.controls["repeats"].value = 13
    found = looking.compare(explorer)
    assert explorer.session is not None
    assert len(explorer.session.asked.held) == 6
    assert found[["arm", "rounds", "n"]].values.tolist() == [
        [arm, kind, 90] for arm in ("eager", "hybrid") for kind in ("followed", "held")]
    rows = explorer.rows
    rows.loc[~rows["round"].isin(explorer.session.asked.held), "ms"] *= 2
    slower = looking.table(rows, list(explorer.session.asked.held))
    assert slower["ratio"].dropna().between(0.45, 0.55).all()
    explorer.controls["model"].value = "tinny"
    with pytest.raises(MeasureError, match="tinny"):
        looking.compare(explorer)


