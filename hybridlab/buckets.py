"""Prompt lengths that are captured: a prompt is right-padded to the next one."""

from __future__ import annotations

from collections.abc import Sequence

from hybridlab.errors import ConfigError

# Doubling while launches cost more than rows, then steps that keep padding under a quarter.
LADDER = (16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)


def ladder(buckets: Sequence[int] | None, max_len: int) -> tuple[int, ...]:
    """The buckets of a runtime, ascending, none above `max_len`. None asks for the default ladder."""
    if buckets is None:
        beyond = range(LADDER[-1] + 256, max_len + 1, 256)
        return (*(b for b in (*LADDER, *beyond) if b < max_len), max_len)
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[-1] > max_len:
        raise ConfigError(f"buckets are {list(buckets)}", f"max_len is {max_len}",
                          "give ascending prompt lengths without repeats, none above max_len")
    return tuple(buckets)


def bucket_for(length: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds `length` tokens, or None."""
    return next((b for b in buckets if b >= length), None)
