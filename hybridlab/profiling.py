"""`hybridlab trace`: where the time of a token goes, in each arm, from a trace made now or from a report that is there.

What takes seconds to import is imported late: the command line reads its options here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlab import terminal
from hybridlab.config import ARMS, POLICIES, TOOLS, TraceConfig, build
from hybridlab.errors import ConfigError, choose
from hybridlab.terminal import option

if TYPE_CHECKING:
    import pandas as pd

DEFAULT = TraceConfig()
EXAMPLES = terminal.examples(
    "hybridlab trace", "hybridlab trace random:llama-2-7b --dtype float16 --arm eager --arm hybrid --kernels fused",
    "hybridlab trace --report report.sqlite", "hybridlab trace --report trace.json.gz --perfetto mine.json.gz")
SUFFIXES = {".sqlite": "nsys", ".db": "nsys", ".json": "kineto", ".gz": "kineto"}


def read(path: Path) -> pd.DataFrame:
    """The events of a report: an SQLite export of Nsight Systems, or a trace of PyTorch's profiler (.json, .json.gz).

    Raises: ConfigError for a file of another kind, TraceError for one that cannot be read.
    """
    from hybridlab import kineto, nsys

    if path.suffix == ".nsys-rep":
        raise ConfigError(f"{path.name} is a report of Nsight Systems", "its format is not open",
                          f"export it: nsys export --type=sqlite {path.name}")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path.name} is no trace by its name", f"known endings are {', '.join(SUFFIXES)}",
                          "give an SQLite export of nsys, or what export_chrome_trace wrote")
    return nsys.read(path) if SUFFIXES[path.suffix] == "nsys" else kineto.read(path)


def command(
    model: Annotated[str, typer.Argument(help="As --model of generate.")] = DEFAULT.model,
    arm: Annotated[list[str] | None, option(f"{', '.join(ARMS)}. Repeatable; default: all.")] = None,
    policy: Annotated[list[str] | None, option(f"{', '.join(POLICIES)}. Repeatable: several are compared.")] = None,
    kernels: Annotated[list[str] | None, option("torch or fused. Repeatable.")] = None,
    length: Annotated[int, option("Tokens of the prompt.", min=1)] = DEFAULT.length,
    tokens: Annotated[int, option("Tokens generated under the profiler.", min=2)] = DEFAULT.traced_tokens,
    warmup: Annotated[int, option("Untraced requests before.", min=1)] = DEFAULT.warmup,
    run_ahead: Annotated[int, option("Steps launched before an earlier token is read.", min=0)] = DEFAULT.run_ahead,
    tool: Annotated[str, option(f"{', '.join(TOOLS)}: auto takes nsys where it is, on a GPU.")] = DEFAULT.tool,
    device: Annotated[str, option("auto, cpu or cuda.")] = DEFAULT.device,
    dtype: Annotated[str | None, option("float32, float16 or bfloat16; default: as the model is.")] = DEFAULT.dtype,
    report: Annotated[Path | None, option("Trace nothing: explain this report (.sqlite of nsys, .json or .json.gz of "
                                          "PyTorch's profiler).")] = None,
    perfetto: Annotated[Path | None, option("Write the trace for ui.perfetto.dev to this .json or .json.gz.")] = None,
    figures: Annotated[Path, option("Where the time line goes, as a page.")] = Path("figures/local"),
    runs: Annotated[Path | None, option("Where run directories go; default data/runs/local.", "--runs")] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Trace one request of each arm and show where a token's time goes: Python, launches, gaps, kernels.

    Under Nsight Systems where `nsys` is and the device is a GPU, else under PyTorch's profiler. A profiler slows what
    it watches: these times explain latencies, and are never mixed with them.
    """
    with terminal.errors(debug):
        if report is not None:
            traces, caption, where = {report.name: read(report)}, report.name, ""
        else:
            choose("tool", tool, TOOLS)
            config: dict[str, Any] = {
                "model": model, "length": length, "traced_tokens": tokens, "warmup": warmup, "run_ahead": run_ahead,
                "tool": tool, "device": device, "dtype": dtype, **({"arms": arm} if arm else {}),
                **({"policy": policy} if policy else {}), **({"kernels": kernels} if kernels else {})}
            build(TraceConfig, config)  # refuse before torch is imported, which takes seconds
            with terminal.err.status("starting"):
                from hybridlab import tracelab
            result = tracelab.run(config, root=runs)
            traces, caption, where = result.traces(), result.caption, f"run      {terminal.near(result.path)}"
        _show(traces, caption, where, perfetto, figures)


def _show(traces: dict[str, pd.DataFrame], caption: str, where: str, perfetto: Path | None, figures: Path) -> None:
    from hybridlab import gaps, plots, tracetables, traceviews
    from hybridlab.perfetto import write

    tables = {name: gaps.by_token(trace) for name, trace in traces.items()}
    written = [file for name, draw in (("trace_token", traceviews.token), ("trace_shares", traceviews.shares))
               for file in plots.write(draw(traces, caption), figures / name, ("html",))]
    if perfetto is not None:
        written.append(write(traces, perfetto))
    lines = [tracetables.reading(tables), *filter(None, [where]),
             *(f"wrote    {terminal.near(file)}" for file in written)]
    terminal.results([tracetables.grid(tables, caption).rich()], "\n".join(lines))
