"""Export to Perfetto: valid Trace Event Format, each stamp as it was, each arrow with both ends."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab import events, perfetto
from hybridlab.errors import TraceError

REQUIRED = {"X": {"name", "cat", "ts", "dur", "pid", "tid", "args"}, "M": {"name", "pid", "tid", "args"},
            "s": {"name", "cat", "id", "ts", "pid", "tid"}, "f": {"name", "cat", "id", "ts", "pid", "tid", "bp"}}
LATE = 3_600_000_000_001  # ns, an hour into a trace


def row(kind: str, name: str, start: int, end: int, **more: Any) -> dict[str, Any]:
    where = {"stream": 7} if kind in events.DEVICE else {"thread": 41}
    return {"kind": kind, "name": name, "start_ns": start, "end_ns": end, **where, **more}


def trace(begin: int = 1001, category: str = "decode") -> pd.DataFrame:
    """A graph launch that starts two kernels, of which the second one begins before the first one ends."""
    return events.tidy([
        row("op", "aten::empty", 0, 7),
        row("range", category, begin, begin + 900, category=category, payload=17),
        row("op", "aten::mm", begin + 1, begin + 400), row("op", "aten::t", begin + 2, begin + 3),
        row("launch", "cudaGraphLaunch", begin + 100, begin + 300, correlation=5),
        row("kernel", 'a "<b>" \\ \x07 é', begin + 500, begin + 800, correlation=5, graph=2, node=9),
        row("kernel", "second", begin + 700, begin + 950, correlation=5, graph=2, node=10),
        row("kernel", "stray", begin + 960, begin + 961, correlation=99),
        row("sync", "cudaStreamSynchronize", LATE, LATE + 3)])


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    found = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    assert isinstance(found, list)
    return found


def slices(found: list[dict[str, Any]], pid: int = 1) -> list[dict[str, Any]]:
    return [entry for entry in found if entry["ph"] == "X" and entry["pid"] == pid]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_each_stamp_comes_back(name: str, tmp_path: Path) -> None:
    """Microseconds as rounded floats would move events against each other."""
    table = trace()
    found = slices(read(perfetto.write(table, tmp_path / "new" / name)))
    assert [(e["cat"], e["name"], round(e["ts"] * 1000), round((e["ts"] + e["dur"]) * 1000)) for e in found] == list(
        table[["kind", "name", "start_ns", "end_ns"]].itertuples(index=False, name=None))
    assert [round(e["dur"] * 1000) for e in found] == (table["end_ns"] - table["start_ns"]).tolist()


def test_each_entry_has_what_its_phase_requires(tmp_path: Path) -> None:
    """A viewer silently drops an entry that lacks a field."""
    found = read(perfetto.write({"eager": trace(), "hybrid": trace()}, tmp_path / "t.json"))
    assert {entry["ph"] for entry in found} == set(REQUIRED)
    for entry in found:
        assert set(entry) == REQUIRED[entry["ph"]] | {"ph"}
        assert isinstance(entry["pid"], int)
        assert isinstance(entry["tid"], int)


def test_lanes_are_named_hosts_before_devices(tmp_path: Path) -> None:
    """Lanes by bare numbers leave the reader to guess which is the device."""
    found = read(perfetto.write({"eager": trace(), "hybrid": trace()}, tmp_path / "t.json"))
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert names == {(pid, tid): name for pid in (1, 2) for tid, name in enumerate(
        ("host thread 41", "device stream 7", "device stream 7 (2)"), 1)}
    assert [e["args"]["name"] for e in found if e["name"] == "process_name"] == ["eager", "hybrid"]
    assert {(e["pid"], e["tid"]) for e in found if e["ph"] == "X"} <= set(names)
    order = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in found if e["name"] == "thread_sort_index"}
    assert order == {key: key[1] for key in names}


def test_events_of_a_lane_are_apart_or_nested(tmp_path: Path) -> None:
    """Perfetto drops slices that overlap otherwise: kernels begun early would vanish."""
    overlapping = [row("kernel", str(n), 10 * n, 10 * n + 25) for n in range(6)]
    inside = [row("kernel", "long", 1000, 2000), row("kernel", "short", 1100, 1200)]  # two kernels at once, not a call
    calls = [row("op", "outer", 0, 50), row("op", "inner", 5, 50), row("op", "crossing", 40, 60)]
    found = slices(read(perfetto.write(events.tidy(overlapping + inside + calls), tmp_path / "t.json")))
    lanes: dict[int, list[dict[str, Any]]] = {}
    for entry in found:
        lanes.setdefault(entry["tid"], []).append(entry)
    by_name = {entry["name"]: entry["tid"] for entry in found}
    assert by_name["outer"] == by_name["inner"] != by_name["crossing"]
    assert by_name["long"] != by_name["short"]
    assert [by_name[str(n)] - by_name["0"] for n in range(6)] == [0, 1, 2, 0, 1, 2]
    for own in lanes.values():
        for one in own:
            for other in own:
                begin, end = other["ts"], other["ts"] + other["dur"]
                assert not one["ts"] < begin < one["ts"] + one["dur"] < end


def test_each_arrow_leads_from_a_launch_to_the_first_work_of_it(tmp_path: Path) -> None:
    """An arrow without an end, to the last kernel, or between two arms with one number."""
    found = read(perfetto.write({"eager": trace(), "hybrid": trace(3001)}, tmp_path / "t.json"))
    starts, ends = ({entry["id"]: entry for entry in found if entry["ph"] == phase} for phase in "sf")
    assert len(starts) == sum(entry["ph"] == "s" for entry in found) == 2
    assert starts.keys() == ends.keys()
    for number, start in starts.items():
        own = slices(found, start["pid"])
        launch = next(entry for entry in own if entry["cat"] == "launch")
        kernel = next(entry for entry in own if entry["cat"] == "kernel")
        assert [start[key] for key in ("pid", "tid", "ts")] == [launch[key] for key in ("pid", "tid", "ts")]
        assert [ends[number][key] for key in ("pid", "tid", "ts")] == [kernel[key] for key in ("pid", "tid", "ts")]
        assert ends[number]["bp"] == "e"


def test_arguments_hold_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    """A missing graph as NaN is no JSON, and as 0 a graph that is not there."""
    found = {entry["name"]: entry["args"] for entry in slices(read(perfetto.write(trace(), tmp_path / "t.json")))}
    assert found["decode"] == {"category": "decode", "payload": 17}
    assert found["second"] == {"correlation": 5, "graph": 2, "node": 10}
    assert found["aten::mm"] == {}


def test_arms_begin_their_tokens_together(tmp_path: Path) -> None:
    """Arms on clocks of their own cannot be compared by eye."""
    found = read(perfetto.write({"eager": trace(1001), "hybrid": trace(54_321)}, tmp_path / "t.json"))
    begins = {pid: next(e["ts"] for e in slices(found, pid) if e["name"] == "decode") for pid in (1, 2)}
    assert begins == {1: 54.321, 2: 54.321}
    assert min(entry["ts"] for entry in found if "ts" in entry) == 0
    mixed = read(perfetto.write({"a": trace(500, "prefill"), "b": trace(700)}, tmp_path / "m.json"))
    assert [e["ts"] for e in mixed if e["ph"] == "X" and e["name"] in ("prefill", "decode")] == [0.7, 0.7]


def test_the_same_trace_is_the_same_file_and_no_rest_stays(tmp_path: Path) -> None:
    """A stamp in the compressed file would change its hash in a manifest at each writing."""
    one, two = (perfetto.write(trace(), tmp_path / name) for name in ("a.json.gz", "b.json.gz"))
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes()[4:8] == bytes(4)  # the time in the header of gzip
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_what_cannot_be_aligned_is_refused(tmp_path: Path) -> None:
    """Arms laid over each other by chance would look aligned."""
    without = events.tidy([row("op", "aten::mm", 0, 5)])
    with pytest.raises(TraceError, match="'b' has no token"):
        perfetto.write({"a": trace(), "b": without}, tmp_path / "t.json")
    with pytest.raises(TraceError, match="no trace"):
        perfetto.write({}, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
    assert len(slices(read(perfetto.write(without, tmp_path / "t.json")))) == 1
    assert slices(read(perfetto.write(events.tidy([]), tmp_path / "e.json"))) == []
