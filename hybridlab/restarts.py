"""One run measured by several fresh processes, one after the other: what a process is lucky with, the next is not.

Memory is laid out anew in each process, and libraries choose anew, which moves a median by more than its interval says.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import msgspec
import psutil

from hybridlab import records
from hybridlab.config import RunConfig, as_dict
from hybridlab.errors import RunError
from hybridlab.progress import Report

EVERY_S = 0.5  # between two looks at how far a process is
PATIENCE_S = 30.0  # for a process that was killed
LAST = 5       # lines of what a process said before it died


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


def asked(source: TextIO, decode: Callable[[str], Any]) -> Any:
    """What the first line of `source` asks this process for; the process ends when `source` does, with its parent, and
    all that it started with it."""
    found = decode(source.readline())

    def follow() -> None:
        source.read()
        for below in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                below.kill()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    return found


def _one(part: RunConfig, process: int, root: Path, progress: Callable[[int], None]) -> str:
    """One process from its start to its end; returns the last lines that it said."""
    wanted = json.dumps({"config": as_dict(part), "root": str(root), "process": process})
    environment = {name: value for name, value in os.environ.items() if name != records.RUN_VARIABLE}
    with (root / "said").open("w+", encoding="utf-8", errors="replace") as said:
        with child([sys.executable, "-m", "hybridlab.experiment"], said, environment) as started:
            assert started.stdin is not None
            started.stdin.write(wanted.encode() + b"\n")
            started.stdin.flush()
            while going(started):
                progress(sum(1 for _ in root.glob(f"*/*/{records.PARTS}/*.parquet")))
        words = last_words(started, said)
    (root / "said").unlink()
    return words


def last_words(ended: subprocess.Popen[bytes], said: TextIO) -> str:
    """Its exit code and the last lines that it said."""
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()]
    return f"exit code {ended.returncode}: " + " | ".join(lines[-LAST:])


def going(child: subprocess.Popen[bytes]) -> bool:
    """Whether a process still runs, after a look of at most EVERY_S."""
    try:
        child.wait(EVERY_S)
    except subprocess.TimeoutExpired:
        return True
    return False


@contextmanager
def child(command: list[str], said: TextIO, environment: dict[str, str],
          stdout: int = subprocess.DEVNULL, held: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, none of which is left behind; `stdout`: where its standard output goes. It
    inherits the open files `held`."""
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=said, env=environment,
                               start_new_session=True, pass_fds=held)
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait(PATIENCE_S)
        for pipe in filter(None, (started.stdin, started.stdout)):
            with suppress(BrokenPipeError):  # what it was asked last and never read
                pipe.close()
