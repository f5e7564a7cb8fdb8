"""Short-range repulsion of nuclei: the universal potential of Ziegler, Biersack and Littmark (ZBL).

    E(d) = (e^2 / 4 pi epsilon_0) Z_i Z_j / d  phi(d / a)  f(d),   a = 0.8854 a_0 / (Z_i^0.23 + Z_j^0.23)

(Ziegler, Biersack, Littmark, The Stopping and Range of Ions in Matter, 1985). It is faded out by the same envelope f as the
radial basis, which vanishes at a fraction of the sum of the two covalent radii (Cordero et al., Dalton Trans. 2008, as tabulated in ASE).
That sum is about the length of a single bond. The fraction, 0.7 unless the model says otherwise, leaves all bonds alone, triple ones too:
a vibration that goes in and out of the repulsion meets its third derivative there, which jumps, and energy is not conserved (MACE fades
out at the whole sum). Below, the nuclei repel whatever the network says.
Each directed edge carries half of the pair's energy.
"""

from typing import Tuple

import torch
from ase.data import covalent_radii
from torch import Tensor

from .filter import cutoff_envelope
from .units import BOHR_ANGSTROM, COULOMB_EV_ANGSTROM


def zbl_pair_table(atomic_numbers: Tensor, fraction: float) -> Tensor:
    """Constants of every pair of elements.

    Args:
        atomic_numbers: [S], the model's elements.
        fraction: of the sum of covalent radii, where the repulsion has faded out (PaiNNConfig.repulsion_range).

    Returns:
        [S, S, 3] float64: half of the Coulomb prefactor in eV Angstrom, 1 / a in 1/Angstrom, radius of the fade-out in Angstrom.
    """
    z = atomic_numbers.to(torch.float64)
    radius = fraction * torch.tensor(covalent_radii, dtype=torch.float64)[atomic_numbers]
    prefactor = 0.5 * COULOMB_EV_ANGSTROM * z[:, None] * z[None, :]
    inverse_length = (z[:, None] ** 0.23 + z[None, :] ** 0.23) / (0.8854 * BOHR_ANGSTROM)
    return torch.stack([prefactor, inverse_length, radius[:, None] + radius[None, :]], dim=-1)


def repulsion(d: Tensor, pair: Tensor) -> Tuple[Tensor, Tensor]:
    """Half pair energies and their derivative.

    Args:
        d: distances [E] in Angstrom.
        pair: rows [E, 3] of :func:`zbl_pair_table` for the elements of each edge.

    Returns:
        energy [E] in eV and dE/dd [E] in eV/Angstrom, both zero beyond the fade-out radius.
    """
    prefactor, inverse_length, radius = pair[:, 0], pair[:, 1], pair[:, 2]
    phi, dphi = torch.zeros_like(d), torch.zeros_like(d)
    for coefficient, exponent in ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162)):
        term = coefficient * torch.exp(-exponent * inverse_length * d)
        phi = phi + term
        dphi = dphi - exponent * inverse_length * term
    x = torch.clamp(d / radius, max=1.0)
    f, df = cutoff_envelope(x, 1.0)
    energy = prefactor * phi / d * f
    slope = prefactor / d * ((dphi - phi / d) * f + phi * df / radius)
    return energy, slope
