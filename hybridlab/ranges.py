"""Named stretches of work for profilers: NVTX ranges in a domain of their own, for Nsight Systems, and on demand the
same ones for PyTorch's profiler.

Whether a tool listens to NVTX is decided when the process starts. Where none does, a span is one shared object that
does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Literal

import nvtx

Category = Literal["prefill", "decode", "replay", "segment", "jit", "eager", "sampling", "capture"]
PREFIX = "hybridlab."  # of a range's name in a profiler that has no domains


class _Idle:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_IDLE = _Idle()
_domain: Any = nvtx.get_domain("hybridlab")
_record: Any = None  # torch.profiler.record_function while `recorded`


class _Span:
    """One range, pushed when entered and popped when left, in whatever way."""

    def __init__(self, category: Category, payload: int | None, detail: str) -> None:
        self.category, self.payload, self.detail = category, payload, detail
        self.mirror: Any = None

    def __enter__(self) -> None:
        name = f"{self.category} {self.detail}".rstrip()
        if _record is not None:
            self.mirror = _record(PREFIX + name + ("" if self.payload is None else f" #{self.payload}"))
            self.mirror.__enter__()
        attributes = _domain.get_event_attributes(message=name, category=self.category, payload=self.payload)
        _domain.push_range(attributes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        _domain.pop_range()
        if self.mirror is not None:
            self.mirror.__exit__(kind, error, trace)


def listening() -> bool:
    """Whether a profiler watches this process now: one that sees the ranges, or PyTorch's own, which slows as much."""
    torch = sys.modules.get("torch")  # not imported: nothing of it runs then
    return _record is not None or _heard() or (torch is not None and torch.autograd._profiler_enabled())


def _heard() -> bool:
    return _domain.get_event_attributes(message="", category="decode") is not None


def span(category: Category, payload: int | None = None, detail: str = "") -> AbstractContextManager[None]:
    """A range around a block: its category names it, with `detail` behind; `payload` is the position in the sequence of
    prefill and decode, and the number of a segment between cuts of a graph."""
    return _Span(category, payload, detail) if _LISTENING or _record is not None else _IDLE


@contextmanager
def recorded(record: Callable[[str], Any] | None = None) -> Iterator[None]:
    """Inside, each span also enters what `record` makes of `PREFIX`, its name and " #" with its payload: by default an
    annotation for PyTorch's profiler, whose traces hold no arguments."""
    global _record
    if record is None:
        from torch.profiler import record_function

        record = record_function
    before, _record = _record, record
    try:
        yield
    finally:
        _record = before


_LISTENING = _heard()
