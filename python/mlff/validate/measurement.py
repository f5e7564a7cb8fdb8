"""Measurements: what a suite asks of a calculator, as plain numbers, kept in a JSON file that an interrupted run goes on from.

A model and its teacher are measured by the same functions, so a file of reference data is a measurement of the teacher. A suite
is a list of parts. A finished part is written to the file at once; dynamics write their state after every chunk, beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Callable

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE

from .. import __version__

FORMAT = "mlff measurement 1"
TIMESTEP = 0.5  # fs
CHUNK = 0.25  # ps of dynamics between two states
LABEL = 0.1  # ps between frames that a reweighted teacher is asked about
EFFECTIVE, SHARE = 50, 0.1  # frames, and of those that were asked about: with fewer, exact weights say nothing about a teacher
FIRST_ORDER = 0.3  # kB T times the root of the number of atoms: to first order energies may differ by that much
HOT = 10  # dynamics hotter than this many times their temperature have blown up
CAUGHT = (
    ValueError,
    RuntimeError,
    ArithmeticError,
    IndexError,
    np.linalg.LinAlgError,
)  # what a bad potential makes ASE and numpy raise


class Breakdown(ValueError):
    """The potential gave something that cannot go on: infinite numbers, an explosion, a relaxation without an end."""


@dataclass(frozen=True)
class Settings:
    """What is measured. A model and a reference may differ in ``ps`` and the name of ``cell``; a run is resumed if all agree.

    Attributes:
        quick: the smallest sizes that still run all of the code: for tests, not for conclusions.
        seed: of starting velocities, thermostats and displaced structures.
        ps: length of each production run of dynamics; None for that of the suite.
        cell: what a crystal was given as, None for its own.
    """

    quick: bool = False
    seed: int = 0
    ps: float | None = None
    cell: str | None = None


@dataclass
class Job:
    """What a part gets: whom to ask, how much, and where it is kept.

    Attributes:
        calculator: an ASE calculator: energy, forces, stress of periodic cells.
        species: chemical symbols to look at.
        progress: called with the share of the part that is done, 0 to 1.
        state: arrays of the interrupted run of this part, {} at its beginning.
        save: keeps arrays as the state.
        crystal: the unit cell given by the user, or None.
        target: whose averages are wanted, by reweighting what `calculator` samples; None for those of `calculator` itself.
    """

    calculator: Calculator
    species: list[str]
    settings: Settings
    progress: Callable[[float], None] = lambda share: None
    state: dict[str, np.ndarray] = field(default_factory=dict)
    save: Callable[[dict[str, np.ndarray]], None] = lambda state: None
    crystal: Atoms | None = None
    target: Calculator | None = None

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers of this seed and key."""
        return np.random.default_rng([self.settings.seed, *key])

    def single_point(self, atoms: Atoms) -> tuple[float, np.ndarray]:
        """Energy in eV and forces [N, 3] in eV/Angstrom, finite ones."""
        energy, forces = (self.calculator.get_property(name, atoms) for name in ("energy", "forces"))
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise Breakdown(f"energy or forces of {atoms.symbols} are not finite")
        return float(energy), np.array(forces)

    def each(self, items: dict[str, object], function: Callable[[object], dict]) -> dict[str, dict]:
        """function of every item; for one that breaks down {"error": why}."""
        results = {}
        for k, (name, item) in enumerate(items.items()):
            try:
                results[name] = function(item)
            except CAUGHT as e:
                results[name] = {"error": one_line(e)}
            self.progress((k + 1) / len(items))
        return results


Part = Callable[[Job], dict]


class TeacherCalculator(Calculator):
    """A teacher (mlff.train.teachers) as an ASE calculator."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results.update(self.teacher.evaluate([self.atoms.copy()])[0])


def measure(parts: dict[str, Part], suite: str, job: Job, source: dict, path: Path | None, progress=None) -> dict:
    """Runs the parts that the file does not hold yet.

    Args:
        parts: functions by name.
        suite: name of the suite.
        job: whom to ask.
        source: identity of the calculator.
        path: JSON file to write and to go on from; None for none.
        progress: rich.progress.Progress or None.

    Returns:
        the content of the file. A part that could not be carried out is {"error": why}.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be written.
    """
    head = {"format": FORMAT, "suite": suite, "source": source, "settings": asdict(job.settings), "species": job.species}
    data = {**head, "mlff_version": __version__, "parts": {}}
    if path is not None and path.exists():
        data = load(path, suite)
        for key, wanted in head.items():
            if data[key] != wanted:
                raise ValueError(
                    f"{path}: expected a measurement with {key} {_short(wanted)}, it has {_short(data[key])}; "
                    "choose another file, or remove it to begin anew"
                )
    save, state_file = job.save, path and path.with_suffix(".state.npz")
    for name, part in parts.items():
        if name in data["parts"]:
            continue
        if state_file is not None:
            job.state, job.save = _read_state(state_file, name), lambda state, name=name: _write_state(state_file, name, state)
        task = progress and progress.add_task(f"{source['name']}: {name}", total=1.0)
        job.progress = (lambda share, task=task: progress.update(task, completed=share)) if progress else lambda share: None
        try:
            data["parts"][name] = plain(part(job))
        except CAUGHT as e:
            data["parts"][name] = {"error": one_line(e)}
        job.progress(1.0)
        job.state = {}
        if path is not None:
            _write(path, data)
            state_file.unlink(missing_ok=True)
    job.save = save
    return data


def load(path: Path, suite: str) -> dict:
    """A file of :func:`measure`.

    Raises:
        OSError: there is none.
        ValueError: it is something else, or of another suite.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no JSON file of mlff reference ({e})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of mlff reference: expected {FORMAT!r} as its format")
    if data["suite"] != suite:
        raise ValueError(f"{path} holds a reference for the suite {data['suite']}, expected {suite}")
    return data


def plain(value):
    """JSON values out of numbers, arrays and what holds them; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _short(value) -> str:
    return value.get("name", str(value)) if isinstance(value, dict) else " ".join(value) if isinstance(value, list) else str(value)


def _write(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(data) + "\n", encoding="utf-8")
    new.replace(path)


def _write_state(path: Path, part: str, state: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new.npz")
    np.savez(new, part=np.array(part), **state)
    new.replace(path)


def _read_state(path: Path, part: str) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        state = dict(arrays)
    return state if str(state.pop("part")) == part else {}


# ---- what parts are made of --------------------------------------------------------------------------------------------


def relax(atoms: Atoms, job: Job, fmax: float = 0.005, steps: int = 500) -> Atoms:
    """A relaxed copy; its constraints stay. fmax in eV/Angstrom."""
    atoms = atoms.copy()
    atoms.calc = job.calculator
    optimizer = (FIRE if atoms.pbc.any() else BFGS)(atoms, logfile=None)  # BFGS needs less steps and a Hessian
    converged = optimizer.run(fmax=fmax, steps=steps)
    if not np.isfinite(atoms.positions).all() or np.abs(atoms.positions).max() > 1e3:
        raise Breakdown(f"the relaxation of {atoms.symbols} ran away")
    if not converged:
        force = np.linalg.norm(atoms.get_forces(), axis=1).max()
        raise Breakdown(f"the relaxation of {atoms.symbols} left a force of {force:.2g} eV/Å after {steps} steps")
    return atoms


@dataclass
class Trajectory:
    """Samples of dynamics, at equal times.

    Attributes:
        times: [S], ps, of the samples.
        positions: [S, N, 3], Angstrom, not wrapped into the cell.
        cells: [S, 3, 3], Angstrom.
        temperatures: [S], K.
        energies: [S], total energy, eV.
    """

    times: np.ndarray
    positions: np.ndarray
    cells: np.ndarray
    temperatures: np.ndarray
    energies: np.ndarray


def thermalize(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Velocities of this temperature in K, without drift of the whole."""
    deviation = np.sqrt(units.kB * temperature / atoms.get_masses())[:, None]
    atoms.set_velocities(rng.normal(size=(len(atoms), 3)) * deviation)
    Stationary(atoms)


def dynamics(
    job: Job,
    atoms: Atoms,
    make: Callable[[Atoms, np.random.Generator], MolecularDynamics],
    ps: float,
    every: float,
    temperature: float,
    name: str = "run",
    share: tuple[float, float] = (0.0, 1.0),
) -> Trajectory:
    """Runs dynamics of ``atoms`` in place, in chunks; an interrupted run goes on with the chunk that it was in, to the same bits.

    Args:
        make: the integrator out of atoms and random numbers; called anew for each chunk.
        ps: length. every: between samples, ps.
        temperature: K; only to tell an explosion by.
        name: of this run in the state of the part.
        share: of the part's progress that this run is.

    Raises:
        Breakdown: positions or energies that are not finite, or a temperature of more than HOT times the intended.
    """
    steps, stride = max(1, round(ps * 1000 / TIMESTEP)), max(1, round(every * 1000 / TIMESTEP))
    chunk = max(1, round(CHUNK / every)) * stride
    fields = ("positions", "cells", "temperatures", "energies")
    samples: dict[str, list] = {key: list(job.state.get(f"{name}.{key}", [])) for key in fields}
    done, p_eps = int(job.state.get(f"{name}.done", 0)), float(job.state.get(f"{name}.p_eps", 0.0))
    if done:
        atoms.set_cell(job.state[f"{name}.cell"], scale_atoms=False)
        atoms.positions = job.state[f"{name}.last"]
        atoms.set_momenta(job.state[f"{name}.momenta"])
    atoms.calc = job.calculator

    def sample():
        now = atoms.get_temperature()
        if not np.isfinite(atoms.positions).all() or not np.isfinite(now) or now > HOT * temperature:
            raise Breakdown(f"{now:.0f} K instead of {temperature:.0f} K")
        for key, value in zip(fields, (atoms.positions, atoms.cell.array, now, atoms.get_total_energy())):
            samples[key].append(np.array(value))

    key = sum(map(ord, name))
    while done < steps:
        md = make(atoms, job.rng(key, done))
        if hasattr(md, "barostat_mass"):
            md.p_eps = p_eps
        n = min(chunk, steps - done)
        for _ in range(-(-n // stride)):
            try:
                md.run(min(stride, steps - done))
                done += min(stride, steps - done)
                sample()
            except CAUGHT as e:
                raise Breakdown(
                    f"the dynamics of {atoms.symbols} broke down after {done * TIMESTEP / 1000:.3f} ps: {one_line(e)}"
                ) from None
        p_eps = float(getattr(md, "p_eps", 0.0))
        last = {"cell": atoms.cell.array, "last": atoms.positions, "momenta": atoms.get_momenta(), "done": done, "p_eps": p_eps}
        job.state.update({f"{name}.{key}": np.array(value) for key, value in {**samples, **last}.items()})
        job.save(job.state)
        job.progress(share[0] + (share[1] - share[0]) * done / steps)
    times = np.minimum(np.arange(1, len(samples["energies"]) + 1) * stride, steps) * TIMESTEP / 1000
    return Trajectory(times, *(np.array(samples[key]) for key in fields))


def nve(job: Job, atoms: Atoms, temperature: float, ps: float) -> dict:
    """Conservation of energy: drift of the total energy in meV/atom/ns and its standard error, after 0.5 ps with a thermostat."""
    atoms = atoms.copy()
    thermalize(atoms, 2 * temperature, job.rng(9))  # half of it goes into the bonds
    dynamics(
        job,
        atoms,
        lambda a, rng: LangevinBAOAB(a, TIMESTEP * units.fs, temperature_K=temperature, T_tau=50 * units.fs, rng=rng),
        min(0.5, ps),
        0.01,
        temperature,
        "thermostat",
        (0.0, 0.1),
    )
    run = dynamics(job, atoms, lambda a, rng: VelocityVerlet(a, TIMESTEP * units.fs), ps, 0.01, temperature, "nve", (0.1, 1.0))
    energies = (run.energies - run.energies[0]) / len(atoms) * 1000
    slope, error = drift(run.times, energies)
    thin = max(1, len(energies) // 1000)
    return {
        "ps": ps,
        "timestep": TIMESTEP,
        "formula": atoms.get_chemical_formula(),
        "temperature": run.temperatures.mean(),
        "drift": slope * 1000,
        "drift_error": error * 1000,
        "times": run.times[::thin].round(4),
        "energies": energies[::thin].round(6),
    }


# ---- averages ----------------------------------------------------------------------------------------------------------


def weights(difference: np.ndarray, first_order: bool = False) -> np.ndarray:
    """Weights of frames for averages in the ensemble of another potential than the one that they were sampled with.

    With d = (E_wanted - E_sampled) / kB T, at constant volume and at constant pressure alike, w = exp(-d) (R. W. Zwanzig, J. Chem.
    Phys. 22, 1420 (1954)). These are exact, but the effective number of frames, 1 / sum(w^2), falls exponentially with the size of
    the system. To first order w = 1 - (d - <d>), that is <A> - <A d> + <A> <d>: what this leaves out does not grow with the size of
    the system, for averages of what is local (M. Ceriotti, G. Brain, O. Riordan, D. Manolopoulos, Proc. R. Soc. A 468, 2 (2012)).

    Args:
        difference: [F], d; a constant may be missing.

    Returns:
        [F], their sum is 1; to first order some may be negative.
    """
    w = 1 - (difference - difference.mean()) if first_order else np.exp(difference.min() - difference)
    return w / w.sum()


def ensemble(job: Job, atoms: Atoms, run: Trajectory, first: int, temperature: float, share: float = 0.0):
    """How to average over a run, from its sample `first` on.

    Without job.target every sample counts alike. With one a sample every LABEL ps counts, with :func:`weights`: exact ones where
    these leave EFFECTIVE frames and SHARE of all, else those to first order.

    Args:
        atoms: whatever has the elements of the run.
        temperature: K, of the run.
        share: of the part's progress that is done.

    Returns:
        indices of samples [F]; a function of their values [F, ...] and of indices into these that averages over the latter; {} or
        the number of `frames`, of `effective` ones with exact weights, whether averages are of `first_order`, and the `spread` of
        the difference of energies (standard deviation, kB T).

    Raises:
        Breakdown: the two potentials differ by too much, or there are less than EFFECTIVE frames.
    """
    samples = np.arange(first, len(run.times))
    if job.target is None:
        return samples, lambda values, which: np.mean(values[which], axis=0), {}
    if not job.settings.quick:
        samples = samples[:: max(1, round(LABEL / (run.times[1] - run.times[0])))]
    energies = list(job.state.get("target.energies", []))
    atoms = atoms.copy()
    for k in range(len(energies), len(samples)):
        atoms.set_cell(run.cells[samples[k]], scale_atoms=False)
        atoms.positions = run.positions[samples[k]]
        energies.append([float(x.get_property("energy", atoms)) for x in (job.calculator, job.target)])
        if k % 20 == 19:
            job.state["target.energies"] = np.array(energies)
            job.save(job.state)
        job.progress(share + (1 - share) * (k + 1) / len(samples))
    difference = np.diff(energies, axis=1)[:, 0] / (units.kB * temperature)
    if not np.isfinite(difference).all():
        raise Breakdown(f"energies of {atoms.symbols} are not finite")
    effective, spread = float(1 / (weights(difference) ** 2).sum()), float(np.std(difference))
    limit = FIRST_ORDER * len(atoms) ** 0.5
    first_order = effective < max(EFFECTIVE, SHARE * len(samples))
    if not job.settings.quick:
        if first_order and spread > limit:
            raise Breakdown(
                f"reweighting: energies of model and teacher differ by {spread:.1f} kB T (standard deviation), "
                f"expected {limit:.1f} at most for {len(atoms)} atoms; take a better model"
            )
        if len(samples) < EFFECTIVE:
            raise Breakdown(f"reweighting: expected {EFFECTIVE} frames at least, got {len(samples)}; take a longer run (--ps)")
    about = {"frames": len(samples), "effective": effective, "first_order": first_order, "spread": spread}
    return samples, lambda values, which: np.average(values[which], axis=0, weights=weights(difference[which], first_order)), about


def jackknife(estimate: Callable[[np.ndarray], object], count: int, blocks: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """An estimate from a correlated series, and its standard error, from those without one block of the series each.

    Args:
        estimate: of indices into the series, a number or numbers [K]; any function of averages, weighted or not.
        count: length of the series.

    Returns:
        estimate of the whole, standard error; NaN for less than two values a block.
    """
    whole, series = np.asarray(estimate(np.arange(count)), float), np.arange(count)
    if count < 2 * blocks:
        return whole, np.full_like(whole, np.nan)
    without = np.array([estimate(np.setdiff1d(series, block)) for block in np.array_split(series, blocks)], float)
    return whole, np.sqrt((blocks - 1) / blocks * ((without - without.mean(0)) ** 2).sum(0))


def shipped_structures(name: str) -> list[Atoms]:
    """The frames of a file in mlff/structures."""
    with (files("mlff") / "structures" / name).open() as file:
        return ase.io.read(file, index=":", format="extxyz")


def block_error(values: np.ndarray, blocks: int = 5) -> float:
    """Standard error of the mean of a correlated series, from the means of blocks; NaN for less than two values a block."""
    if len(values) < 2 * blocks:
        return float("nan")
    means = [block.mean() for block in np.array_split(np.asarray(values, float), blocks)]
    return float(np.std(means, ddof=1) / np.sqrt(blocks))


def drift(times: np.ndarray, energies: np.ndarray, blocks: int = 10) -> tuple[float, float]:
    """Slope of a series and its standard error: a line through the means of blocks.

    The error is the larger of two: that of the fit, right for noise about a line, and that of a random walk with these changes from
    block to block, right for an energy that wanders (means of blocks change by 2/3 of the variance of the walk, the slope of a line
    through a walk has 6/5 of that of its ends).
    """
    blocks = min(blocks, len(times) // 2)
    if blocks < 4:
        return float(np.polyfit(times, energies, 1)[0]) if len(times) > 1 else float("nan"), float("nan")
    t, e = (np.array([part.mean() for part in np.array_split(x, blocks)]) for x in (times, energies))
    (slope, _), covariance = np.polyfit(t, e, 1, cov=True)
    changes = np.diff(e) / np.diff(t)
    return float(slope), float(max(np.sqrt(covariance[0, 0]), changes.std(ddof=1) * np.sqrt(9 / 5 / len(changes))))


def one_line(e: BaseException) -> str:
    return " ".join(str(e).split()) or type(e).__name__
