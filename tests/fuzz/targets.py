"""What may happen when a reader is given any bytes: a result, or the error that it promises. Everything else escapes.

Used by the harnesses beside this file, which search for hours, and by tests/faults/test_fuzz.py, for seconds.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from hybridlab import checkpoint, events, kineto, names, nsys, workload
from hybridlab.errors import ConfigError, ModelError, TraceError


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hybridlab-fuzz-") as made:
        yield Path(made)


def _read(reader: Callable[[Path], Any], name: str, data: bytes) -> None:
    with folder() as made:
        (made / name).write_bytes(data)
        try:
            table = reader(made / name)
        except TraceError as error:
            require_short(error)
        else:
            assert list(table) == list(events.COLUMNS)
            assert (table["end_ns"] >= table["start_ns"]).all()
            assert table["start_ns"].is_monotonic_increasing


def require_short(error: Exception) -> None:
    assert 0 < len(str(error)) < 15_000, "a message is to be read"


def kineto_file(data: bytes) -> None:
    """Any bytes as a trace of PyTorch's profiler."""
    _read(kineto.read, "trace.json", data)


def nsys_file(data: bytes) -> None:
    """Any bytes as an export of Nsight Systems."""
    _read(nsys.read, "report.sqlite", data)


def nsys_tables(tables: dict[str, list[dict[str, Any]]]) -> None:
    """Any values in the tables of an export, which then is a sound database."""
    with folder() as made:
        export(made / "report.sqlite", tables)
        nsys_file((made / "report.sqlite").read_bytes())


def export(path: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    """A database of these tables, whose columns are those of their first rows."""
    with closing(sqlite3.connect(path)) as connection:
        for table, rows in tables.items():
            columns = list(rows[0])
            connection.execute(f'CREATE TABLE "{table}" ({", ".join(f"{chr(34)}{name}{chr(34)}" for name in columns)})')
            connection.executemany(f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(columns))})',
                                   [[row.get(name) for name in columns] for row in rows])
        connection.commit()


def weights(data: bytes) -> None:
    """Any bytes as the safetensors file of a checkpoint."""
    with folder() as made:
        (made / checkpoint.WEIGHTS).write_bytes(data)
        try:
            found = checkpoint.read_headers(made)
        except ModelError as error:
            require_short(error)
        else:
            assert all(isinstance(tensor.shape, tuple) for tensor in found.values())


def index(data: bytes) -> None:
    """Any bytes as the index of a checkpoint: it never leads to a file outside."""
    with folder() as made:
        inside = made / "model"
        inside.mkdir()
        (inside / checkpoint.INDEX).write_bytes(data)
        try:
            files, _ = checkpoint.weight_files(inside)
        except ModelError as error:
            require_short(error)
        else:
            assert all((inside / file).parent == inside for file in files)


def config(data: bytes) -> None:
    """Any bytes as config.json: what passes has sizes that a model can have."""
    with folder() as made:
        (made / "config.json").write_bytes(data)
        try:
            found = checkpoint.check_config(made / "config.json")
            names.context(str(made))
        except ModelError as error:
            require_short(error)
        else:
            assert isinstance(found["model_type"], str)
            assert all(type(found[name]) is int and 1 <= found[name] <= limit
                       for name, limit in checkpoint.SIZES.items()
                       if name in found and name not in checkpoint.SIZES_OR_NULL)
            assert not set(found) & {name for name in checkpoint.FORBIDDEN if found.get(name) is not None}


def requests(data: bytes) -> None:
    """Any bytes as a file of requests: what passes fits, and is the same when it was written again."""
    with folder() as made:
        (made / "x.csv").write_bytes(data)
        try:
            found = workload.read(made / "x.csv", 4096)
        except ConfigError as error:
            require_short(error)
        else:
            assert found
            assert all(min(one) >= 1 and sum(one) <= 4096 for one in found)
            workload.write(made / "y.csv", found)
            assert workload.read(made / "y.csv") == found


EVENT = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 10.5, "dur": 3,
         "args": {"device": 0, "stream": 7, "correlation": 6, "graph id": 3, "graph node id": 12}}
CALL = EVENT | {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "tid": 486, "args": {"correlation": 6}}
TRACE = json.dumps({"traceEvents": [EVENT, CALL, CALL | {"cat": "user_annotation", "name": "hybridlab.decode #17"}]})
CONFIG = json.dumps({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "vocab_size": 48, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
                     "text_config": {"auto_map": None}, "_attn_implementation": "sdpa"})
REQUESTS = "prompt_tokens,new_tokens\n100,4\n\n7, 2\n"
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../x.safetensors"}})
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)
WORK = {"start": 1, "end": 5, "deviceId": 0, "streamId": 7, "correlationId": 3, "globalPid": 42 << 24, "shortName": 1,
        "demangledName": 1, "graphId": 2, "graphNodeId": 5}
RANGE = {"start": 1, "end": 9, "eventType": 59, "globalTid": (42 << 24) + 7, "domainId": 1, "text": "decode",
         "textId": None, "int64Value": 17, "uint64Value": None}
TABLES = {"CUPTI_ACTIVITY_KIND_KERNEL": [WORK], "StringIds": [{"id": 1, "value": "k"}],
          "CUPTI_ACTIVITY_KIND_RUNTIME": [{"start": 1, "end": 2, "nameId": 1, "globalTid": 42 << 24,
                                           "correlationId": 3}],
          "NVTX_EVENTS": [RANGE, RANGE | {"eventType": 75, "text": "hybridlab"}]}


def database() -> bytes:
    """A sound export, to begin from."""
    with folder() as made:
        export(made / "x.sqlite", TABLES)
        return (made / "x.sqlite").read_bytes()
