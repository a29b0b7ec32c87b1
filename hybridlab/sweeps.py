"""A sweep as data: a notebook, a matrix of its parameters and a number of repeats, checked wholly, in a random order.

A job is its notebook's code, its parameters and the number of its repeat, and nothing else: a sweep may be renamed or
extended, and what was measured still counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import msgspec
import nbformat
import yaml
from msgspec import Meta

from hybridlab.config import as_dict, build
from hybridlab.errors import HybridlabError, SweepError
from hybridlab.files import content
from hybridlab.parameters import Experiment, code_cells, defaults, read_notebook, settings

MOST_JOBS = 10_000
MOST_BYTES = 1 << 20  # of a sweep's file

Names = dict[str, Any]


class SweepFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sweep's file says."""

    notebook: str                                              # its path, from the file's folder
    parameters: Names = {}                                     # the same in every cell
    matrix: dict[str, Annotated[list[Any], Meta(min_length=1)]] = {}  # each combination of values is a cell
    exclude: list[Names] = []                                  # cells with these values are left out
    repeats: Annotated[int, Meta(ge=1)] = 1                    # runs of each cell, each in a process of its own
    seed: Annotated[int, Meta(ge=0)] = 0                       # of the order
    timeout_s: Annotated[float, Meta(gt=0)] = 1800.0           # of one cell of the notebook


@dataclass(frozen=True, eq=False)
class Cell:
    """One combination of the matrix: its values there, all parameters, the settings they give, and a name for both."""

    values: Names
    parameters: Names
    config: Experiment
    id: str

    @property
    def label(self) -> str:
        return label(self.values)


@dataclass(frozen=True)
class Job:
    """One run of a cell."""

    cell: Cell
    repeat: int

    @property
    def id(self) -> str:
        return f"{self.cell.id}-{self.repeat}"

    @property
    def label(self) -> str:
        return f"{self.cell.label} · {self.repeat}"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    name: str
    notebook: Path
    cells: tuple[Cell, ...]
    repeats: int
    seed: int
    timeout_s: float

    def jobs(self) -> list[Job]:
        """All jobs in the order of the seed: every cell once in a random order, then again in another, so that what
        drifts over hours falls on all cells alike, and a sweep that is stopped has as many runs of each."""
        chance, found = random.Random(self.seed), []
        for repeat in range(1, self.repeats + 1):
            block = [Job(cell, repeat) for cell in self.cells]
            chance.shuffle(block)
            found += block
        return found


def label(values: Mapping[str, Any]) -> str:
    """A cell's values as one line."""
    return ", ".join(f"{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
                     for name, value in values.items()) or "the notebook"


def read(path: Path) -> Sweep:
    """A sweep from its YAML file; every cell is checked as `notebooks.check` would.

    Raises: SweepError for a file that cannot be read, says a thing twice, or describes no sweep; ConfigError for a key
    that is none; what `notebooks.check` raises, with the cell's values.
    """
    file = build(SweepFile, _mapping(path))
    notebook_path = path.parent / file.notebook
    notebook = read_notebook(notebook_path)
    cells = tuple(_cells(file, notebook, notebook_path.name))
    if len(cells) * file.repeats > MOST_JOBS:
        raise SweepError(f"{len(cells) * file.repeats} jobs", f"{path.name}: {len(cells)} cells, {file.repeats} times",
                         f"a sweep has at most {MOST_JOBS:,}; split it")
    return Sweep(path.stem, notebook_path, cells, file.repeats, file.seed, file.timeout_s)


def identity(notebook: nbformat.NotebookNode, name: str, config: Experiment) -> str:
    """The name of what a notebook does with these settings: a hash of its code and of the parameters that it takes."""
    code = [cell.source for cell in code_cells(notebook) if "parameters" not in cell.metadata.get("tags", ())]
    values = as_dict(config)
    taken = {parameter: values[parameter] for parameter in defaults(notebook, name)}
    return hashlib.sha256(json.dumps([type(config).__name__, taken, code], sort_keys=True).encode()).hexdigest()[:16]


def _cells(file: SweepFile, notebook: nbformat.NotebookNode, name: str) -> list[Cell]:
    if both := sorted(set(file.parameters) & set(file.matrix)):
        raise SweepError(f"{both[0]!r} is in parameters and in matrix", "", "a parameter is fixed or varied, not both")
    for parameter, values in file.matrix.items():
        if len({json.dumps(value, default=str, sort_keys=True) for value in values}) < len(values):
            raise SweepError(f"matrix.{parameter} holds a value twice", f"{values}"[:200],
                             "repeats says how often a cell is run")
    if math.prod(map(len, file.matrix.values())) > MOST_JOBS:
        raise SweepError("the matrix has more cells than a sweep may have jobs", f"at most {MOST_JOBS:,}", "split it")
    found: dict[str, Cell] = {}
    for own in _kept(file):
        cell = _cell(own, file.parameters | own, notebook, name)
        if cell.id in found:
            raise SweepError("two cells measure the same", f"{found[cell.id].label} and {cell.label}",
                             "leave one of them out")
        found[cell.id] = cell
    if not found:
        raise SweepError("no cell is left", "exclude names them all", "leave fewer out")
    return list(found.values())


def _kept(file: SweepFile) -> list[Names]:
    """The combinations of the matrix that no entry of `exclude` matches. Raises SweepError for an idle entry."""
    kept = [dict(zip(file.matrix, values, strict=True)) for values in product(*file.matrix.values())]
    for entry in file.exclude:
        left = [values for values in kept if any(values.get(name, ...) != value for name, value in entry.items())]
        if len(left) == len(kept):
            raise SweepError(f"exclude names {label(entry)}", "no cell has these values", "leave it out")
        kept = left
    return kept


def _cell(values: Names, parameters: Names, notebook: nbformat.NotebookNode, name: str) -> Cell:
    try:
        config = settings(notebook, name, parameters)
    except HybridlabError as error:
        where = " · ".join(filter(None, [error.context, f"in the cell {label(values)}"[:200]]))
        raise type(error)(error.fact, where, error.remedy) from None
    return Cell(values, parameters, config, identity(notebook, name, config))


class _Plain(yaml.SafeLoader):
    """Plain data, each key once and each value written out: an alias could make a short file endless."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"an alias, *{event.anchor}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set[Any]()
        for key, _ in node.value:
            plain = isinstance(key, yaml.ScalarNode)
            if not plain or key.value in seen:
                problem = f"{key.value[:80]!r} is there twice" if plain else "a key that is no name"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _mapping(path: Path) -> Names:
    try:
        loader = _Plain(content(path, MOST_BYTES).decode())
        try:
            found = loader.get_single_data()  # as yaml.safe_load does
        finally:
            loader.dispose()
    except OSError as error:
        raise SweepError(f"{str(path)!r} cannot be read", str(error.strerror), "give a short YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SweepError(f"{str(path)!r} is no plain YAML", " ".join(str(error).split())[:300],
                         "write each key once and each value out") from None
    if not isinstance(found, dict):
        raise SweepError(f"{str(path)!r} describes no sweep", f"it holds {type(found).__name__}",
                         "write notebook, matrix, repeats: see hybridlab sweep --help")
    return found
