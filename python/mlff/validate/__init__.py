"""``mlff validate``: what a model file gets right, measured through the engine that will run it.

checks.py holds the general checks, on any structures. A suite adds the physics of one kind of matter: organics.py, water.py,
crystal.py. What a suite asks of a potential (measurement.py) is the same for a model and for its teacher, so reference data are the
file that ``mlff reference`` writes; report.py makes the page.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import List, Optional, Sequence, Union

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import chemical_symbols

from ..ase import MLFFCalculator
from . import crystal, organics, water
from .checks import CHECKS, Case, Check
from .measurement import CAUGHT, Job, Settings, TeacherCalculator, load, measure, one_line
from .report import Report, show

__all__ = ["CHECKS", "SUITES", "Case", "Check", "Report", "Settings", "reference", "validate"]

SUITES = {"organics": organics, "water": water, "crystal": crystal}


def validate(
    model: Union[str, Path, Calculator],
    structures: Union[str, Path, Sequence[Atoms], None] = None,
    report=None,
    suite: Optional[str] = None,
    teacher=None,
    reference_file=None,
    settings: Settings = Settings(),
    device: str = "cpu",
) -> Report:
    """Runs the general checks and those of a suite, prints a table, and writes a report.

    Args:
        model: a model.pt, or any ASE calculator in its place.
        structures: file readable by ASE (extxyz ...), all of its frames, or a list of ase.Atoms. Energies (eV), forces
            (eV/Angstrom) and stresses (eV/Angstrom^3) stored with them are compared with; the other checks need none. Without
            them the general checks take structures of the suite, and the teacher's labels of these.
        report: HTML page to write, with a JSON file of the same name beside it; None for none. An interrupted suite goes on from
            what it kept beside the report.
        suite: one of SUITES, or None.
        teacher: a mlff.train.teachers.Teacher to compare with; it is measured first, into reference_file.
        reference_file: file of :func:`reference`; without a teacher it must be complete. By default, with a teacher, its name and
            that of the suite beside the report.
        settings: of the suite.
        device: of the model, as MLFFCalculator has it.

    Returns:
        the report; ``report.passed`` says whether every check with a limit passed.

    Raises:
        MLFFFileError: the model file is missing or damaged.
        OSError, ValueError: the structures cannot be read, there are none, the model does not know one of their elements or those
            of the suite, the reference is of something else, or the report is not an HTML page.
    """
    from rich.console import Console

    start, console = time.perf_counter(), Console()
    if report is not None and Path(report).suffix == ".json":
        raise ValueError(f"{report}: the report is an HTML page, such as report.html; its numbers are written beside it as JSON")
    if structures is None and suite is None:
        raise ValueError("expected structures, a suite, or both; got neither")
    if suite is None and (teacher is not None or reference_file is not None or settings != Settings()):
        raise ValueError("a teacher, a reference and settings belong to a suite, got none: --suite " + ", ".join(SUITES))
    report = None if report is None else Path(report)
    calculator = model if isinstance(model, Calculator) else MLFFCalculator(model, device)
    species = getattr(calculator, "species", chemical_symbols[1:])
    sha256 = getattr(calculator, "sha256", "")
    checks: List[Check] = []
    theirs = mine = None
    if suite is not None:
        job = _job(suite, calculator, species, settings)
        if teacher is not None:
            if reference_file is None:
                folder = report.parent if report is not None else Path()
                reference_file = folder / f"{teacher.provenance['name'].lower().replace(' ', '-')}-{suite}.json"
            theirs = reference(teacher, suite, reference_file, settings, job.species)
        elif reference_file is not None:
            theirs = load(Path(reference_file), suite)
        _check_reference(theirs, job, suite, reference_file)
    frames, labels, name = _structures(structures, calculator, job if suite else None, suite, theirs)
    limits = SUITES[suite] if suite else None
    if suite and not settings.quick:
        console.print(f"suite {suite}: {limits.TIMES}")
    case = Case(calculator, frames, labels, getattr(limits, "FORCE_LIMIT", None), getattr(limits, "R2_LIMIT", None))
    if structures is None and theirs:
        case.against = theirs["source"]["name"]
    with _progress(console) as progress:
        task = progress.add_task("general checks", total=len(CHECKS))
        for function in CHECKS:
            try:
                rows = function(case)
            except CAUGHT as e:  # one check must not take the others with it
                rows = [Check(function.__name__.replace("_", " "), None, note=one_line(e), passed=False)]
            for row in rows:
                row.section = row.section or function.__name__.replace("_", " ").capitalize()
            checks += rows
            progress.advance(task)
        if suite is not None:
            source = {"name": "model" if sha256 else type(calculator).__name__, "sha256": sha256}
            mine = _measure_model(suite, job, source, report, progress)
    if suite is not None:
        named = theirs["source"]["name"] if theirs else ""
        checks += SUITES[suite].compare(mine["parts"], theirs and theirs["parts"], named)
    label = str(model) if not isinstance(model, Calculator) else type(model).__name__
    result = Report(
        label, sha256, name, len(frames), checks, time.perf_counter() - start, suite, asdict(settings) if suite else None,
        theirs["source"] if theirs else None, mine["parts"] if mine else {},
    )  # fmt: skip
    show(result, console)
    if report is not None:
        result.write(report)
        for suffix in (".partial.json", ".partial.state.npz"):
            report.with_suffix(suffix).unlink(missing_ok=True)
        console.print(f"wrote {report} and {report.with_suffix('.json').name}")
    return result


def reference(
    teacher,
    suite: str,
    path,
    settings: Settings = Settings(),
    species: Optional[Sequence[str]] = None,
    sampler: Union[str, Path, Calculator, None] = None,
    device: str = "cpu",
) -> dict:
    """Measures a teacher, into a file that an interrupted run goes on from.

    Args:
        teacher: a mlff.train.teachers.Teacher.
        suite: one of SUITES.
        path: JSON file.
        settings: as for the model; only ``ps`` may differ.
        species: chemical symbols to look at; None for all that the teacher knows.
        sampler: a model.pt, or any ASE calculator, that runs the dynamics in place of the teacher; the teacher's averages come out
            of its frames by reweighting (measurement.weights). For the suite water.
        device: of the sampler, as MLFFCalculator has it.

    Returns:
        the content of the file.

    Raises:
        ValueError: teacher or sampler do not know the elements, the suite is none for a sampler, or the file holds something else.
        MLFFFileError: the sampler's file is missing or damaged.
    """
    from rich.console import Console

    if sampler is not None and suite != "water":
        raise ValueError(f"reweighting gives averages of the liquid in the suite water, got the suite {suite}; leave the model out")

    if teacher.elements is not None:
        known = [chemical_symbols[z] for z in sorted(teacher.elements)]
        species = known if species is None else [symbol for symbol in species if symbol in known]
    species = chemical_symbols[1:] if species is None else list(species)
    try:
        job = _job(suite, TeacherCalculator(teacher), species, settings)
    except ValueError as e:
        raise ValueError(f"the teacher {teacher.provenance['name']}: {e}") from None
    if not teacher.periodic and suite != "organics":
        raise ValueError(f"the teacher {teacher.provenance['name']} takes no periodic cells, the suite {suite} needs them")
    source = teacher.provenance
    if sampler is not None:
        if not isinstance(sampler, Calculator):
            sampler = MLFFCalculator(sampler, device)
        _job(suite, sampler, getattr(sampler, "species", job.species), settings)
        job = replace(job, calculator=sampler, target=job.calculator)
        source = {**source, "reweighted_from": getattr(sampler, "sha256", type(sampler).__name__)}
    with _progress(Console()) as progress:
        by_teacher = lambda job: replace(job, calculator=job.target or job.calculator)  # noqa: E731
        parts = {"labels": lambda job: _labels(SUITES[suite].samples(job), by_teacher(job)), **SUITES[suite].PARTS}
        return measure(parts, suite, job, source, Path(path), progress)


def _job(suite: str, calculator: Calculator, species: Sequence[str], settings: Settings) -> Job:
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}: expected one of {', '.join(SUITES)}")
    if settings.cell is not None and suite != "crystal":
        raise ValueError(f"a cell belongs to the suite crystal, got the suite {suite}")
    needed = SUITES[suite].ELEMENTS
    if not needed <= set(species):
        raise ValueError(f"the suite {suite} needs the elements {' '.join(sorted(needed))}, known are {' '.join(species)}")
    job = Job(calculator, list(species), settings)
    if suite == "crystal":
        job.crystal = ase.io.read(settings.cell) if settings.cell is not None else None
        cell = crystal.unit_cell(job.species, job.crystal)
        unknown = sorted(set(cell.symbols) - set(species))
        if unknown:
            raise ValueError(f"{settings.cell}: known are the elements {' '.join(species)}, not {' '.join(unknown)}")
        job.species = sorted(set(cell.symbols), key=chemical_symbols.index)
    elif suite == "water":
        job.species = ["H", "O"]
    return job


def _check_reference(theirs: Optional[dict], job: Job, suite: str, path) -> None:
    if theirs is None:
        return
    mine = asdict(replace(job.settings, ps=theirs["settings"]["ps"], cell=theirs["settings"]["cell"]))
    different = [key for key, value in theirs["settings"].items() if mine[key] != value]
    if different:
        key = different[0]
        raise ValueError(
            f"{path}: the reference was made with {key} {theirs['settings'][key]}, the model is asked with {key} {mine[key]}"
        )
    if suite == "crystal" and theirs["species"] != job.species:
        raise ValueError(
            f"{path}: the reference is a crystal of {' '.join(theirs['species'])}, the model is asked for {' '.join(job.species)}"
        )
    lattice = theirs["parts"].get("lattice", {})
    if "formula" in lattice and lattice["formula"] != (cell := str(crystal.unit_cell(job.species, job.crystal).symbols)):
        raise ValueError(f"{path}: the reference is a cell of {lattice['formula']}, the model is asked for one of {cell}")
    missing = [part for part in ("labels", *SUITES[suite].PARTS) if part not in theirs["parts"]]
    if missing:
        raise ValueError(f"{path}: the reference is not finished, {' '.join(missing)} is missing; go on with mlff reference")


def _structures(structures, calculator, job: Optional[Job], suite: Optional[str], theirs: Optional[dict]):
    """Structures of the general checks without calculators, their labels, and what to call them."""
    if structures is None:
        samples = SUITES[suite].samples(job)
        known = theirs["parts"]["labels"] if theirs and "error" not in theirs["parts"]["labels"] else {}
        labels = []
        for key, atoms in samples.items():
            label = known.get(key, {"error": ""})
            labels.append({} if "error" in label else {name: np.array(value) for name, value in label.items()})
        return list(samples.values()), labels, f"the suite {suite}"
    name = str(structures) if isinstance(structures, (str, Path)) else f"{len(structures)} structures"
    frames = ase.io.read(structures, index=":") if isinstance(structures, (str, Path)) else list(structures)
    if not frames or min(len(atoms) for atoms in frames) == 0:
        raise ValueError(f"{name}: expected structures with at least one atom each")
    labels = [dict(atoms.calc.results) if atoms.calc else {} for atoms in frames]
    frames = [atoms.copy() for atoms in frames]
    species = getattr(calculator, "species", chemical_symbols)
    for k, atoms in enumerate(frames):
        atoms.set_constraint()
        unknown = sorted(set(atoms.symbols) - set(species))
        if unknown:
            raise ValueError(f"{name}, structure {k}: the model knows the elements {' '.join(species)}, not {' '.join(unknown)}")
    return frames, labels, name


def _measure_model(suite: str, job: Job, source: dict, report: Optional[Path], progress) -> dict:
    parts = {**SUITES[suite].PARTS, **SUITES[suite].MODEL_PARTS}
    path = None if report is None else report.with_suffix(".partial.json")
    try:
        return measure(parts, suite, job, source, path, progress)
    except ValueError:  # left by another model: not ours to go on from
        path.unlink()
        path.with_suffix(".state.npz").unlink(missing_ok=True)
        return measure(parts, suite, job, source, path, progress)


def _labels(samples: dict[str, Atoms], job: Job) -> dict:
    """Energy, forces and stress of every sample."""

    def one(atoms: Atoms) -> dict:
        energy, forces = job.single_point(atoms)
        label = {"energy": energy, "forces": forces.round(6)}
        if atoms.pbc.all():
            label["stress"] = job.calculator.get_property("stress", atoms)
        return label

    return job.each(samples, one)


def _progress(console):
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
