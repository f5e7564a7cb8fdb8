"""The CUDA backend with arrays of the host, on the stand-in for a GPU (fake_gpu.py)."""

import copy
import subprocess

import numpy as np
import pytest
from fake_gpu import CUTOFF, assert_close, atoms_of, expected
from fake_plan import packed

from mlff import payload
from mlff.core import (
    RESULTS, DeviceArrays, MLFFExchangeError, MLFFFileError, MLFFInputError, MLFFInternalError, MLFFResourceError, Model, System,
    device_count,
)  # fmt: skip
from mlff.neighbors import find_neighbors


@pytest.fixture
def model(parts, fake):
    return Model(packed(parts))


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


def test_numbers_too_large_for_the_kernels_of_few_atoms(model, fake, monkeypatch):
    """The kernels for many atoms take over, until there are other atoms; what they cannot evaluate either is an error."""
    numbers, positions = atoms_of(20, 8.0)
    system = System(model, device="cuda")
    system.set_atoms(numbers)
    monkeypatch.setenv("FAKE_CUDA_TOO_LARGE", "1")
    assert_close(system.compute(positions), expected(numbers, positions))
    launches = fake("launches")
    assert_close(system.compute(positions), expected(numbers, positions))
    again = fake("launches") - launches
    monkeypatch.delenv("FAKE_CUDA_TOO_LARGE")
    system.set_atoms(numbers)
    system.compute(positions)
    launches = fake("launches")
    assert_close(system.compute(positions), expected(numbers, positions))
    assert again == fake("launches") - launches > 0  # one evaluation, not two
    monkeypatch.setenv("FAKE_CUDA_TOO_LARGE", "2")
    system.set_atoms(numbers)
    with pytest.raises(MLFFInputError, match="the energy of atom [0-9]+, or the force on it, is not finite"):
        system.compute(positions)


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
