"""Radial basis and cutoff function: values by hand, smoothness at the cutoff, slopes against autograd."""

import math

import pytest
import torch
from inputs import isolated_pairs, without_update
from reference import random_model

from mlff.filter import cutoff_envelope, radial_basis

RC = 5.0


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# f(x) = 1 - 28 x^6 + 48 x^7 - 21 x^8, f'(x) = -168 x^5 (1 - x)^2; x = d / rc
@pytest.mark.parametrize(
    "x, f, df",
    [(0.0, 1.0, 0.0), (0.5, 219 / 256, -21 / 16), (0.75, 21067 / 65536, -168 * 3**5 / 4**7), (1.0, 0.0, 0.0), (1.3, 0.0, 0.0)],
)
def test_envelope_values(x, f, df):
    value, slope = cutoff_envelope(tensor(x * RC), RC)
    assert value.item() == pytest.approx(f, abs=1e-12)
    assert slope.item() == pytest.approx(df / RC, abs=1e-12)


def test_envelope_is_smooth_at_the_cutoff():
    """Value, first and second derivative vanish at the cutoff; the second is taken from the analytic first by autograd."""
    d = tensor(RC).requires_grad_()
    f, df = cutoff_envelope(d, RC)
    (df_autograd,) = torch.autograd.grad(f.sum(), d, create_graph=True)
    (d2f,) = torch.autograd.grad(df.sum(), d)
    for value in (f, df, df_autograd, d2f):
        assert abs(value.item()) < 1e-14
    h = 1e-3  # f ~ -56 ((d - rc) / rc)^3 just below the cutoff, so f / h^3 tends to a number and f / h^2 to zero
    f, df = cutoff_envelope(tensor(RC - h), RC)
    assert f.item() == pytest.approx(56 * (h / RC) ** 3, rel=1e-2)
    assert df.item() == pytest.approx(-168 / RC * (h / RC) ** 2, rel=1e-2)


def test_envelope_falls_monotonically():
    f, df = cutoff_envelope(torch.linspace(0, 1.2 * RC, 200, dtype=torch.float64), RC)
    assert bool((f >= 0).all()) and bool((df <= 0).all())


def test_basis_values():
    """At d = rc / 2: sin(n pi / 2) / d * f(1/2), and f in the last column. At d = rc / 3: with sin(pi / 3) and so on."""
    basis, _ = radial_basis(tensor(RC / 2, RC / 3), RC, 3)
    f_half, f_third = 219 / 256, 1 - 28 / 3**6 + 48 / 3**7 - 21 / 3**8
    root = math.sqrt(3) / 2
    expected = tensor(f_half / 2.5, 0, -f_half / 2.5, f_half), tensor(root * 0.6 * f_third, root * 0.6 * f_third, 0, f_third)
    torch.testing.assert_close(basis, torch.stack(expected), rtol=0, atol=1e-12)


def test_basis_vanishes_beyond_the_cutoff():
    basis, slope = radial_basis(tensor(RC, 1.1 * RC, 7.0), RC, 20)
    assert basis.abs().max() < 1e-12 and slope.abs().max() < 1e-12


def test_slope_is_the_derivative():
    d = torch.linspace(0.3, 1.05 * RC, 60, dtype=torch.float64, requires_grad=True)
    basis, slope = radial_basis(d, RC, 20)
    for column in range(21):
        (expected,) = torch.autograd.grad(basis[:, column].sum(), d, retain_graph=True)
        torch.testing.assert_close(slope[:, column], expected, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    d = torch.linspace(0.4, 0.98 * RC, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: radial_basis(d, RC, 6), (d,))
    assert torch.autograd.gradgradcheck(lambda d: radial_basis(d, RC, 6)[0], (d,))


def test_no_edges():
    basis, slope = radial_basis(torch.zeros(0, dtype=torch.float64), RC, 4)
    assert basis.shape == slope.shape == (0, 5)


def test_float32():
    """Single precision keeps six digits of the largest entry."""
    d = torch.linspace(0.5, RC, 100, dtype=torch.float64)
    for a, b in zip(radial_basis(d.float(), RC, 20), radial_basis(d, RC, 20)):
        assert (a.double() - b).abs().max() < 2e-6 * b.abs().max()


@pytest.mark.parametrize("symbols", ["OH", "CC"])
def test_kernel(symbols, assert_kernel_agrees):
    """Pairs at all distances up to and beyond the cutoff, in a model in which the filter does most of the work."""
    model = without_update(random_model(16, 1))
    distances = [*torch.linspace(1.0, RC, 40).tolist(), RC - 1e-4, RC + 1e-4, 6.0]
    assert_kernel_agrees(model, isolated_pairs(symbols, distances))
