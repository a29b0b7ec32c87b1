"""Nothing hangs: every wait in the package has a deadline, or stands here with the reason why it cannot last."""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridlab import graphs
from hybridlab.behind import OnThread
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed

PACKAGE = Path(__file__).resolve().parents[2] / "hybridlab"

# Called without an argument, each of these waits for ever: a thread, a process, a queue, a lock, a future.
WAITS = {"wait", "join", "get", "communicate", "acquire", "result", "recv", "recv_bytes", "accept"}
RUNS = {"run", "call", "check_call", "check_output", "getoutput"}  # of subprocess
DEADLINES = {"timeout", "timeout_s", "blocking", "block"}

ALLOWED = {
    ("behind.py", "self._orders.get()"): "the capture thread waits for work; it is a daemon, and whoever waits for it "
                                         "does so with a deadline",
    ("lowering.py", "_BOUND.get()"): "a context variable",
}


def endless(source: str) -> Iterator[str]:
    """Each call that may wait for ever, as source."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        bounded = bool({keyword.arg for keyword in node.keywords} & DEADLINES)
        name, owner = node.func.attr, ast.unparse(node.func.value)
        if (name in WAITS and not node.args and not bounded) or (
                owner == "subprocess" and name in RUNS and not bounded):
            yield ast.unparse(node)


def test_every_wait_has_a_deadline() -> None:
    """A thread, a process or a queue that never answers, and a caller that waits for it as long as it lives."""
    found = {(path.relative_to(PACKAGE).as_posix(), call) for path in sorted(PACKAGE.rglob("*.py"))
             for call in endless(path.read_text())}
    assert found == set(ALLOWED)


@pytest.mark.parametrize("source", [
    "child.wait()", "thread.join()", "queue.get()", "child.communicate()", "child.communicate(input=b'')",
    "lock.acquire()", "future.result()", "subprocess.run(['ls'])", "subprocess.run(['ls'], check=True)", "pipe.recv()",
])
def test_an_endless_wait_is_seen(source: str) -> None:
    """The check above passing because it sees nothing."""
    assert list(endless(source))


def test_a_wait_with_a_deadline_passes() -> None:
    """The check refusing what it asks for, or text that is joined and a table that is looked up."""
    assert not list(endless("child.wait(3)\nt.join(timeout=3)\n', '.join(x)\nd.get('k')\nq.get(timeout=1)\n"
                            "lock.acquire(blocking=False)\nsubprocess.run(['ls'], timeout=3)\nq.get_nowait()"))


def job(key: str) -> Job:
    out = torch.zeros(3)
    return Job(key, lambda: out.add_(1), [out], state=[out])


def test_a_capture_that_hangs_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture on the thread that never ends, and with it `settle`, `close` and the end of the program."""
    monkeypatch.setattr("hybridlab.behind.PATIENCE_S", 0.2)
    cache, free = GraphCache(torch.device("cpu"), Counters()), threading.Event()
    monkeypatch.setattr(cache, "record", lambda job: free.wait(60))
    way = OnThread(cache)
    way.ask(job("a"))
    with pytest.raises(CaptureFailed, match="does not end"):
        way.settle()
    thread = way._thread
    way.close()
    assert way.busy is False
    free.set()
    thread.join(60)


def test_a_turn_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that waits for another thread's, which hangs."""
    monkeypatch.setattr(graphs, "PATIENCE_S", 0.1)
    held, over = threading.Event(), threading.Event()

    def other() -> None:
        with graphs._turn():
            held.set()
            over.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(60)
    with pytest.raises(CaptureFailed, match="another capture of this process does not end"), graphs._turn():
        pytest.fail("two captures at once")
    over.set()
    thread.join(60)
    with graphs._turn():
        pass  # it was given back
