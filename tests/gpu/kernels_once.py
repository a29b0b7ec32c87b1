"""Every Triton kernel of the package once, on a tiny model: what compute-sanitizer watches (see test_sanitizer)."""

from __future__ import annotations

import hybridlab as hl

REQUESTS = ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9})
LENGTHS = (1, 17, 70)  # a prompt of one row, one of the skinny products, one beyond them


def main() -> None:
    """Arm jit: without a graph each kernel is a launch of its own, and none is hidden behind another's memory."""
    model = hl.load("random:tiny-llama-2-7b", device="cuda", dtype="float16")
    for kernels in ("torch", "fused"):
        with hl.Runtime(model, arm="jit", kernels=kernels, max_len=128) as runtime:
            for length in LENGTHS:
                for draw in REQUESTS:
                    runtime.generate(list(range(2, 2 + length)), max_new_tokens=3, stop=[], **draw)
            assert runtime.counters.compiles > 0, "no kernel was compiled, so none was watched"


if __name__ == "__main__":
    main()
