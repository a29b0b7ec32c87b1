"""What the paper and its repository publish: tables in data/paper/, a source with each cell, unknown cells empty.

Published numbers stay in tables and figures of their own: other hardware and another protocol made them.
"""

from __future__ import annotations

import csv
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pandas as pd
from msgspec import Meta

from hybridlab import paths
from hybridlab.errors import ConfigError, choose

COLUMNS = ("quantity", "system", "tokens", "edition", "value", "spread", "unit", "source", "trust", "note")
TRUSTS = ("verbatim", "secondary", "primary")
SOURCES = ("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "R")
TABLES = ("table1", "table2", "headlines", "ablations", "repository_ttft", "repository_p99", "repository_other")
PERCENT = "%"

Text = Annotated[str, Meta(min_length=1)]


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One claim: its words, where they stand, how it is tested here, and what would count as reproduced."""

    id: Text
    words: Text
    source: Text
    trust: Literal["verbatim", "secondary", "primary"]
    of: Literal["paper", "repository"]
    test: Text
    rule: Text
    needs: Literal["gpu", "any"]                                          # "gpu": about times on one
    judge: Text                                                           # a name in `judging.JUDGES`
    settings: dict[str, Any] = msgspec.field(name="with", default_factory=dict)


def folder() -> Path:
    return paths.data_dir() / "paper"


def table(name: str, root: Path | None = None) -> pd.DataFrame:
    """One table of TABLES, a row a cell: quantity, system, tokens (Int64), edition, value and spread (NaN: unknown,
    none), unit, source, trust, note. `root`: the folder, data/paper by default.

    Raises: ConfigError, naming file and line, for a cell without source, a number that is none, a cell that is there
    twice, and columns that are not these.
    """
    path = (root or folder()) / f"{choose('table', name, TABLES)}.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"published table {name!r} cannot be read", str(error), "restore data/paper") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ConfigError(f"line 1 of {path.name} is {lines[0] if lines else ''}", "it names the columns",
                          f"write {','.join(COLUMNS)}")
    cells = [_cell(line, f"line {number} of {path.name}") for number, line in enumerate(lines[1:], 2)]
    frame = pd.DataFrame(cells, columns=list(COLUMNS)).astype({"tokens": "Int64"})
    again = frame.duplicated(["quantity", "system", "tokens", "edition"])
    if again.any():
        raise ConfigError(f"line {int(again.idxmax()) + 2} of {path.name} is a cell that is there already",
                          "a cell is one quantity, system, length and edition", "leave one of them")
    return frame


def _cell(line: Sequence[str], where: str) -> dict[str, Any]:
    if len(line) != len(COLUMNS):
        raise ConfigError(f"{where} has {len(line)} fields", f"a cell has {len(COLUMNS)}", "quote commas")
    cell: dict[str, Any] = dict(zip(COLUMNS, line, strict=True))
    for name in ("value", "spread"):
        cell[name] = _number(cell[name], f"{where}, {name}")
    if cell["tokens"] and not cell["tokens"].isdigit():
        raise ConfigError(f"{where} has {cell['tokens']!r} tokens", "a whole number, or nothing", "correct it")
    cell["tokens"] = int(cell["tokens"]) if cell["tokens"] else None
    known = not math.isnan(cell["value"])
    if known != bool(cell["source"]) or known != bool(cell["trust"]):
        raise ConfigError(f"{where} has {'a value' if known else 'no value'}, source {cell['source']!r} and trust "
                          f"{cell['trust']!r}", "a known cell has both, an unknown one neither", "correct it")
    if known:
        choose("trust", cell["trust"], TRUSTS)
        require_source(cell["source"], where)
    return cell


def _number(text: str, where: str) -> float:
    try:
        found = float(text) if text else math.nan
    except ValueError:
        found = math.inf
    if math.isinf(found) or (text and math.isnan(found)):
        raise ConfigError(f"{where} is {text[:40]!r}", "it is no finite number", "leave unknown cells empty")
    return found


def require_source(text: str, where: str) -> None:
    """Raise `ConfigError` unless `text` is ids of SOURCES; R stands alone, followed by a file."""
    words = text.split()
    good = words[:1] == ["R"] and len(words) == 2 if "R" in words else bool(words) and set(words) <= set(SOURCES)
    if not good:
        raise ConfigError(f"{where} has source {text!r}", f"sources are {', '.join(SOURCES)}; R is followed by a file",
                          "see data/paper/README.md")


def value(cell: Sequence[Any]) -> float:
    """The number of one cell, given as table, quantity, system and, if it has one, tokens; of percent, the fraction.

    Raises: ConfigError where there is none.
    """
    found = _one(cell)
    return float(found["value"]) / 100 if found["unit"] == PERCENT else float(found["value"])


def source(cell: Sequence[Any]) -> str:
    """Where the number of one cell, given as for `value`, stands."""
    return str(_one(cell)["source"])


def _one(cell: Sequence[Any]) -> pd.Series:
    name, quantity, system, *tokens = cell
    found = table(name)
    found = found[(found["quantity"] == quantity) & (found["system"] == system)]
    found = found[(found["tokens"] == tokens[0]).fillna(False)] if tokens else found
    if len(found) != 1 or math.isnan(found["value"].iloc[0]):
        raise ConfigError(f"{list(cell)} names {len(found)} published cells", "one that is known was expected",
                          "give table, quantity, system and tokens")
    return found.iloc[0]


def claims(root: Path | None = None) -> list[Claim]:
    """The claims of data/paper/claims.toml in their order. Raises: ConfigError for a claim that is malformed or there
    twice."""
    path = (root or folder()) / "claims.toml"
    try:
        found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")).get("claim"), list[Claim])
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path.name} cannot be read", str(error), "restore data/paper") from None
    for number, claim in enumerate(found):
        require_source(claim.source, f"claim {claim.id!r}")
        if claim.id in {other.id for other in found[:number]}:
            raise ConfigError(f"claim {claim.id!r} is there twice", f"in {path.name}", "give it another id")
    return found
