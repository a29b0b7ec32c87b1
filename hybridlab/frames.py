"""What a runtime and its worker say to each other: typed frames of msgpack, each behind its length, over a socket.

Decoding fills typed fields and nothing else: no frame can name code. Token ids do not travel here, see `handover`.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from hybridlab.config import RuntimeConfig, Sampling
from hybridlab.errors import ProtocolError
from hybridlab.tokens import Happening

LIMIT = 64 * 2**20  # bytes of a frame, its length aside
LENGTH = struct.Struct(">I")
PIECE = 2**20       # read at once, so that a length alone takes no memory

Id = Annotated[int, Meta(ge=0, lt=2**31)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Ms = Annotated[float, Meta(ge=0.0, le=1e12)]  # neither NaN nor infinite


class Frame(msgspec.Struct, kw_only=True, tag=True, forbid_unknown_fields=True):
    """One message; its class is named in it."""


# --- from the client; each but Leave is answered by one Done, Described or Failed, Build by Ready or Failed ------


class Build(Frame):
    """The first order: load `model` (a directory, "tiny" or "random:…") and serve it as `config` says."""

    model: str
    name: str                  # what the model is called in plans and errors
    config: RuntimeConfig
    dtype: str | None = None
    threads: Annotated[int, Meta(ge=1, le=4096)] = 1


class Serve(Frame):
    """A request; its tokens come through `handover`, and Done or Failed ends it."""

    number: Count
    ids: Annotated[list[Id], Meta(min_length=1)]
    max_new_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    sampling: Sampling
    stop: frozenset[Id]

    def __post_init__(self) -> None:
        if not math.isfinite(self.sampling.temperature):
            raise ValueError("temperature is not finite")


class Prepare(Frame):
    """Capture what prompts of these lengths and this kind of draw need."""

    lengths: list[Id]
    sampling: Sampling = Sampling()


class Settle(Frame):
    """Finish every capture behind requests."""


class Seal(Frame):
    """Allow captures no more, or again."""

    closed: bool


class Describe(Frame):
    """Answered by the plan."""


class Echo(Frame):
    """Answered at once."""


class Leave(Frame):
    """The last order: give everything back and exit."""


# --- from the worker -------------------------------------------------------------------------------------------


class Ready(Frame):
    """The model is loaded; what the worker made of the settings."""

    device: str
    dtype: str
    max_len: Count
    buckets: list[Id]
    fused: bool


class Way(Frame):
    """What the next number of a way stands for: the path that a token took, and why."""

    path: str
    reason: str


class Done(Frame):
    """An order is carried out: `tokens` were given, with these times by the device's clock; when each was there, what
    happened in the worker meanwhile, and whether a profiler listened there."""

    tokens: Count = 0
    device_ms: list[Ms] = []
    ended_ns: list[Count] = []
    happenings: list[Happening] = []
    profiled: bool = False


class Described(Frame):
    """A plan, see `Plan.from_json`."""

    plan: str


class Failed(Frame):
    """An order was not carried out. `kind` is the class of the error; fatal: the worker leaves."""

    kind: str
    fact: str
    context: str = ""
    remedy: str = ""
    fatal: bool = False


Order = Build | Serve | Prepare | Settle | Seal | Describe | Echo | Leave
Answer = Ready | Way | Done | Described | Failed


class Channel:
    """One end of a connected stream socket over which frames of the union `expected` arrive.

    Raises: ProtocolError for what is no such frame; EOFError where the other end is closed; TimeoutError, where a
    deadline is given. After any of them the channel is of no more use.
    """

    def __init__(self, end: socket.socket, expected: Any) -> None:
        self.socket = end
        self._decoder = msgspec.msgpack.Decoder(expected)

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        """Send one frame, within `timeout_s` if given."""
        body = msgspec.msgpack.encode(frame)
        if len(body) > LIMIT:
            raise ProtocolError(f"a frame of {len(body):,} bytes cannot be sent", type(frame).__name__,
                                f"the limit is {LIMIT:,} bytes")
        self.socket.settimeout(timeout_s)
        try:
            self.socket.sendall(LENGTH.pack(len(body)) + body)
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError("the other end is closed") from None

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next frame, within `timeout_s` if given."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        (length,) = LENGTH.unpack(self._read(LENGTH.size, deadline, first=True))
        if not 0 < length <= LIMIT:
            raise ProtocolError(f"a frame of {length:,} bytes was announced", "",
                                f"frames have between 1 and {LIMIT:,} bytes")
        try:
            return self._decoder.decode(self._read(length, deadline))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError("a frame cannot be read", str(error)[:300], "nothing of it was carried out") from None

    def _read(self, size: int, deadline: float | None, first: bool = False) -> bytes:
        found = bytearray()
        while len(found) < size:
            self.socket.settimeout(None if deadline is None else max(1e-3, deadline - time.monotonic()))
            try:
                piece = self.socket.recv(min(size - len(found), PIECE))
            except ConnectionResetError:
                piece = b""
            if not piece and first and not found:
                raise EOFError("the other end is closed")
            if not piece:
                raise ProtocolError("a frame ends in its middle", f"{len(found)} of {size} bytes came",
                                    "nothing of it was carried out; make a new Runtime")
            found += piece
        return bytes(found)
