"""Requests of each arm in turns, each token said as it comes: what the process that a `Session` starts does.

Between two tokens it writes one line to a pipe and nothing else: text is made before the first timed request, garbage
is collected before each one, and who reads the lines is another process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np

from hybridlab import environment, experiment, measure, models, names, ranges, roofline
from hybridlab.cells import cells, require_steps
from hybridlab.config import RunConfig
from hybridlab.errors import MeasureError, PromptError, RunError
from hybridlab.runtime import Runtime
from hybridlab.session import Asked, Done, Floors, Progress, Ready, Row, Said, Texts

WARMUP = 5         # rounds before the first timed one
ATTENDED_S = 60.0  # until the reader must have dealt with all rows so far

Tell = Callable[[Said], Any]
Told = Callable[[float], bool]  # whether the reader said something, so many seconds from now at the latest


def serve(asked: Asked, tell: Tell, told: Told) -> None:
    """Load, warm up, measure and `tell` of all of it. Raises what goes wrong, as `experiment.run` does, and
    `MeasureError` for a reader that does not follow."""
    config = asked.config
    tell(Progress(f"loading {config.model}", 0, 1))
    require_steps(config, on_cpu=models.resolve_device(config.device).type == "cpu")
    model = models.load(config.model, device=config.device, dtype=config.dtype)
    ids = prompt_ids(model, asked.prompt, asked.length, config.seed)
    config = msgspec.structs.replace(config, lengths=(len(ids),), warmup=WARMUP, itl_repeats=1)
    names.require_fit(config, models.context(model))
    tokenizer, model.tokenizer = model.tokenizer, None  # so that a runtime decodes nothing
    with ExitStack() as stack:
        stack.enter_context(experiment.threads(config.threads, on_cpu=model.device.type == "cpu"))
        if asked.floor:
            tell(_floors(model, config, asked.rates, tell))
        runtimes = _built(model, config, stack, tell)
        tell(Progress("warming up", 0, WARMUP))
        measure.warm_up(runtimes, {len(ids): ids}, config, lambda done: tell(Progress("warming up", done, WARMUP)))
        _say_texts(runtimes, ids, config, tokenizer, tell)
        for runtime in runtimes.values():
            stack.enter_context(runtime.sealed())
        _measure(runtimes, ids, config, frozenset(asked.held), tell, told)
    found = environment.report()
    tell(Done(environment.slug(None if model.device.type == "cpu" else found.get("gpu"), found.get("cpu"))))


def prompt_ids(model: Any, text: str, length: int, seed: int) -> list[int]:
    """Token ids of `text`, `length` of them (0: as many as it has): where it is short, after text of the measured
    prompts; where it is long, its end. BOS first where the model has one.

    Raises `PromptError` for text without a tokenizer, and for nothing at all.
    """
    if text and model.tokenizer is None:
        raise PromptError("the prompt is text and the model has no tokenizer", model.name_or_path,
                          "leave the prompt empty: tokens are drawn then")
    typed = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    (first, *_), *_ = measure.prompts(model, [1], seed).values()
    begin = [first] if first == _begin(model) else []
    length = length or len(begin) + len(typed)
    if not length:
        raise PromptError("the prompt is empty", "and its length is 0", "type some text, or give a length")
    kept = typed[-(length - len(begin)):] if length > len(begin) else []
    return measure.prompts(model, [length], seed)[length][:length - len(kept)] + kept


def _begin(model: Any) -> int | None:
    begin = getattr(model.tokenizer, "bos_token_id", None)
    return model.config.get_text_config().bos_token_id if begin is None else begin


def _floors(model: Any, config: RunConfig, rates: dict[str, Any] | None, tell: Tell) -> Floors:
    if rates is None:
        tell(Progress("measuring what this machine reads and multiplies", 0, 1))
        rates = roofline.measure(model.device, model.dtype, roofline.work(model, context=1).bytes)
    return Floors(rates, roofline.of_run(model, config.lengths, config.new_tokens, rates)["floors"])


def _built(model: Any, config: RunConfig, stack: ExitStack, tell: Tell) -> dict[str, Runtime]:
    found, wanted = dict[str, Runtime](), cells(config)
    rows = -(-(config.lengths[0] + config.new_tokens) // 64) * 64
    for done, (name, cell) in enumerate(wanted.items()):
        tell(Progress(f"building {name}", done, len(wanted)))
        found[name] = stack.enter_context(Runtime(
            model, arm=cell.arm, policy=cell.policy, kernels=cell.kernels, steps=cell.steps, device=config.device,
            capture="sync", max_len=min(rows, models.context(model) or rows), run_ahead=config.run_ahead))
    return found


def _say_texts(runtimes: dict[str, Runtime], ids: list[int], config: RunConfig, tokenizer: Any, tell: Tell) -> None:
    """Each arm's tokens and their text, from a request that is not timed: every later one draws the same tokens."""
    for arm, runtime in runtimes.items():
        new = [token.id for token in _stream(runtime, ids, config)]
        tell(Texts(arm, new, [] if tokenizer is None else pieces(tokenizer, new)))


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds; a character that spans several tokens is the last one's."""
    found, shown = list[str](), ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        whole = text.rstrip("\ufffd") if count < len(ids) else text
        found.append(whole[len(shown):])
        shown = max(shown, whole, key=len)
    return found


def _measure(runtimes: dict[str, Runtime], ids: list[int], config: RunConfig, held: frozenset[int], tell: Tell,
             told: Told) -> None:
    """Every arm once a round, in an order drawn from the seed. Where rounds are held, all of them wait for the reader:
    what it still did with earlier rows would disturb a round that is to be left alone, and that one only."""
    request, arms = itertools.count(), list(runtimes)
    with measure.frozen_heap():
        for number in range(config.repeats):
            kept, say = list[Said](), tell
            if held:
                _attended(number, tell, told)
            if number in held:
                say = kept.append
            for which in np.random.default_rng([config.seed, number]).permutation(len(arms)):
                _request(arms[which], runtimes[arms[which]], ids, config, (number, next(request)), say)
            for said in kept:
                tell(said)


def _attended(number: int, tell: Tell, told: Told) -> None:
    tell(Ready(number))
    if not told(ATTENDED_S):
        raise MeasureError(f"round {number} waits for its reader", f"{ATTENDED_S:g} s without a word",
                           "what follows the run hangs, or paints too slowly; run it again with fewer tokens")


def _request(arm: str, runtime: Runtime, ids: list[int], config: RunConfig, numbers: tuple[int, int],
             say: Tell) -> None:
    before, profiled = runtime.counters.as_dict(), ranges.listening()
    with measure.quiet_collector():
        for index, token in enumerate(_stream(runtime, ids, config)):
            say(Row(arm, *numbers, index, len(ids) + index, token.id, token.ms, token.path, token.reason,
                    profiled))
    after = runtime.counters.as_dict()
    happened = {name: after[name] - before[name] for name in ("captures", "compiles")}
    if any(happened.values()):
        raise RunError(f"{happened['captures']} captures and {happened['compiles']} compilations in a timed request",
                       f"arm {arm}, request {numbers[1]}", "such times are no latencies; run it again")


def _stream(runtime: Runtime, ids: list[int], config: RunConfig) -> Any:
    return runtime.stream(ids, max_new_tokens=config.new_tokens, temperature=config.temperature, top_k=config.top_k,
                          top_p=config.top_p, seed=config.seed, stop=[])
