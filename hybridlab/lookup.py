"""Which graph serves a step, and what becomes of a miss: captured on the spot, behind the request, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hybridlab import selftest
from hybridlab.admission import Admission
from hybridlab.behind import way
from hybridlab.cache import GraphCache, Job
from hybridlab.config import RuntimeConfig
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed

log = logging.getLogger(__name__)


class Key(NamedTuple):
    """What one captured graph is for: everything that it bakes in."""

    phase: str
    rows: int
    steps: int
    draw: str  # how tokens are drawn, if the graph draws them
    policy: str
    dtype: str
    device: str


class Lookup:
    """The graphs of one runtime. `job_of` makes what is to be captured for a key."""

    def __init__(self, config: RuntimeConfig, device: torch.device, counters: Counters,
                 job_of: Callable[[Key], Job]) -> None:
        self.config, self.counters, self.job_of = config, counters, job_of
        self.cache = GraphCache(device, counters, config.cache_bytes, config.cache_graphs, config.pool,
                                one_by_one=_one_by_one(config, device))
        self.cache.on_adopt, self.cache.on_evict = self._captured, self._evicted
        self.behind = way(config.behind, device)(self.cache)
        self.admission = Admission(config.admission == "every")
        self._waited = False             # the step that is served, for its own capture
        self._wanted: Key | None = None  # by the step that runs without a graph now
        self._first: Key | None = None   # of the request that is served, if its time is that of a hit or a miss

    def captured_now(self) -> str:
        """For the reason of a step whose graph is there: whether it had to wait for it."""
        return ", captured while this step waited" if self._waited else ""

    def miss(self, key: Key, bucketed: bool) -> str | None:
        """None if the graph of `key` is there now, else why not. Captures on the spot if the policy is `sync`."""
        prefill, self._waited = key.phase == "prefill", False
        self._first = key if prefill and bucketed else self._first
        if key in self.cache:
            self.counters.hits += 1
            return None
        self.counters.misses += 1
        if key in self.cache.failed:
            return self.cache.failed[key]
        if not bucketed:
            return f"no bucket holds {key.rows} tokens"
        if self.config.capture == "never":
            return "capture policy is never"
        if prefill and (refusal := self.admission.refusal(key.rows)):
            return refusal
        if self.config.capture == "async":
            self._wanted = key
            return "no graph yet; its capture stays behind this request"
        try:
            self.capture(key)
        except CaptureFailed as error:
            return str(error)
        self._first, self._waited = None, True
        return None

    def several(self, key: Key) -> bool:
        """Whether the graph of several decode steps is there now. Until it is, they are launched one by one."""
        if key in self.cache:
            self.counters.hits += 1
            return True
        if key in self.cache.failed or self.config.capture == "never":
            return False
        self.counters.misses += 1
        if self.config.capture == "async":
            self.behind.ask(self.job_of(key), has_run=False)
        else:
            self.ensure(key)
        return key in self.cache

    def ran(self, same: bool) -> None:
        """A step has run without a graph; `same`: by the very program that its graph would hold."""
        if self._wanted is not None:
            self.behind.ask(self.job_of(self._wanted), has_run=same)
            self._wanted = None

    def _captured(self, key: Any, ms: float) -> None:
        if key.phase == "prefill":
            self.admission.captured(key.rows, ms)

    def _evicted(self, key: Any) -> None:
        self.admission.evicted(key.rows)

    def first_token(self, path: str, ms: float) -> None:
        """The first token of a request took `ms`."""
        if self._first is not None:
            self.admission.saw(self._first.rows, path, ms)
            self._first = None

    def ensure(self, key: Key) -> None:
        """Capture `key` unless it is there or has failed. Raises `CaptureFailed` if the fallback is to raise."""
        if key not in self.cache and key not in self.cache.failed:
            try:
                self.capture(key)
            except CaptureFailed:
                if self.config.fallback == "raise":
                    raise

    def capture(self, key: Key) -> None:
        self.behind.settle()  # of two captures one waits for the other
        self.cache.capture(self.job_of(key))

    def close(self) -> None:
        self.behind.close()
        self.cache.clear()


def _one_by_one(config: RuntimeConfig, device: torch.device) -> bool:
    """Whether graphs are dropped one by one. The self-test is worth its seconds where some will be dropped."""
    limited = config.cache_bytes is not None or config.cache_graphs is not None
    if config.eviction != "auto" or device.type != "cuda" or not limited:
        return config.eviction != "all"
    problem = selftest.one_by_one(config.pool)
    if problem:
        log.warning("graphs are dropped all together · %s · eviction='one' overrides this", problem)
    return not problem
