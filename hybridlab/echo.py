"""The protocol of a round trip: token ids to a second process, one id back, over a Unix socket, no work in between."""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hybridlab import children
from hybridlab.errors import MeasureError

WARM_UP = 20
ID = struct.Struct("<q")
COUNT = struct.Struct("<I")
TIMEOUT_S = 60.0


def run(tokens: int, repeats: int) -> list[float]:
    """Milliseconds of `repeats` round trips of `tokens` ids, after a warm-up of 20.

    The clock: from ids as a list of integers in this process until the answer is an integer here, packing, two
    transfers and unpacking included. Raises: MeasureError when the other process is gone or does not answer.
    """
    ids, times = list(range(tokens)), list[float]()
    with _other() as link:
        for _ in range(WARM_UP + repeats):
            start = time.perf_counter_ns()
            _send(link, ids)
            if _receive(link) != [sum(ids)]:
                raise MeasureError("the other process answered something else", f"{tokens} ids", "report this")
            times.append((time.perf_counter_ns() - start) / 1e6)
    return times[WARM_UP:]


@contextmanager
def _other() -> Iterator[socket.socket]:
    here, there = socket.socketpair(socket.AF_UNIX)
    here.settimeout(TIMEOUT_S)
    with there:
        child = children.Child(children.module("hybridlab.echo", there.fileno()), [there.fileno()])
    try:
        yield here
    except OSError as error:
        raise MeasureError("the other process did not answer", str(error), "repeat the run") from None
    finally:
        here.close()  # it ends when nobody is there to ask it
        child.end(TIMEOUT_S)


def _send(link: socket.socket, ids: list[int]) -> None:
    link.sendall(COUNT.pack(len(ids)) + b"".join(map(ID.pack, ids)))


def _receive(link: socket.socket) -> list[int]:
    (count,) = COUNT.unpack(_exactly(link, COUNT.size))
    return [number for (number,) in ID.iter_unpack(_exactly(link, count * ID.size))]


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = link.recv(size - len(parts))
        if not part:
            raise ConnectionError("the connection was closed")
        parts += part
    return bytes(parts)


def _answer(link: socket.socket) -> None:
    while True:
        try:
            ids = _receive(link)
        except ConnectionError:
            return
        _send(link, [sum(ids)])


if __name__ == "__main__":
    _answer(socket.socket(fileno=int(sys.argv[1])))
