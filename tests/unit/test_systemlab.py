"""What serving costs beside latency: every value is one that can be worked out or counted otherwise."""

from contextlib import nullcontext

import pandas as pd
import pytest
import torch

import hybridlab as hl
from hybridlab import memory, models, overhead, systemlab
from hybridlab.config import SystemConfig
from hybridlab.errors import ConfigError, PromptError


@pytest.fixture(scope="module")
def model():
    return models.load("tiny")


def test_memory_is_what_the_tensors_hold(model):
    """Tied weights counted twice, or a cache counted at the length of a prompt, would be no memory that was taken."""
    with hl.Runtime(model, arm="graph", capture="sync", buckets=[16, 64], max_len=96) as runtime:
        rows = {row["step"]: row["value"] for row in memory.memory(runtime, [10, 50])}
        graph_bytes = runtime.counters.graph_bytes
    config, size = model.config, 4
    untied = sum(p.numel() for p in model.parameters()) * size
    assert untied <= memory.held(model) <= untied + 2**16  # and the table of rotations
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert rows["KV cache"] == 2 * config.num_hidden_layers * heads * dim * 96 * size / 2**20
    graphs = [name for name in rows if "graph" in name]
    assert graphs == ["graph of 64 rows", "graph of 16 rows", "decode graph"]
    assert sum(rows[name] for name in graphs) == pytest.approx(graph_bytes / 2**20)


def test_shared_storage_is_held_once():
    """An embedding that is also the head is in memory once."""
    one = torch.nn.Linear(8, 8, bias=False)
    two = torch.nn.Linear(8, 8, bias=False)
    two.weight = one.weight
    assert memory.held(torch.nn.ModuleList([one, two])) == 8 * 8 * 4


def test_observing_a_token_is_counted_in_parts(model):
    """A share of one part alone would call observing cheaper than it is."""
    with hl.Runtime(model, arm="graph", capture="sync", max_len=64) as runtime:
        rows = list(overhead.overhead(runtime, "graph"))
    by_step = {step: [row["value"] for row in rows if row["step"] == step] for step in {row["step"] for row in rows}}
    assert {len(values) for values in by_step.values()} == {overhead.TURNS}
    assert set(by_step["spans"]) == {3.0}  # decode, and inside it replay and sampling
    for turn in range(overhead.TURNS):
        parts = by_step["span"][turn] * 3 + by_step["stamp"][turn] + by_step["row"][turn]
        assert by_step["share"][turn] == pytest.approx(100 * parts / by_step["itl"][turn])
        assert min(by_step[step][turn] for step in ("span", "stamp", "row")) > 0


def test_a_run_records_its_parts_and_reads_them_back(tmp_path):
    """A table that cannot be made again from its rows is a claim."""
    result = systemlab.run({"parts": ["memory"], "arm": "graph", "lengths": [8]}, root=tmp_path, progress=False)
    assert result.status == "complete"
    weights, cache, prefill, decode = result.table()["step"]
    assert (weights, cache, decode) == ("weights", "KV cache", "decode graph")
    assert prefill.startswith("graph of ")  # its bucket follows from the roofline of the machine
    assert [row[0] for row in result.grid().rows] == ["memory"] * 4


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    """A directory of a run that never began is litter that looks like a run."""
    for config, error in (({"parts": ["memory", "memory"]}, ConfigError), ({"lengths": [100_000]}, PromptError),
                          ({"arm": "grph"}, ConfigError),
                          ({"parts": ["watching"], "policy": "attention"}, ConfigError)):
        with pytest.raises(error):
            systemlab.run(config, root=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    assert SystemConfig().parts == ("coldstart", "memory", "overhead", "ipc", "watching")


def test_the_cost_of_a_second_process_is_a_part(tmp_path, monkeypatch):
    """A ratio in words that is not the median of its rows; a part whose two runtimes are the same one."""
    made = []
    monkeypatch.setattr(systemlab, "_runtime", lambda config, process="here": nullcontext(made.append(process)))
    monkeypatch.setattr(systemlab.crossing, "crossing", lambda here, worker, seed: [
        [{"round": turn, "setting": setting, "step": "gap", "value": value + turn, "unit": unit}
         for setting, value, unit in (("here", 10.0, "ms"), ("worker / here", 1.25, "×"))] for turn in range(9)])
    result = systemlab.run({"parts": ["ipc"]}, root=tmp_path, progress=False)
    assert made == ["here", "worker"]
    said, *_ = result.reading().splitlines()
    assert said == "By the asker's clock a gap takes 5.25 times as long through a worker as here."
    assert result.recorded.extra["during"]["readings"] >= 1
    assert [row[:4] for row in result.grid().rows] == [["ipc here", "gap", "ms", "9"],
                                                       ["ipc worker / here", "gap", "×", "9"]]


def test_being_watched_is_a_part(tmp_path, monkeypatch):
    """A followed round beside the held one of another pair, first tokens among the gaps, or a ratio upside down."""
    held = [1, 2, 4, 7, 9, 10]  # one of every two rounds
    rows = pd.DataFrame([{"metric": metric, "arm": "eager", "round": number, "ms": ms}
                         for number in range(12) for metric, ms in (
                             ("ttft", 500.0), *(("itl", (2.0 if number in held else 3.0) * off * (1 + number // 2))
                                                for off in (1.0, 1.0, 7.0)))])
    monkeypatch.setattr(systemlab.looking, "watched", lambda explorer: (rows, held))
    result = systemlab.run({"parts": ["watching"], "arm": "graph"}, root=tmp_path, progress=False)
    by_step = {step: own["value"].tolist() for step, own in result.rows.groupby("step")}
    assert by_step == {"followed": [3.0 * n for n in range(1, 7)], "held": [2.0 * n for n in range(1, 7)],
                       "followed / held": [1.5] * 6}
    said, *_ = result.reading().splitlines()
    assert said == "A gap of eager takes 1.50 [1.50, 1.50] times as long while an Explorer follows it as unobserved."


def test_a_cold_start_says_what_serving_adds_to_loading(tmp_path, monkeypatch):
    """The difference of two medians, of which no process says that it took so long; or one state's stages with the
    other's."""
    took = {"warm": [(1000.0, 1400.0), (3000.0, 3100.0), (2000.0, 2600.0)], "cold": [(500.0, 9500.0)] * 3}
    rows = [{"caches": caches, "process": number, "stage": stage, "ms": 1.0, "total_ms": total}
            for caches, ends in took.items() for number, pair in enumerate(ends)
            for stage, total in zip(("model", "first token"), pair, strict=True)]
    monkeypatch.setattr(systemlab.coldstart, "run", lambda **_: rows)
    result = systemlab.run({"parts": ["coldstart"]}, root=tmp_path, progress=False)
    table = result.table()
    served = table[table["step"] == systemlab.SERVED]
    assert list(zip(served["setting"], served["value"], served["n"], strict=True)) == [("warm", 400.0, 3),
                                                                                       ("cold", 9000.0, 3)]
    assert len(result.rows) == 12  # it follows from the rows, and is none
    assert "With warm caches the first token is there 0.40 s after the weights were on the device." in result.reading()
