"""The run store: every recorded run as one table, and runs side by side where machine and versions agree or the
difference is named. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab import environment, gpus, paths, records
from hybridlab.config import as_dict
from hybridlab.errors import ConfigError, RunError, choose, nearest
from hybridlab.manifests import CONFIG, ENVIRONMENT, MANIFEST, UNFINISHED, load

LIBRARIES = ("torch", "triton", "transformers")
FACTS = ("machine", "cpu", "gpu", "driver", "python", *LIBRARIES, "hybridlab", "commit")  # what numbers depend on
PROBES = ("cpu", "gpu", "python", "hybridlab", "commit", "dirty")  # of `environment`: what FACTS are read from
OWN = ("run_id", "kind", "status", "reason", "machine", "model", "rows", "started", "seconds", *FACTS[1:], "notebook",
       "path")
FIELDS = tuple(dict.fromkeys(name for config, _ in records.KINDS.values() for name in config.__struct_fields__
                             if name not in OWN))
ESTIMATES = ("p50", "p99")


def runs(root: Path | str | None = None) -> pd.DataFrame:
    """One row a run directory, by run_id, the oldest first; no row of a run is read, and no hash checked.

    Without `root`, a folder of `<machine>/<run_id>/`, those that git keeps in data/runs and the user's own. Columns:
    run_id, kind, status ("complete", "failed", "incomplete", or "unreadable"), reason, machine, model, rows, started,
    seconds, cpu, gpu, driver, python, torch, triton, transformers, hybridlab, commit, notebook, path, then the fields
    of configs, None where a kind has no such field.
    """
    lines = [_line(path) for path in directories(root)]
    table = pd.DataFrame(lines, columns=[*OWN, *FIELDS], dtype=object)
    table = table.astype({"rows": "Int64", "seconds": "Float64"})
    table["started"] = pd.to_datetime(table["started"], utc=True)
    return table.sort_values("run_id", kind="stable", ignore_index=True)


def directories(root: Path | str | None = None) -> list[Path]:
    """Every run directory of a store; without `root` of those that git keeps, and of the user's own."""
    checkout = paths.repository()
    roots = [paths.runs_dir(), *([checkout / "data" / "runs"] if checkout else [])] if root is None else [Path(root)]
    found = {path.resolve(): path for top in roots for path in sorted(top.glob("*/*"))
             if path.is_dir() and path.parent.name != "local" and not path.name.startswith(".")}
    return list(found.values())


def _line(path: Path) -> dict[str, Any]:
    line: dict[str, Any] = {"run_id": path.name, "machine": path.parent.name, "status": "incomplete",
                            "reason": UNFINISHED, "started": _stamped(path.name), "path": str(path)}
    found: dict[str, dict[str, Any]] = {}
    for name in (CONFIG, ENVIRONMENT, MANIFEST):
        try:
            if (path / name).exists() or (path / MANIFEST).exists():
                found[name] = load(path / name)
        except RunError as error:
            line |= {"status": "unreadable", "reason": str(error)}
    config, report = found.get(CONFIG), found.get(ENVIRONMENT)
    if config:
        line |= {"kind": "ablation"} | {name: config[name] for name in (*FIELDS, "model", "kind") if name in config}
    if report:
        line |= facts(path.parent.name, report)
    if MANIFEST in found and line["status"] != "unreadable":
        line |= _ended(found[MANIFEST])
    return line


def _ended(manifest: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: manifest.get(name) for name in ("status", "reason", "rows", "started")}
    return found | {"seconds": seconds(manifest), "notebook": (manifest.get("extra") or {}).get("notebook")}


def seconds(manifest: Mapping[str, Any]) -> float | None:
    """How long a run took, from its manifest; None where that does not say."""
    try:
        begun, ended = (datetime.fromisoformat(manifest[name]) for name in ("started", "finished"))
        return (ended - begun).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def _stamped(run_id: str) -> str | None:
    """When a run was begun, from its id."""
    try:
        return datetime.strptime(run_id[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC).isoformat()
    except ValueError:
        return None


def facts(machine: str, report: Mapping[str, Any]) -> dict[str, str | None]:
    """What the numbers of a run depend on beside its config, by the names in FACTS, from its report of the environment.
    None where that does not say. Two working trees with changes are taken as equal if their commits are."""
    boards, versions, commit = report.get("gpu") or [], report.get("versions") or {}, report.get("commit")
    return {"machine": machine, "cpu": report.get("cpu"),
            "gpu": gpus.named(boards) or "none",
            "driver": str(boards[0].get("driver")) if boards else "none", "python": report.get("python"),
            **{name: versions.get(name) for name in LIBRARIES},
            "hybridlab": report.get("hybridlab"), "commit": f"{commit} with changes" if report.get("dirty") else commit}


def here(device: str) -> dict[str, str | None]:
    """The facts of a run that would be recorded here, on `device`."""
    report = environment.report(PROBES)
    return facts(environment.slug(None if device == "cpu" else report["gpu"], report["cpu"]), report)


def require_facts(across: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that is none of FACTS."""
    for name in across:
        choose("across", name, FACTS)


def require_same(found: Mapping[str, Mapping[str, Any]], across: Sequence[str] = ()) -> None:
    """Raise `RunError` unless the facts of all runs in `found` agree in all but what `across` names.

    Raises: ConfigError for a name in `across` that is no fact.
    """
    require_facts(across)
    wrong = {name: values for name in FACTS if name not in across and len(values := _values(found, name)) > 1}
    if wrong:
        said = "; ".join(f"{name}: " + " against ".join(f"{value or 'unknown'} ({_some(ids)})"
                                                        for value, ids in values.items())
                         for name, values in wrong.items())
        names = ", ".join(repr(name) for name in wrong)
        raise RunError(f"the runs differ in {', '.join(wrong)}", said,
                       f"compare runs that agree, or name what may differ: across=[{names}]")


def _values(found: Mapping[str, Mapping[str, Any]], name: str) -> dict[Any, list[str]]:
    values: dict[Any, list[str]] = {}
    for run, known in found.items():
        values.setdefault(known.get(name), []).append(run)
    return values


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:2]) + (f" and {len(ids) - 2} more" if len(ids) > 2 else "")


def opened(wanted: Iterable[str | Path], across: Sequence[str] = (),
           root: Path | str | None = None) -> list[records.Recorded]:
    """Complete runs by id, `machine/id` or directory, each checked against its manifest.

    Raises: RunError for a run that is not there, is not complete or is damaged, for several kinds of runs, and where
    machine or versions differ in what `across` does not name; ConfigError for a name in it that is no fact.
    """
    if isinstance(wanted, str | Path):
        raise ConfigError(f"{str(wanted)!r} is one run", "", "give a list of runs")
    places = directories(root)
    found = [records.read(path) for path in dict.fromkeys(_place(one, places) for one in wanted)]
    for run in found:
        if run.status != "complete":
            raise RunError(f"run {run.run_id} is {run.status}", run.reason, "compare complete runs")
    if len(kinds := {run.kind for run in found}) > 1:
        raise RunError(f"the runs are of kinds {', '.join(sorted(kinds))}", "", "compare runs of one kind")
    require_same({run.run_id: facts(run.path.parent.name, run.environment) for run in found}, across)
    return found


def _place(wanted: str | Path, places: list[Path]) -> Path:
    known = {name: path for path in places for name in (path.name, f"{path.parent.name}/{path.name}")}
    if str(wanted) in known:
        return known[str(wanted)].resolve()
    if Path(wanted).is_dir():
        return Path(wanted).resolve()
    raise RunError(f"there is no run {str(wanted)[:200]!r}", f"{len(places)} runs are here",
                   nearest(str(wanted), known) if known else "")


def rows(runs: Iterable[str | Path], across: Sequence[str] = (), root: Path | str | None = None) -> pd.DataFrame:
    """The rows of several runs in one table: their own columns, run_id among them, and machine. Raises as `opened`."""
    tables = [run.rows.assign(machine=run.path.parent.name) for run in opened(runs, across, root)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["run_id", "machine"])


def compare(runs: Iterable[str | Path], across: Sequence[str] = (), root: Path | str | None = None) -> pd.DataFrame:
    """One line a run and headline: run_id, machine, what of the config and of `across` differs between the runs, then
    what and metric (see `headlines`), n, p50 and p99 with p50_low, p50_high, p99_low, p99_high (95 %; None where n does
    not allow it). Medians over all prompt lengths of a run.

    Raises as `opened`: runs of different machines or versions are compared only across what is named. Raises as
    `headlines` for a run that has none.
    """
    found = opened(runs, across, root)
    known = [_told(run) for run in found]
    shown = [name for name in ("model", *FIELDS, *FACTS[1:]) if len({repr(one.get(name)) for one in known}) > 1]
    lines = []
    for run, told in zip(found, known, strict=True):
        own = {"run_id": run.run_id, "machine": run.path.parent.name} | {name: told.get(name) for name in shown}
        for (what, metric), values in headlines(run).groupby(["what", "metric"])["value"]:
            line = own | {"what": what, "metric": metric, "n": len(values)}
            for name, q in zip(ESTIMATES, (0.5, 0.99), strict=True):
                line |= estimated(name, values, q, values.index.to_numpy())
            lines.append(line)
    return pd.DataFrame(lines, dtype=object)


def _told(run: records.Recorded) -> dict[str, Any]:
    return as_dict(run.config) | facts(run.path.parent.name, run.environment)


def estimated(name: str, values: Any, q: float = 0.5, request: Any = None) -> dict[str, float | None]:
    """A quantile and its interval as columns, None where it has none; `request`: the number of each value's."""
    from hybridlab import stats  # late: scipy takes a second, and a table of runs needs none

    one = pd.DataFrame({"value": values}).assign(**({} if request is None else {"request": request}))
    found = stats.of(one, q, "value")
    value, low, high = (found.value, found.low, found.high) if found else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


PARTS = {"paper": ("part", "arm", "metric"), "system": ("part", "setting", "step")}  # of rows that name their unit
NAMED = {"ttft": "TTFT, ms", "itl": "ITL, ms", "step": "step, ms", "ttft_ms": "TTFT, ms", "itl_ms": "ITL, ms",
         "recovery_ms": "recovery, ms"}
TABLES = {"ttft": NAMED["ttft"], "cached": "gap with a KV cache, ms", "recomputed": "gap of the whole sequence, ms"}


def headlines(run: records.Recorded) -> pd.DataFrame:
    """What a run is first asked for, one row a value: what (arm, system, setting, variant or part), metric with its
    unit, and value. Of the paper that is what its two tables hold, and all there is of a run without these parts.

    Raises: RunError for a run without such values, as a trace always is; StatisticsError for rows under a profiler, see
    `stats.unprofiled`: their times are no latencies.
    """
    from hybridlab import stats  # late, as above

    table = pd.DataFrame() if run.kind == "trace" else _headlines(run.kind, stats.unprofiled(run.rows))
    if table.empty:
        raise RunError(f"run {run.run_id} has no headline", f"kind {run.kind}, {len(run.rows)} rows, none of them a "
                       "latency or a cost measured without a profiler", f"see its rows: hl.rows([{run.run_id!r}])")
    return table


def _headlines(kind: str, found: pd.DataFrame) -> pd.DataFrame:
    if kind == "paper":
        found = found[found["metric"] != "clipped"]  # a length that does not fit the model
    if kind == "soak":
        found = found.melt(value_vars=["ttft_ms", "itl_ms", "recovery_ms"], var_name="metric", value_name="ms").dropna()
        what = pd.Series("requests", found.index)
    elif kind == "paper" and found["part"].isin(list(TABLES)).any():
        found = found[found["part"].isin(list(TABLES))]
        return _each(found, found["arm"], found["part"].map(TABLES), "value")
    elif kind in PARTS:
        part, setting, step = PARTS[kind]
        what = (found[part] + " " + found[setting]).str.strip()
        return _each(found, what, found[step] + ", " + found["unit"], "value")
    elif kind == "kernels":
        found = found[found["metric"] == "step"]
        what = found["variant"] + ", context " + found["context"].astype(str)
    elif kind == "cache":
        found = found[(found["part"] == "stream") & found["metric"].isin(["ttft", "itl"])]
        what = found["setting"]
    else:
        what = found["arm"]
    return _each(found, what, found["metric"].map(NAMED), "ms")


def _each(found: pd.DataFrame, what: pd.Series, metric: pd.Series, column: str) -> pd.DataFrame:
    """A row a value, its index the number of its request."""
    from hybridlab import grouped  # late, as above

    table, groups = pd.DataFrame({"what": what, "metric": metric, "value": found[column]}), grouped.requests(found)
    return table.set_axis(range(len(found)) if groups is None else groups)
