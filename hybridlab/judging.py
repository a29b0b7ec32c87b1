"""What decides a claim: small functions from recorded rows to a number with its interval, and whether the rule holds.

Rules stand in data/paper/claims.toml; settings of a claim are the keyword arguments here. Samples of one part, arms
interleaved, are compared; a claim whose rows are not there, or too few, raises StatisticsError. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from hybridlab import published, stats
from hybridlab.errors import StatisticsError
from hybridlab.papersamples import TIMED, at_length, by_length, holds
from hybridlab.stats import Estimate

KEYS = ("round", "tokens", "position", "index")  # what two arms of one part share
# Requests differ in their tails, so that one p99 over all of them has no interval; compared in pairs they have one.
EACH = "p99 of each request"
TAIL = 100  # gaps of a request, from which on its p99 is not its largest gap


@dataclass(frozen=True)
class Evidence:
    """The rows of one recorded run, what it ran on, and in the same columns those of a run of other engines beside ours
    on the same machine and model."""

    rows: pd.DataFrame
    run_id: str
    on_cpu: bool
    model: str
    gpu: str
    peers: pd.DataFrame | None = None


@dataclass(frozen=True)
class Finding:
    """Whether the rule holds, our number in words with its interval, what it stands against, and the run that the rows
    are of where it is another one."""

    holds: bool
    here: str
    against: str = ""
    run_id: str = ""


Judge = Callable[..., Finding]


class Absent(StatisticsError):
    """A part of the run holds nothing of what a judge asks of it."""


def reduction(evidence: Evidence, *, part: str, arm: str, base: str, statistic: str, cell: Sequence[Any],
              against: Sequence[Any] | None = None, tokens: int | None = None) -> Finding:
    """How much smaller `statistic` is than that of `base`; holds where it reaches the published reduction."""
    found = _flipped(_change(evidence, part, arm, base, statistic, tokens))
    size = published.value(cell)
    return _reached(found, size if against is None else 1 - size / published.value(against))


def increase(evidence: Evidence, *, part: str, arm: str, base: str, statistic: str, cell: Sequence[Any]) -> Finding:
    """How much larger `statistic` is than that of `base`; holds where it reaches the published increase."""
    return _reached(_change(evidence, part, arm, base, statistic), published.value(cell))


def growth(evidence: Evidence, *, part: str, arm: str, statistic: str, before: int, after: int,
           cell: Sequence[Any] | None = None, against: Sequence[Any] | None = None) -> Finding:
    """How much larger `statistic` of one arm is at a length `after` than at `before`. Gaps of a longer generation
    include those of a shorter one: of each request they are compared, else the interval takes them for independent,
    which makes it wider."""
    late, early = (_at(evidence, part, arm, tokens) for tokens in (after, before))
    size = published.value(cell) / published.value(against) - 1 if cell and against else 0.0
    return _reached(_tails(late, early) if statistic == EACH else stats.changed(late, early, statistic, like=()), size)


def peer(evidence: Evidence, *, part: str, system: str, statistic: str, cell: Sequence[Any] | None = None,
         first: int | None = None) -> Finding:
    """How much smaller `statistic` of hybrid is than that of another engine in the run that took turns with it: of
    first tokens at the length where most, of gaps over all requests."""
    beside = _beside(evidence, system, first)
    lengths = sorted(set(_own(beside, part, system)["tokens"])) if part == "ttft" else [None]
    found = max((_flipped(_change(beside, part, "hybrid", system, statistic, tokens)) for tokens in lengths),
                key=lambda one: one.value)
    return replace(_reached(found, published.value(cell) if cell else 0.0), run_id=beside.run_id)


def lowest(evidence: Evidence, *, part: str, arm: str) -> Finding:
    """Whether no other arm, and no other engine in the run beside ours, has a p99 below this one's of the same run with
    disjoint intervals, at any length with enough gaps."""
    lost, among = set[int](), dict[str, list[int]]()
    for rows in (evidence.rows, evidence.peers):
        every = [] if rows is None else by_length(rows, part, "p99")
        lines = [line for line in every if line[2].low <= line[2].high]
        own = {tokens: found for name, tokens, found in lines if name == arm}
        for name, tokens, found in lines:
            if tokens in own and not name.startswith(arm):
                among.setdefault(name, []).append(tokens)
                lost |= {tokens} if found.high < own[tokens].low else set()
    _require(among, f"fewer gaps than a p99 needs, of {arm} or of all others")
    compared = len({length for lengths in among.values() for length in lengths})
    return Finding(not lost, f"lowest at {compared - len(lost)} of {compared} lengths", "; ".join(
        f"{name}: {', '.join(map(str, sorted(tokens)))}" for name, tokens in sorted(among.items())))


def undisturbed(evidence: Evidence, *, arm: str, most: float) -> Finding:
    """Whether gaps are at most so much longer while a graph is captured behind them."""
    found = _disturbance(evidence, arm)
    return Finding(found.high < most, percent(found), f"at most {most:.0%}")


def disturbed(evidence: Evidence, *, arm: str) -> Finding:
    """Whether gaps are longer while a graph is captured behind them."""
    found = _disturbance(evidence, arm)
    return Finding(found.low > 0, percent(found), "more than 0 %")


def replayed(evidence: Evidence, *, part: str, arm: str, metric: str, longest: int) -> Finding:
    """Whether every such row of up to `longest` tokens was replayed."""
    own = _own(evidence, part, arm, metric)
    own = own[own["tokens"] <= longest]
    _require(len(own), f"no length up to {longest}")
    hits = int(((own["path"] == "graph") & (own["captures"] == 0)).sum())
    return Finding(hits == len(own), f"{hits} of {len(own)} replayed", "all")


def missed(evidence: Evidence, *, part: str, arm: str, metric: str, positions: int) -> Finding:
    """Whether some such row found no graph, or had one captured for it, over at least so many positions."""
    own = _own(evidence, part, arm, metric)
    misses = int(((own["path"] != "graph") | (own["captures"] > 0)).sum())
    found = own["position"].nunique()
    _require(found >= positions, f"{found} positions, and {positions} are needed")
    return Finding(misses > 0, f"{misses} of {len(own):,} missed, {found} positions", "some")


def cold(evidence: Evidence, *, arm: str, first: int, second: int, least: float) -> Finding:
    """Whether the first length takes `least` times as long as the second over first calls, and not when warm."""
    means = [_at(evidence, "protocol", arm, tokens, "first")["value"].mean() for tokens in (first, second)]
    one, other = (_at(evidence, "ttft", arm, tokens) for tokens in (first, second))
    warm = stats.changed(one, other, like=())
    low, high = 1 + warm.low, 1 + warm.high
    return Finding(means[0] / means[1] > least > high,
                   f"cold {means[0] / means[1]:.2f}×, warm {1 + warm.value:.2f}× [{low:.2f}, {high:.2f}]",
                   f"{least:g}× between them")


def below(evidence: Evidence, *, arm: str, tokens: int, calls: int) -> Finding:
    """Whether the P99 of repeated calls, as published without an interval, is below the mean of the first ones."""
    repeated = _at(evidence, "protocol", arm, tokens, "repeated")["value"]
    _require(len(repeated) >= calls, f"{len(repeated)} repeated calls, and {calls} are needed")
    tail = float(np.quantile(repeated, 0.99))
    mean = float(_at(evidence, "protocol", arm, tokens, "first")["value"].mean())
    return Finding(tail < mean, f"P99 is {tail / mean:.2f}× the mean", "below 1×")


def captured_inside(evidence: Evidence, *, arm: str, base: str, warm: str) -> Finding:
    """Whether first calls that capture are slower than `base` on average at most lengths, and warm ones are not."""
    means = {name: _own(evidence, "protocol", name, "first").groupby("tokens")["value"].mean() for name in (arm, base)}
    medians = {name: _own(evidence, "ttft", name).groupby("tokens")["value"].median() for name in (warm, base)}
    lengths = sorted(set(means[base].index) & set(medians[base].index))[1:]
    _require(lengths, "a single prompt length")
    slower = sum(means[arm][n] > means[base][n] for n in lengths)
    still = sum(medians[warm][n] > medians[base][n] for n in lengths)
    half = len(lengths) / 2
    return Finding(bool(slower > half >= still), f"slower at {slower} of {len(lengths)} lengths, warm at {still}",
                   "most, few")


def retained(evidence: Evidence, *, arm: str, model: str, longest: int, share: float, cell: Sequence[Any]) -> Finding:
    """Weights, and one graph of each length to `longest`, on a straight line through those measured, in GiB."""
    _require(evidence.model == model, f"{evidence.model} was measured, which is not {model}")
    graphs = _own(evidence, "cost", arm, "capture").groupby("tokens")["bytes"].median().astype(float)
    _require(len(graphs) > 1, "a single length whose graph was weighed")
    held = _own(evidence, "memory", "hybrid", "weights")["value"].iloc[0] / 1024
    slope, start = np.polyfit(graphs.index.to_numpy(float), graphs.to_numpy(), 1)
    total = held + (longest * start + slope * longest * (longest + 1) / 2) / 2**30
    least = share * published.value(cell)
    return Finding(bool(total >= least), f"{total:.1f} GiB, extrapolated", f"at least {least:.1f} GiB")


def absolute(evidence: Evidence, *, part: str, arm: str, tokens: int, gpu: str, model: str, within: float,
             cell: Sequence[Any]) -> Finding:
    """Whether a median is near the published one: only with the same GPU and model are milliseconds compared."""
    _require(gpu in evidence.gpu and evidence.model == model,
             f"{evidence.model} on {evidence.gpu or 'a CPU'} is not the paper's model on an {gpu}")
    found = stats.quantile(_at(evidence, part, arm, tokens)["value"], 0.5)
    size = published.value(cell)
    return Finding(abs(found.value / size - 1) <= within, f"{found.value:.2f} ms [{found.low:.2f}, {found.high:.2f}]",
                   f"{size:g} ms ± {within:.0%}")


def within(evidence: Evidence, *, part: str, arm: str, metric: str, least: Sequence[Any],
           most: Sequence[Any]) -> Finding:
    """Whether the interval of a median meets a published range."""
    found, low, high = stats.quantile(_own(evidence, part, arm, metric)["value"], 0.5), *map(
        published.value, (least, most))
    return Finding(found.low <= high and found.high >= low,
                   f"{found.value:.3g} ms [{found.low:.3g}, {found.high:.3g}], n = {found.n}",
                   f"{low:g} to {high:g} ms")


def split(evidence: Evidence, *, part: str, arm: str, base: str) -> Finding:
    """Whether gaps through a second process are shorter than in one; asked only where all tokens are the same."""
    same = _own(evidence, part, f"{arm} / {base}", "same tokens")["value"]
    _require((same == 100).all(), f"tokens of {arm} differ from those of {base} in {(same < 100).sum()} turns")
    return _reached(_flipped(_change(evidence, part, arm, base, "median")), 0.0)


JUDGES: dict[str, Judge] = {judge.__name__: judge for judge in (
    reduction, increase, growth, peer, lowest, undisturbed, disturbed, replayed, missed, cold, below, captured_inside,
    retained, absolute, within, split)}


def percent(found: Estimate) -> str:
    return f"{found.value:+.1%} [{found.low:+.1%}, {found.high:+.1%}], n = {found.n:,}"


def _reached(found: Estimate, size: float) -> Finding:
    """An effect is there where its interval excludes none, and reproduced where it also reaches the published size."""
    return Finding(found.low > 0 and found.high >= size, percent(found), f"{size:.1%}" if size else "more than 0 %")


def _flipped(found: Estimate) -> Estimate:
    return Estimate(-found.value, -found.high, -found.low, found.n)


def _change(evidence: Evidence, part: str, arm: str, base: str, statistic: str, tokens: int | None = None) -> Estimate:
    own, other = (_own(evidence, part, name) if tokens is None else _at(evidence, part, name, tokens)
                  for name in (arm, base))
    if statistic == EACH:
        return _tails(own, other)
    return stats.changed(own, other, statistic, like=("round", "request") if part == "capture" else KEYS)


def _tails(own: pd.DataFrame, base: pd.DataFrame) -> Estimate:
    """How much larger the p99 of one request's gaps is than that of its pair, from the same round: the median over
    pairs, of which it takes six."""
    tails = [side.groupby("round")["value"].agg(["size", lambda gaps: gaps.quantile(0.99)]) for side in (own, base)]
    pairs = pd.concat(tails, axis=1, join="inner").to_numpy(float)
    long = pairs[(pairs[:, [0, 2]] >= TAIL).all(axis=1)]
    _require(len(long), f"no request has {TAIL} gaps")
    return stats.quantile(long[:, 1] / long[:, 3] - 1, 0.5)


def _disturbance(evidence: Evidence, arm: str) -> Estimate:
    own = _own(evidence, "overlap", arm)
    return stats.changed(own[own["state"] == "capturing"], _own(evidence, "overlap", "quiet"), like=())


def _own(evidence: Evidence, part: str, arm: str, metric: str | None = None) -> pd.DataFrame:
    stats.one_run(evidence.rows)
    held = evidence.rows[(evidence.rows["part"] == part) & (evidence.rows["metric"] != "clipped")]
    _require(len(held), f"part {part} is not in this run")
    own = held[(held["arm"] == arm) & held["metric"].isin(TIMED if metric is None else [metric])]
    if not len(own):
        raise Absent(f"not measured: part {part} of this run holds {holds(held)}, but no {metric or 'times'} of {arm}")
    return own


def _at(evidence: Evidence, part: str, arm: str, tokens: int, metric: str | None = None) -> pd.DataFrame:
    """The rows at one prompt length; of gaps those of the first `tokens` tokens, of requests that were so long."""
    held = _own(evidence, part, arm, metric)
    own = at_length(held, tokens)
    there = ", ".join(map(str, sorted(set(held["tokens"]))))
    _require(len(own), f"{tokens} tokens are not in part {part} of this run, which holds {there}")
    return own


def _beside(evidence: Evidence, system: str, first: int | None) -> Evidence:
    """The run of other engines as evidence of its own; of the first so many tokens."""
    rows = evidence.peers
    _require(rows is not None and len(rows), "no other engine was measured on this machine with this model")
    assert rows is not None
    _require((rows["arm"] == system).any(), f"{system} is not among what was measured: "
             f"{', '.join(sorted(set(rows['arm'])))}")
    own = rows if first is None else rows[rows["index"] < first]
    return replace(evidence, rows=own, run_id=str(rows["run_id"].iloc[0]))


def _require(there: Any, why: str) -> None:
    if not there:
        raise StatisticsError(f"not measured: {why}")
