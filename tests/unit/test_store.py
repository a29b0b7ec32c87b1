"""The run store: every run is listed, and runs of other machines or versions are put together only by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import hybridlab as hl
from hybridlab import cli, records, store
from hybridlab.config import RunConfig, SoakConfig, SystemConfig, TraceConfig, build
from hybridlab.errors import ConfigError, RunError, StatisticsError
from hybridlab.paperconfig import PaperConfig

REPORT = {"cpu": "Test CPU", "gpu": [{"name": "Test Board", "driver": "580.1"}], "python": "3.12", "hybridlab": "0.1",
          "commit": "c0ffee", "dirty": False, "machine": "test-board",
          "versions": {"torch": "2.13", "triton": "3.7", "transformers": "5.23"}}


def row(arm: str, round_: int, ms: float, **more: Any) -> dict[str, Any]:
    return {"round": round_, "request": 0, "arm": arm, "policy": "whole", "prompt_tokens": 10, "bucket": None,
            "index": 0, "position": 10, "metric": "ttft", "ms": ms, "path": "eager", "reason": "", "captures": 0,
            "compiles": 0, "process": 0, "device_ms": None, "client_ms": None, "ended_ns": 1,
            "happened": "", "happened_ms": 0.0, "profiled": False} | more


class Recorder:
    """Records runs into one store, under a report of the environment that a test may change."""

    def __init__(self, root: Path) -> None:
        self.root, self.report = root, dict(REPORT)

    def __call__(self, name: str, status: str = "complete", scale: float = 1.0, **config: Any) -> str:
        run = records.Run.create(build(RunConfig, {"repeats": 9, **config}), self.root, name)
        run.append([row(arm, n, scale * factor * (n + 1)) for n in range(9) for arm, factor in (("eager", 4.0),
                                                                                                ("hybrid", 1.0))])
        if status != "incomplete":
            run.finish(status, "" if status == "complete" else "no room", {"notebook": "05.ipynb"})
        return name


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder(tmp_path)
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setenv("HYBRIDLAB_RUNS", str(tmp_path))
    monkeypatch.setattr(records.environment, "report", lambda names=None: dict(found.report))
    return found


# ---- the table -----------------------------------------------------------------------------------------------------

def test_every_run_is_a_row_whatever_became_of_it(record: Recorder, tmp_path: Path) -> None:
    """A failed or killed run that is not shown looks as if it had never been tried."""
    record("20260101-000002-aaaa")
    record("20260101-000003-bbbb", "failed")
    record("20260101-000004-cccc", "incomplete", policy="full")
    record("20260101-000005-dddd")
    (tmp_path / "test-board" / "20260101-000005-dddd" / "manifest.json").write_text("{")
    (tmp_path / "test-board" / "20260101-000006-eeee").mkdir()
    shutil.copytree(tmp_path / "test-board" / "20260101-000002-aaaa", tmp_path / "test-board" / "20260101-000007-ffff")
    (tmp_path / "test-board" / "20260101-000007-ffff" / "config.json").unlink()
    table = hl.runs(tmp_path).set_index("run_id")
    assert table["status"].to_dict() == {
        "20260101-000002-aaaa": "complete", "20260101-000003-bbbb": "failed", "20260101-000004-cccc": "incomplete",
        "20260101-000005-dddd": "unreadable", "20260101-000006-eeee": "incomplete",
        "20260101-000007-ffff": "unreadable"}
    assert table.loc["20260101-000003-bbbb", "reason"] == "no room"
    assert "never written" in table.loc["20260101-000004-cccc", "reason"]
    assert "cannot be read" in table.loc["20260101-000005-dddd", "reason"]
    assert table.loc["20260101-000004-cccc", "policy"] == "full"
    assert table.loc["20260101-000004-cccc", "started"] == pd.Timestamp("2026-01-01T00:00:04Z")
    first = table.loc["20260101-000002-aaaa"]
    assert (first["kind"], first["machine"], first["model"], first["rows"]) == ("ablation", "test-board", "tiny", 18)
    assert {name: first[name] for name in store.FACTS} == {
        "machine": "test-board", "cpu": "Test CPU", "gpu": "Test Board", "driver": "580.1", "python": "3.12",
        "torch": "2.13", "triton": "3.7", "transformers": "5.23", "hybridlab": "0.1", "commit": "c0ffee"}
    assert first["notebook"] == "05.ipynb"
    assert first["lengths"] == list(RunConfig().lengths)
    assert pd.isna(table.loc["20260101-000004-cccc", "rows"])


def test_the_committed_runs_are_in_it_and_no_row_is_read(record: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that reads gigabytes of rows is not looked at; one without the published runs is not of this store."""
    def never(*_: Any) -> None:
        raise AssertionError("rows were read")

    monkeypatch.setattr(records.pq, "ParquetFile", never)
    mine = record("20260101-000002-aaaa", "incomplete")
    table = hl.runs()
    assert {"h200", "cpu-xeon", "test-board"} <= set(table["machine"])
    assert mine in set(table["run_id"])
    assert table["run_id"].is_unique
    assert table["run_id"].is_monotonic_increasing


def test_a_table_of_runs_needs_no_torch(tmp_path: Path) -> None:
    """Seconds of imports, and a GPU context, for a look at what was measured."""
    code = "import sys, hybridlab as hl; hl.runs(); print([m for m in ('torch', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(store.__file__).parents[1], capture_output=True,
                          text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_no_field_of_a_config_hides_a_column() -> None:
    """A field named like a column of the table would be lost in it."""
    fields = {name for config, _ in records.KINDS.values() for name in config.__struct_fields__}
    assert fields & set(store.OWN) == {"model"}


# ---- side by side --------------------------------------------------------------------------------------------------

OTHERS = {
    "machine": {"gpu": [{"name": "NVIDIA Other", "driver": "580.1"}]}, "cpu": {"cpu": "Other CPU"},
    "driver": {"gpu": [{"name": "Test Board", "driver": "581.0"}]}, "python": {"python": "3.13"},
    "torch": {"versions": REPORT["versions"] | {"torch": "2.14"}},
    "triton": {"versions": REPORT["versions"] | {"triton": None}},
    "transformers": {"versions": REPORT["versions"] | {"transformers": "5.24"}},
    "hybridlab": {"hybridlab": "0.2"}, "commit": {"commit": "decaf"}, "changes": {"dirty": True}}


@pytest.mark.parametrize("what", list(OTHERS))
def test_runs_that_differ_are_refused_unless_the_difference_is_named(what: str, record: Recorder) -> None:
    """A table with rows from another GPU, or another version of PyTorch, compares those and not what it says."""
    one = record("20260101-000002-aaaa")
    record.report |= OTHERS[what]
    two = record("20260101-000003-bbbb", scale=2.0)
    names = {"machine": ["machine", "gpu"], "changes": ["commit"]}.get(what, [what])
    for call in (hl.compare, hl.rows):
        with pytest.raises(RunError) as caught:
            call([one, two])
        assert f"differ in {', '.join(names)}" in caught.value.fact
        assert one in caught.value.context
        assert two in caught.value.context
        assert f"across={names}" in caught.value.remedy
        with pytest.raises(RunError, match=f"differ in {names[-1]}"):
            call([one, two], across=[name for name in store.FACTS if name != names[-1]])
    table = hl.compare([one, two], across=names)
    assert table.groupby("run_id")[names[-1]].nunique().to_dict() == ({one: 1, two: 1} if what != "triton" else
                                                                     {one: 1, two: 0})
    assert len(hl.rows([one, two], across=names)) == 36


def test_a_name_that_is_no_fact_is_refused(record: Recorder) -> None:
    """A misspelt name would allow nothing, and look as if it did."""
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        hl.compare([record("20260101-000002-aaaa")], across=["toch"])


def test_runs_side_by_side_show_what_they_differ_in(record: Recorder) -> None:
    """Two medians beside each other, without the setting that makes the difference, explain nothing."""
    one, two = record("20260101-000002-aaaa", policy="full"), record("20260101-000003-bbbb", scale=2.0)
    table = hl.compare([one, two])
    assert list(table.columns[:3]) == ["run_id", "machine", "policy"]
    assert table[["run_id", "policy", "what", "metric", "n", "p50", "p50_low", "p50_high"]].to_numpy().tolist() == [
        [one, "full", "eager", "TTFT, ms", 9, 20.0, 8.0, 32.0], [one, "full", "hybrid", "TTFT, ms", 9, 5.0, 2.0, 8.0],
        [two, "whole", "eager", "TTFT, ms", 9, 40.0, 16.0, 64.0],
        [two, "whole", "hybrid", "TTFT, ms", 9, 10.0, 4.0, 16.0]]
    assert table["p99"].isna().all(), "9 values carry no p99"
    together = hl.rows([two, one])
    assert together.groupby("run_id")["ms"].sum().to_dict() == {one: 225.0, two: 450.0}
    assert set(together["machine"]) == {"test-board"}


@pytest.mark.parametrize("status", ["failed", "incomplete"])
def test_what_is_not_complete_is_compared_with_nothing(status: str, record: Recorder) -> None:
    """Rows of a run that was killed are a biased part of it."""
    with pytest.raises(RunError, match=f"is {status}"):
        hl.compare([record("20260101-000002-aaaa"), record("20260101-000003-bbbb", status)])


def test_a_changed_row_is_refused(record: Recorder, tmp_path: Path) -> None:
    """A number that was edited after the run would stand beside measured ones."""
    one = record("20260101-000002-aaaa")
    file = tmp_path / "test-board" / one / "rows.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="changed after the run"):
        hl.rows([one])


def test_runs_of_two_kinds_and_unknown_ones_are_refused(record: Recorder, tmp_path: Path) -> None:
    """Events of a trace are no latencies; a misspelt id must not be skipped in silence."""
    one = record("20260101-000002-aaaa")
    trace = records.Run.create(build(TraceConfig, {}), tmp_path, "20260101-000009-abcd")
    trace.finish("complete")
    with pytest.raises(RunError, match="kinds ablation, trace"):
        hl.compare([one, trace.id])
    with pytest.raises(RunError, match="did you mean '20260101-000002-aaaa'"):
        hl.compare(["20260101-000002-aaab"])
    with pytest.raises(ConfigError, match="give a list of runs"):
        hl.compare(one)
    assert len(hl.rows([one, f"test-board/{one}", tmp_path / "test-board" / one])) == 18, "one run, named three times"


def test_rows_under_a_profiler_are_no_headline(record: Recorder, tmp_path: Path) -> None:
    """A profiler stretches every launch."""
    run = records.Run.create(build(RunConfig, {}), tmp_path, "20260101-000002-aaaa")
    run.append([row("eager", n, 1.0, profiled=n > 0) for n in range(9)])
    run.finish("complete")
    with pytest.raises(StatisticsError, match=f"8 of 9 rows .* run {run.id}"):
        store.headlines(records.read(run.path))


HEADLINES = {  # of each kind: what a committed run, or the small one below, is first asked for
    "ablation": ("cpu-xeon/20261123-204110-0793", "eager", "ITL, ms"),
    "cache": ("h200/20261123-235410-4e2d", "capture=sync", "TTFT, ms"),
    "kernels": ("h200/20261124-082824-4268", "fused, context 500", "step, ms"),
    "peers": ("h200/20261129-093153-a9e1", "hf-compile", "ITL, ms"),
    "paper": ("cpu-epyc/20261128-154220-b293", "hybrid", "gap with a KV cache, ms"),
    "trace": ("h200/20261124-162055-2a98", None, None),
    "system": ("test-board/20260101-000002-aaaa", "memory", "weights, MiB"),
    "soak": ("test-board/20260101-000003-bbbb", "requests", "recovery, ms")}
SOAK = {"at_s": 1.0, "prompt_tokens": 4, "canary": False, "ttft_ms": 2.0, "itl_ms": 0.5, "path": "graph", "captures": 0,
        "evictions": 0, "graphs": 1, "rss_bytes": 9, "gpu_bytes": None, "files": 3, "threads": 2, "event": "",
        "recovery_ms": None, "life": 1}


def recorded(root: Path, name: str, config: Any, rows: list[dict[str, Any]]) -> str:
    run = records.Run.create(config, root, name)
    run.append(rows)
    run.finish("complete")
    return name


@pytest.mark.parametrize("kind", records.KINDS)
def test_every_kind_of_run_has_a_headline_or_says_why_not(kind: str, record: Recorder, tmp_path: Path) -> None:
    """A comparison that comes out empty is taken for no difference, and a sweep ends without a number or a word."""
    weights = {"part": "memory", "setting": "", "round": 0, "step": "weights", "value": 7.0, "unit": "MiB"}
    recorded(tmp_path, "20260101-000002-aaaa", build(SystemConfig, {}), [weights])
    recorded(tmp_path, "20260101-000003-bbbb", build(SoakConfig, {}), [
        SOAK | {"request": 0}, SOAK | {"request": 1, "event": "kill", "recovery_ms": 800.0}])
    run, what, metric = HEADLINES[kind]
    if what is None:
        with pytest.raises(RunError, match=rf"no headline · kind {kind}, \d+ rows.* · see its rows: hl\.rows"):
            hl.compare([run])
        return
    table = hl.compare([run])
    assert list(table.columns[:5]) == ["run_id", "machine", "what", "metric", "n"]
    assert table[["what", "metric"]].notna().all(axis=None)
    assert (table["n"] > 0).all()
    assert len(table[(table["what"] == what) & (table["metric"] == metric)]) == 1
    known = table[table["p50"].notna()]
    assert (known["p50_low"].astype(float) <= known["p50"].astype(float)).all()
    assert list(table["metric"]) == (["weights, MiB"] if kind == "system" else
                                     ["ITL, ms", "TTFT, ms", "recovery, ms"] if kind == "soak" else
                                     list(table["metric"]))


def test_peers_are_compared_as_arms_are() -> None:
    """Another engine's medians in columns of their own could not be put beside ours."""
    peers, ablation = (hl.compare([HEADLINES[kind][0]]) for kind in ("peers", "ablation"))
    assert list(peers.columns) == list(ablation.columns)
    assert set(peers["metric"]) == set(ablation["metric"]) == {"TTFT, ms", "ITL, ms"}
    rows = records.read(Path(store.__file__).parents[1] / "data" / "runs" / HEADLINES["peers"][0]).rows
    medians = rows.groupby(["arm", "metric"])["ms"].median()
    for line in peers.to_dict("records"):
        exact = medians[line["what"], "itl" if line["metric"].startswith("ITL") else "ttft"]
        assert line["p50"] == pytest.approx(exact, rel=1e-9)


def paper_row(part: str, metric: str, value: float, unit: str = "ms", arm: str = "hybrid") -> dict[str, Any]:
    return {"part": part, "arm": arm, "round": 0, "request": 0, "tokens": 10, "index": 0, "position": 10,
            "metric": metric, "value": value, "unit": unit, "path": "", "reason": "", "state": "none", "captures": 0,
            "compiles": 0, "bytes": None}


def test_of_the_paper_its_tables_come_first(record: Recorder, tmp_path: Path) -> None:
    """Sizes, steps of a capture and lengths that did not fit would stand in one table with first tokens."""
    sizes = [paper_row("memory", "weights", 3.0, "MiB"), paper_row("ttft", "clipped", 1024.0, "tokens", "all")]
    whole = recorded(tmp_path, "20260101-000002-aaaa", build(PaperConfig, {}), [
        *sizes, paper_row("ttft", "ttft", 2.0), paper_row("cached", "gap", 0.5), paper_row("recomputed", "gap", 4.0)])
    rest = recorded(tmp_path, "20260101-000003-bbbb", build(PaperConfig, {}), sizes)
    found = [store.headlines(run).to_numpy().tolist() for run in store.opened([whole, rest])]
    assert found == [[["hybrid", "TTFT, ms", 2.0], ["hybrid", "gap with a KV cache, ms", 0.5],
                      ["hybrid", "gap of the whole sequence, ms", 4.0]], [["memory hybrid", "weights, MiB", 3.0]]]


# ---- hybridlab runs ------------------------------------------------------------------------------------------------

def listed(*arguments: str) -> list[str]:
    done = CliRunner().invoke(cli.app, ["runs", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return [run["run_id"] for run in json.loads(done.stdout)]


def test_help_names_every_kind() -> None:
    """A kind that the help leaves out is taken for one that cannot be asked for."""
    shown = CliRunner().invoke(cli.app, ["runs", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert f"Only runs of this kind: {', '.join(records.KINDS)}." in " ".join(shown.stdout.replace("│", " ").split())


def test_runs_are_filtered_by_any_column(record: Recorder, tmp_path: Path) -> None:
    """A list of hundreds of runs is of use only where the ones wanted can be named."""
    one = record("20260101-000002-aaaa", policy="full")
    two = record("20260101-000003-bbbb", "failed", policy=["whole", "full"])
    three = record("20260101-000004-cccc", "incomplete")
    place = ("--runs", str(tmp_path))
    assert listed(*place) == [one, two, three]
    assert listed(*place, "--status", "failed") == [two]
    assert listed(*place, "--status", "incomplete", "--kind", "ablation", "--machine", "test-board") == [three]
    assert listed(*place, "--machine", "h200") == []
    assert listed(*place, "--where", "policy=full") == [one, two]
    assert listed(*place, "--where", "torch=2.13", "--where", "repeats=9", "--last", "2") == [two, three]
    shown = CliRunner().invoke(cli.app, ["runs", *place], env={"COLUMNS": "200"}).stdout
    assert all(run in shown for run in (one, two, three))
    assert "no room" in shown
    for wrong in (("--where", "torh=2"), ("--kind", "cach"), ("--status", "done")):
        done = CliRunner().invoke(cli.app, ["runs", *place, *wrong])
        assert done.exit_code == 2
        assert "did you mean" in done.stderr or "known" in done.stderr
