"""Rows of a reproduction of the paper as samples: values by arm and length, and what there is too little of, in words.

Rows are those of `schemas.PAPER`, of one run. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from hybridlab import stats
from hybridlab.config import PAPER_LENGTHS
from hybridlab.stats import Estimate

TIMED = ("ttft", "gap")
NOT_MEASURED = "not measured in this run"
Q = {"median": 0.5, "p99": 0.99}


def by_length(rows: pd.DataFrame, part: str, statistic: str) -> list[tuple[str, int, Estimate]]:
    """Arm, tokens and the median or p99 of each of the `samples` of a part that has enough values; its ends are NaN
    where requests are too few, or differ too much, for an interval."""
    return [(arm, tokens, stats.at(cell, Q[statistic], "value")) for arm, tokens, cell in samples(rows, part)
            if len(cell) >= stats.needed(Q[statistic])]


def samples(rows: pd.DataFrame, part: str) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """Arm, tokens and the rows of each cell of a part, values in ms: first tokens by prompt length; gaps by generation
    length, asked for or the paper's, those of its first tokens, whichever request of at least that length they are of.
    """
    own = stats.unprofiled(rows)[(rows["part"] == part) & rows["metric"].isin(TIMED)]
    gaps = bool((own["metric"] == "gap").any())
    for arm in own["arm"].drop_duplicates():
        mine = own[own["arm"] == arm]
        for tokens in generations(mine) if gaps else sorted(set(mine["tokens"])):
            yield str(arm), int(tokens), at_length(mine, tokens)


def at_length(own: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """First tokens of prompts of `tokens`; of gaps those of the first `tokens` tokens, of requests that were so long.
    """
    if (own["metric"] == "gap").any():
        return own[(own["tokens"] >= tokens) & (own["index"] < tokens)]
    return own[own["tokens"] == tokens]


def generations(gaps: pd.DataFrame) -> list[int]:
    """The lengths that the gaps can speak of: those asked for, and of the paper's those not beyond the longest."""
    asked = {int(tokens) for tokens in gaps["tokens"]}
    return sorted(asked | {tokens for tokens in PAPER_LENGTHS if tokens <= max(asked)})


def served_as(system: str, calls: pd.DataFrame) -> tuple[str, str]:
    """A system of the published protocol by what served its calls, as on a GPU its kernels may be fused: the arm that
    it is, and its name."""
    arm, comma, how = system.partition(",")
    arm += " fused" * bool(calls["reason"].fillna("").str.contains(", fused", regex=False).any())
    return arm, arm + comma + how


def holds(rows: pd.DataFrame) -> str:
    """Which metrics there are, and of which arms."""
    metrics = rows.groupby("arm", sort=False)["metric"].agg(lambda found: ", ".join(dict.fromkeys(found)))
    return "; ".join(f"{names} of {', '.join(metrics.index[metrics == names])}" for names in dict.fromkeys(metrics))


def few(rows: pd.DataFrame, part: str, statistic: str) -> str:
    """Why none of the `samples` of a part has this statistic: how large the largest is, and how large it has to be."""
    return needs(max((len(cell) for _, _, cell in samples(rows, part)), default=0), statistic, " a length")


def needs(n: int, statistic: str, of: str = "") -> str:
    """Why `n` values have no interval of a statistic."""
    least = stats.needed(0.99 if statistic == "p99" else 0.5)
    return f"n = {n:,}{of}; a {statistic} needs {least}" if n else NOT_MEASURED


def short(rows: pd.DataFrame, part: str, lengths: Sequence[int], gaps: int) -> dict[int, int]:
    """How many gaps there are of generation lengths that some arm of a part has fewer than `gaps` of."""
    own = rows[(rows["part"] == part) & (rows["metric"] == "gap")]
    if not len(own):
        return {}
    least = {tokens: min(len(at_length(mine, tokens)) for _, mine in own.groupby("arm")) for tokens in lengths}
    return {tokens: n for tokens, n in sorted(least.items()) if n < gaps}
