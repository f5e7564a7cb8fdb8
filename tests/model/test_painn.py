"""The reference model as a whole: symmetries, analytic gradient, smoothness, checkpoints. All in float64."""

import copy
import json
from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest
import torch
from ase import Atoms
from reference import SCHNETPACK, Results, neighbors_of, random_model, reference
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation
from structures import STRUCTURES, structure

from mlff.painn import PaiNN, PaiNNConfig, energy_and_gradient, load_checkpoint, save_checkpoint

EXACT = 1e-10  # eV and eV/Angstrom
SMALL = ["ethanol", "water_dimer", "triclinic", "isolated_atom", "single_atom", "small_cell", "wire", "on_faces"]


def assert_close(a: Results, b: Results, tolerance=EXACT):
    """Energies per atom without their shifts (which are 2000 eV, so that 1e-10 would be their 14th digit), forces, virial."""
    np.testing.assert_allclose(a.energies, b.energies, atol=tolerance, rtol=1e-13)
    np.testing.assert_allclose(a.forces, b.forces, atol=tolerance, rtol=0)
    np.testing.assert_allclose(a.virial, b.virial, atol=10 * tolerance, rtol=0)


def autograd(model: PaiNN, atoms: Atoms) -> Results:
    """The same results through PaiNN.forward and autograd: no analytic gradient involved."""
    neighbors = neighbors_of(atoms, model.config.cutoff)
    x = torch.tensor(atoms.positions, requires_grad=True)
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    r = x[neighbors.edges[1]] + neighbors.shifts - x[neighbors.edges[0]]
    energies = copy.deepcopy(model).double()(torch.as_tensor(atoms.numbers), neighbors.edges, r + r @ (strain + strain.t()) / 2)
    g_x, g_strain = torch.autograd.grad(energies.sum(), (x, strain), allow_unused=True, materialize_grads=True)
    return Results(float(energies.sum().detach()), energies.detach().numpy(), -g_x.numpy(), -g_strain.numpy(), neighbors)


@pytest.mark.parametrize("name", STRUCTURES)
def test_analytic_gradient_is_autograd(model, name):
    atoms = structure(name)
    assert_close(reference(model, atoms), autograd(model, atoms))


@pytest.mark.parametrize("basis", ["bessel", "gaussian"])
@pytest.mark.parametrize("cutoff_function", ["polynomial", "cosine"])
def test_analytic_gradient_of_other_settings(basis, cutoff_function):
    model = random_model(16, 2, **{**SCHNETPACK, "radial_basis": basis, "cutoff_function": cutoff_function})
    for name in ("ethanol", "small_cell", "single_atom"):
        assert_close(reference(model, structure(name)), autograd(model, structure(name)))


def test_without_repulsion():
    """Nothing is left of it, and all else is as it was."""
    distant = Atoms("OH", positions=[[0, 0, 0], [1.5, 0, 0]])
    without, with_ = random_model(16, 2, repulsion=False), random_model(16, 2)
    assert_close(reference(without, distant), reference(with_, distant), 0)
    without.readout["w2"].zero_()
    without.readout["b2"].zero_()
    close = reference(without, Atoms("OH", positions=[[0, 0, 0], [0.2, 0, 0]]))
    np.testing.assert_array_equal(close.energies, without.shift[[2, 0]].numpy())
    assert not close.forces.any() and not close.virial.any()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
def test_rotation(model, name, reflect):
    atoms = structure(name)
    q = Rotation.random(random_state=3).as_matrix() * (-1 if reflect else 1)
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ q.T)
    turned.positions = atoms.positions @ q.T
    a, b = reference(model, atoms), reference(model, turned)
    assert_close(b, Results(a.energy, a.energies, a.forces @ q.T, q @ a.virial @ q.T, None))


@pytest.mark.parametrize("name", SMALL)
def test_translation(model, name):
    """A shift of all atoms, and of single atoms by cell vectors, changes nothing."""
    atoms = structure(name)
    moved = atoms.copy()
    moved.positions += [11.3, -7.9, 0.4]
    images = np.random.default_rng(0).integers(-2, 3, (len(atoms), 3)) * atoms.pbc
    moved.positions += images @ atoms.cell.array
    assert_close(reference(model, moved), reference(model, atoms))


@pytest.mark.parametrize("name", SMALL)
def test_permutation(model, name):
    atoms = structure(name)
    order = np.random.default_rng(0).permutation(len(atoms))
    a, b = reference(model, atoms), reference(model, atoms[order])
    assert_close(b, Results(a.energy, a.energies[order], a.forces[order], a.virial, None))


@pytest.mark.parametrize("name", SMALL)
def test_forces_are_finite_differences(model, name):
    atoms, h = structure(name), 5e-6
    # So small a step because third derivatives are large: 1e3 eV/A^3 where the repulsion begins, 1e4 eV/A^3 where the
    # vector features of an atom vanish by symmetry and their norm sqrt(|v|^2 + 1e-8) bends.
    forces = reference(model, atoms).forces
    for atom in range(min(3, len(atoms))):
        for axis in range(3):
            e = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[atom, axis] += sign * h
                e.append(reference(model, moved).energies)
            assert -(e[0] - e[1]).sum() / (2 * h) == pytest.approx(forces[atom, axis], abs=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_virial_is_the_strain_derivative(model, name):
    atoms, h = structure(name), 1e-5
    virial = reference(model, atoms).virial
    for a in range(3):
        for b in range(3):
            e = []
            for sign in (1, -1):
                strain = np.zeros((3, 3))
                strain[a, b] += sign * h / 2
                strain[b, a] += sign * h / 2
                strained = atoms.copy()
                strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=False)
                strained.positions = atoms.positions @ (np.eye(3) + strain)
                e.append(reference(model, strained).energies)
            assert -(e[0] - e[1]).sum() / (2 * h) == pytest.approx(virial[a, b], abs=2e-5)


def test_forces_and_torques_vanish_in_sum(model):
    atoms = structure("mixed_elements")
    forces = reference(model, atoms).forces
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-10)
    np.testing.assert_allclose(np.cross(atoms.positions, forces).sum(0), 0, atol=1e-9)


def test_smooth_through_the_cutoff(model):
    """Energy, force and its slope of a pair are continuous where the atoms part, and zero beyond. f''' jumps, so f ~ h^3."""
    rc, isolated = model.config.cutoff, 0.0

    def pair(d):
        result = reference(model, Atoms("OH", positions=[[0, 0, 0], [d, 0, 0]]))
        return result.energies.sum(), result.forces[1, 0]

    isolated, force = pair(rc + 1e-3)
    assert force == 0.0
    size = abs(pair(rc - 0.5)[1])
    for h in (1e-2, 1e-3):
        energy, force = pair(rc - h)
        assert abs(force) < 40 * size * (h / 0.5) ** 2
        assert abs(energy - isolated) < 40 * size * 0.5 * (h / 0.5) ** 3


def test_no_jump_along_a_path_through_the_cutoff(model):
    """Two water molecules drift apart while pairs leave the cutoff one by one: the energy follows the integral of the force."""
    atoms, step, work, energies = structure("water_dimer"), 0.01, 0.0, []
    forces = []
    for k in range(301):
        moved = atoms.copy()
        moved.positions[3:, 0] += k * step
        result = reference(model, moved)
        energies.append(result.energies.sum())
        forces.append(result.forces[3:, 0].sum())
    work = step / 3 * (np.array(forces)[0:-2:2] + 4 * np.array(forces)[1:-1:2] + np.array(forces)[2::2]).sum()  # Simpson
    assert energies[0] - energies[-1] == pytest.approx(work, abs=1e-5)
    assert abs(np.diff(forces)).max() < 0.2


def test_far_fragments_add(model):
    atoms = structure("far_fragments")
    near, far = atoms[:9], atoms[9:]
    both, a, b = reference(model, atoms), reference(model, near), reference(model, far)
    together = np.concatenate([a.energies, b.energies]), np.concatenate([a.forces, b.forces])
    assert_close(both, Results(a.energy + b.energy, *together, a.virial + b.virial, None))


def test_images_are_atoms(model):
    """A cell smaller than the cutoff, and the 3 x 3 x 3 supercell of it, have the same energy per atom and the same forces."""
    cell = structure("small_cell")
    one, many = reference(model, cell), reference(model, cell.repeat(3))
    np.testing.assert_allclose(many.energies, np.tile(one.energies, 27), rtol=1e-12)
    np.testing.assert_allclose(many.forces, np.tile(one.forces, (27, 1)), atol=1e-10)
    np.testing.assert_allclose(many.virial, 27 * one.virial, atol=1e-8)


def test_order_of_edges_does_not_matter(model):
    neighbors = neighbors_of(structure("ethanol"), model.config.cutoff)
    numbers, exact = torch.as_tensor(structure("ethanol").numbers), copy.deepcopy(model).double()
    order = torch.randperm(neighbors.edges.shape[1], generator=torch.Generator().manual_seed(0))
    e, g = energy_and_gradient(exact, numbers, neighbors.edges, neighbors.vectors)
    e2, g2 = energy_and_gradient(exact, numbers, neighbors.edges[:, order], neighbors.vectors[order])
    torch.testing.assert_close(e2, e, rtol=1e-13, atol=EXACT)
    torch.testing.assert_close(g2, g[order], rtol=0, atol=EXACT)


def test_edges_beyond_the_cutoff_contribute_nothing(model):
    atoms = structure("ethanol")
    near, wide = neighbors_of(atoms, model.config.cutoff), neighbors_of(atoms, 12.0)
    far = structure("isolated_atom")
    assert neighbors_of(far, 60.0).edges.shape[1] > neighbors_of(far, model.config.cutoff).edges.shape[1]
    exact = copy.deepcopy(model).double()
    for a, found in ((atoms, (near, wide)), (far, (neighbors_of(far, model.config.cutoff), neighbors_of(far, 60.0)))):
        e = [energy_and_gradient(exact, torch.as_tensor(a.numbers), n.edges, n.vectors)[0] for n in found]
        torch.testing.assert_close(e[1], e[0], rtol=1e-14, atol=1e-12)


def test_float32_is_close_to_float64(model):
    atoms = structure("triclinic")
    neighbors, expected = neighbors_of(atoms, model.config.cutoff), reference(model, atoms)
    energies, gradient = energy_and_gradient(model, torch.as_tensor(atoms.numbers), neighbors.edges, neighbors.vectors)
    assert energies.dtype == gradient.dtype == torch.float64
    np.testing.assert_allclose(energies.numpy(), expected.energies, atol=5e-6, rtol=0)


def test_no_atoms(model):
    energies, gradient = energy_and_gradient(
        model, torch.zeros(0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.float64)
    )
    assert energies.shape == (0,) and gradient.shape == (0, 3)


@pytest.mark.parametrize("settings", [{}, SCHNETPACK], ids=["default", "schnetpack"])
def test_force_loss_trains_every_weight(settings):
    """A loss on forces needs second derivatives: they reach every parameter and agree with finite differences."""
    model = random_model(16, 2, **settings).double().requires_grad_(True)
    atoms = structure("ethanol")
    neighbors, numbers = neighbors_of(atoms, model.config.cutoff), torch.as_tensor(structure("ethanol").numbers)

    def loss():
        x = torch.tensor(atoms.positions, requires_grad=True)
        r = x[neighbors.edges[1]] - x[neighbors.edges[0]]
        energies = model(numbers, neighbors.edges, r)
        (g,) = torch.autograd.grad(energies.sum(), x, create_graph=True)
        return (g**2).sum() + (energies - model.shift[model.species_index(numbers)]).sum() ** 2

    loss().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        entry = parameter.grad.abs().argmax().item()
        slope, h, flat = parameter.grad.view(-1)[entry].item(), 1e-5, parameter.data.view(-1)
        assert slope != 0.0, name
        values = []
        for sign in (1, -1):
            flat[entry] += sign * h
            values.append(loss().item())
            flat[entry] -= sign * h
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-4), name


def test_unknown_element(model):
    with pytest.raises(ValueError, match=r"knows the elements H C O; got atomic numbers \[7\]"):
        reference(model, Atoms("NO", positions=[[0, 0, 0], [1.1, 0, 0]]))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"species": []}, "chemical symbols"),
        ({"species": ["H", "H"]}, "distinct"),
        ({"species": ["H", "Xx"]}, "chemical symbols"),
        ({"species": ["X"]}, "chemical symbols"),
        ({"features": 20}, "multiple of 16"),
        ({"features": 0}, "multiple of 16"),
        ({"layers": 0}, "layers >= 1"),
        ({"n_radial": 0}, "n_radial >= 1"),
        ({"cutoff": 0.0}, "cutoff > 0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon > 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon > 0"),
        ({"radial_basis": "laguerre"}, "radial_basis must be bessel or gaussian, got 'laguerre'"),
        ({"cutoff_function": "mollifier"}, "cutoff_function must be polynomial or cosine, got 'mollifier'"),
        ({"cutoff": float("nan")}, "cutoff > 0"),
    ],
)
def test_bad_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        PaiNNConfig(**wrong)


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        PaiNNConfig().features = 64


class TestCheckpoint:
    def test_round_trip(self, model, tmp_path):
        save_checkpoint(model, tmp_path / "a.ckpt")
        loaded = load_checkpoint(tmp_path / "a.ckpt")
        assert loaded.config == model.config
        for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
            assert torch.equal(a, b) and a.dtype == b.dtype, name
        a, b = (reference(m, structure("ethanol")) for m in (model, loaded))
        np.testing.assert_array_equal(a.forces, b.forces)

    def test_shifts_keep_double_precision(self, tmp_path):
        model = random_model(16, 1)
        model.shift[0] = -13.123456789012345
        save_checkpoint(model.double(), tmp_path / "a.ckpt")
        assert load_checkpoint(tmp_path / "a.ckpt").shift[0].item() == -13.123456789012345

    def test_gaussians_keep_double_precision(self, tmp_path):
        model = random_model(16, 1, radial_basis="gaussian", n_radial=7)
        model.gaussians[:-1] *= 1.123456789
        save_checkpoint(model, tmp_path / "a.ckpt")
        assert torch.equal(load_checkpoint(tmp_path / "a.ckpt").gaussians, model.gaussians)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at .*none.ckpt"):
            load_checkpoint(tmp_path / "none.ckpt")

    @pytest.mark.parametrize("damage", ["empty", "text", "truncated", "pickle", "no header"])
    def test_not_a_checkpoint(self, tmp_path, damage):
        path = tmp_path / "a.ckpt"
        save_checkpoint(random_model(16, 1), path)
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "text":
            path.write_text("not a checkpoint")
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "pickle":
            torch.save({"a": torch.zeros(2)}, path)
        else:
            save_file({"a": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="a.ckpt is not an mlff checkpoint") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"architecture": "schnet"}, "expected architecture painn"),
            ({"version": 99}, "version 1; got painn, 99"),
            ({"config": {"features": 32}}, "do not fit the configuration"),
            ({"config": {"layers": 2}}, "do not fit the configuration"),
            ({"config": {"n_radial": 7}}, "do not fit the configuration"),
            ({"config": {"species": ["H", "O"]}}, "do not fit the configuration"),
            ({"config": {"features": 17}}, "multiple of 16"),
            ({"config": {"radial_basis": "gaussian"}}, "do not fit the configuration .*gaussians"),
            ({"config": {"colour": "blue"}}, "colour"),
        ],
        ids=str,
    )
    def test_wrong_content(self, tmp_path, change, message):
        path, model = tmp_path / "a.ckpt", random_model(16, 1)
        save_checkpoint(model, path)
        with safe_open(str(path), framework="pt") as f:
            header = json.loads(f.metadata()["mlff"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        header.update({**change, "config": {**asdict(model.config), **change.get("config", {})}})
        save_file(tensors, str(path), metadata={"mlff": json.dumps(header)})
        with pytest.raises(ValueError, match=message) as error:
            load_checkpoint(path)
        assert "a.ckpt" in str(error.value) and "\n" not in str(error.value)
