"""The least work of a step by hand, the floor it has on a machine, and the rates that are measured for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hybridlab import bench, kernellab, models, roofline
from hybridlab.errors import ConfigError, RunError
from hybridlab.roofline import Floor, Work

CPU = torch.device("cpu")
TOY = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
       "head_dim": 4, "max_position_embeddings": 64, "tie_word_embeddings": False}
QKVO, MLP, NORMS, HEAD, ROW, KV = 384, 288, 16, 80, 8, 16  # numbers of one layer, of the head, and of one row
LIMITS = {"read_gbs": 2.0, "matmul_tflops": 0.004}


def build(kind: str = "llama", layers: int = 2, **changes: Any) -> PreTrainedModel:
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, **{**TOY, "num_hidden_layers": layers, **changes})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# ---- bytes and FLOPs -------------------------------------------------------------------------------------------------

def test_a_decode_step_is_counted_by_hand() -> None:
    """A matrix, a norm, the row of the embedding or the token's own row of the cache left out or counted twice."""
    weights = 2 * (QKVO + MLP + NORMS) + 8 + HEAD
    assert roofline.work(build(), context=3) == Work(4 * (weights + ROW + 2 * 3 * KV),
                                                     2 * (2 * (QKVO + MLP) + HEAD) + 2 * 4 * 16 * 3)


def test_a_prefill_is_counted_by_hand() -> None:
    """Logits of every row, pairs that the causal mask hides, or weights read once a token."""
    weights = 2 * (QKVO + MLP + NORMS) + 8 + HEAD
    assert roofline.work(build(), prompt_tokens=3) == Work(
        4 * (weights + 3 * ROW + 2 * 3 * KV), 3 * 2 * 2 * (QKVO + MLP) + 2 * HEAD + 2 * 4 * 16 * 6)
    assert roofline.work(build(), prompt_tokens=1) == roofline.work(build(), context=1)


def test_tied_embeddings_are_read_as_the_head() -> None:
    """A head that is left out as a table, or read twice."""
    tied, loose = (roofline.work(build(tie_word_embeddings=tie), context=3) for tie in (True, False))
    assert tied == Work(loose.bytes - 4 * ROW, loose.flops)


def test_a_window_ends_what_is_read_and_attended() -> None:
    """A context of thousands charged to layers that keep the last two rows."""
    model, plain = build("mistral", sliding_window=2), build("mistral", sliding_window=None)
    assert roofline.work(model, context=50) == roofline.work(plain, context=2)
    short, long = (roofline.work(model, prompt_tokens=n) for n in (2, 5))
    assert long.bytes - short.bytes == 4 * 3 * ROW                                   # the window's rows are kept
    assert long.flops - short.flops == 3 * 4 * (QKVO + MLP) + 2 * 4 * 16 * (9 - 3)  # 1 + 2 + 2 + 2 + 2 pairs


def test_layers_of_one_model_may_differ_in_their_window() -> None:
    """The first layer's window taken for all."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2}
    works = [roofline.work(build("gemma3_text", **kinds), context=n) for n in (2, 10)]
    assert works[1].bytes - works[0].bytes == 4 * 8 * KV
    assert works[1].flops - works[0].flops == 8 * 4 * 16


def test_of_experts_only_the_chosen_are_read() -> None:
    """All four experts read, or a router cut like the experts, whose first dimension is theirs."""
    model = build("mixtral", layers=1, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    matrices = QKVO + 4 * 8 + 2 * MLP
    assert roofline.work(model, context=1) == Work(4 * (matrices + NORMS + 8 + HEAD + ROW + KV),
                                                   2 * (matrices + HEAD) + 4 * 16)
    assert roofline.work(model, prompt_tokens=3).flops == 3 * 2 * matrices + 2 * HEAD + 4 * 16 * 6


def test_a_table_of_positions_gives_a_row_and_biases_are_read() -> None:
    """All of a table read at every step; biases forgotten, or counted as matrices."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "gpt2", vocab_size=10, n_embd=8, n_head=2, n_layer=1, n_inner=12, n_positions=16), dtype=torch.float32)
    matrices, biases, norms, heads = 8 * 24 + 8 * 8 + 2 * 8 * 12, 24 + 8 + 12 + 8, 3 * 16, 10 * 8
    assert roofline.work(model, context=2) == Work(4 * (matrices + biases + norms + heads + 8 + 2 * 16),
                                                   2 * (matrices + heads) + 4 * 8 * 2)


def test_llama_2_7b_needs_what_is_known_of_it() -> None:
    """13.2 GB a token and 12.95 GFLOP a token of prompt; bytes of a step other than those recorded with kernels."""
    model = models.skeleton("random:llama-2-7b").half()
    for context, megabytes in ((1, 13215), (500, 13477)):
        found, recorded = roofline.work(model, context=context), kernellab._step_costs(model, context)
        assert round(found.bytes / 1e6) == megabytes
        assert found == Work(recorded["bytes"] + 2 * 4096, recorded["flops"])  # and the row of the embedding
    one, two = (roofline.work(model, prompt_tokens=n).flops for n in (1, 2))
    assert two - one == 12_952_010_752 + 2 * 32 * 4 * 4096
    assert one == 12_952_010_752 + 2 * 32000 * 4096 + 32 * 4 * 4096


def test_every_dtype_has_its_own_bytes_and_weights_are_not_touched() -> None:
    """Half-precision weights counted as float32; a loaded model left on the meta device or with other experts."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TOY, num_hidden_layers=2),
                                             dtype=torch.float16)
    before, pad = {name: p.data_ptr() for name, p in model.named_parameters()}, model.config.pad_token_id
    assert 2 * roofline.work(model, context=3).bytes == roofline.work(build(), context=3).bytes
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert model.config.pad_token_id == pad


@pytest.mark.parametrize("rope", ["dynamic", "yarn"])
def test_rotations_that_look_at_positions_are_no_obstacle(rope: str) -> None:
    """A run that fails as its model's rotation cannot be computed without memory."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    assert roofline.work(build(rope_parameters=parameters), context=3) == roofline.work(build(), context=3)


@pytest.mark.parametrize("given", [{}, {"context": 0}, {"prompt_tokens": -1}, {"context": 1, "prompt_tokens": 1}])
def test_work_of_no_step_is_refused(given: dict[str, int]) -> None:
    """The work of nothing, or of two different steps, as if it were one's."""
    with pytest.raises(ConfigError, match="from 1 on"):
        roofline.work(build(), **given)


# ---- floors ----------------------------------------------------------------------------------------------------------

def test_the_slower_of_reading_and_computing_is_the_floor() -> None:
    """Sum instead of maximum, the wrong one named, or a unit off by a thousand."""
    assert roofline.floor_ms(Work(6_000_000, 4_000_000), LIMITS) == Floor(3.0, "memory")
    assert roofline.floor_ms(Work(2_000_000, 20_000_000), LIMITS) == Floor(5.0, "arithmetic")


def test_a_run_has_floors_of_all_that_it_times() -> None:
    """Positions that are not those of the rows, a length left out, or floors that do not survive the manifest."""
    model, limits = build(), LIMITS | {"turns": {"read": [2.0, 1.0]}}
    stored = json.loads(json.dumps(roofline.of_run(model, (3, 20), 4, limits)))
    assert stored["limits"] == limits
    found = roofline.floors({"roofline": stored})
    assert found is not None
    first = found[found["metric"] == "ttft"].set_index("prompt_tokens")
    for length in (3, 20):
        work = roofline.work(model, prompt_tokens=length)
        assert tuple(first.loc[length, ["bytes", "flops", "ms", "bound"]]) == (*work,
                                                                                *roofline.floor_ms(work, limits))
        gaps = found[(found["metric"] == "itl") & (found["prompt_tokens"] == length)]
        single = gaps[gaps["position"].notna()]
        assert single["position"].tolist() == [length + 1, length + 2, length + 3]
        wanted = [roofline.floor_ms(roofline.work(model, context=at), limits).ms for at in single["position"]]
        assert single["ms"].tolist() == wanted
        assert gaps.loc[gaps["position"].isna(), "ms"].tolist() == [pytest.approx(sum(wanted) / 3)]


def test_where_arithmetic_begins_to_bind_has_a_floor_of_its_own() -> None:
    """A line over the prompt length that cuts the corner of the roofline."""
    entries = roofline.of_run(build(), (1, 60), 1, LIMITS)["floors"]
    bounds = {entry["prompt_tokens"]: entry["bound"] for entry in entries}
    assert len(bounds) == 3
    (corner,) = set(bounds) - {1, 60}
    assert roofline.floor_ms(roofline.work(build(), prompt_tokens=corner - 1), LIMITS).bound == "memory"
    assert bounds == {1: "memory", corner: "arithmetic", 60: "arithmetic"}
    assert {entry["metric"] for entry in entries} == {"ttft"}  # one new token leaves no gap
    assert {e["prompt_tokens"] for e in roofline.of_run(build(), (1, 60), 1, LIMITS | {"matmul_tflops": 9.0})["floors"]
            } == {1, 60}


def test_few_positions_are_kept_and_with_them_the_one_that_fills_the_window() -> None:
    """A manifest of megabytes; a straight line past the corner where the rows that are read stop growing."""
    model = build("mistral", sliding_window=23)
    found = roofline.floors({"roofline": roofline.of_run(model, (2,), 1000, LIMITS)})
    assert found is not None
    kept = found["position"].dropna().tolist()
    assert len(kept) == roofline.POSITIONS + 1
    assert 23 in kept
    assert (kept[0], kept[-1]) == (3, 1001)


def test_older_runs_have_no_floors_and_damaged_ones_are_refused() -> None:
    """A table that fails on a run from before, or that shows what somebody wrote into a manifest."""
    assert roofline.floors({}) is None
    good = roofline.of_run(build(), (3,), 1, LIMITS)["floors"][0]
    changes: list[dict[str, Any]] = [{"ms": "<b>"}, {"ms": 0}, {"ms": float("inf")}, {"bound": "x"}, {"position": "1"}]
    for wrong in (*({"floors": [good | change]} for change in changes), {}, [], None):
        with pytest.raises(RunError, match="floors of this run"):
            roofline.floors({"roofline": wrong})


# ---- rates -----------------------------------------------------------------------------------------------------------

def test_each_rate_is_the_best_of_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean, a slowest turn, or turns that are thrown away."""
    monkeypatch.setattr(bench, "_SIZES", {"cpu": (64, (1, 2))})
    found = roofline.measure(CPU, torch.float32)
    assert found == json.loads(json.dumps(found))
    assert {name: len(values) for name, values in found["turns"].items()} == dict.fromkeys(
        ("read", "gemv", "copy", "matmul"), bench._TURNS - 1)
    assert found["read_gbs"] == max(found["turns"]["read"] + found["turns"]["gemv"])
    assert (found["copy_gbs"], found["matmul_tflops"]) == (max(found["turns"]["copy"]), max(found["turns"]["matmul"]))


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that counts one of its two directions, a product half of its FLOPs, bits for bytes."""
    monkeypatch.setattr(bench, "_SIZES", {"cpu": (64, (1, 2))})
    monkeypatch.setattr(bench.Bench, "turns_of", lambda self, *functions, calls: [[0.5] for _ in functions])
    found = bench.Bench(CPU, torch.float32).rates()
    assert found == {"read": [2 * 2**21 / 1e9], "gemv": [2 * 2**21 / 1e9], "copy": [2 * 2**21 / 1e9],
                     "matmul": [2 * 2 * 64**3 / 1e12]}


def test_a_working_set_of_an_odd_number_of_values_is_copied_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of unequal length: no run of a model that happens to have such a size."""
    monkeypatch.setattr(bench, "_SIZES", {"cpu": (64, (1, 2))})
    found = bench.Bench(CPU, torch.float32).rates(9 * 9 * 4)
    assert min(map(min, found.values())) > 0


def test_a_step_that_fits_a_cache_is_read_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor above the time that a small model takes, from a read rate of memory that it never waits for."""
    monkeypatch.setattr(bench, "_SIZES", {"cpu": (64, (1, 2))})
    rates = {None: {"read": [3.0], "gemv": [2.0], "copy": [1.0], "matmul": [1.0]},
             5000: {"read": [4.0], "gemv": [9.0], "copy": [8.0], "matmul": [8.0]}}
    monkeypatch.setattr(bench.Bench, "rates", lambda self, size=None: dict(rates[size]))
    found = roofline.measure(CPU, torch.float32, 5000)
    assert (found["read_gbs"], found["copy_gbs"], found["matmul_tflops"]) == (9.0, 1.0, 1.0)
    assert set(found["turns"]) == {"read", "gemv", "copy", "matmul", "cached_read", "cached_gemv"}
    assert roofline.measure(CPU, torch.float32, 2 * 2**20)["read_gbs"] == 3.0  # no cache holds it
