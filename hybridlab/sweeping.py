"""`hybridlab sweep`: a notebook under every combination of its parameters, several times, in a random order.

What takes seconds to import is imported late: the command line reads its options here.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridlab import paths, progress, terminal
from hybridlab.errors import RunError, SweepError
from hybridlab.terminal import err, option

if TYPE_CHECKING:
    from hybridlab.finished import Entry
    from hybridlab.jobs import Executor
    from hybridlab.sweeps import Job, Sweep

EXAMPLES = terminal.examples(
    "hybridlab sweep data/sweeps/ablation.yaml --dry-run", "hybridlab sweep data/sweeps/ablation.yaml",
    "hybridlab sweep data/sweeps/ablation.yaml --cluster auto", "hybridlab sweep mine.yaml --across commit") + """

**A file**

```yaml
notebook: ../../notebooks/05_ablation.ipynb   # from the file's folder
repeats: 3                 # runs of each cell, each in a process of its own
seed: 7                    # of the order
parameters:                # the same in every cell
  lengths: [10, 100]
matrix:                    # every combination is a cell
  model: [tiny, "random:tiny-mistral-7b"]
  temperature: [0.0, 0.8]
exclude:                   # cells to leave out
  - {model: tiny, temperature: 0.8}
```
"""


def command(
    file: Annotated[Path, typer.Argument(help="A YAML file: notebook, parameters, matrix, exclude, repeats, seed, "
                                               "timeout_s.", metavar="SWEEP")],
    dry_run: Annotated[bool, option("Check everything and print the plan; run nothing.", "--dry-run")] = False,
    cluster: Annotated[str | None, option(
        "Run the jobs on a Ray cluster, each alone on its GPU: auto, local, or an address.", metavar="ADDRESS")] = None,
    across: Annotated[list[str] | None, option(
        "What runs of this sweep may differ in, such as machine, torch or commit. Repeatable.", metavar="NAME")] = None,
    stop_on_failure: Annotated[bool, option("Start no further job after one failed.", "--stop-on-failure")] = False,
    runs: Annotated[Path | None, option("Where run directories go; default data/runs/local.", "--runs")] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Run a notebook under every combination of its parameters, several times, in a random order; then one table.

    All cells are checked before the first starts. Each job is a run in a process of its own, one at a time. What is
    complete is not run again: after an interruption, a crash or a failure the same command goes on, and a file may be
    extended. Runs of a sweep must agree in machine and versions unless --across names the difference.

    Exit code 0: every job is complete; 1: some are not; 2: refused before the first; 130: interrupted.
    """
    with terminal.errors(debug):
        whole = run(file, runs or paths.runs_dir(), dry_run, cluster, across or [], stop_on_failure)
    if not whole:
        raise typer.Exit(terminal.FAILED)


def run(file: Path, root: Path, dry_run: bool = False, address: str | None = None, across: Sequence[str] = (),
        stop_on_failure: bool = False) -> bool:
    """The command without its errors. Returns whether every job is complete, and after a dry run True."""
    from hybridlab import finished, jobs, outcomes, store, sweeps
    from hybridlab.records import RUN_VARIABLE

    store.require_facts(across)  # before the lock, which leaves a file
    sweep = sweeps.read(file)
    if RUN_VARIABLE in os.environ:
        raise SweepError("a sweep cannot start inside a run", f"{RUN_VARIABLE} is set", f"unset {RUN_VARIABLE}")
    every = sweep.jobs()
    if dry_run:
        grid, words = outcomes.plan(sweep, finished.read(root, every))
        terminal.results([grid.rich()], words)
        return True
    with jobs.alone(root) as lock:
        found = finished.read(root, every)
        todo = [job for job in every if finished.done(found, job) is None]
        if todo:
            with _executor(sweep, todo, root, lock, address) as executor:
                _agree(executor.facts, found, every, across)
                _work(executor, todo, found, stop_on_failure)
        found = finished.read(root, every)
    terminal.results([outcomes.summary(sweep, found, across).rich()], outcomes.plan(sweep, found)[1])
    return all(finished.done(found, job) for job in every)


@contextlib.contextmanager
def _executor(sweep: Sweep, todo: list[Job], root: Path, lock: int, address: str | None) -> Iterator[Executor]:
    from hybridlab import jobs

    if address is None:
        yield jobs.here(sweep, todo, root, lock)
        return
    from hybridlab import cluster

    with err.status("joining the cluster"):
        stack = contextlib.ExitStack()
        executor = stack.enter_context(cluster.executor(address, sweep, todo, root))
    with stack:
        yield executor


def _agree(facts: Mapping[str, Mapping[str, str | None]], found: Mapping[str, list[Entry]], every: list[Job],
           across: Sequence[str]) -> None:
    """Refuse to measure the rest of a sweep on what differs from where its complete runs were made."""
    from hybridlab import finished, store

    complete = [entry for job in every if (entry := finished.done(found, job))]
    try:
        store.require_same({**facts} | {entry.path.name: finished.facts(entry.path) for entry in complete}, across)
    except RunError as error:
        raise SweepError(error.fact, error.context, "name what may differ with --across, or measure into another store "
                         "with --runs DIRECTORY") from None


def _work(executor: Executor, todo: list[Job], found: dict[str, list[Entry]], stop_on_failure: bool) -> None:
    """Run all jobs, a line on stderr as each ends, and total progress. `found` gets their runs."""
    from hybridlab import finished, outcomes

    waiting = {job.id: job for job in todo}
    with progress.reporter(True) as report:
        watch = _Watch(report, len(todo), waiting, finished.expected(found), executor.slots)
        with contextlib.closing(executor.run(watch.tick)) as ended:
            for job, entry in ended:
                del waiting[job.id]
                found.setdefault(job.id, []).append(entry)
                watch.next(finished.expected(found))
                words = "complete" if entry.status == finished.COMPLETE else f"{entry.status}: {entry.reason}"
                time = f" in {outcomes.duration(entry.seconds)}" if entry.seconds is not None else ""
                line = f"[{len(todo) - len(waiting)}/{len(todo)}] {job.label}{time}: {words}{watch.left()}"
                err.print(terminal.printable(line), markup=False, highlight=False, soft_wrap=True)
                if stop_on_failure and entry.status != finished.COMPLETE:
                    return


@dataclass
class _Watch:
    """Moves the bar with the clock, up to what the job in front should take."""

    report: progress.Report
    count: int
    waiting: dict[str, Job]
    times: dict[str, float]
    slots: int
    begun: float = field(default_factory=time.monotonic)

    def next(self, times: dict[str, float]) -> None:
        self.times, self.begun = times, time.monotonic()

    def left(self) -> str:
        """How long the waiting jobs take, in words; nothing where that is not known."""
        from hybridlab import outcomes

        whole = outcomes.left(self.waiting.values(), self.times)
        if not self.waiting or whole is None:
            return ""
        return f" · about {outcomes.duration(max(whole - (time.monotonic() - self.begun), 1) / self.slots)} left"

    def tick(self) -> None:
        job, done = next(iter(self.waiting.values())), self.count - len(self.waiting)
        elapsed = time.monotonic() - self.begun
        share = min(elapsed / self.times[job.cell.id], 0.98) if self.times.get(job.cell.id) else 0.0
        words = self.left() or f" · {elapsed:.0f} s"
        self.report(terminal.printable(f"{done + 1} of {self.count} · {job.label}{words}"), done * 1000 + int(
            share * 1000), self.count * 1000)
