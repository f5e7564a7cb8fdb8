"""The suite water: structure, density and diffusion of the liquid, 64 molecules at 300 K and 1 bar, classical nuclei.

Radial distribution functions and diffusion come from a run at the experimental density, so that a model and its teacher are
compared at the same volume; the density comes from a run at constant pressure.
"""

from __future__ import annotations

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.md.bussi import Bussi
from ase.md.langevinbaoab import LangevinBAOAB
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation

from .checks import Check, compare_parts, conservation, png
from .measurement import TIMESTEP, Job, block_error, dynamics, ensemble, jackknife, nve, relax, shipped_structures, thermalize

TEMPERATURE = 300.0  # K
PRESSURE = 1.0  # bar
DENSITY = 0.9965  # g/cm^3, experiment at 300 K: of the run at constant volume
DIFFUSION = 0.24  # Angstrom^2/ps, experiment at 300 K: M. Holz, S. R. Heil, A. Sacco, PCCP 2, 4740 (2000), interpolated
BULK_MODULUS, BAROSTAT = 2.2, 700.0  # GPa, experiment; fs
VISCOSITY = 0.854e-3  # Pa s, experiment at 300 K
OXYGEN_PEAK = (2.80, 2.57)  # Angstrom, height: X-rays, L. B. Skinner et al., J. Chem. Phys. 138, 074506 (2013), 295 K
HASIMOTO = 2.837297  # of a cubic box; I.-C. Yeh, G. Hummer, J. Phys. Chem. B 108, 15873 (2004)
PAIRS = {"O-O": (2.4, 3.3), "O-H": (1.5, 2.3), "H-H": (1.9, 3.0)}  # where the first intermolecular peak is sought, Angstrom
BIN = 0.02  # Angstrom
EVERY = 0.02  # ps between samples
TIMES = "an hour for a default model on one core of a CPU, nearly all of it dynamics of 192 atoms: 23, 21 and 10 ps"
FORCE_LIMIT = 35.0  # meV/Angstrom against the teacher
ELEMENTS = {"H", "O"}


def lengths(job: Job) -> tuple[int, float, float]:
    """Molecules along an edge, ps of equilibration, ps of production."""
    n, equilibrate, produce = (2, 0.05, 0.2) if job.settings.quick else (4, 3.0, 20.0)
    return n, equilibrate, produce if job.settings.ps is None else job.settings.ps


def box(n: int | tuple[int, int, int], rng: np.random.Generator, density: float = DENSITY) -> Atoms:
    """n^3 or n_x n_y n_z molecules, randomly turned on the sites of a cubic lattice, at a density in g/cm^3. Order O H H."""
    one = molecule("H2O")
    one.positions -= one.get_center_of_mass()
    spacing = (one.get_masses().sum() / density / units.kg * units.m**3 * 1e-3) ** (1 / 3)  # g/cm^3 = 1e-3 kg/(1e-2 m)^3
    sites = (n, n, n) if isinstance(n, int) else n
    atoms = Atoms(cell=np.diag(sites) * spacing, pbc=True)
    for site in np.ndindex(*sites):
        turned = one.copy()
        turned.positions = one.positions @ Rotation.from_quat(rng.normal(size=4)).as_matrix().T + (np.array(site) + 0.5) * spacing
        atoms += turned
    return atoms


def density(masses: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """[S], g/cm^3, of masses [N] in u in cells [S, 3, 3] in Angstrom."""
    return masses.sum() / np.abs(np.linalg.det(cells)) / units.kg * units.m**3 * 1e-3


def start(job: Job, n: int, equilibrate: float, share: float) -> Atoms:
    """A liquid at the experimental density and TEMPERATURE."""
    atoms = box(n, job.rng(1))
    if not job.state:
        atoms = relax(atoms, job, fmax=1.0, steps=200)
        thermalize(atoms, TEMPERATURE, job.rng(2))
    dynamics(
        job, atoms,
        lambda a, rng: LangevinBAOAB(a, TIMESTEP * units.fs, temperature_K=TEMPERATURE, T_tau=100 * units.fs, rng=rng),
        equilibrate, EVERY, TEMPERATURE, "equilibration", (0.0, share),
    )  # fmt: skip
    return atoms


# ---- the parts ---------------------------------------------------------------------------------------------------------


def liquid(job: Job) -> dict:
    """Constant volume: radial distribution functions, intact molecules, mean square displacement of the oxygen atoms.

    Of a teacher by reweighting there are no displacements: weights know of averages, not of times.
    """
    n, equilibrate, produce = lengths(job)
    share, end = equilibrate / (equilibrate + produce), 1.0 if job.target is None else 0.8
    atoms = start(job, n, equilibrate, share * end)
    # a global thermostat leaves the dynamics of the molecules alone
    run = dynamics(
        job, atoms, lambda a, rng: Bussi(a, TIMESTEP * units.fs, TEMPERATURE, 1000 * units.fs, rng=rng),
        produce, EVERY, TEMPERATURE, "production", (share * end, end),
    )  # fmt: skip
    samples, average, reweighted = ensemble(job, atoms, run, 0, TEMPERATURE, end)
    r_max, numbers = min(run.cells[0].diagonal()) / 2, atoms.numbers
    result = {"ps": produce, "molecules": n**3, "edge": float(run.cells[0][0, 0]), "radii": None, "rdf": {}, "peaks": {}}
    result |= reweighted
    bond = np.linalg.norm(run.positions[:, 0::3, None] - np.stack([run.positions[:, 1::3], run.positions[:, 2::3]], 2), axis=3)
    result["longest_bond"] = float(bond.max())
    for pair, window in PAIRS.items():
        a, b = (np.flatnonzero(numbers == {"O": 8, "H": 1}[x]) for x in pair.split("-"))
        frames = []
        for sample in samples:
            here = slice(sample, sample + 1)
            radii, g = rdf(run.positions[here], run.cells[here], a, b, r_max, exclude=np.arange(len(atoms)) // 3)
            frames.append(g)
        g = np.array(frames)
        (position, height), errors = jackknife(lambda which: peak(radii, average(g, which), window), len(samples))
        result["radii"], result["rdf"][pair] = radii.round(4).tolist(), average(g, np.arange(len(samples))).round(5).tolist()
        result["peaks"][pair] = {"position": position, "height": height, "errors": errors.tolist()}
    result |= {"temperature": float(run.temperatures.mean()), "temperature_error": block_error(run.temperatures)}
    if job.target is not None:
        return result | {"lag": [], "msd": [], "diffusion": None, "diffusion_error": None}
    oxygen, lags = run.positions[:, numbers == 8], np.arange(0, len(run.times) // 2 + 1, 5)
    value, error = diffusion(oxygen, EVERY)
    msd = mean_square_displacement(oxygen, lags)
    return result | {"lag": (lags * EVERY).round(4), "msd": msd.round(5), "diffusion": value, "diffusion_error": error}


def pressure(job: Job) -> dict:
    """Constant pressure (isotropic barostat): density. Of a teacher by reweighting there is no series of densities."""
    n, equilibrate, produce = lengths(job)
    equilibrate /= 3  # the first quarter of the run is left out anyway
    share, end = equilibrate / (equilibrate + produce), 1.0 if job.target is None else 0.8
    atoms = start(job, n, equilibrate, share * end)

    def npt(a: Atoms, rng: np.random.Generator) -> LangevinBAOAB:
        stress = -PRESSURE * 1e-4 * units.GPa
        tau, mass = 100 * units.fs, barostat_mass(a)
        return LangevinBAOAB(
            a, TIMESTEP * units.fs, temperature_K=TEMPERATURE, externalstress=stress, hydrostatic=True, T_tau=tau,
            P_tau=500 * units.fs, P_mass=mass, rng=rng,
        )  # fmt: skip

    run = dynamics(job, atoms, npt, produce, EVERY, TEMPERATURE, "production", (share * end, end))
    series = density(atoms.get_masses(), run.cells)
    samples, average, reweighted = ensemble(job, atoms, run, len(series) // 4, TEMPERATURE, end)
    value, error = jackknife(lambda which: average(series[samples], which), len(samples))
    shown = slice(None, None, 5) if job.target is None else slice(0)
    return {
        "ps": produce, "molecules": n**3, **reweighted, "density": float(value), "density_error": float(error),
        "times": run.times[shown].round(4).tolist(), "series": series[shown].round(5).tolist(),
        "temperature": float(run.temperatures.mean()), "temperature_error": block_error(run.temperatures),
    }  # fmt: skip


def barostat_mass(atoms: Atoms) -> float:
    """Mass of the cell with which the volume of liquid water swings with BAROSTAT: W = 9 B V (period / 2 pi)^2."""
    return 9 * BULK_MODULUS * units.GPa * atoms.get_volume() * (BAROSTAT * units.fs / (2 * np.pi)) ** 2


def conserve(job: Job) -> dict:
    """Constant energy, from the relaxed lattice."""
    n, _, produce = lengths(job)
    return nve(job, relax(box(n, job.rng(1)), job, fmax=1.0, steps=200), TEMPERATURE, produce / 2)


PARTS = {"liquid": liquid, "pressure": pressure}
MODEL_PARTS = {"conservation": conserve}  # a teacher need not run these


def samples(job: Job) -> dict[str, Atoms]:
    """Structures for the general checks: the liquid (examples/validate/water_frames.py made it), and bent and stretched molecules."""
    if job.settings.quick:
        liquid = [box(2, job.rng(3))]
    else:
        liquid = shipped_structures("water.extxyz")
    frames = {}
    for k, atoms in enumerate(liquid):
        alone = molecule("H2O")
        alone.positions += job.rng(4, k).normal(0, 0.05, alone.positions.shape)
        for kind, one in (("liquid", atoms), ("molecule", alone)):
            one.info = {"kind": kind}
            frames[f"{kind} {k}"] = one
    return frames


# ---- comparison --------------------------------------------------------------------------------------------------------


def compare(mine: dict, theirs: dict | None, teacher: str) -> list[Check]:
    """Rows of the report. ``mine`` and ``theirs`` are the parts of measurements."""
    sections = {
        "liquid": (_liquid, "Structure and diffusion at constant volume"),
        "pressure": (_pressure, "Density at constant pressure"),
    }
    checks = compare_parts(sections, mine, theirs, teacher)
    if "conservation" in mine:
        checks += conservation(mine)
    return checks


def _length(result: dict) -> str:
    if "effective" not in result:
        return f"{result['ps']:g} ps"
    how = "to first order" if result["first_order"] else f"exactly, {result['effective']:.0f} effective ones"
    spread = f"energies differ by {result['spread']:.1f} kB T"
    return f"{result['ps']:g} ps of a model, {result['frames']} frames of which reweighted ({how}; {spread})"


def _run(result: dict) -> str:
    return f"{result['molecules']} molecules, {_length(result)}, {result['temperature']:.1f} K"


def _deviation(name: str, change: float, errors: tuple, scale: float, unit: str, limit: float | None, teacher: str) -> Check:
    error = None if None in errors else np.hypot(*errors) * scale
    note = f"from {teacher}; the error is that of both, as if they were independent"
    return Check(f"{name}, deviation", abs(change) * scale, unit, limit, note, error=error)


def corrected(result: dict) -> float | None:
    """Diffusion coefficient of an infinite box, Angstrom^2/ps: Yeh and Hummer's correction with the experimental viscosity."""
    if result["diffusion"] is None:
        return None
    size = units._k * TEMPERATURE * HASIMOTO / (6 * np.pi * VISCOSITY * result["edge"] * 1e-10)  # m^2/s
    return result["diffusion"] + size * 1e8


def _liquid(mine, theirs, teacher):
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    label = f"{teacher}, {'reweighted' if 'effective' in theirs else _length(theirs)}" if theirs else ""
    for axes, pair in zip(figure.subplots(1, 3), PAIRS):
        axes.axhline(1, color="0.85", lw=0.8)
        axes.plot(mine["radii"], mine["rdf"][pair], lw=1, label=f"model, {mine['ps']:g} ps")
        if theirs:
            axes.plot(theirs["radii"], theirs["rdf"][pair], "k--", lw=1, label=label)
        axes.set(xlabel="distance, Å", ylabel=f"g({pair})", xlim=(1.0 if "H" in pair else 2.0, mine["radii"][-1]))
    figure.axes[0].plot(*OXYGEN_PEAK, "r^", label="X-ray, peak")
    figure.axes[0].legend(fontsize=7)
    checks = [Check("longest O-H bond", mine["longest_bond"], "Å", 1.5, f"molecules stay whole; {_run(mine)}", png(figure))]
    for pair in PAIRS:
        a, b = mine["peaks"][pair], theirs["peaks"][pair] if theirs else None
        note = f"pairs of different molecules, {_run(mine)}"
        if pair == "O-O":
            note += (
                f"; X-rays at 295 K: {OXYGEN_PEAK[0]:.2f} Å, height {OXYGEN_PEAK[1]} (Skinner et al. 2013); classical nuclei here"
            )
        for k, (key, unit, limit) in enumerate((("position", "Å", 0.02), ("height", "", 5.0))):
            checks.append(Check(f"{pair} peak, {key}", a[key], unit, note=note, error=a["errors"][k]))
            if b:
                checks.append(Check(f"{pair} peak, {key}, {teacher}", b[key], unit, note=_run(theirs), error=b["errors"][k]))
                scale, unit = (1.0, unit) if unit else (100 / b[key], "%")
                judged = limit if pair == "O-O" else None
                checks.append(
                    _deviation(
                        f"{pair} peak, {key}", a[key] - b[key], (a["errors"][k], b["errors"][k]), scale, unit, judged, teacher
                    )
                )
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(mine["lag"], mine["msd"], label="model")
    if theirs and theirs["msd"]:
        axes.plot(theirs["lag"], theirs["msd"], "k--", label=teacher)
    axes.set(xlabel="time, ps", ylabel="mean square displacement of O, Å²", xlim=(0, None), ylim=(0, None))
    axes.legend()
    note = f"Einstein relation, oxygen atoms about their common centre, {_run(mine)}, thermostat of velocity rescaling with 1 ps"
    low, high = diffusion_window(mine["ps"])
    note += f"; slope between {low:.2g} and {high:.2g} ps" + (
        "" if low == 1 else ", too early: molecules still rattle in their cages"
    )
    checks.append(Check("diffusion", mine["diffusion"], "Å²/ps", note=note, figure=png(figure), error=mine["diffusion_error"]))
    note = (
        f"the same for an infinite box: + kB T {HASIMOTO} / (6 pi eta L), Yeh and Hummer (2004), with the experimental viscosity "
        f"{VISCOSITY * 1e3:.3f} mPa s; experiment {DIFFUSION} Å²/ps (Holz et al. 2000)"
    )
    checks.append(Check("diffusion, infinite box", corrected(mine), "Å²/ps", note=note, error=mine["diffusion_error"]))
    if theirs and theirs["diffusion"] and mine["diffusion"]:
        value = 100 * abs(mine["diffusion"] / theirs["diffusion"] - 1)
        error = 100 * np.hypot(mine["diffusion_error"], theirs["diffusion_error"]) / theirs["diffusion"]
        note = f"from {teacher}, {theirs['diffusion']:.3g} Å²/ps in a box of the same size; no bar of its own"
        checks.append(Check("diffusion, deviation", value, "%", note=note, error=error))
    return checks


def _pressure(mine, theirs, teacher):
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(mine["times"], mine["series"], lw=1, label="model")
    if theirs and theirs["series"]:
        axes.plot(theirs["times"], theirs["series"], "k--", lw=1, label=teacher)
    elif theirs:
        axes.axhline(theirs["density"], color="k", ls="--", lw=1, label=f"{teacher}, reweighted")
    axes.axhline(DENSITY, color="r", lw=0.8, ls=":", label="experiment, 300 K")
    axes.set(xlabel="time, ps", ylabel="density, g/cm³")
    axes.legend()
    note = f"{_run(mine)}, {PRESSURE:g} bar, first quarter left out; experiment {DENSITY} g/cm³"
    checks = [Check("density", mine["density"], "g/cm³", note=note, figure=png(figure), error=mine["density_error"])]
    if theirs:
        note = f"{_run(theirs)}, {PRESSURE:g} bar"
        checks.append(Check(f"density, {teacher}", theirs["density"], "g/cm³", note=note, error=theirs["density_error"]))
        change, errors = mine["density"] - theirs["density"], (mine["density_error"], theirs["density_error"])
        checks.append(_deviation("density", change, errors, 100 / theirs["density"], "%", 2.0, teacher))
    return checks


# ---- analysis ----------------------------------------------------------------------------------------------------------


def rdf(positions, cells, a, b, r_max: float, exclude=None) -> tuple[np.ndarray, np.ndarray]:
    """Radial distribution function: pairs found over pairs expected of an ideal gas in the same volume, so it tends to 1.

    Args:
        positions: [S, N, 3]. cells: [S, 3, 3].
        a, b: indices of the two kinds of atoms, either the same or disjoint.
        r_max: at most half of the smallest height of the cells, Angstrom.
        exclude: [N], numbers of molecules: pairs inside of one do not count.

    Returns:
        centres of the bins in Angstrom, g.
    """
    edges = np.arange(0.0, r_max + 1e-9, BIN)
    counted = np.asarray(a)[:, None] != np.asarray(b)[None, :]
    if exclude is not None:
        counted &= exclude[a][:, None] != exclude[b][None, :]
    count, expected = np.zeros(len(edges) - 1), 0.0
    for x, cell in zip(positions, cells):
        fractional = (x[a][:, None] - x[b][None])[counted] @ np.linalg.inv(cell)
        distances = np.linalg.norm((fractional - fractional.round()) @ cell, axis=1)
        count += np.histogram(distances, edges)[0]
        expected += counted.sum() / abs(np.linalg.det(cell))
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    return (edges[1:] + edges[:-1]) / 2, count / (expected * shells)


def peak(radii, g, window: tuple[float, float]) -> tuple[float, float]:
    """Position and height of the highest peak in a window: the top of a parabola through 0.1 Angstrom to either side of it."""
    inside = np.flatnonzero((radii >= window[0]) & (radii <= window[1]))
    if len(inside) < 5:
        return float("nan"), float("nan")
    top = inside[np.argmax(g[inside])]
    near = slice(max(0, top - 5), top + 6)
    c, b, a = np.polynomial.polynomial.polyfit(radii[near] - radii[top], g[near], 2)
    if a >= 0 or abs(b / (2 * a)) > 0.1:
        return float(radii[top]), float(g[top])
    return float(radii[top] - b / (2 * a)), float(c - b**2 / (4 * a))


def mean_square_displacement(positions: np.ndarray, lags: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """[L], of positions [S, N, 3] over all origins, for these lags in samples.

    About the centre of all, or one given as [S, 1, 3]: a drift of the whole is no diffusion.
    """
    x = positions - (positions.mean(1, keepdims=True) if centre is None else centre)
    return np.array([((x[k:] - x[: len(x) - k]) ** 2).sum(2).mean() for k in lags])


def diffusion_window(ps: float) -> tuple[float, float]:
    """Lags in ps between which the slope is taken, of a run of this length."""
    return min(1.0, 0.1 * ps), min(5.0, 0.25 * ps)


def diffusion(positions: np.ndarray, every: float) -> tuple[float, float]:
    """Diffusion coefficient, a sixth of the slope of the mean square displacement, and its standard error; in length^2 / time.

    The slope is taken in diffusion_window; the error is that of the mean over eight groups of molecules. NaN for a run of less than
    8 samples.
    """
    length, centre = len(positions) * every, positions.mean(1, keepdims=True)
    first, last = (round(time / every) for time in diffusion_window(length))
    lags = np.arange(first, last + 1)
    if len(lags) < 2:
        return float("nan"), float("nan")

    def slope(part: np.ndarray) -> float:
        return float(np.polyfit(lags * every, mean_square_displacement(part, lags, centre), 1)[0] / 6)

    groups = [slope(positions[:, k]) for k in np.array_split(np.arange(positions.shape[1]), min(8, positions.shape[1]))]
    return slope(positions), float(np.std(groups, ddof=1) / np.sqrt(len(groups)))
