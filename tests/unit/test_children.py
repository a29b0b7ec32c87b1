"""A process of our own code: what it inherits, that nobody waits for it without end, and that it never stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hybridlab import children, paths
from hybridlab.children import Child

DEAF = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_it_ends_with_its_parent_while_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of PyTorch takes seconds, in which an orphan would go on to take the GPU."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "slow.py").write_text("import os, time\nos.write(1, str(os.getpgrp()).encode())\ntime.sleep(60)\n")
    with (tmp_path / "told").open("w+b") as told, Child(children.tied("slow"), stdout=told) as child:
        deadline = time.monotonic() + 60
        while not (tmp_path / "told").read_bytes():
            assert child.running(0.05)
            assert time.monotonic() < deadline
        assert int((tmp_path / "told").read_bytes()) == child.pid  # a group of its own
        child._process.stdin.close()  # as the kernel does when the parent is killed
        assert not child.running(20)
        assert child.code == -signal.SIGKILL
        assert child.words == ""


def test_a_module_runs_as_python_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments that are shifted by one, or a module that does not take itself for the program."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "shown.py").write_text("import sys\nif __name__ == '__main__':\n    sys.exit(' '.join(sys.argv[1:]))\n")
    with Child(children.tied("shown", "a", 2)) as child:
        assert not child.running(60)
    assert child.words == "exit code 1: a 2"


def test_it_belongs_to_no_run_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process started inside a notebook's run would write its rows into it."""
    monkeypatch.setenv(paths.RUN_VARIABLE, "/a/run")
    code = "import os, sys, hybridlab; sys.exit(' '.join(str(os.environ.get(name)) for name in sys.argv[1:]))"
    with Child([sys.executable, "-c", code, paths.RUN_VARIABLE, "MORE"], environment={"MORE": "x"}) as child:
        assert not child.running(60)
    assert child.words == "exit code 1: None x"


def test_one_that_does_not_listen_is_not_waited_for() -> None:
    """A question longer than a pipe holds, and a process that hangs before it reads it."""
    with Child(DEAF) as child, pytest.raises(TimeoutError):
        child.tell(b"x" * 2**22, 0.2)
    assert child.code == -signal.SIGKILL


def test_a_further_line_is_waited_for_and_no_longer() -> None:
    """A process that goes on before it is told, or waits for one that will never tell it."""
    code = ("from hybridlab import children\nchildren.asked(str)\n"
            "print(children.told(0.05), flush=True)\nprint(children.told(60), flush=True)\nprint(children.told(60))")
    with Child([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        child.tell(b"first")
        assert child.stdout.readline() == b"False\n"
        child.tell(b"")
        assert child.stdout.readline() == b"True\n"
        child.tell(b"")
        assert child.stdout.readline() == b"True\n"
    child.tell(b"")


def test_one_that_is_gone_is_told_without_harm() -> None:
    """A broken pipe in the place of the last words that say why it went."""
    with Child([sys.executable, "-c", "import sys; sys.exit('no room on device')"]) as child:
        assert not child.running(60)
        child.tell(b"{}")
        assert child.leave(0) == "exit code 1: no room on device"


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    """Workers of a compiler that outlive the process that started them."""
    code = "import subprocess, os\nos.write(1, str(subprocess.Popen(['sleep', '60']).pid).encode() + b'\\n')"
    with (tmp_path / "told").open("w+b") as told, Child([sys.executable, "-c", code], stdout=told) as child:
        assert not child.running(60)
        below = psutil.Process(int((tmp_path / "told").read_bytes()))
    psutil.wait_procs([below], timeout=20)
    assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE


def test_one_that_does_not_start_leaves_no_file() -> None:
    """A file that stays open for each process that could not be started."""
    before = psutil.Process().num_fds()
    with pytest.raises(FileNotFoundError):
        Child(["/nowhere/python"])
    assert psutil.Process().num_fds() == before
