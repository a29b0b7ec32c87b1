"""Frames between a runtime and its worker: what is no frame is refused, whatever it is, and nothing of it is done."""

from __future__ import annotations

import math
import pickle
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridlab.config import RuntimeConfig, Sampling
from hybridlab.errors import ProtocolError
from hybridlab.frames import (
    LIMIT,
    Answer,
    Build,
    Channel,
    Described,
    Done,
    Echo,
    Failed,
    Leave,
    Order,
    Prepare,
    Ready,
    Seal,
    Serve,
    Way,
)
from hybridlab.tokens import Happening
from tests.helpers import Bomb

SAMPLING = Sampling(temperature=0.7, top_k=3, top_p=0.5, seed=2**63 - 1)
ORDERS = [Build(model="tiny", name="tiny", config=RuntimeConfig(buckets=(16, 64), policy="full")), Echo(), Leave(),
          Serve(number=1, ids=[0, 2**31 - 1], max_new_tokens=9, sampling=SAMPLING, stop=frozenset({3})),
          Seal(closed=True), Prepare(lengths=[], sampling=SAMPLING)]
ANSWERS = [Ready(device="cuda:0", dtype="float16", max_len=9, buckets=[4], fused=True), Way(path="jit", reason="ü"),
           Done(tokens=3, device_ms=[0.0, 1.5], ended_ns=[1, 2**62], profiled=True,
                happenings=[Happening("preemption", 1, 2, "one", False)]),
           Described(plan="{}"), Failed(kind="NonFinite", fact="a", fatal=True)]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Channel, Channel]]:
    """A bare socket, and at its other end a channel that takes orders and one that takes answers."""
    one, other = socket.socketpair()
    yield one, Channel(other, Order), Channel(other, Answer)
    one.close()
    other.close()


@pytest.mark.parametrize("frame", [*ORDERS, *ANSWERS], ids=lambda frame: type(frame).__name__)
def test_frames_arrive_as_they_were_sent(ends, frame):
    """A field lost on the way changes what is served, and a default would hide it."""
    one, orders, answers = ends
    Channel(one, Order).send(frame)
    got = (orders if frame in ORDERS else answers).receive(timeout_s=5)
    assert got == frame
    assert type(got) is type(frame)


def body(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


SERVE = {"type": "Serve", "number": 1, "ids": [1], "max_new_tokens": 1, "sampling": {}, "stop": []}
BAD = {
    "nothing": b"", "no msgpack": b"\xc1", "two frames in one": body(type="Echo") + body(type="Echo"),
    "no map": msgspec.msgpack.encode([1, 2]), "unknown type": body(type="Exec", code="1"), "no type": body(closed=True),
    "an answer for an order": body(type="Done"), "a field too many": body(type="Echo", more=1),
    "a field too few": body(type="Seal"), "a number for a bool": body(type="Seal", closed=1),
    "a bool for an id": body(**SERVE | {"ids": [True]}), "a negative id": body(**SERVE | {"ids": [-1]}),
    "no ids": body(**SERVE | {"ids": []}), "a float for an id": body(**SERVE | {"ids": [1.0]}),
    "NaN": body(**SERVE | {"sampling": {"temperature": math.nan}}),
    "infinity": body(**SERVE | {"sampling": {"temperature": math.inf}}),
    "a setting that is none": body(type="Build", model="tiny", name="tiny", config={"arm": "hybird"}),
    "a setting that waits for ever": body(type="Build", model="tiny", name="tiny", config={"step_timeout_s": math.inf}),
    "deep nesting": b"\x91" * 100_000 + b"\xc0", "a long string that is not there": b"\xdb\xff\xff\xff\xff",
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_frame_is_refused(ends, what):
    """A worker that guesses at what was meant serves something else than was asked."""
    one, orders, _ = ends
    one.sendall(struct.pack(">I", len(BAD[what])) + BAD[what])
    with pytest.raises(ProtocolError):
        orders.receive(timeout_s=5)


@pytest.mark.parametrize("ms", [math.nan, math.inf, -math.inf, -1.0])
def test_a_time_is_a_number(ends, ms):
    """A time that is not finite would go into rows and make every median of them none."""
    one, _, answers = ends
    data = body(type="Done", tokens=1, device_ms=[ms])
    one.sendall(struct.pack(">I", len(data)) + data)
    with pytest.raises(ProtocolError):
        answers.receive(timeout_s=5)


def test_a_pickle_is_never_loaded(ends, tmp_path):
    """A frame that runs what it names would hand over the machine."""
    one, orders, answers = ends
    for channel in (orders, answers):
        bomb = pickle.dumps(Bomb(tmp_path / "hit"))
        for data in (bomb, body(type="Echo", more=bomb)):
            one.sendall(struct.pack(">I", len(data)) + data)
            with pytest.raises(ProtocolError):
                channel.receive(timeout_s=5)
    assert not (tmp_path / "hit").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "hit"))).close()
    assert (tmp_path / "hit").exists()  # the bomb is live


@pytest.mark.parametrize("length", [LIMIT + 1, 2**32 - 1])
def test_too_long_a_frame_takes_no_memory(ends, length):
    """Four bytes that claim 4 GiB must not have them reserved, nor be waited for."""
    one, orders, _ = ends
    one.sendall(struct.pack(">I", length))
    with pytest.raises(ProtocolError, match="announced"):
        orders.receive(timeout_s=5)
    with pytest.raises(ProtocolError, match="cannot be sent"):
        orders.send(Way(path="x" * LIMIT, reason=""))


@pytest.mark.parametrize("sent", [b"\0", struct.pack(">I", 9), struct.pack(">I", 9) + b"12345678"])
def test_a_short_frame_is_none(ends, sent):
    """A peer that ended in the middle of a frame left half an order, which is none."""
    one, orders, _ = ends
    one.sendall(sent)
    one.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="middle"):
        orders.receive(timeout_s=5)


def test_the_end_is_no_frame_and_a_silence_has_an_end(ends):
    """A wait without a deadline outlives the one it waits for."""
    one, orders, _ = ends
    one.sendall(struct.pack(">I", 9))
    with pytest.raises(TimeoutError):
        orders.receive(timeout_s=0.05)
    one, other = socket.socketpair()
    with one, other:
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            Channel(other, Order).receive(timeout_s=5)
        one.close()
        with pytest.raises(EOFError):
            Channel(other, Order).send(Echo())


def test_one_who_does_not_listen_is_not_waited_for():
    """A stopped worker takes what its socket's buffer holds, and then nothing for ever."""
    one, other = socket.socketpair()
    with one, other, pytest.raises(TimeoutError):
        Channel(one, Answer).send(Prepare(lengths=[2**31 - 1] * 2**20), timeout_s=0.1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), framed=st.booleans())
def test_random_bytes_end_in_a_refusal_or_a_frame(data, framed):
    """Some bytes that raise anything else, or are waited for, would hang or kill whoever reads them."""
    one, other = socket.socketpair()
    with one, other:
        one.sendall((struct.pack(">I", len(data)) if framed else b"") + data)
        one.shutdown(socket.SHUT_WR)
        try:
            found = Channel(other, Order).receive(timeout_s=5)
        except (ProtocolError, EOFError):
            return
        assert isinstance(found, Order)


values = st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
                      | st.binary(max_size=9), lambda inner: st.lists(inner, max_size=3), max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(fields=st.dictionaries(st.sampled_from([*SERVE, "config", "model", "closed"]), values, max_size=7),
       name=st.sampled_from(["Serve", "Build", "Prepare", "Seal", "Echo"]))
def test_random_fields_end_in_a_refusal_or_in_range(fields, name):
    """A field of another type or beyond its range that passes reaches the model."""
    one, other = socket.socketpair()
    with one, other:
        data = body(**{**SERVE, **fields, "type": name} if name == "Serve" else {**fields, "type": name})
        one.sendall(struct.pack(">I", len(data)) + data)
        try:
            found = Channel(other, Order).receive(timeout_s=5)
        except ProtocolError:
            return
        if isinstance(found, Serve):
            assert found.ids
            assert all(type(i) is int and 0 <= i < 2**31 for i in (*found.ids, *found.stop, found.max_new_tokens))
            assert math.isfinite(found.sampling.temperature)


def test_frames_larger_than_a_socket_buffer_arrive_whole(ends):
    """A frame that is cut where the buffer ends is no frame."""
    one, _, answers = ends
    plan = "x" * 3_000_000
    sender = threading.Thread(target=Channel(one, Order).send, args=(Described(plan=plan),))
    sender.start()
    assert answers.receive(timeout_s=10).plan == plan
    sender.join()
