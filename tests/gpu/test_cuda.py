"""The public API on CUDA: the same promises as on the CPU, with real graphs and Triton kernels.

Skipped without a GPU: there is nothing here that a CPU could stand in for.
"""

from __future__ import annotations

import pytest
import torch

import hybridlab as hl
from hybridlab import kernels, ops
from hybridlab.config import ARMS
from hybridlab.errors import NonFinite
from tests.helpers import attended

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LENGTHS = (1, 9, 10, 63, 64, 65, 127, 500)
NEW = 64


def prompt(model: torch.nn.Module, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, model.config.vocab_size, (length,), generator=generator).tolist()


def expected(model: torch.nn.Module, ids: list[int]) -> list[int]:
    given = torch.tensor([ids], device=model.device)
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False,
                         eos_token_id=None)
    return out[0, len(ids):].tolist()


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return hl.load("tiny")


@pytest.mark.parametrize("arm", ARMS)
def test_greedy_tokens_equal_generate(tiny: torch.nn.Module, arm: str) -> None:
    """A kernel, a graph or a bucket that changes a token."""
    with hl.Runtime(tiny, arm=arm) as runtime:
        runtime.warm_up(LENGTHS)
        for length in LENGTHS:
            ids = prompt(tiny, length)
            out = runtime.generate(ids, max_new_tokens=NEW, stop=[])
            assert out.ids == expected(tiny, ids), length
            if arm in ("graph", "hybrid"):
                assert set(out.paths) == {"graph"}


def test_warm_hybrid_captures_and_compiles_nothing(tiny: torch.nn.Module) -> None:
    """A capture or a Triton compilation inside a timed region."""
    with hl.Runtime(tiny) as runtime:
        runtime.warm_up([10, 100], temperature=0.8, top_k=20)
        before = runtime.counters.as_dict()
        runtime.generate(prompt(tiny, 100), temperature=0.8, top_k=20)
        after = runtime.counters.as_dict()
        assert (after["captures"], after["compiles"]) == (before["captures"], before["compiles"])
        assert after["replays"] > before["replays"]


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}])
def test_arms_draw_the_same_tokens(tiny: torch.nn.Module, settings: dict[str, float]) -> None:
    """A sampler whose draw depends on more than seed and position."""
    drawn = {}
    for arm in ARMS:
        with hl.Runtime(tiny, arm=arm) as runtime:
            drawn[arm] = [runtime.generate(prompt(tiny, 20), temperature=0.8, seed=seed, stop=[], **settings).ids
                          for seed in (0, 1, 2)]
    assert drawn["eager"] == drawn["graph"] == drawn["jit"] == drawn["hybrid"]
    assert drawn["eager"][0] != drawn["eager"][1]


@pytest.mark.parametrize(("rows", "start", "window"), [(1, 0, 0), (1, 299, 0), (33, 0, 0), (64, 5, 16)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_attend_against_the_specification(dtype: torch.dtype, limit: float, rows: int, start: int, window: int) -> None:
    """A Triton kernel that differs from its specification beyond rounding; both are compared in float64."""
    torch.manual_seed(0)
    shape = {"q": (1, rows, 8, 64), "k": (1, rows, 2, 64), "v": (1, rows, 2, 64)}
    q, k, v = (torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2) for s in shape.values())
    caches = [torch.randn(1, 2, 300, 64, device="cuda", dtype=dtype) for _ in range(2)]
    positions = torch.arange(start, start + rows, device="cuda")
    exact = attended(ops.attend, *(t.double() for t in (q, k, v, *caches)), positions, 0.125, 300, window, 0.0)
    got = attended(kernels.TRITON["attend"], q, k, v, *caches, positions, 0.125, 300, window, 0.0)
    assert ((got.double() - exact).abs().max() / exact.abs().max()).item() <= limit


def test_random_llama_in_half_precision_matches_across_arms() -> None:
    """Half precision taking another path in one arm: tokens must agree up to the first near-tie; here, all 32."""
    model = hl.load("random:tiny-llama-2")
    assert model.dtype == torch.float16
    drawn = {}
    for arm in ARMS:
        with hl.Runtime(model, arm=arm) as runtime:
            drawn[arm] = runtime.generate(prompt(model, 50), max_new_tokens=32, stop=[]).ids
    assert drawn["hybrid"] == drawn["jit"]
    assert drawn["graph"] == drawn["eager"] or drawn["graph"][:8] == drawn["eager"][:8]


@pytest.mark.parametrize("policy", ["piecewise", "full", hl.Policy(("attention", "lm_head")), hl.Policy(("mlp",))])
@pytest.mark.parametrize("arm", ["graph", "hybrid"])
def test_policies_give_the_same_tokens(tiny: torch.nn.Module, arm: str, policy: str | hl.Policy) -> None:
    """A piece captured before its inputs were real, a value between pieces that moved, or a step that ran twice."""
    for ahead in (0, 3):
        with hl.Runtime(tiny, arm=arm, policy=policy, capture="sync", run_ahead=ahead) as runtime:
            for length in (1, 64, 65, 500):
                ids = prompt(tiny, length)
                want = expected(tiny, ids)
                assert runtime.generate(ids, max_new_tokens=NEW, stop=[]).ids == want, length
                cut = runtime.generate(ids, max_new_tokens=NEW, stop=[want[9]])
                assert cut.ids == want[:want.index(want[9]) + 1]
                assert set(cut.paths) == {"graph"}
            graphs = sum(s.path == "graph" for s in runtime.plan.segments)
            assert runtime.counters.replays == graphs * (runtime.counters.hits + runtime.counters.misses)
            assert runtime.counters.failures == 0


@pytest.mark.parametrize("policy", ["piecewise", "full"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 50, "top_p": 0.8}])
def test_policies_draw_what_eager_draws(tiny: torch.nn.Module, policy: str, settings: dict[str, float]) -> None:
    """A draw inside a graph that bakes in its seed, or reads a position that the graph has not moved on yet."""
    with hl.Runtime(tiny, arm="eager") as eager, hl.Runtime(tiny, policy=policy, run_ahead=2) as runtime:
        for seed in (0, 1, 2, 0):
            asked = {"temperature": 0.8, "seed": seed, "stop": [], **settings}
            ids = prompt(tiny, 20)
            assert runtime.generate(ids, **asked).ids == eager.generate(ids, **asked).ids


@pytest.mark.parametrize("policy", ["whole", "piecewise", "full"])
def test_replay_is_bit_equal_to_its_kernels(tiny: torch.nn.Module, policy: str) -> None:
    """Graphs whose logits differ from the same kernels launched one by one."""
    with hl.Runtime(tiny, policy=policy, capture="sync") as runtime:
        runtime.generate(prompt(tiny, 100), max_new_tokens=5, stop=[])
        executor = runtime._executor
        replayed = executor.logits.clone()
        with torch.no_grad():
            executor.program("decode", 1)()
        assert torch.equal(executor.logits, replayed)


def test_tokens_survive_capture_behind_requests(tiny: torch.nn.Module) -> None:
    """Captures between requests that leave memory of theirs where the next request reads."""
    with hl.Runtime(tiny, policy="piecewise", capture="async", buckets=[16, 64, 512]) as runtime:
        for length in (9, 500, 64, 9, 500, 64):
            ids = prompt(tiny, length)
            assert runtime.generate(ids, max_new_tokens=NEW, stop=[]).ids == expected(tiny, ids)
        assert runtime.counters.captures == 4


def test_broken_logits_do_not_end_the_process(tiny: torch.nn.Module) -> None:
    """The token -1 looked up in the embedding by a step launched ahead: a device assertion that nothing survives."""
    model = hl.load("random:tiny-llama-3")
    with hl.Runtime(model, policy="full", run_ahead=4) as runtime:
        runtime.warm_up([10])
        model.lm_head.weight[3, 3] = float("nan")
        with pytest.raises(NonFinite, match="new token 0"):
            runtime.generate(prompt(model, 10))
    assert torch.ones(2, device="cuda").sum().item() == 2
