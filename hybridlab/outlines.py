"""A model without its weights, for whoever only talks about it, and what another process loads to have them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from hybridlab import checkpoint, models, names
from hybridlab.config import RuntimeConfig
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
def sent(spec: Any, config: RuntimeConfig) -> Iterator[tuple[PreTrainedModel, str, Callable[[], dict[str, Any]]]]:
    """The outline of a model, and what tells a worker to load it: model, name and dtype. An instantiated model is
    written to a directory as safetensors when that is asked for; the directory is gone after the block at the latest.

    Raises: ConfigError for an instantiated model that is not on a CPU.
    """
    bare = outline(spec, device=config.device, dtype=config.dtype)
    name = bare.name_or_path
    if not isinstance(spec, torch.nn.Module):
        models.resolve_device(config.device)
        source = name if name.startswith(names.RANDOM) else str(models.folder_of(name))
        yield bare, "", lambda: {"model": source, "name": name, "dtype": config.dtype}
        return
    if bare.device.type != "cpu":
        raise ConfigError(f"an instantiated model on {bare.device} was given with process='worker'",
                          "its weights would be there twice", "give its name or directory, which the worker loads")
    shell = models.shell(bare.config, bare.dtype, name).requires_grad_(False)
    shell.tokenizer, shell.name_or_path = getattr(bare, "tokenizer", None), name
    shell.generation_config = bare.generation_config
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        yield shell.eval(), folder, lambda: _written(bare, Path(folder))


def _written(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    try:
        model.save_pretrained(folder)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # a full disk, tensors that share memory
        raise ModelError(f"a copy of the model for the worker cannot be written: {error}", f"in {folder}",
                         "give the name or directory of the model instead") from error
    return {"model": str(folder), "name": model.name_or_path, "dtype": str(model.dtype).removeprefix("torch.")}
