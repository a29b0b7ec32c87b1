"""A policy over labelled operations: what stays outside graphs, why that is possible, and the segments it gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from hybridlab.config import REPLAYING, Policy, policy_name
from hybridlab.errors import PlanError, nearest
from hybridlab.plan import KINDS, ROLES, Op, Plan, Segment


class Place(NamedTuple):
    """One operation of a program, the same in its trace and whenever it runs: the n-th `op` of a call of `module`."""

    module: str
    op: str
    nth: int


class Places:
    """Gives each operation its place: to be asked for every one, in the order in which they run."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str]] = Counter()

    def next(self, module: str, op: str) -> Place:
        place = Place(module, op, self._seen[module, op])
        self._seen[module, op] += 1
        return place


def places(ops: Sequence[Op]) -> Iterator[Place]:
    """The place of each operation, in order."""
    seen = Places()
    return (seen.next(op.module, op.op) for op in ops)


def assign(ops: Sequence[Op], policy: Policy) -> tuple[tuple[Op, ...], tuple[Segment, ...]]:
    """The operations with their segment and path under `policy`, and the segments in order.

    Raises `PlanError` for a name that fits no operation, for a policy that leaves nothing to capture, and, naming it,
    for an operation that is still host-dynamic: outside a graph it would run again, but with the old shapes.
    """
    outside = _outside(ops, policy)
    for op, name in zip(ops, outside, strict=True):
        if op.kind == "host-dynamic":
            what = "no graph can hold" if name is None else "what follows depends on the host after"
            raise PlanError(f"policy {policy_name(policy)!r} is impossible: {what} {op.name} ({op.op})",
                            f"{op.module or 'outside the model'}: {op.reason}", "run it with arm='eager'")
    if not any(name is None and op.launches for op, name in zip(ops, outside, strict=True)):
        raise PlanError(f"policy {policy_name(policy)!r} leaves nothing for a graph", "every operation that launches "
                        "anything is outside", "name less in outside=")
    return _segments(ops, _kept_together(ops, outside))


def refusal(ops: Sequence[Op], policy: Policy) -> str:
    """Why `assign` refuses the policy, or ""."""
    try:
        assign(ops, policy)
    except PlanError as error:
        return str(error)
    return ""


def left_out(policy: Policy, arm: str, decode: Callable[[], Plan]) -> set[str]:
    """Which of "prepare" and "sample" no graph of `arm` holds. The plan `decode` is made only where `policy` has names
    that may mean them among others."""
    ends = {"prepare", "sample"}
    if arm not in REPLAYING:
        return ends
    names = {o.role for o in decode().ops if o.path != "graph"} if policy.between else {*policy.outside}
    return ends & names


def _outside(ops: Sequence[Op], policy: Policy) -> list[str | None]:
    """For each operation the name in the policy that leaves it outside; None: a graph holds it."""
    result: list[str | None] = [None] * len(ops)
    for name in policy.outside:
        fitting = _fitting(ops, name)
        if not fitting:
            parts = {part for o in ops for part in o.module.split(".") if part and not part.isdigit()}
            raise PlanError(f"no operation is {name!r}", f"policy {policy_name(policy)!r} leaves it outside",
                            nearest(name, {*KINDS, *ROLES.values(), *(o.short for o in ops), *parts}))
        for index in fitting:
            result[index] = result[index] or name
    return result


def _fitting(ops: Sequence[Op], name: str) -> list[int]:
    """Indices of the operations that `name` means; see `Policy` for the order in which it is looked up."""
    tests = (
        lambda o: o.kind == name,
        lambda o: o.role == name,
        lambda o: name in (o.short, o.op, o.op.rpartition(".")[0]),
        lambda o: f".{name}." in f".{o.module}.",
    )
    found = ([i for i, o in enumerate(ops) if test(o)] for test in tests)
    return next((indices for indices in found if indices), [])


def _kept_together(ops: Sequence[Op], outside: list[str | None]) -> list[str | None]:
    """`outside`, with operations that launch nothing left where their neighbour is: a graph of views would be empty."""
    result = list(outside)
    start = 0
    for name, group in groupby(outside):
        end = start + len(list(group))
        if name is None and not any(o.launches for o in ops[start:end]):
            neighbour = result[start - 1] if start else outside[end] if end < len(ops) else None
            result[start:end] = [neighbour] * (end - start)
        start = end
    return result


def _segments(ops: Sequence[Op], outside: list[str | None]) -> tuple[tuple[Op, ...], tuple[Segment, ...]]:
    runs = [(name, list(group)) for name, group in groupby(zip(outside, ops, strict=True), key=lambda pair: pair[0])]
    total = Counter(name for name, _ in runs)
    seen: Counter[str | None] = Counter()
    placed: list[Op] = []
    segments: list[Segment] = []
    for name, group in runs:
        title = name or "graph"
        title += f" {seen[name]}" if total[name] > 1 else ""
        seen[name] += 1
        own = [op for _, op in group]
        if name is None:
            path, reason = "graph", "no shape or value in it depends on the host, so one capture serves every step"
        else:
            path = "jit" if any(o.role for o in own) else "eager"
            reason = f"the policy leaves {name!r} outside graphs"
        segments.append(Segment(title, path, reason))
        placed += [replace(o, segment=title, path=path if path != "jit" or o.role else "eager") for o in own]
    return tuple(placed), tuple(segments)
