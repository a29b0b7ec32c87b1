"""The Triton kernels under compute-sanitizer: reads and writes beyond their memory, races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
              pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer of the CUDA toolkit is not installed")]
ROOT = Path(__file__).resolve().parents[2]
FOUND = 86  # its exit code when it found something


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_touch_only_what_is_theirs(tool: str) -> None:
    """A mask forgotten at an edge, which the allocator's slack hides; two warps that meet without a barrier."""
    found = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if tool == "memcheck":  # each tensor an allocation of its own, so that one row too many is seen
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    script = Path(__file__).with_name("kernels_once.py")
    done = subprocess.run(
        [str(SANITIZER), "--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name-exclude",
         "kernel_substring=at::", sys.executable, str(script)],
        env=os.environ | found, capture_output=True, text=True, timeout=420)
    assert done.returncode in ((0,) if tool == "memcheck" else (0, FOUND)), (done.stdout + done.stderr)[-4000:]
    assert re.search("ERROR SUMMARY: 0 errors" if tool == "memcheck" else "RACECHECK SUMMARY: ", done.stdout)
    ran = re.search("^KERNELS (.*)$", done.stdout, re.MULTILINE)
    assert ran is not None, done.stdout[-4000:]
    # racecheck takes barriers between the asynchronous copies of cuBLAS and cuDNN on Hopper for hazards, and told to
    # leave these kernels out it ends in an illegal access: what counts is whether ours are among those it names.
    hazards = set(re.findall(r"access at (\S+?)\+0x", done.stdout))
    assert hazards & set(ran[1].split()) == set(), done.stdout[-4000:]
    assert bool(hazards) == bool(done.returncode), done.stdout[-4000:]  # what it found, it named
