"""The committed runs and the tables made of them: verified against their manifests and recomputed from their rows."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybridlab import (
    kernelbench,
    kernelviews,
    papertables,
    paperviews,
    plots,
    records,
    report,
    soundness,
    timeline,
    tracetables,
    traceviews,
)
from hybridlab.cachelab import CacheResult
from hybridlab.errors import HybridlabError, RunError, nearest
from hybridlab.experiment import Result
from hybridlab.files import atomic_write
from hybridlab.kernellab import KernelResult
from hybridlab.manifests import CONFIG, MANIFEST
from hybridlab.paperlab import LEDGER, PaperResult
from hybridlab.peerlab import PeersResult
from hybridlab.records import keep, read
from hybridlab.soak import SoakResult
from hybridlab.systemlab import SystemResult
from hybridlab.tracelab import TraceResult

TABLE = re.compile(r"<!-- table: (?P<kind>[\w-]+) run=(?P<run>[\w.-]+/[\w.-]+) -->\n(?P<body>.*?)<!-- /table -->",
                   re.DOTALL)
STILL = ("svg", "png")  # a page that opens offline needs five megabytes of plotly.js beside it
TEXTS = ("README.md", "RESULTS.md")  # whose tables are recomputed
MARK = re.compile(r"<!-- /?table\b")


@dataclass
class Findings:
    """What was looked at, what was rewritten, and what is wrong, each as one line or a diff."""

    checked: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def committed_runs(runs: Path) -> list[Path]:
    """Every run directory under `runs` that git keeps: `<machine>/<run_id>`, without `local/`."""
    found = {file.parent for name in (MANIFEST, CONFIG) for file in runs.glob(f"*/*/{name}")}
    return sorted(path for path in found if path.parent.name != "local")


def check(root: Path, write: bool = False) -> Findings:
    """Verify the committed runs of the checkout `root` and the tables of its `TEXTS`; `write` rewrites stale tables."""
    findings = Findings()
    runs = root / "data" / "runs"
    for path in committed_runs(runs):
        _check_run(path, path.relative_to(runs).as_posix(), findings)
    for text in filter(Path.exists, (root / name for name in TEXTS)):
        _check_tables(text, runs, findings, write)
    return findings


def publish(path: Path, root: Path) -> Path:
    """Copy a complete run into the checkout's data/runs/<machine>/<run_id> and return the copy. Overwrites nothing."""
    recorded = read(path)
    if recorded.status != "complete":
        raise RunError(f"run {recorded.run_id} is {recorded.status}", recorded.reason, "publish a complete run")
    target = root / "data" / "runs" / path.resolve().parent.name / recorded.run_id
    if target.exists():
        raise RunError(f"{target} is there already", "a committed run is never overwritten", "remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".publishing-") as temporary:
        copy = Path(temporary) / target.name
        keep(path, copy)
        read(copy)  # what is published is what was measured
        os.replace(copy, target)
    return target


def redraw(root: Path) -> list[Path]:
    """Draw the committed figures again: figures/<machine>/ from that machine's latest committed ablation,
    `fused_<figure>` from the latest that compares kernels, `kernels_<figure>` from the latest that times them,
    `peers_<figure>` from the one with most systems, the latest of these, `trace_<figure>` from its latest trace,
    `paper_<figure>` from its latest reproduction of the paper, and `cache_<trace>_<figure>` from its latest run of each
    request trace.
    """
    written: list[Path] = []
    ablations: dict[tuple[str, str], Result | PeersResult] = {}
    kernels: dict[str, KernelResult] = {}
    for path in committed_runs(root / "data" / "runs"):
        if records.kind(path) == Result.kind:
            result = Result.open(path)
            ablations[path.parent.name, "fused_" if isinstance(result.config.kernels, tuple) else ""] = result
        elif records.kind(path) == PeersResult.kind:
            found, shown = PeersResult.open(path), ablations.get((path.parent.name, "peers_"))
            if not isinstance(shown, PeersResult) or len(found.systems) >= len(shown.systems):
                ablations[path.parent.name, "peers_"] = found
        elif records.kind(path) == CacheResult.kind:
            written += _draw_cache(CacheResult.open(path), root / "figures" / path.parent.name)
        elif records.kind(path) == KernelResult.kind:
            kernels[path.parent.name] = KernelResult.open(path)
        elif records.kind(path) == TraceResult.kind:
            written += _draw_trace(TraceResult.open(path), root / "figures" / path.parent.name)
        elif records.kind(path) == PaperResult.kind:
            written += draw_paper(PaperResult.open(path), root / "figures" / path.parent.name, STILL)
    for (machine, prefix), compared in ablations.items():
        written += report.draw(compared, root / "figures" / machine, STILL, prefix)
    for machine, timed in kernels.items():
        written += _draw_kernels(timed, root / "figures" / machine)
    return written


def _draw_cache(result: CacheResult, folder: Path) -> Iterator[Path]:
    trace, parts = Path(result.config.trace).stem, set(result.rows["part"])
    if result.config.requests == 1:
        parts.discard("stream")  # one request is none
    for name, (part, figure) in timeline.FIGURES.items():
        if part in parts:
            floors = {} if name == "costs" else {"floors": result.floors}
            yield from plots.write(figure(result.rows, result.caption, **floors), folder / f"cache_{trace}_{name}",
                                   STILL)


def _draw_kernels(result: KernelResult, folder: Path) -> Iterator[Path]:
    for name, (metric, figure) in kernelviews.FIGURES.items():
        if metric in set(result.rows["metric"]):
            yield from plots.write(figure(result.rows, result.caption), folder / f"kernels_{name}", STILL)


def _draw_trace(result: TraceResult, folder: Path) -> Iterator[Path]:
    yield from plots.write(traceviews.shares(result.traces(), result.caption), folder / "trace_shares", STILL)
    yield from plots.write(traceviews.token(result.traces(), result.caption), folder / "trace_token", STILL)


def draw_paper(result: PaperResult, folder: Path, formats: Sequence[str] = plots.FORMATS) -> Iterator[Path]:
    """Write every figure that a reproduction of the paper has rows for into `folder`; yields each file."""
    for name, figure in paperviews.drawn(result.rows, result.caption, result.floors).items():
        yield from plots.write(figure, folder / f"paper_{name}", formats)


def _check_run(path: Path, name: str, findings: Findings) -> None:
    try:
        recorded = read(path)
    except HybridlabError as error:
        findings.wrong.append(f"run {name}: {error}")
        return
    lacks = PaperResult(recorded).lacks() if recorded.kind == PaperResult.kind else []
    if recorded.status != "complete":
        findings.wrong.append(f"run {name}: status is {recorded.status}: {recorded.reason}")
    elif lacks:
        findings.wrong.append(f"run {name}: {'; '.join(lacks)}: record it again")
    else:
        findings.checked.append(f"run {name}: complete, {len(recorded.rows)} rows, sha256 of every file as recorded")


def _check_tables(place: Path, runs: Path, findings: Findings, write: bool) -> None:
    text = place.read_text(encoding="utf-8")
    tables = list(TABLE.finditer(text))
    if len(MARK.findall(text)) != 2 * len(tables):
        findings.wrong.append(f"{place.name}: a table marker is malformed or not closed; "
                              "write <!-- table: KIND run=MACHINE/RUN_ID --> and <!-- /table --> on lines of their own")
        return
    fresh = text
    for match in reversed(tables):
        name = f"{place.name}: table {match['kind']} of {match['run']}"
        try:
            body = _recompute(match["kind"], match["run"], runs)
        except HybridlabError as error:
            findings.wrong.append(f"{name}: {error}")
            continue
        if body == match["body"]:
            findings.checked.append(f"{name}: equals its rows")
        elif write:
            fresh = fresh[:match.start("body")] + body + fresh[match.end("body"):]
            findings.written.append(name)
        else:
            findings.wrong.append(f"{name} differs from its rows:\n{_diff(match['body'], body)}")
    if fresh != text:
        atomic_write(place, fresh)


def _recompute(kind: str, run: str, runs: Path) -> str:
    tables = (*report.GRIDS, *soundness.GRIDS, CacheResult.kind, *kernelbench.TITLES, TraceResult.kind,
              SystemResult.kind, SoakResult.kind, PeersResult.kind, *papertables.GRIDS, LEDGER)
    if kind not in tables:
        raise RunError(f"there is no table {kind!r}", "", nearest(kind, tables))
    known = {path.relative_to(runs).as_posix(): path for path in committed_runs(runs)}
    if run not in known:
        raise RunError(f"run {run} is not committed under {runs.name}/", "", nearest(run, known) if known else "")
    for shown in (CacheResult, SystemResult, SoakResult, PeersResult):
        if kind == shown.kind:
            return shown.open(known[run]).grid().markdown()
    if kind in kernelbench.TITLES:
        return kernelbench.grid(KernelResult.open(known[run]), kind).markdown()
    if kind == TraceResult.kind:
        traced = TraceResult.open(known[run])
        return tracetables.grid(traced.tokens(), traced.caption).markdown()
    if kind in (*papertables.GRIDS, LEDGER):
        return PaperResult.open(known[run]).grid(kind).markdown()
    if kind in soundness.GRIDS:
        result = (PeersResult if records.kind(known[run]) == PeersResult.kind else Result).open(known[run])
        return soundness.GRIDS[kind](result.rows, result.caption, result.floors).markdown()
    return report.GRIDS[kind](Result.open(known[run])).markdown()


def _diff(old: str, new: str) -> str:
    return "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), "README", "rows", lineterm="", n=0))
