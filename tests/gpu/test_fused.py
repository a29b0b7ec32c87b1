"""Fused decode on CUDA: the tokens of the stock modules, and bits that launching early does not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hybridlab as hl
from hybridlab import kernels, loop
from hybridlab.kernels import gemm
from hybridlab.tuning import LIBRARY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BASE = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1100, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.06}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True}, "mistral": {"sliding_window": 48},
    "qwen2": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 96, "num_key_value_heads": 8},
}
PROMPT = torch.randint(3, 900, (70,), generator=torch.Generator().manual_seed(0)).tolist()


def build(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config).eval().to("cuda", dtype)


def fused(model: PreTrainedModel, **settings: Any) -> hl.Runtime:
    return hl.Runtime(model, **{"kernels": "fused", "policy": "full", "capture": "sync", "max_len": 320,
                                "buckets": [128], **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_stock_model(family: str) -> None:
    """A tile that the interpreter never met, or a part of the context that no multiprocessor reads."""
    model = build(family, torch.float32)
    ids = torch.tensor([PROMPT], device="cuda")
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, do_sample=False,
                          eos_token_id=None, pad_token_id=0)[0, len(PROMPT):].tolist()
    for arm in ("jit", "hybrid"):
        with fused(model, arm=arm) as runtime:
            assert runtime.generate(PROMPT, max_new_tokens=120, stop=[]).ids == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_starting_early_changes_no_bit(dtype: torch.dtype) -> None:
    """A kernel that reads before the wait what the one before has yet to write, now and then."""
    model, drawn = build("llama", dtype), set()
    for settings in ({"pdl": False, "arm": "jit"}, {"pdl": False}, {"pdl": True}, {"pdl": True, "run_ahead": 3}):
        with fused(model, **settings) as runtime:
            for _ in range(3):
                ids = runtime.generate(PROMPT, max_new_tokens=240, stop=[]).ids
                drawn.add((*ids, runtime._executor.logits.double().sum().item()))
    assert len(drawn) == 1


@pytest.mark.parametrize(("arm", "steps", "width"), [("jit", 1, 640), ("hybrid", 1, 768), ("hybrid", 4, 896)])
def test_the_first_request_compiles_nothing(arm: str, steps: int, width: int) -> None:
    """Kernels compiled ahead for what no launch is: other alignments, numbers or warps; a kernel that is forgotten; or
    compilations in threads of their own that no runtime counts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width + 4}  # of no other model: nothing is compiled yet
    config = AutoConfig.for_model("llama", **{**BASE, **sizes})
    model, before = AutoModelForCausalLM.from_config(config).eval().to("cuda", torch.float16), kernels.compiles()
    with hl.Runtime(model, arm=arm, kernels="fused", policy="full", max_len=320, steps=steps) as runtime:
        compiled = runtime.counters.compiles
        assert compiled == kernels.compiles() - before
        assert compiled >= 10
        for _ in range(2):
            runtime.generate(PROMPT[:runtime.buckets[0]], max_new_tokens=6, stop=[])
            runtime.settle()
        assert runtime.counters.compiles == compiled, kernels.compiled()[before + compiled:]
        assert runtime.counters.failures == 0
    with hl.Runtime(model, arm=arm, kernels="fused", policy="full", max_len=320, steps=steps) as runtime:
        assert runtime.counters.compiles == 0


def test_decode_begins_before_the_first_token_is_read() -> None:
    """A GPU that idles between prefill and decode until the host has read a token and launched."""
    model = build("llama", torch.float32)
    with fused(model, run_ahead=1) as runtime:
        assert not runtime._executor.quick  # nothing is captured yet
        runtime.warm_up([len(PROMPT)])
        assert runtime._executor.quick
        ids = runtime.generate(PROMPT, max_new_tokens=8, stop=[]).ids
        assert runtime.counters.discarded == 0
        assert runtime.generate(PROMPT, max_new_tokens=8, stop=ids[:1]).ids == ids[:1]
        assert runtime.counters.discarded == 1


def test_the_library_is_chosen_for_prompts_alone() -> None:
    """A setting of PyTorch's that a step leaves behind for everybody else."""
    before = torch.backends.cuda.preferred_blas_library()
    x, weight, out = (torch.randn(*shape, device="cuda").half() for shape in ((70, 64), (32, 64), (70, 32)))
    exact = out.double() + x.double() @ weight.double().t()
    gemm.residual(x, weight, None, False, out, tile=LIBRARY)
    assert torch.allclose(out.double(), exact, atol=0.05)
    assert torch.backends.cuda.preferred_blas_library() == before


@pytest.mark.parametrize("repeat", ["unrolled", "while"])
@pytest.mark.parametrize("arm", ["graph", "hybrid"])
def test_several_steps_a_launch_give_the_tokens_of_one(arm: str, repeat: str) -> None:
    """A token given out in the wrong order, a loop that runs one round too many, or a stop that it does not see."""
    if repeat == "while" and (problem := loop.problem(torch.device("cuda"))):
        pytest.skip(problem)
    model = build("llama", torch.float32)
    settings: dict[str, Any] = {"arm": arm, "kernels": "fused" if arm == "hybrid" else "auto"}
    with fused(model, **settings) as runtime:
        want = runtime.generate(PROMPT, max_new_tokens=100, stop=[]).ids
    place = next(n for n in range(50, 100) if want[n] not in want[:n])
    for run_ahead in (0, 2):
        with fused(model, **settings, steps=8, repeat=repeat, run_ahead=run_ahead) as runtime:
            runtime.warm_up([len(PROMPT)])
            before = runtime.counters.replays
            for _ in range(3):
                assert runtime.generate(PROMPT, max_new_tokens=100, stop=[]).ids == want
                assert runtime.generate(PROMPT, max_new_tokens=100, stop=[want[place]]).ids == want[:place + 1]
            if repeat == "while":
                assert runtime._executor.positions.item() == len(PROMPT) + place - 1
            assert runtime.counters.replays - before < 3 * (100 + place) // 4
