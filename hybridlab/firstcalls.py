"""The published protocol: a fresh process for each system, no warm-up, a few first calls of each length, then repeats.

Five first calls give mean and standard deviation, and a hundred repeats of the same call what is published as P99.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hybridlab import conversation
from hybridlab.children import module

FIRST = 5          # calls of each length that the published mean is over
TIMEOUT_S = 900.0
# Name: what a runtime is made with beside the lengths. The first three programs of the public repository, in its order.
SYSTEMS: dict[str, dict[str, Any]] = {
    "eager": {"arm": "eager"},
    "graph, captured in the request": {"arm": "graph", "capture": "sync"},
    "hybrid, captured ahead": {"arm": "hybrid", "capture": "ahead"},
}

Row = dict[str, Any]


def run(system: str, **asked: Any) -> list[Row]:
    """Rows of one system in a fresh process: metric "first" (index 0 to 4) of each length in turn, then "repeated"
    (index 0 to `calls` - 1), each with prompt_tokens, ms, path, reason, bucket, captures, compiles and
    profiled.

    The clock is the runtime's: token ids on the host → first new id there. Outside of it, as published: starting the
    process, loading the model, and what a system captures ahead. Nothing is discarded, nothing interleaved, garbage is
    collected when Python likes. `asked`: model, device, dtype, lengths, buckets (prompt lengths that have a graph),
    calls, max_len, temperature, seed and threads. Raises: MeasureError.
    """
    text = json.dumps(asked | {"settings": SYSTEMS[system]})
    with conversation.Conversation(module("hybridlab.firstcalls")) as child:
        found: list[Row] = child.only(text, TIMEOUT_S, f"the first calls of {system}", "lower calls")
    return found


def _calls(model: str, device: str, dtype: str | None, settings: dict[str, Any], lengths: list[int],
           buckets: list[int], calls: int, max_len: int, temperature: float, seed: int, threads: int) -> Iterator[Row]:
    import torch

    from hybridlab import measure, models, ranges
    from hybridlab.runtime import Runtime

    torch.set_num_threads(threads)
    loaded = models.load(model, device=device, dtype=dtype)
    prompts = measure.prompts(loaded, lengths, seed)
    graphs: dict[str, Any] = {} if settings["arm"] == "eager" else {"buckets": buckets}
    with Runtime(loaded, **settings, **graphs, max_len=max_len) as runtime:
        for metric, count in (("first", FIRST), ("repeated", calls)):
            for length in lengths:
                for index in range(count):
                    before = runtime.counters.as_dict()
                    out = runtime.generate(prompts[length], 1, temperature, seed=seed + index, stop=[])
                    after = runtime.counters.as_dict()
                    yield {"metric": metric, "prompt_tokens": length, "index": index, "ms": out.ttft_ms,
                           "path": out.paths[0], "reason": out.reasons[0] or "", "bucket": out.bucket,
                           "profiled": ranges.listening(),
                           **{name: int(after[name] - before[name]) for name in ("captures", "compiles")}}


if __name__ == "__main__":
    questions, answer = conversation.answering(0)
    answer(list(_calls(**next(questions))))
