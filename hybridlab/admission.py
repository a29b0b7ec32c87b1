"""Whether capturing a prompt length should pay, from what captures cost and hits save.

Nobody knows how often a length will come again. So one is captured as skis are bought by who does not know how often
it will snow: once the rent that was paid would have bought them. However the future turns out, that costs at most
twice what knowing it would have cost, but for the miss at which the sum is reached (A. Karlin, M. Manasse,
L. Rudolph, D. Sleator, "Competitive snoopy caching", Algorithmica 3, 1988).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

REPLAYED = "graph"  # the path of a hit


class _Mean:
    """Of the times seen so far, in ms."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0

    def add(self, ms: float) -> None:
        self.count, self.total = self.count + 1, self.total + ms

    @property
    def value(self) -> float:
        return self.total / self.count


class Admission:
    """Decides for one runtime. `always`: every miss is captured, and nothing is learnt."""

    def __init__(self, always: bool) -> None:
        self.always = always
        self._hits: dict[int, _Mean] = {}
        self._misses: dict[int, _Mean] = {}
        self._captures: dict[int, _Mean] = {}
        self._unpaid: Counter[int] = Counter()  # misses of a length since it was last in the cache

    def saw(self, rows: int, path: str, ms: float) -> None:
        """A first token of a prompt padded to `rows` took `ms`: by path "graph" that is a hit's time, else a miss's."""
        if path != REPLAYED:
            self._unpaid[rows] += 1
        (self._hits if path == REPLAYED else self._misses).setdefault(rows, _Mean()).add(ms)

    def captured(self, rows: int, ms: float) -> None:
        """Capturing `rows` took `ms` in all."""
        self._captures.setdefault(rows, _Mean()).add(ms)

    def evicted(self, rows: int) -> None:
        """The graph of `rows` is gone, and has to earn its place anew."""
        self._unpaid.pop(rows, None)

    def refusal(self, rows: int) -> str | None:
        """None if `rows` should be captured now, else why not, in words with the numbers that decide.

        Captured once the misses of this length have cost what a capture costs, and as long as the cost of a capture
        or the saving of a hit is unknown: that is how they become known. Both are means, of this length if it was
        seen, else of the lengths that were. A length is never captured while hits are seen to save nothing.

        So a stream whose lengths are not met again while their graph is held has every miss captured, as under
        `always`: exact lengths in a small cache. The bound above holds from the first length on that was hit.
        """
        saving, cost = self._saving(rows), self._cost(rows)
        if self.always or saving is None or cost is None:
            return None
        if saving <= 0:
            return f"a capture would not pay: hits take {-saving:.3g} ms longer than misses"
        misses, needed = self._unpaid[rows], math.ceil(cost / saving)
        if misses >= needed:
            return None
        return (f"{misses} miss{'' if misses == 1 else 'es'} so far, a capture of {cost:.3g} ms repays after {needed} "
                f"at {saving:.3g} ms saved each")

    def _cost(self, rows: int) -> float | None:
        own = self._captures.get(rows)
        return own.value if own else _mean(m.value for m in self._captures.values())

    def _saving(self, rows: int) -> float | None:
        """Of lengths that were both hit and missed only: a long miss and a short hit say nothing together."""
        both = self._hits.keys() & self._misses.keys()
        seen = {rows} if rows in both else both
        return _mean(self._misses[r].value - self._hits[r].value for r in sorted(seen))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return math.fsum(found) / len(found) if found else None
