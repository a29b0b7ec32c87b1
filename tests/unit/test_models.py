"""`hybridlab.models.load`: every way to name a model, and every unsound checkpoint refused before it costs anything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hybridlab import architectures, checkpoint, models, paths
from hybridlab.errors import ConfigError, ModelError

Change = Callable[[dict[str, torch.Tensor]], None]


def llama(tied: bool = False, **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64} | changes
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **sizes)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound checkpoint of one safetensors file."""
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound checkpoint of several safetensors files and an index."""
    llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when transformers is asked for weights: the checkpoint must be refused earlier."""
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded from a checkpoint that should have been refused before")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_index(folder: Path, name: str) -> None:
    """Let the index name another file for its first tensor."""
    path = folder / checkpoint.INDEX
    index = json.loads(path.read_text())
    index["weight_map"][min(index["weight_map"])] = name
    path.write_text(json.dumps(index))


def add_tokenizer(folder: Path, entries: int) -> None:
    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(entries)}, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)


# --- what comes back --------------------------------------------------------------------------------------------

def test_directory_gives_the_plain_class_with_its_weights(saved: Path) -> None:
    """Prevents a wrapped, patched or re-initialised model: the partition is about unmodified transformers classes."""
    model = models.load(str(saved), device="cpu")
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.tokenizer is None
    assert model.name_or_path == str(saved)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, llama()(ids).logits)


def test_sharded_checkpoint_equals_single_file(sharded: Path) -> None:
    """Prevents the header checks from refusing, or losing tensors of, a checkpoint with an index."""
    assert len(list(sharded.glob("*.safetensors"))) > 1
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(models.load(sharded, device="cpu")(ids).logits, llama()(ids).logits)


def test_tokenizer_comes_along(saved: Path) -> None:
    """Prevents a model that can only be asked in token ids although its tokenizer lies beside it."""
    add_tokenizer(saved, entries=10)
    assert models.load(saved, device="cpu").tokenizer("w3 w4")["input_ids"] == [3, 4]


def test_tied_weights_need_no_second_copy(tmp_path: Path) -> None:
    """Prevents a tied checkpoint, which stores no lm_head, from being called incomplete."""
    llama(tied=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = models.load(tmp_path, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("stored", "asked", "expected"), [
    ("bfloat16", None, torch.bfloat16), ("float32", None, torch.float32), ("float32", "float16", torch.float16),
    ("float16", "float32", torch.float32),
])
def test_dtype_is_the_checkpoints_own_unless_asked(
        tmp_path: Path, stored: str, asked: str | None, expected: torch.dtype) -> None:
    """Prevents a checkpoint from silently being widened or narrowed."""
    llama().to(getattr(torch, stored)).save_pretrained(tmp_path)
    assert models.load(tmp_path, device="cpu", dtype=asked).dtype is expected


def test_nan_weights_load(saved: Path) -> None:
    """Prevents a duplicate check here: non-finite logits are the runtime's to catch, where inputs matter too."""
    edit_weights(saved, lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert models.load(saved, device="cpu").model.norm.weight.isnan().all()


def test_embedded_model_is_there_and_knows_its_text() -> None:
    """Prevents a release without the model that every command, notebook and test starts from."""
    model = models.load("tiny", device="cpu")
    assert model.name_or_path == "tiny"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 1024
    ids = torch.tensor([model.tokenizer(topics["for"])["input_ids"][:512]])
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4.5, "6.4 is the loss of a model that knows only how frequent each token is"


# --- random weights ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "parameters"), [
    ("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("mistral-7b", 7_241_732_096),
    ("qwen3-8b", 8_190_735_360),
])
def test_published_dimensions(name: str, parameters: int) -> None:
    """Prevents timings of a model that is not the one named: the counts are those of the published checkpoints."""
    config = models.AutoConfig.for_model(**architectures.ARCHITECTURES[name])
    skeleton = models.shell(config, torch.float16, name)
    assert sum(p.numel() for p in skeleton.parameters()) == parameters


@pytest.mark.parametrize("name", sorted(n for n in architectures.ARCHITECTURES if n.startswith("tiny-")))
def test_tiny_twin_has_the_flags_of_the_full_one(name: str) -> None:
    """Prevents tests on a small model that skips a code path of the large one: GQA, ties, window, q/k norms."""
    full_name = next(full for full in architectures.FULL if full.startswith(name.removeprefix("tiny-")))
    full, small = architectures.ARCHITECTURES[full_name], architectures.ARCHITECTURES[name]
    for flag in ("model_type", "tie_word_embeddings", "rope_parameters", "rms_norm_eps"):
        assert small[flag] == full[flag]
    grouped = [sizes["num_key_value_heads"] < sizes["num_attention_heads"] for sizes in (full, small)]
    assert grouped[0] == grouped[1]
    assert bool(small.get("sliding_window")) == bool(full.get("sliding_window"))
    model = models.load(f"random:{name}", device="cpu")
    assert hasattr(model.model.layers[0].self_attn, "q_norm") == (full["model_type"] == "qwen3")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_random_weights_depend_on_the_seed_alone() -> None:
    """Prevents two runs from comparing different models, and a load from disturbing the caller's random numbers."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = models.load("random:tiny-llama-2", device="cpu")
    assert torch.equal(torch.rand(3), expected)
    second = models.load("random:tiny-llama-2", device="cpu")
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert first.lm_head.weight.std() > 0


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_random_weights_in_any_dtype_are_sound(dtype: str | None) -> None:
    """Prevents rotary frequencies or norms that were rounded or left unset, and activations that overflow float16."""
    model = models.load("random:tiny-qwen3-8b", device="cpu", dtype=dtype)
    assert model.dtype is getattr(torch, dtype or "float32")
    frequencies = 1e6 ** (-torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies)
    assert (model.model.norm.weight == 1).all()
    assert model(torch.arange(40)[None]).logits.isfinite().all()


def test_random_model_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a 7B model from driving a small machine into swap."""
    class Memory:
        available = 8 * 2**30

    monkeypatch.setattr(models.psutil, "virtual_memory", Memory)
    with pytest.raises(ModelError, match=r"need 25\.1 GiB and cpu has 8\.0 GiB"):
        models.load("random:llama-2-7b", device="cpu")


@pytest.mark.gpu
def test_7b_is_made_once_in_place_and_stays_finite() -> None:
    """Prevents a second copy of the weights while they are made, and float16 overflow at full width."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = models.load("random:llama-2-7b")
    assert model.dtype is torch.float16
    assert torch.cuda.max_memory_allocated() - before < 1.05 * model.get_memory_footprint()
    with torch.no_grad():
        assert model(torch.arange(500, device="cuda")[None]).logits.isfinite().all()


# --- names, devices, instances ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "told"), [
    ("tinny", "did you mean 'tiny'"), ("random:lama-2-7b", "did you mean 'llama-2-7b'"), ("random:", "known: "),
    ("", "unknown"), ("./absent", "does not exist"), ("/absent/model", "does not exist"), ("a/b/c", "does not exist"),
    ("owner/absent", "could not be fetched"), (5, "int is no model"),
])
def test_wrong_name_is_told_the_nearest(
        name: object, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a stack trace from inside transformers as the answer to a typing error."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=told):
        models.load(name, device="cpu")


def test_file_instead_of_directory(saved: Path) -> None:
    """Prevents a path to the weights file from being looked up on the Hub."""
    with pytest.raises(ModelError, match="is a file"):
        models.load(saved / "model.safetensors", device="cpu")


@pytest.mark.parametrize("wrong", [{"dtype": "float8"}, {"dtype": torch.int8}, {"device": "gpu"},
                                   {"device": "cuda:x"}, {"device": "cuda:99"},
                                   {"device": "cuda:999"}])
def test_wrong_device_or_dtype(wrong: dict[str, object]) -> None:
    """Prevents a wrong setting from being found only after the weights were read."""
    with pytest.raises(ConfigError, match=str(next(iter(wrong)))):
        models.load("tiny", **wrong)


def test_instance_comes_back_as_it_is() -> None:
    """Prevents a user's own model from being copied, moved or cast behind their back."""
    model = llama()
    before = set(vars(model))
    assert models.load(model) is model
    assert set(vars(model)) == before
    with pytest.raises(ModelError, match=r"float32 on cpu.*as it is"):
        models.load(model, dtype="float16")


def test_instance_that_is_no_causal_model_is_refused() -> None:
    """Prevents an encoder or a bare module from failing deep inside the partition."""
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with torch.device("meta"):
        hollow = llama()
    for wrong in (LlamaModel(llama().config), t5, torch.nn.Linear(2, 2), hollow):
        with pytest.raises(ModelError, match=r"no causal language model|no weights"):
            models.load(wrong)


# --- config -----------------------------------------------------------------------------------------------------

HOSTILE = [
    {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, {"_attn_implementation_internal": "owner/kernel"},
    {"attn_implementation": "owner/kernel"}, {"_attn_implementation": "owner/kernel:fn"},
    {"_attn_implementation": {"text_config": "a/b"}}, {"transformers_weights": "../other.safetensors"},
    {"fusion_config": {"x": True}}, {"quantization_config": {"quant_method": "awq"}}, {"trust_remote_code": True},
    {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
    {"hidden_size": -32}, {"hidden_size": 0}, {"hidden_size": True}, {"hidden_size": "32"}, {"hidden_size": 32.0},
    {"hidden_size": 2**63}, {"num_hidden_layers": 10**6}, {"vocab_size": None}, {"num_attention_heads": 3},
    {"num_key_value_heads": 3}, {"head_dim": 0}, {"rms_norm_eps": -1.0}, {"rope_theta": False},
    {"sliding_window": -1}, {"dtype": "int8"}, {"torch_dtype": "qint"}, {"text_config": {"hidden_size": -1}},
    {"model_type": None},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_config_field_is_refused_by_name(saved: Path, change: dict[str, object], no_weights_read: None) -> None:
    """Prevents a config from choosing code or files, and absurd sizes from being allocated."""
    if change == {"num_attention_heads": 3}:
        change = change | {"head_dim": None}
    edit_config(saved, **change)
    field = next(iter(change))
    inner = change[field]
    field = next(iter(inner)) if field == "text_config" and isinstance(inner, dict) else field
    with pytest.raises(ModelError, match=f"config.json is refused.*{field}"):
        models.load(saved, device="cpu")


def test_all_fields_are_listed_at_once(saved: Path, no_weights_read: None) -> None:
    """Prevents a person from correcting a config one error at a time."""
    edit_config(saved, hidden_size=-1, vocab_size=0, auto_map={"AutoConfig": "x.Y"}, rms_norm_eps=0)
    with pytest.raises(ModelError) as caught:
        models.load(saved, device="cpu")
    assert all(field in str(caught.value) for field in ("hidden_size", "vocab_size", "auto_map", "rms_norm_eps"))


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff\xfe{}", b'{"vocab_size": NaN}', b'{"rope_theta": 1e999}', b'{"a": 1, "a": 2}',
    b"[" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "' + b"x" * (1 << 20) + b'"}',
], ids=["empty", "cut", "list", "utf-16", "nan", "inf", "duplicate", "deep", "digits", "large"])
def test_config_that_is_no_plain_json(saved: Path, content: bytes, no_weights_read: None) -> None:
    """Prevents a parser's quirks (last duplicate wins, NaN passes, deep nesting overflows) from deciding a model."""
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        models.load(saved, device="cpu")


def test_unknown_and_unfit_model_types(saved: Path, no_weights_read: None) -> None:
    """Prevents a model without a causal head, or a misspelt type, from failing deep inside transformers."""
    edit_config(saved, model_type="lama")
    with pytest.raises(ModelError, match="did you mean 'llama'"):
        models.load(saved, device="cpu")
    edit_config(saved, model_type="vit")
    with pytest.raises(ModelError, match="no causal language model"):
        models.load(saved, device="cpu")


def test_code_beside_the_weights_never_runs(saved: Path) -> None:
    """Prevents a checkpoint's Python from being imported through the config or through the tokenizer's settings."""
    trace = saved.parent / "ran"
    (saved / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Model: pass\n")
    add_tokenizer(saved, entries=10)
    path = saved / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Model", None]}}))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is refused: auto_map"):
        models.load(saved, device="cpu")
    assert not trace.exists()


def test_adapter_is_refused(saved: Path, no_weights_read: None) -> None:
    """Prevents an adapter's settings from sending the load to another model on the Hub."""
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    with pytest.raises(ModelError, match="adapter"):
        models.load(saved, device="cpu")


# --- weight files -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1], ids=["empty", "no-length", "no-header", "in-header", "last-byte"])
def test_truncated_weights_name_the_file(saved: Path, keep: int, no_weights_read: None) -> None:
    """Prevents a half-copied file from being found after a model's memory was taken."""
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        models.load(saved, device="cpu")


@pytest.mark.parametrize("header", [
    b"not json", b'{"a": 1}', b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}',
])
def test_malformed_weights_name_the_file(saved: Path, header: bytes, no_weights_read: None) -> None:
    """Prevents a header that lies about its data from being believed."""
    (saved / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole"):
        models.load(saved, device="cpu")


def test_huge_header_length(saved: Path, no_weights_read: None) -> None:
    """Prevents a length field from reserving memory for a header that is not there."""
    (saved / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole"):
        models.load(saved, device="cpu")


def test_truncated_shard_is_named(sharded: Path, no_weights_read: None) -> None:
    """Prevents the message from naming the index when one of its files is broken."""
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match=path.name):
        models.load(sharded, device="cpu")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", None])
def test_only_safetensors_are_read(saved: Path, name: str | None, no_weights_read: None) -> None:
    """Prevents a pickle from being loaded when the safetensors are missing."""
    (saved / "model.safetensors").unlink()
    if name:
        (saved / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=rf"no model\.safetensors.*{name or ''}.*save_pretrained"):
        models.load(saved, device="cpu")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "x.bin",
                                  "a\\b.safetensors", ""])
def test_index_cannot_name_files_elsewhere(sharded: Path, name: str, no_weights_read: None) -> None:
    """Prevents an index from reading files outside the model directory, or another format."""
    edit_index(sharded, name)
    with pytest.raises(ModelError, match=r"index\.json names"):
        models.load(sharded, device="cpu")


def test_link_out_of_the_directory_is_refused(saved: Path, no_weights_read: None) -> None:
    """Prevents a link inside a checkpoint from reading any file the user can read."""
    outside = saved.parent / "outside.safetensors"
    os.replace(saved / "model.safetensors", outside)
    (saved / "model.safetensors").symlink_to(outside)
    with pytest.raises(ModelError, match=r"model\.safetensors: a link out"):
        models.load(saved, device="cpu")


def test_incomplete_index(sharded: Path, no_weights_read: None) -> None:
    """Prevents a missing shard, or one without the tensor it should hold, from passing as complete."""
    weight_map = json.loads((sharded / checkpoint.INDEX).read_text())["weight_map"]
    edit_index(sharded, next(file for file in weight_map.values() if file != weight_map[min(weight_map)]))
    with pytest.raises(ModelError, match="its files do not hold"):
        models.load(sharded, device="cpu")
    edit_index(sharded, "absent.safetensors")
    with pytest.raises(ModelError, match=r"model file missing: absent\.safetensors"):
        models.load(sharded, device="cpu")


def test_missing_extra_and_wrong_tensors_are_all_listed(saved: Path) -> None:
    """Prevents half-random weights, and proves the refusal comes before the GPU: there is none here to touch."""
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors["stray.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.1.input_layernorm.weight"] = torch.ones(32, dtype=torch.int64)

    edit_weights(saved, change)
    with pytest.raises(ModelError) as caught:
        models._from_directory(saved, torch.device("cuda"), None)
    told = str(caught.value)
    assert "missing lm_head.weight, model.norm.weight" in told
    assert "not in the model: stray.weight" in told
    assert "model.layers.0.mlp.up_proj.weight has shape (3, 4), expected (64, 32)" in told
    assert "model.layers.1.input_layernorm.weight is I64 in model.safetensors" in told


def test_config_far_larger_than_its_files(saved: Path, no_weights_read: None) -> None:
    """Prevents a config of terabytes beside a file of kilobytes from filling the memory with random weights."""
    edit_config(saved, hidden_size=1 << 17, intermediate_size=1 << 20, num_attention_heads=4, head_dim=8)
    with pytest.raises(ModelError, match="the weights need"):
        models.load(saved, device="cpu")


def test_tokenizer_of_another_model(saved: Path) -> None:
    """Prevents token ids without an embedding row, which are an illegal address on a GPU."""
    add_tokenizer(saved, entries=60)
    with pytest.raises(ModelError, match="id 59 and the model 48 embeddings"):
        models.load(saved, device="cpu")


def test_broken_tokenizer(saved: Path) -> None:
    """Prevents a damaged tokenizer from being dropped, which would leave a model that takes no text."""
    add_tokenizer(saved, entries=10)
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        models.load(saved, device="cpu")


# --- Hub --------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Hub's client replaced by its cache layout: snapshots of links into blobs. Returns what was asked for."""
    repository = saved.parent / "models--owner--name"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    asked: list[str] = []

    def place(path: Path) -> Path:
        blob = repository / "blobs" / f"b-{path.name}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).unlink(missing_ok=True)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        return snapshot / path.name

    def one(name: str, file: str) -> str:
        asked.append(file)
        return str(place(saved / file))

    def all_files(name: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(revision)
        for path in saved.iterdir():
            place(path)
        return str(snapshot)

    monkeypatch.setattr(models.huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(models.huggingface_hub, "snapshot_download", all_files)
    return asked


def test_hub_id_loads_one_commit(hub: list[str]) -> None:
    """Prevents weights of another commit than the checked config, and a refusal of the cache's own links."""
    model = models.load("owner/name", device="cpu")
    assert hub == ["config.json", "c0ffee"]
    assert model.name_or_path == "owner/name"
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight)


def test_hub_weights_are_not_fetched_for_a_hostile_config(hub: list[str], saved: Path) -> None:
    """Prevents gigabytes from being downloaded for a model that would be refused anyway."""
    edit_config(saved, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelError, match="auto_map"):
        models.load("owner/name", device="cpu")
    assert hub == ["config.json"]


# --- where data lie ---------------------------------------------------------------------------------------------

def test_data_of_a_checkout_and_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an installed package from looking for its model in a source tree that is not there."""
    assert (paths.data_dir() / "prompts").is_dir()
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "site-packages" / "hybridlab")
    assert paths.repository() is None
    assert paths.data_dir() == tmp_path / "site-packages" / "hybridlab" / "data"
    with pytest.raises(ModelError, match="the embedded model is missing"):
        models.load("tiny", device="cpu")
    monkeypatch.setenv("HYBRIDLAB_RUNS", str(tmp_path / "mine"))
    assert paths.runs_dir() == tmp_path / "mine"
