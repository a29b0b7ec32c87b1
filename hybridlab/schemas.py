"""The columns of each kind of recorded rows: ablation, graph cache, kernels of a decode step, trace, system,
the paper."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def _schema(columns: str, optional: tuple[str, ...] = ()) -> pa.Schema:
    """A schema from `name:type` words. What is not optional is never null."""
    types: dict[str, Any] = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    pairs = (column.split(":") for column in columns.split())
    return pa.schema([pa.field(name, types[kind], nullable=name in optional) for name, kind in pairs])


# One row a timed token, of an ablation, or of peers, whose arm names the system. bucket is null where none was used. In
# every kind of rows these are null in runs recorded before there were any:
#   process    of the processes that share the rounds, the number of the one that made this row.
#   device_ms  the same interval by the device's clock; null on a CPU and with several steps a launch.
#   client_ms  the same interval by the clock of a client that a worker serves; null without a worker.
#   ended_ns   when it ended, by time.perf_counter_ns of the process that served it, on Linux one clock for all of them.
#   happened   what happened meanwhile in that process (tails.KINDS), with commas; happened_ms: of what was timed, the
#              time it overlaps.
#   profiled   a profiler listened, here or in the process that served it: such times are no latencies. Where rows do
#              not say, it is as they are stored.
ABLATION = _schema(
    "run_id:str round:int request:int arm:str policy:str prompt_tokens:int bucket:int index:int position:int "
    "metric:str ms:float path:str reason:str captures:int compiles:int process:int device_ms:float client_ms:float "
    "ended_ns:int happened:str happened_ms:float profiled:bool",
    optional=("bucket", "process", "device_ms", "client_ms", "ended_ns", "happened", "happened_ms", "profiled"))

# One row an interval. part says what was measured, and with it what the other columns mean:
#   stream   requests in order, a pass (round) under a setting. metric "ttft" (index 0), "itl" (index 1, 2, …) and
#            "after": from a request's last token until the runtime is free again (index -1, no path). Two rows of a
#            pass belong to no request: "start", building the runtime, captures ahead included, and "settle", waiting
#            after the last request until every capture behind is done.
#   cost     one time of one capture of prompt_tokens rows. metric "rehearse", "capture", "instantiate",
#            "first_replay", "replay" (path "graph") or "jit" (path "jit"); graph_bytes is what it holds beyond before.
#   disturb  setting is a way to capture. metric "itl": a gap between decode tokens; "capture": from asked to usable.
# hits … capture_ms happened in the interval; graphs and graph_bytes are what is held at its end; capturing: a capture
# behind was under way before or after it. ended_ns, happened and happened_ms are of a stream's requests alone.
CACHE = _schema(
    "run_id:str part:str round:int setting:str request:int prompt_tokens:int bucket:int index:int metric:str ms:float "
    "path:str reason:str hits:int misses:int captures:int evictions:int failures:int capture_ms:float graphs:int "
    "graph_bytes:int capturing:bool ended_ns:int happened:str happened_ms:float profiled:bool",
    optional=("request", "bucket", "ended_ns", "happened", "happened_ms", "profiled"))

# One row a timed replay of a graph of `calls` calls, `ms` in all and `us` each; order counts replays as they were made.
#   op    variant of one operation; rows: of its result, depth: of its input, context: 0 where it sees none.
#   read  a reduction over `depth` numbers that no cache holds, timed beside the op that `variant` names.
#   step  a whole decode step; kernels: what it launches on the device, rows and depth as of its head.
# bytes, flops: of one call, the least that it must read and write, and those of its products.
KERNELS = _schema(
    "run_id:str metric:str op:str variant:str rows:int depth:int context:int calls:int kernels:int ms:float us:float "
    "bytes:int flops:int order:int profiled:bool", optional=("kernels", "profiled"))

# One row an event of a trace; the columns from kind on are those of `events.COLUMNS`, stamps count from the beginning
# of the arm's trace.
TRACE = _schema(
    "run_id:str arm:str kind:str name:str start_ns:int end_ns:int stream:int thread:int correlation:int graph:int "
    "node:int category:str payload:int", optional=("stream", "thread", "correlation", "graph", "node", "payload"))

# One row a value of a reproduction of the paper. part says what was measured, arm what by, tokens at which length:
#   ttft        first tokens, warm; tokens: of the prompt.        cached      gaps, with a KV cache; tokens: asked for.
#   recomputed  tokens, each by a forward of the whole sequence.  capture     first tokens of a stream; arm: a setting.
#   overlap     gaps while graphs are captured; arm: a way.       memory      MiB; metric: what holds them.
#   cost        times of captures as in CACHE; arm: a pool.       protocol    "first" and "repeated" calls in a process.
#   ipc         steps of a crossing; arm: its setting. Of old runs, round trips alone, of arm "unix socket".
# metric "clipped": tokens do not fit the context of `value` tokens. index, position: of the token. state: hit (a graph
# of just these rows), bucket (padded to one), captured (in the request), miss, or none (an arm without graphs); of part
# overlap, whether a capture was under way. bytes: of the graph.
PAPER = _schema(
    "run_id:str part:str arm:str round:int request:int tokens:int index:int position:int metric:str value:float "
    "unit:str path:str reason:str state:str captures:int compiles:int bytes:int profiled:bool",
    optional=("bytes", "profiled"))

# One row a request. at_s: seconds since the soak began; itl_ms: the median gap; canary: its tokens were compared with
# recorded ones; path: of the first token. Memory, files and threads are of this process and its worker, after the
# request; gpu_bytes: in use on the whole device, null without one. event: what was done to the worker meanwhile
# ("stop", "kill"); recovery_ms: from its death until another served; life: which worker this is, counted from 1.
SOAK = _schema(
    "run_id:str request:int at_s:float prompt_tokens:int canary:bool ttft_ms:float itl_ms:float path:str captures:int "
    "evictions:int graphs:int rss_bytes:int gpu_bytes:int files:int threads:int event:str recovery_ms:float life:int "
    "profiled:bool", optional=("gpu_bytes", "recovery_ms", "life", "profiled"))

# One row a value. part: coldstart, memory, overhead or ipc; setting: of the caches, say; step: what the value is of.
SYSTEM = _schema("run_id:str part:str setting:str round:int step:str value:float unit:str profiled:bool",
                 optional=("profiled",))
