"""Progress of long work, shown where it is seen: on a terminal, in a notebook, in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
Report = Callable[[str, int, int], None]  # (what, done, total)
EVERY_S = 10.0                            # between two lines of progress in a log; what ends work is always said


@contextlib.contextmanager
def reporter(progress: bool) -> Iterator[Report]:
    """Progress for where it is seen: a bar on a terminal, one line that is replaced in a notebook, else a log."""
    if progress and _in_kernel():
        yield _notebook_line()
    elif progress and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True), transient=True)
        with bar:
            task = bar.add_task("")
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
    else:
        yield _log_line(EVERY_S)


def _in_kernel() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


def _notebook_line() -> Report:
    from IPython.display import display

    handle = display({"text/plain": "starting"}, raw=True, display_id=True)
    return lambda what, done, total: handle.update({"text/plain": what}, raw=True)


def _log_line(every_s: float) -> Report:
    last = [float("-inf")]

    def report(what: str, done: int, total: int) -> None:
        if done >= total or time.monotonic() - last[0] >= every_s:
            last[0] = time.monotonic()
            log.info(what)

    return report
