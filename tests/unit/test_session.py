"""The process behind the Explorer: what it says arrives, what ends it leaves nothing, and bad input starts none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hybridlab import live, models, session
from hybridlab.errors import ConfigError, ModelError, PlanError, PromptError
from hybridlab.session import Session, checked
from tests.helpers import alive, wait_for

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"model": "tiny", "device": "cpu", "arms": ["eager", "graph"], "repeats": 3, "new_tokens": 8}
ROW = '["row", "eager", 0, 0, {index}, 9, 5, 1.5, "eager", "because"]'
SAYS = "import sys\nsys.stdin.readline()\n"
FOREVER = """
import subprocess, time
subprocess.Popen(["sleep", "60"])
print('["progress", "on", 0, 1]', flush=True)
time.sleep(60)
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Session]:
    """A session whose process runs the given program instead."""
    def start(program: str) -> Session:
        monkeypatch.setattr(session, "COMMAND", (sys.executable, "-c", SAYS + program))
        return Session(checked(SETTINGS))

    return start


@pytest.fixture(scope="module")
def ran() -> Session:
    """One real run, small; the second of its three rounds is held."""
    made = Session(checked(SETTINGS, prompt="The for statement", length=12, floor=False, held=(1,)))
    assert made.wait(240)
    assert made.failure == ""
    return made


def test_every_token_arrives_with_its_path_and_reason(ran: Session) -> None:
    """A page that shows tokens of which it does not know what made them."""
    rows = ran.rows
    assert len(rows) == ran.total == 2 * 3 * 8
    assert {(row.arm, row.path) for row in rows if row.index} == {("eager", "eager"), ("graph", "graph")}
    assert all(row.reason for row in rows)
    assert [row.index for row in rows] == list(range(8)) * 6
    assert {row.position - row.index for row in rows} == {12}
    assert sorted({row.request for row in rows}) == list(range(6))
    assert ran.machine.startswith("cpu")


def test_the_arms_draw_the_same_tokens_and_their_text_is_known(ran: Session) -> None:
    """Text that is decoded between two tokens would be timed with them, or not be there while a request is answered."""
    by_arm = {arm: [row.id for row in ran.rows if row.arm == arm][:8] for arm in ("eager", "graph")}
    assert by_arm["eager"] == by_arm["graph"]
    tokenizer = models.load("tiny").tokenizer
    assert "".join(ran.text(row) or "" for row in ran.rows[:8]) == tokenizer.decode(by_arm["eager"])


def test_rows_are_those_that_statistics_ask_for(ran: Session) -> None:
    """First tokens among the gaps would move every quantile."""
    frame = ran.frame()
    assert frame["metric"].value_counts().to_dict() == {"itl": 42, "ttft": 6}
    assert set(frame.loc[frame["metric"] == "ttft", "index"]) == {0}
    assert set(frame["prompt_tokens"]) == {12}


def test_its_process_is_gone_at_the_end(ran: Session) -> None:
    """A process of each run that stays holds a model in memory, on a GPU above all."""
    assert not psutil.pid_exists(ran.pid)


@pytest.mark.parametrize(("text", "length", "ends"), [("The for statement", 30, True), ("The for statement", 2, False),
                                                      ("The for statement", 0, True), ("", 20, False)])
def test_a_prompt_is_cut_or_padded_in_front(text: str, length: int, ends: bool) -> None:
    """Padding behind the text would make the model continue the padding."""
    model = models.load("tiny", device="cpu")
    typed = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = live.prompt_ids(model, text, length, seed=0)
    begin = model.tokenizer.bos_token_id
    assert len(ids) == (length or len(typed) + (begin is not None))
    if begin is not None:
        assert ids[0] == begin
    if ends:
        assert ids[-len(typed):] == typed


def test_a_prompt_that_cannot_be_made_is_refused() -> None:
    """Text would be dropped without a word where there is no tokenizer."""
    model = models.load("random:tiny-llama-2", device="cpu")
    with pytest.raises(PromptError, match="no tokenizer"):
        live.prompt_ids(model, "text", 8, seed=0)
    model.config.bos_token_id = None
    with pytest.raises(PromptError, match="empty"):
        live.prompt_ids(model, "", 0, seed=0)


def test_pieces_hold_back_a_character_that_is_not_whole() -> None:
    """Half of a character is shown as a replacement, and stays in the text for ever."""
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    assert live.pieces(Bytes(), list("aé!".encode())) == ["a", "", "é", "!"]


@pytest.mark.parametrize(("change", "asked", "error"), [
    ({"arms": []}, {}, ConfigError), ({"policy": "hole"}, {}, ConfigError), ({"repeats": 0}, {}, ConfigError),
    ({"model": "tinny"}, {}, ModelError), ({}, {"length": 2000}, PromptError), ({}, {"length": -1}, ConfigError),
    ({"temperature": float("nan")}, {}, ConfigError)])
def test_bad_input_starts_no_process(change: dict[str, Any], asked: dict[str, Any], error: type[Exception],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value would be found half a minute later, by a process that has loaded a model for it."""
    with pytest.raises((error, PlanError)):
        checked(SETTINGS | change, **asked)


def test_what_the_process_refuses_is_heard(fake: Callable[[str], Session]) -> None:
    """An error that stays in the other process leaves a page that says "measuring" for ever."""
    made = fake("print('[\"failed\", \"no <b>room</b>\"]')")
    assert made.wait(20)
    assert made.failure == "no <b>room</b>"


@pytest.mark.parametrize(("program", "says"), [
    ("sys.stderr.write('Killed by me')\nsys.exit(7)", "exit code 7 · Killed by me"),
    ("print('no json')", "DecodeError"),
    ("print('[\"row\", 1]')", "ValidationError"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "exit code -9")])
def test_a_process_that_breaks_says_how(program: str, says: str, fake: Callable[[str], Session]) -> None:
    """A process that dies, or writes what nobody understands, must end the run with its reason."""
    made = fake(program)
    assert made.wait(20)
    assert says in made.failure


def test_stop_ends_it_at_once_with_all_that_it_started(fake: Callable[[str], Session]) -> None:
    """A Stop that waits for the current request, or leaves a compiler's workers behind."""
    made = fake(FOREVER)
    wait_for(lambda: made.progress.what == "on")
    family = [psutil.Process(made.pid), *psutil.Process(made.pid).children(recursive=True)]
    assert len(family) == 2
    started = time.monotonic()
    made.stop()
    assert time.monotonic() - started < 5  # FOREVER would not end
    assert (made.stopped, made.failure) == (True, "")
    wait_for(lambda: not any(alive(each.pid) for each in family))
    made.stop()


def test_a_new_run_ends_the_one_before(fake: Callable[[str], Session]) -> None:
    """Two processes that measure at once time each other."""
    first = fake(FOREVER)
    second = fake("print('[\"done\", \"cpu\"]')")
    assert first.over.is_set()
    assert not psutil.pid_exists(first.pid)
    assert second.wait(20)
    assert Session._current is None


def test_it_ends_with_the_kernel() -> None:
    """A restarted kernel has no hand on the process that the one before had started."""
    code = ("import os, sys, time\nfrom hybridlab import session\nfrom hybridlab.session import Session, checked\n"
            "made = Session(checked({'model': 'tiny', 'repeats': 1000}))\nprint(made.pid, flush=True)\n"
            "while made.progress.what.startswith('starting'): time.sleep(0.02)\nos.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    pid = int(done.stdout)
    try:
        wait_for(lambda: not alive(pid), 30)
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_reader_that_sleeps_loses_nothing(fake: Callable[[str], Session]) -> None:
    """A page that is busy must not make the measuring process wait, nor lose what it said."""
    made = fake(f"for index in range(20_000): print('{ROW}'.replace('{{index}}', str(index)))\n"
                "print('[\"done\", \"cpu\"]')")
    assert made.wait(60)
    assert [row.index for row in made.rows] == list(range(20_000))
