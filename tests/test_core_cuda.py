"""The CUDA backend without a GPU: against a stand-in for the driver (cpp/fake_cuda.cpp), which runs a model of pairs on the host.

Everything but the machine code is the real thing: reading the plan, memory, growth, graphs, exchanges, errors.
"""

import copy
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fake_plan import model_parts, packed

from mlff import core, payload
from mlff.core import (
    RESULTS, DeviceArrays, MLFFExchangeError, MLFFFileError, MLFFInputError, MLFFInternalError, MLFFResourceError, Model, System,
    device_count,
)  # fmt: skip
from mlff.neighbors import find_neighbors

CUTOFF = 5.0


@pytest.fixture(scope="module")
def parts():
    return model_parts()


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("fake") / "fake_cuda.so"
    source = Path(__file__).parent / "cpp" / "fake_cuda.cpp"
    subprocess.run([compiler, "-std=c++20", "-O1", "-shared", "-fPIC", source, "-o", path], check=True)
    return path


@pytest.fixture
def fresh_core(tmp_path, monkeypatch):
    """A copy of the core that has not opened a driver yet, and that finds none."""
    shutil.copy(core.library_path("libmlff.so"), tmp_path)
    monkeypatch.setenv("MLFF_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("MLFF_CUDA_DRIVER", str(tmp_path / "none.so"))


@pytest.fixture
def fake(fresh_core, fake_library, monkeypatch, tmp_path):
    """The stand-in, and a function that reads its counters. A copy for each test, so that they begin at zero."""
    path = tmp_path / "fake_cuda.so"
    shutil.copy(fake_library, path)
    monkeypatch.setenv("MLFF_CUDA_DRIVER", str(path))
    library = ctypes.CDLL(str(path))
    library.fake_counter.restype = ctypes.c_long
    yield lambda name: library.fake_counter(name.encode())
    assert library.fake_counter(b"contexts") == 0, "a context was left current"


@pytest.fixture
def model(parts, fake):
    return Model(packed(parts))


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


# ---- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, length, pbc", [(1, 9.0, True), (12, 7.0, False), (40, 6.0, True), (40, 3.9, [True, False, True]), (250, 11.0, True)],
    ids=["one", "open", "dense", "images", "list"],
)  # fmt: skip
def test_results_and_edges(model, fake, n, length, pbc):
    """Dense search and list (whose rows are permuted), growth of every capacity, all results, edges in the caller's order."""
    numbers, positions = atoms_of(n, length, least=0.5)
    cell = np.diag([length, 1.1 * length, 1.2 * length])
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    for want in (RESULTS, ["energy"], ["forces", "atom_virial"]):
        found = system.compute(positions, cell, pbc, want)
        assert list(found) == list(want)
        assert_close(found, expected(numbers, positions, cell, pbc))
    edges, wanted = system.edges(), find_neighbors(positions, CUTOFF, cell, np.broadcast_to(pbc, 3))
    assert np.all(np.diff(edges.centers) >= 0)
    np.testing.assert_allclose(
        np.array(sorted(map(tuple, np.c_[edges.centers, edges.neighbors, edges.vectors.round(4)]))).reshape(-1, 5),
        np.array(sorted(map(tuple, np.c_[wanted.edges.T.numpy(), wanted.vectors.numpy().round(4)]))).reshape(-1, 5), atol=2e-4,
    )  # fmt: skip
    assert fake("cubins") > 0 and fake("ptx") == 0


@pytest.mark.parametrize("n", [12, 250], ids=["dense", "list"])
def test_extrapolation_grade(parts, fake, n):
    """The stages of grades run after the others and only when they are wanted; results come in the caller's order."""
    header, tensors = copy.deepcopy(parts[0]), dict(parts[1])
    args = ["s1", "species", "extrapolation.projection", "extrapolation.environments", "grade"]
    header["plans"]["cpu"]["grade"] = [{"kernel": "extrapolation", "pass": "forward", "args": args}]
    tensors["extrapolation.projection"] = np.zeros((2 * 16, 3), np.float32)
    tensors["extrapolation.environments"] = np.ones((2 * 4, 3), np.float32)
    for code in ("sm_80", "sm_86", "sm_90", "ptx"):
        tensors[f"cuda.{code}.extrapolation"] = tensors[f"cuda.{code}.energy"]

    def change(plan):
        kernel = {"warps": 1, "args": ["i32*", "i32*", "f32*", "f64*"], "shared": plan["kernels"]["energy"]["shared"]}
        plan["kernels"]["extrapolation"] = kernel
        args = ["counts", "order", "x", "grade"]
        plan["grade"] = [{"kernel": "extrapolation", "pass": "forward", "args": args, "grid": ["local", 1, 1]}]

    graded = Model(packed((header, tensors), change))
    numbers, positions = atoms_of(n, 11.0, least=0.5)
    system = System(graded, device="cuda")
    system.set_atoms(numbers)
    for want in (["forces", "extrapolation_grade"], ["forces"], ["extrapolation_grade"]):
        found = system.compute(positions, np.eye(3) * 11.0, True, want)
        assert list(found) == want
        if "extrapolation_grade" in want:
            np.testing.assert_array_equal(found["extrapolation_grade"], 100.0 * (graded.species(numbers) + 1) + np.arange(n))
    with pytest.raises(MLFFFileError, match="either all plans have stages of extrapolation grades or none"):
        Model(packed((header, tensors)))


@pytest.mark.parametrize("arch, version, overlaps", [(90, 13000, True), (90, 12020, False), (86, 13000, False)])
def test_kernels_overlap_where_they_wait_by_themselves(parts, fake, monkeypatch, arch, version, overlaps):
    """All kernels of a graph but its first, if the code for this GPU waits and the driver can capture that."""
    monkeypatch.setenv("FAKE_CUDA_ARCH", str(arch))
    monkeypatch.setenv("FAKE_CUDA_VERSION", str(version))
    numbers, positions = atoms_of(12, 7.0)
    system = System(Model(packed(parts)), device="cuda")
    system.set_atoms(numbers)
    assert_close(system.compute(positions), expected(numbers, positions))
    assert fake("captures") > 0 and fake("overlapping") == 4 * overlaps * fake("captures")  # of five kernels


def test_graphs_are_replayed(model, fake):
    """One capture per kind of evaluation, nothing uploaded but positions, and graphs kept while the number of atoms fluctuates."""
    system = System(model, device="cuda:0")
    numbers, positions = atoms_of(150, 14.0)
    cell = np.eye(3) * 14.0
    system.set_atoms(numbers)
    system.compute(positions, cell, True)
    captures, uploads, launched = fake("captures"), fake("uploads"), fake("graph_launches")
    for step in range(3):
        positions = positions + 0.01
        assert_close(system.compute(positions, cell, True), expected(numbers, positions, cell, True))
    assert (fake("captures"), fake("uploads"), fake("graph_launches")) == (captures, uploads + 3, launched + 3)
    system.compute(positions, cell, True, ["energy"])
    assert fake("captures") == captures + 1
    for n in (140, 149, 150, 130):
        system.set_atoms(numbers[:n])
        assert_close(system.compute(positions[:n], cell, True), expected(numbers[:n], positions[:n], cell, True))
    assert fake("captures") == captures + 1
    cell = np.eye(3) * 14.5
    assert_close(system.compute(positions[:130], cell, True), expected(numbers[:130], positions[:130], cell, True))
    assert fake("captures") == captures + 1


def test_system_shrinks_and_grows(model):
    system = System(model, device="cuda")
    for n, length in ((300, 20.0), (5, 6.0), (120, 8.0), (0, 5.0), (64, 6.0), (300, 20.0)):
        numbers, positions = atoms_of(n, length)
        system.set_atoms(numbers)
        found = system.compute(positions, np.eye(3) * length, True, RESULTS)
        if n:
            assert_close(found, expected(numbers, positions, np.eye(3) * length, True))
        else:
            assert found["energy"] == 0 and not found["virial"].any() and len(system.edges().centers) == 0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_batch(model, device):
    sizes, length = [5, 0, 17, 1], 8.0
    parts_ = [atoms_of(n, length, seed) for seed, n in enumerate(sizes)]
    numbers, positions = (np.concatenate([p[k] for p in parts_]) for k in (0, 1))
    cells, pbcs = np.stack([np.eye(3) * (length + b) for b in range(4)]), np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    system = System(model, device=device)
    system.set_atoms(numbers)
    system.set_structures(np.cumsum([0, *sizes]))
    found = system.compute_batch(positions, cells, pbcs, RESULTS)
    single = System(model, device=device)
    for b, (z, x) in enumerate(parts_):
        single.set_atoms(z)
        alone = single.compute(x, cells[b], pbcs[b], RESULTS)
        rows = slice(sum(sizes[:b]), sum(sizes[: b + 1]))
        for name in RESULTS:
            part = found[name][b] if name in ("energy", "virial") else found[name][rows]
            np.testing.assert_allclose(part, alone[name], atol=1e-9, err_msg=name)
    with pytest.raises(MLFFInputError, match="there are no edges"):
        system.edges()
    with pytest.raises(MLFFInputError, match="compute_periodic evaluates one structure, 4 were set: call compute_batch"):
        system.compute(positions)
    for starts in ([0, 5], [1, 23], [0, 7, 6, 23], [0], []):
        with pytest.raises(MLFFInputError, match="set_structures|starts"):
            system.set_structures(starts)


def test_batch_with_too_many_images(model):
    system = System(model, device="cuda")
    numbers, positions = atoms_of(100, 20.0)
    system.set_atoms(np.concatenate([numbers, numbers]))
    system.set_structures([0, 100, 200])
    with pytest.raises(MLFFInputError, match="structure 0 has 100 atoms and 1331 images of each"):
        system.compute_batch(np.concatenate([positions, positions]), np.stack([np.eye(3) * 1.0] * 2), True)


# ---- ghosts -----------------------------------------------------------------------------------------------------------


def with_ghosts(n=30, length=6.5):
    """Local atoms in a periodic box and the images around them as ghosts: numbers, positions, index of the original."""
    numbers, positions = atoms_of(n, length)
    shifts = [s for s in np.ndindex(3, 3, 3) if s != (1, 1, 1)]
    origin = np.concatenate([np.arange(n)] * (len(shifts) + 1))
    moved = np.concatenate([positions, *(positions + (np.array(s) - 1) * length for s in shifts)])
    return numbers[origin], moved, origin, n, expected(numbers, positions, np.eye(3) * length, True)


@pytest.mark.parametrize("images", [False, True])
def test_ghosts(model, fake, images):
    """The exchange fills ghosts from their owners; ghosts that are images need none."""
    numbers, positions, origin, n, wanted = with_ghosts()
    system = System(model, device="cuda")
    system.set_atoms(numbers, n)
    with pytest.raises(MLFFExchangeError, match="780 ghosts"):
        system.compute(positions)
    calls = []

    def exchange(rows):
        assert rows.shape == (len(numbers), 2)
        np.testing.assert_array_equal(rows[:n, 0], np.where(numbers[:n] == 1, 1, 2))
        rows[n:] = 1e9 if images else rows[origin[n:]]
        calls.append(1)

    if images:
        system.set_images(origin)
        assert_close({k: system.compute(positions)[k] for k in ("energy", "virial")}, wanted)
    system.set_exchange(exchange)
    for step in range(2):  # the second evaluates again with what the first has grown: nobody may exchange twice
        found = system.compute(positions, want=RESULTS)
        assert len(calls) == step + 1
        assert_close({k: found[k] for k in ("energy", "virial", "atom_energy")}, wanted)
        assert_close({"forces": found["forces"][:n]}, wanted)
        assert not found["forces"][n:].any()
    edges = system.edges()
    assert edges.centers.max() == n - 1 and (edges.neighbors.max() >= n) != images
    with pytest.raises(MLFFInputError, match="searches its own neighbours"):
        system.set_neighbors(np.zeros(n + 1), [])


def test_exchange_takes_part_everywhere(model):
    """Ranks without ghosts and ranks without atoms exchange as often as the others; a failure is reported, and forgotten."""
    system, calls = System(model, device="cuda"), []
    numbers, positions = atoms_of(20, 8.0)
    system.set_exchange(lambda rows: calls.append(rows.shape))
    for n_local, n_total in ((20, 20), (0, 0), (0, 20)):
        system.set_atoms(numbers[:n_total], n_local)
        found = system.compute(positions[:n_total], want=["energy", "forces"])
        assert n_local or (found["energy"] == 0 and not found["forces"].any())
    assert calls == [(20, 2), (0, 2), (20, 2)]
    system.set_atoms(numbers)
    before = system.compute(positions)

    def broken(rows):
        raise RuntimeError("the other rank is gone")

    system.set_exchange(broken)
    with pytest.raises(MLFFExchangeError, match="the callback returned 1"):
        system.compute(positions)
    with pytest.raises(MLFFInputError, match="there are no edges"):
        system.edges()
    system.set_exchange(None)
    assert_close(system.compute(positions), before)


# ---- bad input, memory ------------------------------------------------------------------------------------------------


def test_bad_input(model):
    system = System(model, device="cuda")
    numbers, positions = atoms_of(20, 8.0)
    system.set_atoms(numbers)
    bad = positions.copy()
    bad[3, 1] = np.nan
    with pytest.raises(MLFFInputError, match=r"the position of atom 3 is not finite \(y = nan\)"):
        system.compute(bad)
    bad[3] = bad[7]
    with pytest.raises(MLFFInputError, match="atoms 3 and 7 are at the same place"):
        system.compute(bad)
    assert_close(system.compute(positions), expected(numbers, positions))
    with pytest.raises(MLFFInputError, match="cell is singular"):
        system.compute(positions, np.ones((3, 3)), True)
    with pytest.raises(MLFFInputError, match="compute_device needs|rows do not fit|positions"):
        system.compute_device(DeviceArrays(length_unit=1.0, energy_unit=1.0))


def test_out_of_memory(model, fake, monkeypatch):
    numbers, positions = atoms_of(300, 17.0)
    system = System(model, device="cuda")
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(fake("used") + 120000))
    system.set_atoms(numbers)
    with pytest.raises(MLFFResourceError, match="out of memory on cuda:0: 300 atoms need .* GB are free; about [0-9]+ atoms fit"):
        system.compute(positions)
    system.set_atoms(numbers[:3])
    assert_close(system.compute(positions[:3]), expected(numbers[:3], positions[:3]))
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(1 << 30))
    system.set_atoms(numbers)
    assert_close(system.compute(positions), expected(numbers, positions))


def test_everything_is_freed(parts, fake):
    model = Model(packed(parts))
    systems = [System(model, device="cuda") for _ in range(3)]
    weights = fake("used")
    assert weights > 0 and fake("allocations") == 1  # shared
    for system in systems:
        system.set_atoms([1, 8])
        system.compute(np.array([[0.0, 0, 0], [1.0, 0, 0]]))
        assert system.bytes > 0
    del system, systems, model
    assert fake("used") == 0


# ---- arrays on the GPU ------------------------------------------------------------------------------------------------


def device_arrays(positions, forces, energy, box=None, atoms=None, stream=None):
    def pointer(array):
        return None if array is None else array.ctypes.data

    return DeviceArrays(
        stream=stream, is_double=positions.dtype == np.float64, n_rows=len(positions), positions=pointer(positions),
        atoms=pointer(atoms), box=pointer(box), length_unit=10.0, energy_unit=96.0, energy=pointer(energy), forces=pointer(forces),
    )  # fmt: skip


@pytest.fixture
def gpu_array(fake, tmp_path):
    """Memory of the stand-in's device, as NumPy arrays. Its driver must be in use by a system."""
    library, context = ctypes.CDLL(str(tmp_path / "fake_cuda.so")), ctypes.c_void_p()
    library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)

    def make(values, dtype):
        values, pointer = np.asarray(values, dtype=dtype), ctypes.c_uint64()
        library.cuCtxPushCurrent_v2(context)
        assert library.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(values.nbytes)) == 0
        library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        array = np.ctypeslib.as_array((ctypes.c_byte * values.nbytes).from_address(pointer.value)).view(dtype).reshape(values.shape)
        array[...] = values
        return array

    make.library, make.context = library, context
    return make


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n, length, box", [(20, 8.0, False), (20, 6.0, True), (150, 9.0, True)], ids=["open", "dense", "list"])
def test_device_arrays(model, gpu_array, fake, dtype, n, length, box):
    numbers, positions = atoms_of(n, length)
    rows = np.random.default_rng(0).permutation(n + 7)[:n]  # of the caller's arrays
    spread = np.zeros((n + 7, 3))
    spread[rows] = positions / 10
    x, f, e = gpu_array(spread, dtype), gpu_array(np.full((n + 7, 3), 7), dtype), gpu_array([0], np.float64)
    cell = gpu_array(np.eye(3) * length / 10, dtype) if box else None
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    arrays = device_arrays(x, f, e, cell, rows)
    for scale in (1.0, 0.55 if box else 1.0):  # the second needs more images, which only the device notices
        x[rows] = positions / 10 * scale
        if box:
            cell[...] = np.eye(3) * length / 10 * scale
        system.compute_device(arrays)
        wanted = expected(numbers, 10 * x[rows].astype(float), np.eye(3) * length * scale if box else None, box)
        tolerance = 1e-5 * 96 * np.abs(wanted["forces"]).max() * 10
        np.testing.assert_allclose(e[0], 96 * wanted["energy"], rtol=1e-5)
        np.testing.assert_allclose(f[rows], 960 * wanted["forces"], atol=tolerance)
        assert np.all(np.delete(f, rows, axis=0) == 7)
    uploads = fake("uploads")
    system.compute_device(arrays)
    assert fake("uploads") == uploads > 0
    arrays.forces, e[0] = None, 0.0  # the energy alone
    system.compute_device(arrays)
    np.testing.assert_allclose(e[0], 96 * wanted["energy"], rtol=1e-5)
    arrays.box = None
    system.compute_device(arrays)
    np.testing.assert_allclose(e[0], 96 * expected(numbers, 10 * x[rows].astype(float))["energy"], rtol=1e-5)
    f[...], e[0] = 7, 7.0
    assert_close(system.compute(positions), expected(numbers, positions))
    assert np.all(f == 7) and e[0] == 7  # are not in an evaluation of the host's arrays


def test_graphs_of_pointers_that_come_back(model, gpu_array, fake):
    """A caller that makes new arrays at every step, and one that has two sets of them in turn."""
    numbers, positions = atoms_of(30, 12.0)
    x, e, *forces = (gpu_array(v, np.float64) for v in (positions / 10, [0], *np.full((5, 30, 3), 7.0)))
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    system.compute_device(device_arrays(x, forces[0], e))
    wanted = 960 * expected(numbers, positions)["forces"]
    steps = [(1, 0, 0), (1, 1, 1), (2, 0, 0), (3, 0, 0), (1, 0, 1), (3, 1, 1), (1, 0, 1), (3, 0, 1)]
    for which, captured, replayed in steps:
        captures, launches = fake("captures"), fake("graph_launches")
        system.compute_device(device_arrays(x, forces[which], e))
        assert (fake("captures") - captures, fake("graph_launches") - launches) == (captured, replayed)
        np.testing.assert_allclose(forces[which], wanted, atol=1e-3)
        forces[which][...] = 7
    assert np.all(forces[4] == 7)


def test_capture_by_the_caller(model, gpu_array, fake):
    """Captured once, replayed at other positions, also after the system has grown; NaN where it does not fit."""
    library, context, stream = gpu_array.library, gpu_array.context, ctypes.c_void_p()
    numbers, positions = atoms_of(30, 12.0)
    x, f, e = (gpu_array(v, np.float64) for v in (positions / 10, np.zeros((30, 3)), [0]))
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    library.cuCtxPushCurrent_v2(context)
    try:
        assert library.cuStreamCreate(ctypes.byref(stream), 1) == 0
        arrays = device_arrays(x, f, e, stream=stream.value)
        graph = ctypes.c_void_p()

        def capture():
            library.cuStreamBeginCapture_v2(stream, 1)
            try:
                system.compute_device(arrays)
            finally:
                library.cuStreamEndCapture(stream, ctypes.byref(graph))

        with pytest.raises(MLFFInputError, match="evaluate once before capturing"):
            capture()
        system.compute_device(arrays)
        arrays.forces = None
        with pytest.raises(MLFFInputError, match="evaluate once before capturing"):
            capture()  # the kernels of the energy alone have not been loaded
        arrays.forces, overlapping = f.ctypes.data, fake("overlapping")
        capture()
        assert (fake("overlapping"), fake("graph_launches")) == (overlapping + 5, 0)  # of six kernels; no graph but the caller's

        def replay(scale):
            x[...] = positions / 10 * scale
            assert library.cuGraphLaunch(graph, None) == 0

        for scale in (1.0, 0.9, 1.1):
            replay(scale)
            wanted = expected(numbers, positions * scale)
            np.testing.assert_allclose(e[0], 96 * wanted["energy"], rtol=1e-6)
            np.testing.assert_allclose(f, 960 * wanted["forces"], atol=1e-2)
        x[1] = x[0]
        assert library.cuGraphLaunch(graph, None) == 0
        assert np.isnan(e[0]) and np.isnan(f).all()
        before = fake("used")
        more_numbers, more = atoms_of(200, 12.0)
        system.compute(positions / 2, np.eye(3) * 7, True)  # boxes are the captured graph's
        replay(1.0)
        np.testing.assert_allclose(e[0], 96 * expected(numbers, positions)["energy"], rtol=1e-6)
        system.set_atoms(more_numbers)
        assert_close(system.compute(more), expected(more_numbers, more))
        assert fake("used") > before
        replay(1.0)
        np.testing.assert_allclose(e[0], 96 * expected(numbers, positions)["energy"], rtol=1e-6)
    finally:
        library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def test_device_arrays_without_atoms(model, gpu_array):
    """A model for no atom of the caller's: nothing to compute, and the caller's forces stay."""
    system = System(model, device="cuda")
    system.set_atoms([])
    x, f, e = gpu_array(np.ones((3, 3)), np.float32), gpu_array(np.full((3, 3), 7), np.float32), gpu_array([5], np.float64)
    system.compute_device(device_arrays(x, f, e))
    assert e[0] == 0 and (f == 7).all()


def test_device_arrays_refused(model, gpu_array):
    numbers, positions = atoms_of(4, 6.0)
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    x, f, e = gpu_array(positions, np.float32), gpu_array(positions, np.float32), gpu_array([0], np.float64)
    good = device_arrays(x, f, e)
    for field, value, match in (
        ("n_rows", 3, "arrays of 3 rows do not fit"), ("positions", None, "the positions of 4 atoms are needed"),
        ("positions", x.ctypes.data + 2, "aligned to the size of their numbers"),
        ("length_unit", 0.0, "length_unit and energy_unit must be positive"),
        ("forces", np.zeros(64).ctypes.data // 16 * 16, "forces must be in the memory of cuda:0"),
        ("atoms", np.array([0, 1, 2, 2]), "row 2 is listed twice"), ("atoms", np.array([0, 1, 2, 4]), r"atoms\[3\] is 4"),
        ("box", gpu_array(np.ones((3, 3)), np.float32), "cell is singular"),
    ):  # fmt: skip
        arrays = DeviceArrays.from_buffer_copy(good)
        setattr(arrays, field, value.ctypes.data if isinstance(value, np.ndarray) else value)
        with pytest.raises(MLFFInputError, match=match):
            system.compute_device(arrays)
    x[2] = np.nan
    with pytest.raises(MLFFInputError, match="the position of atom 2 is not finite"):
        system.compute_device(good)
    with pytest.raises(MLFFInputError, match="compute_device needs a system on a GPU"):
        System(model).compute_device(good)


# ---- devices ----------------------------------------------------------------------------------------------------------


def test_devices(parts, fake, monkeypatch):
    model = Model(packed(parts))
    assert device_count() == 1 and device_count("cpu") == 1
    model.check_device("cuda:0"), model.check_device("cpu")
    with pytest.raises(MLFFInputError, match='kinds of devices are "cpu" and "cuda"'):
        device_count("tpu")
    for device in ("cuda:1", "cuda:9999"):
        with pytest.raises(MLFFResourceError, match=f'no device "{device}"; this machine has 1 GPU, numbered from 0'):
            System(model, device=device)
    for device in ("cuda:", "cuda:x", "cuda:-1", "gpu", ""):
        with pytest.raises(MLFFResourceError, match=f'there is no device "{device}"; this build of mlff computes on'):
            model.check_device(device)
    monkeypatch.setenv("FAKE_CUDA_ARCH", "75")
    with pytest.raises(MLFFResourceError, match=r"\(Fake GPU\) is sm_75; model in memory has code for ptx, sm_80, sm_86, sm_90"):
        model.check_device("cuda")
    with pytest.raises(MLFFInternalError, match="self-check"):
        monkeypatch.setenv("FAKE_CUDA_ARCH", "90")
        model.self_check("cuda")  # the stand-in is another model than the file's


@pytest.mark.parametrize("arch, kind", [(86, "cubins"), (89, "cubins"), (90, "cubins"), (100, "ptx"), (120, "ptx")])
def test_machine_code_that_fits(parts, fake, monkeypatch, arch, kind):
    monkeypatch.setenv("FAKE_CUDA_ARCH", str(arch))
    system = System(Model(packed(parts)), device="cuda")
    system.set_atoms([1])
    system.compute(np.zeros((1, 3)))
    assert fake(kind) > 0 and fake("cubins") + fake("ptx") == fake(kind)


def test_file_without_kernels(parts, fake, tmp_path):
    path = tmp_path / "old.mlff"
    path.write_bytes(payload.pack(*parts))
    with pytest.raises(MLFFResourceError, match=f"{path} has no kernels for GPUs; export it again with this mlff"):
        System(Model(path), device="cuda")
    System(Model(path))
    system = System(Model(packed(parts, lambda plan: plan.pop("import"))), device="cuda")
    system.set_atoms([1])
    with pytest.raises(MLFFResourceError, match="has no kernels for arrays on the GPU; export it again with this mlff"):
        system.compute_device(DeviceArrays())


def test_unknown_entry_point(parts, fake):
    def rename(plan):
        plan["kernels"]["other"] = plan["kernels"].pop("total")
        for schedule in plan["schedules"]:
            schedule["stages"][-1]["kernel"] = "other"

    codes = {k.replace("total", "other"): v for k, v in parts[1].items() if k.startswith("cuda.") and k.endswith(".total")}
    system = System(Model(packed(parts, rename, **codes)), device="cuda")
    system.set_atoms([1])
    with pytest.raises(MLFFInternalError, match="CUDA: cuModuleGetFunction: named symbol not found"):
        system.compute(np.zeros((1, 3)))


def test_no_driver(parts, fresh_core):
    model = Model(packed(parts))
    assert device_count() == 0
    for call in (lambda: System(model, device="cuda"), lambda: model.check_device("cuda:3"), lambda: model.self_check("cuda")):
        with pytest.raises(MLFFResourceError, match=r'no NVIDIA driver \(.*none.so\) on this machine; use the device "cpu"'):
            call()


@pytest.mark.parametrize(
    "name, value, match",
    [("FAKE_CUDA_COUNT", "0", "the NVIDIA driver finds no GPU"),
     ("FAKE_CUDA_VERSION", "11080", "the NVIDIA driver is for CUDA 11.8, mlff needs one for CUDA 12.0 or newer")],
)  # fmt: skip
def test_unusable_driver(parts, fake, monkeypatch, name, value, match):
    monkeypatch.setenv(name, value)
    model = Model(packed(parts))
    assert device_count() == 0
    with pytest.raises(MLFFResourceError, match=match):
        System(model, device="cuda")


def test_foreign_library_as_driver(parts, fake, monkeypatch, tmp_path):
    (tmp_path / "empty.cpp").write_text("")
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "empty.cpp", "-o", tmp_path / "empty.so"], check=True)
    monkeypatch.setenv("MLFF_CUDA_DRIVER", str(tmp_path / "empty.so"))
    with pytest.raises(MLFFResourceError, match="has no function cuInit; update the driver"):
        System(Model(packed(parts)), device="cuda")
