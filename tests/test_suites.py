"""The suites of mlff validate: each number against a case with a known answer, and every suite end to end in its quick setting."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.phonons import Phonons
from scipy.spatial.transform import Rotation
from toys import QUICK, Broken, Spring, argon, job

from mlff import cli
from mlff.ase import MLFFCalculator
from mlff.export import export
from mlff.train.teachers import load_teacher, of_calculator
from mlff.validate import Settings, checks, crystal, measurement, organics, reference, validate, water
from mlff.validate.measurement import Breakdown, Job


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(checks, "NVE_STEPS", 50)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return export("ethanol-water", tmp_path_factory.mktemp("student") / "model.pt", architectures=())


# ---- water -------------------------------------------------------------------------------------------------------------


def test_water_of_a_teacher_by_reweighting(student, tmp_path, monkeypatch):
    """A teacher that is the model itself has the model's averages, to the rounding of a sum with equal weights against a mean."""
    model = MLFFCalculator(student)
    teacher = of_calculator(model, {"name": "Itself"}, elements=frozenset({1, 8}))
    path = tmp_path / "itself.json"
    monkeypatch.setitem(water.MODEL_PARTS, "conservation", lambda job: {"error": "left out"})
    data = reference(teacher, "water", path, QUICK, sampler=student)
    assert data["source"]["reweighted_from"] == model.sha256 and "error" not in data["parts"]["labels"]["molecule 0"]
    report = validate(student, report=tmp_path / "r.html", suite="water", reference_file=path, settings=QUICK)
    rows, parts, mine = by_name(report.checks), data["parts"], report.measured
    assert parts["liquid"]["effective"] == pytest.approx(10) and parts["pressure"]["frames"] == 8
    for pair, peak in mine["liquid"]["peaks"].items():
        for key, value in peak.items():
            assert parts["liquid"]["peaks"][pair][key] == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert parts["liquid"]["rdf"] == mine["liquid"]["rdf"]
    assert parts["pressure"]["density"] == pytest.approx(mine["pressure"]["density"], rel=1e-12)
    assert rows["O-O peak, height, deviation"].value < 1e-9 and rows["density, deviation"].value < 1e-9
    assert "diffusion, deviation" not in rows and parts["liquid"]["diffusion"] is None
    page = (tmp_path / "r.html").read_text()
    assert "10 frames of which reweighted (to first order" in page and "reweighted from" in page
    # a teacher from which nothing could be had is said to be missing
    data["parts"]["pressure"] = {"error": "reweighting: 200 frames are worth 3"}
    path.write_text(json.dumps(data))
    rows = by_name(validate(student, suite="water", reference_file=path, settings=QUICK).checks)
    assert "200 frames are worth 3" in rows["pressure, Itself"].note and rows["pressure, Itself"].passed is None
    with pytest.raises(ValueError, match="expected a measurement with source Itself"):
        reference(teacher, "water", path, QUICK)


def test_rdf_of_an_ideal_gas_is_one_and_of_a_lattice_its_shells():
    rng, cell = np.random.default_rng(0), np.array([[10.0, 0, 0], [2, 9, 0], [0, -1, 9]])
    positions = rng.random((40, 200, 3)) @ cell + rng.integers(-3, 4, (40, 200, 3)) @ cell  # any image will do
    a, b = np.arange(100), np.arange(100, 200)
    for first, second in ((a, b), (a, a)):
        radii, g = water.rdf(positions, np.repeat(cell[None], 40, 0), first, second, 4.0)
        shell = 4 * np.pi * radii**2
        assert np.average(g, weights=shell) == pytest.approx(1, abs=0.01)
        assert np.average(g[radii > 3], weights=shell[radii > 3]) == pytest.approx(1, abs=0.015)
    fcc = bulk("Cu", a=4.0, cubic=True).repeat(3)
    radii, g = water.rdf(fcc.positions[None], fcc.cell.array[None], np.arange(108), np.arange(108), 6.0)
    neighbours = (g * 4 * np.pi * radii**2 * water.BIN)[radii < 3.4].sum() * 107 / fcc.get_volume()
    assert neighbours == pytest.approx(12, rel=1e-3)
    position, _ = water.peak(radii, g, (2.5, 3.2))
    assert position == pytest.approx(4 / np.sqrt(2), abs=water.BIN)


def test_pairs_of_one_molecule_are_left_out():
    box = water.box(2, np.random.default_rng(0))
    o, h = np.flatnonzero(box.numbers == 8), np.flatnonzero(box.numbers == 1)
    for exclude, found in ((None, True), (np.arange(24) // 3, False)):
        radii, g = water.rdf(box.positions[None], box.cell.array[None], o, h, 3.0, exclude)
        assert (g[radii < 1.1].sum() > 0) == found


def test_peak_of_a_smooth_curve():
    radii = np.arange(0.01, 6, 0.02)
    g = 1 + 1.6 * np.exp(-(((radii - 2.793) / 0.15) ** 2))
    position, height = water.peak(radii, g, (2.4, 3.3))
    assert position == pytest.approx(2.793, abs=2e-3) and height == pytest.approx(2.6, abs=0.05)


def test_diffusion_of_a_random_walk():
    rng, every, d = np.random.default_rng(1), 0.02, 0.25
    positions = np.cumsum(rng.normal(0, np.sqrt(2 * d * every), (800, 125, 3)), axis=0)
    drifting = positions + np.linspace(0, 50, 800)[:, None, None]  # of the whole, which is no diffusion
    for x in (positions, drifting):
        value, error = water.diffusion(x, every)
        assert abs(value - d * 124 / 125) < 3 * error and error < 0.05
    msd = water.mean_square_displacement(positions, np.array([0, 10]))
    assert msd[0] == 0 and msd[1] == pytest.approx(6 * d * 10 * every, rel=0.05)


def test_correction_for_the_size_of_the_box():
    # Yeh and Hummer (2004), table: about 0.07 Angstrom^2/ps for water in a box of 12.4 Angstrom
    result = {"diffusion": 0.2, "edge": 12.42}
    assert water.corrected(result) - 0.2 == pytest.approx(0.0588, abs=0.001)
    assert water.corrected({"diffusion": None, "edge": 12.0}) is None


def test_liquid_of_the_general_checks():
    """The frames that are shipped: whole molecules at the experimental density, no two frames alike, close but not too close."""
    frames = water.samples(measurement.Job(EMT(), ["H", "O"], Settings()))
    liquid = [atoms for atoms in frames.values() if atoms.info["kind"] == "liquid"]
    assert len(frames) == 12 and len(liquid) == 6
    for atoms in liquid:
        assert atoms.get_chemical_formula() == "H128O64" and atoms.pbc.all()
        assert water.density(atoms.get_masses(), atoms.cell.array[None])[0] == pytest.approx(water.DENSITY)
        bonds = [atoms.get_distance(o, o + h) for o in range(0, 192, 3) for h in (1, 2)]
        oxygen = atoms[atoms.numbers == 8].get_all_distances(mic=True) + 9 * np.eye(64)
        assert 0.85 < min(bonds) and max(bonds) < 1.15 and 2.3 < oxygen.min() < 2.8
    assert all(abs(a.positions - b.positions).max() > 1 for a, b in zip(liquid, liquid[1:]))


def test_water_box():
    box = water.box(4, np.random.default_rng(0))
    assert len(box) == 192 and water.density(box.get_masses(), box.cell.array[None])[0] == pytest.approx(water.DENSITY)
    assert box.cell[0, 0] == pytest.approx(12.42, abs=0.02)
    assert box.get_distances(0, [1, 2], mic=True) == pytest.approx([0.9686, 0.9686], abs=1e-3)


# ---- crystal -----------------------------------------------------------------------------------------------------------


def test_argon_obeys_the_relations_of_a_pair_potential():
    here = job(argon(), "Ar")
    lattice, c = crystal.lattice(here), crystal.elasticity(here)
    assert lattice["a0"] == pytest.approx(1.5427 * 3.4, rel=2e-3)  # fcc Lennard-Jones at zero pressure
    assert lattice["b"] == pytest.approx(75.2 * 0.0104 / 3.4**3 / units.GPa, rel=0.02)
    assert c["c12"] == pytest.approx(c["c44"], rel=1e-3)  # Cauchy
    assert (c["c11"] + 2 * c["c12"]) / 3 == pytest.approx(lattice["b"], rel=0.01)
    assert c["deviation"] < 1e-6


def test_copper_of_emt():
    here = job(EMT(), "Cu")
    c = crystal.elasticity(here)
    assert [c["c11"], c["c12"], c["c44"]] == pytest.approx([173, 116, 90], abs=1.5)  # GPa, ase's documentation of EMT
    bands = crystal.phonons(here)
    top, labels = np.array(bands["bands"]).max(), bands["labels"]
    assert labels[0] == "G" and np.abs(bands["bands"][0]).max() < 0.05 and top == pytest.approx(8.14, abs=0.1)  # THz
    total = np.trapezoid(bands["dos"], bands["dos_frequencies"])
    assert total == pytest.approx(3, rel=0.05)  # three branches


def test_phonons_between_the_wave_vectors_of_the_supercell(tmp_path):
    cell, results = bulk("Cu", "fcc", a=4.0), {}
    potential = MorsePotential(rho0=2.5, r0=3.0, epsilon=1.0, rcut1=6.0, rcut2=9.0)  # reaches beyond the supercell
    fitting = np.array([[1, 0, 0], [2, 1, 0], [1, 1, -1]]) / 3
    near = np.linspace(0, 0.1, 11)[1:, None] * [1, 1, 0]  # nearer to the origin than any that fits
    for kind in (Phonons, crystal.NearestImages):
        run = kind(cell, potential, supercell=(3, 3, 3), delta=0.01, name=str(tmp_path / "phonon"))
        run.run()
        run.read(acoustic=True)
        speed = run.band_structure(near, verbose=False) / near[:, :1]
        results[kind] = run.band_structure(fitting), np.ptp(speed, axis=0) / speed.mean(0)
    assert results[crystal.NearestImages][0] == pytest.approx(results[Phonons][0], abs=1e-7)
    # sound has one speed, as long as every pair acts over its nearest images
    assert results[crystal.NearestImages][1].max() < 0.05 < results[Phonons][1].max()


def test_phonons_of_a_cell_with_a_basis(tmp_path):
    found = []
    for cubic, size in ((False, 5), (True, 3)):
        cell = bulk("Cu", "fcc", a=3.59, cubic=cubic)
        run = crystal.NearestImages(cell, EMT(), supercell=(size,) * 3, delta=0.01, name=str(tmp_path / f"phonon{size}"))
        run.run()
        run.read(acoustic=True)
        waves = np.linspace(0.05, 0.45, 5)[:, None] * [1.0, 0.4, 0.0]  # of the cube
        found.append(run.band_structure(waves @ cell.cell.array.T / 3.59, verbose=False))
    apart = abs(found[0][:, :, None] - found[1][:, None])  # the four atoms of the cube have these bands and folded ones
    assert apart.min(2).max() < 0.01 * found[0].max()


def test_a_crystal_that_wants_another_lattice_is_followed_or_refused():
    here = job(argon(), "Ar", crystal=bulk("Ar", "fcc", a=5.6))
    assert crystal.lattice(here)["a0"] == pytest.approx(1.5427 * 3.4, rel=2e-3)
    with pytest.raises(Breakdown, match="no minimum of the energy"):
        crystal.lattice(job(argon(), "Ar", crystal=bulk("Ar", "fcc", a=12.0)))


@pytest.mark.parametrize("kind, a", [("fcc", 4.0), ("bcc", 3.2), ("sc", 2.5)])
def test_lattice_constant_of_primitive_and_conventional_cells(kind, a):
    assert crystal.lattice_constant(bulk("Cu", kind, a=a)) == pytest.approx(a)
    assert crystal.lattice_constant(bulk("Cu", kind, a=a, cubic=True)) == pytest.approx(a)


def test_cells():
    assert crystal.unit_cell(["O", "Mg"]).get_chemical_formula() == "MgO"
    with pytest.raises(ValueError, match=r"no cubic crystal of H C O; .*--cell"):
        crystal.unit_cell(["H", "C", "O"])
    with pytest.raises(ValueError, match="cubic"):
        crystal.unit_cell(["Zn"], bulk("Zn"))
    with pytest.raises(ValueError, match="periodic"):
        crystal.unit_cell(["Cu"], Atoms("Cu"))


# ---- organics ----------------------------------------------------------------------------------------------------------


def test_frequency_of_a_spring():
    atoms = Atoms("OH", [[0, 0, 0], [0.6, 0, 0.8]])
    found = organics.frequencies(atoms, job(Spring(k=45.0), "O", "H"))
    reduced = np.prod(atoms.get_masses()) / atoms.get_masses().sum()
    expected = np.sqrt(45.0 * units._e / 1e-20 / (reduced * units._amu)) / (2 * np.pi * units._c * 100)
    assert len(found) == 1 and found[0] == pytest.approx(expected, rel=1e-4)


def test_modes_of_a_bent_molecule_and_imaginary_ones():
    water = molecule("H2O")
    found = organics.frequencies(water, job(Spring(k=45.0, r0=water.get_distance(0, 1)), "O", "H"))
    assert len(found) == 3 and abs(found[0]) < 30 and found[1] > 3000  # no force against bending
    squeezed = organics.frequencies(water, job(Spring(k=45.0, r0=2.0), "O", "H"))
    assert squeezed[0] < -100


def test_atoms_beyond_a_bond():
    ethanol = organics.conformer_structures()["ethanol"][0]
    assert ethanol.info["torsion"].tolist() == [0, 1, 2, 8]
    assert organics.beyond_bond(ethanol, 1, 2) == [2, 8]
    with pytest.raises(ValueError, match="ring"):
        organics.beyond_bond(molecule("C6H6"), 0, 1)


def test_structures_are_what_they_should_be():
    molecules, g2 = organics.conformer_structures(), organics.g2_molecules()
    assert {s for frames in molecules.values() for atoms in frames for s in atoms.symbols} == set("H C N O F S Cl P Br".split())
    assert len(molecules) == 24 and "CH3" not in g2 and "O2" not in g2 and "H" not in g2 and "C6H6" in g2
    for name, frames in molecules.items():
        assert len({str(atoms.symbols) for atoms in frames}) == 1
        for a, b in zip(frames, frames[1:]):
            assert organics.rmsd(a.positions, b.positions, a.numbers) > 0.2, name


def test_rmsd_is_blind_to_motions_of_the_whole():
    atoms = molecule("CH3CH2OH")
    moved = atoms.positions @ Rotation.random(random_state=0).as_matrix().T + 3
    assert organics.rmsd(atoms.positions, moved, atoms.numbers) < 1e-6
    stretched = 1.1 * atoms.positions
    assert organics.rmsd(atoms.positions, stretched, atoms.numbers) > 0.1


def test_interactions_are_those_of_the_complex_minus_its_parts():
    lj = LennardJones(sigma=2.0, epsilon=0.01, rc=30.0)
    found = organics.interactions(Job(lj, ["H", "O"], QUICK))["Water_dimer"]["energies"]
    assert len(found) == 5 and found[1] < found[3] < found[4] < 0  # attraction that fades
    assert abs(found[4]) < 0.01


# ---- comparison --------------------------------------------------------------------------------------------------------


def by_name(rows):
    return {check.name: check for check in rows}


def test_deviations_are_judged_by_the_bars():
    mine = {"formula": "Cu", "volumes": [1, 2], "energies": [0, 1], "e0": 0.0, "a0": 4.02, "b": 109.0}
    theirs = {**mine, "a0": 4.0, "b": 100.0}
    elastic = {"c11": 170.0, "c12": 110.0, "c44": -1.0, "deviation": 0.0}
    rest = {"phonons": {"error": "no"}, "stability": {"error": "lost"}}
    rows = by_name(
        crystal.compare({"lattice": mine, "elasticity": elastic, **rest}, {"lattice": theirs, "elasticity": elastic}, "EMT")
    )
    assert rows["lattice constant, deviation"].value == pytest.approx(0.5) and not rows["lattice constant, deviation"].passed
    assert rows["bulk modulus, deviation"].value == pytest.approx(9.0) and not rows["bulk modulus, deviation"].passed
    assert rows["elastic stability"].passed is False and rows["bulk modulus, two ways"].passed is False
    assert rows["phonons"].passed is False and "lost" in rows["stability"].note


def test_conformers_are_compared_about_their_mean_and_other_minima_are_named():
    frames = organics.conformer_structures()["butane"]
    positions = [atoms.positions.tolist() for atoms in frames]
    energies = np.array([0.0, 1.0, 2.0]) * organics.KCAL
    theirs = {"butane": {"energies": (energies + 7).tolist(), "positions": positions}}
    mine = {"butane": {"energies": (energies * 2).tolist(), "positions": [positions[1], positions[1], positions[2]]}}
    rows = by_name(organics._conformers(mine, theirs, "T"))
    assert (
        rows["relative conformer energy, MAE"].value == pytest.approx(2 / 3) and not rows["relative conformer energy, MAE"].passed
    )
    assert "1 of 3 differ" in rows["geometry of minima"].note
    mine["pentane"] = {"error": "ran away"}
    check = organics._conformers(mine, theirs, "T")[0]
    assert check.value == 1 and check.passed is False and "pentane: ran away" in check.note


def test_frequencies_are_paired_and_a_bent_molecule_is_none_that_is_linear():
    theirs = {"CO2": {"frequencies": [600.0, 600.0, 1300.0, 2300.0]}, "H2": {"frequencies": [4400.0]}}
    mine = {"CO2": {"frequencies": [600.0, 1300.0, 2300.0]}, "H2": {"frequencies": [4300.0]}}
    rows = by_name(organics._vibrations(mine, theirs, "T"))
    assert rows["harmonic frequencies, MAE"].value == pytest.approx(100) and rows["linear molecules"].passed is False
    assert rows["zero-point energy, MAE"].value == pytest.approx(50 * 2.8591e-3, rel=1e-3)  # kcal/mol of a wavenumber
    mine["H2"]["frequencies"] = [-50.0]
    assert organics._vibrations(mine, theirs, "T")[-1].passed is False


def test_a_drift_is_judged_beyond_its_error():
    run = {"ps": 5.0, "timestep": 0.5, "formula": "H2O", "temperature": 300.0, "times": [0.0, 1.0], "energies": [0.0, 0.1]}
    for slope, error, passed in ((9.0, 1.0, False), (9.0, 4.2, None), (0.1, 1.0, None), (-0.5, 0.1, True)):
        rows = by_name(checks.conservation({"conservation": {**run, "drift": slope, "drift_error": error}}))
        assert rows["energy drift, beyond doubt"].passed is passed and rows["energy drift, longer"].value == abs(slope)
    assert checks.conservation({"conservation": {"error": "exploded"}})[0].passed is False


def test_water_deviations():
    peaks = {pair: {"position": 2.8, "height": 2.5, "errors": [0.001, 0.01]} for pair in water.PAIRS}
    liquid = {
        "molecules": 64, "ps": 10.0, "temperature": 300.0, "edge": 12.42, "longest_bond": 1.2, "radii": [1.0, 5.0], "peaks": peaks,
        "rdf": {pair: [0.0, 1.0] for pair in water.PAIRS}, "lag": [0.0, 1.0], "msd": [0.0, 1.5], "diffusion": 0.2,
        "diffusion_error": 0.02,
    }  # fmt: skip
    pressure = {
        "molecules": 64,
        "ps": 10.0,
        "temperature": 300.0,
        "density": 1.0,
        "density_error": 0.01,
        "times": [0, 1],
        "series": [1, 1],
    }
    other = json.loads(json.dumps(liquid))
    other["peaks"]["O-O"].update(position=2.77, height=2.4)
    rows = by_name(
        water.compare({"liquid": liquid, "pressure": pressure}, {"liquid": other, "pressure": {**pressure, "density": 0.97}}, "T")
    )
    assert rows["O-O peak, position, deviation"].value == pytest.approx(0.03) and not rows["O-O peak, position, deviation"].passed
    assert (
        rows["O-O peak, height, deviation"].value == pytest.approx(4.1667, abs=1e-3) and rows["O-O peak, height, deviation"].passed
    )
    assert rows["density, deviation"].passed is False and rows["density, deviation"].value == pytest.approx(3.09, abs=0.01)
    assert rows["O-H peak, position, deviation"].passed is None  # no bar


# ---- end to end --------------------------------------------------------------------------------------------------------


def test_crystal_beside_a_teacher(tmp_path):
    teacher = load_teacher("ase.calculators.emt:EMT")
    report = validate(EMT(), report=tmp_path / "r.html", suite="crystal", teacher=teacher, settings=quick_copper(tmp_path))
    assert report.passed, [check for check in report.checks if check.passed is False]
    rows, page = by_name(report.checks), (tmp_path / "r.html").read_text()
    assert rows["forces, MAE"].value < 1e-2 and rows["phonon frequencies, MAE"].value < 1e-6
    assert page.count("data:image/png;base64,") == sum(check.figure is not None for check in report.checks) >= 8
    text = re.sub(r"base64,[^\"]+", "", page)
    assert "http" not in text and "src=" not in text.replace('src="data:', "") and "<link" not in text
    for text in ("Born", "GPa", "meV/Å", "against EMT", "A quick run"):
        assert text in page, text
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["measured"]["lattice"]["a0"] == pytest.approx(3.59, abs=0.01) and data["reference"]["name"] == "EMT"
    assert (tmp_path / "emt-crystal.json").is_file() and not list(tmp_path.glob("*.partial*"))


def quick_copper(folder):
    bulk("Cu", a=3.6).write(folder / "cu.xyz", format="extxyz")
    return Settings(quick=True, cell=str(folder / "cu.xyz"))


@pytest.mark.slow
def test_organics_and_water_of_the_shipped_student(student, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "NVE_STEPS", 400)
    for suite, least in (("organics", 20), ("water", 15)):
        report = validate(student, report=tmp_path / f"{suite}.html", suite=suite, settings=QUICK)
        assert len(report.checks) > least and report.suite == suite
        bad = {check.name for check in report.checks if check.passed is False}
        assert bad <= {"close contact H-H"}, bad
    again = validate(student, suite="water", settings=QUICK)
    assert again.measured == report.measured  # deterministic
    assert [(c.name, c.value, c.note) for c in again.checks] == [(c.name, c.value, c.note) for c in report.checks]


@pytest.mark.parametrize("suite", ["organics", "water", "crystal"])
def test_a_model_that_breaks_down_gets_a_report_that_says_so(suite, tmp_path):
    cell = quick_copper(tmp_path).cell if suite == "crystal" else None
    report = validate(Broken(), report=tmp_path / "r.html", suite=suite, settings=Settings(quick=True, cell=cell))
    page = (tmp_path / "r.html").read_text()
    assert not report.passed and "<h1>Failed" in page and "What failed" in page
    sections = {check.section for check in report.checks if check.passed is False}
    assert len(sections) >= 3, sections
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_bad_input(student, tmp_path):
    emt = load_teacher("ase.calculators.emt:EMT")
    with pytest.raises(ValueError, match="no cubic crystal of H C O"):
        validate(student, suite="crystal", settings=QUICK)
    with pytest.raises(ValueError, match="suite organics needs the elements C H, known are Cu"):
        reference(SimpleNamespace(elements={29}, periodic=True, provenance={"name": "T"}), "organics", tmp_path / "a.json")
    with pytest.raises(ValueError, match="takes no periodic cells, the suite water"):
        reference(SimpleNamespace(elements={1, 8}, periodic=False, provenance={"name": "T"}), "water", tmp_path / "a.json")
    with pytest.raises(ValueError, match="in the suite water, got the suite crystal; leave the model out"):
        reference(emt, "crystal", tmp_path / "a.json", sampler=student)
    with pytest.raises(ValueError, match="suite water needs the elements H O, known are Cu"):
        copper = EMT()
        copper.species = ["Cu"]
        reference(
            SimpleNamespace(elements={1, 8}, periodic=True, provenance={"name": "T"}), "water", tmp_path / "a.json", sampler=copper
        )
    with pytest.raises(ValueError, match="unknown suite 'metal'"):
        validate(student, suite="metal")
    with pytest.raises(ValueError, match="neither"):
        validate(student)
    with pytest.raises(ValueError, match="belong to a suite"):
        validate(student, [molecule("H2O")], teacher=emt)
    with pytest.raises(ValueError, match="cell belongs to the suite crystal"):
        validate(student, suite="water", settings=Settings(cell="x.cif"))
    (tmp_path / "text.json").write_text("no json")
    with pytest.raises(ValueError, match="text.json is no JSON file"):
        validate(student, suite="water", reference_file=tmp_path / "text.json", settings=QUICK)
    with pytest.raises(FileNotFoundError):
        validate(student, suite="water", reference_file=tmp_path / "none.json", settings=QUICK)


def test_a_reference_must_fit(student, tmp_path):
    path, head = (
        tmp_path / "ref.json",
        {"format": measurement.FORMAT, "suite": "water", "source": {"name": "T"}, "species": ["H", "O"]},
    )
    settings = {"quick": False, "seed": 0, "ps": None, "cell": None}
    for changed, match in (
        ({"suite": "organics"}, "suite organics, expected water"),
        ({"settings": settings}, "made with quick False, the model is asked with quick True"),
        ({"settings": {**settings, "quick": True, "ps": 3.0}}, "not finished, labels liquid pressure is missing"),
    ):
        path.write_text(json.dumps({**head, "settings": settings, "parts": {}, **changed}))
        with pytest.raises(ValueError, match=match):
            validate(student, suite="water", reference_file=path, settings=QUICK)


def test_commands(student, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bulk("Cu", a=3.6).write("cu.xyz", format="extxyz")
    options = ["--suite", "crystal", "--quick", "--cell", "cu.xyz", "--device", "cpu"]
    assert cli.main(["reference", "ase.calculators.emt:EMT", *options, "-o", "cu.json"]) == 0
    assert "labels" in json.loads((tmp_path / "cu.json").read_text())["parts"]
    bulk("Cu", a=3.6, cubic=True).write("cube.xyz", format="extxyz")
    with pytest.raises(ValueError, match="reference is a cell of Cu, the model is asked for one of Cu4"):
        validate(EMT(), suite="crystal", reference_file="cu.json", settings=Settings(quick=True, cell="cube.xyz"))
    for arguments, message in (
        (["validate", str(student), *options], "not Cu"),
        (["validate", str(student), "--suite", "water", "--teacher", "nobody"], "unknown teacher 'nobody'"),
        (["validate", str(student), "--suite", "water", "--reference", "cu.json"], "suite crystal, expected water"),
        (["validate", str(student), "--suite", "crystal", "--cell", "none.cif"], "none.cif: no such file"),
        (["validate", str(student)], "neither"),
        (
            ["reference", "ase.calculators.emt:EMT", *options, "--reweight", str(student), "-o", "b.json"],
            "reweighting gives averages",
        ),
    ):
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["validate", str(student), "--suite", "water", "--ps", "-1"])
    assert "-1" in capsys.readouterr().err
