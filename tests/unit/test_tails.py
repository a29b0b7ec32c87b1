"""What happened is laid to the values it fell into, and the watch sees what really happens in this process."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import pytest

from hybridlab import tails
from hybridlab.errors import ConfigError, MeasureError, StatisticsError
from hybridlab.tokens import Happening

MS = 1_000_000
BEGUN = 10**16  # beyond 2**53, where a float no longer holds a nanosecond


def test_each_value_names_what_happened_in_it():
    """A slow token without its cause is a mystery; with a cause that was over before it began, a wrong accusation."""
    found = tails.during([1.0] * 4, [BEGUN + number * MS for number in (1, 2, 3, 4)], [
        Happening("preemption", BEGUN + 1_500_000, BEGUN + 1_900_000, "", False),
        Happening("garbage collection", BEGUN + 1_600_000, BEGUN + 2_250_000, "", True),  # ends in the third
        Happening("capture", BEGUN + 1_700_000, BEGUN + 1_800_000, "", True),             # inside the collection
        Happening("preemption", BEGUN + 3 * MS, BEGUN + 3 * MS, "", False),               # between two: of neither
        Happening("eviction", BEGUN - 9, BEGUN, "just before", True), Happening("eviction", BEGUN + 4 * MS,
                                                                               BEGUN + 5 * MS, "just after", True)])
    assert found == [("", 0.0), ("garbage collection, capture, preemption", 0.4), ("garbage collection", 0.25),
                     ("", 0.0)]
    assert tails.during([1.0, 2.0], [MS, 3 * MS], []) == [("", 0.0)] * 2
    assert tails.during([], [], [Happening("capture", 0, 1, "", True)]) == []


def test_two_happenings_at_once_count_their_time_once():
    """A collection during a capture, added up, would explain more than there is to explain."""
    both = [Happening("garbage collection", BEGUN + MS, BEGUN + 2 * MS, "", True),
            Happening("capture", BEGUN, BEGUN + 4 * MS, "", True)]
    assert tails.during([7.0], [BEGUN + 5 * MS], both) == [("garbage collection, capture", 4.0)]


def test_what_has_no_exact_time_takes_none():
    """A preemption is only known to lie within its token; as if it lasted all of it, it would explain everything."""
    known = [Happening("preemption", BEGUN, BEGUN + 7 * MS, "1", False),
             Happening("eviction", BEGUN, BEGUN + MS, "", True)]
    assert tails.during([7.0], [BEGUN + 7 * MS], known) == [("eviction, preemption", 1.0)]


def test_a_happening_that_ends_before_it_starts_is_refused():
    """Reversed stamps overlap nothing, and the stall would be called unexplained."""
    with pytest.raises(StatisticsError, match="a capture ends before it starts"):
        tails.during([7.0], [BEGUN], [Happening("capture", BEGUN, BEGUN - 1, "", True)])


@pytest.fixture
def quiet_gc():
    """No collection of its own accord during a test."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("quiet_gc")
def test_the_watch_sees_a_collection_where_it_was():
    """A collection stamped wrongly would be laid to another token."""
    with tails.Watch() as watch:
        before = watch.sample()
        gc.collect(1)
        after = watch.sample()
    gc.collect(0)  # no longer watched
    (one,) = (found for found in watch.happenings() if found.kind == "garbage collection")
    assert before <= one.start_ns <= one.end_ns <= after
    assert one.detail.startswith("generation 1, ")
    assert one.exact


def test_the_watch_leaves_no_callback_behind_on_an_error():
    """A callback left behind would slow every later collection of the process, and grow its list for ever."""
    before = list(gc.callbacks)
    watch = tails.Watch()
    with pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError
    assert gc.callbacks == before
    with watch:
        assert len(gc.callbacks) == len(before) + 1
        with pytest.raises(MeasureError), watch:
            pass
        assert len(gc.callbacks) == len(before) + 1
    assert gc.callbacks == before


def test_the_watch_lays_a_preemption_to_the_token_it_fell_in(monkeypatch):
    """A count taken from the wrong interval would explain a token that was never interrupted."""
    counts = iter([7, 7, 9, 9])
    monkeypatch.setattr(tails.resource, "getrusage", lambda who: SimpleNamespace(ru_nivcsw=next(counts)))
    with tails.Watch() as watch:
        stamps = [watch.sample() for _ in range(3)]
    found = [one for one in watch.happenings() if one.kind == "preemption"]
    assert found == [Happening("preemption", stamps[0], stamps[1], "involuntary context switches: 2", False)]


def test_a_watch_counts_its_own_thread_only():
    """Preemptions of another thread would be laid to tokens that this one made."""
    caught = []

    def other():
        try:
            watch.sample()
        except MeasureError as error:
            caught.append(error)

    with tails.Watch() as watch:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1


@pytest.mark.usefixtures("quiet_gc")
def test_what_another_process_saw_takes_the_place_of_what_this_one_did():
    """A client that is interrupted while it waits delays no token of its worker; an unknown kind splits a count."""
    theirs = Happening("preemption", 25, 28, "", False)
    with tails.Watch() as watch:
        watch.note("capture", 10, 20)
        watch.note("eviction", 15, 31)
        watch.replace(20, [theirs])
        with pytest.raises(ConfigError, match="capture"):
            watch.note("captures", 10, 20)
        with pytest.raises(ConfigError, match="preemption"):
            watch.replace(20, [theirs._replace(kind="preempted")])
    assert watch.happenings() == [Happening("capture", 10, 20, "", True), theirs]


def test_a_watch_forgets_what_is_over():
    """A run of hours would hold every preemption that ever was."""
    with tails.Watch() as watch:
        watch.note("capture", 10, 20)
        watch.note("capture", 30, 40)
        watch.forget(30)
        assert [(one.start_ns, one.end_ns) for one in watch.happenings()] == [(30, 40)]
