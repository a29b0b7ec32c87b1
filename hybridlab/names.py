"""What a model's name names, and the context it has, found without loading torch or weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hybridlab import checkpoint
from hybridlab.architectures import ARCHITECTURES
from hybridlab.config import CacheConfig, RunConfig, TraceConfig
from hybridlab.errors import ModelError, PromptError, nearest, shown
from hybridlab.paperconfig import PaperConfig
from hybridlab.paths import data_dir

RANDOM = "random:"
KNOWN = ("tiny", *(f"{RANDOM}{name}" for name in ARCHITECTURES))
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def architecture(name: str) -> dict[str, Any]:
    """The dimensions of a "random:<architecture>". Raises `ModelError` with the nearest known one."""
    wanted = name.removeprefix(RANDOM)
    if wanted not in ARCHITECTURES:
        raise ModelError(f"architecture {wanted!r} is unknown", f"in model {name!r}", nearest(wanted, ARCHITECTURES))
    return ARCHITECTURES[wanted]


def directory(name: str) -> Path | None:
    """The directory that holds `name`; None for a Hub id, which may not be here. Raises `ModelError` otherwise."""
    if name == "tiny":
        folder = data_dir() / "models" / "tiny"
        if not (folder / "config.json").is_file():
            raise ModelError("the embedded model is missing", f"no config.json in {folder}",
                             "install hybridlab again, or make it: python data/models/train_tiny.py")
        return folder
    folder = _expanded(name)
    if name and folder.is_dir():
        return folder.absolute()
    if folder.is_file():
        raise ModelError(f"{name!r} is a file", "a model is a directory in Hugging Face layout",
                         f"did you mean {str(folder.parent)!r}?")
    if HUB_ID.fullmatch(name):
        return None
    if "/" in name or os.sep in name:
        raise ModelError(f"model directory {name!r} does not exist", f"looked in {Path.cwd()}", "check the path")
    raise ModelError(f"model {name!r} is unknown", "it is no directory, no Hub id (owner/name)", nearest(name, KNOWN))


def _expanded(name: str) -> Path:
    try:
        folder = Path(name).expanduser()
        folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long for the file system, or ~ of a user who is not there
        raise ModelError(f"model {shown(name)} is no path", str(error)[:200], "check the path") from None
    return folder


def context(name: str) -> int | None:
    """Tokens that the model can hold, from its config; None where only loading it can tell."""
    if name.startswith(RANDOM):
        found: dict[str, Any] | None = architecture(name)
    else:
        folder = directory(name)
        found = checkpoint.check_config(folder / "config.json") if folder else None
    return found.get("max_position_embeddings") if found else None


def require_fit(config: RunConfig | CacheConfig | TraceConfig | PaperConfig, tokens: int | None) -> None:
    """Raise `PromptError` if the longest request of an experiment is longer than the context of `tokens`.

    Of a reproduction of the paper the shortest is looked at: what does not fit is left out, and that is recorded.
    Of a trace only `cost_lengths` are looked at here: `workload` clips what it makes and checks what it reads.
    """
    if isinstance(config, TraceConfig):
        what, more, prompt, new = "length", "traced_tokens", config.length, config.traced_tokens
    elif isinstance(config, PaperConfig):
        what, more, prompt, new = "lengths", "generations", min(config.lengths), 1
    elif isinstance(config, RunConfig):
        what, more, prompt, new = "lengths", "new_tokens", max(config.lengths), config.new_tokens
    else:
        what, more, prompt, new = "cost_lengths", "new_tokens", max(*config.cost_lengths, 1, 1), config.new_tokens
    if tokens is not None and prompt + new > tokens:
        raise PromptError(f"prompt length {prompt} + {more} {new} = {prompt + new}",
                          f"the context of {config.model} holds {tokens} tokens", f"lower {what} or {more}")
