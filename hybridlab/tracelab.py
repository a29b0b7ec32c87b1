"""One config about traces in, one recorded run out: a request of each arm under a profiler, its events as rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hybridlab import (
    cells,
    events,
    experiment,
    gaps,
    kineto,
    measure,
    models,
    names,
    nsys,
    paths,
    perfetto,
    ranges,
    tracetables,
)
from hybridlab.config import TraceConfig, as_dict, build
from hybridlab.errors import ConfigError, TraceError
from hybridlab.progress import Report, reporter
from hybridlab.runtime import Runtime

EXPORT = "trace.json.gz"  # of a run directory, for Perfetto: one process an arm
ROOM = 64                 # rows of the KV cache come in these
TIMEOUT_S = 900.0         # of one arm under nsys
FLAGS = ("--trace=cuda,nvtx", "--cuda-graph-trace=node", "--sample=none", "--cpuctxsw=none",
         "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true")


class TraceResult(experiment.Shown):
    """The recorded run of a trace: rows are events, `schemas.TRACE`, taken under a profiler. None is a latency."""

    kind = "trace"

    @property
    def config(self) -> TraceConfig:
        assert isinstance(self.recorded.config, TraceConfig)
        return self.recorded.config

    @property
    def tool(self) -> str:
        """What recorded it: "nsys" or "torch"."""
        return str(self.recorded.extra.get("tool", "unknown"))

    @property
    def perfetto(self) -> Path:
        """The trace for https://ui.perfetto.dev, one process an arm."""
        return self.path / EXPORT

    def traces(self) -> dict[str, pd.DataFrame]:
        """The events of each arm, see `events.COLUMNS`, in the config's order."""
        there = set(self.rows["arm"])
        return {name: self.rows.loc[self.rows["arm"] == name, list(events.COLUMNS)].reset_index(drop=True)
                for name in cells.cells(self.config) if name in there}

    def tokens(self) -> dict[str, pd.DataFrame]:
        """A row a token of each arm, see `gaps.by_token`."""
        return {name: gaps.by_token(trace) for name, trace in self.traces().items()}

    def reading(self) -> str:
        """The result in words; every number is computed from the rows."""
        return tracetables.reading(self.tokens()) if len(self.rows) else f"Run {self.run_id} holds no events."

    def _sizes(self) -> list[str]:
        return [f"{self.config.traced_tokens - 1} decode tokens of each arm, under a profiler ({self.tool})"]


def run(config: TraceConfig | Mapping[str, Any], *, root: Path | str | None = None,
        progress: bool = True) -> TraceResult:
    """Traces one request of each arm, after `config.warmup` untraced ones, and records the events.

    Under nsys each arm has a process of its own, and its report stays in the run directory, for Nsight Systems.
    Raises: ConfigError, ModelError or PromptError for bad input, before anything is written; TraceError when the tool
    made no trace. The events of arms that were traced before stay in a run that is then marked failed.
    """
    config = checked(config)
    tool = choose_tool(config)
    with reporter(progress) as report, experiment.recording(config, root) as target:
        traces: dict[str, pd.DataFrame] = {}
        for name, trace in _traced(config, tool, target.path, report):
            target.append(_rows(name, trace))
            traces[name] = trace
        perfetto.write(traces, target.path / EXPORT)
        target.finish("complete", extra={"tool": tool})
        report(f"run {target.path.name}: complete", 1, 1)
    return TraceResult.open(target.path)


def checked(config: TraceConfig | Mapping[str, Any]) -> TraceConfig:
    """A config whose request fits its model. Raises: ConfigError, ModelError or PromptError."""
    config = build(TraceConfig, as_dict(config) if isinstance(config, TraceConfig) else config)
    names.require_fit(config, names.context(config.model))
    return config


def choose_tool(config: TraceConfig) -> str:
    """"nsys" or "torch". Raises: ConfigError where nsys is asked for and cannot trace."""
    on_gpu = models.resolve_device(config.device).type == "cuda"
    found = shutil.which("nsys") is not None
    if config.tool == "nsys" and not (found and on_gpu):
        raise ConfigError("tool is 'nsys'", "it traces kernels of a GPU, and the device is a CPU" if found else
                          "Nsight Systems is not installed", "use tool='torch', or install nsight-systems-cli")
    return "nsys" if config.tool != "torch" and found and on_gpu else "torch"


def _traced(config: TraceConfig, tool: str, folder: Path, report: Report) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each arm's name and events."""
    wanted = list(cells.cells(config))
    if tool == "nsys":
        for done, name in enumerate(wanted):
            report(f"tracing {name} under nsys", done, len(wanted))
            yield name, _under_nsys(config, name, folder)
        return
    report(f"loading {config.model}", 0, len(wanted))
    model = models.load(config.model, device=config.device, dtype=config.dtype)
    with experiment.threads(config.threads, on_cpu=model.device.type == "cpu"):
        for done, name in enumerate(wanted):
            report(f"tracing {name}", done, len(wanted))
            with tempfile.TemporaryDirectory(prefix="hybridlab-") as temporary:
                path = Path(temporary) / "trace.json"
                request(model, config, name, partial(_under_torch, device=model.device, path=path))
                yield name, kineto.read(path)


def request(model: Any, config: TraceConfig, name: str, traced: Callable[[Callable[[], Any]], None]) -> None:
    """Builds the runtime of one arm, serves the untraced requests, and hands the traced one to `traced`."""
    cell = cells.cells(config)[name]
    rows = -(-(config.length + config.traced_tokens) // ROOM) * ROOM
    rows = min(rows, models.context(model) or rows)
    (prompt,) = measure.prompts(model, [config.length], config.seed).values()
    with Runtime(model, arm=cell.arm, policy=cell.policy, kernels=cell.kernels, device=config.device, capture="sync",
                 max_len=rows, run_ahead=config.run_ahead) as runtime:
        runtime.warm_up([config.length])

        def work() -> None:
            runtime.generate(prompt, max_new_tokens=config.traced_tokens, stop=[])

        for _ in range(config.warmup):
            work()
        with runtime.sealed(), measure.quiet_collector():
            traced(work)


def _under_torch(work: Callable[[], Any], device: torch.device, path: Path) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds, acc_events=True):
        work()  # starting the profiler slows what comes first
    with ranges.recorded(), torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        work()
    profile.export_chrome_trace(str(path))


def _under_nsys(config: TraceConfig, name: str, folder: Path) -> pd.DataFrame:
    report = folder / f"{name.replace(' ', '-')}.nsys-rep"
    asked = json.dumps({"config": as_dict(config), "name": name})
    _tool(["nsys", "profile", *FLAGS, "-o", str(report), sys.executable, "-m", "hybridlab.tracelab", asked], report)
    with tempfile.TemporaryDirectory(prefix="hybridlab-") as temporary:
        export = Path(temporary) / "trace.sqlite"
        _tool(["nsys", "export", "--type=sqlite", "--force-overwrite=true", "-o", str(export), str(report)], export)
        return nsys.read(export)


def _tool(command: list[str], made: Path) -> None:
    """Runs one of the commands of nsys. Raises: TraceError when it fails or `made` is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False,
                              env=paths.importing())
    except subprocess.TimeoutExpired:
        raise TraceError(f"nsys {command[1]} took more than {TIMEOUT_S:.0f} s", "",
                         "trace fewer tokens, or use --tool torch") from None
    if done.returncode or not made.is_file():
        last = " | ".join((done.stderr + done.stdout).strip().splitlines()[-3:])
        raise TraceError(f"nsys {command[1]} made no {made.suffix.lstrip('.')} file", f"exit {done.returncode}: {last}",
                         "use --tool torch, or see that nsys works here")


def _inside(config: Mapping[str, Any], name: str) -> None:
    """One arm in the process that nsys watches."""
    made = build(TraceConfig, config)
    model = models.load(made.model, device=made.device, dtype=made.dtype)

    def traced(work: Callable[[], Any]) -> None:
        torch.cuda.profiler.start()
        work()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    request(model, made, name, traced)


def _rows(name: str, trace: pd.DataFrame) -> list[dict[str, Any]]:
    rows = trace.assign(arm=name)
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


if __name__ == "__main__":
    _inside(**json.loads(sys.argv[1]))
