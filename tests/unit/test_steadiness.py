"""Drift and modes on samples whose answer is known, and the rate of false alarms on steady ones."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from hybridlab import steadiness
from hybridlab.errors import StatisticsError

RUNS = 200


def autocorrelated(rng, n, rho=0.6):
    """Normal noise of unit variance in which each value keeps `rho` of the one before."""
    noise = rng.normal(0, np.sqrt(1 - rho**2), n)
    noise[0] = rng.normal()
    for i in range(1, n):
        noise[i] += rho * noise[i - 1]
    return noise


def heavy(rng, n):
    """Log-normal latencies about 2 ms of which three in a hundred are up to fifty times as long."""
    return 2 * rng.lognormal(0, 0.05, n) * np.where(rng.random(n) < 0.03, rng.uniform(1, 50, n), 1)


@pytest.mark.parametrize("change", [0.05, -0.05])
def test_a_planted_drift_is_flagged_with_its_size(change):
    """A GPU that heats up makes the later arm look slower; pooled, the median belongs to no moment of the run."""
    rng = np.random.default_rng(0)
    n = 2000
    found = steadiness.drift(heavy(rng, n) * np.linspace(1, 1 + change, n))
    assert found.flagged
    assert found.p < 0.01
    assert found.low < 2 * change / n * 1000 < found.high
    assert found.change == pytest.approx(change, rel=0.3)
    assert f"{100 * found.change:+.2g} %" in found.words
    assert found.n == n


@pytest.mark.parametrize("noise", [lambda rng: 2 * rng.lognormal(0, 0.05, 1000), lambda rng: heavy(rng, 1000),
                                   lambda rng: 2 + 0.05 * autocorrelated(rng, 1000)],
                         ids=["log-normal", "heavy tail", "autocorrelated"])
def test_steady_noise_is_not_flagged(noise):
    """An alarm in every tenth steady run is one that nobody reads."""
    rng = np.random.default_rng(1)
    found = [steadiness.drift(noise(rng)) for _ in range(RUNS)]
    assert sum(one.flagged for one in found) <= 0.05 * RUNS
    assert sum(one.low <= 0 <= one.high for one in found) >= 0.95 * RUNS
    assert next(one for one in found if not one.flagged).words.startswith("No drift is seen")


def test_a_constant_has_no_drift_and_one_mode():
    """The rank correlation of a constant is undefined, and NaN below a level is a comparison that says nothing."""
    alone = steadiness.modes(np.full(300, 2.0))
    assert (alone.p, alone.flagged, alone.fast, alone.slow) == (1, False, 2, 2)
    found = steadiness.drift(np.full(300, 2.0))
    assert (found.p, found.flagged, found.slope, found.change) == (1, False, 0, 0)


def test_slope_is_given_per_thousand_values():
    """A slope in another unit would be off by a factor that looks plausible."""
    found = steadiness.drift(10 + np.arange(2001) / 1000)
    assert (found.slope, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.change == pytest.approx(2 / 11, rel=1e-3)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_two_modes_are_flagged_and_described(share):
    """A median between a graph path and a JIT path describes neither."""
    rng = np.random.default_rng(2)
    slow = rng.random(1000) < share
    found = steadiness.modes(np.where(slow, 3.0, 2.0) * rng.lognormal(0, 0.08, 1000))
    assert found.flagged
    assert (found.fast, found.slow) == pytest.approx((2, 3), rel=0.03)
    assert found.slow_share == pytest.approx(share, abs=0.05)
    assert found.words.startswith("There is more than one mode")
    assert found.words.endswith("p <= 0.001, n = 1000.")


@pytest.mark.parametrize("noise", [lambda rng: 2 * rng.lognormal(0, 0.05, 500),
                                   lambda rng: 2 * rng.lognormal(0, 1, 500),
                                   lambda rng: heavy(rng, 500), lambda rng: rng.uniform(1, 2, 500),
                                   lambda rng: np.round(2 * rng.lognormal(0, 0.05, 500), 2)],
                         ids=["narrow", "wide", "heavy tail", "uniform", "rounded"])
def test_one_mode_is_not_taken_for_two(noise):
    """A slow tail, or a clock that ticks, would be reported as a second population that is not there."""
    rng = np.random.default_rng(3)
    found = [steadiness.modes(noise(rng)) for _ in range(RUNS)]
    assert sum(one.flagged for one in found) <= 0.03 * RUNS
    assert "One mode is enough" in next(one for one in found if not one.flagged).words


def test_the_slow_half_is_no_single_value():
    """One stall of a second would be a half of its own, and hide the two modes below it."""
    rng = np.random.default_rng(4)
    values = np.concatenate([rng.normal(2, 0.02, 300), rng.normal(3, 0.02, 300), [1000.0]])
    found = steadiness.modes(values)
    assert (found.fast, found.slow) == pytest.approx((2, 3), rel=0.02)


def reached(x, d, n):
    """The least value at a mode x[-1] of a convex function within d of the distribution of n values, of which x are
    the lowest; infinite where there is none.

    Just before x[j] the distribution is j / n, at x[j] it is (j + 1) / n. A convex function exists where no value has
    to lie above a chord of two others that it may not exceed, and it goes on at least as steeply as it came.
    """
    top, bottom, last = np.arange(len(x)) / n + d, np.arange(1, len(x) + 1) / n - d, len(x) - 1
    for i, j, k in combinations(range(last), 3):
        if bottom[j] > top[i] + (top[k] - top[i]) * (x[j] - x[i]) / (x[k] - x[i]) + 1e-12:
            return np.inf
    steep = [bottom[j] + (bottom[j] - top[i]) * (x[last] - x[j]) / (x[j] - x[i])
             for i, j in combinations(range(last), 2)]
    least = max([0.0, *bottom[:last], *steep])
    return least if least <= top[last] + 1e-12 else np.inf


def brute_dip(x):
    """The dip by its definition: the smallest d, found by halving, within which a function stays that is convex up to
    a mode, jumps there or not, and is concave from there on."""
    n, (low, high) = len(x), (1 / (2 * len(x)), 0.5)
    for _ in range(20):
        d = (low + high) / 2
        fits = any(reached(x[:k + 1], d, n) + reached(-x[k:][::-1], d, n) <= 1 for k in range(n))
        low, high = (low, d) if fits else (d, high)
    return high


@pytest.mark.parametrize("seed", range(6))
def test_dip_is_that_of_the_definition(seed):
    """A slip in the shrinking interval would still give plausible numbers, and wrong p values."""
    rng = np.random.default_rng(seed)
    ordered = np.sort(np.concatenate([rng.normal(0, 1, 6), rng.normal(6, 1, 7)]))
    assert steadiness.dip(ordered) == pytest.approx(brute_dip(ordered), abs=1e-5)


def test_dip_has_its_known_values():
    """Evenly spaced values dip the least that is possible, 1 / 2n; two points of half the values each 1 / 4."""
    assert steadiness.dip(np.arange(10.0)) == pytest.approx(1 / 20)
    assert steadiness.dip(np.full(10, 3.0)) == pytest.approx(1 / 20)
    two = np.sort(np.concatenate([np.linspace(0, 1e-6, 500), np.linspace(1, 1 + 1e-6, 500)]))
    assert steadiness.dip(two) == pytest.approx(1 / 4, abs=2e-3)


def test_the_table_of_dips_is_that_of_uniform_samples():
    """A wrong table would shift every p value at once."""
    rng = np.random.default_rng(5)
    deep = [steadiness.dip(np.sort(rng.random(500))) for _ in range(600)]
    p = np.array([steadiness.dip_p(depth, 500) for depth in deep])
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.08)
    assert steadiness.dip_p(1.0, 500) == pytest.approx(0.001)


@pytest.mark.parametrize(("call", "least"), [(steadiness.drift, 200), (steadiness.modes, 100)])
def test_what_is_too_small_or_failed_is_refused(call, least):
    """No alarm from a handful of values means nothing, and would be read as a steady run."""
    steady = np.linspace(2, 2.1, least)
    assert not call(np.random.default_rng(0).permutation(steady)).flagged
    with pytest.raises(StatisticsError, match=f"n >= {least}"):
        call(steady[1:])
    for wrong in (np.append(steady, np.nan), steady.reshape(2, -1)):
        with pytest.raises(StatisticsError):
            call(wrong)
    with pytest.raises(StatisticsError, match="not positive"):
        steadiness.modes(np.zeros(100))
