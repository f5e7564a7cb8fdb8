"""Radial basis and cutoff function: values by hand, smoothness at the cutoff, slopes against autograd."""

import math

import pytest
import torch
from inputs import isolated_pairs, without_update
from reference import random_model

from mlff.filter import CUTOFF_FUNCTIONS, RADIAL_BASES, cosine_cutoff, cutoff_envelope, gaussian_rows, radial_basis

RC = 5.0


KINDS = [(basis, function) for basis in RADIAL_BASES for function in CUTOFF_FUNCTIONS]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def basis_of(kind, d, n_radial):
    """The radial basis of one of KINDS."""
    return radial_basis(d, RC, kind[1], n_radial, gaussian_rows(RC, n_radial) if kind[0] == "gaussian" else None)


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


@pytest.mark.parametrize("x, f, df", [
    (0.0, 1.0, 0.0), (1 / 3, 0.75, -math.sqrt(3) * math.pi / 4), (0.5, 0.5, -math.pi / 2), (1.0, 0.0, 0.0), (1.3, 0.0, 0.0)
])  # fmt: skip
def test_cosine_values(x, f, df):
    """(1 + cos pi x) / 2 and its slope -pi sin(pi x) / 2; nothing at all is left from the cutoff on."""
    value, slope = cosine_cutoff(tensor(x * RC), RC)
    assert value.item() == pytest.approx(f, abs=1e-15) and slope.item() == pytest.approx(df / RC, abs=1e-15)
    if x >= 1:
        assert value.item() == slope.item() == 0
        assert not any(t.any() for t in cosine_cutoff(tensor(x * RC).float(), RC))


@pytest.mark.parametrize("function", [cutoff_envelope, cosine_cutoff])
def test_cutoff_falls_monotonically(function):
    f, df = function(torch.linspace(0, 1.2 * RC, 200, dtype=torch.float64), RC)
    assert bool((f >= 0).all()) and bool((df <= 0).all())


def test_basis_values():
    """At d = rc / 2: sin(n pi / 2) / d * f(1/2), and f in the last column. At d = rc / 3: with sin(pi / 3) and so on."""
    basis, _ = basis_of(("bessel", "polynomial"), tensor(RC / 2, RC / 3), 3)
    f_half, f_third = 219 / 256, 1 - 28 / 3**6 + 48 / 3**7 - 21 / 3**8
    root = math.sqrt(3) / 2
    expected = tensor(f_half / 2.5, 0, -f_half / 2.5, f_half), tensor(root * 0.6 * f_third, root * 0.6 * f_third, 0, f_third)
    torch.testing.assert_close(basis, torch.stack(expected), rtol=0, atol=1e-12)


def test_gaussian_values():
    """Three Gaussians at 0, 2.5 and 5 Angstrom, 2.5 wide, half-way and at a fifth of the cutoff of 5, with the cosine's 1/2 and 0.904508."""
    basis, _ = basis_of(("gaussian", "cosine"), tensor(2.5, 1.0), 3)
    bells = [[math.exp(-0.5), 1, math.exp(-0.5), 1], [math.exp(-0.08), math.exp(-0.18), math.exp(-1.28), 1]]
    torch.testing.assert_close(basis, tensor(*bells) * tensor([0.5], [(1 + math.cos(math.pi / 5)) / 2]), rtol=0, atol=1e-12)


def test_one_gaussian():
    assert gaussian_rows(RC, 1).tolist() == [[0, 1 / RC], [0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_basis_vanishes_beyond_the_cutoff(kind):
    basis, slope = basis_of(kind, tensor(RC, 1.1 * RC, 7.0), 20)
    assert basis.abs().max() < 1e-12 and slope.abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_slope_is_the_derivative(kind):
    d = torch.linspace(0.3, 1.05 * RC, 60, dtype=torch.float64, requires_grad=True)
    basis, slope = basis_of(kind, d, 20)
    for column in range(21):
        (expected,) = torch.autograd.grad(basis[:, column].sum(), d, retain_graph=True)
        torch.testing.assert_close(slope[:, column], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    d = torch.linspace(0.4, 0.98 * RC, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: basis_of(kind, d, 6), (d,))
    assert torch.autograd.gradgradcheck(lambda d: basis_of(kind, d, 6)[0], (d,))


@pytest.mark.parametrize("kind", KINDS)
def test_no_edges(kind):
    basis, slope = basis_of(kind, torch.zeros(0, dtype=torch.float64), 4)
    assert basis.shape == slope.shape == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    """Single precision keeps six digits of the largest entry."""
    d = torch.linspace(0.5, RC, 100, dtype=torch.float64)
    for a, b in zip(basis_of(kind, d.float(), 20), basis_of(kind, d, 20)):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() < 2e-6 * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symbols", ["OH", "CC"])
def test_kernel(symbols, kind, assert_kernel_agrees):
    """Pairs at all distances up to and beyond the cutoff, in a model in which the filter does most of the work."""
    model = without_update(random_model(16, 1, radial_basis=kind[0], cutoff_function=kind[1], n_radial=20))
    distances = [*torch.linspace(1.0, RC, 40).tolist(), RC - 1e-4, RC + 1e-4, 6.0]
    assert_kernel_agrees(model, isolated_pairs(symbols, distances))
