"""What `hybridlab bench` times: operations and steps in a random order beside the read rate, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from hybridlab import clocks, experiment, fused, kernelanswers, kerneltables, models, opbench
from hybridlab.config import BenchConfig, Sampling
from hybridlab.opbench import Case, Sizes
from hybridlab.records import Run
from hybridlab.runtime import Runtime
from hybridlab.tape import Tape
from hybridlab.telemetry import Telemetry

STEPS = {"torch": ("torch",), "kernel": ("fused", "fused, no graph"), "kernel, pdl": ("fused, pdl",)}
WARM = 2  # replays of each before the timed ones


class KernelResult(experiment.Shown):
    """The recorded run of a timing of kernels; the columns of its rows are `schemas.KERNELS`."""

    kind = "kernels"

    @property
    def config(self) -> BenchConfig:
        assert isinstance(self.recorded.config, BenchConfig)
        return self.recorded.config

    def _sizes(self) -> list[str]:
        counts = self.rows.groupby(["metric", "op", "context", "variant"]).size()
        return [f"{counts.min():,} replays of each"] if len(counts) else []

    def table(self) -> pd.DataFrame:
        """The operations, a line each, as `kernelbench.table`."""
        return kerneltables.table(self.rows)

    def steps(self) -> pd.DataFrame:
        """The whole step, a line a variant and context, as `kernelbench.steps`."""
        return kerneltables.steps(self.rows)

    def reading(self) -> str:
        """The result in words; every number is computed from the rows."""
        if not (self.rows["metric"] == "step").any():
            return f"Run {self.run_id} holds no whole step: {self.reason or self.status}."
        parts = [kernelanswers.in_short(self.rows), *filter(None, [self.during()])]
        if self.on_cpu:
            parts.append("These are CPU timings: a graph is a tape of the recorded calls and a kernel is Inductor's "
                         "here; they are not GPU times.")
        return "\n".join(parts)


class Plan(NamedTuple):
    """A checked config with what follows from it. `capacity`: rows of a KV cache."""
    config: BenchConfig
    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...]
    variants: tuple[str, ...]
    capacity: int


class Timed(NamedTuple):
    """What is timed: `prepare` runs before, untimed. By the device's clock; on a CPU and with `host` by the host's,
    from idle to idle. `row` is what is known of it before."""
    row: dict[str, Any]
    replay: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    host: bool = False


class Lab:
    """All that is timed of one plan."""
    def __init__(self, checked: Plan, target: Run, report: Callable[[str, int, int], None],
                 clocks: Telemetry) -> None:
        self.plan, self.target, self.report, self.telemetry = checked, target, report, clocks
        self.failed: list[str] = []
        self.order = 0
        read, count = opbench.reading(checked.device)
        self.read = [read] * 4 if checked.device.type == "cuda" else [read]
        self.read_row = {"metric": "read", "op": "read", "rows": 1, "depth": count, "bytes": 4 * count, "flops": 0,
                         "calls": len(self.read)}

    def record(self) -> list[str]:
        """Appends all rows; returns what failed, and why."""
        cases = opbench.cases(self.plan.sizes, self.plan.lengths, self.plan.dtype.itemsize)
        steps, rng = len(self.plan.lengths), np.random.default_rng(self.plan.config.seed)
        with torch.no_grad(), opbench.captured(self.read, self.plan.device) as self.reading:
            for done, index in enumerate(rng.permutation(len(cases))):  # one at a time: memory holds one's weights
                self.report(f"timing {cases[index]}", done, len(cases) + steps)
                with self._noting(str(cases[index])), ExitStack() as stack:
                    self._time(self._variants(cases[index], stack), rng)
            self.report(f"loading {self.plan.config.model}", len(cases), len(cases) + steps)
            with self._noting("step"):
                self._steps(rng, len(cases))
        return self.failed

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Triton, LLVM, Inductor and the driver each have their own; others go on
            self.failed.append(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300])

    def _variants(self, case: Case, stack: ExitStack) -> list[Timed]:
        device, found = self.plan.device, list[Timed]()
        work = opbench.work(case, self.plan.sizes, self.plan.capacity, device, self.plan.dtype)
        for variant in opbench.variants(case, self.plan.variants):
            with self._noting(f"{case}, {variant}"):
                opbench.require_right(work, variant)
                calls = opbench.calls(work, variant)
                row = {"metric": "op", "variant": variant, "calls": len(calls)} | {
                    name: getattr(case, name) for name in ("op", "rows", "depth", "context", "bytes", "flops")}
                found.append(Timed(row, stack.enter_context(opbench.captured(calls, device))))
        return found

    def _steps(self, rng: Any, done: int) -> None:
        checked = self.plan
        model = models.load(checked.config.model, device=checked.device, dtype=checked.dtype)
        with ExitStack() as stack:
            found: list[tuple[str, Any]] = []
            for name in (name for variant in checked.variants for name in STEPS[variant]):
                with self._noting(f"step, {name}"):
                    found.append((name, stack.enter_context(_step(model, name, checked))))
            for index, context in enumerate(checked.lengths):
                self.report(f"timing the step, context {context:,}", done + index, done + len(checked.lengths))
                row = {"metric": "step", "op": "step", "context": context, "calls": 1} | _step_costs(model, context)
                self._time([step(row | {"variant": name}, context) for name, step in found], rng)

    def _time(self, found: list[Timed], rng: Any) -> None:
        """Every one and the read `repeats` times, each round in an order of its own, and their rows."""
        if not found:
            return
        beside = {"variant": found[0].row["op"], "context": found[0].row["context"]}
        entries = [*found, Timed(self.read_row | beside, self.reading)]
        milliseconds(entries * WARM, self.plan.device)
        order = [entries[i] for _ in range(self.plan.config.repeats) for i in rng.permutation(len(entries))]
        rows = []
        for one, ms in zip(order, milliseconds(order, self.plan.device), strict=True):
            rows.append({"kernels": None} | one.row | {"ms": ms, "us": 1e3 * ms / one.row["calls"],
                                                        "order": self.order})
            self.order += 1
        self.target.append(rows)
        self.telemetry.sample()


@contextmanager
def _step(model: Any, name: str, checked: Plan) -> Iterator[Callable[[dict[str, Any], int], Timed]]:
    """What makes the timed step of a row and a context."""
    graph, capacity = not name.endswith("no graph"), checked.capacity
    early = name != "fused" and "kernel, pdl" in checked.variants  # also without a graph: it alone is to differ
    with Runtime(model, arm="hybrid" if graph else "jit", policy="full", kernels=name.split(",")[0], capture="sync",
                 pdl=early, max_len=capacity, buckets=[min(64, capacity)]) as runtime, ExitStack() as stack:
        executor: Any = runtime._executor
        executor.start(Sampling())
        for tensor in executor.kv.tensors:
            tensor.normal_(generator=torch.Generator(checked.device).manual_seed(0))
        program = executor.program("decode", 1)

        def launch() -> None:
            executor._prepare("decode", program)
            program()
            executor._sample()

        executor.positions.fill_(-1)
        launch()
        replay = launch
        if graph:
            executor.lookup.cache.capture(executor.job("decode", 1))
            replay = stack.enter_context(executor.lookup.cache.lease(executor._key("decode", 1)))
        kernels = _launches(launch if checked.device.type == "cpu" else replay, checked.device)
        # the step itself goes on to the next position first
        yield lambda row, context: Timed(row | {"kernels": kernels}, replay,
                                         lambda: executor.positions.fill_(context - 2), host=not graph)


def _launches(function: Callable[[], None], device: torch.device) -> int:
    """What one call starts on the device, copies included; on the CPU, the calls of its tape."""
    if device.type == "cpu":
        return len(Tape(function))
    clocks.finish(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        function()
        clocks.finish(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


def _step_costs(model: Any, context: int) -> dict[str, int]:
    """rows, depth, bytes (weights but the embedding, and the rows of the cache that are read) and FLOPs."""
    head, table = model.lm_head.weight, model.get_input_embeddings().weight
    weights = [p for p in model.parameters() if p is not table] + [head] * (head is table)  # tied: read as the head
    sizes, layers = opbench.Sizes.of(model), [fused.Layer(layer, model.config) for layer in model.model.layers]
    rows = sum(opbench.seen(context, layer.window) for layer in layers)
    cached = 2 * rows * sizes.kv_heads * sizes.dim * head.element_size()
    return {"rows": head.shape[0], "depth": head.shape[1], "bytes": sum(w.nbytes for w in weights) + cached,
            "flops": 2 * sum(w.numel() for w in weights if w.dim() > 1) + 4 * rows * sizes.heads * sizes.dim}


def milliseconds(order: Sequence[Timed], device: torch.device) -> list[float]:
    """Of each, in this order, without a wait between those of the device: launching hides behind the one before."""
    found: list[Callable[[], float]] = []
    idle = True
    for one in order:
        one.prepare()
        if one.host or device.type == "cpu":
            ms = clocks.ms(one.replay, device)
            found.append(partial(float, ms))
            idle = True
            continue
        if idle:  # an idle device would wait for the launch, and the wait be timed
            one.replay()
            one.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        one.replay()
        end.record()
        found.append(partial(start.elapsed_time, end))
        idle = False
    clocks.finish(device)
    return [elapsed() for elapsed in found]
