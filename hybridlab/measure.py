"""The protocol: which prompts are measured, in which order, what is inside the clock, and when to stop."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab import paths
from hybridlab.config import RunConfig, cells, policy_name
from hybridlab.errors import MeasureError, PromptError

if TYPE_CHECKING:
    from hybridlab.runtime import Runtime

Row = dict[str, Any]


def prompts(model: Any, lengths: Iterable[int], seed: int) -> dict[int, list[int]]:
    """Token ids of exactly each length, BOS first where the model has one; the same for every arm and process.

    With a tokenizer they are cut from data/prompts/*.txt at a seeded start, wrapping around; without one they are
    uniform over the vocabulary, special tokens left out. Raises: PromptError when there is nothing to cut from.
    """
    tokenizer = getattr(model, "tokenizer", None)
    settings = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    begin = getattr(tokenizer, "bos_token_id", None)
    begin = getattr(settings, "bos_token_id", None) if begin is None else begin
    first = [begin] if isinstance(begin, int) else []
    if tokenizer is not None:
        source = np.asarray(tokenizer(_text(), add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    else:
        special = {begin, getattr(settings, "eos_token_id", None), getattr(settings, "pad_token_id", None)}
        source = np.setdiff1d(np.arange(settings.vocab_size), [i for i in special if isinstance(i, int)])
    if not len(source):
        raise PromptError("there are no tokens to make prompts from", f"tokenizer {type(tokenizer).__name__}")
    made = {}
    for length in lengths:
        rng = np.random.default_rng([seed, length])
        rest = length - len(first)
        if tokenizer is not None:
            body = np.take(source, np.arange(rest) + rng.integers(len(source)), mode="wrap")
        else:
            body = rng.choice(source, size=rest)
        made[length] = (first + [int(i) for i in body])[:length]
    return made


def warm_up(runtimes: Mapping[str, Runtime], prompts: Mapping[int, list[int]], config: RunConfig,
            step: Callable[[int], None] = lambda done: None) -> None:
    """Captures and compiles all that the timed rounds need, then serves `config.warmup` rounds that leave no row.

    Every warm-up round has the TTFT requests of a timed one; the first also has the ITL requests, if there are any.
    """
    for runtime in runtimes.values():
        runtime.warm_up(sorted(prompts), temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    with frozen_heap():
        for number in range(config.warmup):
            itl = number == 0 and config.itl_repeats > 0
            for arm, length, metric in _order(runtimes, prompts, config, round_=number, itl=itl):
                _serve(runtimes[arm], prompts[length], metric, config)
            step(number + 1)


def rounds(runtimes: Mapping[str, Runtime], prompts: Mapping[int, list[int]], config: RunConfig, *,
           clock: Callable[[], float] = time.monotonic) -> Iterator[list[Row]]:
    """Yields the rows of one finished round at a time, until `config.repeats` rounds or `config.budget_s` are over.

    A round holds one TTFT request (one new token) for every arm and prompt length and, in the first
    `config.itl_repeats` rounds, one ITL request (`config.new_tokens` tokens). Their order is drawn from the seed, anew
    for each round, over all arms and lengths together, so that drift and disturbances meet every arm alike.

    Inside the clock, which is the runtime's own: token ids on the host, to the first new token id on the host (TTFT),
    and from each new token id on the host to the next (ITL; its first token is left out, that one is a TTFT).
    Outside: tokenising, decoding to text, garbage collection (done before each request and off during it), and
    writing rows. The end token does not end a request, so all arms generate equally many tokens.

    The budget is looked at between rounds only: the round in which it runs out is finished, and one is always made.
    Rows are those of `schemas.ABLATION` without `run_id`. Captures and compilations that happened during the request
    are counted in each of its rows; a valid timed region has none.
    """
    started, request, named = clock(), 0, cells(config)
    with frozen_heap():
        for number in range(config.repeats):
            if number and clock() - started >= config.budget_s:
                return
            rows: list[Row] = []
            order = _order(runtimes, prompts, config, round_=config.warmup + number, itl=number < config.itl_repeats)
            for arm, length, metric in order:
                served = _serve(runtimes[arm], prompts[length], metric, config)
                common = {"round": number, "request": request, "arm": arm, "policy": policy_name(named[arm].policy),
                          "prompt_tokens": length}
                rows += [common | row for row in served]
                request += 1
            yield rows


def _order(runtimes: Mapping[str, Runtime], prompts: Mapping[int, list[int]], config: RunConfig, *, round_: int,
           itl: bool) -> list[tuple[str, int, str]]:
    metrics = ("ttft", "itl") if itl else ("ttft",)
    requests = [(arm, length, metric) for metric in metrics for length in prompts for arm in runtimes]
    shuffled = np.random.default_rng([config.seed, round_]).permutation(len(requests))
    return [requests[i] for i in shuffled]


def _serve(runtime: Runtime, ids: list[int], metric: str, config: RunConfig) -> list[Row]:
    count = 1 if metric == "ttft" else config.new_tokens
    before = runtime.counters.as_dict()
    with quiet_collector():
        out = runtime.generate(ids, max_new_tokens=count, temperature=config.temperature, top_k=config.top_k,
                               top_p=config.top_p, seed=config.seed, stop=[])
    after = runtime.counters.as_dict()
    if not len(out.ids) == len(out.paths) == len(out.reasons) == len(out.itl_ms) + 1 == count:
        raise MeasureError(f"{count} tokens were asked for, the runtime answered with {len(out.ids)}",
                           f"{len(out.itl_ms)} gaps, {len(out.paths)} paths, {len(out.reasons)} reasons",
                           "a request that ends early cannot be compared; report this as a fault of the runtime")
    common = {"bucket": out.bucket, "metric": metric}
    common |= {name: int(after.get(name, 0) - before.get(name, 0)) for name in ("captures", "compiles")}
    timed = [(0, out.ttft_ms)] if metric == "ttft" else list(enumerate(out.itl_ms, start=1))
    return [common | {"index": index, "position": len(ids) + index, "ms": float(ms), "path": out.paths[index],
                      "reason": out.reasons[index] or ""} for index, ms in timed]


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Collects now and not during the block; leaves the collector as it was."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Takes what is alive out of the collector's sight: a collection before each request then costs microseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _text() -> str:
    folder = paths.data_dir() / "prompts"
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt")))
    if not text:
        raise PromptError("no prompt text was found", "data/prompts holds no .txt file",
                          "restore data/prompts from the repository")
    return text
