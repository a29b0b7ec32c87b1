"""One run measured by several fresh processes, one after the other: what a process is lucky with, the next is not.

Memory is laid out anew in each process, and libraries choose anew, which moves a median by more than its interval says.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from hybridlab import records
from hybridlab.children import Child, tied
from hybridlab.config import RunConfig, as_dict
from hybridlab.errors import RunError
from hybridlab.progress import Report

EVERY_S = 0.5  # between two looks at how far a process is


def collect(config: RunConfig, target: records.Run, report: Report) -> dict[str, Any]:
    """Appends the rows of every process to `target`, rounds and requests counted on, and returns what each noted.

    Raises: RunError if a process fails; its finished rounds are appended first.
    """
    notes, rounds, requests = [], 0, 0
    for process, part in enumerate(parts(config)):
        who = f"process {process + 1} of {config.restarts}"
        progress = partial(_progress, report, who, rounds, part.repeats, config.repeats)
        with tempfile.TemporaryDirectory(prefix="hybridlab-") as folder:
            said = _one(part, process, Path(folder), progress)
            paths = list(Path(folder).glob("*/*"))
            found = records.read(paths[0]) if paths else None
        if found is not None and len(found.rows):
            rows = found.rows.assign(round=found.rows["round"] + rounds, request=found.rows["request"] + requests)
            target.append(rows.astype(object).where(rows.notna(), None).to_dict("records"))
            rounds, requests = int(rows["round"].max()) + 1, int(rows["request"].max()) + 1
        if found is None or found.status != "complete":
            raise RunError(f"{who} failed",
                           found.reason if found is not None and found.status == "failed" else said,
                           "the rounds before are kept; repeat the run")
        notes.append(found.extra)
    return notes[0] | {"rounds": rounds, "processes": notes}


def _progress(report: Report, who: str, before: int, own: int, total: int, done: int) -> None:
    report(f"{who}, round {done} of {own}", before + done, total)


def parts(config: RunConfig) -> list[RunConfig]:
    """The share of each process: as many rounds and ITL rounds, and as much of the budget."""
    count = config.restarts
    share = {"restarts": 1, "budget_s": config.budget_s / count,
             "itl_repeats": math.ceil(config.itl_repeats / count)}
    rounds = [len(range(process, config.repeats, count)) for process in range(count)]
    return [msgspec.structs.replace(config, repeats=number, **share) for number in rounds]


def _one(part: RunConfig, process: int, root: Path, progress: Callable[[int], None]) -> str:
    """One process from its start to its end; returns the last lines that it said."""
    wanted = json.dumps({"config": as_dict(part), "root": str(root), "process": process})
    with Child(tied("hybridlab.experiment")) as started:
        started.tell(wanted.encode())
        while started.running(EVERY_S):
            progress(sum(1 for _ in root.glob(f"*/*/{records.PARTS}/*.parquet")))
    return started.words
