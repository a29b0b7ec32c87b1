"""Request streams: the same on every machine, within the context, and files refused line by line."""

from __future__ import annotations

import errno
import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from hybridlab import files, workload
from hybridlab.config import PAPER_LENGTHS
from hybridlab.errors import ConfigError
from hybridlab.workload import Asked


@pytest.mark.parametrize("kind", workload.KINDS)
def test_a_seed_gives_the_same_requests_for_ever(kind: str) -> None:
    """Two machines that serve different requests under one seed cannot be compared."""
    expected = {"grid": "514cce752706", "uniform": "566102ef61f2", "zipf": "fe8bc88e599d", "chat": "2223df5f7ecd"}
    made = workload.make(kind, 300, 4, seed=7, longest=1024)
    assert hashlib.sha256(repr([tuple(asked) for asked in made]).encode()).hexdigest()[:12] == expected[kind]
    assert workload.make(kind, 300, 4, seed=8, longest=1024) != made
    assert workload.make(kind, 30, 4, seed=7, longest=1024) == made[:30]  # a shorter run is the beginning of a longer


@pytest.mark.parametrize("kind", workload.KINDS)
@pytest.mark.parametrize("longest", [5, 40, 300, None])
def test_every_request_fits_the_context(kind: str, longest: int | None) -> None:
    """A prompt that the KV cache cannot hold would end the run in its middle."""
    made = workload.make(kind, 200, 4, seed=1, longest=longest)
    assert len(made) == 200
    assert all(asked.prompt_tokens >= 1 and asked.new_tokens == 4 for asked in made)
    assert longest is None or max(map(sum, made)) <= longest


def test_the_kinds_are_what_they_say() -> None:
    """A Zipf stream that is uniform, or a grid without one of its lengths, would answer another question."""
    grid = [asked.prompt_tokens for asked in workload.make("grid", 40, 1, seed=3)]
    assert all(sorted(grid[i:i + 10]) == sorted(PAPER_LENGTHS) for i in range(0, 40, 10))
    assert grid[:10] != grid[10:20]
    uniform = Counter(asked.prompt_tokens for asked in workload.make("uniform", 5000, 1, seed=3))
    assert (min(uniform), max(uniform)) == (1, 500)
    assert max(uniform.values()) < 30
    zipf = Counter(asked.prompt_tokens for asked in workload.make("zipf", 5000, 1, seed=3))
    shares = [count / 5000 for _, count in zipf.most_common(10)]
    assert shares[0] == pytest.approx(1 / 6.79, abs=0.02)
    assert sum(shares) == pytest.approx(0.43, abs=0.03)
    assert zipf.most_common(1) != Counter(a.prompt_tokens for a in workload.make("zipf", 5000, 1, 4)).most_common(1)
    chat = [asked.prompt_tokens for asked in workload.make("chat", 500, 1, seed=3)]
    grown = [after - before for before, after in pairwise(chat) if after > before]
    assert len(grown) > 300
    assert min(chat) < 20
    assert max(chat) > 500


@pytest.mark.parametrize(("arguments", "message"), [
    (("zpif", 3, 1, 0), "did you mean 'zipf'"), (("zipf", 0, 1, 0), "0 requests"), (("zipf", 3, 0, 0), "0 new tokens"),
    (("zipf", 3, 8, 0, 8), "may hold 8 tokens"), (("nofile.csv", 3, 8, 0), "cannot be read"),
])
def test_what_cannot_be_made_is_refused(arguments: tuple, message: str) -> None:
    """A misspelt trace must be named before a model is loaded for it."""
    with pytest.raises(ConfigError, match=message):
        workload.load(*arguments)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    """A stream that changes on its way through a file is not the one that was measured."""
    requests = [*workload.make("chat", 50, 3, seed=0), Asked(1, 1), Asked(100, 7)]
    workload.write(tmp_path / "a.csv", requests)
    assert workload.read(tmp_path / "a.csv") == requests
    assert workload.load(str(tmp_path / "a.csv"), 20, 99, 99) == requests[:20]
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf prompt_tokens , new_tokens\r\n 10, 2\r\n\r\n20,3\r\n")
    assert workload.read(tmp_path / "b.csv") == [Asked(10, 2), Asked(20, 3)]
    with pytest.raises(ConfigError, match="cannot be written"):
        workload.write(tmp_path / "none" / "a.csv", requests)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_requests_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         call: str) -> None:
    """A recorded stream lost to the one that was to replace it, and advice that does not help."""
    path = tmp_path / "a.csv"
    workload.write(path, [Asked(10, 2)])
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(ConfigError, match=r"No space left on device .* make room"):
        workload.write(path, [Asked(20, 3)])
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("lines", "message"), [
    ([], "line 1"), (["prompt,new", "1,1"], "line 1"), (["prompt_tokens,new_tokens"], "holds no request"),
    (["H", "1,1", "1"], "line 3"), (["H", "1,1,1"], "line 2"), (["H", "0,1"], "line 2"), (["H", "1,0"], "line 2"),
    (["H", "-1,1"], "line 2"), (["H", "1.5,1"], "line 2"), (["H", "x,1"], "line 2"), (["H", "1e3,1"], "line 2"),
    (["H", "٣,1"], "line 2"), (["H", "", "nan,1"], "line 3"), (["H", "99999999999,1"], "line 2"),
    (["H", "63,1", "63,2"], "line 3 .* asks for 63 . 2 tokens"),
])
def test_a_bad_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    """A mistake in line 900 of a file must not show after an hour of serving, nor without its number."""
    path = tmp_path / "a.csv"
    path.write_text("\n".join(line.replace("H", "prompt_tokens,new_tokens") for line in lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        workload.read(path, longest=64)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Bytes from elsewhere must give a sentence, not a traceback."""
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        workload.read(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        workload.read(tmp_path)
