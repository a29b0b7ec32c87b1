"""Sweeps of real processes and kernels: killed at any moment and started again, and the same jobs on a Ray cluster."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import pytest

from hybridlab import finished, jobs, records, store, sweeps
from tests.helpers import alive, wait_for

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 'model = "tiny"\nrepeats = 3\nlengths = [10]\ndevice = "auto"\n'
# Records rows as an experiment does, without a model, and when and with which GPU it did.
RECORD = """
import os, time
from hybridlab.config import RunConfig, build
from hybridlab.records import Run
begun = time.time_ns()
run = Run.create(build(RunConfig, {"model": model, "repeats": repeats, "lengths": lengths, "device": device}))
row = dict(round=0, request=0, arm="eager", policy="whole", prompt_tokens=10, bucket=None, index=0, position=10,
           metric="ttft", ms=1.5, path="eager", reason=os.environ.get("CUDA_VISIBLE_DEVICES", ""), captures=0,
           compiles=0, process=0, device_ms=None, client_ms=None, ended_ns=begun, happened="", happened_ms=0.0,
           profiled=False)
run.append([row])
run.append([row | {"round": 1, "ended_ns": time.time_ns()}])
"""
FINISH = "run.finish('complete')"
WAIT = "import pathlib, threading; pathlib.Path('kernel').write_text(str(os.getpid())); threading.Event().wait(3600)"
SWEEP = "notebook: small.ipynb\nrepeats: 2\nseed: 3\nmatrix: {repeats: [1, 2]}\n"
# What such a notebook needs of neither: torch takes seconds to import, and so does a grammar that jsonschema can do
# without. Without them a test of processes is a test of processes.
SLOW = ("torch", "rfc3987_syntax")


def write(folder: Path, *cells: str, sweep: str = SWEEP) -> Path:
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"},
                                                  "language_info": {"name": "python"}})
    notebook.cells.append(nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}))
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(notebook, folder / "small.ipynb")
    (folder / "s.yaml").write_text(sweep)
    return folder / "s.yaml"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `hybridlab sweep` on the sweep in `tmp_path`; what still runs at the end of the test is killed."""
    absent, begun = tmp_path / "absent", list[subprocess.Popen[str]]()
    absent.mkdir()
    for name in SLOW:
        (absent / f"{name}.py").write_text("raise ImportError('kept out of this test')\n")
    environment = {name: value for name, value in os.environ.items() if name != records.RUN_VARIABLE}

    def sweep(*more: str, **variables: str) -> subprocess.Popen[str]:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would inherit "ignore"
        command = [sys.executable, "-m", "hybridlab", "sweep", str(tmp_path / "s.yaml"), "--runs",
                   str(tmp_path / "runs"), *more]
        begun.append(subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{absent}", "COLUMNS": "200"} | variables))
        signal.signal(signal.SIGINT, before)
        return begun[-1]

    yield sweep
    for process in begun:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def complete(root: Path) -> Counter[str]:
    """How many complete runs each job has."""
    found = Counter[str]()
    for path in root.glob("*/*"):
        if records.read(path).status == "complete" if (path / "config.json").exists() else False:
            found[json.loads((path / finished.JOB).read_text())["job"]] += 1
    return found


MOMENTS = ("*", "*/*/config.json", "*/*/job.json", "*/*/parts", "*/*/rows.parquet", "*/*/notebook.ipynb",
           "*/*/manifest.json")  # what a run leaves, in the order in which it does


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_is_completed_by_starting_it_again(
        tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """A run that is lost leaves a hole in the table; one that is doubled weighs its cell twice. Each start is killed
    soon after the next run has left something new, at moments drawn from a seed."""
    file, root = write(tmp_path, RECORD, FINISH), tmp_path / "runs"
    wanted, chance, killed = {job.id for job in sweeps.read(file).jobs()}, random.Random(11), 0
    for moment in ("*/*/manifest.json", *chance.sample(MOMENTS, 2)):
        before, process = set(root.glob(moment)), start()
        wait_for(lambda process=process, moment=moment, before=before:
                 process.poll() is not None or set(root.glob(moment)) - before or (moment == "*" and before))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, 0.4))
        killed += process.poll() is None
        process.kill()
        process.communicate()
        assert max(complete(root).values(), default=0) <= 1
    assert killed >= 2, "hardly anything was killed"
    last = start()
    said = last.communicate(timeout=240)[0]
    assert last.returncode == 0, said
    assert "4 jobs, 4 complete, 0 to run" in said
    assert complete(root) == Counter(dict.fromkeys(wanted, 1))
    table = store.runs(root)
    assert set(table["status"]) <= {"complete", "incomplete", "failed"}
    assert (table["status"] == "complete").sum() == 4
    assert set(table.loc[table["status"] == "complete", "rows"]) == {2}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "job_too", "code", "status"), [
    (signal.SIGKILL, False, -signal.SIGKILL, "incomplete"), (signal.SIGKILL, True, -signal.SIGKILL, "incomplete"),
    (signal.SIGINT, False, 130, "failed")], ids=["killed", "killed with its job", "interrupted"])
def test_a_sweep_takes_its_job_and_kernel_along(how: signal.Signals, job_too: bool, code: int, status: str,
                                                tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """A kernel that outlives its sweep measures on beside the next one, on the same cores and the same GPU."""
    write(tmp_path, RECORD, WAIT, FINISH)
    process, kernel = start(), tmp_path / "kernel"
    wait_for(lambda: process.poll() is not None or (kernel.exists() and kernel.read_text()))
    pid = int(kernel.read_text())
    with (tmp_path / "runs" / jobs.LOCK).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    job = psutil.Process(pid).parent()
    process.send_signal(how)
    if job_too:
        assert job is not None
        job.kill()
    assert process.wait(60) == code, process.communicate()[0]
    with jobs.alone(tmp_path / "runs"):  # what the next sweep waits for
        assert not alive(pid)
    assert store.runs(tmp_path / "runs")["status"].tolist() == [status]


# ---- Ray -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def ray_cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of one node that says it has one GPU, on a loopback address, as a person starts one: its address and
    the variables of who may use it."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'hybridlab[cluster]'")
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        address = f"127.0.0.2:{free.getsockname()[1]}"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard", "false",
               "--node-ip-address", "127.0.0.2", "--port", address.rpartition(":")[2], "--num-cpus", "2", "--num-gpus",
               "1", "--temp-dir", f"/tmp/ray-{secrets.token_hex(4)}"]  # the path of a socket must be short
    said = tmp_path / "ray.txt"
    with said.open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                env=os.environ | secret | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'absent'}"})
    try:
        wait_for(lambda: head.poll() is not None or "ray stop" in said.read_text())
        assert head.poll() is None, said.read_text()
        yield address, secret
    finally:
        below = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(command[-1], ignore_errors=True)


@pytest.mark.slow
def test_jobs_run_on_a_ray_cluster_one_a_gpu_and_join_the_same_store(
        tmp_path: Path, start: Callable[..., subprocess.Popen[str]], ray_cluster: tuple[str, dict[str, str]]) -> None:
    """Two timings on one GPU stretch each other; a run that stays on its node is lost with it."""
    file = write(tmp_path, RECORD, "assert repeats != 2, 'no room'", FINISH, sweep=SWEEP.replace("repeats: 2\n", ""))
    address, secret = ray_cluster
    first = start("--cluster", address, **secret)
    said = first.communicate(timeout=240)[0]
    assert first.returncode == 1, said
    assert "2 jobs, 1 complete, 1 to run" in said
    assert "no room" in said
    found = [records.read(path) for path in (tmp_path / "runs").glob("*/*")]
    assert sorted(run.status for run in found) == ["complete", "failed"]
    assert {tuple(run.rows["reason"]) for run in found} == {("0", "0")}, "each had the one GPU"
    spans = sorted((run.rows["ended_ns"].min(), run.rows["ended_ns"].max()) for run in found)
    assert spans[0][1] < spans[1][0], "they ran side by side"
    assert complete(tmp_path / "runs") == {job.id: 1 for job in sweeps.read(file).jobs() if job.cell.values != {
        "repeats": 2}}


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_refused(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """A wrong address must say so before a job starts, and not look like a job that failed."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'hybridlab[cluster]'")
    write(tmp_path, RECORD, FINISH)
    done = start("--cluster", "nowhere:at:all")
    said = done.communicate(timeout=120)[0]
    assert done.returncode == 2, said
    assert "there is no Ray cluster at 'nowhere:at:all'" in said
    assert list((tmp_path / "runs").glob("*/*")) == []
