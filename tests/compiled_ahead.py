"""Compiles kernels ahead for a GPU that is not there, and launches them: what test_ahead runs without an interpreter.

A driver that names a GPU of compute capability 9.0 is enough for Triton's compiler; launching and loading are noted.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hybridlab import kernels
from hybridlab.kernels import ahead, gemm, gemv, inputs, sample
from hybridlab.tuning import Tile

launches: list[str] = []
loaded_by: list[int] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *_: Any) -> None:
        launches.append(self.name)


class Utilities:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        loaded_by.append(threading.get_ident())
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


class Driver:
    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@ahead.Launched
@triton.jit
def _wrong(x):
    tl.store(x, undefined)  # noqa: F821 - no compiler takes it


def steps() -> list[Any]:
    """Kernels with pointers, numbers and floats of several kinds, twice each, as layers have them."""
    ids, last, token, positions = (torch.zeros(1, 16, dtype=torch.int64), *(
        torch.zeros(1, dtype=torch.int64) for _ in range(3)))
    x, some, gain, weight, out = (torch.zeros(*s).half() for s in ((64,), (16, 64), (64,), (48, 64), (48,)))
    rows, logits, work = torch.zeros(16, 48).half(), torch.zeros(5000), torch.zeros(3 + 16 * 256, dtype=torch.int64)
    tile = Tile(16, 32, 1, 2)

    def prefill() -> None:
        inputs.pad(torch.zeros(64, dtype=torch.int64), token, ids, last)
        for _ in range(2):
            gemm.project(some, gain, 1e-5, weight, None, None, None, None, None, True, rows, tile)

    def decode() -> None:
        inputs.advance(token, ids, positions)
        for _ in range(2):
            gemv.project(x, gain, 1e-5, weight, None, None, None, None, None, True, out, tile)
            gemv.residual(x, weight, None, False, out, tile)
        gemv.residual(x[1:33], weight[:, :32].contiguous(), None, False, out[1:], tile)  # aligned otherwise
        sample.greedy(logits, work, token)

    return [prefill, decode]


def main() -> None:
    driver.set_active(Driver())
    torch.cuda.set_device = lambda _: None
    torch.cuda.current_stream = lambda: torch.Stream(torch.device("cpu"))
    given = steps()
    with ahead.compiling([*given, lambda: _wrong[(1,)](torch.zeros(1))], torch.device("cpu")):
        pass
    first = sorted(kernels.compiled())
    assert first == ["_advance", "_draw", "_norm", "_pad", *["_project"] * 4], first
    assert (launches, len(loaded_by)) == ([], len(first))
    assert threading.get_ident() not in loaded_by
    for step in given:
        step()
    assert len(launches) == 12, launches
    assert sorted(kernels.compiled()) == first, "compiled again"
    assert len(loaded_by) == len(first), "loaded again"
    with pytest.raises(Exception, match="undefined"):
        _wrong[(1,)](torch.zeros(1))


if __name__ == "__main__":
    main()
