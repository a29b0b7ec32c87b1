"""Quantiles, ratios and the summary: exact where there is a closed form, refused where the sample is too small."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from hybridlab import stats
from hybridlab.errors import StatisticsError

FRACTIONS = st.floats(0.01, 0.99)


@pytest.mark.parametrize(("q", "n"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.01, 368), (0.999, 3688)])
def test_needed_is_the_closed_form(q, n):
    """A p99 from too few values would be the largest of a handful, shown as if it were a tail."""
    assert stats.needed(q) == n
    extreme = max(q, 1 - q)
    assert extreme**n <= 0.025 < extreme ** (n - 1)


@given(q=FRACTIONS)
@settings(max_examples=60, deadline=None)
def test_needed_agrees_with_the_interval_that_is_computed(q):
    """If the count and scipy disagreed, an interval would hold NaN, or a good sample would be refused."""
    n = stats.needed(q)
    found = stats.quantile(np.arange(n, dtype=float), q)
    assert np.isfinite([found.low, found.high]).all()
    with pytest.raises(StatisticsError, match=f"n >= {n}"):
        stats.quantile(np.arange(n - 1, dtype=float), q)


@given(q=st.sampled_from([0.1, 0.5, 0.9, 0.99]), n=st.integers(368, 2000))
@settings(max_examples=60, deadline=None)
def test_the_interval_covers_by_the_binomial_formula(q, n):
    """An interval that is too short claims a precision that was not measured.

    For a continuous sample, the probability that order statistics i and j (from 1) hold the quantile between them
    is P(i <= Binomial(n, q) < j). The sample 1..n makes values and ranks the same.
    """
    found = stats.quantile(np.arange(1, n + 1, dtype=float), q)
    coverage = binom.cdf(found.high - 1, n, q) - binom.cdf(found.low - 1, n, q)
    assert coverage >= 0.95
    tighter = binom.cdf(found.high - 2, n, q) - binom.cdf(found.low, n, q)
    assert tighter < 0.95 + 2 * binom.pmf(round(n * q), n, q)  # and it is not needlessly wide
    assert found.low <= found.value <= found.high
    assert found.n == n


def test_median_of_six_spans_the_whole_sample():
    """Six is the smallest sample with an interval of the median, and then it is minimum to maximum."""
    assert stats.quantile([3, 1, 2, 6, 5, 4], 0.5) == stats.Estimate(3.5, 1.0, 6.0, 6)


@pytest.mark.parametrize("bad", [[1.0] * 9 + [float("nan")], [1.0] * 9 + [float("inf")], np.ones((3, 3))])
def test_a_failed_measurement_never_enters_a_sample(bad):
    """NaN sorts to one end and would silently shift every quantile."""
    with pytest.raises(StatisticsError):
        stats.quantile(bad, 0.5)


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(q):
    """p0 and p100 have no two-sided interval at any n."""
    with pytest.raises(StatisticsError, match="between 0 and 1"):
        stats.needed(q)


def test_ratio_says_how_many_times_faster_and_repeats():
    """The ratio upside down would turn a slowdown into a speed-up; a moving interval could not be checked."""
    base = np.linspace(9, 11, 40)
    found = stats.ratio(base / 2, base, paired=True)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    loose = stats.ratio(base / 2, base)
    assert loose == stats.ratio(base / 2, base)
    assert loose.low < 2 < loose.high
    assert loose != stats.ratio(base / 2, base, seed=1)


def test_pairing_removes_what_both_arms_share():
    """A slow minute hurts both arms of a round; unpaired it would blur the comparison."""
    rng = np.random.default_rng(0)
    drift = rng.lognormal(0, 0.5, 60)
    fast, slow = drift * rng.lognormal(0, 0.01, 60), 2 * drift * rng.lognormal(0, 0.01, 60)
    paired, unpaired = stats.ratio(fast, slow, paired=True), stats.ratio(fast, slow)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


@pytest.mark.parametrize(("sample", "base", "paired"), [([1.0] * 5, [1.0] * 9, False), ([1.0] * 9, [1.0] * 5, False),
                                                        ([1.0] * 9, [1.0] * 8, True), ([0.0] * 9, [1.0] * 9, False)])
def test_ratio_refuses_what_it_cannot_say(sample, base, paired):
    """Too few, unequal pairs or zero times give no ratio rather than a wrong one."""
    with pytest.raises(StatisticsError):
        stats.ratio(sample, base, paired=paired)


def rows(counts, metric="itl", run_id="a"):
    """Rows of `{arm: (n, ms)}` at one prompt length; the values rise from ms to 1.1 ms."""
    return pd.DataFrame([{"run_id": run_id, "round": i, "arm": arm, "prompt_tokens": 10, "index": 1, "metric": metric,
                          "ms": ms * (1 + 0.1 * i / n)} for arm, (n, ms) in counts.items() for i in range(n)])


@pytest.mark.parametrize(("n", "has_p50", "has_p99"), [(5, False, False), (6, True, False), (367, True, False),
                                                       (368, True, True)])
def test_summary_never_shows_a_quantile_that_n_does_not_support(n, has_p50, has_p99):
    """A table with a p99 of 100 values was how the published comparison misled."""
    for cell in stats.summary(rows({"eager": (n, 2.0), "hybrid": (n, 1.0)})).itertuples():
        assert [cell.p50 is not None, cell.p50_low is not None, cell.p50_high is not None] == [has_p50] * 3
        assert [cell.p99 is not None, cell.p99_low is not None, cell.p99_high is not None] == [has_p99] * 3
        assert (cell.ratio_to_eager is not None) == has_p50
        assert cell.n == n


def test_summary_orders_arms_and_compares_with_eager():
    """Arms by alphabet would put eager in the middle; without eager there is no ratio to show."""
    table = stats.summary(rows({"hybrid": (20, 1.0), "eager": (20, 3.0)}), arms=("eager", "jit", "hybrid"))
    assert table["arm"].tolist() == ["eager", "hybrid"] * 2
    assert table["prompt_tokens"].tolist() == [10, 10, "all", "all"]
    assert table["ratio_to_eager"].tolist() == pytest.approx([1, 3, 1, 3])
    alone = stats.summary(rows({"hybrid": (20, 1.0)}))
    assert alone["ratio_to_eager"].tolist() == [None, None]


def test_rows_of_two_runs_are_not_summarised_together():
    """Two runs differ in machine, versions or load; pooled, the difference would look like one between arms."""
    both = pd.concat([rows({"eager": (9, 1.0)}), rows({"hybrid": (9, 1.0)}, run_id="b")])
    with pytest.raises(StatisticsError, match="2 runs"):
        stats.summary(both)
    with pytest.raises(StatisticsError, match="0 runs"):
        stats.summary(both.iloc[:0])


def test_the_summary_pairs_the_rounds_that_arms_share():
    """Arms are measured in the same rounds; leaving that out would widen the ratio by the drift between rounds."""
    rng = np.random.default_rng(0)
    drift = pd.Series(rng.lognormal(0, 0.5, 60))
    both = pd.concat([rows({"eager": (60, 1.0)}).assign(ms=2 * drift),
                      rows({"hybrid": (60, 1.0)}).assign(ms=drift)]).sample(frac=1, random_state=0)
    cell = stats.summary(both, arms=("hybrid",)).iloc[0]
    assert (cell["ratio_to_eager"], cell["ratio_low"], cell["ratio_high"]) == pytest.approx((2, 2, 2))


def of_requests(levels, gaps=31, **columns):
    """Rows of one arm whose request i has `gaps` equal gaps of levels[i] ms."""
    cell = {"run_id": "a", "arm": "eager", "prompt_tokens": 10, "metric": "itl"}
    return pd.DataFrame([cell | {"round": i, "request": 2 * i, "index": j, "ms": ms} | columns
                         for i, ms in enumerate(levels) for j in range(1, gaps + 1)])


def test_an_interval_of_gaps_is_as_wide_as_its_requests_differ():
    """186 gaps of six requests of which two are slow: by gaps the slow ones are outside the interval for certain."""
    gaps = of_requests([1.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    assert stats.of(gaps, 0.5) == stats.Estimate(1.0, 1.0, 2.0, 186)
    assert stats.quantile(gaps["ms"], 0.5).high == 1.0
    assert stats.of(gaps.assign(request=range(len(gaps))), 0.5).high == 1.0  # each its own


def test_too_few_requests_have_no_interval_however_many_gaps():
    """Five requests are five witnesses."""
    assert stats.of(of_requests([1.0] * 5, gaps=1000), 0.5) is None
    with pytest.raises(StatisticsError, match="5 requests"):
        stats.quantile([1.0] * 500, 0.5, groups=np.repeat(np.arange(5), 100))
    line = stats.summary(pd.concat([of_requests([1.0] * 5), of_requests([2.0] * 5, arm="jit")])).iloc[0]
    assert (line["p50"], line["ratio_to_eager"]) == (None, None)


def test_a_p99_that_hangs_on_one_request_has_no_interval():
    """24 requests, one of which is slow: the p99 is that of one event, whatever its interval by gaps."""
    steady = of_requests(np.linspace(1.0, 1.1, 24))
    steady["ms"] += np.random.default_rng(0).exponential(1, len(steady))
    assert stats.of(steady, 0.99) is not None
    one = of_requests([1.0] * 23 + [9.0])
    assert stats.of(one, 0.99) is None
    with pytest.raises(StatisticsError, match="24 requests that differ too much"):
        stats.change(one["ms"], one["ms"], "p99", groups=np.repeat(np.arange(24), 31), paired=True)


def test_requests_are_told_apart_by_all_that_names_them():
    """The third request of one pass, arm or process is not the third of another."""
    one = of_requests([1.0] * 3)
    for column in ("process", "part", "setting", "arm", "round"):
        both = pd.concat([one.assign(**{column: "x"}), one.assign(**{column: "y"})])
        assert len(np.unique(stats.grouped.requests(both))) == 6, column
    assert stats.grouped.requests(one.assign(request=None)) is None
    assert stats.grouped.requests(one.drop(columns="request")) is None


def test_pairs_of_requests_of_unequal_length_count_what_is_there():
    """A shorter request filled up with something would move the median."""
    ragged = pd.concat([of_requests([1.0] * 6, gaps=31), of_requests([3.0] * 3, gaps=2, round=9)])
    found = stats.against(ragged, ragged.assign(ms=ragged["ms"] * 2), like=())
    assert (found.value, found.n) == (2.0, len(ragged))
    assert found.low == found.high == 2.0


@pytest.mark.parametrize("like", [("round", "index"), ("round", "position", "index")])
def test_pairs_stay_together_by_request_whatever_names_them(like):
    """Paired by columns that tell gaps apart, each gap would be a witness of its own."""
    own = of_requests([1.0, 1.0, 2.0, 1.0, 2.0, 1.0]).assign(position=lambda rows: rows["index"] + 10)
    found = stats.changed(own, own.assign(ms=2.0, request=lambda rows: rows["request"] + 1), like=like, column="ms")
    assert (found.value, found.low, found.high, found.n) == (-0.5, -0.5, 0.0, 186)
    alone = stats.change(own["ms"], np.full(len(own), 2.0), paired=True)
    assert alone.high == -0.5
