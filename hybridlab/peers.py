"""One system of a comparison in a process of its own: started by one question, then asked request by request.

Whatever it is, it answers as a runtime does and is timed by `measure.serve`: from token ids on the host to the first
new id on the host, and from one id to the next.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hybridlab import conversation, measure, models, nearties, ranges, roofline, tails
from hybridlab.config import RunConfig, build, policy, policy_name
from hybridlab.counters import Counters
from hybridlab.engines import ENGINES, PeersConfig, version
from hybridlab.errors import MeasureError
from hybridlab.runtime import Runtime
from hybridlab.tokens import Output

PROTOCOLS: dict[str, measure.Protocol] = {protocol.metric: protocol for protocol in (measure.TTFT, measure.ITL)}
Give = Callable[[int], None]


class Asked(NamedTuple):
    """What starts a system. `cell`: arm and kernels of one of ours; `prompts`: ids of each that will be asked for;
    `max_len`: rows of the longest request; `folder`: an empty directory of its own; `limits`: it measures those of the
    machine."""

    config: PeersConfig
    cell: dict[str, Any]
    prompts: list[list[int]]
    max_len: int
    folder: Path
    limits: bool


class Peer(ABC):
    """An engine that gives tokens one after the other. `paths`: what runs a first token and the others, `reason`: why,
    as rows name them; `weights`: whose they are."""

    distribution = "transformers"
    paths = ("eager", "eager")
    reason = ""
    weights = "of the model"
    comparable = True  # whether its tokens are those of the model

    @abstractmethod
    def run(self, ids: list[int], count: int, give: Give) -> None:
        """Continue `ids` greedily by `count` tokens, whatever they are, and `give` each once it is on the host."""

    @property
    def counters(self) -> Counters:
        """Since it was started: what `measure` counts in each request."""
        return Counters()

    def generate(self, prompt: Sequence[int], max_new_tokens: int, each: Callable[[], Any] | None = None,
                 **_: Any) -> Output:
        """As `Runtime.generate` answers and times it; `each` is called after every token, outside of its time.

        Raises: MeasureError for an engine that gives more or fewer tokens.
        """
        ids, ms, start = list[int](), list[float](), 0

        def give(token: int) -> None:
            nonlocal start
            ms.append((time.perf_counter_ns() - start) / 1e6)
            ids.append(token)
            if each is not None:
                each()
            start = time.perf_counter_ns()

        start = time.perf_counter_ns()
        self.run(list(prompt), max_new_tokens, give)
        if len(ids) != max_new_tokens:
            raise MeasureError(f"{max_new_tokens} tokens were asked for, {type(self).__name__} gave {len(ids)}",
                               f"prompt of {len(prompt)} tokens", "see what the engine said; it may lack memory")
        first, other = self.paths
        return Output(ids, None, ms[0], ms[1:], [first, *[other] * (len(ids) - 1)], [self.reason] * len(ids), None, [])

    def warm_up(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """All that must have run once before requests are timed: three times each, as graphs are recorded late."""
        for prompt in prompts:
            for _ in range(3):
                self.generate(prompt, new_tokens)

    def notes(self) -> dict[str, Any]:
        """What is to be known of it, JSON-ready."""
        names = dict.fromkeys((self.distribution, "torch", "transformers"))
        return {"versions": {name: version(name) for name in names}, "weights": self.weights,
                "comparable": self.comparable, "reason": self.reason}

    def close(self) -> None:  # noqa: B027
        """Leave nothing running."""


class Ours(Peer):
    """An arm of ours: the runtime itself answers."""

    distribution = "hybridlab"

    def __init__(self, asked: Asked) -> None:
        config = asked.config
        self.model = models.load(config.model, device=config.device, dtype=config.dtype)
        self.limits: dict[str, Any] = {}
        if asked.limits:
            rates = roofline.measure(self.model.device, self.model.dtype, roofline.work(self.model, context=1).bytes)
            self.limits = roofline.of_run(self.model, config.lengths, config.new_tokens, rates)
        self.runtime = Runtime(self.model, policy=config.policy, device=config.device, capture="sync",
                               max_len=asked.max_len, run_ahead=config.run_ahead, **asked.cell)
        kernels = "fused kernels" if self.runtime.fused else "stock modules"
        self.reason = f"policy {policy_name(policy(config.policy))}, {kernels}, run_ahead {config.run_ahead}"
        self.stack = ExitStack()

    def run(self, ids: list[int], count: int, give: Give) -> None:
        for token in self.runtime.stream(ids, max_new_tokens=count, stop=[]):
            give(token.id)

    @property
    def counters(self) -> Counters:
        return self.runtime.counters

    def generate(self, prompt: Sequence[int], max_new_tokens: int, each: Callable[[], Any] | None = None,
                 **_: Any) -> Output:
        return self.runtime.generate(prompt, max_new_tokens=max_new_tokens, stop=[], each=each)

    def warm_up(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.runtime.warm_up(sorted(map(len, prompts)))
        super().warm_up(prompts, new_tokens)
        self.stack.enter_context(self.runtime.sealed())

    def notes(self) -> dict[str, Any]:
        return super().notes() | {"roofline": self.limits, "dtype": str(self.model.dtype).removeprefix("torch.")}

    def close(self) -> None:
        self.stack.close()
        self.runtime.close()


class Serving:
    """Answers questions about one system: "rows" of a request, its "tokens", or a "judgement" on tokens that differ."""

    def __init__(self, peer: Peer, config: PeersConfig, watch: tails.Watch) -> None:
        self.peer, self.config, self.watch = peer, config, watch
        self.protocol = build(RunConfig, {"new_tokens": config.new_tokens, "seed": config.seed})

    def rows(self, ids: list[int], metric: str) -> dict[str, Any]:
        """The rows of one timed request, what happened meanwhile with them."""
        for _ in range(self.config.leading):
            self.peer.generate(ids, 1)
        rows = measure.serve(self.peer, ids, PROTOCOLS[metric], self.protocol, self.watch)
        return {"rows": measure.explained([row | {"profiled": ranges.listening()} for row in rows], self.watch)}

    def tokens(self, ids: list[int]) -> dict[str, Any]:
        return {"ids": self.peer.generate(ids, self.config.new_tokens).ids}

    def judgement(self, ids: list[int], one: list[int], other: list[int]) -> dict[str, Any]:
        """In words: whether rounding may have made two greedy answers differ, see `nearties`."""
        assert isinstance(self.peer, Ours)
        try:
            found = nearties.first_difference(self.peer.model, ids, one, other)
        except torch.OutOfMemoryError:
            return {"near_tie": False, "words": "could not be judged: no memory for the model in float64"}
        finally:
            if self.peer.model.device.type == "cuda":
                torch.cuda.empty_cache()  # the copy was several times the model, and others need the memory
        assert found is not None
        return {"near_tie": found.near_tie,
                "words": f"new token {found.index} is {found.ids[1]} and not {found.ids[0]}, by a margin of "
                         f"{found.margin:.3g} where rounding moves logits by up to {found.tolerance:.3g}"}


def adapter(system: str) -> type[Peer]:
    """The class that drives a system; what is no engine's name is an arm of ours."""
    if system not in ENGINES:
        return Ours
    module, _, name = ENGINES[system].adapter.partition(":")
    found: type[Peer] = getattr(import_module(module), name)
    return found


def main(adapter: Callable[[str], type[Peer]] = adapter) -> None:
    """Answer until nobody asks any more."""
    questions, answer = conversation.answering()
    if next(questions, None) is None:
        return
    answer({})  # what is imported above is there
    if (first := next(questions, None)) is None:
        return
    config = build(PeersConfig, first["config"])
    asked = Asked(config, first["cell"], first["prompts"], first["max_len"], Path(first["folder"]), first["limits"])
    if models.resolve_device(config.device).type == "cpu":
        torch.set_num_threads(config.threads)
    peer: Peer = adapter(first["system"])(asked)  # type: ignore[call-arg]
    try:
        peer.warm_up(asked.prompts, config.new_tokens)
        with measure.frozen_heap(), tails.Watch() as watch:
            serving = Serving(peer, config, watch)
            for _ in range(config.warmup):
                for prompt in asked.prompts:
                    peer.generate(prompt, 1)
            answer(peer.notes())
            for question in questions:
                answer(getattr(serving, question.pop("asked"))(**question))
    finally:
        peer.close()


if __name__ == "__main__":
    main()
