"""One config about peers in, one recorded run out: systems in processes of their own, asked in a random order."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab import experiment, measure, models, names, outlines, peerwords, report, roofline, stats
from hybridlab.cells import cells, require_possible
from hybridlab.children import tied
from hybridlab.config import RuntimeConfig, as_dict, build, policy_name
from hybridlab.conversation import Conversation
from hybridlab.engines import ENGINES, PeersConfig, version
from hybridlab.errors import ConfigError, MeasureError, PromptError, RunError, choose
from hybridlab.progress import Report, reporter
from hybridlab.telemetry import Telemetry

ANSWER_S = 120.0  # for one request
COMMAND = tied("hybridlab.peers")

Row = dict[str, Any]


class PeersResult(experiment.Shown):
    """The recorded run of a comparison; its rows are those of an ablation, `arm` names the system."""

    kind = "peers"

    @property
    def config(self) -> PeersConfig:
        assert isinstance(self.recorded.config, PeersConfig)
        return self.recorded.config

    @property
    def systems(self) -> dict[str, dict[str, Any]]:
        """Of each system, ours first: `state` ("measured", "absent" or "failed"), `why`, and where it ran `versions`,
        `weights`, `reason` and `tokens`: how its greedy tokens compare with ours."""
        there = {name: {"state": "measured", "why": "", "reason": "the run did not end"}
                 for name in self.rows["arm"].unique()}
        return dict(self.recorded.extra.get("systems") or there)

    @property
    def floors(self) -> pd.DataFrame | None:
        """The least time of each first token and gap on this machine; None if no arm of ours started."""
        return roofline.floors(self.recorded.extra)

    def table(self) -> pd.DataFrame:
        """As `stats.summary` of the rows, with `slower` and its interval for the ratio: how many times as long as our
        first arm a system takes, in the same rounds."""
        base = next(iter(cells(self.config)))
        there = set(self.rows["arm"])
        table = stats.summary(self.rows, arms=[name for name in self.systems if name in there], base=base)
        for name, of in (("slower", "ratio_to_eager"), ("slower_low", "ratio_high"), ("slower_high", "ratio_low")):
            table[name] = table[of].map(lambda value: None if value is None else 1 / value).astype(object)
        return table.drop(columns=["ratio_to_eager", "ratio_low", "ratio_high"])

    def grid(self) -> report.Grid:
        """The table as text, a line a system; of one that did not run it is empty, and the note says why."""
        return peerwords.grid(self.table() if len(self.rows) else None, self.rows, self.floors, self.systems,
                              self.caption)

    def reading(self) -> str:
        """The result in words; every number is computed from the rows."""
        if self.rows.empty:
            return f"Run {self.run_id} holds no rows: {self.reason or self.status}."
        return peerwords.reading(self.table(), self.systems, self.on_cpu)


def run(config: PeersConfig | Mapping[str, Any], *, root: Path | str | None = None,
        progress: bool = True) -> PeersResult:
    """Starts every system in a process of its own, compares greedy tokens, asks for timed requests in a random order,
    one at a time, and records the run.

    A system that is not installed has no rows; one that does not start, dies, or answers with other tokens has those of
    the rounds before; both are named with the reason, and the others go on.
    Raises: ConfigError, ModelError or PromptError for bad input, before anything is written; RunError if no system is
    left. What goes wrong later leaves a run that is marked failed, with its finished rounds.
    """
    config = checked(config)
    bare = outlines.outline(config.model, device=config.device, dtype=config.dtype)
    prompts = measure.prompts(bare, config.lengths, config.seed)
    with (reporter(progress) as said, tempfile.TemporaryDirectory(prefix="hybridlab-") as scratch,
          experiment.recording(config, root) as target):
        max_len = _rows_held(config, models.context(bare))
        with Comparison(config, prompts, max_len, Path(scratch), said) as comparison:
            comparison.start()
            for rows in comparison.rounds():
                target.append(rows)
        target.finish("complete", extra=comparison.extra)
    return PeersResult.open(target.path)


def _rows_held(config: PeersConfig, context: int | None) -> int:
    """Of each system's KV cache: what the longest request needs, in steps of 64, within the context."""
    longest = max(config.lengths) + config.new_tokens
    return min(-(-longest // 64) * 64, context or longest)


def checked(config: PeersConfig | Mapping[str, Any]) -> PeersConfig:
    """A config whose prompts fit its model and whose systems are known, each named once."""
    config = build(PeersConfig, as_dict(config) if isinstance(config, PeersConfig) else config)
    for name in config.systems:
        choose("system", name, ENGINES)
    for field in ("systems", "arms", "lengths"):
        values = getattr(config, field)
        if len(set(values)) != len(values):
            raise ConfigError(f"{field} holds a value twice", f"{list(values)}", "each is measured once a round")
    for arm in config.arms:
        require_possible(build(RuntimeConfig, {"arm": arm, "policy": config.policy, "kernels": config.kernels}))
    tokens, longest = names.context(config.model), max(config.lengths) + config.new_tokens
    if tokens is not None and longest > tokens:
        raise PromptError(f"a prompt of {max(config.lengths)} tokens and {config.new_tokens} new ones",
                          f"the context of {config.model} holds {tokens} tokens", "lower lengths or new_tokens")
    return config


class Comparison:
    """Systems that run, each with the process it lives in; a context manager that leaves none behind."""

    def __init__(self, config: PeersConfig, prompts: Mapping[int, list[int]], max_len: int, scratch: Path,
                 report: Report) -> None:
        self.config, self.prompts, self.max_len = config, prompts, max_len
        self.scratch, self.report = scratch, report
        self.own = cells(config)
        self.numbers = {name: number for number, name in enumerate([*self.own, *config.systems])}
        self.systems: dict[str, dict[str, Any]] = {  # in the order of tables, ours first
            name: {"state": "failed", "why": "was not started"} for name in self.numbers}
        self.extra: dict[str, Any] = {"systems": self.systems}
        self.running: dict[str, Conversation] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start all systems that are installed and compare their greedy tokens with those of ours. Their processes
        import libraries side by side, then load and warm up one after the other."""
        for name in self.numbers:
            if name not in self.own and version(ENGINES[name].distribution) is None:
                self.systems[name] = {"state": "absent", "why": f"not installed: {ENGINES[name].install}"}
            else:
                self.running[name] = self._stack.enter_context(Conversation(COMMAND))
        self._each(lambda name: self.running[name].ask({}, self.config.start_s), "did not start")
        self._each(self._start, "did not start")
        self._each(self._compare, "died when its tokens were compared")

    def _each(self, step: Callable[[str], Any], failed: str) -> None:
        """One step with every system that runs; one that dies of it is left out."""
        for name in list(self.running):
            self.report(f"starting {name}", self.numbers[name], len(self.numbers))
            try:
                step(name)
            except MeasureError as error:
                self._leave_out(name, f"{failed}: {error}")
        self._require_some()

    def rounds(self) -> Iterator[list[Row]]:
        """The rows of one finished round at a time, until `repeats` rounds or `budget_s` are over."""
        config, request, done = self.config, 0, 0
        with Telemetry.of(models.resolve_device(config.device)) as telemetry:
            started = time.monotonic()
            while done < config.repeats and (not done or time.monotonic() - started < config.budget_s):
                rows: list[Row] = []
                for name, length, protocol in measure.shuffled(self.running, self.prompts, config, round_=done,
                                                               itl=done < config.itl_repeats):
                    rows += self._rows(name, length, protocol, {"round": done, "request": request})
                    request += 1
                    telemetry.sample()
                done += 1
                yield rows
                self._require_some()
                self.report(f"round {done} of {config.repeats}", done, config.repeats)
            self.extra |= {"rounds": done, "measured_s": round(time.monotonic() - started, 1),
                           "during": telemetry.summary()}

    def _start(self, name: str) -> None:
        folder = self.scratch / f"{self.numbers[name]}"
        folder.mkdir()
        cell = self.own.get(name)
        notes = self.running[name].ask({
            "system": name, "config": as_dict(self.config), "prompts": [*self.prompts.values()],
            "max_len": self.max_len, "folder": str(folder),
            "cell": {} if cell is None else {"arm": cell.arm, "kernels": cell.kernels},
            "limits": cell is not None and "roofline" not in self.extra}, self.config.start_s)
        if found := notes.pop("roofline", None):
            self.extra["roofline"] = found
        self.systems[name] = {"state": "measured", "why": "", **notes}

    def _compare(self, name: str) -> None:
        """Greedy tokens of the shortest and the longest prompt beside those of our first arm."""
        base, notes = next(iter(self.own)), self.systems[name]
        if name == base or base not in self.running or not notes["comparable"]:
            notes["tokens"] = peerwords.OURS if name == base else "not compared: " + (
                "no arm of ours started" if notes["comparable"] else f"its weights are {notes['weights']}")
            return
        apart = [self._judged(base, name, self.prompts[length])
                 for length in sorted({min(self.prompts), max(self.prompts)})]
        notes["tokens"] = "; ".join(filter(None, apart)) or peerwords.EQUAL
        if any(apart) and self.systems[base]["dtype"] == "float32":
            self._leave_out(name, f"its tokens are not ours, so that times compare nothing: {notes['tokens']}")

    def _judged(self, base: str, name: str, ids: list[int]) -> str:
        ours, others = (self.running[each].ask({"asked": "tokens", "ids": ids}, ANSWER_S)["ids"]
                        for each in (base, name))
        if ours == others:
            return ""
        found = self.running[base].ask({"asked": "judgement", "ids": ids, "one": ours, "other": others}, ANSWER_S)
        return f"{'apart at a near-tie' if found['near_tie'] else 'apart'}: {found['words']}"

    def _rows(self, name: str, length: int, protocol: measure.Protocol, common: Row) -> list[Row]:
        if name not in self.running:  # it ended earlier in this round
            return []
        question = {"asked": "rows", "ids": self.prompts[length], "metric": protocol.metric}
        try:
            found = self.running[name].ask(question, ANSWER_S)["rows"]
            if any(row["captures"] or row["compiles"] for row in found):
                raise MeasureError("it captured or compiled in a timed request", f"prompt of {length} tokens")
        except MeasureError as error:
            self._leave_out(name, f"round {common['round']}: {error}")
            return []
        common |= {"arm": name, "policy": policy_name(self.own[name].policy) if name in self.own else "",
                   "prompt_tokens": length, "process": self.numbers[name]}
        return [common | row for row in found]

    def _leave_out(self, name: str, why: str) -> None:
        self.systems[name] |= {"state": "failed", "why": why}
        self.running.pop(name).close()

    def _require_some(self) -> None:
        if not self.running:
            raise RunError("no system is left to measure", "; ".join(
                f"{name} {found['why']}" for name, found in self.systems.items() if found["why"]),
                "see why each of them ended")
