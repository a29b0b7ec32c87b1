"""Buckets: a ladder that fits the machine, is the same each time, and never leaves a prompt out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridlab import machine
from hybridlab.buckets import bucket_for, captured_ahead, ladder
from hybridlab.errors import ConfigError


def test_the_ladder_is_flat_below_the_ridge_and_fine_above() -> None:
    """Buckets where padding is free, or steps so wide that a long prompt is mostly padding."""
    assert ladder(None, 512, 32) == (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
    assert ladder(None, 300, 200) == (64, 80, 96, 112, 128, 160, 192, 224, 256, 300)
    assert ladder(None, 100) == (64, 80, 96, 100)
    assert ladder(None, 7) == (7,)
    assert ladder(None, 100, 64, few=16) == (16, 64, 80, 96, 100)
    assert ladder(None, 12, 64, few=16) == (12,)


@given(ridge=st.floats(1e-3, 1e6), max_len=st.integers(1, 5000))
def test_a_measured_ridge_gives_a_sound_ladder(ridge: float, max_len: int) -> None:
    """A prompt without a bucket, a bucket beyond the cache, or more than a fifth of padding above the first one."""
    buckets = ladder(None, max_len, ridge)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == max_len
    assert buckets[0] == max_len or buckets[0] in (16, 32, 64)
    assert all(5 * (high - low - 1) < high for low, high in pairwise(buckets))


@pytest.mark.parametrize(("readings", "first"), [((18.0, 22.5, 31.9), 16), ((150.0, 176.0, 270.0, 1e9), 64),
                                                 ((0.1, 3.0), 16)])
def test_a_noisy_ridge_gives_the_same_ladder(readings: tuple[float, ...], first: int) -> None:
    """Other buckets, and so other captures and times, each time a machine is measured."""
    assert {ladder(None, 1024, ridge)[0] for ridge in readings} == {first}


def test_exact_lengths_and_given_lengths_are_taken_as_they_are() -> None:
    """A length that is padded although exact lengths were asked for; a given list that is changed."""
    assert ladder("exact", 40) == tuple(range(1, 41))
    assert ladder([16, 48], 64, ridge=128) == (16, 48)


@pytest.mark.parametrize("buckets", [[], [64, 32], [32, 32], [16, 128]])
def test_a_bad_ladder_is_refused(buckets: list[int]) -> None:
    """A prompt padded to a shorter bucket, or beyond the cache."""
    with pytest.raises(ConfigError, match="ascending"):
        ladder(buckets, 64)


@given(buckets=st.lists(st.integers(1, 300), min_size=1, unique=True).map(sorted), length=st.integers(1, 310))
def test_a_prompt_gets_the_smallest_bucket_that_holds_it(buckets: list[int], length: int) -> None:
    """A bucket too short, one longer than needed, or an error instead of None beyond the last."""
    assert bucket_for(length, buckets) == next((b for b in buckets if b >= length), None)


def test_exact_lengths_are_captured_ahead_as_in_the_paper() -> None:
    """A thousand captures before the first request; or a given bucket that nobody captured."""
    assert captured_ahead(ladder("exact", 1024), exact=True) == tuple(range(1, 51))
    assert captured_ahead(ladder("exact", 20), exact=True) == tuple(range(1, 21))
    assert captured_ahead((64, 1024), exact=False) == (64, 1024)


def test_the_ridge_is_measured_once() -> None:
    """A second of benchmarks in front of every runtime, or a number that is none."""
    found = machine.ridge(torch.device("cpu"), torch.float32)
    assert 0.1 < found < 1e5
    assert machine.ridge(torch.device("cpu"), torch.float32) == found
