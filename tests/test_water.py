"""The sampling of examples/train/water, and the compact file of periodic frames."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

pytest.importorskip("pydantic", reason="training is not installed: pip install 'mlff[train]'")

from mlff.export import export  # noqa: E402
from mlff.train.config import read_config  # noqa: E402
from mlff.train.frames import load, rounded, save  # noqa: E402
from mlff.validate.water import box  # noqa: E402

FOLDER = Path(__file__).parent.parent / "examples" / "train" / "water"
spec = importlib.util.spec_from_file_location("sample_water", FOLDER / "sample.py")
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)


def test_files_keep_cells_and_stress(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rounded(box(shape, rng)) for shape in (2, (2, 3, 2))]
    frames.append(rounded(box(1, rng)))
    frames[1].cell[0, 1] = 0.3
    frames[2].pbc, frames[2].cell = False, None
    for k, atoms in enumerate(frames):
        atoms.info = {"kind": "box", "trajectory": f"t{k}"}
        stress = {"stress": rng.normal(size=6)} if k < 2 else {}
        atoms.calc = SinglePointCalculator(atoms, energy=-1.5 * k, forces=rng.normal(size=(len(atoms), 3)), **stress)
    save(tmp_path / "a.npz", frames)
    for atoms, again in zip(frames, load(tmp_path / "a.npz"), strict=True):
        assert again.info == atoms.info and again.pbc.tolist() == atoms.pbc.tolist()
        np.testing.assert_array_equal(again.cell.array, atoms.cell.array)
        np.testing.assert_array_equal(again.positions, atoms.positions)
        assert set(again.calc.results) == set(atoms.calc.results)
        np.testing.assert_array_equal(again.calc.results.get("stress", 0), atoms.calc.results.get("stress", 0))
    frames[0].pbc = (True, True, False)
    with pytest.raises(ValueError, match="three periodic directions or none, got pbc .True, True, False. in frame 0"):
        save(tmp_path / "b.npz", frames)
    frames[0].pbc = True
    frames[0].positions[0, 0] += 0.0004
    with pytest.raises(ValueError, match="labels of positions in steps of 0.001 Angstrom"):
        save(tmp_path / "b.npz", frames)


def test_schedule_has_some_of_every_kind_early():
    kinds = sample.schedule(100)
    for kind, (share, *_) in sample.KINDS.items():
        assert kinds.count(kind) == pytest.approx(100 * share, abs=1)
    assert set(kinds[:12]) == set(sample.KINDS)


def test_geometry():
    rng = np.random.default_rng(1)
    atoms = box((4, 3, 3), rng)
    bonds = np.linalg.norm(atoms.positions[1::3] - atoms.positions[::3], axis=1)
    rigid = 0
    for _ in range(12):
        strained = sample.strained(atoms, rng)
        assert not np.allclose(strained.cell.array, np.diag(np.diag(strained.cell.array)))  # shear
        rigid += np.allclose(np.linalg.norm(strained.positions[1::3] - strained.positions[::3], axis=1), bonds)
    assert 0 < rigid < 12
    displaced = sample.displaced(atoms, rng)
    assert np.linalg.norm(displaced.positions - atoms.positions, axis=1).min() > 0
    assert not np.allclose(atoms.positions, sample.contact(atoms, rng).positions)
    close = sample.contact(atoms, rng)
    distances, molecule = close.get_all_distances(mic=True), np.arange(len(atoms)) // 3
    distances[molecule[:, None] == molecule] = np.inf
    for pair, (least, most) in sample.CLOSEST.items():
        first, second = (close.symbols == symbol for symbol in pair.split("-"))
        assert distances[np.ix_(first, second)].min() < most
    assert np.linalg.norm(close.positions[1::3] - close.positions[::3], axis=1) == pytest.approx(bonds)  # molecules stay whole


@pytest.mark.parametrize("pair", sample.TOUCHING)
def test_dimers_touch_with_the_pair_of_their_kind(pair):
    rng, (least, most) = np.random.default_rng(2), sample.TOUCHING[pair]
    for _ in range(5):
        atoms = sample.dimer(pair, rng)
        distances = atoms.get_all_distances()[:3, 3:]
        first, second = (np.array([symbol == x for x in "OHH"]) for symbol in pair.split("-"))
        closest = distances[np.ix_(first, second)].min()
        assert least <= closest <= most and not atoms.pbc.any()
        for other, (limit, _) in sample.TOUCHING.items():
            a, b = (np.array([symbol == x for x in "OHH"]) for symbol in other.split("-"))
            assert min(distances[np.ix_(a, b)].min(), distances[np.ix_(b, a)].min()) > limit
    bent = sample.bent(rng)
    assert all(sample.BOND[0] <= bent.get_distance(0, k) <= sample.BOND[1] for k in (1, 2)) and 60 <= bent.get_angle(1, 0, 2) <= 180


def test_from_a_student_to_a_file_for_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kinds = {kind: (share, ((3, 2, 2),), *more) for kind, (share, _, *more) in sample.KINDS.items()}
    monkeypatch.setattr(sample, "KINDS", kinds)
    export("ethanol-water", "model.pt", architectures=())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        sample.main()

    short = ("--melt", 40, "--equilibrate", 20, "--frames", 2, "--stride", 10)
    run("run", "md.extxyz", "--student", "model.pt", "--prefix", "r0", "--count", 3, *short)
    run("distort", "md.extxyz", "distorted.extxyz", "--count", 6)
    md, distorted = read("md.extxyz", ":"), read("distorted.extxyz", ":")
    assert len(md) == 12 and len({atoms.info["trajectory"] for atoms in md}) == 3
    assert {atoms.info["trajectory"] for atoms in distorted} <= {atoms.info["trajectory"] for atoms in md}
    assert [atoms.info["kind"] for atoms in distorted] == 2 * list(sample.DISTORTIONS)
    run("small", "small.extxyz", "--prefix", "r0", "--count", 8)
    small = read("small.extxyz", ":")
    assert len({atoms.info["trajectory"] for atoms in small}) == 8 and len({atoms.info["kind"] for atoms in small}) == 4
    for name, frames in (("md", md), ("distorted", distorted)):
        for atoms in frames:
            atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)), stress=np.ones(6))
        write(f"{name}.labelled.extxyz", frames)
        Path(f"{name}.labelled.json").write_text(json.dumps({"teacher": {"name": name}}))
    with pytest.raises(SystemExit, match="expected labels of one teacher"):
        run("pack", "md.labelled.extxyz", "distorted.labelled.extxyz", "round0.npz")
    Path("distorted.labelled.json").write_text(json.dumps({"teacher": {"name": "md"}}))
    run("pack", "md.labelled.extxyz", "distorted.labelled.extxyz", "round0.npz")
    capsys.readouterr()
    run("describe", "round0.npz")
    assert "contact               2" in capsys.readouterr().out
    again = load(Path("round0.npz"))
    assert len(again) == 18 and again[0].get_stress()[0] == 1
    np.testing.assert_allclose(again[0].positions, md[0].positions, atol=1e-12)  # a multiple of 0.001 in binary, no longer in decimals
    np.testing.assert_allclose(again[0].cell.array, md[0].cell.array, rtol=1e-14)


def test_the_configuration_splits_by_trajectory():
    """A frame made by geometry stays in its trajectory: split otherwise, a student would be judged by what it has seen."""
    assert read_config(FOLDER / "water.yaml").data.split_by == "trajectory"
