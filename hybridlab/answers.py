"""Open questions about the graph cache, answered in words from the rows of one run (`schemas.CACHE`) alone.

Each function returns its answer, or that these rows do not hold it and how to get them. Never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from hybridlab import stats, tallies
from hybridlab.errors import StatisticsError

PUBLISHED = 406  # graphs, of 1 to this many tokens, that the published code held when its memory was full
HIDDEN = 0.1     # a replay that saves less than this share of a first token hides no launches worth speaking of
COLD = 20        # requests at the start of a pass


def capture_on_the_foreground(rows: pd.DataFrame) -> str:
    """How much longer the gaps between decode tokens are in which a capture was under way, by way of capturing."""
    if missing := _missing(rows, "disturb"):
        return missing
    own = tallies.part(rows, "disturb")
    gaps = own[own["metric"] == "itl"]
    quiet = gaps[gaps["setting"] == "quiet"]
    words = [f"Without captures a gap was {_median(quiet)} (n = {len(quiet):,})"]
    for way in tallies.settings(gaps):
        busy = gaps[(gaps["setting"] == way) & gaps["capturing"].astype(bool)]
        if way != "quiet":
            longest = f", {busy['ms'].max():.3g} ms at the longest" if len(busy) else ""
            words.append(f"{way}: {_median(busy)} while one was under way{_times(quiet, busy)}{longest} "
                         f"(n = {len(busy):,})")
    usable = own[(own["metric"] == "capture") & (own["failures"] == 0)].groupby("setting")["ms"].median()
    waits = _listed(f"{ms:.3g} ms {way}" for way, ms in usable.items())
    return _lines(words) + (f" From asked to usable: {waits}." if waits else "")


def failure_rate(rows: pd.DataFrame) -> str:
    """Captures that failed, with an exact binomial interval, and why: those made behind decoding, and in the stream."""
    words = []
    for name, metric in (("disturb", "capture"), ("stream", None)):
        if not _missing(rows, name):
            own = tallies.part(rows, name)
            own = own[own["metric"] == metric] if metric else own
            for setting in tallies.settings(own):
                mine = own[own["setting"] == setting]
                failed, tried = int(mine["failures"].sum()), int(mine[["captures", "failures"]].to_numpy().sum())
                reasons = sorted({str(reason) for reason in mine.loc[mine["failures"] > 0, "reason"]} - {""})
                if tried:
                    why = f" ({'; '.join(reasons[:3])})" if reasons else ""
                    words.append(f"{setting}: {_rate(failed, tried)}{why}")
    if not words:
        return _missing(rows, "disturb") or "No graph was captured in these rows."
    return (f"{_lines(words)} Tokens are compared with those without captures before a run counts as complete: "
            "one that differs fails it.")


def exact_or_buckets(rows: pd.DataFrame) -> str:
    """Exact lengths against buckets over the stream: hits, padding, graphs, bytes, time; what a replay saves."""
    if missing := _missing(rows, "stream"):
        return missing
    table = tallies.requests(rows)
    words = []
    for name in tallies.settings(table):
        own = table[table["setting"] == name]
        replayed = own[(own["path"] == "graph") & own["bucket"].notna()]
        real = replayed["prompt_tokens"].sum() / max(1.0, replayed["bucket"].astype(float).sum())
        padding = f", {100 * (1 - real):.3g} % of replayed rows padding" if len(replayed) else ""
        peak = own.groupby("round")[["graphs", "graph_bytes"]].max().median()
        words.append(f"{name}: {_percent(own['hit'])} replayed{padding}, {peak['graphs']:.0f} graphs in "
                     f"{_bytes(peak['graph_bytes'])}, first token {_median(own)}")
    exact = any("buckets=exact" in name for name in tallies.settings(table))
    more = _same_lengths(table) if exact else (
        " Exact lengths are not in these rows: add {'buckets': 'exact'} to compare.")
    return _lines(words) + more + _hidden(rows)


def _same_lengths(table: pd.DataFrame) -> str:
    """Replays of exact lengths against those of their buckets, length by length: each was there before its request."""
    hits = table[table["hit"]]
    is_exact = hits["setting"].str.contains("buckets=exact", regex=False)
    times = hits.groupby([is_exact, "prompt_tokens"])["ms"].median().unstack(0).dropna()
    if not len(times) or times.shape[1] < 2:
        return " No length was replayed both exactly and in a bucket."
    ratio = times[True] / times[False]
    return (f" Of the {len(ratio)} lengths replayed both ways, an exact replay took {ratio.median():.2f} times as long "
            f"as one of its bucket ({ratio.min():.2f} to {ratio.max():.2f}).")


def graph_memory(rows: pd.DataFrame) -> str:
    """Bytes of a graph by length and kind of pool, and what one of each length from 1 to 406 would hold together."""
    if missing := _missing(rows, "cost"):
        return missing
    table = tallies.break_even(rows)
    words = []
    for name in tallies.settings(table):
        own = table[table["setting"] == name].sort_values("prompt_tokens")
        sizes = _listed(f"{_bytes(row.graph_bytes)} at {row.prompt_tokens}" for row in own.itertuples())
        total = f"; {_bytes(own['graph_bytes'].sum())} for all of them, captured in turn into one pool"
        if name != "shared" and len(own) > 1:  # what a graph adds to a shared pool depends on those before it
            slope, start = np.polyfit(own["prompt_tokens"], own["graph_bytes"], 1)
            together = PUBLISHED * start + slope * PUBLISHED * (PUBLISHED + 1) / 2
            total = f"; on a straight line, one of each length to {PUBLISHED}: {_bytes(max(together, 0.0))}"
        words.append(f"{name}: {sizes} tokens{total}")
    return _lines(words) + (f" What stands for {PUBLISHED} lengths is extrapolated, for this model, weights "
                               "apart; the published code was full at that many graphs on a GPU of 93 GiB.")


def when_capture_pays(rows: pd.DataFrame) -> str:
    """Reuses after which (rehearsal + capture + instantiation) / (JIT - replay) is repaid, by length."""
    if missing := _missing(rows, "cost"):
        return missing
    table = tallies.break_even(rows)
    words = []
    for row in table[table["setting"] == tallies.settings(table)[0]].itertuples():
        interval = f" [{row.low:.3g}, {row.high:.3g}]" if pd.notna(row.low) else ""
        after = f"after {row.reuses:.3g}{interval} reuses" if math.isfinite(row.reuses) else "never"
        words.append(f"{row.prompt_tokens} tokens: {row.cost_ms:.3g} ms to make, {row.jit_ms:.3g} ms by JIT and "
                     f"{row.replay_ms:.3g} ms replayed, repaid {after} (n = {row.n})")
    reused = ""
    if not _missing(rows, "stream"):
        asked = tallies.requests(rows).drop_duplicates(["request"])["prompt_tokens"].value_counts()
        reused = (f" In this stream {_percent(asked == 1)} of {len(asked):,} lengths are asked once, the most frequent "
                  f"one {asked.max():,} times: admission='pays' waits until a length was missed often enough.")
    return f"{_lines(words)}{reused}"


def trace_dependence(rows: pd.DataFrame) -> str:
    """What this stream is like, and hits and first tokens at its cold start and in its second half, by setting."""
    if missing := _missing(rows, "stream"):
        return missing
    table = tallies.requests(rows)
    one = table.drop_duplicates(["request"])["prompt_tokens"]
    often = one.value_counts(normalize=True).iloc[:5].sum()
    half = len(one) // 2
    first = min(COLD, half)  # the two windows share no request
    words = [f"{len(one):,} requests of {one.nunique():,} lengths, {100 * often:.3g} % of the five most frequent"]
    for name in tallies.settings(table):
        own = table[table["setting"] == name]
        cold, late = own[own["request"] < first], own[own["request"] >= half]
        words.append(f"{name}: {_percent(cold['hit'])} replayed and {_median(cold)} in the first {first}, "
                     f"{_percent(late['hit'])} and {_median(late)} in the second half")
    return _lines(words) + " Another trace, or another size of the cache, is another run or entry of compare."


class Question(NamedTuple):
    """A question, its number in the list of open ones, what answers it, and the parts of a run that it needs."""

    number: int
    words: str
    answer: Callable[[pd.DataFrame], str]
    parts: tuple[str, ...]


QUESTIONS = (
    Question(3, "What does capturing behind cost the tokens in front?", capture_on_the_foreground, ("disturb",)),
    Question(4, "How often does a capture fail that is made beside other work?", failure_rate, ("disturb", "stream")),
    Question(5, "Exact lengths or buckets?", exact_or_buckets, ("stream", "cost")),
    Question(6, "How does the memory of graphs grow?", graph_memory, ("cost",)),
    Question(7, "When does a capture pay?", when_capture_pays, ("cost", "stream")),
    Question(8, "How much depends on the trace?", trace_dependence, ("stream",)),
)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a question: number, question, answer, and rows (how many of this run speak to it).

    Raises `StatisticsError` for rows of several runs or none.
    """
    stats.one_run(rows)
    return pd.DataFrame([{"number": q.number, "question": q.words, "answer": q.answer(rows),
                          "rows": int(rows["part"].isin(q.parts).sum())} for q in QUESTIONS])


def _missing(rows: pd.DataFrame, name: str) -> str:
    stats.one_run(rows)
    return "" if (rows["part"] == name).any() else f"Not in these rows: {tallies.ASK[name]}."


def _hidden(rows: pd.DataFrame) -> str:
    """From which length on a replay saves next to nothing."""
    if _missing(rows, "cost"):
        return ""
    table = tallies.break_even(rows)
    table = table[table["setting"] == tallies.settings(table)[0]].sort_values("prompt_tokens")
    saved = 1 - table["replay_ms"] / table["jit_ms"]
    shares = _listed(f"{100 * s:.2g} % at {length}" for length, s in zip(table["prompt_tokens"], saved, strict=True))
    last = table.loc[saved >= HIDDEN, "prompt_tokens"].max()
    after = table.loc[table["prompt_tokens"] > (0 if pd.isna(last) else last), "prompt_tokens"]
    ends = f", less than {100 * HIDDEN:.0f} % from {after.min()} on" if len(after) else ""
    return f" Of a first token by JIT a replay saves {shares} tokens{ends}."


def _median(own: pd.DataFrame) -> str:
    if own.empty:
        return "not measured"
    sure, tail = stats.of(own, 0.5), stats.of(own, 0.99)
    if sure is None:
        return f"{own['ms'].median():.3g} ms"
    return f"{sure.value:.3g} ms [{sure.low:.3g}, {sure.high:.3g}]" + (f", p99 {tail.value:.3g} ms" if tail else "")


def _times(quiet: pd.DataFrame, busy: pd.DataFrame) -> str:
    found = stats.against(quiet, busy, like=())
    if found is None:
        return ""
    words = f", {found.value:.3g} times as long [{found.low:.3g}, {found.high:.3g}]"
    with suppress(StatisticsError):  # fewer gaps than a p99 needs, or of requests that differ too much
        tail = stats.changed(busy, quiet, "p99", like=(), column="ms")
        words += f", its p99 {1 + tail.value:.3g} times quiet ones' [{1 + tail.low:.3g}, {1 + tail.high:.3g}]"
    return words


def _rate(failed: int, tried: int) -> str:
    interval = scipy_stats.binomtest(failed, tried).proportion_ci(0.95)
    return f"{failed:,} of {tried:,} failed ({100 * interval.low:.3g} to {100 * interval.high:.3g} %)"


def _percent(share: pd.Series) -> str:
    return f"{100 * float(share.mean()):.3g} %" if len(share) else "nothing"


def _bytes(count: float) -> str:
    scale, unit = tallies.binary(count)
    return f"{count / scale:.3g} {unit}"


def _lines(words: list[str]) -> str:
    """A headline, and what belongs to it a line each."""
    return "\n  ".join(words) + "."


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)
