"""The TorchScript module of a model file: operator and portable forward against the reference, saving, freezing, errors."""

import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from machine_code import architectures
from reference import SCHNETPACK, random_model, reference
from structures import STRUCTURES, ethanol, small_cell, structure, triclinic, water_box

from mlff import core, payload, torchscript
from mlff.export import build_payload
from mlff.portable import find_pairs
from mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # TorchForce takes nothing else

FORCE_UNIT = KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM
# OpenMM knows three periodic directions or none
CASES = [name for name in STRUCTURES if name not in ("slab", "wire")]


@pytest.fixture(scope="module")
def model():
    return random_model(32, 3)


@pytest.fixture(scope="module")
def data(model) -> bytes:
    return build_payload(model, {"teacher": "random weights, for tests"})


@pytest.fixture(params=[False, True], ids=["operator", "portable"])
def portable(request) -> bool:
    return request.param


def inputs(atoms, dtype=torch.float64):
    box = torch.tensor(atoms.cell.array / ANGSTROM_PER_NM, dtype=dtype) if atoms.pbc.all() else None
    return torch.tensor(atoms.positions / ANGSTROM_PER_NM, dtype=dtype), box


def results(script, atoms):
    """Energy in eV and forces in eV/Angstrom."""
    energy, forces = script(*inputs(atoms))
    return float(energy) / KJ_PER_MOL_PER_EV, forces.numpy() / FORCE_UNIT


def assert_as_reference(model, script, atoms):
    expected = reference(model, atoms)
    energy, forces = results(script, atoms)
    assert abs(energy - expected.energy) < 1e-6 * len(atoms)
    np.testing.assert_allclose(forces, expected.forces, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(model, data, name, portable):
    atoms = structure(name)
    assert_as_reference(model, torchscript.module(data, atoms.numbers, portable=portable), atoms)


@pytest.mark.parametrize("layers", [1, 2])
def test_any_number_of_layers(layers, portable):
    model, atoms = random_model(16, layers), triclinic()
    assert_as_reference(model, torchscript.module(build_payload(model), atoms.numbers, portable=portable), atoms)


@pytest.mark.parametrize("settings", [SCHNETPACK, {"cutoff_function": "cosine"}], ids=["schnetpack", "cosine"])
def test_other_settings(settings, portable, tmp_path):
    model, atoms = random_model(16, 2, **settings), triclinic()
    torchscript.save(build_payload(model), tmp_path / "model.pt", atoms.numbers, portable=portable)
    assert_as_reference(model, torch.jit.freeze(torch.jit.load(str(tmp_path / "model.pt")).eval()), atoms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_layout(data, dtype, portable):
    atoms = triclinic()
    positions, box = inputs(atoms, dtype)
    script = torchscript.module(data, atoms.numbers, portable=portable)
    energy, forces = script(positions.requires_grad_(True), box)
    assert (energy.dtype, energy.shape) == (torch.float64, ())
    assert (forces.dtype, forces.shape, forces.is_contiguous()) == (dtype, positions.shape, True)
    assert not energy.requires_grad and not forces.requires_grad
    strided = positions.detach().t().contiguous().t()
    torch.testing.assert_close(script(strided, box)[1], forces)
    expected_energy, expected_forces = script(*inputs(atoms))
    tolerance = 1e-5 if dtype == torch.float32 else 0.0  # positions rounded to float32
    assert abs(float(energy - expected_energy)) < tolerance * FORCE_UNIT + 1e-6
    torch.testing.assert_close(forces.double(), expected_forces, atol=10 * tolerance * FORCE_UNIT + 1e-6, rtol=0)


def test_subset(model, data, portable):
    """Atoms outside the indices feel nothing and may be of any element; the order of the indices does not matter."""
    atoms = ethanol()
    n = len(atoms)
    where = np.random.default_rng(0).permutation(n + 4)[:n]
    whole_numbers, whole_positions = np.full(n + 4, 79), np.random.default_rng(1).normal(size=(n + 4, 3))
    whole_numbers[where], whole_positions[where] = atoms.numbers, atoms.positions
    script = torchscript.module(data, whole_numbers, where, portable)
    energy, forces = script(torch.tensor(whole_positions / ANGSTROM_PER_NM))
    expected = reference(model, atoms)
    assert abs(float(energy) / KJ_PER_MOL_PER_EV - expected.energy) < 1e-6 * n
    np.testing.assert_allclose(forces.numpy()[where] / FORCE_UNIT, expected.forces, atol=1e-5)
    assert np.all(np.delete(forces.numpy(), where, axis=0) == 0.0)


def test_empty_subset(data, portable):
    energy, forces = torchscript.module(data, [8, 1], [], portable)(torch.zeros(2, 3))
    assert float(energy) == 0.0 and torch.equal(forces, torch.zeros(2, 3))


@pytest.mark.parametrize("again", ["saved", "frozen", "frozen and saved"])
def test_saving_and_freezing(model, data, tmp_path, portable, again):
    """What TorchForce and users do to a module keeps results, and the payload, stored as it is, in the file."""
    atoms, path = small_cell(), tmp_path / "model.pt"
    torchscript.save(data, path, atoms.numbers, portable=portable)
    assert not list(tmp_path.glob("*.tmp"))
    script = torch.jit.load(str(path))
    if again != "saved":
        script = torch.jit.freeze(script.eval())
    if again == "frozen and saved":
        path = tmp_path / "again.pt"
        torch.jit.save(script, str(path))
        script = torch.jit.load(str(path))
    assert payload.find(path) == data
    assert path.read_bytes().count(payload.MAGIC) == 1
    assert core.Model(path).sha256 == payload.unpack(data)[0]["sha256"]
    assert all(e.compress_type == zipfile.ZIP_STORED for e in zipfile.ZipFile(path).infolist() if e.file_size >= len(data))
    for _ in range(3):  # TorchScript changes its code after the first calls
        assert_as_reference(model, script, atoms)


def test_payload_stays_on_the_host(data, portable):
    """A GPU platform moves the module: weights of a portable one must follow, the payload must not."""
    script = torchscript.module(data, [8, 1, 1], portable=portable).to("meta")
    assert script.payload.device.type == "cpu"
    assert {b.device.type for b in script.buffers()} == ({"meta"} if portable else set())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ethanol", "triclinic", "small_cell"])
def test_portable_on_a_gpu(model, data, name):
    atoms = structure(name)
    positions, box = (None if t is None else t.to("cuda") for t in inputs(atoms))
    script = torch.jit.freeze(torchscript.module(data, atoms.numbers, portable=True).to("cuda").eval())
    for _ in range(4):  # TorchScript changes its code after the first calls
        energy, forces = script(positions, box)
    expected = reference(model, atoms)
    assert abs(float(energy) / KJ_PER_MOL_PER_EV - expected.energy) < 1e-6 * len(atoms)
    np.testing.assert_allclose(forces.cpu().numpy() / FORCE_UNIT, expected.forces, atol=1e-5)


def test_in_a_new_process(data, tmp_path):
    """As a user of torch alone: the library, the file, nothing of mlff."""
    from mlff.core import library_path

    atoms = ethanol()
    torchscript.save(data, tmp_path / "model.pt", atoms.numbers)
    torch.save(inputs(atoms)[0], tmp_path / "positions.pt")
    code = (
        f"import sys, torch; torch.ops.load_library({str(library_path('libmlff_torch.so'))!r}); "
        "e, f = torch.jit.load('model.pt')(torch.load('positions.pt')); assert 'mlff' not in sys.modules; print(float(e))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    energy = float(torchscript.module(data, atoms.numbers)(*inputs(atoms))[0])
    assert abs(float(run.stdout) - energy) < 1e-7 * KJ_PER_MOL_PER_EV * len(atoms)  # another number of threads


def test_portable_needs_no_operator(data, tmp_path):
    atoms = ethanol()
    torchscript.save(data, tmp_path / "model.pt", atoms.numbers, portable=True)
    torch.save(inputs(atoms)[0], tmp_path / "positions.pt")
    code = "import torch; print(float(torch.jit.load('model.pt')(torch.load('positions.pt'))[0]))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    energy = float(torchscript.module(data, atoms.numbers)(*inputs(atoms))[0])
    assert abs(float(run.stdout) - energy) < 1e-6 * KJ_PER_MOL_PER_EV * len(atoms)


def in_threads(work, n):
    """work(0) to work(n - 1) at the same time; raises what the first of them raised."""
    with ThreadPoolExecutor(n) as pool:
        for future in [pool.submit(work, k) for k in range(n)]:
            future.result(timeout=120)


def test_many_threads_at_once(model, data):
    """Concurrent calls of one module, and of modules that share a model, do not disturb each other."""
    cases = [ethanol(), triclinic(), small_cell()]
    scripts = [torchscript.module(data, a.numbers) for a in cases]
    expected = [results(s, a) for s, a in zip(scripts, cases)]

    def work(seed):
        for k in np.random.default_rng(seed).integers(0, len(cases), 30):
            energy, forces = results(scripts[k], cases[k])
            assert abs(energy - expected[k][0]) <= 1e-6 and np.allclose(forces, expected[k][1], atol=1e-6)

    in_threads(work, 4)


def test_systems_are_told_apart(model, data):
    """More modules of the same atoms than are given a system each, and other atoms in tensors that lie where earlier ones did."""
    atoms = water_box(2)
    for _ in range(3):
        scripts = [torchscript.module(data, atoms.numbers) for _ in range(7)]
        shaken = [atoms.copy() for _ in scripts]
        for k, one in enumerate(shaken):
            one.rattle(0.05, seed=k)
        for script, one in [*zip(scripts, shaken)] * 2:
            assert_as_reference(model, script, one)
    numbers = torch.tensor(atoms.numbers, dtype=torch.int64)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    positions, box = inputs(atoms)
    for value in (8, 6, 1):
        numbers[0] = atoms.numbers[0] = value
        energy = float(torch.ops.mlff.energy_forces(tensor, numbers, None, positions, box)[0]) / KJ_PER_MOL_PER_EV
        assert abs(energy - reference(model, atoms).energy) < 1e-6 * len(atoms)


def test_models_do_not_mix(data):
    """More models than are cached, alternating."""
    atoms = ethanol()
    models = [random_model(16, 1, seed=seed) for seed in range(10)]
    scripts = [torchscript.module(build_payload(m), atoms.numbers) for m in models]
    for _ in range(2):
        for m, script in zip(models, scripts):
            assert_as_reference(m, script, atoms)


def test_search_in_blocks():
    """The blocks of the portable search do not show in its result."""
    atoms = water_box(3)
    x, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    whole, blocks = find_pairs(x, 5.0, cell), find_pairs(x, 5.0, cell, pairs_per_block=1000)
    rows = [torch.cat([edges.t().double(), r], dim=1).numpy() for edges, r in (whole, blocks)]
    np.testing.assert_array_equal(*(a[np.lexsort(a.T)] for a in rows))


def test_self_check(data, portable):
    energy, force = torchscript.self_check(data, portable)
    assert energy < 1e-6 and force < 5e-5


def test_self_check_notices_wrong_numbers(data, portable):
    header, tensors = payload.unpack(data)
    del header["sha256"]
    wrong = payload.pack(header, {**tensors, "reference.1.forces": tensors["reference.1.forces"] + 1e-3})
    with pytest.raises(RuntimeError, match="self-check failed.*forces by 1"):
        torchscript.self_check(wrong, portable)


# ---- bad input -------------------------------------------------------------------------------------------------------


def fails(script, *args) -> str:
    """The line of the error that a user reads, which is the last one of TorchScript's."""
    with pytest.raises(Exception) as error:
        script(*args)
    return str(error.value).strip().splitlines()[-1]


def test_without_elements(data, tmp_path, portable):
    torchscript.save(data, tmp_path / "model.pt", portable=portable)
    assert payload.find(tmp_path / "model.pt") == data
    message = fails(torch.jit.load(str(tmp_path / "model.pt")), torch.zeros(3, 3))
    assert "no elements baked in" in message and "mlff-export --structure FILE" in message and "create_force" in message


def test_other_number_of_atoms(data, portable):
    message = fails(torchscript.module(data, [8, 1, 1], portable=portable), torch.rand(4, 3))
    assert "has 4 atoms" in message and "written for 3" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_positions_that_are_not_finite(data, portable, bad):
    script = torchscript.module(data, [8, 1, 1], portable=portable)
    positions = torch.tensor([[0, 0, 0], [0.1, 0, 0], [0, bad, 0]], dtype=torch.float64)
    assert "finite" in fails(script, positions) or "NaN" in fails(script, positions)
    energy, _ = script(positions.nan_to_num(0.1, 0.1))  # and goes on with good input
    assert np.isfinite(float(energy))


@pytest.mark.parametrize(
    "box, words", [(np.diag([1.0, 1.0, 0.02]), "smallest height"), (np.ones((3, 3)), ""), (np.full((3, 3), np.nan), "finite")]
)
def test_bad_boxes(data, portable, box, words):
    message = fails(torchscript.module(data, [8, 1, 1], portable=portable), torch.rand(3, 3).double(), torch.tensor(box))
    assert "mlff" in message and words in message


def test_atoms_at_the_same_place(data, portable):
    assert "mlff" in fails(torchscript.module(data, [8, 1, 1], portable=portable), torch.zeros(3, 3))


def test_shapes(data, portable):
    script = torchscript.module(data, [8, 1, 1], portable=portable)
    assert "[n, 3]" in fails(script, torch.rand(9))
    assert "[n, 3]" in fails(script, torch.rand(3, 2))


def test_operator_on_other_tensors(data):
    op, positions = torch.ops.mlff.energy_forces, torch.rand(3, 3)
    tensor, numbers = torch.frombuffer(bytearray(data), dtype=torch.uint8), torch.tensor([8, 1, 1])
    assert "not finite" not in str(op(tensor, numbers, None, positions, None)[0])
    assert "on the CPU or on a GPU" in fails(op, tensor, numbers, None, positions.to("meta"), None)
    assert "on the CPU or on a GPU" in fails(op, tensor, numbers, None, positions, torch.eye(3, device="meta"))
    assert "float32 or float64" in fails(op, tensor, numbers, None, positions, torch.eye(3, dtype=torch.int64))
    assert "float32 or float64" in fails(op, tensor, numbers, None, positions.half(), None)
    assert "int64" in fails(op, tensor, numbers.int(), None, positions, None)
    assert "listed twice" in fails(op, tensor, numbers, torch.tensor([1, 1]), positions, None)
    assert "outside the system" in fails(op, tensor, numbers, torch.tensor([3]), positions, None)
    assert "atomic number 79" in fails(op, tensor, torch.tensor([8, 1, 79]), None, positions, None)
    assert "uint8" in fails(op, tensor.float(), numbers, None, positions, None)
    assert "mlff" in fails(op, tensor[:40], numbers, None, positions, None)
    damaged = tensor.clone()
    damaged[-1000] ^= 1
    damaged[50] ^= 1  # another hash, so that the model in memory is not taken for it
    assert "mlff" in fails(op, damaged, numbers, None, positions, None)


@pytest.mark.parametrize(
    "numbers, indices, words",
    [
        ([8, 1, 26], None, "atom 2 is Fe"),
        ([8, 1, 0], None, "atom 2 is atomic number 0"),
        ([8, 1, 1], [0, 3], "within 0 .. 2"),
        ([8, 1, 1], [-1], "within 0 .. 2"),
        ([8, 1, 1], [1, 1], "twice"),
        (None, [0], "need the atomic_numbers"),
    ],
)
def test_what_cannot_be_saved(data, tmp_path, numbers, indices, words):
    path = tmp_path / "model.pt"
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=words):
        torchscript.save(data, path, numbers, indices)
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


def test_damaged_payload(data, tmp_path):
    with pytest.raises(payload.PayloadError, match="damaged"):
        torchscript.save(data[:-1] + b"\x01", tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


# ---- on a GPU ----------------------------------------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(scope="module")
def gpu_data(model) -> bytes:
    return build_payload(model, {"teacher": "random weights, for tests"}, architectures())


def gpu_inputs(atoms, dtype=torch.float64):
    return tuple(None if t is None else t.to("cuda") for t in inputs(atoms, dtype))


def as_given(atoms, dtype):
    """The structure whose numbers are those that a tensor of that dtype holds."""
    positions, box = inputs(atoms, dtype)
    atoms = atoms.copy()
    atoms.positions = positions.double().numpy() * ANGSTROM_PER_NM
    if box is not None:
        atoms.cell = box.double().numpy() * ANGSTROM_PER_NM
    return atoms


def assert_close(model, energy, forces, atoms):
    """Tensors on the GPU against the reference."""
    expected = reference(model, atoms)
    assert abs(float(energy) / KJ_PER_MOL_PER_EV - expected.energy) < 1e-6 * len(atoms)
    rounding = 1e-7 if forces.dtype == torch.float32 else 0.0  # of forces that are given in float32
    np.testing.assert_allclose(forces.double().cpu().numpy() / FORCE_UNIT, expected.forces, atol=1e-5, rtol=rounding)


def captured(script, *tensors):
    """A graph of a call and its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # TorchScript changes its code after the first calls
            script(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        energy, forces = script(*tensors)
    return graph, energy, forces


@pytest.mark.gpu
class TestOnAGPU:
    """More is in test_torchscript_cuda.py."""

    @pytest.mark.parametrize("layers", [1, 2])
    def test_any_number_of_layers(self, layers):
        model, atoms = random_model(16, layers), triclinic()
        script = torchscript.module(build_payload(model, {}, architectures()), atoms.numbers)
        assert_close(model, *script(*gpu_inputs(atoms)), atoms)

    @DTYPES
    def test_subset(self, model, gpu_data, dtype):
        atoms = as_given(ethanol(), dtype)
        n = len(atoms)
        where = np.random.default_rng(0).permutation(n + 4)[:n]
        numbers, positions = np.full(n + 4, 79), np.random.default_rng(1).normal(size=(n + 4, 3))
        numbers[where], positions[where] = atoms.numbers, atoms.positions / ANGSTROM_PER_NM
        script, x = torchscript.module(gpu_data, numbers, where), torch.tensor(positions, dtype=dtype, device="cuda")
        graph, *later = captured(script, x)
        graph.replay()
        for energy, forces in (script(x), later):
            assert_close(model, energy, forces[torch.tensor(where)], atoms)
            assert np.all(np.delete(forces.cpu().numpy(), where, axis=0) == 0.0)

    def test_lists_are_made_again(self, model, gpu_data):
        """A system too large to look at all pairs. Each molecule goes where another was, which the old list knows nothing of."""
        atoms = water_box(8)
        script = torchscript.module(gpu_data, atoms.numbers)
        positions, box = gpu_inputs(atoms)
        first = script(positions, box)
        assert_close(model, *first, atoms)
        good = positions.clone()
        graph, energy, forces = captured(script, positions, box)
        for k in (0, 1, 7, 500):
            positions.copy_(good.roll(3 * k, 0))
            graph.replay()
            for e, f in ((energy, forces), script(positions, box)):
                assert abs(float(e - first[0])) < 1e-6 * len(atoms) * KJ_PER_MOL_PER_EV
                torch.testing.assert_close(f, first[1].roll(3 * k, 0), atol=2e-5 * FORCE_UNIT, rtol=0)

    def test_in_turns(self, model, gpu_data):
        """Modules of other atoms and of the same ones, in two streams, alive at the same time."""
        cases = [ethanol(), triclinic(), ethanol(), water_box(3), triclinic()]
        for k, atoms in enumerate(cases):
            atoms.rattle(0.02, seed=k)
        scripts = [torchscript.module(gpu_data, a.numbers) for a in cases]
        given = [gpu_inputs(a) for a in cases]
        streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        for round in range(3):
            for k, (script, atoms, tensors) in enumerate(zip(scripts, cases, given)):
                with torch.cuda.stream(streams[(round + k) % 2]):
                    assert_close(model, *script(*tensors), atoms)
        graphs = [captured(script, *tensors) for script, tensors in zip(scripts, given)]
        for _ in range(2):
            for (graph, energy, forces), atoms in zip(graphs, cases):
                graph.replay()
                assert_close(model, energy, forces, atoms)
