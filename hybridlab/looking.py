"""Whether looking on disturbs what is looked at: the same requests with and without a page that follows them.

Never imports torch.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hybridlab import stats
from hybridlab.errors import MeasureError
from hybridlab.explorer import Explorer

COLUMNS = ["arm", "rounds", "n", "p50", "p50_low", "p50_high", "p99", "p99_low", "p99_high"]


def compare(explorer: Explorer) -> pd.DataFrame:
    """Gaps between tokens (ms) in rounds that the explorer follows token by token, and in rounds of the same process
    that say nothing before they are over, so that this process and the page rest. Rounds of both kinds take turns in
    random order, as many of each; their number and all else is what the controls say. A line an arm and kind.

    `ratio` is the median of the held rounds over that of the followed ones, with its interval: 1 where looking on makes
    no difference. Raises `MeasureError` where the run failed.
    """
    rounds = int(explorer.controls["repeats"].value)
    held = sorted(np.random.default_rng(rounds).permutation(rounds)[:rounds // 2].tolist())
    started = explorer.start(held)
    explorer.wait()
    if not started or explorer.session is None or explorer.session.failure or explorer.session.stopped:
        raise MeasureError("nothing was compared", explorer.status.value, "correct the controls, and let it finish")
    return table(explorer.rows, held)


def table(rows: pd.DataFrame, held: list[int]) -> pd.DataFrame:
    """What `compare` returns, from rows of a session and the rounds that were held."""
    gaps = rows[rows["metric"] == "itl"]
    found = []
    for arm, own in gaps.groupby("arm", sort=False):
        quiet = own["round"].isin(held)
        both = {"followed": own.loc[~quiet, "ms"], "held": own.loc[quiet, "ms"]}
        size = min(map(len, both.values()))
        ratio = stats.ratio(both["followed"], both["held"]) if size >= stats.needed(0.5) else None
        for name, sample in both.items():
            line = {"arm": arm, "rounds": name, "n": len(sample)}
            for label, q in (("p50", 0.5), ("p99", 0.99)):
                if len(sample) >= stats.needed(q):
                    sure = stats.quantile(sample, q)
                    line |= {label: sure.value, f"{label}_low": sure.low, f"{label}_high": sure.high}
            if name == "followed" and ratio is not None:
                line |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
            found.append(line)
    return pd.DataFrame(found, columns=[*COLUMNS, "ratio", "ratio_low", "ratio_high"])
