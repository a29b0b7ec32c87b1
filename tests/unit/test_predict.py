"""Predictions: the stated formulas exactly, what must hold on any machine, and a machine measured here."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlab import bench, costs, machine, ops, predict, stats
from hybridlab.bench import Launching, Reading
from hybridlab.config import POLICIES, Policy
from hybridlab.errors import ConfigError, PlanError
from hybridlab.machine import Machine
from hybridlab.partitioning import partition
from hybridlab.plan import Op, Plan, Segment
from hybridlab.tape import Tape

MODEL, LAYERS, LENGTH = "random:tiny-llama-3", 2, 64
US = 1e-3  # ms


def a_machine(device: str = "cpu", **changes: Any) -> Machine:
    """Every number another one, so that a wrong one shows."""
    launching = Launching(1, forward_us=100.0, eager_op_us=7.0, jit_launch_us=30.0, graph_node_us=2.0,
                          graph_jit_us=11.0, plain_attend_gbs=0.5, jit_attend_gbs=0.25,
                          plain_row_us=2 / LENGTH, jit_row_us=4 / LENGTH)
    values: dict[str, Any] = {"name": "made up", "device": device, "dtype": "float32", "threads": 1,
                              "matmul_tflops": 1e-3, "graph_launch_us": 5.0, "read_back_us": 3.0,
                              "readings": (Reading(1, 4.0, 2.0),), "launchings": (launching,)}
    return Machine(**{**values, **changes})


def a_plan(policy: Policy | None, *segments: Segment) -> Plan:
    """A product bound by bytes (2000 / 2 GB/s: 1 µs), one by FLOPs (5000 at 1 GFLOP/s: 5 µs), and between them, if the
    plan is lowered, an attention of 1000 bytes: 2 µs plain and 4 µs JIT."""
    def op(name: str, segment: str, path: str, **cost: int) -> Op:
        return Op(name.partition(".")[2], f"{name}.default", None, "", "static", "", segment=segment, path=path, **cost)

    product = [("aten.mm", {"flops": 10, "bytes": 2000, "launches": 1}), ("aten.bmm", {"flops": 5000, "launches": 1})]
    attend = [("hybridlab.attend", {"bytes": 1000, "launches": 4})]
    named = [product[0], *(attend if policy else []), product[1]]
    placed = segments if len(segments) == len(named) else segments * len(named)
    made = tuple(op(name, s.name, s.path, **cost) for (name, cost), s in zip(named, placed, strict=True))
    return Plan("made up", "decode", policy, LENGTH, made, tuple(dict.fromkeys(placed)))


GRAPH = Segment("graph", "graph", "")
PIECES = (Segment("graph 0", "graph", ""), Segment("attention", "jit", ""), Segment("graph 1", "graph", ""))
STOCK = a_plan(None, Segment("step", "eager", ""))
WHOLE, PIECEWISE = a_plan(POLICIES["full"], GRAPH), a_plan(POLICIES["piecewise"], *PIECES)
FIXED = predict.plain_launches("prepare", "decode") + predict.plain_launches("sample", "decode")


@pytest.mark.parametrize(("plan", "arm", "launches", "host", "device"), [
    (STOCK, "eager", 2 + FIXED, 100 + 7 * (2 + FIXED), 1 + 5),
    (WHOLE, "jit", 3, 100 + 7 * 2 + 30, 1 + 4 + 5),
    (WHOLE, "graph", 1, 5, 2 * 6 + 1 + 2 + 5),
    (WHOLE, "hybrid", 1, 5, 2 * 2 + 11 + 1 + 4 + 5),
    (PIECEWISE, "graph", 2 + 4, 2 * 5 + 4 * 7, 2 * 2 + 1 + 2 + 5),
    (PIECEWISE, "hybrid", 2 + 1, 2 * 5 + 30, 2 * 2 + 1 + 4 + 5),
])
def test_a_step_on_a_cpu_is_the_stated_sum(plan: Plan, arm: str, launches: int, host: float, device: float) -> None:
    """A term forgotten or counted twice: the formulas of the module's docstring, by hand."""
    found = predict.predict(plan, a_machine(), arm)
    assert found.launches == launches
    assert (found.host_ms, found.device_ms) == pytest.approx((host * US, device * US))
    assert found.step_ms == pytest.approx((host + device + 3) * US)


def test_a_gpu_works_while_its_host_launches() -> None:
    """On a GPU the longer of the two counts, and a device cannot end before its last kernel is launched."""
    host_bound, device_bound = a_machine("cuda"), a_machine("cuda", matmul_tflops=1e-6)
    stock = predict.predict(STOCK, host_bound, "eager")
    assert stock.step_ms == pytest.approx(stock.host_ms + 3 * US)
    # the graph is launched at 5 µs; its products take 5000 µs and 10 µs, attention 4 µs, and there are 4 kernels
    whole = predict.predict(WHOLE, device_bound, "hybrid")
    assert whole.step_ms == pytest.approx((10 + 4 + 5000 + 2 * 2 + 2 * 11 + 3) * US)
    # the first graph ends at 5 µs; the host has launched both Triton kernels at 65 µs; the second graph takes 2 + 5 µs
    pieces = predict.predict(PIECEWISE, host_bound, "hybrid")
    assert pieces.launches == 2 + costs.jit_launches("attend")
    assert pieces.step_ms == pytest.approx((65 + 2 + 5 + 3) * US)


def test_the_table_has_a_row_an_arm_and_policy() -> None:
    """Arms without graphs are not repeated, launches fall from piecewise to whole to full, which is one."""
    table = predict.table(MODEL, a_machine(), length=LENGTH)
    assert list(table["arm"]) == ["eager", *["graph"] * 3, "jit", *["hybrid"] * 3]
    rows = {(row.arm, row.policy): row.launches for row in table.itertuples()}
    graphs = LAYERS + 1
    attend = next(o.launches for o in partition(MODEL, length=LENGTH).ops if o.role == "attention")
    assert [rows["hybrid", policy] for policy in ("piecewise", "whole", "full")] == [graphs + LAYERS + 2, 3, 1]
    assert [rows["graph", policy] for policy in ("piecewise", "whole", "full")] == [
        graphs + LAYERS * attend + FIXED, 1 + FIXED, 1]
    assert rows["eager", ""] > rows["graph", "piecewise"]


def test_one_name_is_a_choice_too() -> None:
    """A policy or an arm taken for a list of letters."""
    table = predict.table(MODEL, a_machine(), arms="hybrid", policies="whole", length=LENGTH)
    assert table[["arm", "policy"]].values.tolist() == [["hybrid", "whole"]]


def test_the_parts_add_up_to_the_step() -> None:
    """A table by segment that says something else than the sum above it."""
    found = predict.predict(partition(MODEL, "piecewise", length=LENGTH), a_machine(), "hybrid")
    table = found.table()
    assert list(table["segment"][:3]) == ["prepare", "graph 0", "attention 0"]
    assert table["launches"].sum() == found.launches
    assert table["host_ms"].sum() + table["device_ms"].sum() == pytest.approx(found.step_ms - 3 * US)


@pytest.mark.parametrize(("plan", "arm"), [(STOCK, "hybrid"), (WHOLE, "eager")])
def test_a_plan_that_the_arm_does_not_run_is_refused(plan: Plan, arm: str) -> None:
    """The stock step predicted as arm hybrid would be a number without a meaning."""
    with pytest.raises(PlanError, match=f"arm {arm} does not run this plan"):
        predict.predict(plan, a_machine(), arm)


def test_the_error_is_relative_to_what_was_measured() -> None:
    """A sign or a base that is the other way round."""
    assert stats.error(3.0, 2.0) == 0.5
    assert stats.error(1.0, 2.0) == -0.5


positive, cost = st.floats(1e-3, 1e6), st.floats(0, 1e5)
readings = st.lists(st.builds(Reading, st.integers(1, 2**40), positive, positive), min_size=1, max_size=4)
launchings = st.lists(st.builds(Launching, st.integers(1, 2**40), cost, cost, cost, cost, cost, positive, positive,
                                cost, cost),
                      min_size=1, max_size=3)
machines = st.builds(
    Machine, name=st.text(max_size=9), device=st.sampled_from(["cpu", "cuda"]), dtype=st.just("float16"),
    threads=st.integers(1, 64), matmul_tflops=positive, graph_launch_us=cost, read_back_us=cost,
    readings=readings.map(lambda found: tuple({r.bytes: r for r in sorted(found, key=lambda r: r.bytes)}.values())),
    launchings=launchings.map(lambda found: tuple({r.bytes: r for r in sorted(found, key=lambda r: r.bytes)}.values())))
CASES = [(STOCK, "eager"), (WHOLE, "jit"), (WHOLE, "graph"), (WHOLE, "hybrid"), (PIECEWISE, "graph"),
         (PIECEWISE, "hybrid")]


@settings(max_examples=60, deadline=None)
@given(found=machines)
def test_a_machine_survives_json(found: Machine) -> None:
    """A number lost or rounded on the way to a file."""
    assert Machine.from_json(found.to_json()) == found


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"name": 1}', b"\xff"])
def test_what_is_no_machine_is_refused(text: str | bytes) -> None:
    """A file of something else must not become a machine with defaults."""
    with pytest.raises(ConfigError, match="this text is no machine"):
        Machine.from_json(text)


@pytest.mark.parametrize("change", [{"matmul_tflops": 0.0}, {"graph_launch_us": -1.0}, {"readings": []}, {"extra": 1},
                                    {"device": "tpu"}, {"read_back_us": math.nan}])
def test_impossible_numbers_are_refused(change: dict[str, Any]) -> None:
    """A rate of zero divides by zero far from where it came in."""
    values = {**msgspec.to_builtins(a_machine()), **change}
    with pytest.raises(ConfigError, match="this text is no machine"):
        Machine.from_json(msgspec.json.encode(values))


@settings(max_examples=60, deadline=None)
@given(found=machines, case=st.sampled_from(CASES))
def test_no_step_is_faster_than_its_floor(found: Machine, case: tuple[Plan, str]) -> None:
    """A floor above a prediction would be no floor."""
    step = predict.predict(case[0], found, case[1])
    assert 0 < step.floor_ms <= step.step_ms * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(found=machines, case=st.sampled_from(CASES), factor=st.floats(1, 100))
def test_a_better_machine_is_never_slower(found: Machine, case: tuple[Plan, str], factor: float) -> None:
    """More bandwidth, more arithmetic or cheaper launches must not lengthen a step."""
    faster = msgspec.structs.replace(found, matmul_tflops=found.matmul_tflops * factor, readings=tuple(
        Reading(r.bytes, r.read_gbs * factor, r.gemv_gbs * factor) for r in found.readings))
    cheaper = msgspec.structs.replace(faster, graph_launch_us=found.graph_launch_us / factor, launchings=tuple(
        Launching(one.bytes, *(v / factor for v in msgspec.structs.astuple(one)[1:6]),
                  one.plain_attend_gbs * factor, one.jit_attend_gbs * factor, one.plain_row_us / factor,
                  one.jit_row_us / factor) for one in found.launchings))
    times = [predict.predict(case[0], m, case[1]).step_ms for m in (found, faster, cheaper)]
    assert times[0] * (1 + 1e-9) >= times[1]
    assert times[1] * (1 + 1e-9) >= times[2]


def test_rates_are_those_of_the_working_set() -> None:
    """A model that fits the cache predicted from the rate of memory, or the other way round."""
    found = a_machine(readings=(Reading(100, 8.0, 6.0), Reading(10_000, 2.0, 4.0)))
    assert [found.gemv_gbs(size) for size in (1, 100, 1000, 10_000, 10**9)] == [6.0, 6.0, 5.0, 4.0, 4.0]
    assert found.peak_gbs(10_000) == 4.0  # the product read faster than the reduction: no floor may lie above it
    assert found.read_gbs == 2.0


@pytest.mark.parametrize(("arm", "attention"), [("graph", 2), ("hybrid", 4)])
def test_attention_on_a_gpu_goes_by_rows(arm: str, attention: int) -> None:
    """Attention predicted from the bytes of few heads, which a GPU reads no slower when there are many."""
    slow = msgspec.structs.replace(a_machine().launchings[0], plain_attend_gbs=1e-3, jit_attend_gbs=1e-3)
    found = predict.predict(WHOLE, a_machine("cuda", launchings=(slow,)), arm)
    nodes = 2 * 6 if arm == "graph" else 2 * 2 + 11 * 2
    assert found.device_ms == pytest.approx((nodes + 1 + attention + 5) * US)


def test_attention_reads_no_faster_than_memory() -> None:
    """A rate of attention measured in a cache must not undercut the memory that a larger step reads from."""
    one = msgspec.structs.replace(a_machine().launchings[0], plain_attend_gbs=1e3)
    found = predict.predict(WHOLE, a_machine(launchings=(one,)), "graph")
    assert found.device_ms == pytest.approx((2 * 6 + 1 + 0.5 + 5) * US)  # 1000 bytes at 2 GB/s


def test_a_custom_policy_is_predicted() -> None:
    """Operations left outside by name are launched one by one between the graphs."""
    plan = partition(MODEL, Policy(("mlp", "prepare", "sample")), length=LENGTH)
    found, whole = (predict.predict(p, a_machine(), "hybrid") for p in (plan, partition(MODEL, length=LENGTH)))
    outside = sum(o.launches for o in plan.ops if o.path == "eager")
    assert outside > 0
    assert found.launches == whole.launches - 1 + (LAYERS + 1) + outside


def test_prefill_is_bound_by_arithmetic() -> None:
    """A prompt's products cost their FLOPs, not the bytes of a decode step."""
    plan = partition(MODEL, phase="prefill", length=LENGTH)
    slow = predict.predict(plan, a_machine(matmul_tflops=1e-6), "hybrid")
    assert slow.floor_ms == pytest.approx(sum(o.flops for o in plan.ops) * US)  # at 1 FLOP a µs
    assert slow.step_ms > slow.floor_ms


def test_plain_launches_are_those_of_the_reference() -> None:
    """The kernels around a step are counted in the operations themselves: as many as their tapes replay."""
    one = torch.ones(1, dtype=torch.int64)
    advance = Tape(lambda: ops.advance(one, one[None], one))
    greedy = Tape(lambda: ops.greedy(torch.ones(9), one, one))
    assert predict.plain_launches("prepare", "decode") == len(advance) == 3
    constants = 1  # the -1 of a broken draw, which a tape keeps
    assert predict.plain_launches("sample", "decode") == len(greedy) + constants


def test_threads_are_put_back() -> None:
    """Measuring with other threads than the caller's must not leave them behind, also when it fails."""
    before = torch.get_num_threads()

    def fail() -> None:
        with machine._threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.get_num_threads() == before


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_TURNS", 2)
    monkeypatch.setattr(bench, "_WIDTHS", {"cpu": (32, 64)})
    monkeypatch.setattr(bench, "_SIZES", {"cpu": (64, (1, 2))})


@pytest.mark.usefixtures("quick")
def test_this_machine_is_measured() -> None:
    """Every number is positive and finite, and measuring leaves the random state as it was."""
    state = torch.get_rng_state()
    found = machine.measure("cpu", threads=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", 1)
    numbers = [found.matmul_tflops, found.graph_launch_us, found.read_back_us,
               *(value for part in (*found.readings, *found.launchings) for value in msgspec.structs.astuple(part))]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert all(one.eager_op_us > 0 and one.graph_node_us > 0 for one in found.launchings)
    assert Machine.from_json(found.to_json()) == found


@pytest.mark.parametrize(("values", "message"), [
    ({"device": "tpu"}, "device"), ({"dtype": "int8"}, "dtype"), ({"threads": 0}, "threads"),
    ({"threads": True}, "threads"),
])
def test_a_wrong_setting_is_refused_before_anything_is_timed(values: dict[str, Any], message: str) -> None:
    """A typing error must not cost the seconds that measuring takes."""
    with pytest.raises(ConfigError, match=message):
        machine.measure(**{"device": "cpu", **values})
