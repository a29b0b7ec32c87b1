"""What a request gives: its tokens, the path that made each, its times, and what a worker saw meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Step(NamedTuple):
    """One token on the host, the path that its forward took, and why."""

    id: int
    path: str
    reason: str


@dataclass(frozen=True)
class Token:
    """One new token: `path` is what ran its forward; `ms` is from the request (first token) or from the moment the
    consumer asked for it (further tokens; a worker asks itself at once) until its id was on the host."""

    id: int
    text: str | None
    path: str
    ms: float
    reason: str = ""


class Happening(NamedTuple):
    """Something of one of `tails.KINDS`; not `exact`: at some time between the stamps, and not all along."""

    kind: str
    start_ns: int
    end_ns: int
    detail: str
    exact: bool


class Seen(NamedTuple):
    """What a second process saw of a request that it served: when each token was there, by the clock that all processes
    of a machine share, what happened meanwhile, and whether a profiler listened."""

    ended_ns: list[int]
    happenings: list[Happening]
    profiled: bool


@dataclass(frozen=True)
class Output:
    """What `generate` gives. `ids` are the new tokens, an end token included, as transformers' `generate` has it.

    ttft_ms: token ids on the host → first new id on the host. itl_ms: the gaps between following ids.
    """

    ids: list[int]
    text: str | None
    ttft_ms: float
    itl_ms: list[float]
    paths: list[str]
    reasons: list[str]
    bucket: int | None
    device_ms: list[float]  # TTFT and ITL by the device's own clock; empty on a CPU and with several steps a launch
    client_ms: list[float] = field(default_factory=list)  # through a worker, by the client's clock: from the request
    # leaving until the first id was back, then from one id to the next; empty without a worker
    seen: Seen | None = None  # by the worker; None without one
