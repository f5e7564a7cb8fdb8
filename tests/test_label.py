"""Labels: they are the teacher's, made once, and one clear error for every structure or file that cannot be used."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from ase.io import read, write
from labels import lennard_jones, with_labels
from structures import ethanol, water_box, water_dimer

from mlff.train.data import read_frames, read_structures
from mlff.train.label import label, label_file, summary
from mlff.train.teachers import TEACHERS, Teacher, load_teacher, of_calculator

MODULES = {"aimnet2": "Auto3D", "chgnet": "chgnet", "gfn2-xtb": "tblite", "sevennet": "sevenn", "so3lr": "so3krates_torch"}


def installed(name: str) -> Teacher:
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"the teacher {name} is not installed: pip install {TEACHERS[name][1]}")
    return load_teacher(name)


def test_labels_are_the_teachers(labelled):
    frames = read_frames([labelled], "trajectory")
    for atoms in (frames[1], frames[-1]):
        again = atoms.copy()
        again.calc = LennardJones(sigma=1.0, epsilon=0.01, rc=4.0)
        assert atoms.get_potential_energy() == pytest.approx(again.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(atoms.get_forces(), again.get_forces(), atol=1e-7)
    np.testing.assert_allclose(frames[-1].get_stress(), again.get_stress(), atol=1e-9)
    assert "stress" not in frames[0].calc.results  # no volume, no stress


def test_violent_frames_are_left_out(labelled, tmp_path):
    record = label_file(labelled, tmp_path / "out.extxyz", lennard_jones(), max_force=1e-6)
    assert record["labelled"] == 0 and record["left_out"] == 25


def test_frames_without_a_finite_answer_are_left_out(labelled, tmp_path):
    class Broken(LennardJones):
        def calculate(self, atoms, *args, **kwargs):
            super().calculate(atoms, *args, **kwargs)
            if atoms.get_chemical_formula() == "C2H6O":
                self.results["forces"][0, 0] = np.nan

    teacher = of_calculator(Broken(), {"name": "broken"})
    record = label_file(labelled, tmp_path / "out.extxyz", teacher, max_force=1e9)
    assert (record["labelled"], record["left_out"], record["not_finite"]) == (13, 0, 12)
    assert "12 for which it returned NaN" in summary(record)
    assert {a.get_chemical_formula() for a in read(tmp_path / "out.extxyz", ":")} == {"H4O2", "H16O8"}


def test_unknown_teacher():
    with pytest.raises(ValueError, match="unknown teacher 'magic': expected one of aimnet2, chgnet"):
        load_teacher("magic")
    with pytest.raises(ValueError, match="ase.calculators.lj:Lenard cannot be made"):
        load_teacher("ase.calculators.lj:Lenard")
    with pytest.raises(ImportError, match="nowhere:Class cannot be loaded .*No module named 'nowhere'"):
        load_teacher("nowhere:Class")


def test_a_teacher_that_is_not_installed(monkeypatch):
    def missing(device):
        import no_such_package  # noqa: F401

    monkeypatch.setitem(TEACHERS, "aimnet2", (missing, "auto3d==2.3.1"))
    with pytest.raises(ImportError, match="aimnet2 cannot be loaded .*no_such_package.*pip install auto3d==2.3.1"):
        load_teacher("aimnet2")


class Double(LennardJones):
    """Changes torch's default type for the whole process, as SO3LR does, and needs it."""

    def __init__(self):
        super().__init__()
        torch.set_default_dtype(torch.float64)

    def calculate(self, *args, **kwargs):
        assert torch.get_default_dtype() == torch.float64
        super().calculate(*args, **kwargs)


def test_a_teacher_keeps_its_default_type_to_itself():
    teacher = load_teacher("test_label:Double")
    assert torch.get_default_dtype() == torch.float32
    label([water_dimer()], teacher)
    assert torch.get_default_dtype() == torch.float32


class Counting:
    """A teacher that counts the batches and structures it is asked for, and fails at a chosen batch."""

    def __init__(self, fail_at: int = 0, max_pairs: int = 0):
        self.structures = self.batches = 0
        inner = lennard_jones()

        def evaluate(structures):
            self.batches += 1
            if self.batches == fail_at:
                raise KeyboardInterrupt
            self.structures += len(structures)
            return inner.evaluate(structures)

        self.teacher = Teacher({"name": "counting"}, evaluate, max_pairs)


@pytest.mark.parametrize("max_pairs, expected", [(0, 25), (200, 13), (100_000, 1)])
def test_batches_of_structures(labelled, tmp_path, max_pairs, expected):
    counting = Counting(max_pairs=max_pairs)
    label_file(labelled, tmp_path / "out.extxyz", counting.teacher)
    assert (counting.batches, counting.structures) == (expected, 25)  # 200 pairs: two of 9 atoms at once, the box alone


def test_labels_are_made_once_and_go_on(labelled, tmp_path):
    source, whole, parts = labelled.with_name("sampled.extxyz"), tmp_path / "whole.extxyz", tmp_path / "parts.extxyz"
    label_file(source, whole, Counting(max_pairs=200).teacher)
    with pytest.raises(KeyboardInterrupt):
        label_file(source, parts, Counting(fail_at=5, max_pairs=200).teacher)
    assert not parts.exists()
    with open(tmp_path / "parts.extxyz.part", "a") as f:
        f.write("half a fra")  # what an interruption while writing leaves
    rest = Counting(max_pairs=200)
    record = label_file(source, parts, rest.teacher)
    assert rest.structures == 25 - 8 and record["labelled"] == 25
    assert parts.read_bytes() == whole.read_bytes()
    again = Counting()
    assert label_file(source, parts, again.teacher) == record and again.structures == 0
    for change in ({"max_force": 1e6}, {"index": ":20"}):
        other = Counting()
        label_file(source, parts, other.teacher, **change)
        assert other.structures == (20 if "index" in change else 25)  # another job
    parts.write_text(parts.read_text() + "\n")
    other = Counting()
    label_file(source, parts, other.teacher, index=":20")
    assert other.structures == 20  # the file is not what was written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.extxyz", "parts.json", "whole.extxyz", "whole.json"]


def test_another_labelling_does_not_undo_one_that_is_unfinished(labelled, tmp_path):
    parts = tmp_path / "parts.extxyz"
    with pytest.raises(KeyboardInterrupt):
        label_file(labelled, parts, Counting(fail_at=5, max_pairs=200).teacher)
    with pytest.raises(ValueError, match="parts.extxyz.part holds 8 frames of another labelling, with another max_force_eV_A;"):
        label_file(labelled, parts, Counting().teacher, max_force=1e6)
    rest = Counting(max_pairs=200)
    label_file(labelled, parts, rest.teacher)
    assert rest.structures == 25 - 8


def test_a_record_that_cannot_be_written_leaves_the_labels(labelled, tmp_path, monkeypatch):
    target, replace = tmp_path / "out.extxyz", Path.replace

    def full(path, other):
        if Path(other).name == "out.json":
            raise OSError(28, "No space left on device")
        return replace(path, other)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="out.json could not be written"):
        label_file(labelled, target, Counting().teacher)
    monkeypatch.undo()
    rest = Counting()
    assert label_file(labelled, target, rest.teacher)["labelled"] == 25 and rest.structures == 0


def test_a_full_disk_leaves_the_labels_that_are_made(labelled, tmp_path, monkeypatch):
    source, whole, parts = labelled.with_name("sampled.extxyz"), tmp_path / "whole.extxyz", tmp_path / "parts.extxyz"
    label_file(source, whole, Counting().teacher)
    monkeypatch.setattr("mlff.train.label.write", Full(space_for=10))
    with pytest.raises(OSError, match="parts.extxyz.part could not be written: .*No space left.* the same command goes on"):
        label_file(source, parts, Counting().teacher)
    monkeypatch.undo()
    rest = Counting()
    label_file(source, parts, rest.teacher)
    assert rest.structures == 15 and parts.read_bytes() == whole.read_bytes()


class Full:
    """ase.io.write on a disk with space for some frames and a half."""

    def __init__(self, space_for: int):
        self.left = space_for

    def __call__(self, path, frames, **options):
        if not self.left:
            with open(path, "a") as f:
                f.write("6\nProperties=spe")
            raise OSError(28, "No space left on device")
        self.left -= 1
        write(path, frames, **options)


def test_labels_do_not_replace_their_source(labelled):
    with pytest.raises(ValueError, match="expected another file"):
        label_file(labelled, labelled, lennard_jones())


def test_teachers_refuse_what_they_do_not_know(tmp_path):
    counting = Counting()
    counting.teacher.elements, counting.teacher.periodic = frozenset((1, 8)), False
    unknown, periodic = r"frame 1 \(C2H6O\): the teacher counting knows H O, got C", "open space, got a periodic cell"
    for atoms, message in ((ethanol(), unknown), (water_box(1), periodic)):
        write(tmp_path / "bad.extxyz", [water_dimer(), atoms], format="extxyz")
        with pytest.raises(ValueError, match=message):
            label_file(tmp_path / "bad.extxyz", tmp_path / "out.extxyz", counting.teacher)
    assert counting.structures == 0  # all are looked at before the first is labelled


def test_aimnet2_is_the_model_in_its_package(tmp_path):
    teacher = installed("aimnet2")
    molecules = [molecule("CH3CH2OH"), molecule("H2O"), molecule("CH3SH"), molecule("C6H6")]
    write(tmp_path / "molecules.extxyz", molecules, format="extxyz")
    label_file(tmp_path / "molecules.extxyz", tmp_path / "labelled.extxyz", teacher)
    path = importlib.util.find_spec("Auto3D").submodule_search_locations[0] + "/models/aimnet2_wb97m_ens_f.jpt"
    model = torch.jit.load(path)
    for atoms in read(tmp_path / "labelled.extxyz", ":"):
        inputs = {
            "coord": torch.tensor(atoms.positions, dtype=torch.float32)[None],
            "numbers": torch.tensor(atoms.numbers)[None],
            "charge": torch.zeros(1),
        }
        out = model(inputs)
        # batched with padding, against one by one: rounding of float32, in energies of thousands of eV
        assert atoms.get_potential_energy() == pytest.approx(float(out["energy"]), abs=1e-4)
        np.testing.assert_allclose(atoms.get_forces(), out["forces"][0].detach(), atol=2e-5)
        spread = out["forces_std"][0].detach().norm(dim=1)
        np.testing.assert_allclose(atoms.arrays["force_spread"], spread, atol=2e-5)
        assert spread.max() > 1e-3
    with pytest.raises(ValueError, match="AIMNet2 knows H B C N O F Si P S Cl As Se Br I, got Na"):
        write(tmp_path / "salt.extxyz", Atoms("NaCl", [[0, 0, 0], [2.4, 0, 0]]), format="extxyz")
        label_file(tmp_path / "salt.extxyz", tmp_path / "out.extxyz", teacher)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["so3lr", "gfn2-xtb", "sevennet", "chgnet"])
def test_other_teachers(name):
    """Forces and stress are derivatives of the energy, in ASE's units and with its signs."""
    teacher = installed(name)
    atoms = bulk("NaCl", "rocksalt", a=5.5) if name in ("sevennet", "chgnet") else molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    (labelled,) = label([atoms], teacher)

    def slope(move, step: float) -> float:
        energies = [label([move(sign * step)], teacher)[0].get_potential_energy() for sign in (1, -1)]
        return (energies[0] - energies[1]) / (2 * step)

    def moved(x):
        copy = atoms.copy()
        copy.positions[1, 2] += x
        return copy

    def stretched(x):
        copy = atoms.copy()
        copy.set_cell(atoms.cell.array @ np.diag([1 + x, 1, 1]), scale_atoms=True)
        return copy

    assert labelled.get_forces()[1, 2] == pytest.approx(-slope(moved, 0.01), abs=2e-3)
    if atoms.pbc.all():
        assert labelled.get_stress()[0] == pytest.approx(slope(stretched, 0.005) / atoms.get_volume(), abs=3e-4)


# ---- files of structures -----------------------------------------------------------------------------------------------


def test_frames_need_a_group_and_labels(tmp_path):
    path, water = tmp_path / "a.extxyz", molecule("H2O")
    write(path, with_labels(water, energy=1.0, forces=np.zeros((3, 3))), format="extxyz")
    assert read_frames([path], "trajectory")[0].info["kind"] == "a"
    with pytest.raises(ValueError, match=r"a.extxyz, frame 0 \(H2O\): expected info\['molecule'\], .* got \['trajectory'\]"):
        read_frames([path], "molecule")
    write(path, [with_labels(water, energy=1.0, forces=np.zeros((3, 3))), with_labels(water, energy=1.0)], format="extxyz")
    with pytest.raises(ValueError, match=r"frame 1 .*expected energy and forces as labels, got energy; make them with mlff label"):
        read_frames([path], "trajectory")
    write(path, water, format="extxyz")
    with pytest.raises(ValueError, match="as labels, got no label"):
        read_frames([path], "trajectory")
    write(path, with_labels(water, energy=1.0, forces=np.full((3, 3), np.nan)), format="extxyz")
    with pytest.raises(ValueError, match="expected forces without NaN"):
        read_frames([path], "trajectory")
    path.write_text('1\nProperties=species:S:1:pos:R:3:forces:R:2 energy=1 trajectory=a pbc="F F F"\nNe 0 0 0 0 0\n')
    with pytest.raises(ValueError, match=r"expected forces as numbers of shape \(1, 3\), got float64 of shape \(1, 2\)"):
        read_frames([path], "trajectory")


@pytest.mark.parametrize("text", ["", "words\n", "3\n\nH 0 0 0\n", "1\n\nXx 0 0 0\n"], ids=["empty", "words", "short", "element"])
def test_files_without_structures(tmp_path, text):
    path = tmp_path / "bad.extxyz"
    path.write_text(text)
    with pytest.raises(ValueError, match="bad.extxyz: expected structures"):
        read_structures(path)
    with pytest.raises(FileNotFoundError, match="none.extxyz: no such file of structures"):
        read_structures(tmp_path / "none.extxyz")
    write(path, [molecule("H2O")] * 3, format="extxyz")
    assert [len(read_structures(path, index)) for index in (":", "::2", "1")] == [3, 2, 1]
    for index in ("words", "5:", "5"):
        with pytest.raises(ValueError, match=f"bad.extxyz.* frames '?{index}'?"):
            read_structures(path, index)


def charged(**change) -> Atoms:
    atoms = molecule("H2O")
    atoms.info.update({k: v for k, v in change.items() if k not in ("charges", "magmoms")})
    atoms.set_initial_charges(change.get("charges"))
    atoms.set_initial_magnetic_moments(change.get("magmoms"))
    return atoms


@pytest.mark.parametrize(
    "atoms, message",
    [
        (charged(charge=-1), r"info\['charge'\] = -1"),
        (charged(spin=2), r"info\['spin'\] = 2"),
        (charged(multiplicity=3), r"info\['multiplicity'\] = 3"),
        (charged(charges=[1, 0, 0]), "add up to 1"),
        (charged(magmoms=[0, 1, 0]), "initial magnetic moments"),
        (Atoms("CH3", molecule("CH3").positions), "an odd number of electrons, 9"),
        (Atoms("He", [[0, 0, np.inf]]), "finite positions"),
        (Atoms("X", [[0, 0, 0]]), r"atomic number 0"),
        (Atoms(), "expected atoms, got none"),
    ],
    ids=["charge", "spin", "multiplicity", "charges", "magmoms", "radical", "inf", "dummy", "empty"],
)
def test_structures_that_no_student_can_learn_from(atoms, message, tmp_path):
    write(tmp_path / "bad.extxyz", [molecule("H2O"), atoms], format="extxyz")
    with pytest.raises(ValueError, match=rf"bad.extxyz, frame 1 .*{message}"):
        read_structures(tmp_path / "bad.extxyz")


def test_neutral_molecules_pass(tmp_path):
    zwitterion = charged(charge=0, spin=1, multiplicity=1, charges=[0.5, -0.5, 0])
    write(tmp_path / "good.extxyz", [zwitterion, bulk("Al")], format="extxyz")  # a metal has no shells to close
    assert len(read_structures(tmp_path / "good.extxyz")) == 2
