"""A worker whose engine has no model, so that it is there at once: the first id of a prompt says what befalls it before
its fourth token. Started instead of `hybridlab.worker` by the fixture `hosted`."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

from hybridlab import ranges, worker
from hybridlab.counters import Counters
from hybridlab.errors import ConfigError, NonFinite
from hybridlab.frames import Done
from hybridlab.handover import RING, SLOT, SLOTS
from hybridlab.tokens import Step

BEFORE = 3  # tokens that come before it happens
HOST = []


def _raise(error):
    raise error


def _overwrite():
    host = HOST[0].handover
    SLOT.pack_into(host._memory, RING + host.given % SLOTS * SLOT.size, 999, 1, 0, 1.0, 1)
    os.write(host._bell, b"\0")


def _say(data):
    HOST[0].channel.socket.sendall(data)
    time.sleep(60)


EVENTS = {
    1: lambda: os.kill(os.getpid(), signal.SIGKILL),
    2: lambda: [None for _ in iter(int, 1)],  # for ever
    3: lambda: os.kill(os.getpid(), signal.SIGSTOP),
    4: lambda: _raise(RuntimeError("CUDA error: an illegal memory access was encountered")),
    5: lambda: _raise(MemoryError("out of memory")),
    6: lambda: _raise(NonFinite("the logits hold NaN", "here", "look")),
    7: lambda: os.write(2, b"last words\nthe very last\n") and os._exit(3),
    8: _overwrite,
    9: lambda: os.write(HOST[0].handover._bell, b"\0" * 5),
    10: lambda: _say(b"\0\0\0\x05hello"),
    11: lambda: _say(b"\xff\xff\xff\xff"),
    12: lambda: _say(b"\0\0"),
    13: lambda: HOST[0].channel.send(Done(tokens=77)),
    14: lambda: HOST[0].handover.put(5, 12, 0.5),
    15: lambda: time.sleep(1),
    16: lambda: gc.collect(),
    17: lambda: setattr(ranges, "_record", lambda name: nullcontext()),  # a profiler listens from now on
}


class Engine:
    """Gives the prompt's first id, then the numbers after it."""

    device, max_len, buckets, fused, capturing = "cpu", 10_000, (16, 64), False, False

    def __init__(self, order):
        if order.name == "refused":
            raise ConfigError("no such model", "anywhere", "give another")
        if order.name == "broken":
            raise OSError("no device")
        self.model = SimpleNamespace(dtype="torch.float32", config=SimpleNamespace(vocab_size=1000))
        self.counters, self.plan = Counters(), SimpleNamespace(to_json=lambda: "no plan")

    def serve(self, asked):
        for index in range(asked.max_new_tokens):
            if index == BEFORE and asked.ids[0] in EVENTS:
                EVENTS[asked.ids[0]]()
            self.counters.replays += 1
            yield Step(asked.ids[0] + index, "graph", f"replayed {index // 100}"), 0.5

    def device_ms(self, count):
        return [0.25] * count

    def prepare(self, lengths, sampling):
        if 666 in lengths:
            raise ConfigError("no such length")
        self.counters.captures += len(lengths)

    def settle(self):
        pass

    def seal(self, closed):
        self.counters.failures = int(closed)

    def close(self):
        self.counters.graphs = 0


class Host(worker._Host):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        HOST.append(self)


if __name__ == "__main__":
    worker.build, worker._Host = Engine, Host
    sys.exit(worker.main(sys.argv[1:]))
