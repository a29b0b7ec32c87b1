"""A report of machine, GPU and libraries that always prints: each probe is guarded, and a failed one says why."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hybridlab import gpus

NEEDED = ("torch", "transformers", "plotly", "pyarrow", "msgspec", "nvtx")
LAB = ("jupyterlab", "ipywidgets", "anywidget")
LIBRARIES = (*NEEDED, *LAB, "triton", "numpy", "scipy", "pandas", "matplotlib", "papermill", "cuda-bindings",
             "nvidia-ml-py")
TRITON, BINDINGS = (3, 6), (13,)   # the least versions that work, of triton and of cuda-bindings
LOOPS, EARLY, BFLOAT = (12, 4), [9, 0], [8, 0]  # CUDA of a driver whose graphs loop; least compute capabilities
CPU, NODES, CGROUP = Path("/sys/devices/system/cpu"), Path("/sys/devices/system/node"), Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
HALF = ("avx512_fp16", "avx512_bf16", "amx_bf16", "bf16", "asimdhp")  # flags of CPUs that compute in 16 bits
NOISE = re.compile(r"\((r|tm)\)|\b(nvidia|intel|amd|cpu|processor|geforce|gpu|with|graphics|[0-9]+-core)\b|@.*")


def report(names: Iterable[str] | None = None) -> dict[str, Any]:
    """Plain values only (JSON-ready), no host name, no paths. A probe that fails gives None and a line in `failed`.
    `names`: only these of PROBES, cpu and gpu among them; some others import torch, which takes seconds."""
    failed, found = dict[str, str](), dict[str, Any]()
    for name in PROBES if names is None else names:
        try:
            found[name] = PROBES[name]()
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
    """A sentence for each feature that `found`, a report, lacks here: the feature, what is missing, and the remedy.

    A compiler, a tool or a library that could not be looked for counts as missing; of other unknowns nothing is said.
    """
    versions = found.get("versions") or {}
    sentences = [f"{name}: it is not installed: reinstall the project with its dependencies."
                 for name in NEEDED if not versions.get(name)]
    sentences += _gpu_features(found, versions) if found.get("cuda_available") else _without_gpu(found)
    return [*sentences, *_cpu_features(found), *_tools(found, versions), *_steadiness(found)]


def _without_gpu(found: dict[str, Any]) -> Iterator[str]:
    yield ("CUDA graphs, Triton kernels, early launches, loops on the device: No usable GPU, so graphs are CPU tapes "
           "and CPU timings are labelled as such: run on an NVIDIA GPU with a CUDA build of PyTorch.")
    if found.get("gpu"):
        yield "GPU: PyTorch cannot use the one here: install a CUDA build of PyTorch that matches the driver."


def _gpu_features(found: dict[str, Any], versions: dict[str, str | None]) -> Iterator[str]:
    gpu = (found.get("gpu") or [{}])[0]
    able, cuda = gpu.get("compute_capability"), _numbers(gpu.get("driver_cuda"))
    shown = ".".join(map(str, able or ()))
    if (triton := _numbers(versions.get("triton"))) < TRITON:
        yield (f"JIT kernels on the GPU: triton is {versions.get('triton') or 'not installed'}"
               f"{', too old' if triton else ''}: install triton {_dotted(TRITON)} or later.")
    if able and able < EARLY:
        yield (f"Early launches: compute capability {shown} has none, so kernels start when the last one has ended: "
               f"use a GPU of {_dotted(EARLY)} or later.")
    if able and able < BFLOAT:
        yield f"Half precision: compute capability {shown} has no bfloat16: use dtype='float16'."
    bindings = versions.get("cuda-bindings")
    for wrong, what, remedy in (
            (_numbers(bindings) < BINDINGS, f"cuda-bindings is {bindings or 'not installed'}",
             f"install cuda-bindings {_dotted(BINDINGS)} or later"),
            (cuda and cuda < LOOPS, f"the driver is for CUDA {_dotted(cuda)}",
             f"install a driver for CUDA {_dotted(LOOPS)} or later"),
            (found.get("device_runtime") is False, f"{gpus.DEVICE_RUNTIME} was not found",
             "install the CUDA toolkit and let CUDA_HOME name it")):
        if wrong:
            yield f"Loops on the device: {what}, so several steps of one launch stand side by side: {remedy}."
    if found.get("profiler") is not None and "CUDA" not in found["profiler"]:
        yield "Profiler traces: PyTorch's profiler sees no GPU kernels: install a PyTorch with CUPTI, or use nsys."
    if gpu.get("sm_clock_mhz") is None or gpu.get("power_w") is None:
        yield "Clocks and power: NVML tells none, so a slow clock goes unseen: install nvidia-ml-py, let NVML be read."


def _cpu_features(found: dict[str, Any]) -> Iterator[str]:
    if not found.get("compiler"):
        yield ("JIT kernels on the CPU: No C++ compiler, so arms jit and hybrid cannot run there: install g++ "
               "(Debian, Ubuntu: apt-get install g++; conda: gxx_linux-64) or set CXX.")
    if not found.get("python_headers"):
        yield ("JIT kernels: No Python headers (Python.h), so compiled kernels cannot be linked: install python3-dev "
               "or use the Python of conda or uv, which ships them.")
    if found.get("cpu_half") == [] and not found.get("cuda_available"):
        yield "Half precision: this CPU computes in float32 and converts, which is slower: use dtype='float32'."


def _tools(found: dict[str, Any], versions: dict[str, str | None]) -> Iterator[str]:
    if not found.get("nsys"):
        yield ("Traces of each node of a graph: No nsys, so traces of GPU kernels come from the PyTorch profiler only: "
               "install Nsight Systems (conda: nsight-systems-cli).")
    if absent := [name for name in LAB if not versions.get(name)]:
        yield (f"Notebooks: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: "
               "pip install 'hybridlab[lab]'.")


def _steadiness(found: dict[str, Any]) -> Iterator[str]:
    """What disturbs a timing without making it impossible."""
    governor, load, cores = found.get("governor"), found.get("load_average"), found.get("usable_cores")
    if governor not in (None, "performance"):
        yield (f"Steady clocks: the CPU's governor is {governor}: cpupower frequency-set -g performance, or compare "
               "within one run only.")
    if load and cores and load[0] > cores:
        yield (f"Steady clocks: the load is {load[0]:g} on {cores} cores, which stretches tails: wait until other work "
               "has ended.")
    if found.get("cpu_quota") and cores and found["cpu_quota"] < cores:
        yield (f"Steady clocks: this container may use {found['cpu_quota']:g} of {cores} cores and is stopped when it "
               "uses more: lift the quota, or use fewer threads.")
    boards = found.get("gpu") or []
    if any((gpu.get("other_processes") or 0) > 0 for gpu in boards):
        yield "Steady clocks: Another process uses the GPU, which disturbs timings: wait until it has ended."
    if any(gpu.get("persistence") is False for gpu in boards):
        yield "Cold starts: persistence mode is off, so the driver starts anew for a first process: nvidia-smi -pm 1."


def _numbers(version: str | None) -> tuple[int, ...]:
    """(3, 7) of "3.7.1+cu130"; nothing of nothing, which is less than any version."""
    return tuple(int(number) for number in re.findall(r"\d+", (version or "").partition("+")[0])[:2])


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _slug(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", NOISE.sub(" ", name.lower()))
    return "-".join(words)[:40].strip("-")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except Exception:  # also damaged metadata of an installed package
        return None


def _cpu() -> str | None:
    for line in _lines(CPUINFO):
        if line.startswith("model name"):
            return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or None


def _half() -> list[str] | None:
    flags = next((line for line in _lines(CPUINFO) if line.startswith(("flags", "Features"))), None)
    return None if flags is None else sorted(set(HALF) & set(flags.split()))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _first(*paths: Path) -> str | None:
    """The first line of the first of these files that has one."""
    return next((lines[0].strip() for path in paths if (lines := _lines(path))), None)


def _mhz() -> dict[str, float | None]:
    import psutil  # late: the report must print where it is broken

    found = psutil.cpu_freq()  # the mean of all cores; of a virtual machine often the nominal one
    return {"now": round(found.current), "max": round(found.max) or None} if found else {"now": None, "max": None}


def _is(value: str, path: Path) -> bool | None:
    """Whether a file of the kernel's says so; None where it has none."""
    found = _first(path)
    return None if found is None else found == value


def _boost() -> bool | None:
    """Whether cores may run faster than their nominal clock."""
    intel = _is("0", CPU / "intel_pstate/no_turbo")
    return _is("1", CPU / "cpufreq/boost") if intel is None else intel


def _quota() -> float | None:
    """Cores that the control group of this container may use; None without a limit."""
    two = _first(CGROUP / "cpu.max")
    quota, period = two.split()[:2] if two else (
        _first(CGROUP / "cpu/cpu.cfs_quota_us") or "max", _first(CGROUP / "cpu/cpu.cfs_period_us") or "100000")
    return None if quota in ("max", "-1") else round(int(quota) / int(period), 2)


def _container() -> bool:
    marks, groups = (Path("/.dockerenv"), Path("/run/.containerenv")), " ".join(_lines(Path("/proc/1/cgroup")))
    return any(mark.exists() for mark in marks) or re.search("docker|kubepods|containerd|lxc", groups) is not None


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch(read: Callable[[Any], Any]) -> Callable[[], Any]:
    def probe() -> Any:
        import torch  # late, so that the report prints where torch is absent or broken

        return read(torch)

    return probe


def _compiler() -> str | None:
    """Name and version of the C++ compiler that torch.compile will call, None without one."""
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(wanted)
    if path is None:
        return None
    version = _output([path, "-dumpfullversion"]) or _output([path, "-dumpversion"])
    return f"{Path(wanted).name} {version}".strip()


def _nsys() -> str | None:
    """"2025.5.1.121" of "NVIDIA Nsight Systems version 2025.5.1.121-255136380782v0"; None without nsys."""
    found = re.search(r"version (\d[\d.]*)", _output(["nsys", "--version"])) if shutil.which("nsys") else None
    return found[1] if found else None


def _listens() -> bool:
    """Whether a profiler sees the ranges of this process."""
    from hybridlab import ranges  # late: it needs nvtx

    return ranges.listening()


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
    "governor": lambda: _first(CPU / "cpu0/cpufreq/scaling_governor"),
    "cpu_mhz": _mhz,
    "cpu_boost": _boost,
    "smt": lambda: _is("1", CPU / "smt/active"),
    "numa_nodes": lambda: len(list(NODES.glob("node[0-9]*"))) or None,
    "cpu_quota": _quota,
    "cpu_half": _half,
    "container": _container,
    "gpu": gpus.report,
    "python": platform.python_version,
    "torch_threads": _torch(lambda torch: torch.get_num_threads()),
    "cuda": _torch(lambda torch: torch.version.cuda),
    "cuda_available": _torch(lambda torch: bool(torch.cuda.is_available())),
    "profiler": _torch(lambda torch: sorted(kind.name for kind in torch.profiler.supported_activities())),
    "device_runtime": lambda: gpus.device_runtime() is not None,
    "compiler": _compiler,
    "python_headers": lambda: (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    "nsys": lambda: shutil.which("nsys") is not None,
    "nsys_version": _nsys,
    "nvtx_listens": _listens,
    "hybridlab": lambda: _version("hybridlab"),
    "commit": lambda: _git("rev-parse", "HEAD"),
    "dirty": _dirty,
}
