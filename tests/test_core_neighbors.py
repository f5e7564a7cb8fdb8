"""The core's neighbour search against vesin and torch-cluster, pair by pair with the integer shifts of every image."""

import itertools

import numpy as np
import pytest
from reference import random_model
from structures import STRUCTURES, structure

from mlff.core import MLFFInputError, Model, System
from mlff.export import build_payload
from mlff.neighbors import find_neighbors

CUTOFF = 5.0
ALL_PBC = list(itertools.product((False, True), repeat=3))
TRICLINIC = np.array([[1.0, 0.0, 0.0], [0.3, 0.9, 0.0], [-0.25, 0.4, 0.85]])


@pytest.fixture(scope="module")
def core_model() -> Model:
    return Model(build_payload(random_model(16, 1, species=("H", "C", "O"), cutoff=CUTOFF)))


def core_edges(model, x, cell=None, pbc=False, threads=1):
    system = System(model, threads=threads)
    system.set_atoms(np.ones(len(x), dtype=int))
    system.compute(x, cell, pbc, want=["energy"])
    return system.edges()


def pairs_with_shifts(x, i, j, vectors, cell, pbc):
    """Rows (i, j, shift) of integers, sorted. The shift follows from the vector, and must be whole."""
    i, j, shifts = np.asarray(i), np.asarray(j), np.zeros((len(i), 3), dtype=int)
    offsets = np.asarray(vectors) - (x[j] - x[i])
    if np.any(pbc):
        periodic = np.flatnonzero(np.broadcast_to(pbc, 3))
        fractions = np.linalg.lstsq(np.asarray(cell)[periodic].T, offsets.T, rcond=None)[0].T
        shifts[:, periodic] = np.round(fractions)
        np.testing.assert_allclose(shifts @ np.asarray(cell), offsets, atol=1e-8 * max(1.0, np.abs(x).max(initial=0)))
    else:
        np.testing.assert_allclose(offsets, 0.0, atol=1e-12)
    table = np.column_stack([i, j, shifts])
    return table[np.lexsort(table.T[::-1])]


def assert_same_pairs(model, x, cell, pbc, threads=1):
    found = core_edges(model, x, cell, pbc, threads)
    expected = find_neighbors(x, CUTOFF, cell, np.broadcast_to(pbc, 3))
    ours = pairs_with_shifts(x, found.centers, found.neighbors, found.vectors, cell, pbc)
    theirs = pairs_with_shifts(x, *expected.edges.numpy(), expected.vectors.numpy(), cell, pbc)
    np.testing.assert_array_equal(ours, theirs)
    return found


@pytest.mark.parametrize("pbc", ALL_PBC, ids=lambda p: "".join("xyz"[k] if p[k] else "-" for k in range(3)))
@pytest.mark.parametrize("size", [2.2, 4.0, 7.0, 12.0, 23.0])
@pytest.mark.parametrize("shape", ["cubic", "triclinic"])
def test_random_cells(core_model, pbc, size, shape):
    """From cells of half the cutoff (several images) to the cell list; atoms in the cell, on its faces and outside."""
    rng = np.random.default_rng(int(10 * size))
    cell = size * (np.eye(3) if shape == "cubic" else TRICLINIC) * rng.uniform(0.95, 1.05, (3, 1))
    n = max(2, min(160, int(0.05 * size**3)))
    fractions = rng.uniform(0, 1, (n, 3))
    fractions[0] = 0.0
    fractions[1] = [0.0, 0.5, 1.0 - 1e-16]
    fractions[n // 2 :] += rng.integers(-3, 4, (n - n // 2, 3))
    assert_same_pairs(core_model, fractions @ cell, cell, pbc)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if len(structure(name))])
def test_structures(core_model, name):
    atoms = structure(name)
    assert_same_pairs(core_model, atoms.positions, atoms.cell.array, atoms.pbc)


@pytest.mark.parametrize("pbc", [(True, True, True), (False, False, False), (True, False, True)])
def test_large_system(core_model, pbc):
    rng = np.random.default_rng(5)
    cell = 41.0 * TRICLINIC
    x = rng.uniform(-0.2, 1.2, (2500, 3)) @ cell
    found = assert_same_pairs(core_model, x, cell, pbc, threads=2)
    assert len(found.centers) > 15000


def test_open_boundaries_against_torch_cluster(core_model):
    torch_cluster = pytest.importorskip("torch_cluster", reason="torch-cluster is not installed (extra torch-cluster)")
    import torch

    x = np.random.default_rng(6).uniform(0, 20, (600, 3))
    j, i = torch_cluster.radius_graph(torch.from_numpy(x), CUTOFF, max_num_neighbors=600).numpy()
    found = core_edges(core_model, x)
    ours, theirs = np.column_stack([found.centers, found.neighbors]), np.column_stack([i, j])
    np.testing.assert_array_equal(ours, theirs[np.lexsort(theirs.T[::-1])])


def test_atom_sees_its_own_images(core_model):
    found = core_edges(core_model, np.zeros((1, 3)), 3.0 * np.eye(3), True)
    steps = itertools.product(range(-2, 3), repeat=3)
    expected = sorted(tuple(3.0 * k for k in s) for s in steps if 0 < 9 * sum(k * k for k in s) < CUTOFF**2)
    assert sorted(map(tuple, found.vectors.tolist())) == expected


def test_far_apart_atoms_need_no_memory_for_the_space_between(core_model):
    """Two dense clusters at a distance that no grid of bins could fill."""
    x = np.random.default_rng(7).uniform(0, 12, (200, 3))
    x[100:] += 1e7
    found = assert_same_pairs(core_model, x, None, False)
    assert len(found.centers) > 1000


@pytest.mark.parametrize("pbc", [False, True])
def test_order_and_antisymmetry(core_model, pbc):
    """Edges are sorted by centre, then neighbour, and reversed edges are the same vector reversed to the last bit."""
    cell = 9.0 * TRICLINIC
    x = np.random.default_rng(8).uniform(-1, 2, (60, 3)) @ cell
    i, j, r = core_edges(core_model, x, cell, pbc)
    assert (np.diff(i.astype(np.int64) * len(x) + j) >= 0).all()
    forward = sorted(zip(i.tolist(), j.tolist(), *r.T.tolist()))
    backward = sorted(zip(j.tolist(), i.tolist(), *(-r).T.tolist()))
    assert forward == backward


def test_skin_changes_nothing(core_model):
    """A system that follows moving atoms has, bit for bit, the edges of a fresh one at every step."""
    rng = np.random.default_rng(9)
    cell = 8.0 * TRICLINIC
    x = rng.uniform(0, 1, (40, 3)) @ cell
    system = System(core_model, threads=1)
    system.set_atoms(np.ones(len(x), dtype=int))
    for step in range(40):
        x = x + rng.normal(0, 0.06, x.shape)
        if step == 15:
            cell = cell * 1.003
        if step == 25:
            x[3] += 2 * cell[1]
        system.compute(x, cell, True, want=["energy"])
        for kept, fresh in zip(system.edges(), core_edges(core_model, x, cell, True)):
            np.testing.assert_array_equal(kept, fresh)


BAD_CELLS = {
    "NaN": (np.diag([9.0, np.nan, 9.0]), True, "cell vector 1 is not finite"),
    "infinite": (np.diag([9.0, 9.0, np.inf]), True, "cell vector 2 is not finite"),
    "zero vector": (np.diag([9.0, 0.0, 9.0]), True, "cell vector 1 has the length 0"),
    "dependent vectors": ([[9, 0, 0], [18, 0, 0], [0, 0, 9]], True, "singular"),
    "two dependent vectors": ([[9, 0, 0], [-9, 0, 0], [0, 0, 9]], (True, True, False), "singular"),
    "absurdly small": (np.diag([9.0, 0.49, 9.0]), True, "smallest height allowed is 0.5"),
    "absurdly flat": ([[9, 0, 0], [0, 9, 0], [9, 9, 0.3]], True, "smallest height allowed is 0.5"),
    "missing": (None, (False, False, True), "direction 2 is periodic, but there is no cell"),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_bad_cells(core_model, case):
    cell, pbc, message = BAD_CELLS[case]
    with pytest.raises(MLFFInputError, match=message):
        core_edges(core_model, np.zeros((1, 3)), cell, pbc)


def test_smallest_cell_allowed(core_model):
    """Ten images within the cutoff in every direction are still found."""
    found = assert_same_pairs(core_model, np.zeros((1, 3)), np.diag([0.51, 4.0, 8.0]), True)
    assert len(found.centers) > 18


@pytest.mark.parametrize(
    "cell, pbc",
    [(np.zeros((3, 3)), (False, False, False)), (np.diag([6.0, 0.0, 0.0]), (True, False, False)), (None, (False, False, False))],
)
def test_vectors_of_open_directions_do_not_matter(core_model, cell, pbc):
    x = np.random.default_rng(10).uniform(0, 6, (20, 3))
    found = core_edges(core_model, x, cell, pbc)
    expected = core_edges(core_model, x, [[6.0, 0, 0], [1.0, 2.0, 3.0], [np.nan, 0, 0]], pbc)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", [3, 300])
@pytest.mark.parametrize("pbc", [False, True])
def test_coincident_atoms_are_named(core_model, n, pbc):
    x = np.random.default_rng(11).uniform(0, 20, (n, 3))
    x[n - 1] = x[1] + 5e-7 + (20.0 if pbc else 0.0)
    with pytest.raises(MLFFInputError, match=f"atoms 1 and {n - 1} are at the same place"):
        core_edges(core_model, x, 20.0 * np.eye(3), pbc)


@pytest.mark.parametrize(
    "pbc, message", [(True, "atom 1 is 1e\\+29 cells outside"), (False, "atom 1 is 1e\\+30 Angstrom from the origin")]
)
def test_absurd_positions(core_model, pbc, message):
    with pytest.raises(MLFFInputError, match=message):
        core_edges(core_model, np.array([[0.0, 0, 0], [1e30, 0, 0]]), 10.0 * np.eye(3), pbc)
