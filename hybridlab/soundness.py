"""Whether the samples of an ablation can be believed: drift, two modes, slow tails and what happened in them, processes
that differ, and how far the clocks of host, device and client are apart.

Rows are those of `schemas.ABLATION`. Prompt lengths are pooled after each value was divided by the median of its arm,
metric and length, so that no length looks like a mode. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hybridlab import stats, steadiness, tails
from hybridlab.report import NONE, Grid, interval, number

CELL = ["arm", "metric", "prompt_tokens"]
QUANTILES = (0.5, 0.9, 0.95, 0.99)


def steady(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm and metric: n, drift (relative, over the run), drift_p, drifts; modes_p, modes, fast and slow (of
    the median) and slow_share. None where n is too small for a test; see `steadiness`."""
    lines = []
    for arm, metric, own in _groups(rows):
        values = own.sort_values(["process", "request", "index"])["relative"].to_numpy()
        line: dict[str, Any] = {"arm": arm, "metric": metric, "n": len(values)}
        drift = steadiness.drift(values) if len(values) >= steadiness.DRIFT_LEAST else None
        modes = steadiness.modes(values) if len(values) >= steadiness.MODES_LEAST else None
        line |= {"drift": drift and drift.change, "drift_p": drift and drift.p, "drifts": drift and drift.flagged}
        line |= {"modes_p": modes and modes.p, "modes": modes and modes.flagged, "fast": modes and modes.fast,
                 "slow": modes and modes.slow, "slow_share": modes and modes.slow_share}
        lines.append(line)
    return pd.DataFrame(lines, dtype=object)


def slow(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm, metric and kind of what happened: times (samples in which it did), of the `count` samples beyond
    the p99 the share in which it did (slow), and of the rest (others). Kind "unexplained": nothing known happened.

    A kind that the rest has as often explains nothing. Empty where n does not allow a p99 or rows hold no record.
    """
    lines = []
    for arm, metric, own in _groups(rows[rows["happened"].notna()]):
        if len(own) < stats.needed(tails.TAIL):
            continue
        beyond = (own["relative"] > stats.quantile(own["relative"], tails.TAIL).value).to_numpy()
        for kind in (*tails.KINDS, tails.UNEXPLAINED):
            hit = ((own["happened"] == "") if kind == tails.UNEXPLAINED else
                   own["happened"].str.split(", ").map(lambda found, kind=kind: kind in found)).to_numpy(dtype=bool)
            if hit.any():
                lines.append({"arm": arm, "metric": metric, "kind": kind, "times": int(hit.sum()),
                              "count": int(beyond.sum()), "slow": float(hit[beyond].mean()) if beyond.any() else 0.0,
                              "others": float(hit[~beyond].mean())})
    return pd.DataFrame(lines, columns=["arm", "metric", "kind", "times", "count", "slow", "others"])


def clocks(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm and metric: median ms by the server's clock (ms, host to host), by the device's (device_ms) and
    by that of a worker's client (client_ms), and of their differences to the server's, value by value: by how much the
    server took longer than the device (beside_ms), and the client longer than the server (beyond_ms). Each with its
    95 % interval, None where there is no such clock. Empty without any of the two."""
    lines = []
    known = rows[rows["device_ms"].notna() | rows["client_ms"].notna()]
    for (arm, metric), own in known.groupby(["arm", "metric"], sort=False):
        if len(own) < stats.needed(0.5):
            continue
        device, client = (own[name].astype(float).dropna() for name in ("device_ms", "client_ms"))
        lines.append({"arm": arm, "metric": metric, "n": len(own)} | _three("ms", own["ms"])
                     | _three("device_ms", device) | _three("beside_ms", (own["ms"] - device).dropna())
                     | _three("client_ms", client) | _three("beyond_ms", (client - own["ms"]).dropna()))
    return pd.DataFrame(lines, dtype=object)


def processes(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm and metric: count of processes, and the least and the most of their medians, relative to the
    median of all (least, most). Empty for rows of one process."""
    lines = []
    for arm, metric, own in _groups(rows[rows["process"].notna()]):
        medians = own.groupby("process")["relative"].median()
        if len(medians) > 1:
            lines.append({"arm": arm, "metric": metric, "processes": len(medians), "least": float(medians.min()),
                          "most": float(medians.max())})
    return pd.DataFrame(lines)


def quantiles(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm, metric and prompt length: n, p50, p90, p95, p99 with their intervals (None where n does not
    allow one), and max, in ms."""
    lines = []
    for (arm, metric, length), own in rows.groupby(CELL, sort=False):
        line: dict[str, Any] = {"arm": arm, "metric": metric, "prompt_tokens": length, "n": len(own)}
        for q in QUANTILES:
            line |= _three(f"p{100 * q:g}", own["ms"], q)
        lines.append(line | {"max": float(own["ms"].max())})
    return pd.DataFrame(lines, dtype=object)


def by_generation(rows: pd.DataFrame, lengths: Sequence[int]) -> pd.DataFrame:
    """One line an arm and generation length: p50 and p99 in ms of the gaps of the first so many new tokens, with their
    intervals. A request of n tokens begins as a longer one does, so that one long request serves all shorter lengths;
    a length beyond what was generated has no line."""
    gaps = rows[rows["metric"] == "itl"]
    lines = []
    for length in lengths:
        for arm, own in gaps[gaps["index"] < length].groupby("arm", sort=False):
            if int(own["index"].max()) == length - 1:
                lines.append({"arm": arm, "new_tokens": length, "n": len(own)} | _three("p50", own["ms"])
                             | _three("p99", own["ms"], 0.99))
    return pd.DataFrame(lines, dtype=object)


def _groups(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    relative = rows.assign(relative=rows["ms"] / rows.groupby(CELL)["ms"].transform("median"))
    for (arm, metric), own in relative.groupby(["arm", "metric"], sort=False):
        yield str(arm), str(metric), own


def _three(name: str, values: Any, q: float = 0.5) -> dict[str, float | None]:
    sample = np.asarray(values, dtype=float)
    if len(sample) < stats.needed(q):
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    found = stats.quantile(sample, q)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def steady_grid(rows: pd.DataFrame, caption: str) -> Grid:
    """`steady` as text."""
    def flag(value: bool | None, words: str) -> str:
        return NONE if value is None else words if value else "no"

    lines = [[f"{line['arm']} {line['metric'].upper()}", str(line["n"]), flag(line["drifts"], "yes"),
              NONE if line["drift"] is None else f"{line['drift']:+.1%}",
              flag(line["modes"], "yes"),
              f"{line['fast']:.2f}, {line['slow']:.2f} ({line['slow_share']:.0%})" if line["modes"] else NONE]
             for line in steady(rows).to_dict("records")]
    return Grid(f"Steadiness · {caption}", ["arm", "n", "drifts", "over the run", "two modes", "fast, slow (share)"],
                lines, f"Tests at level {steadiness.LEVEL:g}; a drift needs n ≥ {steadiness.DRIFT_LEAST}, two modes "
                f"n ≥ {steadiness.MODES_LEAST}. Values relative to the median of their prompt length.")


def slow_grid(rows: pd.DataFrame, caption: str) -> Grid:
    """`slow` as text."""
    lines = [[f"{line['arm']} {line['metric'].upper()}", line["kind"], f"{line['times']:,}", str(line["count"]),
              f"{line['slow']:.0%}", f"{line['others']:.1%}"] for line in slow(rows).to_dict("records")]
    return Grid(f"Slow tail · {caption}", ["arm", "what happened", "times", "beyond p99", "in those", "in the rest"],
                lines, "A kind that the rest has as often explains nothing.")


def clocks_grid(rows: pd.DataFrame, caption: str) -> Grid:
    """`clocks` as text."""
    lines = [[f"{line['arm']} {line['metric'].upper()}",
              *(interval(line, name) if line[name] is not None else NONE
                for name in ("ms", "device_ms", "beside_ms", "client_ms", "beyond_ms"))]
             for line in clocks(rows).to_dict("records")]
    return Grid(f"Clocks · {caption}", ["arm", "server, ms", "device, ms", "server - device, ms", "client, ms",
                                        "client - server, ms"], lines,
                "Medians with 95 % intervals; server: id to id on the host; device: between events on its stream; "
                "client: id to id in the process that a worker serves.")


def quantiles_grid(rows: pd.DataFrame, caption: str) -> Grid:
    """`quantiles` as text."""
    lines = [[f"{line['arm']} {line['metric'].upper()}", str(line["prompt_tokens"]), str(line["n"]),
              *(interval(line, f"p{100 * q:g}") if line[f"p{100 * q:g}"] is not None else NONE for q in QUANTILES),
              number(line["max"])] for line in quantiles(rows).to_dict("records")]
    return Grid(f"Quantiles · {caption}", ["arm", "prompt tokens", "n", "p50, ms", "p90, ms", "p95, ms", "p99, ms",
                                           "max, ms"], lines, "95 % intervals; none where n does not allow one.")


GRIDS: dict[str, Callable[[pd.DataFrame, str], Grid]] = {
    "steadiness": steady_grid, "slow": slow_grid, "clocks": clocks_grid, "quantiles": quantiles_grid}


def words(rows: pd.DataFrame) -> str:
    """What of this a reader must know before a number is believed; empty where nothing speaks against it."""
    said = []
    table = steady(rows)
    for line in table.to_dict("records") if len(table) else []:
        name = f"{line['arm']} ({line['metric'].upper()})"
        if line["drifts"]:
            said.append(f"{name} drifts by {line['drift']:+.1%} over the run")
        if line["modes"]:
            said.append(f"{name} has two modes, {line['slow_share']:.0%} of it {line['slow'] / line['fast']:.2f} times "
                        "as slow as the rest")
    between = processes(rows)
    if len(between):
        worst = between.loc[(between["most"] - between["least"]).idxmax()]
        said.append(f"medians of the {worst['processes']} processes lie between {worst['least'] - 1:+.1%} and "
                    f"{worst['most'] - 1:+.1%} of the whole in the worst case, {worst['arm']} "
                    f"({worst['metric'].upper()})")
    return f"Before believing a number: {'; '.join(said)}." if said else ""
