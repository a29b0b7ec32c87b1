"""The reading of an ablation: what its rows say, in words, and what speaks against believing them. Never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from hybridlab import soundness, stats, telemetry
from hybridlab.cells import cells
from hybridlab.config import RunConfig

if TYPE_CHECKING:
    from hybridlab.experiment import Result

WARMUP = RunConfig().warmup  # rounds; fewer may leave caches and clocks on their way


def reading(result: Result) -> str:
    """The result in words; every number is computed from the rows."""
    if result.rows.empty:
        return f"Run {result.run_id} holds no rows: {result.reason or result.status}."
    table = result.table()
    pooled = table[table["prompt_tokens"] == "all"]
    parts = [_metric(pooled[pooled["metric"] == metric], title) for metric, title in (
        ("itl", "between two tokens"), ("ttft", "to the first token, all prompt lengths pooled,"))]
    parts += [_limit(pooled), _paths(result.rows, list(cells(result.config)))]
    if pooled["p99"].isna().any():
        parts.append(f"A p99 is shown from n = {stats.needed(0.99)} on, where requests agree enough for its interval.")
    parts += [_circumstances(result), soundness.words(result.rows)]
    if result.on_cpu:
        parts.append("These are CPU timings: a graph is a tape of the recorded calls here, so the ratios show what "
                     "leaving Python out of the loop saves on this machine; they are not GPU ratios.")
    return " ".join(part for part in parts if part)


def _circumstances(result: Result) -> str:
    """How the run was made, where that is worse than it could be."""
    said, extra = [], result.recorded.extra
    if result.config.warmup < WARMUP:
        said.append(f"Rounds that warmed up: {result.config.warmup}, where {WARMUP} are usual.")
    said.append(result.busy())
    said += [f"Measure in a new process: {lost}." for one in extra.get("processes", [extra])
             if (lost := one.get("lost"))]
    said.append(telemetry.words([one["during"] for one in extra.get("processes", [extra]) if "during" in one]))
    return " ".join(filter(None, said))


def _metric(table: pd.DataFrame, title: str) -> str:
    table = table[table["p50"].notna()]
    if table.empty:
        return ""
    times = ", ".join(f"{_number(cell.p50, cell.p50_low, cell.p50_high, ' ms')} for {cell.arm}"
                      for cell in table.itertuples())
    faster = [f"{cell.arm} is {_number(cell.ratio_to_eager, cell.ratio_low, cell.ratio_high, '')} times as fast"
              for cell in table.itertuples() if cell.arm != "eager" and cell.ratio_to_eager is not None]
    compared = f" Against eager, {', '.join(faster)}." if faster else ""
    return f"The median time {title} was {times} (95 % interval in brackets).{compared}"


def _limit(pooled: pd.DataFrame) -> str:
    """How near the arms come to the least time that the machine allows."""
    known = pooled[(pooled["metric"] == "itl") & pooled["of_limit"].notna()] if "of_limit" in pooled else pooled[:0]
    if known.empty:
        return ""
    shares = ", ".join(f"{cell.of_limit:.0%} in {cell.arm}" for cell in known.itertuples())
    return (f"Of the least time that memory and arithmetic allow, {known['limit'].median():.3g} ms a token, the share "
            f"reached is {shares}.")


def _number(value: float, low: float, high: float, unit: str) -> str:
    return f"{value:.3g}{unit} [{low:.3g}, {high:.3g}]"


def _paths(rows: pd.DataFrame, arms: list[str]) -> str:
    words = []
    for arm in arms:
        shares = rows.loc[rows["arm"] == arm, "path"].value_counts(normalize=True)
        words.append(f"{arm} ran " + " and ".join(f"{100 * share:.4g} % {path}" for path, share in shares.items()))
    return f"Paths of the timed tokens: {'; '.join(words)}."
