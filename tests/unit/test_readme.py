"""Commands of README and CONTRIBUTING are executed, cheaper where they would take long; no option is misspelt in the
others."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hybridlab import cachelab, cli, committed, notebooks, parameters, records

ROOT = Path(__file__).resolve().parents[2]
FILES = ("README.md", "RESULTS.md", "CONTRIBUTING.md")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(hybridlab [^`]*)`")
Change = tuple[str, str]  # what is replaced, and by what; "" is the end of the line

RUN = "cpu-epyc/20261128-153452-5580"  # committed, and RESULTS shows its table
NOTEBOOK = "tests/notebooks executes every notebook; here its parameters are checked"
CHEAPER: dict[str, tuple[Change, ...]] = {
    "hybridlab partition random:llama-2-7b --policy piecewise": (),
    "hybridlab partition random:tiny-llama-2 --policy none --kind host-dynamic": (),
    "hybridlab partition random:tiny-llama-2 --policy whole": (),
    'hybridlab generate "The for statement" --arm hybrid --policy full --show-paths': (
        ("--arm hybrid", "--arm graph"), ("", "-n 3")),  # hybrid compiles for half a minute
    "hybridlab cache chat --compare capture=sync --compare 'capture=async behind=thread' --save-trace /tmp/chat.csv": (
        ("/tmp/", ""), ("", "--requests 1 --repeats 1 --new-tokens 1 --model random:tiny-llama-2"),),
    "hybridlab env": (),
    "hybridlab sweep data/sweeps/ablation.yaml --dry-run": (("data/", f"{ROOT}/data/"),),
    "hybridlab runs --last 10": (),
    "hybridlab trace --arm eager --arm hybrid": (("--arm hybrid", "--arm graph"), ("", "--tokens 2 --warmup 1")),
    "hybridlab trace random:llama-2-7b --dtype float16 --kernels fused --perfetto /tmp/one.json.gz": (
        ("/tmp/", ""), ("random:llama-2-7b --dtype float16", "random:tiny-llama-2"),
        ("", "--arm graph --tokens 2 --warmup 1")),
    "hybridlab trace --report report.sqlite": (),
    "hybridlab tune random:llama-2-7b --check --gpu nvidia-h200": (),
    "hybridlab system --part overhead --part memory": (
        ("--part overhead ", ""), ("", "--arm graph --length 8")),  # overhead: tests/unit/test_systemlab.py
    "hybridlab check": (("", "--root checkout"),),          # one committed run and its table
    "hybridlab check --write": (("", "--root checkout"),),
    "hybridlab bench tiny --repeats 20": (
        ("tiny", "random:tiny-llama-2"), ("20", "2"), ("", "--length 8 --variant torch")),  # kernels: test_opbench
    "hybridlab peers --length 10 --length 100 --repeats 30": (
        ("--length 100 --repeats 30", "--repeats 1"),
        ("", "--system hf-generate --arm eager --itl-repeats 1 -n 2 --model random:tiny-llama-2")),
    "make test": (("", "--dry-run"),), "make lint": (("", "--dry-run"),), "make lab": (("", "--dry-run"),),
    "make reproduce": (("", "--dry-run"),),
}
ELSEWHERE: dict[str, str] = {
    ". .venv/bin/activate": "changes the shell that reads it",
    'nsys profile --trace=cuda,nvtx --cuda-graph-trace=node hybridlab generate "Once upon a time"':
        "Nsight Systems is not here; flags: test_tracelab",
    'hybridlab run notebooks/05_ablation.ipynb -p repeats 400 -p lengths "[10, 100]"': NOTEBOOK,
    "hybridlab run notebooks/09_traces.ipynb -p length 8 -p traced_tokens 4": NOTEBOOK,
    "python -m pytest tests/unit/test_stats.py -q": "a test that runs tests runs them twice",
    "TRITON_INTERPRET=1 python -m pytest tests/unit/test_kernels.py -q": "a test that runs tests runs them twice",
    "hybridlab sweep data/sweeps/ablation.yaml": "takes an hour: tests/unit/test_sweeps.py",
    "hybridlab sweep data/sweeps/ablation.yaml --cluster auto": "needs Ray: tests/notebooks/test_sweep.py",
    "hybridlab peers --model random:llama-2-7b --dtype float16 --arm eager --arm hybrid":
        "a model of 13 GB: tests/unit/test_peers.py, tests/gpu/test_peers.py",
    "hybridlab reproduce --paper": "takes minutes: test_paperlab, and notebook 10 in tests/notebooks",
    "hybridlab reproduce --paper --model random:llama-2-7b --repeats 1000 --publish":
        "a model of 13 GB, and it changes the checkout: test_paperlab",
    "hybridlab reproduce --repeats 60 --publish": "takes minutes and changes the checkout: test_cli",
}
PYTHON: dict[str, tuple[Change, ...]] = {  # a block by its first line
    "import hybridlab as hl": (('arm="hybrid"', 'arm="graph"'), ("max_new_tokens=32", "max_new_tokens=3")),
}


def blocks(kind: str) -> list[str]:
    return [body for name in FILES for found, body in BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))
            if found == kind]


def commands() -> list[str]:
    """The lines of all sh blocks without their comments, each once."""
    lines = [re.sub(r"\s+#.*$", "", line).strip() for body in blocks("sh") for line in body.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def changed(line: str, changes: tuple[Change, ...]) -> str:
    for old, new in changes:
        assert old in line, f"{old!r} is not in {line!r}: correct its entry"
        line = line.replace(old, new) if old else f"{line} {new}"
    return line


def group() -> Any:
    return typer.main.get_command(cli.app)


def parsed(line: str) -> Any:
    """The hybridlab call in a line, read as the command line reads it and not run. Fails for an unknown option."""
    words = shlex.split(line)
    _, name, *rest = words[words.index("hybridlab"):]
    assert name in group().commands, f"{line!r}: there is no command {name!r}"
    return group().commands[name].make_context(name, rest)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the report that README reads and a small checkout, and a machine whose rates need no measuring.
    """
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setenv("HYBRIDLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cachelab.roofline, "measure", lambda device, dtype, working_set: {
        "read_gbs": 10.0, "copy_gbs": 10.0, "matmul_tflops": 0.1})
    shutil.copytree(ROOT / "data" / "runs" / RUN, tmp_path / "checkout" / "data" / "runs" / RUN)
    (table,) = (found[0] for found in committed.TABLE.finditer((ROOT / "RESULTS.md").read_text(encoding="utf-8"))
                if (found["kind"], found["run"]) == ("ablation", RUN))
    (tmp_path / "checkout" / "RESULTS.md").write_text(table + "\n", encoding="utf-8")
    with closing(sqlite3.connect(tmp_path / "report.sqlite")) as db:
        db.executescript("""
            CREATE TABLE StringIds (id INTEGER, value TEXT);
            CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, globalTid INTEGER,
                                      domainId INTEGER, int64Value INTEGER);
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER,
                                                      correlationId INTEGER, nameId INTEGER);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
                                                     correlationId INTEGER, shortName INTEGER);
            INSERT INTO StringIds VALUES (1, 'gemv'), (2, 'cudaGraphLaunch_v10000');
            INSERT INTO NVTX_EVENTS VALUES (0, NULL, 75, 'hybridlab', 7, 3, NULL), (1000, 9000, 59, 'decode', 7, 3, 6);
            INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (2000, 3000, 7, 11, 2);
            INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (4000, 6000, 0, 7, 11, 1);""")
    return tmp_path


def test_each_command_has_an_entry_and_each_entry_a_command() -> None:
    """A new line that nobody ever executed, or an entry that outlived its line."""
    known = {*CHEAPER, *ELSEWHERE}
    assert len(known) == len(CHEAPER) + len(ELSEWHERE)
    assert [line for line in commands() if line not in known] == [], "see the end of CONTRIBUTING.md"
    assert sorted(known - set(commands())) == []


@pytest.mark.parametrize("line", CHEAPER)
def test_a_command_does_what_it_says(line: str, workplace: Path) -> None:
    """The first thing that a reader types fails."""
    words = shlex.split(changed(line, CHEAPER[line]))
    if words[0] != "hybridlab":
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    parsed(line)
    got = CliRunner().invoke(cli.app, words[1:], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert got.exit_code == 0, got.output
    assert got.output
    for name in re.findall(r"(?:--save-trace|--perfetto) (\S+)", " ".join(words)):
        assert (workplace / name).stat().st_size


@pytest.mark.parametrize("line", ELSEWHERE)
def test_a_command_that_runs_elsewhere_names_files_and_options_that_exist(line: str) -> None:
    """A renamed option, or a file that was moved, in a line that no test can run."""
    assert len(ELSEWHERE[line]) > 10
    for word in shlex.split(line):
        assert not word.startswith(("tests/", "notebooks/")) or (ROOT / word).exists(), word
    if "hybridlab" not in shlex.split(line):
        return
    context = parsed(line)
    if context.info_name == "run":
        given = dict(parameters.pair(text) for text in context.params["parameter"])
        notebooks.check(ROOT / context.params["notebook"], given)


def test_commands_in_sentences_exist() -> None:
    """`hybridlab tune MODEL` in a sentence after the command was renamed."""
    named = {words[1] for name in FILES for text in INLINE.findall((ROOT / name).read_text(encoding="utf-8"))
             if not (words := text.split())[1].startswith("-")}
    assert len(named) > 3
    assert named - set(group().commands) == set()


def test_a_misspelt_option_is_seen() -> None:
    """The check above must be able to fail."""
    with pytest.raises(Exception, match="--polcy"):  # its class is click's, or that of the copy that Typer holds
        parsed("hybridlab partition tiny --polcy whole")


def test_python_runs_as_it_stands(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The public API drifts away from the example that everybody copies."""
    found = blocks("python")
    assert [body.splitlines()[0] for body in found] == list(PYTHON)
    for body in found:
        file = workplace / "example.py"
        file.write_text(changed(body, PYTHON[body.splitlines()[0]]), encoding="utf-8")
        runpy.run_path(str(file))
        assert "host-dynamic" in capsys.readouterr().out
