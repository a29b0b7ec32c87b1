"""Which jobs of a sweep are done: read from the manifests in the run store, which are the only record of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from hybridlab import store
from hybridlab.errors import RunError
from hybridlab.manifests import ENVIRONMENT, MANIFEST, UNFINISHED, load, verify
from hybridlab.sweeps import Job

JOB = "job.json"  # which job a run is of; written before its kernel starts, and hashed by its manifest
COMPLETE = "complete"


class Entry(NamedTuple):
    """One run of a job. `status` is "complete", "failed", "incomplete", or "damaged": files are not as recorded."""

    path: Path
    status: str
    reason: str
    seconds: float | None


def state(path: Path) -> Entry:
    """How the run in a directory ended, from its manifest and the hashes in it."""
    if not (path / MANIFEST).exists():
        return Entry(path, "incomplete", UNFINISHED, None)
    try:
        manifest = load(path / MANIFEST)
        verify(path, manifest)
        if JOB not in manifest["files"]:
            raise RunError(f"{path / MANIFEST} does not list {JOB}", "so it belongs to no sweep",
                           "run the sweep again: it measures this job anew")
    except RunError as error:
        return Entry(path, "damaged", str(error), None)
    return Entry(path, str(manifest["status"]), str(manifest["reason"]), store.seconds(manifest))


def read(root: Path, jobs: Iterable[Job]) -> dict[str, list[Entry]]:
    """The runs of each job of these cells, of other repeats too, by the id of the job; the oldest first."""
    cells = {job.cell.id for job in jobs}
    found: dict[str, list[Entry]] = {}
    for path in sorted(store.directories(root), key=lambda path: path.name):
        name = _job(path)
        if name.rpartition("-")[0] in cells:
            found.setdefault(name, []).append(state(path))
    return found


def _job(path: Path) -> str:
    """The job that a run is of; "" for a run of none."""
    try:
        return str(load(path / JOB).get("job")) if (path / JOB).exists() else ""
    except RunError:
        return ""


def done(found: Mapping[str, list[Entry]], job: Job) -> Entry | None:
    """The complete run of a job, the oldest if a store was merged from several; None without one."""
    return next((entry for entry in found.get(job.id, ()) if entry.status == COMPLETE), None)


def expected(found: Mapping[str, list[Entry]]) -> dict[str, float]:
    """How long a run of each cell takes in seconds, by its id: the median of the complete ones, where there is one."""
    times: dict[str, list[float]] = {}
    for name, entries in found.items():
        times.setdefault(name.rpartition("-")[0], []).extend(
            entry.seconds for entry in entries if entry.status == COMPLETE and entry.seconds is not None)
    return {cell: statistics.median(own) for cell, own in times.items() if own}


def facts(path: Path) -> dict[str, str | None]:
    """What the numbers of a run depend on beside its config, see `store.FACTS`."""
    return store.facts(path.parent.name, load(path / ENVIRONMENT))
