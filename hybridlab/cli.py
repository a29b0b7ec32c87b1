"""The command line: `hybridlab env | partition | generate | run | sweep | runs | cache | bench | trace | …`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridlab import cachebench, kernelbench, listing, peerbench, profiling, soaking, sweeping, systembench, terminal
from hybridlab.config import ARMS, POLICIES, RuntimeConfig, Sampling, build
from hybridlab.errors import ConfigError, choose
from hybridlab.plan import KINDS
from hybridlab.terminal import err, errors, examples, option

EXIT_CODES = """**Exit codes:** 0 done; 1 the work failed; 2 the input was refused before any work; 130 interrupted.

**Start with:** `hybridlab generate 'The for statement' --show-paths`"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
                  add_completion=False, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})


POLICY = f"How much graphs hold: {', '.join(POLICIES)}, or what stays outside, as in attention,lm_head."
Model = Annotated[str, option("tiny (ships with hybridlab), a local directory, a Hub id, or random:llama-2-7b: "
                               "exact shapes with seeded random weights.", "--model", "-m")]
Runs = Annotated[Path | None, option("Where run directories go; default data/runs/local.", "--runs")]
Debug = Annotated[bool, option("Show the traceback of an error.", "--debug")]


@app.callback()
def main() -> None:
    """See where launch overhead goes in LLM inference, and measure what CUDA graphs and JIT kernels do about it.

    Every operation of a decode step is static, device-dynamic or host-dynamic, and that decides whether a graph can
    hold it. The four arms of the ablation: **eager**, **graph** (the static part is replayed), **jit** (the dynamic
    part is compiled) and **hybrid** (both).
    """


@app.command(epilog=examples("hybridlab env", "hybridlab env --json > machine.json"))
def env(as_json: Annotated[bool, option("Print one JSON object instead of a table.", "--json")] = False) -> None:
    """Report machine, GPU and libraries, and what does not work here and why."""
    from hybridlab import environment

    found = environment.report()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        terminal.machine(found, environment.missing(found))


@app.command(epilog=examples(
    "hybridlab partition --policy none --kind host-dynamic", "hybridlab partition --policy lm_head, --explain attend",
    "hybridlab partition random:llama-2-7b --policy piecewise --phase prefill --length 100"))
def partition(
    model: Annotated[str, typer.Argument(help="As --model of generate; only its config is read.")] = "tiny",
    policy: Annotated[str, option(f"{POLICY} none labels the stock step.")] = "whole",
    phase: Annotated[str, option("decode (one token) or prefill (a prompt).")] = "decode",
    length: Annotated[int, option("Tokens of context, or of the prompt, that costs are counted for.")] = 512,
    kind: Annotated[str | None, option("Show only static, device-dynamic or host-dynamic operations.")] = None,
    explain: Annotated[str | None, option("Say why the operation of this name is where it is.")] = None,
    as_json: Annotated[bool, option("Print the whole plan as JSON.", "--json")] = False,
    debug: Debug = False,
) -> None:
    """Label every operation of one step of MODEL: what graphs hold, and why."""
    with errors(debug):
        if kind is not None:
            choose("kind", kind, KINDS)
        with err.status("tracing"):
            from hybridlab.partitioning import partition as plan_of

            plan = plan_of(model, None if policy == "none" else policy, phase, length)
        if as_json:
            print(plan.to_json())
        elif explain is not None:
            print(terminal.printable(plan.explain(explain)))
        else:
            terminal.plan(plan, kind)


@app.command(epilog=examples(
    "hybridlab generate 'The for statement'", "hybridlab generate 'The for statement' --arm eager --show-paths",
    "hybridlab generate 'A list' --temperature 0.8 --top-k 40 --seed 7 > text.txt",
    "hybridlab generate --ids '1 17 23' --model random:tiny-mistral-7b"))
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    ids: Annotated[str | None, option("Token ids instead of text, for a model without a tokenizer.")] = None,
    arm: Annotated[str, option(f"How steps execute: {', '.join(ARMS)}.")] = "hybrid",
    policy: Annotated[str, option(POLICY)] = "whole",
    model: Model = "tiny",
    max_new_tokens: Annotated[int, option("Stop after this many tokens.", "--max-new-tokens", "-n")] = 64,
    temperature: Annotated[float, option("0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, option("Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, option("Draw from the likeliest tokens that hold this probability.")] = None,
    seed: Annotated[int, option("Of the draw; every arm draws the same token from the same seed.")] = 0,
    device: Annotated[str, option("auto, cpu or cuda.")] = "auto",
    capture: Annotated[str, option("When graphs are captured: ahead of the request, sync (inside it), async "
                                    "(behind it) or never.")] = "ahead",
    process: Annotated[str, option("here, or worker: a second process has the weights and graphs.")] = "here",
    echo: Annotated[bool, option("Print PROMPT before its continuation.", "--echo/--no-echo")] = True,
    show_paths: Annotated[bool, option("List the path that made each token, and its time.", "--show-paths")] = False,
    debug: Debug = False,
) -> None:
    """Stream a continuation of PROMPT token by token: text on stdout, one line of timing on stderr."""
    with errors(debug):
        request = terminal.prompt(prompt, ids)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        settings = {"arm": arm, "policy": policy, "device": device, "capture": capture, "process": process}
        tokens = terminal.stream(_answer(model, settings, request, sampling, max_new_tokens),
                                 before=prompt if echo and prompt else "")
        if show_paths:
            terminal.list_paths(tokens)
        terminal.timing(tokens, arm)


def _answer(model: str, settings: dict[str, Any], request: str | list[int], sampling: dict[str, Any],
            count: int) -> Iterator[Any]:
    build(RuntimeConfig, settings)  # refuse before torch is imported, which takes seconds
    build(Sampling, sampling)
    with err.status("loading and preparing"):
        from hybridlab.runtime import Runtime

        ahead = settings["capture"] == "ahead"  # of this one request; every prompt length would take a minute
        runtime = Runtime(model, **settings | ({"capture": "sync"} if ahead else {}))
        tokens = runtime.stream(request, max_new_tokens=count, **sampling)
        if ahead:
            runtime.generate(request, max_new_tokens=min(2, count), **sampling)
    with runtime:
        yield from tokens


@app.command(cls=terminal.Pairs, epilog=examples(
    "hybridlab run notebooks/04_hybrid.ipynb", "hybridlab run notebooks/00_start_here.ipynb --html start.html",
    "hybridlab run notebooks/05_ablation.ipynb -p repeats 20 -p lengths '[10, 50]'",
    "hybridlab run notebooks/05_ablation.ipynb -p model random:tiny-mistral-7b -p temperature 0.8"))
def run(
    notebook: Annotated[Path, typer.Argument(help="A notebook with one cell tagged 'parameters'.")],
    parameter: Annotated[list[str] | None, option(
        "A parameter that the notebook takes, its VALUE written as in JSON. Repeatable.", "--parameter", "-p",
        metavar="NAME VALUE")] = None,
    runs: Runs = None,
    timeout_s: Annotated[float, option("Longest time for one cell, in seconds.", "--timeout-s", min=1)] = 1800,
    html: Annotated[Path | None, option("Also write the executed notebook as one page that opens offline.")] = None,
    debug: Debug = False,
) -> None:
    """Execute NOTEBOOK in its own kernel and record a run: rows, executed notebook, and a manifest written last.

    Parameters are checked before a kernel starts. The notebook is code and runs as you. A cell that fails, a kernel
    that dies or a cell that takes too long gives a run marked failed and exit code 1; rows measured until then stay.
    The directory of a complete run is printed on stdout.
    """
    with errors(debug):
        from hybridlab import export, notebooks
        from hybridlab.parameters import pair

        given = dict(pair(text) for text in parameter or ())
        if html is not None:
            export.require()
        ran = notebooks.run(notebook, given, root=runs, timeout_s=timeout_s)
        if html is not None:
            export.html(ran.path, html)
        print(ran.run_path)


@app.command(epilog=examples("hybridlab tune random:llama-2-7b", "hybridlab tune tiny --check --gpu nvidia-h200"))
def tune(
    model: Annotated[str, typer.Argument(help="As --model of generate; only its config is read.")],
    dtype: Annotated[str, option("float16, bfloat16 or float32.")] = "float16",
    device: Annotated[str, option("cuda or cuda:N.")] = "cuda",
    check: Annotated[bool, option("Time nothing: say which products have a tile; exit code 1 if one has none.",
                                   "--check")] = False,
    gpu: Annotated[str | None, option("With --check: another GPU, named like its file in data/tuning/.")] = None,
    missing: Annotated[bool, option("Only what has no tile yet, as after an interruption.", "--missing")] = False,
    debug: Debug = False,
) -> None:
    """Find the fastest tile of each matrix product of MODEL's fused steps, and keep it for this GPU."""
    with errors(debug):
        if gpu is not None and not check:
            raise ConfigError("--gpu goes with --check", "tiles are timed on the GPU that is here", "leave it out")
        with err.status("starting"):
            from hybridlab import tune as job

        table, words, without = (job.coverage(model, dtype, device, gpu) if check
                                 else job.run(model, dtype, device, err, missing))
        terminal.results([table], words)
    if without:
        raise typer.Exit(terminal.FAILED)


for _name, _module in (("cache", cachebench), ("bench", kernelbench), ("trace", profiling), ("system", systembench),
                       ("peers", peerbench), ("sweep", sweeping), ("runs", listing), ("soak", soaking)):
    app.command(_name, epilog=_module.EXAMPLES)(_module.command)


@app.command(epilog=examples("hybridlab reproduce", "hybridlab reproduce --repeats 400 --budget-s 3600 --restarts 3",
                              "hybridlab reproduce --publish",
                              "hybridlab reproduce --paper --model random:llama-2-7b --repeats 1000"))
def reproduce(
    model: Model = "tiny",
    repeats: Annotated[int, option("Rounds of 05 or 10, at most; one is a TTFT of every arm and length.", min=1)] = 60,
    budget_s: Annotated[float, option("05, and each part of 10, starts no new round after this many seconds.",
                                      "--budget-s", min=1)] = 90.0,
    restarts: Annotated[int, option("Fresh processes that share the rounds and the seconds of 05.", min=1,
                                    max=64)] = 1,
    paper: Annotated[bool, option("Instead: 10, the paper's tables, ablations and claims; raise --budget-s "
                                        "where its reading says that a part ended early.", "--paper")] = False,
    runs: Runs = None,
    publish: Annotated[bool, option("Copy the finished ablation to data/runs/ and redraw the committed figures "
                                     "from committed rows.", "--publish")] = False,
    debug: Debug = False,
) -> None:
    """Execute all notebooks but 10, 05 with the paper's lengths, print the ablation table, and draw the figures.

    Figures go to figures/local/ as HTML, SVG and PNG. Without --publish nothing else changes outside the run store.
    """
    with errors(debug):
        from hybridlab import paths
        from hybridlab import reproduce as job

        checkout = paths.repository()
        if publish and checkout is None:
            raise ConfigError("--publish needs a checkout", "hybridlab runs from an installed package",
                              "clone the repository")
        if paper and restarts > 1:
            raise ConfigError(f"--paper with --restarts {restarts}", "notebook 10 measures in one process",
                              "leave one of them out")
        plan = job.paper_steps(model, repeats, budget_s) if paper else job.steps(model, repeats, budget_s, restarts)
        done = job.run_all(plan, (checkout or Path.cwd()) / "notebooks", err, root=runs)
        run_path = done[job.PAPER if paper else job.ABLATION].run_path
        print((job.paper_shown if paper else job.shown)(run_path, paths.figures_dir(), err))
        if publish and checkout is not None:
            print(job.published(run_path, checkout))


@app.command(epilog=examples("hybridlab check", "hybridlab check --write"))
def check(
    write: Annotated[bool, option("Rewrite tables that differ from their rows.", "--write")] = False,
    root: Annotated[Path | None, option("The checkout; default: the one hybridlab runs from.", "--root")] = None,
    debug: Debug = False,
) -> None:
    """Verify every committed run against its manifest, and every table of README and RESULTS against its rows.

    A table stands between `<!-- table: ablation run=MACHINE/RUN_ID -->` and `<!-- /table -->`; instead
    of ablation also ttft, itl, cache, kernels, steps, trace, system, peers, steadiness, slow, clocks, quantiles and
    generation, and for the paper paper-ttft, paper-p99, paper-ablations, paper-protocol, paper-costs,
    paper-processes and ledger. Exit code 1, with a diff, when anything differs.
    """
    with errors(debug):
        from hybridlab import committed, paths

        checkout = root or paths.repository()
        if checkout is None or not checkout.is_dir():
            raise ConfigError("there is no checkout to check", str(root or ""), "give --root DIRECTORY")
        findings = committed.check(checkout, write)
        for word, lines in (("ok", findings.checked), ("rewrote", findings.written)):
            for line in lines:
                print(f"{word:<8} {line}")
        for line in findings.wrong:
            err.print(f"wrong    {terminal.printable(line)}", highlight=False, markup=False, soft_wrap=True)
        total = len(findings.checked) + len(findings.written) + len(findings.wrong)
        print(f"checked {total} runs and tables, {len(findings.wrong)} wrong")
    if findings.wrong:
        raise typer.Exit(terminal.FAILED)
