"""Every notebook in notebooks/ is thin, clean and takes its parameters: checked on the files, no kernel is started."""

from __future__ import annotations

import ast
import sys
import tokenize
from io import StringIO
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from hybridlab import notebooks

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FORBIDDEN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.While, ast.Try, ast.TryStar)
LATENCIES = ("hl.plots.", "hl.timeline.over_time", "hl.timeline.first_tokens", "hl.timeline.disturbed")
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def parameters_of(path: Path) -> nbformat.NotebookNode:
    return next(cell for cell in code_of(path) if "parameters" in cell.metadata.get("tags", ()))


def complaints(cells: list[nbformat.NotebookNode]) -> list[str]:
    """What a notebook's code may not be: long, or logic that belongs into the package, where it has tests."""
    found = [f"{len(cells)} code cells"] if len(cells) > 15 else []
    allowed = sys.stdlib_module_names | {"hybridlab"}
    for cell in cells:
        lines = len(cell.source.splitlines())
        most = 16 if "parameters" in cell.metadata.get("tags", ()) else 12  # those are a list, a line a parameter
        found += [f"{cell.id}: {lines} lines"] if lines > most else []
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            found.append(f"{cell.id}: {error.msg}: a magic, or no Python")
            continue
        for node in ast.walk(tree):
            if isinstance(node, FORBIDDEN):
                found.append(f"{cell.id}: {type(node).__name__}")
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            found += [f"{cell.id}: imports {name}" for name in names if name.split(".")[0] not in allowed]
    return found


def test_the_notebooks_are_found() -> None:
    """An empty glob would let every other test here pass without looking at anything."""
    assert [path.stem for path in NOTEBOOKS][:6] == ["00_start_here", "01_eager", "02_graphs_only", "03_jit_only",
                                                     "04_hybrid", "05_ablation"]


@every
def test_code_is_thin(path: Path) -> None:
    """Logic that grows in a notebook has no test and drifts away from the package."""
    assert complaints(code_of(path)) == []


@pytest.mark.parametrize("source", ["def f(): pass", "while True: pass", "try:\n    pass\nfinally:\n    pass",
                                    "import numpy", "from torch import nn", "%matplotlib inline", "x = 1\n" * 13,
                                    "f = lambda: 1", "class A: pass"])
def test_thick_code_is_noticed(source: str) -> None:
    """The check above must be able to fail."""
    assert complaints([nbformat.v4.new_code_cell(source)])


@every
def test_nothing_was_executed_into_the_file(path: Path) -> None:
    """Outputs in git go stale, hide machine paths, and can carry scripts that run when the notebook is opened."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata.language_info) == {"name"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.id
        assert not cell.get("outputs"), cell.id
        assert cell.get("execution_count") is None, cell.id


@every
def test_parameters_are_accepted_as_they_stand(path: Path) -> None:
    """A default that RunConfig refuses, or a name that it does not know, would break the notebook for everybody."""
    notebooks.check(path, {})


@every
def test_each_parameter_has_unit_and_meaning(path: Path) -> None:
    """A bare number in the parameters cell makes the reader guess what it counts."""
    for line in parameters_of(path).source.splitlines():
        comments = [token.string for token in tokenize.generate_tokens(StringIO(line).readline)
                    if token.type == tokenize.COMMENT]
        assert len(comments) == 1, line
        assert len(comments[0]) > 15, line


@every
def test_each_parameter_reaches_the_code(path: Path) -> None:
    """A parameter that no cell reads would be accepted and change nothing: a wrong experiment that looks right."""
    taken = {node.id for node in ast.walk(ast.parse(parameters_of(path).source)) if isinstance(node, ast.Name)}
    read = {node.id for cell in code_of(path) for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert taken - read == set()


@every
def test_the_four_beats_are_there(path: Path) -> None:
    """A notebook without its question or its reading is a script with pictures."""
    cells = nbformat.read(path, as_version=4).cells
    order = [cell.id for cell in cells]
    beats = ["question", "parameters", "run", "figure", "reading"]
    assert [name for name in order if name in beats] == beats
    assert "**" in cells[0].source
    assert "?" in cells[0].source


def unescaped(source: str) -> list[str]:
    """Tables in this code that are drawn by `.style` and do not end in `.format(..., escape="html")`, and those whose
    names of lines come from `groupby`, which `format` leaves as they are."""
    nodes = list(ast.walk(ast.parse(source)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    safe = [call.func.value for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "format"
            and any(given.arg == "escape" and ast.unparse(given.value) == "'html'" for given in call.keywords)]
    drawn = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "style"]
    named = [call for call in calls if ast.unparse(call.func).endswith(".groupby")
             and not any(given.arg == "as_index" for given in call.keywords)]
    return [ast.unparse(node) for node in [*(each for each in drawn if each not in safe), *(named if drawn else ())]]


@every
def test_each_styled_table_is_escaped(path: Path) -> None:
    """A name or a reason that brings markup runs it in the page: `.style` alone escapes nothing."""
    assert [found for cell in code_of(path) for found in unescaped(cell.source)] == []


@pytest.mark.parametrize("source", ["t.style", "t.style.format(precision=3)", "t.style.hide()", "t[a].style.format()",
                                    "t.style.format(escape='latex')", "t.style.format(escape='html'); u.style",
                                    "g = t.groupby(['reason'])\ng.agg(n=1).style.format(escape='html')"])
def test_a_table_that_escapes_nothing_is_noticed(source: str) -> None:
    """The check above must be able to fail."""
    assert unescaped(source)


def test_what_the_check_asks_for_escapes() -> None:
    """A reason that holds a script, in the form that the notebooks use and in the one that they used before."""
    reasons = pd.DataFrame({"op": ["cat"] * 2, "reason": ["<script>alert(1)</script>"] * 2})
    grouped = reasons.groupby(["op", "reason"], sort=False, as_index=False).agg(operations=("op", "size"))
    for table in (reasons, grouped):
        assert "<script>" in table.style.to_html()
        shown = table.style.format(precision=3, na_rep="", escape="html").to_html()
        assert "<script>" not in shown
        assert "&lt;script&gt;" in shown


@every
def test_each_figure_of_latencies_shows_the_limit(path: Path) -> None:
    """A time without the least that the machine allows is fast or slow by taste."""
    calls = [node for cell in code_of(path) for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    drawn = [ast.unparse(call) for call in calls if ast.unparse(call.func).startswith(LATENCIES)]
    assert [text for text in drawn if not text.endswith("result.floors)")] == []
