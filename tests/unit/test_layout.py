"""Weights side by side: the same values and the same memory, in one block. And where they lie: what moves is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybridlab import fused, layout, models


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi"])
def test_values_stay_and_nothing_is_held_twice(family: str) -> None:
    """A projection that gets the values of its neighbour; a second copy of the weights."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4} if family == "gpt2" else {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        **({} if family == "phi" else {"num_key_value_heads": 2})}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=128, **sizes)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(9)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        layout.lay_side_by_side(model)
        assert torch.equal(model(ids).logits, wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == sum(p.nbytes for p in model.parameters())
    if family != "gpt2":  # which has one matrix for all three from the start
        attention = model.model.layers[1].self_attn
        parts = tuple(getattr(attention, name).weight for name in layout.TOGETHER[0])
        assert torch.equal(layout.joined(parts), torch.cat(parts))
        assert layout.joined(parts[::-1]) is None
    if family in ("llama", "qwen2"):
        both = [getattr(model.model.layers[1].mlp, name).weight for name in layout.TOGETHER[1]]
        assert torch.equal(layout.joined(tuple(both)), torch.cat(both))


def test_loaded_models_are_laid_out_and_given_ones_left_alone() -> None:
    """A product in three parts for no reason; graphs of somebody else that read addresses which were given up."""
    loaded = models.load("tiny", device="cpu")

    def parts(model: Any) -> tuple[Any, ...]:
        return tuple(getattr(model.model.layers[0].self_attn, name).weight for name in layout.TOGETHER[0])
    assert layout.joined(parts(loaded)) is not None
    assert fused.Layer(loaded.model.layers[0], loaded.config).qkv[1:] == [None, None]
    assert fused.Layer(loaded.model.layers[0], loaded.config).up is None
    given = AutoModelForCausalLM.from_config(loaded.config)
    assert None not in fused.Layer(given.model.layers[0], given.config).qkv
    assert fused.Layer(given.model.layers[0], given.config).up is not None
    before = [p.data_ptr() for p in given.parameters()]
    assert [p.data_ptr() for p in models.load(given, device="cpu").parameters()] == before


def test_neighbours_of_another_block_are_not_joined() -> None:
    """A matrix over memory that belongs to something else."""
    block = torch.arange(48.0).view(6, 8)
    assert torch.equal(layout.joined((block[:2], block[2:3], block[3:])), block)
    assert layout.joined((block[:2], block[3:4], block[4:])) is None
    assert layout.joined((block[:2], None, None)) is None
    assert layout.joined((block[:2], block[2:4, :4], block[4:])) is None
    assert layout.joined((block[:2], block[2:3].clone(), block[3:])) is None
    assert layout.joined((None, None, None)) is None


def test_every_way_of_replacing_a_weight_is_seen() -> None:
    """A module in another's place, a weight more or less, memory moved; and memory given to somebody else while it is
    still read by its address."""
    def change(how: Callable[[torch.nn.Module], Any]) -> bool:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
        places = layout.Places(model)
        assert places.kept()
        how(model)
        return places.kept()

    assert change(lambda model: model[0].weight.data.mul_(2))
    assert not change(lambda model: model.__setitem__(1, torch.nn.Linear(2, 2, bias=False)))
    assert not change(lambda model: setattr(model[1], "weight", torch.nn.Parameter(model[1].weight)))
    assert not change(lambda model: model[1].register_parameter("more", torch.nn.Parameter(torch.ones(1))))
    assert not change(lambda model: model.append(torch.nn.ReLU()))
    assert not change(lambda model: delattr(model[0], "bias"))
    assert not change(lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()))
    layer = torch.nn.Linear(8, 8)
    places, memory = layout.Places(layer), layer.weight.untyped_storage().data_ptr()
    layer.weight.data = torch.ones(8, 8)
    assert memory in [held.data_ptr() for held in places._memory]
