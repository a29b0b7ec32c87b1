"""A reproduction of the paper from config to ledger, with real runtimes: what is measured, refused and left out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest

from hybridlab import (
    children,
    crossing,
    experiment,
    firstcalls,
    models,
    paperlab,
    papertables,
    papertimes,
    paperviews,
    progress,
    records,
    roofline,
    stats,
)
from hybridlab.errors import ConfigError, MeasureError, ModelError, PromptError, RunError
from hybridlab.paperconfig import PAPER_PARTS, PaperConfig

CONFIG: dict[str, Any] = {
    "model": "random:tiny-llama-3", "device": "cpu", "lengths": [5, 60], "generations": [4, 7], "buckets": [16, 64, 70],
    "repeats": 2, "gaps": 12, "warmup": 1, "trace_requests": 3, "passes": 1, "cost_lengths": [16], "cost_repeats": 1}


@pytest.fixture(autouse=True)
def _own_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setenv("HYBRIDLAB_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module", autouse=True)
def _rates() -> Iterator[None]:
    """This machine's rates, which take seconds to measure, are measured once for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "measure", functools.cache(roofline.measure))
        yield


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> paperlab.PaperResult:
    """One run of the parts that share the arms."""
    return paperlab.run(CONFIG | {"parts": ["ttft", "cached", "recomputed", "memory"], "generations": [4, 7, 100_000]},
                        root=tmp_path_factory.mktemp("runs"), progress=False)


def test_the_schedule_gives_every_length_enough_gaps_and_no_more() -> None:
    """A p99 that n forbids, or hours spent on gaps that longer requests bring anyway."""
    for lengths, gaps in (((10, 50, 100, 500), 368), ((2,), 5), ((3, 9), 1), ((10, 500), 10_000)):
        asked = papertimes.schedule(lengths, gaps)
        assert asked == sorted(asked, reverse=True)
        for length in lengths:
            there = sum(length - 1 for one in asked if one >= length)
            assert there >= gaps
            if length in asked:
                requests = sum(one >= length for one in asked)
                assert requests >= 6, "too few for an interval"
                assert requests == 6 or there - (length - 1) < gaps, "a request too many"


def test_a_step_says_how_a_graph_served_it() -> None:
    """A padded replay that is called a graph of just this length, or an arm without graphs that misses them."""
    assert [papertimes.state(*given) for given in (
        ("eager", "eager", None, 5), ("jit", "jit", 16, 5), ("graph", "graph", 5, 5), ("hybrid fused", "graph", 16, 5),
        ("hybrid", "jit", 16, 5), ("hybrid", "graph", 5, 5, 1))] == [
        "none", "none", "hit", "bucket", "miss", "captured"]


def test_every_arm_and_length_is_measured_by_its_own_path(result: paperlab.PaperResult) -> None:
    """An arm that fell back would be compared under its name."""
    rows = result.rows[result.rows["metric"] != "clipped"]
    first = rows[rows["part"] == "ttft"]
    assert first.groupby(["arm", "tokens"]).size().to_dict() == {
        (arm, n): 2 for arm in ("eager", "graph", "jit", "hybrid") for n in (5, 60)}
    timed = rows[rows["part"].isin(["ttft", "cached", "recomputed"])]
    assert timed.groupby("arm")["path"].unique().map(list).to_dict() == {
        "eager": ["eager"], "graph": ["graph"], "jit": ["jit"], "hybrid": ["graph"]}
    assert not timed[["captures", "compiles"]].to_numpy().any()
    gaps = rows[rows["part"] == "cached"]
    asked = papertimes.schedule((4, 7), 12)
    for arm in ("eager", "graph", "jit", "hybrid"):
        own = gaps[gaps["arm"] == arm]
        assert sorted(own.groupby("round")["index"].max() + 1, reverse=True) == asked
        assert (own["position"] == 10 + own["index"]).all()
    whole = rows[rows["part"] == "recomputed"]
    assert set(whole["arm"]) == {"eager", "graph", "hybrid"}
    assert set(whole.loc[whole["arm"] == "hybrid", "state"]) == {"bucket", "hit"}  # 16 rows exactly, once
    hits = whole[(whole["arm"] == "hybrid") & (whole["state"] == "hit")]
    assert set(hits["position"]) == {16}
    assert "padded" not in " ".join(hits["reason"])
    assert set(rows.loc[rows["part"] == "memory", "metric"]) == {
        "weights", "KV cache", "graph of 64 rows", "graph of 16 rows", "decode graph"}


def test_what_does_not_fit_is_left_out_with_the_reason(result: paperlab.PaperResult) -> None:
    """A length that silently vanished from a table."""
    assert result.status == "complete"
    clipped = result.rows[result.rows["metric"] == "clipped"]
    assert set(clipped["part"]) == {"cached", "recomputed"}
    assert set(clipped["tokens"]) == {100_000}
    assert "Left out of part cached: 100000 tokens, as the context of random:tiny-llama-3 holds" in result.reading()
    assert result.recorded.extra["during"]["readings"] > 1, "clocks that were not read until the last row"


def test_a_run_is_read_back_into_the_same_tables(result: paperlab.PaperResult) -> None:
    """A table or a verdict that cannot be made again from its rows is a claim."""
    again = paperlab.PaperResult.open(result.path)
    assert [grid.markdown() for grid in again.grids()] == [grid.markdown() for grid in result.grids()]
    assert len(list(again.grids())) == 5  # two tables, the ablation that gaps allow, costs, and the ledger
    entries = {entry.claim.id: entry for entry in again.ledger()}
    assert "6 positions, and 50 are needed" in entries["decode-buffer"].why
    assert entries["kv-update"].run_id == result.run_id
    assert "no GPU" not in again.caption
    with pytest.raises(RunError, match=r"hl\.paperlab\.PaperResult"):
        experiment.Result.open(result.path)


def test_the_limit_stands_beside_first_tokens_and_gaps(result: paperlab.PaperResult) -> None:
    """A time of which nobody can say how far from possible it is; or a limit above what was measured."""
    for name in papertables.LIMITED:
        grid = result.grid(name)
        assert grid.header[1] == "limit, ms"
        assert all(float(row[1]) > 0 for row in grid.rows)
        assert "Limit: the least time" in grid.note
    floors = result.floors
    assert floors is not None
    first = result.rows[(result.rows["part"] == "ttft") & (result.rows["metric"] == "ttft")]
    limit = floors[(floors["metric"] == "ttft") & floors["position"].isna()].set_index("prompt_tokens")["ms"]
    assert (first["value"] > first["tokens"].map(limit).astype(float)).all()
    drawn = paperviews.drawn(result.rows, result.caption, floors)
    for name in set(paperviews.LIMITED) & set(drawn):
        assert any("limit" in (trace.name or "") for trace in drawn[name].data), name
        assert not any("limit" in (trace.name or "") for trace in paperviews.drawn(result.rows, "")[name].data)


def test_captures_are_compared_over_one_stream(tmp_path: Path) -> None:
    """Captures that the clock of a first token did not hold, under the name of those that it did."""
    found = paperlab.run(CONFIG | {"parts": ["capture", "cost"], "buckets": None}, root=tmp_path, progress=False).rows
    stream = found[found["part"] == "capture"]
    assert stream.groupby("arm").size().to_dict() == {f"capture={name}": 3 for name in ("never", "sync", "async")}
    asked = stream.groupby("arm")["tokens"].apply(list)
    assert asked["capture=never"] == asked["capture=sync"] == asked["capture=async"]
    states = stream.groupby("arm")["state"].apply(set)
    assert states["capture=never"] == {"miss"}
    assert "captured" in states["capture=sync"]
    assert "miss" not in states["capture=sync"]
    assert "captured" not in states["capture=async"]
    cost = found[found["part"] == "cost"]
    assert {"rehearse", "capture", "instantiate", "replay", "jit"} <= set(cost["metric"])
    assert len(papertables.costs(found, "").rows) == 2  # shared and private pool


def test_recomputed_tokens_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fastest way to compute a whole sequence is not to."""
    real = papertimes.Arms._recompute

    def wrong(self: Any, runtime: Any, count: int) -> Any:
        for out, ids in real(self, runtime, count):
            yield out, [*ids[:-1], ids[-1] + 1]

    monkeypatch.setattr(papertimes.Arms, "_recompute", wrong)
    with pytest.raises(MeasureError, match="recomputed tokens of eager differ"):
        paperlab.run(CONFIG | {"parts": ["recomputed"]}, root=tmp_path, progress=False)
    (path,) = tmp_path.glob("*/*")
    assert records.read(path).status == "failed"


def test_a_part_that_fails_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ten minutes of a GPU's time lost to the last part but three; or a part that failed and nobody says so."""
    def breaks(arms: Any) -> Any:
        yield [papertimes.row("capture", arm="capture=never", metric="ttft", value=1.0)]
        raise RunError("a kernel was compiled inside a pass", "", "report this")

    monkeypatch.setitem(paperlab.COSTS, "capture", breaks)
    found = paperlab.run(CONFIG | {"parts": ["capture", "memory"]}, root=tmp_path, progress=False)
    assert (found.status, set(found.rows["part"])) == ("complete", {"capture", "memory"})
    assert "Part capture failed: a kernel was compiled inside a pass" in found.reading()
    with pytest.raises(RunError, match="every part failed · capture: a kernel was compiled"):
        paperlab.run(CONFIG | {"parts": ["capture"]}, root=tmp_path, progress=False)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"part": ["ttft"]}, ConfigError, "did you mean 'parts'"), ({"parts": ["tft"]}, ConfigError, "parts is"),
    ({"parts": []}, ConfigError, "parts is"), ({"parts": ["ttft", "ttft"]}, ConfigError, "parts holds a value twice"),
    ({"lengths": [5, 5]}, ConfigError, "lengths holds a value twice"), ({"generations": [1]}, ConfigError, "gener"),
    ({"lengths": [100_000]}, PromptError, "lower lengths"), ({"model": "tny"}, ModelError, "did you mean 'tiny'"),
])
def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       change: dict[str, Any], error: type[Exception],
                                                       message: str) -> None:
    """A typo in the last part must not show after the first ones were measured for an hour."""
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=message):
        paperlab.run(CONFIG | change, root=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    assert PaperConfig().parts == PAPER_PARTS


def test_first_calls_are_made_in_a_fresh_process_without_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call that was warmed, in a protocol whose point is that it was not."""
    found = pd.DataFrame(firstcalls.run(
        "graph, captured in the request", model="random:tiny-llama-3", device="cpu", dtype=None, lengths=[5, 30],
        buckets=[5, 30], calls=2, max_len=64, temperature=1.0, seed=0, threads=1))
    first, more = found[found["metric"] == "first"], found[found["metric"] == "repeated"]
    assert first.groupby("prompt_tokens").size().to_dict() == {5: 5, 30: 5}
    assert first.loc[first["captures"] > 0, ["prompt_tokens", "index"]].to_numpy().tolist() == [[5, 0], [30, 0]]
    assert more.groupby("prompt_tokens").size().to_dict() == {5: 2, 30: 2}
    assert not more["captures"].any()
    assert set(found["path"]) == {"graph"}
    monkeypatch.setattr(children.sys, "executable", "/bin/false")
    with pytest.raises(MeasureError, match="the first calls of eager failed"):
        firstcalls.run("eager")


def test_two_processes_are_compared_turn_by_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A claim about two processes that is judged from one, or whose milliseconds were microseconds."""
    seen: list[tuple[Any, Any]] = []
    crossed: list[dict[str, Any]] = []
    real = crossing.crossing

    def few(here: Any, worker: Any, seed: int) -> Any:
        seen.append((here, worker))
        for rows in real(here, worker, seed, turns=6):
            crossed.extend(rows)
            yield rows

    monkeypatch.setattr(crossing, "crossing", few)
    found = paperlab.run(CONFIG | {"parts": ["ipc"]}, root=tmp_path, progress=False)
    ((here, worker),) = seen
    assert (here.config.process, worker.config.process) == ("here", "worker")
    assert msgspec.structs.replace(worker.config, process="here", device="auto") == here.config
    counts = found.rows.groupby(["metric", "arm", "unit"]).size()
    assert set(counts) == {6}
    assert set(counts.index) == {("round trip", "worker", "ms"), ("hand-over", "worker", "ms"),
                                 ("same tokens", "worker / here", "%"), *(
        (step, arm, "×" if "/" in arm else "ms") for step in ("first token", "gap")
        for arm in ("here", "worker", "worker / here"))}
    medians = found.rows.groupby("metric")["value"].median()
    in_ms = [one["value"] / 1e3 if one["unit"] == "µs" else one["value"] for one in crossed]
    assert found.rows["value"].tolist() == in_ms
    assert medians["same tokens"] == 100
    entries = {entry.claim.id: entry for entry in found.ledger()}
    assert entries["two-processes"].here.endswith("n = 6")
    assert entries["ipc"].here.endswith("n = 6")
    assert entries["ipc-token"].here.startswith(f"{medians['hand-over']:.3g} ms")
    (grid,) = [grid for grid in found.grids() if grid.title.startswith("Two processes")]
    assert grid.header == ["step", "here", "worker", "worker / here"]
    assert [row[0] for row in grid.rows] == ["round trip", "hand-over", "same tokens", "first token", "gap"]
    assert grid.rows[0][1] == "–"
    assert grid.rows[4][2].endswith(" ms")


def test_a_budget_that_ends_first_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                          result: paperlab.PaperResult) -> None:
    """A table without its p99, and not a word that more time would have brought it."""
    said: list[tuple[str, int, int]] = []
    monkeypatch.setattr(paperlab, "reporter", lambda _: contextlib.nullcontext(lambda *line: said.append(line)))
    found = paperlab.run(CONFIG | {"parts": ["cached", "recomputed"], "budget_s": 1e-6}, root=tmp_path)
    words = f"1 of {len(papertimes.schedule((4, 7), 12))} requests in its budget of 1e-06 s"
    for part in ("cached", "recomputed"):
        own = found.rows[found.rows["part"] == part]
        assert set(own["tokens"]) == {7}, "the longest comes first: its gaps count for all lengths"
        assert own.groupby("arm")["round"].unique().map(list).map(tuple).unique().tolist() == [(0,)]
        assert (f"Part {part} ended early (budget_s = 1e-06), with fewer than 12 gaps an arm: 3 at 4 tokens, "
                "6 at 7 tokens. A p99 needs 368.") in found.reading()
        assert (f"{part}: {words}", 1, 1) in said
    assert said[-1][0] == f"run {found.run_id}: complete; cached: {words}; recomputed: {words}"
    assert result.short() == "", "a budget that was enough"


def test_the_defaults_carry_a_p99_at_every_length() -> None:
    """Table II with holes, whatever the budget."""
    config = PaperConfig()
    asked = papertimes.schedule(config.generations, config.gaps)
    assert all(sum(length - 1 for one in asked if one >= length) >= stats.needed(0.99)
               for length in config.generations)


def test_the_last_line_of_a_log_is_not_the_one_that_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """A log shows a line now and then; that work is over, and how, would be missing from it."""
    with caplog.at_level("INFO", logger="hybridlab.progress"):
        report = progress._log_line(every_s=3600)
        for line in (("first", 0, 3), ("second", 1, 3), ("over", 3, 3)):
            report(*line)
    assert caplog.messages == ["first", "over"]
