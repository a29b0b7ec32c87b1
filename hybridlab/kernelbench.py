"""Every operation of a decode step and the whole step, timed beside the read rate: one recorded run, and its tables.

What takes seconds to import is imported late: the command line reads its options here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlab import terminal
from hybridlab.config import VARIANTS, BenchConfig, as_dict
from hybridlab.errors import ConfigError, RunError
from hybridlab.progress import reporter
from hybridlab.terminal import option

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.kernellab import KernelResult, Plan
    from hybridlab.report import Grid

LENGTHS, LONGEST = (1, 100, 500), 4096  # of the context, by default: these, and the model's own up to the last
TITLES = {"kernels": "Operations of a decode step", "steps": "The whole step"}  # by the name of a table in the README
DEFAULT = BenchConfig()
EXAMPLES = terminal.examples(
    "hybridlab bench tiny", "hybridlab bench random:llama-2-7b --length 1 --length 4096 --repeats 50",
    "hybridlab bench random:mistral-7b --dtype bfloat16 --variant torch --variant 'kernel, pdl'")


def plan(config: BenchConfig | Mapping[str, Any]) -> Plan:
    """All that is looked at before a weight is made. Raises `ConfigError` or `ModelError`."""
    import torch

    from hybridlab import fused, models, parameters
    from hybridlab.kernellab import Plan
    from hybridlab.opbench import Sizes

    config = parameters.timed(as_dict(config) if isinstance(config, BenchConfig) else config)
    device, bare = models.resolve_device(config.device), models.skeleton(config.model)
    sizes, context = Sizes.of(bare), models.context(bare) or LONGEST
    parameters.require_held(config, context)
    lengths = config.lengths or tuple(sorted({n for n in LENGTHS if n < context} | {min(context, LONGEST)}))
    early = fused.starts_early(device)
    if config.variants and "kernel, pdl" in config.variants and not early:
        raise ConfigError("variant 'kernel, pdl' cannot run here", f"device is {device}",
                          f"it needs a GPU of compute capability {'.'.join(map(str, fused.PDL_SINCE))}")
    variants = config.variants or (VARIANTS if early else VARIANTS[:2])
    kind = config.dtype or str(models.random_dtype(device) if config.model.startswith("random:") else bare.dtype)
    capacity = min(-(-max(lengths) // 64) * 64, context)
    dtype = getattr(torch, kind.removeprefix("torch."))
    return Plan(config, sizes, device, dtype, lengths, tuple(variants), capacity)


def run(config: BenchConfig | Mapping[str, Any], root: Path | str | None = None, progress: bool = True) -> KernelResult:
    """Times every operation and the step of the config's model and records the run.

    Raises `ConfigError` or `ModelError` for bad input, before anything is made or written. An operation that fails is
    named in the reason of a run that is then marked failed; the rows of all others are kept, also after Ctrl-C.
    """
    checked = plan(config)
    from hybridlab import experiment
    from hybridlab.kernellab import KernelResult, Lab
    from hybridlab.telemetry import Telemetry

    with (reporter(progress) as report,
          experiment.threads(checked.config.threads, on_cpu=checked.device.type == "cpu"),
          experiment.recording(checked.config, root) as target, Telemetry.of(checked.device) as clocks):
        failed = Lab(checked, target, report, clocks).record()
        reason = f"{len(failed)} could not be timed: {'; '.join(failed)}" if failed else ""
        status = target.finish("failed" if failed else "complete", reason, {"during": clocks.summary()})
        report(f"run {target.path.name}: {status}", 1, 1)  # what stays in a notebook
    return KernelResult.open(target.path)


def table(run: KernelResult | Path | str) -> pd.DataFrame:
    """One line an operation, context and variant, in the order of the step.

    us, us_low, us_high: median of n replays with its 95 % interval (None for under 6), of one call; ratio …: how many
    times faster than variant torch. gbs: the least bytes over us; read_gbs: of the reads timed beside; floor_us: bytes
    at that rate; share: floor_us over us.
    """
    from hybridlab import kerneltables

    return kerneltables.table(_rows(run))


def steps(run: KernelResult | Path | str) -> pd.DataFrame:
    """One line a variant and context of the whole step: as `table`, with its kernels, and lost_us: what each of them
    takes beyond reading the bytes, (us - floor_us) / kernels."""
    from hybridlab import kerneltables

    return kerneltables.steps(_rows(run))


def _rows(run: KernelResult | Path | str) -> pd.DataFrame:
    from hybridlab.kernellab import KernelResult

    found = KernelResult.open(run) if isinstance(run, str | Path) else run
    if found.kind != "kernels":
        raise RunError(f"run {found.run_id} is of kind {found.kind}", "these tables show kernels",
                       "give a run of hybridlab bench")
    return found.rows


def grids(run: KernelResult | Path | str) -> list[Grid]:
    """Both tables as text, those that have lines."""
    from hybridlab import kerneltables
    from hybridlab.report import Grid, interval, number

    def ratio(line: dict[str, Any]) -> str:
        return "1" if line["variant"] == "torch" else interval(line, "ratio")

    ops = [[f"{line['op']} {line['rows']:,} × {line['depth']:,}", f"{line['context'] or ''}", line["variant"],
            interval(line, "us"), ratio(line), number(line["gbs"]), number(line["floor_us"]), f"{line['share']:.0%}"]
           for line in table(run).to_dict("records")]
    whole = [[line["variant"], f"{line['context']:,}", interval(kerneltables.in_ms(line), "ms"), ratio(line),
              number(line["bytes"] / 1e6), number(line["gbs"]), f"{line['share']:.0%}", str(line["kernels"]),
              number(line["lost_us"])] for line in steps(run).to_dict("records")]
    found = [
        Grid(TITLES["kernels"], ["operation", "context", "variant", "µs", "× torch", "GB/s", "floor, µs",
                                             "of read rate"], ops,
             "Medians with 95 % intervals, on memory that no cache holds; floor: the least bytes at the read rate that "
             "was measured beside."),
        Grid(TITLES["steps"], ["variant", "context", "ms", "× torch", "MB", "GB/s", "of read rate", "kernels",
                                "lost a kernel, µs"], whole,
             "MB: weights and the rows of the cache; lost: time beyond reading them, over the number of kernels.")]
    return [grid for grid in found if grid.rows]


def grid(run: KernelResult, name: str) -> Grid:
    """The table that TITLES names so, titled with its run. Raises `RunError` where the run holds no line of it."""
    for found in grids(run):
        if found.title == TITLES[name]:
            return replace(found, title=f"{found.title} · {run.caption}")
    raise RunError(f"run {run.run_id} holds no rows for table {name!r}", run.reason, "name a complete run")


def command(
    model: Annotated[str, typer.Argument(help="As --model of generate: llama, mistral, qwen2 or qwen3.")],
    length: Annotated[list[int] | None, option(
        "Tokens of context. Repeatable; default 1, 100, 500 and the model's own.", min=1)] = None,
    variant: Annotated[list[str] | None, option(
        f"{', '.join(map(repr, VARIANTS))}. Repeatable; default: all that the device can run.")] = None,
    repeats: Annotated[int, option("Timed replays of each; 6 are needed for an interval.", min=1)] = DEFAULT.repeats,
    device: Annotated[str, option("auto, cpu or cuda.")] = DEFAULT.device,
    dtype: Annotated[str | None, option("float32, float16 or bfloat16; default: as the model is.")] = DEFAULT.dtype,
    seed: Annotated[int, option("Of the order of replays.")] = DEFAULT.seed,
    runs: Annotated[Path | None, option("Where run directories go; default data/runs/local.", "--runs")] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Time every operation of MODEL's decode step, and the whole step, beside the rate at which memory is read.

    Each operation runs as stock PyTorch writes it (torch), as one kernel of ours (kernel) and, where the GPU can, begun
    before the one before it ends (kernel, pdl), over weights that no cache holds. Exit code 1 if one could not be
    timed; the others are recorded.
    """
    with terminal.errors(debug):
        with terminal.err.status("starting"):
            config = plan({"model": model, "lengths": length or None, "variants": variant or None, "device": device,
                           "dtype": dtype, "repeats": repeats, "seed": seed}).config
        found = run(config, root=runs)
        terminal.results([grid.rich() for grid in grids(found)], f"run      {terminal.near(found.path)}")
    if found.status != "complete":
        terminal.err.print(found.reason, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(terminal.FAILED)
