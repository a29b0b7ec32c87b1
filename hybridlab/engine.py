"""The serving core: one model in one arm, one request at a time, ids in and ids out. `Runtime` hosts it here, or in a
second process by `worker`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from transformers import PreTrainedModel

from hybridlab import kernels, models, verify
from hybridlab.buckets import ladder
from hybridlab.config import COMPILING, RuntimeConfig, Sampling, policy
from hybridlab.counters import Counters
from hybridlab.errors import ConfigError, NonFinite, RuntimeClosed
from hybridlab.executors import Executor, Launched, StockExecutor
from hybridlab.frames import Serve
from hybridlab.fused import refusal
from hybridlab.kernels import ahead
from hybridlab.kernels.gemm import FEWEST
from hybridlab.link import exclusive
from hybridlab.lowered import LoweredExecutor, cuts
from hybridlab.lowering import twin
from hybridlab.machine import ridge
from hybridlab.partitioning import partition, plain
from hybridlab.plan import Plan
from hybridlab.request import Request
from hybridlab.tokens import Seen, Step

DEFAULT_MAX_LEN = 4096  # tokens; a 128 k context would fill the memory with a KV cache that few requests need


class Engine:
    """Executes one plan over one loaded model, counts, and gives tokens. Raises `ConfigError` for a `max_len` or
    `buckets` that the model does not allow, and refuses a model that does not decode as it should."""

    def __init__(self, model: PreTrainedModel, config: RuntimeConfig) -> None:
        self.config = config
        if model.device.type == "cuda" and config.arm in COMPILING:
            ahead.preparing(model.device)
        self.model = _ready(model)
        self.device: torch.device = self.model.device
        context = models.context(self.model) or DEFAULT_MAX_LEN
        self.max_len = config.max_len or min(context, DEFAULT_MAX_LEN)
        if self.max_len > context:
            raise ConfigError(f"max_len is {config.max_len}", f"the model's context is {context} tokens",
                              "ask for no more")
        self.fused = self._fuses()
        few = FEWEST if self.fused and self.device.type == "cuda" else None
        self.buckets = ladder(config.buckets, self.max_len, self._ridge(), few)
        self.counters = Counters()
        self._busy = threading.Lock()
        self.executor = self._make_executor()
        self.closed = False
        self.client_ms: list[float] = []  # nothing stands between: a client's clock is the host's
        self.seen: Seen | None = None     # and whoever measures sees what happens here

    def _ridge(self) -> float | None:
        """Of the machine, if the ladder of buckets is to be made from it. In half precision that of a GPU whose matrix
        units take both kinds is above what a ladder makes of it, so that it need not be measured."""
        if self.config.buckets is not None or self.config.arm == "eager":
            return None
        if (self.device.type == "cuda" and self.model.dtype.itemsize == 2
                and torch.cuda.get_device_capability(self.device) >= (8, 0)):
            return None
        return ridge(self.device, self.model.dtype)

    def _fuses(self) -> bool:
        """Whether steps run through fused kernels. Raises `ConfigError` if they are asked for and cannot be."""
        config = self.config
        if config.kernels == "torch" or config.arm not in COMPILING:
            return False
        problem = refusal(self.model)
        if config.kernels == "fused":  # whose policy cuts nothing, see `cells.require_possible`
            if problem is not None:
                raise ConfigError("kernels is 'fused'", f"{type(self.model).__name__} cannot be: {problem}",
                                  "use kernels='torch'")
            return True
        return problem is None and self.device.type == "cuda" and not cuts(self.model, self._plan, config)

    def _require_lowerable(self) -> None:
        """Raise `LoweringError` or `PlanError` for what this arm cannot do with this model. A plan, which takes longer
        than everything else here, is made where a policy names what only a plan knows."""
        if policy(self.config.policy).between or not plain(self.model):
            self._plan("decode")

    def _make_executor(self) -> Executor:
        """Refuses a model that does not decode as it should, or that cannot be lowered. Fused kernels, whose families
        have all that a step asks for, are compiled meanwhile."""
        if self.config.arm == "eager":
            return StockExecutor(self.model, self.config.run_ahead + 1)
        if not self.fused or self.device.type != "cuda":
            self._require_lowerable()
            return self._lowered()
        executor = self._lowered()
        with self._owned(), ahead.compiling(executor.first_steps(), self.device):
            self._require_lowerable()
        return executor

    def _lowered(self) -> LoweredExecutor:
        return LoweredExecutor(self.model, self._plan, self.config, self.fused, self.buckets, self.max_len,
                               self.counters)

    @cached_property
    def plan(self) -> Plan:
        """The partition of a decode step as this arm runs it; in arm eager, of the stock step. Made when it is first
        asked for, in seconds."""
        return self._plan("decode")

    def _plan(self, phase: str, *length: int) -> Plan:
        arm = self.config.arm
        return partition(self.model, None if arm == "eager" else self.config.policy, phase, *length).for_arm(arm)

    def serve(self, asked: Request | Serve) -> Generator[tuple[Step, float], None, None]:
        """The steps of one request with their milliseconds, timed from when each is asked for; the first from the ids,
        with what it took to check them."""
        with self._owned():
            flying, over, ids = deque[Launched](), False, list[int]()
            start = time.perf_counter_ns() - (asked.spent_ns if isinstance(asked, Request) else 0)
            try:
                with torch.no_grad():
                    self.executor.start(asked.sampling, asked.stop)
                    try:
                        flying.append(self.executor.prefill(asked.ids))
                    finally:
                        self.executor.check()  # while the device works, and in place of an error that follows from it
                for index in range(asked.max_new_tokens):
                    if index:
                        self.require_open()
                        start = time.perf_counter_ns()
                    if index or self.executor.quick:  # else the first token would wait for Python
                        self._launch(flying, asked.max_new_tokens - index)
                    launched = flying.popleft()
                    step = Step(self.executor.read(launched), launched.path, launched.reason)
                    ms = (time.perf_counter_ns() - start) / 1e6
                    if over := step.id < 0:
                        where = verify.culprit(self.model, list(asked.ids) + ids)
                        raise NonFinite(f"the logits of new token {index} hold NaN or infinity",
                                        f"{where}, arm {self.config.arm}, path {step.path}, dtype {self.model.dtype}",
                                        "check the weights, or use a wider dtype")
                    ids.append(step.id)
                    over = step.id in asked.stop
                    yield step, ms
                    if over:
                        return
            finally:
                self.counters.discarded += sum(not (over and launched.ends) for launched in flying)
                if not self.closed:
                    with torch.no_grad():
                        self.executor.finish()

    def _launch(self, flying: deque[Launched], wanted: int) -> None:
        """Launch steps until `run_ahead` of them fly beyond the next to be read, none beyond the `wanted` last ones."""
        with torch.no_grad():
            while len(flying) < min(self.config.run_ahead + 1, wanted):
                flying.extend(self.executor.decode(wanted - len(flying)))

    def device_ms(self, count: int) -> list[float]:
        """Of the last request's first `count` tokens, see `Output.device_ms`."""
        return self.executor.device_ms(count)

    def prepare(self, lengths: list[int], sampling: Sampling) -> None:
        """Capture all that prompts of these lengths need, and sampling of this kind."""
        with self._owned():
            self.executor.check()
            self.executor.capture_for(lengths, sampling)

    @property
    def capturing(self) -> bool:
        """Whether a capture behind requests is asked for or under way."""
        return self.executor.capturing

    def settle(self) -> None:
        """Return when every capture behind requests is in the cache, or has failed."""
        with self._owned():
            self.executor.settle()

    def seal(self, closed: bool) -> None:
        """Allow captures no more, or again."""
        self.executor.seal(closed)

    def require_open(self) -> None:
        if self.closed:
            raise RuntimeClosed("this runtime was closed", "", "make a new Runtime")

    def close(self) -> None:
        """Drop graphs and buffers; closing twice is fine."""
        if not self.closed:
            self.closed = True
            self.executor.close()

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Exclusive use; compilations that happen meanwhile are its own."""
        with exclusive(self._busy):
            before = kernels.compiles()
            try:
                yield
            finally:
                self.counters.compiles += kernels.compiles() - before


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode; one left in training mode keeps its mode, and a twin of the same weights serves."""
    return twin(model) if model.training else model
