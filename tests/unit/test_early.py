"""What a kernel that starts before the one before it has ended must not do, seen in its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import ModuleType

import pytest

from hybridlab.kernels import attend_next, gemv

WRITES = {"store", "atomic_add", "atomic_xchg", "atomic_cas", "atomic_max"}
READ_EARLY = {"positions", "cos", "sin"}  # written by whole steps that have ended, or never


def kernels(module: ModuleType) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(module)))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)
            and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)}


def called(node: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(call.func).rpartition(".")[2], call) for call in ast.walk(node) if isinstance(call, ast.Call)]


def waiting(module: ModuleType) -> list[tuple[str, ast.FunctionDef, int]]:
    """The kernels that start early: name, source, and the line in which they wait."""
    functions = kernels(module)
    waits = {name for name, node in functions.items() if any(n == "gdc_wait" for n, _ in called(node))}
    found = []
    for name, node in functions.items():
        lines = [call.lineno for n, call in called(node) if n == "gdc_wait" or n in waits]
        if lines and "pdl" in [a.arg for a in node.args.args] and name not in ("_start",):
            found.append((name, node, lines[0]))
    return found


EVERY = [pytest.param(*one, id=f"{module.__name__}.{one[0]}") for module in (gemv, attend_next)
         for one in waiting(module)]


def test_all_kernels_that_start_early_are_looked_at() -> None:
    """A check of nothing."""
    assert {param.values[0] for param in EVERY} == {"_project", "_swiglu", "_attend_next"}


@pytest.mark.parametrize(("name", "node", "line"), EVERY)
def test_nothing_is_written_and_nobody_leaves_before_the_wait(name: str, node: ast.FunctionDef, line: int) -> None:
    """A buffer that the kernel before still reads is overwritten; a block that never waits lets its successors pass."""
    functions = {**kernels(gemv), **kernels(attend_next)}

    def writes(part: ast.AST) -> bool:
        return any(n in WRITES or (n in functions and writes(functions[n])) for n, _ in called(part))
    before = [part for part in node.body if part.lineno < line]
    assert not any(writes(part) for part in before)
    assert not any(isinstance(inner, ast.Return) for part in before for inner in ast.walk(part))


@pytest.mark.parametrize(("name", "node", "line"), EVERY)
def test_only_what_nothing_writes_meanwhile_is_read_before_the_wait(name: str, node: ast.FunctionDef,
                                                                    line: int) -> None:
    """The vector of the kernel before, read while that still writes it."""
    early = [(n, call) for n, call in called(node) if call.lineno < line and n in ("load", "_chunk", "_rows")]
    assert early
    for n, call in early:
        first = ast.unparse(call.args[0])
        if n == "load":
            assert first.split(" ")[0] in READ_EARLY, first
        else:
            assert n == ("_rows" if name == "_attend_next" else "_chunk")
    if name == "_attend_next":  # of the cache, only rows before the token's own, which this step writes
        assert [ast.unparse(call.args[4]) for n, call in early if n == "_rows"] == ["stored"]
        assert "stored = tl.minimum(last, position)" in ast.unparse(node)
