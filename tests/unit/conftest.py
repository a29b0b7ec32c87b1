"""Synthetic rows of cache runs and of timed kernels, for the tests of what is drawn and said from them."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

BLANK = {"run_id": "r1", "part": "stream", "round": 0, "setting": "", "request": None, "prompt_tokens": 1,
         "bucket": None, "index": 0, "metric": "", "ms": 1.0, "path": "", "reason": "", "hits": 0, "misses": 0,
         "captures": 0, "evictions": 0, "failures": 0, "capture_ms": 0.0, "graphs": 0, "graph_bytes": 0,
         "capturing": False, "ended_ns": None, "happened": None, "happened_ms": None, "profiled": False}
MIB = 1 << 20
HOSTILE = '<img src=x onerror=alert(1)></script><script>alert(2)</script> $x$ "\''


@pytest.fixture
def hostile() -> str:
    """A name that would be markup, script and formula, if it were let."""
    return HOSTILE


@pytest.fixture
def require_text() -> Callable[[Path], None]:
    """Asserts that nothing of `hostile` has become markup in a page."""
    def check(page: Path) -> None:
        found: list[str] = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attrs: found.append(tag)  # type: ignore[method-assign]
        parser.feed(page.read_text())
        assert "img" not in found
        assert "<img" not in page.read_text()

    return check


class _Passes:
    """A least-recently-used cache of exact lengths, asked for by one stream of requests."""

    def __init__(self, lengths: list[int], passes: int, seed: int) -> None:
        self.lengths, self.passes, self.seed = lengths, passes, seed

    def rows(self, setting: str, capture: str, most: int | None, failing: int | None) -> list[dict[str, Any]]:
        found = []
        for number in range(self.passes):
            rng, held = np.random.default_rng([self.seed, number]), list[int]()
            for request, rows in enumerate(self.lengths):
                found += self._request(rng, held, request, rows, capture, most, failing, round=number, setting=setting)
        return found

    def _request(self, rng: np.random.Generator, held: list[int], request: int, rows: int, capture: str,
                 most: int | None, failing: int | None, **same: Any) -> list[dict[str, Any]]:
        hit, wanted = rows in held, capture != "never" and rows != failing
        same |= {"request": request, "prompt_tokens": rows, "bucket": rows}
        if hit:
            held.remove(rows)
        evicted = int(not hit and wanted and most is not None and len(held) >= most)
        del held[:evicted]
        if hit or wanted:
            held.append(rows)
        made = {"captures": int(not hit and wanted), "evictions": evicted, "failures": int(rows == failing),
                "capture_ms": 40.0 * (not hit and wanted)}
        kept = {"graphs": len(held), "graph_bytes": sum(held) * MIB // 50}
        at_once = capture == "sync" and wanted
        replayed = hit or at_once
        ms = (8 if replayed else 14) * rng.lognormal(0, 0.05) + (40 if at_once and not hit else 0)
        first = {"metric": "ttft", "ms": ms, "path": "graph" if replayed else "jit", "hits": int(hit),
                 "misses": int(not hit), "reason": "replayed" if replayed else f"no graph of {rows} rows"}
        behind = {} if at_once or hit else made
        return [BLANK | same | kept | first | (made if at_once else {}),
                *(BLANK | same | kept | {"metric": "itl", "index": i, "ms": 2 * rng.lognormal(0, 0.1), "path": "graph"}
                  for i in (1, 2)),
                BLANK | same | kept | behind | {"metric": "after", "index": -1, "ms": 0.1 + 41 * bool(behind)}]


def _cost(settings: tuple[str, ...], lengths: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    rng, found = np.random.default_rng(5), []
    for number in range(repeats):
        for k, setting in enumerate(settings):
            for rows in lengths:
                jit, size = 14 + rows / 25, (1 + k) * (2 * MIB + rows * MIB // 8)
                times = {"rehearse": jit, "capture": 30 + rows / 20, "instantiate": 6.0, "first_replay": jit,
                         "replay": 6 + rows / 20, "jit": jit}
                for metric, ms in times.items():
                    for index in range(3 if metric in ("replay", "jit") else 1):
                        found.append(BLANK | {
                            "part": "cost", "round": number, "setting": setting, "prompt_tokens": rows, "bucket": rows,
                            "metric": metric, "index": index, "ms": ms * rng.lognormal(0, 0.03), "graph_bytes": size,
                            "path": {"replay": "graph", "first_replay": "graph", "jit": "jit"}.get(metric, "")})
    return found


def _disturb(ways: dict[str, float], rounds: int, gaps: int, failing: str | None) -> list[dict[str, Any]]:
    rng, found = np.random.default_rng(7), []
    for number in range(rounds):
        for way, factor in ways.items():
            same = {"part": "disturb", "round": number, "setting": way}
            for i in range(gaps):
                busy = way != "quiet" and i % 2 == 0
                ms = 2 * rng.lognormal(0, 0.08) * (factor if busy else 1)
                found.append(BLANK | same | {"metric": "itl", "index": i + 1, "ms": ms, "path": "graph",
                                             "capturing": busy})
            for i in range(0 if way == "quiet" else 20):
                failed = way == failing and i == 3
                found.append(BLANK | same | {"metric": "capture", "index": i, "prompt_tokens": 64, "bucket": 64,
                                             "ms": 60 * rng.lognormal(0, 0.1), "failures": int(failed),
                                             "captures": int(not failed),
                                             "reason": "operation not permitted when <stream> captures" * failed})
    return found


@pytest.fixture
def cache_rows() -> Callable[..., pd.DataFrame]:
    """A builder of the rows of one cache run: `stream` maps a setting to (capture, most graphs)."""
    def build(stream: dict[str, tuple[str, int | None]] | None = None, *, requests: int = 60, passes: int = 3,
              failing: int | None = None, cost: tuple[str, ...] = ("shared", "private", "outputs kept"),
              lengths: tuple[int, ...] = (16, 64, 256), repeats: int = 8, ways: dict[str, float] | None = None,
              gaps: int = 200, failing_way: str | None = None, run_id: str = "r1") -> pd.DataFrame:
        asked = (np.random.default_rng(3).zipf(1.3, requests) * 7 % 400 + 1).tolist()
        every = _Passes([int(rows) for rows in asked], passes, 11)
        found = [row for setting, (capture, most) in (DEFAULT if stream is None else stream).items()
                 for row in every.rows(setting, capture, most, failing)]
        found += _cost(cost, lengths, repeats)
        found += _disturb(WAYS if ways is None else ways, passes, gaps, failing_way)
        return pd.DataFrame(found, columns=list(BLANK)).assign(run_id=run_id).astype(
            {"request": "Int64", "bucket": "Int64"}).sample(frac=1, random_state=1)  # in no order

    return build


DEFAULT = {"capture=never": ("never", None), "capture=sync": ("sync", None), "capture=async": ("async", None),
           "capture=async, cache_graphs=5": ("async", 5)}
WAYS = {"quiet": 1.0, "thread": 1.3, "thread flush": 6.0, "cooperative": 1.1, "sync": 15.0}


STEPS = {"torch": (5000.0, 100), "fused, no graph": (8000.0, 20), "fused": (3000.0, 20), "fused, pdl": (2500.0, 20)}
CALLS = {"torch": 20.0, "kernel": 10.0, "kernel, pdl": 8.0}


@pytest.fixture
def kernel_rows() -> Callable[..., pd.DataFrame]:
    """A builder of the rows of timed kernels, in no order. `contexts`: how many µs longer a step takes at each. Round i
    adds i - n // 2 times 100 µs to a step and 1 µs to a call, so that a median is the time given, and differences of
    one round are all the same. Reads run at 4 GB/s, and at 5 beside steps that take longer."""
    def build(steps: dict[str, tuple[float, int]] | None = None, calls: dict[str, float] | None = None, *, n: int = 7,
              contexts: dict[int, float] | None = None, run_id: str = "r1") -> pd.DataFrame:
        found: list[dict[str, Any]] = []

        def add(metric: str, op: str, variant: str, context: int, us: float, jitter: float, size: int,
                kernels: int | None = None) -> None:
            for i in range(n):
                time = us + (i - n // 2) * jitter
                found.append({"run_id": run_id, "metric": metric, "op": op, "variant": variant, "rows": 2, "depth": 3,
                              "context": context, "calls": 1, "kernels": kernels, "ms": time / 1e3, "us": time,
                              "bytes": size, "flops": 12, "order": len(found)})

        for context, more in ({1: 0.0, 64: 1000.0} if contexts is None else contexts).items():
            for name, (us, kernels) in (STEPS if steps is None else steps).items():
                add("step", "step", name, context, us + more, 100.0, 8_000_000 + 1000 * int(more), kernels)
            add("read", "read", "step", context, 8.0 if more else 10.0, 0.0, 40_000)
            for name, us in (CALLS if calls is None else calls).items():
                add("op", "attend_next", name, context, us + more / 100, 1.0, 8_000)
            add("read", "read", "attend_next", context, 8.0 if more else 10.0, 0.0, 40_000)
        for name, us in (CALLS if calls is None else calls).items():
            add("op", "project qkv", name, 0, 2 * us, 1.0, 32_000)
        add("read", "read", "project qkv", 0, 10.0, 0.0, 40_000)
        return pd.DataFrame(found).astype({"kernels": "Int64"}).sample(frac=1, random_state=2)

    return build
