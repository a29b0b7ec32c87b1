"""The protocols of the paper's two tables: first tokens by prompt length, and gaps by generation length, with a KV
cache and with the whole sequence computed again for every token.

Each yields rows of `schemas.PAPER` without run_id, a finished round at a time, arms interleaved in it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from transformers import PreTrainedModel

from hybridlab import experiment, fused, measure, models, stats
from hybridlab.buckets import ladder
from hybridlab.cells import cells
from hybridlab.config import REPLAYING, RunConfig
from hybridlab.errors import MeasureError, PromptError
from hybridlab.paperconfig import PaperConfig
from hybridlab.progress import Report
from hybridlab.runtime import DEFAULT_MAX_LEN, Runtime

Row = dict[str, Any]
START = 10  # tokens of the prompt that generations begin with, as in the paper
WHOLE = ("eager", "graph", "hybrid", "hybrid fused")  # the arms that also compute the whole sequence for every token


def row(part: str, **columns: Any) -> Row:
    """All columns, those not given as of an interval in which nothing happened."""
    return {"part": part, "round": 0, "request": 0, "tokens": 0, "index": 0, "position": 0, "unit": "ms", "path": "",
            "reason": "", "state": "none", "captures": 0, "compiles": 0, "bytes": None, **columns}


def state(arm: str, path: str, bucket: int | None, rows: int, captures: int = 0) -> str:
    """How a graph served a step of so many rows: hit, bucket, captured, miss, or none for an arm that replays none."""
    if arm.partition(" ")[0] not in REPLAYING:
        return "none"
    if path != "graph":
        return "miss"
    return "captured" if captures else "hit" if bucket == rows else "bucket"


def schedule(generations: Iterable[int], gaps: int) -> list[int]:
    """The requests, each by its new tokens, that give every generation length `gaps` gaps, of as many requests as an
    interval needs, the longest first.

    A request begins as a shorter one does, so it also counts for all shorter lengths.
    """
    asked: list[int] = []
    for length in sorted(set(generations), reverse=True):
        asked += [length] * (max(stats.needed(0.5), math.ceil(gaps / (length - 1))) - len(asked))
    return asked


class Arms:
    """The arms of a reproduction over one loaded model, warmed up and then sealed: no timed request captures.

    `lengths` and `generations` are those of the config that fit the model's context; `clipped` are rows of the others.
    `ended`: for parts that the budget ended, after how many requests, in words; `failed`: for those that failed, why.
    Raises: PromptError when no length or no generation fits, ConfigError for buckets that are no ladder.
    """

    def __init__(self, model: PreTrainedModel, config: PaperConfig, report: Report) -> None:
        self.model, self.config, self.report = model, config, report
        context = models.context(model) or DEFAULT_MAX_LEN
        self.lengths = _fitting("lengths", config.lengths, context - 1)
        self.generations = _fitting("generations", config.generations, context - START)
        self.clipped = [row(part, arm="all", tokens=tokens, metric="clipped", value=float(context), unit="tokens",
                            reason=f"the context of {config.model} holds {context} tokens")
                        for part, asked, kept in (("ttft", config.lengths, self.lengths),
                                                  ("cached", config.generations, self.generations),
                                                  ("recomputed", config.generations, self.generations))
                        if part in config.parts for tokens in asked if tokens not in kept]
        both = model.device.type == "cuda" and fused.refusal(model) is None
        self.settings = RunConfig(
            model=config.model, kernels=("torch", "fused") if both else "torch", lengths=self.lengths,
            new_tokens=min(min(self.generations), context - max(self.lengths)), repeats=config.repeats, itl_repeats=1,
            warmup=config.warmup, budget_s=config.budget_s, temperature=config.temperature, seed=config.seed,
            threads=config.threads)
        largest = max(config.buckets) if isinstance(config.buckets, tuple) else 0
        longest = max(max(self.lengths) + self.settings.new_tokens, START + max(self.generations), largest)
        self.max_len = min(-(-longest // 64) * 64, context)
        ladder(config.buckets, self.max_len)  # refuses what is none before anything is written
        self.prompts = measure.prompts(model, {*self.lengths, START}, config.seed)
        self.ended: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Arms:
        """Builds and warms up; in float32, compares greedy tokens of the arms. Closes what it built if that fails."""
        with contextlib.ExitStack() as stack:
            self.runtimes: dict[str, Runtime] = {}
            wanted = cells(self.settings)
            for done, (name, cell) in enumerate(wanted.items()):
                self.report(f"building {name}", done, len(wanted))
                self.runtimes[name] = stack.enter_context(Runtime(
                    self.model, arm=cell.arm, policy=cell.policy, kernels=cell.kernels, capture="sync",
                    buckets=self.config.buckets, max_len=self.max_len))
            timed = {length: self.prompts[length] for length in self.lengths}
            self._warm_up(timed)
            if self.model.dtype == torch.float32:
                experiment.require_agreement(self.runtimes, timed, self.settings)
                self._require_recomputed()
            for runtime in self.runtimes.values():
                stack.enter_context(runtime.sealed())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _warm_up(self, timed: dict[int, list[int]]) -> None:
        longest = START + max(self.generations) - 1
        for done, (name, runtime) in enumerate(self.runtimes.items()):
            self.report(f"warming up {name}", done, len(self.runtimes))
            whole = "recomputed" in self.config.parts and name in WHOLE
            rows = range(START, longest + 1) if whole and name != "eager" else {START, longest if whole else START}
            runtime.warm_up(rows, temperature=self.config.temperature)
        measure.warm_up(self.runtimes, timed, self.settings,
                        step=lambda done: self.report("warming up", done, self.config.warmup))

    def _require_recomputed(self) -> None:
        """Refuse to time recomputed tokens that are not those of the KV cache."""
        if "recomputed" in self.config.parts:
            count = min(self.generations)
            expected = self.runtimes["eager"].generate(self.prompts[START], count, self.config.temperature,
                                                       seed=self.config.seed, stop=[]).ids
            for name in self._whole:
                ids = [ids for _, ids in self._recompute(self.runtimes[name], count)][-1]
                if ids != expected:
                    raise MeasureError(f"recomputed tokens of {name} differ from those with a KV cache",
                                       f"{self.config.model}, {count} tokens", "report this: the times compare nothing")

    @property
    def _whole(self) -> list[str]:
        return [name for name in self.runtimes if name in WHOLE]

    def ttft(self) -> Iterator[list[Row]]:
        """First tokens, warm: `measure.TTFT` is the clock, from token ids on the host to the first new id there. In
        each round every arm and prompt length once, in random order."""
        timed = {length: self.prompts[length] for length in self.lengths}
        for done, found in enumerate(measure.rounds(self.runtimes, timed, replace(self.settings, itl_repeats=0)), 1):
            yield [row("ttft", arm=one["arm"], round=one["round"], request=one["request"], tokens=one["prompt_tokens"],
                       position=one["position"], metric="ttft", value=one["ms"], path=one["path"],
                       reason=one["reason"], captures=one["captures"], compiles=one["compiles"],
                       profiled=one["profiled"],
                       state=state(one["arm"], one["path"], one["bucket"], one["prompt_tokens"], one["captures"]))
                   for one in found]
            self.report(f"first tokens, round {done} of {self.config.repeats}", done, self.config.repeats)

    def cached(self) -> Iterator[list[Row]]:
        """Gaps with a KV cache: `measure.ITL` is the clock, from one new id on the host to the next. A round is one
        request of every arm, the same for all, from the prompt of 10 tokens."""
        yield from self._rounds("cached", list(self.runtimes), self._continued)

    def recomputed(self) -> Iterator[list[Row]]:
        """The same tokens with the whole sequence computed again for each, as the public code does: inside the clock,
        token ids of the whole sequence on the host → the next id on the host, a first token each; what the host does
        between two tokens is outside. Through the graph of the length or its bucket in arms that replay."""
        yield from self._rounds("recomputed", self._whole, self._recomputed)

    def _rounds(self, part: str, arms: Sequence[str], serve: Any) -> Iterator[list[Row]]:
        """One round is always made, further ones while the budget lasts, the longest first: its gaps count for all
        shorter lengths, so that a budget that ends early takes from the shortest alone. Arms come in random order."""
        asked, started = schedule(self.generations, self.config.gaps), time.monotonic()
        rng = np.random.default_rng([self.config.seed, len(part)])
        for done, tokens in enumerate(asked):
            if done and time.monotonic() - started >= self.config.budget_s:
                self.ended[part] = f"{done} of {len(asked)} requests in its budget of {self.config.budget_s:g} s"
                self.report(f"{part}: {self.ended[part]}", done, done)  # nothing more comes: what a log always shows
                return
            self.report(f"{part}, {tokens} tokens", done, len(asked))
            found: list[Row] = []
            with measure.frozen_heap():
                for number in rng.permutation(len(arms)):
                    name = arms[number]
                    with measure.quiet_collector():
                        found += [row(part, arm=name, round=done, request=done, tokens=tokens, **one)
                                  for one in serve(name, tokens)]
            yield found

    def _continued(self, name: str, count: int) -> Iterator[Row]:
        runtime = self.runtimes[name]
        before = runtime.counters.as_dict()
        out = runtime.generate(self.prompts[START], count, self.config.temperature, seed=self.config.seed, stop=[])
        happened = _happened(runtime, before)
        for index, ms in enumerate(out.itl_ms, 1):
            yield {"metric": "gap", "index": index, "position": START + index, "value": ms, "path": out.paths[index],
                   "reason": out.reasons[index], "state": state(name, out.paths[index], 1, 1), **happened}

    def _recomputed(self, name: str, count: int) -> list[Row]:
        runtime, found = self.runtimes[name], list[Row]()
        before = runtime.counters.as_dict()
        for index, (out, ids) in enumerate(self._recompute(runtime, count)):
            if index:  # the first token is no gap
                rows = START + len(ids) - 1
                found.append({"metric": "gap", "index": index, "position": START + index, "value": out.ttft_ms,
                              "path": out.paths[0], "reason": out.reasons[0],
                              "state": state(name, out.paths[0], out.bucket, rows)})
        happened = _happened(runtime, before)
        return [one | happened for one in found]

    def _recompute(self, runtime: Runtime, count: int) -> Iterator[tuple[Any, list[int]]]:
        """Each of `count` tokens as an answer to all before it, and the new ids so far."""
        ids: list[int] = []
        for _ in range(count):
            out = runtime.generate([*self.prompts[START], *ids], 1, self.config.temperature, seed=self.config.seed,
                                   stop=[])
            ids = [*ids, *out.ids]
            yield out, ids


def _fitting(name: str, asked: Sequence[int], most: int) -> tuple[int, ...]:
    kept = tuple(sorted({tokens for tokens in asked if tokens <= most}))
    if not kept:
        raise PromptError(f"{name} is {list(asked)}", f"the model's context has room for {most}", "give shorter ones")
    return kept


def _happened(runtime: Runtime, before: dict[str, Any]) -> dict[str, int]:
    after = runtime.counters.as_dict()
    return {name: int(after[name] - before[name]) for name in ("captures", "compiles")}
