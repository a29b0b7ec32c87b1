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

# Without a deadline each of these waits for ever: for a thread, a process, a queue, a lock, a future.
WAITS = {"wait", "join", "get", "communicate", "acquire", "result", "recv", "recv_bytes", "accept"}
ALWAYS = {"subprocess": {"run", "call", "check_call", "check_output", "getoutput"}, "ray": {"get", "wait"}}
LOCKS = {"flock", "lockf"}  # of a file
DEADLINES, AT_ONCE = {"timeout", "timeout_s"}, {"blocking", "block"}

ALLOWED = {
    ("behind.py", "self._orders.get()"): "the capture thread waits for work; it is a daemon, and whoever waits for it "
                                         "does so with a deadline",
    ("lowering.py", "_BOUND.get()"): "a context variable",
    ("kernels/ahead.py", "_READ.get()"): "a context variable",
    ("kernels/ahead.py", "_ASKER.get()"): "a context variable",
    ("kernels/ahead.py", "done.result()"): "kernels are compiled, for which their first launch would wait as long",
    ("frames.py", "receive(timeout_s=None)"): "a worker waits for its client's next order; it ends with its client",
    ("frames.py", "send(timeout_s=None)"): "a worker's answer, which its client may leave unread; it ends with it",
}


def endless(source: str) -> Iterator[str]:
    """Each call that may wait for ever, and each function that does unless it is told otherwise, as source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield from (f"{node.name}({argument.arg}=None)" for argument, value in defaults(node.args)
                        if argument.arg in DEADLINES and is_(value, None))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and waits(
                node, node.func.attr, ast.unparse(node.func.value)):
            yield ast.unparse(node)


def waits(node: ast.Call, name: str, owner: str) -> bool:
    bounded = any((keyword.arg in DEADLINES and not is_(keyword.value, None))
                  or (keyword.arg in AT_ONCE and not is_(keyword.value, True)) for keyword in node.keywords)
    if name in LOCKS:
        return not any(flag in ast.unparse(node) for flag in ("LOCK_NB", "LOCK_UN"))
    if (owner, name) == ("select", "select"):
        return len(node.args) < 4
    if name in ALWAYS.get(owner, ()) or (name == "communicate" and len(node.args) < 2):
        return not bounded
    if name not in WAITS or bounded or not node.args:
        return name in WAITS and not bounded
    first, *more = node.args  # a deadline, or whether to wait at all and then a deadline
    return is_(first, None) or (is_(first, True) and (not more or is_(more[0], None)))


def is_(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def defaults(arguments: ast.arguments) -> Iterator[tuple[ast.arg, ast.AST]]:
    plain = [*arguments.posonlyargs, *arguments.args]
    yield from zip(plain[len(plain) - len(arguments.defaults):], arguments.defaults, strict=True)
    yield from ((argument, value) for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
                if value is not None)


def test_every_wait_has_a_deadline() -> None:
    """A thread, a process or a queue that never answers, and a caller that waits for it as long as it lives."""
    found = {(path.relative_to(PACKAGE).as_posix(), call) for path in sorted(PACKAGE.rglob("*.py"))
             for call in endless(path.read_text())}
    assert found == set(ALLOWED)


@pytest.mark.parametrize("source", [
    "child.wait()", "thread.join()", "queue.get()", "child.communicate()", "child.communicate(input=b'')",
    "lock.acquire()", "future.result()", "pipe.recv()", "subprocess.run(['ls'])",
    "subprocess.run(['ls'], check=True)", "event.wait(None)", "thread.join(None)", "queue.get(timeout=None)",
    "queue.get(True)", "queue.get(block=True)", "lock.acquire(True)", "lock.acquire(blocking=True, timeout=None)",
    "child.communicate(b'')", "queue.get(True, None)", "fcntl.flock(file, fcntl.LOCK_EX)",
    "fcntl.lockf(file, fcntl.LOCK_SH)", "select.select([a], [], [])", "ray.get(x)", "ray.wait([x])",
    "subprocess.run(['ls'], timeout=None)", "def wait(self, timeout_s: float | None = None): pass",
    "def f(*, timeout=None): pass",
])
def test_an_endless_wait_is_seen(source: str) -> None:
    """The check above passing because it sees nothing."""
    assert list(endless(source))


def test_a_wait_with_a_deadline_passes() -> None:
    """The check refusing what it asks for, or text that is joined and a table that is looked up."""
    assert not list(endless("child.wait(3)\nt.join(timeout=3)\n', '.join(x)\nd.get('k')\nq.get(timeout=1)\n"
                            "lock.acquire(blocking=False)\nsubprocess.run(['ls'], timeout=3)\nq.get_nowait()\n"
                            "lock.acquire(False)\nq.get(True, 3)\ne.wait(left)\nray.get(x, timeout=3)\n"
                            "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\nselect.select([a], [], [], 3)\n"
                            "child.communicate(b'', 3)\ndef f(timeout_s=3.0): pass"))


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
    (thread,) = (each for each in threading.enumerate() if each.name == "hybridlab-capture")
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
