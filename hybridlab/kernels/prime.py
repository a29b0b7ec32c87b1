"""Triton: a kernel that does nothing but start early. A graph of plain kernels is a tenth faster behind it.

Why is not known: what was seen, and what undoes it, is in data/experiments.md. What kernels compute does not change.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _nothing(place):
    gdc_launch_dependents()
    gdc_wait()
    tl.store(place, 1)


class Primer:
    """To be called before each graph of a request that has begun with `start`; launches nothing unless `wanted`.

    `again`: a kernel follows each graph, which undoes it; else one at the first graph of a request is enough.
    """

    def __init__(self, device: torch.device, wanted: bool, again: bool) -> None:
        self.wanted, self.again, self._due = wanted, again, False
        self._place = torch.zeros(1, device=device, dtype=torch.int64)
        if wanted:
            self.launch()  # compiled now, and not while a request waits

    def start(self) -> None:
        self._due = self.wanted

    def __call__(self) -> None:
        if self._due:
            self.launch()
            self._due = self.again

    def launch(self) -> None:
        _nothing[(1,)](self._place, launch_pdl=True)
