"""Labels, the split, and training that repeats and resumes bit for bit."""

import numpy as np
import pytest
import torch
from ase.calculators.lj import LennardJones
from ase.io import write
from structures import ethanol, water_box, water_dimer

from mlff.painn import PaiNN, PaiNNConfig
from mlff.train.data import batches, collate, element_shifts, graph, read_frames, split
from mlff.train.fit import FitConfig, errors, fit
from mlff.train.label import label, label_file, load_teacher


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """24 small frames of 12 trajectories, labelled by a Lennard-Jones calculator."""
    folder, rng, frames = tmp_path_factory.mktemp("labels"), np.random.default_rng(0), []
    for k in range(24):
        atoms = (ethanol() if k % 2 else water_dimer()).copy()
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        atoms.info = {"kind": "ethanol" if k % 2 else "water", "trajectory": f"run-{k // 2}"}
        frames.append(atoms)
    box = water_box(2)
    box.info = {"kind": "box", "trajectory": "box"}
    write(folder / "sampled.extxyz", frames + [box], format="extxyz")
    counts = label_file(folder / "sampled.extxyz", folder / "labelled.extxyz", LennardJones(sigma=1.0, epsilon=0.01, rc=4.0), max_force=1e9)
    assert counts == {"labelled": 25, "left_out": 0}
    return folder / "labelled.extxyz"


def test_labels_are_the_teachers(labelled):
    frames = read_frames([labelled])
    for atoms in (frames[1], frames[-1]):
        again = atoms.copy()
        again.calc = LennardJones(sigma=1.0, epsilon=0.01, rc=4.0)
        assert atoms.get_potential_energy() == pytest.approx(again.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(atoms.get_forces(), again.get_forces(), atol=1e-7)
    np.testing.assert_allclose(frames[-1].get_stress(), again.get_stress(), atol=1e-9)
    assert "stress" not in frames[0].calc.results  # no volume, no stress


def test_violent_frames_are_left_out(labelled, tmp_path):
    counts = label_file(labelled, tmp_path / "out.extxyz", LennardJones(sigma=1.0, epsilon=0.01, rc=4.0), max_force=1e-6)
    assert counts["labelled"] == 0 and counts["left_out"] == 25


def test_a_teacher_that_returns_nan_is_refused():
    class Broken(LennardJones):
        def calculate(self, *args, **kwargs):
            super().calculate(*args, **kwargs)
            self.results["energy"] = float("nan")

    with pytest.raises(ValueError, match="energy that is not finite"):
        label(water_dimer(), Broken())


def test_unknown_teacher():
    with pytest.raises(ValueError, match="unknown teacher 'magic': expected one of so3lr"):
        load_teacher("magic")


def test_frames_need_a_trajectory(tmp_path):
    write(tmp_path / "a.extxyz", water_dimer(), format="extxyz")
    with pytest.raises(ValueError, match="expected info\\['kind'\\]"):
        read_frames([tmp_path / "a.extxyz"])


def test_split_keeps_trajectories_whole_and_in_place(labelled):
    frames = read_frames([labelled])
    train, test = split(frames, 0.4, seed=3)
    assert train and test and sorted(train + test) == list(range(25))
    trajectory = [frames[k].info["trajectory"] for k in range(25)]
    assert not {trajectory[k] for k in train} & {trajectory[k] for k in test}
    assert set(split(frames[:12], 0.4, seed=3)[1]) == {k for k in test if k < 12}  # more data move no trajectory


def test_shifts_reproduce_energies_of_a_composition():
    frames = []
    for atoms in (water_dimer(), ethanol(), water_dimer() + ethanol()):
        counts = [np.sum(atoms.numbers == z) for z in (1, 6, 8)]
        atoms.calc = LennardJones()
        atoms.calc.atoms, atoms.calc.results = atoms.copy(), {"energy": float(np.dot(counts, [-13.6, -1030.0, -2040.0]))}
        frames.append(atoms)
    shifts = element_shifts(frames, [1, 6, 8]).numpy()
    for atoms in frames:
        total = sum(shifts[[1, 6, 8].index(z)] for z in atoms.numbers)
        assert total == pytest.approx(atoms.get_potential_energy(), rel=1e-9)
    with pytest.raises(ValueError, match="expected only atomic numbers"):
        element_shifts(frames, [1, 8])


def test_batches_hold_every_graph_once(labelled):
    graphs = [graph(atoms, 5.0, k) for k, atoms in enumerate(read_frames([labelled]))]
    groups = batches(graphs, max_edges=200, generator=torch.Generator().manual_seed(1))
    assert sorted(sum(groups, [])) == list(range(25))
    assert all(len(g) == 1 or sum(graphs[k].edges.shape[1] for k in g) <= 200 for g in groups)
    batch = collate([graphs[k] for k in (3, 24, 0)])
    assert batch.n_atoms.tolist() == [len(graphs[k].atomic_numbers) for k in (3, 24, 0)]
    assert torch.equal(batch.structure[batch.edges[0]], batch.edge_structure)
    assert torch.equal(batch.structure[batch.edges[1]], batch.edge_structure)


def new_model(frames):
    torch.manual_seed(0)
    model = PaiNN(PaiNNConfig(features=16, layers=2, n_radial=8))
    model.shift.copy_(element_shifts(frames, model.config.atomic_numbers))
    return model


def test_training_learns_repeats_and_resumes(labelled, tmp_path):
    frames = read_frames([labelled])
    graphs = [graph(atoms, 5.0, k) for k, atoms in enumerate(frames)]
    config = FitConfig(steps=40, max_edges=400, warmup=5, seed=4, ema_decay=0.9)
    kinds = [atoms.info["kind"] for atoms in frames]
    before = errors(new_model(frames), graphs, kinds, 400, "cpu")
    whole = fit(new_model(frames), graphs, config, "cpu")
    assert errors(whole, graphs, kinds, 400, "cpu")["all"]["force_meV_A_mae"] < 0.7 * before["all"]["force_meV_A_mae"]

    class Interrupted(Exception):
        pass

    def interrupt(step, *_):
        if step == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(new_model(frames), graphs, config, "cpu", tmp_path / "state.pt", interrupt, report_every=20)
    resumed = fit(new_model(frames), graphs, config, "cpu", tmp_path / "state.pt", report_every=20)
    repeated = fit(new_model(frames), graphs, config, "cpu")
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, dict(resumed.named_parameters())[name]), name
        assert torch.equal(weight, dict(repeated.named_parameters())[name]), name
