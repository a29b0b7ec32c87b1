"""Families of decoders: each arm and policy gives `model.generate`'s tokens, or the family is refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hybridlab as hl
from hybridlab import lowering, tracing
from hybridlab.errors import LoweringError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 2}
SLIDING = {"sliding_window": 32}
ALTERNATING = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, **SLIDING},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 32},
    "gemma2": {**GROUPED, **ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0,
               "attn_implementation": "eager"},  # transformers 5.17 would drop the soft-cap in sdpa
    "gemma3_text": {**GROUPED, **ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 128},
    "gpt_neox": {"num_attention_heads": 1, "hidden_size": 128},
    "gpt2": {"n_embd": 72, "n_head": 3, "n_layer": 2, "n_positions": 192, "n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "olmo2": {**GROUPED, "tie_word_embeddings": True},
    "granite": {**GROUPED, "attention_multiplier": 0.25},
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0]},
    "starcoder2": {**GROUPED, **SLIDING},
    "stablelm": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, **EXPERTS, "num_experts": 4, "head_dim": 16, "decoder_sparse_step": 1},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_head": 4, "n_layer": 2}, "does not use transformers' attention interface"),
    "falcon": ({}, "does not use transformers' attention interface"),
    "gptj": ({"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 192},
             "does not use transformers' attention interface"),
    "gpt_oss": ({**GROUPED, **SLIDING, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
                "attends with 's_aux'"),
    "llama4_text": ({**GROUPED, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96,
                     "attention_chunk_size": 32}, "layers of kind chunked_attention"),
    "deepseek_v3": ({**EXPERTS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
                     "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                     "first_k_dense_replace": 1}, "keys of 4 heads of 32 and values of 4 heads of 16"),
    "diffllama": (GROUPED, "(attends otherwise than once a layer|differ from the model's own)"),
    "llama": ({**GROUPED, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
              "rotates by positions of kind 'dynamic'"),
}
PROMPTS = (1, 9, 64, 65, 130)  # within, on and past the edge of the first bucket, and across a window of 32
BUCKETS, MAX_LEN, NEW = (64, 160), 192, 28  # without kernels to compile two buckets cost nothing; else the larger one
# What a family can get wrong is its operations (eager, jit), their tape (graph), and where it is cut (piecewise, full);
# how arms and policies combine is the same for all, and tried on a Llama in test_policy_runs.
ARMS = [("eager", "whole"), ("jit", "whole"), ("graph", "whole"), ("hybrid", "piecewise"), ("hybrid", "full")]


class Family(NamedTuple):
    """A small random model and what `generate` makes of each prompt, by the prompt's length."""

    model: PreTrainedModel
    prompts: dict[int, list[int]]
    wanted: dict[int, list[int]]


def build(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    settings = {**BASE, **settings}
    attention = settings.pop("attn_implementation", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in embeddings:
            parameter.mul_(8)  # in a model as initialised each token repeats the one before, whatever its layers do
    return model.to(DEVICE)


def family_of(name: str, settings: dict[str, Any], lengths: tuple[int, ...] = PROMPTS) -> Family:
    model = build(name, settings)
    generator = torch.Generator().manual_seed(0)
    prompts = {n: torch.randint(3, BASE["vocab_size"], (n,), generator=generator).tolist() for n in lengths}
    wanted = {}
    for length, prompt in prompts.items():
        ids = torch.tensor([prompt], device=DEVICE)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                             eos_token_id=None)
        wanted[length] = out[0, length:].tolist()
    return Family(model, prompts, wanted)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return family_of(request.param, FAMILIES[request.param])


@pytest.mark.parametrize(("arm", "policy"), ARMS)
def test_every_arm_and_policy_gives_the_tokens_of_generate(family: Family, arm: str, policy: str) -> None:
    """A mask, scale, window, cache row, padding or expert that one way of running a family gets wrong."""
    buckets = BUCKETS if arm in ("eager", "graph") else BUCKETS[1:]
    with hl.Runtime(family.model, arm=arm, policy=policy, capture="sync", buckets=buckets, max_len=MAX_LEN) as runtime:
        for length, prompt in family.prompts.items():
            out = runtime.generate(prompt, max_new_tokens=NEW, stop=[])
            assert out.ids == family.wanted[length], f"a prompt of {length} tokens"
            assert set(out.paths) == {"graph" if arm in ("graph", "hybrid") else arm}, out.reasons[0]


def test_the_tokens_can_tell_a_wrong_model(family: Family) -> None:
    """Equality of tokens that are the same whatever the prompt: a wrong arm would pass."""
    assert all(len(set(tokens)) > 5 for tokens in family.wanted.values())
    assert len({tuple(tokens) for tokens in family.wanted.values()}) == len(PROMPTS)


@pytest.mark.parametrize("phase", tracing.PHASES)
def test_lowering_leaves_nothing_to_the_host(family: Family, phase: str) -> None:
    """An operation that a graph would freeze, or a stock step that cannot be shown beside the lowered one."""
    assert hl.partition(family.model, phase=phase).counts["host-dynamic"] == 0
    stock = hl.partition(family.model, policy=None, phase=phase)
    assert any("cat" in op.op for op in stock.ops)
    assert not any(op.role for op in stock.ops)


@pytest.mark.parametrize("rows", [1, 64])
def test_what_is_traced_is_what_runs(family: Family, rows: int) -> None:
    """A plan of shapes alone that shows, and cuts at, other operations than those that run with weights."""
    model = family.model
    traced, _ = tracing.trace_lowered(model, "prefill" if rows > 1 else "decode", 40)
    planned = [((node.meta.get("custom") or {}).get("module", ""), str(node.target)) for node in traced.graph.nodes
               if node.op == "call_function" and "getitem" not in str(node.target)]
    program = lowering.Program(lowering.lower(model, lowering.PLAIN),
                               lowering.StaticKV(model.config, MAX_LEN, model.device, model.dtype),
                               torch.zeros(BASE["vocab_size"], device=DEVICE), lowering.Inputs.of(rows, model.device),
                               MAX_LEN)
    assert list(_ran(program)) == planned


def _ran(program: lowering.Program) -> Iterator[tuple[str, str]]:
    """Module and name of each operation of a run of `program`."""
    ran: list[tuple[str, str]] = []
    modules = [""]

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        modules.append(name)
        yield
        modules.pop()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append((modules[-1], str(func)))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), tracing.module_scopes(program.module, inside), Watch():
        program()
    return iter(ran)


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_run_eagerly_and_say_why(name: str) -> None:
    """A sink, a bias, a position scheme or a compressed cache that lowering does not know, served all the same."""
    settings, reason = REFUSED[name]
    family = family_of(name, settings, lengths=(9, 65))
    for arm in ("graph", "hybrid"):
        with pytest.raises(LoweringError, match=f"{reason}.*arm='eager'"):
            hl.Runtime(family.model, arm=arm)
    with hl.Runtime(family.model, arm="eager") as runtime:
        for length, prompt in family.prompts.items():
            assert runtime.generate(prompt, max_new_tokens=NEW, stop=[]).ids == family.wanted[length]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_routing_is_the_hosts_until_it_is_lowered(name: str) -> None:
    """A stock mixture of experts shown as one that a graph could hold: its default reads row counts back."""
    plan = hl.partition(build(name, FAMILIES[name]), policy=None)
    routed = [op for op in plan.ops if "grouped_mm" in op.op]
    assert len(routed) == 2 * BASE["num_hidden_layers"]
    assert {op.kind for op in routed} == {"host-dynamic"}
