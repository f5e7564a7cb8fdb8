"""Neighbour lists of torch-cluster and vesin against each other, ASE and all pairs by hand, pair by pair."""

import importlib.util

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from structures import STRUCTURES, structure

from mlff import neighbors as module
from mlff.neighbors import find_neighbors

CUTOFF = 5.0
OPEN = [name for name in STRUCTURES if not structure(name).pbc.any()]
needs_torch_cluster = pytest.mark.skipif(
    importlib.util.find_spec("torch_cluster") is None, reason="torch-cluster is not installed (extra torch-cluster)"
)


def rows(edges, vectors):
    """Pairs as sorted rows (i, j, x, y, z), so that two lists can be compared whatever their order."""
    table = np.column_stack([np.asarray(edges).T, np.round(np.asarray(vectors), 6) + 0.0])
    return table[np.lexsort(table.T[::-1])]


def assert_same_pairs(found, edges, vectors):
    a, b = rows(found.edges, found.vectors), rows(edges, vectors)
    assert len(a) == len(b)
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.fixture(params=["vesin", pytest.param("torch-cluster", marks=needs_torch_cluster)])
def library(request, monkeypatch):
    """Open boundaries through each library."""
    if request.param == "vesin":
        monkeypatch.setattr(module, "radius_graph", None)
    return request.param


@pytest.mark.parametrize("name", STRUCTURES)
def test_against_ase(name, library):
    atoms = structure(name)
    i, j, vectors = neighbor_list("ijD", atoms, CUTOFF)
    assert_same_pairs(find_neighbors(atoms.positions, CUTOFF, atoms.cell.array, atoms.pbc), [i, j], vectors)


@pytest.mark.parametrize("name", OPEN)
def test_open_against_all_pairs(name, library):
    x = structure(name).positions
    i, j = np.nonzero((np.linalg.norm(x[None] - x[:, None], axis=-1) < CUTOFF) & ~np.eye(len(x), dtype=bool))
    assert_same_pairs(find_neighbors(x, CUTOFF), [i, j], x[j] - x[i])


@needs_torch_cluster
@pytest.mark.parametrize("name", OPEN)
def test_libraries_give_the_same_rows(name, monkeypatch):
    x = structure(name).positions
    ours = find_neighbors(x, CUTOFF)
    monkeypatch.setattr(module, "radius_graph", None)
    theirs = find_neighbors(x, CUTOFF)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("bound", [1, 33, 128])
def test_dense_cluster_loses_no_neighbour(library, bound, monkeypatch):
    """torch-cluster silently keeps 32 neighbours by default; here atoms have more, and more than the first bound too."""
    monkeypatch.setattr(module, "FIRST_BOUND", bound)
    x = structure("dense_cluster").positions
    count = (np.linalg.norm(x[None] - x[:, None], axis=-1) < CUTOFF).sum(1) - 1
    assert count.max() > 64
    found = find_neighbors(x, CUTOFF)
    np.testing.assert_array_equal(np.bincount(found.edges[0], minlength=len(x)), count)


@pytest.mark.parametrize("name", STRUCTURES)
def test_conventions(name, library):
    """Vectors are x_j + shift - x_i, rows are sorted by centre, and every pair is there in both directions."""
    atoms = structure(name)
    edges, shifts, vectors = find_neighbors(atoms.positions, CUTOFF, atoms.cell.array, atoms.pbc)
    x = torch.as_tensor(atoms.positions)
    assert edges.dtype == torch.int64 and shifts.dtype == vectors.dtype == torch.float64
    torch.testing.assert_close(vectors, x[edges[1]] + shifts - x[edges[0]])
    assert bool((edges[0].diff() >= 0).all())
    np.testing.assert_allclose(rows(edges, vectors), rows(edges.flip(0), -vectors), atol=2e-6)


@pytest.mark.parametrize("seed", range(8))
def test_random_cells(seed):
    """Random triclinic cells from half the cutoff to four times it, all combinations of periodic directions, atoms anywhere."""
    rng = np.random.default_rng(seed)
    cell = (np.eye(3) + rng.uniform(-0.4, 0.4, (3, 3))) * rng.uniform(0.5, 4.0) * CUTOFF
    pbc = [bool(seed & 1), bool(seed & 2), bool(seed & 4)]
    x = rng.uniform(-1.5, 2.5, (25, 3)) @ cell
    i, j, vectors = neighbor_list("ijD", Atoms("H25", x, cell=cell, pbc=pbc), CUTOFF)
    assert_same_pairs(find_neighbors(x, CUTOFF, cell, pbc), [i, j], vectors)


def test_no_atoms(library):
    for pbc in ([False] * 3, [True] * 3):
        edges, shifts, vectors = find_neighbors(np.zeros((0, 3)), CUTOFF, np.eye(3) * 9, pbc)
        assert edges.shape == (2, 0) and shifts.shape == vectors.shape == (0, 3)


def test_bad_input():
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match="finite"):
        find_neighbors(x * np.nan, CUTOFF)
    with pytest.raises(ValueError, match="no cell"):
        find_neighbors(x, CUTOFF, None, [True, False, False])
    with pytest.raises(ValueError, match="does not span"):
        find_neighbors(x, CUTOFF, np.diag([9.0, 0.0, 0.0]), [True, True, False])
    with pytest.raises(ValueError, match="does not span"):
        find_neighbors(x, CUTOFF, [[9, 0, 0], [9, 0, 0], [0, 0, 9]], [True, True, True])
