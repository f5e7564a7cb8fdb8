"""Random small models and their float64 results: what every engine and kernel is compared with."""

import copy
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms

from mlff.neighbors import Neighbors, find_neighbors
from mlff.painn import PaiNN, PaiNNConfig, energy_and_gradient, forces_and_virial

# of the largest force: GPUs give float32, and repulsion pushes close atoms apart with 100 eV/Angstrom
ROUNDING = 2 * np.finfo(np.float32).eps
SHIFTS = {"H": -13.6, "C": -1029.5, "O": -2041.3}  # eV: as large as those of real models, so that lost digits show


# All settings that a model of SchNetPack has and a new one of ours has not.
SCHNETPACK = {"radial_basis": "gaussian", "cutoff_function": "cosine", "repulsion": False, "norm_epsilon": 1e-8}


def random_model(features: int = 32, layers: int = 3, species=("H", "C", "O"), cutoff: float = 5.0, seed: int = 0, **settings) -> PaiNN:
    """A float32 model with random weights: biases are not zero, forces are a few eV/Angstrom, as in real molecules.

    settings: of PaiNNConfig, in place of the ones that the tests have.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"n_radial": 12, **settings}
        model = PaiNN(PaiNNConfig(species=list(species), features=features, layers=layers, cutoff=cutoff, **settings))
        # random weights have holes: with repulsion nearly up to the length of a bond, dynamics do not fall into them
        model.repulsion_radius *= 0.9 / 0.7
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.readout["w2"].mul_(0.2)
            model.shift.copy_(torch.tensor([SHIFTS.get(x, -100.0) for x in species], dtype=torch.float64))
    return model.requires_grad_(False)


class Results(NamedTuple):
    """energy in eV, energies [N], forces [N, 3] in eV/Angstrom, virial [3, 3] in eV (stress = -virial / volume)."""

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    virial: np.ndarray
    neighbors: Neighbors


def neighbors_of(atoms: Atoms, cutoff: float) -> Neighbors:
    return find_neighbors(atoms.positions, cutoff, atoms.cell.array, atoms.pbc)


def reference(model: PaiNN, atoms: Atoms) -> Results:
    """Float64 results of the plain PyTorch model with its analytic gradient."""
    neighbors = neighbors_of(atoms, model.config.cutoff)
    numbers = torch.as_tensor(atoms.numbers, dtype=torch.long)
    with torch.no_grad():
        energies, gradient = energy_and_gradient(copy.deepcopy(model).double(), numbers, neighbors.edges, neighbors.vectors)
        forces, virial = forces_and_virial(gradient, neighbors.edges, neighbors.vectors, len(atoms))
    return Results(float(energies.sum()), energies.numpy(), forces.numpy(), virial.numpy(), neighbors)
