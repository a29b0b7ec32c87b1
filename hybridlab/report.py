"""Recorded runs as tables and figures: the same cells for a terminal, for Markdown and for the check of the README."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab import plots
from hybridlab.cells import cells
from hybridlab.stats import needed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from hybridlab.experiment import Result
    from hybridlab.peerlab import PeersResult

NONE = "–"
WHOLE = 24  # letters in the first column of a table; longer names are broken after commas
PROSE = 72  # and what is longer is a sentence
WORDS = {"ttft": "time to first token", "itl": "gap between tokens"}
METRICS = tuple(WORDS)
LIMIT = ("Limit: the least time for the bytes and FLOPs of a step at the read and matrix rates measured in the same "
         "run; of limit: the limit over the time")
POOLED = ("All prompt lengths pooled; 95 % intervals, those of gaps over requests; p99 only where it has one, from n = "
          f"{needed(0.99)} on")


@dataclass(frozen=True)
class Grid:
    """A finished table: a title, a header, rows of text as wide as the header, and one sentence on how to read it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str

    def markdown(self) -> str:
        """The table and its note in Markdown, with numbers to the right."""
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        table = "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)
        return f"{table}\n\n{_escape(self.title)}. {_escape(self.note)}\n"

    def rich(self) -> Table:
        """The same for a terminal. A first column of sentences is wrapped like the others, which keep their room."""
        from rich.markup import escape
        from rich.table import Table

        prose = any(len(first) > PROSE for first, *_ in self.rows)
        table = Table(title=escape(self.title), caption=escape(self.note), title_justify="left",
                      caption_justify="left", show_lines=prose)
        for index, name in enumerate(self.header):
            table.add_column(escape(name), justify="right" if index and not prose else "left",
                             no_wrap=not index and not prose)
        for first, *row in self.rows:
            broken = first.replace(", ", ",\n") if len(first) > WHOLE and not prose else first
            table.add_row(escape(broken), *map(escape, row))
        return table


def ablation(result: Result) -> Grid:
    """All prompt lengths pooled: one row an arm, TTFT and ITL at p50 and p99, and how many times faster than eager;
    with floors also the least time that the machine allows and the share of it reached."""
    cells, limited, rows = _cells(result.table("pooled")), result.floors is not None, []
    for arm in _arms(result):
        row = [arm]
        for metric in METRICS:
            cell = cells.get((arm, "all", metric), {})
            row += [interval(cell, "p50"), interval(cell, "p99"), "1" if arm == "eager" else _ratio(cell)]
            row += [interval(cell, "limit"), share(cell)] * limited
        rows.append(row)
    more = ["limit, ms", "of limit"] * limited
    header = ["arm", *(f"{name}{word}" for metric in METRICS for name, words in (
        (f"{metric.upper()} ", ["p50, ms", "p99, ms"]), ("", ["× eager", *more])) for word in words)]
    return Grid(f"Ablation · {result.caption}", header, rows,
                f"{POOLED}; × eager is how many times faster than eager in the same interleaved run."
                + f" {LIMIT}; both columns hold medians over the rows, each with its own floor." * limited)


def by_length(result: Result, metric: str) -> Grid:
    """One row a prompt length, one column an arm: the median of `metric` ("ttft" or "itl") and the ratio to eager; with
    floors also a column of the least time that the machine allows, and the share of it reached."""
    cells, limited, arms, rows = _cells(result.table("lengths")), result.floors is not None, _arms(result), []
    for length in sorted({length for _, length, kind in cells if kind == metric and length != "all"}):
        own = {arm: cells.get((arm, length, metric), {}) for arm in arms}
        limit = next((interval(cell, "limit") for cell in own.values() if cell), NONE)  # every arm has the same
        rows.append([str(length), *[limit] * limited, *(_with_ratio(cell, arm) for arm, cell in own.items())])
    header = ["prompt tokens", *["limit, ms"] * limited, *(f"{arm}, ms" for arm in arms)]
    return Grid(f"{metric.upper()} by prompt length · {result.caption}", header, rows,
                f"Median {WORDS[metric]} with 95 % interval, then how many times faster than eager"
                + (f", then the share of the limit. {LIMIT}." if limited else "."))


GRIDS: dict[str, Callable[[Result], Grid]] = {
    "ablation": ablation,
    "ttft": lambda result: by_length(result, "ttft"),
    "itl": lambda result: by_length(result, "itl"),
}

FIGURES: dict[str, tuple[str, Callable[..., Any]]] = {  # name: (the metric that it cannot do without, how it is drawn)
    "ablation": ("ttft", plots.ablation),
    "ttft_by_length": ("ttft", plots.ttft_by_length),
    "itl_by_arm": ("itl", plots.itl_by_arm),
    "itl_by_position": ("itl", plots.itl_by_position),
}


def draw(result: Result | PeersResult, folder: Path, formats: Sequence[str] = plots.FORMATS,
         prefix: str = "") -> Iterator[Path]:
    """Write every figure that the run has rows for into `folder`, `prefix` before its name; yields each file as it is
    there."""
    there = set(result.rows["metric"])
    for name, (metric, figure) in FIGURES.items():
        if metric in there:
            drawn = figure(result.rows, result.caption, result.floors)
            yield from plots.write(drawn, folder / f"{prefix}{name}", formats)


def _arms(result: Result) -> list[str]:
    there = set(result.rows["arm"])
    return [name for name in cells(result.config) if name in there]


def _cells(table: pd.DataFrame) -> dict[tuple[str, Any, str], dict[str, Any]]:
    return {(line["arm"], line["prompt_tokens"], line["metric"]): line for line in table.to_dict("records")}


def interval(cell: dict[str, Any], name: str) -> str:
    value, low, high = _three(cell, name, f"{name}_low", f"{name}_high")
    if _absent(value):
        return NONE
    if _absent(low) or _absent(high):
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def _ratio(cell: dict[str, Any]) -> str:
    value, low, high = _three(cell, "ratio_to_eager", "ratio_low", "ratio_high")
    return NONE if _absent(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def share(cell: dict[str, Any], prefix: str = "") -> str:
    """The share of the limit in a line of a table, see `limits.beside`."""
    value, low, high = _three(cell, *(f"{prefix}of_limit{end}" for end in ("", "_low", "_high")))
    return NONE if _absent(value) else f"{value:.0%} [{low:.0%}, {high:.0%}]"


def _with_ratio(cell: dict[str, Any], arm: str) -> str:
    text, value, reached = interval(cell, "p50"), cell.get("ratio_to_eager"), cell.get("of_limit")
    text += "" if arm == "eager" or _absent(value) else f" {value:.2f}×"
    return text if _absent(reached) else f"{text}, {reached:.0%}"


def _three(cell: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(cell.get(name) for name in names)


def _absent(value: Any) -> bool:
    return value is None or math.isnan(value)


def number(value: float) -> str:
    """Three significant digits, never in exponents."""
    digits = 3 if value <= 0 else min(4, max(0, 2 - math.floor(math.log10(value))))
    return f"{value:.{digits}f}"


def _escape(text: str) -> str:
    """Text as Markdown shows it literally inside a table: model names come from outside."""
    one_line = " ".join(text.splitlines())
    return re.sub(r"([\\|<>*_`&$]|(?<=\])\()", r"\\\1", one_line)  # "](" would be a link
