"""A client and a worker without a model: each way in which a worker can end is an error in time, and stays one."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hybridlab import link, tails
from hybridlab.client import Client
from hybridlab.config import RuntimeConfig, Sampling
from hybridlab.errors import (
    ConfigError,
    EngineBusy,
    NonFinite,
    ProtocolError,
    RuntimeClosed,
    WorkerDied,
    WorkerTimeout,
)
from hybridlab.frames import Build, Echo, Seal, Serve
from hybridlab.handover import SLOTS
from tests.helpers import Bomb

TESTS = Path(__file__).resolve().parents[1]
KILL, LOOP, STOP, STICKY, MEMORY, NAN, EXIT, OVERWRITE, RING, GARBAGE, LONG, SHORT, COUNT, WAY, SLOW = range(1, 16)
COLLECT, LISTEN = 16, 17


def asked(first: int, count: int = 10) -> SimpleNamespace:
    return SimpleNamespace(ids=[first, 5], max_new_tokens=count, sampling=Sampling(), stop=frozenset())


def ids(client: Client, first: int, count: int = 10, got: list[int] | None = None) -> list[int]:
    got = [] if got is None else got
    got.extend(step.id for step, _ in client.serve(asked(first, count)))
    return got


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Client]]:
    """Starts a worker without a model; all of them are ended, and nothing of any is left."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    monkeypatch.setattr(link, "MODULE", "hosted")
    made = []

    def make(step_timeout_s: float = 60.0, name: str = "x", **more: float) -> Client:
        config = RuntimeConfig(process="worker", step_timeout_s=step_timeout_s, **more)
        made.append(Client(config, lambda: Build(model="x", name=name, config=config)))
        return made[-1]

    before = descriptors()
    yield make
    for client in made:
        client.close()
        assert not psutil.pid_exists(client.link.pid)
    made.clear()
    assert descriptors() == before


def descriptors() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_tokens_counters_and_answers_arrive(start):
    """A face that is not an engine's: ids, ways, times and counters are those that the other side gave."""
    client = start()
    assert (client.device, client.dtype, client.max_len, client.fused) == ("cpu", "float32", 10_000, False)
    steps = list(client.serve(asked(100, 2 * SLOTS + 9)))
    assert [step.id for step, _ in steps] == list(range(100, 100 + 2 * SLOTS + 9))
    assert [step.reason for step, _ in steps] == [f"replayed {i // 100}" for i in range(len(steps))]
    assert {(step.path, ms) for step, ms in steps} == {("graph", 0.5)}
    assert client.device_ms(3) == [0.25] * 3
    assert len(client.client_ms) == len(client.handover_ms) == len(steps)
    assert all(ms > 0 for ms in client.client_ms)
    assert client.counters.replays == len(steps)
    client.prepare([1, 2], Sampling())
    assert client.counters.captures == 2
    client.seal(True)
    assert client.counters.failures == 1
    client.settle()
    client.echo()
    with pytest.raises(ConfigError, match="no such length"):
        client.prepare([666], Sampling())
    assert ids(client, 100, 1) == [100]


def test_a_request_says_what_happened_in_the_worker_and_when(start):
    """A stall of the worker under `unexplained`, laid to another token, or by a clock that the client does not have;
    times under a profiler of the worker that pass for latencies."""
    client, before = start(), time.perf_counter_ns()
    assert ids(client, COLLECT, 6) == list(range(COLLECT, COLLECT + 6))
    seen = client.seen
    assert before < seen.ended_ns[0]
    assert seen.ended_ns == sorted(seen.ended_ns)
    assert seen.ended_ns[-1] < time.perf_counter_ns()
    (one,) = (found for found in seen.happenings if found.kind == "garbage collection")
    assert seen.ended_ns[2] < one.start_ns < one.end_ns < seen.ended_ns[3]
    gaps = [(later - sooner) / 1e6 for sooner, later in itertools.pairwise(seen.ended_ns)]
    told = tails.during(gaps, seen.ended_ns[1:], [one])
    assert [number for number, (words, _) in enumerate(told, 1) if words] == [3]
    assert not seen.profiled
    ids(client, LISTEN, 6)
    assert client.seen.profiled
    assert not any(found.kind == "garbage collection" for found in client.seen.happenings)
    assert len(client.seen.ended_ns) == 6


def test_an_abandoned_request_leaves_nothing_to_the_next(start):
    """A token of one request that is given for another's; a worker that waits for ever for room in the ring."""
    client = start()
    for count in (10, 20 * SLOTS):  # the second fills the ring
        request = client.serve(asked(100, count))
        assert next(request)[0].id == 100
        with pytest.raises(EngineBusy):
            next(client.serve(asked(1)))
        with pytest.raises(EngineBusy):
            client.echo()
        request.close()
        assert ids(client, 200, 5) == list(range(200, 205))
        assert len(client.client_ms) == 5


def test_an_error_of_a_request_comes_after_its_tokens(start):
    """An error that swallows tokens which were there, or one that ends a worker which could go on."""
    client, got = start(), []
    with pytest.raises(NonFinite) as found:
        ids(client, NAN, got=got)
    assert got == [NAN, NAN + 1, NAN + 2]
    assert (found.value.fact, found.value.context, found.value.remedy) == ("the logits hold NaN", "here", "look")
    assert ids(client, 100, 2) == [100, 101]


@pytest.mark.parametrize(("what", "error", "message"), [
    (KILL, WorkerDied, r"exit code -9 \(SIGKILL\)"),
    (STICKY, WorkerDied, "RuntimeError: CUDA error: an illegal memory access"),
    (MEMORY, WorkerDied, "MemoryError: out of memory"),
    (EXIT, WorkerDied, r"exit code 3: last words \| the very last"),
    (OVERWRITE, ProtocolError, "not in its place"),
    (RING, ProtocolError, "not in its place"),
    (GARBAGE, ProtocolError, "cannot be read"),
    (LONG, ProtocolError, "announced"),
    (COUNT, ProtocolError, "77 tokens were announced"),
    (WAY, ProtocolError, "way 12 is not known"),
])
def test_a_worker_that_ends_or_lies_is_an_error_in_time_and_stays_one(start, what, error, message):
    """A client that hangs, or goes on with a worker that is gone or not to be trusted."""
    client, got = start(), []
    with pytest.raises(error, match=message) as first:
        ids(client, what, got=got)
    assert got[:3] == [what, what + 1, what + 2]
    assert not psutil.pid_exists(client.link.pid)
    for call in (client.echo, client.settle, lambda: next(client.serve(asked(100))), lambda: client.seal(True)):
        with pytest.raises(error) as again:
            call()
        assert str(again.value) == str(first.value)
    client.seal(False)  # as the end of `sealed` does, which must not hide the error
    assert client.counters.replays >= 3
    client.close()
    with pytest.raises(RuntimeClosed):
        client.echo()


def test_death_is_noticed_within_two_seconds(start):
    """A notebook that waits for a token from a process that is no more."""
    client = start()
    request = client.serve(asked(SLOW, 10_000 - 2))
    assert next(request)[0].id == SLOW
    killed = time.monotonic()
    os.kill(client.link.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        list(request)
    assert time.monotonic() - killed < 2


@pytest.mark.parametrize("what", [LOOP, STOP, SHORT])
def test_a_worker_that_hangs_is_ended_by_its_deadline(start, what):
    """A wait without end: for a loop, for a process that is stopped, for the rest of a frame."""
    client = start(step_timeout_s=1.0)
    started = time.monotonic()
    with pytest.raises(WorkerTimeout, match="within 1 s") as first:
        ids(client, what)
    assert 1 <= time.monotonic() - started < 5
    assert not psutil.pid_exists(client.link.pid)
    with pytest.raises(WorkerTimeout) as again:
        client.echo()
    assert str(again.value) == str(first.value)


def test_a_deadline_is_for_one_token_and_not_for_a_request(start):
    """A long answer taken for a hang, or a consumer that takes its time."""
    client = start(step_timeout_s=1.5)
    request = client.serve(asked(SLOW, 5))
    assert [next(request)[0].id for _ in range(3)] == [SLOW, SLOW + 1, SLOW + 2]
    assert [step.id for step, _ in request] == [SLOW + 3, SLOW + 4]
    assert client.client_ms[3] > 900


def test_an_interrupted_wait_leaves_nothing_to_the_next_order(start, monkeypatch):
    """Ctrl-C while an answer is awaited: that answer must not be taken for the next one's."""
    client = start()
    poll, interrupted = client.link._poll, []

    def once(*arguments):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return poll.poll(*arguments)

    monkeypatch.setattr(client.link, "_poll", SimpleNamespace(poll=once))
    with pytest.raises(KeyboardInterrupt):
        client.prepare([7, 8], Sampling())
    assert ids(client, 100, 3) == [100, 101, 102]
    interrupted.clear()
    with pytest.raises(KeyboardInterrupt):
        ids(client, 200, 3)
    assert ids(client, 300, 2) == [300, 301]
    assert client.counters.captures == 2


@pytest.mark.parametrize(("name", "error", "message"), [
    ("refused", ConfigError, "no such model · anywhere · give another"), ("broken", WorkerDied, "OSError: no device")])
def test_a_worker_that_cannot_build_is_gone(start, name, error, message):
    """A process that stays behind a constructor which failed; nothing to close it with is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(error, match=message):
        start(name=name)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_closing_is_bounded_and_may_be_done_twice(start, monkeypatch):
    """A worker that is stopped and cannot leave must not keep whoever closes it."""
    monkeypatch.setattr(link, "LEAVE_S", 0.3)
    client = start()
    os.kill(client.link.pid, signal.SIGSTOP)
    started = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(client.link.pid)


def test_a_closed_client_ends_its_streams(start):
    """A stream that goes on over memory which is gone."""
    client = start()
    request = client.serve(asked(100))
    next(request)
    client.close()
    assert not psutil.pid_exists(client.link.pid)
    with pytest.raises(RuntimeClosed):
        next(request)
    assert client.counters.replays > 0


def test_a_client_that_is_dropped_ends_its_worker(start, monkeypatch):
    """A runtime that a notebook's next cell replaces would keep its GPU memory."""
    config = RuntimeConfig(process="worker")
    client = Client(config, lambda: Build(model="x", name="x", config=config))
    pid = client.link.pid
    del client
    gc.collect()
    assert not psutil.pid_exists(pid)


def test_a_worker_outlives_the_thread_that_started_it(start):
    """The kernel takes the end of a thread for the end of a parent, if it is asked for the latter."""
    made: list[Client] = []
    thread = threading.Thread(target=lambda: made.append(start()))
    thread.start()
    thread.join()
    assert ids(made[0], 100, 2) == [100, 101]


PARENT = """
import os, signal, sys, time
from hybridlab import link, tails
from hybridlab.client import Client
from hybridlab.config import RuntimeConfig
from hybridlab.frames import Build
link.MODULE, config = "hosted", RuntimeConfig(process="worker")
os.mkdir(sys.argv[1])
client = Client(config, lambda: Build(model="x", name="x", config=config), sys.argv[1])
if sys.argv[2] == "stopped":
    os.kill(client.link.pid, signal.SIGSTOP)
print(client.link.pid, os.path.exists(sys.argv[1]), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("worker", ["idle", "stopped"])
def test_a_worker_ends_with_its_parent(tmp_path, worker):
    """An orphan keeps its GPU memory; one that is stopped cannot even notice."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "model"), worker], stdout=subprocess.PIPE,
                              cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"})
    try:
        pid, there = parent.stdout.readline().split()
        assert there == b"False"  # the directory of the model is gone as soon as it is loaded
        child = psutil.Process(int(pid))
    finally:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
    child.wait(10)
    assert not child.is_running()


def test_a_worker_that_never_built_removes_what_was_meant_for_it(tmp_path, monkeypatch):
    """A copy of a model's weights left in the temporary directory by a notebook that was killed in between."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"x")
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    monkeypatch.setattr(link, "MODULE", "hosted")
    started = link.Link(str(folder), 60.0)
    started._child._process.stdin.close()  # as the kernel does when the parent is killed
    assert not started._child.running(10)
    assert not folder.exists()
    started._child._process.stdin = None
    started.close()


@pytest.mark.parametrize("what", ["no msgpack", "pickle", "long", "out of vocabulary", "too many tokens",
                                  "Build twice"])
def test_a_bad_order_ends_the_worker_and_does_nothing(start, tmp_path, what):
    """A worker that carries out half an order, or one whose sender cannot be its client."""
    client = start()
    serve = {"number": 1, "sampling": Sampling(), "stop": frozenset()}
    data = {"no msgpack": b"\0\0\0\1\xc1", "long": struct.pack(">I", 2**31)}
    data["pickle"] = (lambda bomb: struct.pack(">I", len(bomb)) + bomb)(pickle.dumps(Bomb(tmp_path / "hit")))
    orders = {"out of vocabulary": Serve(ids=[1000], max_new_tokens=1, **serve),
              "too many tokens": Serve(ids=[1], max_new_tokens=10_000, **serve),
              "Build twice": Build(model="x", name="x", config=RuntimeConfig())}
    if what in data:
        client.link._channel.socket.sendall(data[what])
    else:
        client.link._channel.send(orders[what])
    for order in (Echo(), Seal(closed=True)):
        with pytest.raises(ProtocolError):
            client.link.ask(order, 10, "")
    assert not psutil.pid_exists(client.link.pid)
    assert not (tmp_path / "hit").exists()
    assert (client.counters.replays, client.counters.failures) == (0, 0)
