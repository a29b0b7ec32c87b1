"""vLLM and TensorRT-LLM as systems of a comparison, through their offline APIs, one request at a time.

vLLM's ran with 0.25.1. TensorRT-LLM's is written from its documentation and sources (`LLM` of 1.x, PyTorch backend) and
has not been run. Their Python packages are imported when an engine starts.
"""

from __future__ import annotations

import gc
import math
import os
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from hybridlab import models, names, outlines
from hybridlab.engines import version
from hybridlab.errors import MeasureError
from hybridlab.peers import Asked, Give, Peer
from hybridlab.roofline import Demand

WRITTEN = 2 * 2**30  # bytes of random weights that are still written to disk for an engine to read
BESIDE = 6 * 2**30   # bytes that an engine may take beyond weights and KV cache: graphs, activations, workspaces
KV_LEAST = 2**28     # bytes


class Weights:
    """The directory from which an engine reads a model, and whether what it reads are the model's own weights.

    Random weights have no directory: small ones are written into `folder`, as seeded as everywhere else; of large ones
    only the config is, and the engine makes weights of its own, so that its tokens cannot be compared.
    """

    def __init__(self, asked: Asked) -> None:
        config = asked.config
        self.bare = outlines.outline(config.model, device=config.device, dtype=config.dtype)
        found = None if config.model.startswith(names.RANDOM) else models.folder_of(config.model)
        self.bytes = self.bare.get_memory_footprint()
        self.own = found is not None or self.bytes <= WRITTEN
        self.directory = found or asked.folder
        if found is None and self.own:
            models.load(config.model, device=config.device, dtype=config.dtype).save_pretrained(asked.folder)
            gc.collect()
            torch.cuda.empty_cache()
        elif found is None:
            self.bare.config.architectures = [type(self.bare).__name__]
            self.bare.config.save_pretrained(asked.folder)

    @property
    def arguments(self) -> dict[str, Any]:
        """As both engines name them."""
        return {"model": str(self.directory), "dtype": str(self.bare.dtype).removeprefix("torch."),
                "load_format": "auto" if self.own else "dummy"}

    @property
    def words(self) -> str:
        return "of the model" if self.own else "random ones of its own (load_format dummy)"

    def kv_bytes(self, tokens: int) -> int:
        """Of a KV cache twice as long as the longest request: blocks are rounded up, and some are kept free."""
        return max(KV_LEAST, 2 * tokens * sum(layer.row for layer in Demand(self.bare).layers))


def require_gpu(name: str, asked: Asked) -> None:
    """Raise `MeasureError` for a device that these adapters do not drive an engine on."""
    device = models.resolve_device(asked.config.device)
    if device.type != "cuda":
        raise MeasureError(f"{name} is driven on an NVIDIA GPU alone", f"device is {str(device)!r}",
                           "leave it out with --system, or use --device cuda")


class VLLM(Peer):
    """vLLM's `LLM`, its engine stepped in this process: a step that returns the token of our request ends its interval.

    Defaults are kept: compiled, FULL_AND_PIECEWISE graphs of the default sizes, so that prompts up to 512 tokens are
    replayed in pieces and decode whole, and scheduling one step ahead. Changed are: prefix caching off, as a prompt
    would be computed once only; memory by what is needed and not 92 % of the GPU, which others share; no process of
    its own for the engine, which would add a message a token; no tokenizer and no statistics. Its graphs are inside:
    rows name the mode that it reports, and cannot tell which one ran a step.
    """

    distribution = "vllm"
    paths = ("engine", "engine")

    def __init__(self, asked: Asked) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vLLM is imported
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        require_gpu("vLLM", asked)
        weights = Weights(asked)
        self.weights, self.comparable = weights.words, weights.own
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kv = weights.kv_bytes(asked.max_len)
        total = torch.cuda.get_device_properties(0).total_memory
        self.llm = LLM(
            **weights.arguments, skip_tokenizer_init=True,
            max_model_len=asked.max_len, enable_prefix_caching=False, kv_cache_memory_bytes=kv,
            gpu_memory_utilization=math.ceil(100 * (weights.bytes + kv + BESIDE) / total) / 100,
            seed=asked.config.seed % 2**32, disable_log_stats=True)  # NumPy's generator is seeded too: 32 bits
        self.engine, self.requests = self.llm.llm_engine, 0
        self.sampling = partial(SamplingParams, temperature=0.0, ignore_eos=True, detokenize=False,
                                output_kind=RequestOutputKind.DELTA)
        mode = self.engine.vllm_config.compilation_config.cudagraph_mode
        self.reason = f"vLLM {version('vllm')}, cudagraph mode {getattr(mode, 'name', mode)}"

    def run(self, ids: list[int], count: int, give: Give) -> None:
        self.requests += 1
        prompt = {"type": "token", "prompt_token_ids": ids}  # with its type: rendered already; raw ones are deprecated
        self.engine.add_request(str(self.requests), prompt, self.sampling(max_tokens=count))
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():  # empty while a step is under way
                for token in output.outputs[0].token_ids:
                    give(int(token))

    def close(self) -> None:
        with suppress(Exception):  # it is going to end anyway
            self.engine.engine_core.shutdown()


class TensorRTLLM(Peer):
    """TensorRT-LLM's `LLM` with its PyTorch backend, tokens streamed by `generate_async` and read as they come.

    Defaults are kept: CUDA graphs in decode, one step scheduled ahead, an engine process of its own. Changed are: cache
    reuse off; a batch of one; memory by what is needed; no tokenizer. Rows cannot tell which graph ran a step.
    """

    distribution = "tensorrt-llm"
    paths = ("engine", "engine")

    def __init__(self, asked: Asked) -> None:
        require_gpu("TensorRT-LLM", asked)
        weights = Weights(asked)
        self.weights, self.comparable = weights.words, weights.own
        from tensorrt_llm import LLM, SamplingParams
        from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig

        self.llm = LLM(
            **weights.arguments, skip_tokenizer_init=True,
            max_batch_size=1, max_seq_len=asked.max_len, cuda_graph_config=CudaGraphConfig(batch_sizes=[1]),
            kv_cache_config=KvCacheConfig(enable_block_reuse=False, max_tokens=2 * asked.max_len))
        # Without a tokenizer it wants to be told an end token, also where it is to be ignored.
        self.sampling = partial(SamplingParams, top_k=1, end_id=0, pad_id=0, ignore_eos=True, detokenize=False)
        self.reason = f"TensorRT-LLM {version(self.distribution)}, PyTorch backend, CUDA graphs in decode"

    def run(self, ids: list[int], count: int, give: Give) -> None:
        given = 0
        for output in self.llm.generate_async(ids, self.sampling(max_tokens=count), streaming=True):
            found = output.outputs[0].token_ids  # all so far
            for token in found[given:]:
                give(int(token))
            given = len(found)

    def close(self) -> None:
        self.llm.shutdown()

