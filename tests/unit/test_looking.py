"""Whether looking on disturbs: rounds that are left alone must be, and a reader that never says so ends the run."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from hybridlab import explorer as page
from hybridlab import live, looking, session
from hybridlab.errors import MeasureError
from hybridlab.explorer import Explorer
from hybridlab.session import Ready, Session

SLOW_S = 0.15  # of a paint; a round lasts four times as long at least
# A process whose rounds are real but for their tokens; each token's reason says when it was made.
PROGRAM = """
import threading, time
from types import SimpleNamespace
from hybridlab import live, liveprocess
from hybridlab.session import Done

class Arm:
    counters = SimpleNamespace(as_dict=lambda: {"captures": 0, "compiles": 0})

    def stream(self, ids, max_new_tokens, **asked):
        begun = time.monotonic()
        for index in range(max_new_tokens):
            threading.Event().wait(0.05)
            yield SimpleNamespace(id=index, ms=1.0, path="eager", reason=f"{begun} {time.monotonic()}")

def serve(asked, tell, told):
    arms = {arm: Arm() for arm in asked.config.arms}
    live._measure(arms, [1, 2, 3], asked.config, frozenset(asked.held), tell, told)
    tell(Done("cpu"))

live.serve = serve
liveprocess.main()
"""


def test_no_paint_lies_in_a_held_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A paint that is late still runs when the round begins that is to be compared with it, and the ratio is 1."""
    monkeypatch.setattr(session, "COMMAND", (sys.executable, "-c", PROGRAM))
    explorer = Explorer({"model": "tiny", "device": "cpu", "arms": ["eager"], "repeats": 4, "new_tokens": 16})
    paints = list[tuple[float, float]]()

    def paint(session: Session | None) -> None:
        began = time.monotonic()
        threading.Event().wait(SLOW_S)
        paints.append((began, time.monotonic()))

    monkeypatch.setattr(explorer, "_paint", paint)
    monkeypatch.setattr(page, "SETTLE_S", 0.0)
    rows, held = looking.watched(explorer)
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number, own in rows.groupby("round"):
        times = [float(word) for reason in own["reason"] for word in reason.split()]
        spans[number in held].append((min(times), max(times)))
    within = {kind: sum(start < until and end > begin for begin, until in each for start, end in paints)
              for kind, each in spans.items()}
    assert len(spans[True]) == len(spans[False]) == 2
    assert within[True] == 0
    assert within[False] >= 1
    explorer.close()


def test_a_reader_that_never_attends_ends_the_run() -> None:
    """A page that hangs must not leave a process that waits for it for ever."""
    said = list[object]()
    with pytest.raises(MeasureError, match="round 3 waits for its reader"):
        live._attended(3, said.append, lambda within_s: within_s != live.ATTENDED_S)
    assert said == [Ready(3)]
