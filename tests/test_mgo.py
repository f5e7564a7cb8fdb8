"""The sampling of examples/train/mgo: cells are what their kind says, no atoms are where the teacher is wrong."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.io import read
from ase.stress import full_3x3_to_voigt_6_stress

pytest.importorskip("pydantic", reason="training is not installed: pip install 'mlff[train]'")

from mlff.export import export  # noqa: E402
from mlff.painn import PaiNN, PaiNNConfig, save_checkpoint  # noqa: E402
from mlff.train.config import read_config  # noqa: E402

FOLDER = Path(__file__).parent.parent / "examples" / "train" / "mgo"
spec = importlib.util.spec_from_file_location("mgo_sample", FOLDER / "sample.py")  # other examples have a sample.py, too
mgo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mgo)


class Springs(Calculator):
    """Every atom held at its site by a spring of constant k (eV/Angstrom^2); `fails` replaces the forces after some calls."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, sites, k=5.0, fails=None):
        super().__init__()
        self.sites, self.k, self.fails, self.calls = sites, k, fails, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        delta = self.atoms.positions - self.sites
        forces = -self.k * delta
        if self.fails is not None and self.calls > 20:
            forces[0, 0] = self.fails
        stress = full_3x3_to_voigt_6_stress(-delta.T @ forces / self.atoms.get_volume())
        self.results = {"energy": self.k / 2 * (delta**2).sum(), "forces": forces, "stress": stress}


def random_models(folder, count):
    import torch

    paths = []
    for k in range(count):
        torch.manual_seed(k)
        save_checkpoint(PaiNN(PaiNNConfig(species=["Mg", "O"], features=16, layers=1)), folder / f"{k}.safetensors")
        paths.append(export(folder / f"{k}.safetensors", folder / f"{k}.pt", architectures=()))
    return paths


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_split_as_the_sampling_does(path):
    config = read_config(path)
    assert config.data.split_by == "trajectory"
    assert mgo.SPLIT == {"validation": config.data.validation, "held_out": config.data.held_out, "seed": config.fit.seed}


def test_shares_add_up():
    assert sum(mgo.SHARES.values()) == pytest.approx(1) and sum(mgo.STARTS.values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", mgo.SHARES)
def test_frames_are_neutral_periodic_and_not_too_close(kind):
    for atoms in mgo.scans(400, "s", np.random.default_rng(3)):
        if atoms.info["kind"] != kind:
            continue
        assert np.isfinite(atoms.positions).all() and not mgo.too_close(atoms)
        if kind == "pair":
            assert len(atoms) == 2 and not atoms.pbc.any()
        else:
            assert atoms.pbc.all() and (atoms.symbols == "Mg").sum() == (atoms.symbols == "O").sum()
            density = len(atoms) / atoms.get_volume()
            assert 0.04 < density < 0.14  # rock salt: 0.104 atoms/Angstrom^3


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind 'liquid', expected one of phonon, "):
        mgo.scan("liquid", np.random.default_rng(0))


def test_too_close_looks_at_images_and_elements():
    for distance, expected in ((1.1, True), (1.3, False)):
        assert mgo.too_close(Atoms("MgO", [[0, 0, 0], [distance, 0, 0]])) == expected
        assert mgo.too_close(Atoms("MgO", [[0, 0, 0], [9 - distance, 0, 0]], cell=[9, 9, 9], pbc=True)) == expected
    assert mgo.too_close(Atoms("Mg2", [[0, 0, 0], [1.3, 0, 0]])) and not mgo.too_close(Atoms("O2", [[0, 0, 0], [1.3, 0, 0]]))


def test_strains():
    atoms, rng = bulk("MgO", "rocksalt", a=mgo.A, cubic=True), np.random.default_rng(0)
    assert mgo.strained(atoms, mgo.isotropic(0.9)).get_volume() == pytest.approx(0.9 * atoms.get_volume())
    strain = np.array([mgo.random_strain(0.02, rng) for _ in range(2000)])
    assert np.array_equal(strain, strain.transpose(0, 2, 1)) and strain.std(0) == pytest.approx(np.full((3, 3), 0.02), rel=0.1)


def test_defects():
    perfect, rng = bulk("MgO", "rocksalt", a=mgo.A, cubic=True).repeat(2), np.random.default_rng(0)
    assert len(mgo.without_pair(perfect, rng)) == 62
    for _ in range(20):
        atoms = mgo.with_interstitial(perfect, rng)
        moved = np.flatnonzero(np.linalg.norm(atoms.positions - perfect.positions, axis=1))
        assert len(moved) == 1  # the middle of a cube is sqrt(3) / 4 from its corners; one corner may be the vacancy
        distances = np.sort(atoms.get_distances(moved[0], [k for k in range(64) if k != moved[0]], mic=True))
        assert distances[:7] == pytest.approx(np.full(7, np.sqrt(3) / 4 * mgo.A))


def test_slabs_have_a_gap():
    for k in range(20):
        atoms = mgo.slab(np.random.default_rng(k))
        heights = np.sort(np.append(atoms.get_scaled_positions()[:, 2], 1.0)) * atoms.get_volume()
        heights /= np.linalg.norm(np.cross(*atoms.cell[:2]))
        assert np.diff(heights).max() > 1.2 * mgo.A / np.sqrt(8) and np.argmax(np.diff(heights)) == len(atoms) - 1


def test_dynamics_give_frames_of_their_temperature():
    atoms = bulk("MgO", "rocksalt", a=mgo.A, cubic=True).repeat(2)
    args = SimpleNamespace(frames=6, stride=200, check=100, timestep=1.0, max_force=25.0)
    frames = mgo.sample(atoms, Springs(atoms.positions.copy()), 600.0, None, np.random.default_rng(0), args)
    assert len(frames) == 6 and all(frame.calc is None and np.array_equal(frame.cell, atoms.cell) for frame in frames)
    moved = np.mean([(frame.positions - atoms.positions) ** 2 for frame in frames[1:]])
    assert moved == pytest.approx(600 * 8.617e-5 / 5.0, rel=0.2)  # k <x^2> = kT


def test_dynamics_under_pressure():
    atoms = bulk("MgO", "rocksalt", a=mgo.A, cubic=True).repeat(2)
    args = SimpleNamespace(frames=1, stride=60, check=60, timestep=1.0, max_force=1e9)
    volumes = []
    for pressure in (-30.0, 30.0):
        (frame,) = mgo.sample(atoms, Springs(atoms.positions.copy()), 300.0, pressure, np.random.default_rng(0), args)
        volumes.append(frame.get_volume())
    assert volumes[0] > atoms.get_volume() > volumes[1]


@pytest.mark.parametrize("force, kept", [(30.0, 1), (np.nan, 0)])
def test_dynamics_stop_at_a_failure(force, kept):
    atoms = bulk("MgO", "rocksalt", a=mgo.A, cubic=True)
    args = SimpleNamespace(frames=5, stride=100, check=50, timestep=1.0, max_force=25.0)
    calculator = Springs(atoms.positions.copy(), fails=force)
    assert len(mgo.sample(atoms, calculator, 300.0, None, np.random.default_rng(0), args)) == kept


def test_run_and_pick(tmp_path, monkeypatch):
    first, second = random_models(tmp_path, 2)
    command = ["run", first, tmp_path / "md.extxyz", "--count", 12, "--frames", 2, "--stride", 4, "--check", 2, "--max-force", 1e9]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, command)])
    mgo.main()
    frames = read(tmp_path / "md.extxyz", ":")
    assert len(frames) == 24 and len({atoms.info["kind"] for atoms in frames}) > 2

    assert mgo.disagreement(frames, [first, first], "cpu") == pytest.approx(np.zeros(len(frames)))
    assert mgo.disagreement(frames, [first, second], "cpu").min() > 0
    command = ["pick", tmp_path / "md.extxyz", tmp_path / "picked.extxyz", "--models", first, second, "--count", 8]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, command)])
    mgo.main()
    picked = read(tmp_path / "picked.extxyz", ":")
    assert 7 <= len(picked) <= 9
    names = [atoms.info["trajectory"] for atoms in frames]
    assert all(atoms.info["trajectory"] in names for atoms in picked)
