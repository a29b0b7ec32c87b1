"""Several processes, one run: no round lost or counted twice, and a process that dies is named and not left."""

import json
import signal
import subprocess
import sys

import psutil
import pytest

from hybridlab import children, records, restarts
from hybridlab.config import RunConfig, as_dict
from hybridlab.errors import ConfigError, RunError
from hybridlab.experiment import run

CONFIG = {"arms": ["eager", "graph"], "lengths": [4], "repeats": 3, "itl_repeats": 2, "new_tokens": 3, "warmup": 1,
          "device": "cpu", "restarts": 2}


@pytest.fixture(autouse=True)
def _own_runs(monkeypatch):
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)


def test_two_processes_share_the_rounds_of_one_run(tmp_path):
    """Rounds with one number from two processes would be paired with each other, and a ratio made of strangers."""
    result = run(CONFIG, root=tmp_path, progress=False)
    rows = result.rows
    assert result.status == "complete"
    assert rows.groupby("process")["round"].unique().map(sorted).to_dict() == {0: [0, 1], 1: [2]}
    assert not rows.duplicated(["arm", "round", "prompt_tokens", "metric", "index"]).any()
    assert rows.groupby("request")["process"].nunique().eq(1).all()
    assert rows["request"].nunique() == 3 * 2 + 2 * 2
    assert len(result.recorded.extra["processes"]) == 2
    assert not list(tmp_path.glob("*/*/said"))


def test_the_parts_add_up_to_the_whole():
    """A round that no process was given is a sample less than the table says."""
    whole = RunConfig(repeats=7, itl_repeats=3, restarts=3, budget_s=30)
    shares = restarts.parts(whole)
    assert [part.repeats for part in shares] == [3, 2, 2]
    assert [part.itl_repeats for part in shares] == [1, 1, 1]
    assert sum(part.budget_s for part in shares) == 30
    assert {part.restarts for part in shares} == {1}
    with pytest.raises(ConfigError, match="restarts is 5"):
        run({**CONFIG, "restarts": 5}, progress=False)


def test_a_process_that_fails_is_named_with_its_words(tmp_path, monkeypatch):
    """A run of fewer processes than asked for must not pass as complete, and its cause must not be lost."""
    broken = "import sys; sys.stdin.readline(); sys.exit('no room on device')"
    monkeypatch.setattr(restarts, "Child", lambda command: children.Child([sys.executable, "-c", broken]))
    with pytest.raises(RunError, match=r"process 1 of 2 failed .* no room on device"):
        run(CONFIG, root=tmp_path, progress=False)
    (path,) = tmp_path.glob("*/*")
    assert records.read(path).status == "failed"


def test_a_process_ends_with_its_parent():
    """An orphan would measure on, and disturb whatever is measured next."""
    code = ("import json, time; from hybridlab import children; "
            "print(children.asked(json.loads), flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(json.dumps({"config": as_dict(RunConfig())}).encode() + b"\n")
    child.stdin.flush()
    assert b"config" in child.stdout.readline()
    child.stdin.close()  # as the kernel does when the parent is killed
    assert child.wait(20) == 1
    child.stdout.close()


def test_what_a_process_started_ends_with_its_parent_too():
    """A kernel that a job has started would go on after both, and hold the GPU."""
    code = ("import json, subprocess, sys, time; from hybridlab import children; children.asked(json.loads);"
            "below = [sys.executable, '-c', 'import time; time.sleep(60)'];"
            "print(subprocess.Popen(below, start_new_session=True).pid, flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(b"{}\n")
    child.stdin.flush()
    below = psutil.Process(int(child.stdout.readline()))
    child.stdin.close()
    assert child.wait(20) == 1
    child.stdout.close()
    psutil.wait_procs([below], timeout=20)
    assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE


def test_nothing_is_left_when_the_parent_gives_up():
    """Ctrl-C in the parent must end the process that measures."""
    child = children.Child([sys.executable, "-c", "import time; time.sleep(60)"])
    assert psutil.pid_exists(child.pid)
    with pytest.raises(KeyboardInterrupt), child:
        raise KeyboardInterrupt
    assert child.code == -signal.SIGKILL
