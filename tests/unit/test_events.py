"""The table of events: its checks, and which event belongs to which token."""

from __future__ import annotations

import pandas as pd
import pytest

from hybridlab import events
from hybridlab.errors import TraceError


def row(kind, start, end, name="x", **more):
    return {"kind": kind, "name": name, "start_ns": start, "end_ns": end, **more}


def token(start, end, category="decode", thread=1, payload=None):
    return row("range", start, end, category, category=category, thread=thread, payload=payload)


def test_stamps_count_from_the_first_event_and_lose_no_nanosecond():
    """Stamps of 2026 are beyond 2**53, where a float no longer holds a nanosecond."""
    first = 1_790_857_026_000_000_001
    table = events.tidy([row("kernel", first + 7, first + 9), row("kernel", first, first + 3)])
    assert table["start_ns"].tolist() == [0, 7]
    assert table["end_ns"].tolist() == [3, 9]
    assert list(table) == list(events.COLUMNS)


def test_the_outer_of_two_that_start_at_once_comes_first():
    """A nested range before the one around it would be taken for the outer one."""
    table = events.tidy([row("op", 5, 6, "inner"), row("op", 5, 9, "outer")])
    assert table["name"].tolist() == ["outer", "inner"]


@pytest.mark.parametrize("rows", [[], [row("op", 1, 2)], [row("kernel", 0, 1, stream=2**40, correlation=None)]])
def test_every_table_has_the_same_types(rows):
    """A column that is float, or absent, in a trace without any such value breaks whoever joins on it."""
    table = events.tidy(rows)
    assert {name: str(kind) for name, kind in table.dtypes.items() if events.TYPES[name] != "str"} == {
        name: kind for name, kind in events.TYPES.items() if kind != "str"}
    assert table.dtypes["kind"] == pd.Series(["a"], dtype="str").dtype
    assert len(table) == len(rows)


@pytest.mark.parametrize(("wrong", "said"), [
    (row("kernel", 5, 4, "late"), "end before they start.*'late'"), (row("kernell", 1, 2), "kind 'kernell'"),
    (row("op", None, 2), "start_ns.*None"), (row("op", 1.5, 2), "start_ns.*1.5"), (row("op", True, 2), "start_ns"),
    (row("op", 1, "2"), "end_ns.*'2'"), (row("op", 1, 2, name=7), "name"), (row("op", 1, 2**70), "end_ns"),
    (row("op", 1, 2, thread="main"), "thread.*'main'"), (row("op", 1, 2, correlation=2**63), "correlation"),
])
def test_what_no_profiler_writes_is_refused_by_name(wrong, said):
    """A KeyError or a negative length far from the file that holds it."""
    with pytest.raises(TraceError, match=said):
        events.tidy([row("op", 0, 1), wrong])


def test_tokens_are_ranges_of_prefill_and_decode_in_order():
    """Replays counted as tokens, or positions laid to the wrong one."""
    table = events.tidy([token(50, 90, payload=4), token(0, 40, "prefill", payload=3),
                         row("range", 5, 30, "replay", category="replay", thread=1), token(95, 99)])
    spans = events.tokens(table)
    assert spans["token"].tolist() == [0, 1, 2]
    assert spans["category"].tolist() == ["prefill", "decode", "decode"]
    assert spans["position"].tolist()[:2] == [3, 4]
    assert pd.isna(spans["position"][2])
    assert spans[["start_ns", "end_ns"]].to_numpy().tolist() == [[0, 40], [50, 90], [95, 99]]


def test_a_token_holds_what_its_thread_began_and_what_that_launched():
    """Work of a token that ran late laid to the next one, or another thread's work laid to either."""
    table = events.tidy([
        token(0, 10), token(10, 20), row("launch", 2, 3, "first", thread=1, correlation=1),
        row("launch", 9, 11, "across", thread=1, correlation=2),
        row("launch", 10, 11, "second", thread=1, correlation=3),
        row("launch", 4, 5, "elsewhere", thread=2, correlation=4), row("op", 1, 4, "op", thread=1),
        row("kernel", 25, 30, "of first", correlation=1), row("copy", 30, 31, "of across", correlation=2),
        row("kernel", 3, 4, "of elsewhere", correlation=4), row("kernel", 5, 6, "of nothing"),
        row("kernel", 31, 32, "of second", correlation=3), row("launch", 3, 3, "without number", thread=1)])
    assert set(events.of_token(table, 0)["name"]) == {"decode", "first", "across", "op", "of first", "of across",
                                                      "without number"}
    assert set(events.of_token(table, 1)["name"]) == {"decode", "second", "of second"}


@pytest.mark.parametrize("number", [-1, 1])
def test_a_token_that_is_not_there_is_refused(number):
    """An empty table that looks like a token without work."""
    with pytest.raises(TraceError, match="1 tokens"):
        events.of_token(events.tidy([token(0, 10)]), number)


@pytest.mark.parametrize(("name", "kind", "bare"), [
    ("cudaLaunchKernel_v7000", "launch", "cudaLaunchKernel"), ("cudaLaunchKernelExC_v11060", "launch",
                                                               "cudaLaunchKernelExC"),
    ("cuLaunchKernelEx", "launch", "cuLaunchKernelEx"), ("cudaGraphLaunch_v10000", "launch", "cudaGraphLaunch"),
    ("cuLaunchCooperativeKernel", "launch", "cuLaunchCooperativeKernel"),
    ("cudaMemcpyAsync_ptsz_v7000", "launch", "cudaMemcpyAsync"), ("cuMemsetD32Async", "launch", "cuMemsetD32Async"),
    ("cudaEventSynchronize", "sync", "cudaEventSynchronize"),
    ("cuStreamSynchronize_ptsz", "sync", "cuStreamSynchronize"),
    ("cudaStreamWaitEvent", "", "cudaStreamWaitEvent"), ("cudaEventQuery", "", "cudaEventQuery"),
    ("cudaLaunchHostFunc", "", "cudaLaunchHostFunc"), ("cudaGraphInstantiate", "", "cudaGraphInstantiate"),
    ("INVALID", "", "INVALID"), ("", "", ""),
])
def test_calls_are_told_apart_by_what_they_do(name, kind, bare):
    """A query counted as a wait, or a launch of the driver as none."""
    assert events.call(name) == (kind, bare)


def test_a_category_is_a_first_word_that_is_known():
    """A range of another tool, or a misspelt one, must not become a token."""
    assert [events.category(name) for name in ("decode", "capture decode 64", "decoder", "", "step 3")] == [
        "decode", "capture", "", "", ""]


def test_work_of_two_devices_is_refused():
    """Gaps of one device that the work of another hides."""
    events.one_device([0, None, 0])
    with pytest.raises(TraceError, match="2 devices"):
        events.one_device([0, 1])
