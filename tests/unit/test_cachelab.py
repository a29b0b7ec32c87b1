"""An experiment about the graph cache from config to manifest, with real runtimes: what is refused, kept and said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hybridlab import cachelab, cachetables, experiment, models, records, serving, stats, workload
from hybridlab.config import CacheConfig, RunConfig, build
from hybridlab.errors import ConfigError, ModelError, PromptError, RunError, StatisticsError
from hybridlab.parameters import compared
from hybridlab.workload import Asked

LADDER = [16, 64]
CONFIG: dict[str, Any] = {
    "model": "random:tiny-llama-3", "device": "cpu", "requests": 8, "new_tokens": 3, "repeats": 2, "seed": 2,
    "compare": [{"capture": "never", "buckets": LADDER}, {"capture": "sync", "buckets": LADDER, "cache_graphs": 1}],
}
NEVER, SYNC = "capture=never, buckets=16 64", "capture=sync, buckets=16 64, cache_graphs=1"


@pytest.fixture(autouse=True)
def _own_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setenv("HYBRIDLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(cachelab.roofline, "measure", lambda device, dtype, working_set: {
        "read_gbs": working_set / 1e6, "copy_gbs": 1.0, "matmul_tflops": 100.0})  # a step takes 1 ms and a little


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Eight short requests over two buckets and two lengths beyond them."""
    workload.write(tmp_path / "trace.csv", [Asked(n, 3) for n in (5, 60, 9, 70, 5, 60, 5, 30)])
    return str(tmp_path / "trace.csv")


def only_run(tmp_path: Path) -> records.Recorded:
    (path,) = (tmp_path / "runs").glob("*/*")
    return records.read(path)


def test_the_interval_of_a_mean_is_over_passes() -> None:
    """Requests of one pass taken for repetitions: they share a cold start, and the interval would be far too small."""
    first = pd.DataFrame({"round": [0, 0, 1, 1, 2, 2], "ms": [1.0, 3.0, 2.0, 4.0, 4.0, 6.0]})
    mean, low, high = cachetables.mean(first)
    half = 4.30265273 * np.std([2.0, 3.0, 5.0], ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    assert (mean, low, high) == pytest.approx((10 / 3, 10 / 3 - half, 10 / 3 + half))
    assert cachetables.mean(first[first["round"] < 2]) == (2.5, None, None)


def test_a_run_is_recorded_and_told(trace: str, tmp_path: Path) -> None:
    """The table must say what the rows say: here every number is computed a second time, from the rows alone."""
    result = cachelab.run(CONFIG | {"trace": trace}, progress=False)
    assert (result.status, result.kind, result.settings) == ("complete", "cache", [NEVER, SYNC])
    assert result.path.is_relative_to(tmp_path / "runs")
    assert result.config.compare[1]["cache_graphs"] == 1
    assert result.requests() == workload.read(trace)
    assert result.rows.groupby(["round", "setting"]).size().tolist() == [8 * 4 + 2] * 4
    table = result.table().set_index("setting")
    for name, own in result.rows.groupby("setting"):
        first = own[own["metric"] == "ttft"]
        line = table.loc[name]
        assert (line["requests"], line["passes"]) == (16, 2)
        assert line["ttft_mean"] == pytest.approx(first["ms"].mean())
        assert line["ttft_mean_high"] is None  # two passes say next to nothing about their spread
        assert line["ttft_p50"] == stats.quantile(first["ms"], 0.5).value
        assert line["ttft_p99"] is None
        assert line["captures"] * 2 == own["captures"].sum()
        assert line["evictions"] * 2 == own["evictions"].sum()
        assert line["capture_ms"] * 2 == pytest.approx(own["capture_ms"].sum())
    assert table.loc[NEVER, ["hit_rate", "captures", "peak_graphs", "peak_graph_bytes"]].tolist() == [0, 0, 0, 0]
    assert table.loc[SYNC, "hit_rate"] > 0
    assert table.loc[SYNC, "captures"] > 2
    assert table.loc[SYNC, "evictions"] > 0
    assert table.loc[SYNC, ["ttft_limit", "itl_limit"]].tolist() == pytest.approx([1, 1], rel=0.2)
    own = result.rows[(result.rows["setting"] == SYNC) & (result.rows["metric"] == "itl")]
    assert table.loc[SYNC, "itl_of_limit"] == pytest.approx((1 / own["ms"]).median(), rel=0.2)
    assert result.grid().header.count("of limit") == 2
    captured = result.rows[(result.rows["captures"] > 0) & (result.rows["metric"] == "ttft")]
    assert len(captured)
    assert captured["happened"].str.contains("capture").all()
    assert not result.rows["profiled"].any()
    with pytest.raises(StatisticsError, match="while a profiler listened"):
        cachelab.CacheResult(replace(result.recorded, rows=result.rows.assign(profiled=True))).table()
    words = result.reading()
    assert f"With {SYNC} a first token took" in words
    assert "8 requests with 5 prompt lengths" in words
    assert "not GPU times" in words
    assert [line[0] for line in result.grid().rows] == [NEVER, SYNC]
    again = cachelab.CacheResult.open(result.path)
    assert again.reading() == words
    pd.testing.assert_frame_equal(again.rows, result.rows)
    with pytest.raises(RunError, match="of kind cache"):
        experiment.Result.open(result.path)


def test_every_kind_of_kernels_is_compiled_before_a_pass(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends minutes later, as one setting's kernels are not those that warming up compiled."""
    compare = [{"capture": "never", "kernels": "torch"}, {"capture": "sync", "kernels": "fused"},
               {"capture": "async", "kernels": "fused", "cache_graphs": 4}, {"buckets": LADDER}]
    config = build(CacheConfig, CONFIG | {"trace": trace, "compare": compare})
    lab, warmed = cachelab.Lab(models.load(config.model, device="cpu", dtype="float16"), config, print), []
    real = lab.runtime
    monkeypatch.setattr(lab, "runtime", lambda **changes: warmed.append(changes) or real(arm="jit", kernels="torch"))
    monkeypatch.setattr(lab, "_answer", lambda *_: [])
    lab.warm_up()
    each = [{"kernels": "torch"}, {"kernels": "fused"}, {"buckets": LADDER}]
    assert warmed == [*({**changes, "capture": "never"} for changes in each), {"kernels": "torch", "capture": "sync"}]


def test_a_sync_miss_is_no_hit(trace: str) -> None:
    """A first token that waited for its own capture, counted as a hit, would give sync captures a hit rate of 100 %."""
    config = CONFIG | {"trace": trace, "repeats": 1, "compare": [{"capture": "sync", "buckets": LADDER}]}
    result = cachelab.run(config, progress=False)
    first = result.rows[result.rows["metric"] == "ttft"]
    assert (first["path"] == "graph").sum() == 7  # 70 tokens fit no bucket
    assert result.table()["hit_rate"].tolist() == [5 / 8]


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"compare": [{"capure": "sync"}]}, ConfigError, "did you mean 'capture'"),
    ({"compare": [{"capture": "snyc"}]}, ConfigError, "did you mean 'sync'"),
    ({"compare": [{"arm": "graph"}]}, ConfigError, r"compare\[0\] sets 'arm'"),
    ({"compare": [{}, {"max_len": 64}]}, ConfigError, r"compare\[1\] sets 'max_len'"),
    ({"compare": [{"cache_graphs": 0}]}, ConfigError, "cache_graphs is 0"),
    ({"compare": [{"buckets": [64, 16]}]}, ConfigError, "ascending"),
    ({"compare": [{"buckets": []}]}, ConfigError, "ascending"),
    ({"compare": [{"buckets": [16, 100000]}]}, ConfigError, "a bucket of 100000 tokens"),
    ({"compare": [{}, {}]}, ConfigError, "'default' again"), ({"compare": []}, ConfigError, "compare is"),
    ({"trace": "zpif"}, ConfigError, "did you mean 'zipf'"), ({"trace": "none.csv"}, ConfigError, "cannot be read"),
    ({"request": 3}, ConfigError, "did you mean 'requests'"), ({"model": "random:tiny-lama"}, ModelError, "tiny-lama"),
    ({"cost_lengths": [100000]}, PromptError, "cost_lengths"), ({"cost_lengths": [8, 8]}, ConfigError, "twice"),
    ({"new_tokens": 100000}, PromptError, "new_tokens"), ({"arm": "eager"}, ConfigError, "arm"),
])
def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       change: dict[str, Any], error: type[Exception],
                                                       message: str) -> None:
    """A typo in the last setting must not show after the first ones were measured for an hour."""
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=message):
        cachelab.run(CONFIG | change, progress=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("entry", "field"), [({"capture": "never", "cache_graphs": 3}, "cache_graphs"),
                                              ({"capture": "sync", "behind": "thread"}, "behind")])
def test_a_setting_without_effect_is_refused(entry: dict[str, Any], field: str) -> None:
    """Two rows of a table that measure the same under two names."""
    with pytest.raises(ConfigError, match=f"sets {field!r}.*changes nothing"):
        compared(CacheConfig(compare=(entry,)))


def test_settings_are_named_by_what_they_change() -> None:
    """Rows name a setting and nothing else says what it was."""
    config = CacheConfig(compare=({}, {"capture": "sync", "cache_graphs": 5}, {"buckets": [16, 64], "pool": "private"},
                                  {"buckets": "exact", "cache_graphs": None}))
    assert list(compared(config)) == ["default", "capture=sync, cache_graphs=5", "buckets=16 64, pool=private",
                                      "buckets=exact, cache_graphs=None"]


def test_other_tokens_under_one_setting_fail_the_run(trace: str, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest way to serve a request is to answer it wrongly."""
    real = serving.serve

    def wrong(*arguments: Any, **settings: Any) -> Any:
        for served in real(*arguments, **settings):
            if settings["setting"] == SYNC and served.ids:
                served.ids[-1] += 1
            yield served

    monkeypatch.setattr(serving, "serve", wrong)
    with pytest.raises(RunError, match=f"tokens of request . with {SYNC} differ from those with"):
        cachelab.run(CONFIG | {"trace": trace}, progress=False)
    assert only_run(tmp_path).status == "failed"


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_whatever_stops_a_run_leaves_it_failed_with_its_passes(trace: str, tmp_path: Path, error: BaseException,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes of an hour each must survive what stops the fourth, and must not pass as a result."""
    real, passes = serving.serve, [0]

    def stops(*arguments: Any, **settings: Any) -> Any:
        passes[0] += 1
        for number, served in enumerate(real(*arguments, **settings)):
            if passes[0] == 4 and number == 3:
                raise error
            yield served

    monkeypatch.setattr(serving, "serve", stops)
    with pytest.raises(type(error)):
        cachelab.run(CONFIG | {"trace": trace}, progress=False)
    found = only_run(tmp_path)
    assert found.status == "failed"
    assert type(error).__name__ in found.reason
    assert found.rows.groupby(["round", "setting"]).size().tolist() == [34] * 3
    kept = cachelab.CacheResult.open(found.path)
    assert sorted(kept.table()["passes"]) == [1, 2]
    assert "8 requests" in kept.reading()


def test_a_budget_keeps_the_first_round_and_starts_no_later_pass(trace: str) -> None:
    """Without a pass of every setting nothing can be compared; without an end a run blocks the machine."""
    result = cachelab.run(CONFIG | {"trace": trace, "repeats": 50, "budget_s": 0.001}, progress=False)
    assert result.status == "complete"
    assert result.table()["passes"].tolist() == [1, 1]
    assert result.table()["ttft_mean_low"].tolist() == [None, None]


def test_parts_are_recorded_round_by_round(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs and disturbances stand in the same run, and leave the table of the stream alone."""
    from hybridlab import capturing

    def rounds(model: Any, config: CacheConfig, report: Any) -> Any:
        for number in range(2):
            yield [{"part": "cost", "round": number, "setting": "shared", "request": None, "prompt_tokens": 16,
                    "bucket": 16, "index": 0, "metric": "replay", "ms": 1.0, "path": "graph", "reason": "", "hits": 0,
                    "misses": 0, "captures": 1, "evictions": 0, "failures": 0, "capture_ms": 1.0, "graphs": 1,
                    "graph_bytes": 10, "capturing": False, "ended_ns": None, "happened": None, "happened_ms": None}]

    monkeypatch.setattr(capturing, "cost", rounds)
    result = cachelab.run(CONFIG | {"trace": trace, "repeats": 1, "cost_lengths": [16]}, progress=False)
    assert (result.rows["part"] == "cost").sum() == 2
    assert result.settings == [NEVER, SYNC]


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    """A run that was killed before its first pass has nothing to show and must say that, not raise."""
    run = records.Run.create(CacheConfig(device="cpu"), tmp_path)
    result = cachelab.CacheResult.open(run.path)
    assert "holds no pass" in result.reading()
    assert (result.requests(), len(result.table())) == ([], 0)
    assert "n = 0" in result.caption
    with pytest.raises(RunError, match="of kind ablation"):
        cachelab.CacheResult.open(records.Run.create(RunConfig(device="cpu"), tmp_path).path)
