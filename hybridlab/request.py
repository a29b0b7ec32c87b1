"""A request as checked data: prompt ids, how many tokens, how they are drawn, where to stop."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from hybridlab.config import Sampling, build
from hybridlab.errors import PromptError, shown

COLDEST = 1e-4  # temperature; logits of some hundreds over less than this leave float32
LONGEST = 256   # characters of a token, more than any vocabulary has; a longer text is refused before it is cut up


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What one call of `generate` asks for; `ids` fit the model and, with the new tokens, the KV cache. `spent_ns`: of
    the time to the first token, what had passed when this was made; a text becomes ids before."""

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: frozenset[int]
    spent_ns: int


def request(model: PreTrainedModel, prompt: Any, max_len: int, max_new_tokens: int, stop: Iterable[int] | None,
            **sampling: Any) -> Request:
    """Check everything before any work. Raises `PromptError` or `ConfigError`, with the bound that was broken."""
    vocabulary = model.config.vocab_size
    encoded = _encode(model, prompt, max_len) if isinstance(prompt, str) else None
    begun = time.perf_counter_ns()
    ids = _as_ids("prompt", prompt, vocabulary, max_len) if encoded is None else encoded
    if not ids:
        raise PromptError("the prompt is empty", "there is no last token to continue from", "give at least one token")
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        raise PromptError(f"max_new_tokens is {shown(max_new_tokens)}", "it must be a whole number", "give 1 or more")
    if len(ids) + max_new_tokens > max_len:
        raise PromptError(f"{len(ids)} prompt tokens and {shown(max_new_tokens)} new ones do not fit",
                          f"the KV cache holds {max_len} tokens", "shorten the prompt, ask for fewer new tokens, "
                          "or raise max_len up to the model's context")
    drawn = build(Sampling, sampling)
    if 0 < drawn.temperature < COLDEST:
        raise PromptError(f"temperature is {drawn.temperature}", f"below {COLDEST} scores overflow float32",
                          "give 0 for greedy")
    ends = _end_tokens(model) if stop is None else _as_ids("stop", stop, vocabulary, vocabulary)
    return Request(ids=ids, max_new_tokens=max_new_tokens, sampling=drawn, stop=frozenset(ends),
                   spent_ns=time.perf_counter_ns() - begun)


def _encode(model: PreTrainedModel, text: str, most: int) -> list[int]:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PromptError("the prompt is text and the model has no tokenizer", model.name_or_path, "give token ids")
    if not text:
        raise PromptError("the prompt is empty", "", "give some text")
    if len(text) > most * LONGEST:
        raise PromptError(f"the prompt has {len(text):,} characters", f"the KV cache holds {most} tokens",
                          "shorten the prompt")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError("the prompt is not valid text", f"character {error.start} is a lone surrogate",
                          "decode it properly first") from None
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _as_ids(name: str, values: Any, vocabulary: int, most: int) -> list[int]:
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise PromptError(f"{name} is {type(values).__name__}", "it must be a list of token ids",
                          "give whole numbers" if name == "stop" else "give text or whole numbers")
    values = list(islice(values, most + 1))  # it may never end
    if len(values) > most:
        raise PromptError(f"{name} holds more than {most} token ids",
                          f"the model has {most} tokens" if name == "stop" else f"the KV cache holds {most} tokens",
                          "give fewer")
    if set(map(type, values)) <= {int} and min(values, default=0) >= 0 and max(values, default=0) < vocabulary:
        return values  # without a look at each, which at 500 ids is a hundredth of the time to the first token
    for index, value in enumerate(values):
        if not _is_int(value) or not 0 <= value < vocabulary:
            raise PromptError(f"{name}[{index}] is {shown(value)}",
                              f"token ids are whole numbers from 0 to {vocabulary - 1}", "use the model's tokenizer")
    return [int(value) for value in values]


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = model.config.eos_token_id if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
