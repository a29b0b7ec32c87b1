"""Token ids from a worker to its client: a ring in memory that both processes share, and a bell that says when.

The memory has no name and the bell is a pipe, both inherited, so that nothing is left however a process ends.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from contextlib import suppress
from dataclasses import fields
from typing import NamedTuple

from hybridlab.counters import Counters
from hybridlab.errors import ProtocolError

SLOTS = 256  # tokens that may be under way; a worker waits for room beyond
SLOT = struct.Struct("=qqqdq")
NUMBER = struct.Struct("=q")
COUNTED = tuple(field.name for field in fields(Counters))
COUNTERS = struct.Struct(f"={len(COUNTED)}dq")
CANCEL, TAKEN, COUNTS, RING = 0, 64, 128, 4096  # where each is in the memory; the first three on lines of their own
SIZE = RING + SLOTS * SLOT.size
FULL_S = 1e-3  # between two looks for room


class Given(NamedTuple):
    """One token in the ring: its id, the number of its way, ms by the worker's clock, and when it was put there."""

    id: int
    way: int
    ms: float
    at_ns: int


class Handover:
    """Either end. The worker puts tokens and publishes counters; the client takes them and may cancel a request."""

    def __init__(self, memory: int, bell: int) -> None:
        """Takes over both file descriptors; `bell` is the end of the pipe that this side uses."""
        self._memory = mmap.mmap(memory, SIZE)
        os.close(memory)
        self._bell = bell
        self.given = self.rung = self.taken = 0

    # --- the worker's side

    def put(self, token: int, way: int, ms: float) -> None:
        """Give one token; the caller has looked for room."""
        SLOT.pack_into(self._memory, RING + self.given % SLOTS * SLOT.size, self.given + 1, token, way, ms, now_ns())
        self.given += 1
        os.write(self._bell, b"\0")

    def room(self) -> bool:
        """Whether the client has taken enough for one more token."""
        return self.given - NUMBER.unpack_from(self._memory, TAKEN)[0] < SLOTS

    def cancelled(self, number: int) -> bool:
        """Whether the client wants no more of request `number`."""
        return bool(NUMBER.unpack_from(self._memory, CANCEL)[0] >= number)

    def publish(self, counters: Counters, capturing: bool) -> None:
        """Let the client see the counters."""
        COUNTERS.pack_into(self._memory, COUNTS, *vars(counters).values(), capturing)

    # --- the client's side

    def fileno(self) -> int:
        """Of the bell: readable when there may be tokens."""
        return self._bell

    def listen(self) -> int:
        """Count the rings of the bell so far; returns how many tokens can be taken."""
        with suppress(BlockingIOError):
            self.rung += len(os.read(self._bell, SLOTS))
        return self.rung - self.taken

    def take(self) -> Given:
        """The next token. Raises: ProtocolError if it is not the one expected."""
        number, *values = SLOT.unpack_from(self._memory, RING + self.taken % SLOTS * SLOT.size)
        if number != self.taken + 1 or values[0] < 0 or values[1] < 0 or not 0.0 <= values[2] < 1e12:
            raise ProtocolError(f"token {self.taken + 1} is not in its place", f"found number {number}, id {values[0]}",
                                "the worker is not to be trusted; make a new Runtime")
        self.drop(1)
        return Given(*values)

    def drop(self, count: int) -> None:
        """Take `count` tokens without looking at them."""
        self.taken += count
        NUMBER.pack_into(self._memory, TAKEN, self.taken)

    def cancel(self, number: int) -> None:
        """Ask the worker to give no more of request `number`."""
        NUMBER.pack_into(self._memory, CANCEL, number)

    def counters(self) -> tuple[Counters, bool]:
        """The counters as the worker published them last, and whether a capture is under way."""
        *values, capturing = COUNTERS.unpack_from(self._memory, COUNTS)
        return Counters(**{name: value if name == "capture_ms" else int(value)
                           for name, value in zip(COUNTED, values, strict=True)}), bool(capturing)

    def close(self) -> None:
        self._memory.close()
        os.close(self._bell)


def pair() -> tuple[Handover, tuple[int, int]]:
    """The client's end, and the descriptors (memory, bell) of the worker's; the caller closes them once inherited."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("hybridlab")
    else:  # macOS
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, SIZE)
    heard, rung = os.pipe()
    os.set_blocking(heard, False)
    return Handover(os.dup(memory), heard), (memory, rung)


def now_ns() -> int:
    """A clock that all processes of this machine share."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
