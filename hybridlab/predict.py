"""The time of a step, predicted from its plan and a machine: launches, bytes and FLOPs, and nothing fitted to a model.

An operation works for `max(bytes / gemv_gbs, FLOPs / matmul_tflops)`. Attention on a CPU reads no faster than
`plain_attend_gbs` or `jit_attend_gbs`; on a GPU, whose heads work side by side, it takes no less than `plain_row_us` or
`jit_row_us` for each row of context. Rates and launch costs are the machine's at the bytes that the whole step reads,
as they decide what stays in a cache. Beside its work a kernel takes

    from Python        eager_op_us of the host, a JIT kernel jit_launch_us
    inside a graph     graph_node_us of the device, a JIT kernel graph_jit_us; a graph graph_launch_us of the host, once

and a step read_back_us, and in arms eager and jit, whose modules run, forward_us of the host.

On a CPU a call does its work before it returns: step = host + device + read_back_us. On a GPU they overlap, and the
device ends a segment no earlier than the host has launched all of it: done = max(done + device of the segment, host so
far), step = done + read_back_us. There a kernel takes graph_node_us of the device also when it is launched from Python.

Assumed: greedy sampling, one request, and a host that waits for every token. Left out: the runtime's own bookkeeping,
clocks that change, and kernels too small to fill a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
import torch

from hybridlab import costs
from hybridlab.config import ARMS, COMPILING, POLICIES, REPLAYING, Policy, policy_name
from hybridlab.errors import PlanError, choose
from hybridlab.machine import Machine
from hybridlab.partitioning import LENGTH, partition
from hybridlab.plan import Op, Plan


@dataclass(frozen=True)
class Spent:
    """What a part of a step takes: launches made by the host (kernels and graphs), µs of the host, µs of the device."""

    launches: int = 0
    host_us: float = 0.0
    device_us: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.launches + other.launches, self.host_us + other.host_us, self.device_us + other.device_us)


@dataclass(frozen=True)
class Prediction:
    """One step of one arm, in ms. On a GPU `host_ms`, spent launching, and `device_ms` overlap in `step_ms`.

    `launches` are those that the host makes: kernels and graphs. `floor_ms` is the least that the step's bytes and
    FLOPs allow on the machine. `parts`: the plan's segments in order, and what a step does beside them, each with its
    name and path.
    """

    arm: str
    policy: str
    step_ms: float
    host_ms: float
    device_ms: float
    launches: int
    floor_ms: float
    parts: tuple[tuple[str, str, Spent], ...]

    def table(self) -> pd.DataFrame:
        """One row a part: segment, path, launches, host_ms, device_ms."""
        return pd.DataFrame([{"segment": name, "path": path, "launches": spent.launches,
                              "host_ms": spent.host_us / 1e3, "device_ms": spent.device_us / 1e3}
                             for name, path, spent in self.parts])


def predict(plan: Plan, machine: Machine, arm: str) -> Prediction:
    """One step of `plan` in `arm` on `machine`: of the stock plan (policy None) in arm eager, else of a lowered one.

    Raises `PlanError` for a plan that the arm does not run.
    """
    choose("arm", arm, ARMS)
    policy = "none" if plan.policy is None else policy_name(plan.policy)
    if (plan.policy is None) != (arm == "eager"):
        raise PlanError(f"arm {arm} does not run this plan", f"its policy is {policy}",
                        "give partition(model, policy=None) for arm eager, and a policy for the others")
    costing = _Costing(plan.for_arm(arm), machine, arm)
    parts = tuple(costing.parts())
    total = sum((spent for _, _, spent in parts), Spent())
    step = _elapsed([spent for _, _, spent in parts], machine)
    return Prediction(arm, policy, step / 1e3, total.host_us / 1e3, total.device_us / 1e3, total.launches,
                      costing.floor_us() / 1e3, parts)


def table(model: Any, machine: Machine, arms: Iterable[str] = ARMS, policies: Iterable[str | Policy] = tuple(POLICIES),
          phase: str = "decode", length: int = LENGTH) -> pd.DataFrame:
    """Predictions side by side, a row an arm and policy, of `model` (anything `partition` takes).

    Columns: arm, policy, launches, predicted_ms, host_ms, device_ms, floor_ms. Arms eager and jit, in which there are
    no graphs, have one row each, with policy "".
    """
    arms = (arms,) if isinstance(arms, str) else arms
    policies, rows = (policies,) if isinstance(policies, str | Policy) else tuple(policies), []
    for arm in arms:
        replays = arm in REPLAYING
        for wanted in policies if replays else [None] if arm == "eager" else ["whole"]:
            found = predict(partition(model, wanted, phase, length), machine, arm)
            rows.append({"arm": arm, "policy": found.policy if replays else "", "launches": found.launches,
                         "predicted_ms": found.step_ms, "host_ms": found.host_ms, "device_ms": found.device_ms,
                         "floor_ms": found.floor_ms})
    return pd.DataFrame(rows)


class _Costing:
    """What the parts of one arm's step take on a machine."""

    def __init__(self, plan: Plan, machine: Machine, arm: str) -> None:
        self.plan, self.machine, self.arm = plan, machine, arm
        self.bytes, self.flops = sum(o.bytes for o in plan.ops), sum(o.flops for o in plan.ops)
        self.gemv_gbs, self.costs = machine.gemv_gbs(self.bytes), machine.launching(self.bytes)
        self.jits = arm in COMPILING
        which = "jit" if self.jits else "plain"
        self.attend_gbs, self.row_us = (getattr(self.costs, f"{which}_{name}") for name in ("attend_gbs", "row_us"))

    def floor_us(self) -> float:
        return max(self.bytes / self.machine.peak_gbs(self.bytes) / 1e3, self.flops / self.machine.matmul_tflops / 1e6)

    def parts(self) -> Iterator[tuple[str, str, Spent]]:
        held: dict[str, list[Op]] = {}
        for op in self.plan.ops:
            held.setdefault(op.segment, []).append(op)
        if self.arm in ("eager", "jit"):
            yield "call", "eager", Spent(host_us=self.costs.forward_us)
        for segment in self.plan.segments:
            graph = Spent(1, self.machine.graph_launch_us) if segment.path == "graph" else Spent()
            yield segment.name, segment.path, sum(map(self._operation, held[segment.name]), graph)
        if self.arm == "eager":  # the stock plan is the forward alone
            yield "prepare and sample", "eager", self._launched(plain_launches("prepare", self.plan.phase)
                                                                + plain_launches("sample", self.plan.phase))

    def _operation(self, op: Op) -> Spent:
        jit = bool(op.role) and self.jits
        kernels = (self.machine.jit_kernels(op.op) if jit else
                   plain_launches(op.role, self.plan.phase) if op.role in ("prepare", "sample") else op.launches)
        work = max(op.bytes / self.gemv_gbs / 1e3, op.flops / self.machine.matmul_tflops / 1e6)
        if op.role == "attention":
            work = max(work, op.bytes / self.attend_gbs / 1e3 if self.machine.device == "cpu" else
                       self.plan.length * self.row_us)
        if op.path == "graph":
            return Spent(0, 0.0, kernels * (self.costs.graph_jit_us if jit else self.costs.graph_node_us) + work)
        return self._launched(kernels, jit, work)

    def _launched(self, kernels: int, jit: bool = False, work: float = 0.0) -> Spent:
        """Kernels that the host launches one by one."""
        device = kernels * self.costs.graph_node_us if self.machine.device == "cuda" else 0.0
        return Spent(kernels, kernels * (self.costs.jit_launch_us if jit else self.costs.eager_op_us), device + work)


def _elapsed(parts: list[Spent], machine: Machine) -> float:
    """µs from the first launch until the token is on the host."""
    if machine.device == "cpu":
        return sum(spent.host_us + spent.device_us for spent in parts) + machine.read_back_us
    host = done = 0.0
    for spent in parts:
        host += spent.host_us
        done = max(done + spent.device_us, host)
    return done + machine.read_back_us


@cache
def plain_launches(role: str, phase: str) -> int:
    """Kernels of preparing a step's inputs ("prepare") or of drawing greedily ("sample") in plain PyTorch."""
    one, row = torch.zeros(1, dtype=torch.int64), torch.zeros((1, 1), dtype=torch.int64)
    if role == "sample":
        return costs.plain_launches("greedy", torch.zeros(2), one, one)
    return costs.plain_launches("advance", one, row, one) if phase == "decode" else \
        costs.plain_launches("pad", one, one, row, one)
