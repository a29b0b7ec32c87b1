"""Where weights lie: those that one product reads together side by side in memory, so that a library can multiply by
all of them at once, and whether all are still where a graph reads them. Nothing is copied for good: the parameters
become parts of one block, with the values they had."""

from __future__ import annotations

from itertools import chain, product
from operator import is_

import torch
from torch import Tensor

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of one module, as transformers names them


def lay_side_by_side(model: torch.nn.Module) -> None:
    """Lay the projections of every attention of `model` side by side, and those of every gated MLP, weights and
    biases. Memory peaks at one layer's more. What holds their old addresses must not exist yet."""
    for module, names in product(model.modules(), TOGETHER):
        found = [getattr(module, name, None) for name in names]
        if all(type(one) is torch.nn.Linear for one in found):
            for name in ("weight", "bias"):
                parts = [getattr(one, name) for one in found]
                if all(part is not None for part in parts) and len({part.shape[1:] for part in parts}) == 1:
                    _join(parts)


def _join(parts: list[torch.nn.Parameter]) -> None:
    whole = torch.cat([part.data for part in parts])
    for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = place


def joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """The one matrix, or vector, that `parts` are in this order; None if they do not lie side by side."""
    first, place = parts[0], None
    for part in parts:
        if first is None or part is None or not part.is_contiguous() or part.dtype != first.dtype:
            return None
        if place is not None and (part.data_ptr() != place or part.shape[1:] != first.shape[1:]
                                  or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()):
            return None
        place = part.data_ptr() + part.nbytes
    assert first is not None
    return first.as_strided((sum(len(part) for part in parts if part is not None), *first.shape[1:]), first.stride())


class Places:
    """Where every weight of a model lies as of now, and stays while this is held: what reads it by its address may ask
    afterwards. `kept` is asked in each request, and walks no modules: of 32 layers that took 0.7 ms in place of 0.1."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._holders = [held for module in model.modules() for held in (module._modules, module._parameters)]
        self._held = self._now()
        self._weights = list(model.parameters())
        self._memory = [weight.untyped_storage() for weight in self._weights]
        self._addresses = self._lie()

    def kept(self) -> bool:
        """Whether each module and weight is the one of then, at the same address."""
        now = self._now()
        return len(now) == len(self._held) and all(map(is_, now, self._held)) and self._lie() == self._addresses

    def _now(self) -> list[object]:
        return list(chain.from_iterable(held.values() for held in self._holders))

    def _lie(self) -> list[tuple[int, torch.dtype]]:
        return [(weight.data_ptr(), weight.dtype) for weight in self._weights]
