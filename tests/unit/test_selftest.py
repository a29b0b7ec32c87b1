"""The self-test of dropping graphs: it must pass where that is safe, and notice where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab import graphs, lookup, selftest

CPU = torch.device("cpu")


@pytest.mark.parametrize("pool", ["shared", "private"])
def test_tapes_may_be_dropped_one_by_one(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test that fails by itself, in the process that it is run in or in this one."""
    monkeypatch.setattr(selftest, "WIDTH", 64)
    selftest.main(pool, CPU)


def test_a_graph_that_loses_memory_to_another_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test that passes whatever happens: here dropping one graph clears what the others read."""
    monkeypatch.setattr(selftest, "WIDTH", 64)
    record, pools = graphs.record, []

    def sharing(*args: Any, **kwargs: Any) -> Any:
        made = record(*args, **kwargs)
        calls = made._parts
        pools.append(calls)
        made.reset = lambda: [calls.clear() for calls in pools]
        return made

    monkeypatch.setattr(selftest.graphs, "record", sharing)
    with pytest.raises(RuntimeError, match="graph 1 computes something else once graph 0 is dropped"):
        selftest.main("private", CPU)


def test_a_process_that_does_not_start_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-test that never ran taken for one that passed."""
    monkeypatch.setattr(selftest.sys, "executable", "/nowhere/python")
    selftest.one_by_one.cache_clear()
    assert "FileNotFoundError" in selftest.one_by_one("shared")
    selftest.one_by_one.cache_clear()


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash taken for a pass, or a reason that names nothing."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'CUDA error: an illegal memory access' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(selftest.sys, "executable", str(broken))
    selftest.one_by_one.cache_clear()
    assert selftest.one_by_one("shared") == "the self-test failed: CUDA error: an illegal memory access"
    selftest.one_by_one.cache_clear()


@pytest.mark.parametrize(("settings", "device", "asked"), [
    ({"cache_graphs": 3}, "cuda", True), ({}, "cuda", False), ({"cache_graphs": 3}, "cpu", False),
    ({"cache_bytes": 3, "eviction": "one"}, "cuda", False), ({"cache_bytes": 3, "eviction": "all"}, "cuda", False),
])
def test_it_is_asked_where_graphs_will_be_dropped(settings: dict[str, Any], device: str, asked: bool,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds spent where nothing is ever dropped, or a choice that is overruled."""
    calls: list[str] = []
    monkeypatch.setattr(lookup.selftest, "one_by_one", lambda pool: calls.append(pool) or "it broke")
    config = hl.config.build(hl.RuntimeConfig, settings)
    assert lookup._one_by_one(config, torch.device(device)) == (not asked and settings.get("eviction") != "all")
    assert bool(calls) == asked
