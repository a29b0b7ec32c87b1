"""Admission: a capture is made when it has been earned, and the words say the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlab.admission import Admission


def learnt(miss: float = 20.0, hit: float = 4.0, capture: float = 50.0) -> Admission:
    """What hits, misses and captures take is known, from a prompt length of its own: 7 rows."""
    made = Admission(always=False)
    made.saw(7, "jit", miss)
    made.captured(7, capture)
    made.saw(7, "graph", hit)
    return made


def test_a_length_is_captured_once_its_misses_would_have_repaid_it() -> None:
    """Captures that never pay, or none where they would: 50 ms at 16 ms saved each repay after 4."""
    admission = learnt()
    refusals = []
    for _ in range(5):
        refusals.append(admission.refusal(64))
        admission.saw(64, "jit", 20.0)
    assert refusals[:2] == ["0 misses so far, a capture of 50 ms repays after 4 at 16 ms saved each",
                            "1 miss so far, a capture of 50 ms repays after 4 at 16 ms saved each"]
    assert [r is None for r in refusals] == [False] * 4 + [True]


@pytest.mark.parametrize("known", [[], ["miss"], ["capture"], ["miss", "capture"]])
def test_what_is_unknown_is_learnt_by_capturing(known: list[str]) -> None:
    """A cache that stays empty because nobody ever saw what a hit takes."""
    admission = Admission(always=False)
    if "miss" in known:
        admission.saw(7, "jit", 20.0)
    if "capture" in known:
        admission.captured(7, 50.0)
    assert admission.refusal(7) is None
    assert admission.refusal(64) is None


def test_a_length_speaks_for_itself_where_it_was_seen() -> None:
    """The times of short prompts taken for those of a long one that was measured."""
    admission = learnt()
    admission.captured(64, 1000.0)
    admission.saw(64, "jit", 60.0)
    assert "1e+03 ms repays after 63 at 16 ms" in str(admission.refusal(64))
    admission.saw(64, "graph", 10.0)
    assert "repays after 20 at 50 ms" in str(admission.refusal(64))
    assert "a capture of 525 ms repays after 16 at 33 ms" in str(admission.refusal(9))


def test_a_long_miss_and_a_short_hit_say_nothing_together() -> None:
    """A saving that is only the difference between two lengths."""
    admission = Admission(always=False)
    admission.captured(7, 50.0)
    admission.saw(7, "graph", 4.0)
    admission.saw(512, "jit", 400.0)
    assert admission.refusal(512) is None


def test_what_saves_nothing_is_never_captured() -> None:
    """A division by a saving of zero or below, or captures for ever that make things slower."""
    admission = learnt(miss=4.0, hit=4.5)
    for _ in range(100):
        admission.saw(64, "jit", 4.0)
    assert admission.refusal(64) == "a capture would not pay: hits take 0.5 ms longer than misses"
    assert "would not pay" in str(learnt(miss=4.0, hit=4.0).refusal(64))


def test_an_evicted_length_starts_anew() -> None:
    """Two lengths that evict each other at every request, each with a debt long paid."""
    admission = learnt()
    for _ in range(4):
        admission.saw(64, "jit", 20.0)
    assert admission.refusal(64) is None
    admission.evicted(64)
    assert "0 misses so far" in str(admission.refusal(64))
    admission.evicted(9999)  # never seen


def test_every_miss_is_captured_if_asked() -> None:
    """The reference policy, "capture every miss", that refuses one."""
    admission = Admission(always=True)
    admission.saw(7, "jit", 4.0)
    admission.captured(7, 50.0)
    admission.saw(7, "graph", 5.0)
    assert admission.refusal(7) is None


@given(cost=st.floats(0.1, 1000), saving=st.floats(0.1, 100), asked=st.integers(0, 200))
def test_it_costs_at_most_twice_what_knowing_the_future_would(cost: float, saving: float, asked: int) -> None:
    """A rule that loses without bound where lengths never come again, or come for ever."""
    admission = learnt(miss=1000.0 + saving, hit=1000.0, capture=cost)
    paid = 0.0
    for _ in range(asked):
        if admission.refusal(64) is None:
            paid += cost
            break
        admission.saw(64, "jit", 1000.0 + saving)
        paid += saving
    best = min(asked * saving, cost)
    assert paid <= (2 * best + saving) * (1 + 1e-6)
