"""Clocks, power and temperature during a run, read between requests; what the driver says, and for a CPU the kernel.

There is no thread that reads: it would hold the interpreter in the middle of a measured gap.
"""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from hybridlab import gpus
from hybridlab.tokens import Happening

EVERY_S = 0.5
CHANGE = 0.01  # of a clock, between two readings: less is rounding
SET = ("idle", "application clocks", "display clocks")  # a GPU that has nothing to do, or is set so, is not slowed
REASONS = {bit: word for bit, word in gpus.REASONS.items() if word not in SET}
MOVED = 0.02   # of a clock, over a run: less moves no latency that anybody could tell
CPUINFO = Path("/proc/cpuinfo")


class Telemetry:
    """Readings of one GPU (`index` as PyTorch counts), or with None of the CPU; a context manager.

    `sample` is to be called outside of every clock, as often as one likes: at most every `every_s` seconds it reads,
    some tens of µs on a GPU, and otherwise costs less than one. `nvml`: the module to ask, for tests.
    """

    def __init__(self, index: int | None = None, every_s: float = EVERY_S, nvml: Any = None) -> None:
        self.index, self.every_ns, self._nvml = index, int(every_s * 1e9), nvml
        self._probes: dict[str, Callable[[], float]] = {}
        self._readings: list[dict[str, float]] = []
        self._stamps: list[int] = []
        self.problem = ""

    @classmethod
    def of(cls, device: Any) -> Telemetry:
        """Of a `torch.device`: a GPU, or the CPU."""
        return cls(device.index or 0 if device.type == "cuda" else None)

    def __enter__(self) -> Telemetry:
        self._probes = _of_cpu() if self.index is None else self._of_gpu(self.index)
        self._read(time.perf_counter_ns())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._read(time.perf_counter_ns())
        if self.index is not None and not self.problem:
            self._nvml.nvmlShutdown()
        self._probes = {}

    def sample(self) -> None:
        """Reads if it is time to."""
        now = time.perf_counter_ns()
        if now - self._stamps[-1] >= self.every_ns:
            self._read(now)

    def summary(self) -> dict[str, Any]:
        """Plain values: readings, seconds covered, `reasons` (why clocks were lowered, and in how many readings), and
        of each quantity min, median and max; `problem` where the driver could not be asked."""
        found: dict[str, Any] = {"readings": len(self._stamps), "problem": self.problem,
                                 "seconds": round((self._stamps[-1] - self._stamps[0]) / 1e9, 1) if self._stamps else 0}
        for name in {name: None for reading in self._readings for name in reading if name != "reasons"}:
            values = [reading[name] for reading in self._readings if name in reading]
            found[name] = {"min": float(min(values)), "median": float(np.median(values)), "max": float(max(values))}
        masks = [int(reading.get("reasons", 0)) for reading in self._readings]
        counts = {word: sum(bool(mask & bit) for mask in masks) for bit, word in REASONS.items()}
        return found | {"reasons": {word: count for word, count in counts.items() if count}}

    def clock_changes(self, since_ns: int = 0) -> list[Happening]:
        """For `tails`: between which readings the clock of the processor changed, from what to what and why; of
        readings not over before `since_ns`."""
        found = []
        for place in range(max(1, bisect_left(self._stamps, since_ns)), len(self._readings)):
            before, after = (self._readings[place + step].get("clock_mhz") for step in (-1, 0))
            if before and after and abs(after / before - 1) > CHANGE:
                mask = int(self._readings[place].get("reasons", 0))
                why = [word for bit, word in REASONS.items() if mask & bit]
                found.append(Happening("clock change", self._stamps[place - 1], self._stamps[place],
                                       ", ".join([f"{before:,.0f} → {after:,.0f} MHz", *why]), False))
        return found

    def _read(self, now: int) -> None:
        reading = {}
        for name, probe in self._probes.items():
            with suppress(Exception):  # not reported by this board or kernel; a driver has errors of its own
                reading[name] = float(probe())
        self._stamps.append(now)
        self._readings.append(reading)

    def _of_gpu(self, index: int) -> dict[str, Callable[[], float]]:
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            handle = gpus.opened(self._nvml, index)
        except Exception as error:  # no library, no driver, no permission, no such GPU
            self.problem = f"NVML: {type(error).__name__}: {error}"[:200]
            return {}
        nvml = self._nvml
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or (
            nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return {
            "clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "utilization_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_used_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
            "other_processes": lambda: sum(
                _foreign(process.pid) for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
            "reasons": lambda: reasons(handle)}


def words(summaries: Sequence[Mapping[str, Any]]) -> str:
    """What `summary` of each process of a run says against its times: clocks that moved, and why, and other processes
    on the GPU; empty where nothing does."""
    def ends(name: str) -> tuple[float, float] | None:
        found = [one[name] for one in summaries if name in one]
        return (min(each["min"] for each in found), max(each["max"] for each in found)) if found else None

    said, clock, others = [], ends("clock_mhz"), ends("other_processes")
    if clock and clock[0] < (1 - MOVED) * clock[1]:
        said.append(f"the clock moved between {clock[0]:,.0f} and {clock[1]:,.0f} MHz")
    counts = Counter[str]()
    for one in summaries:
        counts.update(one.get("reasons", {}))
    total = sum(int(one.get("readings", 0)) for one in summaries)
    said += [f"{word} held it down in {count} of {total} readings" for word, count in counts.items()]
    if others and others[1] > 0:
        said.append(f"{others[1]:.0f} other processes computed on the GPU")
    return f"While it ran, {', '.join(said)}." if said else ""


def _foreign(pid: int) -> bool:
    """Whether a process is neither this one nor one of those that it started, workers among them."""
    if pid == os.getpid():
        return False
    try:
        return os.getpid() not in {parent.pid for parent in psutil.Process(pid).parents()}
    except (psutil.Error, ValueError):  # gone, or of a namespace that this one does not see
        return True


def _of_cpu() -> dict[str, Callable[[], float]]:
    return {"clock_mhz": _clock_mhz, "load": lambda: os.getloadavg()[0]}


def _clock_mhz() -> float:
    """Of the fastest core, as /proc/cpuinfo has it; of a virtual machine often the nominal one."""
    return max(float(value) for value in re.findall(r"^cpu MHz\s*: ([\d.]+)", CPUINFO.read_text(), re.MULTILINE))
