"""What a notebook takes: its one parameters cell, read as text, and the values given for it. Starts no kernel."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import nbformat

from hybridlab.buckets import ladder
from hybridlab.cells import require_distinct, require_steps
from hybridlab.config import VARIANTS, BenchConfig, CacheConfig, RunConfig, RuntimeConfig, TraceConfig, build
from hybridlab.errors import ConfigError, NotebookError, choose, nearest
from hybridlab.files import content
from hybridlab.names import context, require_fit
from hybridlab.paperconfig import PaperConfig
from hybridlab.workload import require_known

# What a notebook's parameters can be fields of.
Experiment = RunConfig | CacheConfig | BenchConfig | TraceConfig | PaperConfig
KINDS: tuple[type[Experiment], ...] = (RunConfig, CacheConfig, BenchConfig, TraceConfig, PaperConfig)
OWNED = ("arm", "policy", "device", "dtype", "process", "max_len")  # fields that a cache experiment sets itself

LIMIT_BYTES = 2**28  # of a notebook, outputs included
IDLE = {"never": ("behind", "admission", "cache_bytes", "cache_graphs"), "sync": ("behind",)}  # by `capture`: no effect


def opened(path: Path) -> nbformat.NotebookNode:
    """The notebook as it is on disk. Raises `NotebookError` for what is none."""
    try:
        return nbformat.reads(content(path, LIMIT_BYTES).decode("utf-8"), as_version=4)
    except FileNotFoundError:
        known = [other.name for other in path.parent.glob("*.ipynb")]
        raise NotebookError(f"there is no notebook {str(path)!r}", "",
                            nearest(path.name, known) if known else "") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError) as error:
        raise NotebookError(f"{str(path)!r} is no notebook", f"{type(error).__name__}: {error}"[:300],
                            "give a Jupyter notebook (.ipynb, format 4)") from None


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """The notebook without anything that an earlier execution left in it. Raises as `opened`."""
    notebook = opened(path)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", ())]
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
        cell.metadata.pop("execution", None)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that a run must execute: code that is not empty."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def defaults(notebook: nbformat.NotebookNode, name: str) -> dict[str, Any]:
    """What the one cell tagged `parameters` assigns, in its order."""
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        raise NotebookError(f"{name} has {len(tagged)} cells tagged 'parameters'",
                            "parameters enter through exactly one code cell",
                            "tag that cell in JupyterLab's property inspector")
    found: dict[str, Any] = {}
    for statement in _parse(tagged[0].source, name).body:
        pairs = _assignment(statement)
        if pairs is None:
            raise NotebookError(f"the parameters cell of {name} holds more than `name = literal`",
                                _written(statement), "move it to a later cell")
        found[pairs[0]] = pairs[1]
    kind = kind_of(found)
    for parameter in found:
        if parameter not in _fields(kind):
            raise NotebookError(f"the parameters cell of {name} assigns {parameter!r}",
                                f"parameters are fields of {kind.__name__}", nearest(parameter, _fields(kind)))
    return found


def kind_of(names: Iterable[str]) -> type[Experiment]:
    """The config class that knows most of `names`; the first of KINDS where several know equally many."""
    names = set(names)
    return max(KINDS, key=lambda kind: len(names & _fields(kind)))


def _fields(kind: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind)}


def _parse(source: str, name: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotebookError(f"the parameters cell of {name} is no Python", str(error),
                            "write one `name = literal` a line") from None


def _written(statement: ast.stmt) -> str:
    try:
        return ast.unparse(statement)[:200]
    except (RecursionError, ValueError):  # nested without end, or a number too long to print
        return f"line {statement.lineno}"


def _assignment(statement: ast.stmt) -> tuple[str, Any] | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target, value = statement.target, statement.value
    else:
        return None
    if not isinstance(target, ast.Name):
        return None
    try:
        return target.id, ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def settings(notebook: nbformat.NotebookNode, name: str, parameters: Mapping[str, Any]) -> Experiment:
    """The notebook's defaults with `parameters` over them. Raises as `notebooks.check`."""
    taken = defaults(notebook, name)
    for parameter, value in parameters.items():
        if not isinstance(parameter, str) or parameter not in taken:
            shown = repr(parameter)[:80]
            raise NotebookError(f"{name} takes no parameter {shown}", f"it takes {', '.join(taken) or 'none'}",
                                nearest(str(parameter)[:80], taken) if taken else "")
        _plain(parameter, value)
    _single_owner(notebook, name, taken)
    kind, values = kind_of(taken), taken | dict(parameters)
    if kind is BenchConfig:
        bench = timed(values)
        require_held(bench, context(bench.model))
        return bench
    config = build(kind, values)
    assert not isinstance(config, BenchConfig)
    require_fit(config, context(config.model))
    if isinstance(config, RunConfig):
        require_distinct(config)
        require_steps(config, on_cpu=config.device == "cpu")
    if isinstance(config, CacheConfig):
        require_known(config.trace)
        compared(config)
    return config


def timed(values: Mapping[str, Any]) -> BenchConfig:
    """A BenchConfig whose lengths and variants are each there once. Raises: ConfigError."""
    for variant in values.get("variants") or ():
        choose("variant", variant, VARIANTS)
    config = build(BenchConfig, values)
    for name, given in (("lengths", config.lengths), ("variants", config.variants)):
        if given and len(set(given)) != len(given):
            raise ConfigError(f"{name} holds a value twice", f"{list(given)}", "each is timed once a round")
    return config


def require_held(config: BenchConfig, tokens: int | None) -> None:
    """Raise `ConfigError` if a context to be timed is longer than the model's of `tokens` (None: not known yet)."""
    longest = max(config.lengths or (1,))
    if tokens is not None and longest > tokens:
        raise ConfigError(f"a context of {longest} tokens", f"{config.model} holds {tokens}", "give shorter lengths")


def compared(config: CacheConfig) -> dict[str, dict[str, Any]]:
    """What each entry of `compare` changes in a runtime, by the name that it has in rows: "capture=sync,
    cache_graphs=5", or "default" for an empty entry.

    Raises: ConfigError for a field that RuntimeConfig lacks or the experiment owns, a value that it refuses, prompt
    lengths that are no ladder, and an entry that is there twice.
    """
    found: dict[str, dict[str, Any]] = {}
    free = sorted(_fields(RuntimeConfig) - set(OWNED))
    for number, changes in enumerate(config.compare):
        where = f"compare[{number}]"
        for field in changes:
            if field in OWNED:
                raise ConfigError(f"{where} sets {field!r}", "the experiment sets it, the same for all entries",
                                  f"leave it out; entries take {', '.join(free)}")
            if field not in free:
                raise ConfigError(f"{where} sets {field!r}", "RuntimeConfig has no such field", nearest(field, free))
        checked = build(RuntimeConfig, changes)
        for field in sorted(set(IDLE.get(checked.capture, ())) & set(changes)):
            raise ConfigError(f"{where} sets {field!r}", f"it changes nothing while capture is {checked.capture!r}",
                              "leave it out, or capture in another way")
        if isinstance(checked.buckets, tuple):
            ladder(checked.buckets, max(checked.buckets, default=1))
        name = ", ".join(f"{field}={_short(value)}" for field, value in changes.items()) or "default"
        if name in found:
            raise ConfigError(f"{where} is {name!r} again", "each entry is one setting", "leave one of them out")
        found[name] = dict(changes)
    return found


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def entry(text: str) -> dict[str, Any]:
    """One entry of `compare` as a command line gives it: `capture=async buckets=16,64` → fields and values."""
    found = {}
    for word in text.split():
        name, value = pair(word)
        found[name] = parse_value(f"[{value}]") if isinstance(value, str) and "," in value else value
    return found


def _plain(where: str, value: Any) -> None:
    """Refuse what would reach the kernel as something else: papermill turns a tuple into a string, NaN into a name."""
    kind = type(value)  # exactly: a numpy float is a subclass of float and prints as no literal
    if kind is float and not math.isfinite(value):
        raise NotebookError(f"{where} is {value}", "a parameter must be finite", "give a number")
    if kind is str and any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise NotebookError(f"{where} holds half a surrogate pair", ascii(value)[:80], "give valid Unicode text")
    if kind is list:
        for index, item in enumerate(value):
            _plain(f"{where}[{index}]", item)
    elif kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise NotebookError(f"{where} has the key {key!r}", f"of type {type(key).__name__}", "use str keys")
            _plain(f"{where}[{key!r}]", item)
    elif kind not in (bool, int, float, str, type(None)):
        raise NotebookError(f"{where} is a {kind.__module__}.{kind.__qualname__}",
                            "a parameter is a bool, int, float, str, None, list, or dict with str keys",
                            "give a list" if kind is tuple else "convert it first")


def _single_owner(notebook: nbformat.NotebookNode, name: str, taken: Mapping[str, Any]) -> None:
    """Refuse a notebook that assigns a parameter again outside its parameters cell: the value given would be lost."""
    for cell in code_cells(notebook):
        if "parameters" in cell.metadata.get("tags", ()):
            continue
        try:
            nodes = list(ast.walk(ast.parse(cell.source)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # a magic, or a mistake that the kernel will report with its line
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        if again := sorted(stored & set(taken)):
            raise NotebookError(f"{name} assigns {again[0]!r} outside its parameters cell",
                                "the value given would be lost", "use another name there")


def pair(text: str) -> tuple[str, Any]:
    """NAME=VALUE of a command line as name and value. Raises `ConfigError` without a value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"parameter {name!r} has no value", "", "write -p NAME VALUE, for example -p repeats 20")
    return name, parse_value(value)


def parse_value(text: str) -> Any:
    """JSON where it is JSON; True, False and None as in Python; lists of bare words like [eager, graph]; else text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(part.strip().strip("'")) for part in text[1:-1].split(",")]
    return text
