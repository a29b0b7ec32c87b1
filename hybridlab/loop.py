"""A graph that is replayed while its state says so: by a WHILE node of CUDA, or by the host over a tape."""

from __future__ import annotations

import ctypes
import os
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hybridlab import gpus
from hybridlab.config import RuntimeConfig
from hybridlab.errors import ConfigError
from hybridlab.tape import Tape

BINDINGS = 13  # the first major version of cuda.bindings with these signatures
DRIVER = 12040  # of CUDA, from which conditional nodes may loop
SOURCE = rb"""
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);
extern "C" __global__ void go_on(const long long *state, unsigned long long handle) {
    cudaGraphSetConditional(handle, state[1] > 0 && state[2] == 0);
}
"""


def going(state: Tensor) -> bool:
    """Whether a further step is wanted; `state` as in `hybridlab.ops.emit`. Waits for the device."""
    _, left, over = state.tolist()
    return left > 0 and not over


def problem(device: torch.device) -> str | None:
    """Why no graph on `device` can loop, or None."""
    return _problem() if device.type == "cuda" else None


def wanted(config: RuntimeConfig, device: torch.device) -> bool:
    """Whether the graph of several steps holds one that it repeats, rather than all side by side.

    Raises `ConfigError` if that is asked for and cannot be.
    """
    if config.steps == 1 or config.repeat == "unrolled":
        return False
    why_not = problem(device)
    if why_not and config.repeat == "while":
        raise ConfigError("repeat is 'while'", why_not, "use repeat='unrolled'")
    return why_not is None


@cache
def _problem() -> str | None:
    try:
        import cuda.bindings
        from cuda.bindings import driver
    except ImportError:
        return "package cuda-bindings is not installed"
    if int(cuda.bindings.__version__.partition(".")[0]) < BINDINGS:
        return f"cuda-bindings is {cuda.bindings.__version__}; it must be {BINDINGS} or later"
    version = _done(driver.cuDriverGetVersion())
    if version < DRIVER:
        return f"the driver is for CUDA {version // 1000}.{version % 1000 // 10}; graphs loop from 12.4 on"
    if gpus.device_runtime() is None:
        return f"{gpus.DEVICE_RUNTIME} of the CUDA toolkit was not found; CUDA_HOME may say where that is"
    return None


def _done(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings gives beside its status."""
    status, *found = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA refused to loop a graph: {status!r}")
    return found[0] if len(found) == 1 else tuple(found)


@cache
def _kernel(context: int) -> Any:
    """The kernel that asks for a further round, in the context of this number."""
    from cuda.bindings import driver, nvrtc

    major, minor = torch.cuda.get_device_capability()
    options = [b"--relocatable-device-code=true", f"--gpu-architecture=compute_{major}{minor}".encode()]
    program = _done(nvrtc.nvrtcCreateProgram(SOURCE, b"go_on.cu", 0, [], []))
    _done(nvrtc.nvrtcCompileProgram(program, len(options), options))
    code = b" " * _done(nvrtc.nvrtcGetPTXSize(program))
    _done(nvrtc.nvrtcGetPTX(program, code))
    link = _done(driver.cuLinkCreate(0, [], []))
    kinds = driver.CUjitInputType
    _done(driver.cuLinkAddData(link, kinds.CU_JIT_INPUT_PTX, code, len(code), b"go_on", 0, [], []))
    _done(driver.cuLinkAddFile(link, kinds.CU_JIT_INPUT_LIBRARY, os.fsencode(str(gpus.device_runtime())), 0, [], []))
    image, size = _done(driver.cuLinkComplete(link))
    module = _done(driver.cuModuleLoadData(ctypes.string_at(int(image), size)))
    _done(driver.cuLinkDestroy(link))
    return _done(driver.cuModuleGetFunction(module, b"go_on"))


class OnDevice:
    """The graph of one step, captured with keep_graph, in a WHILE node; before its first round it is asked too."""

    def __init__(self, step: torch.cuda.CUDAGraph, state: Tensor) -> None:
        from cuda.bindings import driver

        context = _done(driver.cuCtxGetCurrent())
        self._graph = _done(driver.cuGraphCreate(0))
        handle = _done(driver.cuGraphConditionalHandleCreate(self._graph, context, 0, 0))
        ask = driver.CUDA_KERNEL_NODE_PARAMS()
        ask.func = _kernel(int(context))
        ask.gridDimX = ask.gridDimY = ask.gridDimZ = ask.blockDimX = ask.blockDimY = ask.blockDimZ = 1
        ask.kernelParams = ((state.data_ptr(), int(handle)), (ctypes.c_void_p, ctypes.c_uint64))
        first = _done(driver.cuGraphAddKernelNode(self._graph, [], 0, ask))
        node = driver.CUgraphNodeParams()
        node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle, node.conditional.ctx, node.conditional.size = handle, context, 1
        node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        _done(driver.cuGraphAddNode(self._graph, [first], None, 1, node))
        body = node.conditional.phGraph_out[0]
        inner = _done(driver.cuGraphAddChildGraphNode(body, [], 0, driver.CUgraph(step.raw_cuda_graph())))
        _done(driver.cuGraphAddKernelNode(body, [inner], 1, ask))
        self._executable = _done(driver.cuGraphInstantiate(self._graph, 0))
        self._launch = partial(driver.cuGraphLaunch, self._executable)

    def replay(self) -> None:
        _done(self._launch(torch.cuda.current_stream().cuda_stream))

    def reset(self) -> None:
        from cuda.bindings import driver

        _done(driver.cuGraphExecDestroy(self._executable))
        _done(driver.cuGraphDestroy(self._graph))


class OnHost:
    """The tape of one step, replayed in a Python loop."""

    def __init__(self, step: Tape, state: Tensor) -> None:
        self._step, self._state = step, state
        self.nbytes, self.pool_bytes, self.graphs = step.nbytes, step.pool_bytes, step.graphs
        self.capture_ms, self.instantiate_ms = step.capture_ms, step.instantiate_ms

    def replay(self) -> None:
        while going(self._state):
            self._step.replay()

    def reset(self) -> None:
        self._step.reset()
