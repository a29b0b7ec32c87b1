"""Run directories: whole files or none, finished rounds survive, and only a manifest means complete."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from hybridlab import files, ranges, records
from hybridlab.config import CacheConfig, RunConfig
from hybridlab.errors import RunError

CONFIG = RunConfig(lengths=(10,), arms=("eager",))


@pytest.fixture(autouse=True)
def _quick_report(monkeypatch):
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setattr(records.environment, "report", lambda: {"gpu": [], "cpu": "Test CPU", "machine": "cpu-test"})


def row(number=0, **changes):
    return {"round": number, "request": number, "arm": "eager", "policy": "whole", "prompt_tokens": 10, "bucket": None,
            "index": 0, "position": 10, "metric": "ttft", "ms": 1.5, "path": "eager", "reason": "", "captures": 0,
            "compiles": 0, "process": 0, "device_ms": None, "client_ms": None, "ended_ns": 10, "happened": "",
            "happened_ms": 0.0, "profiled": False} | changes


def test_a_run_reads_back_as_it_was_recorded(tmp_path):
    """What statistics see must be what was measured, types and empty buckets included."""
    run = records.Run.create(CONFIG, tmp_path)
    run.append([row(0), row(1, bucket=16)])
    run.append([row(2)])
    assert run.finish("complete", extra={"rounds": 2}) == "complete"
    found = records.read(run.path)
    assert (found.status, found.reason, found.config, found.run_id) == ("complete", "", CONFIG, run.id)
    assert run.path.parent == tmp_path / "cpu-test"
    assert found.rows["round"].tolist() == [0, 1, 2]
    assert found.rows["bucket"].isna().tolist() == [True, False, True]
    assert str(found.rows["bucket"].dtype) == "Int64"
    assert found.rows["run_id"].unique().tolist() == [run.id]
    assert {file.name for file in run.path.iterdir()} == {"config.json", "environment.json", "manifest.json",
                                                          "rows.parquet"}


def test_a_run_is_never_overwritten(tmp_path):
    """Two runs in one directory: the last writer would win in silence."""
    records.Run.create(CONFIG, tmp_path, run_id="one")
    with pytest.raises(RunError, match="there already"):
        records.Run.create(CONFIG, tmp_path, run_id="one")


def test_a_run_is_finished_once_and_then_closed(tmp_path):
    """A second verdict could turn failed into complete."""
    run = records.Run.create(CONFIG, tmp_path)
    run.finish("failed", "because")
    with pytest.raises(RunError, match="finished already"):
        run.finish("complete")
    with pytest.raises(RunError, match="finished"):
        run.append([row()])
    with pytest.raises(RunError, match="no status"):
        records.Run.create(CONFIG, tmp_path).finish("done")
    assert (records.read(run.path).status, records.read(run.path).reason) == ("failed", "because")
    assert records.read(run.path).rows.empty


def test_finished_rounds_survive_a_kill(tmp_path):
    """A run of an hour that dies in its last minute must not lose the hour, nor pass as complete."""
    code = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from hybridlab import records
        from hybridlab.config import RunConfig
        run = records.Run.create(RunConfig(lengths=(10,), arms=("eager",)), Path({str(tmp_path)!r}), run_id="killed")
        for number in range(3):
            run.append([{row()!r} | {{"round": number}}])
        (run.path / "parts" / ".writing-torn").write_bytes(b"PAR1 half a part")
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    (path,) = tmp_path.glob("*/killed")
    found = records.read(path)
    assert found.status == "incomplete"
    assert found.rows["round"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("change", [
    lambda path: path.joinpath("rows.parquet").write_bytes(b"PAR1"),
    lambda path: path.joinpath("config.json").write_text("{}"),
    lambda path: path.joinpath("environment.json").unlink(),
])
def test_a_changed_or_missing_file_is_named(tmp_path, change):
    """An edited row would become a figure; the message must say which file to restore."""
    run = records.Run.create(CONFIG, tmp_path)
    run.append([row()])
    run.finish("complete")
    before = {name: (run.path / name).read_bytes() for name in ("rows.parquet", "config.json", "environment.json")}
    change(run.path)
    (changed,) = [name for name, data in before.items()
                  if not (run.path / name).exists() or (run.path / name).read_bytes() != data]
    with pytest.raises(RunError, match=changed):
        records.read(run.path)


@pytest.mark.parametrize(("change", "message"), [
    ({"files": {"../../secret": "0"}}, "outside"), ({"files": {}}, "does not list"), ({"rows": 99}, "says 99"),
    ({"files": None}, "no manifest"), ({"status": None}, "no manifest"),
])
def test_a_manifest_that_lies_is_refused(tmp_path, change, message):
    """A manifest comes from others: it must not point outside the run, list nothing, or count other rows."""
    run = records.Run.create(CONFIG, tmp_path)
    run.append([row()])
    run.finish("complete")
    manifest = json.loads((run.path / records.MANIFEST).read_text())
    changed = {name: value for name, value in (manifest | change).items() if value is not None}
    (run.path / records.MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(RunError, match=message):
        records.read(run.path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_broken_manifest_is_an_error_and_not_a_complete_run(tmp_path, text):
    """Status is read from this file only; garbage must not count as a verdict."""
    run = records.Run.create(CONFIG, tmp_path)
    run.finish("complete")
    (run.path / records.MANIFEST).write_text(text)
    with pytest.raises(RunError, match=r"manifest\.json"):
        records.read(run.path)


@pytest.mark.parametrize("wrong", [{"ms": float("nan")}, {"ms": float("inf")}, {"ms": -1.0}, {"arm": None},
                                   {"round": "x"}, {"surprise": 1}])
def test_a_row_out_of_schema_is_refused(tmp_path, wrong):
    """A column that changes its type between rounds would make the whole run unreadable at the end."""
    run = records.Run.create(CONFIG, tmp_path)
    run.append([row()])
    with pytest.raises(RunError):
        run.append([row(1) | wrong])
    with pytest.raises(RunError, match="bucket"):
        run.append([{name: value for name, value in row().items() if name != "bucket"}])
    run.finish("failed", "refused")
    assert len(records.read(run.path).rows) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    """Truncating in place is how an earlier good result is lost."""
    path = tmp_path / "result"
    files.atomic_write(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(records.os, call, full)
    with pytest.raises(OSError, match="no space"):
        files.atomic_write(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_at_any_write_never_makes_a_complete_run(tmp_path, monkeypatch):
    """ENOSPC at each write in turn: earlier rounds stay readable, and complete is only said when all is written."""
    real, seen = os.replace, set()
    for fails_at in range(6):
        count = [0]

        def replace(source, target, count=count, fails_at=fails_at):
            count[0] += 1
            if count[0] > fails_at:
                raise OSError(errno.ENOSPC, "no space left on device")
            real(source, target)

        monkeypatch.setattr(records.os, "replace", replace)
        name = f"run-{fails_at}"
        try:
            run = records.Run.create(CONFIG, tmp_path, run_id=name)
            run.append([row(0)])
            run.append([row(1)])
            run.finish("complete")
        except OSError:
            pass
        path = tmp_path / "cpu-test" / name
        if fails_at >= 2:
            found = records.read(path)
            assert found.status == "incomplete"
            assert len(found.rows) == min(2, fails_at - 2)
            seen.add(len(found.rows))
        else:
            with pytest.raises(RunError):
                records.read(path)
    assert seen == {0, 1, 2}


def test_a_crash_between_merging_and_removing_parts_counts_no_row_twice(tmp_path, monkeypatch):
    """Rows that stand in the parts and in the merged file would narrow every interval."""
    run = records.Run.create(CONFIG, tmp_path)
    run.append([row()])
    monkeypatch.setattr(records.shutil, "rmtree", lambda *_, **__: None)
    run.finish("complete")
    assert (run.path / "parts").exists()
    assert len(records.read(run.path).rows) == 1


def test_the_owner_of_a_batch_has_the_last_word(tmp_path, monkeypatch):
    """A cell that fails after the measurement must leave the run failed: the notebook's process writes no manifest."""
    outer = records.Run.create(CONFIG, tmp_path)
    monkeypatch.setenv(records.RUN_VARIABLE, str(outer.path))
    inner_config = RunConfig(lengths=(20,), arms=("eager",))
    inner = records.Run.create(inner_config, tmp_path / "elsewhere")
    inner.append([row()])
    assert inner.path == outer.path
    assert inner.finish("complete") == "complete"
    assert records.read(outer.path).status == "incomplete"
    with pytest.raises(RunError, match="a run already"):  # one notebook, one run
        records.Run.create(inner_config)
    outer.finish("failed", "cell 5 raised ValueError")
    found = records.read(outer.path)
    assert (found.status, found.reason) == ("failed", "cell 5 raised ValueError")
    assert found.config == inner_config
    assert len(found.rows) == 1
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(RunError, match="no open run"):
        records.Run.create(inner_config)


def test_what_a_joined_run_notes_is_there_at_once_and_in_the_manifest(tmp_path, monkeypatch):
    """Floors, clocks and counters of a run that a notebook makes: lost, its figures and tables show no limit."""
    outer = records.Run.create(CONFIG, tmp_path)
    monkeypatch.setenv(records.RUN_VARIABLE, str(outer.path))
    inner = records.Run.create(CONFIG)
    inner.append([row()])
    inner.finish("complete", extra={"roofline": {"floors": []}, "cell": 7})
    assert records.read(outer.path).extra == {"roofline": {"floors": []}, "cell": 7}
    assert outer.finish("complete", extra={"cell": None}) == "complete"
    assert records.read(outer.path).extra == {"roofline": {"floors": []}, "cell": None}
    records.keep(outer.path, tmp_path / "copy")
    assert records.read(tmp_path / "copy").extra["roofline"] == {"floors": []}


def test_a_failure_that_the_notebook_swallowed_still_fails_the_run(tmp_path, monkeypatch):
    """An except clause in a cell must not turn a failed measurement into a complete run."""
    outer = records.Run.create(CONFIG, tmp_path)
    monkeypatch.setenv(records.RUN_VARIABLE, str(outer.path))
    inner = records.Run.create(CONFIG)
    with pytest.raises(RunError):
        records.Run.create(CONFIG)  # also while the first is going on
    inner.finish("failed", "NonFinite: step 3")
    assert outer.finish("complete") == "failed"
    assert records.read(outer.path).reason == "NonFinite: step 3"


def cache_row(number=0, **changes):
    return {"part": "stream", "round": number, "setting": "default", "request": number, "prompt_tokens": 10,
            "bucket": 16, "index": 0, "metric": "ttft", "ms": 1.5, "path": "graph", "reason": "", "hits": 1,
            "misses": 0, "captures": 0, "evictions": 0, "failures": 0, "capture_ms": 0.0, "graphs": 1,
            "graph_bytes": 64, "capturing": False, "ended_ns": None, "happened": None, "happened_ms": None} | changes


def test_a_cache_run_keeps_its_kind_columns_and_config(tmp_path):
    """Rows about the graph cache read as an ablation's, or a request that is none read as a float."""
    config = CacheConfig(trace="chat", compare=({"capture": "sync"}, {"buckets": [16, 64]}))
    run = records.Run.create(config, tmp_path)
    run.append([cache_row(0), cache_row(1, request=None, bucket=None)])
    with ranges.recorded(print):
        run.append([cache_row(2), cache_row(3, profiled=False)])
    assert json.loads((run.path / "config.json").read_text())["kind"] == "cache"
    assert records.kind(run.path) == "cache"
    run.finish("complete")
    found = records.read(run.path)
    assert (found.kind, found.config, len(found.rows)) == ("cache", config, 4)
    assert found.rows["request"].isna().tolist() == [False, True, False, False]
    assert found.rows["profiled"].tolist() == [False, False, True, False]
    assert [str(found.rows[name].dtype) for name in ("request", "bucket", "capturing")] == ["Int64", "Int64", "bool"]
    with pytest.raises(RunError, match="wrong fields"):
        records.Run.create(config, tmp_path).append([row()])
    with pytest.raises(RunError, match="only request, bucket, ended_ns, happened, happened_ms, profiled may be empty"):
        records.Run.create(config, tmp_path).append([cache_row(metric=None)])
    target = tmp_path / "copy"
    records.keep(run.path, target)
    assert records.read(target).kind == "cache"


def test_an_old_run_is_an_ablation_and_an_unknown_kind_is_refused(tmp_path):
    """Runs recorded before there were kinds must stay readable; those of a later version must not be guessed at."""
    run = records.Run.create(CONFIG, tmp_path)
    run.append([row()])
    assert "kind" not in json.loads((run.path / "config.json").read_text())
    assert records.read(run.path).kind == "ablation"
    config = json.loads((run.path / "config.json").read_text()) | {"kind": "sweep"}
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="kind 'sweep'"):
        records.read(run.path)
