"""The suite crystal: lattice constant, bulk modulus, elastic constants, phonons of a cubic crystal.

The crystal is the one of CRYSTALS with the elements of the model, or a unit cell given by the user.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.eos import EquationOfState
from ase.geometry import cell_to_cellpar
from ase.md.langevinbaoab import LangevinBAOAB
from ase.optimize import FIRE
from ase.phonons import Phonons
from ase.stress import full_3x3_to_voigt_6_stress
from matplotlib.figure import Figure

from .checks import Check, compare_parts, conservation, failed, png
from .measurement import TIMESTEP, Breakdown, Job, dynamics, nve, thermalize

CRYSTALS = {  # elements: formula, structure, lattice constant in Angstrom to start from
    "Mg O": ("MgO", "rocksalt", 4.21), "Ca O": ("CaO", "rocksalt", 4.81), "Na Cl": ("NaCl", "rocksalt", 5.64),
    "Li F": ("LiF", "rocksalt", 4.03), "K Cl": ("KCl", "rocksalt", 6.29), "Si": ("Si", "diamond", 5.43),
    "C": ("C", "diamond", 3.57),
    "Ge": ("Ge", "diamond", 5.66), "Si C": ("SiC", "zincblende", 4.36), "Ga As": ("GaAs", "zincblende", 5.65),
    "Al": ("Al", "fcc", 4.05), "Cu": ("Cu", "fcc", 3.61), "Ni": ("Ni", "fcc", 3.52), "Ag": ("Ag", "fcc", 4.09),
    "Au": ("Au", "fcc", 4.08), "Pt": ("Pt", "fcc", 3.92), "Pd": ("Pd", "fcc", 3.89), "Ar": ("Ar", "fcc", 5.26),
    "Fe": ("Fe", "bcc", 2.87), "W": ("W", "bcc", 3.16), "Na": ("Na", "bcc", 4.23), "Li": ("Li", "bcc", 3.49),
}  # fmt: skip
STRAINS = np.linspace(-0.03, 0.03, 9)  # of the lengths, for the equation of state
SHEAR = 0.005  # strain for elastic constants
LATTICE_LIMIT, BULK_LIMIT, FORCE_LIMIT = 0.3, 8.0, 15.0  # %, %, meV/Angstrom against the teacher
ELEMENTS: set[str] = set()  # those of the crystal
TIMES = "about 10 minutes for a default model on one core of a CPU, nearly all of it dynamics of some hundred atoms, twice 5 ps"
TEMPERATURE, RUN = 300.0, 5.0  # K, ps, of the run for stability


def unit_cell(species: list[str], given: Atoms | None = None) -> Atoms:
    """The primitive cell to start from.

    Raises:
        ValueError: it is not cubic or not periodic, or there is none for these elements.
    """
    if given is not None:
        lengths, angles = np.split(cell_to_cellpar(given.cell), 2)
        equal = np.ptp(lengths) < 1e-3 * lengths.mean() and np.ptp(angles) < 0.1
        if not given.pbc.all() or not equal or min(abs(angles[0] - x) for x in (60, 90, 109.4712)) > 0.1:
            raise ValueError(
                f"{given.symbols}: expected a periodic cell of a cubic crystal, primitive or conventional; "
                f"got cell {np.round(cell_to_cellpar(given.cell), 3).tolist()}, pbc {given.pbc.tolist()}"
            )
        return Atoms(given.numbers, scaled_positions=given.get_scaled_positions(), cell=given.cell, pbc=True)
    for elements, (name, structure, a) in CRYSTALS.items():
        if set(elements.split()) == set(species):
            return bulk(name, structure, a=a)
    some = " ".join(species) if len(species) < 10 else f"{len(species)} elements"
    raise ValueError(f"the suite crystal has no cubic crystal of {some}; give one (--cell FILE)")


def lattice_constant(cell: Atoms) -> float:
    """Edge of the conventional cube in Angstrom, of a simple, face-centred or body-centred cell."""
    primitive_cells = {60: 4, 90: 1, 109: 2}[round(cell.cell.angles()[0])]
    return float((primitive_cells * cell.get_volume()) ** (1 / 3))


def supercell(cell: Atoms, job: Job, least: float) -> tuple[int, int, int]:
    """Odd repetitions after which every height is at least this, Angstrom; 3 in a quick run.

    Odd, because the images of an even number are not symmetric about the displaced atom: ase.phonons would give imaginary
    frequencies near the origin.
    """
    heights = 1 / np.linalg.norm(np.linalg.inv(cell.cell.array), axis=0)
    return (3, 3, 3) if job.settings.quick else tuple(int(n) // 2 * 2 + 1 for n in np.maximum(3, np.ceil(least / heights)))


def relaxed(job: Job) -> tuple[Atoms, dict]:
    """The cell at the minimum of its equation of state, and what that says. Birch-Murnaghan fit; positions inside are kept: where
    symmetry does not fix them they are relaxed at every volume."""
    cell = unit_cell(job.species, job.crystal)
    strains = STRAINS
    for _ in range(4):
        volumes, energies = [], []
        for strain in strains:
            atoms = cell.copy()
            atoms.set_cell(cell.cell * (1 + strain), scale_atoms=True)
            atoms = inside(atoms, job)
            volumes.append(atoms.get_volume() / len(atoms))
            energies.append(job.single_point(atoms)[0] / len(atoms))
        lowest = int(np.argmin(energies))
        if 0 < lowest < len(strains) - 1:
            break
        cell.set_cell(cell.cell * (1 + strains[lowest]), scale_atoms=True)
    else:
        raise Breakdown(f"no minimum of the energy of {cell.symbols} within {abs(strains[0]) * 400:.0f} % of the lattice constant")
    v0, e0, b = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    cell.set_cell(cell.cell * (v0 * len(cell) / cell.get_volume()) ** (1 / 3), scale_atoms=True)
    cell = inside(cell, job)
    eos = {"volumes": volumes, "energies": energies, "v0": v0, "e0": e0, "b": b / units.GPa, "a0": lattice_constant(cell)}
    return cell, eos


def inside(atoms: Atoms, job: Job) -> Atoms:
    """Positions relaxed in a fixed cell."""
    atoms = atoms.copy()
    atoms.calc = job.calculator
    FIRE(atoms, logfile=None).run(fmax=1e-4, steps=200)
    if not np.isfinite(atoms.positions).all():
        raise Breakdown(f"the relaxation of {atoms.symbols} ran away")
    return atoms


# ---- the parts ---------------------------------------------------------------------------------------------------------


def lattice(job: Job) -> dict:
    """Equation of state: lattice constant, bulk modulus."""
    cell, eos = relaxed(job)
    return {"formula": str(cell.symbols), **eos}


def elasticity(job: Job) -> dict:
    """C11, C12, C44 in GPa from the stress under small strains, central differences, positions relaxed.

    ``deviation`` is how far the cell is from cubic: the largest difference between the three axes, GPa.
    """
    cell, _ = relaxed(job)
    size = max(1, round(4.0 / cell.cell.lengths().min())) if not job.settings.quick else 1
    cell = cell.repeat(size)
    columns = []
    for k in range(6):
        strain = np.zeros(6)
        strain[k] = SHEAR
        xx, yy, zz, yz, xz, xy = strain
        tensor = np.array([[xx, xy / 2, xz / 2], [xy / 2, yy, yz / 2], [xz / 2, yz / 2, zz]])
        pair = []
        for sign in (1, -1):
            atoms = cell.copy()
            atoms.set_cell(cell.cell.array @ (np.eye(3) + sign * tensor), scale_atoms=True)
            atoms = inside(atoms, job)
            stress = np.asarray(job.calculator.get_property("stress", atoms))
            pair.append(full_3x3_to_voigt_6_stress(stress) if stress.shape == (3, 3) else stress)
        columns.append((pair[0] - pair[1]) / (2 * SHEAR) / units.GPa)
        job.progress((k + 1) / 6)
    c = np.array(columns).T
    if not np.isfinite(c).all():
        raise Breakdown(f"the stress of {cell.symbols} is not finite")
    normal, shear = c[:3, :3], np.diag(c)[3:]
    off = normal[~np.eye(3, dtype=bool)]
    deviation = max(np.ptp(np.diag(normal)), np.ptp(off), np.ptp(shear))
    return {"c11": np.diag(normal).mean(), "c12": off.mean(), "c44": shear.mean(), "deviation": deviation}


class NearestImages(Phonons):
    """Phonons in which two atoms act on each other over the nearest of their images, by equal shares over equally near ones.

    ase.phonons takes the images of one parallelepiped of cells. In a skewed cell, as the primitive one of rock salt, those at its
    corners are not the nearest, and acoustic frequencies between the origin and the first wave vector that fits into the supercell
    become imaginary. At wave vectors that fit both are the same.
    """

    @cached_property
    def images(self) -> tuple[np.ndarray, ...]:
        """Of every image: atoms a and b, index of b's cell, vector to it [M, 3] in lattice vectors, weight; sorted by a and b."""
        shifts = (np.indices((5, 5, 5)).reshape(3, -1).T - 2) * self.supercell
        vectors = self.compute_lattice_vectors().T[:, None] + shifts
        offsets = self.atoms.positions[None] - self.atoms.positions[:, None]
        lengths = np.linalg.norm(vectors @ self.atoms.cell.array + offsets[:, :, None, None], axis=-1)
        near = lengths < lengths.min(-1, keepdims=True) + 1e-3
        first, second, cells, image = near.nonzero()
        return first, second, cells, vectors[cells, image], 1 / near.sum(-1)[first, second, cells]

    def compute_dynamical_matrix(self, q_scaled: np.ndarray, D_N: np.ndarray) -> np.ndarray:
        first, second, cells, vectors, weights = self.images
        n = len(self.atoms)
        phases = weights * np.exp(-2j * np.pi * vectors @ q_scaled)
        terms = phases[:, None, None] * D_N.reshape(-1, n, 3, n, 3)[cells, first, :, second]
        blocks = np.add.reduceat(terms, np.searchsorted(first * n + second, np.arange(n * n)))
        return blocks.reshape(n, n, 3, 3).swapaxes(1, 2).reshape(3 * n, 3 * n)


def phonons(job: Job) -> dict:
    """Band structure along the standard path and density of states, finite displacements of 0.01 Angstrom, THz."""
    cell, _ = relaxed(job)
    size = supercell(cell, job, 10.0)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # it prints a line for each imaginary frequency
        run = NearestImages(cell, job.calculator, supercell=size, delta=0.01, name=str(Path(folder) / "phonon"))
        run.run()
        run.read(acoustic=True)
        path = cell.cell.bandpath(npoints=20 if job.settings.quick else 120)
        bands = run.get_band_structure(path, verbose=False)
        dos = run.get_dos((6,) * 3 if job.settings.quick else (20,) * 3)
    thz = units._e / units._hplanck / 1e12  # of an energy in eV
    axis, ticks, labels = path.get_linear_kpoint_axis()
    energies = bands.energies[0] * thz
    sampled = dos.sample_grid(200, xmin=min(0.0, energies.min() / thz), width=0.01 * energies.max() / thz)
    return {
        "supercell": list(size), "axis": axis.round(5), "ticks": ticks, "labels": labels, "bands": energies.round(4),
        "dos_frequencies": (sampled.get_energies() * thz).round(4), "dos": (sampled.get_weights() / thz).round(5),
    }  # fmt: skip


def stability(job: Job) -> dict:
    """Dynamics at 300 K, zero pressure not imposed: does the crystal stay a crystal?"""
    cell, _ = relaxed(job)
    start = cell.repeat(supercell(cell, job, 9.0))
    atoms, ps = start.copy(), job.settings.ps or (0.05 if job.settings.quick else RUN)
    thermalize(atoms, 2 * TEMPERATURE, job.rng(7))  # half of it goes into the bonds
    run = dynamics(
        job, atoms, lambda a, rng: LangevinBAOAB(a, TIMESTEP * units.fs, temperature_K=TEMPERATURE, T_tau=100 * units.fs, rng=rng),
        ps, 0.01, TEMPERATURE,
    )  # fmt: skip
    moved = run.positions - start.positions
    moved -= moved.mean(1, keepdims=True)
    settled = slice(len(run.times) // 2, None)
    largest = float(np.linalg.norm(moved, axis=2).max())
    nearest = float(start.get_all_distances(mic=True)[~np.eye(len(start), dtype=bool)].min())
    return {
        "ps": ps, "atoms": len(start), "temperature": run.temperatures[settled].mean(), "largest": largest, "nearest": nearest,
        "rms": float(np.sqrt((moved[settled] ** 2).sum(2).mean())),
    }  # fmt: skip


def conserve(job: Job) -> dict:
    """Constant energy at 300 K."""
    cell, _ = relaxed(job)
    ps = job.settings.ps or (0.05 if job.settings.quick else RUN)
    return nve(job, cell.repeat(supercell(cell, job, 9.0)), TEMPERATURE, ps)


PARTS = {"lattice": lattice, "elasticity": elasticity, "phonons": phonons}
MODEL_PARTS = {"stability": stability, "conservation": conserve}  # a teacher need not run these


def samples(job: Job) -> dict[str, Atoms]:
    """Structures for the general checks: supercells, strained, with every atom moved at random (rms along each axis)."""
    cell, frames = unit_cell(job.species, job.crystal), {}
    start = cell.repeat(supercell(cell, job, 8.0))
    for k, (size, strain) in enumerate([(0.03, 0.0), (0.06, 0.0), (0.1, 0.0), (0.06, 0.03), (0.06, -0.03)]):
        for copy in range(1 if job.settings.quick else 4):
            rng, atoms = job.rng(8, k, copy), start.copy()
            change = np.eye(3) * (1 + strain) + rng.normal(0, abs(strain) / 5, (3, 3))
            atoms.set_cell(atoms.cell.array @ change, scale_atoms=True)
            atoms.positions += rng.normal(0, size, atoms.positions.shape)
            kind = f"rattled {size:g} Å, strained {100 * strain:g} %"
            atoms.info = {"kind": kind}
            frames[f"{kind}, {copy}"] = atoms
    return frames


# ---- comparison --------------------------------------------------------------------------------------------------------


def compare(mine: dict, theirs: dict | None, teacher: str) -> list[Check]:
    """Rows of the report. ``mine`` and ``theirs`` are the parts of measurements."""
    sections = {
        "lattice": (_lattice, "Equation of state"),
        "elasticity": (_elasticity, "Elastic constants"),
        "phonons": (_phonons, "Phonons"),
        "stability": (_stability, "Stability at 300 K"),
    }
    checks = compare_parts(sections, mine, theirs, teacher)
    if not any("error" in mine[part] for part in ("lattice", "elasticity")):
        c, b = mine["elasticity"], mine["lattice"]["b"]
        value = 100 * abs((c["c11"] + 2 * c["c12"]) / 3 / b - 1)
        note = "(C11 + 2 C12) / 3 from stresses against the equation of state from energies: energy and stress of the model agree"
        checks.append(Check("bulk modulus, two ways", value, "%", 3.0, note, section="Elastic constants"))
    if "conservation" in mine:
        checks += conservation(mine)
    return checks


def _against(
    name: str, mine: float, theirs: float | None, unit: str, teacher: str, limit: float | None, figure=None
) -> list[Check]:
    """A number, and its deviation from the teacher's in percent."""
    if theirs is None:
        return [Check(name, mine, unit, note="no reference to compare with", figure=figure)]
    error = 100 * abs(mine / theirs - 1)
    return [
        Check(name, mine, unit, note=f"{teacher}: {theirs:.6g} {unit}", figure=figure),
        Check(f"{name}, deviation", error, "%", limit, f"from {teacher}"),
    ]


def _lattice(mine, theirs, teacher):
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for result, style, name in ((mine, "o-", "model"), (theirs, "k^--", teacher)):
        if result:
            v, e = np.array(result["volumes"]), np.array(result["energies"])
            axes.plot(v, (e - result["e0"]) * 1000, style, ms=4, label=name)
    axes.set(
        xlabel="volume, Å³/atom",
        ylabel="energy above the minimum, meV/atom",
        title=f"{mine['formula']}, 9 volumes, Birch-Murnaghan",
    )
    axes.legend()
    a, b = (theirs[key] if theirs else None for key in ("a0", "b"))
    checks = _against("lattice constant", mine["a0"], a, "Å", teacher, LATTICE_LIMIT, png(figure))
    return checks + _against("bulk modulus", mine["b"], b, "GPa", teacher, BULK_LIMIT)


def _elasticity(mine, theirs, teacher):
    checks = []
    for key in ("c11", "c12", "c44"):
        checks += _against(key.upper(), mine[key], theirs[key] if theirs else None, "GPa", teacher, None)
    c11, c12, c44 = mine["c11"], mine["c12"], mine["c44"]
    value, note = (
        -min(c11 - c12, c11 + 2 * c12, c44),
        "minus the least of C11 - C12, C11 + 2 C12 and C44; negative: mechanically stable (Born)",
    )
    checks.append(Check("elastic stability", value, "GPa", 0.0, note))
    checks.append(
        Check("deviation from cubic", mine["deviation"], "GPa", 0.02 * abs(c11), "among the three axes; the limit is 2 % of C11")
    )
    return checks


def _phonons(mine, theirs, teacher):
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    for result, style, name in ((theirs, "k--", teacher), (mine, "C0-", "model")):
        if result:
            lines = axes.plot(result["axis"], result["bands"], style, lw=1)
            lines[0].set_label(name)
            right.plot(result["dos"], result["dos_frequencies"], style, lw=1)
    for tick in mine["ticks"]:
        axes.axvline(tick, color="0.85", lw=0.8, zorder=0)
    axes.axhline(0, color="0.7", lw=0.8)
    axes.set_xticks(mine["ticks"], [label.replace("G", "Γ") for label in mine["labels"]])
    axes.set(ylabel="frequency, THz; imaginary ones negative", xlim=(mine["axis"][0], mine["axis"][-1]))
    right.set(xlabel="density of states, 1/THz")
    axes.legend()
    size = "×".join(map(str, mine["supercell"]))
    bands = np.array(mine["bands"])
    note = (
        f"minus the lowest on the path; supercell {size} of the primitive cell, displacements of 0.01 Å; no splitting of LO and TO"
    )
    checks = [Check("imaginary phonons", -bands.min(), "THz", 0.1, note, png(figure))]
    if theirs:
        other = np.array(theirs["bands"])
        if other.shape == bands.shape:
            note = f"all branches along the path; against {teacher}, mean frequency {other.mean():.3g} THz"
            checks.append(Check("phonon frequencies, MAE", abs(bands - other).mean(), "THz", note=note))
            note = f"against {teacher}, {other.max():.4g} THz"
            checks.append(Check("highest phonon, deviation", abs(bands.max() - other.max()), "THz", note=note))
        else:
            checks.append(
                failed("phonon frequencies, MAE", f"the reference has {other.shape[1]} branches, the model {bands.shape[1]}")
            )
    return checks


def _stability(mine, theirs, teacher):
    note = (
        f"largest displacement of an atom in {mine['ps']:g} ps, {mine['atoms']} atoms, Langevin dynamics at {TEMPERATURE:.0f} K, "
        f"steps of {TIMESTEP} fs; the limit is a third of the distance of neighbours; "
        f"rms {mine['rms']:.3f} Å; temperature {mine['temperature']:.0f} K"
    )
    return [Check("atoms stay at their sites", mine["largest"], "Å", mine["nearest"] / 3, note)]
