"""A cold start is measured in a fresh process, stage by stage, and a process that fails is named and not left."""

import subprocess

import pytest

from hybridlab import coldstart
from hybridlab.errors import HybridlabError, MeasureError


def test_the_stages_of_a_real_start_follow_each_other():
    """A stage that is missing, or counted twice, moves what a start takes to where it is not."""
    said = []
    rows = coldstart.run(arm="graph", caches=("warm",), repeats=1, report=lambda *words: said.append(words))
    assert [row["stage"] for row in rows] == list(coldstart.STAGES)
    assert {(row["caches"], row["process"]) for row in rows} == {("warm", 0)}
    assert all(row["ms"] > 0 for row in rows)
    total = 0.0
    for row in rows:
        total += row["ms"]
        assert row["total_ms"] == pytest.approx(total)
    assert said == [("cold start, warm caches", 0, 1)]


def test_bad_input_starts_no_process(monkeypatch):
    """Six processes that each fail after their imports take a minute to say what was known at once."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    for wrong in ({"model": "tyny"}, {"arm": "hybird"}, {"caches": ("hot",)}, {"repeats": 0}):
        with pytest.raises(HybridlabError):
            coldstart.run(**wrong)


def test_a_process_that_fails_is_named_with_its_words(tmp_path):
    """An exit code says nothing; the last words of the process do."""
    with pytest.raises(MeasureError, match=r"a cold start failed .*JSONDecodeError"):
        coldstart._child("no JSON", {"PATH": ""}, 60)


def test_a_process_that_hangs_is_ended():
    """A measurement that never ends is worse than one that fails, and so is a process that stays."""
    with pytest.raises(MeasureError, match="more than 0 s"):
        coldstart._child("{}", {"PATH": ""}, 0)


def test_cold_caches_are_empty_ones_and_gone_afterwards(monkeypatch):
    """Kernels compiled by an earlier process would make a cold start a warm one."""
    seen = []

    def child(asked, environment, timeout_s):
        seen.append({name: environment.get(name) for name in coldstart.VARIABLES})
        return 0, {"process": 1_000_000}

    monkeypatch.setattr(coldstart, "_child", child)
    for name in coldstart.VARIABLES:
        monkeypatch.setenv(name, "/kept")
    rows = coldstart.run(repeats=2)
    assert [row["caches"] for row in rows] == ["warm", "cold", "warm", "cold"]  # in turns
    assert [row["process"] for row in rows] == [0, 0, 1, 1]
    assert seen[0] == seen[2] == dict.fromkeys(coldstart.VARIABLES, "/kept")
    assert len({path for places in (seen[1], seen[3]) for path in places.values()}) == 4
