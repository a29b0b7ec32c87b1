"""Lowering broken on purpose: each mistake must be found by the model's own logits, or refused before it can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

import hybridlab as hl
from hybridlab import experts, lowering, partitioning, tracing, verify
from hybridlab.errors import LoweringError

SETTINGS = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAR = {"sliding_window": 4096}  # a window that no probe of a few tokens reaches
BENT = {**FAR, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
Call = dict[str, Any]  # what one layer's attention is called with


def model_of(name: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SETTINGS, **settings})
    attention = "eager" if name == "gemma2" else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
    return model


def changed(**values: Callable[[Any], Any]) -> Callable[[Call], Call]:
    return lambda call: {**call, **{name: change(call[name]) for name, change in values.items()}}


def bound(**values: Callable[[Any], Any]) -> Callable[[Call], Call]:
    return lambda call: {**call, "bound": call["bound"]._replace(
        **{name: change(getattr(call["bound"], name)) for name, change in values.items()})}


def other_heads(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, dims=1)


MUTANTS: dict[str, tuple[str, dict[str, Any], Callable[[Call], Call]]] = {
    "window ignored": ("mistral", FAR, changed(sliding_window=lambda _: None)),
    "window one too wide": ("mistral", FAR, changed(sliding_window=lambda window: window + 1)),
    "window one too narrow": ("mistral", FAR, changed(sliding_window=lambda window: window - 1)),
    "window on every layer": ("gemma2", BENT, changed(sliding_window=lambda window: window or verify.WINDOW)),
    "window on no layer": ("gemma2", BENT, changed(sliding_window=lambda _: None)),
    "soft-cap ignored": ("gemma2", BENT, changed(softcap=lambda _: None)),
    "soft-cap twice as high": ("gemma2", BENT, changed(softcap=lambda cap: 2 * cap)),
    "scale of the wrong size": ("llama", {}, changed(scaling=lambda scale: scale * 2**-0.5)),
    "scale derived, not asked for": ("granite", {"attention_multiplier": 0.5}, changed(scaling=lambda _: None)),
    "rows one too late": ("llama", {}, bound(positions=lambda rows: (rows + 1).clamp(max=verify.PADDED - 1))),
    "rows one too early": ("llama", {}, bound(positions=lambda rows: (rows - 1).clamp(min=0))),
    "span far too short": ("llama", {}, bound(span=lambda span: span // 2)),
    "span one short": ("llama", {}, bound(span=lambda _: verify.PROBE - 1)),
    "queries of other KV heads": ("llama", {}, changed(key=other_heads, value=other_heads)),
    "one cache for every layer": ("llama", {}, changed(module=lambda _: SimpleNamespace(layer_idx=0))),
    "caches of layers swapped half-way": ("llama", {}, lambda call: {**call, "module": SimpleNamespace(
        layer_idx=(call["module"].layer_idx + (len(call["bound"].positions) == 1)) % 2)}),
    "keys as values": ("llama", {}, lambda call: {**call, "value": call["key"]}),
}


@pytest.fixture
def break_lowering() -> Iterator[Callable[[Callable[[Call], Call]], None]]:
    """Makes the lowered attention of every model call through a mutation, until the test ends."""
    right = lowering._attention(lowering.PLAIN)

    def apply(mutate: Callable[[Call], Call]) -> None:
        def wrong(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None,
                  scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
                  **others: Any) -> tuple[torch.Tensor, None]:
            call = mutate({"module": module, "key": key, "value": value, "scaling": scaling, "softcap": softcap,
                           "sliding_window": sliding_window, "bound": lowering._BOUND.get()})
            token = lowering._BOUND.set(call.pop("bound"))
            try:
                return right(call.pop("module"), query, call.pop("key"), call.pop("value"), mask, **call, **others)
            finally:
                lowering._BOUND.reset(token)

        AttentionInterface.register(lowering.PLAIN, wrong)

    yield apply
    AttentionInterface.register(lowering.PLAIN, right)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_lowering_is_refused(break_lowering: Callable[..., None], mutant: str) -> None:
    """Lowering with one mistake, found only by who reads the text. The same model passes without it."""
    name, settings, mutate = MUTANTS[mutant]
    model = model_of(name, **settings)
    verify.verify_lowered(model)
    break_lowering(mutate)
    with pytest.raises(LoweringError, match=f"lowered logits of {type(model).__name__} differ"):
        verify.verify_lowered(model)


@pytest.mark.parametrize("mutant", ["window one too wide", "scale of the wrong size", "rows one too late",
                                    "span one short", "queries of other KV heads", "keys as values"])
def test_a_broken_lowering_gives_other_tokens(break_lowering: Callable[..., None], mutant: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of tokens that would not see a mistake which verification had missed."""
    name, settings, mutate = MUTANTS[mutant]
    model = model_of(name, **{**settings, "sliding_window": 8} if settings else settings)
    prompt = list(range(3, 23))
    ids = torch.tensor([prompt])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                            eos_token_id=None)[0, len(prompt):].tolist()
    monkeypatch.setattr(partitioning, "verify_lowered", lambda _: None)

    def tokens() -> list[int]:
        with hl.Runtime(model_like(model), arm="graph", capture="sync", buckets=[24], max_len=64) as runtime:
            return runtime.generate(prompt, max_new_tokens=20, stop=[]).ids

    assert tokens() == wanted
    break_lowering(mutate)
    assert tokens() != wanted


def model_like(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights as an instance of its own, which no plan is cached for."""
    return lowering.twin(model)


class Deaf(LlamaForCausalLM):
    """A family that gives logits of every row whatever it is asked for."""

    def forward(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_logits_of_the_padding_are_refused() -> None:
    """A bucket's last row, which is padding, taken for the prompt's."""
    llama = model_of("llama")
    deaf = Deaf(llama.config).eval()
    deaf.load_state_dict(llama.state_dict())
    verify.verify_lowered(llama)
    with pytest.raises(LoweringError, match="lowered logits of Deaf differ"):
        verify.verify_lowered(deaf)


def test_windows_that_disagree_are_refused() -> None:
    """A window changed in the config of a built model: masks obey it, and layers still name the old one."""
    model = model_of("gemma2", **BENT)
    model.config.sliding_window = 64
    with pytest.raises(LoweringError, match="windows of 64, 4096 tokens"):
        verify.verify_lowered(model)


@pytest.mark.parametrize("keyword", ["position_bias", "s_aux", "attention_mask"])
def test_a_tensor_that_attention_would_not_use_is_refused(keyword: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks, a bias or a mask that a family hands to its attention, swallowed without a word."""
    stock = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda *args, **kwargs: stock(
        *args, **{**kwargs, keyword: torch.zeros(4)}))
    with pytest.raises(LoweringError, match=f"LlamaAttention attends with '{keyword}'"):
        tracing.trace_lowered(model_of("llama"), "decode", 32)


@pytest.mark.parametrize("mutant", ["one cache for every layer"])
def test_layers_that_share_a_cache_are_refused_without_weights(break_lowering: Callable[..., None],
                                                               mutant: str) -> None:
    """A model planned by name alone, so never compared with itself, that leaves a layer's cache empty."""
    break_lowering(MUTANTS[mutant][2])
    with pytest.raises(LoweringError, match="attends otherwise than once a layer"):
        hl.partition("random:tiny-llama-3")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_change_with_the_length_are_refused(kind: str) -> None:
    """A graph with the rotary angles of the length that it was captured at."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    model = model_of("llama", rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0,
                                               "original_max_position_embeddings": 64, **factors})
    with pytest.raises(LoweringError, match=f"positions of kind '{kind}'"):
        hl.partition(model)


@pytest.mark.parametrize("rows", [1, 2, 30])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_lowered_experts_give_the_librarys_sum(name: str, rows: int) -> None:
    """Experts without their bias, with weights of another layout, or a row sent to an expert that it did not choose."""
    moe = {"num_local_experts": 4} if name != "qwen3_moe" else {"num_experts": 4, "moe_intermediate_size": 32}
    model = model_of(name, num_experts_per_tok=2, **moe).double()
    layer = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    generator = torch.Generator().manual_seed(rows)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    hidden = torch.randn((rows, 64), generator=generator, dtype=torch.float64)
    chosen = torch.rand((rows, 4), generator=generator).topk(2).indices
    weights = torch.rand((rows, 2), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        layer.config._experts_implementation = "eager"
        wanted = layer(hidden, chosen, weights)
        layer.config._experts_implementation = experts.NAME
        torch.testing.assert_close(layer(hidden, chosen, weights), wanted)
