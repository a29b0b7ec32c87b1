"""Captures behind requests: tokens never change, requests never wait for a failure, and the cache learns the result."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import hybridlab as hl
from hybridlab.behind import WAYS, AfterRequest, Cooperative
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureClosed

BEHIND = tuple(WAYS)
BUCKETS = [8, 16, 24, 32, 48]
NEW = 12
every = pytest.mark.parametrize("behind", BEHIND)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("random:tiny-llama-3", device="cpu")


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel) -> dict[int, list[int]]:
    with hl.Runtime(model, arm="eager", max_len=64) as eager:
        return {n: eager.generate(prompt(n), max_new_tokens=NEW, stop=[]).ids for n in range(1, 49)}


def prompt(length: int) -> list[int]:
    return torch.randint(2, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def runtime(model: PreTrainedModel, **settings: Any) -> hl.Runtime:
    return hl.Runtime(model, **{"arm": "graph", "max_len": 64, "buckets": BUCKETS, **settings})


@pytest.mark.parametrize(("policy", "run_ahead"), [("whole", 0), ("full", 2), ("piecewise", 0)])
@every
def test_tokens_stay_equal_while_graphs_come_and_go(model: PreTrainedModel, reference: dict[int, list[int]],
                                                    behind: str, policy: str, run_ahead: int) -> None:
    """A capture, an insertion or an eviction that changes a token of the request it stays behind."""
    draw, paths = random.Random(0), set()
    with runtime(model, behind=behind, policy=policy, run_ahead=run_ahead, cache_graphs=3) as rt:
        for _ in range(60):
            length = draw.randint(1, 48)
            out = rt.generate(prompt(length), max_new_tokens=NEW, stop=[])
            assert out.ids == reference[length], length
            paths |= set(out.paths)
        rt.settle()
        counters = rt.counters
        assert paths == {"graph", "eager"}
        assert counters.evictions > 5
        assert not rt._executor.graphs.failed
        assert counters.graphs == 3
        assert counters.captures == counters.evictions + counters.graphs
        assert counters.hits + counters.misses == 60 * NEW + counters.discarded


@pytest.mark.slow
@pytest.mark.parametrize("admission", ["every", "pays"])
@every
def test_a_thousand_steps_with_captures_behind(model: PreTrainedModel, reference: dict[int, list[int]],
                                               behind: str, admission: str) -> None:
    """A race that a short test does not meet: 100 requests of 12 tokens, two graphs of room, streams left early."""
    draw = random.Random(1)
    with runtime(model, arm="hybrid", max_len=96, buckets=[32, 48], behind=behind, cache_graphs=2,
                 admission=admission) as rt:
        rt.warm_up([32, 48])
        for number in range(100):
            length = draw.randint(1, 48)
            if number % 7:
                assert rt.generate(prompt(length), max_new_tokens=NEW, stop=[]).ids == reference[length]
            else:
                stream = rt.stream(prompt(length), max_new_tokens=NEW, stop=[])
                assert [next(stream).id for _ in range(3)] == reference[length][:3]
                stream.close()
        rt.settle()
        assert rt.counters.evictions > 5 or admission == "pays"  # times decide what pays
        assert rt.counters.failures == 0
        assert not rt.capturing


@every
def test_a_miss_is_served_at_once_and_becomes_a_hit(model: PreTrainedModel, behind: str) -> None:
    """A miss that waits for its capture, a capture that is never asked for, or one that is asked for twice."""
    with runtime(model, behind=behind) as rt:
        assert set(rt.generate(prompt(8), max_new_tokens=1, stop=[]).paths) == {"eager"}
        rt.generate(prompt(8), max_new_tokens=3, stop=[])
        rt.settle()
        assert not rt.capturing
        assert rt.counters.captures == 2
        assert set(rt.generate(prompt(7), max_new_tokens=9, stop=[]).paths) == {"graph"}
        assert rt.counters.captures == 2


def test_the_thread_captures_beside_the_request(model: PreTrainedModel) -> None:
    """A background thread in name only: the capture has to run on it, and enter the cache on the owner's."""
    threads: list[str] = []
    with runtime(model, behind="thread") as rt:
        record, adopt = rt._executor.graphs.record, rt._executor.graphs.adopt
        rt._executor.graphs.record = lambda job: threads.append(threading.current_thread().name) or record(job)
        rt._executor.graphs.adopt = lambda *made: threads.append(threading.current_thread().name) or adopt(*made)
        rt.generate(prompt(8), max_new_tokens=1, stop=[])
        rt.settle()
    assert threads == ["hybridlab-capture", threading.main_thread().name]


def test_slices_end_where_the_token_is_there() -> None:
    """A capture that runs through although the host has nothing to wait for, or that changes what it is behind."""
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).requires_grad_(False)
    x, out, ran = torch.randn(2, 4), torch.zeros(2, 4), []
    layers.register_forward_hook(lambda *_: ran.append(len(ran)))
    cache = GraphCache(torch.device("cpu"), Counters())
    way = Cooperative(cache)
    way.ask(Job("key", lambda: out.copy_(layers(x)), [x, out]))
    steps = 0
    while way.busy:
        torch.set_grad_enabled(steps % 2 == 0)
        way.step(lambda: False)
        assert torch.is_grad_enabled() == (steps % 2 == 0)
        assert torch.ones(2).add(1).tolist() == [2, 2]  # recorded by nobody
        steps += 1
    torch.set_grad_enabled(True)
    assert steps == 7  # up to the first module, then a module each, then the rest
    assert "key" in cache
    assert out.eq(0).all()
    with cache.lease("key") as replay:
        replay()
    assert torch.equal(out, layers(x))


def test_a_runtime_may_close_in_the_middle_of_a_capture(model: PreTrainedModel) -> None:
    """A coroutine or a thread left with a capture open, and a hook on every module of the process."""
    for behind in BEHIND:
        rt = runtime(model, behind=behind)
        stream = rt.stream(prompt(8), max_new_tokens=9, stop=[])
        for _ in range(3):
            next(stream)
        assert rt.capturing or behind == "thread"  # which may be done by now
        rt.close()
        assert rt.counters.graphs == 0
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert "hybridlab-capture" not in {thread.name for thread in threading.enumerate()}
    assert torch.ones(1).requires_grad_().mul(2).requires_grad


@every
def test_what_cannot_be_captured_is_asked_for_once(model: PreTrainedModel, reference: dict[int, list[int]],
                                                   behind: str) -> None:
    """A capture that fails behind every request, or a request that fails with it."""
    with runtime(model, behind=behind) as rt:
        program, inside = rt._executor.program("prefill", 8), rt._executor._inside

        def reads_back(phase: str, which: Any, controls: Any) -> None:
            inside(phase, which, controls)
            if which is program:
                assert which.inputs.last.item() >= 0

        rt._executor._inside = reads_back
        for _ in range(3):
            out = rt.generate(prompt(7), max_new_tokens=NEW, stop=[])
            assert out.ids == reference[7]
            rt.settle()
        assert "reads a value back" in out.reasons[0]
        assert out.paths == ["eager"] + ["graph"] * (NEW - 1)
        assert (rt.counters.failures, rt.counters.captures) == (1, 1)


@pytest.fixture
def disturbed() -> tuple[GraphCache, Job]:
    """A cache and a job that fails the first time that it is recorded, as when somebody disturbs the capture."""
    cache, out = GraphCache(torch.device("cpu"), Counters()), torch.zeros(4)
    runs = iter([True, False, False])

    def step() -> None:
        out.add_(1)
        if next(runs):
            out.sum().item()

    return cache, Job("key", step, [out], state=[out])


AT_EXIT = """
import atexit, threading
captured = threading.Event()
atexit.register(lambda: print(captured.is_set(), "hybridlab-capture" in map(lambda t: t.name, threading.enumerate())))
import torch
from hybridlab.behind import OnThread
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
cache, over, x = GraphCache(torch.device("cpu"), Counters()), threading.Event(), torch.zeros(3)
cache.record = lambda job: over.wait(60) and captured.set()
way = OnThread(cache)
way.ask(Job("key", x.zero_, [x], state=[x]))
atexit.register(over.set)
"""


def test_a_process_ends_after_a_capture_that_is_under_way() -> None:
    """A script that closes nothing and is ended by a signal: a thread of Python's was stopped inside of CUDA."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "False"]), done.stdout + done.stderr


@every
def test_a_disturbed_capture_is_tried_again(disturbed: tuple[GraphCache, Job], behind: str) -> None:
    """A length never captured because somebody synchronised the device at the wrong moment."""
    cache, job = disturbed
    way = WAYS[behind](cache)
    way.ask(job)
    way.settle()
    way.close()
    assert "key" in cache
    assert (cache.counters.captures, cache.counters.failures) == (1, 0)


def test_a_sealed_runtime_captures_nothing(model: PreTrainedModel) -> None:
    """A capture inside a timed region."""
    with runtime(model, capture="sync") as rt:
        rt.warm_up([8])
        with rt.sealed():
            assert set(rt.generate(prompt(8), max_new_tokens=3, stop=[]).paths) == {"graph"}
            with pytest.raises(CaptureClosed, match="prefill"):
                rt.generate(prompt(9), max_new_tokens=3, stop=[])
        assert rt.generate(prompt(9), max_new_tokens=1, stop=[]).paths == ["graph"]


def test_asking_twice_captures_once() -> None:
    """Two graphs of one key, one of them held by nobody."""
    cache, out = GraphCache(torch.device("cpu"), Counters()), torch.zeros(4)
    way = AfterRequest(cache)
    for _ in range(2):
        way.ask(Job("key", lambda: out.add_(1), [out], state=[out]))
    way.idle()
    assert cache.counters.captures == 1
    assert out.eq(0).all()


def test_admission_learns_from_what_was_served(model: PreTrainedModel) -> None:
    """A length captured at its first miss although captures are known to cost more than they save, or never."""
    with runtime(model, capture="sync", admission="pays") as rt:
        admission = rt._executor.lookup.admission
        for _ in range(2):
            rt.generate(prompt(8), max_new_tokens=2, stop=[])
        assert rt.counters.captures == 2  # unknown costs are learnt by paying them
        for path, ms in (("graph", 1.0), ("eager", 2.0)):
            admission.saw(48, path, ms)
        admission.captured(16, 2.9)
        assert admission.refusal(16)
        reasons = [rt.generate(prompt(15), max_new_tokens=1, stop=[]).reasons[0] for _ in range(1)]
        assert "a capture" in reasons[0]
        assert rt.counters.captures == 2
