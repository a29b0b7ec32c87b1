"""Fused decode: tokens of the stock model, over its own weights, at one graph a token; or a refusal that says why."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hybridlab as hl
from hybridlab.errors import ConfigError
from tests.helpers import MAX_LEN, NARROW, VOCABULARY, WIDE, WINDOW

BASE = {**NARROW, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "initializer_range": 0.16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": WINDOW,
              "max_window_layers": 1},
    "qwen3": {**WIDE, "num_key_value_heads": 8},
}
PROMPT = list(range(3, 19))
NEW = MAX_LEN - len(PROMPT)  # to the last entry of the KV cache


def build(family: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**BASE, **settings})).eval()


def tokens(model: PreTrainedModel, count: int = NEW) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                         eos_token_id=None, pad_token_id=0)
    return out[0, len(PROMPT):].tolist()


def fused(model: Any, **settings: Any) -> hl.Runtime:
    return hl.Runtime(model, **{"kernels": "fused", "capture": "sync", "max_len": MAX_LEN, "buckets": [MAX_LEN],
                                **settings})


@pytest.mark.parametrize("arm", ["jit", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_stock_model(family: str, arm: str) -> None:
    """A bias, a window, a norm of heads or an angle that the fused operations leave out."""
    model = build(family, **FAMILIES[family])
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)  # as made they are ones and zeros: leaving them out is free
    with fused(model, arm=arm) as runtime:
        out = runtime.generate(PROMPT, max_new_tokens=NEW, stop=[])
        assert out.ids == tokens(model)
        assert runtime.counters.failures == 0
    assert set(out.paths) == {"graph" if arm == "hybrid" else "jit"}


def test_the_last_layer_works_for_the_last_row_alone() -> None:
    """Arithmetic for rows whose logits nobody asks for; or a row before the last one taken for it."""
    model, seen = build("llama"), []
    with fused(model, arm="jit") as runtime:
        program = runtime._executor.program("prefill", MAX_LEN)
        ops = {name: getattr(program.ops, name).default for name in ("project", "residual", "swiglu", "attend_next")}

        class Noted:
            def __getattr__(self, name: str) -> Any:
                def call(x: torch.Tensor, *args: Any) -> None:
                    seen.append((name, x.dim()))
                    ops[name](x, *args)
                return SimpleNamespace(default=call)
        program.ops = Noted()
        assert runtime.generate(PROMPT, max_new_tokens=3, stop=[]).ids == tokens(model, 3)
    whole = [("project", 2), ("attend_next", 2), ("residual", 2), ("swiglu", 2), ("residual", 2)]
    assert seen == whole + whole[:2] + [("residual", 1), ("swiglu", 1), ("residual", 1), ("project", 1)]


def test_a_model_draws_the_same_with_and_without() -> None:
    """Sampling fed by other logits, or at other positions."""
    drawn, model = {}, build("llama")
    for kernels in ("torch", "fused"):
        with fused(model, kernels=kernels) as runtime:
            drawn[kernels] = [runtime.generate(PROMPT, max_new_tokens=NEW, stop=[], **draw).ids
                              for draw in ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.9, "top_p": 0.8})]
    assert drawn["fused"] == drawn["torch"]


def test_one_graph_serves_every_length_and_a_second_request() -> None:
    """Keys of an earlier request attended, or a length baked into the graph."""
    model = build("llama")
    with fused(model, cache_graphs=4) as runtime:
        first = runtime.generate(PROMPT, max_new_tokens=NEW, stop=[]).ids
        other = runtime.generate(PROMPT[:5], max_new_tokens=20, stop=[]).ids
        again = runtime.generate(PROMPT, max_new_tokens=NEW, stop=[]).ids
        assert runtime.counters.captures == 2  # a prefill bucket and decode
    assert first == again == tokens(model)
    assert other != first[:20]


def test_no_weight_is_copied() -> None:
    """A second copy of the weights in memory: 13 GiB for Llama-2-7B."""
    model = build("llama")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    smallest = min(p.numel() for p in model.parameters() if p.dim() == 2)
    with fused(model, max_len=16, buckets=[16]) as runtime:
        program = runtime._executor.program("decode", 1)
        gc.collect()
        own = [t for t in [*vars(program).values(), *program.buffers] if isinstance(t, torch.Tensor)]
        assert all(t.numel() < smallest for t in own if t.untyped_storage().data_ptr() not in weights)


def test_a_prompt_takes_no_more_memory_than_its_largest_product_and_the_tokens() -> None:
    """Queries, gate and what it lets through each with memory of their own: 22 MiB more in the graph of 512 rows."""
    model = build("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=1)
    with fused(model, max_len=64, buckets=[64]) as runtime:
        work = runtime._executor.program("prefill", 64)._work()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in work}
        assert sum(held.values()) == 64 * (64 + 2 * 256) * 4


def with_hook(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(("make", "settings", "message"), [
    (lambda: build("gemma2", head_dim=16), {}, "gemma2 is none of llama"),
    (lambda: build("llama", hidden_act="gelu"), {}, "its activation is gelu"),
    (lambda: build("llama", mlp_bias=True), {}, "gate_proj has a bias"),
    (lambda: with_hook(build("llama")), {}, "mlp has hooks"),
    (lambda: build("llama"), {"policy": "piecewise"}, "policy piecewise keeps operations out of graphs"),
    (lambda: build("llama"), {"arm": "graph"}, "arm graph compiles no kernels"),
])
def test_what_cannot_be_fused_is_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    """Wrong tokens of a model that only looks like a Llama, or a setting that is silently ignored."""
    with pytest.raises(ConfigError, match=message):
        fused(make(), **settings)
