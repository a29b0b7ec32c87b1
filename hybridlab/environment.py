"""A report of machine, GPU and libraries that always prints: each probe is guarded, and a failed one says why."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "triton", "transformers", "numpy", "scipy", "pandas", "pyarrow", "plotly", "matplotlib",
             "papermill")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
NOISE = re.compile(r"\((r|tm)\)|\b(nvidia|intel|amd|cpu|processor|geforce|gpu|with|graphics|[0-9]+-core)\b|@.*")


def report() -> dict[str, Any]:
    """Plain values only (JSON-ready), no host name, no paths. A probe that fails gives None and a line in `failed`."""
    failed: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name, probe in PROBES.items():
        try:
            found[name] = probe()
        except Exception as error:  # the report must print on any machine, whatever a driver or a library does
            found[name] = None
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    found["versions"] = {name: _version(name) for name in LIBRARIES}
    found["machine"] = slug(found["gpu"], found["cpu"])
    return found | {"failed": failed}


def slug(gpus: list[dict[str, Any]] | None, cpu: str | None) -> str:
    """A short directory name for the machine: "h200" for a GPU, "cpu-xeon" without one."""
    if gpus:
        return _slug(str(gpus[0].get("name", "gpu"))) or "gpu"
    return f"cpu-{_slug(cpu or '') or platform.machine().lower() or 'unknown'}"


def missing(found: dict[str, Any]) -> list[str]:
    """One sentence for each feature that this machine lacks: what does not work, and the remedy."""
    sentences = []
    if not found.get("cuda_available"):
        sentences.append("No usable GPU: graphs are CPU tapes and CPU timings are labelled as such; "
                         "run on an NVIDIA GPU with a CUDA build of PyTorch for CUDA graphs and Triton kernels.")
        if found.get("gpu"):
            sentences.append("A GPU is there but PyTorch cannot use it: install a CUDA build of PyTorch "
                             "that matches the driver.")
    if not found.get("compiler"):
        sentences.append("No C++ compiler: arms jit and hybrid cannot run on the CPU; install g++ "
                         "(Debian, Ubuntu: apt-get install g++; conda: gxx_linux-64) or set CXX.")
    if not found.get("python_headers"):
        sentences.append("No Python headers (Python.h): compiled kernels cannot be linked; install python3-dev "
                         "or use the Python of conda or uv, which ships them.")
    if not found.get("nsys"):
        sentences.append("No nsys: traces of GPU kernels come from the PyTorch profiler only; "
                         "install Nsight Systems (conda: nsight-systems-cli).")
    versions = found.get("versions") or {}
    sentences += [f"{name} is not installed: reinstall the project with its dependencies."
                  for name in ("torch", "transformers", "plotly", "pyarrow") if not versions.get(name)]
    if any((gpu.get("other_processes") or 0) > 0 for gpu in found.get("gpu") or []):
        sentences.append("Another process uses the GPU: timings will be disturbed; wait until it has ended.")
    return sentences


def _slug(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", NOISE.sub(" ", name.lower()))
    return "-".join(words)[:40].strip("-")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except Exception:  # also damaged metadata of an installed package
        return None


def _cpu() -> str | None:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch(read: Callable[[Any], Any]) -> Callable[[], Any]:
    def probe() -> Any:
        import torch  # late, so that the report prints where torch is absent or broken

        return read(torch)

    return probe


def _gpus() -> list[dict[str, Any]]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # no driver on this machine
    try:
        return [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    def others() -> int:
        own = os.getpid()
        return sum(process.pid != own for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))

    def text(value: Any) -> str:
        return value.decode() if isinstance(value, bytes) else str(value)

    probes: dict[str, Callable[[], Any]] = {
        "name": lambda: text(nvml.nvmlDeviceGetName(handle)),
        "driver": lambda: text(nvml.nvmlSystemGetDriverVersion()),
        "memory_gib": lambda: round(nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: round(nvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1),
        "power_limit_w": lambda: round(nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000, 1),
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "other_processes": others,
    }
    found: dict[str, Any] = {}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except nvml.NVMLError:  # a value that this board does not report
            found[name] = None
    return found


def _compiler() -> str | None:
    """Name and version of the C++ compiler that torch.compile will call, None without one."""
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(wanted)
    if path is None:
        return None
    version = _output([path, "-dumpfullversion"]) or _output([path, "-dumpversion"])
    return f"{Path(wanted).name} {version}".strip()


def _git(*arguments: str) -> str | None:
    top = Path(__file__).resolve().parent.parent
    if not (top / ".git").exists() or not shutil.which("git"):
        return None  # installed as a package: the version says what code it is
    return _output(["git", "-C", str(top), *arguments], check=True)


def _output(command: list[str], check: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=check)
    return done.stdout.strip() if done.returncode == 0 else ""


def _dirty() -> bool | None:
    changes = _git("status", "--porcelain")
    return None if changes is None else bool(changes)


PROBES: dict[str, Callable[[], Any]] = {
    "system": lambda: f"{platform.system()} {platform.release()} {platform.machine()}",
    "cpu": _cpu,
    "cores": os.cpu_count,
    "usable_cores": _usable_cores,
    "load_average": lambda: [round(value, 2) for value in os.getloadavg()],
    "memory_gib": _memory_gib,
    "governor": lambda: next(iter(_lines(GOVERNOR)), None),
    "gpu": _gpus,
    "python": platform.python_version,
    "torch_threads": _torch(lambda torch: torch.get_num_threads()),
    "cuda": _torch(lambda torch: torch.version.cuda),
    "cuda_available": _torch(lambda torch: bool(torch.cuda.is_available())),
    "compiler": _compiler,
    "python_headers": lambda: (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    "nsys": lambda: shutil.which("nsys") is not None,
    "hybridlab": lambda: _version("hybridlab"),
    "commit": lambda: _git("rev-parse", "HEAD"),
    "dirty": _dirty,
}
