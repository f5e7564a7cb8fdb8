"""Sampling of MgO: frames by geometry, and molecular dynamics in which the cell may move.

    python sample.py scans scans0.extxyz --count 900                          frames by geometry; --kinds: only these
    python sample.py run a.pt candidates1.extxyz --count 60                   dynamics with a model.pt of mlff-export
    python sample.py pick candidates1.extxyz round1.extxyz --models a.pt b.pt --count 300   those on which two students differ most

info["kind"] names the row in the table of errors, info["trajectory"] the group by which data are split. Labels: `mlff label`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Sequence

import numpy as np
from ase import Atoms, units
from ase.build import bulk, surface
from ase.io import read, write
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.velocitydistribution import thermalize_momenta

from mlff.ase import MLFFCalculator
from mlff.neighbors import find_neighbors
from mlff.train import data

SPLIT = {"validation": 0.05, "held_out": 0.1, "seed": 1}  # as in mgo.yaml
A = 4.25  # Angstrom, the teacher's lattice constant
# The teacher's own repulsion has holes: in the crystal it attracts Mg to O below 1.0, Mg to Mg below 1.1, and two bare Mg
# below 1.2 Angstrom. No frame goes where it does not repel; the student's own repulsion (ZBL) begins where the data end.
CLOSEST = {("Mg", "Mg"): 1.5, ("Mg", "O"): 1.2, ("O", "O"): 0.85}  # Angstrom
SHARES = {  # of the frames by geometry
    "phonon": 0.15, "displaced": 0.16, "volume": 0.12, "strained": 0.16, "vacancy": 0.10, "frenkel": 0.04, "surface": 0.11,
    "contact": 0.05, "disordered": 0.04, "polymorph": 0.04, "pair": 0.03,
}  # fmt: skip
SLABS = [((1, 0, 0), 2, (2, 1, 1)), ((1, 0, 0), 2, (2, 2, 1)), ((1, 1, 0), 3, (1, 2, 1)), ((1, 1, 0), 4, (1, 2, 1))]
STARTS = {"crystal": 0.55, "vacancy": 0.2, "frenkel": 0.1, "surface": 0.15}  # of the systems of dynamics


# ---- cells -------------------------------------------------------------------------------------------------------------


def crystal(rng: np.random.Generator, smallest: int, largest: int) -> Atoms:
    """Rock salt, a random supercell of the primitive or the conventional cell within these numbers of atoms."""
    cells = [bulk("MgO", "rocksalt", a=A), bulk("MgO", "rocksalt", a=A, cubic=True)]
    choices = []
    for cell, most in zip(cells, (6, 3)):
        for n in np.ndindex(most, most, most):
            repeats = sorted(k + 1 for k in n)
            # long and thin cells say little
            if smallest <= len(cell) * np.prod(repeats) <= largest and repeats[2] <= repeats[0] + 1:
                choices.append((cell, tuple(repeats)))
    cell, repeats = choices[rng.integers(len(choices))]
    return cell.repeat(tuple(rng.permutation(repeats).tolist()))


def slab(rng: np.random.Generator) -> Atoms:
    """A slab with two surfaces (100) or (110), 32 to 64 atoms, and a gap of 1.5 to 9 Angstrom between its images."""
    conventional = bulk("MgO", "rocksalt", a=A, cubic=True)
    index, layers, repeats = SLABS[rng.integers(len(SLABS))]
    atoms = surface(conventional, index, layers, periodic=True).repeat(repeats)
    atoms.pbc = True
    atoms.cell[2] *= 1.0 + rng.uniform(1.5, 9.0) / atoms.cell.lengths()[2]
    return atoms


def polymorph(rng: np.random.Generator) -> Atoms:
    """B2 (caesium chloride), zinc blende or wurtzite at about their own volume, 16 atoms."""
    cell, repeats = [
        (bulk("MgO", "cesiumchloride", a=2.66), (2, 2, 2)),
        (bulk("MgO", "zincblende", a=4.63, cubic=True), (2, 1, 1)),
        (bulk("MgO", "wurtzite", a=3.3, c=5.1), (2, 2, 1)),
    ][rng.integers(3)]
    return cell.repeat(repeats)


def without_pair(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """One Mg and one O taken out: a Schottky pair, which leaves the crystal neutral."""
    atoms = atoms.copy()
    del atoms[[int(rng.choice(np.flatnonzero(atoms.symbols == symbol))) for symbol in ("Mg", "O")]]
    return atoms


def with_interstitial(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """One atom moved to the middle of a cube of four Mg and four O: a Frenkel pair."""
    atoms = atoms.copy()
    moved, corner = rng.choice(len(atoms), 2, replace=False)
    atoms.positions[moved] = atoms.positions[corner] + A / 4
    return atoms


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    """A copy with the cell and all positions under 1 + strain [3, 3]."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


def displaced(atoms: Atoms, size: float, rng: np.random.Generator) -> Atoms:
    """A copy with every atom moved at random, by `size` Angstrom (rms) along each axis."""
    atoms = atoms.copy()
    atoms.positions += rng.normal(0, size, atoms.positions.shape)
    return atoms


def random_strain(size: float, rng: np.random.Generator) -> np.ndarray:
    """A symmetric strain [3, 3], its six components normal with this deviation."""
    strain = rng.normal(0, size, (3, 3))
    return (np.tril(strain) + np.tril(strain, -1).T) if size else np.zeros((3, 3))


def isotropic(ratio: float) -> np.ndarray:
    """The strain [3, 3] that brings a volume to `ratio` times itself."""
    return np.eye(3) * (ratio ** (1 / 3) - 1)


def squeeze(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """An atom pushed towards one of its neighbours of a random pair of elements, to 0.95 of their distance or less."""
    atoms = atoms.copy()
    a, b = sorted(CLOSEST)[rng.integers(len(CLOSEST))]
    i = int(rng.choice(np.flatnonzero(atoms.symbols == a)))
    others = np.array([j for j in np.flatnonzero(atoms.symbols == b) if j != i])
    vectors = atoms.get_distances(i, others, mic=True, vector=True)
    lengths = np.linalg.norm(vectors, axis=1)
    nearest = int(np.argmin(lengths))
    target = rng.uniform(CLOSEST[a, b], 0.95 * lengths[nearest])
    atoms.positions[i] += vectors[nearest] * (1 - target / lengths[nearest])
    return atoms


def pair(rng: np.random.Generator) -> Atoms:
    """Two bare atoms in open space, up to 5 Angstrom apart, most of them close: where a student's repulsion is asked for."""
    symbols = sorted(CLOSEST)[rng.integers(len(CLOSEST))]
    closest = CLOSEST[symbols]
    return Atoms(symbols, [[0, 0, 0], [0, 0, closest + (5.0 - closest) * rng.uniform() ** 2]])


def too_close(atoms: Atoms) -> bool:
    """Whether two atoms, or an atom and an image, are closer than CLOSEST."""
    edges, _, vectors = find_neighbors(atoms.positions, max(CLOSEST.values()), atoms.cell.array, atoms.pbc)
    symbols, lengths = np.array(atoms.get_chemical_symbols()), np.linalg.norm(np.asarray(vectors), axis=1)
    return any(length < CLOSEST[tuple(sorted(symbols[ij]))] for ij, length in zip(np.asarray(edges).T, lengths))


# ---- frames by geometry ------------------------------------------------------------------------------------------------


def scan(kind: str, rng: np.random.Generator) -> Atoms:
    """A frame of this kind. Raises ValueError for a kind that is not one of SHARES."""
    size = rng.choice([0.01, 0.03, 0.06, 0.1, 0.15, 0.2])
    near = isotropic(rng.uniform(0.96, 1.06)) + random_strain(0.005, rng)
    if kind == "phonon":
        # at a site of inversion symmetry PaiNN's vectors vanish and their lengths have a kink: what a student learns from larger
        # displacements says little about the first 0.01 Angstrom, where force constants are taken
        atoms = strained(crystal(rng, 16, 64), near)
        some = rng.choice(len(atoms), rng.choice([1, 2, len(atoms)]), replace=False)
        atoms.positions[some] += rng.normal(0, rng.choice([0.003, 0.006, 0.012]), (len(some), 3))
        return atoms
    if kind == "displaced":
        return displaced(strained(crystal(rng, 16, 64), near), size, rng)
    if kind in ("volume", "strained"):
        still = rng.random() < 0.3  # every cell of a perfect lattice says the same: the smallest will do
        atoms = crystal(rng, 2, 8) if still else crystal(rng, 8, 32)
        strain = isotropic(rng.uniform(0.82, 1.2)) if kind == "volume" else random_strain(rng.choice([0.004, 0.015, 0.04]), rng)
        return displaced(strained(atoms, strain), 0.0 if still else min(size, 0.1), rng)
    if kind == "vacancy":
        return displaced(strained(without_pair(crystal(rng, 32, 64), rng), near), min(size, 0.15), rng)
    if kind == "frenkel":
        return displaced(strained(with_interstitial(crystal(rng, 48, 64), rng), near), min(size, 0.15), rng)
    if kind == "surface":
        return displaced(strained(slab(rng), random_strain(0.01, rng)), min(size, 0.15), rng)
    if kind == "contact":
        return displaced(squeeze(crystal(rng, 32, 54), rng), 0.03, rng)
    if kind == "disordered":
        return displaced(strained(crystal(rng, 16, 54), isotropic(rng.uniform(1.0, 1.3))), rng.uniform(0.2, 0.35), rng)
    if kind == "polymorph":
        strain = isotropic(rng.uniform(0.85, 1.15)) + random_strain(0.02, rng)
        return displaced(strained(polymorph(rng), strain), min(size, 0.1), rng)
    if kind == "pair":
        return pair(rng)
    raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(SHARES)}")


def scans(count: int, prefix: str, rng: np.random.Generator, kinds: Sequence[str] = tuple(SHARES)) -> list[Atoms]:
    """About `count` frames of these kinds by SHARES, in random order, each a group of its own."""
    frames, total = [], sum(SHARES[kind] for kind in kinds)
    for kind in kinds:
        for k in range(round(SHARES[kind] / total * count)):
            atoms = scan(kind, rng)
            while too_close(atoms):
                atoms = scan(kind, rng)
            atoms.info = {"kind": kind, "trajectory": f"{prefix}-{kind}-{k}"}
            frames.append(atoms)
    return [frames[k] for k in rng.permutation(len(frames))]


def make_scans(args) -> None:
    frames = scans(args.count, args.prefix, np.random.default_rng(args.seed), args.kinds)
    write(args.target, frames)
    print(table(frames))


# ---- dynamics ----------------------------------------------------------------------------------------------------------


def start(kind: str, rng: np.random.Generator) -> Atoms:
    """A system of this kind (STARTS) to begin dynamics with."""
    if kind == "surface":
        return slab(rng)
    atoms = crystal(rng, 32, 64)
    return {"crystal": lambda a, _: a, "vacancy": without_pair, "frenkel": with_interstitial}[kind](atoms, rng)


def sample(atoms: Atoms, calculator, temperature: float, pressure: float | None, rng: np.random.Generator, args) -> list[Atoms]:
    """Langevin dynamics of one system: frames at equal intervals, and the one at which it fails.

    The cell moves in all six components at `pressure` (GPa), or is fixed (None). A run fails with atoms closer than CLOSEST, or a
    force above --max-force (eV/Angstrom): what a student does wrong there is what it has to learn.
    """
    atoms = atoms.copy()
    atoms.calc = calculator
    thermalize_momenta(atoms, temperature, rng=rng)
    cell = {} if pressure is None else {"externalstress": -pressure * units.GPa, "P_tau": 500 * units.fs}
    md = LangevinBAOAB(atoms, args.timestep * units.fs, temperature_K=temperature, T_tau=100 * units.fs, rng=rng, **cell)
    frames: list[Atoms] = []
    for _ in range(args.frames):
        for _ in range(args.stride // args.check):
            md.run(args.check)
            largest = np.linalg.norm(atoms.get_forces(), axis=1).max()
            if not np.isfinite(largest) or too_close(atoms):
                return frames  # torn apart, where the teacher does not know either
            if largest > args.max_force:
                return [*frames, plain(atoms)]
        frames.append(plain(atoms))
    return frames


def plain(atoms: Atoms) -> Atoms:
    """A copy without velocities and results."""
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def run(args) -> None:
    rng, calculator = np.random.default_rng(args.seed), MLFFCalculator(args.model, args.device)
    kinds = rng.choice(list(STARTS), args.count, p=list(STARTS.values()))
    frames: list[Atoms] = []
    for k, kind in enumerate(kinds):
        temperature, pressure = rng.uniform(*args.temperatures), rng.choice([0.0, 0.0, 10.0, 30.0])
        # a slab has no pressure to hold across the vacuum
        found = sample(start(kind, rng), calculator, temperature, None if kind == "surface" else pressure, rng, args)
        name = {"crystal": "md-cool" if temperature < 1000 else "md-hot"}.get(kind, f"md-{kind}")
        for atoms in found:
            atoms.info = {"kind": name, "trajectory": f"{args.prefix}-{kind}-{k}", "temperature": round(temperature)}
        frames += found
        print(f"{k + 1} of {args.count}: {kind}, {temperature:.0f} K, {len(found)} of {args.frames} frames", flush=True)
    write(args.target, frames)
    print(table(frames))


# ---- choice ------------------------------------------------------------------------------------------------------------


def disagreement(frames: list[Atoms], models: list[Path], device: str) -> np.ndarray:
    """Mean over a frame's atoms of the norm of the standard deviation of the models' forces [F], eV/Angstrom."""
    calculators = [MLFFCalculator(model, device) for model in models]
    forces = [[calculator.get_property("forces", atoms) for calculator in calculators] for atoms in frames]
    return np.array([np.linalg.norm(np.std(f, axis=0), axis=1).mean() for f in forces])


def pick(args) -> None:
    """Of the frames to train on those on which the models differ most, of the others as many by chance.

    The teacher is a hundred times slower than a student, so the choice comes before the labels. What validates and what is held
    out is picked blindly: a test set chosen by difficulty would say nothing about dynamics.
    """
    frames = [atoms for path in args.source for atoms in read(path, ":")]
    rng, spread = np.random.default_rng(args.seed), disagreement(frames, args.models, args.device)
    trained = np.array([data.side(atoms.info["trajectory"], **SPLIT) == 0 for atoms in frames])
    share, chosen = min(1.0, args.count / len(frames)), []
    chances = (np.flatnonzero(trained), spread[trained]), (np.flatnonzero(~trained), np.ones((~trained).sum()))
    for members, chance in chances:
        if len(members):
            chosen += rng.choice(members, round(share * len(members)), replace=False, p=chance / chance.sum()).tolist()
    write(args.target, [frames[k] for k in sorted(chosen)])
    print(f"models differ by {1000 * spread.mean():.0f} meV/A, on those picked by {1000 * spread[chosen].mean():.0f}")
    print(table([frames[k] for k in chosen]))


def table(frames: list[Atoms]) -> str:
    """Of each kind: frames, trajectories, atoms per frame."""
    kinds = Counter(atoms.info["kind"] for atoms in frames)
    lines = [f"{'kind':16} {'frames':>7} {'groups':>7} {'atoms':>6}"]
    for kind in [*sorted(kinds), "all"]:
        members = [atoms for atoms in frames if kind in (atoms.info["kind"], "all")]
        groups = len({atoms.info["trajectory"] for atoms in members})
        lines.append(f"{kind:16} {len(members):7} {groups:7} {np.mean([len(a) for a in members]):6.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function, count: int, prefix: str = "") -> argparse.ArgumentParser:
        p = commands.add_parser(name, description=function.__doc__)
        p.set_defaults(function=function)
        if name == "run":
            p.add_argument("model", type=Path, help="a model.pt")
        if name == "pick":
            p.add_argument("source", type=Path, nargs="+")
        p.add_argument("target", type=Path)
        p.add_argument("--count", type=int, default=count, help="systems" if name == "run" else "frames")
        p.add_argument("--seed", type=int, default=1)
        if prefix:
            p.add_argument("--prefix", default=prefix, help="of the trajectories' names: one per round of sampling")
        if name != "scans":
            p.add_argument("--device", default="cpu")
        return p

    p = command("scans", make_scans, 900, "scan")
    p.add_argument("--kinds", nargs="+", choices=SHARES, default=list(SHARES), help="of the frames (default: all)")
    p = command("run", run, 60, "run")
    p.add_argument("--temperatures", type=float, nargs=2, default=(300.0, 3000.0), help="K")
    p.add_argument("--frames", type=int, default=10, help="of a system")
    p.add_argument("--stride", type=int, default=500, help="steps between frames, a multiple of --check")
    p.add_argument("--check", type=int, default=50, help="steps between looks for failures")
    p.add_argument("--timestep", type=float, default=1.0, help="fs")
    p.add_argument("--max-force", type=float, default=25.0, help="eV/Angstrom")
    p = command("pick", pick, 300)
    p.add_argument("--models", type=Path, nargs="+", required=True, help="two or more files model.pt")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
