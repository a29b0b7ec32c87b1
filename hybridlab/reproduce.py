"""The main job: the notebooks one after the other on one model, then the ablation as tables and figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from hybridlab import committed, kernelbench, notebooks, report, soundness, terminal
from hybridlab.config import PAPER_LENGTHS
from hybridlab.errors import ConfigError, NotebookError
from hybridlab.experiment import Result
from hybridlab.paperconfig import PAPER_PARTS
from hybridlab.paperlab import PaperResult
from hybridlab.records import PARTS

ABLATION = "05_ablation"
PAPER = "10_paper"
PATIENCE_S = 30.0  # for the thread that moves the bar
START_S = 20.0  # a kernel, its imports, the model and warming up the arms, on two slow cores
COMPILE_S = 25.0  # what the first notebook that compiles adds; the later ones find most of it on disk


@dataclass(frozen=True)
class Step:
    """One notebook, its parameters, and how long it should take; the last is for the progress bar only."""

    notebook: str
    parameters: dict[str, Any]
    expected_s: float


def steps(model: str, repeats: int, budget_s: float, restarts: int = 1) -> list[Step]:
    """The notebooks. 05 gets the paper's lengths, the budget and the processes that share it; the others explain, so
    they measure briefly.

    08 is left out, and that is said, where the model's step cannot be fused. Raises `ModelError` for an unknown model.
    """
    brief = ("00_start_here", "01_eager", "02_graphs_only", "03_jit_only", "04_hybrid")
    ablation = {"model": model, "lengths": list(PAPER_LENGTHS), "repeats": repeats, "budget_s": budget_s,
                "restarts": restarts, "itl_repeats": min(repeats, 3)}  # 10 lengths of 31 gaps thrice carry a p99
    later = [Step(name, {"model": model, "budget_s": 6.0}, START_S + 3) for name in brief[1:]]
    return [Step(brief[0], {"model": model, "budget_s": 6.0}, START_S + COMPILE_S), *later,
            Step(ABLATION, ablation, restarts * START_S + COMPILE_S + budget_s),
            Step("06_partition", {"model": model, "budget_s": 6.0}, START_S + COMPILE_S),
            Step("07_graph_cache", {"model": model, "budget_s": 15.0}, START_S + COMPILE_S + 15), *_kernels(model),
            Step("09_traces", {"model": model}, START_S + COMPILE_S)]


def paper_steps(model: str, repeats: int, budget_s: float) -> list[Step]:
    """Notebook 10 with the paper's lengths: `repeats` rounds of first tokens, `budget_s` for each of its parts."""
    full = {"model": model, "lengths": list(PAPER_LENGTHS), "generations": list(PAPER_LENGTHS), "repeats": repeats,
            "warmup": 20, "trace_requests": 200, "cost_lengths": [16, 64, 128, 256, 500], "calls": 100,
            "budget_s": budget_s}
    return [Step(PAPER, full, START_S + COMPILE_S + budget_s * len(PAPER_PARTS))]


def paper_shown(run_path: Path, folder: Path, console: Console) -> str:
    """Print the tables and the ledger of a reproduction of the paper and draw its figures into `folder`; where both
    are, in words."""
    result = PaperResult.open(run_path)
    terminal.results([grid.rich() for grid in result.grids()], result.reading())
    with console.status("drawing figures"):
        files = list(committed.draw_paper(result, folder))
    return _where(run_path, folder, files)


def _where(run_path: Path, folder: Path, files: list[Path]) -> str:
    names = ", ".join(sorted({file.stem for file in files if file.suffix == ".svg"}))
    return f"run      {terminal.near(run_path)}\nfigures  {terminal.near(folder)}: {names}"


def _kernels(model: str) -> list[Step]:
    try:
        kernelbench.plan({"model": model})
    except ConfigError as error:
        terminal.err.print(f"08_kernels is left out: {error}", markup=False, highlight=False, soft_wrap=True)
        return []
    return [Step("08_kernels", {"model": model}, START_S + COMPILE_S)]


def run_all(plan: list[Step], folder: Path, console: Console,
            root: Path | None = None) -> dict[str, notebooks.Executed]:
    """Execute every step, with total progress on `console`. Stops at the first notebook that fails.

    Raises: `NotebookError` or `ConfigError` before the first kernel starts if any notebook refuses its parameters;
    `NotebookFailed` from the one that failed. What finished before stays.
    """
    if not folder.is_dir():
        raise NotebookError("the notebooks are not here", f"{folder} is no directory",
                            "run this command inside a checkout of hybridlab")
    for step in plan:
        notebooks.check(folder / f"{step.notebook}.ipynb", step.parameters)
    done: dict[str, notebooks.Executed] = {}
    with _total(plan, console) as following:
        for number, step in enumerate(plan):
            begun = time.monotonic()
            with following(number) as started:
                done[step.notebook] = notebooks.run(folder / f"{step.notebook}.ipynb", step.parameters, root=root,
                                                    progress=False, started=started)
            left = sum(later.expected_s for later in plan[number + 1:])
            console.print(f"[{number + 1}/{len(plan)}] {step.notebook} in {time.monotonic() - begun:.0f} s"
                          + (f", about {_duration(left)} left" if left else ""), markup=False, highlight=False)
    return done


def shown(run_path: Path, folder: Path, console: Console) -> str:
    """Print the ablation's tables and draw its figures into `folder`; where both are, in words."""
    result = Result.open(run_path)
    grids = [*(grid(result) for grid in report.GRIDS.values()),
             *(soundness.GRIDS[name](result.rows, result.caption, result.floors) for name in ("steadiness", "slow"))]
    terminal.results([grid.rich() for grid in grids], result.reading())
    with console.status("drawing figures"):
        files = list(report.draw(result, folder))
    return _where(run_path, folder, files)


def published(run_path: Path, checkout: Path) -> str:
    """Copy the run to the committed ones and redraw their figures; what was done, and what is left to do, in words."""
    target = committed.publish(run_path, checkout)
    files = committed.redraw(checkout)
    name = f"{target.parent.name}/{target.name}"
    return (f"published {target.relative_to(checkout)}, redrew {len(files)} files under figures/\n"
            f"next: name run={name} in a table marker of RESULTS.md, then hybridlab check --write")


@contextmanager
def _total(plan: list[Step], console: Console) -> Iterator[Callable[[int], Any]]:
    """A bar over all steps in expected seconds; yields what follows one step while it runs."""
    total = sum(step.expected_s for step in plan)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
                  TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[left]}"),
                  console=console, transient=True) as bar:
        task = bar.add_task("", total=total, left="")

        @contextmanager
        def follow(number: int) -> Iterator[Callable[[Path], None]]:
            stop, where = threading.Event(), list[Path]()
            watcher = threading.Thread(target=_watch, args=(bar, task, plan, number, stop, where), daemon=True)
            watcher.start()
            try:
                yield where.append
            finally:
                stop.set()
                watcher.join(PATIENCE_S)

        yield follow


def _watch(bar: Progress, task: TaskID, plan: list[Step], number: int, stop: threading.Event,
           where: list[Path]) -> None:
    """Move the bar with the clock, up to what the step should take, and say how many rounds it has recorded."""
    before = sum(step.expected_s for step in plan[:number])
    after = sum(step.expected_s for step in plan[number + 1:])
    step, begun = plan[number], time.monotonic()
    while True:
        elapsed = time.monotonic() - begun
        rounds = len(list((where[0] / PARTS).glob("[0-9]*.parquet"))) if where else 0
        bar.update(task, completed=before + min(elapsed, 0.98 * step.expected_s),
                   description=f"{step.notebook}" + (f" · {rounds} rounds measured" if rounds else ""),
                   left=f"about {_duration(max(step.expected_s - elapsed, 1) + after)} left")
        if stop.wait(0.5):
            return


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
