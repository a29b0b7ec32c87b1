"""Where a program is cut: the operations that a plan leaves outside, found again while the program runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybridlab.errors import CaptureFailed
from hybridlab.plan import Plan
from hybridlab.policies import Place, Places, places
from hybridlab.tracing import module_scopes

LeaveOutside = Callable[[Any], bool]  # asked of every operation (an OpOverload), in the order in which they run


@dataclass(frozen=True)
class Cut:
    """The operations of a program over `root`'s modules that stay outside its graphs."""

    root: nn.Module
    outside: frozenset[Place]

    @contextmanager
    def __call__(self) -> Iterator[LeaveOutside]:
        """While the program runs once: says of each operation whether it stays outside.

        Raises `CaptureFailed` at the end if one of them never ran: the program is then not the one that was planned.
        """
        missing, seen = set(self.outside), Places()
        inside_of = [""]

        @contextmanager
        def scope(name: str) -> Iterator[None]:
            inside_of.append(name)
            yield
            inside_of.pop()

        def leave_outside(function: Any) -> bool:
            place = seen.next(inside_of[-1], str(function).replace("hybridlab_jit.", "hybridlab."))
            missing.discard(place)
            return place in self.outside

        with module_scopes(self.root, scope):
            yield leave_outside
        if missing:
            first = min(missing)
            raise CaptureFailed(f"{len(missing)} operations of the plan never ran", f"the first is {first.op} number "
                                f"{first.nth} of {first.module}", "run it with policy='whole', and report this")


def cut(root: nn.Module, plan: Plan) -> Cut | None:
    """The cut that `plan` asks for inside the forward; None if that is one graph."""
    outside = frozenset(place for place, op in zip(places(plan.ops), plan.ops, strict=True)
                        if op.path != "graph" and op.role not in ("prepare", "sample") and op.launches)
    return Cut(root, outside) if outside else None
