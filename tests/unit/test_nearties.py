"""The margin rule: rounding may decide between two tokens of equal merit, and excuses nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hybridlab.nearties import Difference, first_difference

PROMPT = [5, 9, 3, 30]
TEXT = [7, 41, 12, 8]  # common tokens need not be greedy ones: the rule only reads what follows them


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                                  initializer_range=0.2, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def ranked(model: PreTrainedModel, text: list[int]) -> list[int]:
    """All ids by their logit after `text`, the best first."""
    with torch.no_grad():
        return model(torch.tensor([[*PROMPT, *text]])).logits[0, -1].argsort(descending=True).tolist()


def rival(model: PreTrainedModel, best: int, other: int, factor: float) -> None:
    """Make the logit of `other` that of `best` times `factor`, wherever the model is."""
    head = model.lm_head.weight
    head[other] = head[best] * factor


def apart(model: PreTrainedModel, text: list[int], one: int, other: int) -> Difference:
    """The difference of two texts that part after `text`, and go on unlike."""
    found = first_difference(model, PROMPT, [*text, one, 1, 2], [*text, other, 3, 4])
    assert found is not None
    assert (found.index, found.ids) == (len(text), (one, other))
    return found


@pytest.mark.parametrize("text", [[], TEXT], ids=["at once", "later"])
def test_a_planted_near_tie_is_told_from_a_wrong_token(model: PreTrainedModel, text: list[int]) -> None:
    """A correct arm that fails by chance, or a wrong one that is excused; at index 0 as well."""
    best, *_, other = ranked(model, text)
    plain = apart(model, text, best, other)
    assert not plain.near_tie
    rival(model, best, other, 1 - 2 ** -23)
    tie = apart(model, text, best, other)
    assert tie.near_tie
    assert 0 < tie.margin < tie.tolerance < 1e-4 < plain.margin


def test_the_order_of_the_answers_changes_no_judgement(model: PreTrainedModel) -> None:
    """A margin with a sign: every mismatch of one order would be below the tolerance."""
    best, *_, other = ranked(model, TEXT)
    one, two = apart(model, TEXT, best, other), apart(model, TEXT, other, best)
    assert (one.margin, one.tolerance) == (two.margin, two.tolerance)
    assert one.margin > 0


def test_both_must_be_near_the_top(model: PreTrainedModel) -> None:
    """Two tokens as bad as each other, excused because they tie; or the best two tie and a third is excused."""
    best, second, *_, low, lowest = ranked(model, TEXT)
    rival(model, low, lowest, 1.0)
    assert not apart(model, TEXT, low, lowest).near_tie
    rival(model, best, second, 1 - 2 ** -23)
    assert not apart(model, TEXT, best, low).near_tie


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tolerance_is_what_the_dtype_rounds(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """One tolerance for all dtypes: half precision always fails, or float32 never does."""
    model.to(dtype)
    best, *_, other = ranked(model, TEXT)
    rival(model, best, other, 1 - torch.finfo(dtype).eps)
    half = apart(model, TEXT, best, other)
    single = apart(model.float(), TEXT, best, other)
    assert half.near_tie
    assert not single.near_tie
    assert half.margin == pytest.approx(single.margin)  # the reference is float64 either way
    assert half.tolerance > 100 * single.tolerance


def test_float64_has_no_near_tie(model: PreTrainedModel) -> None:
    """A tolerance that is not measured: of a model against itself it is nothing."""
    best, *_, other = ranked(model.double(), TEXT)
    rival(model, best, other, 1 - 2 ** -40)
    found = apart(model, TEXT, best, other)
    assert found.tolerance == 0.0 < found.margin < 1e-9
    assert not found.near_tie


def test_equal_answers(model: PreTrainedModel) -> None:
    """A difference where there is none, empty answers included."""
    assert first_difference(model, PROMPT, TEXT, list(TEXT)) is None
    assert first_difference(model, PROMPT, [], []) is None


def test_an_answer_that_ends_early_is_wrong(model: PreTrainedModel) -> None:
    """A truncated answer that passes, as all of it is right."""
    short = first_difference(model, PROMPT, TEXT[:2], TEXT)
    assert short == Difference(2, (None, TEXT[2]), math.inf, 0.0)
    assert not short.near_tie
    assert first_difference(model, PROMPT, TEXT, []) == Difference(0, (TEXT[0], None), math.inf, 0.0)


def test_a_difference_before_an_early_end_is_judged_by_its_logits(model: PreTrainedModel) -> None:
    """Lengths compared first: an arm that took the other token of a near-tie, an end token, would fail."""
    best, *_, other = ranked(model, TEXT)
    rival(model, best, other, 1 - 2 ** -23)
    found = first_difference(model, PROMPT, [*TEXT, best], [*TEXT, other, 5, 6])
    assert found is not None
    assert found.near_tie


def test_broken_weights_excuse_nothing(model: PreTrainedModel) -> None:
    """NaN compared with a tolerance of NaN."""
    model.model.norm.weight.fill_(math.nan)
    assert not apart(model, TEXT, 3, 4).near_tie


def test_the_model_is_left_alone(model: PreTrainedModel) -> None:
    """A model that serves in float64, or out of training mode, after it was asked once."""
    model.train()
    before = {name: (t.data_ptr(), t.dtype) for name, t in model.state_dict().items()}
    found = apart(model, TEXT, 3, 4)
    assert {name: (t.data_ptr(), t.dtype) for name, t in model.state_dict().items()} == before
    assert model.training
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.margin = 0.0
