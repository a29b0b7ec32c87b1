"""The CPU's graph: same results as running the function, and the same mistakes as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlab.errors import CaptureFailed
from hybridlab.tape import Tape, _place


def recorded(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Tape, torch.Tensor, torch.Tensor]:
    """A tape of `out <- function(x)` over fixed x and out."""
    x, out = torch.randn(4, 32), torch.zeros(4, 32)
    return Tape(lambda: out.copy_(function(x))), x, out


def block(x: torch.Tensor) -> torch.Tensor:
    """Norm, projections, views, in-place work, a softmax: what a decoder layer consists of."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    q = normed.view(4, 2, 16).transpose(0, 1)
    k = torch.cat((normed, -normed), -1)[:, :32].view(4, 2, 16).transpose(0, 1)
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)
    mixed = torch.bmm(weights, q).transpose(0, 1).reshape(4, 32)
    mixed += torch.arange(32) * 0.01
    return torch.nn.functional.silu(mixed) + x.to(torch.float64).to(torch.float32)


def test_replay_is_bit_equal_for_new_inputs() -> None:
    """An intermediate placed over one still needed, a dropped call, or an output variant that rounds differently."""
    tape, x, out = recorded(block)
    for seed in range(5):
        torch.manual_seed(seed)
        x.copy_(torch.randn(4, 32))
        out.zero_()
        tape.replay()
        assert torch.equal(out, block(x))


def test_python_values_are_baked_in() -> None:
    """A tape that runs Python again would hide the mistake that a CUDA graph makes."""
    scale = [2.0]
    tape, x, out = recorded(lambda x: x * scale[0])
    scale[0] = 3.0
    tape.replay()
    assert torch.equal(out, x * 2.0)


def test_fixed_addresses_are_read_anew() -> None:
    """A position in device memory frozen at its captured value."""
    position, cache = torch.tensor([1]), torch.zeros(8)
    tape = Tape(lambda: cache.index_copy_(0, position, torch.ones(1)))
    cache.zero_()
    position.fill_(5)
    tape.replay()
    assert cache.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("read", [
    lambda x: x * x.sum().item(), lambda x: x[x > 0].sum() * x, lambda x: x * bool(x.any()),
])
def test_a_host_read_fails_the_capture(read: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A value read once on the host and baked in for ever, where CUDA would have refused."""
    with pytest.raises(CaptureFailed, match="reads a value back"):
        recorded(read)


def test_an_accumulator_is_not_taken_for_a_constant() -> None:
    """A buffer made from nothing and then written in place, left as the last replay had it."""
    def function(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(4, 32)
        total += x
        return total

    tape, x, out = recorded(function)
    for _ in range(3):
        tape.replay()
    assert torch.equal(out, x)


def test_memory_is_reused() -> None:
    """Every intermediate of a long program kept for ever."""
    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            x = x * 1.01 + 0.1
        return x

    tape, x, _ = recorded(chain)
    assert tape.nbytes <= 4 * x.nbytes
    assert len(tape) == 101


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10), st.integers(1, 500)), max_size=20))
def test_storages_alive_together_never_overlap(storages: list[tuple[int, int, int]]) -> None:
    """Two live intermediates on the same bytes: silently wrong tokens."""
    births = {i: birth for i, (birth, _, _) in enumerate(storages)}
    deaths = {i: birth + life for i, (birth, life, _) in enumerate(storages)}
    sizes = {i: size for i, (_, _, size) in enumerate(storages)}
    offsets, total = _place(births, deaths, sizes)
    for a in births:
        assert offsets[a] % 64 == 0
        assert offsets[a] + sizes[a] <= total
        for b in births:
            if a < b and births[a] <= deaths[b] and births[b] <= deaths[a]:
                assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
