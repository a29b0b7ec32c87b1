"""hybridlab: understand, measure and beat launch overhead in LLM inference.

The public names are imported when first used, so that `import hybridlab` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "models", "partition": "partitioning", "Plan": "plan", "Runtime": "runtime", "Output": "runtime",
    "Token": "runtime", "Policy": "config", "RunConfig": "config", "RuntimeConfig": "config",
    "CacheConfig": "config", "run": "experiment", "Result": "experiment", "HybridlabError": "errors",
    "runs": "store", "rows": "store", "compare": "store",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"hybridlab.{_HOME[name]}"), name)
    try:
        return import_module(f"hybridlab.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"hybridlab.{name}":
            raise
        raise AttributeError(f"module 'hybridlab' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return __all__
