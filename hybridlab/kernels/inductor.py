"""CPU JIT: the reference operation traced at fixed shapes and compiled by Inductor, torch.compile's compiler.

Inductor is called on the traced graph directly. `torch.compile` in front of it works on every call, for a small
kernel as long as the kernel itself, to decide what is decided here by one dictionary look-up.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx.experimental.proxy_tensor import make_fx

from hybridlab import ops
from hybridlab.errors import JITUnavailable

log = logging.getLogger(__name__)
Compiled = Callable[..., Any]

_COMPILED: dict[tuple[Any, ...], Compiled] = {}
COMPILED_BY: list[tuple[int, str]] = []  # the thread and the kernel of each compilation, Triton's included
_LOCK = threading.Lock()


def bind(name: str, args: tuple[Any, ...]) -> Callable[[], None]:
    """The compiled kernel of op `name` for `args`, bound to their tensors.

    A kernel belongs to the shapes, strides and dtypes of the tensors, to the values of everything else, and to the
    number of threads it was compiled for.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    shapes = ((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args)
    key = (name, torch.get_num_threads(), *shapes)
    compiled = _COMPILED.get(key)
    if compiled is None:
        with _LOCK:
            compiled = _COMPILED.get(key) or _COMPILED.setdefault(key, _compile(name, args))
    return partial(compiled, *tensors)


def _compile(name: str, args: tuple[Any, ...]) -> Compiled:
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        raise JITUnavailable("no C++ compiler was found", f"Inductor compiles op {name!r} for the CPU with one",
                             "install g++ or clang++, or use arm='eager' or arm='graph'")

    def on_tensors(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return ops.REFERENCE[name](*(next(given) if isinstance(a, Tensor) else a for a in args))

    # Compiling runs the op once on stand-ins: the caller's cache and buffers must not be written twice.
    # They have the caller's strides, which the kernel is compiled for; a clone would be dense.
    tensors = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a) for a in args if isinstance(a, Tensor)]
    with torch.no_grad():
        traced = make_fx(on_tensors)(*tensors)
        try:
            compiled = torch._inductor.compile(traced, tensors)
        except Exception as error:  # several kinds, by what is wrong with the library
            if not _discarded(error):
                raise
            compiled = torch._inductor.compile(traced, tensors)
    COMPILED_BY.append((threading.get_ident(), name))
    return compiled


def _discarded(error: Exception) -> bool:
    """Whether `error` names a library in Inductor's cache, which is removed then: a process that was killed while it
    wrote one leaves half of it, and Inductor would load that again for ever."""
    library = re.search(r"(/\S+\.so)\b", str(error))
    path = Path(library[1]) if library else None
    if path is None or not path.is_relative_to(cache_dir()) or not path.is_file():
        return False
    log.warning("a compiled kernel could not be loaded and is compiled again · %s", str(error)[:300])
    path.unlink()
    return True
