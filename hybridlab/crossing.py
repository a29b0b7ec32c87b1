"""The protocol of a second process: what serving through a worker costs, beside the same engine here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hybridlab import measure
from hybridlab.client import Client
from hybridlab.handover import now_ns
from hybridlab.runtime import Runtime

PROMPT, NEW, ECHOES, TURNS = 16, 33, 50, 60  # tokens, tokens, round trips a turn, turns

Row = dict[str, Any]


def crossing(here: Runtime, worker: Runtime, seed: int, turn_done: Callable[[int], Any] = lambda turn: None,
             turns: int = TURNS) -> Iterator[Row]:
    """Rows of `turns` turns (round) of two runtimes with the same settings: setting, step, value, unit.

    "round trip": µs of an empty message there and back, the median of a turn's; "hand-over": µs from an id on the
    worker's host until it is in the client, the median of a request's. "first token" and "gap" (the median of a
    request's): ms of one request to each in a random order, by the clock of whoever asked: of the host here, of the
    client through the worker. Setting "worker / here" is the ratio of the two in the same turn.
    """
    engine = worker._engine
    assert isinstance(engine, Client)
    prompt, rng = [number % 7 + 3 for number in range(PROMPT)], np.random.default_rng(seed)
    for runtime in (here, worker):
        runtime.warm_up([PROMPT])
        runtime.settle()
    with measure.frozen_heap():
        for turn in range(turns):
            found: dict[str, tuple[float, float]] = {}
            with measure.quiet_collector():
                for name in rng.permutation(["here", "worker"]).tolist():
                    out = (worker if name == "worker" else here).generate(prompt, max_new_tokens=NEW, stop=[])
                    first, *gaps = out.client_ms or [out.ttft_ms, *out.itl_ms]
                    found[name] = first, float(np.median(gaps))
                trips = [_trip(engine) for _ in range(ECHOES)]
            yield _row(turn, "worker", "round trip", float(np.median(trips)), "µs")
            yield _row(turn, "worker", "hand-over", 1e3 * float(np.median(engine.handover_ms)), "µs")
            for index, step in enumerate(("first token", "gap")):
                for name in ("here", "worker"):
                    yield _row(turn, name, step, found[name][index], "ms")
                yield _row(turn, "worker / here", step, found["worker"][index] / found["here"][index], "×")
            turn_done(turn + 1)


def _trip(engine: Client) -> float:
    start = now_ns()
    engine.echo()
    return (now_ns() - start) / 1e3


def _row(turn: int, setting: str, step: str, value: float, unit: str) -> Row:
    return {"round": turn, "setting": setting, "step": step, "value": value, "unit": unit}
