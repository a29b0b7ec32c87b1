"""Python's garbage collector, off while something must not be interrupted by it; several may ask at once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()  # what is collected may ask, too
_holders, _was_on = 0, False


@contextmanager
def off() -> Iterator[None]:
    """No collection during the block, whichever thread asks; on again with the last one that asked, if it was."""
    global _holders, _was_on
    with _LOCK:
        if not _holders:
            _was_on = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _LOCK:
            _holders -= 1
            if not _holders and _was_on:
                gc.enable()


def collect() -> None:
    """A collection now, unless somebody wants none; whoever does later waits for its end."""
    with _LOCK:
        if gc.isenabled():
            gc.collect()
