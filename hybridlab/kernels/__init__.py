"""The dynamic operations, JIT-compiled, with the signatures of `hybridlab.ops`, registered as `hybridlab_jit::*`.

On a GPU they are Triton kernels, one file an op; on the CPU, Inductor's C++ of the reference. Which one runs is
decided by where the tensors are, so a graph captured on either holds the kernel itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import triton

from hybridlab import ops
from hybridlab.kernels import ahead, attend, attend_next, emit, gemm, gemv, inductor, inputs, sample

_EARLIER_HOOK = triton.knobs.runtime.jit_post_compile_hook


def _note_compile(**event: Any) -> Any:
    inductor.COMPILED_BY.append((ahead.asker(), str(event["repr"]).partition("[")[0]))
    return _EARLIER_HOOK(**event) if _EARLIER_HOOK else None


triton.knobs.runtime.jit_post_compile_hook = _note_compile

TRITON: dict[str, Callable[..., None]] = {
    "attend": attend.attend, "pad": inputs.pad, "advance": inputs.advance,
    "greedy": sample.greedy, "sample": sample.sample, "emit": emit.emit,
    "project": gemv.project, "swiglu": gemv.swiglu, "residual": gemv.residual, "attend_next": attend_next.attend_next,
}
OF_SEVERAL: dict[str, Callable[..., None]] = {  # tokens: where the first argument has two dimensions
    "project": gemm.project, "swiglu": gemm.swiglu, "residual": gemm.residual,
}


def bind(name: str, args: tuple[Any, ...]) -> Callable[[], None]:
    """The call of op `name` with these very arguments, with everything decided that can be decided now.

    Compiles the kernel for the shapes of `args` if that has not happened yet.
    """
    if args[0].is_cuda or args[-1].is_cuda:  # what a step reads first, or writes last, may lie on the host
        several = args[0].dim() == 2 and name in OF_SEVERAL
        return partial((OF_SEVERAL if several else TRITON)[name], *args)
    return inductor.bind(name, args)


def compiled() -> list[str]:
    """The kernels that this thread has compiled so far, by name, itself or ahead: what another thread compiles is not
    this one's."""
    own = ahead.asker()
    return [name for thread, name in list(inductor.COMPILED_BY) if thread == own]


def compiles() -> int:
    """JIT compilations by this thread so far."""
    return len(compiled())


def _run(name: str) -> Callable[..., None]:
    return lambda *args: bind(name, args)()


_LIBRARY = ops.register("hybridlab_jit", {name: _run(name) for name in ops.SCHEMAS})
