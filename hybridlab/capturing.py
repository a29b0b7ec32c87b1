"""The protocol of captures: what one costs in time and memory, and what it does to decoding meanwhile.

Both parts yield the rows of `schemas.CACHE` without run_id, a finished round at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hybridlab import clocks, measure, models
from hybridlab.cache import GraphCache, Job
from hybridlab.config import CacheConfig
from hybridlab.counters import Counters
from hybridlab.disturbing import HAPPENED, Decoding, require_ways
from hybridlab.errors import CaptureFailed, MeasureError
from hybridlab.lowered import LoweredExecutor
from hybridlab.measure import quiet_collector
from hybridlab.runtime import DEFAULT_MAX_LEN, Runtime

Row = dict[str, Any]
Report = Callable[[str, int, int], None]  # what is measured, how many are done, of how many

REPLAYS = 5                        # warm times of a replay and of a launch from Python, for each capture
PROMPT, NEW, BUCKET = 16, 64, 128  # tokens of a request that decodes meanwhile; rows of what is captured behind it
KEPT = "outputs kept"


def cost(model: PreTrainedModel, config: CacheConfig, report: Report) -> Iterator[list[Row]]:
    """`config.cost_repeats` rounds: a prefill graph of each of `config.cost_lengths` rows in each kind of memory.

    Kinds: "shared" and "private" pools, and on a GPU "outputs kept": the stock forward, each graph with its pool, its
    logits of all rows and its KV cache kept alive. They come in random order, each from an empty cache, and within it
    the longest first, as a runtime captures ahead: in a shared pool that one brings the memory, and what the others
    add is their own. Rows from "capture" on have the graph's bytes, beyond those of the graphs before it.

    Times in ms, each until the device is done: "rehearse", the first launch of the step from Python in this round, all
    compiled before; "capture" and "instantiate"; "first_replay"; then "replay" and "jit", which is the step with every
    launch from Python, in turns. On a CPU recording runs the step once, on copies of its buffers.

    A capture that fails gives one row "capture" with failures = 1 and the reason. Raises `ConfigError` for lengths
    beyond the model's context, and `MeasureError` for a replay whose logits are not those of the launches.
    """
    lengths = sorted(set(config.cost_lengths), reverse=True)
    kinds = ["shared", "private", *([KEPT] if model.device.type == "cuda" else [])]
    total, rng, done = config.cost_repeats * len(kinds) * len(lengths), np.random.default_rng(config.seed), 0
    with _runtime(model, config, lengths, lengths[0] + 1) as runtime:
        prompts = _prompts(runtime, lengths, config.seed)
        for rows in lengths:
            _prefill(runtime, prompts[rows])  # compiles what its step needs
        for number in range(config.cost_repeats):
            found: list[Row] = []
            for kind in map(str, rng.permutation(kinds)):
                with _emptied(runtime.device, "shared" if kind == "shared" else "private") as (cache, alive):
                    for rows in lengths:
                        report("capture costs", done, total)
                        common = {"round": number, "setting": kind, "prompt_tokens": rows, "bucket": rows}
                        found += [_row("cost", **common, **row) for row in
                                  _one(runtime, cache, kind, rows, prompts[rows], alive)]
                        done += 1
            yield found


def _one(runtime: Runtime, cache: GraphCache, kind: str, rows: int, prompt: list[int], alive: list[Any]
         ) -> Iterator[Row]:
    """The times of one capture into `cache`; what the graph keeps alive goes to `alive`."""
    executor, device = _executor(runtime), runtime.device
    path = _prefill(runtime, prompt)
    launch, job = _stock(runtime, rows, alive) if kind == KEPT else _lowered(executor, rows)
    with quiet_collector(), torch.no_grad():
        launch()
        before = cache.counters.graph_bytes
        yield {"metric": "rehearse", "ms": clocks.ms(launch, device), "graphs": len(cache)}
        try:
            graph, ms = cache.record(job)
        except CaptureFailed as error:
            yield {"metric": "capture", "ms": 0.0, "failures": 1, "reason": str(error), "graphs": len(cache)}
            return
        cache.adopt(job, graph, ms)
        held = {"graphs": len(cache), "graph_bytes": cache.counters.graph_bytes - before}
        yield {"metric": "capture", "ms": graph.capture_ms, "captures": 1, "capture_ms": ms, **held}
        yield {"metric": "instantiate", "ms": graph.instantiate_ms, **held}
        with cache.lease(job.key) as replay:
            expected = executor.logits.clone()
            executor.logits.zero_()
            yield {"metric": "first_replay", "path": "graph", "ms": clocks.ms(replay, device), **held}
            if kind != KEPT and not torch.equal(executor.logits, expected):
                raise MeasureError(f"a replay of {rows} rows gives other logits than its launches", f"pool: {kind}",
                                   "do not trust captures on this machine, and report this")
            for index in range(REPLAYS):
                yield {"metric": "replay", "index": index, "path": "graph", "ms": clocks.ms(replay, device), **held}
                yield {"metric": "jit", "index": index, "path": path, "ms": clocks.ms(launch, device), **held}


def _lowered(executor: LoweredExecutor, rows: int) -> tuple[Callable[[], Any], Job]:
    """The step as this runtime would launch and capture it."""
    job = executor.job("prefill", rows)
    return job.function, job


def _stock(runtime: Runtime, rows: int, alive: list[Any]) -> tuple[Callable[[], Any], Job]:
    """The stock forward, all of whose outputs a capture keeps alive."""
    ids = torch.zeros((1, rows), dtype=torch.int64, device=runtime.device)

    def launch() -> Any:
        return runtime.model(input_ids=ids, use_cache=True)

    return launch, Job((KEPT, rows), lambda: alive.append(launch()), [ids])


@contextmanager
def _emptied(device: torch.device, pool: str) -> Iterator[tuple[GraphCache, list[Any]]]:
    """A cache and a place for what its graphs keep alive; afterwards all memory is back, so that the next starts alike.
    """
    cache, alive = GraphCache(device, Counters(), pool=pool), list[Any]()
    try:
        yield cache, alive
    finally:
        cache.clear()
        alive.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def disturb(model: PreTrainedModel, config: CacheConfig, report: Report) -> Iterator[list[Row]]:
    """`config.repeats` rounds of requests that decode, undisturbed first and then, in random order, while a prefill
    graph is captured again and again in each way of `config.disturb`, `config.disturb_captures` times.

    Rows: "itl", the ms between two tokens on the host, everything between them included; "after" (index -1), from
    the last token until the runtime is free; "capture", from asked to usable, with failures = 1 and the reason if it
    failed before or for good; "lost", a request that a capture ended. A capture is asked for after a gap in which
    none was under way, so that every way has gaps of both kinds.

    Raises `ConfigError` before any work for the name of no way and for one that the model's device does not have, and
    for a policy that cuts the forward into pieces; `RunError` for tokens that differ from those of quiet requests.
    """
    require_ways(config.disturb, model.device)
    return _disturb(model, config, report)


def _disturb(model: PreTrainedModel, config: CacheConfig, report: Report) -> Iterator[list[Row]]:
    context = models.context(model) or DEFAULT_MAX_LEN
    bucket, rng = min(BUCKET, context), np.random.default_rng(config.seed)
    others = [name for name in dict.fromkeys(config.disturb) if name != "quiet"]
    (prompt,) = measure.prompts(model, [min(PROMPT, context // 2)], config.seed).values()
    total, done = config.repeats * (1 + len(others)), 0
    rows, ahead = max(bucket, len(prompt) + NEW), config.disturb_run_ahead
    with _runtime(model, config, {len(prompt), bucket}, rows, ahead) as runtime:
        for ids in (*_prompts(runtime, [bucket], config.seed).values(), prompt):
            _prefill(runtime, ids)
        new = min(NEW, runtime.max_len - len(prompt))
        decoding = Decoding(runtime, prompt, new, bucket, config.disturb_captures)
        for number in range(config.repeats):
            found: list[Row] = []
            for name in ["quiet", *map(str, rng.permutation(others))]:
                report(f"decoding, {name}", done, total)
                found += [_row("disturb", round=number, setting=name, **row) for row in decoding.under(name)]
                done += 1
            yield found


# --- both ----------------------------------------------------------------------------------------------------------

def _runtime(model: PreTrainedModel, config: CacheConfig, buckets: Iterable[int], rows: int, run_ahead: int = 0
             ) -> Runtime:
    """One that captures nothing by itself, with a KV cache of `rows` rows if the model's context allows."""
    context = models.context(model) or max(rows, DEFAULT_MAX_LEN)
    return Runtime(model, arm=config.arm, policy=config.policy, buckets=sorted(buckets), capture="never",
                   max_len=min(rows, context), run_ahead=run_ahead)


def _executor(runtime: Runtime) -> LoweredExecutor:
    assert isinstance(runtime._executor, LoweredExecutor)
    return runtime._executor


def _prompts(runtime: Runtime, buckets: Iterable[int], seed: int) -> dict[int, list[int]]:
    """A prompt for each bucket, as long as that with room for one new token."""
    counts = {rows: min(rows, runtime.max_len - 1) for rows in buckets}
    made = measure.prompts(runtime.model, set(counts.values()), seed)
    return {rows: made[count] for rows, count in counts.items()}


def _prefill(runtime: Runtime, prompt: list[int]) -> str:
    """Serve one prompt: the step of its bucket has run then, and its inputs are in place. Returns the path."""
    return runtime.generate(prompt, max_new_tokens=1, stop=[]).paths[0]


def _row(part: str, **columns: Any) -> Row:
    """All columns, those not given as of an interval in which nothing happened."""
    nothing = {**dict.fromkeys(HAPPENED, 0), "capture_ms": 0.0, "graphs": 0, "graph_bytes": 0, "capturing": False,
               **dict.fromkeys(("ended_ns", "happened", "happened_ms"))}
    return {"part": part, "request": None, "bucket": None, "index": 0, "path": "", "reason": "", **nothing, **columns}
