"""Cases 1 to 17 that run without a GPU: captures that fail, threads, lengths, callers, and numbers that are none."""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hybridlab as hl
from hybridlab import graphs, kernels, models, ops, pools, records, verify
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed, EngineBusy, NonFinite, PromptError, WrongThread
from hybridlab.kernels import attend
from hybridlab.tape import Tape

BUCKETS, ROWS = [16, 32], 40  # prompt lengths that are captured, and rows of the KV cache
NEW = 6


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return hl.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def wanted(tiny: PreTrainedModel) -> Callable[[int, int], list[int]]:
    """Tokens of arm eager, by prompt length and count."""
    with hl.Runtime(tiny, arm="eager") as eager:
        known = {n: eager.generate(prompt(n), max_new_tokens=NEW, stop=[]).ids for n in range(1, ROWS)}
    return lambda length, count: known[length][:count]


@pytest.fixture(scope="module")
def replaying(tiny: PreTrainedModel) -> Iterator[hl.Runtime]:
    """Of arm graph, which has nothing to compile."""
    with hl.Runtime(tiny, arm="graph", capture="sync", buckets=BUCKETS, max_len=ROWS) as runtime:
        yield runtime


def prompt(length: int) -> list[int]:
    return [7 + 31 * n % 1900 for n in range(length)]


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1, "stranger") as pool:
        return pool.submit(work).result(timeout=60)


def refused_as(kind: type[Exception], work: Callable[[], Any]) -> None:
    with pytest.raises(kind):
        work()


@pytest.fixture
def reading_back(tiny: PreTrainedModel) -> Iterator[hl.Runtime]:
    """A runtime whose model looks at a value on the host in the middle of each step."""
    with hl.Runtime(tiny, capture="sync", buckets=BUCKETS, max_len=ROWS) as runtime:
        (twin,) = runtime._executor.modules.values()

        def look(module: torch.nn.Module, given: Any, out: torch.Tensor) -> None:
            assert out.sum().item() == out.sum().item()

        hook = twin.get_submodule("model.layers.0.mlp").register_forward_hook(look)
        yield runtime
        hook.remove()


def test_case_01_a_host_read_in_a_step_costs_its_graph_only(reading_back: hl.Runtime,
                                                           wanted: Callable[[int, int], list[int]]) -> None:
    """A request lost to `.item()` in the model, a key tried at every step, or rows that do not say what ran."""
    for length in (9, 16, 9):
        out = reading_back.generate(prompt(length), max_new_tokens=NEW, stop=[])
        assert out.ids == wanted(length, NEW)
        assert set(out.paths) == {"jit"}
        assert all("reads a value back" in reason for reason in out.reasons)
    counted = reading_back.counters
    assert (counted.failures, counted.captures, counted.graph_bytes) == (2, 0, 0)  # one bucket, and decode
    assert {key.phase for key in reading_back._executor.graphs.failed} == {"prefill", "decode"}


def test_case_01_without_the_guard_a_tape_keeps_the_value_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal of host reads that guards against nothing: without it a replay goes on with the old value."""
    x, out = torch.ones(3), torch.zeros(3)
    def step() -> None:
        out.fill_(x.sum().item())

    monkeypatch.setattr("hybridlab.tape.reads_back", lambda function, args: False)
    tape = Tape(step, None, None, [])
    x.fill_(5)
    tape.replay()
    assert out.tolist() == [3.0] * 3, "a tape that baked nothing in would need no guard"


@pytest.fixture
def owned() -> tuple[GraphCache, Job, Job]:
    """A cache of this thread that holds the first of two jobs."""
    cache = GraphCache(torch.device("cpu"), Counters())
    jobs = []
    for key in "ab":
        x, out = torch.ones(8), torch.zeros(8)
        jobs.append(Job(key, lambda x=x, out=out: out.copy_(x * 2), [x, out]))
    cache.capture(jobs[0])
    return cache, *jobs


def calls(cache: GraphCache, first: Job, second: Job) -> list[Callable[[], None]]:
    """The three ways to use a cache."""
    def replay() -> None:
        with cache.lease(first.key) as launch:
            launch()

    return [replay, lambda: cache.capture(second), lambda: cache.adopt(second, *cache.record(second))]


@pytest.mark.parametrize("call", range(3))
def test_case_06_a_second_thread_is_refused(owned: tuple[GraphCache, Job, Job], call: int) -> None:
    """A capture or replay on a thread that does not own the buffers, in the middle of the owner's request."""
    cache, first, second = owned
    before = cache.counters.as_dict()
    with pytest.raises(WrongThread, match=r"thread stranger_0 .* thread MainThread owns"):
        in_thread(calls(cache, first, second)[call])
    assert (cache.counters.as_dict(), list(cache)) == (before, ["a"])
    calls(cache, first, second)[call]()  # the owner may


@pytest.mark.parametrize("call", range(3))
def test_case_06_without_the_guard_a_second_thread_gets_in(owned: tuple[GraphCache, Job, Job], call: int,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above passing for another reason than the guard."""
    monkeypatch.setattr(GraphCache, "_require_owner", lambda self, key: None)
    in_thread(calls(*owned)[call])
    assert owned[0].counters.captures + owned[0].counters.replays == 2


def test_case_06_a_request_belongs_to_one_thread_and_the_next_to_any(replaying: hl.Runtime,
                                                                    wanted: Callable[[int, int], list[int]]) -> None:
    """A stream advanced from two threads; or a runtime that only the thread which made it can use."""
    stream = replaying.stream(prompt(9), max_new_tokens=NEW, stop=[])
    next(stream)
    with pytest.raises(WrongThread):
        in_thread(lambda: next(stream))
    for run in (in_thread, lambda work: work()):
        assert run(lambda: replaying.generate(prompt(9), max_new_tokens=NEW, stop=[])).ids == wanted(9, NEW)


def test_case_05_no_collection_happens_during_a_capture() -> None:
    """A graph or a kernel's module in a cycle of garbage, freed by the collector in the middle of a capture."""
    seen: list[bool] = []
    out = torch.zeros(3)

    def step() -> None:
        seen.append(gc.isenabled())
        out.add_(1)

    assert gc.isenabled()
    graphs.record(step, torch.device("cpu"), private=[out])
    assert (seen, gc.isenabled()) == ([False], True)


def test_case_13_every_length_around_a_bucket_is_exact(replaying: hl.Runtime,
                                                       wanted: Callable[[int, int], list[int]]) -> None:
    """A bucket one row short, or a prompt padded to the wrong one."""
    for length in (1, *(b + d for b in BUCKETS for d in (-1, 0, 1)), ROWS - 1):
        count = min(NEW, ROWS - length)
        out = replaying.generate(prompt(length), max_new_tokens=count, stop=[])
        assert out.ids == wanted(length, count), length
        assert out.bucket == next((bucket for bucket in BUCKETS if bucket >= length), None)


def test_case_13_lengths_outside_are_refused_with_the_limit(replaying: hl.Runtime) -> None:
    """StopIteration, an index error, or a cut prompt for a length that no bucket and no cache holds."""
    before = replaying.counters.as_dict()
    for length, says in ((0, "empty"), (ROWS, "holds 40 tokens"), (ROWS + 1, "holds 40 tokens|holds more than 40")):
        with pytest.raises(PromptError, match=says):
            replaying.generate(prompt(length), max_new_tokens=1)
    assert replaying.counters.as_dict() == before


def test_case_14_a_second_caller_on_another_thread_is_refused(replaying: hl.Runtime,
                                                             wanted: Callable[[int, int], list[int]]) -> None:
    """Two requests that write one KV cache, whichever threads they come from."""
    stream = replaying.stream(prompt(9), max_new_tokens=NEW, stop=[])
    first = [next(stream).id for _ in range(2)]
    in_thread(lambda: refused_as(EngineBusy, lambda: replaying.generate(prompt(3), max_new_tokens=2)))
    assert first + [token.id for token in stream] == wanted(9, NEW)


def column_too_many(*args: Any) -> None:
    """The kernel, attending one column beyond the position."""
    q, k, v, keys, values, positions, *rest = args
    attend.attend(q, k, v, keys, values, positions + 1, *rest)


def one_element(*args: Any) -> None:
    """The kernel, with one number of its output off by a twentieth of the largest."""
    attend.attend(*args)
    args[-1].view(-1)[5] += args[-1].abs().max() / 20


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("mutant", [column_too_many, one_element])
def test_case_16_a_kernel_that_is_wrong_in_one_place_is_seen(mutant: Callable[..., None]) -> None:
    """A comparison of kernels so loose that a wrong mask or a wrong number passes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 1, 32, device=device) for heads in (6, 2, 2))
    caches = [torch.randn(1, 2, 64, 32, device=device) for _ in range(2)]
    position = torch.tensor([30], device=device)

    def error(function: Callable[..., None]) -> float:
        outs = [torch.zeros(1, 1, 6, 32, device=device) for _ in range(2)]
        for each, out in ((ops.attend, outs[0]), (function, outs[1])):
            each(q, k, v, *(c.clone() for c in caches), position, 0.2, 64, 0, 0.0, out)
        return float((outs[1] - outs[0]).abs().max() / outs[0].abs().max())

    assert error(attend.attend) < 1e-5 < error(mutant)


def overflowing() -> PreTrainedModel:
    """Finite weights whose product is none."""
    model = models.load("random:tiny-llama-2", device="cpu")
    model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    return model


@pytest.mark.parametrize("arm", ["eager", "graph"])
def test_case_17_numbers_that_are_none_are_traced_to_their_place(arm: str) -> None:
    """A token drawn from NaN, or an error that leaves the layer to be guessed."""
    with (hl.Runtime(overflowing(), arm=arm, capture="sync", buckets=[16], max_len=64) as runtime,
          pytest.raises(NonFinite, match=rf"first in the output of model\.layers\.1\.mlp\.down_proj, arm {arm}")):
        runtime.generate(prompt(5), max_new_tokens=2)
    broken = models.load("random:tiny-llama-2", device="cpu")
    broken.model.norm.weight[3] = float("nan")
    assert verify.culprit(broken, [1, 2]) == "weight model.norm.weight holds one"


def test_case_17_a_run_keeps_the_rounds_before(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of rows lost to one NaN, or a run that ends with it and says complete."""
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    append, model = records.Run.append, models.load("random:tiny-llama-2", device="cpu")

    def then_break(run: records.Run, rows: Any) -> None:
        append(run, rows)
        model.lm_head.weight[3, 3] = float("nan")

    monkeypatch.setattr(records.Run, "append", then_break)
    monkeypatch.setattr("hybridlab.experiment.roofline.measure", lambda *_: {"read_gbs": 10.0})
    monkeypatch.setattr("hybridlab.experiment.roofline.of_run", lambda *_: {})
    monkeypatch.setattr("hybridlab.experiment.models.load", lambda *_, **__: model)
    with pytest.raises(NonFinite):
        hl.run({"model": "random:tiny-llama-2", "arms": ["eager"], "lengths": [4], "new_tokens": 2, "repeats": 3,
                "warmup": 1, "device": "cpu"}, root=tmp_path)
    (config,) = tmp_path.glob("*/*/config.json")
    found = records.read(config.parent)
    assert (found.status, found.rows["round"].unique().tolist()) == ("failed", [0])
    assert "lm_head.weight holds one" in found.reason


ENDLESS = {"ten megabytes of text": lambda: "word " * 2_000_000, "ids without an end": lambda: itertools.repeat(5),
           "ten million ids": lambda: [5] * 10_000_000}


@pytest.mark.parametrize("kind", ENDLESS)
def test_case_25_a_prompt_beyond_all_bounds_is_refused_unread(kind: str, replaying: hl.Runtime,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute of tokenising, or a loop without an end, before a refusal that its length alone decides."""
    monkeypatch.setattr(replaying.model, "tokenizer", lambda *_, **__: pytest.fail("the text was cut into tokens"))
    given, start = ENDLESS[kind](), time.monotonic()
    with pytest.raises(PromptError, match="holds 40 tokens"):
        replaying.generate(given)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("arguments", "says"), [
    ({"max_new_tokens": 10**5000}, "new ones do not fit"), ({"temperature": "x"}, "temperature"),
    ({"temperature": None}, "temperature"), ({"stop": itertools.repeat(5)}, "stop holds more than"),
    ({"stop": [10**5000]}, r"stop\[0\]"), ({"seed": 10**5000}, "seed")], ids=range(6))
def test_case_25_settings_of_any_type_and_size_are_refused(arguments: dict[str, Any], says: str,
                                                           replaying: hl.Runtime) -> None:
    """A TypeError or an integer too long to print, from inside, where field and bound should stand."""
    with pytest.raises(hl.HybridlabError, match=says) as caught:
        replaying.generate([5], **arguments)
    assert len(str(caught.value)) < 1000


def test_case_03_memory_that_failed_captures_keep_is_reported(owned: tuple[GraphCache, Job, Job],
                                                             caplog: pytest.LogCaptureFixture,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that loses memory with each failed capture and does not know it; or one that is said to, while a
    graph of the same pool still needs it."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pools, "SPOILED", [(0, 1), (0, 2), (0, 3)])
    monkeypatch.setattr(pools, "LIVE", Counter({(0, 1): 1}))
    monkeypatch.setattr(pools, "_bytes_of", lambda handle: asked.append(handle) or {(0, 2): 0, (0, 3): 4096}[handle])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append((9, 9)))
    with caplog.at_level("WARNING"):
        owned[0].clear()
    assert asked == [(9, 9), (0, 2), (0, 3)]
    assert pools.SPOILED == [(0, 1), (0, 3)]
    assert "captures that failed keep 4,096 bytes" in caplog.text
    assert f"PyTorch {torch.__version__}" in caplog.text
    assert "start a new process" in caplog.text


def test_case_04_the_kernel_that_was_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture in which something was compiled, kept all the same."""
    compiled: list[str] = []
    monkeypatch.setattr(kernels, "compiled", lambda: list(compiled))
    out = torch.zeros(3)
    cache = GraphCache(torch.device("cpu"), Counters())

    def step() -> None:
        compiled.append("attend")
        out.add_(1)

    with pytest.raises(CaptureFailed, match="kernel attend was compiled during capture"):
        cache.capture(Job("a", step, [out], state=[out]), rehearse=False)
    assert "a" not in cache
