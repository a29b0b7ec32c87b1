"""The time of a step, predicted from its plan and a machine: launches, bytes and FLOPs, and nothing fitted to a model.

An operation works for `max(bytes / gemv_gbs, FLOPs / matmul_tflops)`, where `gemv_gbs` is the rate at which the machine
reads a working set as large as all bytes of the step; attention instead for `bytes / attend_gbs`, plain or JIT. Starting
its kernels takes, for each of them:

    from Python          host eager_op_us, of a JIT kernel jit_launch_us
    inside a graph       device graph_node_us, of a JIT kernel graph_jit_us; host graph_launch_us once a graph

A step whose modules run (arms eager and jit) spends `forward_us` once more, and every step `read_back_us`.

On a CPU a call does its work before it returns: step = host + device. On a GPU they overlap, and the device starts a
segment no earlier than the host has launched its last kernel: done = max(done + device of the segment, host so far),
each kernel taking the device graph_node_us beside its work.

Assumed: greedy sampling, nothing fused, one request at a time, the host waits for every token. Left out: the runtime's
own bookkeeping, clocks that change, caches that hold part of a step, GPU kernels too small to fill the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd
import torch

from hybridlab import costs
from hybridlab.config import ARMS, policy_name
from hybridlab.errors import PlanError, choose
from hybridlab.machine import Machine
from hybridlab.partitioning import partition
from hybridlab.plan import Op, Plan, Segment


@dataclass(frozen=True)
class Prediction:
    """One step of one arm. Times in ms; `launches` are those the host makes: kernels and graphs.

    `host_ms` is spent launching and waiting for the token, `device_ms` computing; on a GPU they overlap in `step_ms`.
    `floor_ms` is the least that the step's bytes and FLOPs allow on this machine. `segments`: one row a segment with
    columns segment, path, launches, host_ms, device_ms.
    """

    arm: str
    policy: str
    step_ms: float
    host_ms: float
    device_ms: float
    launches: int
    floor_ms: float
    segments: pd.DataFrame


class _Spent(NamedTuple):
    """What one segment takes: launches by the host, µs of the host, µs of the device."""

    launches: int
    host: float
    device: float


def predict(plan: Plan, machine: Machine, arm: str) -> Prediction:
    """The time of one step of `plan` in `arm` on `machine`.

    Arm eager takes the stock plan (policy None), the others a lowered one. Raises `PlanError` for the wrong one.
    """
    choose("arm", arm, ARMS)
    if (plan.policy is None) != (arm == "eager"):
        raise PlanError(f"arm {arm} cannot run this plan", f"its policy is {_policy(plan)}",
                        "give partition(model, policy=None) for arm eager, and a policy for the others")
    costing = _Costing(plan.for_arm(arm), machine, arm)
    names, spent = costing.segments()
    launches = sum(s.launches for s in spent)
    host, device = (sum(getattr(s, side) for s in spent) for side in ("host", "device"))
    rows = [{"segment": n, "path": p, "launches": s.launches, "host_ms": s.host / 1e3, "device_ms": s.device / 1e3}
            for (n, p), s in zip(names, spent, strict=True)]
    return Prediction(arm, _policy(plan), _elapsed(spent, machine) / 1e3, host / 1e3, device / 1e3, launches,
                      costing.floor() / 1e3, pd.DataFrame(rows))


def table(model: Any, machine: Machine, arms: Iterable[str] = ARMS,
          policies: Iterable[Any] = ("piecewise", "whole", "full"), phase: str = "decode",
          length: int = 512) -> pd.DataFrame:
    """Predictions side by side, a row an arm and policy: columns arm, policy, launches, predicted_ms, host_ms,
    device_ms, floor_ms.

    `model` is what `partition` takes. Arms without graphs have one row, as no policy changes what they run.
    """
    rows = []
    for arm in arms:
        for wanted in [None] if arm == "eager" else ["whole"] if arm == "jit" else policies:
            p = predict(partition(model, wanted, phase, length), machine, arm)
            rows.append({"arm": arm, "policy": p.policy if arm in ("graph", "hybrid") else "", "launches": p.launches,
                         "predicted_ms": p.step_ms, "host_ms": p.host_ms, "device_ms": p.device_ms,
                         "floor_ms": p.floor_ms})
    return pd.DataFrame(rows)


def error(predicted_ms: float, measured_ms: float) -> float:
    """How far a prediction is off, as a share of what was measured: 0.1 is ten per cent too slow a prediction."""
    return predicted_ms / measured_ms - 1


class _Costing:
    """What each segment of one arm's plan takes on a machine."""

    def __init__(self, plan: Plan, machine: Machine, arm: str) -> None:
        self.plan, self.machine, self.arm = plan, machine, arm
        self.bytes, self.flops = (sum(getattr(o, what) for o in plan.ops) for what in ("bytes", "flops"))
        self.gbs = machine.gemv_gbs(self.bytes)
        self.jits = arm in ("jit", "hybrid")

    def floor(self) -> float:
        """µs that the step's bytes and FLOPs take at the machine's best rates."""
        return max(self.bytes / self.machine.peak_gbs(self.bytes) / 1e3, self.flops / self.machine.matmul_tflops / 1e6)

    def segments(self) -> tuple[list[tuple[str, str]], list[_Spent]]:
        """Names with paths, and what each takes: the plan's segments, and what a step does beside its operations."""
        held = {name: list(ops) for name, ops in groupby(self.plan.ops, key=lambda o: o.segment)}
        found = [((s.name, s.path), self._segment(s, held[s.name])) for s in self.plan.segments]
        if self.arm in ("eager", "jit"):
            found.insert(0, (("modules", "eager"), _Spent(0, self.machine.forward_us, 0)))
        if self.arm == "eager":
            count = plain_launches("prepare", "decode") + plain_launches("sample", "decode")
            found.append((("inputs and sample", "eager"), self._launched(count, self.machine.eager_op_us, 0)))
        return [name for name, _ in found], [spent for _, spent in found]

    def _segment(self, segment: Segment, ops: list[Op]) -> _Spent:
        if segment.path == "graph":
            nodes = sum(self._nodes(o) for o in ops)
            return _Spent(1, self.machine.graph_launch_us, nodes + sum(map(self._work, ops)))
        parts = [self._operation(o) for o in ops]
        return _Spent(*(sum(part[i] for part in parts) for i in range(3)))

    def _nodes(self, op: Op) -> float:
        """µs of the device for the kernels of one operation in a graph, beside their work."""
        if op.role and self.jits:
            return self.machine.jit_kernels(op.op) * self.machine.graph_jit_us
        return self._launches(op) * self.machine.graph_node_us

    def _operation(self, op: Op) -> _Spent:
        """One operation that the host launches."""
        if op.role and self.jits:
            return self._launched(self.machine.jit_kernels(op.op), self.machine.jit_launch_us, self._work(op))
        return self._launched(self._launches(op), self.machine.eager_op_us, self._work(op))

    def _launched(self, count: int, each: float, work: float) -> _Spent:
        device = count * self.machine.graph_node_us if self.machine.device == "cuda" else 0
        return _Spent(count, count * each, device + work)

    def _launches(self, op: Op) -> int:
        return plain_launches(op.role, self.plan.phase) if op.role in ("prepare", "sample") else op.launches

    def _work(self, op: Op) -> float:
        """µs that reading, writing and computing take."""
        gbs = self.gbs
        if op.role == "attention":
            gbs = min(gbs, self.machine.jit_attend_gbs if self.jits else self.machine.plain_attend_gbs)
        return max(op.bytes / gbs / 1e3, op.flops / self.machine.matmul_tflops / 1e6)


def _elapsed(spent: list[_Spent], machine: Machine) -> float:
    """µs from the first launch until the token is on the host."""
    if machine.device == "cpu":
        return sum(s.host + s.device for s in spent) + machine.read_back_us
    host = done = 0.0
    for s in spent:
        host += s.host
        done = max(done + s.device, host)
    return done + machine.read_back_us


@cache
def plain_launches(role: str, phase: str) -> int:
    """Kernels of preparing a step's inputs, or of drawing greedily, in plain PyTorch."""
    one, row = torch.zeros(1, dtype=torch.int64), torch.zeros((1, 1), dtype=torch.int64)
    if role == "sample":
        return costs.plain_launches("greedy", torch.zeros(2), one)
    if phase == "decode":
        return costs.plain_launches("advance", one, row, one)
    return costs.plain_launches("pad", one, one, row, one)


def _policy(plan: Plan) -> str:
    return "none" if plan.policy is None else policy_name(plan.policy)
