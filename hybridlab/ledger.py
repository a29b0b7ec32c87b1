"""The claims of the paper with their verdicts: each judged anew from rows, by the rule that its data states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hybridlab import published, records
from hybridlab.errors import ConfigError, HybridlabError, RunError, StatisticsError, nearest
from hybridlab.judging import JUDGES, Absent, Evidence
from hybridlab.published import Claim
from hybridlab.report import NONE, Grid

REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = VERDICTS = ("reproduced", "not reproduced", "not testable here")
PEERS = "peers"  # the kind of a run of other engines, whose rows are those of an ablation; `arm` names the system
ON_CPU = "a claim about times on a GPU; the number is this CPU's"


@dataclass(frozen=True)
class Entry:
    """One claim, its verdict, our number with its interval ("" if there is none), what it stands against, and why it
    is not testable where it is not; run_id: of the rows it was judged by."""

    claim: Claim
    verdict: str
    here: str
    against: str
    why: str
    run_id: str


def judge(evidence: Evidence, claims: Sequence[Claim] | None = None) -> list[Entry]:
    """Every claim judged from the rows, in the order of its file.

    Raises: ConfigError for a claim whose judge is unknown or does not take its settings.
    """
    return [_entry(claim, evidence) for claim in (published.claims() if claims is None else claims)]


def _entry(claim: Claim, evidence: Evidence) -> Entry:
    if claim.judge not in JUDGES:
        raise ConfigError(f"claim {claim.id!r} names the judge {claim.judge!r}", "there is none of that name",
                          nearest(claim.judge, JUDGES))
    try:
        found = JUDGES[claim.judge](evidence, **claim.settings)
    except StatisticsError as error:
        return Entry(claim, NOT_TESTABLE, "", "", f"{error.fact}{': ' if error.context else ''}{error.context}",
                     evidence.run_id)
    except TypeError as error:
        raise ConfigError(f"claim {claim.id!r} does not fit the judge {claim.judge!r}", str(error),
                          "see hybridlab/judging.py for its settings") from None
    run_id = found.run_id or evidence.run_id
    if claim.needs == "gpu" and evidence.on_cpu:
        return Entry(claim, NOT_TESTABLE, found.here, found.against, ON_CPU, run_id)
    return Entry(claim, REPRODUCED if found.holds else NOT_REPRODUCED, found.here, found.against, "", run_id)


def lacks(evidence: Evidence, claims: Sequence[Claim] | None = None) -> list[str]:
    """What claims ask of the run's own parts and do not find in them, though the part is there: the run is older than
    its judges. A line each; empty for a run of today. A claim about a GPU asks nothing of a CPU."""
    found: dict[str, None] = {}
    for claim in published.claims() if claims is None else claims:
        if claim.needs == "gpu" and evidence.on_cpu:
            continue
        try:
            JUDGES[claim.judge](replace(evidence, peers=None), **claim.settings)
        except Absent as error:
            found[error.fact.removeprefix("not measured: ")] = None
        except StatisticsError:
            continue  # too few values, or a part that was not asked for: the ledger says so
    return list(found)


def grid(entries: Sequence[Entry], caption: str) -> Grid:
    """The ledger as text."""
    rows = [[f"{entry.claim.words}", f"{entry.claim.of}, {entry.claim.source.split()[0]}", entry.verdict,
             entry.here or NONE, entry.against or NONE, (entry.why or entry.claim.test)
             + (f" Run {entry.run_id}." if entry.run_id not in caption else "")] for entry in entries]
    return Grid(f"Claims · {caption}", ["claim", "of, source", "verdict", "here", "against", "how, or why not"], rows,
                "Rules stand in data/paper/claims.toml, sources in data/paper/README.md; 95 % intervals. An effect is "
                "reproduced where its interval excludes none and reaches the published size; milliseconds are compared "
                "on the same GPU and model only.")


def words(entries: Sequence[Entry]) -> str:
    """How many claims have which verdict."""
    counts = Counter(entry.verdict for entry in entries)
    return f"Of {len(entries)} claims, " + ", ".join(
        f"{counts[verdict]} {'is' if counts[verdict] == 1 else 'are'} {verdict}" for verdict in VERDICTS) + "."


def peers_of(path: Path, model: str) -> pd.DataFrame | None:
    """The rows of the latest complete run of other engines in the same folder, which is a machine, with this model, as
    `beside` gives them."""
    for other in sorted(path.resolve().parent.iterdir(), reverse=True):
        try:
            if records.kind(other) == PEERS:
                found = records.read(other)
                if found.status == "complete" and found.config.model == model:
                    return beside(found)
        except HybridlabError:
            continue  # no run, or one of another version: it is not this one that is asked for
    return None


def read_peers(path: Path, model: str) -> pd.DataFrame:
    """The rows of a recorded run of other engines with this model, as `beside` gives them. Raises: RunError."""
    found = records.read(path)
    if found.kind != PEERS or found.config.model != model:
        raise RunError(f"run {found.run_id} is of kind {found.kind}, with {found.config.model}",
                       f"the ledger compares with {PEERS} of {model}", "give such a run")
    return beside(found)


def beside(found: records.Recorded) -> pd.DataFrame:
    """The first tokens and gaps of a run of other engines, in columns of `schemas.PAPER`, parts "ttft" and "cached", of
    systems that went on to its end; tokens: of the prompt, and of gaps the new ones asked for."""
    there = [name for name, notes in found.extra.get("systems", {}).items() if notes["state"] == "measured"]
    rows = found.rows[found.rows["arm"].isin(there)]
    first = rows["metric"] == "ttft"
    new = rows.groupby("request")["index"].transform("max") + 1
    return rows[["run_id", "round", "request", "arm", "index", "position", "path", "reason", "captures"]].assign(
        part=np.where(first, "ttft", "cached"), metric=np.where(first, "ttft", "gap"), value=rows["ms"],
        tokens=np.where(first, rows["prompt_tokens"], new))
