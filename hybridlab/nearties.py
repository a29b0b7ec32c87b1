"""Two greedy answers to one prompt: equal, apart at a near-tie, or apart where rounding cannot explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridlab.lowering import twin


@dataclass(frozen=True)
class Difference:
    """Where two answers part: `ids` are the tokens there, None for an answer that had ended.

    margin: the largest reference logit less the smaller one of `ids`; infinite where an answer had ended.
    tolerance: twice what the dtype of the model moves a logit by, at this position.
    """

    index: int
    ids: tuple[int | None, int | None]
    margin: float
    tolerance: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding may have decided; a NaN never excuses."""
        return self.margin < self.tolerance


def first_difference(model: PreTrainedModel, prompt: Sequence[int], one: Sequence[int],
                     other: Sequence[int]) -> Difference | None:
    """Where greedy answers `one` and `other` to `prompt` first differ, judged by the stock `model`; None if nowhere.

    The rule, from the project's numerics policy (faults.md, section 5, "whole model, real weights, greedy"): tokens
    are equal up to the first position whose reference top-1/top-2 margin is below 2x the measured logit difference,
    and a mismatch at a larger margin fails. So with r the logits of the model in float64 and s those of the model as
    it is, both over the prompt and the common tokens,

        margin = max(r) - min(r[id of one], r[id of other]);  tolerance = 2 max |s - r|;  near-tie: margin < tolerance.

    Where the policy leaves room this is the stricter reading. The difference is measured between two runs of the
    *stock* model: twice that to the logits of the answer under test exceeds the margin whenever tokens differ, however
    wrong that answer is. It is of this position alone. Both ids must be near the top, not only the two best. A margin
    equal to the tolerance, and an answer that ends where the other goes on, fail. transformers computes norms and
    angles in float32 whatever the weights are, so that part of rounding is in no tolerance.

    Needs a float64 copy of the weights if there is a difference, and runs no end-token logic: only ids are compared.
    """
    for index, ids in enumerate(zip_longest(one, other)):
        if ids[0] != ids[1]:
            if None in ids:
                return Difference(index, ids, math.inf, 0.0)
            near, exact = _logits(model, [*prompt, *one[:index]])
            margin = exact.max() - exact[list(ids)].min()
            return Difference(index, ids, float(margin), 2 * float((near - exact).abs().max()))
    return None


def _logits(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """float64 logits of what follows `ids`: of the model as it is, and of the same weights in float64."""
    given = torch.tensor([ids], device=model.device)
    stocks = (twin(model), twin(model, lambda t: t.double() if t.is_floating_point() else t))
    with torch.no_grad():
        near, exact = (stock(input_ids=given, use_cache=False).logits[0, -1].double() for stock in stocks)
    return near, exact
