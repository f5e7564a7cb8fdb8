"""Neighbour search on the GPU against mlff.neighbors: both searches, every structure; without a GPU in Triton's interpreter."""

import numpy as np
import pytest
import structures
import torch
from ase import Atoms
from ase.geometry import complete_cell
from plan_runner import PlanRunner, images_of
from structures import STRUCTURES

pytest.importorskip("triton")
from dense_search import searches  # noqa: E402

from mlff import neighbors_triton  # noqa: E402
from mlff.neighbors import find_neighbors  # noqa: E402
from mlff.plan import CudaPlan  # noqa: E402

CUTOFF = 5.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("search", ["dense", "list"])
# What the interpreter, which is slow, is given of the larger structures, and the cutoff for them; a GPU is given everything.
SHORT = {
    "water_box": (lambda atoms: structures.water_box(2)[:12], 2.9),
    "triclinic": (lambda atoms: atoms[:8], 2.9),
    "outside_cell": (lambda atoms: atoms[8:16], 2.9),
    "dense_cluster": (lambda atoms: atoms[:40], 2.9),
    "small_cell": (lambda atoms: atoms, 3.5),
    "slab": (lambda atoms: atoms[:9], 3.5),
    "wire": (lambda atoms: atoms[:9], 3.5),
    "far_fragments": (lambda atoms: atoms[6:], 5.0),
}


class Search(PlanRunner):
    """A plan of nothing but the searches, for atoms of one or several structures."""

    def __init__(self, search: str, cutoff: float = CUTOFF):
        plan = CudaPlan({"cutoff": "f64"})
        neighbors_triton.search_buffers(plan)
        plan.search = searches(plan)
        plan.schedules = [{"max_rows": None, "stages": []}]
        super().__init__(plan, {"cutoff": np.array([cutoff])}, cutoff, DEVICE, search)

    def search_atoms(self, positions, cells=None, pbcs=None):
        """Searches with flags of its own: what the kernels of the forces would clear afterwards is cleared here before."""
        self.arrays["flags"].zero_()
        self.compute(positions, cells, pbcs)
        self.rebuilt = bool(self.arrays["flags"][8])
        self.arrays["rebuild"].zero_()
        return self

    def array(self, name, *shape):
        return self.arrays[name].cpu().numpy()[: self.n_total].reshape(self.n_total, *shape)

    @property
    def flags(self):
        return self.arrays["flags"].cpu().numpy()

    def edges(self):
        """Centres and neighbours (caller's indices) [E], vectors [E, 3], distances [E]; the order of rows."""
        capacity, order, count = self.scalars["edge_capacity"], self.array("order"), self.array("edge_count")
        e = np.concatenate([i * capacity + np.arange(n) for i, n in enumerate(count)]).astype(int)
        geometry = self.arrays["geometry"].cpu().numpy()[e].astype(float)
        i, j = order[e // capacity], order[self.arrays["neighbors"].cpu().numpy()[e]]
        distance = self.arrays["distance"].cpu().numpy()[e]
        np.testing.assert_allclose(np.linalg.norm(geometry[:, :3], axis=1), 1, atol=3e-7)
        np.testing.assert_array_equal(geometry[:, 3], distance.astype(np.float32))
        return i, j, geometry[:, :3] * distance[:, None], distance

    def check_reverse(self, among=None):
        """Every edge (of the rows ``among``) has a reverse, whose reverse it is, with exactly the opposite vector."""
        capacity, candidates = self.scalars["edge_capacity"], self.scalars["candidate_capacity"]
        a = {k: v.cpu().numpy() for k, v in self.arrays.items()}
        for i in range(self.n_total) if among is None else among:
            e = i * capacity + np.arange(a["edge_count"][i])
            j = a["neighbors"][e]
            place = a["slot"][j * candidates + a["reverse"][e]]
            assert (place >= 0).all() and (place < a["edge_count"][j]).all()
            back = j * capacity + place
            np.testing.assert_array_equal(a["neighbors"][back], i)
            np.testing.assert_array_equal(a["geometry"][back, :3], -a["geometry"][e, :3])
            np.testing.assert_array_equal(a["distance"][back], a["distance"][e])
            np.testing.assert_array_equal(i * capacity + a["slot"][i * candidates + a["reverse"][back]], e)


def keys(i, j, vectors, positions, cell, pbc):
    """Pairs as whole numbers [E, 5], i, j and the shift, and what sorts them."""
    box = np.zeros((3, 3))
    box[np.asarray(pbc)] = np.asarray(cell)[np.asarray(pbc)]
    shifts = (vectors - positions[j] + positions[i]) @ np.linalg.inv(complete_cell(box))
    assert np.abs(shifts - np.rint(shifts)).max(initial=0) < 1e-5
    table = np.column_stack([i, j, np.rint(shifts)]).astype(int)
    return table, np.lexsort(table.T[::-1])


def check(search, atoms: Atoms, cutoff=CUTOFF, first=0, keep=None, rtol=1e-13):
    """Compares the edges of the atoms from index ``first`` on with the reference."""
    i, j, vectors, distance = search.edges()
    mine = (i >= first) & (i < first + len(atoms))
    i, j, vectors, distance = i[mine] - first, j[mine] - first, vectors[mine], distance[mine]
    wanted = find_neighbors(atoms.positions, cutoff, atoms.cell.array, atoms.pbc)
    wi, wj, wv = wanted.edges[0].numpy(), wanted.edges[1].numpy(), wanted.vectors.numpy()
    if keep is not None:
        chosen = keep(wi, wj)
        wi, wj, wv = wi[chosen], wj[chosen], wv[chosen]
    table, order = keys(i, j, vectors, atoms.positions, atoms.cell.array, atoms.pbc)
    wanted_table, wanted_order = keys(wi, wj, wv, atoms.positions, atoms.cell.array, atoms.pbc)
    np.testing.assert_array_equal(table[order], wanted_table[wanted_order])
    np.testing.assert_allclose(distance[order], np.linalg.norm(wv, axis=1)[wanted_order], rtol=rtol)
    np.testing.assert_allclose(vectors[order], wv[wanted_order], atol=1e-6)


def species_of(atoms):
    return np.searchsorted([1, 6, 8], atoms.numbers)


def room(search, atoms, cutoff):
    """Candidates that a structure may have."""
    if search == "list":
        return 320
    images = 2 * images_of(atoms.cell.array, atoms.pbc, cutoff) + 1
    return int(-(-len(atoms) * np.prod(images) // 16) * 16)


def searched(search, atoms, cutoff=CUTOFF, **options):
    runner = Search(search, cutoff)
    species = options.pop("species", species_of(atoms))
    runner.set_atoms(species, **{"edge_capacity": 128, "candidate_capacity": room(search, atoms, cutoff), **options})
    return runner.search_atoms(atoms.positions, atoms.cell.array, atoms.pbc)


@BOTH
@pytest.mark.parametrize("name", STRUCTURES)
def test_same_edges_as_the_reference(search, name):
    atoms, cutoff = STRUCTURES[name](), CUTOFF
    if DEVICE == "cpu" and name in SHORT:
        shorten, cutoff = SHORT[name]
        atoms = shorten(atoms)
    runner = searched(search, atoms, cutoff)
    check(runner, atoms, cutoff)
    runner.check_reverse()
    assert (runner.flags[3:8] == 0).all()
    assert runner.flags[0] == runner.array("edge_count").max() and runner.flags[1] <= runner.scalars["candidate_capacity"]
    np.testing.assert_array_equal(runner.array("species"), species_of(atoms)[runner.array("order")])
    assert runner.rebuilt == (search == "list")


@BOTH
def test_batch_of_structures(search):
    atoms = [structures.small_cell(), structures.ethanol(), structures.single_atom(), structures.slab()[:6], structures.wire()[:5]]
    starts = np.cumsum([0] + [len(a) for a in atoms])
    runner = Search(search, 3.0)
    runner.set_atoms(np.concatenate([species_of(a) for a in atoms]), starts=starts, edge_capacity=48, candidate_capacity=512)
    runner.search_atoms(np.concatenate([a.positions for a in atoms]), [a.cell.array for a in atoms], [a.pbc for a in atoms])
    for a, first in zip(atoms, starts):
        check(runner, a, 3.0, first)
    runner.check_reverse()
    structure = np.repeat(np.arange(len(atoms)), np.diff(starts))
    np.testing.assert_array_equal(structure[runner.array("order")], structure)


@BOTH
def test_ignored_atoms(search):
    atoms = structures.triclinic()[:10]
    species = species_of(atoms)
    species[[0, 7, 9]] = -1
    runner = searched(search, atoms, 4.0, species=species)
    check(runner, atoms, 4.0, keep=lambda i, j: (species[i] >= 0) & (species[j] >= 0))
    runner.check_reverse()
    assert sorted(runner.array("order")) == list(range(10))


@BOTH
def test_ghosts_have_edges_to_local_atoms_only(search):
    atoms = structures.mixed_elements()
    runner = searched(search, atoms, 4.0, n_local=9)
    check(runner, atoms, 4.0, keep=lambda i, j: (i < 9) | (j < 9))
    runner.check_reverse()
    np.testing.assert_array_equal(runner.array("order"), np.arange(len(atoms)))


@BOTH
def test_shuffled_atoms_have_the_same_edges(search):
    atoms = structures.slab()[:12]
    shuffled = atoms[np.random.default_rng(0).permutation(len(atoms))]
    check(searched(search, shuffled, 4.0), shuffled, 4.0)


@BOTH
def test_the_same_bits_twice(search):
    atoms = structures.wire()[:8]
    first, second = searched(search, atoms, 4.0), searched(search, atoms, 4.0)
    for name in ("order", "edge_count", "neighbors", "geometry", "distance", "reverse", "slot"):
        assert torch.equal(first.arrays[name], second.arrays[name]), name


@BOTH
def test_rows_that_overflow_are_flagged_and_cut(search):
    atoms = structures.dense_cluster()[:40]
    runner = searched(search, atoms, candidate_capacity=64, edge_capacity=16)
    most = np.bincount(find_neighbors(atoms.positions, CUTOFF).edges[0]).max()
    assert runner.flags[0] == most and runner.array("edge_count").max() == 16
    assert runner.arrays["slot"].max() < 16

    runner = searched(search, atoms, candidate_capacity=16, edge_capacity=64)
    if search == "dense":
        assert runner.flags[1] == 40
    else:
        assert runner.flags[1] == np.bincount(find_neighbors(atoms.positions, CUTOFF + neighbors_triton.SKIN).edges[0]).max()
        runner.search_atoms(atoms.positions)
        assert not runner.rebuilt and runner.flags[1] > 16  # also when the list is not made again
    assert runner.array("edge_count").max() <= 16
    i, j, _, distance = runner.edges()
    assert (distance < CUTOFF).all() and (i != j).all() and (j < 40).all()


@BOTH
def test_atoms_at_the_same_place(search):
    atoms = structures.ethanol()
    atoms.positions[5] = atoms.positions[2] + 1e-8
    atoms.positions[7] = atoms.positions[3]
    runner = searched(search, atoms)
    assert {*runner.flags[4:6]} == {4, 8}  # both of one pair, from one


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_box_that_is_not_finite(search, value):
    """That of a caller on the device, which the host has not seen."""
    atoms = structures.slab()
    runner = searched(search, atoms)
    box = runner.arrays["boxes"][0]
    box[0], box[9:] = value, np.nan  # as import_atoms makes it
    runner.arrays["flags"].zero_()
    runner.run(runner.dict["search"][search])
    assert runner.flags[6] == 1


@pytest.mark.parametrize("search, value", [("dense", np.nan), ("dense", np.inf), ("list", np.nan)])
def test_positions_that_are_not_finite(search, value):
    atoms = structures.slab()[:6]
    good = atoms.positions.copy()
    runner = searched(search, atoms)
    for axis, atom in ((0, 3), (2, 5)):
        bad = good.copy()
        bad[atom, axis] = value
        runner.search_atoms(bad, atoms.cell.array, atoms.pbc)
        assert runner.flags[3] == atom + 1 and not runner.rebuilt
        assert (runner.edges()[0] != atom).all()
    runner.arrays["rebuild"].fill_(1)
    runner.search_atoms(bad, atoms.cell.array, atoms.pbc)
    assert runner.flags[3] == 6
    runner.search_atoms(good, atoms.cell.array, atoms.pbc)
    assert runner.rebuilt == (search == "list") and runner.flags[3] == 0
    check(runner, atoms)


def test_images_that_are_too_few_are_flagged():
    atoms = structures.small_cell()
    runner = Search("dense")
    runner.set_atoms(species_of(atoms), edge_capacity=128, candidate_capacity=512)
    runner.cutoff = 2.0  # for which the host counts fewer images than the kernel needs
    runner.search_atoms(atoms.positions, atoms.cell.array, atoms.pbc)
    assert runner.flags[6] == 1


def test_the_list_is_made_again_when_atoms_have_moved():
    atoms = structures.triclinic()[:6]
    runner = searched("list", atoms, 3.0)
    half = 0.5 * neighbors_triton.SKIN
    directions = np.random.default_rng(0).normal(size=(len(atoms), 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for distance, rebuilt in ((0.999, False), (1.001, True)):
        moved = atoms.copy()
        moved.positions += distance * half * directions
        runner.search_atoms(moved.positions, moved.cell.array, moved.pbc)
        assert runner.rebuilt == rebuilt
        check(runner, moved, 3.0)
        runner.check_reverse()
    moved.set_cell(moved.cell.array * 1.001)
    runner.search_atoms(moved.positions, moved.cell.array, moved.pbc)
    assert runner.rebuilt
    check(runner, moved, 3.0)


def test_many_bins_and_a_long_way_outside():
    """Several bins in every direction, and atoms a million cells away."""
    rng = np.random.default_rng(3)
    cell = np.diag([14.0, 9.0, 11.5])
    atoms = Atoms("H37", positions=rng.uniform(0, 1, (37, 3)) @ cell, cell=cell, pbc=[True, True, False])
    runner = searched("list", atoms, 1.9)
    assert (runner.arrays["grid_bins"][0, :3].cpu().numpy() == [4, 3, 3]).all()
    check(runner, atoms, 1.9)
    atoms.positions[::2] += 2.0**20 * atoms.cell.array[0] - 2.0**18 * atoms.cell.array[1]
    runner.search_atoms(atoms.positions, atoms.cell.array, atoms.pbc)
    assert runner.flags[3] == 0
    check(runner, atoms, 1.9, rtol=1e-7)  # a float64 at 10^7 Angstrom has 9 digits behind the point
    runner.check_reverse()
