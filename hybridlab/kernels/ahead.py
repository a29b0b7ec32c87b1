"""Triton kernels compiled before they are launched, several at once, for exactly what a step will launch.

The first launch of a kernel compiles it, builds its launcher and loads it: half a second, in which other programs work
for most of the time. So the step runs once without its launches, which says what they are, and threads do the rest.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention, silu
from triton.runtime.cache import triton_key

from hybridlab import collector, ops

log = logging.getLogger(__name__)

COMPILERS = 8  # threads; with more the slowest kernel shares Python with all others, with fewer all wait for their turn

# What the steps that are read now launch: the text of each kernel and how to have it compiled, by kinds of launches.
_READ: ContextVar[dict[Any, tuple[str, Callable[[], Any]]] | None] = ContextVar("read", default=None)
_ASKER: ContextVar[int | None] = ContextVar("asker", default=None)     # the thread that this one compiles for


class Launched:
    """Decorates a Triton kernel: `kernel[grid](...)` launches it, or, while a step is read, has it compiled."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        asked = _READ.get()
        return self.kernel[grid] if asked is None else partial(self._asked, asked, grid)  # type: ignore[no-any-return]

    def _asked(self, asked: dict[Any, Any], grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        kind = (id(self), *map(_kind, args), *options.items())
        asked.setdefault(kind, (self.kernel.src, partial(self.kernel.warmup, *args, grid=grid, **options)))


def _kind(value: Any) -> Any:
    """What a kernel may be compiled for; of numbers it is less than their value."""
    return (value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value


def reading() -> bool:
    """Whether a step is read: what is no kernel of ours has nothing to do then."""
    return _READ.get() is not None


def asker() -> int:
    """The thread whose work this is."""
    return _ASKER.get() or threading.get_ident()


def preparing(device: torch.device) -> list[Future[Any]]:
    """Begins, once a process and on threads of its own, what a first step waits for whatever it is: Triton reads all of
    itself, imports its other language and builds what it calls the driver by, the device's library of products and
    PyTorch's kernels of a decoder are loaded, and Python collects its garbage, a quarter of a second that it would soon
    take otherwise. Three quarters of a second in all, in which weights can be loaded. Returns what Triton does."""
    known = device.type != "cuda" or device.index is not None
    return _begun(device if known else torch.device("cuda", torch.cuda.current_device()))


@cache
def _begun(device: torch.device) -> list[Future[Any]]:
    threads = ThreadPoolExecutor(thread_name_prefix="hybridlab-prepare")
    begun: list[Future[Any]] = [threads.submit(step) for step in (triton_key, _languages, _driver)]
    for step in (partial(_library, device), partial(_operations, device), collector.collect):
        threads.submit(step)
    threads.shutdown(wait=False)
    return begun


def _languages() -> None:
    import triton.experimental.gluon  # noqa: F401 - the first launch asks of each argument whether it is one of its


def _driver() -> None:
    triton.compiler.make_backend(triton.runtime.driver.active.get_current_target()).hash()


def _library(device: torch.device) -> None:
    one = torch.ones((16, 16), device=device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        torch.mm(one.to(dtype), one.to(dtype))


def _operations(device: torch.device) -> None:
    """What the check of a decoder launches in plain PyTorch: each kernel is loaded when it is first launched.
    Values mean nothing here; each operation stands for one of the check."""
    ids = torch.arange(16, device=device) * 7 % 11
    same = (ids == ids.cumsum(0)).all() | (ids != 0).all()
    for dtype in (torch.float16, torch.bfloat16):
        x = embedding(ids, torch.ones((16, 128), device=device, dtype=dtype))
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * same
        x = torch.cat((-x[:, 64:], x[:, :64]), dim=-1) * wide.cos().to(dtype) + silu(x) * wide.sin().to(dtype)
        heads, kept = x.view(1, 1, 16, 128), torch.zeros((1, 1, 16, 128), device=device, dtype=dtype)
        scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        for rows in (16, 1):
            new = heads[:, :, :rows]
            ops.attend(new, new, new, kept, kept, ids[:rows].fill_(0), 0.1, 16, 0, 0.0,
                       torch.empty_like(new).transpose(1, 2))
        wide.copy_(kept[0, 0])
        (wide - (x[ids] @ x.t()).float().abs().max() / wide.clamp(min=1).max()).isfinite().all().item()


@contextmanager
def compiling(steps: Sequence[Callable[[], None]], device: torch.device) -> Iterator[None]:
    """Compiles and loads what `steps` launch on a GPU while the body runs, and is done when that has ended.

    Steps run without launching; what else they do to their tensors, they do. A kernel that cannot be compiled is left
    to its launch, which says why. Compilations count as the calling thread's.
    """
    if not steps:
        yield
        return
    with ThreadPoolExecutor(1, "hybridlab-ahead") as thread:
        done = thread.submit(_compile, steps, device, threading.get_ident())
        yield
        done.result()


def _compile(steps: Sequence[Callable[[], None]], device: torch.device, asker: int) -> None:
    wait(preparing(device))  # if it went wrong, so does what follows
    torch.cuda.set_device(device)
    _ASKER.set(asker)
    loading = _Loading(COMPILERS, "hybridlab-compile", partial(torch.cuda.set_device, device))
    with loading, triton.AsyncCompileMode(loading, ignore_errors=True), torch.no_grad():
        asked: dict[Any, tuple[str, Callable[[], Any]]] = {}
        _READ.set(asked)
        try:
            try:
                for step in steps:
                    step()
            finally:
                _READ.set(None)
                for _, compiled in sorted(asked.values(), key=lambda one: len(one[0]), reverse=True):
                    compiled()  # first the one that takes longest, as far as its text tells
        except Exception as error:  # the first request meets it too, and tells it
            log.info("kernels are compiled when they are launched · %s: %s", type(error).__name__, error)
    torch.cuda.current_stream().synchronize()  # whoever serves may do so on another stream


class _Loading(ThreadPoolExecutor):
    """Threads that load what they have compiled: a kernel's launcher may have to be compiled, too."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def whole() -> Any:
            kernel = fn(*args, **kwargs)
            assert kernel.run is not None  # asking for it builds and loads
            return kernel

        return super().submit(whole)
