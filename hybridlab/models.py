"""A name becomes a model: weights, tokenizer and config. No code from a checkpoint runs, and nothing is patched.

The plain transformers class is what comes back, because the partition is meant to work on unmodified models.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from hybridlab import checkpoint, layout, names
from hybridlab.config import DTYPES
from hybridlab.errors import ConfigError, ModelError, choose, nearest

log = logging.getLogger(__name__)

SEED = 0  # of the weights of every "random:" model
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
HUB_NOT = ["*/*", "consolidated*"]  # folders of other formats, and Mistral's second copy of the weights


def load(spec: str | os.PathLike[str] | PreTrainedModel, *, device: str | torch.device = "auto",
         dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """A transformers causal LM in eval mode without gradients, its tokenizer (or None) as `model.tokenizer`.

    `spec`: "tiny" (the embedded model), a directory in Hugging Face layout, a Hub id ("owner/name"),
    "random:<architecture>" (seeded weights, no tokenizer), or an instantiated causal LM, which comes back as it is.
    `dtype` None: the checkpoint's own; of random weights float16 on a GPU and float32 on a CPU.
    Raises `ModelError` before weights take memory of `device` when the checkpoint is not sound, and `ConfigError`
    for a wrong device or dtype. Weights may hold NaN: that is found when logits are not finite.
    """
    wanted = None if dtype is None else choose("dtype", str(dtype).removeprefix("torch."), DTYPES)
    if isinstance(spec, torch.nn.Module):
        return _instance(spec, device, wanted)
    name, target = _name(spec), resolve_device(device)
    if target.type == "cuda":
        from hybridlab.kernels import ahead  # late: it imports compilers, which whoever only plans does not need

        ahead.preparing(target)
    if name.startswith(names.RANDOM):
        model = _random(name, target, wanted)
        model.tokenizer = None
    else:
        model = _from_directory(folder_of(name), target, wanted)
    model.name_or_path = name
    layout.lay_side_by_side(model)
    return model.eval().requires_grad_(False)


def skeleton(spec: str | os.PathLike[str] | PreTrainedModel) -> PreTrainedModel:
    """What `load` takes as a model to plan: a name gives its architecture on the meta device, so no weight is made,
    read or fetched; an instantiated causal LM, with weights or without, comes back as it is.

    Raises `ModelError` for what is no causal LM, or for a config that is not sound.
    """
    if isinstance(spec, torch.nn.Module):
        return _causal(spec)
    name = _name(spec)
    if name.startswith(names.RANDOM):
        config, kind = AutoConfig.for_model(**names.architecture(name)), random_dtype(resolve_device())
    else:
        folder = names.directory(name) or _fetch_config(name).parent
        checkpoint.check_links(folder)
        if not (path := folder / "config.json").is_file():
            raise ModelError("config.json is missing", f"in {folder}", "give a folder in Hugging Face layout")
        config = _config(path, checkpoint.check_config(path))
        kind = config.dtype or torch.float32
    model = shell(config, kind, name)
    model.tokenizer, model.name_or_path = None, name
    return model.eval().requires_grad_(False)


def context(model: PreTrainedModel) -> int | None:
    """Tokens that `model` holds; None where it sets no limit, as with ALiBi.

    One that turns to other rotary angles beyond its original length ("longrope") holds that length: the keys of
    earlier tokens would keep the angles of before, and transformers' `generate` begins anew there.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    return min(limit, rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else limit


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The torch device for "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N". Raises `ConfigError`."""
    text = str(device)
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", text):
        raise ConfigError(f"device {text!r} is unknown", "it must be auto, cpu, cuda or cuda:N",
                          "write cuda for a GPU" if "gpu" in text.lower() else nearest(text, ("auto", "cpu", "cuda")))
    found = torch.device(text)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {text!r} is not there", f"PyTorch {torch.__version__} sees "
                          f"{torch.cuda.device_count()} GPUs", 'use device="cpu", or check the driver with nvidia-smi')
    return found


def _name(spec: object) -> str:
    if not isinstance(spec, str | os.PathLike):
        raise ModelError(f"{type(spec).__name__} is no model", f"got {spec!r}",
                         "give a name, a directory or an instantiated transformers causal LM")
    return str(os.fspath(spec))


def _causal(model: torch.nn.Module) -> PreTrainedModel:
    if (not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder
            or model.get_output_embeddings() is None):
        raise ModelError(f"{type(model).__name__} is no causal language model", "an instantiated model was given",
                         "give a transformers ...ForCausalLM")
    return model


def _instance(model: torch.nn.Module, device: str | torch.device, dtype: str | None) -> PreTrainedModel:
    model = _causal(model)
    if any(p.is_meta for p in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no weights", "some of its parameters are on the meta device",
                         "load its weights first")
    here = next(model.parameters())
    if (str(device) != "auto" and resolve_device(device).type != here.device.type) or (
            dtype and getattr(torch, dtype) != here.dtype):
        raise ModelError(f"the model is {here.dtype} on {here.device}",
                         f"device={str(device)!r}, dtype={dtype!r} were asked for, but an instance is taken as it is",
                         "move it with model.to(...) first")
    return model


def _random(name: str, device: torch.device, dtype: str | None) -> PreTrainedModel:
    """Seeded weights by transformers' own initialisation, made on `device` in `dtype`: there is never a second copy."""
    config = AutoConfig.for_model(**names.architecture(name))
    kind = getattr(torch, dtype) if dtype else random_dtype(device)
    _require_memory(shell(config, kind, name), device, name)
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), device:
        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(config, dtype=kind)


def random_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def folder_of(name: str) -> Path:
    """The directory that holds `name`, fetched first if it is on the Hub."""
    return names.directory(name) or _fetch(name)


def _fetch(name: str) -> Path:
    """The folder of a Hub repository's snapshot: its config comes first, the rest only when the config passes."""
    config = _fetch_config(name)
    checkpoint.check_config(config)
    commit = config.parent.name  # the config that was checked and the weights must come from one commit
    with _naming(name):
        return Path(huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=HUB_FILES, ignore_patterns=HUB_NOT))


def _fetch_config(name: str) -> Path:
    with _naming(name):
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of the network, of authorisation and of the cache as one that names the model."""
    try:
        yield
    except Exception as error:  # they come from several libraries
        raise ModelError(f"model {name!r} could not be fetched", f"it is no directory here, and the Hub said: "
                         f"{type(error).__name__}: {error}",
                         f"check the name, the network and `hf auth login`; {nearest(name, names.KNOWN)}") from error


def _from_directory(folder: Path, device: torch.device, dtype: str | None) -> PreTrainedModel:
    found = checkpoint.inspect(folder)
    with _quiet():
        config = _config(found.directory / "config.json", found.config)
        kind = getattr(torch, dtype or own_dtype(found))
        bare = shell(config, kind, folder)
        problems = _wrong_dtypes(bare, found)
        _require_memory(bare, torch.device("cpu"), folder)
        model, problems_of_names = _read_weights(folder, kind)
        if problems := problems + problems_of_names:
            raise ModelError(f"the weights do not fit the config: {'; '.join(problems)}", f"in {folder}",
                             "the files belong to another model or are incomplete; download them again")
        model.tokenizer = tokenizer_of(found, model)
    if device.type != "cpu":
        _require_memory(bare, device, folder)
    return model.to(device)


def _config(path: Path, fields: dict[str, Any]) -> PreTrainedConfig:
    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"model_type {kind!r} is unknown to transformers", str(path),
                         nearest(kind, CONFIG_MAPPING.keys()))
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers validates each field its own way
        raise ModelError(f"transformers refuses config.json: {error}", str(path), "correct the field named") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model_type {kind!r} is no causal language model", str(path), "give a decoder-only model")
    return config


def own_dtype(found: checkpoint.Checkpoint) -> str:
    """The dtype a checkpoint was saved in: the config's word, else that of its first floating tensor."""
    named = found.config.get("dtype") or found.config.get("torch_dtype")
    known = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return named or next((known[t.dtype] for t in found.tensors.values() if t.dtype in known), "float32")


def shell(config: PreTrainedConfig, dtype: torch.dtype, where: object) -> PreTrainedModel:
    """The model without memory, to know its names and size before anything is allocated."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"transformers cannot build this config: {error}", str(where), "correct its fields") from error


def _require_memory(skeleton: PreTrainedModel, device: torch.device, where: object) -> None:
    needed = skeleton.get_memory_footprint()
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        raise ModelError(f"the weights need {needed / 2**30:,.1f} GiB and {device} has {free / 2**30:,.1f} GiB free",
                         str(where), "use a smaller model or dtype, or free memory first")


def _wrong_dtypes(skeleton: PreTrainedModel, found: checkpoint.Checkpoint) -> list[str]:
    """Parameters stored as whole numbers: transformers would cast them without a word."""
    return [f"{name} is {found.tensors[name].dtype} in {found.tensors[name].file}"
            for name, _ in skeleton.named_parameters()
            if name in found.tensors and not re.fullmatch(r"B?F\d+", found.tensors[name].dtype)]


def _read_weights(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """The model on the CPU, and what does not match. transformers is asked, as it knows ties and renamed tensors."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            ignore_mismatched_sizes=True, output_loading_info=True)  # mismatches are listed, then refused
    except Exception as error:
        raise ModelError(f"transformers could not load the weights: {error}", f"from {folder}",
                         "the files belong to another model or are damaged; download them again") from error
    shapes = [f"{name} has shape {tuple(got)}, expected {tuple(want)}"
              for name, got, want in sorted(info["mismatched_keys"])]
    missing = [f"missing {checkpoint.some(info['missing_keys'])}"] if info["missing_keys"] else []
    extra = [f"not in the model: {checkpoint.some(info['unexpected_keys'])}"] if info["unexpected_keys"] else []
    return model, shapes + missing + extra + list(info["error_msgs"])


def tokenizer_of(found: checkpoint.Checkpoint, model: PreTrainedModel) -> Any:
    if not found.has_tokenizer:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"the tokenizer cannot be read: {error}", f"in {found.directory}",
                         "fetch its files again, or remove them to use token ids only") from error
    rows = model.get_input_embeddings().num_embeddings
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise ModelError(f"the tokenizer has id {largest} and the model {rows} embeddings", f"in {found.directory}",
                         "the tokenizer belongs to another model")
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own loading report and progress bar away: what matters of them is raised."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
