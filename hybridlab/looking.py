"""Whether looking on disturbs what is looked at: the same requests with and without a page that follows them.

Never imports torch.
"""

from __future__ import annotations

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
    a gap, so that rounds are what repeats. Raises `MeasureError` where the run failed.
    """
    rounds = int(explorer.controls["repeats"].value)
    coins = np.random.default_rng(rounds).integers(2, size=rounds // 2)
    held = [2 * pair + int(coin) for pair, coin in enumerate(coins)]
    started = explorer.start(held)
    explorer.wait(LONGEST_S)
    if not started or explorer.session is None or explorer.session.failure or explorer.session.stopped:
        raise MeasureError("nothing was compared", explorer.status.value, "correct the controls, and let it finish")
    return table(explorer.rows, held)


def table(rows: pd.DataFrame, held: list[int]) -> pd.DataFrame:
    """What `compare` returns, from rows of a session and the rounds that were held, one of every two."""
    gaps = rows[(rows["metric"] == "itl") & (rows["round"] < 2 * len(held))]
    quiet = gaps["round"].isin(held)
    found = []
    for arm in gaps["arm"].unique():
        both = {"followed": gaps[~quiet & (gaps["arm"] == arm)], "held": gaps[quiet & (gaps["arm"] == arm)]}
        medians = {name: own.groupby("round")["ms"].median().to_numpy() for name, own in both.items()}
        for name, own in both.items():
            line = {"arm": arm, "rounds": name, "n": len(own), "pairs": len(held)}
            for label, q in (("p50", 0.5), ("p99", 0.99)):
                if len(own) >= stats.needed(q):
                    line |= _named(label, stats.quantile(own["ms"], q))
            if name == "followed" and len(held) >= stats.needed(0.5):
                line |= _named("ratio", stats.ratio(medians["followed"], medians["held"], paired=True))
            found.append(line)
    return pd.DataFrame(found, columns=COLUMNS)


def _named(label: str, found: stats.Estimate) -> dict[str, float]:
    return {label: found.value, f"{label}_low": found.low, f"{label}_high": found.high}
