"""The protocol of a cold start: a fresh process, from its start to its first token and its first replay of a graph."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridlab import conversation
from hybridlab.children import module
from hybridlab.config import REPLAYING, RuntimeConfig, build
from hybridlab.errors import ConfigError, MeasureError
from hybridlab.progress import Report

CACHES = ("warm", "cold")
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
STAGES = ("process", "imports", "model", "runtime", "first token", "first replay")
PROMPT, TRIES = 16, 5  # tokens, requests

Row = dict[str, Any]


def run(model: str = "tiny", arm: str = "hybrid", policy: str = "whole", device: str = "auto",
        dtype: str | None = None, caches: Sequence[str] = CACHES, repeats: int = 3, seed: int = 0,
        timeout_s: float = 600.0, report: Report = lambda what, done, total: None) -> list[Row]:
    """Rows of `repeats` fresh processes for each state of the caches: caches, process, stage, ms (of this stage) and
    total_ms (since just before the process was started).

    Stages, each from the end of the one before: "process", until Python runs our first line; "imports", of torch,
    transformers and hybridlab; "model", weights on the device; "runtime", buffers and lowering; "first token" of a
    prompt of 16 tokens, its id on the host, by the path that is ready first, compilations included; and in arms that
    replay "first replay", until a request was answered from a graph that was captured behind the first. Caches: "warm",
    compiled kernels where earlier processes left them (the first of a machine leaves them); "cold", none anywhere.
    Files that the system holds in memory stay there.
    Raises: ConfigError or ModelError for bad input, before a process starts; MeasureError for one that fails or takes
    longer than `timeout_s`.
    """
    settings = {"arm": arm, "policy": policy, "device": device, "dtype": dtype}
    from hybridlab import measure, outlines  # late: the process that is timed begins here, too

    build(RuntimeConfig, settings)
    wrong = [word for word in caches if word not in CACHES]
    if wrong or repeats < 1:
        raise ConfigError(f"caches is {list(caches)}, repeats {repeats}", f"caches are {' or '.join(CACHES)}",
                          "give some of these, and at least one repeat")
    (prompt,) = measure.prompts(outlines.outline(model, device=device, dtype=dtype), [PROMPT], seed).values()
    rows, total = list[Row](), len(caches) * repeats
    for done in range(total):
        state, process = caches[done % len(caches)], done // len(caches)
        report(f"cold start, {state} caches", done, total)
        with tempfile.TemporaryDirectory(prefix="hybridlab-") as empty:
            places = {name: str(Path(empty) / name) if state == "cold" else os.environ.get(name) for name in VARIABLES}
            started, ended = _child(json.dumps({"model": model, "settings": settings, "prompt": prompt}),
                                    {name: place for name, place in places.items() if place}, timeout_s)
        before = started
        for stage, at in ended.items():
            rows.append({"caches": state, "process": process, "stage": stage, "ms": (at - before) / 1e6,
                         "total_ms": (at - started) / 1e6})
            before = at
    return rows


def _child(asked: str, environment: dict[str, str], timeout_s: float) -> tuple[int, dict[str, int]]:
    """When a process was started, and when each of its stages ended, in ns of the clock that both share."""
    started = _now()
    with conversation.Conversation(module("hybridlab.coldstart"), environment) as child:
        return started, child.only(asked, timeout_s, "a cold start", "allow more time")


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def _stages(model: str, settings: dict[str, Any], prompt: list[int], note: Callable[[str], None]) -> None:
    from hybridlab import models
    from hybridlab.runtime import Runtime

    note("imports")
    loaded = models.load(model, device=settings["device"], dtype=settings["dtype"])
    note("model")
    with Runtime(loaded, **settings) as runtime:
        note("runtime")
        runtime.generate(prompt, max_new_tokens=1, stop=[])
        note("first token")
        if settings["arm"] not in REPLAYING:
            return
        for _ in range(TRIES):
            runtime.settle()
            if "graph" in runtime.generate(prompt, max_new_tokens=2, stop=[]).paths:
                note("first replay")
                return
        raise MeasureError(f"no graph was replayed in {TRIES} requests", f"model {model}", "report this")


def _main() -> None:
    ended = {"process": _now()}
    questions, answer = conversation.answering(0)
    _stages(**next(questions), note=lambda stage: ended.update({stage: _now()}))
    answer(ended)


if __name__ == "__main__":
    _main()
