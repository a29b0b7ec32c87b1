"""Whether the samples of an ablation can be believed: drift, two modes, slow tails and what happened in them, processes
that differ, and how far the clocks of host, device and client are apart.

Rows are those of `schemas.ABLATION`. Prompt lengths are pooled after each value was divided by the median of its arm,
metric and length, so that no length looks like a mode. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from hybridlab import limits, stats, steadiness, tails
from hybridlab.report import LIMIT, NONE, Grid, interval, number, share

CELL = ("arm", "metric", "prompt_tokens")
QUANTILES = (0.5, 0.9, 0.95, 0.99)
GENERATED = (8, 16, 32, 64, 100, 128, 200, 256, 300, 400, 500, 512, 1024)  # new tokens; some are the paper's


def steady(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm and metric: n, drift (relative, over the run), drift_p, drifts; modes_p, modes, fast and slow (of
    the median) and slow_share. None where n is too small for a test; see `steadiness`."""
    lines = []
    for arm, metric, own in _groups(stats.unprofiled(rows)):
        values = own.sort_values(["process", "request", "index"])["relative"].to_numpy()
        line: dict[str, Any] = {"arm": arm, "metric": metric, "n": len(values)}
        drift = steadiness.drift(values) if len(values) >= steadiness.DRIFT_LEAST else None
        modes = steadiness.modes(values) if len(values) >= steadiness.MODES_LEAST else None
        line |= {"drift": drift and drift.change, "drift_p": drift and drift.p, "drifts": drift and drift.flagged}
        line |= {"modes_p": modes and modes.p, "modes": modes and modes.flagged, "fast": modes and modes.fast,
                 "slow": modes and modes.slow, "slow_share": modes and modes.slow_share}
        lines.append(line)
    return pd.DataFrame(lines, dtype=object)


def slow(rows: pd.DataFrame, alike: Sequence[str] = CELL) -> pd.DataFrame:
    """One line an arm, metric and kind of what happened: times (samples in which it did), of the `count` samples beyond
    the p99 the share in which it did (slow), and of the rest (others). Kind "unexplained": nothing known happened.

    A kind that the rest has as often explains nothing. Empty where n does not allow a p99 or rows hold no record.
    Values are relative to the median of those that share `alike`.
    """
    lines = []
    for arm, metric, own in _groups(stats.unprofiled(rows)[rows["happened"].notna()], alike):
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


def clocks(rows: pd.DataFrame, floors: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line an arm and metric: median ms by the server's clock (ms, host to host), by the device's (device_ms) and
    by that of a worker's client (client_ms), and of their differences to the server's, value by value: by how much the
    server took longer than the device (beside_ms), and the client longer than the server (beyond_ms). Each with its
    95 % interval, None where there is no such clock; with floors the limit and the share reached by the server's clock,
    see `limits.cells`. Empty without any of the two."""
    lines = []
    known = stats.unprofiled(rows)[rows["device_ms"].notna() | rows["client_ms"].notna()]
    for (arm, metric), own in known.groupby(["arm", "metric"], sort=False):
        if len(own) < stats.needed(0.5):
            continue
        both = own.assign(**{name: own[name].astype(float) for name in ("device_ms", "client_ms")})
        both = both.assign(beside_ms=both["ms"] - both["device_ms"], beyond_ms=both["client_ms"] - both["ms"])
        lines.append({"arm": arm, "metric": metric, "n": len(own)} | _three("ms", both) | _three("device_ms", both)
                     | _three("beside_ms", both) | _three("client_ms", both) | _three("beyond_ms", both)
                     | limits.cells(own, floors))
    return pd.DataFrame(lines, dtype=object)


def processes(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm and metric: count of processes, and the least and the most of their medians, relative to the
    median of all (least, most). Empty for rows of one process."""
    lines = []
    for arm, metric, own in _groups(stats.unprofiled(rows)[rows["process"].notna()]):
        medians = own.groupby("process")["relative"].median()
        if len(medians) > 1:
            lines.append({"arm": arm, "metric": metric, "processes": len(medians), "least": float(medians.min()),
                          "most": float(medians.max())})
    return pd.DataFrame(lines)


def quantiles(rows: pd.DataFrame, floors: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line an arm, metric and prompt length: n, p50, p90, p95, p99 with their intervals (None where n does not
    allow one), and max, in ms; with floors the limit and the share reached, see `limits.cells`."""
    lines = []
    for (arm, metric, length), own in stats.unprofiled(rows).groupby(list(CELL), sort=False):
        line: dict[str, Any] = {"arm": arm, "metric": metric, "prompt_tokens": length, "n": len(own)}
        for q in QUANTILES:
            line |= _three("ms", own, q, f"p{100 * q:g}")
        lines.append(line | {"max": float(own["ms"].max())} | limits.cells(own, floors))
    return pd.DataFrame(lines, dtype=object)


def by_generation(rows: pd.DataFrame, lengths: Sequence[int] = GENERATED,
                  floors: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line an arm and generation length: p50 and p99 in ms of the gaps of the first so many new tokens, with their
    intervals; with floors the limit and the share reached, see `limits.cells`. A request of n tokens begins as a
    longer one does, so that one long request serves all shorter lengths; a length beyond what was generated has no
    line."""
    gaps = stats.unprofiled(rows)[rows["metric"] == "itl"]
    lines = []
    for length in lengths:
        for arm, own in gaps[gaps["index"] < length].groupby("arm", sort=False):
            if int(own["index"].max()) == length - 1:
                lines.append({"arm": arm, "new_tokens": length, "n": len(own)} | _three("ms", own, 0.5, "p50")
                             | _three("ms", own, 0.99, "p99") | limits.cells(own, floors))
    return pd.DataFrame(lines, dtype=object)


def _groups(rows: pd.DataFrame, alike: Sequence[str] = CELL) -> Iterator[tuple[str, str, pd.DataFrame]]:
    relative = rows.assign(relative=rows["ms"] / rows.groupby(list(alike))["ms"].transform("median"))
    for (arm, metric), own in relative.groupby(["arm", "metric"], sort=False):
        yield str(arm), str(metric), own


def _three(column: str, rows: pd.DataFrame, q: float = 0.5, name: str = "") -> dict[str, float | None]:
    found, name = stats.of(rows.dropna(subset=column), q, column), name or column
    value, low, high = (found.value, found.low, found.high) if found else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def steady_grid(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> Grid:
    """`steady` as text."""
    def flag(value: bool | None) -> str:
        return NONE if value is None else "yes" if value else "no"

    lines = [[_name(line), str(line["n"]), flag(line["drifts"]),
              NONE if line["drift"] is None else f"{line['drift']:+.1%}", flag(line["modes"]),
              f"{line['fast']:.2f}, {line['slow']:.2f} ({line['slow_share']:.0%})" if line["modes"] else NONE]
             for line in steady(rows).to_dict("records")]
    return Grid(f"Steadiness · {caption}", ["arm", "n", "drifts", "over the run", "two modes", "fast, slow (share)"],
                lines, f"Tests at level {steadiness.LEVEL:g}; a drift needs n ≥ {steadiness.DRIFT_LEAST}, two modes "
                f"n ≥ {steadiness.MODES_LEAST}. Values relative to the median of their prompt length.")


def slow_grid(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> Grid:
    """`slow` as text."""
    lines = [[_name(line), line["kind"], f"{line['times']:,}", str(line["count"]),
              f"{line['slow']:.0%}", f"{line['others']:.1%}"] for line in slow(rows).to_dict("records")]
    return Grid(f"Slow tail · {caption}", ["arm", "what happened", "times", "beyond p99", "in those", "in the rest"],
                lines, "A kind that the rest has as often explains nothing.")


def clocks_grid(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> Grid:
    """`clocks` as text."""
    columns = ("ms", "device_ms", "beside_ms", "client_ms", "beyond_ms")
    lines = [[_name(line), *(interval(line, name) for name in columns), *_limit(line)]
             for line in clocks(rows, floors).to_dict("records")]
    return Grid(f"Clocks · {caption}", ["arm", "server, ms", "device, ms", "server - device, ms", "client, ms",
                                        "client - server, ms", *_limits(floors)], lines,
                "Medians with 95 % intervals; server: id to id on the host; device: between events on its stream; "
                f"client: id to id in the process that a worker serves.{_note(floors)}")


def quantiles_grid(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> Grid:
    """`quantiles` as text."""
    lines = [[_name(line), str(line["prompt_tokens"]), str(line["n"]),
              *(interval(line, f"p{100 * q:g}") for q in QUANTILES), number(line["max"]), *_limit(line)]
             for line in quantiles(rows, floors).to_dict("records")]
    return Grid(f"Quantiles · {caption}", ["arm", "prompt tokens", "n", "p50, ms", "p90, ms", "p95, ms", "p99, ms",
                                           "max, ms", *_limits(floors)], lines,
                f"95 % intervals; none where n does not allow one.{_note(floors)}")


def generation_grid(rows: pd.DataFrame, caption: str, floors: pd.DataFrame | None = None) -> Grid:
    """`by_generation` as text."""
    lines = [[line["arm"], str(line["new_tokens"]), str(line["n"]), interval(line, "p50"), interval(line, "p99"),
              *_limit(line)] for line in by_generation(rows, floors=floors).to_dict("records")]
    return Grid(f"Gaps by generation length · {caption}", ["arm", "new tokens", "n", "p50, ms", "p99, ms",
                                                           *_limits(floors)], lines,
                f"All gaps of the first so many new tokens; 95 % intervals.{_note(floors)}")


def _name(line: Mapping[str, Any]) -> str:
    return f"{line['arm']} {line['metric'].upper()}"


def _limit(line: dict[str, Any]) -> list[str]:
    return [interval(line, "limit"), share(line)] if "limit" in line else []


def _limits(floors: pd.DataFrame | None) -> list[str]:
    return [] if floors is None else ["limit, ms", "of limit"]


def _note(floors: pd.DataFrame | None) -> str:
    return "" if floors is None else f" {LIMIT}."


GRIDS: dict[str, Callable[..., Grid]] = {  # of rows, a caption, and floors
    "steadiness": steady_grid, "slow": slow_grid, "clocks": clocks_grid, "quantiles": quantiles_grid,
    "generation": generation_grid}


def words(rows: pd.DataFrame) -> str:
    """What of this a reader must know before a number is believed; empty where nothing speaks against it."""
    table = steady(rows).to_dict("records")
    name = {id(line): f"{line['arm']} ({line['metric'].upper()}" for line in table}
    drifting = [f"{name[id(line)]}, {line['drift']:+.1%})" for line in table if line["drifts"]]
    double = [f"{name[id(line)]}, {_halves(line)})" for line in table if line["modes"]]
    said = [f"{what} {', '.join(found)}" for what, found in (
        ("a drift over the run in", drifting), ("two modes in", double)) if found]
    between = processes(rows)
    if len(between):
        worst = between.loc[(between["most"] - between["least"]).idxmax()]
        said.append(f"medians of the {worst['processes']} processes lie between {worst['least'] - 1:+.1%} and "
                    f"{worst['most'] - 1:+.1%} of the whole in the worst case, {worst['arm']} "
                    f"({worst['metric'].upper()})")
    said += filter(None, [slow_words(slow(rows))])
    return f"Before believing a number: {'; '.join(said)}." if said else ""


def _halves(line: Mapping[str, Any]) -> str:
    times, slow = line["slow"] / line["fast"], line["slow_share"]
    return (f"{slow:.0%} of it {times:.3g} times as slow as the rest" if times < 10 else
            f"{1 - slow:.0%} of it less than a tenth of the rest")


def slow_words(table: pd.DataFrame) -> str:
    """Of a table of `slow` the kinds that slow values have more often than others, over all arms; "" without any."""
    if table.empty:
        return ""
    found = []
    beyond = int(table.drop_duplicates(["arm", "metric"])["count"].sum())
    for kind, own in table.groupby("kind", sort=False):
        hits = round(float((own["slow"] * own["count"]).sum()))
        if kind == tails.UNEXPLAINED or hits > beyond * float(own["others"].mean()):
            found.append(f"{kind} {hits} (of the rest {own['others'].mean():.1%})")
    return f"of the {beyond} values beyond the p99 of their arm, {', '.join(found)}" if beyond else ""
