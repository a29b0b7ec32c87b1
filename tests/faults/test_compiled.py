"""Compiled kernels on disk: what a process that was killed in the middle of writing one leaves for the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif("TORCHINDUCTOR_FORCE_DISABLE_CACHES" in os.environ, reason="nothing is kept on disk")

CODE = """
import torch
from hybridlab.kernels import inductor
token, ids, positions = torch.tensor([7]), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([3])
inductor.bind("advance", (token, ids, positions))()
assert (int(ids), int(positions)) == (7, 4), (ids, positions)
"""


def compile_in(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE], env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)},
                          cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=300)


def test_half_a_compiled_kernel_is_compiled_again(tmp_path: Path) -> None:
    """Every later process ended by a file that one which was killed could not finish."""
    first = compile_in(tmp_path)
    assert first.returncode == 0, first.stderr
    (library,) = tmp_path.rglob("*.main.so")  # the other one says what the CPU can do
    library.write_bytes(b"")
    again = compile_in(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "compiled again" in again.stderr
    assert library.stat().st_size
