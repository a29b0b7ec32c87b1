"""Graphs with work between them: cut where the plan says, run in order, and nothing lost when the cut does not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import hybridlab as hl
from hybridlab import kernels
from hybridlab.cache import GraphCache, Job
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed
from hybridlab.pieces import Cut, cut
from hybridlab.policies import Place


class Two(nn.Module):
    """Two linear layers with a function of x's own between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.second = nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.middle(self.first(x)).view(2, 8).t().t())


MIDDLE = Place("middle", "aten.tanh.default", 0)


def captured(outside: set[Place]) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor, Two, Counters]:
    model, x, out, counters = Two().requires_grad_(False), torch.randn(2, 8), torch.zeros(2, 8), Counters()
    cache = GraphCache(torch.device("cpu"), counters)
    cache.capture(Job("key", lambda: out.copy_(model(x)), [x, out], cut=Cut(model, frozenset(outside))))

    def replay() -> None:
        with cache.lease("key") as run:
            run()

    return replay, x, out, model, counters


@pytest.mark.parametrize(("outside", "graphs"), [
    ({MIDDLE}, 2),
    ({Place("first", "aten.addmm.default", 0)}, 1),
    ({Place("", "aten.copy_.default", 0)}, 1),
    ({MIDDLE, Place("second", "aten.addmm.default", 0)}, 2),
])
def test_pieces_give_what_the_function_gives(outside: set[Place], graphs: int) -> None:
    """A value that is lost, stale or overwritten between two graphs; or one graph counted for two."""
    replay, x, out, model, counters = captured(outside)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(2, 8))
        out.zero_()
        replay()
        assert torch.equal(out, model(x))
    assert counters.replays == 3 * graphs


def test_equal_operations_of_a_module_are_told_apart() -> None:
    """The first of two equal operations left outside in place of the second, or both."""
    x, out, counters = torch.randn(3), torch.zeros(3), Counters()
    cache = GraphCache(torch.device("cpu"), counters)
    second = Place("", "aten.tanh.default", 1)
    cache.capture(Job("key", lambda: out.copy_(x.tanh().tanh()), [x, out], cut=Cut(nn.Module(), frozenset({second}))))
    with cache.lease("key") as replay:
        replay()
    assert torch.equal(out, x.tanh().tanh())
    assert counters.replays == 2  # the first, then the copy; outside both would leave the copy alone


@pytest.mark.parametrize("outside", [True, False])
def test_what_is_outside_is_launched_from_python(outside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation said to be outside and recorded like the rest, or one inside a graph that Python still launches."""
    logits, work, token = torch.randn(33), *(torch.zeros(size, dtype=torch.int64) for size in (19, 1))
    place = Place("", "hybridlab.greedy.default", 0)
    cache = GraphCache(torch.device("cpu"), Counters())
    cache.capture(Job("key", lambda: torch.ops.hybridlab_jit.greedy.default(logits, work, token), [logits, token],
                  cut=Cut(nn.Module(), frozenset({place} if outside else ()))))
    launched: list[str] = []
    bind = kernels.bind
    monkeypatch.setattr(kernels, "bind", lambda name, args: launched.append(name) or bind(name, args))
    logits[17] = 100.0
    with cache.lease("key") as replay:
        replay()
    assert int(token) == 17
    assert launched == (["greedy"] if outside else [])


def test_a_planned_operation_that_never_runs_fails_the_capture() -> None:
    """A plan of another program executed as if it fitted: the operation it leaves outside would be in a graph."""
    with pytest.raises(CaptureFailed, match=r"1 operations of the plan never ran.*aten.tanh.default number 1 "):
        captured({Place("middle", "aten.tanh.default", 1)})


def test_hooks_are_gone_after_a_capture_that_failed() -> None:
    """A model that stays slower, or reports to a capture long over."""
    model = Two().requires_grad_(False)
    cache = GraphCache(torch.device("cpu"), Counters())

    def reads_back() -> None:
        model(torch.zeros(2, 8)).sum().item()

    with pytest.raises(CaptureFailed, match="reads a value back"):
        cache.capture(Job("key", reads_back, [], cut=Cut(model, frozenset({MIDDLE}))))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_capture_puts_back_what_a_step_moves_on() -> None:
    """A position that capture moved on twice: the next token would be written two rows further."""
    position = torch.zeros(1, dtype=torch.int64)
    cache = GraphCache(torch.device("cpu"), Counters())
    cache.capture(Job("key", lambda: position.add_(1), [position], state=[position]))
    assert int(position) == 0
    with cache.lease("key") as replay:
        replay()
        replay()
    assert int(position) == 2


def test_a_plan_without_cuts_is_one_graph() -> None:
    """Hooks and a dispatch mode paid for by programs that need none."""
    model = hl.load("random:tiny-llama-3", device="cpu")
    assert cut(model, hl.partition(model, "whole")) is None
    assert cut(model, hl.partition(model, "full")) is None
    found = cut(model, hl.partition(model, "piecewise"))
    assert found is not None
    assert {p.module for p in found.outside} == {f"model.layers.{i}.self_attn" for i in (0, 1)}
