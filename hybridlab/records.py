"""A run directory: config, environment, rows in Parquet, and a manifest that is the only proof of completion.

Every file is written whole or not at all. Rows arrive as one part a round, so that finished rounds survive a kill.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hybridlab import environment, paths, ranges, schemas
from hybridlab.config import BenchConfig, CacheConfig, RunConfig, SoakConfig, SystemConfig, TraceConfig, as_dict, build
from hybridlab.engines import PeersConfig
from hybridlab.errors import RunError
from hybridlab.files import atomic_write, opened
from hybridlab.manifests import CONFIG, ENVIRONMENT, MANIFEST, ROWS, UNFINISHED, hashes, load, verify
from hybridlab.paperconfig import PaperConfig

Status = Literal["complete", "failed"]
RUN_VARIABLE = paths.RUN_VARIABLE
PARTS, FAILURE, NOTES = "parts", "failure.json", "notes.json"

Config = RunConfig | CacheConfig | BenchConfig | TraceConfig | SystemConfig | SoakConfig | PeersConfig | PaperConfig
KINDS: dict[str, tuple[type[Config], pa.Schema]] = {  # a config that names none is an ablation's
    "ablation": (RunConfig, schemas.ABLATION), "cache": (CacheConfig, schemas.CACHE),
    "kernels": (BenchConfig, schemas.KERNELS), "trace": (TraceConfig, schemas.TRACE),
    "system": (SystemConfig, schemas.SYSTEM), "soak": (SoakConfig, schemas.SOAK),
    "peers": (PeersConfig, schemas.ABLATION), "paper": (PaperConfig, schemas.PAPER)}

NULLABLE = {pa.int64(): "Int64", pa.bool_(): "boolean"}  # pandas would make floats and objects of these


@dataclass(frozen=True)
class Recorded:
    """A run as found on disk. `status` is "complete", "failed", or "incomplete" when no manifest was written."""

    path: Path
    run_id: str
    kind: str
    config: Config
    environment: dict[str, Any]
    status: str
    reason: str
    rows: pd.DataFrame
    extra: dict[str, Any]


class Run:
    """A run being recorded. Owned by one process; `append` after each round, `finish` once."""

    def __init__(self, path: Path, kind: str, *, joined: bool) -> None:
        self.path, self.id, self.kind, self.joined = path, path.name, kind, joined
        self.finished = False
        self._parts = 0
        self._started = _now()

    @classmethod
    def create(cls, config: Config, root: Path | None = None, run_id: str | None = None) -> Run:
        """Makes `<root>/<machine>/<run_id>/` with config.json and environment.json, and never touches an older run.

        Without a root, runs go where `paths.runs_dir` says. The class of the config decides the columns of its rows.
        When HYBRIDLAB_RUN is set, joins that directory instead: the outer process owns it and writes its manifest.
        Raises: RunError if the directory is there already, or has been joined before.
        """
        kind = next(name for name, (known, _) in KINDS.items() if isinstance(config, known))
        report = environment.report()
        outer = os.environ.get(RUN_VARIABLE)
        if outer:
            run = cls(_joinable(Path(outer)), kind, joined=True)
        else:
            machine = environment.slug(None if config.device == "cpu" else report["gpu"], report["cpu"])
            run = cls((root or paths.runs_dir()) / machine / (run_id or _new_id()), kind, joined=False)
            _make(run.path, "a run is never overwritten")
        atomic_write(run.path / CONFIG, _json(({} if kind == "ablation" else {"kind": kind}) | as_dict(config)))
        atomic_write(run.path / ENVIRONMENT, _json(report))
        return run

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Stores rows as one atomic Parquet part; `run_id` is filled in, and `profiled` where rows do not say and their
        kind has it. Raises RunError for rows out of schema."""
        if self.finished:
            raise RunError(f"run {self.id} is finished", "rows were appended after finish", "create a new run")
        schema = KINDS[self.kind][1]
        known = {"profiled": ranges.listening()} if "profiled" in schema.names else {}
        table = _table([{**known, **row, "run_id": self.id} for row in rows], schema)
        if table.num_rows == 0:
            return
        (self.path / PARTS).mkdir(exist_ok=True)
        atomic_write(self.path / PARTS / f"{self._parts:06d}.parquet", _parquet(table))
        self._parts += 1

    def finish(self, status: Status, reason: str = "", extra: Mapping[str, Any] | None = None) -> str:
        """Merges the parts into rows.parquet and writes the manifest last. Returns the status that was recorded.

        In a joined run only rows are merged; `extra`, and a failure, are noted for the owner of the directory, whose
        manifest then holds both: its "complete" becomes "failed". Raises: RunError on a second finish or an unknown
        status.
        """
        if status not in ("complete", "failed"):
            raise RunError(f"{status!r} is no status of a finished run", "", "use 'complete' or 'failed'")
        if self.finished or (self.path / MANIFEST).exists():
            raise RunError(f"run {self.id} is finished already", "", "a run is finished once")
        merged = _merge(self.path)
        self.finished = True
        if self.joined:
            atomic_write(self.path / NOTES, _json(dict(extra or {})))
            if status == "failed":
                atomic_write(self.path / FAILURE, _json({"reason": reason}))
            return status
        if (self.path / FAILURE).exists() and status == "complete":
            status, reason = "failed", str(load(self.path / FAILURE).get("reason", ""))
        manifest = {"run_id": self.id, "status": status, "reason": reason, "rows": merged, "started": self._started,
                    "finished": _now(), "files": hashes(self.path), "extra": _notes(self.path) | dict(extra or {})}
        atomic_write(self.path / MANIFEST, _json(manifest))
        return status


def read(path: Path | str) -> Recorded:
    """A recorded run, checked against its manifest. Without a manifest it is "incomplete", with the rows so far.

    Raises: RunError naming the file that is missing, damaged or was changed after the run.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise RunError(f"{path} is no run directory", f"{CONFIG} is missing", "give <root>/<machine>/<run_id>")
    manifest: dict[str, Any] = {"run_id": path.name, "status": "incomplete", "reason": UNFINISHED}
    if (path / MANIFEST).exists():
        manifest = load(path / MANIFEST)
        verify(path, manifest)
    table = _rows(path)
    if "rows" in manifest and manifest["rows"] != table.num_rows:
        raise RunError(f"{path / ROWS} holds {table.num_rows} rows", f"its manifest says {manifest['rows']}",
                       "restore the files of this run")
    frame = table.to_pandas().astype({field.name: NULLABLE[field.type] for field in table.schema
                                      if field.nullable and field.type in NULLABLE})
    found = kind(path)
    config = {name: value for name, value in load(path / CONFIG).items() if name != "kind"}
    return Recorded(path, str(manifest["run_id"]), found, build(KINDS[found][0], config),
                    load(path / ENVIRONMENT), str(manifest["status"]), str(manifest["reason"]), frame,
                    dict(manifest.get("extra") or _notes(path)))


def _notes(path: Path) -> dict[str, Any]:
    """What a joined run noted beside its rows; the manifest holds it once there is one."""
    return load(path / NOTES) if (path / NOTES).exists() else {}


def kind(path: Path) -> str:
    """What a run directory records, one of KINDS, from its config. Raises: RunError."""
    found = str(load(path / CONFIG).get("kind", "ablation"))
    if found not in KINDS:
        raise RunError(f"{path / CONFIG} says kind {found[:80]!r}", f"known kinds are {', '.join(KINDS)}",
                       "read it with the version of hybridlab that recorded it")
    return found


def keep(path: Path, target: Path) -> None:
    """Copies a finished run to the new directory `target`, without the executed notebook and the texts of failed
    probes, which may name paths of the machine; the copy has a manifest of its own."""
    target.mkdir()
    for name in (CONFIG, ROWS):
        shutil.copyfile(path / name, target / name)
    environment = load(path / ENVIRONMENT)
    atomic_write(target / ENVIRONMENT, _json(environment | {"failed": sorted(environment.get("failed", ()))}))
    atomic_write(target / MANIFEST, _json(load(path / MANIFEST) | {"files": hashes(target)}))


def _joinable(path: Path) -> Path:
    if not path.is_dir() or (path / MANIFEST).exists():
        raise RunError(f"{RUN_VARIABLE} names {path}", "it is no open run directory",
                       f"unset {RUN_VARIABLE} to record a run of its own")
    if (path / ROWS).exists():
        raise RunError(f"{path} holds a run already", "a notebook records one run", "use one notebook an experiment")
    _make(path / PARTS, "a notebook records one run; use one notebook an experiment")
    return path


def _make(path: Path, remedy: str) -> None:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise RunError(f"{path} is there already", "", remedy) from None


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    known = set(schema.names)
    for row in rows:
        wrong = known.symmetric_difference(row)
        if wrong:
            raise RunError(f"a row has the wrong fields: {', '.join(sorted(wrong))}", "", f"fields are {schema.names}")
        if not 0 <= row.get("ms", 0.0) < float("inf"):
            raise RunError(f"a row has ms = {row['ms']}", f"{row['metric']}, request {row['request']}",
                           "a time is finite and not negative")
    try:
        table = pa.Table.from_pydict({name: [row[name] for row in rows] for name in schema.names}, schema=schema)
        table.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RunError("a row does not fit the schema", str(error), f"columns are {schema.to_string()}") from None
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            free = ", ".join(other.name for other in schema if other.nullable)
            raise RunError(f"a row has no {field.name}", "", f"only {free} may be empty")
    return table


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _rows(path: Path) -> pa.Table:
    """rows.parquet when it was merged, else the parts: a crash between the two leaves either whole."""
    files = [path / ROWS] if (path / ROWS).exists() else sorted((path / PARTS).glob("[0-9]*.parquet"))
    schema, tables = KINDS[kind(path)][1], []
    for file in files:
        try:
            with opened(file) as part:
                tables.append(_cast(pq.ParquetFile(part).read(), schema))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise RunError(f"{file} cannot be read", str(error), "restore this file of the run") from None
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table in today's columns: optional ones that were not known when it was recorded are empty."""
    for field in schema:
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    if set(table.column_names) != set(schema.names):
        raise ValueError(f"its columns are {', '.join(table.column_names)}")
    return table.select(schema.names).cast(schema)


def _merge(path: Path) -> int:
    table = _rows(path)
    if not (path / ROWS).exists():
        atomic_write(path / ROWS, _parquet(table))
    shutil.rmtree(path / PARTS, ignore_errors=True)
    return int(table.num_rows)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _new_id() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
