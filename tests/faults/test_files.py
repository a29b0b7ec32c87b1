"""Cases 22 to 30 in which files, names or texts from outside are the fault."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import sys
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import hybridlab as hl
from hybridlab import (
    checkpoint,
    files,
    kineto,
    models,
    parameters,
    paths,
    records,
    report,
    store,
    sweeps,
    terminal,
    tuning,
    workload,
)
from hybridlab.config import RunConfig
from hybridlab.errors import ConfigError, HybridlabError, ModelError, RunError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = RunConfig(lengths=(10,), arms=("eager",))
ROW = {"round": 0, "request": 0, "arm": "eager", "policy": "whole", "prompt_tokens": 10, "bucket": None, "index": 0,
       "position": 10, "metric": "ttft", "ms": 1.5, "path": "eager", "reason": "", "captures": 0, "compiles": 0,
       "process": 0, "device_ms": None, "client_ms": None, "ended_ns": 10, "happened": "", "happened_ms": 0.0,
       "profiled": False}


@pytest.fixture(autouse=True)
def _quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setattr(records.environment, "report", lambda: {"gpu": [], "cpu": "Test CPU", "machine": "cpu-test"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model's files, free to be damaged."""
    made = tmp_path / "model"
    made.mkdir()
    for file in (paths.data_dir() / "models" / "tiny").iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    return made


# --- 23: links ----------------------------------------------------------------------------------------------------

def outside(folder: Path) -> Path:
    (folder.parent / "secret.json").write_text("{}")
    return folder.parent / "secret.json"


LINKS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file outside": ("generation_config.json", outside),
    "a device": ("generation_config.json", lambda f: "/dev/zero"),
    "a circle": ("vocab.txt", lambda f: f / "vocab.txt"),
    "nothing": ("vocab.txt", lambda f: "absent"),
    "the folder above": ("sub", lambda f: f.parent),
    "a way back in": ("vocab.txt", lambda f: f"../{f.name}/../secret"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_case_23_a_link_that_leaves_the_checkpoint_is_refused(kind: str, folder: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file of the user read through a checkpoint, or an error of the file system without a remedy."""
    name, target = LINKS[kind]
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target(folder))
    with pytest.raises(ModelError, match=f"{name}: a link out"):
        models.load(folder, device="cpu")
    monkeypatch.setattr(checkpoint, "_leads_into", lambda root, link: True)
    checkpoint.check_links(folder)  # it is this guard that refuses


def test_case_23_a_link_inside_the_checkpoint_is_followed(folder: Path) -> None:
    """A sound checkpoint refused for a link between its own files, as the Hub's cache has them."""
    os.replace(folder / "model.safetensors", folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    assert models.load(folder, device="cpu").name_or_path == str(folder)


# --- 24: configs --------------------------------------------------------------------------------------------------

def test_case_24_a_config_of_fifty_megabytes_is_not_read(folder: Path) -> None:
    """Memory and minutes given to a file whose size alone says that it is no config."""
    with (folder / "config.json").open("r+b") as file:
        file.truncate(50 << 20)
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"52,428,800 bytes.*the limit is 1,048,576"):
        models.load(folder, device="cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


HOSTILE = [{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, {"_attn_implementation_internal": "owner/kernel"},
           {"attn_implementation": "owner/kernel"}, {"hidden_size": 2**63}, {"num_attention_heads": True}]


@pytest.mark.parametrize("change", [*HOSTILE, "duplicate"], ids=str)
def test_case_24_a_hostile_config_imports_and_fetches_nothing(change: Any, folder: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Code imported or a repository asked before the field that named it is refused."""
    text = (folder / "config.json").read_text()
    if change == "duplicate":
        text = text.replace("{", '{"vocab_size": 1, ', 1)
    else:
        text = json.dumps(json.loads(text) | change)
    (folder / "config.json").write_text(text)
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    before = set(sys.modules)
    with pytest.raises(ModelError, match=r"config\.json"):
        models.load(folder, device="cpu")
    assert set(sys.modules) == before


@pytest.mark.parametrize("name", ["x" * 1_000_000, "/" + "x" * 300, "o/" + "x" * 300, "a\0b", "\ud800", "~absent/x",
                                  "random:" + "x" * 1_000_000, "\x1b[31m"])
def test_case_24_a_name_of_any_kind_is_refused_as_one(name: str) -> None:
    """An error of the operating system, or a message of a megabyte, as the answer to a name."""
    with pytest.raises(ModelError) as caught:
        models.load(name, device="cpu")
    assert len(str(caught.value)) < 10_000


# --- 28: a disk that is full ---------------------------------------------------------------------------------------

class Disk:
    """Counts what is asked of the disk, and is full from the call of number `full_at` on; that one writes half."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full_at: int) -> None:
        self.full_at, self.count = full_at, 0
        opened, disk = io.open, self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if disk.full():
                    super().write(bytes(data)[:len(data) // 2])
                    raise no_space()
                return super().write(data)

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode != "xb":
                return opened(file, mode, *args, **kwargs)
            self.ask()
            return io.BufferedWriter(File(os.fspath(file), "xb"))

        monkeypatch.setattr(io, "open", open_)
        for name in ("fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self.asking(getattr(os, name)))

    def full(self) -> bool:
        self.count += 1
        return self.count > self.full_at

    def ask(self) -> None:
        if self.full():
            raise no_space()

    def asking(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            self.ask()
            return call(*args, **kwargs)

        return asked


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def record(root: Path, name: str, done: list[str]) -> None:
    """A run of two rounds; `done` says how far it came."""
    run = records.Run.create(CONFIG, root, run_id=name)
    done.append("created")
    for number in range(2):
        run.append([ROW | {"round": number}])
        done.append("appended")
    run.finish("complete")
    done.append("finished")


def test_case_28_a_full_disk_at_every_call_in_turn_loses_nothing_finished(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn file, a lost round or a false "complete", at whichever call the disk is full."""
    record(tmp_path, "earlier", [])
    earlier, ended = records.read(tmp_path / "cpu-test" / "earlier"), set()
    for full_at in range(200):
        done: list[str] = []
        with monkeypatch.context() as patch, suppress(OSError):
            disk = Disk(patch, full_at)
            record(tmp_path, f"run-{full_at}", done)
        path = tmp_path / "cpu-test" / f"run-{full_at}"
        assert not list(path.rglob(f"{files.TEMPORARY}*")), "half a file was left"
        if "created" in done:
            found = records.read(path)
            assert len(found.rows) >= done.count("appended")
            assert found.rows["round"].is_unique
            assert (found.status == "complete") == (path / records.MANIFEST).exists()
            assert found.status == "complete" or "finished" not in done
        ended.add(done[-1] if done else "")
        assert records.read(earlier.path).rows.equals(earlier.rows)
        if disk.count <= full_at:
            break
    assert ended == {"", "created", "appended", "finished"}
    assert disk.count > 20  # of calls that could be the one


# --- 29: two runs, edited rows ---------------------------------------------------------------------------------------

def test_case_29_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    """The last writer winning in silence, from one process or from two."""
    records.Run.create(CONFIG, tmp_path, run_id="one")
    with pytest.raises(RunError, match="there already"):
        records.Run.create(CONFIG, tmp_path, run_id="one")


# --- what cannot be read to its end ----------------------------------------------------------------------------------

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "requests": ("x.csv", workload.read), "tiles": ("x.csv", tuning.read), "trace": ("x.json", kineto.read),
    "notebook": ("x.ipynb", parameters.read_notebook), "sweep": ("x.yaml", sweeps.read),
    "config": ("config.json", checkpoint.check_config), "run": (records.CONFIG, lambda file: records.read(file.parent)),
    "manifest": (records.MANIFEST, lambda file: records.load(file)),
    "rows": (records.ROWS, lambda file: records._rows(file.parent)),
}


def without_end(file: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_a_file_without_an_end_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    """A run, trace or notebook from somebody whose reader waits for ever, or fills the memory."""
    (tmp_path / records.CONFIG).write_text("{}")
    file, said = tmp_path / READERS[name][0], list[Exception]()
    file.unlink(missing_ok=True)
    without_end(file, kind)

    def read() -> None:
        try:
            READERS[name][1](file)
        except HybridlabError as error:
            said.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(30)
    assert not reader.is_alive()
    assert re.search("no regular file|leads out of the run|is no run directory", str(said[0]))


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    """`hybridlab runs` waiting for ever for one manifest of a store."""
    record(tmp_path, "good", [])
    record(tmp_path, "bad", [])
    manifest = tmp_path / "cpu-test" / "bad" / records.MANIFEST
    manifest.unlink()
    without_end(manifest, "device")
    assert dict(zip(*store.runs(tmp_path)[["run_id", "status"]].T.to_numpy(), strict=True)) == {
        "good": "complete", "bad": "unreadable"}


def test_a_file_of_a_run_is_not_one_elsewhere(tmp_path: Path) -> None:
    """Somebody's run that shows what another file of this machine holds, in a table or an error."""
    (tmp_path / "secret.json").write_text('{"reason": "mine"}')
    record(tmp_path, "one", [])
    path = tmp_path / "cpu-test" / "one"
    (path / records.MANIFEST).unlink()
    (path / records.MANIFEST).symlink_to(tmp_path / "secret.json")
    with pytest.raises(RunError, match="leads out of the run"):
        records.read(path)


def test_more_than_its_limit_is_not_read(tmp_path: Path) -> None:
    """A manifest of terabytes, which a disk holds in a few bytes."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RunError, match="holds more than 67,108,864 bytes"):
        records.load(tmp_path / "sparse")
    (tmp_path / "small").write_bytes(b"12345")
    assert files.content(tmp_path / "small", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        files.content(tmp_path / "small", 4)


# --- 30: hostile text -------------------------------------------------------------------------------------------------

TEXTS = ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "$\\href{javascript:alert(1)}{x}$",
         "\x1b]8;;http://evil\x07click\x1b[2J", "`rm -rf`|x", "[x](javascript:alert(1))", "x" * 1_000_000]


@pytest.mark.parametrize("text", [*TEXTS, "a\nb | c"], ids=range(len(TEXTS) + 1))
def test_case_30_a_table_shows_hostile_text_as_text(text: str) -> None:
    """A cell from somebody's run that adds an element, a column, a formula or a link to a page that shows the table."""
    tame, wild = (report.Grid("t", ["a", "b"], [[cell, "1"]], "note").markdown() for cell in ("x", text))
    assert len(wild.splitlines()) == len(tame.splitlines())
    (row,) = (line for line in wild.splitlines() if line.endswith("| 1 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert not re.search(r"(?<!\\)[<$`]|\]\(", row)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_case_30_a_terminal_and_an_error_stay_in_hand(text: str) -> None:
    """A message that drives the terminal, or is so long that nothing else can be seen."""
    shown = terminal.printable(str(HybridlabError(text, text, text)))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert len(shown) < 20_000


def test_case_30_a_setting_of_a_megabyte_is_refused_in_a_line() -> None:
    """The whole of a hostile value repeated in the error that refuses it."""
    for field in ("arm", "policy", "device", "capture"):
        with pytest.raises(ConfigError) as caught:
            hl.Runtime("tiny", **{field: "x" * 1_000_000})
        assert len(str(caught.value)) < 5_000


def test_case_30_jupyterlab_is_told_to_run_no_command_for_a_page(tmp_path: Path) -> None:
    """A button in an untrusted table that runs a command of JupyterLab, which its default allows."""
    utils, commands = (pytest.importorskip(name, reason="the extra lab is not installed")
                       for name in ("jupyterlab_server.settings_utils", "jupyterlab.commands"))
    (option,) = re.findall(r'--LabApp\.app_settings_dir="\$\(CURDIR\)/(\S+)"', (ROOT / "Makefile").read_text())
    schemas, plugin = str(Path(commands.get_app_dir()) / "schemas"), "@jupyterlab/apputils-extension:sanitizer"

    def default(folder: Path) -> object:
        found, _ = utils.get_settings(str(folder), schemas, str(tmp_path), schema_name=plugin)
        return found["schema"]["properties"]["allowCommandLinker"]["default"]

    assert default(ROOT / option) is False
    assert default(tmp_path) is True, "without the file it is JupyterLab that decides"


def test_case_29_rows_of_two_machines_make_no_table() -> None:
    """Rows of another GPU or another PyTorch, which come in another run, pooled into one median."""
    rows = pd.DataFrame([ROW | {"run_id": run} for run in ("h200", "cpu") for _ in range(9)])
    with pytest.raises(HybridlabError, match="2 runs"):
        hl.stats.summary(rows, arms=("eager",))
