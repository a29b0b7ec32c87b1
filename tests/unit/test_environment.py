"""The report prints on any machine and names what is missing."""

import json
import subprocess
import sys

import pytest

from hybridlab import environment, terminal


def test_the_report_is_plain_and_complete():
    """Environment.json is written from it: a value that JSON cannot hold would lose the run."""
    found = environment.report()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["versions"]["torch"]
    assert found["python"]
    assert found["cores"] >= 1
    assert found["machine"]


def test_every_probe_may_fail(monkeypatch):
    """A broken driver must not stop the report that is needed to see that the driver is broken."""

    def broken():
        raise OSError("driver fell over")

    monkeypatch.setattr(environment, "PROBES", dict.fromkeys(environment.PROBES, broken))
    found = environment.report()
    assert set(found["failed"]) == set(environment.PROBES)
    assert found["failed"]["gpu"] == "OSError: driver fell over"
    assert found["gpu"] is None
    assert found["machine"].startswith("cpu-")
    assert any("No C++ compiler" in line for line in environment.missing(found))


@pytest.mark.parametrize(("gpus", "cpu", "name"), [
    ([{"name": "NVIDIA H200"}], "Intel(R) Xeon(R) Processor", "h200"),
    ([{"name": "NVIDIA GeForce RTX 4090"}], None, "rtx-4090"),
    ([], "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "cpu-xeon-e5-2680-v4"),
    (None, "AMD EPYC 7763 64-Core Processor", "cpu-epyc-7763"),
    ([], "../../etc", "cpu-etc"),
])
def test_a_machine_name_is_a_short_directory_name(gpus, cpu, name):
    """The name becomes a directory: slashes and dots of a reported name must not lead outside the root."""
    assert environment.slug(gpus, cpu) == name


GPU = {"other_processes": 0, "compute_capability": [9, 0], "driver_cuda": "13.0", "sm_clock_mhz": 1980, "power_w": 90.0,
       "persistence": True}
GOOD = {"cuda_available": True, "gpu": [GPU], "compiler": "g++ 12", "python_headers": True, "nsys": True,
        "device_runtime": True, "profiler": ["CPU", "CUDA"], "governor": "performance", "load_average": [0.5, 1, 9],
        "usable_cores": 8, "cpu_quota": None, "cpu_half": [],
        "versions": dict.fromkeys(environment.LIBRARIES, "1") | {"triton": "3.10.0", "cuda-bindings": "13.0.3"}}
ON_CPU = {"cuda_available": False, "gpu": []}


def without(*names):
    return {"versions": {name: version for name, version in GOOD["versions"].items() if name not in names}}


def with_version(name, version):
    return {"versions": GOOD["versions"] | {name: version}}


def test_nothing_is_missing_where_all_is_there():
    """A list that is never empty is read by nobody."""
    assert environment.missing(GOOD) == []


@pytest.mark.parametrize(("change", "feature", "words"), [
    ({"compiler": None}, "JIT kernels on the CPU", "jit and hybrid"),
    ({"python_headers": False}, "JIT kernels", "Python.h"),
    ({"nsys": False}, "Traces of each node of a graph", "nsight-systems-cli"),
    ({"profiler": ["CPU"]}, "Profiler traces", "CUPTI"),
    (ON_CPU | {"cpu_half": ["amx_bf16"]}, "CUDA graphs, Triton kernels, early launches, loops on the device",
     "No usable GPU"),
    ({"gpu": [GPU | {"other_processes": 2}]}, "Steady clocks", "Another process"),
    ({"gpu": [GPU | {"compute_capability": [8, 9]}]}, "Early launches", "8.9"),
    ({"gpu": [GPU | {"driver_cuda": "12.3"}]}, "Loops on the device", "CUDA 12.4 or later"),
    ({"gpu": [GPU | {"power_w": None}]}, "Clocks and power", "NVML"),
    ({"gpu": []}, "Clocks and power", "NVML"),
    ({"gpu": [GPU | {"persistence": False}]}, "Cold starts", "nvidia-smi -pm 1"),
    ({"device_runtime": False}, "Loops on the device", "CUDA_HOME"),
    (with_version("cuda-bindings", "12.9.4"), "Loops on the device", "cuda-bindings is 12.9.4"),
    (without("cuda-bindings"), "Loops on the device", "cuda-bindings is not installed"),
    (without("vllm"), "Peers", "vllm is not installed"),
    (with_version("triton", "3.5.1"), "JIT kernels on the GPU", "triton is 3.5.1, too old"),
    (without("triton"), "JIT kernels on the GPU", "triton is not installed: install"),
    (without("anywidget"), "Notebooks", "anywidget is not installed"),
    (without("jupyterlab", "ipywidgets"), "Notebooks", "jupyterlab, ipywidgets are not installed"),
    (without("torch"), "torch", "not installed"),
    ({"governor": "powersave"}, "Steady clocks", "powersave"),
    ({"load_average": [8.5, 1, 1]}, "Steady clocks", "8.5 on 8 cores"),
    ({"cpu_quota": 1.5}, "Steady clocks", "1.5 of 8 cores"),
])
def test_a_missing_feature_is_named_with_what_it_lacks_and_a_remedy(change, feature, words):
    """A person should read what to install, not find out in the middle of a run."""
    (sentence,) = environment.missing(GOOD | change)
    assert sentence.startswith(f"{feature}: ")
    assert words in sentence
    assert sentence.count(": ") >= 2
    assert sentence.endswith(".")


def test_a_machine_of_two_faults_names_both():
    """A GPU that PyTorch cannot use is not the same as none: the remedy is another build, not another machine."""
    first, second = environment.missing(GOOD | {"cuda_available": False, "cpu_half": ["amx_bf16"]})
    assert "No usable GPU" in first
    assert "matches the driver" in second
    assert "bfloat16" in environment.missing(GOOD | {"gpu": [GPU | {"compute_capability": [7, 5]}]})[1]
    assert "float32" in environment.missing(GOOD | ON_CPU)[-1]


def test_an_older_gpu_lacks_only_what_it_lacks():
    """9.0 is early enough, and a comparison of texts would put 10.0 before it."""
    for able, driver in (([9, 0], "12.4"), ([10, 0], "13.0"), ([12, 1], "12.10")):
        assert environment.missing(GOOD | {"gpu": [GPU | {"compute_capability": able, "driver_cuda": driver}]}) == []


@pytest.mark.parametrize(("files", "quota"), [
    ({"cpu.max": "150000 100000"}, 1.5), ({"cpu.max": "max 100000"}, None), ({}, None),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
])
def test_a_quota_is_read_from_either_kind_of_control_group(files, quota, monkeypatch, tmp_path):
    """A container that may use one and a half cores is stopped in the middle of tokens; that must not go unseen."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(environment, "CGROUP", tmp_path)
    assert environment.report()["cpu_quota"] == quota


@pytest.mark.parametrize(("files", "boost"), [
    ({"intel_pstate/no_turbo": "1"}, False), ({"intel_pstate/no_turbo": "0"}, True), ({"cpufreq/boost": "1"}, True),
    ({"cpufreq/boost": "0"}, False), ({}, None),
])
def test_boost_is_read_from_either_driver(files, boost, monkeypatch, tmp_path):
    """One driver says whether it is off and the other whether it is on; read as one, half the machines are wrong."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(environment, "CPU", tmp_path)
    found = environment.report()
    assert (found["cpu_boost"], found["smt"], found["governor"]) == (boost, None, None)


def test_nsys_says_its_version(monkeypatch, tmp_path):
    """Tables of an export differ between versions, so a trace without one cannot be read again."""
    tool = tmp_path / "nsys"
    tool.write_text("#!/bin/sh\necho NVIDIA Nsight Systems version 2025.5.1.121-255136380782v0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = environment.report()
    assert (found["nsys"], found["nsys_version"]) == (True, "2025.5.1.121")


def test_the_table_ends_with_what_is_missing_or_that_nothing_is(capsys):
    """An empty end would read as if the check had not run."""
    found = environment.report()
    terminal.machine(found | {"gpu": [GPU | {"name": "[red]H200"}]}, [])
    out = capsys.readouterr().out
    assert "gpu 0 name" in out
    assert "[red]H200" in out
    assert out.rstrip().endswith("Nothing is missing: every feature works here.")
    assert "self-test" not in out
    terminal.machine(found | {"cuda_available": True}, [])
    assert "self-test decides" in " ".join(capsys.readouterr().out.split())
    terminal.machine(found, ["Notebooks: [b]x[/b] \x1b[2J is not installed: pip install x."])
    out = capsys.readouterr().out
    assert "• Notebooks: [b]x[/b]" in out
    assert "\x1b" not in out.splitlines()[-1]


def test_a_compiler_is_looked_for_where_torch_looks(monkeypatch, tmp_path):
    """With CXX set to something absent, torch.compile fails although g++ is installed; the report must say so."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert environment.report()["compiler"] is None


def test_importing_the_report_needs_no_torch():
    """The report explains a broken torch, so it cannot depend on one."""
    code = "import sys; import hybridlab.environment; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
