"""The exception family. Every message is fact · context · remedy, in that order."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 4000  # characters of one part of a message: a name or value from outside may have millions


class HybridlabError(Exception):
    """Base of everything hybridlab raises on purpose.

    `fact` says what is wrong, `context` where and with which values, `remedy` what to do about it.
    """

    def __init__(self, fact: str, context: str = "", remedy: str = "") -> None:
        self.fact, self.context, self.remedy = map(_bounded, (fact, context, remedy))
        super().__init__(" · ".join(part for part in (self.fact, self.context, self.remedy) if part))


class ConfigError(HybridlabError, ValueError):
    """A setting or parameter is unknown, of the wrong type or out of range. Raised before any work starts."""


class ModelError(HybridlabError, ValueError):
    """A model name, config or checkpoint cannot be used."""


class PromptError(HybridlabError, ValueError):
    """A prompt is empty, too long, or holds something that is no token of the model."""


class LoweringError(HybridlabError):
    """A model step still holds host-dynamic operations after lowering, so no graph can hold it."""


class PlanError(HybridlabError, ValueError):
    """A policy is impossible for a model, or a plan does not hold what was asked of it."""


class CaptureFailed(HybridlabError, RuntimeError):
    """A segment could not be captured; the graph was reset and nothing of it is kept."""


class CaptureClosed(HybridlabError, RuntimeError):
    """A capture was asked for while captures are closed, as they are inside a timed region."""


class WrongThread(HybridlabError, RuntimeError):
    """A graph cache was used from a thread that does not own it."""


class StaleAddress(HybridlabError, RuntimeError):
    """A buffer that a graph reads or writes has moved since capture."""


class EngineBusy(HybridlabError, RuntimeError):
    """One runtime serves one request at a time, and another one is still running."""


class RuntimeClosed(HybridlabError, RuntimeError):
    """The runtime was closed and serves no more requests."""


class ProtocolError(HybridlabError, RuntimeError):
    """A frame between a runtime and its worker is damaged, too large or unknown. Nothing of it was carried out."""


class WorkerDied(HybridlabError, RuntimeError):
    """The process that served a runtime is gone. Every later call of that runtime raises this again."""


class WorkerTimeout(HybridlabError, RuntimeError):
    """The process that served a runtime did not answer in time and was ended. Every later call raises this again."""


class NonFinite(HybridlabError, ArithmeticError):
    """Logits hold NaN or infinity, so no token can be drawn from them."""


class JITUnavailable(HybridlabError, RuntimeError):
    """The dynamic path cannot be compiled on this machine."""


class StatisticsError(HybridlabError, ValueError):
    """The sample is too small for the statistic asked of it."""


class MeasureError(HybridlabError, RuntimeError):
    """A runtime answered something that cannot be measured."""


class TraceError(HybridlabError, ValueError):
    """A trace cannot be made or read, or holds what no profiler writes."""


class FigureError(HybridlabError, ValueError):
    """A Plotly figure uses something that the static renderer does not draw."""


class RunError(HybridlabError):
    """A run directory exists already, is incomplete, or does not match its manifest."""


class NotebookError(HybridlabError):
    """A notebook or its parameters were refused before a kernel started."""


class SweepError(HybridlabError, ValueError):
    """A sweep was refused before its first job started."""


class NotebookFailed(HybridlabError):
    """A notebook started and did not finish: a cell failed, timed out, or its kernel died."""


def shown(value: object) -> str:
    """`value` for a message: its repr, at most 80 characters of it, whatever the value is."""
    try:
        text = repr(value)
    except Exception as error:  # an integer of more than 4300 digits, or a class of somebody's own
        text = f"{type(value).__name__} that cannot be shown: {error}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bounded(part: str) -> str:
    if len(part) <= LONGEST:
        return part
    return f"{part[:LONGEST // 2]} … {len(part) - LONGEST:,} characters more … {part[-LONGEST // 2:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a wrong name: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name[:LONGEST], known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def choose(field: str, value: object, known: Iterable[str]) -> str:
    """`value` if it is one of `known`, else a `ConfigError` that names the nearest."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{field} {shown(value)} is unknown", f"it must be one of {', '.join(known)}",
                          nearest(str(value), known) if isinstance(value, str) else "")
    return value
