"""Reads what PyTorch's profiler writes (`export_chrome_trace`, .json or .json.gz) as a table of events.

Kineto's stamps are µs with three decimals, read as decimals so that no nanosecond is lost. It drops the payload of a
`record_function`, so a range says it in its name, as in "hybridlab.decode #17". Never imports torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from decimal import Decimal
from gzip import GzipFile
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from hybridlab import events
from hybridlab.errors import TraceError
from hybridlab.files import opened
from hybridlab.ranges import PREFIX

LIMIT_BYTES = 2**29  # of a trace when decompressed
DEVICE = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "copy"}
CALLS = ("cuda_runtime", "cuda_driver")
OURS = {"range", "launch"}  # categories of what `perfetto` writes, and of nothing that Kineto does
HOST = (*CALLS, "user_annotation", "cpu_op")
AGAIN = "give a file as export_chrome_trace wrote it, or trace again"
LATEST_US = Decimal(events.LIMIT // 2000)

_PAYLOAD = re.compile(r"(?s)(.*?)(?: #(\d{1,18}))?")


class _Event(msgspec.Struct):
    ph: str
    cat: str = ""
    name: str = ""
    ts: Decimal | None = None
    dur: Decimal | None = None
    tid: int | str | None = None
    args: msgspec.Raw = msgspec.Raw(b"{}")


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]  # noqa: N815, the name in the file


class _Args(msgspec.Struct):
    correlation: int | None = None
    device: int | None = None
    stream: int | None = None
    graph: int | None = msgspec.field(name="graph id", default=None)
    node: int | None = msgspec.field(name="graph node id", default=None)


_TRACE, _ARGS = msgspec.json.Decoder(_Trace), msgspec.json.Decoder(_Args)


def read(path: str | Path) -> pd.DataFrame:
    """The events of a trace, see `events.COLUMNS`. Without a GPU there is no device work: operations are the work.

    Raises: TraceError for a file that is missing, no such trace, damaged, beyond LIMIT_BYTES when decompressed, or of
    several devices; and for an export of our own.
    """
    path = Path(path)
    try:
        trace = _TRACE.decode(_content(path))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path.name} is no trace of PyTorch's profiler", str(error),
                         "give a file that export_chrome_trace wrote") from None
    kinds = {event.cat for event in trace.traceEvents}
    if kinds & OURS and not kinds & {*HOST, "ac2g"}:
        raise TraceError(f"{path.name} is an export of hybridlab for Perfetto", "not what a profiler wrote",
                         "look at it at https://ui.perfetto.dev, or open its run: "
                         "hl.tracelab.TraceResult.open(DIRECTORY)")
    devices: set[int | None] = set()
    rows = list(_rows(trace.traceEvents, path.name, devices))
    events.one_device(devices)
    return events.tidy(rows)


def short(name: str) -> str:
    """The bare name of a kernel: no namespaces, template arguments, parameters or result type."""
    kept, depth = [], 0
    for letter in name.replace("(anonymous namespace)::", ""):
        depth += (letter == "<") - (letter == ">")
        if depth == 0 and letter == "(":
            break
        if depth == 0 and letter != ">":
            kept.append(letter)
    words = "".join(kept).split()
    return (words[-1].rpartition("::")[2] if words else "") or name


def _content(path: Path) -> bytes:
    try:
        with opened(path) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            content = (GzipFile(fileobj=file) if packed else file).read(LIMIT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path.name} cannot be read", str(error), "give a .json or a whole .json.gz file") from None
    if len(content) > LIMIT_BYTES:
        raise TraceError(f"{path.name} is too large", f"more than {LIMIT_BYTES:,} bytes decompressed",
                         "trace fewer tokens")
    return content


def _rows(found: list[_Event], name: str, devices: set[int | None]) -> Iterator[dict[str, Any]]:
    """Complete events of the categories that count; `devices` receives those that did work."""
    for number, event in enumerate(found):
        if event.ph != "X" or (event.cat not in DEVICE and event.cat not in HOST):
            continue
        if event.cat == "user_annotation" and not event.name.startswith(PREFIX):
            continue
        where = f"{name}, traceEvents[{number}], {event.cat} {event.name[:60]!r}"
        row = {"name": event.name, **_stamps(event, where)}
        if event.cat in DEVICE:
            args = _args(event, where)
            devices.add(args.device)
            yield row | {"kind": DEVICE[event.cat], "stream": args.stream, "correlation": args.correlation,
                         "name": short(event.name) if event.cat == "kernel" else event.name, "graph": args.graph,
                         "node": args.node}
            continue
        if not isinstance(event.tid, int):
            raise TraceError("an event of the host has no number of its thread", where, AGAIN)
        row["thread"] = event.tid
        if event.cat == "cpu_op":
            yield row | {"kind": "op"}
        elif event.cat == "user_annotation":
            yield row | {"kind": "range", **_named(event.name.removeprefix(PREFIX))}
        else:
            kind, row["name"] = events.call(event.name)
            if kind:
                yield row | {"kind": kind, "correlation": _args(event, where).correlation}


def _named(name: str) -> dict[str, Any]:
    match = _PAYLOAD.fullmatch(name)
    assert match is not None  # both groups may be empty
    return {"name": match[1], "category": events.category(match[1]), "payload": int(match[2]) if match[2] else None}


def _stamps(event: _Event, where: str) -> dict[str, int]:
    """start_ns and end_ns, the exact decimals rounded to whole ns."""
    for key, value in (("ts", event.ts), ("dur", event.dur)):
        if value is None or not value.is_finite() or abs(value) > LATEST_US:
            raise TraceError(f"{key} of an event is {'missing' if value is None else str(value)[:40]}", where,
                             f"a number of µs is wanted; {AGAIN}")
    assert event.ts is not None
    assert event.dur is not None
    return {"start_ns": round(event.ts * 1000), "end_ns": round((event.ts + event.dur) * 1000)}


def _args(event: _Event, where: str) -> _Args:
    try:
        return _ARGS.decode(event.args)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError("args of an event are not as Kineto writes them", f"{where}: {error}", AGAIN) from None
