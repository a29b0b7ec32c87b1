"""Ranges for profilers: which, in which order, with which payload, always closed, and nothing where nobody listens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab import ranges

PROMPT, NEW = [3, 4, 5], 3


class Domain:
    """What NVTX was told, nested as it was pushed; `left` are ranges that were not popped."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, str, int | None]] = []
        self.left: list[SimpleNamespace] = []

    def get_event_attributes(self, **given: Any) -> SimpleNamespace:
        return SimpleNamespace(**given)

    def push_range(self, a: SimpleNamespace) -> None:
        self.seen.append((len(self.left), a.category, a.message, a.payload))
        self.left.append(a)

    def pop_range(self) -> None:
        self.left.pop()


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Domain:
    made = Domain()
    monkeypatch.setattr(ranges, "_domain", made)
    monkeypatch.setattr(ranges, "_LISTENING", True)
    return made


@pytest.mark.parametrize(("settings", "inside"), [
    ({"arm": "eager"}, ["eager", "sampling"]),
    ({"arm": "jit"}, ["jit", "sampling"]),
    ({"arm": "hybrid"}, ["replay", "sampling"]),
    ({"arm": "hybrid", "policy": "full"}, ["replay"]),
    ({"arm": "hybrid", "capture": "never"}, ["jit", "sampling"]),
    ({"arm": "graph", "capture": "never"}, ["eager", "sampling"]),
])
def test_each_step_is_a_range_with_its_path_inside(domain: Domain, settings: dict[str, Any],
                                                   inside: list[str]) -> None:
    """A trace whose ranges name another path than the rows, or a token that no range holds."""
    with hl.Runtime("tiny", **{"capture": "sync", "max_len": 64, "device": "cpu", **settings}) as runtime:
        if runtime.config.capture != "never":
            runtime.warm_up([len(PROMPT)])
        domain.seen.clear()
        runtime.generate(PROMPT, max_new_tokens=NEW, stop=[])
    assert domain.left == []
    assert [(category, payload) for depth, category, _, payload in domain.seen if depth == 0] == [
        ("prefill", 3), ("decode", 4), ("decode", 5)]
    assert [category for depth, category, *_ in domain.seen if depth == 1] == inside * NEW


def test_each_segment_of_a_graph_in_pieces_is_a_range_with_its_number(domain: Domain) -> None:
    """A replay of which a trace cannot say which piece took the time."""
    with hl.Runtime("tiny", policy="piecewise", capture="sync", max_len=64, device="cpu") as runtime:
        runtime.warm_up([len(PROMPT)])
        domain.seen.clear()
        runtime.generate(PROMPT, max_new_tokens=2, stop=[])
        layers = runtime.model.config.num_hidden_layers
    numbers = [payload for depth, category, _, payload in domain.seen if category == "segment"]
    assert numbers == list(range(2 * layers + 1)) * 2  # graph, attention, graph, …, in prefill and decode
    assert {depth for depth, category, *_ in domain.seen if category == "segment"} == {2}
    assert domain.left == []


def test_several_steps_a_launch_are_one_range(domain: Domain) -> None:
    """Positions that stand still while a graph decodes several tokens."""
    with hl.Runtime("tiny", policy="full", steps=4, capture="sync", max_len=64, device="cpu") as runtime:
        runtime.warm_up([len(PROMPT)])
        domain.seen.clear()
        runtime.generate(PROMPT, max_new_tokens=9, stop=[])
    assert [payload for depth, _, _, payload in domain.seen if depth == 0] == [3, 4, 8]


def test_a_capture_is_a_range_named_by_its_key(domain: Domain) -> None:
    """Time that a trace shows in a request and nobody can place."""
    with hl.Runtime("tiny", capture="sync", max_len=64, device="cpu") as runtime:
        runtime.warm_up([len(PROMPT)])
    names = [message for _, category, message, _ in domain.seen if category == "capture"]
    assert len(names) == runtime.counters.captures == 2
    assert any("prefill" in name for name in names)
    assert domain.left == []


def test_a_range_is_closed_when_its_block_fails(domain: Domain) -> None:
    """Every later range nested in one that failed."""
    with pytest.raises(ZeroDivisionError), ranges.span("replay"):
        raise ZeroDivisionError
    assert domain.left == []


def test_without_a_listener_nothing_is_made() -> None:
    """An object, a string or a lookup in each of a token's steps that nobody sees."""
    assert not ranges.listening()
    assert ranges.span("decode", 7) is ranges.span("capture", detail="x")


def test_pytorchs_profiler_is_noticed_although_it_sees_no_range() -> None:
    """It slows each operation: times taken under it that are not marked become latencies."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        assert ranges.listening()
        assert ranges.span("decode", 7) is ranges.span("capture", detail="x")
    assert not ranges.listening()


def test_pytorchs_profiler_sees_them_on_demand() -> None:
    """A trace on a machine without Nsight Systems that shows operations and not whose they are."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (hl.Runtime("tiny", arm="eager", max_len=64, device="cpu") as runtime, ranges.recorded(),
          torch.profiler.profile(activities=activities, acc_events=True) as seen):
        runtime.generate(PROMPT, max_new_tokens=2, stop=[])
    names = [event.name for event in seen.events() if event.name.startswith(ranges.PREFIX)]
    assert {name.removeprefix(ranges.PREFIX) for name in names} == {"prefill #3", "decode #4", "eager", "sampling"}
    assert not ranges.listening()


LISTENED = """
from contextlib import suppress
from hybridlab import ranges
assert ranges.listening()
for position in (17, 18):
    with suppress(ZeroDivisionError), ranges.span("decode", position), ranges.span("capture", detail="prefill 64"):
        1 / (position - 18)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which builds the tool that listens")
def test_a_tool_that_listens_to_nvtx_is_told_each_range(tmp_path: Path) -> None:
    """A domain, a category or a payload that NVTX itself takes otherwise than the stand-in of these tests does."""
    listener = tmp_path / "listener.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", listener, Path(__file__).parents[1] / "listener.cpp"], check=True,
                   timeout=60)
    told = subprocess.run([sys.executable, "-c", LISTENED], capture_output=True, text=True, check=True, timeout=60,
                          env={**os.environ, "NVTX_INJECTION64_PATH": str(listener)}).stdout.splitlines()
    one = [line for position in (17, 18) for line in (
        f"push hybridlab | decode | decode | {position}", "push hybridlab | capture | capture prefill 64 | none",
        "pop hybridlab", "pop hybridlab")]
    assert [line for line in told if not line.startswith("domain")] == one
    assert "domain hybridlab" in told
