"""What speaks against a number is found in its rows: drift, two modes, what happened in slow samples, processes."""

import numpy as np
import pandas as pd
import pytest

from hybridlab import soundness


def rows(ms, arm="hybrid", metric="itl", **columns):
    count = len(ms)
    return pd.DataFrame({"run_id": "r", "arm": arm, "metric": metric, "prompt_tokens": 10, "ms": ms, "process": 0,
                         "request": range(count), "index": 1, "round": range(count), "happened": "",
                         "device_ms": np.nan, "client_ms": np.nan} | columns)


def quiet(count=1000, seed=0):
    return np.random.default_rng(seed).normal(3.0, 0.02, count)


def test_a_planted_drift_is_flagged_and_a_steady_run_is_not():
    """A median over a machine that heats up is a number no request ever saw."""
    steady = soundness.steady(rows(quiet())).iloc[0]
    assert not steady["drifts"]
    assert not steady["modes"]
    drifting = soundness.steady(rows(quiet() * np.linspace(1, 1.1, 1000))).iloc[0]
    assert drifting["drifts"]
    assert drifting["drift"] == pytest.approx(0.095, abs=0.01)
    words = soundness.words(rows(quiet() * np.linspace(1, 1.1, 1000), happened=None))
    assert words.startswith("Before believing a number: a drift over the run in hybrid (ITL, +9")
    assert "modes" not in words


def test_two_prompt_lengths_are_not_two_modes():
    """Pooled without care, a short and a long prompt look like a machine with two paces."""
    both = pd.concat([rows(quiet(500)), rows(3 * quiet(500, 1), prompt_tokens=400)])
    assert not soundness.steady(both).iloc[0]["modes"]
    assert soundness.steady(both.assign(prompt_tokens=10)).iloc[0]["modes"]
    assert soundness.words(both.assign(happened=None)) == ""
    assert "two modes in hybrid (ITL, 50% of it 3 times as slow as the rest)" in soundness.words(
        both.assign(prompt_tokens=10))


def test_what_happened_in_slow_samples_is_told_from_what_always_happens():
    """A cause that ordinary samples share explains nothing; one that only slow ones have does."""
    ms, happened = quiet(), np.full(1000, "", dtype=object)
    ms[100:110] += 5.0
    happened[100:110] = "preemption"
    happened[::2] = np.where(happened[::2] == "", "clock change", "preemption, clock change")
    table = soundness.slow(rows(ms, happened=happened)).set_index("kind")
    assert table.loc["preemption", ["times", "count", "slow", "others"]].tolist() == [10, 10, 1.0, 0.0]
    assert table.loc["clock change", "slow"] == 0.5
    assert table.loc["clock change", "others"] == pytest.approx(0.5, abs=0.01)
    assert table.loc["unexplained", "slow"] == 0.0
    assert ("of the 10 values beyond the p99 of their arm, preemption 10 (of the rest 0.0%), unexplained 0"
            in soundness.words(rows(ms, happened=happened)))
    assert soundness.slow(rows(quiet(100))).empty  # no p99
    assert soundness.slow(rows(quiet(), happened=None)).empty  # rows of an older run


def test_the_device_clock_stands_beside_the_host_clock():
    """A gain that only one clock sees must be visible as such."""
    (line,) = soundness.clocks(rows(quiet(100), device_ms=quiet(100) - 0.25)).to_dict("records")
    assert line["beside_ms"] == pytest.approx(0.25)
    assert line["ms"] - line["device_ms"] == pytest.approx(0.25)
    assert soundness.clocks(rows(quiet(100))).empty


def test_the_client_clock_stands_beside_the_others():
    """What a second process adds to a latency must be visible where there is one, and no number where there is none."""
    here = rows(quiet(100))
    (line,) = soundness.clocks(rows(quiet(100), client_ms=quiet(100) + 0.5)).to_dict("records")
    assert line["beyond_ms"] == pytest.approx(0.5)
    assert line["client_ms"] - line["ms"] == pytest.approx(0.5)
    assert line["device_ms"] is None
    (text,) = soundness.clocks_grid(rows(quiet(100), client_ms=quiet(100) + 0.5), "r").rows
    assert text[2:4] == ["–", "–"]
    assert text[5].startswith("0.500")
    assert soundness.clocks_grid(here, "r").rows == []


def test_processes_that_differ_are_seen():
    """Memory laid out differently moves a median by more than its interval says."""
    both = rows(np.concatenate([quiet(100), 1.1 * quiet(100)]), process=np.repeat([0, 1], 100))
    (line,) = soundness.processes(both).to_dict("records")
    assert line["most"] / line["least"] == pytest.approx(1.1, abs=0.005)
    assert soundness.processes(rows(quiet())).empty


def test_a_generation_length_counts_its_own_gaps_only():
    """The p99 of ten tokens must not hold gaps of the five-hundredth, and no length longer than was generated."""
    index = np.tile(np.arange(1, 101), 50)
    table = soundness.by_generation(rows(index.astype(float), index=index), [10, 101, 500])
    assert table["new_tokens"].tolist() == [10, 101]
    assert table["n"].tolist() == [9 * 50, 100 * 50]
    assert table["p50"].tolist() == [5.0, 50.5]
    assert table["p99"].iloc[0] == 9.0


def test_quantiles_name_only_what_the_sample_supports():
    """A p99 of fifty values is its maximum by another name."""
    line = soundness.quantiles(rows(quiet(60))).iloc[0]
    assert line["p90_low"] <= line["p90"] <= line["p90_high"]
    assert (line["p95"], line["p99"]) == (None, None)
    assert line["max"] == rows(quiet(60))["ms"].max()


def test_each_table_of_latencies_has_the_limit():
    """A table without it calls fast what the machine could do ten times as fast."""
    floors = pd.DataFrame([("itl", 10, 11, 1.5, "memory"), ("itl", 10, 1000, 1.5, "memory")],
                          columns=["metric", "prompt_tokens", "position", "ms", "bound"]).astype({"position": "Int64"})
    sample = rows(quiet(), position=11, device_ms=quiet() - 1, index=np.tile([1, 7], 500))
    for name, grid in soundness.GRIDS.items():
        for given in (None, floors):
            made = grid(sample, "c", given)
            assert made.rows
            assert all(len(row) == len(made.header) for row in made.rows)
            limited = given is not None and name in ("clocks", "quantiles", "generation")
            assert (made.header[-2:] == ["limit, ms", "of limit"]) == limited
            assert ("1.50" in made.rows[0] and "50% [" in made.rows[0][-1]) == limited
