"""Short-range repulsion: against LAMMPS's ZBL, by hand, slopes against autograd, smooth end of the fade-out."""

import pytest
import torch
from ase.data import covalent_radii
from inputs import isolated_pairs, without_network
from reference import random_model
from torch.autograd import grad

from mlff.repulsion import repulsion, zbl_pair_table

ELEMENTS = torch.tensor([1, 6, 8])
# LAMMPS 22 Jul 2025, units metal, `pair_style zbl 3.0 4.0` on two atoms: force in eV/Angstrom, and energy in eV up to one
# constant per pair (that of its switching function), so that differences of energies are compared.
LAMMPS = {
    (1, 1): {0.2: (270.168016, 33.274532), 0.5: (26.135385, 5.905367), 0.9: (4.230559, 1.371885)},
    (1, 8): {0.2: (1945.686827, 221.497547), 0.5: (162.367108, 33.155903), 0.9: (22.533315, 6.612160)},
    (8, 8): {0.2: (14039.373369, 1491.384921), 0.5: (1014.819014, 191.491824), 0.9: (123.973040, 33.346835)},
    (6, 8): {0.2: (10713.131808, 1150.730246), 0.5: (792.939669, 151.450352), 0.9: (98.843420, 26.963746)},
}


def pair_rows(z_i, z_j, n=1, radius=None):
    row = zbl_pair_table(torch.tensor([z_i, z_j]), 1.0)[0, 1].clone()
    if radius is not None:
        row[2] = radius
    return row.expand(n, 3)


@pytest.mark.parametrize("pair", LAMMPS)
def test_against_lammps(pair):
    """Without the fade-out. LAMMPS rounds the screening length to 0.4685 Angstrom (here 0.46853), hence 2e-4."""
    distances = torch.tensor(list(LAMMPS[pair]), dtype=torch.float64)
    energy, slope = repulsion(distances, pair_rows(*pair, 3, radius=1e9))
    forces, energies = torch.tensor(list(LAMMPS[pair].values()), dtype=torch.float64).t()
    torch.testing.assert_close(-2 * slope, forces, rtol=2e-4, atol=0)
    torch.testing.assert_close(2 * (energy - energy[2]), energies - energies[2], rtol=2e-4, atol=2e-3)


def test_value_by_hand():
    """H-H at 0.3 Angstrom: x = d / a = 1.28059; phi(x) from the four exponentials; E = 14.39965 / 0.3 * phi * f(0.3 / 0.62)."""
    phi = 0.18175 * 0.01661189 + 0.50986 * 0.29918639 + 0.28022 * 0.59693306 + 0.02817 * 0.77244625
    x = 0.3 / 0.62
    f = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    energy, _ = repulsion(torch.tensor([0.3], dtype=torch.float64), pair_rows(1, 1))
    assert 2 * energy.item() == pytest.approx(14.399645 / 0.3 * phi * f, rel=1e-7)


def test_pair_table():
    table = zbl_pair_table(ELEMENTS, 0.7)
    assert table.shape == (3, 3, 3) and table.dtype == torch.float64
    torch.testing.assert_close(table, table.transpose(0, 1), rtol=0, atol=0)
    assert table[0, 2, 0].item() == pytest.approx(0.5 * 14.399645 * 8, rel=1e-7)
    assert 1 / table[0, 0, 1].item() == pytest.approx(0.8854 * 0.529177 / 2, rel=1e-6)
    assert table[1, 2, 2].item() == pytest.approx(0.7 * (covalent_radii[6] + covalent_radii[8]))


def test_slope_is_the_derivative():
    for z_i in ELEMENTS.tolist():
        for z_j in ELEMENTS.tolist():
            d = torch.linspace(0.05, 2.0, 80, dtype=torch.float64, requires_grad=True)
            energy, slope = repulsion(d, pair_rows(z_i, z_j, 80))
            (expected,) = grad(energy.sum(), d)
            torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-10)


def test_repels_and_ends_smoothly():
    """Positive and falling inside; from the sum of the covalent radii on exactly zero, derivatives too."""
    pair = pair_rows(1, 8, 100)
    end = pair[0, 2].item()
    energy, slope = repulsion(torch.linspace(0.02, end - 1e-3, 100, dtype=torch.float64), pair)
    assert bool((energy > 0).all()) and bool((slope < 0).all())
    energy, slope = repulsion(torch.linspace(end, 9.0, 100, dtype=torch.float64), pair)
    assert not energy.any() and not slope.any()
    d = torch.tensor([end * (1 - 1e-9)], dtype=torch.float64, requires_grad=True)
    energy, slope = repulsion(d, pair[:1])
    (second,) = grad(slope.sum(), d)
    assert abs(energy.item()) < 1e-12 and abs(slope.item()) < 1e-12 and abs(second.item()) < 1e-4


def test_gradcheck():
    d = torch.linspace(0.2, 0.9, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: repulsion(d, pair_rows(6, 8, 6)), (d,))


def test_no_edges():
    energy, slope = repulsion(torch.zeros(0, dtype=torch.float64), pair_rows(1, 8, 0))
    assert energy.shape == slope.shape == (0,)


@pytest.mark.parametrize("symbols", ["HH", "CO", "OH"])
def test_kernel(symbols, assert_kernel_agrees):
    """Energies are double precision; directions of forces single, which leaves 2e-7 of thousands of eV/Angstrom."""
    distances = torch.linspace(0.1, 2.0, 39).tolist()
    assert_kernel_agrees(without_network(random_model(16, 1)), isolated_pairs(symbols, distances), 1e-9, 1e-9, 2e-7)
