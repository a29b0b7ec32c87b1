"""What NVML says of a GPU, from a driver made here that refuses some questions."""

import json
import os
from types import SimpleNamespace

import pytest

from hybridlab import gpus


class Refused(Exception):
    """What the driver raises."""


class Driver:
    """One H200 as NVML shows it; it knows no power limit, and has no name for reasons newer than `older` drivers."""

    NVMLError = Refused
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, pids=(), mask=0, older=False):
        self.pids, self.mask, self.open = pids, mask, 0
        name = "nvmlDeviceGetCurrentClocksThrottleReasons" if older else "nvmlDeviceGetCurrentClocksEventReasons"
        setattr(self, name, lambda handle: self.mask)

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA H200"  # bytes in older libraries

    def nvmlSystemGetDriverVersion(self):
        return "580.95.05"

    def nvmlSystemGetCudaDriverVersion(self):
        return 12040

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return (9, 0)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=140 * 2**30, used=3 * 2**29)

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 345, 2: 3201}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 76_543

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        raise Refused("not supported")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 31

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=7, memory=1)

    def nvmlDeviceGetPersistenceMode(self, handle):
        return 1

    def nvmlDeviceGetMigMode(self, handle):
        return [0, 1]  # now, and after a reset

    def nvmlDeviceGetComputeMode(self, handle):
        return 3

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def __getattr__(self, name):
        raise AttributeError(name)  # ECC: this library does not know it


def test_every_value_is_asked_for_by_itself():
    """One question that a board refuses must not take the others with it."""
    driver = Driver(mask=0x1)
    (found,) = gpus.report(driver)
    assert json.loads(json.dumps(found)) == found == {
        "name": "NVIDIA H200", "driver": "580.95.05", "driver_cuda": "12.4", "compute_capability": [9, 0],
        "memory_gib": 140.0, "sm_clock_max_mhz": 1980, "memory_clock_max_mhz": 3201, "power_limit_w": None,
        "persistence": True, "mig": False, "compute_mode": "exclusive process", "ecc": None, "memory_used_gib": 1.5,
        "sm_clock_mhz": 345, "memory_clock_mhz": 3201, "clock_reasons": ["idle"], "power_w": 76.5,
        "temperature_c": 31, "utilization_percent": 7, "other_processes": 0}
    assert driver.open == 0


def test_a_report_names_no_board():
    """Runs are committed: what tells one board from another, or who uses it, must not be in them."""
    asked = []

    class Watched(Driver):
        def __getattribute__(self, name):
            asked.append(name)
            return super().__getattribute__(name)

    gpus.report(Watched())
    assert not [name for name in asked if any(word in name for word in ("UUID", "Pci", "Serial", "ProcessName"))]


def test_this_process_is_no_other_one():
    """Its own context counted as another's, every run would be called disturbed."""
    (found,) = gpus.report(Driver(pids=(os.getpid(), 1, 2)))
    assert found["other_processes"] == 2


@pytest.mark.parametrize(("mask", "words"), [
    (0, []), (0x4, ["power cap"]), (0x24, ["power cap", "thermal slowdown, software"]), (0x8000_0000, []),
])
@pytest.mark.parametrize("older", [False, True])
def test_reasons_are_words_under_both_names_of_the_question(mask, words, older):
    """A mask in hexadecimal explains no slow clock."""
    assert gpus.words(mask) == words
    (found,) = gpus.report(Driver(mask=mask, older=older))
    assert found["clock_reasons"] == words


@pytest.mark.parametrize(("seen", "index", "asked"), [
    (None, 1, ("index", 1)), ("4,2", 1, ("index", 2)), ("4, GPU-5ab1", 1, ("UUID", "GPU-5ab1")),
    ("MIG-77c0", 0, ("UUID", "MIG-77c0")),
])
def test_the_gpu_that_is_read_is_the_one_that_works(seen, index, asked, monkeypatch):
    """Of eight GPUs with one made visible, the clocks of the first would be laid to another's tokens."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    driver = Driver()
    driver.nvmlDeviceGetHandleByIndex = lambda number: ("index", number)
    driver.nvmlDeviceGetHandleByUUID = lambda name: ("UUID", name)
    assert gpus.opened(driver, index) == asked
    assert driver.open == 1


def test_a_gpu_that_is_not_visible_leaves_no_driver_open(monkeypatch):
    """CUDA_VISIBLE_DEVICES without this many must not leave NVML initialised."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    driver = Driver()
    with pytest.raises(IndexError):
        gpus.opened(driver, 1)
    assert driver.open == 0


def test_without_a_driver_there_is_no_gpu():
    """A container without a driver has NVML's library all the same."""
    class Absent(Driver):
        def nvmlInit(self):
            raise Refused("driver not loaded")

    assert gpus.report(Absent()) == []


def test_a_driver_that_breaks_in_the_middle_is_let_go():
    """Left open, it would keep the GPU awake."""
    class Broken(Driver):
        def nvmlDeviceGetCount(self):
            raise Refused("GPU is lost")

    driver = Broken()
    with pytest.raises(Refused):
        gpus.report(driver)
    assert driver.open == 0


def test_the_device_runtime_is_looked_for_where_cuda_home_says(monkeypatch, tmp_path):
    """A toolkit of one's own would be passed over, and loops called impossible."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpus, "find_spec", lambda name: None)
    file = tmp_path / "lib64" / gpus.DEVICE_RUNTIME
    assert gpus.device_runtime() != file
    file.parent.mkdir()
    file.touch()
    assert gpus.device_runtime() == file
