"""Ids through shared memory: in order, none lost, none made up, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridlab.counters import Counters
from hybridlab.errors import ProtocolError
from hybridlab.handover import RING, SLOT, SLOTS, Handover, now_ns, pair


@pytest.fixture
def ends() -> Iterator[tuple[Handover, Handover]]:
    """The client's end and the worker's."""
    client, (memory, bell) = pair()
    worker = Handover(memory, bell)
    yield client, worker
    for end in (client, worker):
        end.close()


def test_ids_come_in_order_round_the_ring(ends):
    """An id that is lost or comes twice at the seam of the ring is a wrong token."""
    client, worker = ends
    taken = []
    for number in range(3 * SLOTS + 7):
        before = now_ns()
        worker.put(number, number % 3, number / 4)
        assert client.listen() == 1
        given = client.take()
        assert before <= given.at_ns <= now_ns()
        taken.append(tuple(given)[:3])
    assert taken == [(number, number % 3, number / 4) for number in range(3 * SLOTS + 7)]
    assert client.listen() == 0


def test_a_full_ring_has_no_room_until_one_is_taken(ends):
    """A token that overwrites one nobody has read is a token lost."""
    client, worker = ends
    for number in range(SLOTS):
        assert worker.room()
        worker.put(number, 0, 0.0)
    assert not worker.room()
    assert client.listen() == SLOTS
    assert client.take().id == 0
    assert worker.room()


def test_what_is_not_the_next_id_is_refused(ends):
    """A bell without a token, a stale slot, or one that something else has written to: no token is better."""
    client, worker = ends
    with pytest.raises(ProtocolError, match="not in its place"):
        client.take()
    for wrong in ((9, 5, 0, 1.0, 1), (1, -1, 0, 1.0, 1), (1, 5, -1, 1.0, 1), (1, 5, 0, float("nan"), 1),
                  (1, 5, 0, -1.0, 1)):
        SLOT.pack_into(worker._memory, RING, *wrong)
        with pytest.raises(ProtocolError):
            client.take()
    worker.put(7, 0, 1.0)
    assert client.take().id == 7


def test_a_cancelled_request_is_seen_by_its_number(ends):
    """A cancel that arrives late must not end the next request."""
    client, worker = ends
    assert not worker.cancelled(1)
    client.cancel(3)
    assert [worker.cancelled(number) for number in (2, 3, 4)] == [True, True, False]


def test_counters_arrive_as_they_are(ends):
    """A counter in another's place would prove a path that did not run."""
    client, worker = ends
    assert client.counters() == (Counters(), False)
    sent = Counters(**{name: number for number, name in enumerate(Counters(), 1)})
    sent.capture_ms = 2.5
    worker.publish(sent, True)
    assert client.counters() == (sent, True)


def test_the_memory_has_no_name_and_goes_with_its_owners(ends):
    """Memory with a name outlives a process that is killed."""
    mapped = Path("/proc/self/maps").read_text()
    assert mapped.count("memfd:hybridlab (deleted)") == len(ends)
    assert not list(Path("/dev/shm").glob("*hybridlab*"))
