"""A model without its weights, for whoever only talks about it, and what another process loads to have them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from hybridlab import checkpoint, models, names
from hybridlab.errors import ConfigError, ModelError

PREFIX = "hybridlab-model-"  # of a directory that a copy of an instantiated model is in


def outline(spec: Any, *, device: str = "auto", dtype: str | None = None) -> PreTrainedModel:
    """What `models.load` gives, on the meta device: tokenizer, configs and dtype, no weight made or read.

    Raises `ModelError` and `ConfigError` as `models.load` does for names and for what files say of themselves.
    """
    if isinstance(spec, torch.nn.Module):
        return models.load(spec, device=device, dtype=dtype)
    bare, name = models.skeleton(spec), str(spec)
    if name.startswith(names.RANDOM):
        kind = dtype or str(models.random_dtype(models.resolve_device(device))).removeprefix("torch.")
    else:
        found = checkpoint.inspect(models.folder_of(name))
        bare.tokenizer = models.tokenizer_of(found, bare)
        if (found.directory / "generation_config.json").is_file():
            bare.generation_config = GenerationConfig.from_pretrained(found.directory, local_files_only=True)
        kind = dtype or models.own_dtype(found)
    return bare.to(getattr(torch, kind))


@contextmanager
def sent(spec: Any, *, device: str, dtype: str | None) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
    """The outline of a model and what a worker is told to load: source, name and dtype, and for an instantiated model,
    of which it gets a copy as safetensors, the directory to discard; it is there inside the block at most.

    Raises: ConfigError for an instantiated model that is not on a CPU.
    """
    bare = outline(spec, device=device, dtype=dtype)
    name = bare.name_or_path
    if not isinstance(spec, torch.nn.Module):
        models.resolve_device(device)
        source = name if name.startswith(names.RANDOM) else str(models.folder_of(name))
        yield bare, {"model": source, "name": name, "dtype": dtype}
        return
    if bare.device.type != "cpu":
        raise ConfigError(f"an instantiated model on {bare.device} was given with process='worker'",
                          "its weights would be there twice", "give its name or directory, which the worker loads")
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        _write(bare, Path(folder))
        shadow = models.skeleton(folder)
        shadow.tokenizer, shadow.name_or_path = getattr(bare, "tokenizer", None), name
        shadow.generation_config = bare.generation_config
        kind = str(bare.dtype).removeprefix("torch.")
        yield shadow, {"model": folder, "name": name, "dtype": kind, "discard": folder}


def _write(model: PreTrainedModel, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # a full disk, tensors that share memory
        raise ModelError(f"a copy of the model for the worker cannot be written: {error}", f"in {folder}",
                         "give the name or directory of the model instead") from error
