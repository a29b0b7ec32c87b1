"""Fused steps of random architectures: the stock model's greedy tokens, or apart where rounding alone can decide."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hybridlab as hl
from hybridlab.fused import FusedStep
from hybridlab.nearties import Difference, first_difference
from tests.helpers import MAX_LEN, NARROW, VOCABULARY, WIDE, WINDOW

BASE = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0}
PROMPTS = (1, 5, 18, MAX_LEN - 1)  # one token, within a window, beyond it, all that the KV cache has beside a new one
# These few are given, and the rest is drawn.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "groups of 2": ("llama", {**NARROW, "num_key_value_heads": 2}),
    "groups of 2, window": ("mistral", {**NARROW, "num_key_value_heads": 2, "sliding_window": WINDOW}),
    "no groups, norms of heads": ("qwen3", {**WIDE, "num_key_value_heads": 8}),
    "groups of 8, four biases": ("llama", {**WIDE, "num_key_value_heads": 1, "attention_bias": True}),
}
DTYPES = {"float32": [*SHAPES], "float16": ["no groups, norms of heads"], "bfloat16": ["groups of 2"]}
CASES = [(dtype, shape) for dtype, shapes in DTYPES.items() for shape in shapes]
DRAWS = 5  # architectures of each case
EXACT = {"float32": 0.95, "float16": 0.75, "bfloat16": 0.5}  # of the texts; rounding may decide some, never most


class Compared(NamedTuple):
    """One prompt of one architecture; `apart` is None for equal tokens."""

    what: str
    wanted: list[int]
    apart: Difference | None


def architecture(dtype: str, shape: str, draw: int) -> PreTrainedModel:
    """Depth, angles, tied embeddings and weights are drawn; norms and biases too, as theirs by default change nothing.

    Weights are so large that every layer moves the tokens.
    """
    family, given = SHAPES[shape]
    drawn = random.Random(f"{shape} {draw}")
    settings = {"num_hidden_layers": drawn.randint(1, 3), "tie_word_embeddings": drawn.random() < 0.5,
                "rope_parameters": {"rope_type": "default", "rope_theta": drawn.choice([30.0, 1e4, 1e6])},
                "initializer_range": drawn.uniform(0.12, 0.25)}
    torch.manual_seed(drawn.randrange(1 << 30))
    config = AutoConfig.for_model(family, **BASE, **given, **settings)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.4)
    return model.to(getattr(torch, dtype))


def stock(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                         eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt):].tolist()


def compared(dtype: str, shape: str, draw: int, lengths: tuple[int, ...] = PROMPTS,
             buckets: tuple[int, ...] = (MAX_LEN,)) -> list[Compared]:
    """Greedy texts of one architecture, as long as the KV cache allows."""
    model, what, found = architecture(dtype, shape, draw), f"{dtype}, {shape}, draw {draw}", []
    ids = random.Random(what)
    with hl.Runtime(model, arm="hybrid", policy="full", kernels="fused", capture="sync", max_len=MAX_LEN,
                    buckets=buckets) as runtime:
        for length in lengths:
            prompt, count = [ids.randrange(3, VOCABULARY) for _ in range(length)], MAX_LEN - length
            out = runtime.generate(prompt, max_new_tokens=count, stop=[])
            assert set(out.paths) == {"graph"}
            wanted = stock(model, prompt, count)
            found.append(Compared(f"{what}, {length} tokens", wanted,
                                  first_difference(model, prompt, out.ids, wanted)))
    return found


def unexcused(found: list[Compared]) -> list[Compared]:
    return [c for c in found if c.apart is not None and not c.apart.near_tie]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: pytest.FixtureRequest) -> tuple[str, list[Compared]]:
    dtype, shape = request.param
    return dtype, [c for draw in range(DRAWS) for c in compared(dtype, shape, draw)]


def test_tokens_are_those_of_the_stock_model(case: tuple[str, list[Compared]],
                                             record_property: pytest.RecordProperty) -> None:
    """A size, ratio of heads, width of heads, bias, window or angle that only one way of computing gets right."""
    dtype, found = case
    assert not unexcused(found)
    exact = sum(c.apart is None for c in found)
    record_property("exact", f"{exact} of {len(found)}")
    assert exact >= EXACT[dtype] * len(found)


def test_the_tokens_can_tell_a_wrong_model(case: tuple[str, list[Compared]]) -> None:
    """Equality of texts that repeat one token, whatever the layers do."""
    rich = [len(set(c.wanted)) > 5 for c in case[1] if len(c.wanted) > 15]
    assert sum(rich) > 0.6 * len(rich)


def test_a_prompt_of_one_token_in_a_bucket_of_its_own() -> None:
    """A prefill of one row that takes the decode step's kernels, over a cache as short as itself."""
    found = compared("float32", "groups of 2", 0, lengths=(1, 5), buckets=(1, MAX_LEN))
    assert [c.apart for c in found] == [None, None]


def next_angles(step: FusedStep) -> None:
    if step.rows == 1:  # of prompts as well, it would be right: only distances count
        step.cos, step.sin = step.cos.roll(-1, 0), step.sin.roll(-1, 0)


def slightly_warm(step: FusedStep) -> None:
    for layer in step.layers:
        layer.q_gain = layer.q_gain * 0.98


def large_eps(step: FusedStep) -> None:
    for layer in step.layers:
        norm = layer.norms[1]
        layer.norms[1] = SimpleNamespace(weight=norm.weight, variance_epsilon=1e4 * norm.variance_epsilon)


@pytest.mark.parametrize(("dtype", "shape", "fault"), [
    ("float32", "groups of 2", next_angles), ("float32", "groups of 2", large_eps),
    ("float32", "no groups, norms of heads", slightly_warm),
    ("float16", "no groups, norms of heads", next_angles), ("bfloat16", "groups of 2", next_angles),
])
def test_a_wrong_operation_is_no_near_tie(dtype: str, shape: str, fault: Callable[[FusedStep], None],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule so generous that it excuses what it is there to find."""
    built = FusedStep.__init__

    def wrong(step: FusedStep, *args: Any) -> None:
        built(step, *args)
        fault(step)

    monkeypatch.setattr(FusedStep, "__init__", wrong)
    assert unexcused([c for draw in range(2) for c in compared(dtype, shape, draw)])
