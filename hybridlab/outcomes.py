"""A sweep as tables: what is planned, and what came of it, with headline numbers of each cell over its runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from hybridlab import finished, records, stats, store
from hybridlab.errors import RunError
from hybridlab.finished import Entry
from hybridlab.report import NONE, Grid, interval
from hybridlab.sweeps import Cell, Job, Sweep

NOTE = ("Medians over all prompt lengths. Of one run with its 95 % interval; of several the median of theirs, with its "
        f"95 % interval from {stats.needed(0.5)} runs on, else with the ends of their intervals.")


def duration(seconds: float) -> str:
    """A time to wait, roughly."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else (
        f"{seconds / 3600:.1f} h")


def left(todo: Iterable[Job], times: Mapping[str, float]) -> float | None:
    """The seconds that these jobs should take one after the other, by the times of their cells; a cell without one
    counts as the mean of the others. None if no cell has one."""
    mean = statistics.fmean(times.values()) if times else None
    return None if mean is None else sum(times.get(job.cell.id, mean) for job in todo)


def plan(sweep: Sweep, found: Mapping[str, list[Entry]]) -> tuple[Grid, str]:
    """Every job in its order with its state, and in words how many are to run and how long that should take."""
    every, times, rows = sweep.jobs(), finished.expected(found), []
    for number, job in enumerate(every, 1):
        done, tried, time = finished.done(found, job), found.get(job.id, []), times.get(job.cell.id)
        state = f"complete: {done.path.name}" if done else (
            f"again: {tried[-1].path.name} is {tried[-1].status}" if tried else "to run")
        rows.append([job.cell.label, str(job.repeat), str(number), state, NONE if time is None else duration(time)])
    todo = [job for job in every if finished.done(found, job) is None]
    time = left(todo, times)
    words = f"{len(every)} jobs, {len(every) - len(todo)} complete, {len(todo)} to run"
    words += (", nothing is left to do" if not todo else f", about {duration(time)}" if time is not None else
              "; how long they take is known when the first is done")
    return Grid(f"Sweep {sweep.name} · {sweep.notebook.name}", ["cell", "repeat", "order", "state", "takes"], rows,
                "Expected times are medians of complete runs of the same cell."), words


def summary(sweep: Sweep, found: Mapping[str, list[Entry]], across: Sequence[str]) -> Grid:
    """One row a cell and arm: how many of its runs are complete, medians with intervals, and the runs.

    Raises: RunError where the runs differ in machine or versions and `across` does not name it.
    """
    complete = {cell.id: [entry for repeat in range(1, sweep.repeats + 1)
                          if (entry := finished.done(found, Job(cell, repeat)))] for cell in sweep.cells}
    counted = [entry.path for own in complete.values() for entry in own]
    store.require_same({path.name: finished.facts(path) for path in counted}, across)
    lines = [line for cell in sweep.cells for line in _lines(cell, complete[cell.id], sweep.repeats)]
    metrics = list(dict.fromkeys(metric for _, _, numbers, _ in lines for metric in numbers))
    rows = [[label, what, *(numbers.get(metric, NONE) for metric in metrics), ids]
            for label, what, numbers, ids in lines]
    return Grid(f"Sweep {sweep.name} · {sweep.notebook.name}", ["cell", "", *metrics, "complete runs"], rows, NOTE)


def _lines(cell: Cell, complete: list[Entry], repeats: int) -> list[tuple[str, str, dict[str, str], str]]:
    """Label, what, metrics as text, and the runs; these are named in the first line of a cell."""
    ids = f"{len(complete)} of {repeats}" + "".join(f"\n{entry.path.name}" for entry in complete)
    if not complete:
        return [(cell.label, "", {}, ids)]
    try:
        tables = [store.headlines(records.read(entry.path)) for entry in complete]
    except RunError as error:  # after hours of work: said in the table
        return [(cell.label, str(error), {}, ids)]
    together = pd.concat([table.assign(run=number) for number, table in enumerate(tables)])
    found: dict[str, dict[str, str]] = {}
    for (what, metric), own in together.groupby(["what", "metric"]):
        samples = [values for _, values in own.groupby("run")["value"]]
        found.setdefault(str(what), {})[str(metric)] = interval(pooled(samples), "p50")
    return [(cell.label, what, numbers, "" if number else ids) for number, (what, numbers) in enumerate(found.items())]


def pooled(samples: Sequence[Any]) -> dict[str, float | None]:
    """The median of several runs as p50, p50_low, p50_high. Runs are what repeats: from as many runs on as an interval
    of a median needs, theirs counts alone; with fewer, the interval holds that of every run. None: too few values."""
    medians = [float(pd.Series(values).median()) for values in samples]
    if len(medians) >= stats.needed(0.5):
        return store.estimated("p50", medians)
    each = [store.estimated("p50", values) for values in samples]
    ends = [(one["p50_low"], one["p50_high"]) for one in each]
    known = [(low, high) for low, high in ends if low is not None and high is not None]
    whole = len(known) == len(ends)
    return {"p50": statistics.median(medians), "p50_low": min(low for low, _ in known) if whole else None,
            "p50_high": max(high for _, high in known) if whole else None}
