"""`hybridlab soak`: requests that evict all along, canaries, a worker that is stopped and killed; does anything grow?

What takes seconds to import is imported late: the command line reads its options here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlab import terminal, workload
from hybridlab.config import POLICIES, PROCESSES, SoakConfig, build
from hybridlab.errors import choose
from hybridlab.terminal import option

DEFAULT = SoakConfig()
EXAMPLES = terminal.examples("hybridlab soak --minutes 10", "hybridlab soak --minutes 1 --process here",
                             "hybridlab soak -m random:llama-2-7b --dtype float16 --device cuda --minutes 60")


def command(
    minutes: Annotated[float, option("How long.", min=0.01)] = DEFAULT.minutes,
    model: Annotated[str, option("As --model of generate.", "--model", "-m")] = DEFAULT.model,
    arm: Annotated[str, option("graph or hybrid.")] = DEFAULT.arm,
    policy: Annotated[str, option(f"{', '.join(POLICIES)}.")] = "whole",
    process: Annotated[str, option("worker: it is stopped and killed at random; here: neither.")] = DEFAULT.process,
    trace: Annotated[str, option("Lengths of the requests, as TRACE of cache.")] = DEFAULT.trace,
    cache_graphs: Annotated[int, option("That the cache holds; four times as many are asked for.",
                                         min=2)] = DEFAULT.cache_graphs,
    device: Annotated[str, option("auto, cpu or cuda.")] = DEFAULT.device,
    dtype: Annotated[str | None, option("float32, float16 or bfloat16; default: as the model is.")] = DEFAULT.dtype,
    seed: Annotated[int, option("Of the requests and of the moments at which the worker is hit.")] = DEFAULT.seed,
    runs: Annotated[Path | None, option("Where run directories go; default data/runs/local.", "--runs")] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Serve requests for a while, record a run, and say whether anything grows. Exit code 1 if so.

    Four times more prompt lengths are asked for than the cache holds. Every tenth request is a canary, whose tokens
    must be those that were recorded before. Watched are memory, open files, threads and the gap between tokens.
    """
    with terminal.errors(debug):
        choose("process", process, PROCESSES)
        config = build(SoakConfig, {
            "minutes": minutes, "model": model, "arm": arm, "policy": policy, "process": process, "trace": trace,
            "cache_graphs": cache_graphs, "device": device, "dtype": dtype, "seed": seed})
        workload.require_known(trace)  # refuse before torch is imported, which takes seconds
        with terminal.err.status("starting"):
            from hybridlab import soak
        result = soak.run(config, root=runs)
        verdict = result.reading().splitlines()[-1]  # what comes before it stands under the table
        terminal.results([result.grid().rich()], f"{verdict}\nrun      {terminal.near(result.path)}")
    if result.status != "complete":
        raise typer.Exit(terminal.FAILED)
