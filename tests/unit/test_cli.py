"""The command line: exit codes, what goes to stdout and what to stderr, and the check of committed runs and tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from hybridlab import (
    cachelab,
    cli,
    committed,
    models,
    notebooks,
    parameters,
    paths,
    records,
    report,
    reproduce,
    terminal,
    workload,
)
from hybridlab.config import PAPER_LENGTHS, BenchConfig, CacheConfig, Policy, RunConfig, build
from hybridlab.errors import CaptureFailed, ConfigError, ModelError, NotebookFailed
from hybridlab.experiment import Result as Recorded
from hybridlab.plan import Plan

COMMANDS = ("env", "partition", "generate", "run", "sweep", "runs", "cache", "tune", "peers", "reproduce", "check")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def row(arm: str, round_: int, length: int, index: int, ms: float) -> dict[str, Any]:
    return {"round": round_, "request": 0, "arm": arm, "policy": "whole", "prompt_tokens": length, "bucket": None,
            "index": index, "position": length + index, "metric": "itl" if index else "ttft", "ms": ms,
            "path": "graph" if arm == "hybrid" else "eager", "reason": "", "captures": 0, "compiles": 0,
            "process": 0, "device_ms": None, "client_ms": None, "ended_ns": 1, "happened": "", "happened_ms": 0.0,
            "profiled": False}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one committed run (hybrid twice as fast as eager) and a README that shows it."""
    config = build(RunConfig, {"model": "tiny", "arms": ["eager", "hybrid"], "lengths": [10, 50], "device": "cpu"})
    run = records.Run.create(config, tmp_path / "data" / "runs")
    run.append([row(arm, n, length, index, scale * (1 + n / 100 + index / 50)) for n in range(20)
                for arm, scale in (("eager", 4.0), ("hybrid", 2.0)) for length in (10, 50) for index in range(3)])
    run.finish("complete")
    name = run.path.relative_to(tmp_path / "data" / "runs").as_posix()
    (tmp_path / "README.md").write_text(
        f"# Title\n\n<!-- table: ablation run={name} -->\nstale\n<!-- /table -->\n\ntext stays\n\n"
        f"<!-- table: itl run={name} -->\n<!-- /table -->\n", encoding="utf-8")
    return tmp_path


# ---- help and errors ------------------------------------------------------------------------------------------------

def test_help_lists_every_command() -> None:
    """A command that the help does not show is one that nobody finds."""
    shown = invoke("--help")
    assert shown.exit_code == 0
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", shown.output)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_teaches_by_an_example(command: str) -> None:
    """Help without an example leaves the reader guessing how values are written."""
    shown = invoke(command, "--help")
    assert shown.exit_code == 0
    assert f"hybridlab {command}" in shown.output


@pytest.mark.parametrize(("error", "code"), [
    (ConfigError("fact", "context", "remedy"), 2), (ModelError("fact", "context", "remedy"), 2),
    (CaptureFailed("fact", "context", "remedy"), 1), (NotebookFailed("fact", "context", "remedy"), 1),
])
def test_an_error_is_three_lines_and_a_code(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback for a typing mistake, or exit code 0 after a failure, would make scripts and people go wrong."""
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(notebooks, "run", fails)
    got = invoke("run", "any.ipynb")
    assert got.exit_code == code
    assert got.stdout == ""
    assert [line.split() for line in got.stderr.splitlines()] == [["error", "fact"], ["where", "context"],
                                                                  ["try", "remedy"]]
    assert "Traceback" in invoke("run", "any.ipynb", "--debug").stderr


def test_an_interrupt_has_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script must be able to tell Ctrl-C from a failure."""
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "run", interrupted)
    assert invoke("run", "any.ipynb").exit_code == 130


def test_text_from_outside_does_not_drive_the_terminal() -> None:
    """An escape sequence in a model name or in generated text could rewrite what the reader sees."""
    assert terminal.printable("a\x1b[2Jb\tc\n\x07\u202e") == "a\ufffd[2Jb\tc\n\ufffd\ufffd"
    got = invoke("run", "\x1b]0;owned\x07[red].ipynb")
    assert got.exit_code == 2
    assert "\x1b" not in got.stderr
    assert "[red]" in got.stderr


# ---- env ------------------------------------------------------------------------------------------------------------

def test_env_prints_a_table_and_json() -> None:
    """A report that does not print is missing exactly when someone needs help."""
    assert "torch" in invoke("env").stdout
    found = json.loads(invoke("env", "--json").stdout)
    assert found["versions"]["torch"]


# ---- generate -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    [], ["text", "--ids", "1 2"], ["--ids", "1 x"], ["text", "--arm", "hybird"], ["text", "--temperature", "-1"],
    ["text", "--top-p", "1.5"], ["text", "--capture", "later"], ["text", "--seed", "-1"],
    ["text", "--temperature", "nan"],
])
def test_generate_refuses_bad_input(arguments: list[str]) -> None:
    """Bad input must cost no model load and give exit code 2."""
    got = invoke("generate", *arguments)
    assert got.exit_code == 2
    assert got.stdout == ""
    assert "error" in got.stderr


def test_generate_refuses_what_the_model_cannot_take() -> None:
    """An empty prompt, too many tokens, and a misspelt model are refused before a token is drawn."""
    for arguments in ([""], ["text", "-n", "100000"], ["text", "-n", "0"], ["text", "--model", "tinny"],
                      ["--ids", "999999999"]):
        got = invoke("generate", *arguments, "--arm", "eager", "--device", "cpu")
        assert (got.exit_code, got.stdout) == (2, ""), arguments


def test_generate_streams_text_and_sums_up() -> None:
    """The text goes to stdout alone, so that it can be redirected; timing and paths go to stderr."""
    got = invoke("generate", "The for statement", "--arm", "eager", "-n", "5", "--show-paths", "--device", "cpu")
    assert got.exit_code == 0, got.stderr
    assert "TTFT" not in got.stdout
    assert re.search(r"eager · TTFT [\d.]+ ms · median ITL [\d.]+ ms · \d tokens by path: eager \d", got.stderr)
    ids = invoke("generate", "--ids", "1 17, 23", "--model", "random:tiny-llama-2-7b", "--arm", "eager", "-n", "3",
                 "--device", "cpu")
    assert ids.exit_code == 0, ids.stderr
    assert all(word.isdecimal() for word in ids.stdout.split())
    assert len(ids.stdout.split()) in (1, 2, 3)


# ---- run ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "value"), [
    ("20", 20), ("1e-3", 0.001), ("0.5", 0.5), ("true", True), ("True", True), ("false", False), ("None", None),
    ("null", None), ("tiny", "tiny"), ("random:llama-2-7b", "random:llama-2-7b"), ("[10, 50]", [10, 50]),
    ("[eager, graph]", ["eager", "graph"]), ("['eager', 'graph']", ["eager", "graph"]), ('"20"', "20"), ("007", "007"),
    ("no", "no"), ("1:30", "1:30"), ("/models/[x", "/models/[x"), ("", ""),
])
def test_values_are_read_as_written(text: str, value: Any) -> None:
    """papermill reads `true` as text, and YAML reads `no` as False and 1:30 as 90."""
    got = parameters.parse_value(text)
    assert got == value
    assert type(got) is type(value)


def test_run_hands_parameters_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`-p NAME VALUE` and `-p NAME=VALUE` must both arrive, typed, and the run directory be printed for scripts."""
    seen: dict[str, Any] = {}

    def run(path: Path, parameters: dict[str, Any], **options: Any) -> notebooks.Executed:
        seen.update(parameters, path=path, **options)
        return notebooks.Executed(tmp_path / "notebook.ipynb", tmp_path, "complete")

    monkeypatch.setattr(notebooks, "run", run)
    got = invoke("run", "a.ipynb", "-p", "repeats", "20", "-p", "model=a=b", "--parameter", "lengths", "[10, 50]",
                 "-p", "seed", "-1", "--timeout-s", "9", "--runs", str(tmp_path))
    assert got.exit_code == 0, got.stderr
    assert got.stdout.split() == [str(tmp_path)]
    assert seen == {"path": Path("a.ipynb"), "repeats": 20, "model": "a=b", "lengths": [10, 50], "seed": -1,
                    "timeout_s": 9.0, "root": tmp_path}


@pytest.mark.parametrize("arguments", [["-p", "repeats"], ["-p"], ["--timeout-s", "0"], ["-p", "repeatz", "3"]])
def test_run_refuses_half_a_parameter(arguments: list[str], tmp_path: Path) -> None:
    """A parameter without a value must not be taken for the notebook, nor be dropped."""
    path = tmp_path / "a.ipynb"
    cell = nbformat.v4.new_code_cell("repeats = 3", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    got = invoke("run", str(path), *arguments, "--runs", str(tmp_path / "runs"))
    assert got.exit_code == 2
    assert not (tmp_path / "runs").exists()


# ---- cache ----------------------------------------------------------------------------------------------------------

def test_cache_hands_its_options_over_and_shows_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An option that does not arrive, or a trace saved that is not the one served, would mislead without a sign."""
    seen: dict[str, Any] = {}
    real = cachelab.run

    def run(config: CacheConfig, root: Path) -> cachelab.CacheResult:
        seen.update({"config": config, "root": root})
        return real(CacheConfig(model="random:tiny-llama-3", device="cpu", trace="grid", requests=3, new_tokens=2,
                                repeats=1, compare=({"capture": "sync", "buckets": [64, 512]},)), root, progress=False)

    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setattr(cachelab.roofline, "measure", lambda device, dtype, working_set: {
        "read_gbs": 10.0, "copy_gbs": 10.0, "matmul_tflops": 0.1})
    monkeypatch.setattr(cachelab, "run", run)
    got = invoke("cache", "zipf", "--requests", "7", "--new-tokens", "2", "--repeats", "4", "--model", "tiny",
                 "--compare", "capture=async behind=thread", "--compare", "capture=sync buckets=16,64 cache_graphs=5",
                 "--cost", "64", "--cost", "8", "--disturb", "thread", "--disturb-run-ahead", "1", "--policy", "full",
                 "--device", "cpu", "--dtype", "float32", "--seed", "3", "--save-trace", str(tmp_path / "served.csv"),
                 "--runs", str(tmp_path / "runs"))
    assert got.exit_code == 0, got.stderr
    assert seen["root"] == tmp_path / "runs"
    assert seen["config"] == build(CacheConfig, {
        "trace": "zipf", "requests": 7, "new_tokens": 2, "repeats": 4, "cost_lengths": [64, 8], "disturb": ["thread"],
        "disturb_run_ahead": 1, "policy": "full",
        "compare": [{"capture": "async", "behind": "thread"},
                    {"capture": "sync", "buckets": [16, 64], "cache_graphs": 5}],
        "device": "cpu", "dtype": "float32", "seed": 3})
    (path,) = (tmp_path / "runs").glob("*/*")
    assert f"run      {path}" in got.stdout
    assert "Graph cache · run" in got.stdout
    assert "a first token took" in got.stdout
    served = cachelab.CacheResult.open(path).requests()
    assert workload.read(tmp_path / "served.csv") == served == workload.make("grid", 3, 2, 0)


@pytest.mark.parametrize(("arguments", "message"), [
    (["zpif"], "did you mean 'zipf'"), (["--compare", "capture=snyc"], "did you mean 'sync'"),
    (["--compare", "capture"], "has no value"), (["--compare", "arm=graph"], "leave it out"),
    (["--compare", "cache_graphs=x"], "cache_graphs is 'x'"), (["--device", "gpu", "--disturb", "x"], ""),
    (["none.csv"], "cannot be read"), (["--save-trace", "none/a.csv"], "--save-trace"), (["--seed", "-1"], "seed"),
    (["--disturb", "thraed"], "did you mean 'thread'"), (["--cost", "0"], "cost_lengths"),
])
def test_cache_refuses_bad_input(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
                                 tmp_path: Path) -> None:
    """Bad input must cost no model load, leave no run and give exit code 2."""
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    got = invoke("cache", *arguments, "--runs", str(tmp_path / "runs"))
    assert (got.exit_code, got.stdout) == (2, "")
    assert message in got.stderr
    assert not (tmp_path / "runs").exists()


def test_cache_runs_are_verified_shown_and_not_drawn(checkout: Path) -> None:
    """A committed cache run must be checked like any other, and must not hide the machine's ablation from redraw."""
    config = CacheConfig(device="cpu", compare=({"capture": "sync"},))
    run = records.Run.create(config, checkout / "data" / "runs", run_id="99991231-000000-ffff")
    own = {"part": "stream", "setting": "capture=sync", "prompt_tokens": 9, "bucket": 16, "reason": "", "hits": 1,
           "misses": 0, "captures": 0, "evictions": 0, "failures": 0, "capture_ms": 0.0, "graphs": 1,
           "graph_bytes": 64, "capturing": False, "ended_ns": None, "happened": None, "happened_ms": None}
    run.append([own | {"round": round_, "request": n, "index": 0 if metric == "ttft" else -1, "metric": metric,
                       "ms": 2.0, "path": "graph"}
                for round_ in range(3) for n in range(4) for metric in ("ttft", "after")])
    run.finish("complete")
    name = run.path.relative_to(checkout / "data" / "runs").as_posix()
    readme = checkout / "README.md"
    readme.write_text(readme.read_text() + f"\n<!-- table: cache run={name} -->\n<!-- /table -->\n")
    assert invoke("check", "--root", str(checkout), "--write").exit_code == 0
    assert "| capture=sync | 2.00 [2.00, 2.00] |" in readme.read_text()
    assert "100.0 %" in readme.read_text()
    assert invoke("check", "--root", str(checkout)).exit_code == 0
    assert "ablation.svg" in {file.name for file in committed.redraw(checkout)}
    readme.write_text(f"<!-- table: ablation run={name} -->\n<!-- /table -->\n")
    assert "of kind cache" in invoke("check", "--root", str(checkout)).stderr


def test_runs_of_kernels_are_verified_shown_and_drawn(checkout: Path, kernel_rows: Callable[..., pd.DataFrame]) -> None:
    """A table of a timing of kernels must be recomputed from its rows, and its figures be those of its run."""
    run = records.Run.create(BenchConfig(device="cpu"), checkout / "data" / "runs", run_id="99991231-000000-eeee")
    rows = kernel_rows().drop(columns="run_id").astype({"kernels": object})
    run.append(rows.where(rows.notna(), None).to_dict("records"))
    run.finish("complete")
    name = run.path.relative_to(checkout / "data" / "runs").as_posix()
    readme = checkout / "README.md"
    readme.write_text("".join(f"<!-- table: {kind} run={name} -->\n<!-- /table -->\n" for kind in ("kernels", "steps")))
    assert invoke("check", "--root", str(checkout), "--write").exit_code == 0
    text = readme.read_text()
    assert "| fused | 64 | 4.00 [3.70, 4.30] |" in text
    assert "| attend\\_next 2 × 3 | 1 | kernel | 10.0 [7.00, 13.0] | 2.00 [" in text
    assert f"The whole step · run {run.id} · " in text
    assert invoke("check", "--root", str(checkout)).exit_code == 0
    readme.write_text(text.replace("4.00 [3.70", "3.99 [3.70"))
    assert invoke("check", "--root", str(checkout)).exit_code == 1
    drawn = {f"{file.parent.name}/{file.name}" for file in committed.redraw(checkout)}
    machine = run.path.parent.name
    assert {f"{machine}/kernels_{figure}.{end}" for figure in ("operations", "waterfall", "by_context")
            for end in ("svg", "png")} <= drawn
    assert "ablation.svg" in {name.partition("/")[2] for name in drawn}
    readme.write_text(f"<!-- table: ablation run={name} -->\n<!-- /table -->\n")
    assert "of kind kernels" in invoke("check", "--root", str(checkout)).stderr


# ---- reproduce ------------------------------------------------------------------------------------------------------

def test_every_step_of_reproduce_is_accepted_by_its_notebook() -> None:
    """A parameter that a notebook does not take would end the main job after minutes, in its last notebook."""
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    plan = reproduce.steps("tiny", 5, 10.0, restarts=3)
    assert [step.notebook for step in plan] == ["00_start_here", "01_eager", "02_graphs_only", "03_jit_only",
                                                "04_hybrid", "05_ablation", "06_partition",
                                                "07_graph_cache", "08_kernels", "09_traces"]
    configs = {step.notebook: notebooks.check(folder / f"{step.notebook}.ipynb", step.parameters) for step in plan}
    ablation = configs["05_ablation"]
    assert (ablation.lengths, ablation.repeats, ablation.budget_s) == (PAPER_LENGTHS, 5, 10.0)
    assert (ablation.restarts, ablation.warmup) == (3, 20)
    refused = invoke("reproduce", "--paper", "--restarts", "2")
    assert refused.exit_code == 2
    assert "notebook 10 measures in one process" in refused.stderr


def test_the_paper_is_reproduced_with_its_lengths_and_enough_gaps() -> None:
    """A full reproduction that silently measured the small defaults of the notebook."""
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    (step,) = reproduce.paper_steps("tiny", 1000, 60.0)
    config = notebooks.check(folder / f"{step.notebook}.ipynb", step.parameters)
    assert (config.lengths, config.generations, config.repeats) == (PAPER_LENGTHS, PAPER_LENGTHS, 1000)
    assert config.gaps >= 368  # a p99 needs as many
    assert step.expected_s > 60 * len(config.parts)


def test_a_model_that_cannot_be_fused_is_reproduced_without_its_kernels(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The last notebook would end the main job after all others had run, or be passed over in silence."""
    monkeypatch.setattr("hybridlab.fused.FAMILIES", ("qwen3",))
    assert [step.notebook for step in reproduce.steps("tiny", 5, 10.0)][-2:] == ["07_graph_cache", "09_traces"]
    assert "08_kernels is left out" in capsys.readouterr().err


def test_reproduce_stops_at_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table made after a failed notebook would look like a finished reproduction."""
    monkeypatch.setattr(paths, "repository", lambda: Path(__file__).resolve().parents[2])

    def fails(path: Path, *_: Any, **__: Any) -> notebooks.Executed:
        raise NotebookFailed(f"{path.name} failed", "", "")

    monkeypatch.setattr(notebooks, "run", fails)
    got = invoke("reproduce", "--runs", str(tmp_path))
    assert got.exit_code == 1
    assert "00_start_here.ipynb failed" in got.stderr


# ---- tables, check and publish --------------------------------------------------------------------------------------

def test_check_finds_writes_and_accepts(checkout: Path) -> None:
    """A README number that no row supports must not survive."""
    stale = invoke("check", "--root", str(checkout))
    assert stale.exit_code == 1
    assert "-stale" in stale.stderr
    assert "stale" in (checkout / "README.md").read_text(encoding="utf-8")
    assert invoke("check", "--root", str(checkout), "--write").exit_code == 0
    text = (checkout / "README.md").read_text(encoding="utf-8")
    assert "text stays" in text
    assert "| hybrid |" in text
    assert "2.00 [2.00, 2.00]" in text
    fine = invoke("check", "--root", str(checkout))
    assert fine.exit_code == 0
    assert "checked 3 runs and tables, 0 wrong" in fine.stdout
    (checkout / "README.md").write_text(text.replace("2.00 [", "4.25 ["), encoding="utf-8")
    assert invoke("check", "--root", str(checkout)).exit_code == 1


def test_check_notices_a_changed_run(checkout: Path) -> None:
    """Rows edited after the run make every table and figure of it worthless."""
    rows = next((checkout / "data" / "runs").glob("*/*/rows.parquet"))
    rows.write_bytes(rows.read_bytes() + b" ")
    got = invoke("check", "--root", str(checkout), "--write")
    assert got.exit_code == 1
    assert "was changed after the run" in got.stderr


@pytest.mark.parametrize("readme", [
    "<!-- table: ablation run=m/none -->\n<!-- /table -->", "<!-- table: ablations run=RUN -->\n<!-- /table -->",
    "<!-- table: ablation run=RUN -->\nno end", "<!-- table: ablation run=../../x -->\n<!-- /table -->",
    "<!-- table: ablation run=../local -->\n<!-- /table -->", "<!-- table ablation RUN -->\n<!-- /table -->",
])
def test_check_refuses_a_marker_that_it_cannot_follow(readme: str, checkout: Path) -> None:
    """A marker with a typing mistake would otherwise leave its table unchecked for ever."""
    name = committed.committed_runs(checkout / "data" / "runs")[0].relative_to(checkout / "data" / "runs").as_posix()
    (checkout / "README.md").write_text(readme.replace("RUN", name), encoding="utf-8")
    got = invoke("check", "--root", str(checkout), "--write")
    assert got.exit_code == 1
    assert "wrong" in got.stderr


def test_a_failed_or_unfinished_run_is_not_published(checkout: Path) -> None:
    """Half a run in the committed data would be shown as a result."""
    config = build(RunConfig, {"device": "cpu"})
    failed = records.Run.create(config, checkout / "elsewhere")
    failed.finish("failed", "a cell failed")
    open_run = records.Run.create(config, checkout / "elsewhere")
    for run in (failed, open_run):
        with pytest.raises(records.RunError, match="publish a complete run"):
            committed.publish(run.path, checkout)
    assert len(committed.committed_runs(checkout / "data" / "runs")) == 1


def test_publish_copies_once_and_redraws(checkout: Path) -> None:
    """A committed run is never overwritten, and the committed figures come from committed rows."""
    source = committed.committed_runs(checkout / "data" / "runs")[0]
    other = checkout / "other"
    target = committed.publish(source, other)
    assert records.read(target).status == "complete"
    assert sorted(file.name for file in target.iterdir()) == sorted(file.name for file in source.iterdir())
    pd.testing.assert_frame_equal(records.read(target).rows, records.read(source).rows)
    with pytest.raises(records.RunError, match="never overwritten"):
        committed.publish(source, other)
    files = committed.redraw(other)
    assert {file.name for file in files} >= {"ablation.svg", "ablation.png", "itl_by_arm.svg"}
    assert all(file.parent == other / "figures" / target.parent.name and file.stat().st_size for file in files)


def test_a_committed_copy_names_no_path_of_the_machine(checkout: Path, tmp_path: Path) -> None:
    """The executed notebook, or the text of a failed probe, carrying a home directory into the history."""
    source = committed.committed_runs(checkout / "data" / "runs")[0]
    target = tmp_path / "copy"
    kept = json.loads((source / records.ENVIRONMENT).read_text()) | {"failed": {"commit": "Error: git -C /home/me/x"}}
    (source / records.ENVIRONMENT).write_text(json.dumps(kept))
    (source / "notebook.ipynb").write_text("/home/me")
    records.keep(source, target)
    assert all(b"/home/me" not in file.read_bytes() for file in target.iterdir())
    assert records.read(target).environment["failed"] == ["commit"]


def test_tables_show_the_rows(checkout: Path) -> None:
    """A table that drops an interval, an arm or the sample limit of p99 says more than was measured."""
    result = Recorded.open(committed.committed_runs(checkout / "data" / "runs")[0])
    grid = report.ablation(result)
    assert [line[0] for line in grid.rows] == ["eager", "hybrid"]
    assert all(len(line) == len(grid.header) for line in grid.rows)
    assert [line[2] for line in grid.rows] == [report.NONE, report.NONE]  # 40 values carry no p99
    assert grid.rows[1][3] == "2.00 [2.00, 2.00]"
    lengths = report.by_length(result, "itl")
    assert [line[0] for line in lengths.rows] == ["10", "50"]
    assert all(line[2].endswith("] 2.00×") and "×" not in line[1] for line in lengths.rows)
    assert result.run_id in grid.markdown()


def test_numbers_keep_three_digits_and_cells_stay_in_their_column() -> None:
    """A bar in a model name would add a column, and 1.23e+03 is no way to write milliseconds."""
    assert [report.number(value) for value in (0.01234, 0.5, 3.14159, 31.4159, 314.159, 3141.59, 0.0)] == [
        "0.0123", "0.500", "3.14", "31.4", "314", "3142", "0.000"]
    text = report.Grid("a|b <i>", ["x|y", "z"], [["1|2", "3"]], "note").markdown()
    assert "x\\|y" in text
    assert "1\\|2" in text
    assert "<i>" not in text.replace("\\<i\\>", "")
    assert report._absent(None)
    assert report._absent(math.nan)


def test_partition_shows_reasons_segments_and_json() -> None:
    """A partition that only Python can see, or a table that says other things than the plan."""
    shown = invoke("partition", "--policy", "piecewise")
    assert shown.exit_code == 0, shown.output
    for text in ("0 host-dynamic", "attention 0", "reads the position from device memory", "attend ×4"):
        assert text in shown.stdout
    stock = invoke("partition", "--policy", "none", "--kind", "host-dynamic")
    assert "concatenates onto the cache" in stock.stdout
    assert "same shapes" not in stock.stdout
    assert "is device-dynamic: reads the position" in invoke("partition", "--explain", "attend").stdout
    plan = Plan.from_json(invoke("partition", "--policy", "lm_head,", "--json").stdout)
    assert plan.policy == Policy(("lm_head",))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--policy", "hole"], "did you mean 'whole'"), (["--policy", "lm_haed,"], "did you mean 'lm_head'"),
    (["--phase", "decoding"], "did you mean 'decode'"), (["--kind", "statik"], "did you mean 'static'"),
    (["--explain", "atend"], "did you mean 'attend'"), (["--length", "0"], "length is 0"), (["random:lama"], "lama"),
])
def test_partition_refuses_what_it_cannot_label(arguments: list[str], message: str) -> None:
    """A traceback, or a plan of something else, for a misspelt option."""
    result = invoke("partition", *arguments)
    assert result.exit_code == terminal.REFUSAL
    assert message in result.stderr
    assert result.stdout == ""
