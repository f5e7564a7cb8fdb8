"""Batched dynamics: systems do not feel each other, energy is conserved, the thermostat holds, failures are put back."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from reference import random_model

from mlff.train.dynamics import AIMNet2, Batch, Compiled, Langevin, Student, relax, sample
from mlff.train.teachers import load_teacher


class Springs:
    """Every atom on a spring (eV/Angstrom^2) at its starting place."""

    def __init__(self, batch: Batch, constant: float = 5.0):
        self.home, self.constant, self.listed_at = batch.positions.clone(), constant, None

    def __call__(self, batch: Batch):
        delta = batch.positions - self.home
        each = 0.5 * self.constant * delta.square().sum(1)
        energy = torch.zeros(batch.size, dtype=torch.float64).index_add(0, batch.system, each)
        return energy, -self.constant * delta, torch.zeros_like(energy)


def systems(count: int) -> list[Atoms]:
    rng = np.random.default_rng(0)
    return [Atoms(["C", "N", "O", "H"][: 1 + k % 4], rng.uniform(0, 3, (1 + k % 4, 3))) for k in range(count)]


def test_without_friction_energy_is_conserved():
    batch = Batch(systems(12), "cpu")
    md = Langevin(batch, Springs(batch), [300.0] * 12, timestep=0.5, friction=0.0)
    total = []
    for _ in range(20):
        md.step(20)
        total.append((md.energy + md.kinetic()).numpy())
    total = np.array(total)
    assert np.ptp(total, axis=0).max() < 2e-3 * total.mean()
    assert abs(total[-5:].mean() - total[:5].mean()) < 1e-4 * total.mean()


def test_the_thermostat_holds_every_systems_own_temperature():
    batch = Batch(systems(400), "cpu")
    temperatures = torch.where(torch.arange(400) < 200, 300.0, 900.0)
    md = Langevin(batch, Springs(batch), temperatures, timestep=1.0, friction=0.05, seed=3)
    kinetic = []
    for _ in range(40):
        md.step(10)
        kinetic.append(md.kinetic())
    kelvin = torch.stack(kinetic).mean(0) / (1.5 * units.kB * batch.counts)
    assert kelvin[:200].mean().item() == pytest.approx(300, rel=0.05)
    assert kelvin[200:].mean().item() == pytest.approx(900, rel=0.05)


def test_at_zero_kelvin_dynamics_with_friction_relax():
    batch = Batch(systems(8), "cpu")
    springs = Springs(batch)
    batch.positions = batch.positions + 0.3
    md = Langevin(batch, springs, [0.0] * 8, timestep=1.0, friction=0.05)
    md.step(600)
    assert md.forces.abs().max() < 1e-3


def test_what_flies_apart_is_put_back_and_gives_no_frames():
    batch = Batch(systems(6), "cpu")
    md = Langevin(batch, Springs(batch), [300.0] * 6, friction=0.01)
    torn = torch.arange(6) == 2
    frames, failures = sample(md, steps=40, stride=20, check=10, max_force=100.0, apart=lambda batch: torn)
    assert failures.tolist() == [0, 0, 4, 0, 0, 0] and len(frames) == 10
    assert torch.equal(batch.positions[batch.system == 2], md.potential.home[batch.system == 2])


def test_a_clock_that_has_run_out_ends_sampling():
    batch = Batch(systems(2), "cpu")
    frames, _ = sample(Langevin(batch, Springs(batch), [300.0] * 2), steps=40, stride=20, check=10, deadline=0.0)
    assert frames == []


def test_frames_are_taken_when_systems_are_looked_at():
    batch = Batch(systems(1), "cpu")
    with pytest.raises(ValueError, match="multiple of check, got 30 and 20"):
        sample(Langevin(batch, Springs(batch), [300.0]), steps=60, stride=30, check=20)


def test_cells_follow_the_pressure_however_steps_are_counted(monkeypatch):
    batch = Batch(systems(2), "cpu")
    md, rescaled = Langevin(batch, Springs(batch), [300.0] * 2, pressure=1.0), []
    monkeypatch.setattr(md, "_rescale_cells", lambda: rescaled.append(md.steps))
    for count in (1, 3, 20, 1, 5):
        md.step(count)
    assert rescaled == [10, 20, 30]


def test_potentials_for_open_space_refuse_a_box(save_payload):
    box = Batch([molecule("H2O", cell=[8.0] * 3, pbc=True)], "cpu")
    with pytest.raises(ValueError, match="Compiled takes molecules in open space"):
        Compiled(save_payload(random_model(16, 2)), "cpu")(box)


def test_a_student_in_a_batch_is_the_student_alone(save_payload):
    model = random_model(16, 2)
    frames = [molecule(name) for name in ("H2O", "CH3CH2OH", "CH4")]
    for atoms in frames:
        atoms.rattle(0.05, seed=1)  # perfect tetrahedra have features of length 0, which round badly
    energy, forces, _ = Student(model, "cpu")(Batch(frames, "cpu"))
    compiled = Compiled(save_payload(model), "cpu")(Batch(frames, "cpu"))
    np.testing.assert_allclose(energy, compiled[0], atol=1e-5)
    np.testing.assert_allclose(forces, compiled[1], atol=1e-5)
    alone = Student(model, "cpu")(Batch([frames[1]], "cpu"))
    np.testing.assert_allclose(forces[3:12], alone[1], atol=1e-5)


def test_a_teacher_in_padded_batches_is_the_teacher():
    pytest.importorskip("Auto3D", reason="the teacher aimnet2 is not installed: pip install auto3d==2.3.1")
    frames = [molecule(name) for name in ("CH3CH2OH", "H2O", "CH4", "CH3Cl")]
    batch = Batch(frames, "cpu")
    members = [AIMNet2("cpu", member, max_pairs=60) for member in range(4)]
    energy, forces = (np.mean(values, 0) for values in zip(*((e.numpy(), f.numpy()) for e, f, _ in (m(batch) for m in members))))
    assert [len(chunk[0]) for chunk in members[0].chunks] == [2, 1, 1]
    expected = load_teacher("aimnet2").evaluate(frames)
    np.testing.assert_allclose(energy, [r["energy"] for r in expected], atol=1e-3)
    np.testing.assert_allclose(forces, np.concatenate([r["forces"] for r in expected]), atol=1e-3)


def test_relaxing_goes_downhill():
    batch = Batch(systems(4), "cpu")
    springs = Springs(batch)
    batch.positions = batch.positions + 0.5
    before = springs(batch)[0]
    relax(batch, springs, 30)
    assert (springs(batch)[0] < before).all()
