"""The fastest tile of each matrix product in a model's fused steps, timed on this GPU and kept in its table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from hybridlab import fused, models, tiles, tuning
from hybridlab.config import DTYPES
from hybridlab.errors import ConfigError, choose
from hybridlab.files import atomic_write
from hybridlab.tiles import Found, Product, Weights
from hybridlab.tuning import LIBRARY, TOKENS, Entry, Tile


def products(model: Any) -> list[Product]:
    """Every different product of the fused steps of `model` (anything `hybridlab.load` takes), from its config alone:
    those of decode first, then of prompts by the tokens of a tile. Raises `ConfigError` if a step cannot be fused."""
    bare = models.skeleton(model)
    fused.require(bare)
    found: list[Product] = []
    for layer in bare.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found += [_product("project", attention.q_proj, attention.k_proj, attention.v_proj),
                  _product("residual", attention.o_proj), _product("swiglu", mlp.gate_proj, mlp.up_proj),
                  _product("residual", mlp.down_proj)]
    head = _product("project", bare.lm_head)  # of one token also where a prompt has several
    layers = [one._replace(tokens=tokens) for tokens in TOKENS for one in found]
    decode = [*layers[:len(found)], head]
    return list({one._replace(parts=()): one for one in reversed([*decode, *layers[len(found):]])}.values())[::-1]


def _product(op: str, *matrices: Any) -> Product:
    parts = tuple(matrix.weight.shape[0] for matrix in matrices)
    return Product(op, parts[0] if op == "swiglu" else sum(parts), matrices[0].weight.shape[1], parts)


def run(model: str, dtype: str = "float16", device: str = "cuda", console: Console | None = None,
        missing: bool = False, candidates: Callable[[int], Sequence[Tile]] = tiles.candidates
        ) -> tuple[Table, str, int]:
    """Finds and keeps the tile of every product of `model`, or of those alone that have none (`missing`): a table,
    words, and 0, which is how many are left without.

    Each product is written as soon as it is found; entries of other products stay. Raises `ConfigError` or
    `ModelError` before any work, and `MeasureError` where no tile runs.
    """
    kind, where = choose("dtype", dtype, DTYPES), _gpu(device)
    wanted, gpu = products(model), tuning.gpu(where.index)
    there = tuning.read(_writable(gpu))  # refused now if it is damaged
    wanted = [one for one in wanted if not missing or one.key(kind) not in there]
    copies = _copies(wanted, kind, where)
    pdl = fused.starts_early(where)
    results: list[tuple[Product, Entry, Found]] = []
    with torch.cuda.device(where), _bars(console) as bars:
        rate = tiles.read_gbs(where, tiles.replays_us)
        for product, count in zip(wanted, copies, strict=True):
            tried = candidates(product.tokens)
            bar = bars.add_task(str(product), total=2 * len(tried), doing="making weights")
            weights = Weights(product, getattr(torch, kind), where, count, pdl)
            found = tiles.search(weights, tiles.replays_us, tried, tick=partial(_advance, bars, bar))
            entry = entry_of(product, kind, found, rate)
            keep(gpu, [entry])
            bars.update(bar, doing=f"{_shown(entry.tile)}: {entry.us:.1f} µs, {entry.gbs:,.0f} GB/s")
            results.append((product, entry, found))
            del weights  # before the next are made: both may not fit
    return _summary(f"{gpu}, {kind}", results), _words(gpu, rate, results), 0


def entry_of(product: Product, dtype: str, found: Found, read_rate: float) -> Entry:
    """The line of the table, rounded as it is written."""
    us = round(found.us(found.best), 3)
    gbs = tuning.weight_bytes(product.key(dtype)) / us / 1e3
    return Entry(op=product.op, tokens=product.tokens, rows=product.rows,  # type: ignore[arg-type]
                 depth=product.depth, dtype=dtype, tile_rows=found.best.rows,  # type: ignore[arg-type]
                 tile_columns=found.best.columns, warps=found.best.warps, stages=found.best.stages, us=us,
                 gbs=round(gbs, 1), share=round(gbs / read_rate, 4), timings=len(found.times[found.best]),
                 date=datetime.now(UTC).date(), torch=torch.__version__, triton=triton.__version__)


def keep(gpu: str, entries: Sequence[Entry]) -> None:
    """Put entries into the table of `gpu`, in place of older ones of the same products; all others stay."""
    file = tuning.path(gpu)
    merged = tuning.read(file) | {entry.key: entry for entry in entries}
    atomic_write(file, tuning.text(merged.values()))
    tuning.forget()


def coverage(model: str, dtype: str = "float16", device: str = "cuda", gpu: str | None = None
             ) -> tuple[Table, str, int]:
    """Which products of `model` have an entry for `gpu` (None: that of `device`): a table, words, and how many have
    none. Needs no GPU if `gpu` is given."""
    kind = choose("dtype", dtype, DTYPES)
    name = gpu or tuning.gpu(_gpu(device).index)
    file, entries, wanted = tuning.path(name), tuning.table(name), products(model)
    table = Table("product", "tile", "", "µs", "GB/s", "found", title=f"{name}, {kind}")
    for product in wanted:
        entry = entries.get(product.key(kind))
        table.add_row(str(product), _shown(entry.tile if entry else _default(product, kind)),
                      "tuned" if entry else "default", *((f"{entry.us:.1f}", f"{entry.gbs:,.0f}",
                      f"{entry.date}, triton {entry.triton}") if entry else ("", "", "")))
    missing = sum(product.key(kind) not in entries for product in wanted)
    words = f"{len(wanted) - missing} of {len(wanted)} products have a tuned tile.\ntable    {file}"
    return table, words + ("" if file.exists() else ", which is not there"), missing


def _gpu(device: str) -> torch.device:
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not seen or (asked := models.resolve_device(device)).type != "cuda":
        raise ConfigError("tiles are timed on a CUDA GPU",
                          f"device is {device!r}, and PyTorch {torch.__version__} sees {seen} GPUs",
                          "run this where the GPU is; --check --gpu NAME needs none")
    return torch.device("cuda", torch.cuda.current_device() if asked.index is None else asked.index)


def _writable(gpu: str) -> Path:
    file = tuning.path(gpu)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        good = os.access(file.parent, os.W_OK)
    except OSError:
        good = False
    if not good:
        raise ConfigError("the table of tiles cannot be written", str(file),
                          "make its directory writable, or run this from a checkout of hybridlab")
    return file


def _copies(wanted: Sequence[Product], dtype: str, device: torch.device) -> list[int]:
    """Copies of the weights of each product. Raises `ConfigError` if one would not fit beside its float32 twin, which
    the specification makes, or if the memory that is read for the rate would not."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [tuning.weight_bytes(one.key(dtype)) for one in wanted]
    counts = [tiles.copies_of(size, cache) for size in sizes]
    needed = max(tiles.READ_BYTES, *(
        size * (count + 4 // tuning.ITEMSIZE[dtype]) for size, count in zip(sizes, counts, strict=True)))
    free = torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise ConfigError(f"timing needs {needed / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB free",
                          "weights several times as large as its cache", "free memory on the GPU first")
    return counts


def _bars(console: Console | None) -> Progress:
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[doing]}"),
                    console=console, disable=console is None)


def _advance(bars: Progress, bar: TaskID, doing: str) -> None:
    bars.update(bar, advance=1, doing=doing)


def _default(product: Product, dtype: str) -> Tile:
    return tuning.default(product.op, product.tokens, product.rows, dtype)


def _shown(tile: Tile) -> str:
    if tile == LIBRARY:
        return "cuBLAS"
    return f"{tile.rows} × {tile.columns}, {tile.warps} warps" + (f", {tile.stages} deep" if tile.stages > 1 else "")


def _summary(where: str, results: Sequence[tuple[Product, Entry, Found]]) -> Table:
    table = Table("product", "tile", "µs", "GB/s", "of read rate", "default tile, µs", "cuBLAS, µs", "left out",
                  title=f"{where}, medians of {tiles.TIMINGS}")
    for product, entry, found in results:
        others = (f"{found.us(tile):.1f}" if tile in found.times else ""
                  for tile in (_default(product, entry.dtype), LIBRARY))
        table.add_row(str(product), _shown(entry.tile), f"{entry.us:.1f}", f"{entry.gbs:,.0f}", f"{entry.share:.0%}",
                      *others, str(len(found.left_out)))
    return table


def _words(gpu: str, rate: float, results: Sequence[tuple[Product, Entry, Found]]) -> str:
    reasons = Counter(reason for *_, found in results for reason in found.left_out.values())
    tried = sum(len(found.times) + len(found.left_out) for *_, found in results)
    left = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common()) or "none"
    return (f"A plain reduction read {rate:,.0f} GB/s. Of {tried} candidates for {len(results)} products, left out: "
            f"{left}.\nkept     {tuning.path(gpu)}")
