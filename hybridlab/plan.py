"""The partition of one step as data: labelled operations, the segments that run them, and what differs between two."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from hybridlab.config import COMPILING, REPLAYING, Policy
from hybridlab.errors import PlanError, nearest

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("static", "device-dynamic", "host-dynamic")
ROLES = {"pad": "prepare", "advance": "prepare", "attend": "attention", "greedy": "sample", "sample": "sample"}


@dataclass(frozen=True)
class Op:
    """One operation of a traced step.

    `layer` is None outside the decoder layers. `flops`, `bytes` (read and written) and `launches` (kernels started
    when it runs eagerly) are those of one step at the plan's `length`. `path` says how it would run: "graph", "jit"
    or "eager".
    """

    name: str
    op: str
    layer: int | None
    module: str
    kind: str
    reason: str
    shape: str = ""
    flops: int = 0
    bytes: int = 0
    launches: int = 0
    segment: str = ""
    path: str = "eager"

    @property
    def short(self) -> str:
        """The operation without namespace and overload: "mm" of "aten.mm.default"."""
        return self.op.split(".")[1] if "." in self.op else self.op

    @property
    def role(self) -> str:
        """"prepare", "attention" or "sample" for hybridlab's own operations, else ""."""
        return ROLES.get(self.short, "") if self.op.startswith("hybridlab.") else ""


@dataclass(frozen=True)
class Segment:
    """A run of operations executed one way, and why."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The partition of one program: labelled operations and the segments that execute them, in order.

    `length` is the KV length (decode) or prompt length (prefill) that FLOPs and bytes are counted at, in tokens.
    `policy` is None for the stock step, of which nothing is lowered.
    """

    model: str
    phase: str
    policy: Policy | None
    length: int
    ops: tuple[Op, ...]
    segments: tuple[Segment, ...]

    def table(self) -> pd.DataFrame:
        """One row an operation, in order; the columns are op, layer, kind, reason, segment, path, then the rest."""
        import pandas as pd  # late: what serves asks for no table, and would import it for a second

        rows = [asdict(o) for o in self.ops]
        first = ["op", "layer", "kind", "reason", "segment", "path"]
        table = pd.DataFrame(rows).astype({"layer": "Int64"})
        return table[[*first, *(c for c in table.columns if c not in first)]]

    @property
    def counts(self) -> dict[str, int]:
        """Operations of each kind, all three always present."""
        found = Counter(o.kind for o in self.ops)
        return {kind: found[kind] for kind in KINDS}

    def explain(self, op: str | int) -> str:
        """Why one operation is where it is, in words. `op` is its name or its index in the plan.

        Raises `PlanError` for an operation that the plan does not hold.
        """
        found = self._find(op)
        where = f"in layer {found.layer} ({found.module})" if found.layer is not None else \
            f"in {found.module}" if found.module else "outside the model"
        launches = "1 launch" if found.launches == 1 else f"{found.launches} launches"
        runs = next((s for s in self.segments if s.name == found.segment), None)
        return (f"{found.name} ({found.op}) {where} is {found.kind}: {found.reason}. "
                f"At {self.length} tokens it costs {found.flops:,} FLOPs, {found.bytes:,} bytes and "
                f"{launches}. It runs {found.path}" + (f": {runs.reason}." if runs else "."))

    def _find(self, op: str | int) -> Op:
        if isinstance(op, int):
            if not -len(self.ops) <= op < len(self.ops):
                raise PlanError(f"there is no operation {op}", f"the plan has {len(self.ops)}", "see plan.table()")
            return self.ops[op]
        if not isinstance(op, str):
            raise PlanError(f"{op!r} is no operation", f"the plan of {self.model}", "give a name, or an index from 0")
        found = next((o for o in self.ops if o.name == op), None)
        if found is None:
            raise PlanError(f"there is no operation {op!r}", f"the plan of {self.model}",
                            f"{nearest(op, [o.name for o in self.ops])}; see the column name of plan.table()")
        return found

    def diff(self, other: Plan) -> pd.DataFrame:
        """What `other` has otherwise: one row an operation of a module whose number or kind differs.

        Columns: layer, module, op, before and after (how many), kind_before, kind_after, reason (in `other` if it is
        there, else here).
        """
        import pandas as pd  # late, as in `table`

        before, after = _by_place(self), _by_place(other)
        rows = []
        for place in dict.fromkeys((*before, *after)):
            mine, theirs = before.get(place, []), after.get(place, [])
            if Counter(o.kind for o in mine) != Counter(o.kind for o in theirs):
                module, op = place
                rows.append({"layer": (mine or theirs)[0].layer, "module": module, "op": op, "before": len(mine),
                             "after": len(theirs), "kind_before": _kinds(mine), "kind_after": _kinds(theirs),
                             "reason": (theirs or mine)[0].reason})
        columns = ["layer", "module", "op", "before", "after", "kind_before", "kind_after", "reason"]
        return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})

    def for_arm(self, arm: str) -> Plan:
        """The same operations as `arm` runs them: replay and JIT become eager where the arm leaves them out."""
        replays, jits = arm in REPLAYING, arm in COMPILING

        def path(planned: str, dynamic: bool) -> str:
            if planned == "graph" and replays:
                return "graph"
            return "jit" if dynamic and jits else "eager"

        held = {s.name: {bool(o.role) for o in self.ops if o.segment == s.name} for s in self.segments}
        return replace(
            self,
            ops=tuple(replace(o, path=path(o.path, bool(o.role))) for o in self.ops),
            segments=tuple(replace(s, path=path(s.path, True in held[s.name])) for s in self.segments),
        )

    def to_json(self) -> str:
        """The plan as text that `from_json` turns back into an equal plan."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """A plan from its JSON. Raises `PlanError` for text that is none."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PlanError("this text is no plan", str(error), "give what Plan.to_json() returned") from None


def _by_place(plan: Plan) -> dict[tuple[str, str], list[Op]]:
    places: dict[tuple[str, str], list[Op]] = {}
    for op in plan.ops:
        places.setdefault((op.module, op.op), []).append(op)
    return places


def _kinds(ops: list[Op]) -> str:
    return ", ".join(dict.fromkeys(o.kind for o in ops))
