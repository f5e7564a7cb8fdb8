"""``mlff validate model.pt structures.extxyz``: what a model file gets right, measured through the engine that will run it.

Each check is a function of a :class:`Case` that returns :class:`Check` rows; :data:`CHECKS` lists them in the order of the report.
To add one, write the function and add it to the list.
"""

import base64
import html
import io
import json
import time
from dataclasses import asdict, dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Union

import ase.io
import numpy as np
from ase import Atoms, units
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation

from . import __version__
from .ase import MLFFCalculator

NVE_STEPS, NVE_TIMESTEP, NVE_TEMPERATURE = 400, 0.5, 300.0  # fs, K


@dataclass
class Check:
    """One row of the report.

    Attributes:
        name: what was measured.
        value: the number, in ``unit``; None where it could not be measured, with the reason in ``note``.
        limit: largest value that passes; None for a number that is reported without judgement.
        note: how it was measured, or what went wrong.
        figure: PNG picture or None.
        passed: whether value <= limit; None without a limit; False for a check that could not be carried out.
    """

    name: str
    value: Optional[float]
    unit: str = ""
    limit: Optional[float] = None
    note: str = ""
    figure: Optional[bytes] = field(default=None, repr=False)
    passed: Optional[bool] = None

    def __post_init__(self):
        if self.value is not None:
            self.value = float(self.value)
            if self.limit is not None:
                self.passed = self.value <= self.limit


@dataclass
class Case:
    """The model and the structures under test. ``structures`` carry no calculator; ``labels[k]`` are those of structure k."""

    calculator: MLFFCalculator
    structures: List[Atoms]
    labels: List[dict]

    def results(self, atoms: Atoms, *names: str) -> tuple:
        """Results of the model under ASE's names (energy, energies, forces, stress)."""
        return tuple(self.calculator.get_property(name, atoms) for name in reversed(names))[::-1]

    @property
    def sample(self) -> List[Atoms]:
        """The first, middle and last structure, for checks that are too slow for all."""
        return [self.structures[k] for k in sorted({0, len(self.structures) // 2, len(self.structures) - 1})]


@dataclass
class Report:
    """Result of :func:`validate`."""

    model: str
    sha256: str
    structures: str
    n_structures: int
    checks: List[Check]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no check with a limit failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict:
        """JSON values; figures are left out."""
        checks = [{k: v for k, v in asdict(check).items() if k != "figure"} for check in self.checks]
        return {**self.__dict__, "mlff_version": __version__, "passed": self.passed, "checks": checks}


def validate(model_path, structures: Union[str, Path, Sequence[Atoms]], report=None) -> Report:
    """Runs all checks, prints a table, and writes a report.

    Args:
        model_path: a model.pt.
        structures: file readable by ASE (extxyz ...), all of its frames, or a list of ase.Atoms. Energies (eV), forces
            (eV/Angstrom) and stresses (eV/Angstrom^3) stored with them are compared with; the other checks need none.
        report: HTML page to write, with a JSON file of the same name beside it; None for none.

    Returns:
        the report; ``report.passed`` says whether every check with a limit passed.

    Raises:
        MLFFFileError: the model file is missing or damaged.
        OSError, ValueError: the structures cannot be read, there are none, the model does not know one of their elements, or
            the report is not an HTML page.
    """
    from rich.console import Console
    from rich.progress import track

    start, console = time.perf_counter(), Console()
    if report is not None and Path(report).suffix == ".json":
        raise ValueError(f"{report}: the report is an HTML page, such as report.html; its numbers are written beside it as JSON")
    calculator = MLFFCalculator(model_path)
    name = str(structures) if isinstance(structures, (str, Path)) else f"{len(structures)} structures"
    frames = ase.io.read(structures, index=":") if isinstance(structures, (str, Path)) else list(structures)
    if not frames or min(len(atoms) for atoms in frames) == 0:
        raise ValueError(f"{name}: expected structures with at least one atom each")
    labels = [dict(atoms.calc.results) if atoms.calc else {} for atoms in frames]
    frames = [atoms.copy() for atoms in frames]
    for k, atoms in enumerate(frames):
        atoms.set_constraint()
        unknown = sorted(set(atoms.symbols) - set(calculator.species))
        if unknown:
            raise ValueError(
                f"{name}, structure {k}: the model knows the elements {' '.join(calculator.species)}, not {' '.join(unknown)}"
            )
    case, checks = Case(calculator, frames, labels), []
    for function in track(CHECKS, description="validate", console=console, transient=True):
        try:
            checks += function(case)
        except (ValueError, RuntimeError, FloatingPointError) as e:  # one check must not take the others with it
            checks.append(Check(function.__name__.replace("_", " "), None, note=" ".join(str(e).split()), passed=False))
    result = Report(str(model_path), calculator.sha256, name, len(frames), checks, time.perf_counter() - start)
    _print(result, console)
    if report is not None:
        report = Path(report)
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(_page(result), encoding="utf-8")
        report.with_suffix(".json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {report} and {report.with_suffix('.json').name}")
    return result


# ---- checks ------------------------------------------------------------------------------------------------------------


def self_check(case: Case) -> List[Check]:
    """The file's own reference structures, whose results were stored in float64 when it was written."""
    energy, force = case.calculator.model.self_check(case.calculator.parameters["device"])
    return [
        Check("self-check, energy", energy, "eV/atom", 1e-5, "largest deviation from the file's reference structures"),
        Check("self-check, forces", force, "eV/Å", 1e-4, "largest deviation from the file's reference structures"),
    ]


def errors(case: Case) -> List[Check]:
    """Errors against the labels in the file: energy per atom, forces by element, stress."""
    energy, forces, stress = [], [], []  # pairs (label, model)
    elements: List[str] = []
    for atoms, label in zip(case.structures, case.labels):
        if "forces" in label:
            forces.append(np.stack([label["forces"], *case.results(atoms, "forces")]))
            elements += list(atoms.symbols)
        if "energy" in label:
            energy.append(np.array([label["energy"], *case.results(atoms, "energy")]) / len(atoms))
        if "stress" in label and atoms.pbc.all():
            stress.append(np.stack([np.asarray(label["stress"]).reshape(-1), *case.results(atoms, "stress")]))
    if not energy and not forces and not stress:
        return [Check("errors", None, note="the structures carry no energies, forces or stresses to compare with")]
    checks = []
    if energy:
        label, model = np.array(energy).T * 1000
        figure = _parity(label - label.mean(), model - label.mean(), "energy, meV/atom, about the mean label")
        checks += _errors("energy", label, model, "meV/atom", f"{len(label)} structures", figure)
        checks.append(
            Check("energy, mean error", (model - label).mean(), "meV/atom", note="the systematic part of the error above")
        )
    if forces:
        label, model = np.concatenate(forces, axis=1) * 1000
        checks += _errors(
            "forces", label, model, "meV/Å", f"{label.size} components", _parity(label, model, "force components, meV/Å")
        )
        for element in sorted(set(elements)):
            rows = np.array(elements) == element
            checks += _errors(f"forces on {element}", label[rows], model[rows], "meV/Å", f"{3 * rows.sum()} components")
    if stress:
        label, model = np.stack(stress, axis=1) / units.GPa
        checks += _errors(
            "stress", label, model, "GPa", f"{label.size} components", _parity(label, model, "stress components, GPa")
        )
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
    """Forces must end smoothly at the cutoff: the force of every pair of elements just inside it."""
    rc, inside, worst = case.calculator.cutoff, 1e-3, 0.0
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, distances = figure.add_subplot(), np.linspace(rc - 1.0, rc + 0.2, 61)
    for a, b in _pairs(case):
        worst = max(worst, abs(_pair_curve(case, a, b, [rc - inside])[1][0]))
        axes.plot(distances, _pair_curve(case, a, b, distances)[1], label=f"{a}-{b}")
    axes.axvline(rc, color="0.7", lw=1)
    axes.set(xlabel="distance, Å", ylabel="force of an isolated pair, eV/Å")
    axes.legend()
    note = f"largest of all pairs of elements, {inside} Å inside {rc} Å"
    return [Check("force at the cutoff", worst, "eV/Å", 1e-4, note, _png(figure))]


def close_contacts(case: Case) -> List[Check]:
    """Every pair of elements must repel at short distances, so that a bad contact in MD comes apart."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, checks = figure.add_subplot(), []
    for a, b in _pairs(case):
        bond = covalent_radii[atomic_numbers[a]] + covalent_radii[atomic_numbers[b]]
        distances = np.linspace(0.35, 1.5, 47) * bond
        energy, force = _pair_curve(case, a, b, distances)
        attraction = -force[distances <= 0.75 * bond].min()
        note = f"strongest attraction of an isolated pair, {0.35 * bond:.2f} to {0.75 * bond:.2f} Å; negative: it repels throughout"
        checks.append(Check(f"close contact {a}-{b}", attraction, "eV/Å", 0.0, note))
        axes.plot(distances, np.clip(energy - energy[-1], -10, 60), label=f"{a}-{b}")
    axes.set(xlabel="distance, Å", ylabel="energy of an isolated pair, eV (60 at most)")
    axes.legend()
    if checks:
        checks[0].figure = _png(figure)
    return checks


def energy_conservation(case: Case) -> List[Check]:
    """A short run at constant energy from the first structure with more than one atom: the total energy must not drift."""
    atoms = next((a for a in case.structures if len(a) > 1), None)
    if atoms is None:
        return [Check("energy drift", None, note="no structure with more than one atom")]
    atoms = atoms.copy()
    atoms.calc = case.calculator
    deviation = np.sqrt(units.kB * NVE_TEMPERATURE / atoms.get_masses())[:, None]
    atoms.set_velocities(np.random.default_rng(0).normal(size=(len(atoms), 3)) * deviation)
    Stationary(atoms)
    md, total = VelocityVerlet(atoms, NVE_TIMESTEP * units.fs), []
    md.attach(lambda: total.append(atoms.get_total_energy()))
    try:
        md.run(NVE_STEPS)
    except ValueError as e:
        return [Check("energy drift", None, note=f"the run broke down after {len(total) - 1} steps: {e}", passed=False)]
    energies = (np.array(total) - total[0]) / len(atoms) * 1000
    times = np.arange(len(total)) * NVE_TIMESTEP / 1000
    slope = np.polyfit(times, energies, 1)[0]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(times, energies)
    axes.set(xlabel="time, ps", ylabel="total energy, meV/atom")
    run = f"{NVE_STEPS} steps of {NVE_TIMESTEP} fs from {NVE_TEMPERATURE:.0f} K, {atoms.get_chemical_formula()}"
    return [
        Check("energy drift", abs(slope), "meV/atom/ps", 1.0, f"slope of the total energy, {run}", _png(figure)),
        Check("energy fluctuation", energies.std(), "meV/atom", note="standard deviation in the same run"),
    ]


CHECKS: List[Callable[[Case], List[Check]]] = [
    self_check,
    errors,
    equivariance,
    finite_differences,
    cutoff,
    close_contacts,
    energy_conservation,
]


# ---- their parts -------------------------------------------------------------------------------------------------------


def _errors(name: str, label, model, unit: str, note: str, figure: Optional[bytes] = None) -> List[Check]:
    error = np.asarray(model) - np.asarray(label)
    return [
        Check(f"{name}, MAE", abs(error).mean(), unit, note=note, figure=figure),
        Check(f"{name}, RMSE", np.sqrt((error**2).mean()), unit, note=f"largest error {abs(error).max():.3g} {unit}"),
    ]


def _pairs(case: Case):
    """Pairs of the elements that the structures hold."""
    return combinations_with_replacement(
        sorted({s for atoms in case.structures for s in atoms.symbols}, key=chemical_symbols.index), 2
    )


def _pair_curve(case: Case, a: str, b: str, distances):
    """Energy in eV and force in eV/Angstrom (positive: repulsion) of two isolated atoms at these distances."""
    rows = [case.results(Atoms([a, b], positions=[[0, 0, 0], [0, 0, d]]), "energy", "forces") for d in distances]
    return np.array([e for e, _ in rows]), np.array([f[1, 2] for _, f in rows])


def _parity(label, model, title: str) -> bytes:
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes, ends = figure.add_subplot(), [min(label.min(), model.min()), max(label.max(), model.max())]
    axes.plot(ends, ends, color="0.7", lw=1)
    axes.plot(label.ravel(), model.ravel(), ".", ms=2)
    axes.set(xlabel="label", ylabel="model", title=title, aspect="equal")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


# ---- the report --------------------------------------------------------------------------------------------------------


def _row(check: Check) -> tuple:
    number = "" if check.value is None else f"{check.value:.3g} {check.unit}"
    return (
        check.name,
        number,
        "" if check.limit is None else f"{check.limit:.3g}",
        {True: "passed", False: "FAILED", None: ""}[check.passed],
        check.note,
    )


def _print(report: Report, console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report.model} on {report.structures}", title_justify="left", title_style="bold", box=box.SIMPLE)
    for column in ("check", "value", "limit", ""):
        table.add_column(column, justify="right" if column in ("value", "limit") else "left")
    for check in report.checks:
        style = {True: "green", False: "bold red", None: ""}[check.passed]
        name, value, limit, passed, _ = _row(check)
        table.add_row(name, value, limit, Text(passed, style=style))
    console.print(table)
    for check in report.checks:
        if check.passed is False or check.value is None:
            console.print(Text(f"{check.name}: {check.note}"))
    failed = sum(check.passed is False for check in report.checks)
    judged = sum(check.passed is not None for check in report.checks)
    console.print(f"{judged - failed} of {judged} checks with a limit passed, in {report.seconds:.1f} s")


def _page(report: Report) -> str:
    rows, figures = "", ""
    for check in report.checks:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _row(check))
        rows += f'<tr class="{ {True: "passed", False: "failed", None: ""}[check.passed] }">{cells}</tr>\n'
        if check.figure:
            picture = base64.b64encode(check.figure).decode()
            figures += f'<figure><img alt="" src="data:image/png;base64,{picture}">'
            figures += f"<figcaption>{html.escape(check.name)}</figcaption></figure>\n"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>mlff validate: {html.escape(report.model)}</title>
<style>
body {{ font: 15px sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; }}
td:nth-child(2), td:nth-child(3) {{ text-align: right; white-space: nowrap; }}
td:nth-child(5) {{ color: #666; }}
.passed td:nth-child(4) {{ color: #080; }}
.failed td:nth-child(4) {{ color: #c00; font-weight: bold; }}
figure {{ display: inline-block; margin: 1em; }}
</style></head><body>
<h1>{"Passed" if report.passed else "Failed"}: {html.escape(report.model)}</h1>
<p>{report.n_structures} structures of {html.escape(report.structures)}; mlff {__version__}; model SHA-256 {report.sha256}</p>
<table><tr><th>check</th><th>value</th><th>limit</th><th></th><th></th></tr>
{rows}</table>
{figures}</body></html>
"""
