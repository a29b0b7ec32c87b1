"""Settings as frozen data: one class a noun, refused with field, value and remedy when they make no sense."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from hybridlab.errors import ConfigError, choose, nearest, shown

Arm = Literal["eager", "graph", "jit", "hybrid"]
Kernels = Literal["auto", "torch", "fused"]
Capture = Literal["ahead", "sync", "async", "never"]
Behind = Literal["auto", "request", "thread", "cooperative"]
Admission = Literal["every", "pays"]
Pool = Literal["shared", "private"]
Eviction = Literal["auto", "one", "all"]
Repeat = Literal["auto", "unrolled", "while"]
Fallback = Literal["jit", "eager", "raise"]
Process = Literal["here", "worker"]

ARMS: tuple[Arm, ...] = get_args(Arm)
CAPTURES: tuple[str, ...] = get_args(Capture)
BEHINDS: tuple[str, ...] = get_args(Behind)
PROCESSES: tuple[str, ...] = get_args(Process)
KERNELS: tuple[Kernels, ...] = get_args(Kernels)
DTYPES = ("float32", "float16", "bfloat16")
WORDS = {"dtype": DTYPES} | {name: get_args(words) for name, words in (  # what fields of these names may be
    ("arm", Arm), ("kernels", Kernels), ("capture", Capture), ("behind", Behind), ("admission", Admission),
    ("pool", Pool), ("eviction", Eviction), ("repeat", Repeat), ("fallback", Fallback), ("process", Process))}

PAPER_LENGTHS = (10, 50, 100, 150, 200, 250, 300, 350, 400, 500)

Positive = Annotated[int, Meta(ge=1)]
Steps = Annotated[int, Meta(ge=1, le=64)]
Seconds = Annotated[float, Meta(gt=0.0, le=86400.0)]
Probability = Annotated[float, Meta(gt=0.0, le=1.0)]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of a step graphs hold: everything but what `outside` names.

    A name is a kind ("device-dynamic"), a role ("prepare", "attention" or "sample"), an operation ("mm", "aten.mm" or
    "aten.mm.default") or a part of a module's path ("lm_head", "mlp", "layers.0.self_attn"), looked up in this order.
    """

    outside: Annotated[tuple[str, ...], Meta(max_length=64)] = ()

    def __post_init__(self) -> None:
        if isinstance(self.outside, str) or not all(isinstance(name, str) and name for name in self.outside):
            raise ConfigError(f"outside is {self.outside!r}", "it must be a list of names",
                              "write it like Policy(outside=['attention'])")
        msgspec.structs.force_setattr(self, "outside", tuple(self.outside))

    @property
    def between(self) -> tuple[str, ...]:
        """What stays outside in the midst of a forward."""
        return tuple(name for name in self.outside if name not in ("prepare", "sample"))


POLICIES = {
    "piecewise": Policy(("prepare", "attention", "sample")),  # attention stays outside, between graphs
    "whole": Policy(("prepare", "sample")),                   # the forward is one graph: the paper's
    "full": Policy(()),                                       # one launch a token
}


def policy(value: str | Policy | Mapping[str, Any]) -> Policy:
    """A policy from its name, from names to leave outside with commas between ("attention,lm_head"), or from its data.

    Raises `ConfigError` for a name that is none.
    """
    if isinstance(value, str) and "," in value:
        return Policy(tuple(name.strip() for name in value.split(",") if name.strip()))
    if isinstance(value, Mapping):
        return build(Policy, value)
    return value if isinstance(value, Policy) else POLICIES[choose("policy", value, POLICIES)]


def policy_name(value: Policy) -> str:
    """The name of a built-in policy, else what it leaves outside."""
    return next((name for name, known in POLICIES.items() if known == value), f"outside {', '.join(value.outside)}")


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one token is drawn from a row of logits; the draw is keyed by (seed, position)."""

    temperature: Annotated[float, Meta(ge=0.0)] = 0.0  # 0 is greedy
    top_k: Positive | None = None                      # keep the k largest logits; ties are kept
    top_p: Probability | None = None                   # keep the smallest set holding this much probability
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One cell of the ablation and how it serves requests."""

    arm: Arm = "hybrid"
    policy: str | Policy = "whole"
    device: str = "auto"                               # "auto": where the model is, or the GPU if there is one
    dtype: str | None = None                           # None: as the model is
    kernels: Kernels = "auto"                          # of arms that compile: those of the stock modules around JIT
                                                       # attention, or all fused; auto: fused on a GPU where possible
    pdl: bool = True                                   # kernels may start before the last one ends, where they can
    # Prompt lengths to capture; None: a ladder from the machine's roofline; "exact": every length by itself.
    buckets: Literal["exact"] | tuple[Positive, ...] | None = None
    capture: Capture = "async"
    behind: Behind = "auto"                            # how an async capture stays behind: after the request, on a
                                                       # thread (auto on a GPU), or in slices while the host waits
    admission: Admission = "every"                     # which misses are captured; "pays": once reuse should repay it
    cache_bytes: Positive | None = None                # budget of the graph cache; None: no limit
    cache_graphs: Positive | None = None               # most graphs it holds; decode and the newest stay anyway
    pool: Pool = "shared"                              # memory of intermediates: one pool, or one for each graph
    eviction: Eviction = "auto"                        # what goes when room is needed; auto: as a self-test allows
    max_len: Positive | None = None                    # rows of the static KV cache; None: the model's context
    fallback: Fallback = "jit"                         # what serves a step whose graph is not there
    process: Process = "here"                          # "worker": weights and graphs in a process of their own, which
    step_timeout_s: Seconds = 120.0                    # may take so long for one token, its capture included,
    work_timeout_s: Seconds = 900.0                    # and so long to load, to warm up or to settle
    run_ahead: Annotated[int, Meta(ge=0, le=64)] = 0   # steps launched before the token of an earlier one is read
    steps: Steps = 1                                   # decode steps of one graph launch, under policy "full"
    repeat: Repeat = "auto"                            # how a graph holds them: side by side, or as a loop (if it can)


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One experiment. A notebook's parameters are fields of this class."""

    model: str = "tiny"
    arms: Annotated[tuple[Arm, ...], Meta(min_length=1)] = ARMS                        # interleaved in one process
    policy: str | Policy | Annotated[tuple[str | Policy, ...], Meta(min_length=1)] = "whole"  # several are compared
    kernels: Kernels | Annotated[tuple[Literal["torch", "fused"], ...], Meta(min_length=1)] = "torch"  # of arms that
                                                        # compile; several are compared
    run_ahead: Annotated[int, Meta(ge=0, le=64)] = 0    # steps launched before the token of an earlier one is read
    steps: Steps | Annotated[tuple[Steps, ...], Meta(min_length=1)] = 1  # decode steps of one graph launch, where
                                                        # policy "full" replays; several are compared
    device: str = "auto"
    dtype: str | None = None
    lengths: Annotated[tuple[Positive, ...], Meta(min_length=1)] = PAPER_LENGTHS  # of prompts, in tokens with BOS
    new_tokens: Positive = 32                           # generated by an ITL request
    repeats: Positive = 30                              # timed TTFT requests for each arm and length
    itl_repeats: Annotated[int, Meta(ge=0)] = 1         # timed ITL requests for each arm and length
    warmup: Annotated[int, Meta(ge=1)] = 20             # untimed rounds before the first timed one
    process: Process = "here"                           # "worker": each arm in a process of its own, with its weights
    restarts: Annotated[int, Meta(ge=1, le=64)] = 1     # fresh processes, one after the other, that share the rounds
    budget_s: Annotated[float, Meta(gt=0)] = 600.0      # timed rounds stop here; finished rounds are kept
    temperature: Annotated[float, Meta(ge=0.0)] = 0.0
    top_k: Positive | None = None
    top_p: Probability | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0      # of prompts, of the order of requests, of sampling
    threads: Positive = 1                               # CPU threads of PyTorch; 1 is steadiest at batch 1


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One experiment about the graph cache: a request stream served under several settings, what a capture costs, and
    what captures behind do to decoding. Notebook 07's parameters are fields of this class."""

    model: str = "tiny"
    arm: Literal["graph", "hybrid"] = "hybrid"
    policy: str | Policy = "whole"
    device: str = "auto"
    dtype: str | None = None
    trace: str = "zipf"                                # grid, uniform, zipf or chat, or a file of requests (.csv)
    requests: Positive = 200                           # of the trace
    new_tokens: Positive = 4                           # generated by each request, unless a file says otherwise
    pause_ms: Annotated[float, Meta(ge=0)] = 0.0       # between two requests
    compare: Annotated[tuple[dict[str, Any], ...], Meta(min_length=1)] = (
        {"capture": "never"}, {"capture": "sync"}, {"capture": "async"})  # fields of RuntimeConfig, one dict a setting
    repeats: Positive = 3                              # passes of the trace under each setting, each from a cold cache
    cost_lengths: tuple[Positive, ...] = ()            # prompt lengths whose capture is timed and weighed
    cost_repeats: Positive = 6                         # captures of each of them
    disturb: tuple[str, ...] = ()                      # ways to capture behind whose effect on decoding is measured
    disturb_captures: Positive = 20                    # captures made behind decoding, for each way and round
    disturb_run_ahead: Annotated[int, Meta(ge=0, le=64)] = 0  # steps launched meanwhile before an earlier token is read
    budget_s: Annotated[float, Meta(gt=0)] = 600.0     # no pass or round starts later than this; finished ones are kept
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    threads: Positive = 1


Tool = Literal["auto", "nsys", "torch"]
TOOLS: tuple[Tool, ...] = get_args(Tool)


class TraceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trace: a request of each arm under a profiler, after warm-up. Notebook 09's parameters are fields of this
    class."""

    model: str = "tiny"
    arms: Annotated[tuple[Arm, ...], Meta(min_length=1)] = ARMS
    policy: str | Policy | Annotated[tuple[str | Policy, ...], Meta(min_length=1)] = "whole"
    kernels: Kernels | Annotated[tuple[Literal["torch", "fused"], ...], Meta(min_length=1)] = "torch"
    run_ahead: Annotated[int, Meta(ge=0, le=64)] = 0
    device: str = "auto"
    dtype: str | None = None
    length: Positive = 16                               # of the prompt, in tokens with BOS
    traced_tokens: Annotated[int, Meta(ge=2)] = 16      # generated under the profiler
    warmup: Annotated[int, Meta(ge=1)] = 20             # untraced requests before
    tool: Tool = "auto"                                 # nsys where it is and the device is a GPU, else PyTorch's
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    threads: Positive = 1


Part = Literal["coldstart", "memory", "overhead", "ipc", "watching"]
PARTS: tuple[Part, ...] = get_args(Part)


class SystemConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What serving costs beside latency: a cold start, memory, and what measuring itself adds."""

    model: str = "tiny"
    parts: Annotated[tuple[Part, ...], Meta(min_length=1)] = PARTS
    arm: Arm = "hybrid"
    policy: str | Policy = "whole"
    device: str = "auto"
    dtype: str | None = None
    lengths: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (16, 128)  # of prompts whose graphs are weighed
    repeats: Positive = 3                               # fresh processes of a cold start for each state of the caches
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    threads: Positive = 1


class SoakConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One soak: requests that force evictions all along, with canaries, over a worker that is stopped and killed."""

    model: str = "tiny"
    arm: Literal["graph", "hybrid"] = "hybrid"
    policy: str | Policy = "whole"
    process: Process = "worker"                         # "here": nothing is stopped or killed
    device: str = "auto"
    dtype: str | None = None
    minutes: Annotated[float, Meta(gt=0, le=10080)] = 10.0
    trace: str = "uniform"                              # as in CacheConfig
    cache_graphs: Annotated[int, Meta(ge=2, le=64)] = 5  # that the cache holds; four times as many are asked for
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


Variant = Literal["torch", "kernel", "kernel, pdl"]  # stock PyTorch, our kernels, these begun early
VARIANTS: tuple[Variant, ...] = get_args(Variant)


class BenchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One timing of every operation of a model's decode step, and of the whole step, beside the read rate."""

    model: str = "tiny"
    # Of the context, the token itself with it; None: 1, 100, 500 and the model's own, 4096 at most.
    lengths: Annotated[tuple[Positive, ...], Meta(min_length=1)] | None = None
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1)] | None = None  # None: all that the device can run
    device: str = "auto"
    dtype: str | None = None
    repeats: Positive = 20                             # timed replays of each operation, context and variant
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0  # of the order
    threads: Positive = 1


REPLAYING = ("graph", "hybrid")  # the arms that replay graphs, so that a policy makes a difference to them
COMPILING = ("jit", "hybrid")    # the arms whose dynamic operations are JIT kernels

T = TypeVar("T", bound=msgspec.Struct)


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """A `kind` from plain values. Raises `ConfigError` with field, value and remedy; `kind` is untouched by order."""
    fields = set(kind.__struct_fields__)
    for name in values:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise ConfigError(f"{name!r} is no parameter name", f"{kind.__name__} takes {', '.join(sorted(fields))}")
        if name not in fields:
            raise ConfigError(f"{kind.__name__} has no field {name!r}", "", nearest(name, fields))
    given = values.get("policy") if "policy" in fields else None
    for one in (each for each in (given if isinstance(given, list | tuple) else [given]) if isinstance(each, str)):
        policy(one)
    for name, known in WORDS.items():
        if name in values and name in fields and not (name == "dtype" and values[name] is None):
            several = kind in (RunConfig, TraceConfig) and isinstance(values[name], list | tuple)
            for one in values[name] if several else [values[name]]:
                choose(name, one, known)
    if "buckets" in fields and isinstance(values.get("buckets"), str) and values["buckets"] != "exact":
        raise ConfigError(f"buckets is {values['buckets']!r}", "that is neither a list nor 'exact'",
                          "give ascending prompt lengths, 'exact' for each length by itself, or nothing for a ladder")
    arms = values.get("arms", ()) if "arms" in fields else ()
    for arm in arms if isinstance(arms, list | tuple) else [arms] if isinstance(arms, str) else ():
        choose("arm", arm, ARMS)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}", f"in {kind.__name__}", "give a finite number")
    try:
        return msgspec.convert(dict(values), kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # of half a surrogate pair
        what, _, where = str(error).partition(" - at `$.")
        name = where.partition("[")[0].strip("`.")
        given = shown(values.get(name, dict(values)))
        raise ConfigError(f"{name or kind.__name__} is {given}", what[:1].lower() + what[1:],
                          f"see {kind.__name__} for types and ranges") from None


def as_dict(config: msgspec.Struct) -> dict[str, Any]:
    """Plain values that `build` turns back into an equal config, also after a trip through JSON."""
    return msgspec.to_builtins(config)
