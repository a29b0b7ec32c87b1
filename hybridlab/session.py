"""A process that measures while this one only looks on: what it is asked, what it says, how it is started and stopped.

The process is `liveprocess`: measuring where a notebook's event loop runs would time that too. Never imports torch.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec
import pandas as pd

from hybridlab import children, names
from hybridlab.cells import cells
from hybridlab.config import RunConfig, as_dict, build
from hybridlab.errors import ConfigError

COMMAND = children.module("hybridlab.liveprocess")
LONGEST_S = 3600.0  # of a run that somebody waits for
GONE_S = 10.0  # until a killed process must have been reaped


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured: `config.repeats` requests of `new_tokens` for each arm, in turns, after one prompt.

    `length`: of the prompt, in tokens with BOS; 0: as the text has. `rates`: those of an earlier `Floors`, so that they
    are measured once; `floor`: whether they are wanted. `held`: rounds whose rows are said only when they are over; if
    there are any, each round waits for its reader, see `Ready`.
    """

    config: RunConfig
    prompt: str = ""
    length: int = 0
    floor: bool = True
    rates: dict[str, Any] | None = None
    held: tuple[int, ...] = ()


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """What goes on before the first timed token."""

    what: str
    done: int
    total: int


class Floors(msgspec.Struct, frozen=True, array_like=True, tag="floors"):
    """What this machine reads and multiplies, and the least times that follow, as `roofline.of_run` has them."""

    rates: dict[str, Any]
    floors: list[dict[str, Any]]


class Texts(msgspec.Struct, frozen=True, array_like=True, tag="texts"):
    """The new tokens of an arm's last request, and the text of each, where there is a tokenizer."""

    arm: str
    ids: list[int]
    pieces: list[str]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """This round begins when the process is told a line: its reader has nothing left to do with earlier rows then."""

    round: int


class Row(msgspec.Struct, frozen=True, array_like=True, tag="row"):
    """One new token, timed as a `Token` is; whether a profiler listened in the process that measures."""

    arm: str
    round: int
    request: int
    index: int
    position: int
    id: int
    ms: float
    path: str
    reason: str
    profiled: bool = False


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """Why nothing more comes."""

    reason: str


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """Every request was answered; on which machine."""

    machine: str


Said = Progress | Floors | Texts | Ready | Row | Failed | Done
COLUMNS = ["run_id", "metric", "prompt_tokens", *Row.__struct_fields__]


def checked(settings: dict[str, Any], **asked: Any) -> Asked:
    """An `Asked` from plain settings of a `RunConfig`. Raises `ConfigError`, `ModelError` or `PromptError`."""
    length = asked.get("length", 0)
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ConfigError(f"length is {length!r}", "it counts the tokens of a prompt", "give 0 for the text as it is")
    config = build(RunConfig, {**settings, "lengths": [max(length, 1)]})
    names.require_fit(config, names.context(config.model))
    cells(config)  # refuses a policy that is none
    return Asked(config=config, **asked)


class Session:
    """One run of the process. A thread of this one takes what it says, so that it never waits for a reader.

    `rows`, `texts`, `floors`, `progress` and `failure` are what it said so far; `over` is set when nothing more comes.
    Starting one stops the one before: two would time each other. The process ends with this one, however that ends.

    `followed`: someone looks on, and calls `attended` whenever `called` says so. Otherwise no round waits for anyone.
    """

    _current: ClassVar[Session | None] = None
    _starting: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, asked: Asked, *, followed: bool = False) -> None:
        self.asked = asked
        self.rows: list[Row] = []
        self.texts: dict[str, Texts] = {}
        self.floors: Floors | None = None
        self.progress = Progress("starting a process", 0, 1)
        self.machine = self.failure = ""
        self.stopped = False
        self.over = threading.Event()
        self._followed, self._called = followed, threading.Event()
        with Session._starting:
            if Session._current is not None:
                Session._current.stop()
            Session._current = self
            self._child = children.Child(COMMAND, stdout=subprocess.PIPE)
            self._reader = threading.Thread(target=self._read, name="hybridlab-session", daemon=True)
            self._reader.start()

    @property
    def total(self) -> int:
        """Tokens that a whole run says."""
        config = self.asked.config
        return config.repeats * len(cells(config)) * config.new_tokens

    @property
    def pid(self) -> int:
        return self._child.pid

    def frame(self, rows: Iterable[Row] | None = None, run_id: str = "live") -> pd.DataFrame:
        """The rows with the columns that statistics and figures ask for, first tokens as "ttft", gaps as "itl"."""
        found = list(self.rows if rows is None else rows)
        return pd.DataFrame(
            [(run_id, "itl" if row.index else "ttft", row.position - row.index,
              *(getattr(row, name) for name in Row.__struct_fields__)) for row in found], columns=COLUMNS)

    @staticmethod
    def nothing() -> pd.DataFrame:
        """The frame of a run without rows."""
        return pd.DataFrame(columns=COLUMNS).astype({"ms": float, "index": int, "position": int})

    def floor_table(self) -> pd.DataFrame | None:
        """The floors as `roofline.floors` has them; None before they are known."""
        if self.floors is None:
            return None
        return pd.DataFrame(self.floors.floors).astype({"position": "Int64"})

    def text(self, row: Row) -> str | None:
        """What the token adds to the text; None where that is not known."""
        known = self.texts.get(row.arm)
        there = known is not None and row.index < len(known.pieces) and known.ids[row.index] == row.id
        return known.pieces[row.index] if known is not None and there else None

    def stop(self) -> None:
        """End the process and all that it started, at once; returns when it is gone. What was said is kept."""
        if not self.over.is_set():
            self.stopped = True
            if self._child.running():
                self._child.kill()
            self.over.wait(GONE_S)

    def wait(self, timeout_s: float = LONGEST_S) -> bool:
        """Whether the run is over, `timeout_s` from now at the latest."""
        return self.over.wait(timeout_s)

    def called(self, timeout_s: float) -> bool:
        """Whether the process waits for `attended`, or the run is over, `timeout_s` from now at the latest."""
        return self._called.wait(timeout_s)

    def attended(self) -> None:
        """All that was said so far is dealt with: the round that waits may begin."""
        self._called.clear()
        self._child.tell(b"")

    def _read(self) -> None:
        decoder = msgspec.json.Decoder(Said)
        try:
            with self._child:
                asked = {**msgspec.to_builtins(self.asked), "config": as_dict(self.asked.config)}
                self._child.tell(msgspec.json.encode(asked))
                for line in self._child.stdout:
                    self._take(decoder.decode(line))
                self._child.end(GONE_S)
                self._verdict()
        except Exception as error:  # the page must hear of it, and nothing else listens to this thread
            self.failure = self.failure or f"{type(error).__name__}: {error}"
        finally:
            self.over.set()
            self._called.set()
            with Session._starting:
                if Session._current is self:
                    Session._current = None

    def _take(self, said: Said) -> None:
        match said:
            case Row():
                self.rows.append(said)
            case Texts():
                self.texts[said.arm] = said
            case Ready():
                self._called.set()
                if not self._followed:
                    self.attended()
            case Progress():
                self.progress = said
            case Floors():
                self.floors = said
            case Failed():
                self.failure = said.reason
            case Done():
                self.machine = said.machine

    def _verdict(self) -> None:
        if self.failure or self.machine or self.stopped:
            return
        self.failure = f"the measuring process died with exit code {self._child.code} · {' | '.join(self._child.last)}"
