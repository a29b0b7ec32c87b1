"""How often the 95 % intervals hold the true value: exactly where there is a closed form, counted everywhere.

An interval from order statistics can end at a value only, so its exact coverage is at least the nominal one and more
where steps are coarse, as they are for a p99. What is counted over RUNS seeded runs is therefore held against the
closed form, and that against 95 %; nothing is loosened to fit a count.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from hybridlab import grouped, stats

RUNS = 2000
WITHIN = 3.3 * np.sqrt(0.95 * 0.05 / RUNS)  # 1.6 %: what a count of RUNS stays within in 999 of 1000 sets of runs


def by_formula(q, n):
    """Ranks i and j (from 1) of the interval's ends, and the exact coverage P(i <= Binomial(n, q) < j)."""
    found = stats.quantile(np.arange(1, n + 1, dtype=float), q)  # here values and ranks are the same
    return int(found.low), int(found.high), binom.cdf(found.high - 1, n, q) - binom.cdf(found.low - 1, n, q)


@pytest.mark.parametrize(("q", "n", "nominal"), [(0.5, 25, True), (0.5, 1000, True), (0.99, 5000, True),
                                                 (0.99, 1000, False)])
def test_the_interval_of_a_quantile_covers_as_often_as_it_says(q, n, nominal):
    """An interval that covers less often than it says shows differences that are none."""
    low, high, exact = by_formula(q, n)
    rng = np.random.default_rng([n, int(100 * q)])
    true = np.exp(norm.ppf(q))
    below = np.array([np.count_nonzero(rng.lognormal(size=n) <= true) for _ in range(RUNS)])
    counted = np.mean((low <= below) & (below < high))  # rank `low` is at most the true value, rank `high` above it
    assert counted == pytest.approx(exact, abs=WITHIN)
    assert (0.93 <= counted <= 0.97) == nominal  # 97.6 % for a p99 of 1000 values: too coarse to be nearer to 95 %
    # One rank fewer at either end would leave more than 2.5 % beyond it, so that no interval is needlessly wide.
    assert exact >= 0.95
    assert binom.cdf(low, n, q) > 0.025
    assert binom.sf(high - 2, n, q) > 0.025


def test_the_closed_form_of_a_p99_is_conservative_where_few_values_lie_beyond_it():
    """Read as exactly 95 %, the interval of a p99 of few values would be taken for narrower than it is."""
    exact = [by_formula(0.99, n)[2] for n in (368, 1000, 5000, 20_000)]
    assert exact == pytest.approx([0.9624, 0.9761, 0.9537, 0.9535], abs=5e-5)


@pytest.mark.parametrize(("q", "n"), [(0.5, 100), (0.99, 1000)])
def test_ends_are_the_order_statistics_that_the_formula_counts(q, n):
    """The coverage counted by ranks is that of the values shown only if the ends are the values of those ranks."""
    low, high, _ = by_formula(q, n)
    for seed in range(20):
        values = np.random.default_rng(seed).lognormal(size=n)
        found, ordered = stats.quantile(values, q), np.sort(values)
        assert (found.low, found.high) == (ordered[low - 1], ordered[high - 1])


def covered(shared, runs=RUNS, n=40, own=0.1):
    """How often the paired interval holds a true ratio of 2, with a spread that both arms share and one of their own.

    Fewer resamples than stats.RESAMPLES leave the mean coverage as it is to a few tenths of a per cent."""
    hits = 0
    for seed in range(runs):
        rng = np.random.default_rng([seed, int(1000 * shared)])
        both = rng.lognormal(0, shared, n)
        sample, base = both * rng.lognormal(0, own, n), 2 * both * rng.lognormal(0, own, n)
        found = stats.ratio(sample, base, paired=True, seed=seed)
        hits += found.low <= 2 <= found.high
    return hits / runs


def test_the_paired_ratio_covers_where_arms_vary_on_their_own(monkeypatch):
    """The percentile bootstrap is an approximation; were it too short, a ratio of 1 would be called a speed-up."""
    monkeypatch.setattr(stats, "RESAMPLES", 199)
    assert 0.93 <= covered(shared=0.03) <= 0.97


def test_the_paired_ratio_errs_on_the_safe_side_where_arms_share_their_spread(monkeypatch):
    """What both arms share makes the ratio of their medians lumpy, and the bootstrap then covers more than 95 %:
    0.99 and more for 40 rounds whose shared spread is three times the own. Safe, but it must not turn around."""
    monkeypatch.setattr(stats, "RESAMPLES", 199)
    assert covered(shared=0.3) >= 0.97


REQUESTS, GAPS = 12, 31  # of a cell of a run with twelve requests of 32 tokens
BY_REQUEST = np.repeat(np.arange(REQUESTS), GAPS)


def alike(rng, spread=1.0):
    """Gaps of requests each of which has a level of its own; their true median is 100."""
    return (100 + spread * rng.normal(size=(REQUESTS, 1)) + rng.normal(size=(REQUESTS, GAPS))).ravel()


def test_the_interval_of_gaps_covers_where_those_of_a_request_are_alike():
    """Counted as independent, gaps of one request that fell into a slow mode are so many witnesses of one event."""
    hits = np.zeros(2)
    for seed in range(RUNS):
        gaps = alike(np.random.default_rng(seed))
        for place, groups in enumerate((BY_REQUEST, None)):
            found = stats.quantile(gaps, 0.5, groups=groups)
            hits[place] += found.low <= 100 <= found.high
    by_request, as_if_independent = hits / RUNS
    assert 0.93 <= by_request <= 0.97
    assert as_if_independent < 0.6


def test_the_ratio_of_gaps_covers_where_those_of_a_request_are_alike(monkeypatch):
    """A percentile interval of twelve requests, drawn whole, would still be too narrow."""
    monkeypatch.setattr(grouped, "RESAMPLES", 199)
    hits = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        found = stats.ratio(alike(rng), 2 * alike(rng), groups=BY_REQUEST, base_groups=BY_REQUEST, seed=seed)
        hits += found.low <= 2 <= found.high
    assert 0.93 <= hits / RUNS <= 0.975


def test_the_paired_ratio_of_gaps_covers_where_a_round_slows_both_arms(monkeypatch):
    """Too narrow, it would call what a round did to both arms a speed-up; what they share makes it err on the safe
    side, as above."""
    monkeypatch.setattr(grouped, "RESAMPLES", 199)
    hits = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        both = np.repeat(rng.normal(0, 3, REQUESTS), GAPS)
        found = stats.ratio(alike(rng) + both, 2 * (alike(rng) + both), paired=True, groups=BY_REQUEST, seed=seed)
        hits += found.low <= 2 <= found.high
    assert hits / RUNS >= 0.93
