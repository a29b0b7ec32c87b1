"""Answers about kernels come from the rows: numbers are known beforehand here, and a missing variant is said."""

import pandas as pd
import pytest

from hybridlab import kernelanswers, kerneltables
from hybridlab.errors import StatisticsError

ALL = (kernelanswers.what_fusion_buys, kernelanswers.what_pdl_buys, kernelanswers.what_the_graph_buys,
       kernelanswers.where_the_time_goes)


def without(rows, *variants):
    return rows[~rows["variant"].isin(variants)]


def test_fusion_is_the_step_and_each_operation_against_torch(kernel_rows):
    """A median of other rows, times of unequal rounds subtracted, or a ratio upside down."""
    said = kernelanswers.what_fusion_buys(kernel_rows())
    assert ("the step at a context of 1: torch 5.00 [4.70, 5.30] ms (100 launches), fused 3.00 [2.70, 3.30] ms "
            "(20 launches): 2.00 [2.00, 2.00] ms less, 1.67 [") in said
    assert "the step at a context of 64: torch 6.00 [5.70, 6.30] ms" in said
    assert "project qkv: 20.0 [17.0, 23.0] µs, 2.00 [" in said
    assert "attend_next at a context of 64: 20.0 [17.0, 23.0] µs, 1.50 [" in said


def test_an_early_launch_is_compared_with_the_same_kernels(kernel_rows):
    """What fusing buys, credited to early launches."""
    said = kernelanswers.what_pdl_buys(kernel_rows())
    assert "fused, pdl 2.50 [2.20, 2.80] ms (20 launches): 0.500 [0.500, 0.500] ms less, 1.20 [" in said
    assert "project qkv: 4.00 [4.00, 4.00] µs less" in said
    assert "attend_next at a context of 1: 2.00 [2.00, 2.00] µs less" in said


def test_what_costs_is_not_called_a_gain(kernel_rows):
    """A sign lost on the way to the sentence."""
    rows = kernel_rows(steps={"torch": (5000.0, 100), "fused": (2500.0, 20), "fused, pdl": (3000.0, 20)},
                       calls={"kernel": 8.0, "kernel, pdl": 10.0})
    said = kernelanswers.what_pdl_buys(rows)
    assert "0.500 [0.500, 0.500] ms more, 0.833 [" in said
    assert "project qkv: 4.00 [4.00, 4.00] µs more" in said
    assert " less" not in said


def test_a_difference_within_its_interval_is_not_claimed(kernel_rows):
    """Noise sold as a gain."""
    rows = kernel_rows(steps={"fused": (3000.0, 20), "fused, pdl": (3000.0, 20)}, contexts={1: 0.0})
    early = (rows["variant"] == "fused, pdl") & (rows["metric"] == "step")
    rows.loc[early, "us"] = 6000 - rows.loc[early, "us"]  # turned round: differences from -600 to 600
    assert "not told apart, 0 ms [-0.6, 0.6] less" in kernelanswers.what_pdl_buys(rows)


def test_the_graph_is_compared_with_the_kernels_that_it_replays(kernel_rows):
    """What early launches buy, credited to the graph: without one, kernels begin early too where they can."""
    assert "8.00 [7.70, 8.30] ms (20 launches), fused, pdl 2.50 [2.20, 2.80] ms (20 launches): 5.50 [" in (
        kernelanswers.what_the_graph_buys(kernel_rows()))
    assert "fused 3.00 [2.70, 3.30] ms (20 launches): 5.00 [5.00, 5.00] ms less" in kernelanswers.what_the_graph_buys(
        without(kernel_rows(), "fused, pdl"))


def test_the_time_is_split_into_reading_and_launches(kernel_rows):
    """A floor in other units, a share upside down, or time lost over the wrong number of launches."""
    said = kernelanswers.where_the_time_goes(kernel_rows())
    assert "at a context of 1: 8.00 MB at 4.00 GB/s take 2.00 ms" in said
    assert "at a context of 64: 9.00 MB at 5.00 GB/s take 1.80 ms" in said
    assert "fused: 3.00 [2.70, 3.30] ms, 67 % of the read rate; 20 launches lose 50.0 µs each" in said
    assert "torch: 5.00 [4.70, 5.30] ms, 40 % of the read rate; 100 launches lose 30.0 µs each" in said


def test_a_missing_variant_is_said(kernel_rows):
    """An answer from rows that are not there would be invented."""
    rows = kernel_rows()
    assert "cannot start a kernel early" in kernelanswers.what_pdl_buys(without(rows, "kernel, pdl", "fused, pdl"))
    bare = rows[rows["variant"].isin(["torch"]) | (rows["metric"] == "read")]
    assert "not in these rows" in kernelanswers.what_fusion_buys(bare)
    assert "not in these rows" in kernelanswers.what_the_graph_buys(bare)
    assert "no whole step" in kernelanswers.where_the_time_goes(rows[rows["metric"] != "step"])


def test_few_replays_get_no_interval(kernel_rows):
    """An interval that three values cannot have."""
    said = "".join(answer(kernel_rows(n=3)) for answer in ALL)
    assert "torch 5.00 ms (100 launches), fused 3.00 ms (20 launches): 2.00 ms less." in said
    assert "[" not in said
    assert "nan" not in said


def test_the_short_answer_is_that_of_the_longest_context(kernel_rows):
    """A reading that mixes contexts, or that drops what was asked for."""
    said = kernelanswers.in_short(kernel_rows())
    assert "at a context of 1:" not in said
    assert all(word in said for word in ("fused 4.00", "0.500 [0.500, 0.500] ms less", "5.50 [5.50", "take 1.80 ms"))


@pytest.mark.parametrize("answer", ALL)
def test_several_runs_are_refused(answer, kernel_rows):
    """Numbers of two machines in one sentence compare nothing."""
    with pytest.raises(StatisticsError, match="2 runs"):
        answer(pd.concat([kernel_rows(), kernel_rows(run_id="r2")]))


def test_lines_stand_in_the_order_of_the_step_and_of_the_changes(kernel_rows):
    """A table in the order of the alphabet, or of the draw, hides what leads to what."""
    found = kerneltables.table(kernel_rows())
    assert found[["op", "context"]].drop_duplicates().to_numpy().tolist() == [
        ["project qkv", 0], ["attend_next", 1], ["attend_next", 64]]
    assert found["variant"].tolist() == ["torch", "kernel", "kernel, pdl"] * 3
    assert kerneltables.steps(kernel_rows())["variant"].tolist() == [
        "torch", "fused, no graph", "fused", "fused, pdl"] * 2
