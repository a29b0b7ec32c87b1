"""One config in, one recorded run out: load, warm up, measure the arms interleaved, record, tell how it ended."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pandas as pd
import torch

from hybridlab import (
    environment,
    limits,
    measure,
    models,
    names,
    outlines,
    pools,
    records,
    restarts,
    roofline,
    stats,
    telemetry,
    wording,
)
from hybridlab.cells import cells, require_distinct, require_possible, require_steps
from hybridlab.children import asked
from hybridlab.config import RunConfig, RuntimeConfig, as_dict, build
from hybridlab.errors import RunError
from hybridlab.progress import Report, reporter
from hybridlab.runtime import Runtime


@dataclass(frozen=True)
class Shown:
    """A recorded run, read back from disk: everything shown is what was stored."""

    recorded: records.Recorded
    kind: ClassVar[str]

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """A run from its directory, checked against its manifest. Raises: RunError, for a run of another kind too."""
        found = records.read(path)
        if found.kind != cls.kind:
            known = {"ablation": "Result", "cache": "cachelab.CacheResult", "kernels": "kernellab.KernelResult",
                     "trace": "tracelab.TraceResult", "system": "systemlab.SystemResult", "soak": "soak.SoakResult",
                     "peers": "peerlab.PeersResult", "paper": "paperlab.PaperResult"}
            raise RunError(f"run {found.run_id} is of kind {found.kind}", f"{cls.__name__} shows {cls.kind}",
                           f"open it with hl.{known[found.kind]}")
        return cls(found)

    @property
    def run_id(self) -> str:
        return self.recorded.run_id

    @property
    def path(self) -> Path:
        return self.recorded.path

    @property
    def status(self) -> str:
        return self.recorded.status

    @property
    def reason(self) -> str:
        """Why it is not complete."""
        return self.recorded.reason

    @property
    def rows(self) -> pd.DataFrame:
        """One row a timed interval; the columns are those of `hybridlab.schemas`."""
        return self.recorded.rows

    @property
    def on_cpu(self) -> bool:
        return self.recorded.config.device == "cpu" or not self.recorded.environment.get("cuda_available")

    @property
    def machine(self) -> str:
        found = self.recorded.environment
        return environment.slug(None if self.on_cpu else found.get("gpu"), found.get("cpu"))

    @property
    def caption(self) -> str:
        """Run, machine, model and sample sizes: what stands under each figure."""
        model = self.recorded.config.model
        if getattr(self.recorded.config, "process", "here") == "worker":
            model += " through workers"
        return " · ".join([f"run {self.run_id}", self.machine, model, f"n = {', '.join(self._sizes()) or 0}"])

    def busy(self) -> str:
        """That other work was under way, in words; empty where none was."""
        load, cores = self.recorded.environment.get("load_average"), self.recorded.environment.get("usable_cores")
        if not load or not cores or load[0] <= cores:
            return ""
        return (f"The machine was busy when the run began (load {load[0]:.1f} on {cores} cores): other work stretched "
                "the tails.")

    def during(self) -> str:
        """What clocks and power say against its times, in words; empty where they say nothing, or were not read."""
        return telemetry.words([self.recorded.extra.get("during", {})])

    def _sizes(self) -> list[str]:
        counts = self.rows["metric"].value_counts()
        return [f"{counts[name]:,} {word}" for name, word in (("ttft", "first tokens"), ("itl", "gaps"))
                if name in counts]


class Result(Shown):
    """The recorded run of an ablation."""

    kind = "ablation"

    @property
    def config(self) -> RunConfig:
        assert isinstance(self.recorded.config, RunConfig)
        return self.recorded.config

    @property
    def floors(self) -> pd.DataFrame | None:
        """The least time of each first token and gap on this machine, see `roofline.of_run`; None for older runs."""
        return roofline.floors(self.recorded.extra)

    def table(self, which: Literal["both", "lengths", "pooled"] = "both") -> pd.DataFrame:
        """p50, p99 and ratio to eager with 95 % intervals (see `stats.summary`), with floors the limit and the share of
        it reached too (see `limits.beside`); None where n does not allow one."""
        table = stats.summary(self.rows, arms=list(cells(self.config)), which=which)
        return table if self.floors is None else limits.beside(table, self.rows, self.floors)

    def reading(self) -> str:
        """The result in words; every number is computed from the rows."""
        return wording.reading(self)


def run(config: RunConfig | Mapping[str, Any], *, root: Path | str | None = None, progress: bool = True,
        process: int = 0) -> Result:
    """Measures all arms of the config over one loaded model, in one process, and records the run; through workers, each
    arm in one with a model of its own. With `config.restarts`, in that many processes one after the other; `process` is
    the number of one of them.

    Raises: ConfigError, ModelError or PromptError for bad input, before anything is written. Whatever goes wrong
    later, Ctrl-C included, leaves a run that is marked failed with the rows of the finished rounds, and is re-raised.
    RunError when a graph was captured or a kernel compiled inside a timed request.
    """
    config = _checked(config)
    names.require_fit(config, names.context(config.model))
    if config.restarts > 1:
        return _restarted(config, root, progress)
    with reporter(progress) as report:
        report(f"loading {config.model}", 0, 1)
        model = (outlines.outline if config.process == "worker" else models.load)(
            config.model, device=config.device, dtype=config.dtype)
        names.require_fit(config, getattr(model.config.get_text_config(), "max_position_embeddings", None))
        prompts = measure.prompts(model, config.lengths, config.seed)
        device = models.resolve_device(config.device)
        with threads(config.threads, on_cpu=device.type == "cpu"), recording(config, root) as target:
            extra = _measure(model, device, prompts, config, target, report, process)
            target.finish("complete", extra=extra | {"lost": pools.lost()})
    return Result.open(target.path)


def _restarted(config: RunConfig, root: Path | str | None, progress: bool) -> Result:
    with reporter(progress) as report, recording(config, root) as target:
        target.finish("complete", extra=restarts.collect(config, target, report))
    return Result.open(target.path)


def _measure(model: Any, device: torch.device, prompts: dict[int, list[int]], config: RunConfig, target: records.Run,
             report: Report, process: int) -> dict[str, Any]:
    report("measuring the machine's limits", 0, 1)
    rates = roofline.measure(device, model.dtype, roofline.work(model, context=1).bytes)
    limits = roofline.of_run(model, config.lengths, config.new_tokens, rates)
    with contextlib.ExitStack() as stack:
        runtimes: dict[str, Runtime] = {}
        wanted = cells(config)
        for done, (name, cell) in enumerate(wanted.items()):
            report(f"building {name}", done, len(wanted))
            runtimes[name] = stack.enter_context(Runtime(
                config.model if config.process == "worker" else model, arm=cell.arm, policy=cell.policy,
                kernels=cell.kernels, device=config.device, dtype=config.dtype, capture="sync",
                max_len=_cache_rows(model, config), run_ahead=config.run_ahead, steps=cell.steps,
                process=config.process))
        report("warming up", 0, config.warmup)
        measure.warm_up(runtimes, prompts, config, step=lambda done: report("warming up", done, config.warmup))
        if model.dtype == torch.float32:
            require_agreement(runtimes, prompts, config)
        for runtime in runtimes.values():
            stack.enter_context(runtime.sealed())
        clocks = stack.enter_context(telemetry.Telemetry.of(device))
        started, done = time.monotonic(), 0
        for done, rows in enumerate(measure.rounds(runtimes, prompts, config, process=process, telemetry=clocks),
                                    start=1):
            target.append(rows)
            _check_undisturbed(rows)
            report(_remaining(done, time.monotonic() - started, config), done, config.repeats)
        return {"rounds": done, "measured_s": round(time.monotonic() - started, 1), "roofline": limits,
                "during": clocks.summary(),
                "counters": {arm: dict(runtime.counters.as_dict()) for arm, runtime in runtimes.items()}}


def _cache_rows(model: Any, config: RunConfig) -> int:
    """Rows of the static KV cache: what the longest request needs, in steps of 64, within the context."""
    longest = max(config.lengths) + config.new_tokens
    return min(-(-longest // 64) * 64, model.config.get_text_config().max_position_embeddings)


def _checked(config: RunConfig | Mapping[str, Any]) -> RunConfig:
    config = build(RunConfig, as_dict(config) if isinstance(config, RunConfig) else config)
    require_distinct(config)
    for cell in cells(config).values():
        require_possible(RuntimeConfig(arm=cell.arm, policy=cell.policy, kernels=cell.kernels))
    require_steps(config, on_cpu=models.resolve_device(config.device).type == "cpu")
    return config


def require_agreement(runtimes: Mapping[str, Runtime], prompts: Mapping[int, list[int]], config: RunConfig) -> None:
    """Refuse to time arms that differ in a greedy token. In half precision a near-tie may fall either way."""
    for length in {min(prompts), max(prompts)}:
        answers = {arm: runtime.generate(prompts[length], max_new_tokens=config.new_tokens, stop=[]).ids
                   for arm, runtime in runtimes.items()}
        first, *others = answers
        wrong = [arm for arm in others if answers[arm] != answers[first]]
        if wrong:
            raise RunError(f"greedy tokens of {' and '.join(wrong)} differ from those of {first}",
                           f"{config.model}, prompt of {length} tokens", "report this: their times compare nothing")


def _check_undisturbed(rows: list[measure.Row]) -> None:
    for row in rows:
        if row["captures"] or row["compiles"]:
            raise RunError(f"{row['captures']} captures and {row['compiles']} compilations in a timed request",
                           f"arm {row['arm']}, {row['prompt_tokens']} prompt tokens, round {row['round']}",
                           "such times are no latencies; raise warmup, and report this if it stays")


@contextlib.contextmanager
def recording(config: records.Config, root: Path | str | None) -> Iterator[records.Run]:
    """A new run under `root` (None: the default place), which the block finishes. Where anything goes wrong, Ctrl-C
    included, the run is marked failed with the rows so far, so that it does not look unfinished forever."""
    target = records.Run.create(config, Path(root) if root is not None else None)
    try:
        yield target
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        try:
            target.finish("failed", reason)
        except Exception as second:  # a full disk, say: without a manifest it counts as incomplete, never as complete
            error.add_note(f"the run could not be marked failed: {second}")
        raise


@contextlib.contextmanager
def threads(count: int, on_cpu: bool) -> Iterator[None]:
    """Sets PyTorch's CPU threads for the block; on a GPU they are left alone."""
    before = torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if on_cpu:
            torch.set_num_threads(before)


def _remaining(done: int, elapsed_s: float, config: RunConfig) -> str:
    left = min((config.repeats - done) * elapsed_s / done, max(0.0, config.budget_s - elapsed_s))
    return f"round {done} of {config.repeats}, {left:.0f} s left"


if __name__ == "__main__":  # one of several processes of a run, see `restarts`
    run(**asked(json.loads), progress=False)
