"""One config about endurance in, one recorded run out: requests that evict all along, canaries, a worker that dies."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import psutil
import torch

from hybridlab import experiment, gpus, growth, measure, names, records, workload
from hybridlab.config import SoakConfig, as_dict, build
from hybridlab.errors import ConfigError, RunError, WorkerDied
from hybridlab.growth import Quantity, Slope
from hybridlab.progress import Report, reporter
from hybridlab.report import Grid, number
from hybridlab.runtime import Runtime
from hybridlab.tokens import Output

TIMES = 4                  # more keys than the cache holds
LONGEST = 256              # tokens of a prompt
NEW = 8                    # tokens of a request
FEWEST = 120               # requests, however short the time
EVERY = 10                 # requests from one canary to the next
STOPPED_S = 0.3            # that a stopped worker rests
ASKED = 1000               # requests that are made at once
Row = dict[str, Any]


class SoakResult(experiment.Shown):
    """The recorded run of a soak; the columns of its rows are `schemas.SOAK`."""

    kind = "soak"

    @property
    def config(self) -> SoakConfig:
        assert isinstance(self.recorded.config, SoakConfig)
        return self.recorded.config

    def _sizes(self) -> list[str]:
        rows = self.rows
        return [f"{len(rows):,} requests", f"{int(rows['canary'].sum()):,} canaries"] if len(rows) else []

    def slopes(self) -> dict[Quantity, Slope]:
        """See `growth.slopes`."""
        return growth.slopes(self.rows)

    def grid(self) -> Grid:
        """What is watched, with its slope and verdict, as text."""
        lines = [[quantity.words, number(found.first), number(found.last),
                  f"{found.per_hour:.3g} [{found.low:.3g}, {found.high:.3g}]", f"{found.growth:+.3g}",
                  "grows" if found.grows(quantity) else "steady"] for quantity, found in self.slopes().items()]
        return Grid(f"Soak · {self.caption}", ["what", "at first", "at last", "an hour", "in all", "verdict"], lines,
                    f"{self._counted()} Slopes with 95 % intervals after the first tenth; it grows if the interval is "
                    "above 0 and what it adds up to is above a limit.")

    def reading(self) -> str:
        """The result in words; every number is computed from the rows."""
        if not len(self.rows):
            return f"Run {self.run_id}: {self.reason or self.status}."
        verdict = "Nothing grows." if self.status == "complete" else f"It failed: {self.reason}."
        return f"{self._counted()}\n{verdict}"

    def _counted(self) -> str:
        rows = self.rows
        if not len(rows):
            return "Nothing was served."
        events, back = rows["event"].str.split(",").explode().value_counts(), rows["recovery_ms"].dropna()
        said = (f"{len(rows):,} requests in {rows['at_s'].max() / 60:.1f} minutes, {int(rows['evictions'].sum()):,} "
                f"evictions; {int(rows['canary'].sum()):,} canaries gave their recorded tokens.")
        if len(back):
            said += (f" The worker was stopped {events.get('stop', 0)} and killed {events.get('kill', 0)} times; "
                     f"another one served after {back.max() / 1e3:.1f} s at most.")
        return said


def run(config: SoakConfig | Mapping[str, Any], *, root: Path | str | None = None,
        progress: bool = True) -> SoakResult:
    """Soaks for the config's minutes and records the run: complete only if every canary was right, nothing grew and
    nothing was left behind.

    Raises: ConfigError or ModelError for bad input, before anything is written; RunError for a canary that is wrong,
    and whatever else ends it, after the run was marked failed.
    """
    config = build(SoakConfig, as_dict(config) if isinstance(config, SoakConfig) else config)
    workload.require_known(config.trace)
    buckets = keys(config)
    with reporter(progress) as report, experiment.recording(config, root) as target:
        before = _children()
        with experiment.threads(1, on_cpu=True), _Soak(config, buckets) as soak:
            for rows in soak.rows(report):
                target.append(rows)
        problems = verdict(records.read(target.path).rows)
        if left := _children() - before:
            problems.append(f"{len(left)} processes were left behind")
        target.finish("failed" if problems else "complete", "; ".join(problems))
    return SoakResult.open(target.path)


def keys(config: SoakConfig) -> tuple[int, ...]:
    """The prompt lengths that are captured, four times more than the cache holds. Raises: ConfigError."""
    longest = min(LONGEST, (names.context(config.model) or LONGEST + NEW) - NEW)
    count = TIMES * config.cache_graphs
    if longest < count:
        raise ConfigError(f"cache_graphs is {config.cache_graphs}", f"{TIMES} times as many prompt lengths do not fit "
                          f"into the {longest} tokens that a prompt may have", "lower it")
    return tuple(longest * number // count for number in range(1, count + 1))


def verdict(rows: pd.DataFrame) -> list[str]:
    """What is wrong in the rows of a soak, in words; nothing if they are sound. Raises: StatisticsError."""
    return [f"{quantity.words} grows by {found.growth:.3g}: {found.per_hour:.3g} [{found.low:.3g}, {found.high:.3g}] "
            "an hour" for quantity, found in growth.slopes(rows).items() if found.grows(quantity)]


def _children() -> set[int]:
    gc.collect()
    return {child.pid for child in psutil.Process().children(recursive=True)}


class _Soak:
    """The runtime that is soaked, what it is asked, and what it should answer. A context manager."""

    def __init__(self, config: SoakConfig, buckets: tuple[int, ...]) -> None:
        self.config, self.buckets, self.draw = config, buckets, Random(config.seed)
        self.seconds = 60 * config.minutes
        self.canaries: dict[int, list[int]] = {}
        self.asked: list[workload.Asked] = []
        self._batch = self.life = 0

    def __enter__(self) -> _Soak:
        """Records the canaries and warms up, outside of the time: on a CPU each length is compiled for, once."""
        wanted = [self.buckets[0], self.buckets[len(self.buckets) // 2], self.buckets[-1]]
        self.runtime = self._made("eager")
        self.prompts = measure.prompts(self.runtime.model, range(1, self.buckets[-1] + 1), self.config.seed)
        if self.runtime.model.dtype != torch.float32:  # where a near-tie may fall either way, only with itself
            self.runtime.close()
            self.runtime = self._made(self.config.arm)
        with self.runtime:
            self.canaries = {length: self._answer(length).ids for length in wanted}
        self._begin()
        self.runtime.warm_up(self.buckets)
        self.gauge, self.hand = _Gauge(self.runtime.device), _Hand(self._moments(), self.process)
        return self

    def __exit__(self, *_: object) -> None:
        self.hand.close()
        self.gauge.close()
        self.runtime.close()

    def _made(self, arm: str) -> Runtime:
        config, settings = self.config, dict[str, Any]()
        if arm != "eager":
            settings = {"buckets": self.buckets, "cache_graphs": config.cache_graphs}
        return Runtime(config.model, arm=arm, policy=config.policy, device=config.device, dtype=config.dtype,
                       process=config.process, max_len=self.buckets[-1] + NEW, **settings)

    def _begin(self) -> None:
        self.life += 1
        self.runtime = self._made(self.config.arm)
        pid = self.runtime.worker_pid
        self.process = None if pid is None else psutil.Process(pid)
        self.counted = {"captures": 0.0, "evictions": 0.0}

    def _moments(self) -> list[tuple[float, str]]:
        """When the worker is stopped and killed: each once in two minutes, at random in one half of them or the other,
        as what was killed can be stopped no more."""
        if self.process is None:
            return []
        count = max(1, round(self.config.minutes / 2))
        span = self.seconds / count
        return [(span * (number + self.draw.uniform(*where)), kind) for number in range(count)
                for where, kind in (((0.1, 0.5), "stop"), ((0.5, 0.9), "kill"))]

    def rows(self, report: Report) -> Iterator[list[Row]]:
        """Requests until the time is over, a list of rows about every second. Raises: RunError for a wrong canary."""
        start, found, flushed, request = time.monotonic(), list[Row](), 0.0, 0
        self.hand.start()
        while (at := time.monotonic() - start) < self.seconds or request < FEWEST:
            canary = request % EVERY == 0
            length = self.draw.choice(sorted(self.canaries)) if canary else self._next()
            row = self._served(length, canary)
            found.append({"request": request, "at_s": time.monotonic() - start} | row)
            request += 1
            if at - flushed > 1:
                report(f"{request} requests, {max(0.0, self.seconds - at):.0f} s left", int(at), int(self.seconds))
                yield found
                flushed, found = at, []
        yield found

    def _next(self) -> int:
        if not self.asked:
            self.asked = workload.load(self.config.trace, ASKED, NEW, self.config.seed + self._batch,
                                       self.buckets[-1] + NEW)
            self._batch += 1
        return self.asked.pop().prompt_tokens

    def _answer(self, length: int) -> Output:
        return self.runtime.generate(self.prompts[length], max_new_tokens=NEW, stop=[])

    def _served(self, length: int, canary: bool) -> Row:
        recovery_ms = None
        try:
            out = self._answer(length)
        except WorkerDied:
            if not self.hand.killed(self.process):
                raise
            died = time.monotonic()
            self.runtime.close()
            self._begin()
            self.hand.process = self.process
            out = self._answer(length)
            recovery_ms = (time.monotonic() - died) * 1e3
        if canary and out.ids != self.canaries[length]:
            raise RunError(f"tokens of a canary of {length} tokens changed", f"{out.ids}, recorded were "
                           f"{self.canaries[length]}; path {out.paths[0]}", "report this: what is served is wrong")
        counters = self.runtime.counters
        happened = {name: int(counters[name] - before) for name, before in self.counted.items()}
        self.counted = {name: counters[name] for name in self.counted}
        return {"prompt_tokens": length, "canary": canary, "ttft_ms": out.ttft_ms, "path": out.paths[0],
                "itl_ms": statistics.median(out.itl_ms), **happened, "graphs": int(counters["graphs"]),
                **self.gauge.read(self.process), "event": self.hand.happened(), "recovery_ms": recovery_ms,
                "life": self.life}


class _Gauge:
    """Memory, open files and threads of this process and its worker, and memory in use on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.own, self._handle, self._nvml = psutil.Process(), None, None
        if device.type == "cuda":
            import pynvml

            self._handle, self._nvml = gpus.opened(pynvml, device.index or 0), pynvml

    def read(self, worker: psutil.Process | None) -> Row:
        found = {"rss_bytes": 0, "files": 0, "threads": 0}
        for process in filter(None, (self.own, worker)):
            with suppress(psutil.Error), process.oneshot():  # a worker may be killed between two looks
                found["rss_bytes"] += process.memory_info().rss
                found["files"] += process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
                found["threads"] += process.num_threads()
        return found | {"gpu_bytes": self._nvml and self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used}

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()


class _Hand:
    """Stops and kills a worker at given moments, in seconds after `start`, from a thread of its own."""

    def __init__(self, moments: list[tuple[float, str]], process: psutil.Process | None) -> None:
        self.moments, self.process = moments, process
        self._over, self._done, self._victims = threading.Event(), deque[str](), set[psutil.Process]()
        self._thread = threading.Thread(target=self._work, name="hybridlab-soak", daemon=True)

    def start(self) -> None:
        self._begun = time.monotonic()
        self._thread.start()

    def killed(self, process: psutil.Process | None) -> bool:
        return process in self._victims

    def happened(self) -> str:
        """What was done since this was asked last."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        return ",".join(found)

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(STOPPED_S + 10)

    def _work(self) -> None:
        for at_s, kind in self.moments:
            if self._over.wait(max(0.0, at_s - (time.monotonic() - self._begun))):
                return
            process = self.process
            assert process is not None
            with suppress(psutil.NoSuchProcess):
                if kind == "kill":
                    self._victims.add(process)
                    process.kill()
                else:
                    process.suspend()
                    self._over.wait(STOPPED_S)
                    process.resume()
                self._done.append(kind)
