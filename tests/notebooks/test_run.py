"""Running notebooks: real papermill and real kernels, judged by rows and status, never by the text of a cell."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from jupyter_client import AsyncKernelManager

from hybridlab import answers, kernelanswers, notebooks, paperlab, published, records, workload
from hybridlab.config import ARMS
from hybridlab.errors import ConfigError, ModelError, NotebookError, NotebookFailed, PromptError
from hybridlab.ledger import VERDICTS
from hybridlab.paperconfig import PAPER_PARTS
from tests.helpers import alive, wait_for

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Their rows are those of a cache run, of timed kernels, of traces, of a reproduction of the paper.
CACHE, KERNELS, TRACES, PAPER = "07_graph_cache", "08_kernels", "09_traces", "10_paper"
PARAMETERS = 'model = "tiny"  # which model\nrepeats = 3  # rounds\nlengths = [10]  # tokens\n'
ARMS_OF = {"00_start_here": set(ARMS), "01_eager": {"eager"}, "02_graphs_only": {"eager", "graph"},
           "03_jit_only": {"eager", "jit"}, "04_hybrid": {"eager", "hybrid"}, "05_ablation": set(ARMS),
           "06_partition": {"eager", "jit", *(f"{arm} {policy}" for arm in ("graph", "hybrid") for policy in (
               "piecewise", "whole", "full", "outside attention, lm_head"))}}
# Records rows as an experiment does, without a model: joins the run, appends one round, finishes.
RECORD = """
from hybridlab.config import RunConfig, build
from hybridlab.records import Run
run = Run.create(build(RunConfig, {"model": model, "repeats": repeats, "lengths": lengths}))
row = dict(round=0, request=0, arm="eager", policy="whole", prompt_tokens=10, bucket=None, index=0, position=10,
           metric="ttft", ms=1.5, path="eager", reason="", captures=0, compiles=0, process=0, device_ms=None,
           client_ms=None, ended_ns=1, happened="", happened_ms=0.0, profiled=False)
run.append([row])
"""
pytestmark = pytest.mark.filterwarnings(  # of Jupyter's own machinery; ours still count as errors
    "ignore::DeprecationWarning:(zmq|jupyter_client|nbclient|papermill|ipykernel|traitlets|tornado).*",
    "ignore:unclosed:ResourceWarning")


def write(folder: Path, *cells: str, parameters: str | None = PARAMETERS, name: str = "small") -> Path:
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"},
                                                  "language_info": {"name": "python"}})
    if parameters is not None:
        notebook.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def only_run(root: Path) -> Path:
    (config,) = root.glob("*/*/config.json")
    return config.parent


def manifest(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "manifest.json").read_text(encoding="utf-8")))


# ---- refused before a kernel starts --------------------------------------------------------------------------------

@pytest.mark.parametrize(("parameters", "says"), [
    ({"repeat": 5}, "'repeats'"),
    ({"batchsize": 8}, "it takes model, repeats, lengths"),
    ({"new_tokens": 8}, "takes no parameter 'new_tokens'"),
    ({"x=1; import os; print(os.environ); y": 1}, "takes no parameter"),
    ({"class": 1}, "takes no parameter"),
    ({3: 1}, "takes no parameter"),
    ({"n" * 1_000_000: 1}, "takes no parameter"),
    ({"lengths": (10, 50)}, "give a list"),
    ({"lengths": {10}}, "builtins.set"),
    ({"lengths": [10, np.int64(50)]}, "numpy.int64"),
    ({"repeats": np.int64(5)}, "numpy.int64"),
    ({"repeats": Decimal(5)}, "decimal.Decimal"),
    ({"model": Path("/x")}, "Path"),
    ({"model": "\ud800"}, "surrogate"),
    ({"model": {1: "a"}}, "str keys"),
    ({"repeats": float("nan")}, "finite"),
    ({"lengths": [float("inf")]}, "finite"),
    ({"repeats": np.float64(2.0)}, "numpy.float64"),
    ({"repeats": "20"}, "repeats"),
    ({"repeats": True}, "repeats"),
    ({"repeats": 0}, "repeats"),
    ({"lengths": []}, "lengths"),
    ({"lengths": [10, 5000]}, "the context of tiny holds 1024 tokens"),
    ({"model": "random:tiny-lama-2"}, "did you mean 'tiny-llama-2'"),
    ({"model": "./not/there"}, "does not exist"),
], ids=lambda value: None if isinstance(value, str) else next(iter(map(str, value)))[:20])
def test_a_bad_parameter_is_refused_before_anything_is_written(parameters: Any, says: str, tmp_path: Path) -> None:
    """papermill warns about a misspelt name and runs with the default, executes a hostile name, and turns a tuple
    into a string."""
    path = write(tmp_path, "raise SystemExit('a kernel was started')")
    with pytest.raises((NotebookError, ConfigError, PromptError, ModelError)) as caught:
        notebooks.run(path, parameters, root=tmp_path / "runs")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("parameters", "cells", "says"), [
    (None, ["repeats = 3"], "0 cells tagged"),
    ("repeats = 3\nimport os", [], "import os"),
    ("repeats = 1 + len('x')", [], "repeats = 1 + len('x')"),
    ("a, repeats = 1, 2", [], "a, repeats"),
    ("repeats = 3\nbatch = 8", [], "'batch'"),
    ("repeats =", [], "no Python"),
    ("repeats = 3", ["repeats = 9"], "outside its parameters cell"),
    ("repeats = 3", ["for repeats in range(3): pass"], "outside its parameters cell"),
    ("repeats = 0", [], "repeats"),
])
def test_a_notebook_that_would_lose_its_parameters_is_refused(parameters: str | None, cells: list[str], says: str,
                                                              tmp_path: Path) -> None:
    """Without the tag papermill injects at the top, and the notebook's own lines win in silence."""
    path = write(tmp_path, *cells, parameters=parameters)
    with pytest.raises((NotebookError, ConfigError)) as caught:
        notebooks.check(path, {})
    assert says in str(caught.value)


def test_two_parameter_cells_are_refused(tmp_path: Path) -> None:
    """papermill takes the first of two, so a person who edits the second changes nothing."""
    path = write(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("repeats = 9", metadata={"tags": ["parameters"]}))
    nbformat.write(notebook, path)
    with pytest.raises(NotebookError, match="2 cells tagged"):
        notebooks.check(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"cells": 3, "nbformat": 4}', None])
def test_a_file_that_is_no_notebook_is_refused(content: bytes | None, tmp_path: Path) -> None:
    """A traceback of a JSON parser tells a person nothing about which file is wrong."""
    path = tmp_path / "broken.ipynb"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NotebookError, match=r"broken\.ipynb"):
        notebooks.check(path)


def test_a_run_inside_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner notebook would write its rows into the outer run."""
    monkeypatch.setenv(records.RUN_VARIABLE, str(tmp_path))
    with pytest.raises(NotebookError, match="inside another run"):
        notebooks.run(write(tmp_path), root=tmp_path / "runs")


# ---- how it ends ---------------------------------------------------------------------------------------------------

def test_a_complete_run_has_its_parameters_rows_and_notebook(tmp_path: Path) -> None:
    """Values must arrive in the kernel exactly as given, and rows measured there must belong to this run."""
    folder = tmp_path / 'a "quoted" \\ {brace} naïve\nline'
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    name = str(folder)
    path = write(tmp_path, RECORD, "run.finish('complete')", f"assert model == {name!r} and lengths == [7, 9]",
                 "import os; assert os.environ['PLOTLY_RENDERER'] == 'plotly_mimetype+notebook_connected'")
    seen: list[Path] = []
    done = notebooks.run(path, {"model": name, "lengths": [7, 9]}, root=tmp_path / "{runs}", progress=False,
                         started=seen.append)
    assert done.status == "complete"
    assert seen == [done.run_path]
    recorded = records.read(done.run_path)
    assert recorded.status == "complete"
    assert recorded.rows["ms"].tolist() == [1.5]
    assert recorded.config.lengths == (7, 9)
    executed = nbformat.read(done.path, as_version=4)
    assert executed.metadata.hybridlab.status == "complete"
    assert all(cell.execution_count for cell in executed.cells)
    assert not [file for file in done.run_path.rglob("*") if "partial" in file.name]


KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(("cells", "says", "cell"), [
    ([RECORD, "1 / 0", "2"], "ZeroDivisionError: division by zero", 3),
    ([RECORD, KILL, "2"], "the kernel died", 3),
    (["2", "import os; os._exit(0)"], "the kernel died", 3),
    (["import sys; sys.exit()", "2"], "SystemExit", 2),
    (["import sys; sys.exit(0)"], "SystemExit", 2),
    (["import sys; sys.exit(3)", "2"], "SystemExit", 2),
    (["def f(:", "2"], "SyntaxError", 2),
    (["raise ValueError('<img src=x onerror=alert(1)>')"], "ValueError", 2),
], ids=["raises", "killed", "dies in the last cell", "sys.exit", "sys.exit(0) in the last cell", "sys.exit(3)",
        "no Python", "hostile text"])
def test_an_end_that_is_no_end_leaves_a_failed_run_with_its_rows(cells: list[str], says: str, cell: int,
                                                                 tmp_path: Path) -> None:
    """papermill marks all cells completed after a kill, and returns normally from sys.exit()."""
    path = write(tmp_path, *cells)
    with pytest.raises(NotebookFailed) as caught:
        notebooks.run(path, {"repeats": 5}, root=tmp_path / "runs", progress=False)
    run = only_run(tmp_path / "runs")
    assert says in str(caught.value)
    recorded = records.read(run)
    assert recorded.status == "failed"
    assert says in recorded.reason
    assert len(recorded.rows) == (RECORD in cells)
    assert manifest(run)["extra"]["cell"] == cell
    executed = nbformat.read(run / notebooks.EXECUTED, as_version=4)
    assert executed.metadata.hybridlab.status == "failed"
    assert "papermill" not in json.dumps(executed.metadata)
    assert "<img" not in executed.cells[0].source


def test_a_cell_that_takes_too_long_fails_the_run(tmp_path: Path) -> None:
    """Without a limit a hanging cell holds the machine for ever; with one papermill calls the cell completed."""
    path = write(tmp_path, "import threading; threading.Event().wait(3600)", "2")
    with pytest.raises(NotebookFailed, match="longer than 2 s"):
        notebooks.run(path, root=tmp_path / "runs", timeout_s=2, progress=False)
    run = only_run(tmp_path / "runs")
    assert records.read(run).status == "failed"
    assert manifest(run)["extra"]["cell"] == 2


def test_a_failing_cell_after_the_measurement_fails_the_run(tmp_path: Path) -> None:
    """The measurement finished its part; the notebook that belongs to it did not, so nothing may call it complete."""
    with pytest.raises(NotebookFailed, match="AssertionError"):
        notebooks.run(write(tmp_path, RECORD, "run.finish('complete')", "assert False"), root=tmp_path / "runs",
                      progress=False)
    assert records.read(only_run(tmp_path / "runs")).status == "failed"


def test_a_swallowed_failure_of_the_measurement_fails_the_run(tmp_path: Path) -> None:
    """A cell that catches the error of its experiment still has no result to show."""
    with pytest.raises(NotebookFailed, match="captures in a timed request"):
        notebooks.run(write(tmp_path, RECORD, "run.finish('failed', 'captures in a timed request')"),
                      root=tmp_path / "runs", progress=False)
    assert records.read(only_run(tmp_path / "runs")).status == "failed"


def test_a_notebook_that_measures_something_else_fails(tmp_path: Path) -> None:
    """A notebook that reads its parameter and then measures with another value is a wrong experiment."""
    path = write(tmp_path, RECORD.replace('"repeats": repeats', '"repeats": 99'), "run.finish('complete')")
    with pytest.raises(NotebookFailed, match="measured with repeats = 99, not with 4"):
        notebooks.run(path, {"repeats": 4}, root=tmp_path / "runs", progress=False)


def test_an_old_execution_in_the_file_is_no_evidence(tmp_path: Path) -> None:
    """Execution counts and an injected cell saved with the file must not count for this run."""
    path = write(tmp_path, "import sys; sys.exit()", "assert repeats == 3")
    notebook = nbformat.read(path, as_version=4)
    for count, cell in enumerate(notebook.cells, 1):
        cell.execution_count = count
    notebook.cells.insert(1, nbformat.v4.new_code_cell("repeats = 77", metadata={"tags": ["injected-parameters"]}))
    nbformat.write(notebook, path)
    with pytest.raises(NotebookFailed, match="SystemExit"):
        notebooks.run(path, root=tmp_path / "runs", progress=False)


def test_a_second_run_leaves_the_first_alone(tmp_path: Path) -> None:
    """Two papermill runs to one path end with the last writer's file and no word about it."""
    path = write(tmp_path, "x = repeats")
    first, second = (notebooks.run(path, {"repeats": n}, root=tmp_path / "runs", progress=False) for n in (1, 2))
    assert first.run_path != second.run_path
    assert [records.read(done.run_path).config.repeats for done in (first, second)] == [1, 2]


def test_a_full_disk_fails_the_run_and_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """papermill truncates its output in place; the executed notebook of this run must be whole or absent."""
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(notebooks, "atomic_write", full)
    with pytest.raises(NotebookFailed, match="No space left"):
        notebooks.run(write(tmp_path, "x = 1"), root=tmp_path / "runs", progress=False)
    run = only_run(tmp_path / "runs")
    assert records.read(run).status == "failed"
    assert not (run / notebooks.EXECUTED).exists()


def test_an_interrupt_leaves_a_verdict_and_no_kernel(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a cell: the run must say failed, and the kernel must not keep the machine busy."""
    marker = tmp_path / "kernel.pid"
    wait = f"import os, threading; open({str(marker)!r}, 'w').write(str(os.getpid())); threading.Event().wait(3600)"
    path = write(tmp_path, wait)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would inherit "ignore"
    runner = subprocess.Popen([sys.executable, "-m", "hybridlab", "run", str(path), "--runs",
                               str(tmp_path / "runs")], cwd=FOLDER.parent, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    wait_for(lambda: marker.exists() and marker.read_text())
    runner.send_signal(signal.SIGINT)
    _, said = runner.communicate(timeout=60)
    assert runner.returncode == 130, said
    assert records.read(only_run(tmp_path / "runs")).status == "failed"
    wait_for(lambda: not alive(int(marker.read_text())))


# ---- the notebooks themselves ---------------------------------------------------------------------------------------

# What a fresh kernel would do before a cell: nothing of another notebook stays but imports, which `hl.NAME` makes by
# itself, compiled kernels, and the rates of this machine, which take seconds to measure.
FRESH = """
get_ipython().reset()
import functools, os
from hybridlab import roofline
os.environ.update({variables!r})
os.chdir({folder!r})
if not hasattr(roofline.measure, "cache_info"):
    roofline.measure = functools.cache(roofline.measure)
del functools, os, roofline
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, dict[str, Any]]]:
    """The process of one kernel, and how to reach it, for notebooks of which each would import, compile and measure the
    same for half a minute. Those written above start their own."""
    with notebooks._kernel_manager(tmp_path_factory.mktemp("kernel"), ()) as own:
        manager = own()
        asyncio.run(manager.start_kernel())
        yield manager.provisioner.pid, manager.get_connection_info()
        asyncio.run(manager.shutdown_kernel(now=True))


@pytest.fixture
def shared(kernel: tuple[int, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `notebooks.run` find that kernel where it would start one."""
    pid, connection = kernel

    @contextmanager
    def manager(run_path: Path, held: tuple[int, ...]) -> Iterator[type[AsyncKernelManager]]:
        variables = {records.RUN_VARIABLE: str(run_path)}

        class Shared(AsyncKernelManager):
            async def start_kernel(self, **_: Any) -> None:
                self.load_connection_info(connection)
                client = self.client()
                client.start_channels()
                await client.wait_for_ready(60)
                code = FRESH.format(variables=variables, folder=str(Path.cwd()))
                done = await client.execute_interactive(code, timeout=60)
                client.stop_channels()
                assert done["content"]["status"] == "ok", done

            async def _async_is_alive(self) -> bool:  # asked by clients, for which a dead kernel must not be slow
                return alive(pid)

            is_alive = _async_is_alive

            async def shutdown_kernel(self, **_: Any) -> None:
                pass

            cleanup_resources = shutdown_kernel

        yield Shared

    monkeypatch.setattr(notebooks, "_kernel_manager", manager)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in (CACHE, KERNELS, TRACES, PAPER)],
                         ids=lambda path: path.stem)
@pytest.mark.usefixtures("shared")
def test_each_notebook_runs_and_records_what_it_says(path: Path, tmp_path: Path) -> None:
    """A notebook that drifts from the package fails for the reader; here it fails first."""
    small = {"lengths": [3, 9], "new_tokens": 4, "repeats": 1, "itl_repeats": 1, "warmup": 1, "budget_s": 5.0,
             "device": "cpu"}
    done = notebooks.run(path, small, root=tmp_path / "runs", progress=False)
    recorded = records.read(done.run_path)
    assert recorded.status == "complete"
    arms = ARMS_OF.get(path.stem, set(recorded.config.arms))
    rows = recorded.rows
    assert set(rows["arm"]) == arms
    assert len(rows) == len(arms) * 2 * (1 + 3)  # lengths x (one first token + the gaps of one request)
    assert set(rows["prompt_tokens"]) == {3, 9}
    assert not rows[["captures", "compiles"]].to_numpy().any()
    for arm, path_of_arm in {"eager": "eager", "hybrid": "graph"}.items():
        assert set(rows.loc[rows["arm"] == arm, "path"]) <= {path_of_arm}
    require_figures(done.path)
    assert {"roofline", "during", "counters"} <= set(recorded.extra)
    if "result.floors" in path.read_text(encoding="utf-8"):
        drawn = [str(figure["data"]["application/vnd.plotly.v1+json"]) for figure in figures_of(done.path)]
        assert any("limit (" in text for text in drawn)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_the_cache_notebook_runs_and_answers_from_its_rows(tmp_path: Path) -> None:
    """A question that is posed and answered with "not in these rows" would leave the reader with nothing."""
    workload.write(tmp_path / "short.csv", [workload.Asked(length, 3) for length in (5, 40, 5, 60, 9, 33) * 2])
    small = {"trace": str(tmp_path / "short.csv"), "requests": 12, "cost_lengths": [9], "cost_repeats": 1,
             "compare": [{"capture": "never"}, {"capture": "async"}], "disturb": ["cooperative"], "disturb_captures": 1,
             "device": "cpu"}
    done = notebooks.run(FOLDER / f"{CACHE}.ipynb", small, root=tmp_path / "runs", progress=False)
    recorded = records.read(done.run_path)
    assert recorded.status == "complete"
    first = recorded.rows[(recorded.rows["part"] == "stream") & (recorded.rows["metric"] == "ttft")]
    assert first.groupby("setting").size().to_dict() == {"capture=async": 12, "capture=never": 12}
    assert set(first.loc[first["setting"] == "capture=never", "path"]) == {"jit"}
    assert set(recorded.rows["part"]) == {"stream", "cost", "disturb"}
    assert not answers.table(recorded.rows)["answer"].str.startswith("Not in these rows").any()
    require_figures(done.path)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_the_kernel_notebook_runs_and_answers_from_its_rows(tmp_path: Path) -> None:
    """An answer "not in these rows" to a question that the notebook poses would leave the reader with nothing."""
    small = {"lengths": [1, 20], "variants": ["torch", "kernel"], "repeats": 6, "device": "cpu"}
    done = notebooks.run(FOLDER / f"{KERNELS}.ipynb", small, root=tmp_path / "runs", progress=False)
    recorded = records.read(done.run_path)
    assert (recorded.status, recorded.kind, recorded.config.lengths) == ("complete", "kernels", (1, 20))
    steps = recorded.rows[recorded.rows["metric"] == "step"]
    assert steps.groupby(["context", "variant"]).size().to_dict() == {
        (context, name): 6 for context in (1, 20) for name in ("torch", "fused", "fused, no graph")}
    said = [answer(recorded.rows) for answer in (kernelanswers.what_fusion_buys, kernelanswers.what_the_graph_buys,
                                                 kernelanswers.where_the_time_goes)]
    assert not any("in these rows" in answer for answer in said)
    assert "cannot start a kernel early" in kernelanswers.what_pdl_buys(recorded.rows)
    require_figures(done.path)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_the_paper_notebook_runs_and_judges_every_claim(tmp_path: Path) -> None:
    """A reproduction without one of its parts, or whose ledger shows claims and no verdicts."""
    parts = [part for part in PAPER_PARTS if part not in ("protocol", "capture")]  # these: test_paperlab
    small = {"model": "tiny", "parts": parts, "lengths": [5, 10], "generations": [4], "repeats": 1, "warmup": 1,
             "trace_requests": 2, "cost_lengths": [16], "budget_s": 0.1, "device": "cpu"}  # all of one bucket
    done = notebooks.run(FOLDER / f"{PAPER}.ipynb", small, root=tmp_path / "runs", progress=False)
    result = paperlab.PaperResult.open(done.run_path)
    assert (result.status, result.config.model, result.config.lengths) == ("complete", "tiny", (5, 10))
    assert set(result.rows["part"]) == set(result.config.parts) == set(parts)
    assert set(result.rows.loc[result.rows["part"] == "ipc", "arm"]) == {"here", "worker", "worker / here"}
    assert result.lacks() == []
    said = said_in(done.path)
    assert result.reading().splitlines()[0] in said
    ledger = cells_of(said[said.index("Claims · run"):])
    assert [row[0] for row in ledger] == [claim.words for claim in published.claims()]
    assert [row[2] for row in ledger] == [entry.verdict for entry in result.ledger()]
    assert {row[2] for row in ledger} <= set(VERDICTS)
    require_figures(done.path)


def said_in(path: Path) -> str:
    """All text that the cells of an executed notebook put out, without colours."""
    said = (str(output.get("data", {}).get("text/plain", output.get("text", "")))
            for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ()))
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(said))


def cells_of(text: str) -> list[list[str]]:
    """The rows of the first table in a text that has lines between them; words of a cell joined by blanks."""
    rows, lines = [], list[list[str]]()
    for line in text.splitlines():
        if line.startswith("│"):
            lines.append([cell.strip() for cell in line[1:-1].split("│")])
        elif line.startswith(("├", "└")):
            rows.append([" ".join(filter(None, cell)) for cell in zip(*lines, strict=True)])
            lines = []
        if line.startswith("└"):
            break
    return rows


def figures_of(path: Path) -> list[Any]:
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())
            if "application/vnd.plotly.v1+json" in output.get("data", ())]


def require_figures(path: Path) -> None:
    figures = figures_of(path)
    assert figures
    assert all("text/html" in figure["data"] for figure in figures), "it would vanish from an HTML export"


@pytest.mark.usefixtures("shared")
def test_the_trace_notebook_shows_each_arm(tmp_path: Path) -> None:
    """Notebook 09 records events and no latencies: an arm that it lost would leave one without an explanation."""
    small = {"arms": ["eager", "graph"], "length": 5, "traced_tokens": 3, "warmup": 1}
    done = notebooks.run(FOLDER / f"{TRACES}.ipynb", small, root=tmp_path / "runs", progress=False)
    found = records.read(done.run_path)
    assert (found.kind, found.status) == ("trace", "complete")
    ranges = found.rows[found.rows["kind"] == "range"]
    assert ranges.groupby("arm")["category"].value_counts().unstack()["decode"].to_dict() == {"eager": 2, "graph": 2}
