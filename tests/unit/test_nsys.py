"""The reader of Nsight Systems' SQLite exports, on files made after NVIDIA's schema and on files that are none."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from hybridlab import events, gaps, nsys
from hybridlab.errors import TraceError

PROCESS, OTHER = 4242, 77
THREAD = (PROCESS << 24) + 4250
STRINGS = {1: "cudaLaunchKernel_v7000", 2: "cudaGraphLaunch_v10000", 3: "cudaStreamSynchronize_v3020",
           4: "cudaMemcpyAsync_v3020", 5: "cudaEventQuery_v3020", 10: "_norm", 11: "void at::f<int>(int)", 12: "f",
           20: "hybridlab", 21: "decode", 22: "CCCL"}
COLUMNS = {
    "StringIds": "id value",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start end deviceId contextId streamId correlationId globalPid demangledName "
                                  "shortName gridX graphNodeId graphId",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start end deviceId streamId correlationId globalPid bytes copyKind graphNodeId",
    "CUPTI_ACTIVITY_KIND_MEMSET": "start end deviceId streamId correlationId globalPid value bytes",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "start end deviceId streamId correlationId globalPid graphId graphExecId",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end eventClass globalTid correlationId nameId returnValue",
    "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": "start end deviceId streamId correlationId globalPid syncType",
    "NVTX_EVENTS": "start end eventType rangeId category text globalTid textId domainId uint64Value int64Value "
                   "doubleValue uint32Value int32Value floatValue",
}
KERNEL, MEMCPY, MEMSET, GRAPH, RUNTIME, SYNC, NVTX = (
    f"CUPTI_ACTIVITY_KIND_{name}" if name != "NVTX_EVENTS" else name
    for name in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE", "RUNTIME", "SYNCHRONIZATION", "NVTX_EVENTS"))


def work(start, end, correlation, **more):
    return {"start": start, "end": end, "deviceId": 0, "streamId": 7, "correlationId": correlation,
            "globalPid": PROCESS << 24, **more}


def call(start, end, name, correlation, thread=THREAD):
    return {"start": start, "end": end, "eventClass": 0, "globalTid": thread, "correlationId": correlation,
            "nameId": name, "returnValue": 0}


def nvtx(start, end, kind=nsys.PUSH_POP, domain=1, thread=THREAD, **more):
    return {"start": start, "end": end, "eventType": kind, "globalTid": thread, "domainId": domain, **more}


def tables():
    """One decode token: a kernel, a graph of two kernels and a copy, a memset and a wait."""
    return {
        KERNEL: [work(1200, 1300, 101, shortName=10, demangledName=10),
                 work(1500, 1700, 102, shortName=12, demangledName=11, graphId=3, graphNodeId=12884901889),
                 work(1800, 1900, 102, shortName=10, demangledName=10, graphId=3, graphNodeId=12884901890)],
        MEMCPY: [work(1910, 1920, 102, copyKind=8, graphNodeId=12884901891), work(0, 0, 102, copyKind=8)],
        MEMSET: [work(1950, 1960, 103)],
        RUNTIME: [call(1100, 1150, 1, 101), call(1200, 1400, 2, 102), call(1410, 1420, 4, 103),
                  call(1430, 1440, 5, 104), call(1450, 1990, 3, 105)],
        SYNC: [work(1450, 1990, 105, syncType=3)],
        NVTX: [nvtx(900, None, nsys.DOMAIN_CREATE, text="hybridlab"),
               nvtx(900, None, nsys.DOMAIN_CREATE, domain=2, textId=22),
               nvtx(1000, 2000, textId=21, int64Value=17, category=5), nvtx(1190, 1405, text="replay"),
               nvtx(1000, 1900, domain=2, text="decode"), nvtx(1000, 1950, domain=0, text="decode"),
               nvtx(1960, None, text="decode"), nvtx(1970, None, 34, text="a mark")],
    }


def export(tmp_path, content, drop=(), columns=COLUMNS):
    """A file with these tables; `drop` names columns, as table.column or alone, that this version does not have."""
    path = tmp_path / "report.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        strings = {"StringIds": [{"id": key, "value": value} for key, value in STRINGS.items()]}
        for table, rows in (strings | content).items():
            names = [name for name in columns[table].split() if not {name, f"{table}.{name}"} & set(drop)]
            connection.execute(f'CREATE TABLE {table} ({", ".join(f"{chr(34)}{name}{chr(34)}" for name in names)})')
            connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})",
                                   [[row.get(name) for name in names] for row in rows])
        connection.commit()
    return path


def test_a_report_by_node_is_read(tmp_path):
    """Ranges of libraries taken for tokens, waits counted twice, a row that was not timed put at the beginning."""
    table = nsys.read(export(tmp_path, tables()))
    assert list(zip(table["kind"], table["name"], table["start_ns"], table["end_ns"], strict=True)) == [
        ("range", "decode", 0, 1000), ("launch", "cudaLaunchKernel", 100, 150), ("range", "replay", 190, 405),
        ("launch", "cudaGraphLaunch", 200, 400), ("kernel", "_norm", 200, 300), ("launch", "cudaMemcpyAsync", 410, 420),
        ("sync", "cudaStreamSynchronize", 450, 990), ("kernel", "f", 500, 700), ("kernel", "_norm", 800, 900),
        ("copy", "Memcpy DtoD", 910, 920), ("copy", "Memset", 950, 960)]
    first = table.iloc[0]
    assert (first["category"], first["payload"], first["thread"]) == ("decode", 17, 4250)
    nodes = table[table["kind"].isin(events.DEVICE)]
    assert nodes["graph"].fillna(-1).tolist() == [-1, 3, 3, -1, -1]
    assert nodes["node"].dropna().tolist() == [12884901889, 12884901890, 12884901891]


def test_a_token_of_a_report_has_its_numbers(tmp_path):
    """The join of launches and kernels, from the file to the table of tokens."""
    (token,) = gaps.by_token(nsys.read(export(tmp_path, tables()))).to_dict("records")
    assert {name: token[name] for name in ("position", "launches", "graph_launches", "kernels", "busy_us", "idle_us",
                                           "sync_us")} == {
        "position": 17, "launches": 3, "graph_launches": 1, "kernels": 3, "busy_us": 0.42, "idle_us": 0.34,
        "sync_us": 0.54}


def test_a_report_by_graph_has_one_row_a_replay(tmp_path):
    """The default of nsys, where a device would look idle during every replay."""
    content = tables() | {GRAPH: [work(1500, 1920, 102, graphId=3, deviceId=0)]}
    content[KERNEL], content[MEMCPY] = content[KERNEL][:1], []
    table = nsys.read(export(tmp_path, content))
    replay = table[table["name"] == nsys.GRAPH].iloc[0]
    assert (replay["kind"], replay["correlation"], replay["graph"], replay["end_ns"] - replay["start_ns"]) == (
        "kernel", 102, 3, 420)
    assert gaps.by_token(table)["kernels"].tolist() == [2]


@pytest.mark.parametrize("absent", [MEMCPY, MEMSET, SYNC, KERNEL, RUNTIME, NVTX, "all but one"])
def test_tables_may_be_absent(tmp_path, absent):
    """nsys makes a table only where there was something to write."""
    content = tables()
    content = {KERNEL: content[KERNEL]} if absent == "all but one" else {
        name: rows for name, rows in content.items() if name != absent}
    found = nsys.read(export(tmp_path, content))
    assert len(found) == {MEMCPY: 10, MEMSET: 10, SYNC: 11, KERNEL: 8, RUNTIME: 7, NVTX: 9, "all but one": 3}[absent]


@pytest.mark.parametrize("drop", [
    ("graphId", "graphNodeId"), ("globalPid",), ("streamId", "deviceId"), ("shortName",), ("copyKind",),
    ("doubleValue", "floatValue", "int64Value", "int32Value", "uint32Value", "category", "rangeId")])
def test_columns_may_be_absent(tmp_path, drop):
    """Columns that a version of nsys does not write yet."""
    assert len(nsys.read(export(tmp_path, tables(), drop))) == 11


def test_a_kernel_without_a_short_name_has_its_long_one(tmp_path):
    """A kernel without a name cannot be found again."""
    table = nsys.read(export(tmp_path, tables(), ["shortName"]))
    assert "void at::f<int>(int)" in set(table["name"])


@pytest.mark.parametrize("member", nsys.PAYLOADS)
@pytest.mark.parametrize("others", [None, 0])
def test_a_payload_is_found_in_whatever_member_it_is(tmp_path, member, others):
    """Versions without missing values write 0 in every member that was not set."""
    given = dict.fromkeys(nsys.PAYLOADS, others) | {member: 17}
    content = {NVTX: [nvtx(0, None, nsys.DOMAIN_CREATE, text="hybridlab"), nvtx(1, 2, text="prefill", **given)]}
    assert nsys.read(export(tmp_path, content))["payload"].tolist() == [17]


def test_a_domain_is_known_by_process_and_number(tmp_path):
    """Each process numbers its domains from 1, so another's 1 is something else."""
    content = tables()
    content[NVTX] += [nvtx(900, None, nsys.DOMAIN_CREATE, thread=OTHER << 24, textId=22),
                      nvtx(1000, 2000, thread=OTHER << 24, text="decode")]
    content[RUNTIME].append(call(1100, 1150, 1, 101, thread=(OTHER << 24) + 1))
    content[KERNEL].append(work(5000, 6000, 101, shortName=10, globalPid=OTHER << 24, deviceId=1))
    assert len(nsys.read(export(tmp_path, content))) == 11


def test_ranges_of_domains_without_a_name_are_refused(tmp_path):
    """Every token was dropped in silence, and the reader told to trace more of them."""
    content = tables()
    content[NVTX] = [row for row in content[NVTX] if row["eventType"] != nsys.DOMAIN_CREATE]
    with pytest.raises(TraceError, match="which of its NVTX domains is 'hybridlab' · 6 rows of NVTX_EVENTS"):
        nsys.read(export(tmp_path, content))
    content[NVTX] = [nvtx(1000, 1950, domain=0, text="somebody's own")]
    (tmp_path / "other").mkdir()
    assert "range" not in set(nsys.read(export(tmp_path / "other", content))["kind"])


def test_two_processes_with_ranges_are_refused(tmp_path):
    """Correlations that two processes share would join one's launch with the other's kernel."""
    content = tables()
    content[NVTX] += [nvtx(900, None, nsys.DOMAIN_CREATE, thread=OTHER << 24, text="hybridlab"),
                      nvtx(1000, 2000, thread=OTHER << 24, text="decode")]
    with pytest.raises(TraceError, match="2 processes"):
        nsys.read(export(tmp_path, content))


def test_two_devices_are_refused_but_not_a_start_on_the_host(tmp_path):
    """Gaps of one device would hide behind the work of the other; a host call has no device."""
    content = tables() | {GRAPH: [work(1500, 1920, 102, deviceId=nsys.HOST_DEVICE)]}
    assert len(nsys.read(export(tmp_path, content))) == 12
    (tmp_path / "report.sqlite").unlink()
    content[KERNEL][0]["deviceId"] = 1
    with pytest.raises(TraceError, match="2 devices"):
        nsys.read(export(tmp_path, content))


@pytest.mark.parametrize(("table", "column", "value", "said"), [
    (KERNEL, "start", "soon", "start_ns.*'soon'"), (KERNEL, "end", 1, "end before they start"),
    (KERNEL, "start", None, "start_ns.*None"), (RUNTIME, "globalTid", "x", "identifier of a thread"),
    (NVTX, "globalTid", 1.5, "identifier of a thread"), (KERNEL, "correlationId", "x", "correlation"),
])
def test_values_of_a_wrong_type_are_refused_by_name(tmp_path, table, column, value, said):
    """SQLite keeps any type in any column."""
    content = tables()
    content[table][0][column] = value
    with pytest.raises(TraceError, match=said):
        nsys.read(export(tmp_path, content))


def test_a_string_that_is_absent_or_no_utf8_does_no_harm(tmp_path):
    """One damaged name must not cost the whole report."""
    content = tables()
    content[KERNEL][0] |= {"shortName": 999, "demangledName": None}
    content[RUNTIME][0]["nameId"] = 999
    path = export(tmp_path, content)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE StringIds SET value = CAST(x'ff' AS TEXT) WHERE id = 12")
        connection.commit()
    names = nsys.read(path)["name"].tolist()
    assert "unnamed" in names
    assert "\ufffd" in names
    assert "cudaLaunchKernel" not in names


def test_a_column_that_everything_rests_on_is_asked_for(tmp_path):
    """Without its stamps a table of kernels is a list of names."""
    with pytest.raises(TraceError, match=r"CUPTI_ACTIVITY_KIND_KERNEL of report\.sqlite has no column end"):
        nsys.read(export(tmp_path, tables(), [f"{KERNEL}.end"]))


def test_a_table_of_endless_rows_is_refused(tmp_path, monkeypatch):
    """A file that fills the memory, be it by a view that never ends, which is not read at all."""
    path = export(tmp_path, {NVTX: []})
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE VIEW {KERNEL} AS WITH RECURSIVE r(start) AS (SELECT 1 UNION ALL SELECT start + 1 "
                           'FROM r) SELECT start, start AS "end" FROM r')
        connection.commit()
    assert nsys.read(path).empty
    path.unlink()
    monkeypatch.setattr(nsys, "MOST_ROWS", len(STRINGS))
    assert nsys.read(export(tmp_path, {NVTX: []})).empty
    monkeypatch.setattr(nsys, "MOST_ROWS", len(STRINGS) - 1)
    with pytest.raises(TraceError, match=r"StringIds .* is too large"):
        nsys.read(path)


def test_a_file_that_is_no_export_is_refused_and_none_is_made(tmp_path):
    """A reader that makes an empty database where a path was mistyped."""
    with pytest.raises(TraceError, match="is not there"):
        nsys.read(tmp_path / "none.sqlite")
    assert not (tmp_path / "none.sqlite").exists()
    text = tmp_path / "text.sqlite"
    text.write_text("no database, but long enough to have a header of one hundred bytes " * 3)
    with pytest.raises(TraceError, match="no readable SQLite"):
        nsys.read(text)
    with pytest.raises(TraceError, match="no table of Nsight Systems"):
        nsys.read(export(tmp_path, {}))


def test_a_damaged_export_is_refused(tmp_path):
    """A file cut short by a full disk must be named as such."""
    path = export(tmp_path, tables())
    content = bytearray(path.read_bytes())
    content[4096:] = b"\x55" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(TraceError):
        nsys.read(path)
