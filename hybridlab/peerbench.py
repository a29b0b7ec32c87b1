"""`hybridlab peers`: other engines under our protocol.

What takes seconds to import is imported late: the command line reads its options here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from hybridlab import terminal
from hybridlab.config import ARMS, KERNELS, POLICIES, build
from hybridlab.engines import ENGINES, SYSTEMS, PeersConfig
from hybridlab.errors import choose
from hybridlab.terminal import option

DEFAULT = PeersConfig()
EXAMPLES = terminal.examples(
    "hybridlab peers", "hybridlab peers --system hf-generate --length 10 --repeats 30",
    "hybridlab peers --model random:llama-2-7b --dtype float16 --arm eager --arm hybrid")


def command(
    model: Annotated[str, option("As --model of generate.", "--model", "-m")] = DEFAULT.model,
    system: Annotated[list[str] | None, option(f"{', '.join(ENGINES)}. Repeatable; default: "
                                                f"{', '.join(SYSTEMS)}.")] = None,
    arm: Annotated[list[str] | None, option(f"Of ours: {', '.join(ARMS)}. Repeatable; ratios are against the "
                                             "first; default: hybrid.")] = None,
    policy: Annotated[str, option(f"Of ours: {', '.join(POLICIES)}.")] = "full",
    kernels: Annotated[str, option(f"Of ours: {', '.join(KERNELS)}.")] = DEFAULT.kernels,
    length: Annotated[list[int] | None, option("Prompt lengths in tokens. Repeatable; default: 10, 100, 500.",
                                                min=1)] = None,
    new_tokens: Annotated[int, option("Tokens of a request whose gaps are timed.", "--new-tokens", "-n",
                                       min=2)] = DEFAULT.new_tokens,
    repeats: Annotated[int, option("Rounds, of one first token for each system and length.",
                                    min=1)] = DEFAULT.repeats,
    itl_repeats: Annotated[int, option("Rounds that also have a request whose gaps are timed.", "--itl-repeats",
                                        min=0)] = DEFAULT.itl_repeats,
    budget_s: Annotated[float, option("No round starts after this many seconds of them.", "--budget-s",
                                       min=1)] = DEFAULT.budget_s,
    seed: Annotated[int, option("Of prompts and of the order of requests.", min=0)] = DEFAULT.seed,
    device: Annotated[str, option("auto, cpu or cuda.")] = DEFAULT.device,
    dtype: Annotated[str | None, option("float32, float16 or bfloat16; default: as the model is.")] = DEFAULT.dtype,
    runs: Annotated[Path | None, option("Where run directories go; default data/runs/local.", "--runs")] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Measure other engines beside arms of ours, under one protocol, record a run, and print it.

    Each system has a process of its own and loads the same weights where it can; requests go to them one at a time, in
    a random order, with the same prompts, greedy, timed from token ids on the host to token ids on the host. Greedy
    tokens are compared with ours first. An engine that is not installed leaves its line empty and says how to install
    it; one that does not start or dies is named with its last words, and the others go on.
    """
    with terminal.errors(debug):
        for name in system or ():
            choose("system", name, ENGINES)
        config: dict[str, Any] = {
            "model": model, "policy": policy, "kernels": kernels, "new_tokens": new_tokens, "repeats": repeats,
            "itl_repeats": itl_repeats, "budget_s": budget_s, "seed": seed, "device": device, "dtype": dtype,
            **{name: value for name, value in (("systems", system), ("arms", arm), ("lengths", length)) if value}}
        build(PeersConfig, config)  # refuse before torch is imported, which takes seconds
        with terminal.err.status("starting"):
            from hybridlab import peerlab
        result = peerlab.run(config, root=runs)
        terminal.results([result.grid().rich()], f"{result.reading()}\nrun      {terminal.near(result.path)}")
