"""The sampling of examples/train/organics: structures are sound, and no held-out scaffold is in a frame to train on."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

pytest.importorskip("scipy", reason="structures are turned with SciPy")
pytest.importorskip("pydantic", reason="training is not installed: pip install 'mlff[train]'")

FOLDER = Path(__file__).parent.parent / "examples" / "train" / "organics"
sys.path.insert(0, str(FOLDER))

from geometry import (  # noqa: E402
    HELD_OUT, PAIRS, SCAN_KINDS, SMALL, SPLIT, TRAINING, VALIDATION, Source, bare_pairs, beyond, bonds, closeness, closest,
    flown_apart, has_hole, joined, named, pushed, rotatable, scans, side, starts, stretched, thermal, turned, wall, walls_of,
)  # fmt: skip

from mlff.train.config import read_config  # noqa: E402
from mlff.train.data import Place, check, split  # noqa: E402
from mlff.train.dynamics import Batch  # noqa: E402
from mlff.train.frames import load, rounded, save  # noqa: E402

spec = importlib.util.spec_from_file_location("organics_sample", FOLDER / "sample.py")  # other examples have a sample.py, too
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)

WALLS = np.full((36, 36), 0.7)  # Angstrom
ETHANOL, BUTANE, BENZENE = molecule("CH3CH2OH"), molecule("trans-butane"), molecule("C6H6")


def conformers() -> list:
    """Molecules of 40 made-up families and three that are SMALL, the names of which say where they belong."""
    result = []
    for k in range(40):
        atoms = (ETHANOL, BUTANE, BENZENE)[k % 3].copy()
        atoms.info = {"molecule": f"m{k}", "scaffold": f"family {k}"}
        result.append(atoms)
    for name in ("H2O", "CH4", "HCl"):
        atoms = molecule(name)
        atoms.info = {"molecule": name, "scaffold": SMALL}
        result.append(atoms)
    return [rounded(atoms) for atoms in result]


@pytest.mark.parametrize("name", ["first.yaml", "organics.yaml", "organics-small.yaml"])
def test_configurations_split_as_the_sampling_does(name):
    config = read_config(FOLDER / name)
    assert config.data.split_by == "scaffold"
    assert SPLIT == {"validation": config.data.validation, "held_out": config.data.held_out, "seed": config.fit.seed}


def test_large_families_are_trained_on():
    assert side(SMALL) == TRAINING and side("c1ccccc1") == TRAINING


@pytest.mark.parametrize("wanted", [TRAINING, VALIDATION, HELD_OUT])
def test_no_frame_holds_a_molecule_of_another_side(wanted):
    known = conformers()
    family = {atoms.info["molecule"]: atoms.info["scaffold"] for atoms in known}
    source = Source(known, wanted, np.random.default_rng(1))
    systems = {"molecule": 4, "dimer": 10, "cluster": 10}
    frames = [*scans(source, dict.fromkeys(SCAN_KINDS, 6)), *starts(source, systems, (300.0, 900.0))]
    frames += pushed(source, {"collision": 10, "pressed": 4}, WALLS)
    for atoms in frames:
        members = [family[name] for name in atoms.info["molecule"].split(".")]
        assert {side(name) for name in members if name != SMALL} <= {wanted}
        assert side(atoms.info["scaffold"]) == wanted  # mlff train puts it where its molecules are
    if wanted == TRAINING:
        chosen = split(known + frames, "scaffold", SPLIT["validation"], SPLIT["held_out"], SPLIT["seed"])
        assert set(range(len(known), len(known) + len(frames))) <= set(chosen[0])
    assert any("." in atoms.info["molecule"] for atoms in frames)


def test_structures_are_finite_and_keep_their_atoms():
    source = Source(conformers(), TRAINING, np.random.default_rng(2))
    for atoms in scans(source, dict.fromkeys(SCAN_KINDS, 10)):
        assert np.isfinite(atoms.positions).all() and np.abs(atoms.positions).max() < 32
        assert atoms.numbers.sum() % 2 == 0
        distances = atoms.get_all_distances() + 9 * np.eye(len(atoms))
        assert distances.min() > (0.4 if atoms.info["kind"] == "contact" else 0.5)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind 'twist'"):
        scans(Source(conformers(), TRAINING, np.random.default_rng(0)), {"twist": 1})


def test_torsions_and_stretches_move_one_side_rigidly():
    pairs = bonds(ETHANOL)
    assert len(pairs) == 8 and len(bonds(BENZENE)) == 12
    assert beyond(bonds(BENZENE), 0, 1) is None  # a ring
    assert rotatable(bonds(BENZENE)) == [] and len(rotatable(pairs)) == 2  # C-C and C-O
    i, j, moving = rotatable(pairs)[0]
    before, after = ETHANOL.get_all_distances(), turned(ETHANOL, i, j, moving, 77.0).get_all_distances()
    for a, b in pairs:
        assert after[a, b] == pytest.approx(before[a, b])
    assert np.abs(after - before).max() > 0.3
    rng = np.random.default_rng(0)
    for _ in range(10):
        moved = stretched(ETHANOL, pairs, rng)
        changed = np.abs([moved.get_distance(*pair) / ETHANOL.get_distance(*pair) - 1 for pair in pairs])
        assert (changed > 1e-6).sum() == 1 and changed.max() < 0.6


def test_thermal_displacements_grow_with_temperature():
    rng, pairs = np.random.default_rng(0), bonds(BENZENE)

    def spread(temperature):
        moved = [thermal(BENZENE, pairs, temperature, rng).get_all_distances() - BENZENE.get_all_distances() for _ in range(50)]
        return np.std([d[i, j] for d in moved for i, j in pairs])

    # a spring of 35 eV/A^2 at 300 K spreads by 0.027 A
    assert 0.015 < spread(300.0) < 0.04 and spread(1200.0) == pytest.approx(2 * spread(300.0), rel=0.2)


def test_joined_molecules_are_as_far_apart_as_asked():
    rng = np.random.default_rng(0)
    for gap in (1.0, 2.5, 6.0):
        atoms = joined([ETHANOL, BENZENE], gap, rng)
        apart = np.linalg.norm(atoms.positions[:9, None] - atoms.positions[9:], axis=2)
        assert apart.min() == pytest.approx(gap, abs=1e-6)
        np.testing.assert_allclose(atoms.positions.mean(0), 0, atol=1e-9)
    assert closest(ETHANOL, bonds(ETHANOL)) > 2.0


def test_a_wall_ends_where_a_teacher_fails():
    distances, everywhere = np.arange(0.6, 1.25, 0.1), np.ones(7, dtype=bool)
    forces = np.array([-30.0, 20.0, 40.0, 30.0, 12.0, -4.0, -1.0])  # a hole, the top, the wall, a bond
    assert wall(distances, forces, everywhere) == pytest.approx(0.9)  # the top is between 0.7 and 0.9
    assert wall(distances, forces, np.array([1, 1, 1, 0, 1, 1, 1], dtype=bool)) == pytest.approx(1.1)
    assert wall(distances, np.array([60.0, 50.0, 40.0, 30.0, 12.0, 8.0, -1.0]), everywhere) == pytest.approx(0.7)


def test_bare_pairs_begin_at_the_wall_and_are_trained_on():
    frames = [rounded(atoms) for atoms in bare_pairs(WALLS, 12, np.random.default_rng(0))]
    assert len(frames) == 12 * len(PAIRS) == 12 * 45
    by_pair = {atoms.info["trajectory"]: [] for atoms in frames}
    for k, atoms in enumerate(frames):
        check(atoms, Place(Path("pairs.npz"), k, atoms))  # an even number of electrons
        assert side(atoms.info["scaffold"]) == TRAINING
        distances = atoms.get_all_distances()[np.triu_indices(len(atoms), 1)]
        assert distances[0] == pytest.approx(distances[-1])
        assert len(atoms) == 2 or np.sort(distances)[2] > 19.9  # a second pair is out of reach
        by_pair[atoms.info["trajectory"]].append(distances[0])
    for lengths in by_pair.values():
        assert lengths[0] == pytest.approx(0.7, abs=2e-3) and 4.0 < lengths[-1] < 5.6 and lengths == sorted(lengths)


def test_close_atoms_are_no_closer_than_the_walls():
    source = Source(conformers(), TRAINING, np.random.default_rng(4))
    walls = WALLS.copy()
    walls[8, 8] = 1.2
    frames = pushed(source, {"collision": 30, "pressed": 10}, walls)
    sizes = {atoms.info["molecule"]: len(atoms) for atoms in conformers()}
    meet = set()
    for atoms in frames[:30]:
        first = sizes[atoms.info["molecule"].split(".")[0]]
        ratio = np.linalg.norm(atoms.positions[:first, None] - atoms.positions[first:], axis=2)
        ratio /= walls[atoms.numbers[:first, None], atoms.numbers[first:]]
        assert 1.0 - 1e-6 < ratio.min() < 2.1 + 1e-6
        i, j = np.unravel_index(ratio.argmin(), ratio.shape)
        meet.add(tuple(sorted((atoms.symbols[i], atoms.symbols[first + j]))))
    assert ("O", "O") in meet and len(meet) > 3
    for atoms in frames[30:]:
        assert atoms.info["kind"] == "pressed" and closeness(atoms, walls) >= 1.0


def test_labels_are_left_out_where_the_teacher_is_uncertain():
    forces, spread = np.array([[0.0, 0.0, 50.0], [0.0, 3.0, 4.0]]), np.array([13.0, 4.9])
    limits = SimpleNamespace(max_force=70.0, max_spread=4.0, relative_spread=0.2)  # 14 and 5 eV/Angstrom of these two atoms
    assert not sample.too_hard(forces, limits) and sample.too_hard(2 * forces, limits)
    assert not sample.too_uncertain(forces, spread, limits)
    assert sample.too_uncertain(forces, spread + [0.0, 0.2], limits) and sample.too_uncertain(forces, spread + [1.1, 0.0], limits)
    assert sample.too_uncertain(forces, spread, SimpleNamespace(max_spread=4.0, relative_spread=0.0))


def test_labels_are_left_out_where_the_teacher_has_a_hole():
    frames = scans(Source(conformers(), TRAINING, np.random.default_rng(5)), {"contact": 2})
    walls = walls_of(frames + bare_pairs(WALLS, 4, np.random.default_rng(0)))
    assert walls[1, 8] == walls[8, 1] == pytest.approx(0.7) and np.isnan(walls[0]).all()
    water, along = molecule("H2O"), np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    water.positions = [[0.0, 0.0, 0.0], [0.75, 0.0, 0.0], [0.0, 0.9, 0.0]]  # one hydrogen atom within 1.15 * 0.7 of the oxygen atom
    assert has_hole(water, -5.0 * along, walls) and has_hole(water, 15.0 * along, walls)  # 7.5 on each of the two
    assert not has_hole(water, 25.0 * along, walls)
    assert not has_hole(water, -5.0 * along, np.full((36, 36), np.nan))  # nothing is known of files without bare pairs


def test_flown_apart():
    frames = [named(atoms.copy(), "x", [atoms], 0) for atoms in conformers()[:3]]
    batch = Batch(frames, "cpu")
    apart = flown_apart(batch)
    assert not apart(batch).any()
    batch.positions[9] += torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)  # a bond of the second molecule
    assert apart(batch).tolist() == [False, True, False]


def test_files_keep_frames(tmp_path):
    frames = scans(Source(conformers(), TRAINING, np.random.default_rng(3)), {"dimer": 3, "torsion": 2})
    frames = [rounded(atoms) for atoms in frames]
    frames[0].info["temperature"] = 450.5
    save(tmp_path / "bare.npz", frames)
    rng = np.random.default_rng(0)
    for atoms in frames:
        atoms.arrays["force_spread"] = rng.random(len(atoms))
        atoms.calc = SinglePointCalculator(atoms, energy=-1234.56789, forces=rng.normal(size=(len(atoms), 3)))
    save(tmp_path / "labelled.npz", frames)
    for path, labels in ((tmp_path / "bare.npz", False), (tmp_path / "labelled.npz", True)):
        for atoms, again in zip(frames, load(path), strict=True):
            assert again.info == atoms.info
            np.testing.assert_array_equal(again.numbers, atoms.numbers)
            np.testing.assert_array_equal(again.positions, atoms.positions)  # rounded() is what a file keeps
            assert (again.calc is not None) == labels
            if labels:
                assert again.calc.results["energy"] == atoms.calc.results["energy"]
                np.testing.assert_allclose(again.calc.results["forces"], atoms.calc.results["forces"], atol=1e-4)
                np.testing.assert_allclose(again.arrays["force_spread"], atoms.arrays["force_spread"], rtol=1e-3)
    frames[0].positions += 40.0
    with pytest.raises(ValueError, match="within 32 Angstrom"):
        save(tmp_path / "far.npz", frames)


def test_scaffolds():
    pytest.importorskip("rdkit", reason="molecules are made with RDKit: pip install rdkit")
    from molecules import Chem, scaffold, suitable

    def family(smiles):
        return scaffold(Chem.AddHs(Chem.MolFromSmiles(smiles)))

    assert family("O") == family("CC=O") == family("ClC(Cl)Cl") == SMALL
    assert family("Cc1ccccc1") == family("Oc1ccccc1Br") == "c1ccccc1"
    assert family("C[C@@H]1CCCN1") == family("C[C@H]1CCCN1")
    assert family("CCCCO") == family("CCCCN") == family("C=CC=CC") == "CCCCC"  # skeletons of molecules without rings
    assert family("CC(C)CO") != family("CCCCO") and family("FS(F)(F)(F)(F)F") == "CC(C)(C)(C)(C)C"
    for smiles in ("CC(=O)[O-]", "C[CH2]", "[Na]Cl", "O.O", "[2H]O[2H]", "C[Si](C)(C)C", "C" * 20, "not a molecule"):
        assert suitable(smiles, 50) is None
    assert suitable("C[N+](=O)[O-]", 50).GetNumAtoms() == 7


def test_conformers():
    pytest.importorskip("rdkit", reason="molecules are made with RDKit: pip install rdkit")
    from molecules import conformers as embedded

    frames = embedded(("CCCCO", 2))
    assert frames and all(atoms.info["molecule"] == "CCCCO" and atoms.info["scaffold"] == "CCCCC" for atoms in frames)
    assert len(bonds(frames[0])) == 14


def test_recombined_molecules_are_new_and_trained_on():
    pytest.importorskip("rdkit", reason="molecules are made with RDKit: pip install rdkit")
    from itertools import islice

    from molecules import Chem, recombined, scaffold

    known = ["CCOc1ccccc1", "CC(=O)Nc1ccc(Cl)cc1", "COCCN(C)C(=O)c1ccncc1", "O=C(OCC)c1ccc(Br)cc1", "CNS(=O)(=O)c1ccccc1", "FC(F)(F)COc1ccccn1"]
    mols = [Chem.AddHs(Chem.MolFromSmiles(smiles)) for smiles in known]
    new, again = ([Chem.MolToSmiles(mol) for mol in islice(recombined(mols), 12)] for _ in range(2))
    assert new == again and len(set(new) - set(known)) > 5
    assert all(side(scaffold(Chem.AddHs(Chem.MolFromSmiles(smiles)))) == TRAINING for smiles in new)


def test_shipped_conformers():
    frames = load(FOLDER / "molecules.npz")
    assert len({atoms.info["molecule"] for atoms in frames}) > 5000
    assert {symbol for atoms in frames for symbol in atoms.symbols} == {"H", "C", "N", "O", "F", "P", "S", "Cl", "Br"}
    assert all(atoms.numbers.sum() % 2 == 0 for atoms in frames)
    sides = [side(name) for name in {atoms.info["molecule"]: atoms.info["scaffold"] for atoms in frames}.values()]
    assert sides.count(HELD_OUT) > 500 and sides.count(VALIDATION) > 300  # those of the tables; recombined ones are all trained on
