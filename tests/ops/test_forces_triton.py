"""Forces, virials and energies of the GPU kernels against mlff.painn.forces_and_virial, with gradients that are random numbers."""

import numpy as np
import pytest
import structures
import torch
from plan_runner import PlanRunner, inverse_box

pytest.importorskip("triton")
from dense_search import searches  # noqa: E402

from mlff import caller_triton, forces_triton, neighbors_triton  # noqa: E402
from mlff.painn import forces_and_virial  # noqa: E402
from mlff.plan import CudaPlan  # noqa: E402

CUTOFF = 4.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
XYZ = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]


class Forces(PlanRunner):
    """Searches and forces, without a model between them: gradients and energies of rows are what the test puts there."""

    def __init__(self, search: str, large: bool):
        plan = CudaPlan({"cutoff": "f64"})
        neighbors_triton.search_buffers(plan)
        plan.buffer("row_energy", "local", 1, "f64")
        plan.buffer("gradient", "edges", 4)
        plan.search = searches(plan)
        plan.schedules = [{"max_rows": None, "stages": []}]
        self.last = [forces_triton.forces_stage(plan, large), *forces_triton.total_stages(plan, large)]
        self.imports = caller_triton.import_stages(plan)
        super().__init__(plan, {"cutoff": np.array([CUTOFF])}, CUTOFF, DEVICE, search)

    def prepare(self, atoms, **options):
        """One structure, or several in a list."""
        self.atoms = atoms if isinstance(atoms, list) else [atoms]
        species = np.concatenate([np.searchsorted([1, 6, 8], a.numbers) for a in self.atoms])
        starts = np.cumsum([0] + [len(a) for a in self.atoms])
        self.set_atoms(species, starts=starts, **{"edge_capacity": 80, "candidate_capacity": 320, **options})
        for name in ("energies", "virials", "atom_energy", "forces", "atom_virial"):
            self.arrays[name].fill_(123.0)
        self.search_again()
        torch.manual_seed(1)
        self.arrays["gradient"].copy_(torch.randn(self.arrays["gradient"].shape))
        self.arrays["row_energy"].copy_(torch.randn(self.arrays["row_energy"].shape, dtype=torch.float64))

    def search_again(self):
        positions = np.concatenate([a.positions for a in self.atoms])
        self.compute(positions, [a.cell.array for a in self.atoms], [a.pbc for a in self.atoms])

    def results(self, backward=True):
        self.run(self.last, backward)
        a = {k: v.cpu().numpy() for k, v in self.arrays.items()}
        return {k: a[k] if k in ("energies", "virials", "status") else a[k][: self.n_total]
                for k in ("energies", "virials", "status", "atom_energy", "forces", "atom_virial")}

    def reference(self):
        """Forces [total, 3] and virials [structures, 6] from the edges of the local rows, and the order of the rows."""
        a = {k: v.cpu() for k, v in self.arrays.items()}
        capacity, order = self.scalars["edge_capacity"], a["order"].long()
        e = torch.cat([i * capacity + torch.arange(int(a["edge_count"][i])) for i in range(self.n_local)]).long()
        row = e // capacity
        edges = torch.stack([order[row], order[a["neighbors"][e].long()]])
        vectors = a["geometry"][e, :3].double() * a["distance"][e, None]
        gradient = a["gradient"][e, :3].double()
        forces, _ = forces_and_virial(gradient, edges, vectors, self.n_total)
        virials = []
        for b in range(len(a["starts"]) - 1):
            mine = a["structure"][row] == b
            virial = forces_and_virial(gradient[mine], edges[:, mine], vectors[mine], self.n_total)[1]
            virials.append([float(virial[x, y]) for x, y in XYZ])
        return forces.numpy(), np.array(virials), order.numpy()


def check(runner, got):
    forces, virials, order = runner.reference()
    energy = np.zeros(runner.n_total)
    energy[order[: runner.n_local]] = runner.arrays["row_energy"].cpu().numpy()[: runner.n_local]
    starts = runner.arrays["starts"].cpu().numpy()
    np.testing.assert_allclose(got["forces"], forces, atol=1e-12)
    np.testing.assert_allclose(got["virials"], virials, atol=2e-5)  # sums of hundreds of vectors, given as float32
    np.testing.assert_array_equal(got["atom_energy"], energy)
    for b, (begin, end) in enumerate(zip(starts, starts[1:])):
        np.testing.assert_allclose(got["energies"][b], energy[begin:end].sum(), atol=1e-12)
        np.testing.assert_allclose(got["atom_virial"][begin:end].sum(0), got["virials"][b], atol=1e-12)
    assert (got["status"][[3, 4, 5, 6, 7, 15]] == 0).all() and got["status"][0] == int(runner.arrays["edge_count"].max())
    assert (runner.arrays["flags"] == 0).all() and int(runner.arrays["rebuild"]) == 0


@pytest.mark.parametrize("search, large", [("dense", False), ("list", True)])
@pytest.mark.parametrize("name", ["ethanol", "small_cell", "slab", "isolated_atom"])
def test_forces_and_virial(search, large, name):
    runner = Forces(search, large)
    runner.prepare(structures.STRUCTURES[name]()[:12])
    check(runner, runner.results())


@SIZES
def test_ghosts(large):
    runner = Forces("dense", large)
    runner.prepare(structures.mixed_elements(), n_local=10)
    check(runner, runner.results())


@SIZES
def test_batch(large):
    runner = Forces("list", large)
    runner.prepare([structures.wire()[:5], structures.single_atom(), structures.ethanol()])
    check(runner, runner.results())


def test_virial_of_an_atom_is_half_of_each_of_its_pairs():
    runner = Forces("dense", False)
    runner.prepare(structures.STRUCTURES["ethanol"]()[:2])
    got = runner.results()
    g, q = runner.arrays["geometry"].cpu().double(), runner.arrays["gradient"].cpu().double()
    capacity = runner.scalars["edge_capacity"]
    r, pull = g[0, :3] * g[0, 3], q[0, :3] - q[capacity, :3]  # r_01 and dE/dr_01 - dE/dr_10
    w = -0.25 * (torch.outer(r, pull) + torch.outer(pull, r))
    for atom in (0, 1):
        np.testing.assert_allclose(got["atom_virial"][atom], [float(w[x, y]) for x, y in XYZ], rtol=1e-12)
    np.testing.assert_array_equal(got["forces"], [pull.numpy(), -pull.numpy()])


@SIZES
def test_energy_alone(large):
    runner = Forces("dense", large)
    runner.prepare(structures.water_dimer())
    got = runner.results(backward=False)
    assert (got["forces"] == 123).all() and (got["virials"] == 123).all() and (got["atom_virial"] == 123).all()
    np.testing.assert_array_equal(got["atom_energy"], runner.arrays["row_energy"].cpu().numpy()[:6])
    np.testing.assert_allclose(got["energies"], got["atom_energy"].sum(), atol=1e-13)
    assert (runner.arrays["flags"] == 0).all()


@SIZES
def test_what_cannot_be_trusted_is_nan(large):
    runner = Forces("dense", large)
    runner.prepare([structures.water_dimer(), structures.single_atom()])
    for flag in (0, 1, 3, 4, 5, 6):
        runner.arrays["flags"][flag] = 321
        got = runner.results()
        for name in ("energies", "virials", "atom_energy", "forces", "atom_virial"):
            assert np.isnan(got[name]).all(), name
        assert got["status"][flag] == 321 and got["status"][15] == 0 and (runner.arrays["flags"] == 0).all()
        for name in ("energies", "virials", "atom_energy", "forces", "atom_virial"):
            runner.arrays[name].fill_(123.0)
    runner.search_again()
    check(runner, runner.results())


@SIZES
def test_overflow_is_nan_and_reads_nothing_outside(large):
    runner = Forces("list", large)
    runner.prepare(structures.dense_cluster()[:24], edge_capacity=16, candidate_capacity=16)
    got = runner.results()
    assert got["status"][0] <= 16 and got["status"][1] > 16
    assert np.isnan(got["forces"]).all() and np.isnan(got["energies"]).all()


@pytest.mark.parametrize("large, value", [(False, np.nan), (True, np.inf)])
def test_an_energy_that_is_not_finite(large, value):
    runner = Forces("list", large)
    runner.prepare(structures.ethanol())
    runner.arrays["row_energy"][2] = value
    got = runner.results()
    atom = int(runner.arrays["order"][2])
    assert got["status"][7] == atom + 1 and not np.isfinite(got["energies"]).any()
    assert np.isfinite(got["forces"]).all() and not np.isfinite(got["atom_energy"][atom])
    runner.arrays["row_energy"][2] = value
    runner.arrays["flags"][3] = 1
    assert runner.results()["status"][[3, 7]].tolist() == [1, 0]  # another flag explains it


def given(values):
    """The caller's memory, and what kernels get: a pointer to float64, whatever is there."""
    memory = torch.full((values.numel() + 8,), 7.0, dtype=values.dtype, device=DEVICE)[: -(-values.numel() // 2) * 2]
    memory[: values.numel()] = values.flatten()
    return memory, memory.view(torch.float64)


@pytest.mark.parametrize("large, kind", [(False, torch.float32), (True, torch.float64)], ids=["small-f32", "large-f64"])
def test_arrays_of_the_caller(large, kind):
    runner = Forces("list", large)
    atoms = structures.slab()
    runner.prepare(atoms)
    n = runner.n_total
    rows = torch.from_numpy(np.random.default_rng(0).permutation(n + 3)[: n].astype(np.int32))  # the caller has three atoms more
    a = runner.arrays
    a["caller_atoms"][:n] = rows.to(DEVICE)
    a["units"].copy_(torch.tensor([10.0, 96.485, 964.85, float(kind == torch.float32)], dtype=torch.float64))

    caller = torch.full((n + 3, 3), 7.0, dtype=kind)
    caller[rows.long()] = torch.from_numpy(atoms.positions / 10).to(kind)
    a["caller_positions"] = given(caller)[1]
    before = a["boxes"].clone()
    runner.run(runner.imports)
    assert torch.equal(a["boxes"], before)  # the box is a null pointer
    np.testing.assert_array_equal(a["positions"].cpu()[:n], caller[rows.long()].double() * 10)
    cell = np.array([[3.1, 0.2, 0.0], [0.7, 3.0, 0.4], [-0.6, 0.5, 3.3]])
    for pbc in ([True] * 3, [True, False, True], [False, True, False]):
        box = torch.from_numpy(np.where(np.array(pbc)[:, None], cell, 0)).to(kind)
        a["caller_box"] = given(box)[1]
        runner.run(runner.imports)
        np.testing.assert_allclose(a["boxes"][0].cpu(), inverse_box(box.double().numpy() * 10, pbc), atol=1e-14, rtol=1e-14)

    memory, a["caller_forces"] = given(torch.full((n + 3, 3), 7.0, dtype=kind))
    a["caller_energy"] = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    got = runner.results()
    assert float(a["caller_energy"]) == got["energies"][0] * 96.485
    wanted = torch.full((n + 3, 3), 7.0, dtype=kind)
    wanted[rows.long()] = (torch.from_numpy(got["forces"]) * 964.85).to(kind)
    np.testing.assert_array_equal(memory.cpu()[: wanted.numel()], wanted.flatten())
    a["flags"][3] = 1
    runner.results()
    assert np.isnan(float(a["caller_energy"])) and bool(torch.isnan(memory[: wanted.numel()].view(-1, 3)[rows.long().to(DEVICE)]).all())
    a["caller_energy"].fill_(5.0)
    a["caller_forces"] = a["caller_forces"][:0].clone()
    runner.results(backward=False)
    assert float(a["caller_energy"]) == float(a["energies"][0] * 96.485) and float(a["caller_energy"]) != 5.0


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ["ethanol", "slab"])
def test_dense_search_reads_the_arrays_of_the_caller(name, kind):
    """And nothing of the host's, which are not a number here."""
    atoms = structures.structure(name)
    atoms.positions = 10 * torch.from_numpy(atoms.positions / 10).to(kind).double().numpy()
    atoms.cell = 10 * torch.from_numpy(atoms.cell.array / 10).to(kind).double().numpy()
    runner = Forces("dense", False)
    runner.prepare(atoms)
    a, n = runner.arrays, runner.n_total
    names = ("edge_count", "neighbors", "distance", "geometry", "slot", "reverse")
    wanted = {k: a[k].clone() for k in names}
    rows = np.random.default_rng(0).permutation(n + 3)[:n].astype(np.int32)
    a["caller_atoms"][:n] = torch.from_numpy(rows).to(DEVICE)
    a["units"].copy_(torch.tensor([10.0, 1.0, 1.0, float(kind == torch.float32)], dtype=torch.float64))
    caller = torch.full((n + 3, 3), np.nan, dtype=kind)
    caller[rows.astype(int)] = torch.from_numpy(atoms.positions / 10).to(kind)
    kept, a["caller_positions"] = given(caller)
    box, a["caller_box"] = given(torch.from_numpy(np.where(atoms.pbc[:, None], atoms.cell.array / 10, 0)).to(kind))
    for k in ("positions", "boxes"):
        a[k].fill_(np.nan)
    for k in names:
        a[k].zero_()
    runner.run(runner.dict["search"]["dense"])
    assert not a["flags"][2:].any()
    assert torch.equal(a["edge_count"], wanted["edge_count"]) and int(a["edge_count"].sum()) > 0
    for i in range(n):
        e = slice(i * runner.scalars["edge_capacity"], i * runner.scalars["edge_capacity"] + int(a["edge_count"][i]))
        for k in ("neighbors", "reverse"):
            assert torch.equal(a[k][e], wanted[k][e])
        for k in ("distance", "geometry"):
            torch.testing.assert_close(a[k][e], wanted[k][e], rtol=1e-13 if k == "distance" else 1e-6, atol=1e-6 if k == "geometry" else 0)
