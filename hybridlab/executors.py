"""How a runtime runs prefill and decode: by the stock modules, or by lowered programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hybridlab.config import Sampling
from hybridlab.lowering import PLAIN
from hybridlab.ranges import span
from hybridlab.readback import Readback
from hybridlab.sampling import Controls
from hybridlab.verify import verify_cached


class Launched(NamedTuple):
    """A step that was launched: where its token will be read, the path that its forward took, and why.

    emitted: its token comes in the middle of a launch; ends: it does not run once a token has ended the request."""

    place: int
    path: str
    reason: str
    emitted: bool = False
    ends: bool = False


class Executor(Protocol):
    """Serves one request at a time: `start`, `prefill` once, then `decode` for every further token.

    `prefill` launches a step and `decode` one or several, never more than `wanted`; `read` waits for the token of one.
    Steps are read in the order of their launch, and no more than the executor was made for are launched and not read.
    `quick`: the next decode step is launched in one call, and runs while the host goes on.
    """

    def check(self) -> None: ...

    def start(self, sampling: Sampling, stop: Iterable[int] = ()) -> None: ...

    def prefill(self, ids: list[int]) -> Launched: ...

    def decode(self, wanted: int) -> list[Launched]: ...

    def read(self, step: Launched) -> int: ...

    def device_ms(self, count: int) -> list[float]: ...

    def finish(self) -> None: ...

    def capture_for(self, lengths: list[int], sampling: Sampling) -> None: ...

    @property
    def quick(self) -> bool: ...

    @property
    def capturing(self) -> bool: ...

    def settle(self) -> None: ...

    def seal(self, closed: bool) -> None: ...

    def close(self) -> None: ...


class StockExecutor:
    """Arm `eager`: the stock modules, a dynamic cache, and preparation and sampling in plain PyTorch."""

    REASON = "arm eager launches every operation from Python"

    def __init__(self, model: PreTrainedModel, depth: int) -> None:
        verify_cached(model)
        self.model = model
        self.controls = Controls(model.device, PLAIN)
        self.tokens = Readback(self.controls.token, depth)

    def check(self) -> None:
        """Nothing to check: the stock modules read whatever weights the model has."""

    def start(self, sampling: Sampling, stop: Iterable[int] = ()) -> None:
        self.tokens.start()
        self.cache, self.at = DynamicCache(config=self.model.config), 0
        self.controls.set(sampling, self.model.config.vocab_size)

    def prefill(self, ids: list[int]) -> Launched:
        device = self.model.device
        self.position = torch.tensor([len(ids) - 1], device=device)
        self.at = len(ids)
        with span("prefill", self.at):
            return self._step(torch.tensor([ids], device=device))

    def decode(self, wanted: int) -> list[Launched]:
        self.at += 1
        with span("decode", self.at):
            self.position += 1
            return [self._step(self.controls.token.clamp(min=0).view(1, 1))]

    def _step(self, ids: Tensor) -> Launched:
        with span("eager"):
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        with span("sampling"):
            self.controls.draw(out.logits[0, -1].float(), self.position)
        return Launched(self.tokens.send(), "eager", self.REASON)

    def read(self, step: Launched) -> int:
        return self.tokens.read(step.place)

    def device_ms(self, count: int) -> list[float]:
        return self.tokens.device_ms(count)

    def finish(self) -> None:
        del self.cache

    def capture_for(self, lengths: list[int], sampling: Sampling) -> None:
        pass

    quick = capturing = False

    def settle(self) -> None:
        pass

    def seal(self, closed: bool) -> None:
        pass

    def close(self) -> None:
        pass
