"""Short range: ZBL against LAMMPS's, by hand, the switch, slopes against autograd, smooth ends, and nothing that the network can undo."""

import pytest
import torch
from ase import Atoms
from ase.data import covalent_radii
from inputs import isolated_pairs, without_network
from reference import random_model, reference
from torch.autograd import grad

from mlff.repulsion import repulsion, switch, switched, untrained_radius, zbl_constants

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
    numbers = torch.tensor([z_i, z_j])
    radius = untrained_radius(numbers)[0, 1] if radius is None else torch.tensor(radius, dtype=torch.float64)
    return torch.cat([zbl_constants(numbers)[0, 1], radius[None]]).expand(n, 3)


@pytest.mark.parametrize("pair", LAMMPS)
def test_against_lammps(pair):
    """Without the fade-out. LAMMPS rounds the screening length to 0.4685 Angstrom (here 0.46853), hence 2e-4."""
    distances = torch.tensor(list(LAMMPS[pair]), dtype=torch.float64)
    energy, slope = repulsion(distances, pair_rows(*pair, 3, radius=1e9))
    forces, energies = torch.tensor(list(LAMMPS[pair].values()), dtype=torch.float64).t()
    torch.testing.assert_close(-2 * slope, forces, rtol=2e-4, atol=0)
    torch.testing.assert_close(2 * (energy - energy[2]), energies - energies[2], rtol=2e-4, atol=2e-3)


def test_value_by_hand():
    """H-H at 0.3 Angstrom: x = d / a = 1.28059; phi(x) from the four exponentials; in the middle of the switch half of it is left."""
    phi = 0.18175 * 0.01661189 + 0.50986 * 0.29918639 + 0.28022 * 0.59693306 + 0.02817 * 0.77244625
    for radius, left in ((1e9, 1.0), (0.3 / 0.9, 0.5)):
        energy, _ = repulsion(torch.tensor([0.3], dtype=torch.float64), pair_rows(1, 1, radius=radius))
        assert 2 * energy.item() == pytest.approx(left * 14.399645 / 0.3 * phi, rel=1e-7)


def test_constants():
    constants, radius = zbl_constants(ELEMENTS), untrained_radius(ELEMENTS)
    assert constants.shape == (3, 3, 2) and constants.dtype == radius.dtype == torch.float64
    for table in (constants, radius):
        torch.testing.assert_close(table, table.transpose(0, 1), rtol=0, atol=0)
    assert constants[0, 2, 0].item() == pytest.approx(0.5 * 14.399645 * 8, rel=1e-7)
    assert 1 / constants[0, 0, 1].item() == pytest.approx(0.8854 * 0.529177 / 2, rel=1e-6)
    assert radius[1, 2].item() == pytest.approx(0.7 * (covalent_radii[6] + covalent_radii[8]))


def test_switch():
    """By hand at t = 0, 1/4, 1/2, 1 of its range 0.8 to 1: w = t^4 (35 - 84 t + 70 t^2 - 20 t^3); three derivatives vanish at both ends."""
    w, dw = switch(torch.tensor([0.5, 0.8, 0.85, 0.9, 1.0, 1.5], dtype=torch.float64), torch.ones(6, dtype=torch.float64))
    expected = (35 - 84 / 4 + 70 / 16 - 20 / 64) / 256
    torch.testing.assert_close(w, torch.tensor([0.0, 0.0, expected, 0.5, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(dw, torch.tensor([0.0, 0.0, 5 * 140 * (3 / 16) ** 3, 5 * 140 / 64, 0.0, 0.0], dtype=torch.float64))
    h, ends = 1e-4, torch.tensor([0.8, 1.0], dtype=torch.float64)
    for sign in (1, -1):
        w, _ = switch(ends + sign * h, torch.ones_like(ends))
        assert (w - torch.tensor([0.0, 1.0], dtype=torch.float64)).abs().max() < 35 * (5 * h) ** 4 * 1.1


def test_switched_basis():
    d, basis = torch.tensor([0.7, 0.85, 0.9, 1.2], dtype=torch.float64), torch.tensor([[2.0, 1.0]] * 4)
    both = switched(basis, torch.tensor([[-1.0, 3.0]] * 4), d, torch.ones(4, dtype=torch.float64))
    w, dw = (x.float()[:, None] for x in switch(d, torch.ones_like(d)))
    torch.testing.assert_close(both[0], w * basis, rtol=0, atol=0)
    torch.testing.assert_close(both[1], torch.cat([-w + 2 * dw, 3 * w + dw], 1))
    assert not both[0][0].any() and not both[1][0].any() and torch.equal(both[0][3], basis[3])


def test_slope_is_the_derivative():
    for z_i in ELEMENTS.tolist():
        for z_j in ELEMENTS.tolist():
            d = torch.linspace(0.05, 2.0, 80, dtype=torch.float64, requires_grad=True)
            energy, slope = repulsion(d, pair_rows(z_i, z_j, 80))
            (expected,) = grad(energy.sum(), d)
            torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-10)


def test_repels_and_ends_smoothly():
    """Positive and falling inside; from the radius on exactly zero, derivatives too."""
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


def test_the_network_cannot_undo_it():
    """Below 0.8 of the radius an edge is the repulsion alone, whatever weights: here of a network that attracts a thousand times as much."""
    model, close = random_model(16, 2), 0.79 * 0.9 * (covalent_radii[6] + covalent_radii[8])
    model.readout["w2"].mul_(1000)
    apart, near = (reference(model, Atoms("CO", positions=[[0, 0, 0], [0, 0, d]])) for d in (20.0, close))
    energy, slope = repulsion(torch.tensor([close], dtype=torch.float64), pair_rows(6, 8, radius=close / 0.79))
    assert near.energy - apart.energy == pytest.approx(2 * energy.item(), abs=1e-9)
    assert near.forces[1, 2] == pytest.approx(-2 * slope.item(), rel=1e-12)


def test_gradcheck():
    d = torch.linspace(0.2, 0.9, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: repulsion(d, pair_rows(6, 8, 6, radius=1.0)), (d,))


def test_no_edges():
    energy, slope = repulsion(torch.zeros(0, dtype=torch.float64), pair_rows(1, 8, 0))
    assert energy.shape == slope.shape == (0,)


@pytest.mark.parametrize("symbols", ["HH", "CO", "OH"])
def test_kernel(symbols, assert_kernel_agrees):
    """Energies are double precision; directions of forces single, which leaves 2e-7 of thousands of eV/Angstrom."""
    distances = torch.linspace(0.1, 2.0, 39).tolist()
    assert_kernel_agrees(without_network(random_model(16, 1)), isolated_pairs(symbols, distances), 1e-9, 1e-9, 2e-7)


@pytest.mark.parametrize("symbols", ["HH", "CO", "OH"])
def test_kernel_beside_the_network(symbols, assert_kernel_agrees):
    """Network and repulsion from where only one of them is on to where only the other is."""
    model, pair = random_model(16, 2), Atoms(symbols).numbers
    a, b = model.species_index(torch.tensor(pair)).tolist()
    radius = model.repulsion_radius[a, b].item()
    assert_kernel_agrees(model, isolated_pairs(symbols, [x * radius for x in (0.75, 0.81, 0.85, 0.9, 0.95, 0.99, 1.0, 1.2)]), 2e-5, 2e-5, 2e-6)
