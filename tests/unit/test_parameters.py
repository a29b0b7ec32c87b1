"""Parameters of notebooks and entries of `compare`: which config they are of, and what is refused before a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from hybridlab import notebooks, parameters
from hybridlab.config import BenchConfig, CacheConfig, RunConfig
from hybridlab.errors import ConfigError, NotebookError, PromptError
from hybridlab.paperconfig import PaperConfig


def notebook(tmp_path: Path, source: str) -> Path:
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    return tmp_path / "a.ipynb"


@pytest.mark.parametrize(("source", "kind"), [
    ("model = 'tiny'\nrepeats = 3", RunConfig), ("", RunConfig), ("lengths = [10]", RunConfig),
    ("model = 'tiny'\ntrace = 'chat'\nrequests = 5", CacheConfig),
    ("compare = [{'capture': 'sync'}, {}]\nseed = 1", CacheConfig),
    ("model = 'tiny'\nlengths = [1]\nvariants = None\nrepeats = 3", BenchConfig),
    ("model = 'tiny'\nlengths = [1]\ngenerations = [5]\nrepeats = 3", PaperConfig),
    ("model = 'tiny'\nlengths = [1]\nrepeats = 3\nbudget_s = 1.0\nseed = 1", RunConfig),
])
def test_the_names_of_the_cell_decide_the_config(tmp_path: Path, source: str, kind: type) -> None:
    """A notebook about the graph cache, checked against an ablation's fields, would be refused or lose parameters."""
    assert type(notebooks.check(notebook(tmp_path, source))) is kind


def test_a_cache_notebook_takes_its_parameters(tmp_path: Path) -> None:
    """A list of settings must arrive from the command line as it was written."""
    path = notebook(tmp_path, "trace = 'zipf'\ncompare = [{}]\nrepeats = 3")
    given = dict([parameters.pair('compare=[{"capture": "sync", "buckets": [16, 64]}]'), parameters.pair("repeats=2")])
    config = notebooks.check(path, given)
    assert config == CacheConfig(trace="zipf", repeats=2, compare=({"capture": "sync", "buckets": [16, 64]},))


def test_a_kernel_notebook_takes_its_parameters(tmp_path: Path) -> None:
    """A variant with a comma in its name must not arrive as two."""
    path = notebook(tmp_path, "model = 'tiny'\nlengths = [1]\nvariants = None")
    given = dict([parameters.pair('variants=["torch", "kernel, pdl"]'), parameters.pair("lengths=[3, 9]")])
    assert notebooks.check(path, given) == BenchConfig(lengths=(3, 9), variants=("torch", "kernel, pdl"))


@pytest.mark.parametrize(("source", "given", "error", "message"), [
    ("trace = 'zipf'\nrequets = 3", {}, NotebookError, "did you mean 'requests'"),
    ("trace = 'zipf'\nlengths = [3]", {}, NotebookError, "fields of CacheConfig|fields of RunConfig"),
    ("trace = 'zipf'", {"trace": "zpif"}, ConfigError, "did you mean 'zipf'"),
    ("trace = 'zipf'\ncompare = [{}]", {"compare": [{"capture": "snyc"}]}, ConfigError, "did you mean 'sync'"),
    ("trace = 'zipf'\ncompare = [{}]", {"compare": [{"arm": "graph"}]}, ConfigError, "leave it out"),
    ("trace = 'zipf'\ncost_lengths = [8]", {"cost_lengths": [100000]}, PromptError, "lower cost_lengths"),
    ("variants = None\nlengths = [1]", {"lengths": [1, 100000]}, ConfigError, "a context of 100000 tokens"),
    ("variants = None\nlengths = [1]", {"lengths": [5, 5]}, ConfigError, "lengths holds a value twice"),
    ("variants = None\nlengths = [1]", {"variants": ["kernels"]}, ConfigError, "did you mean 'kernel'"),
    ("variants = None\nlengths = [1]", {"variants": ["torch", "torch"]}, ConfigError, "variants holds a value twice"),
])
def test_wrong_parameters_are_refused_before_a_kernel(tmp_path: Path, source: str, given: dict[str, Any],
                                                      error: type[Exception], message: str) -> None:
    """A typo that only the kernel finds costs a minute and leaves a failed run."""
    with pytest.raises(error, match=message):
        notebooks.check(notebook(tmp_path, source), given)


@pytest.mark.parametrize(("text", "entry"), [
    ("capture=sync", {"capture": "sync"}), ("", {}),
    (" capture=async  behind=thread ", {"capture": "async", "behind": "thread"}),
    ("buckets=16,64,256 cache_graphs=5", {"buckets": [16, 64, 256], "cache_graphs": 5}),
    ("buckets=[16,64] cache_bytes=None", {"buckets": [16, 64], "cache_bytes": None}),
    ("buckets=exact", {"buckets": "exact"}),
])
def test_an_entry_is_read_as_written(text: str, entry: dict[str, Any]) -> None:
    """Prompt lengths that arrive as text, or a value that swallows the next name, would be another setting."""
    assert parameters.entry(text) == entry


def test_an_entry_without_a_value_is_refused() -> None:
    """`--compare sync` looks complete and names no field."""
    with pytest.raises(ConfigError, match="'sync' has no value"):
        parameters.entry("sync")
