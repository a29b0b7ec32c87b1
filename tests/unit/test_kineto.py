"""The reader of PyTorch's traces, on excerpts written by hand after real ones, and on files that are none."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pandas as pd
import pytest

from hybridlab import events, gaps, kineto, perfetto
from hybridlab.errors import TraceError

BEGIN = 4676943531702.835  # µs, as Kineto writes them


def host(cat, name, ts, dur, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 486, "tid": 486, "ts": ts, "dur": dur, "args": args}


def device(cat, name, ts, dur, correlation, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur,
            "args": {"device": 0, "context": 1, "stream": 7, "correlation": correlation, **args}}


TRACE = [
    {"ph": "M", "name": "process_name", "ts": 4676943530143.8, "pid": 486, "tid": 0, "args": {"name": "python"}},
    host("user_annotation", "hybridlab.decode #17", BEGIN, 93.7, **{"External id": 1, "Record function id": 0}),
    host("user_annotation", "hybridlab.replay", 4676943531710.0, 30.125),
    host("user_annotation", "ProfilerStep#1", 4676943531600.0, 500),
    host("cpu_op", "aten::copy_", 4676943531703.0, 6, **{"External id": 3}),
    host("cuda_runtime", "cudaStreamIsCapturing", 4676943531703.5, 0.5, cbid=317, correlation=5),
    host("cuda_runtime", "cudaMemcpyAsync", 4676943531704.0, 2.5, cbid=41, correlation=6),
    host("cuda_runtime", "cudaGraphLaunch", 4676943531711.0, 20, cbid=311, correlation=7),
    host("cuda_driver", "cuLaunchKernelEx", 4676943531745.0, 4, cbid=652, correlation=8),
    host("cuda_runtime", "INVALID", 4676943531750.0, 1, cbid=0, correlation=9),
    host("cuda_runtime", "cudaEventSynchronize", 4676943531800.0, 10, correlation=10),
    {"ph": "s", "id": 7, "pid": 486, "tid": 486, "ts": 4676943531711.0, "cat": "ac2g", "name": "ac2g"},
    {"ph": "X", "cat": "overhead", "name": "Activity Buffer Request", "pid": -1, "tid": 0, "ts": 1.5, "dur": 3},
    device("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 4676943531708.001, 0.768, 6, bytes=128),
    device("kernel", "void at::native::vectorized_elementwise_kernel<2, at::native::FillFunctor<long>, "
                     "std::array<char*, 1ul> >(int, at::native::FillFunctor<long>, std::array<char*, 1ul>)",
           4676943531720.528, 0.768, 7, **{"graph id": 3, "graph node id": 12884901888, "blocks per SM": 0.007}),
    device("kernel", "_project", 4676943531722.0, 5, 7, grid=[1, 1, 1]),
    device("kernel", "_norm", 4676943531760.0, 5, 8),
    device("gpu_memset", "Memset (Device)", 4676943531770.0, 0.8, 99),
    {"ph": "X", "cat": "gpu_user_annotation", "name": "hybridlab.replay", "pid": 0, "tid": 7, "ts": 1.5, "dur": 3},
    {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler", "ts": 1.25,
     "dur": 2, "args": {"Op count": 0}},
    {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": 4676943532000.5},
]


def written(tmp_path, found, name="trace.json", **more):
    path = tmp_path / name
    content = json.dumps({"schemaVersion": 1, "traceEvents": found, **more}).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_each_kind_of_event_is_read(tmp_path, name):
    """Events of the profiler itself counted as work, or a launch of the driver lost."""
    table = kineto.read(written(tmp_path, TRACE, name))
    assert list(zip(table["kind"], table["name"], strict=True)) == [
        ("range", "decode"), ("op", "aten::copy_"), ("launch", "cudaMemcpyAsync"),
        ("copy", "Memcpy HtoD (Pinned -> Device)"), ("range", "replay"), ("launch", "cudaGraphLaunch"),
        ("kernel", "vectorized_elementwise_kernel"), ("kernel", "_project"), ("launch", "cuLaunchKernelEx"),
        ("kernel", "_norm"), ("copy", "Memset (Device)"), ("sync", "cudaEventSynchronize")]
    first = table.iloc[0]
    assert (first["category"], first["payload"], first["thread"], first["start_ns"], first["end_ns"]) == (
        "decode", 17, 486, 0, 93_700)
    kernel = table[table["kind"] == "kernel"].iloc[0]
    assert (kernel["stream"], kernel["correlation"], kernel["graph"], kernel["node"]) == (7, 7, 3, 12884901888)
    assert pd.isna(kernel["thread"])
    assert pd.isna(table.loc[table["name"] == "_project", "graph"].item())
    assert pd.isna(table.loc[table["name"] == "replay", "payload"].item())


def test_no_nanosecond_is_lost(tmp_path):
    """Stamps read as floats are off by one already at twice the µs of today's clocks, and lengths beside them."""
    found = [host("cpu_op", "a", 0, 0), host("cpu_op", "b", 0, 0)]
    text = json.dumps({"traceEvents": found}).replace(
        '"ts": 0, "dur": 0', '"ts": 1790857026000000.001, "dur": 0.002', 1)
    path = tmp_path / "trace.json"
    path.write_text(text.replace('"ts": 0, "dur": 0', '"ts": 1790857026000000.004, "dur": 1.0005'))
    assert kineto.read(path)[["start_ns", "end_ns"]].to_numpy().tolist() == [[0, 2], [3, 1003]]


def test_a_graph_without_numbers_is_known_by_its_launch(tmp_path):
    """torch 2.11 names no graph in a kernel: what one call started is one graph all the same."""
    (token,) = gaps.by_token(kineto.read(written(tmp_path, TRACE))).to_dict("records")
    assert (token["launches"], token["graph_launches"], token["kernels"], token["position"]) == (3, 1, 3, 17)
    causes = gaps.gaps(kineto.read(written(tmp_path, TRACE)))["cause"].tolist()
    assert causes == ["launch", "in graph", "launch", "unknown"]


@pytest.mark.parametrize(("name", "category", "payload"), [
    ("hybridlab.decode", "decode", None), ("hybridlab.capture decode 64 #64", "capture", 64), ("hybridlab.x", "", None),
    ("hybridlab.prefill #", "prefill", None), ("hybridlab. #5", "", 5), ("hybridlab.", "", None)])
def test_a_range_says_its_payload_in_its_name(tmp_path, name, category, payload):
    """Kineto drops the argument of a range; without it no token has a position."""
    (found,) = kineto.read(written(tmp_path, [host("user_annotation", name, 1.5, 2)])).to_dict("records")
    assert found["category"] == category
    assert (None if pd.isna(found["payload"]) else found["payload"]) == payload
    assert "#5" not in found["name"]


@pytest.mark.parametrize(("name", "bare"), [
    ("_project", "_project"), ("nvjet_sm90_128x8_4x1_v_bz_splitK_TNT", "nvjet_sm90_128x8_4x1_v_bz_splitK_TNT"),
    ("void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::Half, long, 2>(at::T<c10::Half>, int)",
     "indexSelectSmallIndex"),
    ("void cutlass::Kernel2<cutlass_80_wmma<int>::type>(cutlass::Params)", "Kernel2"),
    ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, 7>(cublasGemvParamsEx<int>)", "kernel"),
    ("", ""), ("<>", "<>"), ("a<b", "a"), ("(", "(")])
def test_a_kernel_has_a_short_name(name, bare):
    """Tables whose first column is a paragraph of template arguments."""
    assert kineto.short(name) == bare


def test_a_trace_without_work_is_empty(tmp_path):
    """An empty trace is a finding, and no reason to fail in the middle of a table."""
    table = kineto.read(written(tmp_path, TRACE[:1]))
    assert (len(table), list(table)) == (0, list(events.COLUMNS))


def damaged(change):
    return json.dumps({"traceEvents": [change(dict(host("cuda_runtime", "cudaLaunchKernel", 1.5, 2, correlation=1)))]})


@pytest.mark.parametrize(("content", "said"), [
    ("", "trace.json"), ("{", "trace.json"), ("[]", "object"), ("{}", "traceEvents"), ('{"traceEvents": {}}', "array"),
    ('{"traceEvents": [3]}', r"traceEvents\[0\]"), ("[" * 100_000, "trace.json"), (b"\xff\xfe{}", "trace.json"),
    ('{"traceEvents": [{"ph": "X", "x": ' + "[" * 100_000, "trace.json"),
    (damaged(lambda e: e | {"ts": None}), "ts of an event is missing.*cudaLaunchKernel"),
    (damaged(lambda e: {k: v for k, v in e.items() if k != "dur"}), "dur of an event is missing"),
    (damaged(lambda e: e | {"ts": "NaN"}), "ts of an event is NaN"), (damaged(lambda e: e | {"ts": [1]}), "ts"),
    (damaged(lambda e: e | {"dur": 7}).replace('"dur": 7', '"dur": 1e999999'), "dur of an event is 1E"),
    (damaged(lambda e: e | {"dur": -1}), "end before they start"), (damaged(lambda e: e | {"tid": "main"}), "thread"),
    (damaged(lambda e: e | {"tid": None}), "thread"), (damaged(lambda e: e | {"tid": 2**64 - 1}), "thread"),
    (damaged(lambda e: e | {"args": 3}), "args of an event.*cudaLaunchKernel"),
    (damaged(lambda e: e | {"args": {"correlation": "one"}}), "args.*correlation"),
    (damaged(lambda e: e | {"args": None}), "args of an event"),
    (damaged(lambda e: e | {"name": 5}), "name"), (damaged(lambda e: e | {"cat": 5}), "cat"),
])
def test_what_is_no_trace_is_refused_with_what_is_wrong(tmp_path, content, said):
    """A KeyError, a stack overflow or minutes of arithmetic from a file that somebody sent."""
    path = tmp_path / "trace.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TraceError, match=said):
        kineto.read(path)


def test_an_export_of_our_own_is_told_from_what_a_profiler_wrote(tmp_path):
    """It was read as a trace without a token, and the reader told to trace more of them."""
    table = events.tidy([{"kind": "range", "name": "decode", "start_ns": 0, "end_ns": 9, "thread": 1,
                          "category": "decode", "payload": 7}, {"kind": "op", "name": "mm", "start_ns": 1, "end_ns": 2,
                                                                "thread": 1}])
    with pytest.raises(TraceError, match=r"trace.json.gz is an export of hybridlab .* open its run"):
        kineto.read(perfetto.write(table, tmp_path / "trace.json.gz"))


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch):
    """A gzip bomb that fills the memory."""
    monkeypatch.setattr(kineto, "LIMIT_BYTES", 10_000)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * 2**24))
    tracemalloc.start()
    with pytest.raises(TraceError, match="more than 10,000 bytes"):
        kineto.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    path.write_bytes(gzip.compress(b'{"traceEvents":[]}'.ljust(10_000)))
    assert kineto.read(path).empty


@pytest.mark.parametrize("cut", [3, 60, -4])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    """Half a trace read as a whole one would show half the launches."""
    path = written(tmp_path, TRACE, "trace.json.gz")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TraceError, match=r"trace\.json\.gz cannot be read"):
        kineto.read(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    """The reader's own traceback does not say which path was wrong."""
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(TraceError, match="cannot be read"):
            kineto.read(path)


def test_two_devices_are_refused(tmp_path):
    """Gaps of one device would hide behind the work of the other."""
    with pytest.raises(TraceError, match="2 devices"):
        kineto.read(written(tmp_path, [*TRACE, device("kernel", "k", 4676943531790.0, 1, 9, device=1)]))
