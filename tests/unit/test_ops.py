"""The specification ops: attention against float64, Philox against its authors, sampling against its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats as scipy_stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hybridlab import ops
from tests.helpers import attended


def one(value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


def draw(logits: torch.Tensor, seed: int, position: int, temperature: float = 1.0, top_k: int | None = None,
         top_p: float | None = None) -> int:
    token = one(0)
    ops.sample(logits, one(seed), one(position), one(temperature, torch.float32), one(top_k or len(logits)),
               one(top_p or 1.0, torch.float32), top_k is not None or top_p is not None, one(0), token)
    return int(token)


def naive_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, position: int, window: int,
                    softcap: float) -> torch.Tensor:
    """One query row by the definition, in Python loops and float64."""
    heads, groups = q.shape[0], k_cache.shape[0]
    out = torch.zeros_like(q, dtype=torch.float64)
    for head in range(heads):
        keys, values = (c[head * groups // heads].double() for c in (k_cache, v_cache))
        rows = range(max(0, position - window + 1) if window else 0, position + 1)
        scores = [float(q[head].double() @ keys[r]) * 0.25 for r in rows]
        scores = [softcap * math.tanh(s / softcap) if softcap else s for s in scores]
        weights = [math.exp(s - max(scores)) for s in scores]
        out[head] = sum(w / sum(weights) * values[r] for w, r in zip(weights, rows, strict=True))
    return out


@pytest.mark.parametrize(("start", "rows"), [(0, 1), (19, 1), (0, 5), (7, 3)])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attend_is_attention_by_definition(start: int, rows: int, window: int, softcap: float) -> None:
    """An off-by-one position, a window one too wide, a wrong scale, or query heads sent to the wrong KV head."""
    torch.manual_seed(start + rows)
    q, k, v = torch.randn(1, 6, rows, 16), torch.randn(1, 2, rows, 16), torch.randn(1, 2, rows, 16)
    k_cache, v_cache = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    positions = torch.arange(start, start + rows)
    out = attended(ops.attend, q, k, v, k_cache, v_cache, positions, 0.25, 20, window, softcap)
    assert torch.equal(k_cache[0, :, positions], k[0])
    assert torch.equal(v_cache[0, :, positions], v[0])
    for row in range(rows):
        exact = naive_attention(q[0, :, row], k_cache[0], v_cache[0], start + row, window, softcap)
        torch.testing.assert_close(out[0, row].double(), exact, rtol=1e-5, atol=1e-5)


def test_rows_beyond_the_position_never_matter() -> None:
    """Padding rows, or the last request's rows, leaking into a token."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1, 16) for _ in range(3))
    outs = []
    for rest in (0.0, 1e4):
        k_cache, v_cache = torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16)
        k_cache[:, :, 9:], v_cache[:, :, 9:] = rest, rest
        outs.append(attended(ops.attend, q, k, v, k_cache, v_cache, one(8), 0.25, 16, 0, 0.0))
    assert torch.equal(*outs)


@pytest.mark.parametrize(("seed", "position", "first"), [
    (0, 0, 0x6627E8D5),
    (0xFFFFFFFFFFFFFFFF - 2**64, 0xFFFFFFFF, None),
])
def test_philox_known_answer(seed: int, position: int, first: int | None) -> None:
    """A generator that only looks random: the first word for the zero counter and key is published by its authors
    (Random123, kat_vectors: philox4x32 10); every word must stay within 32 bits, also where int64 products wrap."""
    words = ops.philox(one(seed), one(position), 64)
    assert int(words.min()) >= 0
    assert int(words.max()) < 2**32
    if first is not None:
        assert int(words[0]) == first


def test_noise_is_finite_for_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform number that rounds to 0 or 1, once in some million entries: infinite noise, and no token."""
    monkeypatch.setattr(ops, "philox", lambda seed, positions, count: torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert torch.isfinite(ops.gumbel(one(0), one(0), 4)).all()


def test_noise_is_gumbel() -> None:
    """Noise of another distribution, which would bend every sampled text. False alarm 1e-6."""
    noise = ops.gumbel(one(1), one(2), 20000).numpy()
    assert scipy_stats.kstest(noise, "gumbel_r").pvalue > 1e-6


def test_draws_follow_the_softmax() -> None:
    """A sampler that prefers some entries. 4000 draws at as many positions; chi-square, false alarm 1e-6."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    counts = torch.bincount(torch.tensor([draw(logits, 3, p, temperature=0.7) for p in range(4000)]), minlength=5)
    expected = torch.softmax(logits / 0.7, 0).double() * 4000
    expected = expected * 4000 / expected.sum()
    assert scipy_stats.chisquare(counts.double().numpy(), expected.numpy(), sum_check=False).pvalue > 1e-6


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (5, None), (None, 0.3), (None, 0.9), (20, 0.7), (500, 0.99)])
def test_filters_keep_what_transformers_keeps(top_k: int | None, top_p: float | None) -> None:
    """Top-k or top-p cutting one entry too many or too few: draws must lie in transformers' set, and reach it all."""
    torch.manual_seed(5)
    logits = torch.randn(40) * 2
    warped = TemperatureLogitsWarper(0.8)(None, logits[None].clone())
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p else warped
    allowed = set(torch.nonzero(torch.isfinite(warped[0])).flatten().tolist())
    likely = set(torch.nonzero(torch.softmax(warped[0], 0) > 0.02).flatten().tolist())
    drawn = {draw(logits, 11, position, 0.8, top_k, top_p) for position in range(600)}
    assert drawn <= allowed
    assert drawn >= likely


def test_seed_and_position_alone_decide() -> None:
    """A draw that depends on call order, or that ignores the seed or the position."""
    logits = torch.zeros(1000)
    assert draw(logits, 1, 1) == draw(logits, 1, 1)
    assert len({draw(logits, 1, p) for p in range(20)}) > 15
    assert len({draw(logits, s, 1) for s in range(20)}) > 15
    assert draw(logits, 5, 1) != draw(logits, 5 + 2**32, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_give_no_token(bad: float) -> None:
    """NaN or infinity turned into a plausible token id."""
    logits = torch.zeros(10)
    logits[4] = bad
    token = one(3)
    ops.greedy(logits, one(0), token)
    assert int(token) == -1
    assert draw(logits, 0, 0) == -1
    assert draw(logits, 0, 0, top_k=3) == -1


def test_pad_and_advance() -> None:
    """A prompt shifted by one, stale ids in the padding, or a position that does not move."""
    ids, last, positions = torch.full((1, 8), 7), one(0), one(4)
    ops.pad(torch.arange(10, 20), one(3), ids, last)
    assert ids.tolist() == [[10, 11, 12, 0, 0, 0, 0, 0]]
    assert int(last) == 2
    ops.pad(torch.arange(10, 20), one(10), ids, last)
    assert int(last) == 7  # the prompt of another request: a row that is not there would end the process on a GPU
    ops.advance(one(42), ids[:, :1], positions)
    assert int(ids[0, 0]) == 42
    assert int(positions) == 5
