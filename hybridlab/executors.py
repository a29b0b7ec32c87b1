"""How an arm runs prefill and decode: the stock modules, or lowered programs replayed, JIT-run or run eagerly."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hybridlab import kernels, ops
from hybridlab.buckets import bucket_for
from hybridlab.config import RuntimeConfig, Sampling
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed, StaleAddress
from hybridlab.graphs import GraphCache
from hybridlab.lowering import JIT, PLAIN, Inputs, Program, StaticKV, lower
from hybridlab.partitioning import Plan
from hybridlab.sampling import Controls
from hybridlab.verify import verify_cached

assert kernels, ops  # both register the namespaces that programs call


class Step(NamedTuple):
    """One token on the host, the path that its forward took, and why."""

    id: int
    path: str
    reason: str


class Key(NamedTuple):
    """What one captured graph is for: everything that it bakes in."""

    phase: str
    rows: int
    policy: str
    dtype: str
    device: str


class Executor(Protocol):
    """Serves one request at a time: `start`, `prefill` once, then `decode` for every further token."""

    def check(self) -> None: ...

    def start(self, sampling: Sampling) -> None: ...

    def prefill(self, ids: list[int]) -> Step: ...

    def decode(self) -> Step: ...

    def finish(self) -> None: ...

    def capture_for(self, lengths: list[int]) -> None: ...

    def close(self) -> None: ...


class StockExecutor:
    """Arm `eager`: the stock modules, a dynamic cache, and preparation and sampling in plain PyTorch."""

    REASON = "arm eager launches every operation from Python"

    def __init__(self, model: PreTrainedModel) -> None:
        verify_cached(model)
        self.model = model
        self.controls = Controls(model.device, PLAIN)

    def check(self) -> None:
        """Nothing to check: the stock modules read whatever weights the model has."""

    def start(self, sampling: Sampling) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.controls.set(sampling, self.model.config.vocab_size)

    def prefill(self, ids: list[int]) -> Step:
        device = self.model.device
        self.position = torch.tensor([len(ids) - 1], device=device)
        return self._step(torch.tensor([ids], device=device))

    def decode(self) -> Step:
        self.position += 1
        return self._step(self.controls.token.view(1, 1))

    def _step(self, ids: Tensor) -> Step:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.controls.draw(out.logits[0, -1].float(), self.position)
        return Step(int(self.controls.token.item()), "eager", self.REASON)

    def finish(self) -> None:
        del self.cache

    def capture_for(self, lengths: list[int]) -> None:
        pass

    def close(self) -> None:
        pass


class LoweredExecutor:
    """Arms `graph`, `jit` and `hybrid`: lowered programs over one static KV cache.

    `graph` and `hybrid` replay the forward where a graph is there. `jit` and `hybrid` run the dynamic operations,
    attention included, as JIT kernels; `graph` runs them as plain PyTorch.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, config: RuntimeConfig, buckets: tuple[int, ...],
                 max_len: int, counters: Counters) -> None:
        self.model, self.plan, self.config, self.buckets, self.counters = model, plan, config, buckets, counters
        self.namespace = JIT if config.arm in ("jit", "hybrid") else PLAIN
        self.modules = {self.namespace: lower(model, self.namespace)}
        self.weights = _addresses(model)
        self.controls = Controls(model.device, self.namespace)
        self.kv = StaticKV(model.config, max_len, model.device, model.dtype)
        self.logits = torch.zeros(model.config.vocab_size, device=model.device)
        self.prompt = torch.zeros(max_len, dtype=torch.int64, device=model.device)
        self.length = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.staging = torch.zeros(max_len, dtype=torch.int64, pin_memory=model.device.type == "cuda")
        self.inputs: dict[tuple[str, int], Inputs] = {}
        self.programs: dict[tuple[str, str, int], Program] = {}
        self.positions = self.program("decode", 1).inputs.positions
        self.graphs: GraphCache | None = None
        if config.arm in ("graph", "hybrid"):
            self.graphs = GraphCache(model.device, config.cache_bytes, counters)
        self.pending: dict[Key, Program] = {}
        self.baked = (config.policy, str(model.dtype), str(model.device))  # of every key
        self.bucket: int | None = None
        self.parts = {"prepare": self._prepare, "forward": self._forward, "sample": self._sample}

    def program(self, phase: str, rows: int, namespace: str | None = None) -> Program:
        """The program of one shape, made at first use; programs of one shape read the same inputs."""
        namespace = namespace or self.namespace
        key = (namespace, phase, rows)
        if key not in self.programs:
            if namespace not in self.modules:
                self.modules[namespace] = lower(self.model, namespace)
            inputs = self.inputs.setdefault((phase, rows), Inputs.of(rows, self.model.device))
            span = rows if phase == "prefill" else self.kv.capacity
            self.programs[key] = Program(self.modules[namespace], self.kv, self.logits, inputs, span)
        return self.programs[key]

    def check(self) -> None:
        """Raise `StaleAddress` if a weight was replaced: graphs and lowered modules hold the old one."""
        if _addresses(self.model) != self.weights:
            raise StaleAddress("a weight of the model was replaced since this runtime was built",
                               "its graphs and lowered modules still read the old one",
                               "make a new Runtime, or change weights in place with copy_()")

    def start(self, sampling: Sampling) -> None:
        self.controls.set(sampling, self.model.config.vocab_size)

    def prefill(self, ids: list[int]) -> Step:
        count = len(ids)
        self.staging[:count] = torch.tensor(ids)
        self.prompt[:count].copy_(self.staging[:count], non_blocking=True)
        self.length.fill_(count)
        self.bucket = bucket_for(count, self.buckets)
        return self._run("prefill", self.bucket or count)

    def decode(self) -> Step:
        return self._run("decode", 1)

    def _run(self, phase: str, rows: int) -> Step:
        """Execute the plan's segments in order, then read the token: the only thing the host waits for."""
        program = self.program(phase, rows)
        path, reason = "", ""
        for segment in self.plan.segments:
            taken = self.parts[segment.name](phase, program)
            if taken is not None:
                path, reason = taken
        return Step(int(self.controls.token.item()), path, reason)

    def _prepare(self, phase: str, program: Program) -> None:
        ids, positions, last = program.inputs
        if phase == "prefill":
            self.controls.ops.pad.default(self.prompt, self.length, ids, last)
            self.positions.copy_(last)
        else:
            self.controls.ops.advance.default(self.controls.token, ids, positions)

    def _sample(self, phase: str, program: Program) -> None:
        self.controls.draw(self.logits, self.positions)

    def _forward(self, phase: str, program: Program) -> tuple[str, str]:
        if self.graphs is None:
            program()
            return "jit", "arm jit launches static operations from Python and dynamic ones as JIT kernels"
        key = self._key(phase, program)
        reason = self._miss(key, program)
        if reason is None:
            with self.graphs.lease(key) as replay:
                replay()
            return "graph", f"replayed {phase} graph of {program.rows} rows"
        return self._fall_back(phase, program, reason)

    def _key(self, phase: str, program: Program) -> Key:
        return Key(phase, program.rows, *self.baked)

    def _miss(self, key: Key, program: Program) -> str | None:
        """None if the graph of `key` is there now, else why not. Captures on the spot if the policy is `sync`."""
        assert self.graphs is not None
        if key in self.graphs:
            self.counters.hits += 1
            return None
        self.counters.misses += 1
        if key in self.graphs.failed:
            return self.graphs.failed[key]
        if key.phase == "prefill" and self.bucket is None:
            return f"no bucket holds {program.rows} tokens"
        if self.config.capture == "never":
            return "capture policy is never"
        if self.config.capture == "async":
            self.pending[key] = program
            return "no graph yet; its capture waits behind this request"
        try:
            self._capture(key, program)
        except CaptureFailed as error:
            return str(error)
        return None

    def _capture(self, key: Key, program: Program) -> None:
        """Decode is pinned: every token needs it, and a prefill graph only the first."""
        assert self.graphs is not None
        self.graphs.capture(key, program, program.buffers, pin=key.phase == "decode")

    def _fall_back(self, phase: str, program: Program, reason: str) -> tuple[str, str]:
        self.counters.fallbacks += 1
        if self.config.fallback == "raise":
            raise CaptureFailed(f"the {phase} step has no graph to replay", reason,
                                "call warm_up first, or choose fallback='jit'")
        if self.config.fallback == "eager" and self.namespace == JIT:
            program = self.program(phase, program.rows, PLAIN)
        program()
        return ("jit" if program.module is self.modules.get(JIT) else "eager"), reason

    def finish(self) -> None:
        """Capture what the finished request missed: behind it, so that none of its tokens waited."""
        for key, program in self.pending.items():
            self._try_capture(key, program)
        self.pending.clear()
        if self.bucket is None:  # a length of its own, which may never come again
            self.programs = {key: p for key, p in self.programs.items() if key[1] == "decode" or key[2] in self.buckets}
            self.inputs = {key: i for key, i in self.inputs.items() if key[0] == "decode" or key[1] in self.buckets}

    def capture_for(self, lengths: list[int]) -> None:
        """Capture decode and the bucket of every length, unless they are there or cannot be captured."""
        if self.graphs is None or self.config.capture == "never":
            return
        rows = {b for b in (bucket_for(n, self.buckets) for n in lengths) if b is not None}
        for program, phase in [*((self.program("prefill", r), "prefill") for r in sorted(rows, reverse=True)),
                               (self.program("decode", 1), "decode")]:
            key = self._key(phase, program)
            if key not in self.graphs and key not in self.graphs.failed:
                self._try_capture(key, program)

    def _try_capture(self, key: Key, program: Program) -> None:
        try:
            self._capture(key, program)
        except CaptureFailed:
            if self.config.fallback == "raise":
                raise

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.clear()
        self.programs.clear()
        self.modules.clear()
        self.pending.clear()


def _addresses(model: PreTrainedModel) -> list[tuple[int, torch.dtype]]:
    return [(p.data_ptr(), p.dtype) for p in model.parameters()]


def executor(model: PreTrainedModel, plan: Plan | None, config: RuntimeConfig, buckets: tuple[int, ...],
             max_len: int, counters: Counters) -> Executor:
    """The executor of `config.arm`; without a plan, of arm eager."""
    if plan is None:
        return StockExecutor(model)
    return LoweredExecutor(model, plan, config, buckets, max_len, counters)
