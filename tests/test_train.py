"""Labels, the split, training that repeats and resumes bit for bit, and one clear error for every bad input."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from safetensors.torch import save_file
from structures import ethanol, water_box, water_dimer

from mlff.painn import PaiNN, PaiNNConfig, load_checkpoint, save_checkpoint
from mlff.train import config
from mlff.train.config import FitConfig, read_config
from mlff.train.data import batches, collate, element_shifts, graph, read_frames, read_structures, split
from mlff.train.fit import errors, fit, mean_terms
from mlff.train.label import label, label_file, summary
from mlff.train.run import train
from mlff.train.teachers import TEACHERS, Teacher, load_teacher, of_calculator

MODULES = {"aimnet2": "Auto3D", "chgnet": "chgnet", "gfn2-xtb": "tblite", "sevennet": "sevenn", "so3lr": "so3krates_torch"}


def lennard_jones() -> Teacher:
    return load_teacher("ase.calculators.lj:LennardJones", sigma=1.0, epsilon=0.01, rc=4.0)


def installed(name: str) -> Teacher:
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"the teacher {name} is not installed: pip install {TEACHERS[name][1]}")
    return load_teacher(name)


def sampled() -> list:
    """24 small frames of 12 trajectories, and a box."""
    rng, frames = np.random.default_rng(0), []
    for k in range(24):
        atoms = (ethanol() if k % 2 else water_dimer()).copy()
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        atoms.info = {"kind": "ethanol" if k % 2 else "water", "trajectory": f"run-{k // 2}"}
        frames.append(atoms)
    box = water_box(2)
    box.info = {"kind": "box", "trajectory": "box"}
    return [*frames, box]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    write(folder / "sampled.extxyz", sampled(), format="extxyz")
    record = label_file(folder / "sampled.extxyz", folder / "labelled.extxyz", lennard_jones(), max_force=1e9)
    assert record["labelled"] == 25 and record["left_out"] == 0
    return folder / "labelled.extxyz"


# ---- labels ------------------------------------------------------------------------------------------------------------


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
    teacher = load_teacher("test_train:Double")
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


# ---- data --------------------------------------------------------------------------------------------------------------


def with_labels(atoms: Atoms, **labels) -> Atoms:
    atoms = atoms.copy()
    atoms.info["trajectory"] = "a"
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


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


def test_split_keeps_groups_whole_and_in_place(labelled):
    frames = read_frames([labelled], "trajectory")
    sides = split(frames, "trajectory", 0.3, 0.3, seed=3)
    assert all(sides) and sorted(sum(sides, [])) == list(range(25))
    names = [{frames[k].info["trajectory"] for k in side} for side in sides]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    part = split(frames[:12], "trajectory", 0.3, 0.3, seed=3)  # more data move no group
    assert [set(side) for side in part] == [{k for k in side if k < 12} for side in sides]
    assert split(frames, "trajectory", 0.0, 0.3, seed=3)[2] == sides[2]  # nor does a validation set what is held out
    with pytest.raises(ValueError, match=r"expected some validation data, got none of 13 groups info\['trajectory'\]"):
        split(frames, "trajectory", 1e-9, 0.3, seed=3)


def test_shifts_reproduce_energies_of_a_composition():
    frames = []
    for atoms in (water_dimer(), ethanol(), water_dimer() + ethanol()):
        counts = [np.sum(atoms.numbers == z) for z in (1, 6, 8)]
        frames.append(with_labels(atoms, energy=float(np.dot(counts, [-13.6, -1030.0, -2040.0]))))
    shifts = element_shifts(frames, [1, 6, 8]).numpy()
    for atoms in frames:
        total = sum(shifts[[1, 6, 8].index(z)] for z in atoms.numbers)
        assert total == pytest.approx(atoms.get_potential_energy(), rel=1e-9)
    with pytest.raises(ValueError, match="expected only atomic numbers"):
        element_shifts(frames, [1, 8])


def test_batches_hold_every_graph_once(labelled):
    graphs = [graph(atoms, 5.0, k) for k, atoms in enumerate(read_frames([labelled], "trajectory"))]
    groups = batches(graphs, max_edges=200, generator=torch.Generator().manual_seed(1))
    assert sorted(sum(groups, [])) == list(range(25))
    assert all(len(g) == 1 or sum(graphs[k].edges.shape[1] for k in g) <= 200 for g in groups)
    batch = collate([graphs[k] for k in (3, 24, 0)])
    assert batch.n_atoms.tolist() == [len(graphs[k].atomic_numbers) for k in (3, 24, 0)]
    assert batch.has_stress.tolist() == [False, True, False]
    assert torch.equal(batch.structure[batch.edges[0]], batch.edge_structure)
    assert torch.equal(batch.structure[batch.edges[1]], batch.edge_structure)


# ---- fit ---------------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_at(step: int):
    def report(_, curves):
        if curves[-1].step == step:
            raise Interrupted

    return report


def new_model(frames):
    torch.manual_seed(0)
    model = PaiNN(PaiNNConfig(features=16, layers=2, n_radial=8))
    model.shift.copy_(element_shifts(frames, model.config.atomic_numbers))
    return model


@pytest.fixture(scope="module")
def data(labelled):
    frames = read_frames([labelled], "trajectory")
    return frames, [graph(atoms, 5.0, k) for k, atoms in enumerate(frames)]


def same_weights(a: PaiNN, b: PaiNN) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_training_learns_repeats_and_resumes(data, tmp_path):
    frames, graphs = data
    config = FitConfig(steps=40, max_edges=400, warmup=5, seed=4, ema_decay=0.9, report_every=20)
    kinds, state = [atoms.info["kind"] for atoms in frames], tmp_path / "state.pt"
    before = errors(new_model(frames), graphs, kinds, 400, "cpu")
    whole, curves = fit(new_model(frames), graphs, config, "cpu")
    assert errors(whole, graphs, kinds, 400, "cpu")["all"]["force_meV_A_mae"] < 0.7 * before["all"]["force_meV_A_mae"]
    assert [point.step for point in curves] == [20, 40] and curves[1].loss < curves[0].loss
    with pytest.raises(Interrupted):
        fit(new_model(frames), graphs, config, "cpu", (), state, None, interrupt_at(20))
    resumed, curves_again = fit(new_model(frames), graphs, config, "cpu", (), state)
    assert curves_again == curves and same_weights(resumed, whole)
    assert same_weights(fit(new_model(frames), graphs, config, "cpu")[0], whole)
    other = config.model_copy(update={"seed": 5})
    assert not same_weights(fit(new_model(frames), graphs, other, "cpu")[0], whole)


def test_early_stop_keeps_the_best_weights_and_resumes(data, tmp_path):
    frames, graphs = data
    training, validation = graphs[:2], graphs[4:8]  # few to train on: it soon learns them by heart
    config = FitConfig(steps=400, max_edges=400, warmup=1, learning_rate=2e-2, ema_decay=0.5, report_every=3, patience=2)
    whole, curves = fit(new_model(frames), training, config, "cpu", validation)
    losses = [point.loss for point in curves]
    best = losses.index(min(losses))
    assert curves[-1].step < 400 and len(curves) == best + 3
    kept = np.dot(mean_terms(whole, validation, 400, "cpu"), [5.0, 1.0, 1.0])
    assert kept == pytest.approx(min(losses), rel=1e-6)
    state = tmp_path / "state.pt"
    for step in (curves[best].step, curves[-1].step):  # the last finds nothing left to do
        state.unlink(missing_ok=True)
        with pytest.raises(Interrupted):
            fit(new_model(frames), training, config, "cpu", validation, state, None, interrupt_at(step))
        resumed, curves_again = fit(new_model(frames), training, config, "cpu", validation, state)
        assert curves_again == curves and same_weights(resumed, whole)


def test_validation_terms_do_not_depend_on_batches(data):
    frames, graphs = data
    model = new_model(frames)
    np.testing.assert_allclose(mean_terms(model, graphs, 100, "cpu"), mean_terms(model, graphs, 10**6, "cpu"), rtol=1e-5)


def test_a_state_of_another_run_is_refused(data, tmp_path):
    frames, graphs = data
    config, state = FitConfig(steps=2, report_every=2), tmp_path / "state.pt"
    fit(new_model(frames), graphs, config, "cpu", (), state, {"data": {"sha256": "abc"}})
    other = config.model_copy(update={"steps": 4})
    with pytest.raises(ValueError, match="another run: data.sha256 was abc, is xyz; fit.steps was 2, is 4. .*remove the file"):
        fit(new_model(frames), graphs, other, "cpu", (), state, {"data": {"sha256": "xyz"}})
    state.write_text("no state")
    with pytest.raises(ValueError, match="state.pt is not the state of a training run"):
        fit(new_model(frames), graphs, config, "cpu", (), state)


def test_a_full_disk_leaves_the_last_state_and_checkpoint(data, tmp_path, monkeypatch):
    frames, graphs = data
    config, state = FitConfig(steps=4, report_every=2), tmp_path / "state.pt"
    whole, _ = fit(new_model(frames), graphs, config, "cpu")
    with pytest.raises(Interrupted):
        fit(new_model(frames), graphs, config, "cpu", (), state, None, interrupt_at(2))
    before = state.read_bytes()
    (tmp_path / "state.pt.tmp").symlink_to("/dev/full")  # every write fails for want of space
    with pytest.raises(OSError, match="state.pt could not be written, what was there is unchanged"):
        fit(new_model(frames), graphs, config, "cpu", (), state)
    assert state.read_bytes() == before
    assert same_weights(fit(new_model(frames), graphs, config, "cpu", (), state)[0], whole)  # there is space again

    path = tmp_path / "student.safetensors"
    save_checkpoint(whole, path)
    before = path.read_bytes()

    def full(tensors, file, metadata):
        with open(file, "wb") as f:
            f.write(b"half a checkpoint")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("mlff.painn.save_file", full)
    with pytest.raises(OSError, match="student.safetensors could not be written, what was there is unchanged"):
        save_checkpoint(new_model(frames), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_loss_that_is_not_finite_ends_the_training(data):
    frames, graphs = data
    config = FitConfig(steps=40, learning_rate=1e30, clip=1e30, warmup=0, report_every=10)
    with pytest.raises(FloatingPointError, match="not finite at step 10: .*lower fit.learning_rate"):
        fit(new_model(frames), graphs, config, "cpu")


# ---- the whole of it ---------------------------------------------------------------------------------------------------

CONFIG = """
data: {files: [sampled.extxyz], teacher: "ase.calculators.lj:LennardJones", split_by: trajectory, validation: 0.2, held_out: 0.2,
  teacher_options: {sigma: 1.0, epsilon: 0.01, rc: 4.0}, max_force: 1e9}
model: {features: 16, layers: 1, n_radial: 8}
fit: {steps: 20, max_edges: 400, warmup: 2, learning_rate: 2e-3, ema_decay: 0.9, report_every: 5, seed: 3}
"""


def folder_with(path, text=CONFIG):
    path.mkdir(exist_ok=True)
    write(path / "sampled.extxyz", sampled(), format="extxyz")
    (path / "student.yaml").write_text(text)
    return path / "student.yaml"


def test_train_from_structures_to_a_checkpoint(tmp_path, monkeypatch):
    whole, parts = folder_with(tmp_path / "whole"), folder_with(tmp_path / "parts")
    record = train(whole, "cpu")
    names = sorted(p.name for p in whole.parent.iterdir())
    labels = ["sampled.extxyz", "sampled.lennardjones.extxyz", "sampled.lennardjones.json"]
    assert names == [*labels, "student.json", "student.png", "student.safetensors", "student.state.pt", "student.yaml"]
    model = load_checkpoint(whole.with_suffix(".safetensors"))
    assert model.config.species == ["H", "C", "O"] and model.config.features == 16
    assert record == json.loads(whole.with_suffix(".json").read_text())
    assert record["teacher"]["name"] == "LennardJones" and record["fit"]["steps_done"] == 20
    assert record["data"]["training"] + record["data"]["validation"] + record["data"]["held_out"] == 25
    assert record["held_out_errors"]["all"]["structures"] == record["data"]["held_out"] > 0
    assert whole.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    from mlff.train import run

    monkeypatch.setattr(run, "plot", lambda curves, path: interrupt_at(10)(None, curves))
    with pytest.raises(Interrupted):
        train(parts, "cpu")
    monkeypatch.setattr(run, "plot", lambda curves, path: None)
    monkeypatch.setattr(run, "label_file", lambda source, target, *_: json.loads(target.with_suffix(".json").read_text()))
    again = train(parts, "cpu")
    assert parts.with_suffix(".safetensors").read_bytes() == whole.with_suffix(".safetensors").read_bytes()
    again["fit"]["seconds"], again["date"] = record["fit"]["seconds"], record["date"]
    assert again == record
    assert train(parts, "cpu")["fit"]["seconds"] == json.loads(parts.with_suffix(".json").read_text())["fit"]["seconds"]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("steps: 20", "step: 20", "unknown key fit.step, expected one of steps, max_edges, learning_rate"),
        ("data:", "train: 1\ndata:", "unknown key train, expected one of data, start, model, fit"),
        ("features: 16", "species: H", r"model.species: .*valid (list|array), got 'H'"),
        ("steps: 20", 'steps: "20"', "fit.steps: .*valid integer, got '20'"),
        ("steps: 20", "steps: 0", "fit.steps: .*greater than or equal to 1, got 0"),
        ("steps: 20", "steps: 20, steps: 30", 'found duplicate key "steps"'),
        ("split_by: trajectory, ", "", "expected the key data.split_by"),
        ("held_out: 0.2", "held_out: 0.9", "nothing is left to train on"),
        ("validation: 0.2", "validation: 0", "patience needs validation data"),
        ("[sampled.extxyz]", "[]", "data.files: .*at least 1"),
        ("model:", "start: a.safetensors\nmodel:", "expected start or model, got both"),
        (CONFIG, "- words", "valid dictionary|object"),
        (CONFIG, "data: {", "is not a YAML file of settings"),
    ],
)
def test_wrong_configurations(old, new, message, tmp_path):
    path, text = tmp_path / "student.yaml", CONFIG.replace("seed: 3", "seed: 3, patience: 2")
    path.write_text(new if old == CONFIG else text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"(?s)student.yaml.*" + message):
        read_config(path)
    path.write_text(text)
    assert read_config(path).fit.learning_rate == 2e-3
    with pytest.raises(FileNotFoundError, match="none.yaml: no such configuration"):
        read_config(tmp_path / "none.yaml")


def test_configurations_of_the_documentation(tmp_path):
    root = Path(__file__).parents[1]
    (tmp_path / "readme.yaml").write_text(re.search(r"```yaml\n(.*?)```", (root / "README.md").read_text(), re.S)[1])
    (tmp_path / "config.yaml").write_text(re.search(r"\n    data:\n.*?\n\n", config.__doc__, re.S)[0])
    assert read_config(tmp_path / "config.yaml").fit.steps == 4000
    for path in [tmp_path / "readme.yaml", *root.glob("examples/train/*/*.yaml")]:
        assert read_config(path).data.files


def test_wrong_runs(tmp_path, labelled):
    path = folder_with(tmp_path, CONFIG.replace("features: 16", "species: [H, O], features: 16"))
    with pytest.raises(ValueError, match="expected only atomic numbers|the data hold C, but model.species has only H O"):
        train(path, "cpu")
    folder_with(tmp_path, CONFIG.replace("max_force: 1e9", "max_force: 1e-9"))
    with pytest.raises(ValueError, match="nothing is left to train on, with data.max_force = 1e-09 eV/A: 0 frames .*, 25 left out"):
        train(path, "cpu")
    start = re.sub(r"model:.*\n", "start: other.safetensors\n", CONFIG)
    folder_with(tmp_path, start)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*other.safetensors"):
        train(path, "cpu")
    header = {"architecture": "schnet", "version": 1, "config": {}}
    save_file({"w": torch.zeros(1)}, str(tmp_path / "other.safetensors"), metadata={"mlff": json.dumps(header)})
    with pytest.raises(ValueError, match="expected architecture painn, version 1; got schnet"):
        train(path, "cpu")
    save_checkpoint(PaiNN(PaiNNConfig(species=["H", "O"], features=16, layers=1)), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="the data hold C, but .*other.safetensors has only H O"):
        train(path, "cpu")
    path.write_text(CONFIG.replace("[sampled.extxyz]", "[sampled.extxyz, sampled.xyz]"))
    with pytest.raises(ValueError, match="expected distinct files of labels"):
        train(path, "cpu")
    (tmp_path / "student.extxyz").write_bytes(labelled.read_bytes())
    path.write_text("data: {files: [student.extxyz], split_by: trajectory}")
    with pytest.raises(ValueError, match="would be one file"):
        train(path, "cpu")
    for name in "ab":
        (tmp_path / f"{name}.extxyz").write_bytes(labelled.read_bytes())
        (tmp_path / f"{name}.json").write_text(json.dumps({"teacher": {"name": name}}))
    path.write_text("data: {files: [a.extxyz, b.extxyz], split_by: trajectory}")
    with pytest.raises(ValueError, match="expected one teacher for all files, got .*'a'.* and .*'b'"):
        train(path, "cpu")
