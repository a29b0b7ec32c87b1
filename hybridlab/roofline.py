"""The least time of a step on a machine: the bytes it must move and the FLOPs it must do, over the rates measured here.

A step takes no less than its bytes at the read rate and its FLOPs at the matrix rate, whichever is longer (S. Williams,
A. Waterman, D. Patterson, "Roofline", Communications of the ACM 52(4), 2009).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import torch
from msgspec import Meta
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from hybridlab import experts
from hybridlab.bench import Bench
from hybridlab.errors import ConfigError, RunError
from hybridlab.lowering import twin

Bound = Literal["memory", "arithmetic"]
COLUMNS = ["metric", "prompt_tokens", "position", "bytes", "flops", "ms", "bound"]
POSITIONS = 9  # of each prompt length, beside those where a window fills; between two of them the floor is a line


class Work(NamedTuple):
    """The least that a step must do: bytes read and written in memory, and FLOPs."""

    bytes: int
    flops: int


class Floor(NamedTuple):
    """The least time of a step, and which of its bytes ("memory") and FLOPs ("arithmetic") takes it."""

    ms: float
    bound: Bound


class _Entry(msgspec.Struct, frozen=True):
    """A floor as a run's manifest holds it."""

    metric: Literal["ttft", "itl"]
    prompt_tokens: int
    position: int | None
    bytes: Annotated[float, Meta(ge=0)]
    flops: Annotated[float, Meta(ge=0)]
    ms: Annotated[float, Meta(gt=0)]
    bound: Bound


class _Attention(NamedTuple):
    """What a layer attends: bytes of a row of its cache, FLOPs of a query with a row, rows it sees (0: all)."""

    row: int
    pair: int
    window: int


class Demand:
    """What steps of one model need, from its tensors; a model on the meta device will do.

    Counted are each parameter that a step uses, once, and the rows of the KV cache. Matrices take 2 FLOPs a weight and
    token, attention 2 a query, seen row and dimension of key and value. A table of embeddings gives one row a token,
    also where ids repeat; tied with the head it is read as the head. Of a mixture's experts a step reads as many as one
    token chooses, as all rows might choose the same. Left out: what may stay on the chip (activations, logits, keys of
    a prompt), and the arithmetic of norms, activations and softmax.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        self.bytes = self.each = self.row = 0  # bytes of every step, FLOPs of every row, bytes of a token's embeddings
        for module, weight in _weights(model, head):
            if isinstance(module, nn.Embedding):
                self.row += weight[0].nbytes
                continue
            chosen, of = _chosen(module, config)
            stacked = of > 1 and weight.shape[0] == of
            self.bytes += weight.nbytes // of * chosen if stacked else weight.nbytes
            if weight.dim() > 1 + stacked:
                self.each += 2 * (weight.numel() // of * chosen if stacked else weight.numel())
        self.head = 2 * head.weight.numel()
        self.layers = _attentions(model, config)

    def decode(self, context: int) -> Work:
        """Of a step whose token is the `context`-th of its sequence, in tokens: earlier rows of the cache are read,
        as far as a window goes, and its own is written.

        `kernellab` counts the same but for the row of the embedding, which it leaves out.
        """
        rows = [_seen(context, layer.window) for layer in self.layers]
        cached = sum(n * layer.row for n, layer in zip(rows, self.layers, strict=True))
        attended = sum(n * layer.pair for n, layer in zip(rows, self.layers, strict=True))
        return Work(self.bytes + self.row + cached, self.each + attended)

    def prefill(self, tokens: int) -> Work:
        """Of a prompt: weights once, the rows that a window keeps written, logits of the last row alone, and of all
        pairs of rows those that a causal mask leaves."""
        cached = sum(_seen(tokens, layer.window) * layer.row for layer in self.layers)
        attended = sum(_pairs(tokens, layer.window) * layer.pair for layer in self.layers)
        return Work(self.bytes + tokens * self.row + cached, tokens * (self.each - self.head) + self.head + attended)


def work(model: PreTrainedModel, *, context: int | None = None, prompt_tokens: int | None = None) -> Work:
    """The least work of one decode step at a `context`, or of the prefill of `prompt_tokens`: see `Demand`.

    Raises `ConfigError` unless one of them is given, from 1 on.
    """
    given = [n for n in (context, prompt_tokens) if n is not None]
    if len(given) != 1 or given[0] < 1:
        raise ConfigError(f"context is {context} and prompt_tokens {prompt_tokens}", "a step has one of them",
                          "give one, from 1 on")
    demand = Demand(model)
    return demand.decode(context) if context is not None else demand.prefill(given[0])


def measure(device: torch.device, dtype: torch.dtype, working_set: int | None = None) -> dict[str, Any]:
    """What bounds a step on this device, JSON-ready, in a few seconds: read_gbs, copy_gbs (read and written) and
    matmul_tflops, each of the quickest turn, and `turns`, all of them by name (see `Bench.rates`).

    Reading is the quicker of a reduction and of matrix-vector products, over more memory than caches hold. A step that
    reads fewer bytes, `working_set`, finds them in a cache again: those are read too ("cached_read", "cached_gemv"),
    and the best counts. The product is computed as the model runs, on values that take the least power: no product is
    quicker. Memory of a GPU is given back.
    """
    bench = Bench(torch.device(device), dtype)
    with torch.no_grad():
        turns = bench.rates()
        if working_set is not None and working_set < bench.beyond_caches:
            cached = bench.rates(working_set)
            turns |= {f"cached_{name}": cached[name] for name in ("read", "gemv")}
    if bench.cuda:
        torch.cuda.empty_cache()
    read = [value for name, values in turns.items() if name.endswith(("read", "gemv")) for value in values]
    return {"read_gbs": max(read), "copy_gbs": max(turns["copy"]), "matmul_tflops": max(turns["matmul"]),
            "turns": turns}


def floor_ms(work: Work, limits: Mapping[str, Any]) -> Floor:
    """The least time of `work` at the rates of `limits`, which `measure` returned."""
    read, computed = work.bytes / limits["read_gbs"] / 1e6, work.flops / limits["matmul_tflops"] / 1e9
    return Floor(read, "memory") if read >= computed else Floor(computed, "arithmetic")


def of_run(model: PreTrainedModel, lengths: Sequence[int], new_tokens: int,
           limits: Mapping[str, Any]) -> dict[str, Any]:
    """`limits`, and the floors of all that a run times, JSON-ready, as `floors` reads them back.

    Of each prompt length: its first token (position None), the mean over its gaps (position None, bytes and FLOPs
    too), and gaps at some positions, counted as the rows of a run count them: from 1, with the prompt. First tokens
    also of the prompt length between them at which arithmetic begins to bind.
    """
    demand, found = Demand(model), list[dict[str, Any]]()
    firsts = {*lengths, min(lengths) + bisect_left(
        range(min(lengths), max(lengths)), True,
        key=lambda length: floor_ms(demand.prefill(length), limits).bound == "arithmetic")}
    found += [_entry("ttft", length, None, demand.prefill(length), limits) for length in sorted(firsts)]
    for length in lengths:
        steps = [_entry("itl", length, at, demand.decode(at), limits)
                 for at in range(length + 1, length + new_tokens)]
        if steps:
            mean = {name: float(np.mean([step[name] for step in steps])) for name in ("bytes", "flops", "ms")}
            found.append(steps[len(steps) // 2] | {"position": None} | mean)
            kept = {*np.linspace(0, len(steps) - 1, POSITIONS).round().astype(int).tolist(),
                    *(layer.window - length - 1 for layer in demand.layers)}
            found += [steps[index] for index in sorted(kept) if 0 <= index < len(steps)]
    return {"limits": dict(limits), "floors": found}


def floors(extra: Mapping[str, Any]) -> pd.DataFrame | None:
    """The floors that a run's manifest holds, a line each; None for runs recorded before there were any.

    Columns: metric, prompt_tokens, position (Int64, null for a whole prompt length), bytes, flops, ms, bound.
    Raises `RunError` for what is no list of floors.
    """
    if "roofline" not in extra:
        return None
    try:
        given = msgspec.convert(extra["roofline"]["floors"], list[_Entry])
    except (msgspec.ValidationError, KeyError, TypeError) as error:
        raise RunError("the floors of this run cannot be read", str(error), "its manifest was changed; measure again"
                       ) from None
    if wrong := [entry for entry in given if not math.isfinite(entry.ms)]:
        raise RunError(f"{len(wrong)} floors of this run are not finite", "", "its manifest was changed; measure again")
    return pd.DataFrame(map(msgspec.structs.astuple, given), columns=COLUMNS).astype({"position": "Int64"})


def _entry(metric: str, length: int, position: int | None, work: Work, limits: Mapping[str, Any]) -> dict[str, Any]:
    ms, bound = floor_ms(work, limits)
    return {"metric": metric, "prompt_tokens": length, "position": position, "bytes": work.bytes, "flops": work.flops,
            "ms": ms, "bound": bound}


def _weights(model: PreTrainedModel, head: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every parameter once, with the module that holds it; one that is shared with the head as the head's."""
    seen: set[int] = set()
    for module in (head, *model.modules()):
        for weight in module.parameters(recurse=False):
            if id(weight) not in seen:
                seen.add(id(weight))
                yield module, weight


def _chosen(module: nn.Module, config: Any) -> tuple[int, int]:
    """How many experts a token chooses of how many that `module` holds the weights of; (1, 1) where it holds none.

    Experts are held as stacks of matrices. One is chosen where the config has no number.
    """
    stacks = {weight.shape[0] for weight in module.parameters(recurse=False) if weight.dim() == 3}
    if len(stacks) != 1:
        return 1, 1
    of = stacks.pop()
    return min(of, int(getattr(config, "num_experts_per_tok", None) or 1)), of


def _attentions(model: PreTrainedModel, config: Any) -> list[_Attention]:
    """Of each layer, from the keys and values that the model itself makes of two tokens, without memory."""
    bare, cache = twin(model, _shape), DynamicCache(config=config)
    bare.set_experts_implementation(experts.NAME)
    bare.config.pad_token_id = None  # no value can be looked at here: neither an id, nor a position by some rotations
    for module in bare.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"
    ids, positions = (torch.zeros((1, 2), dtype=torch.int64, device="meta") for _ in range(2))
    with torch.no_grad():
        bare(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    found = []
    for layer in cache.layers:
        kept = (layer.keys, layer.values)  # [1, heads, 2, dim]
        found.append(_Attention(sum(t.shape[1] * t.shape[3] * t.element_size() for t in kept),
                                2 * config.num_attention_heads * sum(t.shape[3] for t in kept),
                                layer.sliding_window if layer.is_sliding else 0))
    return found


def _shape(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _seen(context: int, window: int) -> int:
    """Rows that the last of `context` tokens attends, with its own."""
    return min(context, window) if window else context


def _pairs(tokens: int, window: int) -> int:
    """Pairs of a row and a row it attends, over `tokens` rows in a row."""
    full = _seen(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * full
