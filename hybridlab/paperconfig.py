"""Settings of a reproduction of the paper, as frozen data."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from hybridlab.config import PAPER_LENGTHS, Positive

PaperPart = Literal["ttft", "cached", "recomputed", "capture", "overlap", "memory", "cost", "protocol",
                    "ipc"]
PAPER_PARTS: tuple[PaperPart, ...] = get_args(PaperPart)


class PaperConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One reproduction of the paper: its tables, its ablations, what graphs cost, and its protocol beside ours.
    Notebook 10's parameters are fields of this class."""

    model: str = "tiny"
    parts: Annotated[tuple[PaperPart, ...], Meta(min_length=1)] = PAPER_PARTS
    device: str = "auto"
    dtype: str | None = None
    lengths: Annotated[tuple[Positive, ...], Meta(min_length=1)] = PAPER_LENGTHS  # of prompts, in tokens with BOS
    generations: Annotated[tuple[Annotated[int, Meta(ge=2)], ...], Meta(min_length=1)] = PAPER_LENGTHS  # new tokens
    buckets: Literal["exact"] | tuple[Positive, ...] | None = None  # prompt lengths to capture, as of RuntimeConfig
    repeats: Positive = 30                              # rounds of first tokens
    gaps: Positive = 660  # between tokens, for each generation length and arm; a p99 of six requests needs so many
    warmup: Annotated[int, Meta(ge=1)] = 20             # untimed rounds before the first timed one
    trace_requests: Positive = 100                      # of the stream of prompts that captures are made under
    passes: Positive = 3                                # of that stream under each capture policy, from a cold cache
    cost_lengths: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (16, 128)  # whose graphs are timed and weighed
    cost_repeats: Positive = 6                          # captures of each of them
    calls: Positive = 100                               # repeated calls of each length, under the published protocol
    budget_s: Annotated[float, Meta(gt=0)] = 120.0      # for each part: no round of it starts later than this
    temperature: Annotated[float, Meta(ge=0.0)] = 1.0   # of the draws, the same for all; they are part of a step
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    threads: Positive = 1
