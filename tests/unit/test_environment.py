"""The report prints on any machine and names what is missing."""

import json
import subprocess
import sys

import pytest

from hybridlab import environment


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


def test_missing_features_come_with_a_remedy():
    """A person should read what to install, not find out in the middle of a run."""
    good = {"cuda_available": True, "gpu": [{"other_processes": 0}], "compiler": "g++ 12", "python_headers": True,
            "nsys": True, "versions": dict.fromkeys(environment.LIBRARIES, "1")}
    assert environment.missing(good) == []
    for change, word in (({"compiler": None}, "jit and hybrid"), ({"nsys": False}, "nsys"),
                         ({"python_headers": False}, "Python.h"), ({"cuda_available": False}, "matches the driver"),
                         ({"gpu": [{"other_processes": 2}]}, "Another process"), ({"versions": {}}, "torch")):
        assert any(word in line for line in environment.missing(good | change)), word


def test_a_compiler_is_looked_for_where_torch_looks(monkeypatch, tmp_path):
    """With CXX set to something absent, torch.compile fails although g++ is installed; the report must say so."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert environment.report()["compiler"] is None


def test_importing_the_report_needs_no_torch():
    """The report explains a broken torch, so it cannot depend on one."""
    code = "import sys; import hybridlab.environment; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
