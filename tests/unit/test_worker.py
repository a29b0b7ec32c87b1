"""A runtime that a second process serves is the same runtime: same tokens, text, paths, counters, plan and errors."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

import hybridlab as hl
from hybridlab import crossing, measure, outlines
from hybridlab.client import Client
from hybridlab.config import RunConfig
from hybridlab.errors import (
    CaptureClosed,
    ConfigError,
    EngineBusy,
    MeasureError,
    ModelError,
    NonFinite,
    PromptError,
    RuntimeClosed,
    WorkerDied,
)

SETTINGS: dict[str, Any] = {"arm": "graph", "policy": "full", "capture": "sync", "buckets": [16, 64], "max_len": 128}
TEXT = "The for statement"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hl.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def here(model: PreTrainedModel) -> Iterator[hl.Runtime]:
    with hl.Runtime(model, **SETTINGS) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def there(model: PreTrainedModel) -> Iterator[hl.Runtime]:
    """Of an instantiated model, which reaches the worker as a copy."""
    with hl.Runtime(model, **SETTINGS, process="worker") as runtime:
        yield runtime


@pytest.fixture
def both(here: hl.Runtime, there: hl.Runtime) -> tuple[hl.Runtime, hl.Runtime]:
    return here, there


SAME = ("ids", "text", "paths", "reasons", "bucket")


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 0.9, "top_k": 20, "seed": 6},
                                      {"temperature": 1.2, "top_p": 0.8, "seed": 2**63 - 1}, {"stop": []}])
def test_the_same_tokens_come(both, settings):
    """A setting, an id or a stop token that is lost on the way."""
    outs = [runtime.generate(TEXT, max_new_tokens=40, **settings) for runtime in both]
    assert [getattr(outs[1], name) for name in SAME] == [getattr(outs[0], name) for name in SAME]
    assert len(outs[1].itl_ms) == len(outs[1].ids) - 1
    assert (len(outs[0].client_ms), len(outs[1].client_ms)) == (0, len(outs[1].ids))
    assert outs[1].client_ms[0] > outs[1].ttft_ms  # the client's clock holds the server's


def test_streams_give_the_same_pieces(both):
    """Text that is cut otherwise, or a first token that waits for the last."""
    pieces = [[(token.id, token.text, token.path, token.reason) for token in
               runtime.stream([5, 6, 7], max_new_tokens=30, stop=[])] for runtime in both]
    assert pieces[0] == pieces[1]
    stream = both[1].stream([5, 6, 7], max_new_tokens=30, stop=[])
    assert next(stream).id == pieces[0][0][0]
    with pytest.raises(EngineBusy) as busy:
        both[1].generate([5])
    with pytest.raises(EngineBusy):
        both[1].settle()
    assert "serving another request" in str(busy.value)
    stream.close()
    assert both[1].generate([5, 6, 7], max_new_tokens=3, stop=[]).ids == [piece[0] for piece in pieces[0][:3]]


def test_what_a_runtime_is_made_of_is_the_same(both):
    """Settings that the worker resolves otherwise than this process would."""
    here, there = both
    for name in ("device", "max_len", "buckets", "fused", "plan", "capturing"):
        assert getattr(there, name) == getattr(here, name), name
    assert [there.bucket_for(n) for n in (1, 16, 17, 65)] == [here.bucket_for(n) for n in (1, 16, 17, 65)]
    assert there.model.device.type == "meta"  # its weights are there once
    assert there.model.dtype == here.model.dtype


def test_counters_prove_the_same_path(both):
    """A path reported for a worker that ran another; counters that lag behind the request."""
    for runtime in both:
        runtime.warm_up([10, 60], temperature=1.0)
    changes = []
    for runtime in both:
        before = runtime.counters.as_dict()
        runtime.generate([5] * 20, max_new_tokens=9, temperature=1.0, stop=[])
        changes.append({name: value - before[name] for name, value in runtime.counters.as_dict().items()})
    assert changes[0] == changes[1]
    assert changes[1]["replays"] == 9


def test_sealed_means_sealed_there(both):
    """A capture in a timed region that only this process would have refused."""
    said = []
    for runtime in both:
        with runtime.sealed(), pytest.raises(CaptureClosed) as closed:
            runtime.generate([5] * 40, max_new_tokens=2, temperature=0.7, top_k=3, stop=[])
        said.append(str(closed.value))
        assert runtime.generate([5] * 40, max_new_tokens=2, temperature=0.7, top_k=3, stop=[]).paths == ["graph"] * 2
    assert said[0] == said[1]


@pytest.mark.parametrize(("prompt", "more"), [
    ("", {}), ([], {}), ([5, 2048], {}), ([5] * 120, {"max_new_tokens": 9}), (TEXT, {"stop": [9999]}),
    (TEXT, {"temperature": float("nan")}), (TEXT, {"top_p": 2.0}), ("\ud800", {})])
def test_bad_input_is_refused_in_the_same_words(both, prompt, more):
    """An error that names another bound, or that reaches the worker."""
    said = []
    for runtime in both:
        with pytest.raises((PromptError, ConfigError)) as error:
            runtime.generate(prompt, **more)
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize(("spec", "settings"), [
    ("tyny", {}), ("random:tiny-llama-2", {"max_len": 10**6}),
    ("random:tiny-llama-2", {"device": "cuda:77"}), ("random:tiny-llama-2", {"arm": "eager", "steps": 4})])
def test_a_runtime_that_cannot_be_is_refused_in_the_same_words(spec, settings):
    """A worker that dies of a setting, and says so in its own words."""
    said = []
    for process in ("here", "worker"):
        with pytest.raises((ConfigError, ModelError)) as error:
            hl.Runtime(spec, process=process, **{"device": "cpu"} | settings)
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]


def test_a_directory_is_loaded_by_name_and_a_broken_model_says_so(tmp_path):
    """Weights that are read twice, a directory that is not found from another process, NaN that becomes a token."""
    broken = hl.load("random:tiny-llama-3", device="cpu")
    broken.generation_config.eos_token_id = 7
    broken.lm_head.weight[3, 3] = float("nan")
    broken.save_pretrained(tmp_path / "m")
    said = []
    for process in ("here", "worker"):
        with hl.Runtime(str(tmp_path / "m"), arm="eager", device="cpu", process=process) as runtime:
            assert runtime.model.generation_config.eos_token_id == 7
            assert runtime.model.tokenizer is None
            with pytest.raises(NonFinite) as error:
                runtime.generate([5, 6])
            said.append(str(error.value))
            with pytest.raises(PromptError, match="no tokenizer"):
                runtime.generate(TEXT)
    assert said[0] == said[1]


def test_the_copy_of_a_model_is_gone_and_the_model_untouched(model, there):
    """Weights left in the temporary directory, or a model that was changed to be written."""
    assert not list(Path(tempfile.gettempdir()).glob(f"{outlines.PREFIX}*"))
    assert model.device.type == "cpu"
    assert not model.training


def test_an_instance_that_cannot_be_sent_is_refused(model, monkeypatch):
    """A copy that fills the disk and then fails; weights of a GPU that would be there twice."""
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    before = psutil.Process().children()
    with pytest.raises(ModelError, match="No space left"):
        hl.Runtime(model, process="worker")
    assert psutil.Process().children() == before
    assert not list(Path(tempfile.gettempdir()).glob(f"{outlines.PREFIX}*"))


def test_an_outline_is_the_model_without_its_weights(model):
    """A client that checks requests against another model than the one that serves them."""
    bare = outlines.outline("tiny", device="cpu")
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert (bare.dtype, bare.config.vocab_size) == (model.dtype, model.config.vocab_size)
    assert bare.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert bare.tokenizer(TEXT)["input_ids"] == model.tokenizer(TEXT)["input_ids"]
    assert outlines.outline("tiny", device="cpu", dtype="float16").dtype == torch.float16


def test_an_ablation_through_workers_has_a_client_clock(both):
    """A row whose client's time is another token's, or none."""
    here, there = both
    config = RunConfig(arms=("graph",), lengths=(9,), new_tokens=5, repeats=2, itl_repeats=1, warmup=1)
    prompts = measure.prompts(there.model, [9], 0)
    assert prompts == measure.prompts(here.model, [9], 0)
    for runtime, known in ((here, False), (there, True)):
        measure.warm_up({"graph": runtime}, prompts, config)
        rows = [row for part in measure.rounds({"graph": runtime}, prompts, config) for row in part]
        assert len(rows) == 2 + 4
        assert all((row["client_ms"] is not None) == known for row in rows)
        assert not any(row["captures"] or row["compiles"] for row in rows)
    assert all(row["client_ms"] > row["ms"] for row in rows if row["metric"] == "ttft")
    out = there.generate([5, 6], max_new_tokens=5, stop=[])
    assert len(out.seen.ended_ns) == 5
    assert not out.seen.profiled
    assert [row["ended_ns"] for row in rows] == sorted(row["ended_ns"] for row in rows)


def test_the_cost_of_a_second_process_is_measured_in_turns(both):
    """A ratio over two processes that had different minutes of the machine."""
    rows = [row for turn in crossing.crossing(*both, seed=1, turns=3) for row in turn]
    by_step = {(row["setting"], row["step"], row["unit"]) for row in rows}
    assert by_step == {("worker", "round trip", "µs"), ("worker", "hand-over", "µs"),
                       ("worker / here", "same tokens", "%"),
                       *((setting, step, "×" if "/" in setting else "ms") for step in ("first token", "gap")
                         for setting in ("here", "worker", "worker / here"))}
    assert len(rows) == 3 * len(by_step)
    assert all(row["value"] > 0 for row in rows)
    for turn in range(3):
        for step in ("first token", "gap"):
            found = {row["setting"]: row["value"] for row in rows if (row["round"], row["step"]) == (turn, step)}
            assert found["worker / here"] == pytest.approx(found["worker"] / found["here"])


def test_a_worker_with_other_tokens_is_not_compared(both, monkeypatch):
    """The fastest second process is one that computes something else."""
    real = both[0].generate

    def wrong(*asked, **settings):
        out = real(*asked, **settings)
        return replace(out, ids=[*out.ids[:-1], out.ids[-1] + 1])

    monkeypatch.setattr(both[0], "generate", wrong)
    with pytest.raises(MeasureError, match="differ from those here · 1 of 33"):
        next(crossing.crossing(*both, seed=1))
    ids = {"here": [1] * crossing.NEW, "worker": [1] * (crossing.NEW - 1) + [2]}
    assert crossing._same(ids, torch.float16) == pytest.approx(100 * 32 / 33), "a near-tie, which is told"


def test_a_worker_that_is_killed_is_an_error_that_stays(there):
    """A runtime that hangs on its next call, or that forgets why; the last test, as it ends the worker of all."""
    assert isinstance(there._engine, Client)
    stream = there.stream([5, 6], max_new_tokens=100, stop=[])
    next(stream)
    os.kill(there._engine.link.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        list(stream)
    for call in (lambda: there.generate([5]), lambda: there.warm_up([16]), there.settle):
        with pytest.raises(WorkerDied, match="SIGKILL"):
            call()
    there.close()
    there.close()
    with pytest.raises(RuntimeClosed):
        there.generate([5])
