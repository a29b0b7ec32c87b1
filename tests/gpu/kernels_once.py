"""Every Triton kernel of the package once, on a tiny model: what compute-sanitizer watches (see test_sanitizer).

Prints the names of those that ran."""

from __future__ import annotations

import sys

import hybridlab as hl
from hybridlab import kernels

REQUESTS = ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9})
LENGTHS = (1, 17, 70)  # a prompt of one row, one of the skinny products, one beyond them


def main() -> None:
    """Arm jit: without a graph each kernel is a launch of its own, and none is hidden behind another's memory."""
    model = hl.load("random:tiny-llama-2-7b", device="cuda", dtype="float16")
    for kind in ("torch", "fused"):
        with hl.Runtime(model, arm="jit", kernels=kind, max_len=128) as runtime:
            for length in LENGTHS:
                for draw in REQUESTS:
                    runtime.generate(list(range(2, 2 + length)), max_new_tokens=3, stop=[], **draw)
            assert runtime.counters.compiles > 0, "no kernel was compiled, so none was watched"
    sys.stdout.write(" ".join(["KERNELS", *sorted(set(kernels.compiled()))]) + "\n")


if __name__ == "__main__":
    main()
