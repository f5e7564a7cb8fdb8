"""The general checks: what can be asked of any model on any structures.

Each check is a function of a :class:`Case` that returns :class:`Check` rows; :data:`CHECKS` lists them in the order of the report.
To add one, write the function and add it to the list.
"""

import io
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Callable, Dict, List, Optional

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from ase.stress import voigt_6_to_full_3x3_stress
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation
from scipy.stats import spearmanr

from .measurement import block_error, drift, thermalize

NVE_STEPS, NVE_TIMESTEP, NVE_TEMPERATURE = 1000, 0.5, 300.0  # fs, K


@dataclass
class Check:
    """One row of the report.

    Attributes:
        name: what was measured.
        value: the number, in ``unit``; None where it could not be measured, with the reason in ``note``.
        limit: largest value that passes; None for a number that is reported without judgement.
        note: how it was measured and what it is compared with, or what went wrong.
        figure: PNG picture or None.
        passed: whether value <= limit; None without a limit; False for a check that could not be carried out.
        section: heading under which the report shows it.
        error: standard error of the value; None where there is none.
    """

    name: str
    value: Optional[float]
    unit: str = ""
    limit: Optional[float] = None
    note: str = ""
    figure: Optional[bytes] = field(default=None, repr=False)
    passed: Optional[bool] = None
    section: str = ""
    error: Optional[float] = None

    def __post_init__(self):
        if self.value is not None:
            self.value = float(self.value)
            self.error = None if self.error is None or not np.isfinite(self.error) else float(self.error)
            if self.limit is not None:
                self.passed = self.value <= self.limit


def conservation(mine: Dict[str, dict]) -> List[Check]:
    """Rows of the part ``conservation`` (measurement.nve) of a model."""
    result, section = mine["conservation"], "Energy conservation, longer"
    if "error" in result:
        return [Check("energy drift, longer", None, note=str(result["error"]), passed=False, section=section)]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(result["times"], result["energies"], lw=0.8)
    axes.set(xlabel="time, ps", ylabel="total energy, meV/atom")
    slope, error = result["drift"], result["drift_error"]
    what = f"{result['formula']}, {result['temperature']:.0f} K"
    run = f"{result['ps']:g} ps at constant energy, steps of {result['timestep']} fs, {what}"
    rows = [
        Check(
            "energy drift, longer", None if slope is None else abs(slope), "meV/atom/ns", note=run, figure=png(figure), error=error
        )
    ]
    if slope is None or error is None:
        rows[0].note += "; too short for a slope with an error"
    else:
        note, least = "the part of the drift that is beyond two standard errors", max(0.0, abs(slope) - 2 * error)
        undecided = least <= 1.0 < abs(slope) + 2 * error
        if undecided:
            note += "; no verdict, the run is too short to tell 1 meV/atom/ns: the bar is for a million steps (--ps 500)"
        rows.append(Check("energy drift, beyond doubt", least, "meV/atom/ns", None if undecided else 1.0, note))
    for row in rows:
        row.section = section
    return rows


def failed(name: str, note: str) -> Check:
    """A check that could not be carried out."""
    return Check(name, None, note=note, passed=False)


def compare_parts(sections: Dict[str, tuple], mine: dict, theirs: Optional[dict], teacher: str) -> List[Check]:
    """Rows of the parts of a suite. sections: by part, the function that compares its results with the teacher's (None where it has
    none) and the title of its section."""
    checks: List[Check] = []
    for part, (function, title) in sections.items():
        if "error" in mine[part]:
            rows = [failed(part, str(mine[part]["error"]))]
        else:
            other = None if theirs is None or "error" in theirs.get(part, {"error": ""}) else theirs[part]
            rows = function(mine[part], other, teacher)
            if theirs is not None and "error" in theirs.get(part, {}):
                rows.append(Check(f"{part}, {teacher}", None, note=f"nothing to compare with: {theirs[part]['error']}"))
        for row in rows:
            row.section = title
        checks += rows
    return checks


@dataclass
class Case:
    """The model and the structures under test. ``structures`` carry no calculator; ``labels[k]`` are those of structure k.

    ``force_limit`` (meV/Angstrom) and ``r2_limit`` (of 1 - R^2) judge the errors; None for no judgement. ``against`` says whose the
    labels are.
    """

    calculator: Calculator
    structures: List[Atoms]
    labels: List[dict]
    force_limit: Optional[float] = None
    r2_limit: Optional[float] = None
    against: str = "label"

    def results(self, atoms: Atoms, *names: str) -> tuple:
        """Results of the model under ASE's names (energy, energies, forces, stress)."""
        return tuple(self.calculator.get_property(name, atoms) for name in reversed(names))[::-1]

    @property
    def sample(self) -> List[Atoms]:
        """The first, middle and last structure, for checks that are too slow for all."""
        return [self.structures[k] for k in sorted({0, len(self.structures) // 2, len(self.structures) - 1})]


# ---- checks ------------------------------------------------------------------------------------------------------------


def self_check(case: Case) -> List[Check]:
    """The file's own reference structures, whose results were stored in float64 when it was written."""
    if not hasattr(case.calculator, "model"):
        return []  # a stand-in, such as a teacher
    energy, force = case.calculator.model.self_check(case.calculator.parameters["device"])
    return [
        Check("self-check, energy", energy, "eV/atom", 1e-5, "largest deviation from the file's reference structures"),
        Check("self-check, forces", force, "eV/Å", 1e-4, "largest deviation from the file's reference structures"),
    ]


def errors(case: Case) -> List[Check]:
    """Errors against the labels: energy per atom and relative, forces in all, by element and by kind of structure, stress."""
    energy, forces, stress = [], [], []  # pairs (label, model)
    formulas: List[str] = []
    elements: List[str] = []
    kinds: List[str] = []
    for atoms, label in zip(case.structures, case.labels):
        if "forces" in label:
            forces.append(np.stack([label["forces"], *case.results(atoms, "forces")]))
            elements += list(atoms.symbols)
            kinds += [str(atoms.info.get("kind", ""))] * len(atoms)
        if "energy" in label:
            energy.append(np.array([label["energy"], *case.results(atoms, "energy")]) / len(atoms))
            formulas.append(f"{atoms.symbols.formula:hill}")
        if "stress" in label and atoms.pbc.all():
            stress.append(np.stack([np.asarray(label["stress"]).reshape(-1), *case.results(atoms, "stress")]))
    if not energy and not forces and not stress:
        return [Check("errors", None, note="the structures carry no energies, forces or stresses to compare with")]
    checks = []
    if energy:
        pairs = np.array(energy) * 1000
        label, model = pairs.T
        figure = _parity(
            case.against, label - label.mean(), model - model.mean(), "energy, meV/atom, about its mean", groups=formulas
        )
        checks += _errors("energy", label, model, "meV/atom", f"{len(label)} structures against {case.against}", figure)
        checks.append(
            Check("energy, mean error", (model - label).mean(), "meV/atom", note="the systematic part of the error above")
        )
        relative = [pairs[rows] - pairs[rows].mean(0) for rows in _groups(formulas).values() if len(rows) > 1]
        if relative:
            label, model = np.concatenate(relative).T
            note = (
                f"about the mean of each composition, {len(relative)} compositions, {len(label)} structures against {case.against}"
            )
            figure = _parity(case.against, label, model, "relative energy, meV/atom")
            checks += _errors("relative energy", label, model, "meV/atom", note, figure, r2=True)
    if forces:
        label, model = np.concatenate(forces, axis=1) * 1000
        figure = _parity(case.against, label, model, "force components, meV/Å", groups=np.repeat(elements, 3))
        note = f"{label.size} components against {case.against}"
        checks += _errors("forces", label, model, "meV/Å", note, figure, case.force_limit, True, case.r2_limit)
        for element, rows in sorted(_groups(elements).items()):
            checks += _errors(
                f"forces on {element}",
                label[rows],
                model[rows],
                "meV/Å",
                f"{3 * len(rows)} components against {case.against}",
                r2=True,
            )
        if len(set(kinds)) > 1:
            figure = _parity(case.against, label, model, "force components, meV/Å", groups=np.repeat(kinds, 3))
            for kind, rows in sorted(_groups(kinds).items()):
                note = f"{3 * len(rows)} components against {case.against}"
                checks += _errors(
                    f"forces, kind {kind or 'without a name'}", label[rows], model[rows], "meV/Å", note, figure, r2=True
                )
                figure = None
    if stress:
        label, model = np.stack(stress, axis=1) / units.GPa
        checks += _errors(
            "stress",
            label,
            model,
            "GPa",
            f"{label.size} components against {case.against}",
            _parity(case.against, label, model, "stress components, GPa"),
            r2=True,
        )
    return checks


def extrapolation(case: Case) -> List[Check]:
    """The extrapolation grade of every atom, beside the error of its force where there are labels."""
    if "extrapolation_grade" not in case.calculator.implemented_properties:
        return []
    grades = [case.results(atoms, "extrapolation_grade")[0] for atoms in case.structures]
    above = np.concatenate(grades) > 1
    note = f"of {len(above)} atoms; a model is not to be trusted where it extrapolates"
    checks = [Check("atoms with a grade above 1", 100 * above.mean(), "%", note=note)]
    pairs = [
        (grade, np.linalg.norm(case.results(atoms, "forces")[0] - label["forces"], axis=1))
        for atoms, label, grade in zip(case.structures, case.labels, grades)
        if "forces" in label
    ]
    if not pairs or sum(len(grade) for grade, _ in pairs) < 2:
        return checks
    grade, error = map(np.concatenate, zip(*pairs))
    known = case.calculator.model.calibration
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, ascending = figure.add_subplot(), np.argsort(grade)
    axes.plot(grade, error, ".", ms=2, color="0.7", label="atoms")
    parts = [part for part in np.array_split(ascending, min(20, len(grade))) if len(part)]
    axes.plot([grade[p].mean() for p in parts], [error[p].mean() for p in parts], "o", label="means of equally many atoms")
    axes.plot(known[0], known[1], "-", color="k", label="expected, from the training")
    axes.axvline(1, color="0.7", lw=1)
    axes.set(xlabel="extrapolation grade", ylabel="error of the force, eV/Å", xscale="log", yscale="log")
    axes.legend()
    rank = spearmanr(grade, error)[0]
    note = f"of the grade and the error of the force, {len(grade)} atoms against {case.against}; 1: the same order"
    checks.append(Check("rank correlation with the error", rank, note=note, figure=png(figure)))
    expected = np.interp(grade, *known)
    note = "mean error of forces (lengths), divided by what the grades let expect; above 1 the errors are larger"
    checks.append(Check("error beside the expected error", error.mean() / expected.mean(), note=note))
    return checks


def equivariance(case: Case) -> List[Check]:
    """Rotated, reflected, permuted and translated copies must give the same energy and the same forces, moved along."""
    worst = {"energy": 0.0, "forces": 0.0}
    for k, atoms in enumerate(case.sample):
        rng = np.random.default_rng(k)
        q = Rotation.random(random_state=k).as_matrix() * (-1 if k % 2 else 1)
        order, moved = rng.permutation(len(atoms)), atoms.copy()
        moved.set_cell(atoms.cell.array @ q.T)
        moved.positions = atoms.positions @ q.T + rng.uniform(-5, 5, 3)
        e, f = case.results(atoms, "energy", "forces")
        e_moved, f_moved = case.results(moved[order], "energy", "forces")
        worst["energy"] = max(worst["energy"], abs(e - e_moved) / len(atoms))
        worst["forces"] = max(worst["forces"], abs(f_moved - f[order] @ q.T).max())
    note = "largest change under random rotation, reflection, translation and permutation; single precision leaves about 1e-6"
    return [
        Check("equivariance, energy", worst["energy"], "eV/atom", 1e-5, note),
        Check("equivariance, forces", worst["forces"], "eV/Å", 1e-4, note),
    ]


def finite_differences(case: Case) -> List[Check]:
    """Forces and stress against central differences of the energy along random directions."""
    forces, stresses, step = 0.0, None, 0.01
    weights = ((1, 8 / 12), (-1, -8 / 12), (2, -1 / 12), (-2, 1 / 12))  # fourth order
    for k, atoms in enumerate(case.sample):
        rng = np.random.default_rng(k)
        direction = rng.normal(size=(len(atoms), 3))
        direction /= np.linalg.norm(direction)
        (f,) = case.results(atoms, "forces")
        slope = 0.0
        for factor, weight in weights:
            moved = atoms.copy()
            moved.positions += factor * step * direction
            slope += weight * case.results(moved, "energy")[0] / step
        forces = max(forces, abs(slope + (f * direction).sum()))
        if atoms.pbc.all():
            strain = rng.normal(size=(3, 3))
            strain = (strain + strain.T) / np.linalg.norm(strain + strain.T)
            small, slope = step / 10, 0.0
            for factor, weight in weights:
                deformation = np.eye(3) + factor * small * strain
                moved = atoms.copy()
                moved.set_cell(atoms.cell.array @ deformation, scale_atoms=False)
                moved.positions = atoms.positions @ deformation
                slope += weight * case.results(moved, "energy")[0] / small
            stress = voigt_6_to_full_3x3_stress(case.results(atoms, "stress")[0])
            stresses = max(stresses or 0.0, abs(slope / atoms.get_volume() - (stress * strain).sum()) / units.GPa)
    note = "random directions in steps of {}, fourth order"
    checks = [Check("forces against finite differences", forces, "eV/Å", 2e-3, note.format(f"{step} Å"))]
    if stresses is not None:
        checks.append(Check("stress against finite differences", stresses, "GPa", 0.02, note.format(step / 10)))
    return checks


def cutoff(case: Case) -> List[Check]:
    """Energies and forces must be continuous where an atom enters the cutoff, and its force must begin at zero."""
    rc, inside, worst = getattr(case.calculator, "cutoff", None), 1e-3, 0.0
    if rc is None:
        return []  # a stand-in, such as a teacher
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes, right = figure.subplots(1, 2)
    distances = np.linspace(rc - 1.0, rc + 0.2, 241)
    for a, b in _pairs(case):
        worst = max(worst, abs(_pair_curve(case, a, b, [rc - inside])[1][0]))
        axes.plot(distances, _pair_curve(case, a, b, distances)[1], label=f"{a}-{b}")
    axes.axvline(rc, color="0.7", lw=1)
    axes.set(xlabel="distance, Å", ylabel="force of an isolated pair, eV/Å")
    axes.legend()
    note = f"largest of all pairs of elements, {inside} Å inside {rc} Å"
    checks = [Check("force at the cutoff", worst, "eV/Å", 1e-4, note)]
    scan = np.linspace(rc - 0.1, rc + 0.1, 201)
    jump_energy = jump_force = 0.0
    host = min((a for a in case.structures), key=len)
    host = Atoms(host.numbers, host.positions - host.positions.mean(0))
    top = host.positions[np.argmax(host.positions[:, 2])]
    for element in _elements(case):  # above the topmost atom, which is the first to be met
        rows = [case.results(host + Atoms([element], [top + [0, 0, d]]), "energy", "forces") for d in scan]
        e, f = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
        work = -(f[1:, -1, 2] + f[:-1, -1, 2]) / 2 * np.diff(scan)
        jump_energy = max(jump_energy, abs(np.diff(e) - work).max())
        jump_force = max(jump_force, abs(np.diff(f, axis=0)).max())
        right.plot(scan, f[:, -1, 2] * 1000, label=element)
    right.axvline(rc, color="0.7", lw=1)
    right.set(xlabel=f"distance from the topmost atom of {host.symbols}, Å", ylabel="force on the entering atom, meV/Å")
    right.legend()
    note = f"largest in steps of {scan[1] - scan[0]:.3f} Å, an atom of each element enters the cutoff of {host.symbols}"
    checks[0].figure = png(figure)
    return [
        *checks,
        Check("jump of the energy at the cutoff", jump_energy, "eV", 1e-4, note + ", beyond the work of its force"),
        Check("jump of a force at the cutoff", jump_force, "eV/Å", 1e-3, note),
    ]


def close_contacts(case: Case) -> List[Check]:
    """Every pair of elements must repel at short distances, so that a bad contact in MD comes apart: a wall without a hole."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    (wall, well), checks = figure.subplots(1, 2), []
    reach = getattr(case.calculator, "cutoff", 5.0) + 0.2
    for a, b in _pairs(case):
        bond = covalent_radii[atomic_numbers[a]] + covalent_radii[atomic_numbers[b]]
        distances = np.linspace(0.35, 0.75, 81) * bond
        energy, force = _pair_curve(case, a, b, distances)
        name = f"close contact {a}-{b}"
        if not (np.isfinite(energy).all() and np.isfinite(force).all()):
            checks.append(failed(name, "energy or force is not finite"))
            continue
        attraction = -force.min()
        note = (
            f"strongest attraction of an isolated pair, {0.35 * bond:.2f} to {0.75 * bond:.2f} Å; negative: it repels throughout, "
            "the energy rises monotonically"
        )
        if attraction > 0:
            holes = distances[force <= 0]
            note += f"; it attracts between {holes[0]:.2f} and {holes[-1]:.2f} Å"
        checks.append(Check(name, attraction, "eV/Å", 0.0, note))
        far = np.linspace(0.75 * bond, reach, 121)
        tail, _ = _pair_curve(case, a, b, far)
        depth = tail[-1] - tail.min()
        where = far[np.argmin(tail)]
        note = f"at {where:.2f} Å, below the atoms apart; a pair of bare atoms is no molecule, the number is for the eye"
        checks.append(Check(f"dissociation {a}-{b}, depth", depth, "eV", note=note))
        wall.plot(distances, energy - tail[-1], label=f"{a}-{b}")
        well.plot(far, np.clip(tail - tail[-1], None, 5), label=f"{a}-{b}")
    wall.set(xlabel="distance, Å", ylabel="energy of an isolated pair, eV", title="repulsive wall", yscale="symlog")
    well.set(xlabel="distance, Å", ylabel="energy, eV (5 at most)", title="dissociation")
    if wall.lines:
        wall.legend()
    if checks:
        checks[0].figure = png(figure)
    return checks


def energy_conservation(case: Case) -> List[Check]:
    """A run at constant energy, then one with a thermostat, from the first structure with more than one atom, a little relaxed."""
    atoms = next((a for a in case.structures if len(a) > 1), None)
    if atoms is None:
        return [Check("energy drift", None, note="no structure with more than one atom")]
    atoms = atoms.copy()
    atoms.calc = case.calculator
    FIRE(atoms, logfile=None).run(fmax=0.1, steps=50)  # what is packed or displaced at random would heat up
    return _nve(case, atoms) + _nvt(case, atoms)


def _nve(case: Case, atoms: Atoms) -> List[Check]:
    atoms = atoms.copy()
    atoms.calc = case.calculator
    thermalize(atoms, 2 * NVE_TEMPERATURE, np.random.default_rng(0))  # half of it goes into the bonds
    md, total, kelvin = VelocityVerlet(atoms, NVE_TIMESTEP * units.fs), [], []
    md.attach(lambda: (total.append(atoms.get_total_energy()), kelvin.append(atoms.get_temperature())))
    try:
        md.run(NVE_STEPS)
    except ValueError as e:
        return [failed("energy drift", f"the run broke down after {len(total) - 1} steps: {e}")]
    if not np.isfinite(total).all():
        return [failed("energy drift", f"the energy is not finite after {np.argmin(np.isfinite(total))} steps")]
    energies = (np.array(total) - total[0]) / len(atoms) * 1000
    times = np.arange(len(total)) * NVE_TIMESTEP / 1000
    slope, error = drift(times, energies)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes, right = figure.subplots(1, 2)
    axes.plot(times, energies, lw=0.8)
    axes.set(xlabel="time, ps", ylabel="total energy, meV/atom")
    right.plot(times, kelvin, lw=0.8)
    right.set(xlabel="time, ps", ylabel="temperature, K")
    run = f"{NVE_STEPS} steps of {NVE_TIMESTEP} fs from {NVE_TEMPERATURE:.0f} K, {atoms.get_chemical_formula()}"
    note = f"slope of the total energy, {run}; the bar of 1 meV/atom/ns (0.001 here) asks for a longer run"
    return [
        Check("energy drift", abs(slope), "meV/atom/ps", 1.0, note, png(figure), error=error),
        Check("energy fluctuation", energies.std(), "meV/atom", note="standard deviation in the same run"),
    ]


def _nvt(case: Case, atoms: Atoms) -> List[Check]:
    name, atoms, kelvin = "temperature under a thermostat", atoms.copy(), []
    atoms.calc = case.calculator
    thermalize(atoms, 2 * NVE_TEMPERATURE, np.random.default_rng(1))  # half of it goes into the bonds
    md = LangevinBAOAB(
        atoms, NVE_TIMESTEP * units.fs, temperature_K=NVE_TEMPERATURE, T_tau=20 * units.fs, rng=np.random.default_rng(2)
    )
    md.attach(lambda: kelvin.append(atoms.get_kinetic_energy() / (1.5 * len(atoms) * units.kB)))
    try:
        md.run(NVE_STEPS)
    except ValueError as e:
        return [failed(name, f"the run broke down after {len(kelvin) - 1} steps: {e}")]
    settled = np.array(kelvin[len(kelvin) // 4 :])
    error = block_error(settled)
    limit = 0.05 * NVE_TEMPERATURE + 4 * (error if np.isfinite(error) else 0.0)
    note = (
        f"deviation of the mean from {NVE_TEMPERATURE:.0f} K in {NVE_STEPS} steps of {NVE_TIMESTEP} fs, "
        f"the first quarter left out, {atoms.get_chemical_formula()}, Langevin; the limit is 5 % and four standard errors"
    )
    return [Check(name, abs(settled.mean() - NVE_TEMPERATURE), "K", limit, note, error=error)]


CHECKS: List[Callable[[Case], List[Check]]] = [
    self_check,
    errors,
    extrapolation,
    equivariance,
    finite_differences,
    cutoff,
    close_contacts,
    energy_conservation,
]


# ---- their parts -------------------------------------------------------------------------------------------------------


def _errors(
    name: str, label, model, unit: str, note: str, figure: Optional[bytes] = None, limit: Optional[float] = None, r2: bool = False,
    r2_limit: Optional[float] = None,
) -> List[Check]:  # fmt: skip
    error = np.asarray(model) - np.asarray(label)
    rows = [
        Check(f"{name}, MAE", abs(error).mean(), unit, limit, note, figure),
        Check(f"{name}, RMSE", np.sqrt((error**2).mean()), unit, note=f"largest error {abs(error).max():.3g} {unit}"),
    ]
    if r2 and np.var(label) > 0:
        value = (error**2).mean() / np.var(label)
        rows.append(Check(f"{name}, 1 - R²", value, limit=r2_limit, note=f"R² = {1 - value:.6f}"))
    return rows


def _groups(names) -> Dict[str, List[int]]:
    """Indices by name."""
    groups: Dict[str, List[int]] = defaultdict(list)
    for k, name in enumerate(names):
        groups[name].append(k)
    return dict(groups)


def _elements(case: Case) -> List[str]:
    """The elements that the structures hold."""
    return sorted({s for atoms in case.structures for s in atoms.symbols}, key=chemical_symbols.index)


def _pairs(case: Case):
    """Pairs of the elements that the structures hold."""
    return combinations_with_replacement(_elements(case), 2)


def _pair_curve(case: Case, a: str, b: str, distances):
    """Energy in eV and force in eV/Angstrom (positive: repulsion) of two isolated atoms at these distances."""
    rows = [case.results(Atoms([a, b], positions=[[0, 0, 0], [0, 0, d]]), "energy", "forces") for d in distances]
    return np.array([e for e, _ in rows]), np.array([f[1, 2] for _, f in rows])


def _parity(against: str, label, model, title: str, groups=None) -> bytes:
    """Label against model, and beside it the error; a colour for each group where there are few."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    (axes, right), ends = figure.subplots(1, 2), [min(label.min(), model.min()), max(label.max(), model.max())]
    axes.plot(ends, ends, color="0.7", lw=1)
    right.axhline(0, color="0.7", lw=1)
    label, model = np.asarray(label).ravel(), np.asarray(model).ravel()
    sets = _groups(groups) if groups is not None else {}
    for name, rows in sets.items() if 1 < len(sets) <= 10 else [("", slice(None))]:
        axes.plot(label[rows], model[rows], ".", ms=3, label=name)
        right.plot(label[rows], (model - label)[rows], ".", ms=3)
    axes.set(xlabel=against, ylabel="model", title=title, aspect="equal")
    right.set(xlabel=against, ylabel=f"model - {against}")
    if 1 < len(sets) <= 10:
        axes.legend(markerscale=3)
    return png(figure)


def png(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
