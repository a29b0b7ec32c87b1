"""Host time of work on a device: the clock starts and stops when nothing is left to run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def finish(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds that `call` takes, with all it launches."""
    finish(device)
    start = time.perf_counter_ns()
    call()
    finish(device)
    return (time.perf_counter_ns() - start) / 1e6
