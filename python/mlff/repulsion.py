"""Short range: where the network has no data, nuclei repel each other by the universal potential of Ziegler, Biersack and Littmark (ZBL).

    E(d) = (1 - w(d)) (e^2 / 4 pi epsilon_0) Z_i Z_j / d  phi(d / a),   a = 0.8854 a_0 / (Z_i^0.23 + Z_j^0.23)

(Ziegler, Biersack, Littmark, The Stopping and Range of Ions in Matter, 1985). The same w switches the network off: the radial basis
B(d) of an edge, without which the two atoms do not see each other, is w(d) B(d). Every two elements have a radius. From it on w = 1, and
the model is the network alone; below 0.8 of it w = 0, and the network cannot undo the repulsion, whatever it would extrapolate to.
In between w rises with three continuous derivatives. `mlff train` makes the radius the shortest distance that the two elements have
in the training data (train/run.py), so the network is whole wherever it was trained, and ends where its data end.
Each directed edge carries half of the pair's energy.
"""

from typing import Tuple

import torch
from ase.data import covalent_radii
from torch import Tensor

from .units import BOHR_ANGSTROM, COULOMB_EV_ANGSTROM


def untrained_radius(atomic_numbers: Tensor) -> Tensor:
    """Radii [S, S] in Angstrom, float64, of a model that has seen no data yet: 0.7 of the sum of the covalent radii (Cordero et al.,
    Dalton Trans. 2008, as tabulated in ASE), below all bonds."""
    radius = 0.7 * torch.tensor(covalent_radii, dtype=torch.float64)[atomic_numbers]
    return radius[:, None] + radius[None, :]


def zbl_constants(atomic_numbers: Tensor) -> Tensor:
    """[S, S, 2] float64: half of the Coulomb prefactor in eV Angstrom, 1 / a in 1/Angstrom, for every pair of elements [S]."""
    z = atomic_numbers.to(torch.float64)
    prefactor = 0.5 * COULOMB_EV_ANGSTROM * z[:, None] * z[None, :]
    inverse_length = (z[:, None] ** 0.23 + z[None, :] ** 0.23) / (0.8854 * BOHR_ANGSTROM)
    return torch.stack([prefactor, inverse_length], dim=-1)


def switch(d: Tensor, radius: Tensor) -> Tuple[Tensor, Tensor]:
    """What is left of the network.

    Args:
        d: distances [E] in Angstrom.
        radius: of the two elements of each edge, [E] in Angstrom.

    Returns:
        w [E], 0 below 0.8 of the radius and 1 from the radius on, and dw/dd [E] in 1/Angstrom.
    """
    width = 0.2 * radius
    t = torch.clamp((radius - d) / width, 0.0, 1.0)
    rest = 1.0 - t
    w = 1.0 - t * t * t * t * (35.0 - t * (84.0 - t * (70.0 - 20.0 * t)))
    return w, 140.0 * t * t * t * rest * rest * rest / width


def switched(basis: Tensor, slope: Tensor, d: Tensor, radius: Tensor) -> Tuple[Tensor, Tensor]:
    """Radial basis [E, K] and its derivative (filter.radial_basis) where the network is switched off at short range; d, radius: as in
    :func:`switch`."""
    w, dw = switch(d, radius)
    w, dw = w.to(basis.dtype).unsqueeze(-1), dw.to(basis.dtype).unsqueeze(-1)
    return w * basis, w * slope + dw * basis


def repulsion(d: Tensor, pair: Tensor) -> Tuple[Tensor, Tensor]:
    """Half pair energies and their derivative.

    Args:
        d: distances [E] in Angstrom.
        pair: [E, 3] for the elements of each edge: :func:`zbl_constants` and the radius in Angstrom.

    Returns:
        energy [E] in eV and dE/dd [E] in eV/Angstrom, both zero from the radius on.
    """
    prefactor, inverse_length = pair[:, 0], pair[:, 1]
    phi, dphi = torch.zeros_like(d), torch.zeros_like(d)
    for coefficient, exponent in ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162)):
        term = coefficient * torch.exp(-exponent * inverse_length * d)
        phi = phi + term
        dphi = dphi - exponent * inverse_length * term
    w, dw = switch(d, pair[:, 2])
    energy = prefactor * phi / d * (1.0 - w)
    slope = prefactor / d * ((dphi - phi / d) * (1.0 - w) - phi * dw)
    return energy, slope
