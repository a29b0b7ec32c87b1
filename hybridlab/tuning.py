"""Which tile each matrix product of a fused step takes on this GPU: a table per GPU, and a default without.

`hybridlab tune` writes the tables. A request never times anything: its kernels ask here, and the answer is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from hybridlab.errors import ConfigError, nearest
from hybridlab.files import content
from hybridlab.paths import data_dir


class Tile(NamedTuple):
    """How a product is cut: rows of a program, columns of a chunk, warps of a program, and chunks under way at once,
    which a kernel for one token does not ask for."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


LIBRARY = Tile(0, 0, 0, 0)      # no kernel of ours: cuBLAS multiplies
TOKENS = (1, 16, 32, 64, 128)   # of a tile; of more tokens the library multiplies
# For one token without a tuned entry. Found on an H200 for the matrices of Llama-2-7B in float16.
DEFAULTS = {"project": Tile(2, 2048, 8), "swiglu": Tile(2, 1024, 4), "residual": Tile(4, 2048, 8)}
FEW = 64  # tokens up to which the library was no faster there
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
LARGEST = Tile(128, 16384, 32, 8)  # what a kernel may be asked for: powers of two, as Triton wants them, but stages
SMALLEST = Tile(1, 16, 1, 1)
MOST_ELEMENTS = 2**16  # held in registers: a compiler works for minutes on more
LIMIT_BYTES = 2**24  # of a table
RATES_AGREE = 1e-3  # or 0.1 GB/s: a table holds rounded numbers

Key = tuple[str, int, int, int, str]  # op, tokens, rows, depth, dtype
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Version = Annotated[str, Meta(pattern=r"^[0-9][0-9A-Za-z.+-]{0,40}$")]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a table: the product, its fastest tile, and how that was found.

    `rows` are those of all matrices that `project` reads together, and of each of the two that `swiglu` reads.
    Without a tile, which is four zeros, the library was the fastest. `share` is of the rate at which a plain reduction
    read memory in the same command, so it may exceed 1.
    """

    op: Literal["project", "swiglu", "residual"]
    tokens: Literal[1, 16, 32, 64, 128]
    rows: Count
    depth: Count
    dtype: Literal["float16", "bfloat16", "float32"]
    tile_rows: int
    tile_columns: int
    warps: int
    stages: int
    us: Positive      # median
    gbs: NotNegative  # of weights alone; 0.0 is what rounding leaves of next to nothing
    share: NotNegative
    timings: Count    # that the median is of
    date: date
    torch: Version
    triton: Version

    def __post_init__(self) -> None:
        if self.tokens == 1 or self.tile != LIBRARY:
            for name, value, low, high in zip(("tile_rows", "tile_columns", "warps", "stages"), self.tile, SMALLEST,
                                              LARGEST, strict=True):
                any_number = name == "stages"
                if not low <= value <= high or not (any_number or value.bit_count() == 1):
                    raise ValueError(f"{name} must be {'' if any_number else 'a power of two '}from {low} to {high}")
        if self.tile_rows * self.tile_columns > MOST_ELEMENTS:
            raise ValueError(f"tile_rows times tile_columns must be at most {MOST_ELEMENTS}")
        if not all(map(math.isfinite, (self.us, self.gbs, self.share))):
            raise ValueError("us, gbs and share must be finite")
        rate = weight_bytes(self.key) / self.us / 1e3
        if abs(self.gbs - rate) > max(0.1, RATES_AGREE * rate):
            raise ValueError(f"gbs must be {rate:.1f}: the bytes of the weights over us")

    @property
    def key(self) -> Key:
        return self.op, self.tokens, self.rows, self.depth, self.dtype

    @property
    def tile(self) -> Tile:
        return Tile(self.tile_rows, self.tile_columns, self.warps, self.stages)


COLUMNS = Entry.__struct_fields__


def weight_bytes(product: Key) -> int:
    """Bytes of weights that one product reads."""
    op, _, rows, depth, dtype = product
    return rows * depth * ITEMSIZE[dtype] * (2 if op == "swiglu" else 1)


@cache
def tile(op: str, tokens: int, rows: int, depth: int, dtype: str, device: int | None) -> Tile:
    """The tile of a product of `tokens` on CUDA device number `device`: of a tuned entry for exactly this product and
    the least of `TOKENS` that holds them, else `default`'s. None stands for the CPU, which has no table. Raises
    `ConfigError` if the table of that GPU is damaged."""
    held = next((held for held in TOKENS if tokens <= held), None)
    if held is None:
        return LIBRARY
    found = None if device is None else table(gpu(device)).get((op, held, rows, depth, dtype))
    return found.tile if found else default(op, held, rows, dtype)


def default(op: str, tokens: int, rows: int, dtype: str) -> Tile:
    """The tile of a product without an entry; several tokens in float32 have half the columns, as shared memory holds
    no more."""
    if tokens == 1:
        return DEFAULTS[op]
    if tokens > FEW:
        return LIBRARY
    wide = rows > 4096 or op == "swiglu"
    return Tile(64, 256 // ITEMSIZE[dtype], 4, 4 if wide and tokens == TOKENS[1] else 6)


def gpu(device: int) -> str:
    """The name under which a CUDA device's table is kept."""
    import torch  # late: to read a table one needs none

    return slug(torch.cuda.get_device_name(device))


def slug(name: str) -> str:
    """The whole name: two GPUs that differ in one word may differ in speed."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower())) or "gpu"


def path(gpu: str) -> Path:
    """The file of a GPU's table, which need not be there. Raises `ConfigError` for what is no name of one."""
    folder = data_dir() / "tuning"
    if gpu != slug(gpu):
        raise ConfigError(f"GPU {gpu!r} is no name of a table", f"tables are in {folder}",
                          nearest(gpu, [file.stem for file in folder.glob("*.csv")] or [slug(gpu)]))
    return folder / f"{gpu}.csv"


@cache
def table(gpu: str) -> dict[Key, Entry]:
    """The entries of a GPU, read once a process; none where it has no file. Raises `ConfigError` with file and line."""
    return read(path(gpu))


def forget() -> None:
    """Read tables anew from now on."""
    table.cache_clear()
    tile.cache_clear()


def read(file: Path) -> dict[Key, Entry]:
    """Every entry of a file by its product, in the file's order. Raises `ConfigError` for the first line that is
    damaged: a tile taken from it would be slow for no visible reason, or none that a kernel compiles with."""
    try:
        text = content(file, LIMIT_BYTES).decode("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("a table of tiles cannot be read", f"{file}: {error}"[:300], _remedy("the file")) from None
    lines = text.splitlines()
    if not lines or tuple(lines[0].split(",")) != COLUMNS:
        raise ConfigError("a table of tiles has other columns", f"{file}, line 1: {lines[0][:200] if lines else ''!r}",
                          f"write {','.join(COLUMNS)}, or {_remedy('the file')}")
    found: dict[Key, Entry] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            entry = _entry(line)
            if entry.key in found:
                raise ValueError("the same product stands in an earlier line")
        except ValueError as error:  # msgspec's is one
            raise ConfigError(f"a table of tiles is damaged: {error}", f"{file}, line {number}: {line[:200]!r}",
                              _remedy("this line")) from None
        found[entry.key] = entry
    return found


def _entry(line: str) -> Entry:
    values = line.split(",")
    if len(values) != len(COLUMNS):
        raise ValueError(f"{len(values)} values in {len(COLUMNS)} columns")
    return msgspec.convert(dict(zip(COLUMNS, values, strict=True)), type=Entry, strict=False)


def _remedy(what: str) -> str:
    return f"remove {what} and run hybridlab tune MODEL again"


def text(entries: Iterable[Entry]) -> str:
    """A file that `read` gives back as these entries."""
    return "".join(",".join(map(str, line)) + "\n" for line in (COLUMNS, *map(msgspec.structs.astuple, entries)))
