"""Tokens on their way to the device, and back to the host, which may launch further steps before it reads them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hybridlab.errors import HybridlabError

STOPS = 16         # tokens that end a request on the device; further ones are left to the host
NO_TOKEN = -2      # -1 is what is drawn from logits that are not finite
NUMBER = 32        # bits below the number of a token


class Prompt:
    """The ids of one prompt and their number where a step reads them: int64 `ids` [most] and `count` [1].

    `mapped`: on a GPU both stay in pinned memory of the host, for kernels that read it by themselves. Every call to
    the driver before the first kernel is time in which the device does nothing.
    """

    def __init__(self, most: int, device: torch.device, mapped: bool) -> None:
        self._host = torch.zeros(most + 1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._host[0] = 1
        self._there = self._host if mapped else self._host.to(device)  # on a CPU the same
        self.count, self.ids = self._there[:1], self._there[1:]
        self._seen = self._host.numpy()

    def put(self, ids: Sequence[int]) -> None:
        """The step that read the ids before must have given its token out, or be of no interest any more."""
        end = len(ids) + 1
        self._seen[0], self._seen[1:end] = len(ids), ids
        if self._there is not self._host:
            self._there[:end].copy_(self._host[:end], non_blocking=True)


class Readback:
    """A ring of `depth` places on the host for the values of `token`, int64 [1] on any device.

    On a GPU a value travels behind the step that wrote it, into pinned memory, and only `read` waits; so steps that
    overwrite `token` can be launched meanwhile, as long as no more than `depth` values are under way.
    """

    def __init__(self, token: Tensor, depth: int) -> None:
        self.token, self.depth, self._sent = token, depth, 0
        self._cuda = token.device.type == "cuda"
        self._host = torch.zeros(depth, dtype=torch.int64, pin_memory=self._cuda)
        self._seen = self._host.numpy()
        self._events: list[torch.cuda.Event] = []  # of a request: its beginning, and each value on the host
        self.start()

    def start(self) -> None:
        """A request begins; the numbers of its values do too."""
        self._sent = 0
        self._mark(0)

    def send(self) -> int:
        """Send what the launched steps leave in `token`; returns the number to read it by."""
        number, self._sent = self._sent, self._sent + 1
        place = number % self.depth
        self._host[place:place + 1].copy_(self.token, non_blocking=True)
        self._mark(self._sent)
        return number

    def arrived(self, number: int) -> bool:
        """Whether `read` would not wait."""
        return not self._cuda or self._events[number + 1].query()

    def read(self, number: int) -> int:
        """The value of this number; waits until it has arrived."""
        if self._cuda:
            self._events[number + 1].synchronize()
        return int(self._seen[number % self.depth])

    def device_ms(self, count: int) -> list[float]:
        """By the device's clock, ms from the request's start to its first value and from each to the next, of the
        first `count` values, which were read; nothing on a CPU."""
        if not self._cuda:
            return []
        return [before.elapsed_time(after) for before, after in pairwise(self._events[:count + 1])]

    def _mark(self, index: int) -> None:
        if not self._cuda:
            return
        if index == len(self._events):  # kept for later requests: making one takes longer than recording it
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[index].record()


class Ring:
    """Tokens that a launch of several steps gives out one by one, into memory of the host, which looks for them there.

    At most `depth` are under way. On a GPU the memory is pinned, and no call of the host stands between two tokens.
    """

    def __init__(self, token: Tensor, depth: int) -> None:
        cuda = token.device.type == "cuda"
        self.depth, self._next, self._given = depth, 0, frozenset[int]()
        self.ring = torch.zeros(depth, dtype=torch.int64, pin_memory=cuda)
        self.state = torch.zeros(3, dtype=torch.int64, device=token.device)  # see hybridlab.ops.emit
        self.stops = torch.full((STOPS,), NO_TOKEN, dtype=torch.int64, device=token.device)
        self._token, self._seen, self._cuda = token, self.ring.numpy(), cuda
        self._emit = getattr(torch.ops, "hybridlab_jit" if cuda else "hybridlab").emit.default

    @property
    def buffers(self) -> list[Tensor]:
        return [self.state, self.stops, self.ring]

    def start(self, stop: Iterable[int]) -> None:
        """A request begins, which one of `stop` ends: steps behind it are then not run."""
        if frozenset(stop) != self._given:
            self._given = frozenset(stop)
            known = sorted(self._given)[:STOPS]
            self.stops.copy_(torch.tensor(known + [NO_TOKEN] * (STOPS - len(known))))
        self.state[:1].fill_(self._next)
        self.state[1:].zero_()

    def emit(self) -> None:
        """Part of a step: gives its token out."""
        self._emit(self._token, self.stops, self.state, self.ring)

    def expect(self, count: int) -> list[int]:
        """To be said before a launch: that it shall give out `count` tokens. Returns their numbers."""
        self.state[1:2].fill_(count)
        self._next += count
        return list(range(self._next - count, self._next))

    def arrived(self, number: int) -> bool:
        """Whether `read` would not wait."""
        return int(self._seen[number % self.depth]) >> NUMBER == number + 1

    def read(self, number: int) -> int:
        """The token of this number. Waits for it; raises what went wrong on the device."""
        while not self.arrived(number):
            idle = not self._cuda or torch.cuda.current_stream().query()
            if idle and not self.arrived(number):
                raise HybridlabError(f"token {number} was not given out", "its launch has ended without it",
                                     "report this")
            time.sleep(0)  # captures on another thread go on
        return (int(self._seen[number % self.depth]) & (1 << NUMBER) - 1) - 1
