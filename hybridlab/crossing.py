"""The protocol of a second process: what serving through a worker costs, beside the same engine here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hybridlab import measure, ranges
from hybridlab.client import Client
from hybridlab.errors import MeasureError
from hybridlab.handover import now_ns
from hybridlab.runtime import Runtime

PROMPT, NEW, ECHOES, TURNS = 16, 33, 50, 60  # tokens, tokens, round trips a turn, turns

Row = dict[str, Any]


def crossing(here: Runtime, worker: Runtime, seed: int, turns: int = TURNS) -> Iterator[list[Row]]:
    """The rows of each of `turns` turns (round) of two runtimes with the same settings: setting, step, value, unit.

    "round trip": µs of an empty message there and back, the median of a turn's; "hand-over": µs from an id on the
    worker's host until it is in the client, the median of a request's. "first token" and "gap" (the median of a
    request's): ms of one request to each in a random order, by the clock of whoever asked: of the host here, of the
    client through the worker. Setting "worker / here" is the ratio of the two in the same turn; its "same tokens" are
    the % of new tokens that are equal. Raises: MeasureError where they are not all, in float32.
    """
    engine = worker._engine
    assert isinstance(engine, Client)
    (prompt,), rng = measure.prompts(here.model, [PROMPT], seed).values(), np.random.default_rng(seed)
    for runtime in (here, worker):
        runtime.warm_up([PROMPT])
        runtime.settle()
    with measure.frozen_heap():
        for turn in range(turns):
            found: dict[str, tuple[float, float]] = {}
            ids, seen = dict[str, list[int]](), None
            with measure.quiet_collector():
                for name in rng.permutation(["here", "worker"]).tolist():
                    out = (worker if name == "worker" else here).generate(prompt, max_new_tokens=NEW, stop=[])
                    seen = out.seen or seen
                    first, *gaps = out.client_ms or [out.ttft_ms, *out.itl_ms]
                    found[name], ids[name] = (first, float(np.median(gaps))), out.ids
                trips = [_trip(engine) for _ in range(ECHOES)]
            rows = [_row(turn, "worker", "round trip", float(np.median(trips)), "µs"),
                    _row(turn, "worker", "hand-over", 1e3 * float(np.median(engine.handover_ms)), "µs"),
                    _row(turn, "worker / here", "same tokens", _same(ids, here.model.dtype), "%")]
            for index, step in enumerate(("first token", "gap")):
                rows += [_row(turn, name, step, found[name][index], "ms") for name in ("here", "worker")]
                rows.append(_row(turn, "worker / here", step, found["worker"][index] / found["here"][index], "×"))
            profiled = ranges.listening() or (seen is not None and seen.profiled)
            yield [row | {"profiled": profiled} for row in rows]


def _trip(engine: Client) -> float:
    start = now_ns()
    engine.echo()
    return (now_ns() - start) / 1e3


def _same(ids: dict[str, list[int]], dtype: torch.dtype) -> float:
    equal = sum(one == other for one, other in zip(ids["here"], ids["worker"], strict=True))
    if equal < NEW and dtype == torch.float32:
        raise MeasureError("the worker's greedy tokens differ from those here", f"{NEW - equal} of {NEW}",
                           "report this: the times compare nothing")
    return 100 * equal / NEW


def _row(turn: int, setting: str, step: str, value: float, unit: str) -> Row:
    return {"round": turn, "setting": setting, "step": step, "value": value, "unit": unit}
