"""Whether looking on disturbs what is looked at: the same requests with and without a page that follows them.

Never imports torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from hybridlab import stats
from hybridlab.errors import MeasureError
from hybridlab.explorer import LONGEST_S, Explorer

COLUMNS = ["arm", "rounds", "n", "pairs", *(f"{name}{end}" for name in ("p50", "p99", "ratio")
                                           for end in ("", "_low", "_high"))]


def compare(explorer: Explorer) -> pd.DataFrame:
    """Gaps between tokens (ms) in rounds that the explorer follows token by token, and in rounds of the same process
    that say nothing before they are over, so that this process and the page rest. Of every two rounds one is held,
    drawn by lot; their number and all else is what the controls say. A line an arm and kind, with the number of gaps.

    `ratio` is the median of the held rounds over that of the followed ones, both of medians of whole rounds, resampled
    pair by pair, with its 95 % interval: 1 where looking on makes no difference. Load from elsewhere lasts longer than
    a gap, so that rounds are what repeats; with as many busy processes as cores the ratio speaks of the scheduler.
    Raises `MeasureError` where the run failed.
    """
    return table(*watched(explorer))


def watched(explorer: Explorer) -> tuple[pd.DataFrame, list[int]]:
    """The rows of the run that `compare` makes, and which rounds of it were held. Raises as it does."""
    rounds = int(explorer.controls["repeats"].value)
    coins = np.random.default_rng(rounds).integers(2, size=rounds // 2)
    held = [2 * pair + int(coin) for pair, coin in enumerate(coins)]
    started = explorer.start(held)
    explorer.wait(LONGEST_S)
    if not started or explorer.session is None or explorer.session.failure or explorer.session.stopped:
        raise MeasureError("nothing was compared", explorer.status.value, "correct the controls, and let it finish")
    return explorer.rows, held


def pairs(rows: pd.DataFrame, held: list[int]) -> list[dict[str, Any]]:
    """Rows of a system run (round, setting, step, value, unit) for each arm and every two rounds: the median gap of the
    followed and of the held one, in ms, and the first over the second."""
    found = []
    for arm, own in _gaps(rows, held).groupby("arm", sort=False):
        medians = own.groupby("round")["ms"].median()
        for pair, at in enumerate(held):
            quiet, seen = float(medians[at]), float(medians[at ^ 1])
            found += [{"round": pair, "setting": arm, "step": step, "value": value, "unit": unit} for step, value, unit
                      in (("followed", seen, "ms"), ("held", quiet, "ms"), ("followed / held", seen / quiet, "×"))]
    return found


def table(rows: pd.DataFrame, held: list[int]) -> pd.DataFrame:
    """What `compare` returns, from rows of a session and the rounds that were held, one of every two."""
    gaps = _gaps(rows, held)
    quiet = gaps["round"].isin(held)
    found = []
    for arm in gaps["arm"].unique():
        both = {"followed": gaps[~quiet & (gaps["arm"] == arm)], "held": gaps[quiet & (gaps["arm"] == arm)]}
        medians = {name: own.groupby("round")["ms"].median().to_numpy() for name, own in both.items()}
        for name, own in both.items():
            line = {"arm": arm, "rounds": name, "n": len(own), "pairs": len(held)}
            for label, q in (("p50", 0.5), ("p99", 0.99)):
                if (found_at := stats.of(own, q)) is not None:
                    line |= _named(label, found_at)
            if name == "followed" and len(held) >= stats.needed(0.5):
                line |= _named("ratio", stats.ratio(medians["followed"], medians["held"], paired=True))
            found.append(line)
    return pd.DataFrame(found, columns=COLUMNS)


def _gaps(rows: pd.DataFrame, held: list[int]) -> pd.DataFrame:
    return stats.unprofiled(rows)[(rows["metric"] == "itl") & (rows["round"] < 2 * len(held))]


def _named(label: str, found: stats.Estimate) -> dict[str, float]:
    return {label: found.value, f"{label}_low": found.low, f"{label}_high": found.high}
