"""`python -m tests.fuzz.harness NAME [libFuzzer options]`: atheris searches for bytes that break one reader.

Names: kineto, nsys, weights, index, config, workload. It begins from a sound file, keeps what it learns in
.cache/fuzz/NAME, and ends at the first input that is neither read nor refused; that input is then a case for
tests/faults/test_fuzz.py.
`-max_total_time=60` bounds it. Needs atheris, which `make fuzz` installs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hybridlab"]):
    from tests.fuzz import targets

BEGIN = {
    "kineto": (targets.kineto_file, [targets.TRACE.encode(), b'{"traceEvents":[]}']),
    "nsys": (targets.nsys_file, [targets.database()]),
    "weights": (targets.weights, [targets.WEIGHTS]),
    "index": (targets.index, [targets.INDEX.encode()]),
    "workload": (targets.requests, [targets.REQUESTS.encode()]),
    "config": (targets.config, [targets.CONFIG.encode()]),
}


def main(name: str, options: list[str]) -> None:
    target, seeds = BEGIN[name]
    corpus = Path(__file__).resolve().parents[2] / ".cache" / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={corpus.parent}/{name}-", *options], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
