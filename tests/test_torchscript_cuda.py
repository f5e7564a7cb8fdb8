"""The operator on a GPU: against the reference, in every dtype and stream, captured into graphs, and its errors."""

import numpy as np
import pytest
import torch
from machine_code import architectures
from reference import ROUNDING, random_model, reference
from structures import STRUCTURES, dense_cluster, ethanol, structure, triclinic, water_box
from test_torchscript import CASES, FORCE_UNIT, fails, in_threads

from mlff import torchscript
from mlff.export import build_payload
from mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]


@pytest.fixture(scope="module")
def model():
    return random_model(32, 3)


@pytest.fixture(scope="module")
def data(model) -> bytes:
    return build_payload(model, {"teacher": "random weights, for tests"}, architectures())


def inputs(atoms, dtype=torch.float64):
    box = torch.tensor(atoms.cell.array / ANGSTROM_PER_NM, dtype=dtype, device="cuda") if atoms.pbc.all() else None
    return torch.tensor(atoms.positions / ANGSTROM_PER_NM, dtype=dtype, device="cuda"), box


def assert_close(model, atoms, energy, forces, tolerance=1e-5):
    expected = reference(model, atoms)
    assert abs(float(energy) / KJ_PER_MOL_PER_EV - expected.energy) < 0.1 * tolerance * len(atoms)
    tolerance += ROUNDING * np.abs(expected.forces).max()
    np.testing.assert_allclose(forces.cpu().numpy() / FORCE_UNIT, expected.forces, rtol=0, atol=tolerance)


def moved(atoms, seed):
    other = atoms.copy()
    other.rattle(0.03, seed=seed)
    return other


@pytest.mark.parametrize("name", [*CASES, "large box"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(model, data, name, dtype):
    """Both searches: the large box has more atoms than the dense one takes."""
    atoms = water_box(8) if name == "large box" else structure(name)
    positions, box = inputs(atoms, dtype)
    script = torchscript.module(data, atoms.numbers)
    exact = atoms.copy()  # what float32 left of the positions
    exact.positions = positions.double().cpu().numpy() * ANGSTROM_PER_NM
    if box is not None:
        exact.set_cell(box.double().cpu().numpy() * ANGSTROM_PER_NM)
    energy, forces = script(positions.requires_grad_(True), box)
    assert (energy.dtype, energy.shape, energy.device) == (torch.float64, (), positions.device)
    assert (forces.dtype, forces.shape, forces.device) == (dtype, positions.shape, positions.device)
    assert forces.is_contiguous() and not energy.requires_grad and not forces.requires_grad
    assert_close(model, exact, energy, forces)
    for _ in range(3):  # TorchScript changes its code after the first calls
        again = script(positions, box)
    assert torch.equal(again[1], forces) and torch.equal(again[0], energy)


def test_layout_and_boxes(data):
    """Positions that are not contiguous; a box on the CPU and of the other dtype."""
    atoms = triclinic()
    positions, box = inputs(atoms)
    script = torchscript.module(data, atoms.numbers)
    energy, forces = script(positions, box)
    for x, b in ((positions.t().contiguous().t(), box), (positions, box.cpu()), (positions, box.t().contiguous().t())):
        again = script(x, b)
        torch.testing.assert_close(again[1], forces, rtol=0, atol=1e-6 * FORCE_UNIT)
    narrow = script(positions.float(), box)
    torch.testing.assert_close(narrow[1].double(), forces, rtol=0, atol=1e-3 * FORCE_UNIT)
    assert narrow[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subset(model, data, dtype):
    atoms = ethanol()
    n = len(atoms)
    where = np.random.default_rng(0).permutation(n + 4)[:n]
    numbers, positions = np.full(n + 4, 79), np.random.default_rng(1).normal(size=(n + 4, 3))
    numbers[where], positions[where] = atoms.numbers, atoms.positions
    script = torchscript.module(data, numbers, where)
    for _ in range(3):
        garbage = torch.full((n + 4, 3), 1e30, dtype=dtype, device="cuda")
        del garbage  # memory that new tensors may get
        energy, forces = script(torch.tensor(positions / ANGSTROM_PER_NM, dtype=dtype, device="cuda"))
        assert_close(model, atoms, energy, forces[where], 1e-5 if dtype == torch.float64 else 1e-3)
        rest = np.delete(forces.cpu().numpy(), where, axis=0)
        assert np.all(rest == 0.0)


def test_empty_subset(data):
    energy, forces = torchscript.module(data, [8, 1], [])(torch.zeros(2, 3, device="cuda"))
    assert float(energy) == 0.0 and not forces.any()


def test_frozen_on_the_gpu(model, data, tmp_path):
    """As OpenMM-Torch treats a module."""
    atoms = triclinic()
    torchscript.save(data, tmp_path / "model.pt", atoms.numbers)
    script = torch.jit.load(str(tmp_path / "model.pt")).to("cuda")
    script = torch.jit.freeze(script.eval())
    for _ in range(3):
        assert_close(model, atoms, *script(*inputs(atoms)))


def test_streams(model, data):
    """Inputs are made in the stream that the operator is called in, and results are used there at once."""
    atoms = water_box(3)
    script = torchscript.module(data, atoms.numbers)
    for seed in range(4):
        other = moved(atoms, seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            positions, box = inputs(other)
            torch.cuda._sleep(1_000_000)
            energy, forces = script(positions * 1.0, box)
            energy, forces = energy + 0.0, forces + 0.0
        torch.cuda.synchronize()
        assert_close(model, other, energy, forces)


def test_current_device_is_left_alone(data):
    before = torch.cuda.current_device()
    torchscript.module(data, [8, 1, 1])(torch.rand(3, 3, device="cuda"))
    assert torch.cuda.current_device() == before
    torch.ones(3, device="cuda").sum().item()


def capture(script, positions, box, warm=3):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            script(positions, box)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = script(positions, box)
    return graph, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["ethanol", "triclinic", "large box"])
def test_capture(model, data, name, dtype):
    """A captured evaluation follows positions and box, and lives on whatever else the operator is used for."""
    atoms = water_box(8) if name == "large box" else structure(name)
    positions, box = inputs(atoms, dtype)
    graph, (energy, forces) = capture(torchscript.module(data, atoms.numbers), positions, box)
    tolerance = 1e-5 if dtype == torch.float64 else 2e-3
    others = [torchscript.module(data, atoms.numbers[: 4 + k]) for k in range(20)]  # more than are kept idle
    for seed in range(4):
        other = moved(atoms, seed)
        if box is not None:
            other.set_cell(other.cell.array * 1.01**seed, scale_atoms=True)
            box.copy_(inputs(other, dtype)[1])
        positions.copy_(inputs(other, dtype)[0])
        graph.replay()
        assert_close(model, other, energy, forces, tolerance)
        for script in others:
            script(torch.rand(len(script.atomic_numbers), 3, device="cuda", dtype=torch.float64) * 2)
        eager = torchscript.module(data, atoms.numbers)(*inputs(other, dtype))
        assert_close(model, other, *eager, tolerance)
    positions[0] = float("nan")
    graph.replay()
    assert torch.isnan(energy) and torch.isnan(forces).all()
    positions.copy_(inputs(atoms, dtype)[0])
    if box is not None:
        box.copy_(inputs(atoms, dtype)[1])
    graph.replay()
    assert_close(model, atoms, energy, forces, tolerance)


def test_two_captures_of_one_module(model, data):
    """As OpenMM-Torch captures with and without forces: the second warms up after the first was captured."""
    atoms = triclinic()
    positions, box = inputs(atoms)
    script = torchscript.module(data, atoms.numbers)
    graphs = [capture(script, positions, box) for _ in range(2)]
    for seed in range(3):
        other = moved(atoms, seed)
        positions.copy_(inputs(other)[0])
        for graph, results in graphs:
            graph.replay()
            assert_close(model, other, *results)


def test_captures_of_two_simulations_of_one_composition(model, data):
    atoms = triclinic()
    tensors = [inputs(atoms) for _ in range(2)]
    scripts = [torchscript.module(data, atoms.numbers) for _ in tensors]
    graphs = [capture(script, *x) for script, x in zip(scripts, tensors)]
    for seed in range(3):
        others = [moved(atoms, 2 * seed + k) for k in range(2)]
        for (graph, _), (positions, _), other in zip(graphs, tensors, others):
            positions.copy_(inputs(other)[0])
            graph.replay()
        for (_, results), other in zip(graphs, others):
            assert_close(model, other, *results)


def test_capture_without_an_evaluation_before(data):
    """An error, and torch goes on."""
    atoms = dense_cluster()
    positions, _ = inputs(atoms)
    script = torchscript.module(data, atoms.numbers)
    torch.cuda.synchronize()
    with pytest.raises(Exception) as error:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            script(positions)
    assert "call once before capturing" in str(error.value) or "call once before capturing" in str(error.value.__context__)
    energy, _ = script(positions)
    assert torch.isfinite(energy)


def test_several_threads(model, data):
    cases = [ethanol(), triclinic(), water_box(3)]
    scripts = [torchscript.module(data, a.numbers) for a in cases]

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for k in np.random.default_rng(seed).integers(0, len(cases), 20):
                other = moved(cases[k], seed)
                assert_close(model, other, *scripts[k](*inputs(other)))

    in_threads(work, 3)


def test_one_simulation_on_the_cpu_and_on_the_gpu(model, data):
    atoms = triclinic()
    script = torchscript.module(data, atoms.numbers)
    for device in ("cuda", "cpu", "cuda"):
        positions, box = (t.to(device) for t in inputs(atoms))
        assert_close(model, atoms, *script(positions, box))


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_file_without_machine_code(model):
    message = fails(torchscript.module(build_payload(model), [8, 1, 1]), torch.rand(3, 3, device="cuda"))
    assert "has no kernels for GPUs" in message and "export it again" in message


@pytest.mark.parametrize("name", sorted(set(STRUCTURES) & {"ethanol", "triclinic"}))
def test_positions_that_are_not_finite(model, data, name):
    atoms = structure(name)
    script = torchscript.module(data, atoms.numbers)
    positions, box = inputs(atoms)
    bad = positions.clone()
    bad[2, 1] = float("nan")
    for _ in range(2):
        assert "the position of atom 2 is not finite" in fails(script, bad, box)
        assert_close(model, atoms, *script(positions, box))


def test_atoms_at_the_same_place(data):
    assert "are at the same place" in fails(torchscript.module(data, [8, 1, 1]), torch.zeros(3, 3, device="cuda"))


def test_boxes_and_tensors(data):
    script = torchscript.module(data, [8, 1, 1])
    positions = torch.rand(3, 3, dtype=torch.float64, device="cuda")
    assert "smallest height" in fails(script, positions, torch.diag(torch.tensor([1.0, 1.0, 0.02])).double().cuda())
    assert "float32 or float64" in fails(script, positions.half())
    assert "written for 3" in fails(script, torch.rand(4, 3, device="cuda"))
    assert "on the CPU, where the positions are" in fails(script, positions.cpu(), torch.eye(3).cuda())
    op, tensor = torch.ops.mlff.energy_forces, torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert "on the CPU" in fails(op, tensor, torch.tensor([8, 1, 1]).cuda(), None, positions, None)
    assert "on the CPU" in fails(op, tensor.cuda(), torch.tensor([8, 1, 1]), None, positions, None)
