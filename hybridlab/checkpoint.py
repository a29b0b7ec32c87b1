"""What a checkpoint directory may hold. Reads JSON and safetensors headers only, and runs nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import msgspec
from safetensors import SafetensorError, safe_open

from hybridlab.errors import ModelError
from hybridlab.files import content

CONFIG_LIMIT_BYTES = 1 << 20
OTHER_LIMIT_BYTES = 32 << 20  # an index of many shards, or a tokenizer's settings
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

# Each of these lets a config choose code or files that the caller did not: refused at any depth.
FORBIDDEN = {
    "auto_map": "names code inside the checkpoint",
    "_attn_implementation_internal": "can name a repository whose code would be imported",
    "trust_remote_code": "is not the checkpoint's to decide",
    "transformers_weights": "points to another weight file",
    "fusion_config": "replaces the model's modules",
    "quantization_config": "needs quantised kernels; load it with transformers and pass the instance",
}
# Upper limits are ten times and more above any published model; they stop a config that would eat all memory.
SIZES = {
    "hidden_size": 1 << 17, "n_embd": 1 << 17, "intermediate_size": 1 << 20, "vocab_size": 1 << 22,
    "num_hidden_layers": 1 << 10, "n_layer": 1 << 10, "num_attention_heads": 1 << 12, "n_head": 1 << 12,
    "num_key_value_heads": 1 << 12, "head_dim": 1 << 12, "max_position_embeddings": 1 << 26, "n_positions": 1 << 26,
}
SIZES_OR_NULL = {"sliding_window": 1 << 26, "n_inner": 1 << 20, "num_key_value_heads": 1 << 12, "head_dim": 1 << 12}
POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta")
DTYPES = (None, "float64", "float32", "float16", "bfloat16")


class Tensor(msgspec.Struct, frozen=True):
    """One tensor as a safetensors header describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint(msgspec.Struct, frozen=True):
    """A directory that passed every check that needs no weights."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    has_tokenizer: bool


def inspect(directory: Path) -> Checkpoint:
    """Check links, JSON files and safetensors headers of `directory`. Raises `ModelError` listing what is wrong."""
    check_links(directory)
    if not (directory / "config.json").is_file():
        raise ModelError("config.json is missing", f"in {directory}", "give a folder in Hugging Face layout")
    if (directory / "adapter_config.json").exists():
        raise ModelError("adapter_config.json is not supported", f"{directory} is an adapter to another model",
                         "merge it into its base model and save that")
    config = check_config(directory / "config.json")
    for name in JSON_FILES[1:]:
        if (directory / name).is_file():
            refuse(directory / name, list(_forbidden(read_json(directory / name, OTHER_LIMIT_BYTES))))
    tensors = read_headers(directory)
    has_tokenizer = any((directory / name).is_file() for name in TOKENIZER_FILES)
    return Checkpoint(directory, config, tensors, has_tokenizer)


def check_links(directory: Path) -> None:
    """Refuse a link that leaves the checkpoint. In the Hub's cache the checkpoint is the repository's folder."""
    cached = directory.parent.name == "snapshots" and directory.parents[1].name.startswith("models--")
    root = (directory.parents[1] if cached else directory).resolve()
    outside = [p.name for p in sorted(directory.iterdir()) if p.is_symlink() and not _leads_into(root, p)]
    if outside:
        raise ModelError(f"{', '.join(outside)}: a link out of the checkpoint", f"in {directory}",
                         "only files inside the model directory are read; copy them there")


def _leads_into(root: Path, link: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # it leads nowhere, or round in a circle
        return False


def read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """The object in a JSON file; too large, not UTF-8, bad syntax, duplicate keys or NaN raise `ModelError`."""
    size = path.stat().st_size
    if size > limit_bytes:
        raise ModelError(f"{path.name} has {size:,} bytes", f"in {path.parent}", f"the limit is {limit_bytes:,} bytes")
    try:
        found = json.loads(content(path, limit_bytes).decode("utf-8"), object_pairs_hook=_unique,
                           parse_constant=_no_constant, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ModelError(f"{path.name} is no valid JSON in UTF-8", f"{path}: {error}", "fetch the file again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} holds no JSON object", f"{path}: {type(found).__name__}", "fetch the file again")
    return found


def check_config(path: Path) -> dict[str, Any]:
    """The model's settings, or a `ModelError` that lists every field which is dangerous or makes no sense."""
    config = read_json(path, CONFIG_LIMIT_BYTES)
    problems = [*_forbidden(config), *_sizes(config)]
    if not isinstance(config.get("model_type"), str):
        problems.append("model_type is missing")
    refuse(path, problems)
    return config


def refuse(path: Path, problems: list[str]) -> None:
    """Raise one `ModelError` with all `problems`, if there are any."""
    if problems:
        raise ModelError(f"{path.name} is refused: {'; '.join(problems)}", str(path),
                         "correct these fields, or load the model with transformers yourself and pass the instance")


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Name, dtype and shape of every tensor, from headers alone. Raises `ModelError` naming the file that is broken."""
    files, named = weight_files(directory)
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(directory / file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - the handle is not iterable
                    piece = opened.get_slice(name)
                    if name in tensors:
                        raise ModelError(f"tensor {name} stands in two files", f"{tensors[name].file} and {file}",
                                         "remove the file that the index does not name")
                    tensors[name] = Tensor(file, piece.get_dtype(), tuple(piece.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is not a whole safetensors file", f"in {directory}: {error}",
                             "it is truncated or damaged; copy or download it again") from None
    lost = [name for name, file in named.items() if name not in tensors or tensors[name].file != file]
    if lost:
        raise ModelError(f"{INDEX} names tensors that its files do not hold: {some(lost)}", f"in {directory}",
                         "download the checkpoint again")
    return tensors


def weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The safetensors files of a checkpoint, and where its index says each tensor lies (empty without an index)."""
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS], {}
    if not (directory / INDEX).is_file():
        others = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.safetensors") for p in directory.glob(kind))
        held = f"{directory} holds {', '.join(others)}" if others else f"in {directory}"
        raise ModelError(f"no {WEIGHTS} and no {INDEX}", held,
                         "only safetensors are read, because other formats can run code; convert the checkpoint with "
                         "save_pretrained() where you trust it")
    weight_map = read_json(directory / INDEX, OTHER_LIMIT_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError(f"{INDEX} has no weight_map", f"in {directory}", "download the checkpoint again")
    files = sorted(set(weight_map.values()))
    if wrong := [f for f in files if not f.endswith(".safetensors") or f != Path(f).name or "\\" in f or "\0" in f]:
        raise ModelError(f"{INDEX} names {some(wrong)}", f"in {directory}",
                         "only safetensors files inside the model directory are read")
    if missing := [f for f in files if not (directory / f).is_file()]:
        raise ModelError(f"model file missing: {some(missing)}", f"named by {INDEX} in {directory}", "fetch it again")
    return files, weight_map


def some(names: list[str], limit: int = 20) -> str:
    """`names` for a message: all of them up to `limit`, then a count."""
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _forbidden(node: object) -> Iterator[str]:
    """Fields at any depth that would let the file choose code, with the reason."""
    if isinstance(node, list):
        for item in node:
            yield from _forbidden(item)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in FORBIDDEN and value is not None:
            yield f"{key} {FORBIDDEN[key]}"
        elif key.endswith("_implementation") and any(set(name) & set("/:\\") for name in _strings(value)):
            yield f"{key} {value!r} names a repository"
        else:
            yield from _forbidden(value)


def _strings(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _strings(item)


def _sizes(config: dict[str, Any], where: str = "") -> Iterator[str]:
    """Sizes, eps and dtype that no model can have, here and in nested `*_config` objects."""
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            yield from _sizes(value, f"{where}{name}.")
        elif value is None and name in SIZES_OR_NULL:
            continue
        elif (limit := SIZES.get(name) or SIZES_OR_NULL.get(name)) and not _is_count(value, limit):
            yield f"{where}{name} {value!r} is not a whole number from 1 to {limit}"
        elif name in POSITIVE and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            yield f"{where}{name} {value!r} is not a positive number"
        elif name in ("dtype", "torch_dtype") and value not in DTYPES:
            yield f"{where}{name} {value!r} is not one of {', '.join(filter(None, DTYPES))}"
    yield from _divisions(config, where)


def _divisions(config: dict[str, Any], where: str) -> Iterator[str]:
    width = config.get("hidden_size", config.get("n_embd"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    groups = config.get("num_key_value_heads")
    if not _is_count(heads, SIZES["num_attention_heads"]):
        return
    if config.get("head_dim") is None and _is_count(width, SIZES["hidden_size"]) and width % heads:
        yield f"{where}hidden_size {width} is not divisible by num_attention_heads {heads}"
    if _is_count(groups, SIZES["num_key_value_heads"]) and heads % groups:
        yield f"{where}num_attention_heads {heads} is not divisible by num_key_value_heads {groups}"


def _is_count(value: object, limit: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate keys {some([name for name in found if names.count(name) > 1])}")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value
