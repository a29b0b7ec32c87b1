"""One config about what serving costs beside latency in, one recorded run out: cold start, memory, overhead, a
second process, being watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab import coldstart, crossing, experiment, looking, models, stats
from hybridlab.config import POLICIES, SystemConfig, as_dict, build
from hybridlab.errors import ConfigError, PromptError
from hybridlab.explorer import Explorer
from hybridlab.memory import memory
from hybridlab.names import context
from hybridlab.overhead import overhead
from hybridlab.progress import Report, reporter
from hybridlab.report import Grid, interval, number
from hybridlab.runtime import Runtime
from hybridlab.telemetry import Telemetry

SERVED = "model → first token"
WATCHED = 40  # rounds, every second one of which an Explorer follows

Row = dict[str, Any]


class SystemResult(experiment.Shown):
    """The recorded run of these protocols; the columns of its rows are `schemas.SYSTEM`."""

    kind = "system"

    @property
    def config(self) -> SystemConfig:
        assert isinstance(self.recorded.config, SystemConfig)
        return self.recorded.config

    def _sizes(self) -> list[str]:
        counts = self.rows.groupby("part").size()
        return [f"{counts[part]:,} values of {part}" for part in self.config.parts if part in counts]

    def table(self) -> pd.DataFrame:
        """One line a part, setting and step: unit, n, value (the median) and its 95 % interval, None where n does not
        allow one. Of a cold start also what lies between the weights on the device and the first token."""
        lines = []
        for (part, setting, step, unit), own in _with_served(stats.unprofiled(self.rows)).groupby(
                ["part", "setting", "step", "unit"], sort=False):
            line = {"part": part, "setting": setting, "step": step, "unit": unit, "n": len(own),
                    "value": float(own["value"].median()), "value_low": None, "value_high": None}
            if len(own) >= stats.needed(0.5):
                found = stats.quantile(own["value"], 0.5)
                line |= {"value_low": found.low, "value_high": found.high}
            lines.append(line)
        return pd.DataFrame(lines, dtype=object)

    def grid(self) -> Grid:
        """The table as text."""
        rows = [[f"{line['part']} {line['setting']}".rstrip(), line["step"], line["unit"], str(line["n"]),
                 number(line["value"]) if line["value_low"] is None else interval(line, "value")]
                for line in self.table().to_dict("records")]
        return Grid(f"Beside latency · {self.caption}", ["what", "step", "unit", "n", "median"], rows,
                    "Medians, with 95 % intervals where n allows; cold start: ms since the process was started, or "
                    "from one stage to another.")

    def reading(self) -> str:
        """The result in words; every number is computed from the rows."""
        said = []
        for line in self.table().to_dict("records"):
            if line["step"] == "share":
                said.append(f"Observing a token costs {line['value']:.2g} % of the time between two.")
            elif line["part"] == "watching" and line["unit"] == "×":
                ends = "" if line["value_low"] is None else f" [{line['value_low']:.2f}, {line['value_high']:.2f}]"
                said.append(f"A gap of {line['setting']} takes {line['value']:.2f}{ends} times as long while an "
                            "Explorer follows it as unobserved.")
            elif line["unit"] == "×":
                said.append(f"By the asker's clock a {line['step']} takes {line['value']:.3g} times as long through a "
                            "worker as here.")
            elif line["part"] == "coldstart" and line["step"] == "first token":
                said.append(f"With {line['setting']} caches the first token is there {line['value'] / 1e3:.2f} s after "
                            "the process was started.")
            elif line["step"] == SERVED:
                said.append(f"With {line['setting']} caches the first token is there {line['value'] / 1e3:.2f} s after "
                            "the weights were on the device.")
        if said and self.during():
            said.append(self.during())
        return "\n".join(said) or f"Run {self.run_id}: {self.reason or self.status}."


def _with_served(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, and for each cold start one more: its first token, counted from the end of its stage "model"."""
    ends = {step: rows[(rows["part"] == "coldstart") & (rows["step"] == step)] for step in ("model", "first token")}
    both = ends["first token"].merge(ends["model"], on=["setting", "round"], suffixes=("", "_before"))
    served = both.assign(step=SERVED, value=both["value"] - both["value_before"])
    return pd.concat([rows, served[rows.columns]], ignore_index=True) if len(served) else rows


def run(config: SystemConfig | Mapping[str, Any], *, root: Path | str | None = None,
        progress: bool = True) -> SystemResult:
    """Measures the parts of the config one after the other and records the run.

    Raises: ConfigError, ModelError or PromptError for bad input, before anything is written; what goes wrong later
    leaves a run that is marked failed, with the rows so far.
    """
    config = checked(config)
    with reporter(progress) as report, experiment.recording(config, root) as target, \
            Telemetry.of(models.resolve_device(config.device)) as clocks:
        for part in config.parts:
            for rows in PARTS[part](config, report):
                target.append([{"part": part, **row} for row in rows])
                clocks.sample()
        target.finish("complete", extra={"during": clocks.summary()})
    return SystemResult.open(target.path)


def checked(config: SystemConfig | Mapping[str, Any]) -> SystemConfig:
    """A config whose prompts fit its model. Raises: ConfigError, ModelError or PromptError."""
    config = build(SystemConfig, as_dict(config) if isinstance(config, SystemConfig) else config)
    if len(set(config.parts)) != len(config.parts):
        raise ConfigError("parts holds a value twice", f"{list(config.parts)}", "each is measured once")
    if "watching" in config.parts and config.policy not in POLICIES:
        raise ConfigError("part watching does not know this policy", f"policy is {config.policy!r}",
                          f"choose one that an Explorer lists: {', '.join(POLICIES)}; or leave the part out")
    tokens = context(config.model)
    if tokens is not None and max(config.lengths) + 64 > tokens:
        raise PromptError(f"a prompt of {max(config.lengths)} tokens and 64 new ones",
                          f"the context of {config.model} holds {tokens} tokens", "lower lengths")
    return config


def _coldstart(config: SystemConfig, report: Report) -> Iterator[list[Row]]:
    assert isinstance(config.policy, str)
    rows = coldstart.run(model=config.model, arm=config.arm, policy=config.policy, device=config.device,
                         dtype=config.dtype, repeats=config.repeats, seed=config.seed, report=report)
    yield [{"round": row["process"], "setting": row["caches"], "step": row["stage"], "value": row["total_ms"],
            "unit": "ms"} for row in rows]


def _memory(config: SystemConfig, report: Report) -> Iterator[list[Row]]:
    report("weighing", 0, 1)
    with _runtime(config) as runtime:
        yield list(memory(runtime, config.lengths, config.seed))


def _overhead(config: SystemConfig, report: Report) -> Iterator[list[Row]]:
    report("timing ranges and rows", 0, 1)
    with _runtime(config) as runtime, experiment.threads(config.threads, on_cpu=runtime.device.type == "cpu"):
        yield list(overhead(runtime, config.arm, config.seed))


def _ipc(config: SystemConfig, report: Report) -> Iterator[list[Row]]:
    report("starting a worker", 0, 1)
    on_cpu = models.resolve_device(config.device).type == "cpu"
    with (experiment.threads(config.threads, on_cpu), _runtime(config) as here,
          _runtime(config, process="worker") as worker):
        for done, rows in enumerate(crossing.crossing(here, worker, config.seed), 1):
            report("both in turns", done, crossing.TURNS)
            yield rows


def _watching(config: SystemConfig, report: Report) -> Iterator[list[Row]]:
    report("following an Explorer", 0, 1)
    explorer = Explorer({"model": config.model, "arms": sorted({"eager", config.arm}), "policy": config.policy,
                         "device": config.device, "dtype": config.dtype, "threads": config.threads,
                         "seed": config.seed, "repeats": WATCHED, "floor": False})
    try:
        yield looking.pairs(*looking.watched(explorer))
    finally:
        explorer.close()


def _runtime(config: SystemConfig, process: str = "here") -> Runtime:
    return Runtime(config.model, arm=config.arm, policy=config.policy, device=config.device, dtype=config.dtype,
                   capture="sync", max_len=max(config.lengths) + 64, process=process)


PARTS = {"coldstart": _coldstart, "memory": _memory, "overhead": _overhead, "ipc": _ipc, "watching": _watching}
