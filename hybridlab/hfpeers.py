"""Hugging Face transformers as a system of a comparison: its `generate`, and its static cache with torch.compile.

Weights are those of `models.load`, tokens plain greedy search; a prompt's ids go to the device inside the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache

from hybridlab import models
from hybridlab.counters import Counters
from hybridlab.peers import Asked, Give, Peer


class Generate(Peer):
    """`generate` as it is called by default: eager modules, a cache that grows; a streamer hands out each token."""

    reason = "generate launches every operation from Python"

    def __init__(self, asked: Asked) -> None:
        self.model = models.load(asked.config.model, device=asked.config.device, dtype=asked.config.dtype)
        self.model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    def run(self, ids: list[int], count: int, give: Give) -> None:
        given = torch.tensor([ids], device=self.model.device)
        self.model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count,
                            streamer=_Streamer(give))


class _Streamer:
    """What `generate` puts its tokens into, on the host: the prompt first, which is left out."""

    def __init__(self, give: Give) -> None:
        self.give, self.begun = give, False

    def put(self, ids: Tensor) -> None:
        if self.begun:
            self.give(int(ids))
        self.begun = True

    def end(self) -> None:
        """Nothing is held back."""


class Compile(Peer):
    """A static cache, and one decode step with its argmax compiled by torch.compile(mode="reduce-overhead",
    fullgraph=True), as transformers' documentation has it; prefill is eager.

    On a GPU that mode replays CUDA graphs. Inductor leaves them out, and says so in a counter, where it may not: then
    rows say "jit".
    """

    def __init__(self, asked: Asked) -> None:
        self.model = models.load(asked.config.model, device=asked.config.device, dtype=asked.config.dtype)
        self.cache = StaticCache(config=self.model.config, max_cache_len=asked.max_len)
        self._skipped = _count("inductor", "cudagraph_skips")
        self.decode = torch.compile(self._decode, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def run(self, ids: list[int], count: int, give: Give) -> None:
        device = self.model.device
        with torch.no_grad():
            position = torch.arange(len(ids), device=device)[None]
            token = self.prefill(torch.tensor([ids], device=device), position)
            give(int(token))
            at = torch.full((1, 1), len(ids), device=device)
            for _ in range(count - 1):
                token = self.decode(token, at).clone()  # the next replay writes where this one did
                give(int(token))
                at += 1
            self.cache.reset()

    def prefill(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._step(ids, positions)

    def _decode(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._step(ids, positions)

    def _step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[1, T] ids at their positions → [1, 1]: the token that follows, the first of equal ones."""
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True,
                         logits_to_keep=1)
        return out.logits[:, -1].float().argmax(-1, keepdim=True)

    @property
    def counters(self) -> Counters:
        """Compilations of Dynamo: one in a timed request would be no latency."""
        return Counters(compiles=_count("stats", "unique_graphs"))

    def warm_up(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        super().warm_up(prompts, new_tokens)
        skips, cpu = _count("inductor", "cudagraph_skips") - self._skipped, self.model.device.type == "cpu"
        self.path = "jit" if skips or cpu else "graph"
        why = "a CPU has none" if cpu else f"Inductor left out {skips}"
        self.reason = f"compiled, no CUDA graphs: {why}" if skips or cpu else "compiled, replayed as CUDA graphs"
        self.paths = self.first_path, self.path

    @property
    def first_path(self) -> str:
        return "eager"


class CompilePrefill(Compile):
    """The same with the prefill compiled as well, once for all prompt lengths; a graph is recorded for each of them."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        with torch.no_grad():  # a cache that is first used inside a compiled region has no fixed addresses
            self._step(torch.tensor([asked.prompts[0]], device=self.model.device),
                       torch.arange(len(asked.prompts[0]), device=self.model.device)[None])
            self.cache.reset()
        self._compiled = torch.compile(self._prefill, mode="reduce-overhead", fullgraph=True, dynamic=True)

    def prefill(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._compiled(ids, positions).clone()

    def _prefill(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._step(ids, positions)

    @property
    def first_path(self) -> str:
        return self.path


def _count(kind: str, name: str) -> int:
    from torch._dynamo.utils import counters

    found: Any = counters[kind][name]
    return int(found)
