"""A model against itself before it serves: its own forward, a forward over a cache, and the lowered one must agree.

Families differ in masks, scales, sinks, states and position schemes. One that hybridlab does not know would give
plausible wrong tokens, so it is found here, by its logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from hybridlab.errors import LoweringError, ModelError
from hybridlab.lowering import EAGER, PLAIN, Inputs, Program, StaticKV, lowered, require, twin
from hybridlab.tape import reads_back

PROBE = 17  # tokens; all but the last are a prompt, the last is a decode step
PADDED = 24  # rows that the prompt is padded to, as a bucket would
WINDOW, SOFTCAP = 8, 0.1  # in place of a model's own, which so few tokens would not reach
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
            error = _error(out.logits[0, -1:], _own(model, ids, 1))
    except (RuntimeError, TypeError, ValueError, AttributeError) as raised:
        cause = f"{type(raised).__name__}: {raised}"
        raise ModelError(f"{name} does not decode over a KV cache", cause, remedy) from raised
    if error > TOLERANCE[model.dtype]:
        raise ModelError(f"{name} decodes differently over a KV cache", f"logits differ by {error:.1e} of the largest",
                         remedy)


def verify_lowered(model: PreTrainedModel) -> bool:
    """Raise `LoweringError` if a lowered prefill and decode step differ from the model's own forward.

    Both run with sliding windows and soft-caps so narrow that a few tokens reach them. Returns whether the decode step
    was seen to need nothing of the host, and to attend once a layer; a trace says what it is, if not.
    """
    require(model)
    model = _narrowed(model)
    ids, config = _probe(model), model.config
    kv = StaticKV(config, PADDED, model.device, model.dtype)
    logits = torch.zeros((2, config.vocab_size), device=model.device)
    with torch.no_grad():
        own = _own(model, ids, 2)
        module = lowered(model, PLAIN)
        _program(module, kv, logits[0], ids[:, :-1], 0, PADDED)()
        decode, watch = _program(module, kv, logits[1], ids[:, -1:], PROBE - 1, 1), _Watch()
        with watch, _Reads(watch):
            decode()
        error = _error(logits, own)
    if error > TOLERANCE[model.dtype]:
        raise LoweringError(f"lowered logits of {type(model).__name__} differ from the model's own",
                            f"by {error:.1e} of the largest, after {PROBE} tokens in {model.dtype}", EAGER)
    return not watch.host and sorted(watch.attended) == sorted(id(keys) for keys, _ in kv.layers)


def _program(module: PreTrainedModel, kv: StaticKV, logits: Tensor, ids: Tensor, start: int, rows: int) -> Program:
    """What reads `ids` at the positions from `start` on, padded to `rows`."""
    count, inputs = ids.shape[1], Inputs.of(rows, module.device)
    inputs.ids[:, :count] = ids
    inputs.positions.add_(start)
    inputs.last.fill_(count - 1)
    return Program(module, kv, logits, inputs, PADDED)


class _Watch(TorchDispatchMode):
    """Notes whether the host waits for a value of the operations that run meanwhile, and into which caches attention
    writes. Products of experts may read back too, on some machines; that a trace knows."""

    def __init__(self) -> None:
        super().__init__()
        self.host = False
        self.attended: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.host |= reads_back(func, args) or "grouped_mm" in str(func)
        if func is torch.ops.hybridlab.attend.default:
            self.attended.append(id(args[3]))
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Notes values that leave a tensor without an operation of the dispatcher, as they do on a CPU."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.host |= getattr(func, "__name__", "") in ("tolist", "numpy", "__array__", "__dlpack__")
        return func(*args, **(kwargs or {}))


def culprit(model: PreTrainedModel, ids: list[int]) -> str:
    """Where numbers stop being finite: the first weight that is not, else the first module in the order of execution
    whose output is not, when the stock modules read `ids`. Runs the model once; for messages."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            return f"weight {name} holds one"
    found: list[str] = []
    hooks = [module.register_forward_hook(_finite(name, found)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    except RuntimeError as error:  # out of memory, above all: the first error is the one that counts
        return f"where could not be seen, {type(error).__name__}"
    finally:
        for hook in hooks:
            hook.remove()
    return f"first in the output of {found[0]}" if found else "though not in the stock modules"


def _finite(name: str, found: list[str]) -> Callable[..., None]:
    def look(module: torch.nn.Module, given: Any, out: Any) -> None:
        tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        if not found and not all(torch.isfinite(t).all() for t in tensors):
            found.append(name)

    return look


def _narrowed(model: PreTrainedModel) -> PreTrainedModel:
    """A twin whose sliding windows and soft-caps are `WINDOW` and `SOFTCAP`, wherever a module or config keeps one.

    Raises `LoweringError` for windows of several sizes: which of them its mask obeys, a narrowed twin cannot tell.
    """
    narrowed = twin(model)
    windows = [*_settings(narrowed, r"window(_size)?$", int)]
    sizes = {getattr(holder, name) for holder, name in windows} - {0}
    if len(sizes) > 1:
        raise LoweringError(f"{type(model).__name__} has windows of {', '.join(map(str, sorted(sizes)))} tokens",
                            "its config and its layers must name the same", EAGER)
    for holder, name in windows:
        setattr(holder, name, min(WINDOW, getattr(holder, name)))
    for holder, name in _settings(narrowed, "^(?!final).*softcap", float):  # a final one would only blur the logits
        setattr(holder, name, SOFTCAP)
    return narrowed


def _settings(model: PreTrainedModel, pattern: str, kind: type) -> Iterator[tuple[Any, str]]:
    """Each module or config of `model` with the name of a number that it keeps under a name that has `pattern`."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for holder in (*configs.values(), *model.modules()):
        for name, value in list(vars(holder).items()):
            if type(value) is kind and re.search(pattern, name):
                yield holder, name


def _probe(model: PreTrainedModel) -> Tensor:
    return torch.arange(PROBE, device=model.device)[None] * 7 % model.config.get_text_config().vocab_size


def _own(model: PreTrainedModel, ids: Tensor, rows: int) -> Tensor:
    """Logits of the last `rows` by the model's own forward over all ids at once: [rows, vocabulary]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -rows:].float()
    return logits


def _error(logits: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest logit wanted. 0 where the model itself gives NaN: broken weights
    are found, and named, when a token is drawn."""
    if not torch.isfinite(wanted).all():
        return 0.0
    return float((logits.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
