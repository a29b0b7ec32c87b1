"""Triton: a kernel that does nothing but start early. Behind it a token's graph of plain kernels is a twelfth faster.

Why is not known: what was seen, and what undoes it, is in data/experiments.md. What kernels compute does not change.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

log = logging.getLogger(__name__)


@triton.jit
def _nothing(place):
    gdc_launch_dependents()
    gdc_wait()
    tl.store(place, 1)


class Primer:
    """To be called before each graph of a request that has begun with `start`; launches nothing unless `wanted`, and
    where Triton cannot.

    `again`: a kernel stands between two graphs, which undoes it; else one before the first of a request is enough.
    """

    def __init__(self, device: torch.device, wanted: bool, again: bool) -> None:
        self.wanted, self.again, self._due = wanted, again, False
        self._place = torch.zeros(1, device=device, dtype=torch.int64)
        if wanted:
            try:
                self.launch()  # compiled now, and not while a request waits
            except Exception as error:  # of Triton, a C compiler, the driver; graphs are only slower without it
                log.warning("graphs are replayed unprimed · %s: %s", type(error).__name__, error)
                self.wanted = False

    def start(self) -> None:
        self._due = self.wanted

    def __call__(self) -> None:
        if self._due:
            self.launch()
            self._due = self.again

    def launch(self) -> None:
        with torch.cuda.device(self._place.device):
            _nothing[(1,)](self._place, launch_pdl=True)
