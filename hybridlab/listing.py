"""`hybridlab runs`: every recorded run as a table, or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlab import records, terminal
from hybridlab.errors import choose
from hybridlab.terminal import option

EXAMPLES = terminal.examples(
    "hybridlab runs", "hybridlab runs --kind ablation --machine h200 --last 10",
    "hybridlab runs --status incomplete", "hybridlab runs --where torch=2.11.0 --where kernels=fused --json")
STATUSES = ("complete", "failed", "incomplete", "unreadable")
SHOWN = ("run_id", "kind", "status", "machine", "model", "rows", "seconds", "torch", "commit", "reason")


def command(
    kind: Annotated[str | None, option(f"Only runs of this kind: {', '.join(records.KINDS)}.")] = None,
    status: Annotated[str | None, option(f"Only {', '.join(STATUSES)} runs.")] = None,
    machine: Annotated[str | None, option("Only runs of this machine, as in h200 or cpu-xeon.")] = None,
    where: Annotated[list[str] | None, option(
        "Only runs with this value in a column of hl.runs(): a version or a field of the config. Repeatable.",
        metavar="NAME=VALUE")] = None,
    last: Annotated[int | None, option("Only so many, the latest.", min=1)] = None,
    as_json: Annotated[bool, option("Print one JSON array, a run an object with every column.", "--json")] = False,
    runs: Annotated[Path | None, option("A folder of runs; default: the committed ones and data/runs/local.",
                                        "--runs")] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """List every recorded run, the latest last: those that git keeps and your own, failed and incomplete ones too.

    In Python `hl.runs()` is the same as a DataFrame; `hl.compare([a, b])` puts runs side by side.
    """
    with terminal.errors(debug):
        from hybridlab import parameters, report, store

        table = store.runs(runs)
        given = {"kind": kind and choose("kind", kind, records.KINDS), "machine": machine,
                 "status": status and choose("status", status, STATUSES)}
        wanted = {name: value for name, value in given.items() if value is not None}
        for name, value in [*wanted.items(), *(parameters.pair(text) for text in where or ())]:
            choose("column", name, table.columns)
            table = table[[_is(found, value) for found in table[name]]]
        table = table.tail(last) if last else table
        if as_json:
            typer.echo(table.to_json(orient="records", date_format="iso", indent=1))
            return
        lines = [[_shown(name, value) for name, value in line.items()]
                 for line in table[list(SHOWN)].to_dict("records")]
        grid = report.Grid("Runs", list(SHOWN), lines, f"{len(table)} runs.")
        terminal.results([grid.rich()], "")


def _is(found: object, value: object) -> bool:
    """Whether a cell of the table is a value as the command line gives it; of a list, whether it holds it."""
    return value in found if isinstance(found, list) else found == value or str(found) == str(value)


def _shown(name: str, value: object) -> str:
    text = terminal.printable("" if value is None or str(value) in ("<NA>", "nan", "NaT") else str(value))
    return text[:8] + "+" * text.endswith(" with changes") if name == "commit" else text
