"""Tail attribution on planted stalls, and the watch on what really happens in this process."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from hybridlab import tails
from hybridlab.errors import ConfigError, MeasureError, StatisticsError

MS = 1_000_000
PLANTED, STALL_MS = 617, 5.0


def tokens(n=1000, stall_ms=STALL_MS, seed=0):
    """n tokens of 2 ms one after another, number PLANTED longer by a stall in its middle; and the stall's stamps."""
    lengths = (np.random.default_rng(seed).normal(2.0, 0.02, n) * MS).astype("int64")
    lengths[PLANTED] += int(stall_ms * MS)
    ends = 10**16 + np.cumsum(lengths)  # beyond 2**53, where a float no longer holds a nanosecond
    samples = pd.DataFrame({"start_ns": ends - lengths, "end_ns": ends})
    start = int(samples["start_ns"][PLANTED]) + MS
    return samples, (start, start + int(stall_ms * MS))


def happened(*rows):
    return pd.DataFrame(rows, columns=["kind", "start_ns", "end_ns", "detail"])


def inside(samples, index, length_ns=MS // 2):
    start = int(samples["start_ns"][index]) + MS // 2
    return start, start + length_ns


def test_a_planted_stall_is_found_and_laid_to_its_happening_alone():
    """A stall laid to a neighbour's happening would send whoever reads it to mend the wrong part."""
    samples, stall = tokens()
    known = happened(("capture", *stall, "64 rows"), ("eviction", *inside(samples, PLANTED - 1), "one graph"),
                     ("clock change", *inside(samples, PLANTED + 1), ""),
                     ("garbage collection", *inside(samples, 3), ""),
                     ("eviction", int(samples["end_ns"][PLANTED]), int(samples["end_ns"][PLANTED]) + 9, "just after"),
                     ("eviction", int(samples["start_ns"][PLANTED]) - 9, int(samples["start_ns"][PLANTED]), "before"))
    found = tails.attribute(samples, known)
    worst = found.iloc[0]
    assert (worst["sample"], worst["cause"], worst["detail"]) == (PLANTED, "capture", "64 rows")
    assert worst["ms"] == pytest.approx(7, abs=0.1)
    assert worst["excess_ms"] == pytest.approx(STALL_MS, abs=0.1)
    assert worst["overlap_ms"] == STALL_MS
    assert worst["share"] == worst["exact_share"] > 0.97
    assert (found["cause"] == "capture").sum() == 1
    assert len(found) == 10  # a thousand values have ten beyond the p99


def test_a_stall_without_a_happening_stays_unexplained():
    """An attribution that always finds a cause says nothing."""
    samples, _ = tokens()
    worst = tails.attribute(samples, happened(("eviction", *inside(samples, 3), ""))).iloc[0]
    assert (worst["sample"], worst["cause"], worst["share"], worst["detail"]) == (PLANTED, tails.UNEXPLAINED, 0, "")
    assert (tails.attribute(samples, happened())["cause"] == tails.UNEXPLAINED).all()


def test_a_happening_explains_no_more_than_its_own_length():
    """A collection of 1 ms inside a stall of 5 ms would be blamed for all of it, and the real cause never sought."""
    samples, (start, _) = tokens()
    worst = tails.attribute(samples, happened(("garbage collection", start, start + MS, ""))).iloc[0]
    assert worst["share"] == pytest.approx(0.2, abs=0.01)


def test_two_happenings_at_once_count_their_time_once():
    """A collection during a capture, added up, would explain more than there is to explain."""
    samples, (start, end) = tokens()
    both = happened(("garbage collection", start + MS, start + 2 * MS, "gen 2"),
                    ("capture", start, end - MS, "64 rows"))
    worst = tails.attribute(samples, both).iloc[0]
    assert worst["overlap_ms"] == STALL_MS - 1
    assert (worst["cause"], worst["detail"]) == ("capture, garbage collection", "64 rows; gen 2")


def test_what_has_no_exact_time_is_kept_apart():
    """A preemption is only known to lie within its token; as if it lasted all of it, it would explain everything."""
    samples, (start, _) = tokens()
    token = (int(samples["start_ns"][PLANTED]), int(samples["end_ns"][PLANTED]))
    known = happened(("preemption", *token, "1"), ("eviction", start, start + MS, "")).assign(exact=[False, True])
    worst = tails.attribute(samples, known).iloc[0]
    assert worst["share"] == 1
    assert worst["exact_share"] == pytest.approx(0.2, abs=0.01)


def test_samples_may_come_as_lengths_and_ends():
    """Rows of a run hold ms; a caller who had to make the start stamps could make them wrong."""
    samples, stall = tokens()
    lengths = pd.DataFrame({"ms": (samples["end_ns"] - samples["start_ns"]) / MS, "end_ns": samples["end_ns"]})
    known = happened(("capture", *stall, ""))
    pd.testing.assert_frame_equal(tails.attribute(lengths, known), tails.attribute(samples, known))


def test_a_kind_that_is_always_there_is_told_from_one_that_is_not():
    """What overlaps every token overlaps the slow ones too, and would look like their cause."""
    samples, stall = tokens()
    always = [("clock change", *inside(samples, i, 1), "") for i in range(len(samples))]
    table = tails.by_kind(samples, happened(*always, ("capture", *stall, ""))).set_index("kind")
    assert table.loc["clock change"].tolist() == [1000, 1, 1]
    assert table.loc["capture"].tolist() == [1, 0.1, 0]


def test_equal_samples_have_no_tail():
    """Nothing lies beyond the p99 of equal values; a share of an excess of zero would be NaN."""
    ends = 2 * MS * np.arange(1, 401)
    samples = pd.DataFrame({"start_ns": ends - 2 * MS, "end_ns": ends})
    known = happened(("capture", 0, MS, ""))
    assert tails.attribute(samples, known).empty
    assert np.isnan(tails.by_kind(samples, known).loc[0, "slow"])


@pytest.mark.parametrize("samples", [tokens()[0].iloc[:367], tokens()[0].rename(columns={"end_ns": "end"}),
                                     tokens()[0].rename(columns={"start_ns": "ms", "end_ns": "start_ns"}),
                                     tokens()[0].rename(columns={"start_ns": "end_ns", "end_ns": "start_ns"})])
def test_a_sample_without_a_tail_or_stamps_is_refused(samples):
    """The largest of a handful is no p99, and reversed stamps overlap nothing."""
    with pytest.raises(StatisticsError):
        tails.attribute(samples, happened())


def test_happenings_without_a_stamp_are_refused():
    """A happening that never ended would silently overlap nothing, and its stall be called unexplained."""
    samples, (start, _) = tokens()
    with pytest.raises(StatisticsError, match="1 of 1 happenings"):
        tails.attribute(samples, happened(("capture", start, None, "")))
    with pytest.raises(StatisticsError, match="no column detail"):
        tails.attribute(samples, happened().drop(columns="detail"))


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
    found = watch.happenings()
    collections = found[found["kind"] == "garbage collection"]
    assert len(collections) == 1
    one = collections.iloc[0]
    assert before <= one["start_ns"] <= one["end_ns"] <= after
    assert one["detail"].startswith("generation 1, ")
    assert one["exact"]


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
    found = watch.happenings()
    found = found[found["kind"] == "preemption"]
    assert found[["start_ns", "end_ns", "exact"]].values.tolist() == [[stamps[0], stamps[1], False]]
    assert found["detail"].tolist() == ["involuntary context switches: 2"]


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
def test_what_was_noted_goes_straight_into_an_attribution():
    """Columns that differ between the two would need glue at every use; an unknown kind would split a count."""
    samples, stall = tokens()
    with tails.Watch() as watch:
        watch.note("capture", *stall, "64 rows")
        with pytest.raises(ConfigError, match="capture"):
            watch.note("captures", *stall)
    assert tails.attribute(samples, watch.happenings()).iloc[0]["cause"] == "capture"
    assert len(tails.attribute(samples, tails.Watch().happenings())) == 10


def test_each_sample_names_what_happened_in_it():
    """A slow token without its cause is a mystery; with a cause that was over before it began, a wrong accusation."""
    samples = pd.DataFrame({"ms": [1.0, 1.0, 1.0, 1.0], "end_ns": [1_000_000, 2_000_000, 3_000_000, 4_000_000]})
    happenings = pd.DataFrame([
        ("preemption", 1_500_000, 1_900_000, "", False),
        ("garbage collection", 1_600_000, 2_250_000, "", True),   # ends in the third
        ("capture", 1_700_000, 1_800_000, "", True),              # inside the collection
        ("preemption", 3_000_000, 3_000_000, "", False),          # between the third and the fourth: of neither
    ], columns=tails.HAPPENINGS)
    found = tails.during(samples, happenings)
    assert found["happened"].tolist() == ["", "garbage collection, capture, preemption", "garbage collection", ""]
    assert found["happened_ms"].tolist() == [0.0, 0.4, 0.25, 0.0]
    assert tails.during(samples, happenings.iloc[:0])["happened"].tolist() == [""] * 4


def test_a_watch_forgets_what_is_over():
    """A run of hours would hold every preemption that ever was."""
    with tails.Watch() as watch:
        watch.note("capture", 10, 20)
        watch.note("capture", 30, 40)
        watch.forget(30)
        assert watch.happenings()[["start_ns", "end_ns"]].to_numpy().tolist() == [[30, 40]]
