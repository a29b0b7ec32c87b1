"""The protocol of memory: what weights, KV cache and each graph hold, and the most that a request needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab import measure, pools
from hybridlab.lowered import LoweredExecutor
from hybridlab.runtime import Runtime

Row = dict[str, Any]


def memory(runtime: Runtime, lengths: Iterable[int], seed: int = 0) -> Iterator[Row]:
    """Rows in MiB: step, value, unit, of one runtime that has captured nothing yet.

    "weights": parameters and buffers, a storage that several share counted once; "KV cache": of the static cache;
    "decode graph" and "graph of N rows": by how much memory grew in each capture, the longest prompt first, so that in
    a shared pool the first brings the memory (on a CPU: the buffers that a tape keeps); on a GPU also "workspaces",
    which cuBLAS has for all captures of the process together, and "allocated" and "reserved", the most that PyTorch's
    allocator held while one request of each length was served. No clock.
    """
    lengths = sorted(set(lengths), reverse=True)
    yield _row("weights", held(runtime.model))
    executor = runtime._executor
    if isinstance(executor, LoweredExecutor):
        yield _row("KV cache", sum(t.untyped_storage().nbytes() for t in executor.kv.tensors))
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    before = runtime.counters.graph_bytes
    prompts = measure.prompts(runtime.model, {*lengths, 1}, seed)
    for length in lengths:
        captured = runtime.counters.captures
        runtime.generate(prompts[length], max_new_tokens=1, stop=[])
        if runtime.counters.captures > captured:
            yield _row(f"graph of {runtime.bucket_for(length)} rows", runtime.counters.graph_bytes - before)
        before = runtime.counters.graph_bytes
    captured = runtime.counters.captures
    runtime.generate(prompts[1], max_new_tokens=2, stop=[])
    if runtime.counters.captures > captured:
        yield _row("decode graph", runtime.counters.graph_bytes - before)
    if runtime.device.type == "cuda":
        yield _row("workspaces", pools.workspace_bytes())
        yield _row("allocated", torch.cuda.max_memory_allocated(runtime.device))
        yield _row("reserved", torch.cuda.max_memory_reserved(runtime.device))


def held(module: nn.Module) -> int:
    """Bytes of the storages of parameters and buffers, each once."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _row(step: str, size: float) -> Row:
    return {"round": 0, "setting": "", "step": step, "value": size / 2**20, "unit": "MiB"}
