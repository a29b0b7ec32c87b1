"""A run that is killed at a random moment, two hundred times: nothing that it called finished is lost or doubled."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridlab import records

KILLS = 200
ROUNDS, ROWS = 6, 3
STEPS = 2 + ROUNDS  # the run is created, its rounds, it is finished

# One process that forks a light child for each kill: a fresh interpreter would take a second each time. The child says
# each step once it is over; what it says is in the pipe whatever happens to it.
CHILD = textwrap.dedent("""
    import json, os, sys
    from pathlib import Path
    from hybridlab import records
    from hybridlab.config import RunConfig

    root, rounds, rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    row = json.loads(sys.argv[4])
    records.environment.report = lambda: {"gpu": [], "cpu": "Test CPU", "machine": "cpu-test"}

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    def run(name):
        made = records.Run.create(RunConfig(lengths=(10,), arms=("eager",)), root, run_id=name)
        say("created", name)
        for number in range(rounds):
            made.append([row | {"round": number, "request": i} for i in range(rows)])
            say("round", number)
        made.finish("complete")
        say("finished")

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(line.strip())
                say("over")
            finally:
                os._exit(0)
        say("child", child)
        sys.stdin.readline()  # until then a child that is over is a zombie, so that its number names nobody else
        os.waitpid(child, 0)
        say("ended")
""")
ROW = {"round": 0, "request": 0, "arm": "eager", "policy": "whole", "prompt_tokens": 10, "bucket": None, "index": 0,
       "position": 10, "metric": "ttft", "ms": 1.5, "path": "eager", "reason": "", "captures": 0, "compiles": 0,
       "process": 0, "device_ms": None, "client_ms": None, "ended_ns": 10, "happened": "", "happened_ms": 0.0,
       "profiled": False}


class Forge:
    """The process that makes a child for each name."""

    def __init__(self, root: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if k != records.RUN_VARIABLE}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(root), str(ROUNDS), str(ROWS), json.dumps(ROW)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2])
        self._read = b""

    def run(self, name: str, kill_at: tuple[int, float] | None = None) -> list[str]:
        """Starts a run, kills it after so many steps that it said and so many seconds if asked to; what it said."""
        said: list[str] = []
        self._ask(name)
        steps, seconds = kill_at or (0, 0.0)
        while not any(word.startswith("child") for word in said) or len(said) <= steps:
            said.append(self.line())
        if kill_at is not None:
            select.select([], [], [], seconds)
            os.kill(next(int(word.split()[1]) for word in said if word.startswith("child")), signal.SIGKILL)
        self._ask("reap")
        while said[-1] != "ended":
            said.append(self.line())
        return said

    def _ask(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def line(self, timeout_s: float = 120) -> str:
        while b"\n" not in self._read:
            assert select.select([self.process.stdout], [], [], timeout_s)[0], "the child says nothing"
            more = os.read(self.process.stdout.fileno(), 4096)
            assert more, "the child's parent ended"
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()


@pytest.fixture
def forge(tmp_path: Path) -> Iterator[Forge]:
    made = Forge(tmp_path)
    yield made
    made.process.stdin.close()
    made.process.stdout.close()
    made.process.wait(30)


def finished_rows(said: list[str]) -> list[tuple[int, int]]:
    numbers = [int(word.split()[1]) for word in said if word.startswith("round")]
    return [(number, request) for number in numbers for request in range(ROWS)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_promise_3_no_finished_row_is_lost_or_doubled_in_200_kills(forge: Forge, tmp_path: Path) -> None:
    """A row that was said to be safe and is gone, stands twice, or a run that was killed and says complete."""
    draw, ends, times = random.Random(20), Counter[str](), []
    for number in range(4):  # the first one loads what the others find
        start = time.monotonic()
        assert len(finished_rows(forge.run(f"whole-{number}"))) == ROUNDS * ROWS
        times.append(time.monotonic() - start)
    for kill in range(KILLS):
        # From a step on, not from the start: however busy the machine, most kills hit a run that goes on.
        said = forge.run(f"run-{kill}", (draw.randrange(STEPS), draw.uniform(0, 2 * min(times) / STEPS)))
        path, safe = tmp_path / "cpu-test" / f"run-{kill}", finished_rows(said)
        if not any(word.startswith("created") for word in said):
            ends["before it was there"] += 1
            continue
        found = records.read(path)
        kept = list(zip(found.rows["round"], found.rows["request"], strict=True))
        assert len(set(kept)) == len(kept), said
        assert set(safe) <= set(kept), said
        assert len(kept) - len(safe) in (0, ROWS), "whole rounds only, at most one that nobody was told of"
        assert found.status == "complete" or "finished" not in said
        assert found.status == "incomplete" or len(kept) == ROUNDS * ROWS
        ends["in the middle" if len(safe) < ROUNDS * ROWS else found.status] += 1
    assert ends["in the middle"] > KILLS // 4, f"kills that hit nothing prove nothing: {dict(ends)}"
