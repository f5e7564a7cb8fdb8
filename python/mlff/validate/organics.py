"""The suite organics: conformers, torsions, vibrations and interactions of neutral closed-shell molecules in open space.

Molecules and their conformers are in structures/conformers.extxyz (examples/validate/conformers.py made it), those of the G2 and
S22 sets come with ASE. What holds an element that the model does not know is left out.

Every potential relaxes the structures itself, from the same starts: this is what a user of either gets.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from zlib import crc32

import ase.data.s22 as s22_data
import numpy as np
from ase import Atoms, units
from ase.build import minimize_rotation_and_translation, molecule
from ase.collections import g2
from ase.constraints import FixInternals
from ase.data import covalent_radii
from ase.md.langevinbaoab import LangevinBAOAB
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.optimize import BFGS
from matplotlib.figure import Figure
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import mannwhitneyu

from .checks import Check, compare_parts, conservation, failed, png
from .measurement import TIMESTEP, Breakdown, Job, dynamics, nve, relax, shipped_structures, thermalize

KCAL = units.kcal / units.mol
CARBENES = ("CH2_s1A1d", "SiH2_s1A1d")  # closed shells on paper
HOT = 500.0  # K, of the runs for stability
RUN = 2.0  # ps of each
CONSERVATION = 10.0  # ps, of the run at constant energy
CONFORMER_LIMIT = 0.6  # kcal/mol against the teacher
FORCE_LIMIT, R2_LIMIT = 40.0, 1e-3  # meV/Angstrom against the teacher; 1 - R^2
OUT_OF_DOMAIN = ("ion", "radical", "unusual")  # kinds of structures/out-of-domain.extxyz
AUC_LIMIT = 0.15  # of 1 - AUC, all of them
SAME = 0.5  # Angstrom: minima that differ by more (RMSD of all atoms) are different ones
ELEMENTS = {"H", "C"}
TIMES = "about 6 minutes for a default model on one core of a CPU, of which dynamics take 5; a teacher of 20 ms takes 10"
S22X5 = ("0.9", "1.0", "1.2", "1.5", "2.0")  # distances, of that at equilibrium


def known(frames: dict[str, Atoms], job: Job, few: int) -> dict[str, Atoms]:
    """Those with elements to look at; of a quick run the smallest few."""
    chosen = {name: atoms for name, atoms in frames.items() if set(atoms.symbols) <= set(job.species)}
    if job.settings.quick:
        chosen = {name: chosen[name] for name in sorted(chosen, key=lambda name: len(chosen[name]))[:few]}
    return chosen


def conformer_structures() -> dict[str, list[Atoms]]:
    """The conformers that are shipped, by molecule. info["torsion"] [4] names the atoms of a dihedral angle."""
    molecules: dict[str, list[Atoms]] = defaultdict(list)
    for atoms in shipped_structures("conformers.extxyz"):
        molecules[atoms.info["molecule"]].append(atoms)
    return dict(molecules)


def g2_molecules() -> dict[str, Atoms]:
    """Molecules of G2 with closed shells and more than one atom."""
    frames = {name: molecule(name) for name in g2.names if name not in CARBENES}
    return {name: a for name, a in frames.items() if len(a) > 1 and not a.get_initial_magnetic_moments().any()}


# ---- the parts ---------------------------------------------------------------------------------------------------------


def conformers(job: Job) -> dict:
    """Energies and geometries of relaxed conformers."""
    molecules = conformer_structures()
    several = {name: frames for name, frames in molecules.items() if len(frames) > 1}
    chosen = known({name: frames[0] for name, frames in several.items()}, job, 1)

    def one(name: str) -> dict:
        minima = [relax(atoms, job) for atoms in several[name]]
        energies = [job.single_point(atoms)[0] for atoms in minima]
        return {"energies": energies, "positions": [atoms.positions.round(4) for atoms in minima]}

    return job.each({name: name for name in chosen}, one)


def torsions(job: Job) -> dict:
    """Relaxed energy along a dihedral angle."""
    molecules = {name: frames[0] for name, frames in conformer_structures().items() if "torsion" in frames[0].info}
    angles = np.arange(0, 360, 120 if job.settings.quick else 20)

    def one(start: Atoms) -> dict:
        atoms, dihedral, energies = start.copy(), [int(k) for k in start.info["torsion"]], []
        moving = beyond_bond(atoms, dihedral[1], dihedral[2])
        for angle in angles:
            atoms.set_constraint()
            atoms.set_dihedral(*dihedral, angle, indices=moving)
            atoms.set_constraint(FixInternals(dihedrals_deg=[[float(angle), dihedral]], epsilon=1e-6))
            atoms.calc = job.calculator
            if not BFGS(atoms, logfile=None).run(fmax=0.02, steps=300):
                raise Breakdown(f"the relaxation at {angle} degrees did not end after 300 steps")
            energies.append(job.single_point(atoms)[0])
        return {"atoms": dihedral, "symbols": "-".join(start.symbols[dihedral]), "energies": energies}

    return {"angles": angles.tolist(), "molecules": job.each(known(molecules, job, 1), one)}


def vibrations(job: Job) -> dict:
    """Harmonic frequencies in cm^-1 of relaxed molecules of G2; imaginary ones are negative."""

    def one(start: Atoms) -> dict:
        atoms = relax(start, job, fmax=0.002, steps=1000)
        return {"frequencies": frequencies(atoms, job).round(3)}

    return job.each(known(g2_molecules(), job, 3), one)


def interactions(job: Job) -> dict:
    """Interaction energies in eV of the S22 complexes at five distances (S22x5), monomers as they are in the complex."""
    frames = {name: s22_data.create_s22_system(name, dist="1.0") for name in s22_data.s22}

    def one(atoms: Atoms) -> dict:
        name, energies = atoms.info["name"], []
        for distance in S22X5:
            dimer = s22_data.create_s22_system(name, dist=distance)
            first = s22_data.get_number_of_dimer_atoms(name)[0]
            whole, a, b = (job.single_point(part)[0] for part in (dimer, dimer[:first], dimer[first:]))
            energies.append(whole - a - b)
        return {"energies": energies}

    for name, atoms in frames.items():
        atoms.info["name"] = name
    return job.each(known(frames, job, 2), one)


def stability(job: Job) -> dict:
    """Dynamics at 500 K: does every molecule stay what it was?"""
    molecules = known({name: frames[0] for name, frames in conformer_structures().items()}, job, 1)
    ps = job.settings.ps or (0.05 if job.settings.quick else RUN)

    def one(start: Atoms) -> dict:
        atoms = relax(start, job, fmax=0.05)
        thermalize(atoms, 2 * HOT, job.rng(5))  # half of it goes into the bonds
        run = dynamics(
            replace(job, progress=lambda share: None), atoms,  # each() counts molecules
            lambda a, rng: LangevinBAOAB(a, TIMESTEP * units.fs, temperature_K=HOT, T_tau=100 * units.fs, rng=rng),
            ps, 0.01, HOT, name=start.info["molecule"],
        )  # fmt: skip
        i, j = bonds(start)
        lengths = np.linalg.norm(run.positions[:, i] - run.positions[:, j], axis=2)
        stretch = lengths / (covalent_radii[start.numbers[i]] + covalent_radii[start.numbers[j]])
        broken = np.flatnonzero((stretch > 1.6).any(1))
        if len(broken):
            k = np.argmax(stretch[broken[0]])
            bond = f"{start.symbols[i[k]]}-{start.symbols[j[k]]}"
            raise Breakdown(f"a bond {bond} of {start.info['molecule']} broke after {run.times[broken[0]]:.2f} ps")
        return {"temperature": run.temperatures[len(run.times) // 2 :].mean(), "longest_stretch": stretch.max()}

    return {"ps": ps, "molecules": job.each(molecules, one)}


def conserve(job: Job) -> dict:
    """Constant energy, the first molecule, 300 K."""
    start = next(iter(known({name: frames[0] for name, frames in conformer_structures().items()}, job, 1).values()))
    return nve(job, relax(start, job), 300.0, job.settings.ps or (0.05 if job.settings.quick else CONSERVATION))


def extrapolation(job: Job) -> dict:
    """Largest extrapolation grade of each structure: conformers, and what a student of neutral closed-shell molecules cannot know."""
    if "extrapolation_grade" not in job.calculator.implemented_properties:
        return {}
    chosen = known({f"{name} {k}": a for name, frames in conformer_structures().items() for k, a in enumerate(frames)}, job, 5)
    others = known({f"{atoms.info['kind']} {k}": atoms for k, atoms in enumerate(out_of_domain())}, job, 20)
    grades: dict[str, list] = {"conformer": [], **{kind: [] for kind in OUT_OF_DOMAIN}}
    for kind, atoms in [*(("conformer", a) for a in chosen.values()), *((a.info["kind"], a) for a in others.values())]:
        grades[kind].append(job.calculator.get_property("extrapolation_grade", atoms).max())
    return grades


def out_of_domain() -> list[Atoms]:
    """Ions, radicals and unusual molecules (examples/validate/out_of_domain.py made them), info["kind"]."""
    return shipped_structures("out-of-domain.extxyz")


PARTS = {"conformers": conformers, "torsions": torsions, "vibrations": vibrations, "interactions": interactions}
MODEL_PARTS = {"extrapolation": extrapolation, "stability": stability, "conservation": conserve}  # a teacher need not run these


def samples(job: Job) -> dict[str, Atoms]:
    """Structures for the general checks: conformers and molecules of G2, moved at random by 0.04 Angstrom (rms of each axis)."""
    frames = {}
    for kind, molecules in (("conformer", {n: f[0] for n, f in conformer_structures().items()}), ("G2", g2_molecules())):
        for name, atoms in known(molecules, job, 3).items():
            for copy in range(1 if job.settings.quick else 3):
                moved = Atoms(atoms.numbers, atoms.positions)
                moved.positions += job.rng(6, crc32(name.encode()), copy).normal(0, 0.04, atoms.positions.shape)
                moved.info = {"kind": kind}
                frames[f"{kind} {name}, {copy}"] = moved
    return frames


# ---- what they are made of ---------------------------------------------------------------------------------------------


def bonds(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of atoms closer than 1.2 times the sum of their covalent radii, each once."""
    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.2))
    return i[i < j], j[i < j]


def beyond_bond(atoms: Atoms, a: int, b: int) -> list[int]:
    """Atoms on b's side of the bond a-b."""
    i, j = bonds(atoms)
    keep = ~(((i == a) & (j == b)) | ((i == b) & (j == a)))
    graph = coo_array((np.ones(keep.sum()), (i[keep], j[keep])), shape=(len(atoms), len(atoms)))
    _, part = connected_components(graph, directed=False)
    if part[a] == part[b]:
        raise ValueError(f"the bond between atoms {a} and {b} of {atoms.symbols} is in a ring")
    return np.flatnonzero(part == part[b]).tolist()


def frequencies(atoms: Atoms, job: Job, step: float = 0.01) -> np.ndarray:
    """Harmonic frequencies in cm^-1 (wavenumbers) out of central differences of forces in steps of ``step`` Angstrom."""
    n = len(atoms)
    hessian = np.zeros((3 * n, 3 * n))
    for k in range(3 * n):
        for sign in (1, -1):
            moved = atoms.copy()
            moved.set_constraint()
            moved.positions.flat[k] += sign * step
            hessian[k] -= sign * job.single_point(moved)[1].ravel() / (2 * step)
    return wavenumbers(atoms, hessian)


def wavenumbers(atoms: Atoms, hessian: np.ndarray) -> np.ndarray:
    """Harmonic frequencies in cm^-1, ascending, imaginary ones as negative numbers; translations and rotations are projected out.

    ``hessian`` [3N, 3N] in eV/Angstrom^2, symmetric but for its errors.
    """
    n = len(atoms)
    root = np.repeat(np.sqrt(atoms.get_masses()), 3)
    hessian = (hessian + hessian.T) / 2 / np.outer(root, root)
    x = atoms.positions - atoms.get_center_of_mass()
    rigid = [np.tile(axis, n) for axis in np.eye(3)] + [np.cross(axis, x).ravel() for axis in np.eye(3)]
    _, size, basis = np.linalg.svd(np.array(rigid) * root)
    basis = basis[: (size > 1e-2 * size.max()).sum()]  # a linear molecule has two rotations
    project = np.eye(3 * n) - basis.T @ basis
    values = np.linalg.eigvalsh(project @ hessian @ project)
    values = np.delete(values, np.argsort(abs(values))[: len(basis)])
    to_wavenumber = units._hbar * 1e10 / np.sqrt(units._e * units._amu) / units.invcm
    return np.sign(values) * np.sqrt(abs(values)) * to_wavenumber


def rmsd(a: np.ndarray, b: np.ndarray, numbers) -> float:
    """Root mean square distance [Angstrom] of two geometries [N, 3] after the best rotation."""
    one, other = Atoms(numbers, a), Atoms(numbers, b)
    minimize_rotation_and_translation(one, other)
    return float(np.sqrt(((one.positions - other.positions) ** 2).sum(1).mean()))


# ---- comparison --------------------------------------------------------------------------------------------------------


def compare(mine: dict, theirs: dict | None, teacher: str) -> list[Check]:
    """Rows of the report. ``mine`` and ``theirs`` are the parts of measurements."""
    sections = {
        "conformers": (_conformers, "Conformers"),
        "torsions": (_torsions, "Torsion profiles"),
        "vibrations": (_vibrations, "Vibrations of G2 molecules"),
        "interactions": (_interactions, "S22 interaction energies"),
        "extrapolation": (_extrapolation, "Extrapolation grade"),
        "stability": (_stability, "Stability at 500 K"),
    }
    checks = compare_parts(sections, mine, theirs, teacher)
    if "conservation" in mine:
        checks += conservation(mine)
    return checks


def _extrapolation(mine, theirs, teacher):
    if not mine or not mine["conformer"]:
        return []
    inside, checks = np.array(mine["conformer"]), []
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    ends = np.log10([min(map(min, filter(None, mine.values()))), max(map(max, filter(None, mine.values())))])
    for kind, grades in mine.items():
        axes.hist(grades, np.logspace(*ends, 25), histtype="step", label=kind)
    axes.axvline(1, color="0.7", lw=1)
    axes.set(xlabel="largest extrapolation grade of a structure", ylabel="structures", xscale="log")
    axes.legend()
    alarm = np.quantile(inside, 0.95)
    every = [grade for kind in OUT_OF_DOMAIN for grade in mine[kind]]
    for name, outside in (("all", every), *((kind, mine[kind]) for kind in OUT_OF_DOMAIN)):
        if not outside:
            continue
        outside = np.array(outside)
        auc = mannwhitneyu(outside, inside).statistic / (len(outside) * len(inside))
        note = (
            f"area under the ROC curve {auc:.3f}: the largest grades of {len(outside)} structures against those of {len(inside)} conformers, "
            f"all relaxed; {100 * (outside > alarm).mean():.0f} % are above what 5 % of the conformers exceed ({alarm:.2f}), "
            f"{100 * (outside > 1).mean():.0f} % above 1 ({100 * (inside > 1).mean():.0f} % of the conformers)"
        )
        checks.append(Check(f"told apart, {name}: 1 - AUC", 1 - auc, limit=None if checks else AUC_LIMIT, note=note))
    if checks:
        checks[0].figure = png(figure)
    return checks


def _broken(results: dict, what: str) -> Check:
    """How many could not be carried out; none may."""
    errors = {name: r["error"] for name, r in results.items() if "error" in r}
    note = f"of {len(results)}" + "".join(f"; {name}: {why}" for name, why in list(errors.items())[:8])
    return Check(what, len(errors), "", 0, note + (f"; and {len(errors) - 8} more" if len(errors) > 8 else ""))


def _both(mine: dict, theirs: dict | None) -> list[str]:
    return [name for name in mine if theirs and "error" not in mine[name] and "error" not in theirs.get(name, {"error": ""})]


def _conformers(mine, theirs, teacher):
    checks = [_broken(mine, "molecules whose conformers do not relax")]
    structures, pairs, distances, labels = conformer_structures(), [], [], []
    for name in _both(mine, theirs):
        a, b = (np.array(x[name]["energies"]) / KCAL for x in (theirs, mine))
        pairs.append(np.stack([a - a.mean(), b - b.mean()]))
        labels += [name] * len(a)
        numbers = structures[name][0].numbers
        distances += [rmsd(x, y, numbers) for x, y in zip(np.array(mine[name]["positions"]), np.array(theirs[name]["positions"]))]
    if not pairs:
        return checks
    label, model = np.concatenate(pairs, axis=1)
    error, moved = abs(model - label), np.array(distances) > SAME
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, ends = figure.add_subplot(), [min(label.min(), model.min()), max(label.max(), model.max())]
    axes.plot(ends, ends, color="0.7", lw=1)
    for k, name in enumerate(dict.fromkeys(labels)):
        rows = np.array(labels) == name
        axes.plot(label[rows], model[rows], "osv^D"[k % 5], ms=4, label=name)
    axes.plot(label[moved], model[moved], "o", ms=9, mfc="none", mec="k", label="different minima")
    axes.set(xlabel=f"{teacher}, kcal/mol", ylabel="model, kcal/mol", title="conformer energies about the mean of each molecule")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    note = (
        f"{len(label)} conformers of {len(pairs)} molecules, each relaxed by either, about its molecule's mean, against {teacher}"
    )
    checks.append(Check("relative conformer energy, MAE", error.mean(), "kcal/mol", CONFORMER_LIMIT, note, png(figure)))
    if moved.any() and not moved.all():
        note = f"{(~moved).sum()} conformers whose minima agree within {SAME} Å"
        checks.append(Check("relative conformer energy, MAE, same minima", error[~moved].mean(), "kcal/mol", note=note))
    note = f"RMSD of all atoms, median; {moved.sum()} of {len(moved)} differ by more than {SAME} Å"
    checks.append(Check("geometry of minima", np.median(distances), "Å", note=f"{note}; against {teacher}"))
    return checks


def _torsions(mine, theirs, teacher):
    angles, mine = np.array(mine["angles"]), mine["molecules"]
    other = theirs["molecules"] if theirs else None
    checks = [_broken(mine, "torsion profiles that could not be followed")]
    names = [name for name in mine if "error" not in mine[name]]
    if not names:
        return checks
    rows = -(-len(names) // 3)
    figure, errors, barriers = Figure(figsize=(10, 2.6 * rows), layout="constrained"), [], []
    for axes, name in zip(figure.subplots(rows, 3, squeeze=False).flat, names):
        e = np.array(mine[name]["energies"]) / KCAL
        axes.plot(angles, e - e.min(), "o-", ms=3, label="model")
        if name in _both(mine, other):
            t = np.array(other[name]["energies"]) / KCAL
            axes.plot(angles, t - t.min(), "k--", label=teacher)
            errors.append(abs((e - e.mean()) - (t - t.mean())).mean())
            barriers.append(abs(np.ptp(e) - np.ptp(t)))
        axes.set_title(f"{name}, {mine[name]['symbols']}", fontsize=9)
        axes.set(xlabel="dihedral angle, degrees", ylabel="kcal/mol")
    for axes in figure.axes[len(names) :]:
        axes.axis("off")
    figure.axes[0].legend(fontsize=7)
    checks[0].figure = png(figure)
    if errors:
        note = f"{len(errors)} profiles, relaxed by either at each angle, each about its mean; against {teacher}; no bar of its own"
        checks.append(Check("torsion profiles, MAE", np.mean(errors), "kcal/mol", note=note))
        checks.append(
            Check("torsion barriers, MAE", np.mean(barriers), "kcal/mol", note=f"highest above lowest point; against {teacher}")
        )
    return checks


def _vibrations(mine, theirs, teacher):
    checks = [_broken(mine, "G2 molecules that do not relax")]
    both = _both(mine, theirs)
    other = [name for name in both if len(mine[name]["frequencies"]) != len(theirs[name]["frequencies"])]
    if other:
        checks.append(failed("linear molecules", f"linear for one, bent for the other, left out below: {', '.join(other)}"))
    both = [name for name in both if name not in other]
    if not both:
        return checks
    pairs = [np.array([theirs[name]["frequencies"], mine[name]["frequencies"]]) for name in both]
    label, model = np.concatenate(pairs, axis=1)
    error = abs(model - label)
    figure = Figure(figsize=(10, max(4.5, 0.13 * len(both))), layout="constrained")
    axes, bars = figure.subplots(1, 2)
    ends = [min(label.min(), model.min()), max(label.max(), model.max())]
    axes.plot(ends, ends, color="0.7", lw=1)
    axes.plot(label, model, ".", ms=4)
    axes.set(xlabel=f"{teacher}, cm⁻¹", ylabel="model, cm⁻¹", title="harmonic frequencies; imaginary ones negative")
    worst = sorted(zip((abs(b - a).mean() for a, b in pairs), both))
    bars.barh(range(len(worst)), [value for value, _ in worst])
    bars.set_yticks(range(len(worst)), [name for _, name in worst], fontsize=6)
    bars.set(xlabel="mean absolute error of a molecule, cm⁻¹")
    note = f"{len(label)} modes of {len(both)} molecules, each relaxed by either, modes in ascending order; against {teacher}"
    checks.append(
        Check("harmonic frequencies, MAE", error.mean(), "cm⁻¹", note=f"{note}; median {np.median(error):.3g}", figure=png(figure))
    )
    note = f"of all modes; against {teacher}"
    checks.append(Check("harmonic frequencies, mean error", (model - label).mean(), "cm⁻¹", note=note))
    energy = [abs(np.clip(b, 0, None).sum() - np.clip(a, 0, None).sum()) / 2 * units.invcm / KCAL for a, b in pairs]
    checks.append(Check("zero-point energy, MAE", np.mean(energy), "kcal/mol", note=f"harmonic; against {teacher}"))
    extra = {name: int((b < -30).sum() - (a < -30).sum()) for name, (a, b) in zip(both, pairs)}
    extra = {name: n for name, n in extra.items() if n > 0}
    note = f"modes below -30 cm⁻¹ that {teacher} does not have: " + (", ".join(extra) or "none")
    checks.append(Check("imaginary frequencies too many", sum(extra.values()), "", 0, note))
    return checks


def _interactions(mine, theirs, teacher):
    checks = [_broken(mine, "S22 complexes without an energy")]
    names = [name for name in mine if "error" not in mine[name]]
    if not names:
        return checks
    published = np.array([[s22_data.get_interaction_energy_s22x5(name, d) for d in S22X5] for name in names]) / KCAL
    model = np.array([mine[name]["energies"] for name in names]) / KCAL
    both = _both(mine, theirs)
    figure = Figure(figsize=(10, 2.6 * -(-len(names) // 4)), layout="constrained")
    x = [float(d) for d in S22X5]
    panels = figure.subplots(-(-len(names) // 4), 4, squeeze=False).flat
    for axes, name, e, p in zip(panels, names, model, published):
        axes.axhline(0, color="0.8", lw=0.8)
        axes.plot(x, e, "o-", ms=3, label="model")
        if name in both:
            axes.plot(x, np.array(theirs[name]["energies"]) / KCAL, "k--", label=teacher)
        axes.plot(x, p, "r^", ms=4, label="CCSD(T)/CBS")
        axes.set_title(name.replace("_", " ")[:34], fontsize=8)
        axes.set(xlabel="distance / equilibrium", ylabel="kcal/mol")
    for axes in figure.axes[len(names) :]:
        axes.axis("off")
    figure.axes[0].legend(fontsize=7)
    checks[0].figure = png(figure)
    source = "CCSD(T)/CBS, Takatani et al., J. Chem. Phys. 132, 144104 (2010)"
    error = abs(model - published)
    listed = ", ".join(f"{n.replace('_', ' ')} {m:.2f} ({p:.2f})" for n, m, p in zip(names, model[:, 1], published[:, 1]))
    checks.append(
        Check(
            "S22 against CCSD(T), MAE",
            error[:, 1].mean(),
            "kcal/mol",
            note=f"{len(names)} complexes at equilibrium; {source}; model (published): {listed}",
        )
    )
    note = "all five distances (S22x5, scaled to the same reference), Grafova et al., J. Chem. Theory Comput. 6, 2365 (2010)"
    checks.append(Check("S22x5 against CCSD(T), MAE", error.mean(), "kcal/mol", note=note))
    if both:
        t = np.array([theirs[name]["energies"] for name in both]) / KCAL
        rows, same = [names.index(name) for name in both], f"{len(both)} complexes at equilibrium"
        checks.append(Check(f"S22 against {teacher}, MAE", abs(model[rows] - t)[:, 1].mean(), "kcal/mol", note=same))
        note = f"{same}, how far the teacher itself is; {source}"
        checks.append(Check(f"S22, {teacher} against CCSD(T), MAE", abs(t - published[rows])[:, 1].mean(), "kcal/mol", note=note))
    return checks


def _stability(mine, theirs, teacher):
    results = mine["molecules"]
    check = _broken(results, "molecules that break")
    check.note = (
        f"in {mine['ps']:g} ps of Langevin dynamics at {HOT:.0f} K, steps of {TIMESTEP} fs: a bond longer than 1.6 sums of "
        f"covalent radii; the bar asks for 100 ps (--ps 100); {check.note}"
    )
    kelvin = [r["temperature"] for r in results.values() if "error" not in r]
    rows = [check]
    if kelvin:
        rows.append(
            Check("temperature", np.mean(kelvin), "K", note=f"mean of the molecules, second half of the runs, intended {HOT:.0f} K")
        )
    return rows
