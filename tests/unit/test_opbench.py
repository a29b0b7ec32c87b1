"""Timed operations of a decode step: what they cost, compute and leave behind, and the numbers of their tables."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from hybridlab import cli, kernelbench, kernellab, kernels, kerneltables, models, opbench, records, tiles
from hybridlab.config import BenchConfig
from hybridlab.errors import ConfigError, MeasureError, ModelError, RunError
from hybridlab.opbench import Sizes

CPU = torch.device("cpu")
TOY = Sizes(hidden=8, inner=12, heads=4, kv_heads=2, dim=4, vocabulary=10, window=0, normed=False, scale=0.5)
CONFIG: dict[str, Any] = {"model": "tiny", "device": "cpu", "lengths": [1, 40], "repeats": 6, "seed": 3}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of 256 KiB: seconds instead of a minute."""
    monkeypatch.setattr(opbench, "CPU_CACHE", 2**18)
    monkeypatch.setattr(tiles, "MOST_COPIES", 8)
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setenv("HYBRIDLAB_RUNS", str(tmp_path / "runs"))


# ---- what an operation costs -----------------------------------------------------------------------------------------

def test_bytes_and_flops_are_those_counted_by_hand() -> None:
    """A floor that forgets a matrix, the residual that is read, or the row that is written."""
    found = {(case.op, case.context): case for case in opbench.cases(TOY, [1, 3], 2)}
    assert {key: (case.rows, case.depth, case.bytes, case.flops) for key, case in found.items()} == {
        ("project qkv", 0): (32, 8, 2 * (32 * 8 + 8 + 8 + 32), 2 * 32 * 8),
        ("attend_next", 1): (16, 4, 2 * (32 + 8 + 16 + 16) + 8, 4 * 16 * 1),          # qkv, cos and sin, row, out
        ("attend_next", 3): (16, 4, 2 * (32 + 8 + 16 + 16 + 2 * 16) + 8, 4 * 16 * 3),  # and two earlier rows
        ("residual output", 0): (8, 16, 2 * (8 * 16 + 16 + 8 + 8), 2 * 8 * 16),
        ("swiglu", 0): (12, 8, 2 * (2 * 12 * 8 + 8 + 8 + 12), 4 * 12 * 8),
        ("residual down", 0): (8, 12, 2 * (8 * 12 + 12 + 8 + 8), 2 * 8 * 12),
        ("project head", 0): (10, 8, 2 * (10 * 8 + 8 + 8 + 10), 2 * 10 * 8),
        ("greedy", 0): (1, 10, 48, 0),
        ("attend", 1): (16, 4, 2 * (32 + 16 + 16) + 8, 64), ("attend", 3): (16, 4, 2 * (32 + 16 + 16 + 32) + 8, 192)}
    assert {op for op, _ in found} == set(kerneltables.OPS)


def test_a_window_and_norms_of_heads_are_counted() -> None:
    """A context of thousands charged to attention that keeps the last two rows."""
    (_, case, *_) = opbench.cases(TOY._replace(window=2, normed=True), [100], 2)
    assert (case.bytes, case.flops) == (2 * (32 + 16 + 16 + 16 + 16) + 8, 4 * 16 * 2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_weights_but_the_embedding(tied: bool) -> None:
    """A head that is left out as its weights are the embedding's, or an embedding that no step reads whole."""
    config = AutoConfig.for_model("llama", vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=4, tie_word_embeddings=tied)
    weights = 2 * (32 * 8 + 8 * 16 + 3 * 12 * 8 + 2 * 8) + 8 + 10 * 8
    found = kernellab._step_costs(AutoModelForCausalLM.from_config(config, dtype=torch.float32), 3)
    matrices = weights - 2 * 2 * 8 - 8
    assert found == {"rows": 10, "depth": 8, "bytes": 4 * (weights + 2 * 3 * 16), "flops":
                     2 * matrices + 2 * 4 * 16 * 3}


# ---- what is timed ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [TOY, TOY._replace(window=2, normed=True)], ids=["plain", "window, normed"])
def test_variants_compute_the_same(sizes: Sizes) -> None:
    """A time of stock PyTorch that leaves out the norm, the rotation, the residual or the scale."""
    with torch.no_grad():
        for case in opbench.cases(sizes, [1, 3], 4):
            work = opbench.work(case, sizes, 64, CPU, torch.float32)
            exact = work.exact().double().clone()
            for variant in opbench.variants(case, ["torch", "kernel"]):
                torch.testing.assert_close(work.result(variant).double(), exact, rtol=1e-4, atol=1e-5, msg=str(case))
                opbench.require_right(work, variant)


def test_every_copy_is_called_and_no_two_share_memory() -> None:
    """A graph that finds the weights of its last launch in the cache."""
    with torch.no_grad():
        for case in opbench.cases(TOY, [3], 4):
            work = opbench.work(case, TOY, 64, CPU, torch.float32)
            assert work.copies == 8
            calls = opbench.calls(work, "torch")
            assert len(calls) == tiles.LAUNCHES
            places = [tuple(t.data_ptr() for t in call.args if t.numel()) for call in calls]
            assert len(set(places)) == 8
            assert places[:8] * 4 == places
        attention = opbench.work(opbench.cases(TOY, [3], 4)[1], TOY, 64, CPU, torch.float32)
        first, second = (attention.caches[i][0] for i in (0, 1))
        assert second[0, 0, 0].data_ptr() > first[0, 0, -1].data_ptr()


def test_wrong_work_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast kernel that computes nothing."""
    work = opbench.work(opbench.cases(TOY, [1], 4)[0], TOY, 64, CPU, torch.float32)
    monkeypatch.setattr(work, "call", lambda *_: lambda: None)
    with pytest.raises(MeasureError, match="wrong result"):
        opbench.require_right(work, "kernel")


def test_a_token_is_right_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbour of the right token taken for nearly right; token 0 for wrong, as nothing is a share of it."""
    case = next(case for case in opbench.cases(TOY, [1], 4) if case.kind == "greedy")
    work = opbench.work(case, TOY, 64, CPU, torch.float32)
    work.logits.zero_()[:, 0] = 1
    opbench.require_right(work, "kernel")
    work.logits[:, 5] = 2
    monkeypatch.setattr(work, "exact", lambda: torch.tensor([6.0], dtype=torch.float64))
    with pytest.raises(MeasureError, match=r"token \[5\], not \[6"):
        opbench.require_right(work, "kernel")


def test_kernels_alone_start_early() -> None:
    """An unfused operation timed twice under two names."""
    both = {case.op: opbench.variants(case, ["torch", "kernel", "kernel, pdl"]) for case in opbench.cases(TOY, [1], 2)}
    assert [op for op, names in both.items() if len(names) == 2] == ["greedy", "attend"]


# ---- a run -----------------------------------------------------------------------------------------------------------

def cells(rows: pd.DataFrame) -> pd.Series:
    return rows.groupby(["metric", "op", "context", "variant"])["ms"].size()


def test_a_run_has_a_row_for_each_replay_and_its_order_is_seeded() -> None:
    """A variant that is timed less often, all of one before all of another, or another order of the same seed."""
    found = kernelbench.run(CONFIG, progress=False)
    rows = found.rows
    assert (found.status, found.reason, found.kind) == ("complete", "", "kernels")
    assert found.recorded.extra["during"]["readings"] > 0
    counts = cells(rows)
    assert set(counts) == {6}
    assert len(counts) == (6 + 2 * 2) * 2 + (6 + 2 * 2 + 2) + 2 * 3
    assert (rows[["ms", "us", "bytes"]] > 0).all(axis=None)
    assert (rows["us"] - 1e3 * rows["ms"] / rows["calls"]).abs().max() < 1e-9
    assert rows["order"].tolist() == list(range(len(rows)))
    swiglu = rows[(rows["op"] == "swiglu") | (rows["variant"] == "swiglu")]
    rounds = [tuple(swiglu["variant"].iloc[i:i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(one) == ["kernel", "swiglu", "torch"] for one in rounds)
    assert len(set(rounds)) > 1
    names = ["metric", "op", "context", "variant"]
    again = kernelbench.run(CONFIG, progress=False).rows
    assert again[names].equals(rows[names])
    assert not kernelbench.run(CONFIG | {"seed": 4}, progress=False).rows[names].equals(rows[names])
    launched = kernelbench.steps(found.path).groupby("variant")["kernels"].first()
    assert launched["fused"] == launched["fused, no graph"] == 4 * 5 + 4 < launched["torch"]
    assert len(kernelbench.grids(found)) == 2


def test_a_broken_operation_is_named_and_the_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel that does not compile takes an hour of rows with it, or is passed over in silence."""
    real = kernels.bind

    def broken(name: str, args: tuple[Any, ...]) -> Any:
        if name == "swiglu":
            raise RuntimeError("no such instruction")
        return real(name, args)

    monkeypatch.setattr(kernels, "bind", broken)
    found = kernelbench.run(CONFIG, progress=False)
    assert found.status == "failed"
    assert "swiglu, kernel: RuntimeError: no such instruction" in found.reason
    assert "step, fused: " in found.reason
    there = {(op, variant) for _, op, _, variant in cells(found.rows).index}
    assert ("swiglu", "kernel") not in there
    assert {("swiglu", "torch"), ("project qkv", "kernel"), ("greedy", "kernel"), ("step", "torch")} <= there
    assert set(cells(found.rows)) == {6}


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"lengths": [0]}, ConfigError, "lengths is"), ({"lengths": [5, 100000]}, ConfigError, "a context of 100000"),
    ({"lengths": [5, 5]}, ConfigError, "lengths holds a value twice"), ({"repeats": 0}, ConfigError, "repeats is 0"),
    ({"variants": ["kernels"]}, ConfigError, "did you mean 'kernel'"), ({"variants": []}, ConfigError, "variants is"),
    ({"variants": ["kernel, pdl"]}, ConfigError, "cannot run here"), ({"length": [1]}, ConfigError, "'lengths'"),
    ({"lengths": []}, ConfigError, "lengths is"),
    ({"model": "random:tiny-lama"}, ModelError, "tiny-lama"), ({"device": "gpu"}, ConfigError, "device 'gpu'"),
    ({"model": "random:tiny-gpt2"}, (ConfigError, ModelError), "gpt2"), ({"dtype": "int8"}, ConfigError, "dtype"),
])
def test_bad_input_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any],
                                              error: Any, message: str) -> None:
    """A typo that shows after minutes of timing, or an empty run directory."""
    monkeypatch.setattr(opbench, "work", lambda *_: pytest.fail("a weight was made"))
    monkeypatch.setattr(opbench, "reading", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(error, match=message):
        kernelbench.run(CONFIG | change, progress=False)
    assert not (tmp_path / "runs").exists()


def test_default_lengths_end_with_the_context() -> None:
    """A default that no short model can run, or that asks for a cache of 128 k rows."""
    assert kernelbench.plan({"model": "tiny", "device": "cpu"}).lengths == (1, 100, 500, 1024)
    assert kernelbench.plan(BenchConfig(model="random:llama-2-7b", device="cpu")).lengths == (1, 100, 500, 4096)


def test_the_command_refuses_and_explains() -> None:
    """A help without its options, or a refusal with the exit code of a failure."""
    runner, env = CliRunner(), {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    shown = runner.invoke(cli.app, ["bench", "--help"], env=env)
    assert all(word in shown.output for word in ("--length", "--variant", "hybridlab bench tiny"))
    refused = runner.invoke(cli.app, ["bench", "tiny", "--device", "cpu", "--length", "99999"], env=env)
    assert refused.exit_code == 2


# ---- the tables ------------------------------------------------------------------------------------------------------

def made() -> Any:
    """Two variants of one operation and a step, at times that divide well; the read takes 4 µs for 8,000 bytes."""
    def rows(metric: str, op: str, variant: str, us: list[float], size: int, kernels: int | None = None) -> list[Any]:
        return [{"metric": metric, "op": op, "variant": variant, "rows": 2, "depth": 3, "context": 7, "calls": 1,
                 "kernels": kernels, "ms": t / 1e3, "us": t, "bytes": size, "flops": 12, "order": i}
                for i, t in enumerate(us)]

    every = [*rows("op", "attend", "torch", [20.0] * 7, 16_000),
             *rows("op", "attend", "kernel", [7.0, 8, 9, 10, 11, 12, 13], 16_000),
             *rows("read", "read", "attend", [4.0] * 7, 8_000), *rows("read", "read", "step", [2.0] * 7, 8_000),
             *rows("step", "step", "torch", [50.0] * 5, 40_000, 8),
             *rows("step", "step", "fused", [30.0] * 5, 40_000, 4)]
    return SimpleNamespace(kind="kernels", rows=pd.DataFrame(every).astype({"kernels": "Int64"}))


def test_the_table_says_what_its_rows_say() -> None:
    """A share of the wrong read, a floor in other units, or a ratio upside down."""
    line = kernelbench.table(made()).set_index("variant").loc["kernel"]
    assert (line["n"], line["us"], line["us_low"], line["us_high"]) == (7, 10.0, 7.0, 13.0)
    assert (line["ratio"], line["gbs"], line["read_gbs"]) == pytest.approx((2.0, 1.6, 2.0))
    assert (line["floor_us"], line["share"]) == pytest.approx((8.0, 0.8))


def test_the_step_says_what_each_kernel_loses() -> None:
    """Time lost at boundaries taken from the whole step, or an interval that five replays do not allow."""
    found = kernelbench.steps(made()).set_index("variant")
    assert found["floor_us"].tolist() == pytest.approx([10.0, 10.0])  # 40,000 bytes at 4 GB/s
    assert found["lost_us"].to_dict() == pytest.approx({"fused": 5.0, "torch": 5.0})
    assert found["us_low"].isna().all()
    assert [grid.title for grid in kernelbench.grids(made())] == ["Operations of a decode step", "The whole step"]


def test_a_run_of_another_kind_is_refused() -> None:
    """A table of nothing, or a KeyError, from the rows of an ablation."""
    with pytest.raises(RunError, match="of kind ablation"):
        kernelbench.table(SimpleNamespace(kind="ablation", run_id="r"))  # type: ignore[arg-type]


def test_models_are_loaded_after_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the model and those of the copies in memory at once; a model that does not load takes the rows."""
    monkeypatch.setattr(models, "load", lambda *_, **__: (_ for _ in ()).throw(ModelError("no weights")))
    found = kernelbench.run(CONFIG | {"lengths": [1]}, progress=False)
    assert "step: ModelError: no weights" in found.reason
    assert set(found.rows["metric"]) == {"op", "read"}
