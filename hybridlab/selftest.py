"""Whether graphs may be dropped one by one here, tried in a process of its own.

Graphs captured on one stream may share a cuBLAS workspace, and with some versions of PyTorch resetting one gives that
memory back under the others (pytorch issue 193402): a later replay of a graph that nobody touched then ends the
process, or computes with what others have written there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hybridlab import children, graphs

PATIENCE_S = 120.0
WIDTH, WEIGHTS, REPLAYS = 2048, 3, 20
ROWS = (1, 16, 64)  # of the graphs: products that cuBLAS computes in different ways


@cache
def one_by_one(pool: str) -> str:
    """Why graphs cannot be dropped one by one on this GPU, in pools of kind "shared" or "private"; "" if they can.

    Takes some seconds, once a process: a GPU that has gone wrong takes its process with it.
    """
    try:
        with children.Child(children.tied("hybridlab.selftest", pool)) as child:
            if child.running(PATIENCE_S):
                return f"the self-test did not end within {PATIENCE_S:g} s"
    except OSError as error:
        return f"the self-test did not start: {type(error).__name__}"
    if child.code == 0:
        return ""
    return f"the self-test failed: {(child.last or [child.words])[-1][:200]}"


def main(pool: str, device: torch.device) -> None:
    """Capture, drop each graph in turn, overwrite what is free, and replay the others. Raises if a result changes."""
    torch.manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, device=device) for _ in range(WEIGHTS)]
    for dropped in range(len(ROWS)):
        shared = graphs.new_pool(device) if pool == "shared" else None
        outs = [torch.zeros(rows, WIDTH, device=device) for rows in ROWS]
        programs = [_program(weights, out) for out in outs]
        for program in programs:
            program()
        wanted = [out.clone() for out in outs]
        made = [graphs.record(program, device, pool=shared) for program in programs]
        made[dropped].reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        garbage = [torch.full((2**18,), float("nan"), device=device) for _ in range(64)]
        for _ in range(REPLAYS):
            for index, (graph, out) in enumerate(zip(made, outs, strict=True)):
                if index != dropped:
                    out.fill_(-1)
                    graph.replay()
                    if not torch.equal(out, wanted[index]):
                        raise RuntimeError(f"graph {index} computes something else once graph {dropped} is dropped")
        if not all(bool(block.isnan().all()) for block in garbage):
            raise RuntimeError(f"a graph writes into memory that was given back with graph {dropped}")
        for index, graph in enumerate(made):
            if index != dropped:
                graph.reset()


def _program(weights: list[Tensor], out: Tensor) -> Callable[[], None]:
    given = torch.ones_like(out)

    def program() -> None:
        x = given
        for weight in weights:
            x = x @ weight * 0.01
        out.copy_(x)

    return program


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
