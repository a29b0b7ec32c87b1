"""Arms `graph`, `jit` and `hybrid`: lowered programs over one static KV cache, replayed, JIT-run or run eagerly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from transformers import PreTrainedModel

from hybridlab import kernels, layout, loop, ops
from hybridlab.buckets import bucket_for
from hybridlab.cache import GraphCache, Job
from hybridlab.config import COMPILING, REPLAYING, RuntimeConfig, Sampling, policy, policy_name
from hybridlab.counters import Counters
from hybridlab.errors import CaptureFailed, StaleAddress
from hybridlab.executors import Launched
from hybridlab.fused import FusedStep, starts_early
from hybridlab.kernels.prime import Primer
from hybridlab.lookup import Key, Lookup
from hybridlab.lowering import JIT, PLAIN, Inputs, Program, StaticKV, lower
from hybridlab.pieces import Cut, cut
from hybridlab.plan import Plan
from hybridlab.policies import left_out
from hybridlab.ranges import span
from hybridlab.readback import Prompt, Readback, Ring
from hybridlab.sampling import Controls

assert kernels, ops  # both register the namespaces that programs call


class LoweredExecutor:
    """`graph` and `hybrid` replay what the plan puts into graphs, where a graph is there. `jit` and `hybrid` run the
    dynamic operations, attention included, as JIT kernels; `graph` runs them as plain PyTorch.

    `plan_of` gives the plan of a phase, and of prefill by its rows; a policy that leaves the forward whole needs none.
    Of a step's three parts the forward is always captured, with the cut that the plan makes inside it; `prepare` and
    `sample` with it where the policy says so.
    """

    def __init__(self, model: PreTrainedModel, plan_of: Callable[..., Plan], config: RuntimeConfig, fused: bool,
                 buckets: tuple[int, ...], max_len: int, counters: Counters) -> None:
        self.fused = fused
        self.model, self.plan_of, self.config, self.buckets, self.counters = model, plan_of, config, buckets, counters
        self.namespace = JIT if config.arm in COMPILING else PLAIN
        self.modules = {self.namespace: lower(model, self.namespace)}
        self.weights = layout.Places(model)
        self.controls = Controls(model.device, self.namespace)
        self.tokens = Readback(self.controls.token, config.run_ahead + 1)
        self.ring = Ring(self.controls.token, config.run_ahead + config.steps)
        self.looping = loop.wanted(config, model.device)
        self.kv = StaticKV(model.config, max_len, model.device, model.dtype)
        self.logits = torch.zeros(model.config.vocab_size, device=model.device)
        self.prompt = Prompt(max_len, model.device, mapped=self.namespace == JIT)
        self.inputs: dict[tuple[str, int], Inputs] = {}
        self.programs: dict[tuple[str, str, int], Program] = {}
        self.positions = self.program("decode", 1).inputs.positions
        self.lookup = Lookup(config, model.device, counters, self._job) if config.arm in REPLAYING else None
        chosen = policy(config.policy)
        self.outside = left_out(chosen, config.arm, lambda: plan_of("decode"))
        self.cutting = cuts(model, plan_of, config)
        early = self.lookup is not None and config.pdl and starts_early(model.device) and not (fused or self.cutting)
        self.primer = Primer(model.device, early, again=bool(self.outside) or config.steps > 1)
        between = ", ".join(chosen.between)
        self.around = f", in pieces around {between}" if between else ", fused" if self.fused else ""
        self.baked = (policy_name(chosen), str(model.dtype), str(model.device))  # of every key
        self.bucket: int | None = None
        self.at = 0  # tokens that the last launched step has seen
        self.asked_at: float | None = None  # when the request was, until its first token is read

    @property
    def graphs(self) -> GraphCache | None:
        """The graph cache; None in arm jit."""
        return self.lookup.cache if self.lookup is not None else None

    def program(self, phase: str, rows: int, namespace: str | None = None) -> Program:
        """The program of one shape, made at first use; programs of one shape read the same inputs."""
        namespace = namespace or self.namespace
        key = (namespace, phase, rows)
        if key not in self.programs:
            if namespace not in self.modules:
                self.modules[namespace] = lower(self.model, namespace)
            inputs = self.inputs.setdefault((phase, rows), Inputs.of(rows, self.model.device))
            span = rows if phase == "prefill" else self.kv.capacity
            module = self.modules[namespace]
            if namespace == JIT and self.fused:
                self.programs[key] = FusedStep(module, namespace, self.kv, self.logits, inputs, span, self.config.pdl)
            else:
                self.programs[key] = Program(module, self.kv, self.logits, inputs, span)
        return self.programs[key]

    def check(self) -> None:
        """Raises `StaleAddress` if a weight was replaced: graphs and lowered modules hold the old one."""
        if not self.weights.kept():
            raise StaleAddress("a weight of the model was replaced since this runtime was built",
                               "its graphs and lowered modules still read the old one",
                               "make a new Runtime, or change weights in place with copy_()")

    def start(self, sampling: Sampling, stop: Iterable[int] = ()) -> None:
        """Graphs become the calling thread's, whose request this is."""
        if self.lookup is not None:
            self.lookup.cache.own()
        self.primer.start()
        self.tokens.start()
        self.controls.set(sampling, self.model.config.vocab_size)
        if self.config.steps > 1:
            self.ring.start(stop)

    def prefill(self, ids: list[int]) -> Launched:
        self.asked_at, count = time.perf_counter(), len(ids)
        self.prompt.put(ids)
        self.bucket, self.at = bucket_for(count, self.buckets), count
        with span("prefill", count):
            return self._launch("prefill", self.bucket or count)

    def decode(self, wanted: int) -> list[Launched]:
        """One step; or as many as one graph holds, if the graph is there. One that loops can do with fewer."""
        with span("decode", self.at + 1):
            launched = self._decode(wanted)
        self.at += len(launched)
        return launched

    def _decode(self, wanted: int) -> list[Launched]:
        steps = min(self.config.steps, wanted) if self.looping else self.config.steps
        if not 1 < steps <= wanted or self.lookup is None:
            return [self._launch("decode", 1)]
        if not self.lookup.several(key := self._key("decode", 1, self.config.steps)):
            return [self._launch("decode", 1)]
        places = self.ring.expect(steps)
        with span("replay"), self.lookup.cache.lease(key) as replay:
            self.primer()
            replay()
        reason = f"replayed decode graph of 1 rows, {steps} steps a launch" + ", in a loop" * self.looping
        return [Launched(place, "graph", reason, emitted=True, ends=self.looping) for place in places]

    def read(self, step: Launched) -> int:
        tokens = self.ring if step.emitted else self.tokens
        if self.lookup is None:
            return tokens.read(step.place)
        self.lookup.behind.step(lambda: not tokens.arrived(step.place))
        token = tokens.read(step.place)
        if self.asked_at is not None:
            self.lookup.first_token(step.path, (time.perf_counter() - self.asked_at) * 1e3)
            self.asked_at = None
        return token

    def device_ms(self, count: int) -> list[float]:
        return [] if self.config.steps > 1 else self.tokens.device_ms(count)

    def _launch(self, phase: str, rows: int) -> Launched:
        program = self.program(phase, rows)
        if "prepare" in self.outside:
            self._prepare(phase, program)
        if self.lookup is None:
            path, reason = "jit", "arm jit launches static operations from Python and dynamic ones as JIT kernels"
            self._run(phase, program)
        else:
            key = self._key(phase, rows)
            missed = self.lookup.miss(key, bucketed=phase == "decode" or self.bucket is not None)
            if missed is None:
                path = "graph"
                reason = f"replayed {phase} graph of {rows} rows{self.around}{self.lookup.captured_now()}"
                with span("replay"), self.lookup.cache.lease(key) as replay:
                    self.primer()
                    replay()
                if "sample" in self.outside:
                    self._sample()
            else:
                path, reason = self._fall_back(phase, program, missed)
        return Launched(self.tokens.send(), path, reason)

    def _run(self, phase: str, program: Program) -> None:
        """The step with every operation launched from Python; its inputs are prepared if that is never captured."""
        if "prepare" not in self.outside:
            self._prepare(phase, program)
        with span("jit" if program.module is self.modules.get(JIT) else "eager"):
            program()
        self._sample()

    def first_steps(self) -> list[Callable[[], None]]:
        """What the first request launches: a prefill of the smallest bucket and a decode step, each by itself."""
        return [partial(self._whole, phase, self.program(phase, rows))
                for phase, rows in (("prefill", self.buckets[0]), ("decode", 1))]

    def _whole(self, phase: str, program: Program) -> None:
        self._prepare(phase, program)
        program()
        self._sample()
        if self.config.steps > 1:
            self.ring.emit()

    def _inside(self, phase: str, program: Program, controls: Controls) -> None:
        """The parts of a step that one capture holds, drawing as `controls` say."""
        if "prepare" not in self.outside:
            self._prepare(phase, program)
        program()
        if "sample" not in self.outside:
            controls.draw(self.logits, self.positions)

    def _prepare(self, phase: str, program: Program) -> None:
        ids, positions, last = program.inputs
        if phase == "prefill":
            self.controls.ops.pad.default(self.prompt.ids, self.prompt.count, ids, last)
            self.positions.copy_(last)
        else:
            self.controls.ops.advance.default(self.controls.token, ids, positions)

    def _sample(self) -> None:
        with span("sampling"):
            self.controls.draw(self.logits, self.positions)

    def _key(self, phase: str, rows: int, steps: int = 1) -> Key:
        draw = "" if "sample" in self.outside else self.controls.mode
        return Key(phase, rows, steps, draw, *self.baked)

    def job(self, phase: str, rows: int) -> Job:
        """What a graph of one step would capture, tokens drawn as the last request asked."""
        return self._job(self._key(phase, rows))

    def _job(self, key: Key) -> Job:
        """Decode is pinned: every token needs it, and a prefill graph only the first."""
        program, controls = self.program(key.phase, key.rows), self.controls.as_now()

        def function() -> None:
            for _ in range(1 if self.looping else key.steps):
                self._inside(key.phase, program, controls)
                if key.steps > 1:
                    self.ring.emit()

        buffers = [*program.buffers, *self.controls.buffers, self.prompt.ids, self.prompt.count, self.positions,
                   *self.ring.buffers]
        return Job(key, function, buffers, [*program.inputs, self.controls.token, self.positions], self._cut(key),
                   pin=key.phase == "decode", repeat=self.ring.state if self.looping and key.steps > 1 else None)

    def _cut(self, key: Key) -> Cut | None:
        """Where the program of `key` is cut: planned at its own rows, as few and many may be computed differently."""
        if not self.cutting:
            return None
        plan = self.plan_of("decode") if key.phase == "decode" else self.plan_of("prefill", key.rows)
        return cut(self.modules[self.namespace], plan)

    def _fall_back(self, phase: str, program: Program, reason: str) -> tuple[str, str]:
        self.counters.fallbacks += 1
        if self.config.fallback == "raise":
            raise CaptureFailed(f"the {phase} step has no graph to replay", reason,
                                "call warm_up first, or choose fallback='jit'")
        if self.config.fallback == "eager" and self.namespace == JIT:
            program = self.program(phase, program.rows, PLAIN)
        self._run(phase, program)
        assert self.lookup is not None
        self.lookup.ran(same=program.module is self.modules[self.namespace])
        return ("jit" if program.module is self.modules.get(JIT) else "eager"), reason

    def finish(self) -> None:
        if self.lookup is not None:
            self.lookup.behind.idle()
        if self.bucket is None:  # a length of its own, which may never come again
            self.programs = {key: p for key, p in self.programs.items() if key[1] == "decode" or key[2] in self.buckets}
            self.inputs = {key: i for key, i in self.inputs.items() if key[0] == "decode" or key[1] in self.buckets}

    def capture_for(self, lengths: list[int], sampling: Sampling) -> None:
        """Capture decode and the bucket of every length, the largest first, unless they are there or cannot be."""
        if self.lookup is None or self.config.capture == "never":
            return
        self.start(sampling)
        rows = {b for b in (bucket_for(n, self.buckets) for n in lengths) if b is not None}
        decode = [self._key("decode", 1, steps) for steps in {1, self.config.steps}]
        for key in [*(self._key("prefill", r) for r in sorted(rows, reverse=True)), *decode]:
            self.lookup.ensure(key)

    @property
    def quick(self) -> bool:
        return (self.lookup is not None and self.model.device.type == "cuda" and not self.cutting and not self.outside
                and all(self._key("decode", 1, steps) in self.lookup.cache for steps in {1, self.config.steps}))

    @property
    def capturing(self) -> bool:
        return self.lookup is not None and self.lookup.behind.busy

    def settle(self) -> None:
        if self.lookup is not None:
            self.lookup.cache.own()
            self.lookup.behind.settle()

    def seal(self, closed: bool) -> None:
        if self.lookup is not None:
            self.lookup.cache.closed = closed

    def close(self) -> None:
        if self.lookup is not None:
            self.lookup.close()
        self.programs.clear()
        self.modules.clear()


def cuts(model: PreTrainedModel, plan_of: Callable[..., Plan], config: RuntimeConfig) -> bool:
    """Whether a graph of a step of `model` is cut inside the forward."""
    return (config.arm in REPLAYING and bool(policy(config.policy).between)
            and cut(model, plan_of("decode")) is not None)
