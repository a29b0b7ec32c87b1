"""Streams of requests as lengths: seeded and the same on every machine, or read from a file."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

from hybridlab.config import PAPER_LENGTHS
from hybridlab.errors import ConfigError, choose
from hybridlab.files import atomic_write, content

KINDS = ("grid", "uniform", "zipf", "chat")
HEADER = ("prompt_tokens", "new_tokens")
FILE = ".csv"
LIMIT_BYTES = 2**26
LONGEST = 500          # tokens: uniform and zipf draw prompts of 1 to this, the range of the paper's lengths

# Of a conversation. These are ours, chosen to be plausible, and were not measured on any service.
TURNS = (1, 8)         # requests of one conversation
ASKED = (5, 60)        # tokens that a person adds in each
ANSWERED = (20, 120)   # tokens of an answer, which the next request carries as context


class Asked(NamedTuple):
    """One request: its prompt's length and how many tokens it wants, both in tokens."""

    prompt_tokens: int
    new_tokens: int


def load(trace: str | Path, count: int, new_tokens: int, seed: int, longest: int | None = None) -> list[Asked]:
    """The requests of a kind (see `make`), or those of a file (see `read`), at most `count` of them.

    `longest` is how many tokens a request may hold, prompt and new ones together; None: no limit.
    Raises: ConfigError for a name that is neither, and for whatever `make` or `read` refuses.
    """
    require_known(trace)
    if str(trace) in KINDS:
        return make(str(trace), count, new_tokens, seed, longest)
    return read(trace, longest)[:count]


def require_known(trace: str | Path) -> None:
    """Raises ConfigError unless `trace` is a kind or names a .csv file; the file is not looked at."""
    if not str(trace).endswith(FILE):
        choose("trace", str(trace), (*KINDS, f"file{FILE}"))


def make(kind: str, count: int, new_tokens: int, seed: int, longest: int | None = None) -> list[Asked]:
    """`count` requests for `new_tokens` tokens each; prompts are clipped so that both fit into `longest` tokens.

    "grid": the paper's ten lengths, each once in every ten, in random order. "uniform": 1 to 500 alike. "zipf": 1 to
    500 in an order drawn from the seed, the r-th taken with probability proportional to 1 / r: the commonest length
    makes a seventh of the requests, the ten commonest two fifths. "chat": conversations of 1 to 8 requests, each the
    context so far and 5 to 60 tokens more, with answers of 20 to 120 tokens between; one that no longer fits has ended.

    Only `Random.random`, whose stream Python promises to keep, and exactly rounded arithmetic are used, so a seed
    gives the same requests on every machine. Raises: ConfigError.
    """
    choose("trace", kind, KINDS)
    if count < 1 or new_tokens < 1 or (longest is not None and longest <= new_tokens):
        raise ConfigError(f"{count} requests for {new_tokens} new tokens cannot be made",
                          f"a request may hold {longest or 'any number of'} tokens, one of them a prompt's",
                          "give 1 or more requests, and fewer new tokens than the context")
    room = longest - new_tokens if longest is not None else None
    draw = Random(seed)
    source = {"grid": _grid, "uniform": _uniform, "zipf": _zipf}.get(kind)
    lengths = _chat(draw, room) if source is None else source(draw)
    return [Asked(length if room is None else min(length, room), new_tokens) for length in islice(lengths, count)]


def _grid(draw: Random) -> Iterator[int]:
    while True:
        yield from _shuffled(PAPER_LENGTHS, draw)


def _uniform(draw: Random) -> Iterator[int]:
    while True:
        yield _between(1, LONGEST, draw)


def _zipf(draw: Random) -> Iterator[int]:
    order = _shuffled(range(1, LONGEST + 1), draw)
    sums = list(accumulate(1 / rank for rank in range(1, LONGEST + 1)))
    while True:
        wanted = draw.random() * sums[-1]
        yield order[next(rank for rank, total in enumerate(sums) if wanted < total or rank == LONGEST - 1)]


def _chat(draw: Random, room: int | None) -> Iterator[int]:
    while True:
        context = 0
        for turn in range(_between(*TURNS, draw)):
            context += _between(*ASKED, draw)
            if turn and room is not None and context > room:
                break
            yield context
            context += _between(*ANSWERED, draw)


def _between(low: int, high: int, draw: Random) -> int:
    return low + int(draw.random() * (high - low + 1))


def _shuffled(values: Iterable[int], draw: Random) -> list[int]:
    left = list(values)
    for last in range(len(left) - 1, 0, -1):
        other = _between(0, last, draw)
        left[last], left[other] = left[other], left[last]
    return left


def read(path: str | Path, longest: int | None = None) -> list[Asked]:
    """The requests of a CSV file with the header `prompt_tokens,new_tokens` and one request a line, in its order.

    Raises: ConfigError naming the first line that is no request, or holds more than `longest` tokens in all.
    """
    try:
        lines = content(path, LIMIT_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {str(path)!r} cannot be read", f"{type(error).__name__}: {error}"[:200],
                          f"give one of {', '.join(KINDS)}, or a CSV file with the header {','.join(HEADER)}") from None
    if not lines or tuple(part.strip() for part in lines[0].split(",")) != HEADER:
        raise ConfigError(f"line 1 of {path} is {(lines[0] if lines else '')[:80]!r}", "it names the columns",
                          f"write {','.join(HEADER)}")
    requests = [_request(line, number, path, longest) for number, line in enumerate(lines[1:], 2) if line.strip()]
    if not requests:
        raise ConfigError(f"{path} holds no request", "only a header", "write one request a line, like 100,4")
    return requests


def _request(line: str, number: int, path: str | Path, longest: int | None) -> Asked:
    parts = [part.strip() for part in line.split(",")]
    good = len(parts) == len(HEADER) and all(p.isascii() and p.isdigit() and len(p) < 10 and int(p) for p in parts)
    if not good:
        raise ConfigError(f"line {number} of {path} is {line[:80]!r}",
                          "it must hold two whole numbers of 1 or more, prompt tokens and new tokens", "as in 100,4")
    asked = Asked(int(parts[0]), int(parts[1]))
    if longest is not None and sum(asked) > longest:
        raise ConfigError(f"line {number} of {path} asks for {asked.prompt_tokens} + {asked.new_tokens} tokens",
                          f"the model's context holds {longest}", "shorten the request, or choose another model")
    return asked


def write(path: str | Path, requests: Iterable[Asked]) -> None:
    """Writes requests so that `read` gives them back; replaces the file in one step, or leaves it as it was and raises
    ConfigError."""
    lines = [",".join(map(str, fields)) for fields in (HEADER, *requests)]
    try:
        atomic_write(Path(path), "\n".join(lines) + "\n")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ConfigError(f"requests cannot be written to {str(path)!r}", str(error), "make room on the disk" if full
                          else "give a file in a directory that exists and that you may write to") from None
