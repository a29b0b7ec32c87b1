"""The state of sampling in device memory: what a draw reads, and the token it writes."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from hybridlab.config import Sampling

PARTS = 256  # programs of a kernel at most, each with 4096 entries or more


class Controls:
    """Fixed buffers of one runtime; `namespace` says whose sampling ops run, plain or JIT."""

    def __init__(self, device: torch.device, namespace: str) -> None:
        self.ops = getattr(torch.ops, namespace)
        self.seed, self.top_k, self.token = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3))
        self.temperature, self.top_p = (torch.ones(1, device=device) for _ in range(2))
        self.work = torch.zeros(3 + 16 * PARTS, dtype=torch.int64, device=device)
        self.random = self.filtered = False

    def set(self, sampling: Sampling, vocabulary: int) -> None:
        self.random = sampling.temperature > 0
        self.filtered = sampling.top_k is not None or sampling.top_p is not None
        if self.random:
            self.seed.fill_(sampling.seed)
            self.temperature.fill_(sampling.temperature)
            self.top_k.fill_(min(sampling.top_k or vocabulary, vocabulary))
            self.top_p.fill_(sampling.top_p or 1.0)

    def as_now(self) -> Controls:
        """The same buffers, drawing as now also when the next request draws otherwise."""
        return copy(self)

    @property
    def mode(self) -> str:
        """How tokens are drawn: what a captured draw bakes in."""
        return ("filtered" if self.filtered else "random") if self.random else "greedy"

    @property
    def buffers(self) -> list[Tensor]:
        """What a draw reads beside the logits, what it works in, and the token it writes."""
        return [self.seed, self.temperature, self.top_k, self.top_p, self.work, self.token]

    def draw(self, logits: Tensor, positions: Tensor) -> None:
        if self.random:
            self.ops.sample.default(logits, self.seed, positions, self.temperature, self.top_k, self.top_p,
                                    self.filtered, self.work, self.token)
        else:
            self.ops.greedy.default(logits, self.work, self.token)
