"""Every operation of a decode step and the whole step, timed beside the read rate: one recorded run, and its tables.

What takes seconds to import is imported late: the command line reads its options here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlab import terminal
from hybridlab.config import VARIANTS, BenchConfig, as_dict, build
from hybridlab.errors import ConfigError, choose
from hybridlab.terminal import option

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.kernellab import Plan
    from hybridlab.records import Recorded
    from hybridlab.report import Grid

LENGTHS, LONGEST = (1, 100, 500), 4096  # of the context, by default: these, and the model's own up to the last
OPS = ("project qkv", "attend_next", "residual output", "swiglu", "residual down", "project head", "greedy", "attend")
COLUMNS = ["op", "context", "variant", "rows", "depth", "kernels", "n", "us", "us_low", "us_high", "ratio", "ratio_low",
           "ratio_high", "bytes", "flops", "gbs", "read_gbs", "floor_us", "share"]
DEFAULT = BenchConfig()
EXAMPLES = terminal.examples(
    "hybridlab bench tiny", "hybridlab bench random:llama-2-7b --length 1 --length 4096 --repeats 50",
    "hybridlab bench random:mistral-7b --dtype bfloat16 --variant torch --variant 'kernel, pdl'")


def plan(config: BenchConfig | Mapping[str, Any]) -> Plan:
    """All that is looked at before a weight is made. Raises `ConfigError` or `ModelError`."""
    values = as_dict(config) if isinstance(config, BenchConfig) else dict(config)
    for variant in values.get("variants") or ():
        choose("variant", variant, VARIANTS)
    config = build(BenchConfig, values)
    import torch

    from hybridlab import fused, models
    from hybridlab.kernellab import Plan
    from hybridlab.opbench import Sizes

    device, bare = models.resolve_device(config.device), models.skeleton(config.model)
    sizes, context = Sizes.of(bare), models.context(bare) or LONGEST
    lengths = config.lengths or tuple(sorted({n for n in LENGTHS if n < context} | {min(context, LONGEST)}))
    if max(lengths) > context:
        raise ConfigError(f"a context of {max(lengths)} tokens", f"{config.model} holds {context}",
                          "give shorter lengths")
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= fused.PDL_SINCE
    if config.variants and "kernel, pdl" in config.variants and not early:
        raise ConfigError("variant 'kernel, pdl' cannot run here", f"device is {device}",
                          f"it needs a GPU of compute capability {'.'.join(map(str, fused.PDL_SINCE))}")
    variants = config.variants or (VARIANTS if early else VARIANTS[:2])
    for name, given in (("lengths", lengths), ("variants", variants)):
        if len(set(given)) != len(given):
            raise ConfigError(f"{name} holds a value twice", f"{list(given)}", "each is timed once a round")
    kind = config.dtype or str(models._random_dtype(device) if config.model.startswith("random:") else bare.dtype)
    capacity = min(-(-max(lengths) // 64) * 64, context)
    dtype = getattr(torch, kind.removeprefix("torch."))
    return Plan(config, sizes, device, dtype, lengths, tuple(variants), capacity)


def run(config: BenchConfig | Mapping[str, Any], root: Path | str | None = None, progress: bool = True) -> Recorded:
    """Times every operation and the step of the config's model and records the run.

    Raises `ConfigError` or `ModelError` for bad input, before anything is made or written. An operation that fails is
    named in the reason of a run that is then marked failed; the rows of all others are kept, also after Ctrl-C.
    """
    checked = plan(config)
    from hybridlab import experiment, records
    from hybridlab.kernellab import Lab

    with (experiment.reporter(progress) as report,
          experiment.threads(checked.config.threads, on_cpu=checked.device.type == "cpu")):
        target = records.Run.create(checked.config, Path(root) if root is not None else None)
        try:
            failed = Lab(checked, target, report).record()
            reason = f"{len(failed)} could not be timed: {'; '.join(failed)}" if failed else ""
            target.finish("failed" if failed else "complete", reason)
        except BaseException as error:  # KeyboardInterrupt too: the run must not look unfinished forever
            experiment.fail(target, error)
            raise
    return records.read(target.path)


def table(run: Recorded | Path | str) -> pd.DataFrame:
    """One line an operation, context and variant, in the order of the step.

    us, us_low, us_high: median of n replays with its 95 % interval (None for under 6), of one call; ratio …: how many
    times faster than variant torch. gbs: the least bytes over us; read_gbs: of the reads timed beside; floor_us: bytes
    at that rate; share: floor_us over us.
    """
    return _table(_rows(run), "op")


def steps(run: Recorded | Path | str) -> pd.DataFrame:
    """One line a variant and context of the whole step: as `table`, with its kernels, and lost_us: what each of them
    takes beyond reading the bytes, (us - floor_us) / kernels."""
    found = _table(_rows(run), "step")
    return found.assign(lost_us=(found["us"] - found["floor_us"]) / found["kernels"].astype(float))


def _rows(run: Recorded | Path | str) -> pd.DataFrame:
    from hybridlab import records
    from hybridlab.errors import RunError

    found = records.read(run) if isinstance(run, str | Path) else run
    if found.kind != "kernels":
        raise RunError(f"run {found.run_id} is of kind {found.kind}", "these tables show kernels",
                       "give a run of hybridlab bench")
    return found.rows


def _table(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    import pandas as pd

    names = ["op", "context", "variant"]
    own = rows[rows["metric"] == metric]
    cells = dict(list(own.sort_values("order").groupby(names, sort=False)))
    reads = rows[rows["metric"] == "read"]
    place = {op: at for at, op in enumerate(OPS)}
    lines = []
    for op, context, variant in sorted(cells, key=lambda key: (place.get(key[0], -1), *key[1:])):
        beside = reads[(reads["variant"] == op) & (reads["context"] == context)]
        cell = cells[op, context, variant]
        lines.append({"op": op, "context": context, "variant": variant, "rows": cell["rows"].iloc[0],
                      "depth": cell["depth"].iloc[0], "kernels": cell["kernels"].iloc[0]}
                     | _line(cell, cells.get((op, context, "torch")), beside))
    return pd.DataFrame(lines, columns=COLUMNS)


def _line(cell: pd.DataFrame, base: pd.DataFrame | None, reads: pd.DataFrame) -> dict[str, Any]:
    from hybridlab import stats

    enough = len(cell) >= stats.needed(0.5)
    us = stats.quantile(cell["us"], 0.5) if enough else None
    ratio = None
    if enough and base is not None and len(base) == len(cell):  # the i-th of both are of one round
        ratio = stats.ratio(cell["us"], base["us"], paired=True)
    median, size = float(cell["us"].median()), int(cell["bytes"].iloc[0])
    read_gbs = float((reads["bytes"] / reads["us"]).median()) / 1e3
    floor = size / read_gbs / 1e3
    return {"n": len(cell), "us": median, "us_low": us and us.low, "us_high": us and us.high,
            "ratio": ratio and ratio.value, "ratio_low": ratio and ratio.low, "ratio_high": ratio and ratio.high,
            "bytes": size, "flops": int(cell["flops"].iloc[0]), "gbs": size / median / 1e3, "read_gbs": read_gbs,
            "floor_us": floor, "share": floor / median}


def grids(run: Recorded | Path | str) -> list[Grid]:
    """Both tables as text, those that have lines."""
    from hybridlab.report import Grid, interval, number

    def ratio(line: dict[str, Any]) -> str:
        return "1" if line["variant"] == "torch" else interval(line, "ratio")

    ops = [[f"{line['op']} {line['rows']:,} × {line['depth']:,}", f"{line['context'] or ''}", line["variant"],
            interval(line, "us"), ratio(line), number(line["gbs"]), number(line["floor_us"]), f"{line['share']:.0%}"]
           for line in table(run).to_dict("records")]
    whole = [[line["variant"], f"{line['context']:,}", interval(_in_ms(line), "ms"), ratio(line),
              number(line["bytes"] / 1e6), number(line["gbs"]), f"{line['share']:.0%}", str(line["kernels"]),
              number(line["lost_us"])] for line in steps(run).to_dict("records")]
    found = [
        Grid("Operations of a decode step", ["operation", "context", "variant", "µs", "× torch", "GB/s", "floor, µs",
                                             "of read rate"], ops,
             "Medians with 95 % intervals, on memory that no cache holds; floor: the least bytes at the read rate that "
             "was measured beside."),
        Grid("The whole step", ["variant", "context", "ms", "× torch", "MB", "GB/s", "of read rate", "kernels",
                                "lost a kernel, µs"], whole,
             "MB: weights and the rows of the cache; lost: time beyond reading them, over the number of kernels.")]
    return [grid for grid in found if grid.rows]


def _in_ms(line: dict[str, Any]) -> dict[str, Any]:
    return {f"ms{end}": None if line[f"us{end}"] is None else line[f"us{end}"] / 1e3 for end in ("", "_low", "_high")}


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
