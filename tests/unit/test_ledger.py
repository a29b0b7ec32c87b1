"""Claims judged from rows: the verdict follows the rows and the rule, and nothing is judged that was not measured."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from hybridlab import (
    committed,
    gpus,
    judging,
    ledger,
    papertables,
    paperviews,
    peerlab,
    peerwords,
    plots,
    published,
    records,
    schemas,
)
from hybridlab.config import RunConfig
from hybridlab.engines import PeersConfig
from hybridlab.errors import ConfigError, RunError
from hybridlab.judging import Evidence
from hybridlab.ledger import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED
from hybridlab.paperconfig import PaperConfig
from hybridlab.papertimes import row, schedule

MIB = 2**20
LENGTHS = (10, 50, 100, 500)
CLAIMS = {claim.id: claim for claim in published.claims()}


@pytest.fixture(autouse=True)
def _own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)


def times(part: str, arm: str, ms: Any, lengths: Iterable[int] = LENGTHS, n: int = 30, **columns: Any) -> list[Any]:
    """First tokens of an arm: `ms` of the length, one per cent up and down."""
    return [row(part, **{"arm": arm, "round": k, "request": k, "tokens": length, "position": length, "metric": "ttft",
                         "value": ms(length) * (1 + 0.01 * (-1) ** k), "path": "graph", "state": "hit"} | columns)
            for k in range(n) for length in lengths]


def gaps(part: str, arm: str, ms: Any, **columns: Any) -> list[Any]:
    """Gaps of an arm: `ms` of the index, one per cent up and down."""
    return [row(part, **{"arm": arm, "round": k, "request": k, "tokens": length, "index": index,
                         "position": 10 + index, "metric": "gap", "value": ms(index) * (1 + 0.01 * (-1) ** index),
                         "path": "graph", "state": "hit"} | columns)
            for k, length in enumerate(schedule((50, 350, 500), 660)) for index in range(1, length)]


def calls(arm: str, first: Any, again: float) -> list[Any]:
    """The published protocol: `first` of length and call, and a hundred repeats."""
    cell = {"arm": arm, "path": "graph", "state": "hit"}
    return [row("protocol", tokens=length, metric=metric, index=index, value=value, **cell) for length in LENGTHS
            for metric, values in (("first", [first(length, k) for k in range(5)]), ("repeated", [again] * 100))
            for index, value in enumerate(values)]


def judged(claim: str, rows: list[Any], **changes: Any) -> ledger.Entry:
    """One claim, judged as on the GPU of another machine unless `changes` say otherwise."""
    evidence = Evidence(pd.DataFrame(rows).assign(run_id="r1"), "r1", False, "random:llama-2-7b", "NVIDIA H200")
    (entry,) = ledger.judge(replace(evidence, **changes), [CLAIMS[claim]])
    return entry


@pytest.mark.parametrize(("hybrid", "verdict"), [(30.0, REPRODUCED), (60.0, NOT_REPRODUCED), (99.99, NOT_REPRODUCED),
                                                 (150.0, NOT_REPRODUCED)])
def test_an_effect_must_be_there_and_reach_the_published_size(hybrid: float, verdict: str) -> None:
    """A small gain, called a reproduction of a large one; a loss, called any."""
    rows = times("ttft", "eager", lambda _: 100.0) + times("ttft", "hybrid", lambda _: hybrid)
    entry = judged("ttft-eager-500", rows)
    assert entry.verdict == verdict
    assert entry.here.startswith(f"{1 - hybrid / 100:+.1%} [")
    assert entry.against == f"{1 - 17.79 / 48.96:.1%}"
    assert entry.run_id == "r1"


def test_a_claim_about_a_gpu_is_not_judged_on_a_cpu() -> None:
    """A tape of calls that is faster than Python would confirm what was said about CUDA graphs."""
    rows = times("ttft", "eager", lambda _: 100.0) + times("ttft", "hybrid", lambda _: 30.0)
    entry = judged("ttft-eager-500", rows, on_cpu=True)
    assert (entry.verdict, entry.why) == (NOT_TESTABLE, ledger.ON_CPU)
    assert entry.here, "the number itself is shown"


def test_too_few_rows_and_none_are_not_testable() -> None:
    """A verdict from three values, or from rows of another part."""
    few = times("ttft", "eager", lambda _: 100.0, n=3) + times("ttft", "hybrid", lambda _: 30.0, n=3)
    assert "n >= 6" in judged("ttft-eager-500", few).why
    assert "500 tokens are not in part ttft" in judged(
        "ttft-eager-500", times("ttft", "hybrid", lambda _: 1.0, lengths=[10])).why
    for claim in CLAIMS:
        entry = judged(claim, [row("other", arm="eager", metric="ttft", value=1.0)])
        assert (entry.verdict, entry.here) == (NOT_TESTABLE, ""), claim
        assert entry.why, claim


def test_growth_follows_from_recomputing_and_not_from_a_cache() -> None:
    """The two protocols of Table II, taken one for the other."""
    rows = gaps("cached", "hybrid", lambda _: 7.0) + gaps("recomputed", "hybrid", lambda index: 5 + index / 20)
    assert judged("growth-cached", rows).verdict == NOT_REPRODUCED
    assert judged("growth-recomputed", rows).verdict == REPRODUCED
    equal, longer = (times("ttft", "hybrid", lambda n, ms=ms: ms if n == 10 else 20.0) for ms in (20.0, 24.0))
    assert judged("ttft-10-longer", equal).verdict == NOT_REPRODUCED, "its interval reaches 0, the size claimed"
    assert judged("ttft-10-longer", longer).verdict == REPRODUCED
    table = papertables.by_position(pd.DataFrame(rows).assign(run_id="r1"), "recomputed")
    assert table["p50"].is_monotonic_increasing
    assert table["position"].iloc[0] == 10 + 16.5  # the middle of 32 positions


def test_tails_are_compared_request_by_request() -> None:
    """No verdict on a third less time at the tail in every round, as the rounds differ among themselves; requests of
    other rounds taken for a pair; or the largest of ten gaps called a p99."""
    def uneven(arm: str, share: float) -> list[Any]:
        """Seven long rounds of very different tails, in an order of its own for each arm."""
        rows = gaps("cached", arm, lambda _: 10.0)
        rows += [one | {"round": 99, "request": 99} for one in rows if one["round"] == 0]
        for one in rows:
            one["value"] *= share * (1 + (one["round"] % 5) * (one["index"] % 20 == 0))
        return sorted(rows, key=lambda one: one["round"] * (1 if arm == "eager" else -1))

    found = judged("p99-eager-cached", uneven("eager", 1.0) + uneven("hybrid", 0.5))
    assert (found.verdict, found.here) == (REPRODUCED, "+50.0% [+50.0%, +50.0%], n = 7")
    some = [one for one in uneven("hybrid", 0.5) if one["round"]]
    assert judged("p99-eager-cached", uneven("eager", 1.0) + some).here == "+50.0% [+50.0%, +50.0%], n = 6"
    some = [one for one in some if one["round"] > 1]
    assert "n >= 6" in judged("p99-eager-cached", uneven("eager", 1.0) + some).why
    short = [one for one in uneven("hybrid", 0.5) if one["index"] < judging.TAIL]
    assert "100 gaps" in judged("p99-eager-cached", uneven("eager", 1.0) + short).why


def test_the_lowest_tail_is_asked_at_every_length() -> None:
    """A lead at most lengths, called one at all."""
    eager = gaps("cached", "eager", lambda _: 20.0)
    assert judged("lowest-tail", gaps("cached", "hybrid", lambda _: 7.0) + eager).verdict == REPRODUCED
    late = judged("lowest-tail", gaps("cached", "hybrid", lambda index: 7.0 if index < 450 else 90.0) + eager)
    assert (late.verdict, late.here) == (NOT_REPRODUCED, "lowest at 7 of 8 lengths")
    fused = gaps("cached", "hybrid fused", lambda _: 3.0)
    assert judged("lowest-tail", gaps("cached", "hybrid", lambda _: 7.0) + eager + fused).verdict == REPRODUCED


def test_one_missed_step_is_enough() -> None:
    """A share of hits that is rounded to all of them."""
    rows = gaps("cached", "hybrid", lambda _: 7.0)
    assert judged("decode-buffer", rows).verdict == NOT_REPRODUCED
    assert "10 positions" in judged("decode-buffer", [one for one in rows if one["index"] <= 10]).why
    rows[5] |= {"path": "jit"}
    assert judged("decode-buffer", rows).verdict == REPRODUCED
    assert judged("kv-update", rows).here.startswith(f"1 of {len(rows):,} missed")
    ahead = calls("hybrid, captured ahead", lambda *_: 1.0, 1.0)
    assert judged("precapture", ahead).verdict == REPRODUCED
    ahead[0] |= {"captures": 1}
    assert judged("precapture", ahead).here == "9 of 10 replayed"
    assert judged("precapture", ahead).verdict == NOT_REPRODUCED


def test_a_cold_start_is_told_from_a_slow_length() -> None:
    """A length that is slower also when warm would pass for an artefact of the protocol."""
    cold = calls("eager", lambda length, call: 300.0 if (length, call) == (10, 0) else 20.0, 19.0)
    warm = times("ttft", "eager", lambda _: 20.0)
    assert judged("cold-first", cold + warm).verdict == REPRODUCED
    assert judged("cold-first", cold + times("ttft", "eager", lambda n: 90.0 if n == 10 else 20.0)
                  ).verdict == NOT_REPRODUCED
    assert judged("p99-below-mean", cold).verdict == REPRODUCED
    assert judged("p99-below-mean", calls("eager", lambda *_: 20.0, 21.0)).verdict == NOT_REPRODUCED
    few = [one for one in cold if one["index"] < 50]
    assert "50 repeated calls" in judged("p99-below-mean", few).why


def test_a_capture_inside_a_mean_of_five_is_seen() -> None:
    """Graphs that are slow in themselves, taken for graphs that were captured in the clock."""
    first = calls("graph, captured in the request", lambda _, call: 0.0 if call else 600.0, 9.0) + calls(
        "eager", lambda *_: 20.0, 20.0)
    warm = times("ttft", "eager", lambda _: 20.0)
    assert judged("graphs-only-slow", first + warm + times("ttft", "graph", lambda _: 9.0)).verdict == REPRODUCED
    assert judged("graphs-only-slow", first + warm + times("ttft", "graph", lambda _: 40.0)).verdict == NOT_REPRODUCED


def test_overlap_and_its_limit_are_two_claims() -> None:
    """A gap a little longer while a graph is captured: not blocked, and not free."""
    cell = {"metric": "gap", "path": "graph"}
    def gap(arm: str, state: str, ms: float) -> list[Any]:
        return [row("overlap", arm=arm, state=state, request=k, index=k, value=ms * (1 + 0.01 * (-1) ** k), **cell)
                for k in range(40)]
    rows = gap("quiet", "quiet", 10.0) + gap("thread", "capturing", 10.5) + gap("thread", "quiet", 99.0)
    assert [judged(name, rows).verdict for name in ("overlap", "overlap-limit")] == [REPRODUCED, REPRODUCED]
    rows = gap("quiet", "quiet", 10.0) + gap("thread", "capturing", 15.0)
    assert [judged(name, rows).verdict for name in ("overlap", "overlap-limit")] == [NOT_REPRODUCED, REPRODUCED]


def test_the_memory_of_kept_outputs_is_extrapolated() -> None:
    """A straight line through the wrong columns: 406 graphs of n MiB a row and 1 MiB each, beside 10 GiB of weights."""
    def rows(per_row: float) -> list[Any]:
        return [row("cost", arm="outputs kept", tokens=n, metric="capture", value=1.0,
                    bytes=int(MIB * (1 + per_row * n))) for n in (16, 64, 256)] + [
            row("memory", arm="hybrid", metric="weights", value=10 * 1024.0, unit="MiB")]
    total = 10 + (406 + 0.5 * 406 * 407 / 2) / 1024
    assert judged("memory-full", rows(0.5)).here == f"{total:.1f} GiB, extrapolated"
    assert judged("memory-full", rows(0.5)).verdict == NOT_REPRODUCED
    assert judged("memory-full", rows(0.75)).verdict == REPRODUCED
    assert judged("memory-full", rows(0.75), model="tiny").verdict == NOT_TESTABLE


def test_milliseconds_are_compared_on_the_same_gpu_only() -> None:
    """A time on a faster GPU that confirms or refutes one on another."""
    rows = times("ttft", "hybrid", lambda _: 17.0)
    assert judged("absolute-ttft", rows).verdict == NOT_TESTABLE
    boards = [{"name": "NVIDIA H200", "driver": "580"}] * 2
    assert gpus.named(boards) == "NVIDIA H200"
    assert "on NVIDIA H200 is not" in judged("absolute-ttft", rows, gpu=gpus.named(boards)).why
    assert judged("absolute-ttft", rows, gpu="NVIDIA H100 NVL").verdict == REPRODUCED
    assert judged("absolute-ttft", times("ttft", "hybrid", lambda _: 9.0), gpu="NVIDIA H100 NVL"
                  ).verdict == NOT_REPRODUCED


def crossing(here: float, worker: float, same: float = 100.0, trip: float = 0.3) -> list[Any]:
    """Twenty turns of one engine here and one in a worker, as `papercosts.ipc` records them."""
    cells = (("here", "gap", here, "ms"), ("worker", "gap", worker, "ms"), ("worker", "round trip", trip, "ms"),
             ("worker", "hand-over", trip / 10, "ms"), ("worker / here", "same tokens", same, "%"))
    return [row("ipc", arm=arm, round=k, metric=metric, unit=unit,
                value=value * (1 + 0.01 * (-1) ** k * (unit == "ms")))
            for k in range(20) for arm, metric, value, unit in cells]


def test_a_round_trip_is_held_against_the_published_range() -> None:
    """A median beyond the range that an outlier pulls into it; one measure under the other's name."""
    assert [judged("ipc", crossing(2.0, 2.0, trip=ms)).verdict for ms in (0.1, 0.3, 0.9)] == [
        NOT_REPRODUCED, REPRODUCED, NOT_REPRODUCED]
    assert [judged("ipc-token", crossing(2.0, 2.0, trip=ms)).verdict for ms in (0.9, 3.0)] == [
        NOT_REPRODUCED, REPRODUCED]


def test_two_processes_are_judged_by_gaps_of_equal_tokens() -> None:
    """A second process that is faster because it computes something else, or a cost that passes for a gain."""
    assert [judged("two-processes", crossing(2.0, ms)).verdict for ms in (1.5, 2.0, 2.5)] == [
        REPRODUCED, NOT_REPRODUCED, NOT_REPRODUCED]
    assert judged("two-processes", crossing(2.0, 2.5)).here.startswith("-25.0% [")
    assert "tokens of worker differ from those of here in 20 turns" in judged(
        "two-processes", crossing(2.0, 1.5, same=96.0)).why
    old = [row("ipc", arm="unix socket", metric="round trip", value=0.1) for _ in range(20)]
    assert [judged(name, old).verdict for name in ("two-processes", "ipc", "ipc-token")] == 3 * [NOT_TESTABLE]


def peers_run(root: Path, name: str, ms: dict[str, tuple[float, float]], *, model: str = "tiny",
              status: Literal["complete", "failed"] = "complete", failed: str = "") -> Path:
    """A recorded run of kind peers: a first token and 47 gaps of each system, four prompt lengths and twelve rounds;
    `ms` of both, ten per cent up and down and a hundredth more of a first token's for each row of the prompt."""
    config = PeersConfig(model=model, systems=tuple(ms)[1:], arms=("hybrid",), lengths=LENGTHS, new_tokens=48,
                         device="cpu")
    run = records.Run.create(config, root, name)
    cell = dict.fromkeys(schemas.ABLATION.names) | {
        "policy": "", "path": "graph", "reason": "", "captures": 0, "compiles": 0, "profiled": False}
    asked = [(arm, length, metric) for arm in ms for length in LENGTHS for metric in ("ttft", "itl")]
    for number in range(12):
        run.append([{**cell, "round": number, "request": number * len(asked) + request, "arm": arm,
                     "prompt_tokens": length, "index": index, "position": length + index, "metric": metric,
                     "ms": (1 + 0.1 * (-1) ** (number + index))
                     * (ms[arm][0] + length / 100 if metric == "ttft" else ms[arm][1])}
                    for request, (arm, length, metric) in enumerate(asked)
                    for index in ([0] if metric == "ttft" else range(1, 48))])
    run.finish(status, "it was killed" if status == "failed" else "", extra={"systems": {
        arm: {"state": "failed" if arm == failed else "measured", "why": "", "reason": "", "tokens": peerwords.EQUAL}
        for arm in ms}})
    return run.path


ENGINES = {"hybrid": (10.0, 7.0), "hf-generate": (1.0, 20.0), "tensorrt-llm": (60.0, 9.0)}


def test_other_engines_are_judged_by_the_run_that_took_turns_with_them(tmp_path: Path) -> None:
    """Our time of one run beside theirs of another, an engine under another's name, or one that did not run to the end.
    """
    path = peers_run(tmp_path, "a1", ENGINES)
    assert peerlab.PeersResult.open(path).status == "complete", "a real run, which its own class opens"
    rows = times("ttft", "hybrid", lambda _: 0.1) + gaps("cached", "hybrid", lambda _: 0.1)
    peers = ledger.read_peers(path, "tiny")
    entry = judged("ttft-tensorrt", rows, peers=peers)
    assert (entry.verdict, entry.run_id, entry.against) == (REPRODUCED, "a1", "66.0%")
    assert entry.here.startswith(f"{1 - 10.1 / 60.1:+.1%} ["), "the length with the largest reduction"
    tail = judged("p99-tensorrt", rows, peers=peers)
    assert (tail.verdict, tail.here.partition(" [")[0]) == (REPRODUCED, f"{1 - 7 / 9:+.1%}")
    assert tail.here.endswith(f"n = {12 * 4 * 47:,}"), "all gaps, and no first token"
    evidence = Evidence(pd.DataFrame(rows).assign(run_id="r1"), "r1", False, "tiny", "", peers)
    mean = judging.peer(evidence, part="cached", system="tensorrt-llm", statistic="mean")
    assert mean.here.startswith("+22.2% [+22.2%, +22.2%]"), "gap by gap: what both met is no difference"
    assert judged("short-generations", rows, peers=peers).verdict == REPRODUCED
    assert "Run a1." in ledger.grid([entry], "run r1").rows[0][5]
    assert "Run" not in ledger.grid([entry], "run a1").rows[0][5]
    ended = ledger.read_peers(peers_run(tmp_path, "a2", ENGINES, failed="tensorrt-llm"), "tiny")
    assert "tensorrt-llm is not among what was measured: hf-generate, hybrid" in judged(
        "ttft-tensorrt", rows, peers=ended).why
    assert "no other engine was measured" in judged("ttft-tensorrt", rows).why


def test_the_lowest_tail_is_asked_among_other_engines_too(tmp_path: Path) -> None:
    """"Lowest of all" among ours alone, where a run says that another engine is faster."""
    rows = gaps("cached", "hybrid", lambda _: 7.0) + gaps("cached", "eager", lambda _: 20.0)
    slower = ledger.read_peers(peers_run(tmp_path, "a1", ENGINES), "tiny")
    entry = judged("lowest-tail", rows, peers=slower)
    assert (entry.verdict, entry.here) == (REPRODUCED, "lowest at 9 of 9 lengths")
    assert "; hf-generate: 48; tensorrt-llm: 48" in entry.against
    faster = ledger.read_peers(peers_run(tmp_path, "a2", ENGINES | {"vllm": (60.0, 6.0)}), "tiny")
    entry = judged("lowest-tail", rows, peers=faster)
    assert (entry.verdict, entry.here) == (NOT_REPRODUCED, "lowest at 8 of 9 lengths")
    assert "vllm: 48" in entry.against
    assert judged("lowest-tail", gaps("cached", "hybrid", lambda _: 7.0)).verdict == NOT_TESTABLE, "among nobody"


def test_peers_are_the_latest_complete_run_of_the_same_model(tmp_path: Path) -> None:
    """Engines timed on another model, in a run that failed, or an ablation taken for one."""
    folder = peers_run(tmp_path, "a1", ENGINES).parent
    peers_run(tmp_path, "a2", ENGINES)
    peers_run(tmp_path, "a3", ENGINES, model="random:tiny-llama-3")
    peers_run(tmp_path, "a4", ENGINES, status="failed")
    ablation = records.Run.create(RunConfig(device="cpu"), tmp_path, "a5")
    ablation.finish("complete")
    (folder / "a6").mkdir()  # no run
    found = ledger.peers_of(ablation.path, "tiny")
    assert found is not None
    assert set(found["run_id"]) == {"a2"}
    assert ledger.peers_of(ablation.path, "other") is None
    for name, message in (("a5", "of kind ablation"), ("a3", "with random:tiny-llama-3")):
        with pytest.raises(RunError, match=message):
            ledger.read_peers(folder / name, "tiny")


def test_a_claim_that_fits_no_judge_is_refused() -> None:
    """A misspelt judge that counts as not testable for ever."""
    import msgspec

    evidence = Evidence(pd.DataFrame(times("ttft", "hybrid", lambda _: 1.0)).assign(run_id="r1"), "r1", False, "", "")
    for change in ({"judge": "reducton"}, {"settings": {"part": "ttft"}}):
        with pytest.raises(ConfigError, match=r"did you mean 'reduction'|does not fit the judge"):
            ledger.judge(evidence, [msgspec.structs.replace(CLAIMS["ttft-eager-500"], **change)])


@pytest.fixture
def rows() -> pd.DataFrame:
    """A whole small run."""
    rng = np.random.default_rng(0)
    found = [one for arm, ms in (("eager", 20.0), ("graph", 9.0), ("jit", 21.0), ("hybrid", 8.0))
             for one in (*times("ttft", arm, lambda n, ms=ms: ms + n / 100), *gaps("cached", arm, lambda _, ms=ms: ms))]
    found += [one for arm in ("eager", "hybrid") for one in gaps("recomputed", arm, lambda n: 8 + n / 30)]
    found += [one for arm, ms in (("capture=sync", 30.0), ("capture=async", 20.0)) for one in times(
        "capture", arm, lambda _, ms=ms: ms * rng.lognormal(0, 0.1))]
    found += calls("eager", lambda n, k: 300.0 if (n, k) == (10, 0) else 20.0, 19.0)
    found += [row("ttft", arm="all", tokens=900, metric="clipped", value=64.0, unit="tokens", reason="it holds 64")]
    return pd.DataFrame(found).assign(run_id="r1")


@pytest.mark.parametrize("fused", [False, True])
def test_first_calls_stand_beside_warm_ones_of_the_same_kernels(fused: bool) -> None:
    """First calls with fused kernels, as a GPU has them unless told otherwise, beside warm ones with stock kernels."""
    name, ms = ("hybrid fused", 4.0) if fused else ("hybrid", 8.0)
    cold = calls("hybrid, captured ahead", lambda n, k: 12.0, 12.0)
    reason = "replayed prefill graph of 16 rows" + ", fused" * fused
    rows = pd.DataFrame([*times("ttft", "hybrid", lambda _: 8.0), *times("ttft", "hybrid fused", lambda _: 4.0),
                         *({**one, "reason": reason} for one in cold)]).assign(run_id="r1")
    shown = papertables.protocol(rows, "").rows[0]
    assert (shown[0], shown[-1]) == (f"{name}, captured ahead: 10 tokens", f"{12.0 / ms:.2f}")
    drawn = paperviews.protocol(rows, "").data
    assert {value for trace in drawn if trace.xaxis == "x2" for value in trace.y} == {ms}


def test_tables_say_what_the_rows_say(rows: pd.DataFrame) -> None:
    """Published numbers in a column of ours, a p99 of too few gaps, a length that nobody asked for."""
    first = papertables.ttft(rows, "run r1")
    assert first.header == ["prompt tokens", "eager, ms", "graph, ms", "jit, ms", "hybrid, ms"]
    assert [line[0] for line in first.rows] == ["10", "50", "100", "500"]
    assert first.rows[0][4].startswith("8.1")
    assert first.rows[0][4].endswith(" hit")
    tail = papertables.p99(rows, "run r1")
    assert [line[0] for line in tail.rows] == ["10", "50", "100", "150", "200", "250", "300", "350", "400", "500"]
    assert tail.rows[0][1] == "–", "each of eight requests has nine gaps among its first ten tokens"
    assert "whole sequence" in tail.header[5]
    effects = papertables.effects(rows)
    assert [round(one.value, 1) for one in effects["mean"]] == [0.5, 0.1, -0.0]
    assert effects["published"].tolist() == [0.175, 0.28, None]
    assert papertables.ablations(rows, "").rows[0][3] == "+17.5% (S2 S3)"
    assert papertables.protocol(rows, "").rows[0][:2] == ["eager: 10 tokens", "76.0 ± 125"]
    assert papertables.clipped(rows) == "Left out of part ttft: 900 tokens, as it holds 64."
    shown = papertables.published_grid("table1")
    assert shown.rows[1] == ["50", "", "", ""]
    assert shown.rows[0][1] == "13.36 ms (S2)"


def test_figures_keep_published_points_apart(rows: pd.DataFrame, tmp_path: Path) -> None:
    """A line from a measured point to a published one, or one of ours under another's name."""
    figures = paperviews.drawn(rows, "run r1")
    assert set(figures) == set(paperviews.FIGURES)
    for name, panel in (("table1", "y2"), ("table2", "y3"), ("ablations", "y2")):
        named = {True: [], False: []}
        for trace in figures[name].data:
            named[trace.name.startswith("published")].append(trace)
        assert named[True]
        assert all(trace.mode == "markers" and trace.yaxis == panel and "(S2" in trace.name for trace in named[True])
        assert all(trace.yaxis != panel for trace in named[False])
    for name, figure in figures.items():
        assert plots.write(figure, tmp_path / name, ("svg",))[0].stat().st_size > 5000


def test_the_ledger_counts_and_shows_every_claim(rows: pd.DataFrame) -> None:
    """A claim that fell out of the table because it could not be judged."""
    entries = ledger.judge(Evidence(rows, "r1", False, "tiny", "NVIDIA H200"))
    assert [entry.claim.id for entry in entries] == list(CLAIMS)
    grid = ledger.grid(entries, "run r1")
    assert len(grid.rows) == len(CLAIMS)
    assert {line[2] for line in grid.rows} == set(ledger.VERDICTS)
    console = Console(width=115, file=io.StringIO())  # as wide as a notebook is
    console.print(grid.rich())
    shown = console.file.getvalue()
    assert shown.count(f"│ {NOT_TESTABLE} ") == sum(line[2] == NOT_TESTABLE for line in grid.rows)
    words = ledger.words(entries)
    for verdict in ledger.VERDICTS:
        assert f"{sum(entry.verdict == verdict for entry in entries)} are {verdict}" in words
    assert set(judging.JUDGES) == {claim.judge for claim in CLAIMS.values()}, "a judge that decides nothing"


def test_a_part_that_no_judge_reads_is_told_from_one_that_is_not_there() -> None:
    """A run of yesterday, whose rows today's judges pass over as if nothing had been measured."""
    def lacks(rows: list[Any], on_cpu: bool = True) -> list[str]:
        return ledger.lacks(Evidence(pd.DataFrame(rows).assign(run_id="r1"), "r1", on_cpu, "tiny", ""))

    old = [row("ipc", arm="unix socket", metric="round trip", value=0.1) for _ in range(20)]
    held = "part ipc of this run holds round trip of unix socket, but no"
    assert lacks(old) == [f"{held} round trip of worker", f"{held} hand-over of worker"]
    assert lacks(old, on_cpu=False) == [f"{held} same tokens of worker / here", *lacks(old)]
    assert judged("ipc-token", old).why == f"not measured: {held} hand-over of worker"
    other = gaps("cached", "hybrid", lambda _: 7.0)
    assert judged("ipc-token", other).why == "not measured: part ipc is not in this run"
    today = crossing(2.0, 2.0)
    assert lacks(today) == lacks(today, on_cpu=False) == []
    held = "part ipc of this run holds gap of here; gap, round trip of worker; same tokens of worker / here, but no"
    assert lacks([one for one in today if one["metric"] != "hand-over"]) == [f"{held} hand-over of worker"]
    assert lacks(other) == [], "parts that were not asked for are no fault"
    assert lacks([row("ipc", arm="all", metric="clipped", value=64.0)]) == []


def test_the_check_finds_a_committed_run_that_no_judge_reads(tmp_path: Path) -> None:
    """A stale run whose files and tables are all in order would stay committed."""
    old = [row("ipc", arm="unix socket", metric="round trip", value=0.1) for _ in range(20)]
    for name, rows in (("r1", old), ("r2", crossing(2.0, 2.0))):
        run = records.Run.create(PaperConfig(device="cpu", parts=("ipc",)), tmp_path / "data" / "runs", name)
        run.append(rows)
        run.finish("complete")
    findings = committed.check(tmp_path)
    held = "part ipc of this run holds round trip of unix socket, but no"
    (wrong,) = findings.wrong
    assert wrong.endswith(f"/r1: {held} round trip of worker; {held} hand-over of worker: record it again")
    assert [line.partition(":")[0].rpartition("/")[2] for line in findings.checked] == ["r2"]
