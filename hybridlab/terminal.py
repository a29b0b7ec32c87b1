"""What a person sees in a terminal: errors in three lines, a streamed continuation, and the report of the machine."""

from __future__ import annotations

import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from hybridlab.config import policy_name
from hybridlab.errors import ConfigError, HybridlabError, ModelError, NotebookError, PlanError, PromptError, SweepError
from hybridlab.plan import Plan

REFUSED = (ConfigError, ModelError, PromptError, PlanError, NotebookError, SweepError)  # raised before work starts
WIDE = 132  # columns of a table that goes to a file or a log
SHOWN = 12  # segments; a piecewise plan has two a layer
COLOURS = {"graph": "blue", "jit": "dark_orange", "eager": "grey50"}
DONE, FAILED, REFUSAL, INTERRUPTED = 0, 1, 2, 130

err = Console(stderr=True)


def option(text: str, *names: str, **settings: Any) -> Any:
    """An option of a command with its sentence of help."""
    return typer.Option(*names, help=text, **settings)


def examples(*lines: str) -> str:
    """The examples under a command's help, in Markdown."""
    return "**Examples**\n\n" + "\n".join(f"* `{line}`" for line in lines)


class Pairs(TyperCommand):
    """Lets `-p NAME VALUE` take two words, as papermill does; Typer's repeatable options take one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined, rest = [], iter(args)
        for word in rest:
            joined.append(word)
            if word in ("-p", "--parameter"):
                name = next(rest, None)
                if name is not None and "=" not in name:
                    value = next(rest, None)
                    name = name if value is None else f"{name}={value}"
                joined += [] if name is None else [name]
        return list(super().parse_args(ctx, joined))


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


def prompt(text: str | None, ids: str | None) -> str | list[int]:
    """What the user wants continued: PROMPT, or the numbers of --ids. Raises: PromptError unless one is given."""
    if (text is None) == (ids is None):
        raise PromptError("give a PROMPT or --ids" + ("" if text is None else ", not both"), "",
                          "hybridlab generate 'The for statement'")
    if text is not None:
        return text
    try:
        return [int(part) for part in str(ids).replace(",", " ").split()]
    except ValueError:
        raise PromptError("--ids holds something that is no number", str(ids)[:80], "write it like '1 17 23'") from None


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
    """The report of `environment.report` as a table on stdout, then what does not work here, or that all does."""
    table = Table(title="environment", title_justify="left", show_header=False)
    for name, value in found.items():
        if name == "gpu" and value:
            for number, gpu in enumerate(value):
                for detail, one in gpu.items():
                    table.add_row(escape(f"gpu {number} {detail}"), escape(_shown(one)))
        elif name not in ("versions", "failed"):
            table.add_row(escape(name), escape(_shown(value)))
    if found.get("cuda_available"):
        table.add_row("graphs make room", "one by one, or all together: a self-test decides at the start of a runtime "
                                          "with cache_graphs or cache_bytes")
    for name, value in found["versions"].items():
        table.add_row(escape(name), escape(value or "not installed"))
    for name, reason in found["failed"].items():
        table.add_row(f"[red]{escape(name)}[/red]", escape(f"could not be read: {reason}"))
    out = Console()
    out.print(table)
    for sentence in missing or ["Nothing is missing: every feature works here."]:
        out.print(f"• {escape(printable(sentence))}", highlight=False)


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


def results(tables: Iterable[Table], reading: str) -> None:
    """A run on stdout: its tables, then what they say in words."""
    out = Console(width=None if sys.stdout.isatty() else WIDE)
    for table in tables:
        out.print(table)
    out.print(printable(reading), highlight=False, markup=False)


def near(path: Path) -> str:
    """The path as one types it from here."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def printable(text: str) -> str:
    """Text without control characters: a model or a file name must not drive the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(_shown(item) for item in value) or "none"
    return "unknown" if value is None else str(value)
