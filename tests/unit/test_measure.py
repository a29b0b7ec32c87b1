"""The protocol, proven on a fake runtime whose every time is a formula of the request."""

import gc
import itertools
import time
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pytest

from hybridlab import collector, measure, schemas, soundness, tails
from hybridlab.config import RunConfig
from hybridlab.errors import HybridlabError, PromptError
from hybridlab.tokens import Happening, Seen

ARMS = ("eager", "graph", "jit", "hybrid")
CONFIG = RunConfig(arms=ARMS, lengths=(4, 7), repeats=5, itl_repeats=2, new_tokens=3, warmup=2, seed=11)


class Fake:
    """A runtime: request k takes 1000 + k ms to the first token, then gap i takes i ms. `log` is shared by all arms."""

    def __init__(self, arm, log, captures_at=()):
        self.arm, self.log, self.captures_at, self.captures, self.warmed = arm, log, captures_at, 0, []
        self.counters = self

    def as_dict(self):
        return {"captures": self.captures, "compiles": 0, "replays": len(self.log)}

    def warm_up(self, lengths, temperature, top_k, top_p):
        self.warmed.append((list(lengths), temperature, top_k, top_p))

    def generate(self, prompt, max_new_tokens, each, **options):
        self.captures += len(self.log) in self.captures_at
        for _ in range(max_new_tokens):
            each()
        self.log.append((self.arm, len(prompt), max_new_tokens, gc.isenabled(), options))
        return SimpleNamespace(ids=[1] * max_new_tokens, ttft_ms=999.0 + len(self.log),
                               itl_ms=[float(i) for i in range(1, max_new_tokens)], bucket=8,
                               device_ms=[i / 2 for i in range(max_new_tokens)], client_ms=[], seen=None,
                               paths=[f"path{i}" for i in range(max_new_tokens)], reasons=[""] * max_new_tokens)


def fakes(**options):
    log = []
    return {arm: Fake(arm, log, **options) for arm in ARMS}, log


PROMPTS = {4: [1, 2, 3, 4], 7: [1, 2, 3, 4, 5, 6, 7]}


def test_a_round_holds_every_request_once_in_a_random_order():
    """Arms measured one after the other would each get their own stretch of machine noise."""
    runtimes, log = fakes()
    found = list(measure.rounds(runtimes, PROMPTS, CONFIG))
    requests = [entry[:3] for entry in log]
    start, orders, changes = 0, [], 0
    for number in range(5):
        expected = Counter((arm, length, 1) for arm in ARMS for length in (4, 7))
        if number < 2:
            expected += Counter((arm, length, 3) for arm in ARMS for length in (4, 7))
        part = requests[start:start + expected.total()]
        assert Counter(part) == expected
        changes += sum(a[0] != b[0] for a, b in itertools.pairwise(part))
        orders.append(tuple(part))
        start += len(part)
    assert start == len(requests)
    assert len(found) == 5
    assert changes > 2 * 5 * (len(ARMS) - 1)  # arms in blocks would change three times a round
    assert len(set(orders[2:])) == 3  # a new order each round


def test_the_order_is_drawn_from_the_seed():
    """A run that cannot be repeated in its order cannot be checked; another seed must give another order."""
    orders = []
    for seed in (11, 11, 12):
        runtimes, log = fakes()
        list(measure.rounds(runtimes, PROMPTS, RunConfig(**{name: getattr(CONFIG, name) for name in
                            ("arms", "lengths", "repeats", "itl_repeats", "new_tokens", "warmup")}, seed=seed)))
        orders.append([entry[:3] for entry in log])
    assert orders[0] == orders[1] != orders[2]


def test_rows_say_what_was_measured():
    """A time under the wrong arm, length or metric is worse than no time."""
    runtimes, log = fakes()
    rows = [row for part in measure.rounds(runtimes, PROMPTS, CONFIG) for row in part]
    for row in rows:
        arm, length, tokens, *_ = log[row["request"]]
        assert (row["arm"], row["prompt_tokens"]) == (arm, length)
        assert row["position"] == length + row["index"]
        assert row["path"] == f"path{row['index']}"
        assert (row["policy"], row["bucket"], row["captures"], row["compiles"]) == ("whole", 8, 0, 0)
        if row["metric"] == "ttft":
            assert tokens == 1
            assert row["index"] == 0
            assert row["ms"] == 1000.0 + row["request"]
        else:
            assert tokens == 3
            assert row["ms"] == row["index"]
    counts = Counter(row["metric"] for row in rows)
    assert counts == {"ttft": 5 * 8, "itl": 2 * 8 * 2}


def test_the_first_token_is_never_a_gap():
    """Prefill counted among the gaps would be the p99 of every arm."""
    runtimes, _ = fakes()
    itl = [row for part in measure.rounds(runtimes, PROMPTS, CONFIG) for row in part if row["metric"] == "itl"]
    assert {row["index"] for row in itl} == {1, 2}
    assert max(row["ms"] for row in itl) == 2.0


def test_captures_in_a_timed_request_reach_its_rows_and_no_other():
    """A capture inside the clock is a latency spike that says nothing about replaying."""
    runtimes, _ = fakes(captures_at={3})
    rows = [row for part in measure.rounds(runtimes, PROMPTS, CONFIG) for row in part]
    assert {row["request"] for row in rows if row["captures"]} == {3}


def test_the_budget_stops_after_a_whole_round():
    """Half a round would leave some arms with more samples than others; no round at all would leave nothing."""
    runtimes, log = fakes()
    times = iter([0.0, 400.0, 599.9, 600.0])
    found = list(measure.rounds(runtimes, PROMPTS, CONFIG, clock=lambda: next(times)))
    assert len(found) == 3
    assert len(log) == 16 + 16 + 8
    assert {tuple(sorted(Counter(row["arm"] for row in part).values())) for part in found} == {(6,) * 4, (2,) * 4}
    runtimes, log = fakes()
    times = iter([0.0, 1e9])
    assert len(list(measure.rounds(runtimes, PROMPTS, CONFIG, clock=lambda: next(times)))) == 1


def test_warm_up_leaves_no_row_and_touches_every_request_kind():
    """A cold first call in the rows, or a request kind that was never warmed, would be charged to one arm."""
    runtimes, log = fakes()
    steps = []
    assert measure.warm_up(runtimes, PROMPTS, CONFIG, step=steps.append) is None
    assert steps == [1, 2]
    assert all(runtime.warmed == [([4, 7], 0.0, None, None)] for runtime in runtimes.values())
    assert Counter(entry[:3] for entry in log) == Counter(
        {(arm, length, tokens): 2 if tokens == 1 else 1 for arm in ARMS for length in (4, 7) for tokens in (1, 3)})
    warm = len(log)
    rows = [row for part in measure.rounds(runtimes, PROMPTS, CONFIG) for row in part]
    assert min(row["ms"] for row in rows if row["metric"] == "ttft") == 1000.0 + warm


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_off_inside_and_left_as_found(was_on):
    """A collection in the middle of a gap takes longer than the gap; a disabled collector afterwards leaks memory."""
    runtimes, log = fakes()
    (gc.enable if was_on else gc.disable)()
    try:
        rounds = measure.rounds(runtimes, PROMPTS, CONFIG)
        next(rounds)
        assert gc.isenabled() == was_on
        rounds.close()
        assert gc.isenabled() == was_on
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
    assert not any(entry[3] for entry in log)


def test_nothing_is_collected_where_somebody_wants_none(monkeypatch):
    """A full collection, asked for while weights load, in the middle of a capture on another thread."""
    done = []
    monkeypatch.setattr(collector.gc, "collect", lambda: done.append(gc.isenabled()))
    with collector.off():
        collector.collect()
    assert done == []
    collector.collect()
    assert done == [True]


def test_every_request_samples_alike_and_never_stops_early():
    """An end token would shorten one arm's request only if arms differed, and hide that they do."""
    runtimes, log = fakes()
    config = RunConfig(arms=ARMS, lengths=(4,), repeats=1, temperature=0.7, top_k=5, top_p=0.9, seed=3)
    list(measure.rounds(runtimes, {4: PROMPTS[4]}, config))
    expected = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3, "stop": []}
    assert all(entry[4] == expected for entry in log)


def test_an_answer_of_the_wrong_length_is_an_error():
    """A request that ended early has fewer gaps; averaged in silence, the arm would look better."""
    runtimes, _ = fakes()
    short = runtimes["jit"].generate
    runtimes["jit"].generate = lambda prompt, max_new_tokens, **options: short(prompt, max(1, max_new_tokens - 1),
                                                                               **options)
    with pytest.raises(measure.MeasureError, match="3 tokens were asked for"):
        list(measure.rounds(runtimes, PROMPTS, CONFIG))
    assert issubclass(measure.MeasureError, HybridlabError)


class Tokenizer:
    """One token a character, 100 and up, BOS 1."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        assert not verbose
        return {"input_ids": [100 + ord(c) for c in text]}


def model(tokenizer=None, **config):
    return SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(**config))


@pytest.mark.parametrize("made", [model(Tokenizer()), model(vocab_size=50, bos_token_id=1, eos_token_id=2)])
def test_prompts_have_exactly_the_length_and_begin_with_bos(made):
    """A prompt one token off falls into another bucket and another line of the table."""
    lengths = (1, 2, 10, 500, 9000)
    found = measure.prompts(made, lengths, seed=0)
    assert {length: len(ids) for length, ids in found.items()} == {length: length for length in lengths}
    assert all(ids[0] == 1 and 1 not in ids[1:] and all(type(i) is int for i in ids) for ids in found.values())
    assert found == measure.prompts(made, lengths, seed=0) != measure.prompts(made, lengths, seed=1)
    assert found[10] == measure.prompts(made, (10,), seed=0)[10]  # a prompt does not depend on the other lengths


def test_prompts_of_a_tokenizer_are_text_of_the_repository():
    """Random ids for a model that has a text would measure sampling of noise and call it a prompt."""
    found = measure.prompts(model(Tokenizer()), (400,), seed=5)[400]
    text = "".join(chr(i - 100) for i in found[1:])
    source = measure._text()
    assert text in source + source
    assert len(source) > 5000


def test_random_prompts_hold_no_special_token():
    """An end token inside a prompt, or an id beyond the vocabulary, is no valid input."""
    found = measure.prompts(model(vocab_size=12, bos_token_id=None, eos_token_id=3, pad_token_id=4), (2000,), seed=0)
    assert set(found[2000]) == set(range(12)) - {3, 4}
    with pytest.raises(PromptError):
        measure.prompts(model(vocab_size=0), (5,), seed=0)


def test_missing_prompt_text_is_an_error(monkeypatch, tmp_path):
    """Falling back to random ids in silence would change what is measured."""
    monkeypatch.setattr(measure.paths, "data_dir", lambda: tmp_path)
    with pytest.raises(PromptError, match="no prompt text"):
        measure.prompts(model(Tokenizer()), (5,), seed=0)


def test_a_row_holds_when_it_ended_and_what_happened_in_it():
    """A stall that is not laid to its own row is laid to the next, or to the arm."""
    runtimes, _ = fakes()

    def answering(runtime, whole):
        def generate(prompt, max_new_tokens, each, **options):
            if max_new_tokens > 1 and runtime.arm == "graph":
                gc.collect()
            out = whole(prompt, max_new_tokens, each, **options)
            out.ttft_ms, out.itl_ms = 1e-4, [1.0] + [1e-4] * (max_new_tokens - 2) if max_new_tokens > 1 else []
            return out
        return generate

    for runtime in runtimes.values():
        runtime.generate = answering(runtime, runtime.generate)
    rows = [row | {"run_id": "x"} for part in measure.rounds(runtimes, PROMPTS, CONFIG, process=3) for row in part]
    assert schemas.ABLATION.names == list(pa.Table.from_pylist(rows, schema=schemas.ABLATION).column_names)
    assert {row["process"] for row in rows} == {3}
    assert {row["profiled"] for row in rows} == {False}
    assert [row["ended_ns"] for row in rows] == sorted(row["ended_ns"] for row in rows)
    assert all(row["device_ms"] == row["index"] / 2 for row in rows)
    stalled = [row for row in rows if (row["arm"], row["metric"], row["index"]) == ("graph", "itl", 1)]
    assert len(stalled) == 4
    assert all("garbage collection" in row["happened"] and row["happened_ms"] > 0 for row in stalled)
    assert not any("garbage collection" in row["happened"] for row in rows if row["ms"] < 1e-3)


def test_processes_have_orders_of_their_own():
    """Three restarts that repeat one order are one draw of the order, three times."""
    orders = []
    for process in (0, 0, 1):
        runtimes, log = fakes()
        list(measure.rounds(runtimes, PROMPTS, CONFIG, process=process))
        orders.append([entry[:3] for entry in log])
    assert orders[0] == orders[1] != orders[2]


def test_clocks_are_read_between_requests_and_reach_the_rows():
    """Read inside a request, the driver's answer would be part of a latency."""
    runtimes, log = fakes()
    asked = []

    class Clocks:
        def sample(self):
            asked.append(len(log))

        def clock_changes(self, since_ns):
            return [Happening("clock change", 0, 2**62, "1,980 → 1,755 MHz", False)]

    (rows, *_) = measure.rounds(runtimes, PROMPTS, CONFIG, telemetry=Clocks())
    assert asked[:16] == list(range(1, 17))
    assert all("clock change" in row["happened"] for row in rows)


class Clock:
    """Stands still but where it is moved."""

    def __init__(self):
        self.ns = 10**16

    def perf_counter_ns(self):
        return self.ns


class Ticking(Fake):
    """Every token takes 2 ms and some ns by `clock`; of all tokens that come later than the first, number `slow` takes
    5 ms more, in which `stall` is called."""

    def __init__(self, clock, slow, stall):
        super().__init__("hybrid", [])
        self.clock, self.slow, self.stall, self.gaps = clock, slow, stall, 0

    def generate(self, prompt, max_new_tokens, each, **options):
        ms = []
        for index in range(max_new_tokens):
            before = self.clock.ns
            self.clock.ns += 2_000_000 + 617 * self.gaps % 1000  # no two gaps are equal
            if index:
                if self.gaps == self.slow:
                    self.stall()
                self.gaps += 1
            ms.append((self.clock.ns - before) / 1e6)
            each()
        out = super().generate(prompt, max_new_tokens, lambda: None, **options)
        out.ttft_ms, out.itl_ms = ms[0], ms[1:]
        return out


@pytest.mark.parametrize("cause", ["garbage collection", "unexplained"])
def test_a_stall_of_5_ms_in_one_of_a_thousand_tokens_is_found_and_named(monkeypatch, cause):
    """The one slow token of a thousand is what a tail is about: its cause must reach the words that a reader sees, and
    where none is known, none may be."""
    clock = Clock()
    monkeypatch.setattr(tails, "time", clock)
    monkeypatch.setattr(tails.resource, "getrusage", lambda who: SimpleNamespace(ru_nivcsw=0))

    def stop(phase, info):
        clock.ns += 5_000_000 * (phase == "start")

    def stall():
        if cause == "unexplained":
            stop("start", {})
            return
        gc.callbacks.append(stop)
        try:
            gc.collect(0)
        finally:
            gc.callbacks.remove(stop)

    config = RunConfig(arms=("hybrid",), lengths=(4,), repeats=10, itl_repeats=10, new_tokens=101)
    runtime = Ticking(clock, 616, stall)
    rows = pd.DataFrame([row for part in measure.rounds({"hybrid": runtime}, {4: PROMPTS[4]}, config) for row in part])
    gaps = rows[rows["metric"] == "itl"]
    assert len(gaps) == runtime.gaps == 1000
    assert gaps.loc[gaps["ms"] > 5, "index"].tolist() == [17]
    table = soundness.slow(gaps).set_index("kind")
    assert table.loc[cause, ["times", "count"]].tolist()[1] == 10
    assert (table.loc["unexplained", "slow"] == 1) == (cause == "unexplained")
    found = gaps.loc[gaps["happened"] != "", ["ms", "happened", "happened_ms"]]
    if cause == "unexplained":
        assert found.empty
        assert "of the 10 values beyond the p99 of their arm, unexplained 10 (" in soundness.words(gaps)
    else:
        assert found["happened"].tolist() == [cause]
        assert found["happened_ms"].tolist() == pytest.approx([5.0])
        assert table.loc[cause, ["times", "slow", "others"]].tolist() == [1, 0.1, 0.0]
        assert "of the 10 values beyond the p99 of their arm, garbage collection 1 (of the rest 0.0%)" in (
            soundness.words(gaps))


def test_what_a_worker_saw_counts_and_what_its_client_saw_meanwhile_does_not():
    """Rows of a worker said what interrupted the client, which waits, and never what held up the worker."""
    runtimes, _ = fakes()
    whole, stamps = runtimes["jit"].generate, set()

    def serve(prompt, max_new_tokens, each, **options):
        gc.collect()  # of the client
        out = whole(prompt, max_new_tokens, each, **options)
        now = time.perf_counter_ns()
        ends = [now - 1000 * (max_new_tokens - index) for index in range(max_new_tokens)]
        stamps.update(ends)
        out.seen = Seen(ends, [Happening("preemption", ends[-1] - 50, ends[-1] - 40, "", False)], True)
        out.ttft_ms, out.itl_ms = 1e-4, [1e-4] * (max_new_tokens - 1)
        return out

    runtimes["jit"].generate = serve
    rows = [row for part in measure.rounds(runtimes, PROMPTS, CONFIG) for row in part]
    own = [row for row in rows if row["arm"] == "jit"]
    assert {row["ended_ns"] for row in own} < stamps
    last = {"ttft": 0, "itl": CONFIG.new_tokens - 1}
    assert all((row["happened"] == "preemption") == (row["index"] == last[row["metric"]]) for row in own)
    assert {row["profiled"] for row in own} == {True}
    assert {row["profiled"] for row in rows if row["arm"] != "jit"} == {False}
