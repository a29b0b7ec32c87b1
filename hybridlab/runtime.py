"""The public runtime: text or ids in, text and ids out, one request at a time, served here or by a second process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from hybridlab import models, outlines
from hybridlab.buckets import bucket_for, captured_ahead, finite
from hybridlab.cells import require_possible
from hybridlab.client import Client
from hybridlab.config import Policy, RuntimeConfig, Sampling, build
from hybridlab.config import policy as named_policy
from hybridlab.counters import Counters
from hybridlab.engine import DEFAULT_MAX_LEN as DEFAULT_MAX_LEN
from hybridlab.engine import Engine
from hybridlab.errors import PromptError
from hybridlab.executors import Executor
from hybridlab.frames import Build
from hybridlab.plan import Plan
from hybridlab.policies import left_out
from hybridlab.request import Request, request
from hybridlab.tokens import Output, Step, Token


class Runtime:
    """One arm over one model. See `RuntimeConfig` for the settings, among them those of the graph cache that are not
    named here; each is checked before any work starts.

    `model` is whatever `hybridlab.load` takes; an instantiated model is never changed. A context manager.

    process="worker": the same, served by a second process that has weights, graphs and captures; here stay tokenizer,
    checks and text, and `model` has no weights. Such a process loads the model by its name; of an instantiated one on a
    CPU it gets a copy as it is now. Where it ends or hangs, every call raises `WorkerDied` or `WorkerTimeout`.
    """

    def __init__(self, model: Any, arm: str = "hybrid", policy: str | Policy = "whole", device: str = "auto",
                 dtype: str | None = None, kernels: str = "auto", buckets: Iterable[int] | str | None = None,
                 capture: str = "async", cache_bytes: int | None = None, max_len: int | None = None,
                 fallback: str = "jit", process: str = "here", run_ahead: int = 0, **cache: Any) -> None:
        if isinstance(buckets, Iterable) and not isinstance(buckets, str):
            buckets = finite("buckets", buckets)
        self.config = build(RuntimeConfig, {
            "arm": arm, "policy": policy, "device": device, "dtype": dtype, "kernels": kernels, "buckets": buckets,
            "capture": capture, "cache_bytes": cache_bytes, "max_len": max_len, "fallback": fallback,
            "process": process, "run_ahead": run_ahead, **cache,
        })
        require_possible(self.config)
        self._engine: Engine | Client
        if process == "worker":
            self.model, self._engine = _apart(model, self.config)
        else:
            self._engine = Engine(models.load(model, device=device, dtype=dtype), self.config)
            self.model = self._engine.model
        self.device: torch.device = torch.device(self._engine.device)
        self.max_len, self.fused = self._engine.max_len, self._engine.fused
        self.buckets = tuple(self._engine.buckets)
        if capture == "ahead":
            try:
                self._warm_up_ahead()
            except BaseException:  # no one has this runtime, so no one else will close it
                self.close()
                raise

    def _warm_up_ahead(self) -> None:
        """What requests may need: each bucket, of exact lengths those that `captured_ahead` names, and where a graph
        holds the draw, draws of each kind. Any other length is captured when it is first asked for."""
        lengths = captured_ahead(self.buckets, exact=self.config.buckets == "exact")
        draws: list[dict[str, Any]] = [{}]
        if "sample" not in left_out(named_policy(self.config.policy), self.config.arm, lambda: self.plan):
            draws += [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
        for draw in draws:
            self.warm_up(lengths, **draw)

    @property
    def counters(self) -> Counters:
        """What was done so far; by a worker, as of its last token or answer."""
        return self._engine.counters

    @property
    def worker_pid(self) -> int | None:
        """The process that serves; None if that is this one."""
        return self._engine.link.pid if isinstance(self._engine, Client) else None

    @property
    def _executor(self) -> Executor:
        """For protocols that look inside; here only."""
        assert isinstance(self._engine, Engine)
        return self._engine.executor

    @cached_property
    def plan(self) -> Plan:
        """The partition of a decode step as this arm runs it; in arm eager, of the stock step. Made when it is first
        asked for, in seconds."""
        return self._engine.plan

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
            bucket=self.bucket_for(len(asked.ids)), device_ms=self._engine.device_ms(len(ids)),
            client_ms=self._engine.client_ms, seen=self._engine.seen)

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
        self._engine.prepare(lengths, sampling)
        for length in {self.bucket_for(n) or n: n for n in lengths}.values():
            new = min(2, self.max_len - length)
            self.generate([0] * length, max_new_tokens=new, temperature=temperature, top_k=top_k, top_p=top_p, stop=[])

    def _lengths(self, lengths: Iterable[int]) -> list[int]:
        """Checked lengths, each with room for one new token."""
        self._engine.require_open()
        lengths = list(finite("warm_up", lengths)) if isinstance(lengths, Iterable) else [lengths]
        for length in lengths:
            if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= self.max_len:
                raise PromptError(f"a prompt length to warm up for is {length!r}",
                                  f"the KV cache holds {self.max_len} tokens", "give whole numbers from 1 to that")
        return sorted({min(n, self.max_len - 1) for n in lengths} - {0})

    def bucket_for(self, length: int) -> int | None:
        """The bucket that a prompt of `length` tokens is padded to; None in arm eager, and beyond the largest."""
        return None if self.config.arm == "eager" else bucket_for(length, self.buckets)

    @property
    def capturing(self) -> bool:
        """Whether a capture behind requests is asked for or under way."""
        return self._engine.capturing

    def settle(self) -> None:
        """Return when every capture behind requests is in the cache, or has failed."""
        self._engine.require_open()
        self._engine.settle()

    @contextmanager
    def sealed(self) -> Iterator[None]:
        """A region in which nothing may be captured: what would be raises `CaptureClosed`. For timing what is warm."""
        self._engine.seal(True)
        try:
            yield
        finally:
            self._engine.seal(False)

    def close(self) -> None:
        """Drop graphs and buffers. The runtime serves nothing afterwards; closing twice is fine."""
        self._engine.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, prompt: Any, max_new_tokens: int, stop: Iterable[int] | None, temperature: float,
                 top_k: int | None, top_p: float | None, seed: int) -> Request:
        self._engine.require_open()
        return request(self.model, prompt, self.max_len, max_new_tokens, stop,
                       temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)

    def _serve(self, asked: Request) -> Generator[tuple[Step, float], None, None]:
        """The steps of one request with their milliseconds, see `Engine.serve`."""
        return self._engine.serve(asked)

    def _text(self, ids: list[int]) -> str | None:
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return None
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _apart(model: Any, config: RuntimeConfig) -> tuple[PreTrainedModel, Client]:
    """The model without weights, and a worker that has them."""
    with outlines.sent(model, config) as (outline, folder, source):
        client = Client(config, lambda: Build(config=config, threads=torch.get_num_threads(), **source()), folder)
    return outline.to(getattr(torch, client.dtype)), client
