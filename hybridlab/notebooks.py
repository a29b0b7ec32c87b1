"""Run a notebook with checked parameters in its own kernel, keep the executed copy, and tell how it really ended."""

from __future__ import annotations

import html
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

from hybridlab import paths
from hybridlab.config import as_dict
from hybridlab.errors import NotebookError, NotebookFailed
from hybridlab.files import atomic_write
from hybridlab.manifests import MANIFEST
from hybridlab.parameters import Experiment, code_cells, defaults, read_notebook, settings
from hybridlab.records import RUN_VARIABLE, Run

if TYPE_CHECKING:
    from jupyter_client import AsyncKernelManager

EXECUTED = "notebook.ipynb"
PARTIAL = ".notebook.partial.ipynb"  # what papermill truncates and rewrites while it works
# Both kinds of output, so that a figure shows in JupyterLab and survives `nbconvert --to html`.
RENDERER = "plotly_mimetype+notebook_connected"


@dataclass(frozen=True)
class Executed:
    """A notebook that ran to its end: the executed copy, the run it belongs to, and the status in its manifest."""

    path: Path
    run_path: Path
    status: str


@dataclass(frozen=True)
class Failure:
    """Why a notebook did not finish, and in which code cell (counted from 1; None: in none of them)."""

    reason: str
    cell: int | None


def check(path: str | Path, parameters: Mapping[str, Any] | None = None) -> Experiment:
    """The settings that a run of this notebook with these parameters would have. Starts no kernel.

    Raises: `NotebookError` for a notebook that cannot be run or a parameter that it does not take or whose value
    would not survive the trip into a kernel; `ConfigError` for a value that the config class refuses.
    """
    return settings(read_notebook(Path(path)), Path(path).name, dict(parameters or {}))


def run(path: str | Path, parameters: Mapping[str, Any] | None = None, *, root: str | Path | None = None,
        timeout_s: float = 1800, progress: bool = True, started: Callable[[Path], None] | None = None,
        held: tuple[int, ...] = ()) -> Executed:
    """Execute the notebook with papermill in a fresh run directory and write that run's manifest.

    `timeout_s` bounds one cell. `started` is called with the run directory before the kernel starts, which inherits the
    open files `held`. The run is complete only if every code cell was executed, none failed, and the recorded settings
    hold the parameters.

    Raises: as `check`, before anything is written; `NotebookFailed` after the run was recorded as failed.
    """
    path, parameters = Path(path), dict(parameters or {})
    if RUN_VARIABLE in os.environ:
        raise NotebookError(f"{path.name} cannot start inside another run", f"{RUN_VARIABLE} is set",
                            f"unset {RUN_VARIABLE}; each notebook records a run of its own")
    notebook = read_notebook(path)
    config = settings(notebook, path.name, parameters)
    target = Run.create(config, Path(root) if root is not None else None)
    if started is not None:
        started(target.path)
    try:
        failure = _execute(notebook, path, parameters, target.path, timeout_s, progress, held)
        failure = failure or _disagreement(config, target.path, set(defaults(notebook, path.name)))
    except BaseException as error:  # Ctrl-C above all: the run must not stay without a verdict
        _settle(target, notebook, path, parameters, Failure(f"interrupted by {type(error).__name__}", None))
        raise
    failure = _settle(target, notebook, path, parameters, failure)
    if failure is not None:
        where = f"code cell {failure.cell}, " if failure.cell else ""
        raise NotebookFailed(f"{path.name} failed: {failure.reason}", f"{where}run {target.path}",
                             f"open {EXECUTED} there; what was measured until then is kept")
    return Executed(target.path / EXECUTED, target.path, "complete")


def _execute(notebook: nbformat.NotebookNode, path: Path, parameters: dict[str, Any], run_path: Path,
             timeout_s: float, progress: bool, held: tuple[int, ...]) -> Failure | None:
    """Run all cells; on return `notebook` holds what was executed so far. None: every cell ran and none failed."""
    import papermill

    partial = run_path / PARTIAL
    reason = None
    try:
        with _kernel_manager(run_path, held) as manager:
            papermill.execute_notebook(
                nbformat.from_dict(notebook), str(partial).replace("{", "{{").replace("}", "}}"), parameters=parameters,
                kernel_name="python3", language="python", progress_bar={"desc": path.stem} if progress else False,
                log_output=False, cwd=path.resolve().parent, execution_timeout=max(1, math.ceil(timeout_s)),
                kernel_manager_class=manager, store_widget_state=False)
    except Exception as error:  # whatever it is, the run failed; its kind decides only the wording
        reason = _wording(error, timeout_s)
    finally:
        if partial.exists():
            try:
                notebook.update(nbformat.read(partial, as_version=4))
            except ValueError:
                reason = reason or "the executed notebook could not be read back"
            partial.unlink()
    return _verdict(notebook, reason)


def _wording(error: Exception, timeout_s: float) -> str:
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, CellTimeoutError):
        return f"the cell ran longer than {timeout_s:g} s"
    if isinstance(error, DeadKernelError):
        return "the kernel died (killed, out of memory, or crashed)"
    if isinstance(error, PapermillExecutionError):
        return f"{error.ename}: {error.evalue}"[:1000]
    return f"{type(error).__name__}: {error}"[:1000]


def _verdict(notebook: nbformat.NotebookNode, reason: str | None) -> Failure | None:
    """Judge by the kernel's reply to each cell: papermill's own status says completed after a kill or a timeout."""
    cells = code_cells(notebook)
    open_ = [number for number, cell in enumerate(cells, 1) if not _replied(cell)]
    for number, cell in enumerate(cells, 1):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors:
            return Failure(reason or f"{errors[0].ename}: {errors[0].evalue}"[:1000], _own_number(cells, number))
    first = _own_number(cells, open_[0]) if open_ else None
    if reason is not None:
        return Failure(reason, first)
    return Failure("the notebook ended before all cells were executed", first) if open_ else None


def _replied(cell: nbformat.NotebookNode) -> bool:
    return cell.execution_count is not None and "shell.execute_reply" in cell.metadata.get("execution", {})


def _own_number(cells: list[nbformat.NotebookNode], number: int) -> int:
    """The number of a cell as its author counts: without the cell that papermill injected."""
    return number - sum("injected-parameters" in cell.metadata.get("tags", ()) for cell in cells[:number - 1])


@contextmanager
def _kernel_manager(run_path: Path, held: tuple[int, ...]) -> Iterator[type[AsyncKernelManager]]:
    """A kernel of this interpreter, importing this hybridlab, reached over sockets in a private directory."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                      language="python", display_name="Python 3")
    environment = paths.importing() | {RUN_VARIABLE: str(run_path.resolve()), "PLOTLY_RENDERER": RENDERER}
    with tempfile.TemporaryDirectory(prefix="hybridlab-", ignore_cleanup_errors=True) as private:
        class OwnKernel(AsyncKernelManager):
            def __init__(self, **settings: Any) -> None:
                place = {"transport": "ipc", "connection_file": f"{private}/kernel.json"} if os.name == "posix" else {}
                super().__init__(**settings, **place)
                self._kernel_spec = spec

            async def start_kernel(self, **settings: Any) -> None:
                await super().start_kernel(**settings, env=environment, **({"pass_fds": held} if held else {}))

        yield OwnKernel


def _disagreement(config: Experiment, run_path: Path, taken: set[str]) -> Failure | None:
    """A failure if the settings that the notebook really measured with differ from its parameters."""
    recorded = json.loads((run_path / "config.json").read_text(encoding="utf-8"))
    for name, asked in as_dict(config).items():
        if name in taken and name in recorded and recorded[name] != json.loads(json.dumps(asked)):
            return Failure(f"the notebook measured with {name} = {recorded[name]!r}, not with {asked!r}", None)
    return None


def _settle(target: Run, notebook: nbformat.NotebookNode, path: Path, parameters: dict[str, Any],
            failure: Failure | None) -> Failure | None:
    """Save the executed notebook, then write the manifest, which is the only proof of how the run ended."""
    stamp = {"notebook": path.name, "status": "complete" if failure is None else "failed",
             "reason": failure.reason if failure else "", "cell": failure.cell if failure else None,
             "parameters": parameters}
    try:
        _stamp(notebook, stamp)
        atomic_write(target.path / EXECUTED, nbformat.writes(notebook))
    except OSError as error:
        failure = failure or Failure(f"the executed notebook could not be saved: {error}", None)
    details = {"notebook": path.name, "cell": failure.cell if failure else None, "parameters": parameters}
    recorded = target.finish("failed" if failure else "complete", failure.reason if failure else "", details)
    if failure is None and recorded != "complete":  # the measurement failed and a cell kept that to itself
        failure = Failure(str(json.loads((target.path / MANIFEST).read_text(encoding="utf-8"))["reason"]), None)
    return failure


def _stamp(notebook: nbformat.NotebookNode, stamp: dict[str, Any]) -> None:
    notebook.metadata["hybridlab"] = stamp
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)  # it holds paths of this machine and a status that may be untrue
    marker = "papermill-error-cell-tag"
    notebook.cells = [cell for cell in notebook.cells if marker not in cell.metadata.get("tags", ())]
    if stamp["status"] == "failed":
        where = f" in code cell {stamp['cell']}" if stamp["cell"] else ""
        text = f"**This run failed{where}.**\n\n<pre>{html.escape(stamp['reason'])}</pre>"
        tags = {"tags": ["hybridlab-failed"]}
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(text, id="failed", metadata=tags))
