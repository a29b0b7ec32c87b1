"""Where things lie: the data that ships with the package, and where runs and figures go."""

from __future__ import annotations

import os
import site
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
RUN_VARIABLE = "HYBRIDLAB_RUN"  # directory of the run that a notebook's process belongs to


def repository() -> Path | None:
    """The source checkout this package runs from, or None when it was installed as a wheel."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "data").is_dir() else None


def importing() -> dict[str, str]:
    """The variables of a process that must import this hybridlab, also from a checkout that is not installed, and that
    belongs to no run."""
    home = str(PACKAGE.parent)
    path = os.environ.get("PYTHONPATH")
    added = {} if home in site.getsitepackages() else {"PYTHONPATH": os.pathsep.join(filter(None, [home, path]))}
    return {name: value for name, value in {**os.environ, **added}.items() if name != RUN_VARIABLE}


def data_dir() -> Path:
    """The folder of models, prompts, tiles and published numbers: `data/` of the checkout, or its copy in the wheel."""
    root = repository()
    return root / "data" if root else PACKAGE / "data"


def runs_dir() -> Path:
    """Where new runs go: $HYBRIDLAB_RUNS, else `data/runs/local` of the checkout, else `./runs`. Not created."""
    if named := os.environ.get("HYBRIDLAB_RUNS"):
        return Path(named).expanduser().absolute()
    root = repository()
    return root / "data" / "runs" / "local" if root else Path.cwd() / "runs"


def figures_dir() -> Path:
    """Where a person's own figures go: `figures/local` of the checkout, else `./figures`. Not created."""
    root = repository()
    return root / "figures" / "local" if root else Path.cwd() / "figures"
