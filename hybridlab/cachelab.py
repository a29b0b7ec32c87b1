"""One config about the graph cache in, one recorded run out: a request stream under several settings, and more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hybridlab import (
    cachetables,
    capturing,
    experiment,
    measure,
    models,
    names,
    records,
    roofline,
    serving,
    soundness,
    stats,
    tallies,
    workload,
)
from hybridlab.config import CacheConfig, as_dict, build
from hybridlab.disturbing import require_ways
from hybridlab.errors import ConfigError, RunError
from hybridlab.parameters import compared
from hybridlab.progress import Report, reporter
from hybridlab.report import Grid
from hybridlab.runtime import Runtime
from hybridlab.telemetry import Telemetry
from hybridlab.workload import Asked

Settings = dict[str, dict[str, Any]]
OF_GRAPHS = ("capture", "behind", "admission", "cache_bytes", "cache_graphs", "pool", "eviction")  # of RuntimeConfig

Row = dict[str, Any]


class CacheResult(experiment.Shown):
    """The recorded run of an experiment about the graph cache; the columns of its rows are `schemas.CACHE`."""

    kind = "cache"

    @property
    def config(self) -> CacheConfig:
        assert isinstance(self.recorded.config, CacheConfig)
        return self.recorded.config

    @property
    def floors(self) -> pd.DataFrame | None:
        """The least time of each first token and gap on this machine, see `roofline.of_run`; None for older runs."""
        return roofline.floors(self.recorded.extra)

    @property
    def settings(self) -> list[str]:
        """The settings of the request stream that have rows, in the config's order."""
        there = set(self._stream["setting"])
        return [name for name in compared(self.config) if name in there]

    @property
    def _stream(self) -> pd.DataFrame:
        return self.rows[self.rows["part"] == "stream"]

    def requests(self) -> list[Asked]:
        """The requests as they were served, from the rows of the first pass."""
        rows = self._stream
        first = rows[(rows["round"] == 0) & (rows["setting"] == rows["setting"].iloc[0])] if len(rows) else rows
        tokens = first[first["metric"].isin(["ttft", "itl"])]
        return [Asked(int(own["prompt_tokens"].iloc[0]), len(own)) for _, own in tokens.groupby("request")]

    def table(self) -> pd.DataFrame:
        """One line a setting of the request stream.

        requests: first tokens timed, in all `passes`. ttft_mean: ms, over all of them, with the 95 % interval of
        Student's t over the means of the passes, which are what repeats (None for under three). ttft_p50, ttft_p99,
        itl_p50, itl_p99: ms with their intervals; None where n does not allow one. hit_rate: the share of requests
        whose graph was there; a first token that was captured and then replayed is none. after_mean: ms from a last
        token until the runtime is free. tokens_per_s: of a pass, see `tallies.throughput`. captures, evictions,
        failures, capture_ms: of one pass, building and settling included, mean of the passes. peak_graphs,
        peak_graph_bytes: the most held at the end of an interval. With floors also ttft_limit and itl_limit, ms, and
        ttft_of_limit and itl_of_limit, the shares reached, see `limits`.
        """
        if len(self.rows):
            stats.one_run(self.rows)
        groups = {name: self._stream[self._stream["setting"] == name] for name in self.settings}
        rates = tallies.throughput(self.rows).set_index("setting")["tokens_per_s"] if groups else {}
        lines = [{"setting": name, "passes": own["round"].nunique(), "tokens_per_s": float(rates[name])}
                 | cachetables.of_setting(own, self.floors) for name, own in groups.items()]
        return pd.DataFrame(lines, dtype=object)

    def grid(self) -> Grid:
        """The table as text, for a terminal, the README and its check."""
        return cachetables.grid(self.table().to_dict("records"), self.caption)

    def slow(self) -> pd.DataFrame:
        """What happened in the slowest first tokens and gaps of each setting, and in the rest: see `soundness.slow`."""
        own = self._stream[self._stream["metric"].isin(["ttft", "itl"])]
        return soundness.slow(own.assign(arm=own["setting"]), alike=("arm", "metric"))

    def reading(self) -> str:
        """The result in words; every number is computed from the rows."""
        if not self.settings:
            return f"Run {self.run_id} holds no pass of the requests: {self.recorded.reason or self.status}."
        asked = self.requests()
        lengths = len({one.prompt_tokens for one in asked})
        parts = [f"{len(asked)} requests with {lengths} prompt lengths were served from a cold cache in each pass.",
                 *map(cachetables.words, self.table().to_dict("records")), tallies.throughput_words(self.rows)]
        if slowest := soundness.slow_words(self.slow()):
            parts.append(f"O{slowest[1:]}.")
        parts += filter(None, [self.during()])
        if self.on_cpu:
            parts.append("These are CPU timings: a graph is a tape of the recorded calls here; they are not GPU times.")
        return "\n".join(parts + tallies.cut_short(self.rows, {
            "stream": self.config.repeats, "cost": self.config.cost_repeats, "disturb": self.config.repeats}))


def run(config: CacheConfig | Mapping[str, Any], root: Path | str | None = None, progress: bool = True) -> CacheResult:
    """Serves a request stream under every setting of the config, from a cold cache each time, and records the run;
    then times captures and what they do to decoding, if the config asks for it.

    Raises: ConfigError, ModelError or PromptError for bad input, before anything is written. Whatever goes wrong
    later, Ctrl-C included, leaves a run that is marked failed with the rows of the finished passes, and is re-raised.
    RunError when, in float32, the tokens of a request differ between two settings or from arm eager, or when a kernel
    was compiled inside a pass.
    """
    config = checked(config)
    settings = compared(config)
    if (context := names.context(config.model)) is not None:
        _fit(config, settings, context)
    with reporter(progress) as report:
        report(f"loading {config.model}", 0, 1)
        model = models.load(config.model, device=config.device, dtype=config.dtype)
        lab = Lab(model, config, report)
        on_cpu = next(model.parameters()).device.type == "cpu"
        with experiment.threads(config.threads, on_cpu), experiment.recording(config, root) as target:
            target.finish("complete", extra=lab.record(target))
            report(f"run {target.path.name}: complete", 1, 1)  # what stays in a notebook
    return CacheResult.open(target.path)


def checked(config: CacheConfig | Mapping[str, Any]) -> CacheConfig:
    """The config, all of it looked at that needs no model. Raises: ConfigError."""
    config = build(CacheConfig, as_dict(config) if isinstance(config, CacheConfig) else config)
    compared(config)
    workload.require_known(config.trace)
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    require_ways(config.disturb, torch.device("cuda" if on_gpu else "cpu"))
    for field in ("cost_lengths", "disturb"):
        values = getattr(config, field)
        if len(set(values)) != len(values):
            raise ConfigError(f"{field} holds a value twice", f"{list(values)}", "each is measured once a round")
    return config


def _fit(config: CacheConfig, settings: Settings, context: int | None) -> tuple[list[Asked], int]:
    """The requests, and rows of the static KV cache: what the longest of them and the largest bucket need, in steps of
    64, within the context. The same for all settings."""
    names.require_fit(config, context)
    requests = workload.load(config.trace, config.requests, config.new_tokens, config.seed, context)
    largest = max((max(entry["buckets"]) for entry in settings.values()
                   if isinstance(entry.get("buckets"), list | tuple)), default=0)
    if context is not None and largest > context:
        raise ConfigError(f"a bucket of {largest} tokens", f"the context of {config.model} holds {context}",
                          "give smaller buckets")
    needed = max(largest, *(sum(asked) for asked in requests))
    return requests, min(-(-needed // 64) * 64, context or needed)


class Lab:
    """One loaded model and all that is measured with it. Raises ConfigError for requests beyond its context."""

    def __init__(self, model: Any, config: CacheConfig, report: Report) -> None:
        self.model, self.config, self.settings, self.report = model, config, compared(config), report
        self.requests, self.max_len = _fit(config, self.settings, models.context(model))
        self.prompts = measure.prompts(model, sorted({asked.prompt_tokens for asked in self.requests}), config.seed)
        self.proof = serving.Proof(self.requests, model.dtype == torch.float32)
        self.telemetry = Telemetry.of(model.device)
        self.started = time.monotonic()

    def runtime(self, **changes: Any) -> Runtime:
        fixed = {"arm": self.config.arm, "policy": self.config.policy, "device": self.config.device}
        return Runtime(self.model, **fixed | {"max_len": self.max_len} | changes)

    def record(self, target: records.Run) -> dict[str, Any]:
        """Appends all rows to the run; returns what its manifest says beside them."""
        limited = self.limits()
        self.warm_up()
        self.started = time.monotonic()
        passes = 0
        for rows in self.passes():
            target.append(rows)
            passes += 1
        for asked, part in ((self.config.cost_lengths, capturing.cost), (self.config.disturb, capturing.disturb)):
            if asked:
                self._rounds(part, target)
        return {"passes": passes, "measured_s": round(time.monotonic() - self.started, 1),
                "requests_with_equal_tokens": self.proof.count, "roofline": limited, "during": self.telemetry.summary()}

    def limits(self) -> dict[str, Any]:
        """The machine's rates, and the floors of what is timed, see `roofline.of_run`."""
        self.report("measuring the machine's limits", 0, 1)
        model, gaps = self.model, max(asked.new_tokens for asked in self.requests)
        rates = roofline.measure(model.device, model.dtype, roofline.work(model, context=1).bytes)
        decoding = {min(capturing.PROMPT, models.context(model) or capturing.PROMPT)} if self.config.disturb else set()
        return roofline.of_run(model, sorted({*self.prompts, *decoding}), max(gaps, capturing.NEW * bool(decoding)),
                               rates)

    def _rounds(self, part: Callable[..., Iterator[list[Row]]], target: records.Run) -> None:
        """One round is always made, further ones while the budget lasts."""
        for rows in part(self.model, self.config, self.report):
            target.append(rows)
            if self._over():
                return

    def _over(self) -> bool:
        return time.monotonic() - self.started >= self.config.budget_s

    def passes(self) -> Iterator[list[Row]]:
        """The rows of one finished pass at a time: in each round every setting once, in an order drawn anew from the
        seed. The first round is always made; no later pass starts after the budget is over. The machine is read all the
        while."""
        entries, total = list(self.settings.items()), len(self.settings) * self.config.repeats
        done = 0
        with self.telemetry:
            for round_ in range(self.config.repeats):
                for index in np.random.default_rng([self.config.seed, round_]).permutation(len(entries)):
                    if round_ and self._over():
                        return
                    name, changes = entries[index]
                    self.report(_progress(done, total, time.monotonic() - self.started, name), done, total)
                    yield self._pass(round_, name, changes)
                    done += 1

    def _pass(self, round_: int, name: str, changes: Mapping[str, Any]) -> list[Row]:
        begun = time.perf_counter_ns()
        with self.runtime(**changes) as runtime:
            built_ms = (time.perf_counter_ns() - begun) / 1e6
            compiles, rows, answered = runtime.counters.compiles, list[Row](), 0
            for served in serving.serve(runtime, self.requests, self.prompts, setting=name, round_=round_,
                                        built_ms=built_ms, pause_ms=self.config.pause_ms,
                                        telemetry=self.telemetry):
                rows += served.rows
                if served.ids:
                    self.proof.require_equal(answered, name, served.ids)
                    answered += 1
            if compiled := int(runtime.counters.compiles - compiles):
                raise RunError(f"{compiled} kernels were compiled inside a pass", f"setting {name}, round {round_}",
                               "its times are no latencies; report this, and leave the setting out meanwhile")
        return rows

    def warm_up(self) -> None:
        """Compiles what the passes run, with no capture, then captures once what no pass will use: a process's first
        capture loads what later ones find. In float32 compares a few requests with arm eager."""
        lengths = sorted(self.prompts)
        few = self.proof.few()
        if few:
            with self.runtime(arm="eager") as eager:
                for request in few:
                    self.proof.require_equal(request, "arm eager", self._answer(eager, self.requests[request]))
        programs = self.programs()
        for done, changes in enumerate(programs):
            self.report("warming up", done, len(programs) + 1)
            with self.runtime(**changes, capture="never") as runtime:
                for length in {runtime.bucket_for(n) or n: n for n in lengths}.values():
                    self._answer(runtime, Asked(length, min(2, self.max_len - length)))
                for request in few:
                    self.proof.require_equal(request, "capture=never", self._answer(runtime, self.requests[request]))
        self.report("warming up", len(programs), len(programs) + 1)
        with self.runtime(**programs[0], capture="sync") as runtime:
            self._answer(runtime, Asked(lengths[0], min(2, self.max_len - lengths[0])))

    def programs(self) -> list[dict[str, Any]]:
        """What differs between settings beside what becomes of graphs: each has kernels of its own to compile."""
        kept = [{name: value for name, value in changes.items() if name not in OF_GRAPHS}
                for changes in self.settings.values()]
        return [changes for number, changes in enumerate(kept) if changes not in kept[:number]]

    def _answer(self, runtime: Runtime, asked: Asked) -> list[int]:
        return runtime.generate(self.prompts[asked.prompt_tokens], max_new_tokens=asked.new_tokens, stop=[]).ids


def _progress(done: int, total: int, elapsed_s: float, name: str) -> str:
    left = f", {(total - done) * elapsed_s / done:.0f} s left" if done else ""
    return f"pass {done + 1} of {total}: {name}{left}"
