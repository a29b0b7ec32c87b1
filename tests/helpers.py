"""What tests of several files use: waiting with a deadline, what must not be unpickled, kernels and graphs by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from hybridlab.cache import GraphCache, Job

# Shapes of fused steps. A kernel compiles for a second or two, for its dtype, shapes, eps, scale and window, and for
# nothing else of an architecture, so tests of several files share these few.
VOCABULARY, MAX_LEN, WINDOW = 211, 40, 7
NARROW = {"hidden_size": 60, "intermediate_size": 91, "num_attention_heads": 4, "head_dim": 24}
WIDE = {"hidden_size": 88, "intermediate_size": 133, "num_attention_heads": 8, "head_dim": 10}


def wait_for(condition: Callable[[], Any], timeout_s: float = 120) -> None:
    """Poll until `condition` holds; the bound is only there so that a hang fails."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Bomb:
    """Would create a file wherever something unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., IO[Any]], tuple[str, str]]:
        return open, (str(self.path), "w")


def attended(attend: Any, *args: Any) -> torch.Tensor:
    """What `attend` writes for these arguments into an output that holds NaN before."""
    q = args[0]
    out = torch.full((1, q.shape[2], q.shape[1], q.shape[3]), float("nan"), dtype=q.dtype, device=q.device)
    attend(*args, out)
    return out


def replayed(held: GraphCache, each: Job) -> torch.Tensor:
    """What the graph of a job leaves in its second buffer."""
    each.buffers[1].fill_(-1)
    with held.lease(each.key) as replay:
        replay()
    return each.buffers[1].clone()


def by_hand(each: Job) -> torch.Tensor:
    """What the function of a job leaves there."""
    each.function()
    return each.buffers[1].clone()
