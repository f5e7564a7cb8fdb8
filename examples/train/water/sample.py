"""Frames of water for a teacher to label: by dynamics of a student, and by geometry out of those.

    python sample.py run md.extxyz --student model.pt --prefix r0     boxes, slabs and gas over temperatures and densities
    python sample.py distort md.extxyz distorted.extxyz               strained cells, displaced atoms, close contacts
    python sample.py small small.extxyz --prefix r0                   two molecules in contact, bonds far from their length
    mlff label md.extxyz -o md.labelled.extxyz --teacher so3lr        likewise distorted.extxyz, small.extxyz
    python sample.py pack md.labelled.extxyz ... round0.npz           a tenth of the size (mlff.train.frames)
    python sample.py water ../ethanol_water/round0.extxyz ... known.extxyz   of labelled files the frames of water alone
    python sample.py describe round0.npz

Every frame carries info["trajectory"], by which the data are split, and info["kind"], its row in the table of errors. What is made
out of a frame by geometry stays in its trajectory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.io import write
from ase.md.langevinbaoab import LangevinBAOAB

from mlff.ase import MLFFCalculator
from mlff.files import replacing
from mlff.painn import read_record
from mlff.train.data import read_structures
from mlff.train.frames import rounded, save
from mlff.validate.measurement import thermalize
from mlff.validate.water import PRESSURE, barostat_mass, box, density

# Configurations do not depend on masses: with heavy hydrogen atoms a step is three times as long.
TIMESTEP, HYDROGEN = 1.5, 4.0  # fs, u
MELTING = 600.0  # K, of the first steps from a lattice
SHAPES = ((4, 4, 2), (4, 3, 3), (4, 4, 3), (4, 4, 4))  # molecules along the edges
LARGE = ((4, 4, 6), (5, 5, 4), (5, 5, 5))
# kind: share of the trajectories, shapes, densities in g/cm^3, ranges of temperature in K that a trajectory goes through
KINDS = {
    "nvt": (0.48, SHAPES, (0.85, 1.25), ((400, 600), (260, 380))),
    "npt": (0.20, SHAPES[2:], (0.95, 1.05), ((320, 370), (280, 320))),
    "hot": (0.08, SHAPES[:2], (0.80, 1.40), ((500, 700), (700, 1200))),
    "slab": (0.08, SHAPES[1:], (0.95, 1.05), ((350, 450), (280, 350))),
    "vapour": (0.10, SHAPES[:2], (0.10, 0.70), ((400, 600), (280, 400))),
    "large": (0.06, LARGE, (0.95, 1.05), ((350, 450), (280, 350))),
}
TORN = 3.0  # Angstrom between an oxygen atom and one of its hydrogen atoms: nothing to learn from
TOUCHING = {"O-O": (1.0, 3.0), "O-H": (0.65, 2.1), "H-H": (0.5, 1.8)}  # Angstrom, of two molecules in open space
BOND = (0.55, 2.4)  # Angstrom, of a molecule in open space
CLOSEST = {"O-O": (1.8, 2.6), "O-H": (0.95, 1.6), "H-H": (0.6, 1.7)}  # Angstrom, of molecules pushed together


# ---- dynamics ----------------------------------------------------------------------------------------------------------


def start(kind: str, rng: np.random.Generator) -> Atoms:
    """A box of molecules on a lattice, with heavy hydrogen atoms."""
    _, shapes, densities, _ = KINDS[kind]
    atoms = box(shapes[rng.integers(len(shapes))], rng, rng.uniform(*densities))
    if kind == "slab":
        atoms.cell[2] *= rng.uniform(1.8, 2.5)
    atoms.set_masses(np.where(atoms.numbers == 1, HYDROGEN, atoms.get_masses()))
    return atoms


def schedule(count: int) -> list[str]:
    """Kinds of `count` trajectories by their shares, mixed, so that a run that is cut off has some of each."""
    places = [((k + 0.5) / share, kind) for kind, (share, *_) in KINDS.items() for k in range(count)]
    return [kind for _, kind in sorted(places)[:count]]


def broken(atoms: Atoms, temperature: float) -> bool:
    """Whether a student has failed: nothing after this is worth a frame."""
    found = (np.linalg.norm(atoms.get_forces(), axis=1).max(), atoms.get_temperature())
    return not np.isfinite(found).all() or found[0] > 40.0 or found[1] > 3 * temperature


def torn(atoms: Atoms) -> bool:
    bonds = atoms.positions.reshape(-1, 3, 3)
    return not np.isfinite(bonds).all() or bool((np.linalg.norm(bonds[:, 1:] - bonds[:, :1], axis=2) > TORN).any())


def trajectory(kind: str, calculator: MLFFCalculator, args, rng: np.random.Generator) -> tuple[list[Atoms], bool]:
    """Frames of one box at one temperature after the other, and whether the student failed on the way."""
    atoms, frames = start(kind, rng), []
    atoms.calc = calculator
    temperatures = [rng.uniform(*limits) for limits in KINDS[kind][3]]
    thermalize(atoms, 2 * MELTING, rng)  # half of it goes into the bonds

    def dynamics(temperature: float, steps: int, barostat: bool, stride: int | None = None) -> bool:
        constant = {"externalstress": -PRESSURE * 1e-4 * units.GPa, "hydrostatic": True, "P_tau": 500 * units.fs,
                    "P_mass": barostat_mass(atoms)} if barostat else {}  # fmt: skip
        md = LangevinBAOAB(atoms, TIMESTEP * units.fs, temperature_K=temperature, T_tau=100 * units.fs, rng=rng, **constant)
        for done in range(10, steps + 1, 10):
            md.run(10)
            failed = broken(atoms, temperature)
            if (failed or (stride and done % stride == 0)) and not torn(atoms):
                frame = rounded(atoms)
                frame.info = {"kind": kind, "temperature": round(temperature, 1)}
                frames.append(frame)
            if failed:
                return False
        return True

    sound = dynamics(MELTING, args.melt, False)
    for temperature in temperatures:
        sound = sound and dynamics(temperature, args.equilibrate, kind == "npt")
        sound = sound and dynamics(temperature, args.frames * args.stride, kind == "npt", args.stride)
    return frames, not sound


def run(args) -> None:
    """Trajectories of all kinds, until there are enough or the clock says so."""
    calculator, began, frames, failures = MLFFCalculator(args.student, args.device), time.time(), [], []
    for k, kind in list(enumerate(schedule(args.first + args.count)))[args.first :]:
        if time.time() - began > 60 * args.minutes:
            print(f"stopped by the clock before trajectory {k}; go on with --first {k} into another file")
            break
        name = f"{args.prefix}-{kind}-{k}"
        made, failed = trajectory(kind, calculator, args, np.random.default_rng([args.seed, k]))
        for atoms in made:
            atoms.info["trajectory"] = name
        frames += made
        failures += [name] * failed
        print(f"{name}: {len(made)} frames of {len(made[0]) // 3 if made else 0} molecules{', failed' * failed}", flush=True)
    print(f"{len(frames)} frames, {time.time() - began:.0f} s; failed: {' '.join(failures) or 'none'}")
    write_bare(args.target, frames)


# ---- geometry ----------------------------------------------------------------------------------------------------------


def strained(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """A random strain of the cell, shear included: of the centres of the molecules, or of half of the frames of every atom."""
    strain = rng.normal(0, rng.choice((0.01, 0.03)), (3, 3))
    deformation = np.eye(3) + 0.5 * (strain + strain.T)
    result = atoms.copy()
    result.set_cell(atoms.cell.array @ deformation, scale_atoms=False)
    if rng.random() < 0.5:
        result.positions = atoms.positions @ deformation
    else:
        centres = atoms.positions.reshape(-1, 3, 3).mean(1)
        result.positions += np.repeat(centres @ deformation - centres, 3, axis=0)
    return result


def displaced(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Every atom moved at random, and one O-H bond in twenty stretched or compressed."""
    result = atoms.copy()
    molecules = result.positions.reshape(-1, 3, 3)
    scale = np.where(rng.random((len(molecules), 2)) < 0.05, rng.uniform(0.75, 2.2, (len(molecules), 2)), 1.0)
    molecules[:, 1:] = molecules[:, :1] + (molecules[:, 1:] - molecules[:, :1]) * scale[..., None]
    result.positions = molecules.reshape(-1, 3) + rng.normal(0, rng.uniform(0.01, 0.08), (len(atoms), 3))
    return result


def contact(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Neighbouring molecules pushed together until two atoms are closer than in any liquid, twice for each kind of pair."""
    result = atoms.copy()
    free = np.arange(len(atoms) // 3)
    for pair in (*CLOSEST, *CLOSEST):
        first, second = pair.split("-")
        one = rng.choice(free)
        mine = rng.choice([a for a in range(3 * one, 3 * one + 3) if atoms.symbols[a] == first])
        theirs = [a for m in free if m != one for a in range(3 * m, 3 * m + 3) if atoms.symbols[a] == second]
        vectors = result.get_distances(mine, theirs, mic=True, vector=True)
        nearest = int(np.argmin(np.linalg.norm(vectors, axis=1)))
        distance = np.linalg.norm(vectors[nearest])
        closer = min(0.0, rng.uniform(*CLOSEST[pair]) / distance - 1) * vectors[nearest]
        other = theirs[nearest] // 3
        result.positions[3 * other : 3 * other + 3] += closer / 2
        result.positions[3 * one : 3 * one + 3] -= closer / 2
        free = np.setdiff1d(free, (one, other))
    return result


def dimer(pair: str, rng: np.random.Generator) -> Atoms:
    """Two molecules turned at random, of whose atoms those of `pair` are closest, measured by what is least in TOUCHING."""
    least = np.array([[TOUCHING["O-O"][0]] + 2 * [TOUCHING["O-H"][0]]] + 2 * [[TOUCHING["O-H"][0]] + 2 * [TOUCHING["H-H"][0]]])
    a, b = (0 if symbol == "O" else 1 for symbol in pair.split("-"))
    while True:
        atoms = box((2, 1, 1), rng)
        first, second = atoms.positions[:3], atoms.positions[3:]
        direction = rng.normal(size=3)
        distance = rng.uniform(*TOUCHING[pair])
        second += first[a] - second[b] + distance * direction / np.linalg.norm(direction)
        ratios = np.linalg.norm(first[:, None] - second[None], axis=2) / least
        if ratios.min() >= ratios[a, b]:
            return Atoms(atoms.numbers, np.concatenate([first, second]))


def bent(rng: np.random.Generator) -> Atoms:
    """A molecule with any bonds in BOND and any angle from 60 to 180 degrees."""
    (one, two), angle = rng.uniform(*BOND, 2), np.radians(rng.uniform(60, 180))
    return Atoms("OH2", [[0, 0, 0], [one, 0, 0], [two * np.cos(angle), two * np.sin(angle), 0]])


def small(args) -> None:
    """Molecules in open space: dimers of every pair of elements in contact, and one molecule out of shape."""
    rng, frames = np.random.default_rng(args.seed), []
    makers = {**{f"dimer-{pair}": lambda pair=pair: dimer(pair, rng) for pair in TOUCHING}, "bent": lambda: bent(rng)}
    for k in range(args.count):
        kind = list(makers)[k % len(makers)]
        frame = rounded(makers[kind]())
        frame.info = {"kind": kind, "trajectory": f"{args.prefix}-{kind}-{k}"}
        frames.append(frame)
    write_bare(args.target, frames)


DISTORTIONS = {"strained": strained, "displaced": displaced, "contact": contact}


def distort(args) -> None:
    """The kinds of DISTORTIONS in equal numbers, each out of a frame that is drawn by chance."""
    source, rng, frames = read_structures(args.source), np.random.default_rng(args.seed), []
    for k in range(args.count):
        kind = list(DISTORTIONS)[k % len(DISTORTIONS)]
        atoms = source[rng.integers(len(source))]
        frame = rounded(DISTORTIONS[kind](atoms, rng))
        frame.info = {"kind": kind, "trajectory": atoms.info["trajectory"]}
        frames.append(frame)
    write_bare(args.target, frames)


# ---- files -------------------------------------------------------------------------------------------------------------


def write_bare(path: Path, frames: list[Atoms]) -> None:
    for atoms in frames:
        atoms.calc = None
        for name in set(atoms.arrays) - {"numbers", "positions"}:
            del atoms.arrays[name]
    with replacing(path) as unfinished:
        write(unfinished, frames, format="extxyz")
    print(table(frames))


def copy_record(sources: list[Path], target: Path) -> None:
    """The record of the teacher beside `target`; it must be the same for all sources."""
    teachers = [read_record(path).get("teacher") for path in sources]
    if not teachers[0] or any(teacher != teachers[0] for teacher in teachers):
        raise SystemExit(f"expected labels of one teacher, with their records: {' '.join(map(str, sources))}")
    with replacing(target.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps({"teacher": teachers[0]}, indent=2) + "\n")


def pack(args) -> None:
    """Labelled files as one compact file."""
    frames = [atoms for path in args.sources for atoms in read_structures(path)]
    save(args.target, frames)
    copy_record(args.sources, args.target)
    print(table(frames))


def water(args) -> None:
    """Of labelled files the frames of water alone."""
    write_labelled(args, [atoms for path in args.sources for atoms in read_structures(path) if set(atoms.symbols) == {"H", "O"}])


def write_labelled(args, frames: list[Atoms]) -> None:
    with replacing(args.target) as unfinished:
        write(unfinished, frames, format="extxyz")
    copy_record(args.sources, args.target)
    print(table(frames))


def describe(args) -> None:
    print(table([atoms for path in args.sources for atoms in read_structures(path)]))


def table(frames: list[Atoms]) -> str:
    """Of each kind: frames, trajectories, molecules and densities (g/cm^3) from least to most. Of labelled frames: the root mean
    square of a force's component, the largest force (median of frames, largest of all; eV/A), components of the stress (GPa)."""
    widths = {"frames": 6, "traj.": 6, "molecules": 10, "density": 12, "F rms": 6, "max F": 6, "most": 6, "stress": 12}
    lines = [f"{'kind':16} " + " ".join(name.rjust(width) for name, width in widths.items())]
    for kind in [*sorted({atoms.info["kind"] for atoms in frames}), "all"]:
        members = [atoms for atoms in frames if kind in (atoms.info["kind"], "all")]
        sizes, periodic = [len(atoms) // 3 for atoms in members], [atoms for atoms in members if atoms.pbc.all()]
        line = (
            f"{kind:16} {len(members):6} {len({atoms.info['trajectory'] for atoms in members}):6} {min(sizes):4} to {max(sizes):3}"
        )
        water = Atoms("OH2").get_masses().sum()
        rho = [density(np.full(len(a) // 3, water), a.cell.array[None])[0] for a in periodic]
        line += f" {min(rho):4.2f} to {max(rho):4.2f}" if rho else 13 * " "
        if all(atoms.calc is not None for atoms in members):
            forces = [atoms.calc.results["forces"] for atoms in members]
            largest = [np.linalg.norm(f, axis=1).max() for f in forces]
            line += f" {np.sqrt((np.concatenate(forces) ** 2).mean()):6.2f} {np.median(largest):6.1f} {max(largest):6.1f}"
            stress = [atoms.calc.results["stress"] / units.GPa for atoms in periodic]
            line += f" {np.min(stress):5.1f} to {np.max(stress):4.1f}" if stress else ""
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function):
        p = commands.add_parser(name, description=function.__doc__)
        p.set_defaults(function=function)
        return p

    p = command("run", run)
    p.add_argument("target", type=Path)
    p.add_argument("--student", type=Path, required=True, help="model.pt of mlff-export")
    p.add_argument("--prefix", required=True, help="of the trajectories' names: one per round of sampling")
    p.add_argument("--device", default="cpu", help='"cpu", "cuda" or "cuda:N"')
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--count", type=int, default=60, help="trajectories")
    p.add_argument("--first", type=int, default=0, help="number of the first trajectory, to share the work")
    p.add_argument("--minutes", type=float, default=1e9, help="stop early after this long")
    p.add_argument("--melt", type=int, default=120, help=f"steps of {TIMESTEP} fs at {MELTING:g} K")
    p.add_argument("--equilibrate", type=int, default=100, help="steps at a temperature before the first frame")
    p.add_argument("--frames", type=int, default=6, help="at a temperature")
    p.add_argument("--stride", type=int, default=30, help="steps between frames, a multiple of 10")
    p = command("distort", distort)
    p.add_argument("source", type=Path)
    p.add_argument("target", type=Path)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--count", type=int, default=330)
    p = command("small", small)
    p.add_argument("target", type=Path)
    p.add_argument("--prefix", required=True, help="of the trajectories' names")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--count", type=int, default=600)
    for name, function in (("pack", pack), ("water", water), ("describe", describe)):
        p = command(name, function)
        p.add_argument("sources", type=Path, nargs="+")
        if name != "describe":
            p.add_argument("target", type=Path)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
