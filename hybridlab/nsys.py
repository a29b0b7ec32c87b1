"""Reads the SQLite export of an Nsight Systems report (`nsys export --type=sqlite`) as a table of events.

Tables and columns come and go between versions of nsys, so what is absent is asked for first and left out. Of NVTX,
only hybridlab's domain is read. A report with `--cuda-graph-trace=node` has a row a kernel of a graph; the default has
one row a replay, which is read as one kernel named GRAPH. Never imports torch.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab import events
from hybridlab.errors import TraceError

DOMAIN = "hybridlab"
GRAPH = "CUDA graph"  # all the work of one replay
MOST_ROWS = 3_000_000  # of one table
PUSH_POP, START_END, DOMAIN_CREATE = 59, 60, 75  # NVTX_EVENTS.eventType
COPIES = {1: "HtoD", 2: "DtoH", 8: "DtoD", 9: "HtoH", 10: "PtoP"}  # CUpti_ActivityMemcpyKind
HOST_DEVICE = 2**31 - 1  # deviceId of a graph that starts on the host
WORK = ("start", "end", "deviceId", "streamId", "correlationId", "globalPid", "graphId", "graphNodeId")
PAYLOADS = ("int64Value", "uint64Value", "int32Value", "uint32Value")

Row = dict[str, Any]


def read(path: str | Path) -> pd.DataFrame:
    """The events of an export, see `events.COLUMNS`, of the process that hybridlab ran in.

    Raises: TraceError for a file that is missing, no such export, damaged, or of several processes or devices.
    """
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"{path.name} is not there", f"no file in {path.parent}",
                         "export a report with nsys export --type=sqlite")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            return _Export(connection, path.name).events()
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite quotes the bytes that it cannot read
        raise TraceError(f"{path.name} is no readable SQLite file", str(error),
                         "export the report again with nsys export --type=sqlite") from None


class _Export:
    """One open export; reads it once."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self.connection, self.name = connection, name
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.execute("PRAGMA trusted_schema = OFF")  # the schema is the file's, and may call functions
        self.tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not any(table.startswith("CUPTI_ACTIVITY_KIND_") or table == "NVTX_EVENTS" for table in self.tables):
            raise TraceError(f"{name} holds no table of Nsight Systems", f"{len(self.tables)} tables",
                             "export a report with nsys export --type=sqlite")
        self.strings = {row["id"]: _string(row["value"]) for row in self.rows("StringIds", "id", "value")}

    def events(self) -> pd.DataFrame:
        found_ranges, found_calls = list(self.ranges()), list(self.calls())
        process = self._process(found_ranges or found_calls)
        work = [row for row in self.work() if process is None or row["process"] in (process, None)]
        events.one_device(row["device"] for row in work if row["device"] != HOST_DEVICE)
        return events.tidy([*work, *(row for row in (*found_ranges, *found_calls) if row["process"] == process)])

    def rows(self, table: str, *columns: str, needed: int | None = None) -> Iterator[Row]:
        """These columns of a table: None where it has no such column, nothing where it is absent.

        Raises: TraceError where it lacks one of the first `needed` (default: all), or has more than MOST_ROWS rows.
        """
        if table not in self.tables:
            return
        there = {row[1] for row in self.connection.execute(f'PRAGMA table_info("{table}")')}
        missing = [column for column in columns[:needed] if column not in there]
        if missing:
            raise TraceError(f"table {table} of {self.name} has no column {', '.join(missing)}", "",
                             "export the report with a version of nsys that writes it")
        wanted = ", ".join(f'"{column}"' if column in there else "NULL" for column in columns)
        query = f'SELECT {wanted} FROM "{table}" LIMIT {MOST_ROWS + 1}'  # noqa: S608, constants of this module
        for number, row in enumerate(self.connection.execute(query)):
            if number == MOST_ROWS:
                raise TraceError(f"table {table} of {self.name} is too large", f"more than {MOST_ROWS:,} rows",
                                 "trace fewer tokens, or use --capture-range")
            yield dict(zip(columns, row, strict=True))

    def work(self) -> Iterator[Row]:
        """Kernels, copies and replays. A row whose stamps are both 0 was not timed, and is left out."""
        for table, kind, extra in (("KERNEL", "kernel", ("shortName", "demangledName")), ("MEMSET", "copy", ()),
                                   ("MEMCPY", "copy", ("copyKind",)), ("GRAPH_TRACE", "kernel", ())):
            for row in self.rows(f"CUPTI_ACTIVITY_KIND_{table}", *WORK, *extra, needed=2):
                if row["start"] == row["end"] == 0:
                    continue
                if table == "KERNEL":
                    name = self.strings.get(row["shortName"]) or self.strings.get(row["demangledName"]) or "unnamed"
                elif table == "MEMCPY":
                    name = f"Memcpy {COPIES.get(row['copyKind'], '')}".rstrip()
                else:
                    name = "Memset" if table == "MEMSET" else GRAPH
                yield {"kind": kind, "name": name, "start_ns": row["start"], "end_ns": row["end"],
                       "stream": row["streamId"], "correlation": row["correlationId"], "graph": row["graphId"],
                       "node": row["graphNodeId"] or None,  # 0 in a version without missing values
                       "process": _process(row["globalPid"]), "device": row["deviceId"]}

    def calls(self) -> Iterator[Row]:
        """Calls that launch or wait. The device's own rows of synchronization repeat these, and are not read."""
        for row in self.rows("CUPTI_ACTIVITY_KIND_RUNTIME", "start", "end", "nameId", "globalTid", "correlationId"):
            kind, name = events.call(self.strings.get(row["nameId"], ""))
            if kind:
                yield {"kind": kind, "name": name, "start_ns": row["start"], "end_ns": row["end"],
                       "correlation": row["correlationId"], "thread": _thread(row["globalTid"]),
                       "process": _process(row["globalTid"])}

    def ranges(self) -> Iterator[Row]:
        """The closed ranges of hybridlab's domain, which each process numbers by itself. Raises: TraceError where there
        are ranges of domains, and no name of one."""
        rows = list(self.rows("NVTX_EVENTS", "start", "end", "eventType", "globalTid", "domainId", "text", "textId",
                              *PAYLOADS, needed=4))
        own = {(_process(row["globalTid"]), row["domainId"]) for row in rows
               if row["eventType"] == DOMAIN_CREATE and self._text(row) == DOMAIN}
        if not any(row["eventType"] == DOMAIN_CREATE for row in rows) and any(
                row["eventType"] in (PUSH_POP, START_END) and row["domainId"] for row in rows):
            raise TraceError(f"{self.name} does not say which of its NVTX domains is {DOMAIN!r}",
                             f"{len(rows)} rows of NVTX_EVENTS, none that names a domain (eventType {DOMAIN_CREATE})",
                             "record it again from the start of the process, with --trace=cuda,nvtx")
        for row in rows:
            process = _process(row["globalTid"])
            if row["eventType"] not in (PUSH_POP, START_END) or row["end"] is None or (
                    process, row["domainId"]) not in own:
                continue
            name = self._text(row)
            yield {"kind": "range", "name": name, "start_ns": row["start"], "end_ns": row["end"],
                   "thread": _thread(row["globalTid"]), "category": events.category(name), "payload": _payload(row),
                   "process": process}

    def _text(self, row: Mapping[str, Any]) -> str:
        """The message, which stands in the row, or among the strings where it was registered."""
        return _string(row["text"]) or self.strings.get(row["textId"], "")

    def _process(self, rows: list[Row]) -> int | None:
        """The one process of these rows: correlations of two would collide."""
        found = sorted({row["process"] for row in rows}, key=str)
        if len(found) > 1:
            raise TraceError(f"{self.name} holds {len(found)} processes", ", ".join(map(str, found[:4])),
                             "trace one process: nsys profile --trace-fork-before-exec=false")
        return found[0] if found else None


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _payload(row: Mapping[str, Any]) -> int | None:
    """The whole number of the payload. Versions without missing values write 0 in the members that were not set."""
    given = [row[member] for member in PAYLOADS if row[member] is not None]
    return next((value for value in given if value != 0), given[0] if given else None)


def _thread(identifier: object) -> int | None:
    """The lowest 24 bits of nsys' identifier of a thread; the next 24 are the process."""
    return None if identifier is None else _whole(identifier) % 2**24


def _process(identifier: object) -> int | None:
    return None if identifier is None else _whole(identifier) // 2**24 % 2**24


def _whole(identifier: object) -> int:
    if not isinstance(identifier, int):
        raise TraceError(f"an identifier of a thread is {str(identifier)[:60]!r}", "", "a whole number is wanted")
    return identifier
