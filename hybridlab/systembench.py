"""`hybridlab system`: what serving costs beside latency: a cold start, memory, what observing, a second process and
an Explorer add.

What takes seconds to import is imported late: the command line reads its options here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from hybridlab import terminal
from hybridlab.config import ARMS, PARTS, POLICIES, SystemConfig, build
from hybridlab.errors import choose
from hybridlab.terminal import option

DEFAULT = SystemConfig()
EXAMPLES = terminal.examples("hybridlab system", "hybridlab system --part coldstart --repeats 6",
                             "hybridlab system --part ipc",
                             "hybridlab system --part memory --model random:llama-2-7b --dtype float16 --length 500")


def command(
    part: Annotated[list[str] | None, option(f"{', '.join(PARTS)}. Repeatable; default: all.")] = None,
    model: Annotated[str, option("As --model of generate.", "--model", "-m")] = DEFAULT.model,
    arm: Annotated[str, option(f"{', '.join(ARMS)}.")] = DEFAULT.arm,
    policy: Annotated[str, option(f"{', '.join(POLICIES)}.")] = "whole",
    length: Annotated[list[int] | None, option("Prompt lengths whose graphs are weighed. Repeatable.", min=1)] = None,
    repeats: Annotated[int, option("Fresh processes of a cold start, for each state of the caches.",
                                    min=1)] = DEFAULT.repeats,
    device: Annotated[str, option("auto, cpu or cuda.")] = DEFAULT.device,
    dtype: Annotated[str | None, option("float32, float16 or bfloat16; default: as the model is.")] = DEFAULT.dtype,
    runs: Annotated[Path | None, option("Where run directories go; default data/runs/local.", "--runs")] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Measure what serving costs beside latency, record a run, and print it.

    **coldstart**: a fresh process from its start to its first token and first replay, with the caches of compiled
    kernels as they are and empty. **memory**: weights, KV cache, each graph. **overhead**: what ranges for profilers
    and a row a token add to the time between two tokens. **ipc**: a message to a worker and back, the way of a token
    from it, and first tokens and gaps through it beside those of the same engine here. **watching**: gaps of requests
    that an Explorer follows token by token, beside gaps of requests that say nothing before they are over.
    """
    with terminal.errors(debug):
        for name in part or ():
            choose("part", name, PARTS)
        config: dict[str, Any] = {"model": model, "arm": arm, "policy": policy, "repeats": repeats, "device": device,
                                  "dtype": dtype, **({"parts": part} if part else {}),
                                  **({"lengths": length} if length else {})}
        build(SystemConfig, config)  # refuse before torch is imported, which takes seconds
        with terminal.err.status("starting"):
            from hybridlab import systemlab
        result = systemlab.run(config, root=runs)
        terminal.results([result.grid().rich()], f"{result.reading()}\nrun      {terminal.near(result.path)}")
