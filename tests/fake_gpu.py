"""What is evaluated on the stand-in for a GPU (cpp/fake_cuda.cpp; the fixture ``fake`` of conftest.py): a model of pairs, run by the host.

Everything but the machine code is the real thing: reading the plan, memory, growth, graphs, exchanges, errors.
"""

import numpy as np

from mlff.neighbors import find_neighbors

CUTOFF = 5.0


def atoms_of(n, length, seed=0, least=0.9):
    """n atoms, no two closer than `least`, in a box of that length."""
    rng, positions = np.random.default_rng(seed), np.zeros((0, 3))
    while len(positions) < n:
        x = rng.uniform(0, length, 3)
        d = positions - x
        d -= length * np.round(d / length)
        if not len(d) or np.linalg.norm(d, axis=1).min() > least:
            positions = np.vstack([positions, x])
    return rng.choice([1, 8], n), positions


def expected(numbers, positions, cell=None, pbc=False) -> dict:
    """The stand-in's model, written down again."""
    neighbors = find_neighbors(positions, CUTOFF, cell, np.broadcast_to(pbc, 3))
    i, j = neighbors.edges.numpy()
    r = neighbors.vectors.numpy()
    d = np.linalg.norm(r, axis=1)
    q = np.where(np.asarray(numbers) == 1, 1.0, 2.0)
    qq, s, u = q[i] * q[j], CUTOFF - d, r / d[:, None]
    n = len(positions)
    forces, atom_virial = np.zeros((n, 3)), np.zeros((n, 6))
    np.add.at(forces, i, -2 * (qq * s)[:, None] * u)
    np.add.at(atom_virial, i, ((qq * s * d)[:, None, None] * u[:, :, None] * u[:, None, :]).reshape(-1, 9)[:, [0, 4, 8, 1, 2, 5]])
    energy = np.bincount(i, 0.5 * qq * s * s, minlength=n)
    virial = atom_virial.sum(0)
    return {"energy": energy.sum(), "atom_energy": energy, "forces": forces, "virial": virial, "atom_virial": atom_virial}


def assert_close(found, wanted):
    for name in found:
        scale = max(1.0, np.abs(wanted[name]).max(initial=0))
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=2e-6 * scale, err_msg=name)
