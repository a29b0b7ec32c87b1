"""One job of a sweep in a process of its own, that leaves a run in the store and nothing else behind.

The process ends with the one that started it, and its kernel with it. Both hold the lock of the run store, so that who
gets the lock knows that nothing of an earlier sweep still runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlab import children, finished, notebooks, store
from hybridlab.errors import HybridlabError, SweepError
from hybridlab.files import atomic_write
from hybridlab.parameters import read_notebook
from hybridlab.sweeps import Job, Sweep, identity

LOCK = ".sweep.lock"
EVERY_S = 0.5   # between two looks at a job
WAIT_S = 15.0   # for what a killed sweep left to end
GRACE_S = 30.0  # for an interrupted job to mark its run failed


def request(sweep: Sweep, job: Job) -> dict[str, Any]:
    """All that a process needs to do a job, as plain values."""
    note = {"job": job.id, "sweep": sweep.name, "values": job.cell.values, "repeat": job.repeat}
    return {"notebook": str(sweep.notebook.resolve()), "parameters": job.cell.parameters, "note": note,
            "timeout_s": sweep.timeout_s}


def perform(notebook: str, parameters: dict[str, Any], note: dict[str, Any], timeout_s: float, root: str,
            held: tuple[int, ...] = (), scratch: str = "") -> None:
    """The job itself, in this process. Prints the run's directory as soon as it is there. The folder `scratch`, which
    the parent removes, goes with the parent if that is killed. Raises as `notebooks.run`, and SweepError if the
    notebook is no longer the one that the sweep was planned with."""
    if scratch:
        children.end_with(os.getppid(), lambda: shutil.rmtree(scratch, ignore_errors=True))
    config, name = notebooks.check(notebook, parameters), Path(notebook).name
    if not note["job"].startswith(f"{identity(read_notebook(Path(notebook)), name, config)}-"):
        raise SweepError(f"{name} was changed while the sweep ran", "its jobs are of the earlier version",
                         "start the sweep again")

    def started(path: Path) -> None:
        atomic_write(path / finished.JOB, json.dumps(note, indent=1, ensure_ascii=False) + "\n")
        print(path, flush=True)  # noqa: T201 - this is how the parent learns it

    notebooks.run(notebook, parameters, root=root, timeout_s=timeout_s, progress=False, started=started,
                  held=tuple(held))


def run(wanted: Mapping[str, Any], root: Path, held: tuple[int, ...] = (),
        tick: Callable[[], object] = lambda: None) -> finished.Entry:
    """One job from the start of its process to the end, judged by the manifest that it left. `tick` is called twice a
    second meanwhile. On Ctrl-C the job may mark its run failed before it ends."""
    began = time.monotonic()
    with (tempfile.TemporaryFile("w+", encoding="utf-8") as told,
          children.Child(children.tied("hybridlab.jobs"), held, told) as process):
        process.tell(json.dumps({**wanted, "root": str(root.resolve()), "held": held}).encode())
        try:
            while process.running(EVERY_S):
                tick()
        except KeyboardInterrupt:
            process.interrupt(GRACE_S)
            raise
        told.seek(0)
        place = told.read().strip()
    if place:
        return finished.state(Path(place))._replace(seconds=time.monotonic() - began)
    reason = f"exit code {process.code} before a run was recorded: {' | '.join(process.last)}"
    return finished.Entry(root, "failed", reason, time.monotonic() - began)


@dataclass(frozen=True)
class Executor:
    """Where jobs run: what they are measured on there (see `store.FACTS`), how many at a time, and what runs them,
    calling a function twice a second, and yields each with its run."""

    facts: dict[str, dict[str, str | None]]
    slots: int
    run: Callable[[Callable[[], object]], Generator[tuple[Job, finished.Entry], None, None]]


def here(sweep: Sweep, todo: list[Job], root: Path, lock: int) -> Executor:
    """One job at a time on this machine, in the order given."""
    devices = sorted({job.cell.config.device for job in todo})

    def each(tick: Callable[[], object]) -> Generator[tuple[Job, finished.Entry], None, None]:
        for job in todo:
            yield job, run(request(sweep, job), root, (lock,), tick)

    return Executor({f"this machine ({device})": store.here(device) for device in devices}, 1, each)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[int]:
    """Keeps other sweeps out of a run store for the block; yields the open lock, which jobs and kernels inherit.

    Raises: SweepError if another sweep, or what a killed one left, does not end within WAIT_S.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("a") as file:
        end = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise SweepError("another sweep is at work in this run store", str(root),
                                     "wait until it has ended, or give another --runs DIRECTORY") from None
                threading.Event().wait(0.1)
        yield file.fileno()


def main() -> None:
    """What `python -m hybridlab.jobs` does: one request on the first line of stdin."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would inherit "ignore"
    try:
        perform(**children.asked(json.loads))
    except HybridlabError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
