"""Inputs for the tests of single operations: small graphs and float64 features."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from inputs import CUTOFF, N_RADIAL, SPECIES
from reference import reference

from mlff.core import Model, System
from mlff.filter import radial_basis
from mlff.neighbors import find_neighbors


@pytest.fixture(params=["cluster", "crystal", "one atom", "no edges"])
def graph(request) -> SimpleNamespace:
    """Symmetric directed pairs with their geometry, float64: an open cluster, a cell smaller than the cutoff (with
    images of an atom itself), an atom without neighbours, three atoms without neighbours."""
    torch.manual_seed(0)
    n = {"cluster": 7, "crystal": 3, "one atom": 1, "no edges": 3}[request.param]
    spread = {"cluster": 3.0, "crystal": 2.5, "one atom": 1.0, "no edges": 200.0}[request.param]
    positions = spread * torch.rand(n, 3, dtype=torch.float64) * torch.arange(1, n + 1, dtype=torch.float64).unsqueeze(1) ** 0.3
    periodic = request.param == "crystal"
    edges, shifts, vectors = find_neighbors(positions, CUTOFF, torch.eye(3).numpy() * 2.5, [periodic] * 3)
    d = torch.linalg.vector_norm(vectors, dim=-1)
    basis, slope = radial_basis(d, CUTOFF, "polynomial", N_RADIAL, None)
    return SimpleNamespace(
        n=n,
        species=torch.arange(n) % SPECIES,
        edges=edges,
        vectors=vectors,
        d=d,
        unit=vectors / d.unsqueeze(-1),
        basis=basis,
        slope=slope,
    )


@pytest.fixture
def normal():
    """normal(3, 4): a float64 tensor of that shape, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def assert_kernel_agrees(save_payload):
    """assert_kernel_agrees(model, atoms): energies and forces of the compiled core are those of the float64 reference.

    The core runs whole models, so a test of one kernel switches the others off (inputs.py).
    """

    def check(model, atoms, energy=1e-6, force=1e-5, relative=0.0):
        expected = reference(model, atoms)
        for threads in (1, 2):
            system = System(Model(save_payload(model)), threads=threads)
            system.set_atoms(atoms.numbers)
            found = system.compute(atoms.positions, atoms.cell.array, atoms.pbc, ("atom_energy", "forces"))
            np.testing.assert_allclose(found["atom_energy"], expected.energies, atol=energy, rtol=1e-12)
            np.testing.assert_allclose(found["forces"], expected.forces, atol=force, rtol=relative)

    return check
