"""Kernels compiled ahead of their launches: all that a step launches, for exactly that, and nothing launched."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hybridlab as hl
from hybridlab import verify
from hybridlab.kernels import ahead, gemm
from hybridlab.tuning import LIBRARY

CPU = torch.device("cpu")


class Kernel:
    """Says what is done to it."""

    def __init__(self, src: str = "") -> None:
        self.src = src
        self.done: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.done.append("launched")

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.done.append((grid, args, options, threading.current_thread().name))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets steps be read without a GPU."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.Stream(CPU))


def read(*steps: Any) -> None:
    with ahead.compiling(steps, CPU):
        pass


@pytest.mark.usefixtures("on_cpu")
def test_a_step_that_is_read_launches_nothing() -> None:
    """A KV cache that is written by a step that nobody asked for; a kernel compiled once for each of 32 layers, or for
    one layer of two whose weights are differently aligned."""
    kernel, x = Kernel(), torch.zeros(64)
    launch = ahead.Launched(kernel)

    def step() -> None:
        for _ in range(3):
            launch[(4,)](x, 7, 0.5, num_warps=4)
        for given in ((x[1:], 7, 0.5), (x.half(), 7, 0.5), (x, 8, 0.5)):
            launch[(4,)](*given, num_warps=4)
        launch[(9,)](x, 7, 0.5, num_warps=8)

    read(step, step)
    assert [(grid, args[0].dtype, args[0].storage_offset(), args[1], options) for grid, args, options, _ in kernel.done
            ] == [((4,), torch.float32, 0, 7, {"num_warps": 4}), ((4,), torch.float32, 1, 7, {"num_warps": 4}),
                  ((4,), torch.float16, 0, 7, {"num_warps": 4}), ((4,), torch.float32, 0, 8, {"num_warps": 4}),
                  ((9,), torch.float32, 0, 7, {"num_warps": 8})]
    assert {name for *_, name in kernel.done} != {threading.current_thread().name}
    kernel.done.clear()
    step()
    assert kernel.done == ["launched"] * 7


@pytest.mark.usefixtures("on_cpu")
def test_the_body_runs_meanwhile_and_launches_what_it_likes() -> None:
    """Verification that waits for compilers, or that is read instead of run."""
    kernel, going, gone = Kernel(), threading.Event(), threading.Event()
    launch = ahead.Launched(kernel)

    def step() -> None:
        launch[(1,)]()
        going.set()
        assert gone.wait(60)

    with ahead.compiling([step], CPU):
        assert going.wait(60)
        launch[(1,)]()
        assert not ahead.reading()
        gone.set()
    assert sorted(done == "launched" for done in kernel.done) == [False, True]


@pytest.mark.usefixtures("on_cpu")
def test_the_longest_kernel_is_compiled_first() -> None:
    """A first token that waits for the kernel which takes longest to compile, begun when all others were done."""
    kernels = [Kernel("short"), Kernel("the longest of them"), Kernel("not so short")]
    order: list[str] = []
    for kernel in kernels:
        kernel.warmup = lambda *_, src=kernel.src, **__: order.append(src)  # type: ignore[method-assign]

    launches = [ahead.Launched(kernel) for kernel in kernels]

    def step() -> None:
        for launch in launches:
            launch[(1,)]()

    read(step)
    assert order == sorted((kernel.src for kernel in kernels), key=len, reverse=True)


@pytest.mark.usefixtures("on_cpu")
def test_what_goes_wrong_ahead_is_left_to_the_request() -> None:
    """A runtime that cannot be built, or that hides why its model was refused, for the sake of being quicker."""
    kernel = Kernel()

    def step() -> None:
        ahead.Launched(kernel)[(1,)]()
        raise RuntimeError("no memory")

    read(step)
    assert len(kernel.done) == 1  # what was read until then is ready at least
    with pytest.raises(KeyError, match="refused"), ahead.compiling([step], CPU):
        raise KeyError("refused")


def test_nothing_to_do_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, which has no such kernels, paying for them."""
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread was started"))
    read()


def test_the_library_multiplies_nothing_for_a_step_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of memory that holds anything, on a stream that nobody waits for."""
    x, weight = torch.ones(70, 64), torch.ones(32, 64)
    for out in (torch.zeros(70, 32), torch.zeros(70, 32)):
        with ExitStack() as stack:
            stack.callback(ahead._READ.reset, ahead._READ.set({}))
            gemm._by_library(x, (weight,), (None,), out)
            gemm.residual(x, weight, None, False, out, LIBRARY)
        assert not out.any()
        gemm._by_library(x, (weight,), (None,), out)
        gemm.residual(x, weight, None, False, out, LIBRARY)
        assert torch.equal(out, torch.full_like(out, 128.0))


class Seen(TorchDispatchMode):
    """The operations of the dispatcher that run meanwhile, those left out that launch nothing on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name():
            self.names.add(func._schema.name.rstrip("_"))
        return func(*args, **(kwargs or {}))


def test_what_a_model_is_checked_by_is_loaded_ahead() -> None:
    """A cold start that waits for PyTorch's kernels, one after the other, when the weights are there."""
    with Seen() as ahead_of_it:
        ahead._operations(CPU)
    model = hl.load("random:tiny-llama-3", device="cpu").half()
    with Seen() as check:
        verify.verify_lowered(model)
    assert len(check.names) > 30
    assert check.names - ahead_of_it.names <= {"aten::_unsafe_view", "hybridlab::attend"}


def test_what_was_compiled_ahead_is_what_is_launched(tmp_path: Path) -> None:
    """A kernel compiled for what no launch is, and again, for what it is, in the middle of a request; a compilation
    that no runtime counts; or a kernel that no compiler takes and that ends the building of a runtime."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "compiled_ahead.py"
    done = subprocess.run([sys.executable, str(script)], env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
