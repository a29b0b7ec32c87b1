"""Prefill, decode and sampling: one runtime is one arm of the ablation, serving one request at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from hybridlab import kernels, models, verify
from hybridlab.buckets import bucket_for, captured_ahead, ladder
from hybridlab.cells import require_possible
from hybridlab.config import Policy, RuntimeConfig, Sampling, build
from hybridlab.counters import Counters
from hybridlab.errors import ConfigError, EngineBusy, NonFinite, PromptError, RuntimeClosed
from hybridlab.executors import Executor, Launched, StockExecutor
from hybridlab.kernels.gemm import FEWEST
from hybridlab.lowered import LoweredExecutor, fuses
from hybridlab.lowering import twin
from hybridlab.machine import ridge
from hybridlab.partitioning import partition
from hybridlab.plan import Plan
from hybridlab.request import Request, request
from hybridlab.tokens import Output, Step, Token

DEFAULT_MAX_LEN = 4096  # tokens; a 128 k context would fill the memory with a KV cache that few requests need


class Runtime:
    """One arm over one model. See `RuntimeConfig` for the settings, among them those of the graph cache that are not
    named here; each is checked before any work starts.

    `model` is whatever `hybridlab.load` takes; an instantiated model is never changed. A context manager.
    """

    def __init__(self, model: Any, arm: str = "hybrid", policy: str | Policy = "whole", device: str = "auto",
                 dtype: str | None = None, kernels: str = "auto", buckets: Iterable[int] | str | None = None,
                 capture: str = "async", cache_bytes: int | None = None, max_len: int | None = None,
                 fallback: str = "jit", process: str = "here", run_ahead: int = 0, **cache: Any) -> None:
        if isinstance(buckets, Iterable) and not isinstance(buckets, str):
            buckets = tuple(buckets)
        self.config = build(RuntimeConfig, {
            "arm": arm, "policy": policy, "device": device, "dtype": dtype, "kernels": kernels, "buckets": buckets,
            "capture": capture, "cache_bytes": cache_bytes, "max_len": max_len, "fallback": fallback,
            "process": process, "run_ahead": run_ahead, **cache,
        })
        require_possible(self.config)
        self.model = _ready(models.load(model, device=device, dtype=dtype))
        self.device: torch.device = self.model.device
        context = models.context(self.model) or DEFAULT_MAX_LEN
        self.max_len = max_len or min(context, DEFAULT_MAX_LEN)
        if self.max_len > context:
            raise ConfigError(f"max_len is {max_len}", f"the model's context is {context} tokens", "ask for no more")
        self.fused = arm != "eager" and fuses(self.model, self.plan, self.config)
        few = FEWEST if self.fused and self.device.type == "cuda" else None
        self.buckets = ladder(self.config.buckets, self.max_len, self._ridge(), few)
        self.counters = Counters()
        self._executor = self._make_executor()
        self._busy = threading.Lock()
        self._closed = False
        if capture == "ahead":
            self._warm_up_ahead()

    def _ridge(self) -> float | None:
        """Of the machine, if the ladder of buckets is to be made from it."""
        if self.config.buckets is not None or self.config.arm == "eager":
            return None
        return ridge(self.device, self.model.dtype)

    def _warm_up_ahead(self) -> None:
        """What requests may need: each bucket, of exact lengths those that `captured_ahead` names, and where a graph
        holds the draw, draws of each kind. Any other length is captured when it is first asked for."""
        lengths = captured_ahead(self.buckets, exact=self.config.buckets == "exact")
        draws: list[dict[str, Any]] = [{}]
        if any(op.role == "sample" and op.path == "graph" for op in self.plan.ops):
            draws += [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
        for draw in draws:
            self.warm_up(lengths, **draw)

    def _make_executor(self) -> Executor:
        """Refuses a model that does not decode as it should, or that cannot be lowered."""
        if self.config.arm == "eager":
            return StockExecutor(self.model, self.config.run_ahead + 1)
        return LoweredExecutor(self.model, self._plan, self.config, self.fused, self.buckets, self.max_len,
                               self.counters)

    @cached_property
    def plan(self) -> Plan:
        """The partition of a decode step as this arm runs it; in arm eager, of the stock step."""
        return self._plan("decode")

    def _plan(self, phase: str, *length: int) -> Plan:
        arm = self.config.arm
        return partition(self.model, None if arm == "eager" else self.config.policy, phase, *length).for_arm(arm)

    def generate(self, prompt: str | Iterable[int], max_new_tokens: int = 32, temperature: float = 0.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int = 0,
                 stop: Iterable[int] | None = None, each: Callable[[], Any] | None = None) -> Output:
        """Continue `prompt` (text, or token ids). temperature 0 is greedy; stop=None stops at the model's own end
        tokens, stop=[] never. Sampled tokens depend on (seed, position) only, so every arm draws the same ones.
        `each` is called after every new id, outside of its time and of the next one's."""
        asked = self._request(prompt, max_new_tokens, stop, temperature, top_k, top_p, seed)
        taken = []
        for timed in self._serve(asked):
            taken.append(timed)
            if each is not None:
                each()
        ids = [step.id for step, _ in taken]
        return Output(
            ids=ids, text=self._text(ids), ttft_ms=taken[0][1], itl_ms=[ms for _, ms in taken[1:]],
            paths=[step.path for step, _ in taken], reasons=[step.reason for step, _ in taken],
            bucket=self.bucket_for(len(asked.ids)), device_ms=self._executor.device_ms(len(ids)))

    def stream(self, prompt: str | Iterable[int], max_new_tokens: int = 32, temperature: float = 0.0,
               top_k: int | None = None, top_p: float | None = None, seed: int = 0,
               stop: Iterable[int] | None = None) -> Iterator[Token]:
        """As `generate`, token by token. Bad input is refused here, before the first token is asked for."""
        asked = self._request(prompt, max_new_tokens, stop, temperature, top_k, top_p, seed)
        return self._stream(asked)

    def _stream(self, asked: Request) -> Iterator[Token]:
        ids, shown = list[int](), ""
        with closing(self._serve(asked)) as steps:  # from Python 3.12 on, closing this alone would leave them open
            for step, ms in steps:
                ids.append(step.id)
                text = self._text(ids)
                piece = None
                if text is not None:
                    # A character may span several tokens: hold its bytes back until it is whole.
                    whole = text.rstrip("\ufffd") if len(ids) < asked.max_new_tokens else text
                    piece, shown = whole[len(shown):], max(shown, whole, key=len)
                yield Token(step.id, piece, step.path, ms, step.reason)

    def warm_up(self, lengths: Iterable[int], temperature: float = 0.0, top_k: int | None = None,
                top_p: float | None = None) -> None:
        """Capture and compile all that prompts of these lengths need, and sampling of this kind."""
        lengths = self._lengths(lengths)
        sampling = build(Sampling, {"temperature": temperature, "top_k": top_k, "top_p": top_p})
        with self._owned():
            self._executor.check()
            self._executor.capture_for(lengths, sampling)
        for length in {self.bucket_for(n) or n: n for n in lengths}.values():
            new = min(2, self.max_len - length)
            self.generate([0] * length, max_new_tokens=new, temperature=temperature, top_k=top_k, top_p=top_p, stop=[])

    def _lengths(self, lengths: Iterable[int]) -> list[int]:
        """Checked lengths, each with room for one new token."""
        self._require_open()
        lengths = list(lengths) if isinstance(lengths, Iterable) else [lengths]
        for length in lengths:
            if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= self.max_len:
                raise PromptError(f"a prompt length to warm up for is {length!r}",
                                  f"the KV cache holds {self.max_len} tokens", "give whole numbers from 1 to that")
        return sorted({min(n, self.max_len - 1) for n in lengths} - {0})

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeClosed("this runtime was closed", "", "make a new Runtime")

    def bucket_for(self, length: int) -> int | None:
        """The bucket that a prompt of `length` tokens is padded to; None in arm eager, and beyond the largest."""
        return None if self.config.arm == "eager" else bucket_for(length, self.buckets)

    @property
    def capturing(self) -> bool:
        """Whether a capture behind requests is asked for or under way."""
        return self._executor.capturing

    def settle(self) -> None:
        """Return when every capture behind requests is in the cache, or has failed."""
        self._require_open()
        with self._owned():
            self._executor.settle()

    @contextmanager
    def sealed(self) -> Iterator[None]:
        """A region in which nothing may be captured: what would be raises `CaptureClosed`. For timing what is warm."""
        self._executor.seal(True)
        try:
            yield
        finally:
            self._executor.seal(False)

    def close(self) -> None:
        """Drop graphs and buffers. The runtime serves nothing afterwards; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._executor.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, prompt: Any, max_new_tokens: int, stop: Iterable[int] | None, temperature: float,
                 top_k: int | None, top_p: float | None, seed: int) -> Request:
        self._require_open()
        return request(self.model, prompt, self.max_len, max_new_tokens, stop,
                       temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)

    def _serve(self, asked: Request) -> Generator[tuple[Step, float], None, None]:
        """The steps of one request with their milliseconds, timed from when each is asked for."""
        with self._owned():
            flying, over, ids = deque[Launched](), False, list[int]()
            try:
                self._executor.check()
                start = time.perf_counter_ns()
                with torch.no_grad():
                    self._executor.start(asked.sampling, asked.stop)
                    flying.append(self._executor.prefill(asked.ids))
                for index in range(asked.max_new_tokens):
                    if index:
                        self._require_open()
                        start = time.perf_counter_ns()
                        self._launch(flying, asked.max_new_tokens - index)
                    launched = flying.popleft()
                    step = Step(self._executor.read(launched), launched.path, launched.reason)
                    ms = (time.perf_counter_ns() - start) / 1e6
                    if over := step.id < 0:
                        where = verify.culprit(self.model, asked.ids + ids)
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
                if not self._closed:
                    with torch.no_grad():
                        self._executor.finish()

    def _launch(self, flying: deque[Launched], wanted: int) -> None:
        """Launch steps until `run_ahead` of them fly beyond the next to be read, none beyond the `wanted` last ones."""
        with torch.no_grad():
            while len(flying) < min(self.config.run_ahead + 1, wanted):
                flying.extend(self._executor.decode(wanted - len(flying)))

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Exclusive use of this runtime; compilations that happen meanwhile are its own."""
        if not self._busy.acquire(blocking=False):
            raise EngineBusy("this runtime is serving another request", "a runtime serves one at a time",
                             "finish or close the other stream first, or make another Runtime")
        before = kernels.compiles()
        try:
            yield
        finally:
            self.counters.compiles += kernels.compiles() - before
            self._busy.release()

    def _text(self, ids: list[int]) -> str | None:
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return None
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode; one left in training mode keeps its mode, and a twin of the same weights serves."""
    return twin(model) if model.training else model
