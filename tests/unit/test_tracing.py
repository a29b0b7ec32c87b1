"""Traces of shapes alone: they show the step at the length asked for, and take neither weights nor memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_symbols
from transformers import LlamaConfig, Phi3Config, Phi3ForCausalLM, PreTrainedModel

import hybridlab as hl
from hybridlab import models, tracing
from hybridlab.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("random:tiny-llama-3", device="cpu")


def growing(graph: fx.Graph) -> Counter[str]:
    """Names of the operations with a symbol in the shape of their result or of a tensor that they read."""
    def has_symbol(node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and bool(free_symbols(value))

    return Counter(node.target.overloadpacket.__name__ for node in graph.nodes
                   if isinstance(node.target, torch._ops.OpOverload)
                   and any(map(has_symbol, (node, *node.all_input_nodes))))


@pytest.mark.parametrize("length", [2, 4, 16, 512, 100_000])
def test_only_the_length_is_a_symbol(model: PreTrainedModel, length: int) -> None:
    """A length that equals the number of heads or their size, taken for it, and labels that depend on the length."""
    found = growing(tracing.trace_stock(model, "decode", length))
    assert found == {"cat": 4, "_scaled_dot_product_flash_attention_for_cpu": 2}


def test_a_full_window_no_longer_grows() -> None:
    """A cache of the last tokens shown as growing when it is full, or full when it still grows."""
    model = hl.load("random:tiny-mistral", device="cpu")
    window = model.config.sliding_window
    assert growing(tracing.trace_stock(model, "decode", window - 3))["cat"] == 4
    assert growing(tracing.trace_stock(model, "decode", window))["cat"] == 0
    for length in (window - 2, window - 1):
        with pytest.raises(ConfigError, match=f"length is {length}"):
            tracing.trace_stock(model, "decode", length)


@pytest.mark.parametrize("phase", tracing.PHASES)
def test_sizes_are_those_of_the_length(model: PreTrainedModel, phase: str) -> None:
    """Costs counted for another length than the plan names."""
    inputs = [n.meta.get("val") for n in tracing.trace_stock(model, phase, 300).find_nodes(op="placeholder")]
    sizes = [size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape]
    assert {size.node.hint for size in sizes if isinstance(size, torch.SymInt)} == {300}
    traced, program = tracing.trace_lowered(model, phase, 300)
    attend, *_ = traced.graph.find_nodes(op="call_function", target=torch.ops.hybridlab.attend.default)
    assert attend.args[0].meta["val"].shape[2] == (1 if phase == "decode" else 300)
    assert attend.args[7] == program.kv.capacity == 300


@pytest.mark.parametrize("phase", tracing.PHASES)
def test_a_seven_billion_model_is_traced_without_memory(phase: str) -> None:
    """Weights, caches or logits of a planned model allocated: 27 GB on whatever machine plans it."""
    model = models.skeleton("random:llama-2-7b")
    assert all(p.is_meta for p in model.parameters())
    traced, program = tracing.trace_lowered(model, phase, 512)
    constants = [getattr(traced, str(n.target)) for n in traced.graph.find_nodes(op="get_attr")]
    assert all(isinstance(t, FakeTensor) for t in (*constants, *program.buffers))
    assert len(traced.graph.find_nodes(op="call_function", target=torch.ops.hybridlab.attend.default)) == 32


def test_a_model_without_weights_is_traced_like_one_with(model: PreTrainedModel) -> None:
    """A plan by name that shows other operations than the plan of the loaded model."""
    bare = models.skeleton("random:tiny-llama-3")
    for phase in tracing.PHASES:
        for trace in (tracing.trace_stock, lambda *given: tracing.trace_lowered(*given)[0].graph):
            one, other = (trace(m, phase, 32) for m in (model, bare))
            assert [str(n.target) for n in one.nodes] == [str(n.target) for n in other.nodes]


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_length_that_cannot_be_a_symbol_is_refused(model: PreTrainedModel, length: int) -> None:
    """A length of 1 baked into the trace: everything would be labelled static. Nothing in a lowered step grows, and a
    prompt of one row can be planned."""
    for trace in (tracing.trace_stock, *([tracing.trace_lowered] if length < 1 else [])):
        with pytest.raises(ConfigError, match=f"length is {length}"):
            trace(model, "decode", length)


def test_a_skeleton_is_what_load_would_give() -> None:
    """A plan of another architecture or number format than the model that is then loaded."""
    for name in ("random:tiny-mistral", "tiny"):
        bare, loaded = models.skeleton(name), hl.load(name, device="cpu")
        assert bare.name_or_path == name
        assert {n: (p.shape, p.dtype) for n, p in bare.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in loaded.named_parameters()}
        assert models.skeleton(loaded) is loaded
    assert models.skeleton(bare) is bare


@pytest.mark.parametrize(("spec", "message"), [("random:lama", "did you mean"), (3, "int is no model"),
                                               (torch.nn.Linear(2, 2), "no causal language model")])
def test_what_is_no_model_has_no_skeleton(spec: object, message: str) -> None:
    """A misspelt name or a wrong object found only deep inside a trace."""
    with pytest.raises(ModelError, match=message):
        models.skeleton(spec)


def test_a_config_that_is_not_sound_has_no_skeleton(tmp_path: Path) -> None:
    """A hostile or missing config read because only the architecture was wanted."""
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        models.skeleton(tmp_path)
    (tmp_path / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="a link out of the checkpoint"):
        models.skeleton(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(ModelError, match="auto_map"):
        models.skeleton(tmp_path)


def test_a_skeleton_of_the_hub_fetches_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes downloaded to draw a plan, or a model planned in another number format than it was saved in."""
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, dtype="bfloat16",
                         num_attention_heads=2)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(tmp_path / file))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("weights were fetched"))
    bare = models.skeleton("owner/name")
    assert bare.name_or_path == "owner/name"
    assert bare.dtype == torch.bfloat16


@pytest.mark.parametrize(("rope", "tokens"), [({"rope_type": "default"}, 128), ({"rope_type": "longrope"}, 64)])
def test_context_ends_where_the_angles_change(rope: dict[str, str], tokens: int) -> None:
    """Tokens past the length at which `generate` computes every key again, with the keys of before."""
    factors = {"factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = Phi3Config(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                        max_position_embeddings=128, original_max_position_embeddings=64, pad_token_id=0,
                        rope_parameters={**rope, "rope_theta": 10000.0, "original_max_position_embeddings": 64,
                                         **(factors if rope["rope_type"] == "longrope" else {})})
    assert models.context(Phi3ForCausalLM(config)) == tokens
