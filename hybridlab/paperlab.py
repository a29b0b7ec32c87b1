"""One config about the paper in, one recorded run out; a recorded run → tables, ledger, reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab import (
    experiment,
    gpus,
    judging,
    ledger,
    models,
    names,
    papercosts,
    papersamples,
    papertables,
    roofline,
    stats,
)
from hybridlab.config import as_dict, build
from hybridlab.errors import ConfigError, HybridlabError, RunError
from hybridlab.paperconfig import PaperConfig
from hybridlab.papertimes import START, Arms, Row
from hybridlab.progress import reporter
from hybridlab.report import Grid
from hybridlab.telemetry import Telemetry

LEDGER = "ledger"


class PaperResult(experiment.Shown):
    """The recorded run of a reproduction of the paper; the columns of its rows are `schemas.PAPER`."""

    kind = "paper"

    @property
    def config(self) -> PaperConfig:
        assert isinstance(self.recorded.config, PaperConfig)
        return self.recorded.config

    def _sizes(self) -> list[str]:
        return [f"{int((self.rows['metric'] != 'clipped').sum()):,} values"]

    def ledger(self, peers: Path | str | None = None) -> list[ledger.Entry]:
        """Every claim with its verdict, judged now, from rows. `peers`: a recorded run of other engines; None takes the
        latest beside this run that is of the same model, if there is one."""
        return ledger.judge(self._evidence(
            ledger.peers_of(self.path, self.config.model) if peers is None
            else ledger.read_peers(Path(peers), self.config.model)))

    def lacks(self) -> list[str]:
        """What today's judges ask of parts of this run and do not find there, see `ledger.lacks`."""
        return ledger.lacks(self._evidence(None))

    def _evidence(self, peers: pd.DataFrame | None) -> judging.Evidence:
        return judging.Evidence(
            rows=self.rows, run_id=self.run_id, on_cpu=self.on_cpu, model=self.config.model,
            gpu="" if self.on_cpu else gpus.named(self.recorded.environment.get("gpu") or ()), peers=peers)

    @property
    def floors(self) -> pd.DataFrame | None:
        """The least time of first tokens and gaps on this machine, see `roofline.of_run`; None for older runs."""
        return roofline.floors(self.recorded.extra)

    def grid(self, name: str) -> Grid:
        """A table of `papertables.GRIDS`, or the ledger."""
        if name == LEDGER:
            return ledger.grid(self.ledger(), self.caption)
        floors = [self.floors] if name in papertables.LIMITED else []
        return papertables.GRIDS[name](self.rows, self.caption, *floors)

    def grids(self) -> Iterator[Grid]:
        """Every table that the run has rows for, the ledger last."""
        there = set(self.rows["part"])
        for name, parts in papertables.NEEDS.items():
            if there & set(parts):
                yield self.grid(name)
        yield self.grid(LEDGER)

    def reading(self) -> str:
        """The result in words; every number is computed from the rows."""
        failed = [f"Part {part} failed: {why}." for part, why in self.recorded.extra.get("failed_parts", {}).items()]
        words = [*failed, papertables.clipped(self.rows), self.short(), ledger.words(self.ledger()), self.busy(),
                 self.during()]
        if self.on_cpu:
            words.append("These are CPU timings: a graph is a tape of the recorded calls here, so claims about "
                         "times on a GPU are not judged by them.")
        return "\n".join(filter(None, words))

    def short(self) -> str:
        """Which generation lengths have fewer gaps than were asked for, in words; empty where none has, and for a run
        that failed, which has a reason of its own."""
        if self.status == "failed":
            return ""
        clipped, asked = self.rows[self.rows["metric"] == "clipped"], self.config.gaps
        words = []
        for part in papertables.PARTS:
            out = set(clipped.loc[clipped["part"] == part, "tokens"])
            found = papersamples.short(self.rows, part, [n for n in self.config.generations if n not in out], asked)
            if found:
                words.append(f"Part {part} ended early (budget_s = {self.config.budget_s:g}), with fewer than {asked} "
                             "gaps an arm: "
                             + ", ".join(f"{n} at {tokens} tokens" for tokens, n in found.items())
                             + f". A p99 needs {stats.needed(0.99)}.")
        return "\n".join(words)


def run(config: PaperConfig | Mapping[str, Any], *, root: Path | str | None = None,
        progress: bool = True) -> PaperResult:
    """Measures the parts of the config over one loaded model, one after the other, and records the run. A part that
    fails is named in the reading with the reason, and the others are measured; RunError if all fail.

    Raises: ConfigError, ModelError or PromptError for bad input, before anything is written; what goes wrong later,
    Ctrl-C included, leaves a run that is marked failed with the rows of the finished rounds, and is re-raised.
    """
    config = checked(config)
    with reporter(progress) as report:
        report(f"loading {config.model}", 0, 1)
        model = models.load(config.model, device=config.device, dtype=config.dtype)
        arms = Arms(model, config, report)
        on_cpu = model.device.type == "cpu"
        with experiment.threads(config.threads, on_cpu), experiment.recording(config, root) as target, \
                Telemetry.of(model.device) as clocks:
            report("measuring the machine's limits", 0, 1)
            rates = roofline.measure(model.device, model.dtype, roofline.work(model, context=1).bytes)
            floors = roofline.of_run(model, sorted({START, *arms.lengths}), max(arms.generations, default=1), rates)
            target.append(arms.clipped)
            for rows in _parts(arms):
                target.append(rows)
                clocks.sample()
            if set(arms.failed) == set(config.parts):
                raise RunError("every part failed", "; ".join(f"{part}: {why}" for part, why in arms.failed.items()),
                               "see why each of them did")
            target.finish("complete", extra={"during": clocks.summary(), "roofline": floors,
                                             "failed_parts": arms.failed})
            report("; ".join([f"run {target.path.name}: complete",  # what stays in a notebook
                              *(f"{part}: {words}" for part, words in (arms.ended | arms.failed).items())]), 1, 1)
    return PaperResult.open(target.path)


def checked(config: PaperConfig | Mapping[str, Any]) -> PaperConfig:
    """A config whose shortest request fits its model. Raises: ConfigError, ModelError or PromptError."""
    config = build(PaperConfig, as_dict(config) if isinstance(config, PaperConfig) else config)
    for name in ("parts", "lengths", "generations", "cost_lengths"):
        values = getattr(config, name)
        if len(set(values)) != len(values):
            raise ConfigError(f"{name} holds a value twice", f"{list(values)}", "each is measured once a round")
    names.require_fit(config, names.context(config.model))
    return config


def _parts(arms: Arms) -> Iterator[list[Row]]:
    """The rows of every part, those first that share the warmed-up arms; the others then have the memory to themselves.
    """
    wanted = set(arms.config.parts)
    if wanted & set(TIMES):
        with arms:
            for name, times in TIMES.items():
                if name in wanted:
                    yield from _part(arms, name, times)
    for name, costs in COSTS.items():
        if name in wanted:
            yield from _part(arms, name, costs)


def _part(arms: Arms, name: str, measured: Callable[[Arms], Iterator[list[Row]]]) -> Iterator[list[Row]]:
    """The rows of one part; of one that fails those of its finished rounds, and why: an hour of others is not lost."""
    try:
        yield from measured(arms)
    except HybridlabError as error:
        arms.failed[name] = str(error)


TIMES: dict[str, Callable[[Arms], Iterator[list[Row]]]] = {
    "ttft": Arms.ttft, "cached": Arms.cached, "recomputed": Arms.recomputed}
COSTS: dict[str, Callable[[Arms], Iterator[list[Row]]]] = {
    "capture": papercosts.capture, "overlap": papercosts.overlap, "memory": papercosts.weights,
    "cost": papercosts.cost, "protocol": papercosts.protocol, "ipc": papercosts.ipc}
