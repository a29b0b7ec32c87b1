"""What every test needs: one CPU thread, no network, Triton without a GPU, and GPU tests that say why they skip."""

from __future__ import annotations

import gc
import os

# Before torch or the Hub's client are imported: two busy threads on two cores turn 1 ms steps into 50 ms ones.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: Triton kernels then run on CPU tensors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where PyTorch sees no GPU; on a machine with one they run or fail."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"no GPU seen by PyTorch {torch.__version__}"))


class Heap:
    """Whether the heap is frozen, as far as this process froze it: `gc.get_freeze_count` walks all of it, a tenth of a
    second before each test."""

    def __init__(self) -> None:
        self.frozen, self._unfreeze = False, gc.unfreeze

    def freeze(self) -> None:
        if not self.frozen:
            gc.collect()
            gc.freeze()
            self.frozen = True

    def unfreeze(self) -> None:
        self._unfreeze()
        self.frozen = False


HEAP = Heap()
gc.unfreeze = HEAP.unfreeze


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Takes what was imported out of the collector's sight, as a measurement does, which undoes it at its end: where
    each request is preceded by a collection, half a second of it would be for PyTorch's own objects. Not beside a GPU:
    what a fixture leaves behind would keep its memory until then."""
    if not torch.cuda.is_available():
        HEAP.freeze()
