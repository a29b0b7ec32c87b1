"""Faults of processes, cases 18 to 21: a worker or its client is killed or hangs, and frames that are none."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import hybridlab as hl
from hybridlab import experiment, link, records
from hybridlab.client import Client
from hybridlab.errors import ProtocolError, WorkerDied, WorkerTimeout
from tests.helpers import Bomb

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"arm": "graph", "capture": "sync", "buckets": [16], "max_len": 128, "process": "worker", "device": "cpu"}


def worker_of(runtime: hl.Runtime) -> psutil.Process:
    assert isinstance(runtime._engine, Client)
    return psutil.Process(runtime._engine.link.pid)


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "hybridlab.worker" in child.cmdline()]


def test_case_18_a_killed_worker_fails_the_run_with_its_rows_and_the_next_run_works(tmp_path, monkeypatch):
    """A worker killed amid a run: an error within two seconds, finished rounds kept, a status that says so."""
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setattr(experiment.roofline, "measure", lambda *_: {"read_gbs": 10.0, "matmul_tflops": 0.01})
    config = {"arms": ["eager"], "lengths": [8], "repeats": 10_000, "itl_repeats": 0, "warmup": 1, "new_tokens": 4,
              "device": "cpu", "process": "worker"}
    killed: list[float] = []

    def kill() -> None:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("*/*/parts/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.01)
        killed.append(time.monotonic())
        for worker in workers():
            worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerDied, match="SIGKILL"):
        experiment.run(config, root=tmp_path, progress=False)
    ended = time.monotonic()
    killer.join()
    (path,) = tmp_path.glob("*/*")
    found = records.read(path)
    assert (found.status, found.reason.partition(":")[0]) == ("failed", "WorkerDied")
    assert len(found.rows) >= 1
    assert ended - killed[0] < 2 + 5  # two for the error, the rest to write the manifest on a busy machine
    result = experiment.run(config | {"repeats": 2}, root=tmp_path, progress=False)
    assert result.status == "complete"
    assert result.rows["client_ms"].notna().all()
    assert not workers()


PARENT = """
import sys, time
import hybridlab as hl
model = hl.load("tiny", device="cpu")
runtime = hl.Runtime(model, arm="eager", process="worker", device="cpu", max_len=128)
runtime.generate([5, 6], max_new_tokens=3)
print(runtime._engine.link.pid, flush=True)
for token in runtime.stream([5, 6], max_new_tokens=100, stop=[]):
    time.sleep(1)
"""


def test_case_19_a_worker_is_gone_ten_seconds_after_its_parent(tmp_path):
    """The kernel of a notebook is killed: its worker, shared memory and directories must go with it."""
    before = set(Path("/dev/shm").iterdir())
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=ROOT,
                              env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert "hybridlab.worker" in worker.cmdline()
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
    worker.wait(10)
    assert not worker.is_running()
    assert set(Path("/dev/shm").iterdir()) <= before
    assert not list(tmp_path.glob("hybridlab*"))


@pytest.mark.gpu
def test_case_19_gpu_memory_is_back_after_the_parent(tmp_path):
    """Weights of a worker that nobody can reach any more keep the GPU for whoever comes next. What is free is counted
    of the whole GPU: nothing else may run on it meanwhile."""
    import torch

    code = PARENT.replace('hl.load("tiny", device="cpu")', '"random:tiny-llama-2-7b"').replace('"cpu"', '"cuda"')
    torch.cuda.init()
    before = torch.cuda.mem_get_info()[0]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
    worker.wait(10)
    deadline = time.monotonic() + 10
    while torch.cuda.mem_get_info()[0] < before and time.monotonic() < deadline:
        time.sleep(0.1)  # the driver takes a moment
    assert torch.cuda.mem_get_info()[0] >= before


@pytest.mark.parametrize("device", [{}, pytest.param({"device": "cuda"}, marks=pytest.mark.gpu)])
def test_case_20_a_worker_that_is_stopped_is_ended_and_what_wakes_it_later_does_no_harm(device):
    """A request that waits minutes for a worker which somebody stopped, as a long step may take them; or one that is
    let go on in time and is taken for it."""
    with hl.Runtime("tiny", **SETTINGS | device) as runtime:
        assert runtime._engine.link.step_timeout_s == 120
        runtime.generate([5, 6], max_new_tokens=20, stop=[])
        worker = worker_of(runtime)
        worker.suspend()
        timer = threading.Timer(0.6, worker.resume)
        timer.start()
        assert len(runtime.generate([5, 6], max_new_tokens=20, stop=[]).ids) == 20
        timer.join(60)
        worker.suspend()
        started = time.monotonic()
        with pytest.raises(WorkerTimeout, match=r"did not answer within 2 s .* somebody stopped it"):
            runtime.generate([5, 6], max_new_tokens=20, stop=[])
        assert time.monotonic() - started < 2 + 5  # the rest to end it on a busy machine
        assert not worker.is_running()
        with pytest.raises(psutil.NoSuchProcess):
            worker.resume()
        with pytest.raises(WorkerTimeout):
            runtime.generate([5, 6])


def test_case_21_a_pickle_for_a_frame_is_refused_and_ends_the_worker(tmp_path):
    """A frame that is executed; the other kinds of bad frames are in test_frames and test_link."""
    bomb = pickle.dumps(Bomb(tmp_path / "hit"))
    with hl.Runtime("tiny", **SETTINGS | {"arm": "eager"}) as runtime:
        worker = worker_of(runtime)
        runtime._engine.link._channel.socket.sendall(struct.pack(">I", len(bomb)) + bomb)
        with pytest.raises(ProtocolError, match="cannot be read"):
            runtime.settle()
        assert not worker.is_running()
        with pytest.raises(ProtocolError):
            runtime.generate([5])
    assert not (tmp_path / "hit").exists()


STICKY = """
import sys, torch
from hybridlab import engine, worker
serve = engine.Engine.serve

def broken(self, asked):
    yield next(serve(self, asked))
    if len(asked.ids) == 3:
        torch.zeros(2, device="cuda")[torch.tensor([7], device="cuda")]
        torch.cuda.synchronize()

engine.Engine.serve = broken
sys.exit(worker.main(sys.argv[1:]))
"""


@pytest.mark.gpu
def test_case_18_a_device_that_is_broken_for_good_is_a_death(tmp_path, monkeypatch):
    """After an assertion on the device every later call of the same process fails; only a new process helps."""
    (tmp_path / "sticky.py").write_text(STICKY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(link, "MODULE", "sticky")
    on_gpu = SETTINGS | {"device": "cuda"}
    with hl.Runtime("random:tiny-llama-2-7b", **on_gpu) as runtime:
        expected = runtime.generate([5, 6], max_new_tokens=1, stop=[]).ids
        for _ in range(2):
            with pytest.raises(WorkerDied, match="device-side assert"):
                runtime.generate([5, 6, 7], max_new_tokens=5, stop=[])
    monkeypatch.undo()
    with hl.Runtime("random:tiny-llama-2-7b", **on_gpu) as again:
        assert again.generate([5, 6], max_new_tokens=1, stop=[]).ids == expected
