"""Evaluation by the core: given neighbour lists, ghosts and ranks, ignored atoms, threads, and every kind of bad input."""

import copy
import ctypes
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from reference import neighbors_of, random_model, reference
from structures import structure

from mlff import core, payload
from mlff.core import RESULTS, MLFFExchangeError, MLFFInputError, MLFFResourceError, Model, System
from mlff.export import build_payload
from mlff.painn import energy_and_gradient

SIX = [0, 4, 8, 1, 2, 5]  # xx, yy, zz, xy, xz, yz of a flattened 3 x 3 matrix


@pytest.fixture(scope="module")
def three_layers():
    return random_model(32, 3)


@pytest.fixture(scope="module")
def core_model(three_layers):
    return Model(build_payload(three_layers))


def evaluate(model, atoms, want=RESULTS, threads=1):
    system = System(model, threads=threads)
    system.set_atoms(atoms.numbers)
    return system.compute(atoms.positions, atoms.cell.array, atoms.pbc, want)


def assert_close(a, b, tolerance=2e-6):
    for name in a:
        np.testing.assert_allclose(
            a[name], b[name], rtol=0, atol=tolerance * (10 if "virial" in name or name == "energy" else 1), err_msg=name
        )


def assert_identical(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ethanol", "triclinic", "small_cell", "slab"])
def test_every_result_against_the_reference(three_layers, core_model, name):
    """atom_virial: half of each edge's term to each of its atoms, by hand from the float64 gradient."""
    atoms = structure(name)
    expected, found = reference(three_layers, atoms), evaluate(core_model, atoms)
    neighbors = neighbors_of(atoms, core_model.cutoff)
    _, gradient = energy_and_gradient(
        copy.deepcopy(three_layers).double(), torch.as_tensor(atoms.numbers), neighbors.edges, neighbors.vectors
    )
    r, g = neighbors.vectors.numpy(), gradient.numpy()
    terms = -0.5 * (r[:, :, None] * g[:, None, :] + r[:, None, :] * g[:, :, None]).reshape(-1, 9)[:, SIX]
    atom_virial = np.zeros((len(atoms), 6))
    for row in neighbors.edges.numpy():
        np.add.at(atom_virial, row, 0.5 * terms)
    assert_close(
        {"energy": expected.energy / len(atoms), "atom_energy": expected.energies, "forces": expected.forces,
         "virial": expected.virial.flatten()[SIX], "atom_virial": atom_virial},
        {**found, "energy": found["energy"] / len(atoms)},
    )  # fmt: skip
    np.testing.assert_allclose(found["atom_virial"].sum(0), found["virial"], atol=1e-10)
    np.testing.assert_allclose(found["atom_energy"].sum(), found["energy"], rtol=1e-14)
    np.testing.assert_allclose(found["forces"].sum(0), 0.0, atol=1e-10)


@pytest.mark.parametrize("want", [["energy"], ["atom_energy"], ["forces"], ["virial"], ["atom_virial"], ["energy", "virial"], []])
def test_any_subset_of_results(core_model, want):
    atoms = structure("triclinic")
    some, all_of_them = evaluate(core_model, atoms, want), evaluate(core_model, atoms)
    assert list(some) == want
    assert_identical(some, all_of_them)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_reproducible_for_a_number_of_threads(core_model, threads):
    atoms = structure("water_box")
    system = System(core_model, threads=threads)
    system.set_atoms(atoms.numbers)
    first = system.compute(atoms.positions, atoms.cell.array, True, RESULTS)
    for _ in range(3):
        assert_identical(first, system.compute(atoms.positions, atoms.cell.array, True, RESULTS))
    assert_close(first, evaluate(core_model, atoms), 1e-5)
    default = System(core_model)
    default.set_atoms(atoms.numbers)
    assert_close(first, default.compute(atoms.positions, atoms.cell.array, True, RESULTS), 1e-5)


def test_one_model_in_many_threads(core_model):
    atoms = structure("triclinic")
    expected = evaluate(core_model, atoms)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: evaluate(core_model, atoms), range(12)):
            assert_identical(expected, found)


def test_workspace_is_reused(core_model):
    """Large, small and large again: no remains of one system in the next, and no growth."""
    system, sizes = System(core_model, threads=1), []
    for name in ("water_box", "ethanol", None, "small_cell", "water_box", "water_box"):
        atoms = structure(name) if name else Atoms()
        system.set_atoms(atoms.numbers)
        assert_identical(evaluate(core_model, atoms), system.compute(atoms.positions, atoms.cell.array, atoms.pbc, RESULTS))
        sizes.append(system.bytes)
    assert sizes[-1] == sizes[-2] and sizes[-1] < 1.05 * sizes[0]


def test_energies_alone_need_less_memory(core_model):
    atoms = structure("water_box")
    sizes = []
    for want in (["energy"], ["forces"]):
        system = System(core_model, threads=1)
        system.set_atoms(atoms.numbers)
        system.compute(atoms.positions, atoms.cell.array, True, want)
        sizes.append(system.bytes)
    assert sizes[0] < 0.9 * sizes[1]


# ---- given neighbours, ghosts, ranks -------------------------------------------------------------------------------------


def given_list(i, j, n_local):
    return np.concatenate([[0], np.cumsum(np.bincount(i, minlength=n_local))]), j


def test_given_neighbours_with_a_skin(core_model):
    """A list kept while atoms move: pairs beyond the cutoff are skipped, those that come closer are found."""
    atoms, rng = structure("mixed_elements"), np.random.default_rng(0)
    i, j = np.nonzero(~np.eye(len(atoms), dtype=bool))
    system = System(core_model, threads=1)
    system.set_atoms(atoms.numbers)
    system.set_neighbors(*given_list(i, j, len(atoms)))
    for _ in range(3):
        assert_identical(evaluate(core_model, atoms), system.compute(atoms.positions, want=RESULTS))
        assert len(system.edges().centers) < len(i)
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)


class Rank:
    """The atoms of one rank: its locals, and ghosts for every other atom or image within the cutoff of them."""

    def __init__(self, model, atoms, ids, edges):
        home = {int(k): n for n, k in enumerate(ids)}
        shifts = edges.vectors - (atoms.positions[edges.neighbors] - atoms.positions[edges.centers])
        ghosts, self.owners, self.positions = {}, list(ids), [atoms.positions[k] for k in ids]
        rows = [[] for _ in ids]
        for i, j, shift in zip(edges.centers, edges.neighbors, shifts):
            if i not in home:
                continue
            key = (int(j), *np.round(shift, 6))
            if j in home and not np.any(np.abs(shift) > 1e-6):
                rows[home[i]].append(home[j])
                continue
            if key not in ghosts:
                ghosts[key] = len(self.owners)
                self.owners.append(int(j))
                self.positions.append(atoms.positions[j] + shift)
            rows[home[i]].append(ghosts[key])
        self.n_local, self.owners = len(ids), np.array(self.owners, dtype=int)
        self.positions = np.array(self.positions).reshape(-1, 3)
        self.system = System(model, threads=1)
        self.system.set_atoms(atoms.numbers[self.owners], self.n_local)
        self.system.set_neighbors(np.cumsum([0, *map(len, rows)]), [j for row in rows for j in row])


def on_ranks(model, atoms, assignment, n_ranks, want=RESULTS, images=False):
    """Evaluates on several ranks, each a thread, with an exchange through a shared table; sums everything home.

    With `images`, ghosts of the same atom share the first one's features, and the exchange leaves NaN to the others.
    """
    whole = System(model, threads=1)
    whole.set_atoms(atoms.numbers)
    whole.compute(atoms.positions, atoms.cell.array, atoms.pbc, ["energy"])
    edges = whole.edges()
    ranks = [Rank(model, atoms, np.flatnonzero(assignment == r), edges) for r in range(n_ranks)]
    table, barrier, calls = np.zeros((len(atoms), model.max_exchange_width), np.float32), threading.Barrier(n_ranks, timeout=60), []

    def evaluate_rank(rank):
        _, first, inverse = np.unique(rank.owners, return_index=True, return_inverse=True)
        originals = first[inverse].reshape(-1)
        is_image = originals != np.arange(len(rank.owners))
        if images:
            rank.system.set_images(originals)

        def exchange(rows):
            assert rows.shape[0] == len(rank.owners)
            table[rank.owners[: rank.n_local], : rows.shape[1]] = rows[: rank.n_local]
            barrier.wait()
            rows[rank.n_local :] = table[rank.owners[rank.n_local :], : rows.shape[1]]
            if images:
                rows[is_image] = np.nan
            barrier.wait()
            calls.append(rows.shape[1])

        rank.system.set_exchange(exchange)
        return rank.system.compute(rank.positions, want=want)

    with ThreadPoolExecutor(n_ranks) as pool:
        parts = list(pool.map(evaluate_rank, ranks))
    total = {}
    for name in want:
        if name in ("energy", "virial"):
            total[name] = sum(part[name] for part in parts)
        else:
            shape = (len(atoms),) + parts[0][name].shape[1:]
            total[name] = np.zeros(shape)
            for rank, part in zip(ranks, parts):
                np.add.at(total[name], rank.owners[: len(part[name])], part[name])
    return total, calls


@pytest.mark.parametrize("name", ["triclinic", "small_cell", "slab", "ethanol", "far_fragments"])
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("images", [False, True], ids=["", "images"])
def test_ranks(core_model, name, n_ranks, images):
    """The sum over ranks is the whole, also with a rank that has no atoms (the last of four)."""
    atoms = structure(name)
    rng = np.random.default_rng(1)
    assignment = rng.integers(0, min(n_ranks, 3), len(atoms))
    total, calls = on_ranks(core_model, atoms, assignment, n_ranks, images=images)
    assert_close(total, evaluate(core_model, atoms))
    assert sorted(calls) == sorted([192, 192, 128, 128] * n_ranks)


def test_ranks_energy_only(core_model):
    atoms = structure("triclinic")
    total, calls = on_ranks(core_model, atoms, np.arange(len(atoms)) % 2, 2, ["energy", "atom_energy"])
    assert_close(total, evaluate(core_model, atoms, ["energy", "atom_energy"]))
    assert calls == [192] * 4


def test_ghosts_of_one_layer_need_no_exchange():
    atoms, model = structure("triclinic"), Model(build_payload(random_model(16, 1)))
    whole = System(model, threads=1)
    whole.set_atoms(atoms.numbers)
    expected = whole.compute(atoms.positions, atoms.cell.array, True, RESULTS)
    rank = Rank(model, atoms, np.arange(len(atoms)), whole.edges())
    found = rank.system.compute(rank.positions, want=["energy", "forces", "virial"])
    forces = np.zeros((len(atoms), 3))
    np.add.at(forces, rank.owners, found.pop("forces"))
    assert model.max_exchange_width == 0
    assert_close({**found, "forces": forces}, expected)


def test_ghosts_that_are_images_need_no_exchange(core_model):
    atoms = structure("small_cell")
    whole = System(core_model, threads=1)
    whole.set_atoms(atoms.numbers)
    expected = whole.compute(atoms.positions, atoms.cell.array, True, RESULTS)
    rank = Rank(core_model, atoms, np.arange(len(atoms)), whole.edges())
    rank.system.set_images(rank.owners)
    found = rank.system.compute(rank.positions, want=RESULTS)
    for name in ("forces", "atom_virial"):
        assert not found[name][len(atoms) :].any()
        found[name] = found[name][: len(atoms)]
    assert_close(found, expected)


@pytest.mark.parametrize("originals", [[0, 1, 2, 5], [0, 1, 2, -1], [1, 1, 2, 0], [0, 1, 2, 1]], ids=["later", "negative", "local", "element"])
def test_bad_images(core_model, originals):
    system = System(core_model, threads=1)
    system.set_atoms([8, 1, 1, 8], 3)
    with pytest.raises(MLFFInputError, match="has the original -?[0-9]; it must be the first row of the same atom"):
        system.set_images(originals)
    system.set_images([0, 1, 2, 0])


def test_missing_and_failing_exchange(core_model):
    atoms = structure("triclinic")
    whole = System(core_model, threads=1)
    whole.set_atoms(atoms.numbers)
    expected = whole.compute(atoms.positions, atoms.cell.array, True)
    rank = Rank(core_model, atoms, np.arange(len(atoms)), whole.edges())
    with pytest.raises(MLFFExchangeError, match=f"{len(rank.owners) - len(atoms)} ghosts.*call set_exchange"):
        rank.system.compute(rank.positions)

    def fail(rows):
        raise OSError("the network is down")

    rank.system.set_exchange(fail)
    with pytest.raises(MLFFExchangeError, match="the callback returned 1") as error:
        rank.system.compute(rank.positions)
    assert isinstance(error.value.__cause__, OSError)
    rank.system.set_exchange(lambda rows: rows.__setitem__(slice(len(atoms), None), rows[rank.owners[len(atoms) :]]))
    found = rank.system.compute(rank.positions)
    assert_close({"energy": found["energy"], "virial": found["virial"]}, expected)


# ---- atoms that the model ignores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["triclinic", "mixed_elements", "small_cell"])
def test_ignored_atoms(core_model, name):
    """The result is that of the other atoms alone, wherever the ignored ones are (also on top of others)."""
    atoms = structure(name)
    kept = np.arange(len(atoms)) % 3 != 0
    numbers = np.where(kept, atoms.numbers, -1)
    positions = atoms.positions.copy()
    positions[0] = positions[1]
    system = System(core_model, threads=1)
    system.set_atoms(numbers)
    found = system.compute(positions, atoms.cell.array, atoms.pbc, RESULTS)
    expected = evaluate(core_model, atoms[kept])
    for key in ("atom_energy", "forces", "atom_virial"):
        assert not found[key][~kept].any()
        found[key] = found[key][kept]
    assert_close(found, expected)
    system.set_neighbors(*given_list(*np.nonzero(~np.eye(len(atoms), dtype=bool)), len(atoms)))
    if not atoms.pbc.any():
        given = system.compute(positions, want=["forces"])["forces"]
        np.testing.assert_allclose(given[kept], expected["forces"], atol=2e-6)


@pytest.mark.parametrize("numbers", [[], [-1], [-1, -1]])
def test_nothing_to_do(core_model, numbers):
    system = System(core_model, threads=2)
    system.set_atoms(numbers)
    for cell, pbc in ((None, None), (4 * np.eye(3), True)):
        found = system.compute(np.zeros((len(numbers), 3)), cell, pbc, RESULTS)
        assert found["energy"] == 0.0 and not found["virial"].any() and not found["forces"].any()
        assert len(system.edges().centers) == 0
    system.set_neighbors(np.zeros(len(numbers) + 1), [])
    assert system.compute(np.zeros((len(numbers), 3)))["energy"] == 0.0


# ---- bad input -------------------------------------------------------------------------------------------------------


def nan_position(system, x):
    x[4, 1] = np.nan
    system.compute(x)


def infinite_position(system, x):
    x[2, 0] = -np.inf
    system.compute(x)


def coincident(system, x):
    x[5] = x[3]
    system.compute(x)


def coincident_given(system, x):
    system.set_neighbors(*given_list(*np.nonzero(~np.eye(len(x), dtype=bool)), len(x)))
    x[5] = x[3]
    system.compute(x)


def ghosts_without_neighbours(system, x):
    system.set_atoms([1] * len(x), n_local=3)
    system._call("compute_periodic", x.ctypes.data, None, None, ctypes.byref(core._Results()))


def no_neighbours(system, x):
    system._call("compute", x.ctypes.data, ctypes.byref(core._Results()))


BAD_INPUTS = {
    "unknown element": (
        lambda s, x: s.set_atoms([1, 92, 8, 79]),
        r"the model knows the atomic numbers \[1, 6, 8\]; the structure has \[79, 92\] too",
    ),
    "atomic number 0": (lambda s, x: s.set_atoms([1, 0]), r"the structure has \[0\] too"),
    "negative n_local": (lambda s, x: s.set_atoms([1, 1], n_local=-1), "0 <= n_local <= n_total"),
    "too few atoms": (lambda s, x: s.set_atoms([1, 1], n_local=3), "n_local = 3 and n_total = 2"),
    "NaN": (nan_position, r"position of atom 4 is not finite \(y = nan\)"),
    "infinity": (infinite_position, r"position of atom 2 is not finite \(x = -inf\)"),
    "shape of positions": (lambda s, x: s.compute(x[:-1]), r"positions must have the shape \(9, 3\), got \(8, 3\)"),
    "shape of cell": (lambda s, x: s.compute(x, [5, 5, 5], True), r"cell must have the shape \(3, 3\)"),
    "unknown result": (lambda s, x: s.compute(x, want=["energies"]), "want must be names out of energy, atom_energy"),
    "coincident": (coincident, "atoms 3 and 5 are at the same place"),
    "coincident, given": (coincident_given, "atoms 3 and 5 are at the same place"),
    "ghosts without neighbours": (ghosts_without_neighbours, "6 atoms were set as ghosts"),
    "no neighbours": (no_neighbours, "call set_neighbors"),
    "offsets not from 0": (lambda s, x: s.set_neighbors([1] * 9 + [1], [2]), "must start at 0"),
    "offsets decrease": (lambda s, x: s.set_neighbors([0, 2, 1, 2, 2, 2, 2, 2, 2, 2], [1, 2]), "never decrease; they do at atom 1"),
    "offsets too short": (lambda s, x: s.set_neighbors([0, 0], []), r"offsets must have the shape \(10\)"),
    "offsets and neighbours": (
        lambda s, x: s.set_neighbors([0] * 9 + [3], [1]),
        "the last offset must be the number of neighbours, 1, got 3",
    ),
    "neighbour out of range": (
        lambda s, x: s.set_neighbors([0] + [1] * 9, [9]),
        "atom 0 has the neighbour 9; neighbours must be other atoms, 0 to 8",
    ),
    "neighbour negative": (lambda s, x: s.set_neighbors([0] + [1] * 9, [-1]), "atom 0 has the neighbour -1"),
    "own neighbour": (lambda s, x: s.set_neighbors([0] + [1] * 9, [0]), "atom 0 has the neighbour 0"),
    "threads": (lambda s, x: s._call("set_threads", -1), "number of threads must be 0"),
    "many threads": (lambda s, x: s._call("set_threads", 100000), "number of threads must be 0"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_leaves_the_system_usable(core_model, case):
    act, message = BAD_INPUTS[case]
    atoms = structure("ethanol")
    expected = evaluate(core_model, atoms)
    system = System(core_model, threads=1)
    system.set_atoms(atoms.numbers)
    system.compute(atoms.positions)
    with pytest.raises(MLFFInputError, match=message) as error:
        act(system, atoms.positions.copy())
    assert "\n" not in str(error.value)
    system.set_atoms(atoms.numbers)
    assert_identical(expected, system.compute(atoms.positions, want=RESULTS))


def test_a_failed_set_atoms_changes_nothing(core_model):
    atoms = structure("ethanol")
    system = System(core_model, threads=1)
    system.set_atoms(atoms.numbers)
    bad = np.array([0, 1, 7], dtype=np.int32)
    with pytest.raises(MLFFInputError, match="atom 2 has species 7; the model's species are 0 to 2"):
        system._call("set_atoms", 3, 3, bad.ctypes.data)
    assert_identical(evaluate(core_model, atoms), system.compute(atoms.positions, want=RESULTS))


def test_atoms_come_first(core_model):
    for compute in ("compute", "compute_periodic"):
        with pytest.raises(MLFFInputError, match="call set_atoms before computing"):
            System(core_model)._call(compute, *[None] * (1 if compute == "compute" else 3), ctypes.byref(core._Results()))


def test_edges_need_a_good_evaluation(core_model):
    atoms = structure("ethanol")
    system = System(core_model, threads=1)
    with pytest.raises(MLFFInputError, match="there are no edges"):
        system.edges()
    system.set_atoms(atoms.numbers)
    system.compute(atoms.positions)
    assert len(system.edges().centers) > 0
    with pytest.raises(MLFFInputError, match="not finite"):
        system.compute(atoms.positions * np.nan)
    with pytest.raises(MLFFInputError, match="there are no edges"):
        system.edges()


def test_results_that_are_not_finite_are_errors(core_model):
    """Finite weights can still overflow: that must not become a silent NaN, in any result."""
    header, tensors = payload.unpack(build_payload(random_model(16, 2)))
    atoms = structure("ethanol")
    for name, want, message in (
        ("readout.w2", ["energy"], "energy of atom 0 is not finite"),
        ("layers.1.filter", ["forces"], "not finite"),
    ):
        broken = {**tensors, name: np.full_like(tensors[name], 3e38)}
        with pytest.raises(MLFFInputError, match=message):
            evaluate(Model(payload.pack(header, broken)), atoms, want)


def test_no_such_device(core_model):
    with pytest.raises(MLFFResourceError, match='there is no device "abacus"; this build of mlff computes on "cpu"'):
        System(core_model, device="abacus")


def test_model_may_be_freed_first():
    model = Model(build_payload(random_model(16, 2)))
    atoms = structure("ethanol")
    expected = evaluate(model, atoms)
    system = System(model, threads=1)
    model._library.mlff_model_free(model._handle)
    model._handle = None
    species = np.searchsorted([1, 6, 8], atoms.numbers).astype(np.int32)
    system._call("set_atoms", len(atoms), len(atoms), species.ctypes.data)
    forces = np.empty((len(atoms), 3))
    system._call(
        "compute_periodic", atoms.positions.ctypes.data, None, None, ctypes.byref(core._Results(forces=forces.ctypes.data))
    )
    np.testing.assert_array_equal(forces, expected["forces"])


def test_null_pointers(core_model):
    """Every function that can fail refuses NULL with one line."""
    library, system = core_model._library, System(core_model, threads=1)
    system.set_atoms([1, 1])
    x, out, results = np.eye(3)[:2].copy(), ctypes.c_void_p(), core._Results()
    offsets = np.array([0, 1, 2])
    model, handle, place = core_model._handle, system._handle, ctypes.byref(out)
    calls = [
        ("model_load", None, place),
        ("model_load", b"x", None),
        ("model_load_memory", None, 5, place),
        ("model_load_memory", b"", 0, None),
        ("model_self_check", None, b"cpu", None, None),
        ("model_self_check", model, None, None, None),
        ("system_create", None, b"cpu", place),
        ("system_create", model, None, place),
        ("system_create", model, b"cpu", None),
        ("system_set_threads", None, 1),
        ("system_set_atoms", None, 0, 0, None),
        ("system_set_atoms", handle, 1, 1, None),
        ("system_set_neighbors", None, None, None),
        ("system_set_neighbors", handle, None, None),
        ("system_set_neighbors", handle, offsets.ctypes.data, None),
        ("system_compute", None, None, None),
        ("system_compute", handle, x.ctypes.data, None),
        ("system_compute_periodic", handle, None, None, None, ctypes.byref(results)),
        ("system_compute_periodic", handle, x.ctypes.data, None, None, None),
        ("system_edges", None, None, None, None, None),
    ]
    for name, *arguments in calls:
        assert getattr(library, f"mlff_{name}")(*arguments) == 2, name
        assert 10 < len(library.mlff_last_error()) < 300
    library.mlff_model_free(None)
    library.mlff_system_free(None)
    assert library.mlff_system_bytes(None) == 0


OUT_OF_MEMORY = """
import resource, sys
import numpy as np
from mlff.core import MLFFResourceError, Model, System
model = Model(sys.argv[1])
system, n = System(model, threads=1), 27_000
x = np.mgrid[:30, :30, :30].reshape(3, -1).T * 2.0
system.set_atoms(np.ones(n, dtype=int))
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20,) * 2)
try:
    system.compute(x)
except MLFFResourceError as e:
    print(e)
system.set_atoms([1, 1])
print(system.compute([[0, 0, 0], [0, 0, 1.0]])["forces"].shape)
"""


@pytest.mark.parametrize("megabytes", [8, 40, 160])
def test_out_of_memory(tmp_path, megabytes):
    """In the neighbour search and in the workspace: an error that names the size, and the process goes on."""
    path = tmp_path / "model.mlff"
    path.write_bytes(build_payload(random_model(16, 2)))
    run = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(path), str(megabytes)], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(Path(core.__file__).parents[1]), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
             "MLFF_LIBRARY_PATH": str(core.library_path("libmlff.so").parent)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    error, shape = run.stdout.splitlines()
    assert error.startswith("out of memory for 27000 atoms") and shape == "(2, 3)"


# ---- the library -------------------------------------------------------------------------------------------------------


def test_library_shows_its_interface_alone():
    """Two skins that hold the core can live in one process only if neither shows more than mlff.h."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    lines = subprocess.run(
        ["nm", "-DC", "--defined-only", core.library_path("libmlff.so")], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split(maxsplit=2)[2] for line in lines.splitlines()]
    assert {name for name in names if name.startswith("mlff_")} >= set(core._SIGNATURES)
    assert [name for name in names if "mlff::" in name] == []


def test_header_is_c():
    compiler = shutil.which("gcc") or shutil.which("cc")
    header = Path(__file__).parents[1] / "plugin" / "mlff.h"
    if not compiler:
        pytest.skip("no C compiler")
    run = subprocess.run(
        [compiler, "-std=c99", "-pedantic", "-Wall", "-Werror", "-fsyntax-only", "-x", "c", header], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_library_path(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFF_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="libmlff.so is not in .*; build it with `make build`"):
        core.library_path("libmlff.so")
    (tmp_path / "libmlff.so").touch()
    assert core.library_path("libmlff.so") == tmp_path / "libmlff.so"
