"""What a person sees in a terminal: errors in three lines, a streamed continuation, and the report of the machine."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hybridlab.config import policy_name
from hybridlab.errors import ConfigError, HybridlabError, ModelError, NotebookError, PlanError, PromptError
from hybridlab.plan import Plan

REFUSED = (ConfigError, ModelError, PromptError, PlanError, NotebookError)  # raised before work starts
WIDE = 132  # columns of a table that goes to a file or a log
SHOWN = 12  # segments; a piecewise plan has two a layer
COLOURS = {"graph": "blue", "jit": "dark_orange", "eager": "grey50"}
DONE, FAILED, REFUSAL, INTERRUPTED = 0, 1, 2, 130

err = Console(stderr=True)


@contextmanager
def errors(debug: bool = False) -> Iterator[None]:
    """Say what went wrong in a few lines on stderr and leave with an exit code that means something."""
    try:
        yield
    except HybridlabError as error:
        if debug:
            err.print_exception()
        for name, text in (("error", error.fact), ("where", error.context), ("try", error.remedy)):
            if text:
                err.print(f"[b]{name:>5}[/b]  {escape(printable(text))}", highlight=False, soft_wrap=True)
        raise typer.Exit(REFUSAL if isinstance(error, REFUSED) else FAILED) from None
    except KeyboardInterrupt:
        err.print("interrupted; what was finished is kept")
        raise typer.Exit(INTERRUPTED) from None


def stream(tokens: Iterable[Any], before: str = "") -> list[Any]:
    """Write each token to stdout as it comes: its text, or its id where the model has no tokenizer.

    `before` is written once the first token is there, so that refused input leaves stdout empty.
    """
    seen: list[Any] = []
    for token in tokens:
        sys.stdout.write("" if seen else printable(before))
        seen.append(token)
        sys.stdout.write(printable(token.text) if token.text is not None else f"{token.id} ")
        sys.stdout.flush()
    sys.stdout.write("\n")
    return seen


def timing(tokens: list[Any], arm: str) -> None:
    """One dim line on stderr: TTFT, median ITL, and how many tokens each path made."""
    if not tokens:
        return
    gaps = [token.ms for token in tokens[1:]]
    paths = ", ".join(f"{path} {count}" for path, count in Counter(token.path for token in tokens).most_common())
    itl = f"median ITL {statistics.median(gaps):.2f} ms · " if gaps else ""
    err.print(f"{arm} · TTFT {tokens[0].ms:.2f} ms · {itl}{len(tokens)} tokens by path: {paths}", style="dim",
              highlight=False, markup=False)


def list_paths(tokens: list[Any]) -> None:
    """A table on stderr: for each token the path that made it, its time and its text."""
    table = Table("token", "path", "ms", "text")
    for index, token in enumerate(tokens):
        text = repr(token.text) if token.text is not None else str(token.id)
        colour = COLOURS.get(token.path, "default")
        table.add_row(str(index), f"[{colour}]{escape(token.path)}[/]", f"{token.ms:.2f}", escape(printable(text)))
    err.print(table)


def machine(found: dict[str, Any], missing: list[str]) -> None:
    """The report of `environment.report` as a table on stdout, then what does not work here."""
    table = Table(title="environment", title_justify="left", show_header=False)
    for name, value in found.items():
        if name not in ("versions", "failed"):
            table.add_row(escape(name), escape(_shown(value)))
    for name, value in found["versions"].items():
        table.add_row(escape(name), escape(value or "not installed"))
    for name, reason in found["failed"].items():
        table.add_row(f"[red]{escape(name)}[/red]", escape(f"could not be read: {reason}"))
    out = Console()
    out.print(table)
    for sentence in missing:
        out.print(f"• {escape(sentence)}", highlight=False)


def plan(found: Plan, kind: str | None = None) -> None:
    """A plan on stdout: how many operations of each kind, its segments, and the operations that share a reason."""
    out = Console() if sys.stdout.isatty() else Console(width=WIDE)
    policy = "stock, nothing lowered" if found.policy is None else f"policy {policy_name(found.policy)}"
    counts = ", ".join(f"{n:,} {name}" for name, n in found.counts.items())
    out.print(f"{printable(found.model)} · {found.phase} of {found.length} tokens · {policy}: {counts}",
              highlight=False, markup=False)
    ops = found.table()
    segments = Table("segment", "path", "operations", "launches, eager", "why")
    for segment in found.segments[:SHOWN]:
        own = ops[ops["segment"] == segment.name]
        segments.add_row(escape(segment.name), f"[{COLOURS[segment.path]}]{segment.path}[/]", f"{len(own):,}",
                         f"{own['launches'].sum():,}", escape(segment.reason))
    if len(found.segments) > SHOWN:
        segments.add_row("…", "", "", "", f"{len(found.segments) - SHOWN} more")
    out.print(segments)
    table = Table("kind", "why", "operations", "launches, eager", "MFLOPs", "MB")
    ops["short"] = [o.short for o in found.ops]
    for (of_kind, reason), own in ops.groupby(["kind", "reason"], sort=False):
        if kind in (None, of_kind):
            names = ", ".join(f"{short} ×{n}" for short, n in own["short"].value_counts(sort=False).items())
            table.add_row(of_kind, escape(printable(reason)), escape(names), f"{own['launches'].sum():,}",
                          f"{own['flops'].sum() / 1e6:,.2f}", f"{own['bytes'].sum() / 1e6:,.2f}")
    out.print(table)


def printable(text: str) -> str:
    """Text without control characters: a model or a file name must not drive the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(_shown(item) for item in value) or "none"
    return "unknown" if value is None else str(value)
