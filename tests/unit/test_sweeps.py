"""A sweep: refused wholly before a job starts, in one order for one seed, resumed from the manifests alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from typer.testing import CliRunner

from hybridlab import cli, cluster, files, finished, jobs, outcomes, records, store, sweeping, sweeps
from hybridlab.errors import HybridlabError, RunError, SweepError

PARAMETERS = 'model = "tiny"\nrepeats = 3\nlengths = [10]\ndevice = "cpu"\n'
SWEEP = "notebook: small.ipynb\nrepeats: 2\nseed: 5\nmatrix: {repeats: [1, 2, 3]}\n"
MACHINE = {"cpu": "Test CPU", "gpu": [], "python": "3.12", "hybridlab": "1", "commit": "c0ffee", "dirty": False}


def row(ms: float) -> dict[str, Any]:
    return {"round": 0, "request": 0, "arm": "eager", "policy": "whole", "prompt_tokens": 10, "bucket": None,
            "index": 0, "position": 10, "metric": "ttft", "ms": ms, "path": "eager", "reason": "", "captures": 0,
            "compiles": 0, "process": 0, "device_ms": None, "client_ms": None, "ended_ns": 1,
            "happened": "", "happened_ms": 0.0, "profiled": False}


def notebook(folder: Path, *cells: str) -> Path:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})])
    made.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(made, folder / "small.ipynb")
    return folder / "small.ipynb"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    notebook(tmp_path, "x = repeats")
    (tmp_path / "s.yaml").write_text(SWEEP)
    return tmp_path / "s.yaml"


class Machine:
    """Where jobs are done without a process: `breaks` says how a job ends, and `started` which were."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.breaks: dict[str, str] = {}
        self.report: dict[str, Any] = {**MACHINE, "versions": {"torch": "2.13"}, "machine": "test"}

    def run(self, wanted: dict[str, Any], root: Path, held: Any = (), tick: Any = lambda: None) -> finished.Entry:
        name = wanted["note"]["job"]
        self.started.append(name)
        tick()
        if self.breaks.get(name) == "interrupt":
            raise KeyboardInterrupt
        target = records.Run.create(sweeps.settings(sweeps.read_notebook(Path(wanted["notebook"])), "small.ipynb",
                                                    wanted["parameters"]), root)
        files.atomic_write(target.path / finished.JOB, json.dumps(wanted["note"]))
        target.append([row(ms + 1) for ms in range(9)])
        if self.breaks.get(name) != "dies":
            target.finish("failed" if name in self.breaks else "complete", self.breaks.get(name, ""))
        return finished.state(target.path)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setattr(jobs, "run", found.run)
    monkeypatch.setattr("hybridlab.environment.report", lambda names=None: dict(found.report))
    return found


def ids(root: Path) -> list[str]:
    """The jobs that have a complete run, one for each run."""
    return sorted(json.loads((path.parent / finished.JOB).read_text())["job"] for path in root.glob("*/*/manifest.json")
                  if json.loads(path.read_text())["status"] == "complete")


# ---- refused -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "says"), [
    ("", "describes no sweep"),
    ("- 1", "describes no sweep"),
    ("{", "no plain YAML"),
    ("matrix: {}", "missing required field `notebook`"),
    ("notebok: small.ipynb", "did you mean 'notebook'"),
    ("notebook: smal.ipynb", "small.ipynb"),
    ("notebook: small.ipynb\nnotebook: other.ipynb", "'notebook' is there twice"),
    ("notebook: small.ipynb\nmatrix: {repeats: [1], repeats: [2]}", "'repeats' is there twice"),
    ("notebook: small.ipynb\nmatrix: {repeats: 3}", "expected `array`"),
    ("notebook: small.ipynb\nmatrix: {repeats: []}", "length >= 1"),
    ("notebook: small.ipynb\nmatrix: {repeats: [1, 1]}", "holds a value twice"),
    ("notebook: small.ipynb\nmatrix: {lengths: [[10], [10.0]]}", "in the cell lengths=[10.0]"),
    ("notebook: small.ipynb\nparameters: {repeats: 1}\nmatrix: {repeats: [2]}", "in parameters and in matrix"),
    ("notebook: small.ipynb\nmatrix: {repeat: [2]}", "did you mean 'repeats'"),
    ("notebook: small.ipynb\nmatrix: {repeats: [1, 0]}", "in the cell repeats=0"),
    ("notebook: small.ipynb\nmatrix: {repeats: [1, 2020-01-01]}", "datetime.date"),
    ("notebook: small.ipynb\nmatrix: {lengths: [[10], [5000]]}", "the context of tiny holds 1024"),
    ("notebook: small.ipynb\nmatrix: {model: [tiny, 'random:tiny-lama-2']}", "did you mean 'tiny-llama-2'"),
    ("notebook: small.ipynb\nmatrix: {lengths: [[10, 10]]}", "lengths holds a value twice"),
    ("notebook: small.ipynb\nmatrix: {repeats: [1]}\nexclude: [{repeats: 2}]", "no cell has these values"),
    ("notebook: small.ipynb\nmatrix: {repeats: [1]}\nexclude: [{repeats: 1}]", "no cell is left"),
    ("notebook: small.ipynb\nrepeats: 0", "repeats is 0"),
    ("notebook: small.ipynb\nrepeats: 10001", "at most 10,000"),
    ("notebook: small.ipynb\nparameters: &p {repeats: 1}\nmatrix: *p", "an alias, *p"),
    ("notebook: !!python/object/apply:os.getcwd []", "no plain YAML"),
    ("? [1]\n: 2", "a key that is no name"),
    ("[" * 5000, "no plain YAML"),
    ("x: " + "9" * 5000, "no plain YAML"),
    ("x: \"\udc80\"", "no plain YAML"),
    ("x: " + "y" * (sweeps.MOST_BYTES + 1), "holds more than 1,048,576 bytes"),
], ids=lambda value: value[:30] if isinstance(value, str) else None)
def test_what_is_wrong_anywhere_is_refused_before_anything_starts(text: str, says: str, file: Path, tmp_path: Path,
                                                                  machine: Machine) -> None:
    """A mistake in the last cell would show after hours; a short file with aliases could describe millions of jobs."""
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(HybridlabError) as caught:
        sweeping.run(file, tmp_path / "runs")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "runs").exists()
    assert machine.started == []


def test_a_sweep_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A traceback tells a person nothing about a misspelt name, and exit code 1 would look like a failed job."""
    done = CliRunner().invoke(cli.app, ["sweep", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2
    assert "cannot be read" in done.stderr


def test_a_sweep_inside_a_run_is_refused(file: Path, tmp_path: Path, machine: Machine,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jobs would record into the outer run."""
    monkeypatch.setenv(records.RUN_VARIABLE, str(tmp_path))
    with pytest.raises(SweepError, match="inside a run"):
        sweeping.run(file, tmp_path / "runs")


# ---- jobs and their order ------------------------------------------------------------------------------------------

def test_every_cell_is_there_once_in_each_repeat_in_an_order_of_the_seed(file: Path) -> None:
    """An order that is not reproducible, or that puts one cell's runs together, confounds it with the time of day."""
    found = sweeps.read(file).jobs()
    assert [job.id for job in found] == [job.id for job in sweeps.read(file).jobs()]
    assert Counter(job.label for job in found[:3]) == Counter(f"repeats={n} · 1" for n in (1, 2, 3))
    assert Counter(job.label for job in found[3:]) == Counter(f"repeats={n} · 2" for n in (1, 2, 3))
    orders = set()
    for seed in range(8):
        file.write_text(SWEEP.replace("seed: 5", f"seed: {seed}"))
        orders.add(tuple(job.id for job in sweeps.read(file).jobs()))
    assert len(orders) > 4


def test_a_job_is_its_code_its_parameters_and_its_repeat(file: Path, tmp_path: Path) -> None:
    """A changed notebook that counted as measured would be a lie; a longer matrix that did not would cost hours."""
    first = {job.label: job.id for job in sweeps.read(file).jobs()}
    file.write_text(SWEEP.replace("[1, 2, 3]", "[4, 2, 1, 3]").replace("repeats: 2\n", "repeats: 3\n"))
    longer = {job.label: job.id for job in sweeps.read(file).jobs()}
    assert len(longer) == 12
    assert first.items() <= longer.items()
    file.write_text("notebook: small.ipynb\nparameters: {repeats: 2}\n")
    assert sweeps.read(file).jobs()[0].id == first["repeats=2 · 1"]
    file.write_text(SWEEP)
    notebook(tmp_path, "x = repeats + 1")
    assert not set(first.values()) & {job.id for job in sweeps.read(file).jobs()}


def test_excluded_cells_are_left_out(file: Path) -> None:
    """A combination that is impossible would refuse the whole matrix."""
    file.write_text("notebook: small.ipynb\nmatrix: {repeats: [1, 2], lengths: [[5], [9]]}\n"
                    "exclude: [{repeats: 1, lengths: [9]}]\n")
    assert [cell.values for cell in sweeps.read(file).cells] == [
        {"repeats": 1, "lengths": [5]}, {"repeats": 2, "lengths": [5]}, {"repeats": 2, "lengths": [9]}]


# ---- what is complete is not run again -----------------------------------------------------------------------------

def test_a_failing_job_stops_no_other_and_only_it_is_run_again(file: Path, tmp_path: Path, machine: Machine,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    """One bad cell would cost the night; running all again would cost the next."""
    every = [job.id for job in sweeps.read(file).jobs()]
    machine.breaks = {every[1]: "no room", every[3]: "dies"}
    assert sweeping.run(file, tmp_path / "runs") is False
    assert machine.started == every
    said = capsys.readouterr()
    assert "6 jobs, 4 complete, 2 to run" in said.out
    assert "failed: no room" in said.err
    machine.breaks, machine.started = {}, []
    assert sweeping.run(file, tmp_path / "runs") is True
    assert machine.started == [every[1], every[3]]
    assert ids(tmp_path / "runs") == sorted(every)
    machine.started = []
    assert sweeping.run(file, tmp_path / "runs") is True
    assert machine.started == []


def test_it_stops_at_a_failure_when_asked(file: Path, tmp_path: Path, machine: Machine) -> None:
    """A broken machine fails every job that it is given."""
    every = [job.id for job in sweeps.read(file).jobs()]
    machine.breaks = {every[1]: "no room"}
    assert sweeping.run(file, tmp_path / "runs", stop_on_failure=True) is False
    assert machine.started == every[:2]


def test_an_interrupt_keeps_what_is_done(file: Path, tmp_path: Path, machine: Machine) -> None:
    """Ctrl-C must say that it was one, and the next start must go on."""
    every = [job.id for job in sweeps.read(file).jobs()]
    machine.breaks = {every[2]: "interrupt"}
    done = CliRunner().invoke(cli.app, ["sweep", str(file), "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 130
    assert ids(tmp_path / "runs") == sorted(every[:2])


@pytest.mark.parametrize("harm", ["rows.parquet", "job.json"])
def test_a_run_whose_files_changed_does_not_count(harm: str, file: Path, tmp_path: Path, machine: Machine) -> None:
    """A run that was edited, or given another job's name, is no measurement of this job."""
    sweeping.run(file, tmp_path / "runs")
    victim = next((tmp_path / "runs").glob(f"*/*/{harm}"))
    lost = json.loads((victim.parent / finished.JOB).read_text())["job"]
    victim.write_bytes(victim.read_bytes().replace(b'"repeat": ', b'"repeat":  ') + b" ")
    machine.started = []
    assert sweeping.run(file, tmp_path / "runs") is True
    assert machine.started == [lost]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(file: Path, tmp_path: Path, machine: Machine,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that starts something, or leaves a lock behind, is none."""
    assert sweeping.run(file, tmp_path / "runs", dry_run=True) is True
    assert "6 jobs, 0 complete, 6 to run; how long they take is known when" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert machine.started == []
    machine.breaks = {sweeps.read(file).jobs()[5].id: "no room"}
    sweeping.run(file, tmp_path / "runs")
    capsys.readouterr()
    sweeping.run(file, tmp_path / "runs", dry_run=True)
    said = capsys.readouterr().out
    assert "6 jobs, 5 complete, 1 to run, about 0 s" in said
    assert "is failed" in said


def test_two_sweeps_do_not_share_a_store(file: Path, tmp_path: Path, machine: Machine,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would run the same job, and disturb each other's times."""
    monkeypatch.setattr(jobs, "WAIT_S", 0.0)
    with jobs.alone(tmp_path / "runs"), pytest.raises(SweepError, match="another sweep is at work"):
        sweeping.run(file, tmp_path / "runs")
    assert machine.started == []
    assert sweeping.run(file, tmp_path / "runs") is True


# ---- one table -----------------------------------------------------------------------------------------------------

def test_a_sweep_is_not_finished_on_another_version_unless_named(file: Path, tmp_path: Path, machine: Machine) -> None:
    """Half a table from one version of PyTorch and half from the next compares the versions."""
    every = [job.id for job in sweeps.read(file).jobs()]
    machine.breaks = {every[4]: "no room"}
    sweeping.run(file, tmp_path / "runs")
    machine.breaks, machine.started = {}, []
    machine.report["versions"] = {"torch": "2.14"}
    with pytest.raises(SweepError, match=r"differ in torch .*2\.14.*2\.13.*--across"):
        sweeping.run(file, tmp_path / "runs")
    assert machine.started == []
    assert CliRunner().invoke(cli.app, ["sweep", str(file), "--runs", str(tmp_path / "runs")]).exit_code == 2
    assert sweeping.run(file, tmp_path / "runs", across=["torch"]) is True
    assert machine.started == [every[4]]
    with pytest.raises(RunError, match="differ in torch"):  # nothing left to run: its table still says so
        sweeping.run(file, tmp_path / "runs")


def test_a_misspelt_name_is_refused_before_anything_is_written(file: Path, tmp_path: Path, machine: Machine) -> None:
    """A lock file, or hours of jobs, before a word is found to name nothing."""
    got = CliRunner().invoke(cli.app, ["sweep", str(file), "--runs", str(tmp_path / "runs"), "--across", "tocrh"])
    assert got.exit_code == 2
    assert "did you mean 'torch'" in got.stderr
    assert machine.started == []
    assert not (tmp_path / "runs").exists()


def test_the_table_has_every_cell_with_its_runs(file: Path, tmp_path: Path, machine: Machine) -> None:
    """A table without the runs it was made of cannot be checked."""
    sweep = sweeps.read(file)
    machine.breaks = {sweep.jobs()[0].id: "no room"}
    sweeping.run(file, tmp_path / "runs")
    grid = outcomes.summary(sweep, finished.read(tmp_path / "runs", sweep.jobs()), ())
    assert grid.header == ["cell", "", "TTFT, ms", "complete runs"]
    assert [line[0] for line in grid.rows] == ["repeats=1", "repeats=2", "repeats=3"]
    assert {line[2] for line in grid.rows} == {"5.00 [2.00, 8.00]"}
    assert sorted(line[3].splitlines()[0] for line in grid.rows) == ["1 of 2", "2 of 2", "2 of 2"]
    shown = [name for line in grid.rows for name in line[3].splitlines()[1:]]
    assert sorted(shown) == sorted(store.runs(tmp_path / "runs").query("status == 'complete'")["run_id"])


def test_a_kind_without_headline_numbers_is_said_in_the_table(file: Path, tmp_path: Path, machine: Machine,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep over traces that ends, after hours, without a number or a word."""
    sweeping.run(file, tmp_path / "runs")
    sweep, read = sweeps.read(file), records.read
    monkeypatch.setattr(records, "read", lambda path: dataclasses.replace(read(path), kind="trace"))
    grid = outcomes.summary(sweep, finished.read(tmp_path / "runs", sweep.jobs()), ())
    assert len(grid.rows) == 3
    assert all("has no headline · kind trace" in line[1] and "2 of 2" in line[2] for line in grid.rows)


def test_runs_are_what_repeats() -> None:
    """Pooling the values of several runs would shrink an interval that only more runs can."""
    run = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    later = [value + 10 for value in run]
    assert outcomes.pooled([run]) == {"p50": 5.0, "p50_low": 2.0, "p50_high": 8.0}
    assert outcomes.pooled([run, later]) == {"p50": 10.0, "p50_low": 2.0, "p50_high": 18.0}
    assert outcomes.pooled([run, later[:2]]) == {"p50": 8.25, "p50_low": None, "p50_high": None}
    assert outcomes.pooled([[n] for n in range(7)]) == store.estimated("p50", range(7))


def test_how_long_it_takes_is_told_from_runs_of_the_same_cells(file: Path) -> None:
    """An estimate from other cells alone can be off by the whole night."""
    every = sweeps.read(file).jobs()
    one, two, _ = sweeps.read(file).cells
    entry = finished.Entry(Path("x"), "complete", "", 10.0)
    found = {f"{one.id}-1": [entry, entry._replace(seconds=20.0), entry._replace(status="failed", seconds=900.0)],
             f"{two.id}-9": [entry._replace(seconds=30.0)]}
    assert finished.expected(found) == {one.id: 15.0, two.id: 30.0}
    assert outcomes.left(every, finished.expected(found)) == 2 * (15.0 + 30.0 + 22.5)
    assert outcomes.left(every, {}) is None


# ---- what a cluster sends back -------------------------------------------------------------------------------------

def sent(root: Path, machine: Machine, file: Path) -> dict[str, Any]:
    sweep = sweeps.read(file)
    entry = machine.run(jobs.request(sweep, sweep.jobs()[0]), root)
    files = {path.relative_to(entry.path).as_posix(): path.read_bytes() for path in entry.path.rglob("*")}
    return {"machine": "test", "run": entry.path.name, "files": files, "reason": ""}


def test_a_run_that_comes_back_is_whole_or_not_there(file: Path, tmp_path: Path, machine: Machine) -> None:
    """Half a run, or one that was changed on its way, would be counted as measured."""
    found = sent(tmp_path / "node", machine, file)
    for name in ("rows.parquet", "config.json"):
        with pytest.raises(RunError, match=name):
            cluster.keep({**found, "files": {**found["files"], name: b"{}"}}, tmp_path / "runs")
        with pytest.raises(RunError, match="missing"):
            cluster.keep({**found, "files": {k: v for k, v in found["files"].items() if k != name}}, tmp_path / "runs")
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == []
    assert cluster.keep(found, tmp_path / "runs").status == "complete"
    assert records.read(tmp_path / "runs" / "test" / found["run"]).status == "complete"
    with pytest.raises(RunError, match="there already"):
        cluster.keep(found, tmp_path / "runs")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", "a\n", "a b"])
def test_a_node_cannot_write_elsewhere(name: str, file: Path, tmp_path: Path, machine: Machine) -> None:
    """A file name from another machine must not leave the run store."""
    found = sent(tmp_path / "node", machine, file)
    with pytest.raises(RunError, match="do not trust"):
        cluster.keep({**found, "files": {**found["files"], name: b""}}, tmp_path / "runs")
    with pytest.raises(RunError, match="do not trust"):
        cluster.keep({**found, "run": name}, tmp_path / "runs")


class Nodes:
    """A cluster as Ray describes it: GPUs and CPUs of each node."""

    def __init__(self, *nodes: tuple[int, int]) -> None:
        self.found = [{"Alive": True, "NodeID": str(n), "Resources": {"GPU": gpus, "CPU": cpus}}
                      for n, (gpus, cpus) in enumerate(nodes)]

    def nodes(self) -> list[dict[str, Any]]:
        return self.found

    def cluster_resources(self) -> dict[str, float]:
        return {name: sum(node["Resources"][name] for node in self.found) for name in ("GPU", "CPU")}


@pytest.mark.parametrize(("nodes", "device", "wanted", "slots"), [
    (((8, 64), (0, 32)), "auto", {"num_gpus": 1, "num_cpus": 1}, 8),
    (((8, 64), (0, 32)), "cuda", {"num_gpus": 1, "num_cpus": 1}, 8),
    (((0, 32), (0, 32)), "auto", {"num_cpus": 32}, 2),
    (((8, 64), (0, 32)), "cpu", {"num_cpus": 64}, 1),
    (((0, 32),), "cuda", "no GPU", 0),
    (((8, 64),), "cuda:1", "the GPU", 0),
])
def test_no_two_timings_share_a_gpu_or_a_node(nodes: Any, device: str, wanted: Any, slots: int, file: Path) -> None:
    """A neighbour on the same GPU, or on the cores that launch, stretches every time."""
    file.write_text(f"notebook: small.ipynb\nparameters: {{device: '{device}'}}\n")
    (job,) = sweeps.read(file).jobs()
    if isinstance(wanted, str):
        with pytest.raises(SweepError, match=wanted):
            cluster.needs(Nodes(*nodes), job)
    else:
        assert cluster.needs(Nodes(*nodes), job) == wanted
        assert cluster.slots(Nodes(*nodes), wanted) == slots


def test_without_ray_a_cluster_is_refused(file: Path, tmp_path: Path, machine: Machine,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is optional: a traceback of an import would not say what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SweepError, match=r"Ray is not installed .*hybridlab\[cluster\]"):
        sweeping.run(file, tmp_path / "runs", address="auto")
    assert machine.started == []


class Ray(ModuleType):
    """Ray as far as joining goes: it counts how often, and is not there."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.asked: list[tuple[str, str | None]] = []

    def init(self, address: str, **_: Any) -> None:
        self.asked.append((address, os.environ.get(cluster.TRIES)))
        raise ConnectionError("no Ray here")


def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks such an address for ten minutes, with a warning in every few seconds of them; one where something else
    listens it asks once."""
    fake = Ray()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delenv(cluster.TRIES, raising=False)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{port.getsockname()[1]}"
        for address in (place, f"ray://{place}", "127.0.0.1:99999"):
            with pytest.raises(SweepError, match=f"there is no Ray cluster at '{address}' .*ray start --head"), \
                    cluster.joined(address):
                pass
        assert fake.asked == []
        port.listen()
        for address in (place, "auto"):
            with pytest.raises(SweepError, match="no Ray here"), cluster.joined(address):
                pass
    assert fake.asked == [(place, "1"), ("auto", "1")]
    assert cluster.TRIES not in os.environ


def test_a_job_whose_node_kills_its_parent_leaves_no_folder(tmp_path: Path) -> None:
    """Every job that a cluster stops would leave a notebook and a run in a temporary folder of the node."""
    scratch = tmp_path / "scratch"
    (scratch / "runs").mkdir(parents=True)
    code = ("import threading\nfrom hybridlab import jobs\n"
            "def never(*_): print('there', flush=True); threading.Event().wait()\n"
            "jobs.notebooks.check = never\njobs.main()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd=Path(jobs.__file__).parents[1], start_new_session=True) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        job.stdin.write(json.dumps({"notebook": "n.ipynb", "parameters": {}, "note": {}, "timeout_s": 1.0, "root": "r",
                                    "scratch": str(scratch)}) + "\n")
        job.stdin.flush()
        assert job.stdout.readline() == "there\n"
        assert scratch.exists()
        job.stdin.close()  # as the kernel does with a parent that is killed
        job.wait(60)
    assert not scratch.exists()


def test_a_notebook_that_changes_while_its_sweep_runs_is_refused(file: Path, tmp_path: Path) -> None:
    """The rest of the jobs would measure something else under the same name."""
    sweep = sweeps.read(file)
    wanted = jobs.request(sweep, sweep.jobs()[0])
    notebook(tmp_path, "x = repeats + 1")
    with pytest.raises(SweepError, match="was changed while the sweep ran"):
        jobs.perform(**wanted, root=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_the_example_is_a_sweep() -> None:
    """The file that the README runs must not be refused."""
    sweep = sweeps.read(Path(__file__).resolve().parents[2] / "data" / "sweeps" / "ablation.yaml")
    assert len(sweep.jobs()) == 8


def test_what_an_old_store_cannot_say_is_no_job(tmp_path: Path) -> None:
    """A run of no sweep, or a job file that was cut, must not stop a sweep from reading its store."""
    (tmp_path / "m" / "r1").mkdir(parents=True)
    (tmp_path / "m" / "r2").mkdir()
    (tmp_path / "m" / "r2" / finished.JOB).write_text("{")
    assert finished.read(tmp_path, []) == {}
    shutil.rmtree(tmp_path / "m")
