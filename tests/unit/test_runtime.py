"""The runtime: tokens equal in every arm, paths and counters that prove what ran, bad input refused first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hybridlab as hl
from hybridlab.config import ARMS
from hybridlab.errors import (
    CaptureFailed,
    ConfigError,
    EngineBusy,
    ModelError,
    NonFinite,
    PromptError,
    RuntimeClosed,
    StaleAddress,
)

LENGTHS = (1, 9, 10, 63, 64, 65, 127, 500)
NEW = 32


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return hl.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def runtimes(tiny: PreTrainedModel) -> Iterator[dict[str, hl.Runtime]]:
    """All four arms over one model, warm for every length."""
    made = {arm: hl.Runtime(tiny, arm=arm) for arm in ARMS}
    for runtime in made.values():
        runtime.warm_up(LENGTHS)
    yield made
    for runtime in made.values():
        runtime.close()


def prompt(model: PreTrainedModel, length: int) -> list[int]:
    """The first `length` tokens of text that the model was made for."""
    text = "The for statement is used to iterate over the elements of a sequence. " * 60
    return model.tokenizer(text, verbose=False)["input_ids"][:length]


def expected(model: PreTrainedModel, ids: list[int], new: int = NEW, **settings: Any) -> list[int]:
    given = torch.tensor([ids])
    settings = {"eos_token_id": None, **settings}
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, **settings)
    return out[0, len(ids):].tolist()


@pytest.fixture(scope="module")
def references(tiny: PreTrainedModel) -> dict[int, list[int]]:
    return {length: expected(tiny, prompt(tiny, length)) for length in LENGTHS}


@pytest.mark.parametrize("arm", ARMS)
def test_greedy_tokens_equal_generate(runtimes: dict[str, hl.Runtime], references: dict[int, list[int]], arm: str,
                                      tiny: PreTrainedModel) -> None:
    """A bucket, a position, a mask or a kernel that changes a token."""
    for length in LENGTHS:
        out = runtimes[arm].generate(prompt(tiny, length), max_new_tokens=NEW, stop=[])
        assert out.ids == references[length], f"prompt of {length}"


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}])
def test_arms_draw_the_same_tokens(runtimes: dict[str, hl.Runtime], settings: dict[str, Any],
                                   tiny: PreTrainedModel) -> None:
    """A draw that depends on anything but seed, position and logits; or one that ignores the seed."""
    drawn = {arm: [runtimes[arm].generate(prompt(tiny, 20), temperature=0.9, seed=seed, stop=[], **settings).ids
                   for seed in (0, 1, 2)] for arm in ARMS}
    assert drawn["graph"] == drawn["eager"]
    assert drawn["jit"] == drawn["eager"]
    assert drawn["hybrid"] == drawn["eager"]
    assert len({tuple(ids) for ids in drawn["eager"]}) == 3


@pytest.mark.parametrize(("arm", "path"), [("eager", "eager"), ("graph", "graph"), ("jit", "jit"), ("hybrid", "graph")])
def test_paths_and_counters_prove_what_ran(runtimes: dict[str, hl.Runtime], arm: str, path: str,
                                           tiny: PreTrainedModel) -> None:
    """A latency reported for a path that never ran; a capture or compilation inside a warm request."""
    runtime = runtimes[arm]
    before = runtime.counters.as_dict()
    out = runtime.generate(prompt(tiny, 64), max_new_tokens=20, stop=[])
    after = {name: value - before[name] for name, value in runtime.counters.as_dict().items()}
    assert out.paths == [path] * 20
    assert len(out.itl_ms) == 19
    assert all(out.reasons)
    replays = 20 if path == "graph" else 0
    assert (after["replays"], after["hits"], after["misses"]) == (replays, replays, 0)
    assert (after["captures"], after["compiles"], after["fallbacks"], after["graph_bytes"]) == (0, 0, 0, 0)


def test_replay_is_bit_equal_to_its_program(runtimes: dict[str, hl.Runtime], tiny: PreTrainedModel) -> None:
    """A graph whose logits differ from the same operations launched one by one."""
    for arm in ("graph", "hybrid"):
        executor = runtimes[arm]._executor
        runtimes[arm].generate(prompt(tiny, 127), max_new_tokens=3, stop=[])
        replayed = executor.logits.clone()
        with torch.no_grad():
            executor.program("decode", 1)()
        assert torch.equal(executor.logits, replayed)


@pytest.mark.parametrize(("capture", "first", "second"), [
    ("async", "jit", "graph"), ("sync", "graph", "graph"), ("never", "jit", "jit"), ("ahead", "graph", "graph"),
])
def test_capture_policies(tiny: PreTrainedModel, references: dict[int, list[int]], capture: str, first: str,
                          second: str) -> None:
    """A miss that waits although its policy is async, or tokens that differ between miss and hit."""
    with hl.Runtime(tiny, capture=capture, buckets=[64], max_len=256) as runtime:
        for path in (first, second):
            out = runtime.generate(prompt(tiny, 63), max_new_tokens=NEW, stop=[])
            assert out.ids == references[63]
            assert set(out.paths) == {path}
        assert runtime.counters.captures == (0 if capture == "never" else 2)
        assert runtime.counters["misses"] == {"async": NEW, "sync": 2, "never": 2 * NEW, "ahead": 0}[capture]


def test_ahead_leaves_no_bucket_out(tiny: PreTrainedModel) -> None:
    """The last bucket, which only prompts shorter than the cache can use, found uncaptured by the first such prompt."""
    with hl.Runtime(tiny, arm="graph", capture="ahead", buckets=[16, 48], max_len=48) as runtime:
        assert runtime.counters.captures == 3
        assert runtime.generate(prompt(tiny, 40), max_new_tokens=3, stop=[]).paths == ["graph"] * 3


def test_tokens_survive_eviction(tiny: PreTrainedModel, references: dict[int, list[int]]) -> None:
    """A recaptured graph that replays what its predecessor had baked in."""
    with hl.Runtime(tiny, arm="graph", capture="sync", cache_bytes=1, max_len=600) as runtime:
        for length in (9, 500, 9, 64, 500):
            assert runtime.generate(prompt(tiny, length), max_new_tokens=NEW, stop=[]).ids == references[length]
        assert (runtime.counters.captures, runtime.counters.evictions) == (6, 4)  # decode stays


def test_failed_capture_falls_back_and_says_why(tiny: PreTrainedModel, references: dict[int, list[int]],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """A request lost to a failed capture, or answered without saying that no graph ran."""
    def broken(*_: object) -> None:
        raise CaptureFailed("no graph today")

    monkeypatch.setattr("hybridlab.graphs.Tape", broken)
    with hl.Runtime(tiny, capture="sync", max_len=256) as runtime:
        out = runtime.generate(prompt(tiny, 64), max_new_tokens=NEW, stop=[])
        assert out.ids == references[64]
        assert set(out.paths) == {"jit"}
        assert all("no graph today" in reason for reason in out.reasons)
        assert runtime.counters.failures == 2
    with hl.Runtime(tiny, capture="sync", max_len=256, fallback="raise") as runtime, pytest.raises(CaptureFailed):
        runtime.generate([5, 6], max_new_tokens=2)


def test_a_prompt_beyond_every_bucket_is_served(tiny: PreTrainedModel, references: dict[int, list[int]]) -> None:
    """A bare StopIteration, or a prompt cut to the largest bucket."""
    with hl.Runtime(tiny, arm="graph", buckets=[16, 63], capture="sync", max_len=256) as runtime:
        out = runtime.generate(prompt(tiny, 64), max_new_tokens=NEW, stop=[])
        assert out.ids == references[64]
        assert (out.paths[0], out.bucket) == ("eager", None)
        assert "no bucket holds 64" in out.reasons[0]
        assert runtime.generate(prompt(tiny, 63), max_new_tokens=NEW, stop=[]).paths[0] == "graph"
        assert {rows for _, phase, rows in runtime._executor.programs if phase == "prefill"} <= {16, 63}


def test_a_prompt_may_fill_the_cache(tiny: PreTrainedModel) -> None:
    """The last row of the cache written out of bounds, or refused."""
    with hl.Runtime(tiny, arm="hybrid", buckets=[32], max_len=32, capture="sync") as runtime:
        ids = prompt(tiny, 31)
        assert runtime.generate(ids, max_new_tokens=1, stop=[]).ids == expected(tiny, ids, 1)
        short = prompt(tiny, 2)
        assert runtime.generate(short, max_new_tokens=30, stop=[]).ids == expected(tiny, short, 30)


def test_end_tokens_stop_as_in_generate(runtimes: dict[str, hl.Runtime], tiny: PreTrainedModel,
                                        references: dict[int, list[int]]) -> None:
    """A stop token lost, doubled, or ignored; stop=[] that still stops."""
    runtime, ids = runtimes["graph"], prompt(tiny, 64)
    end = references[64][5]
    cut = references[64][: references[64].index(end) + 1]
    assert runtime.generate(ids, max_new_tokens=NEW, stop=[end]).ids == cut
    assert expected(tiny, ids, eos_token_id=end) == cut
    assert runtime.generate(ids, max_new_tokens=NEW, stop=[]).ids == references[64]
    assert runtime.generate(ids, max_new_tokens=NEW).ids == expected(tiny, ids, eos_token_id=tiny.config.eos_token_id)


def test_stream_gives_what_generate_gives(runtimes: dict[str, hl.Runtime]) -> None:
    """Text pieces that do not add up, for instance where a character spans two tokens."""
    runtime, text = runtimes["hybrid"], "The for statement"
    tokens = list(runtime.stream(text, max_new_tokens=30))
    out = runtime.generate(text, max_new_tokens=30)
    assert [t.id for t in tokens] == out.ids
    assert "".join(t.text for t in tokens) == out.text
    assert [t.path for t in tokens] == out.paths
    assert all(t.ms > 0 for t in tokens)


@pytest.mark.parametrize(("ids", "arguments", "message"), [
    ([], {}, "empty"),
    ("", {}, "empty"),
    ([5] * 1000, {"max_new_tokens": 100}, "1024"),
    ([5, 2048], {}, r"prompt\[1\] is 2048"),
    ([5, -1], {}, r"prompt\[1\] is -1"),
    ([5, True], {}, "True"),
    ([5, 1.0], {}, "1.0"),
    ("\ud800", {}, "surrogate"),
    (7, {}, "int"),
    ([5], {"max_new_tokens": 0}, "max_new_tokens"),
    ([5], {"max_new_tokens": True}, "max_new_tokens"),
    ([5], {"stop": "x"}, "stop"),
    ([5], {"stop": [9999]}, r"stop\[0\]"),
    ([5], {"temperature": 1e-40}, "overflow"),
])
def test_bad_prompts_are_refused(runtimes: dict[str, hl.Runtime], ids: Any, arguments: dict[str, Any],
                                 message: str) -> None:
    """Work begun on input that cannot be served, or an error that does not name value and bound."""
    before = runtimes["hybrid"].counters.as_dict()
    with pytest.raises(PromptError, match=message):
        runtimes["hybrid"].generate(ids, **arguments)
    with pytest.raises(PromptError, match=message):
        runtimes["hybrid"].stream(ids, **arguments)
    assert runtimes["hybrid"].counters.as_dict() == before


@pytest.mark.parametrize("arguments", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0},
                                       {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}, {"seed": 2**63}])
def test_bad_sampling_is_refused(runtimes: dict[str, hl.Runtime], arguments: dict[str, Any]) -> None:
    """A sampler fed a value for which its distribution is not defined."""
    with pytest.raises(ConfigError):
        runtimes["eager"].generate([5], **{"temperature": 1.0, **arguments})


@pytest.mark.parametrize(("settings", "message"), [
    ({"arm": "hybird"}, "did you mean 'hybrid'"), ({"policy": "hole"}, "whole"), ({"capture": "asink"}, "async"),
    ({"fallback": "retry"}, "fallback"), ({"kernels": "fast"}, "kernels"), ({"dtype": "float8"}, "float16"),
    ({"device": "gpu"}, "device"), ({"buckets": []}, "buckets"), ({"buckets": [64, 32]}, "ascending"),
    ({"buckets": [32, 32]}, "ascending"), ({"buckets": [5000]}, "max_len"), ({"buckets": 16}, "buckets"),
    ({"max_len": 5000}, "1024"), ({"max_len": 0}, "max_len"), ({"cache_bytes": 0}, "cache_bytes"),
    ({"process": "elsewhere"}, "process"),
])
def test_bad_settings_are_refused(tiny: PreTrainedModel, settings: dict[str, Any], message: str) -> None:
    """A misspelt setting that silently measures something else."""
    with pytest.raises((ConfigError, ModelError), match=message):
        hl.Runtime(tiny, **settings)


def test_one_request_at_a_time(runtimes: dict[str, hl.Runtime], references: dict[int, list[int]],
                               tiny: PreTrainedModel) -> None:
    """Two requests writing one KV cache."""
    runtime = runtimes["hybrid"]
    stream = runtime.stream(prompt(tiny, 64), max_new_tokens=NEW, stop=[])
    first = [next(stream).id for _ in range(5)]
    with pytest.raises(EngineBusy):
        runtime.generate([5, 6])
    assert first + [token.id for token in stream] == references[64]
    abandoned = runtime.stream([5, 6], max_new_tokens=9)
    next(abandoned)
    abandoned.close()
    assert len(runtime.generate([5, 6], max_new_tokens=3, stop=[]).ids) == 3


def test_broken_weights_raise() -> None:
    """NaN logits turned into a plausible token."""
    model = hl.load("random:tiny-llama-2", device="cpu")
    model.lm_head.weight[3, 3] = float("nan")
    with hl.Runtime(model, arm="graph", capture="sync") as runtime, pytest.raises(NonFinite, match="new token 0"):
        runtime.generate([5, 6])


def test_a_closed_runtime_serves_nothing(tiny: PreTrainedModel) -> None:
    """Graphs used after their buffers are gone."""
    runtime = hl.Runtime(tiny, arm="graph", capture="sync")
    runtime.generate([5, 6], max_new_tokens=2)
    runtime.close()
    runtime.close()
    assert runtime.counters.graph_bytes == 0
    with pytest.raises(RuntimeClosed):
        runtime.generate([5, 6])


def test_a_closed_runtime_ends_its_streams(tiny: PreTrainedModel) -> None:
    """An open stream that lowers and captures anew into a runtime that was closed."""
    runtime = hl.Runtime(tiny, arm="graph")
    stream = runtime.stream([5, 6, 7], max_new_tokens=9)
    next(stream)
    runtime.close()
    with pytest.raises(RuntimeClosed):
        next(stream)
    with pytest.raises(RuntimeClosed):
        runtime.warm_up([16])
    assert (runtime.counters.captures, runtime.counters.graph_bytes) == (0, 0)


def test_replaced_weights_are_noticed() -> None:
    """A graph that goes on serving the weights it was captured with, or a mixture; changes in place are served."""
    model = hl.load("random:tiny-llama-3", device="cpu")
    with hl.Runtime(model, arm="graph", capture="sync") as runtime:
        runtime.generate([5, 6], max_new_tokens=3, stop=[])
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        assert runtime.generate([5, 6], max_new_tokens=8, stop=[]).ids == expected(model, [5, 6], 8)
        model.lm_head.weight.data = model.lm_head.weight.flip(0)
        with pytest.raises(StaleAddress, match="weight of the model was replaced"):
            runtime.generate([5, 6], max_new_tokens=3)


@pytest.mark.parametrize("arm", ["graph", "jit"])
def test_an_error_that_follows_from_replaced_weights_is_named_after_them(arm: str) -> None:
    """Shapes that do not fit, where what a step reads has been replaced; weights are looked at while the device works.
    """
    model = hl.load("random:tiny-llama-3", device="cpu")
    with hl.Runtime(model, arm=arm, capture="never", max_len=64) as runtime:
        model.lm_head.weight.data = model.lm_head.weight[:, 1:].clone()
        with pytest.raises(StaleAddress, match="weight of the model was replaced"):
            runtime.generate([5, 6], max_new_tokens=3)


def test_checking_a_request_is_part_of_its_first_token(tiny: PreTrainedModel) -> None:
    """A clock that starts when the work before it is done."""
    with hl.Runtime(tiny, arm="graph", max_len=64) as runtime:
        asked = runtime._request([5, 6], 3, [], 0.0, None, None, 0)
        assert asked.spent_ns > 0
        times = [ms for _, ms in runtime._serve(replace(asked, spent_ns=10**15))]
    assert times[0] > 1e9
    assert max(times[1:]) < 1e9


def test_a_small_budget_keeps_the_decode_graph(tiny: PreTrainedModel) -> None:
    """The one graph that every token needs evicted for the one that only first tokens need."""
    with hl.Runtime(tiny, arm="graph", cache_bytes=1, max_len=128) as runtime:
        paths = [runtime.generate([5, 6], max_new_tokens=5, stop=[]).paths[1:] for _ in range(4)]
    assert paths[1:] == [["graph"] * 4] * 3


@pytest.mark.parametrize("lengths", [16, [0], [-3], [2000], [1.5], [True]])
def test_bad_warm_up_lengths_are_refused(runtimes: dict[str, hl.Runtime], lengths: Any) -> None:
    """A length that is silently not warmed up, and then captured inside a timed region."""
    if lengths == 16:
        runtimes["graph"].warm_up(16)
    else:
        with pytest.raises(PromptError, match="warm up"):
            runtimes["graph"].warm_up(lengths)


@pytest.mark.parametrize("name", ["gpt_neox", "phi3"])
def test_fused_projections_run_in_every_arm(name: str) -> None:
    """Queries, keys and values that are views of one tensor."""
    torch.manual_seed(2)
    config = AutoConfig.for_model(name, vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=4, bos_token_id=1, eos_token_id=2,
                                  pad_token_id=0, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config)
    want = expected(model, [5, 6, 7], 12)
    for arm in ARMS:
        with hl.Runtime(model, arm=arm, capture="sync", buckets=[8]) as runtime:
            assert runtime.generate([5, 6, 7], max_new_tokens=12, stop=[]).ids == want


@pytest.mark.parametrize("name", ["random:tiny-llama-2", "random:tiny-mistral", "random:tiny-qwen3"])
def test_other_families(name: str) -> None:
    """Multi-head attention, a sliding window that is crossed, or query norms lowered as if they were Llama 3."""
    model = hl.load(name, device="cpu")
    ids = torch.randint(3, 512, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    want = expected(model, ids, 40)
    for arm in ("graph", "hybrid"):
        with hl.Runtime(model, arm=arm, capture="sync", max_len=128, buckets=[64]) as runtime:
            assert runtime.generate(ids, max_new_tokens=40, stop=[]).ids == want


def test_a_model_in_training_mode_is_served_in_eval_mode() -> None:
    """Dropout drawn into the tokens of a model that was just trained; or the model's mode changed behind its back."""
    model = hl.load("random:tiny-llama-3", device="cpu")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    want = expected(model, [5, 6, 7], 10)
    model.train()
    with hl.Runtime(model, arm="eager") as runtime:
        assert runtime.generate([5, 6, 7], max_new_tokens=10, stop=[]).ids == want
    assert model.training


def test_lengths_without_end_are_refused(runtimes: dict[str, hl.Runtime]) -> None:
    """A call that reads an iterator until it ends, and never returns."""
    with pytest.raises(ConfigError, match=r"warm_up has 1,048,576 lengths or more"):
        runtimes["graph"].warm_up(itertools.count(1))
    with pytest.raises(ConfigError, match="buckets has"):
        hl.Runtime(runtimes["graph"].model, arm="graph", buckets=itertools.count(16))
