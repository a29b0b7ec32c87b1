"""The adapters of vLLM and TensorRT-LLM, over doubles with the part of those libraries' interfaces that they call.

The doubles compute nothing, and no number of theirs is kept: they hand out known tokens as the engines hand out theirs,
and take no argument that the engines do not take.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from hybridlab import enginepeers, models, peers, tails
from hybridlab.engines import PeersConfig
from hybridlab.errors import MeasureError

PROMPT, COUNT = [5, 7, 11], 7
BATCHES = (0, 1, 0, 2, 1)  # tokens that one step brings, over and over: none while a step is under way, or several
GPU_BYTES = 80 * 2**30


def tokens(ids: list[int], count: int) -> list[int]:
    return [(sum(ids) + 31 * place) % 997 for place in range(count)]


def batches(ids: list[int], count: int) -> Iterator[list[int]]:
    left = tokens(ids, count)
    while left:
        for size in BATCHES:
            if left or not size:
                yield left[:size]
            left = left[size:]


# ---- vLLM 0.25.1: vllm.LLM, its llm_engine, vllm.sampling_params ---------------------------------------------------

@dataclass
class VllmSampling:
    temperature: float = 1.0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: str = "CUMULATIVE"


class VllmEngine:
    """`LLMEngine` in this process: a request is stepped until its last token is out."""

    def __init__(self) -> None:
        mode = SimpleNamespace(name="FULL_AND_PIECEWISE")
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode))
        self.engine_core = SimpleNamespace(shutdown=self._shut)
        self.taken: list[tuple[str, Any, VllmSampling]] = []
        self.running: list[list[int]] = []
        self.loses, self.shut = 0, 0

    def _shut(self) -> None:
        self.shut += 1
        if self.shut > 1:
            raise RuntimeError("shut down already")

    def add_request(self, request_id: str, prompt: Any, params: VllmSampling) -> str:
        assert request_id not in [name for name, _, _ in self.taken], "an id is of one request"
        assert (prompt["type"], params.output_kind) == ("token", "DELTA")
        assert params.max_tokens is not None
        self.taken.append((request_id, prompt, params))
        self.running = list(batches(prompt["prompt_token_ids"], params.max_tokens - self.loses))
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        new = self.running.pop(0)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=new)])] if new else []


class VllmLLM:
    made: ClassVar[list[VllmLLM]] = []

    def __init__(self, model: str, *, skip_tokenizer_init: bool = False, dtype: str = "auto", seed: int = 0,
                 gpu_memory_utilization: float = 0.92, kv_cache_memory_bytes: int | None = None,
                 load_format: str = "auto", max_model_len: int | None = None, disable_log_stats: bool = False,
                 enable_prefix_caching: bool | None = None) -> None:
        self.given = dict(locals())
        assert 0 <= seed < 2**32, "numpy.random.seed takes no other"
        self.llm_engine = VllmEngine()
        self.made.append(self)


# ---- TensorRT-LLM 1.x: tensorrt_llm.LLM, tensorrt_llm.llmapi -------------------------------------------------------

@dataclass
class TrtSampling:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    ignore_eos: bool = False
    detokenize: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None


@dataclass
class CudaGraphConfig:
    batch_sizes: list[int] | None = None


@dataclass
class KvCacheConfig:
    enable_block_reuse: bool = True
    max_tokens: int | None = None


@dataclass
class TrtResult:
    """What `generate_async` returns: iterating steps it, and it yields itself, with all tokens so far."""

    steps: Iterator[list[int]]
    outputs: list[Any] = field(default_factory=lambda: [SimpleNamespace(token_ids=[])])

    def __iter__(self) -> TrtResult:
        return self

    def __next__(self) -> TrtResult:
        self.outputs[0].token_ids.extend(next(self.steps))
        return self


class TrtLLM:
    made: ClassVar[list[TrtLLM]] = []

    def __init__(self, model: str, *, skip_tokenizer_init: bool = False, dtype: str = "auto", load_format: str = "auto",
                 max_batch_size: int | None = None, max_seq_len: int | None = None,
                 cuda_graph_config: CudaGraphConfig | None = None,
                 kv_cache_config: KvCacheConfig | None = None) -> None:
        self.given = dict(locals())
        self.taken: list[tuple[Any, TrtSampling]] = []
        self.loses, self.shut = 0, 0
        self.made.append(self)

    def generate_async(self, inputs: Any, sampling_params: TrtSampling | None = None, *,
                       streaming: bool = False) -> TrtResult:
        assert sampling_params is not None
        assert streaming
        if sampling_params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        self.taken.append((inputs, sampling_params))
        return TrtResult(batches(inputs, sampling_params.max_tokens - self.loses))

    def shutdown(self) -> None:
        self.shut += 1


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    made = ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries' modules, and a GPU to ask for its memory."""
    kinds = SimpleNamespace(CUMULATIVE="CUMULATIVE", DELTA="DELTA", FINAL_ONLY="FINAL_ONLY")
    module(monkeypatch, "vllm", LLM=VllmLLM, SamplingParams=VllmSampling)
    module(monkeypatch, "vllm.sampling_params", RequestOutputKind=kinds, SamplingParams=VllmSampling)
    module(monkeypatch, "tensorrt_llm", LLM=TrtLLM, SamplingParams=TrtSampling)
    module(monkeypatch, "tensorrt_llm.llmapi", CudaGraphConfig=CudaGraphConfig, KvCacheConfig=KvCacheConfig)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "unset")  # the adapter sets them; undone afterwards
    monkeypatch.setattr(enginepeers, "require_gpu", lambda name, asked: None)
    monkeypatch.setattr(enginepeers.torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=GPU_BYTES))


def asked(folder: Path, **settings: Any) -> peers.Asked:
    return peers.Asked(PeersConfig(device="cpu", **{"seed": 3} | settings), {}, [PROMPT], 64, folder, False)


ADAPTERS: dict[str, tuple[type[peers.Peer], Any]] = {
    "vllm": (enginepeers.VLLM, VllmLLM), "tensorrt-llm": (enginepeers.TensorRTLLM, TrtLLM)}
Started = Callable[..., tuple[peers.Peer, Any]]


@pytest.fixture
def started(tmp_path: Path, doubles: None) -> Started:
    """Starts an adapter: it, and the double of its library's `LLM` that it made."""
    def start(name: str, **settings: Any) -> tuple[peers.Peer, Any]:
        adapter, library = ADAPTERS[name]
        assert peers.adapter(name) is adapter
        return adapter(asked(tmp_path, **settings)), library.made[-1]  # type: ignore[call-arg]

    return start


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("count", [1, 2, COUNT])
def test_each_token_is_given_once_in_order(name: str, count: int, started: Started) -> None:
    """A token that is given twice, or kept back for the next step, shifts every time after it."""
    peer, _ = started(name)
    given: list[int] = []
    for _ in range(2):  # the second request must not begin where the first ended
        peer.run(PROMPT, count, given.append)
    assert given == 2 * tokens(PROMPT, count)
    assert all(type(token) is int for token in given)


@pytest.mark.parametrize("name", ADAPTERS)
def test_rows_of_an_engine_are_those_of_the_protocol(name: str, started: Started) -> None:
    """The whole way from the engine's tokens to timed rows; a row names the engine and not a path of ours."""
    peer, _ = started(name, new_tokens=COUNT, leading=1)
    peer.warm_up([PROMPT], COUNT)
    with tails.Watch() as watch:
        serving = peers.Serving(peer, PeersConfig(device="cpu", new_tokens=COUNT), watch)
        (first,) = serving.rows(PROMPT, "ttft")["rows"]
        gaps = serving.rows(PROMPT, "itl")["rows"]
        assert serving.tokens(PROMPT) == {"ids": tokens(PROMPT, COUNT)}
    assert (first["path"], first["index"]) == ("engine", 0)
    assert [row["index"] for row in gaps] == list(range(1, COUNT))
    assert {row["reason"] for row in [first, *gaps]} == {peer.reason}
    assert peer.notes()["comparable"] is True


def test_vllm_is_asked_for_greedy_tokens_of_these_ids(started: Started) -> None:
    """A temperature left at its default, an end token, a shared prompt cache: other tokens, or a prompt timed once."""
    peer, llm = started("vllm", dtype="float32")
    peer.generate(PROMPT, COUNT)
    peer.generate(PROMPT, 1)
    (_, prompt, sampling), (_, _, other) = llm.llm_engine.taken
    assert prompt == {"type": "token", "prompt_token_ids": PROMPT}
    assert sampling == VllmSampling(0.0, COUNT, True, False, "DELTA")
    assert other.max_tokens == 1
    given = llm.given
    assert (given["model"], given["dtype"], given["load_format"]) == (str(models.folder_of("tiny")), "float32", "auto")
    assert (given["max_model_len"], given["seed"], given["skip_tokenizer_init"]) == (64, 3, True)
    assert given["enable_prefix_caching"] is False
    assert given["kv_cache_memory_bytes"] >= enginepeers.KV_LEAST
    needed = enginepeers.BESIDE + given["kv_cache_memory_bytes"]
    assert needed <= given["gpu_memory_utilization"] * GPU_BYTES < needed + 0.02 * GPU_BYTES
    assert enginepeers.os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "cudagraph mode FULL_AND_PIECEWISE" in peer.reason


def test_every_seed_of_a_config_starts_vllm(started: Started) -> None:
    """A config's seed has 63 bits; vLLM seeds NumPy with it, which raises beyond 32, so that it would not start."""
    _, llm = started("vllm", seed=2**63 - 1)
    assert llm.given["seed"] == 2**32 - 1


def test_tensorrt_llm_is_asked_for_greedy_tokens_of_these_ids(started: Started) -> None:
    """As above, of the other engine; without an end token it asks for a tokenizer that it was told not to load."""
    peer, llm = started("tensorrt-llm")
    peer.generate(PROMPT, COUNT)
    ((ids, sampling),) = llm.taken
    assert ids == PROMPT
    assert sampling == TrtSampling(end_id=0, pad_id=0, max_tokens=COUNT, ignore_eos=True, detokenize=False, top_k=1)
    given = llm.given
    assert (given["model"], given["load_format"]) == (str(models.folder_of("tiny")), "auto")
    assert (given["max_batch_size"], given["max_seq_len"], given["skip_tokenizer_init"]) == (1, 64, True)
    assert given["cuda_graph_config"] == CudaGraphConfig(batch_sizes=[1])
    assert given["kv_cache_config"] == KvCacheConfig(enable_block_reuse=False, max_tokens=128)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_engine_is_shut_down(name: str, started: Started) -> None:
    """An engine that outlives its comparison keeps the GPU's memory; one that is gone already must not hide why."""
    peer, llm = started(name)
    peer.close()
    assert (llm.llm_engine if name == "vllm" else llm).shut == 1
    if name == "vllm":
        peer.close()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("loses", [1, COUNT])
def test_an_engine_that_stops_early_is_an_error_in_words(name: str, loses: int, started: Started) -> None:
    """A request that an engine aborts, for want of cache say, would be a fast one; with no token at all, a traceback
    about an index."""
    peer, llm = started(name)
    (llm.llm_engine if name == "vllm" else llm).loses = loses
    with pytest.raises(MeasureError, match=rf"{COUNT} tokens were asked for, \w+ gave {COUNT - loses} · prompt of 3"):
        peer.generate(PROMPT, COUNT)


@pytest.mark.parametrize("name", ADAPTERS)
def test_without_a_gpu_an_engine_is_refused_in_words(name: str, tmp_path: Path) -> None:
    """A line about CUDA from deep inside PyTorch says neither which system it is of nor what to do."""
    with pytest.raises(MeasureError, match="driven on an NVIDIA GPU alone · device is 'cpu' · leave it out"):
        ADAPTERS[name][0](asked(tmp_path))  # type: ignore[call-arg]
