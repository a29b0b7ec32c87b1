"""Prompt lengths that are captured: a prompt is right-padded to the next one."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from hybridlab.errors import ConfigError

RIDGE = 64                # rows, for a machine that was not measured
LEAST, MOST = 16, 64      # rows of the first bucket
STEPS = 4                 # buckets in each doubling above it
AHEAD = range(1, 51)      # exact lengths that the paper captures before it serves
COUNTLESS = 2**20         # lengths are more than any context has


def finite(name: str, lengths: Iterable[Any]) -> tuple[Any, ...]:
    """All `lengths`. Raises `ConfigError` where they do not end, like those of `itertools.count`."""
    found = tuple(islice(lengths, COUNTLESS))
    if len(found) == COUNTLESS:
        raise ConfigError(f"{name} has {COUNTLESS:,} lengths or more", "no context is as long", "give those you need")
    return found


def ladder(buckets: Sequence[int] | Literal["exact"] | None, max_len: int,
           ridge: float | None = None, few: int | None = None) -> tuple[int, ...]:
    """The buckets of a runtime in rows, ascending, none above `max_len`.

    Given lengths are taken as they are, and "exact" asks for every length by itself. None asks for a ladder from the
    roofline: up to `ridge` rows (see `hybridlab.machine.ridge`) a step takes as long as reading its weights, so that
    padding costs nothing and one bucket serves; above it time grows with the rows, and in steps of a quarter of each
    octave at most a fifth of them is padding. The last bucket is `max_len`.

    A measured ridge is noisy and a ladder should be the same each time, so it is rounded down to a power of two,
    within 16 to 64. A GPU's ridge lies above, in half precision between 150 and 250 rows, but kernels do not read and
    compute at full rate at once: on an H200 a replay of Llama-2-7B takes 7.5 ms at 16 and at 64 rows, 8.3 at 128 and
    10.6 at 256 (run h200/20261123-235410-4e2d, part "cost"). None stands for a ridge of 64. `few` rows, if given, are
    a bucket of their own below: what multiplies so few is faster than what multiplies more.

    Raises `ConfigError` for lengths that are not ascending, or above `max_len`.
    """
    if buckets == "exact":
        return tuple(range(1, max_len + 1))
    if buckets is None:
        rungs = (*_rungs(_rounded(RIDGE if ridge is None else ridge), max_len), max_len)
        return (few, *rungs) if few and few < rungs[0] else rungs
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[-1] > max_len:
        raise ConfigError(f"buckets are {list(buckets)}", f"max_len is {max_len}",
                          "give ascending prompt lengths without repeats, none above max_len")
    return tuple(buckets)


def _rounded(ridge: float) -> int:
    return 1 << int(math.log2(min(max(ridge, LEAST), MOST)))


def _rungs(first: int, end: int) -> Iterator[int]:
    """From `first` on, a power of two, each doubling in four equal steps; all below `end`."""
    octave = first
    while octave < end:
        yield from range(octave, min(2 * octave, end), octave // STEPS)
        octave *= 2


def bucket_for(length: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds `length` tokens, or None. `buckets` ascend."""
    at = bisect_left(buckets, length)
    return buckets[at] if at < len(buckets) else None


def captured_ahead(buckets: Sequence[int], exact: bool) -> tuple[int, ...]:
    """What is captured before serving: every bucket; of exact lengths, which are too many, the paper's 1 to 50."""
    return tuple(b for b in buckets if not exact or b in AHEAD)
