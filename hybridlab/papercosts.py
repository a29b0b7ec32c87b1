"""What graphs cost, for the paper's ablation of asynchronous capture and beside it: captures under a stream of
requests, during decoding, by length, in memory; the published protocol; and a second process.

Each yields rows of `schemas.PAPER` without run_id, a finished round at a time; the protocols are those of `cachelab`,
`capturing`, `memory`, `firstcalls` and `crossing`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from hybridlab import cachelab, capturing, crossing, firstcalls
from hybridlab.buckets import bucket_for, ladder
from hybridlab.config import CacheConfig
from hybridlab.memory import memory
from hybridlab.paperconfig import PaperConfig
from hybridlab.papertimes import Arms, Row, row, state
from hybridlab.runtime import Runtime

POLICIES = ("never", "sync", "async")
OVERLAP_ROUNDS, OVERLAP_CAPTURES = 6, 10
# Of both engines of a crossing, whose requests need 49 rows.
SPLIT: dict[str, Any] = {"arm": "hybrid", "kernels": "torch", "capture": "sync", "max_len": 64}


def capture(arms: Arms) -> Iterator[list[Row]]:
    """First tokens of a seeded stream of prompts of 1 to 500 tokens, uniform, so that most lengths are new, under each
    capture policy, a pass each, from a cold cache; policies in random order. `serving.serve` has the clock.

    On a GPU every length has a graph of its own, as published; on a CPU, where each would compile kernels first, it has
    a bucket. In float32 the tokens must be equal under all policies. First passes are always made, later ones while
    the budget lasts.
    """
    config, exact = arms.config, _exact(arms)
    cache = CacheConfig(
        model=config.model, trace="uniform", requests=config.trace_requests, new_tokens=2, repeats=config.passes,
        budget_s=config.budget_s, seed=config.seed, threads=config.threads,
        compare=tuple({"capture": name, "kernels": "torch", **({"buckets": "exact"} if exact else {})}
                      for name in POLICIES))
    lab = cachelab.Lab(arms.model, cache, arms.report)
    names = {setting: f"capture={policy}" for setting, policy in zip(lab.settings, POLICIES, strict=True)}
    lab.warm_up()
    for rows in lab.passes():
        yield [row("capture", arm=names[one["setting"]], round=one["round"], request=one["request"],
                   tokens=one["prompt_tokens"], position=one["prompt_tokens"], metric="ttft", value=one["ms"],
                   path=one["path"], reason=one["reason"], captures=one["captures"],
                   state=state("hybrid", one["path"], one["bucket"], one["prompt_tokens"], one["misses"]))
               for one in rows if one["metric"] == "ttft"]


def overlap(arms: Arms) -> Iterator[list[Row]]:
    """Gaps of requests that decode while a graph is captured behind them on a second thread, on a GPU a second stream,
    and of quiet ones. `capturing.disturb` has the clock: from one new id on the host to the next."""
    cache = _cache(arms.config, disturb=("thread",), repeats=OVERLAP_ROUNDS, disturb_captures=OVERLAP_CAPTURES)
    for rows in _while(arms, capturing.disturb(arms.model, cache, arms.report)):
        yield [row("overlap", arm=one["setting"], round=one["round"], request=one["request"], index=one["index"],
                   metric="gap", value=one["ms"], path=one["path"], reason=one["reason"], captures=one["captures"],
                   state="capturing" if one["capturing"] else "quiet") for one in rows if one["metric"] == "itl"]


def cost(arms: Arms) -> Iterator[list[Row]]:
    """Times and bytes of captures by length: `capturing.cost` has the clocks and says what its metrics are."""
    cache = _cache(arms.config, cost_lengths=arms.config.cost_lengths, cost_repeats=arms.config.cost_repeats)
    for rows in _while(arms, capturing.cost(arms.model, cache, arms.report)):
        yield [row("cost", arm=one["setting"], round=one["round"], tokens=one["prompt_tokens"], index=one["index"],
                   metric=one["metric"], value=one["ms"], path=one["path"], reason=one["reason"],
                   captures=one["captures"], bytes=one["graph_bytes"]) for one in rows]


def weights(arms: Arms) -> Iterator[list[Row]]:
    """What weights, KV cache and each graph of hybrid hold, as `memory.memory` weighs them. No clock."""
    with Runtime(arms.model, arm="hybrid", kernels="torch", capture="sync", buckets=arms.config.buckets,
                 max_len=arms.max_len) as runtime:
        yield [row("memory", arm="hybrid", metric=one["step"], value=one["value"], unit=one["unit"])
               for one in memory(runtime, arms.lengths, arms.config.seed)]


def protocol(arms: Arms) -> Iterator[list[Row]]:
    """The published protocol, a fresh process for each of its systems: `firstcalls.run` has the clock. All systems are
    measured, whatever the budget: each is a round. On a GPU every length has a graph of its own, as published; on a CPU
    a bucket."""
    config = arms.config
    rungs = ladder(None, arms.max_len)
    buckets = arms.lengths if _exact(arms) else sorted({bucket_for(n, rungs) or n for n in arms.lengths})
    for done, system in enumerate(firstcalls.SYSTEMS):
        arms.report(f"first calls of {system}", done, len(firstcalls.SYSTEMS))
        found = firstcalls.run(
            system, model=config.model, device=str(arms.model.device), dtype=str(arms.model.dtype),
            lengths=list(arms.lengths), buckets=list(buckets), calls=config.calls, max_len=arms.max_len,
            temperature=config.temperature, seed=config.seed, threads=config.threads)
        yield [row("protocol", arm=system, request=number, tokens=one["prompt_tokens"], index=one["index"],
                   position=one["prompt_tokens"], metric=one["metric"], value=one["ms"], path=one["path"],
                   reason=one["reason"], captures=one["captures"], compiles=one["compiles"], profiled=one["profiled"],
                   state=state(system.partition(",")[0], one["path"], one["bucket"], one["prompt_tokens"],
                               one["captures"])) for number, one in enumerate(found)]


def ipc(arms: Arms) -> Iterator[list[Row]]:
    """What serving through a second process costs: `crossing.crossing` has the clocks and says what its steps are. The
    worker loads the model by its name; the split is between client and engine, not within a step as in the paper."""
    config = arms.config
    arms.report("starting a worker", 0, 1)
    with (Runtime(arms.model, **SPLIT) as here,
          Runtime(config.model, device=config.device, dtype=config.dtype, process="worker", **SPLIT) as worker):
        for runtime in (here, worker):
            runtime.warm_up([crossing.PROMPT])  # outside of the budget
        for done, rows in enumerate(_while(arms, crossing.crossing(here, worker, config.seed)), 1):
            arms.report("two processes in turns", done, crossing.TURNS)
            yield [row("ipc", arm=one["setting"], round=one["round"], tokens=crossing.PROMPT, metric=one["step"],
                       profiled=one["profiled"],
                       **_in_ms(one["value"], one["unit"])) for one in rows]


def _in_ms(value: float, unit: str) -> dict[str, Any]:
    return {"value": value / 1e3, "unit": "ms"} if unit == "µs" else {"value": value, "unit": unit}


def _exact(arms: Arms) -> bool:
    return arms.model.device.type == "cuda" or arms.config.buckets == "exact"


def _cache(config: PaperConfig, **changes: Any) -> CacheConfig:
    return CacheConfig(model=config.model, seed=config.seed, threads=config.threads, **changes)


def _while(arms: Arms, rounds: Iterable[list[Row]]) -> Iterator[list[Row]]:
    """The first round, and further ones while the budget lasts."""
    started = time.monotonic()
    for rows in rounds:
        yield rows
        if time.monotonic() - started >= arms.config.budget_s:
            return
