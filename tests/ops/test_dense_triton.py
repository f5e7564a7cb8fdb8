"""Products of halves: float32 accuracy whatever the size of the numbers."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from mlff.dense_triton import product, weights  # noqa: E402
from mlff.plan import HALVES_SCALE  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def multiply(a, w, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    w_hi, w_lo = weights(w + k[:, None] * N + n, K * N)
    tl.store(out + m * N + n, product(tl.load(a + m * K + k[None, :]), w_hi, w_lo))


def run(a, weight):
    scaled = (weight * HALVES_SCALE).float()
    hi = scaled.half()
    w = torch.cat([hi, (scaled - hi.float()).half()]).contiguous().to(DEVICE)
    out = torch.full((a.shape[0], weight.shape[1]), 7.0, device=DEVICE)
    multiply[(1,)](a.float().to(DEVICE), w, out, *a.shape, weight.shape[1])
    return out.cpu().double()


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-3, 1.0, 300.0, 1e5, 1e20])
def test_any_size_of_features(size):
    generator = torch.Generator().manual_seed(0)
    a = size * torch.randn(16, 64, generator=generator, dtype=torch.float64)
    weight = 0.1 * torch.randn(64, 32, generator=generator, dtype=torch.float64)
    expected = a.float().double() @ weight
    error = (run(a, weight) - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


def test_rows_of_different_size_and_of_zeros():
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([10.0**k for k in range(-12, 3)] + [0.0], dtype=torch.float64)[:, None]
    a = size * torch.randn(16, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(32, 16, generator=generator, dtype=torch.float64)
    expected = a.float().double() @ weight
    found = run(a, weight)
    assert (found[-1] == 0).all()
    assert ((found - expected).abs().amax(1)[:-1] / expected.abs().amax(1)[:-1]).max() < 1e-6


def test_values_by_hand():
    a, weight = torch.zeros(16, 16), torch.zeros(16, 16)
    a[0, 0], a[0, 1], a[1, 2] = 3.0, 0.125, -2.0
    weight[0, 5], weight[1, 5], weight[2, 0] = 2.0, 8.0, 0.25
    expected = torch.zeros(16, 16, dtype=torch.float64)
    expected[0, 5], expected[1, 0] = 7.0, -0.5
    np.testing.assert_array_equal(run(a, weight), expected)


def test_not_a_number_stays_one():
    a = torch.ones(16, 16)
    a[3, 3], a[4, 4] = float("nan"), float("inf")
    found = run(a, torch.ones(16, 16))
    assert not torch.isfinite(found[3:5]).any() and torch.isfinite(found[:3]).all()
