"""Clocks and power are read between requests, never in one, and a driver that refuses does no harm."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hybridlab import telemetry
from hybridlab.telemetry import Telemetry
from hybridlab.tokens import Happening


class Driver:
    """NVML of a GPU whose clock is what `clocks` says, reading after reading; it knows no temperature."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, clocks, mask=0):
        self.clocks, self.mask, self.open = iter(clocks), mask, 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return next(self.clocks) if kind == self.NVML_CLOCK_SM else 3201

    def nvmlDeviceGetPowerUsage(self, handle):
        return 350_000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        raise RuntimeError("not supported")

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=2**30)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=-1), SimpleNamespace(pid=os.getpid())]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self.mask


@pytest.fixture(autouse=True)
def _every_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(ns=0)
    monkeypatch.setattr(telemetry.time, "perf_counter_ns", lambda: now.ns)
    return now


def test_it_reads_no_more_often_than_it_is_told(clock):
    """The driver takes tens of µs to answer; asked after every request of a ms it would be part of the load."""
    driver = Driver([1980] * 9)
    with Telemetry(0, every_s=0.5, nvml=driver) as found:
        for clock.ns in range(0, 1_000_000_001, 100_000_000):
            found.sample()
    assert found.summary()["readings"] == 2 + 2  # on entering and leaving, and at 0.5 and 1 s
    assert found.summary()["seconds"] == 1.0
    assert driver.open == 0


def test_the_summary_holds_what_was_read_and_nothing_else(clock):
    """A temperature of 0 for a board that reports none would look like a cold one."""
    with Telemetry(0, every_s=0, nvml=Driver([1980, 1755, 1980], mask=0x5)) as found:
        found.sample()
    summary = found.summary()
    assert summary["clock_mhz"] == {"min": 1755.0, "median": 1980.0, "max": 1980.0}
    assert summary["utilization_percent"]["max"] == 97.0
    assert summary["power_w"]["median"] == 350.0
    assert summary["memory_used_mib"]["max"] == 1024.0
    assert summary["other_processes"]["max"] == 1.0
    assert summary["reasons"] == {"power cap": 3}
    assert "temperature_c" not in summary
    assert summary["problem"] == ""


def test_a_clock_change_is_a_happening_between_two_readings(clock):
    """A slow token while the clock fell is explained; rounding of a clock is no change."""
    with Telemetry(0, every_s=0, nvml=Driver([1980, 1979, 1755, 1755], mask=0x4)) as found:
        for clock.ns in (10, 20):
            found.sample()
        clock.ns = 30
    change = Happening("clock change", 10, 20, "1,979 → 1,755 MHz, power cap", False)
    assert found.clock_changes() == found.clock_changes(since_ns=20) == [change]
    assert found.clock_changes(since_ns=21) == []


def test_a_worker_of_ours_is_no_other_process():
    """A run through workers would be said to have shared its GPU with somebody."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not telemetry._foreign(child.pid)
        child.stdin.write(b"\n")
    assert not telemetry._foreign(os.getpid())
    assert telemetry._foreign(os.getppid())
    assert telemetry._foreign(-1)


def test_without_a_driver_a_run_goes_on_and_says_so():
    """A container without NVML must not lose a measurement for want of a thermometer."""
    broken = SimpleNamespace(nvmlInit=lambda: (_ for _ in ()).throw(RuntimeError("no driver")))
    with Telemetry(0, nvml=broken) as found:
        found.sample()
    assert found.summary()["problem"] == "NVML: RuntimeError: no driver"
    assert found.clock_changes() == []


def test_a_gpu_that_the_driver_does_not_show_ends_no_run():
    """A handle refused after the driver was opened would lose the run, and leave the driver open."""
    class Hidden(Driver):
        def nvmlDeviceGetHandleByIndex(self, index):
            raise RuntimeError("Invalid Argument")

    driver = Hidden([])
    with Telemetry(3, nvml=driver) as found:
        found.sample()
    assert found.summary()["problem"] == "NVML: RuntimeError: Invalid Argument"
    assert driver.open == 0


def test_a_cpu_says_its_clock_where_the_kernel_does(monkeypatch, tmp_path):
    """The fastest core is the one that measures; a kernel that says nothing gives no number."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\ncpu MHz\t\t: 2100.5\n\nprocessor : 1\ncpu MHz\t\t: 3000.0\n")
    monkeypatch.setattr(telemetry, "CPUINFO", info)
    with Telemetry() as found:
        pass
    assert found.summary()["clock_mhz"]["max"] == 3000.0
    info.write_text("")
    with Telemetry() as found:
        pass
    assert "clock_mhz" not in found.summary()
    assert found.summary()["load"]["min"] >= 0


def test_what_was_read_is_said_where_it_speaks_against_the_times():
    """A clock that was held down for half of a run, read, recorded, and never seen by whoever reads the result."""
    def one(low, high, others=0.0, **reasons):
        return {"readings": 10, "clock_mhz": {"min": low, "median": high, "max": high}, "reasons": reasons,
                "other_processes": {"min": 0.0, "median": 0.0, "max": others}}

    assert telemetry.words([one(1980.0, 1980.0), one(1975.0, 1980.0)]) == ""
    assert telemetry.words([{"readings": 2, "load": {"min": 0.0, "median": 0.0, "max": 0.0}}]) == ""
    found = telemetry.words([one(1980.0, 1980.0), one(1755.0, 1980.0, 1.0, **{"power cap": 4})])
    assert found == ("While it ran, the clock moved between 1,755 and 1,980 MHz, power cap held it down in 4 of 20 "
                     "readings, 1 other processes computed on the GPU.")
