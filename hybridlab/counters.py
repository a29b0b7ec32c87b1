"""What a runtime did, as numbers: the proof of which path served a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Counts since the runtime started; `graph_bytes` is what captured graphs hold now, beyond weights and KV cache."""

    captures: int = 0      # graphs captured
    capture_ms: float = 0  # spent capturing, warm-up and instantiation included
    replays: int = 0       # graph launches
    hits: int = 0          # steps whose graph was there
    misses: int = 0        # steps whose graph was not
    evictions: int = 0     # graphs dropped for room
    fallbacks: int = 0     # steps that should have replayed and did not
    failures: int = 0      # captures that failed; their keys are not tried again
    compiles: int = 0      # JIT compilations
    discarded: int = 0     # steps launched ahead of a token that ended the request
    graphs: int = 0        # held now
    graph_bytes: int = 0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __getitem__(self, name: str) -> float:
        return self.as_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_dict())
