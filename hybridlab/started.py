"""`python -m hybridlab.started MODULE …`: runs a module in a process that ends with its parent from its first line on,
also while PyTorch is imported, which takes seconds."""

from __future__ import annotations

import os
import runpy
import sys

from hybridlab import children


def main() -> None:
    """As `python -m MODULE …` does."""
    children.end_with(os.getppid())
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
