"""What the driver says of each GPU, through NVML: every value is asked for by itself, and a refused one is None.

Nothing that names one board among others, like a UUID or a PCI address, is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REASONS = {  # nvml.h, nvmlClocksEventReasons
    0x001: "idle", 0x002: "application clocks", 0x004: "power cap", 0x008: "hardware slowdown", 0x010: "sync boost",
    0x020: "thermal slowdown, software", 0x040: "thermal slowdown, hardware", 0x080: "power brake",
    0x100: "display clocks"}
COMPUTE_MODES = ("default", "exclusive thread", "prohibited", "exclusive process")  # nvml.h, nvmlComputeMode_t
DEVICE_RUNTIME = "libcudadevrt.a"  # of the CUDA toolkit: what a kernel calls that starts work itself


def report(nvml: Any = None) -> list[dict[str, Any]]:
    """Plain values of every GPU that the driver shows; none without library or driver. `nvml`: the module to ask.

    Clocks are in MHz; `clock_reasons` are words for why they are not higher. `other_processes` counts those that
    compute on it beside this one.
    """
    try:
        nvml = nvml or import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []  # no driver on this machine
    try:
        return [_read(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def named(boards: Iterable[Mapping[str, Any]]) -> str:
    """What a `report` says of which GPUs they are, each kind once; empty without any."""
    return ", ".join(sorted({str(board.get("name")) for board in boards}))


def opened(nvml: Any, index: int) -> Any:
    """The handle of the GPU that PyTorch calls `index`, which counts those of CUDA_VISIBLE_DEVICES alone.

    NVML is initialised, and shut down by the caller; where this raises, by this. A device that is named by the first
    letters of its UUID is not found. Raises what NVML raises, or IndexError.
    """
    nvml.nvmlInit()
    try:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        name = str(index) if seen is None else seen.split(",")[index].strip()
        return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    except Exception:
        nvml.nvmlShutdown()
        raise


def words(mask: int) -> list[str]:
    """The reasons that a mask of `nvmlDeviceGetCurrentClocksEventReasons` holds; bits of later drivers are left out."""
    return [word for bit, word in REASONS.items() if mask & bit]


def device_runtime() -> Path | None:
    """The library that a graph's loop is linked with: of the toolkit, or of the packages that PyTorch came with."""
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places += [Path("/usr/local/cuda")]
    if (spec := find_spec("nvidia")) is not None:
        places += [folder for root in spec.submodule_search_locations or () for folder in sorted(Path(root).iterdir())]
    inner = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    files = (place / folder / DEVICE_RUNTIME for place in places for folder in inner)
    return next((file for file in files if file.is_file()), None)


def _read(nvml: Any, handle: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, probe in (_settings(nvml, handle) | _state(nvml, handle)).items():
        try:
            found[name] = probe()
        except (nvml.NVMLError, AttributeError):  # this board does not report it, or this library does not know it
            found[name] = None
    return found


def _state(nvml: Any, handle: Any) -> dict[str, Callable[[], Any]]:
    """What changes while the GPU works."""
    def others() -> int:
        own = os.getpid()
        return sum(process.pid != own for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))

    def reasons() -> list[str]:
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)  # its name since driver 535
        return words((ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle))

    return {
        "memory_used_gib": lambda: round(nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30, 1),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "clock_reasons": reasons,
        "power_w": lambda: round(nvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1),
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "utilization_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "other_processes": others,
    }


def _settings(nvml: Any, handle: Any) -> dict[str, Callable[[], Any]]:
    """What stays as it is, or as somebody set it."""
    def mode() -> str:
        number = nvml.nvmlDeviceGetComputeMode(handle)
        return COMPUTE_MODES[number] if number < len(COMPUTE_MODES) else f"mode {number}"

    def capability() -> list[int]:
        return [int(number) for number in nvml.nvmlDeviceGetCudaComputeCapability(handle)]

    def cuda() -> str:
        version = nvml.nvmlSystemGetCudaDriverVersion()
        return f"{version // 1000}.{version % 1000 // 10}"

    return {
        "name": lambda: _text(nvml.nvmlDeviceGetName(handle)),
        "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
        "driver_cuda": cuda,
        "compute_capability": capability,
        "memory_gib": lambda: round(nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
        "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_limit_w": lambda: round(nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000, 1),
        "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]),
        "compute_mode": mode,
        "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0]),
    }


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
