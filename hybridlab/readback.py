"""Tokens on their way to the host, which may launch further steps before it reads them."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """A ring of `depth` places on the host for the values of `token`, int64 [1] on any device.

    On a GPU a value travels behind the step that wrote it, into pinned memory, and only `read` waits; so steps that
    overwrite `token` can be launched meanwhile, as long as no more than `depth` values are under way.
    """

    def __init__(self, token: Tensor, depth: int) -> None:
        self.token, self.depth, self._next = token, depth, 0
        self._cuda = token.device.type == "cuda"
        self._host = torch.zeros(depth, dtype=torch.int64, pin_memory=self._cuda)
        self._arrived = [torch.cuda.Event() for _ in range(depth)] if self._cuda else []

    def send(self, value: Tensor | None = None) -> int:
        """Send what the launched steps leave in `token`, or in `value`, like it; returns the place to read it from."""
        place, self._next = self._next, (self._next + 1) % self.depth
        self._host[place:place + 1].copy_(self.token if value is None else value, non_blocking=True)
        if self._cuda:
            self._arrived[place].record()
        return place

    def arrived(self, place: int) -> bool:
        """Whether `read` would not wait."""
        return not self._cuda or self._arrived[place].query()

    def read(self, place: int) -> int:
        """The value sent to `place`; waits until it has arrived."""
        if self._cuda:
            self._arrived[place].synchronize()
        return int(self._host[place])
