"""The analysis of a trace that was drawn by hand, so that every number is known."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from hybridlab import events, gaps

US = 1000

# µs        0    10   20   30   40   50      70   90  100  110  120  130  140  150
# thread 1  |decode                                    |decode                   |
#             |replay              to 60|
#           linear, in it mm         (1-8, 2-7)
#             A    GGGGGGGGGGG                |sync|       E    C
# thread 2                        M
# stream 7    .aaa     bbbbb .ccc                             eeeeee
# stream 9                      dddddd                             copy
#            8-12     20-30 33-40, 36-50                   118-130, 128-132


def host(kind, start, end, name, **more):
    return {"kind": kind, "name": name, "start_ns": start * US, "end_ns": end * US, "thread": 1, **more}


def device(start, end, name, correlation, stream=7, kind="kernel"):
    return {"kind": kind, "name": name, "start_ns": start * US, "end_ns": end * US, "stream": stream,
            "correlation": correlation}


DRAWN = [
    host("range", 0, 100, "decode", category="decode", payload=17), host("range", 10, 60, "replay", category="replay"),
    host("range", 100, 150, "decode", category="decode", payload=18),
    host("op", 1, 8, "aten::linear"), host("op", 2, 7, "aten::mm"),
    host("launch", 2, 6, "cudaLaunchKernel", correlation=1), host("launch", 10, 30, "cudaGraphLaunch", correlation=2),
    host("sync", 70, 90, "cudaStreamSynchronize"), host("launch", 110, 115, "cudaLaunchKernel", correlation=3),
    host("launch", 120, 124, "cudaMemcpyAsync", correlation=4),
    host("launch", 40, 41, "cudaMemsetAsync", correlation=5) | {"thread": 2},
    device(8, 12, "a", 1), device(20, 30, "b", 2), device(33, 40, "c", 2), device(36, 50, "d", 2, stream=9),
    device(118, 130, "e", 3), device(128, 132, "copy", 4, stream=9, kind="copy"),
]


@pytest.fixture
def drawn():
    return events.tidy(DRAWN)


@pytest.fixture(params=["empty", "cpu"])
def idle(request):
    """A trace without device work."""
    return events.tidy([] if request.param == "empty" else [
        host("range", 0, 100, "decode", category="decode"), host("op", 10, 40, "aten::linear"),
        host("op", 15, 30, "aten::mm"), host("op", 50, 60, "aten::add")])


def test_time_that_streams_share_counts_once(drawn):
    """A device that is busy for longer than the trace lasts."""
    assert gaps.busy(drawn) == (4 + 10 + 17 + 14) * US
    assert gaps.overlap_ns(drawn) == (4 + 2) * US


def test_work_inside_other_work_makes_no_gap():
    """A short kernel at the end of the list that hides a long one still running."""
    table = events.tidy([device(0, 100, "long", 1), device(10, 20, "short", 2, stream=9), device(110, 120, "next", 3)])
    found = gaps.gaps(table)
    assert found[["us", "before", "after", "cause"]].to_numpy().tolist() == [[10.0, "long", "next", "unknown"]]
    assert gaps.busy(table) == 110 * US


def test_each_gap_has_its_length_neighbours_and_cause(drawn):
    """A gap of the device laid to the host, which would be mended in the wrong place."""
    assert gaps.gaps(drawn).to_numpy().tolist() == [
        [12 * US, 20 * US, 8.0, "a", "b", "device"],  # launched at 10, before a ended
        [30 * US, 33 * US, 3.0, "b", "c", "in graph"],
        [50 * US, 118 * US, 68.0, "d", "e", "launch"],  # launched at 110
    ]


def test_two_works_without_a_correlation_are_of_no_graph():
    """Missing numbers that compare as equal."""
    assert gaps.gaps(events.tidy([device(0, 1, "a", None), device(2, 3, "b", None)]))["cause"].tolist() == ["unknown"]


def test_each_token_has_its_numbers(drawn):
    """Nested operations or concurrent streams counted twice, another thread's launch, late work of the next token."""
    first, second = gaps.by_token(drawn).to_dict("records")
    assert first == {"token": 0, "category": "decode", "position": 17, "host_us": 100.0, "launches": 2,
                     "graph_launches": 1, "kernels": 4, "device_us": 42.0, "busy_us": 31.0, "idle_us": 11.0,
                     "overlap_us": 4.0, "launch_us": 24.0, "sync_us": 20.0, "python_us": 56.0, "ops_us": 7.0}
    assert second == {"token": 1, "category": "decode", "position": 18, "host_us": 50.0, "launches": 2,
                      "graph_launches": 0, "kernels": 1, "device_us": 14.0, "busy_us": 14.0, "idle_us": 0.0,
                      "overlap_us": 2.0, "launch_us": 9.0, "sync_us": 0.0, "python_us": 41.0, "ops_us": 0.0}


def test_each_kernel_has_its_time_and_share(drawn):
    """A share of something else than the worked time would hide the kernel that matters."""
    table = gaps.by_kernel(drawn)
    assert table[["name", "count", "us"]].to_numpy().tolist() == [
        ["d", 1, 14.0], ["e", 1, 12.0], ["b", 1, 10.0], ["c", 1, 7.0], ["a", 1, 4.0], ["copy", 1, 4.0]]
    assert table["share"].sum() == pytest.approx(51 / 45)
    twice = gaps.by_kernel(events.tidy([device(0, 3, "k", 1), device(5, 10, "k", 2)]))
    assert twice.to_numpy().tolist() == [["k", 2, 8.0, 1.0]]


def test_each_range_has_what_it_holds_innermost(drawn):
    """Kernels of a replay counted again for the token around it."""
    assert gaps.by_range(drawn).to_numpy().tolist() == [["decode", 2, 100.0, 2, 20.0], ["replay", 1, 50.0, 3, 31.0]]


def test_each_segment_of_a_graph_in_pieces_has_its_own_time():
    """Segments added up as one: which of them is slow cannot be seen, and work outside of them is counted in."""
    def segment(start, end, number):
        return host("range", start, end, "segment", category="segment", payload=number)

    pieces = [host("range", 0, 90, "replay", category="replay"),
              *(segment(start, start + 8, number) for start, number in ((0, 0), (10, 1), (20, 2), (40, 0), (50, 1))),
              *(host("launch", at, at + 2, "cudaGraphLaunch", correlation=at) for at in (1, 11, 21, 41, 51, 81)),
              *(device(at + 3, at + 3 + us, "k", at)
                for at, us in ((1, 1), (11, 2), (21, 3), (41, 4), (51, 5), (81, 6)))]
    assert gaps.by_segment(events.tidy(pieces)).to_numpy().tolist() == [
        [0, 2, 16.0, 2, 5.0], [1, 2, 16.0, 2, 7.0], [2, 1, 8.0, 1, 3.0]]
    assert gaps.by_segment(events.tidy(DRAWN)).empty
    assert gaps.by_segment(events.tidy([])).empty


def test_work_that_no_range_holds_is_named_so():
    """Kernels that vanish from a table whose rows are said to add up."""
    table = gaps.by_range(events.tidy([host("launch", 0, 2, "cudaLaunchKernel", correlation=1), device(3, 8, "k", 1)]))
    assert table.drop(columns="host_us").to_numpy().tolist() == [["outside", 0, 1, 5.0]]
    assert math.isnan(table["host_us"][0])


def test_delays_run_from_the_call_to_the_kernel(drawn):
    """Copies are no kernels; kernels of a graph all count from its one call."""
    table = gaps.launch_delay(drawn)
    assert table[["name", "call", "us"]].to_numpy().tolist() == [
        ["a", "cudaLaunchKernel", 6.0], ["b", "cudaGraphLaunch", 10.0], ["c", "cudaGraphLaunch", 23.0],
        ["d", "cudaGraphLaunch", 26.0], ["e", "cudaLaunchKernel", 8.0]]
    assert table["start_ns"].tolist() == [8 * US, 20 * US, 33 * US, 36 * US, 118 * US]


def test_launches_of_a_token_are_medians_of_decode_tokens(drawn):
    """A prefill among them would be the median of a short trace."""
    prefill = events.tidy([*DRAWN, host("range", 160, 170, "prefill", category="prefill"),
                           *(host("launch", at, at + 1, "cudaLaunchKernel", correlation=at) for at in range(161, 169))])
    for table in (drawn, prefill):
        assert gaps.launches_per_token(table) == {"launches": 2.0, "graph_launches": 0.5, "kernels": 2.5}
    assert all(math.isnan(value) for value in gaps.launches_per_token(events.tidy([])).values())


def test_a_trace_without_device_work_has_tables_without_rows(idle):
    """An error, or a division by no time at all, for whoever has no GPU."""
    assert gaps.busy(idle) == gaps.overlap_ns(idle) == 0
    for table in (gaps.gaps(idle), gaps.launch_delay(idle)):
        assert table.empty
    assert gaps.by_kernel(idle).to_numpy().tolist() in (
        [], [["aten::linear", 1, 15.0, 0.375], ["aten::mm", 1, 15.0, 0.375], ["aten::add", 1, 10.0, 0.25]])
    assert gaps.by_kernel(idle).empty == idle.empty
    assert list(gaps.by_kernel(idle)) == ["name", "count", "us", "share"]
    assert list(gaps.by_range(idle)) == ["range", "count", "host_us", "kernels", "device_us"]


def test_on_a_cpu_python_is_what_operations_leave():
    """The operations are the work where no kernel is: without them, all of a step would be Python."""
    table = events.tidy([host("range", 0, 100, "decode", category="decode"), host("op", 10, 40, "aten::linear"),
                         host("op", 15, 30, "aten::mm"), host("op", 50, 60, "aten::add")])
    (token,) = gaps.by_token(table).to_dict("records")
    assert (token["ops_us"], token["python_us"], token["kernels"], token["device_us"]) == (40.0, 60.0, 0, 0.0)
    assert gaps.by_range(table).to_numpy().tolist() == [["decode", 1, 100.0, 0, 0.0]]


def test_a_call_that_outlasts_its_range_counts_as_far_as_the_range():
    """Negative time in Python, where the clocks of two tools differ by a rounding."""
    table = events.tidy([host("range", 0, 10, "decode", category="decode"),
                         host("launch", 0, 11, "cudaGraphLaunch", correlation=1)])
    assert gaps.by_token(table)[["launch_us", "python_us"]].to_numpy().tolist() == [[10.0, 0.0]]


def test_types_do_not_depend_on_the_trace(drawn):
    """Columns of an empty trace that cannot be joined with those of a full one."""
    for analyse in (gaps.gaps, gaps.by_token, gaps.by_kernel, gaps.launch_delay):
        empty, full = analyse(events.tidy([])), analyse(drawn)
        assert list(empty) == list(full)
        numbers = [name for name in full if pd.api.types.is_numeric_dtype(full[name])]
        assert empty[numbers].dtypes.to_dict() == full[numbers].dtypes.to_dict()


def test_a_table_that_went_through_a_file_says_the_same(drawn):
    """Rows of a run come back with other types for missing numbers."""
    back = drawn.astype({name: "float64" for name, kind in events.TYPES.items() if kind == "Int64"})
    for analyse in (gaps.gaps, gaps.by_token, gaps.by_range, gaps.launch_delay):
        assert analyse(back).to_numpy().tolist() == analyse(drawn).to_numpy().tolist()
