"""The protocol: which prompts are measured, in which order, what is inside the clock, and when to stop."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab import collector, paths, ranges, tails
from hybridlab.cells import cells
from hybridlab.config import RunConfig, policy_name
from hybridlab.errors import MeasureError, PromptError

if TYPE_CHECKING:
    from hybridlab.runtime import Runtime
    from hybridlab.telemetry import Telemetry
    from hybridlab.tokens import Output

Row = dict[str, Any]


def prompts(model: Any, lengths: Iterable[int], seed: int) -> dict[int, list[int]]:
    """Token ids of exactly each length, BOS first where the model has one; the same for every arm and process.

    With a tokenizer they are cut from data/prompts/*.txt at a seeded start, wrapping around; without one they are
    uniform over the vocabulary, special tokens left out. Raises: PromptError when there is nothing to cut from.
    """
    tokenizer = getattr(model, "tokenizer", None)
    settings = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    begin = getattr(tokenizer, "bos_token_id", None)
    begin = getattr(settings, "bos_token_id", None) if begin is None else begin
    first = [begin] if isinstance(begin, int) else []
    if tokenizer is not None:
        source = np.asarray(tokenizer(_text(), add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    else:
        special = {begin, getattr(settings, "eos_token_id", None), getattr(settings, "pad_token_id", None)}
        source = np.setdiff1d(np.arange(settings.vocab_size), [i for i in special if isinstance(i, int)])
    if not len(source):
        raise PromptError("there are no tokens to make prompts from", f"tokenizer {type(tokenizer).__name__}")
    made = {}
    for length in lengths:
        rng = np.random.default_rng([seed, length])
        rest = length - len(first)
        if tokenizer is not None:
            body = np.take(source, np.arange(rest) + rng.integers(len(source)), mode="wrap")
        else:
            body = rng.choice(source, size=rest)
        made[length] = (first + [int(i) for i in body])[:length]
    return made


def warm_up(runtimes: Mapping[str, Runtime], prompts: Mapping[int, list[int]], config: RunConfig,
            step: Callable[[int], None] = lambda done: None) -> None:
    """Captures and compiles all that the timed rounds need, then serves `config.warmup` rounds that leave no row.

    Every warm-up round has the TTFT requests of a timed one; the first also has the ITL requests, if there are any.
    """
    for runtime in runtimes.values():
        runtime.warm_up(sorted(prompts), temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    with frozen_heap(), tails.Watch() as watch:
        for number in range(config.warmup):
            itl = number == 0 and config.itl_repeats > 0
            for arm, length, protocol in shuffled(runtimes, prompts, config, round_=number, itl=itl):
                serve(runtimes[arm], prompts[length], protocol, config, watch)
            step(number + 1)


class TTFT:
    """Time to first token: one request for one new token.

    Inside the clock: from token ids on the host, checking them and that weights are where they were, sampling settings
    to the device and the prompt copied there, prefill, the draw, until the new token id is on the host. By the device's
    clock: from the first of this work that the device does until the id has left it. By the clock of a worker's client:
    from the request leaving until the id is there.
    Outside: tokenising, decoding to text, garbage collection, rows.
    """

    metric = "ttft"

    @staticmethod
    def tokens(config: RunConfig) -> int:
        """New tokens that a request asks for."""
        return 1

    @staticmethod
    def timed(out: Output) -> list[tuple[int, float]]:
        """Index of each timed token and its ms."""
        return [(0, out.ttft_ms)]


class ITL:
    """Gaps between tokens: one request for `new_tokens`; a row a gap, so that position and generation length are known.

    Inside the clock: from when the next token is asked for, at once after this one was on the host, launching
    of decode steps, `run_ahead` of them beyond the next token, until its id is on the host. By the device's clock: from
    one id leaving it to the next; by the clock of a worker's client: from one id there to the next. Outside: the first
    token, a TTFT; decoding to text, garbage collection, rows.
    """

    metric = "itl"

    @staticmethod
    def tokens(config: RunConfig) -> int:
        """New tokens that a request asks for."""
        return config.new_tokens

    @staticmethod
    def timed(out: Output) -> list[tuple[int, float]]:
        """Index of each timed token and its ms."""
        return list(enumerate(out.itl_ms, start=1))


Protocol = type[TTFT] | type[ITL]


def rounds(runtimes: Mapping[str, Runtime], prompts: Mapping[int, list[int]], config: RunConfig, *, process: int = 0,
           telemetry: Telemetry | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[list[Row]]:
    """Yields the rows of one finished round at a time, until `config.repeats` rounds or `config.budget_s` are over.

    A round holds one TTFT request for every arm and prompt length and, in the first `config.itl_repeats` rounds, one
    ITL request. Their order is drawn from the seed, anew for each round and `process`, over all arms and lengths
    together, so that drift and disturbances meet every arm alike. The clock is the runtime's own; garbage is collected
    before each request and not during it. The end token does not end a request, so all arms generate equally many.

    The budget is looked at between rounds only: the round in which it runs out is finished, and one is always made.
    Rows are those of `schemas.ABLATION` without `run_id`. Captures and compilations that happened during the request
    are counted in each of its rows; a valid timed region has none. Clocks and power are read between requests.
    """
    started, request, named = clock(), 0, cells(config)
    with frozen_heap(), tails.Watch() as watch:
        for number in range(config.repeats):
            if number and clock() - started >= config.budget_s:
                return
            rows, profiled = list[Row](), ranges.listening()
            order = shuffled(runtimes, prompts, config, round_=config.warmup + number, itl=number < config.itl_repeats,
                             process=process)
            for arm, length, protocol in order:
                served = serve(runtimes[arm], prompts[length], protocol, config, watch)
                common = {"round": number, "request": request, "arm": arm, "policy": policy_name(named[arm].policy),
                          "prompt_tokens": length, "process": process}
                rows += [common | row | {"profiled": profiled or row["profiled"]} for row in served]
                request += 1
                if telemetry is not None:
                    telemetry.sample()
            yield explained(rows, watch, telemetry)


COUNTED = {"captures": "capture", "capturing": "capture", "evictions": "eviction"}  # of a row: kinds of `tails`


def explained(rows: list[Row], watch: tails.Watch, telemetry: Telemetry | None = None) -> list[Row]:
    """The rows of a round, each with what happened meanwhile: seen by the watch and the clocks, or counted in the row.
    """
    ended, ms = [row["ended_ns"] for row in rows], [row["ms"] for row in rows]
    changes = telemetry.clock_changes(since_ns=min(ended) - int(max(ms) * 1e6)) if telemetry is not None else []
    found = tails.during(ms, ended, [*watch.happenings(), *changes])
    watch.forget(max(ended))
    return [row | {"happened": _with_counted(row, seen), "happened_ms": taken}
            for row, (seen, taken) in zip(rows, found, strict=True)]


def _with_counted(row: Row, seen: str) -> str:
    counted = {kind for name, kind in COUNTED.items() if row.get(name)}
    return ", ".join(kind for kind in tails.KINDS if kind in counted | set(seen.split(", "))) if counted else seen


def shuffled(runtimes: Mapping[str, Any], prompts: Mapping[int, list[int]], config: Any, *, round_: int,
             itl: bool, process: int = 0) -> list[tuple[str, int, Protocol]]:
    """One round as (arm, prompt length, protocol): every TTFT request, with `itl` the ITL requests too."""
    protocols: tuple[Protocol, ...] = (TTFT, ITL) if itl else (TTFT,)
    requests = [(arm, length, protocol) for protocol in protocols for length in prompts for arm in runtimes]
    places = np.random.default_rng([config.seed, round_, process]).permutation(len(requests))
    return [requests[i] for i in places]


def serve(runtime: Any, ids: list[int], protocol: Protocol, config: RunConfig, watch: tails.Watch) -> list[Row]:
    """The rows of one timed request; `runtime`: a `Runtime`, or what answers and counts as one does. What a worker
    timed ended when the worker says so, and what happened meanwhile is what it saw: its clock is of the same machine.
    """
    count, ended = protocol.tokens(config), list[int]()
    before = runtime.counters.as_dict()
    with quiet_collector():
        began = watch.sample()
        out = runtime.generate(ids, max_new_tokens=count, temperature=config.temperature, top_k=config.top_k,
                               top_p=config.top_p, seed=config.seed, stop=[],
                               each=lambda: ended.append(watch.sample()))
    after = runtime.counters.as_dict()
    if not len(out.ids) == len(out.paths) == len(out.reasons) == len(out.itl_ms) + 1 == len(ended) == count:
        raise MeasureError(f"{count} tokens were asked for, the runtime answered with {len(out.ids)}",
                           f"{len(out.itl_ms)} gaps, {len(out.paths)} paths, {len(out.reasons)} reasons",
                           "a request that ends early cannot be compared; report this as a fault of the runtime")
    happened = {name: int(after.get(name, 0) - before.get(name, 0)) for name in ("captures", "compiles")}
    if out.seen is not None:
        watch.replace(began, out.seen.happenings)
        ended = out.seen.ended_ns
    return answered(out, len(ids), protocol, ended, happened)


def answered(out: Output, prompt_tokens: int, protocol: Protocol, ended: Sequence[int],
             happened: Mapping[str, int]) -> list[Row]:
    """A row a timed token of what a request answered; `ended`: stamps of all its tokens, `happened`: counters.
    profiled: whether a profiler listened in a second process that served it."""
    common = {"bucket": out.bucket, "metric": protocol.metric, **happened,
              "profiled": out.seen is not None and out.seen.profiled}
    return [common | {"index": index, "position": prompt_tokens + index, "ms": float(ms), "path": out.paths[index],
                      "reason": out.reasons[index] or "", "ended_ns": ended[index],
                      "device_ms": out.device_ms[index] if out.device_ms else None,
                      "client_ms": out.client_ms[index] if out.client_ms else None}
            for index, ms in protocol.timed(out)]


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Collects now and not during the block; leaves the collector as it was."""
    gc.collect()
    with collector.off():
        yield


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Takes what is alive out of the collector's sight: a collection before each request then costs microseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _text() -> str:
    folder = paths.data_dir() / "prompts"
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt")))
    if not text:
        raise PromptError("no prompt text was found", "data/prompts holds no .txt file",
                          "restore data/prompts from the repository")
    return text
