"""ASE calculator: conventions, caching, dynamics, errors. Numbers against the reference are in test_parity.py."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.constraints import FixAtoms
from ase.db import connect
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from fake_gpu import assert_close, atoms_of, expected
from fake_plan import packed
from machine_code import architectures
from reference import random_model, reference
from structures import structure

from mlff import ase as module
from mlff.ase import MLFFCalculator
from mlff.core import MLFFFileError, MLFFInputError, MLFFResourceError
from mlff.export import build_payload


@pytest.fixture(scope="module")
def model():
    return random_model(16, 2)


@pytest.fixture
def path(model, save_payload):
    return save_payload(model)


@pytest.fixture
def calculator(path):
    return MLFFCalculator(path, threads=1)


@pytest.fixture
def counted(calculator, monkeypatch):
    """The calculator and the list of what the core was asked for, call by call."""
    calls, compute = [], calculator._system.compute
    monkeypatch.setattr(calculator._system, "compute", lambda x, cell, pbc, want: calls.append(want) or compute(x, cell, pbc, want))
    return calculator, calls


def test_properties_and_their_conventions(calculator, model):
    atoms = structure("triclinic")
    atoms.calc = calculator
    expected, volume = reference(model, atoms), atoms.get_volume()
    w = -expected.virial / volume
    voigt = [w[0, 0], w[1, 1], w[2, 2], w[1, 2], w[0, 2], w[0, 1]]
    np.testing.assert_allclose(atoms.get_stress(), voigt, atol=2e-7)
    np.testing.assert_allclose(atoms.get_stress(voigt=False), w, atol=2e-7)
    np.testing.assert_allclose(atoms.get_stresses().sum(0), atoms.get_stress(), atol=1e-12)
    assert atoms.get_stresses().shape == (len(atoms), 6)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), rel=1e-13)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert atoms.get_forces().shape == (len(atoms), 3)


def test_against_the_numerical_derivatives_of_ase(calculator):
    """The sign and the order of stress components, by ASE's own finite differences.

    The step is a compromise: the third derivative jumps by 2e3 eV/Angstrom^3 where the repulsion begins (3e-4 eV/Angstrom for
    this step), and single precision leaves an energy noise of about 1e-6 eV (5e-4 eV/Angstrom).
    """
    atoms = structure("small_cell")
    atoms.calc = calculator
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-3), atol=2e-3)
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-3), atol=3e-4)


class TestCaching:
    def test_nothing_is_computed_twice(self, counted):
        calculator, calls = counted
        atoms = structure("triclinic")
        atoms.calc = calculator
        for _ in range(2):
            atoms.get_forces(), atoms.get_potential_energy(), atoms.get_stress(), atoms.get_potential_energies()
        assert len(calls) == 1

    def test_energy_alone_runs_no_gradient(self, counted):
        calculator, calls = counted
        atoms = structure("ethanol")
        atoms.calc = calculator
        atoms.get_potential_energy()
        assert calls == [["energy", "atom_energy"]]
        atoms.get_forces()
        assert len(calls) == 2 and "forces" in calls[1]

    def test_one_evaluation_per_step_of_md(self, counted):
        calculator, calls = counted
        atoms = structure("ethanol")
        atoms.calc = calculator
        md = VelocityVerlet(atoms, 0.1 * units.fs)
        md.attach(lambda: (atoms.get_total_energy(), atoms.get_forces()))
        md.run(5)
        assert len(calls) == 6  # the first forces, and one for each step

    @pytest.mark.parametrize("change", ["positions", "cell", "pbc", "numbers", "number of atoms"])
    def test_changes_are_noticed(self, calculator, model, change):
        atoms = structure("triclinic")
        atoms.calc = calculator
        before = atoms.get_potential_energy()
        if change == "positions":
            atoms.positions[0, 0] += 0.05
        elif change == "cell":
            atoms.cell[0, 0] *= 1.01
        elif change == "pbc":
            atoms.pbc = [True, False, True]
        elif change == "numbers":
            atoms.numbers[0] = 6
        else:
            del atoms[-1]
        after = atoms.get_potential_energy()
        assert after != before
        assert after == pytest.approx(reference(model, atoms).energy, abs=1e-6 * len(atoms))

    def test_charges_and_magnetic_moments_do_not_matter(self, counted):
        calculator, calls = counted
        atoms = structure("ethanol")
        atoms.calc = calculator
        atoms.get_forces()
        atoms.set_initial_charges(np.ones(len(atoms)))
        atoms.get_forces()
        assert len(calls) == 1

    def test_results_are_not_those_of_the_caller(self, calculator):
        atoms = structure("ethanol")
        atoms.calc = calculator
        atoms.get_forces()[:] = 0.0
        assert abs(atoms.get_forces()).max() > 0.1

    def test_without_calculation(self, calculator):
        atoms = structure("ethanol")
        assert calculator.get_property("energy", atoms, allow_calculation=False) is None
        calculator.get_property("forces", atoms)
        assert calculator.get_property("energy", atoms, allow_calculation=False) is not None
        assert not calculator.calculation_required(atoms, ["energy", "forces"])
        assert calculator.calculation_required(atoms, ["stresses"])

    def test_results_are_those_of_the_last_structure(self, calculator, model):
        one, two = structure("ethanol"), structure("triclinic")
        calculator.calculate(one, ["forces"])
        calculator.calculate(two, ["energy"])
        np.testing.assert_allclose(calculator.get_property("forces", two), reference(model, two).forces, atol=1e-4)

    def test_two_systems_share_a_calculator(self, calculator, model):
        one, two = structure("ethanol"), structure("triclinic")
        one.calc = two.calc = calculator
        for _ in range(2):
            for atoms in (one, two):
                assert atoms.get_potential_energy() == pytest.approx(reference(model, atoms).energy, abs=1e-6 * len(atoms))


@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)), ids=lambda p: "".join("ft"[x] for x in p))
def test_every_combination_of_periodic_directions(calculator, model, pbc):
    atoms = structure("triclinic")
    atoms.pbc = pbc
    atoms.calc = calculator
    np.testing.assert_allclose(atoms.get_forces(), reference(model, atoms).forces, atol=1e-5)
    if not all(pbc):
        with pytest.raises(PropertyNotImplementedError, match="periodic in three directions, got pbc"):
            atoms.get_stress()
        with pytest.raises(PropertyNotImplementedError):
            atoms.get_stresses()
    assert atoms.get_stress().shape == (6,) if all(pbc) else True


def test_no_atoms(calculator):
    atoms = Atoms(cell=[9, 9, 9], pbc=True)
    atoms.calc = calculator
    assert atoms.get_potential_energy() == 0.0
    assert atoms.get_forces().shape == (0, 3)
    assert not atoms.get_stress().any()


class TestDynamics:
    def drift(self, calculator, timestep, length=40.0):
        atoms = structure("water_dimer")
        atoms.calc = calculator
        atoms.set_velocities(0.05 * np.random.default_rng(0).normal(size=(len(atoms), 3)))
        energies = []
        md = VelocityVerlet(atoms, timestep * units.fs)
        md.attach(lambda: energies.append(atoms.get_total_energy()))
        md.run(round(length / timestep))
        return np.std(energies) / len(atoms)

    def test_energy_is_conserved(self, calculator):
        """The error of velocity Verlet falls with the square of the step, if forces are the energy's gradient."""
        coarse, fine = self.drift(calculator, 0.2), self.drift(calculator, 0.1)
        assert coarse < 2e-3
        assert 3.3 < coarse / fine < 4.7

    def test_relaxation(self, calculator):
        atoms = structure("ethanol")
        atoms.calc = calculator
        before = atoms.get_potential_energy()
        BFGS(atoms, logfile=None).run(fmax=0.05, steps=5)
        assert atoms.get_potential_energy() < before

    def test_cell_relaxation(self, calculator):
        atoms = structure("triclinic")
        atoms.calc = calculator
        before = atoms.get_potential_energy()
        BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.05, steps=3)
        assert atoms.get_potential_energy() < before

    def test_constraints(self, calculator):
        atoms = structure("ethanol")
        atoms.calc = calculator
        atoms.set_constraint(FixAtoms([0]))
        assert not atoms.get_forces()[0].any()
        assert atoms.get_forces(apply_constraint=False)[0].any()


class TestStorage:
    def test_trajectory(self, calculator, tmp_path):
        atoms = structure("triclinic")
        atoms.calc = calculator
        energy, stress = atoms.get_potential_energy(), atoms.get_stress()
        with Trajectory(tmp_path / "a.traj", "w", atoms) as trajectory:
            trajectory.write()
        back = read(tmp_path / "a.traj")
        assert back.get_potential_energy() == energy
        np.testing.assert_array_equal(back.get_stress(), stress)
        assert back.calc.name == "mlff"

    def test_trajectory_without_stress(self, calculator, tmp_path):
        atoms = structure("wire")
        atoms.calc = calculator
        atoms.get_forces()
        with Trajectory(tmp_path / "a.traj", "w", atoms) as trajectory:
            trajectory.write()
        np.testing.assert_array_equal(read(tmp_path / "a.traj").get_forces(), atoms.get_forces())

    def test_extxyz(self, calculator, tmp_path):
        atoms = structure("triclinic")
        atoms.calc = calculator
        atoms.get_stress()
        write(tmp_path / "a.extxyz", atoms)
        np.testing.assert_allclose(read(tmp_path / "a.extxyz").get_forces(), atoms.get_forces(), atol=1e-7)

    def test_database(self, calculator, path, tmp_path):
        atoms = structure("ethanol")
        atoms.calc = calculator
        atoms.get_forces()
        with connect(tmp_path / "a.db") as db:
            row = db.get(id=db.write(atoms))
        assert row.calculator == "mlff"
        assert row.energy == atoms.get_potential_energy()
        assert row.calculator_parameters == {"model_path": str(path), "threads": 1, "sha256": calculator.sha256}

    def test_parameters(self, calculator, path):
        assert calculator.parameters == {"model_path": str(path), "device": "cpu", "threads": 1, "with_grade": False}
        assert calculator.todict(skip_default=False) == {**calculator.parameters, "sha256": calculator.sha256}
        assert len(calculator.sha256) == 64

    @pytest.mark.parametrize(
        "way", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "copy", "pickle"]
    )
    def test_copies_are_independent(self, calculator, way):
        atoms = structure("ethanol")
        atoms.calc = calculator
        forces = atoms.get_forces()
        other = way(calculator)
        assert other.parameters == calculator.parameters and other._system is not calculator._system
        assert other.get_property("forces", atoms, allow_calculation=False) is not None
        atoms.calc = None
        del calculator
        moved = structure("ethanol")
        moved.positions += 1.0
        np.testing.assert_allclose(other.get_property("forces", moved), forces, atol=1e-5)


class TestErrors:
    def test_unknown_element(self, calculator):
        atoms = Atoms("NaClO", positions=np.eye(3) * 2)
        with pytest.raises(ValueError, match="knows the elements H C O, not Cl Na"):
            calculator.get_property("energy", atoms)

    def test_nan(self, calculator):
        """After an error the calculator goes on with better input, and has no results of the bad one."""
        atoms = structure("ethanol")
        atoms.calc = calculator
        good = atoms.get_forces()
        atoms.positions[3, 1] = np.nan
        for _ in range(2):
            with pytest.raises(ValueError, match="(?i)nan|finite"):
                atoms.get_forces()
        atoms.positions = structure("ethanol").positions
        np.testing.assert_array_equal(atoms.get_forces(), good)

    def test_cell_that_spans_nothing(self, calculator):
        atoms = structure("ethanol")
        atoms.pbc = True
        with pytest.raises(ValueError, match="cell"):
            calculator.get_property("energy", atoms)

    def test_missing_file(self, tmp_path):
        with pytest.raises(MLFFFileError, match="none.pt"):
            MLFFCalculator(tmp_path / "none.pt")

    def test_foreign_file(self, tmp_path):
        (tmp_path / "a.pt").write_text("something else")
        with pytest.raises(MLFFFileError, match="a.pt"):
            MLFFCalculator(tmp_path / "a.pt")

    def test_unknown_device(self, path):
        with pytest.raises(RuntimeError, match="abacus"):
            MLFFCalculator(path, device="abacus")

    def test_unknown_parameter(self, path, calculator):
        with pytest.raises(ValueError, match="colour"):
            MLFFCalculator(path, colour="blue")
        with pytest.raises(ValueError, match="new calculator"):
            calculator.set(model_path="other.pt")
        with pytest.raises(TypeError, match="threads: expected a whole number, got 'two'"):
            MLFFCalculator(path, threads="two")

    def test_errors_are_one_line(self, calculator, tmp_path):
        for action in (lambda: MLFFCalculator(tmp_path / "none.pt"), lambda: calculator.get_property("energy", Atoms("Xe"))):
            with pytest.raises(Exception) as error:
                action()
            assert "\n" not in str(error.value)


def test_self_check(path):
    MLFFCalculator(path, self_check=True)


def test_threads_can_be_changed(calculator, model):
    atoms = structure("triclinic")
    atoms.calc = calculator
    one = atoms.get_forces()
    calculator.set(threads=2)
    np.testing.assert_allclose(atoms.get_forces(), one, atol=1e-5)
    assert calculator.parameters["threads"] == 2


@pytest.mark.parametrize("change", [{"threads": 5000}, {"device": "cuda:99"}])
def test_a_change_that_fails_changes_nothing(calculator, change):
    before = dict(calculator.parameters), calculator.device
    for _ in range(2):
        with pytest.raises((MLFFResourceError, MLFFInputError)):
            calculator.set(**change)
        assert (dict(calculator.parameters), calculator.device) == before


# ---- batches -----------------------------------------------------------------------------------------------------------

MIXED = ("ethanol", "triclinic", "slab", "single_atom", "small_cell", "wire", "water_box", "mixed_elements")
EVERYTHING = ("energy", "free_energy", "energies", "forces", "stress", "stresses")


def assert_as_single(calculator, structures, batch, atol=1e-12):
    """Each result of a batch is that of the structure alone."""
    assert len(batch) == len(structures)
    for atoms, found in zip(structures, batch):
        for name, value in found.items():
            wanted = calculator.get_property(name, atoms)
            assert type(value) is type(wanted) and np.shape(value) == np.shape(wanted)
            np.testing.assert_allclose(value, wanted, rtol=0, atol=atol * (len(atoms) if "energy" in name else 1), err_msg=name)


class TestBatches:
    def test_equals_single_evaluations(self, calculator, model):
        """Any composition and periodicity, structures without atoms among them, in the caller's order."""
        structures = [structure(name) for name in MIXED]
        structures[2:2] = [Atoms(), Atoms(cell=[9, 9, 9], pbc=True)]
        batch = calculator.calculate_batch(structures)
        assert [set(r) for r in batch] == [{"energy", "forces"} | ({"stress"} if a.pbc.all() else set()) for a in structures]
        assert_as_single(calculator, structures, batch)
        np.testing.assert_allclose(batch[0]["forces"], reference(model, structures[0]).forces, atol=1e-5)

    def test_every_property(self, calculator):
        structures = [structure(name) for name in MIXED if structure(name).pbc.all()]
        batch = calculator.calculate_batch(structures, EVERYTHING)
        assert all(set(r) == set(EVERYTHING) for r in batch)
        assert_as_single(calculator, structures, batch)
        assert [set(r) for r in calculator.calculate_batch(structures[:1], ["free_energy"])] == [{"free_energy"}]

    def test_nothing(self, calculator):
        assert calculator.calculate_batch([]) == []
        assert calculator.calculate_batch([Atoms()])[0]["forces"].shape == (0, 3)

    @pytest.mark.parametrize("limit", ["BATCH_ATOMS", "BATCH_CANDIDATES", "MAX_CANDIDATES"])
    def test_in_pieces(self, calculator, monkeypatch, limit):
        """Many structures, and such as are too large to share a call, are evaluated some at a time."""
        structures = [structure(name) for name in MIXED * 3]
        whole = calculator.calculate_batch(structures)
        monkeypatch.setattr(module, limit, {"BATCH_ATOMS": 40, "BATCH_CANDIDATES": 4000, "MAX_CANDIDATES": 60}[limit])
        sizes, evaluate = [], calculator._evaluate
        monkeypatch.setattr(calculator, "_evaluate", lambda s, names: sizes.append([len(a) for a in s]) or evaluate(s, names))
        pieces = calculator.calculate_batch(iter(structures))
        assert len(sizes) > 3 and sum(map(len, sizes)) == len(structures)
        if limit == "BATCH_ATOMS":
            assert all(sum(s) <= 40 or len(s) == 1 for s in sizes)
        for a, b in zip(whole, pieces):
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-12)

    def test_the_calculator_keeps_its_own_results(self, calculator):
        atoms, other = structure("ethanol"), structure("triclinic")
        atoms.calc = calculator
        forces = atoms.get_forces()
        calculator.calculate_batch([other, other])
        assert not calculator.calculation_required(atoms, ["forces"])
        np.testing.assert_array_equal(atoms.get_forces(), forces)

    def test_stress_that_does_not_exist(self, calculator):
        structures = [structure("triclinic"), structure("slab")]
        for name in ("stress", "stresses"):
            with pytest.raises(PropertyNotImplementedError, match="structure 1, .*: stress needs a cell .* got pbc"):
                calculator.calculate_batch(structures, ["energy", name])

    def test_errors_name_the_structure(self, calculator):
        """And the same calculator goes on with better input."""
        good = structure("ethanol")
        not_finite, flat, unknown, touching = good.copy(), good.copy(), good.copy(), good.copy()
        not_finite.positions[3, 1] = np.nan
        flat.pbc = True
        unknown.symbols[4] = "Fe"
        touching.positions[1] = touching.positions[0]
        cases = [(not_finite, "finite|NaN"), (flat, "cell"), (unknown, "elements H C O, not Fe"), (touching, "same place")]
        for bad, words in cases:
            with pytest.raises(ValueError, match=f"structure 2, .*({words})") as error:
                calculator.calculate_batch([good, structure("triclinic"), bad, good])
            assert "\n" not in str(error.value) and str(error.value).count("structure") == 1
            assert_as_single(calculator, [good], calculator.calculate_batch([good]))

    def test_unknown_property(self, calculator):
        with pytest.raises(ValueError, match=r"properties must be out of energy .*; got \['dipole'\]"):
            calculator.calculate_batch([structure("ethanol")], ["dipole"])
        with pytest.raises(TypeError, match="expected a list of Atoms, got one"):
            calculator.calculate_batch(structure("ethanol"))


# ---- devices -----------------------------------------------------------------------------------------------------------


def test_device_without_code_for_it(path):
    """A file for CPUs alone: "auto" takes the CPU wherever it runs, and a GPU that is asked for is one clear error."""
    calculator = MLFFCalculator(path, device="auto")
    assert calculator.device == "cpu" and calculator.parameters["device"] == "auto"
    with pytest.raises(MLFFResourceError) as error:
        MLFFCalculator(path, device="cuda:0")
    assert "\n" not in str(error.value)


def test_batches_on_a_stand_in_for_a_gpu(fake, parts, tmp_path, monkeypatch):
    """The way through the GPU without one (fake_gpu.py): small structures at once, a large one alone; errors."""
    path = tmp_path / "model.pt"
    path.write_bytes(packed(parts))
    calculator, structures = MLFFCalculator(path, device="cuda"), []
    for n, length, pbc in ((12, 7.0, False), (40, 6.0, True), (250, 12.0, True), (1, 9.0, True), (30, 6.5, [True, True, False])):
        numbers, positions = atoms_of(n, length)
        structures.append(Atoms(numbers, positions, cell=[[length, 0, 0], [1, length, 0], [0, 0.5, 1.1 * length]], pbc=pbc))
    structures.insert(2, Atoms())
    monkeypatch.setattr(module, "MAX_CANDIDATES", 1000)
    assert [len(chunk) for chunk in calculator._chunks(structures)] == [5, 1]
    batch = calculator.calculate_batch(structures)
    energies = calculator.calculate_batch(structures, ["energies"])
    assert_as_single(calculator, structures, batch, atol=1e-4)
    for atoms, found, more in zip(structures, batch, energies):
        if len(atoms):
            wanted = expected(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
            assert_close({"energy": found["energy"], "forces": found["forces"], "atom_energy": more["energies"]}, wanted)
    structures[3].positions[7] = structures[3].positions[8]
    with pytest.raises(ValueError, match="structure 3, .*: atoms .* same place"):
        calculator.calculate_batch(structures)


@pytest.fixture(scope="module")
def gpu_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "model.pt"
    path.write_bytes(build_payload(model, {}, architectures()))
    return path


@pytest.mark.gpu
class TestOnAGPU:
    def test_devices(self, gpu_path):
        for device, where in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
            calculator = MLFFCalculator(gpu_path, device, self_check=True)
            assert calculator.device == where and calculator.parameters["device"] == device
        with pytest.raises(MLFFResourceError):
            MLFFCalculator(gpu_path, "cuda:99")

    def test_device_can_be_changed(self, gpu_path):
        calculator = MLFFCalculator(gpu_path)
        atoms = structure("triclinic")
        atoms.calc = calculator
        forces, stress = atoms.get_forces(), atoms.get_stress()
        calculator.set(device="cuda:0")
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-5)
        np.testing.assert_allclose(atoms.get_stress(), stress, atol=1e-6)
        assert copy.deepcopy(calculator).device == "cuda:0"

    def test_batches(self, gpu_path, model):
        """Against the reference, and against one after the other; twice, with others between, as memory is used again."""
        calculator = MLFFCalculator(gpu_path, "cuda:0")
        structures = [structure(name) for name in MIXED * 4] + [Atoms()]
        for atoms in structures[len(MIXED):-1]:
            atoms.rattle(0.02, seed=len(atoms))
        for _ in range(2):
            batch = calculator.calculate_batch(structures)
            assert_as_single(calculator, structures, batch, atol=1e-5)
            for atoms, found in zip(structures[:len(MIXED)], batch):
                expected = reference(model, atoms)
                assert found["energy"] == pytest.approx(expected.energy, abs=1e-6 * len(atoms))
                np.testing.assert_allclose(found["forces"], expected.forces, atol=1e-5)
            calculator.calculate_batch([structure("water_box")], ["energy"])
        solid = [a for a in structures if len(a) and a.pbc.all()]
        assert_as_single(calculator, solid, calculator.calculate_batch(solid, EVERYTHING), atol=1e-5)

    def test_in_pieces(self, gpu_path, monkeypatch):
        calculator = MLFFCalculator(gpu_path, "cuda:0")
        structures = [structure(name) for name in MIXED * 3]
        monkeypatch.setattr(module, "BATCH_ATOMS", 100)
        monkeypatch.setattr(module, "MAX_CANDIDATES", 150)
        assert_as_single(calculator, structures, calculator.calculate_batch(structures), atol=1e-5)

    def test_many_small_molecules(self, gpu_path):
        """More than one call's worth."""
        calculator, rng = MLFFCalculator(gpu_path, "cuda:0"), np.random.default_rng(0)
        structures = [structure("ethanol") for _ in range(3000)]
        for atoms in structures:
            atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        batch = calculator.calculate_batch(structures, ["forces"])
        for k in (0, 1500, 2999):
            np.testing.assert_allclose(batch[k]["forces"], calculator.get_property("forces", structures[k]), atol=1e-5)

    def test_errors_name_the_structure(self, gpu_path):
        calculator, good, bad = MLFFCalculator(gpu_path, "cuda:0"), structure("ethanol"), structure("ethanol")
        bad.positions[3, 1] = np.nan
        with pytest.raises(ValueError, match="structure 1, .*(finite|NaN)"):
            calculator.calculate_batch([good, bad, good])
        assert_as_single(calculator, [good], calculator.calculate_batch([good]), atol=1e-5)
