"""A model against itself before it serves: its own forward, a forward over a cache, and the lowered one must agree.

Families differ in masks, scales, sinks, states and position schemes. One that hybridlab does not know would give
plausible wrong tokens, so it is found here, by its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hybridlab.errors import LoweringError, ModelError
from hybridlab.lowering import EAGER, PLAIN, Inputs, Program, StaticKV, lower, twin

PROBE = 17  # tokens; all but the last are a prompt, the last is a decode step
# Of the largest logit. Rounding in another order moves logits by a hundredth of this; a wrong mask or scale by more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def verify_cached(model: PreTrainedModel) -> None:
    """Raise `ModelError` if decoding over keys and values alone differs from the model's own forward."""
    name = type(model).__name__
    remedy = "hybridlab serves decoders whose only state is keys and values"
    if getattr(model, "_is_stateful", False):
        raise ModelError(f"{name} keeps a state that is no KV cache", model.name_or_path, remedy)
    try:
        with torch.no_grad():
            ids, cache = _probe(model), DynamicCache(config=model.config.get_text_config())
            for part in (ids[:, :-1], ids[:, -1:]):
                out = model(input_ids=part, past_key_values=cache, use_cache=True)
            error = _error(model, ids, out.logits[0, -1])
    except (RuntimeError, TypeError, ValueError, AttributeError) as raised:
        cause = f"{type(raised).__name__}: {raised}"
        raise ModelError(f"{name} does not decode over a KV cache", cause, remedy) from raised
    if error > TOLERANCE[model.dtype]:
        raise ModelError(f"{name} decodes differently over a KV cache", f"logits differ by {error:.1e} of the largest",
                         remedy)


def verify_lowered(model: PreTrainedModel) -> None:
    """Raise `LoweringError` if a lowered prefill and decode step differ from the model's own forward."""
    ids, config = _probe(model), model.config
    kv = StaticKV(config, PROBE, model.device, model.dtype)
    logits = torch.zeros(config.vocab_size, device=model.device)
    module = lower(model, PLAIN)
    with torch.no_grad():
        for rows, first in ((PROBE - 1, 0), (1, PROBE - 1)):
            inputs = Inputs.of(rows, model.device)
            inputs.ids.copy_(ids[:, first:first + rows])
            inputs.positions.add_(first)
            inputs.last.fill_(rows - 1)
            Program(module, kv, logits, inputs, PROBE if rows == 1 else rows)()
        error = _error(twin(model), ids, logits)
    if error > TOLERANCE[model.dtype]:
        raise LoweringError(f"lowered logits of {type(model).__name__} differ from the model's own",
                            f"by {error:.1e} of the largest, after {PROBE} tokens in {model.dtype}", EAGER)


def _probe(model: PreTrainedModel) -> Tensor:
    return torch.arange(PROBE, device=model.device)[None] * 7 % model.config.get_text_config().vocab_size


def _error(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> float:
    """The largest difference to the model's forward over all ids at once, in units of the largest logit.

    0 where the model itself gives NaN: broken weights are found, and named, when a token is drawn.
    """
    wanted = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    if not torch.isfinite(wanted).all():
        return 0.0
    return float((logits.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
