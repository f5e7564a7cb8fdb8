"""The calculator on a GPU: on a stand-in for one (fake_gpu.py), and dynamics on a real one. More is in test_ase.py."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from fake_gpu import atoms_of, expected
from fake_plan import packed
from machine_code import architectures
from reference import random_model
from structures import structure, water_box

from mlff.ase import MLFFCalculator
from mlff.core import MLFFResourceError
from mlff.export import build_payload
from mlff.extrapolation import Extrapolation


@pytest.fixture
def fake_path(fake, parts, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(packed(parts))
    return path


def test_batch_on_a_stand_in(fake_path):
    structures = []
    for k, (n, length, pbc) in enumerate([(30, 7.0, True), (5, 6.0, False), (12, 6.0, [True, False, True]), (3, 5.0, False)]):
        numbers, positions = atoms_of(n, length, seed=k)
        structures.append(Atoms(numbers, positions, cell=np.diag([length] * 3), pbc=pbc))
    for device in ("cuda", "cuda:0", "auto"):
        calculator = MLFFCalculator(fake_path, device)
        assert calculator.device == ("cuda" if device == "auto" else device)
        assert calculator.parameters["device"] == device
        for atoms, found in zip(structures, calculator.calculate_batch(structures)):
            wanted = expected(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
            np.testing.assert_allclose(found["forces"], wanted["forces"], atol=2e-6 * max(1, np.abs(wanted["forces"]).max()))
            assert found["energy"] == pytest.approx(wanted["energy"], rel=1e-6)
            assert ("stress" in found) == bool(atoms.pbc.all())
            np.testing.assert_allclose(calculator.get_property("forces", atoms), found["forces"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reason", ["no driver", "no code"])
def test_auto_without_a_gpu_that_serves(fake_path, reason, monkeypatch):
    """The CPU; a device that is named is an error."""
    if reason == "no driver":
        monkeypatch.setenv("MLFF_CUDA_DRIVER", "/nowhere/none.so")
    else:
        monkeypatch.setenv("FAKE_CUDA_ARCH", "70")
    calculator = MLFFCalculator(fake_path, "auto")
    assert calculator.device == "cpu"
    assert calculator.get_property("energy", Atoms("OH", positions=[[0, 0, 0], [1, 0, 0]])) < -1000
    with pytest.raises(MLFFResourceError, match="driver" if reason == "no driver" else "has code for"):
        MLFFCalculator(fake_path, "cuda")


@pytest.mark.gpu
def test_molecular_dynamics(tmp_path):
    """The error of velocity Verlet falls with the square of the step; both searches."""
    path = tmp_path / "model.pt"
    path.write_bytes(build_payload(random_model(16, 2), {}, architectures()))
    for atoms in (structure("water_dimer"), water_box(8)):
        spread = []
        for step in (0.2, 0.1):
            one = atoms.copy()
            one.calc = MLFFCalculator(path, "cuda")
            one.set_velocities(0.05 * np.random.default_rng(0).normal(size=(len(one), 3)))
            energies = []
            md = VelocityVerlet(one, step * units.fs)
            md.attach(lambda: energies.append(one.get_total_energy()))
            md.run(round(10 / step))
            spread.append(np.std(energies) / len(one))
        assert 2.5 < spread[0] / spread[1] < 6, spread


@pytest.mark.gpu
def test_extrapolation_grade(tmp_path):
    """The same as on the CPU, with forces and without, in a box and in a molecule."""
    torch.manual_seed(2)
    model, path = random_model(16, 2), tmp_path / "model.pt"
    species = len(model.config.species)
    model.extrapolation = Extrapolation(torch.randn(species, 16, 5), torch.randn(species, 7, 5), torch.tensor([[0.0, 1.0], [0.1, 0.5]]))
    path.write_bytes(build_payload(model, {}, architectures()))
    for atoms in (structure("ethanol"), water_box(3), structure("triclinic")):
        grades = {}
        for device in ("cpu", "cuda"):
            calculator = MLFFCalculator(path, device)
            grades[device] = calculator.get_property("extrapolation_grade", atoms)
            calculator.get_property("forces", atoms)
            np.testing.assert_array_equal(calculator.get_property("extrapolation_grade", atoms), grades[device])
        np.testing.assert_allclose(grades["cuda"], grades["cpu"], rtol=1e-4)
