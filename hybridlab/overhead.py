"""The protocol of overhead: what ranges and rows add to a token, beside the gap between two tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa

from hybridlab import measure, ranges, schemas, tails
from hybridlab.runtime import Runtime
from hybridlab.tokens import Output

LOOPS, TURNS = 2000, 15
PROMPT, NEW, REQUESTS = 16, 33, 10
ROUND = 40  # requests whose rows are made together: four arms at ten prompt lengths, as a run has them by default

Row = dict[str, Any]


def overhead(runtime: Runtime, arm: str, seed: int = 0) -> Iterator[Row]:
    """Rows of what one token costs to observe, a turn (round) each: step, value, unit.

    "span": ns in and out of one range where nobody listens; "spans": ranges that one decode step enters, counted;
    "stamp": ns of the call after each token that takes its end and asks for preemptions; "row": ns a token from what a
    round of requests answered to finished rows in a table, all of it outside of every clock. "itl": ns between
    two tokens in the same process, medians of requests. "share": (span · spans + stamp + row) / itl.
    """
    (prompt,) = measure.prompts(runtime.model, [PROMPT], seed).values()
    runtime.warm_up([PROMPT])
    spans = _spans(runtime, prompt)
    with measure.frozen_heap(), measure.quiet_collector(), tails.Watch() as watch:
        for turn in range(TURNS):
            answers = [runtime.generate(prompt, max_new_tokens=NEW, stop=[]) for _ in range(REQUESTS)]
            itl = 1e6 * float(np.median([np.median(out.itl_ms) for out in answers]))
            found = {"span": _each(_one_span), "stamp": _each(watch.sample), "row": _row(answers[0], arm, watch)}
            found["share"] = 100 * (found["span"] * spans + found["stamp"] + found["row"]) / itl
            for step, value in {**found, "spans": float(spans), "itl": itl}.items():
                unit = "%" if step == "share" else "ranges" if step == "spans" else "ns"
                yield {"round": turn, "setting": arm, "step": step, "value": value, "unit": unit}


def _one_span() -> None:
    with ranges.span("decode", PROMPT):
        pass


def _each(call: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    for _ in range(LOOPS):
        call()
    return (time.perf_counter_ns() - start) / LOOPS


def _spans(runtime: Runtime, prompt: list[int]) -> int:
    """Ranges of one decode step: those of a request of three tokens less those of one of two."""
    counts = []
    for new in (2, 3):
        names = list[str]()

        def record(name: str, names: list[str] = names) -> Any:
            names.append(name)
            return nullcontext()

        with ranges.recorded(record):
            runtime.generate(prompt, max_new_tokens=new, stop=[])
        counts.append(len(names))
    return counts[1] - counts[0]


def _row(out: Output, arm: str, watch: tails.Watch) -> float:
    """ns a token of what `measure.rounds` and a run do with a round of answered requests, collections aside."""
    common = {"round": 0, "arm": arm, "policy": "", "prompt_tokens": PROMPT, "process": 0}
    ended = [watch.sample() for _ in out.ids]
    start = time.perf_counter_ns()
    rows = [common | {"request": request} | row for request in range(ROUND)
            for row in measure.answered(out, PROMPT, measure.ITL, ended, {"captures": 0, "compiles": 0})]
    rows = measure.explained(rows, watch)
    found = [{**row, "run_id": "overhead"} for row in rows]
    columns = {name: [row[name] for row in found] for name in schemas.ABLATION.names}
    pa.Table.from_pydict(columns, schema=schemas.ABLATION)
    return (time.perf_counter_ns() - start) / len(rows)
