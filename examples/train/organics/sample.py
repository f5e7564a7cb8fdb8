"""Sampling and labels, every step minutes at most; files are compact (mlff.train.frames), and one that is there is not made again.

    python sample.py scans molecules.npz scans.npz --count 20000           by geometry: torsions, dimers, contacts ...
    python sample.py pairs molecules.npz pairs.npz --count 16000           atoms as close as AIMNet2's repulsion reaches
    python sample.py run molecules.npz md.npz --count 2000 --teacher       by dynamics, driven by AIMNet2
    python sample.py run molecules.npz md.npz --count 2000 --student a.safetensors
    python sample.py label scans.npz md.npz labelled.npz                   energies, forces and ensemble spread of AIMNet2
    python sample.py quench molecules.npz relaxed.npz --count 60           conformers of held-out molecules, relaxed
    python sample.py external external.npz                                 S22 and G2 of ASE
    python sample.py describe labelled.npz

Needs torch, NumPy, SciPy, ASE, mlff and the file of AIMNet2 in the wheel of auto3d; neither RDKit nor a network.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.data import atomic_numbers, covalent_radii
from ase.data.g2 import molecule_names
from ase.data.s22 import create_s22_system, get_number_of_dimer_atoms, s22
from rich.console import Console
from rich.progress import track

from geometry import (
    ELEMENTS, HELD_OUT, PAIRS, TRAINING, VALIDATION, Source, bare_pairs, flown_apart, has_hole, pair, pushed, scans, side, starts,
    wall, walls_of,
)  # fmt: skip
from mlff.files import replacing
from mlff.painn import load_checkpoint
from mlff.train.data import element_shifts
from mlff.train.dynamics import AIMNet2, Batch, Compiled, Langevin, Potential, Student, relax, sample
from mlff.train.frames import load, rounded, save
from mlff.train.label import label
from mlff.train.teachers import load_teacher

SIDES = {"training": TRAINING, "validation": VALIDATION, "held_out": HELD_OUT}
SHARES = {"training": 0.85, "validation": 0.05, "held_out": 0.1}
SCANS = {  # shares of the frames made by geometry
    "conformer": 0.08, "thermal": 0.22, "torsion": 0.22, "stretch": 0.12, "scaled": 0.06, "dimer": 0.18, "contact": 0.06,
    "cluster": 0.06,
}  # fmt: skip
PUSHED = {"collision": 0.75, "pressed": 0.25}  # of the frames of close atoms, besides bare pairs
BARE = 60  # bare pairs of every two elements
STARTS = {"molecule": 0.65, "dimer": 0.23, "cluster": 0.12}  # of the systems that dynamics starts from


def progress(items, text: str):
    return track(items, description=text, console=Console(stderr=True), disable=not sys.stderr.isatty())


def counts(shares: dict[str, float], total: float) -> dict[str, int]:
    return {name: round(total * share) for name, share in shares.items()}


def drawn(args, make, shares: dict[str, float], *more) -> list[Atoms]:
    """Structures of every side asked for, made by `make`; the seed is part of the names of their trajectories."""
    conformers = load(args.source)
    frames = []
    for name in [args.side] if args.side else SIDES:
        source = Source(conformers, SIDES[name], np.random.default_rng([args.seed, SIDES[name]]))
        made = make(source, counts(shares, args.count * (1.0 if args.side else SHARES[name])), *more)
        for atoms in made:
            atoms.info["trajectory"] = f"{args.prefix}{args.seed}-{name}-{atoms.info['trajectory']}"
        frames += made
    return frames


def make_scans(args) -> None:
    save(args.target, [rounded(atoms) for atoms in drawn(args, scans, SCANS)])


def too_hard(forces: np.ndarray, args) -> bool:
    """Whether forces [N, 3] are beyond what a teacher is asked for."""
    return bool(np.linalg.norm(forces, axis=1).max() > args.max_force)


def too_uncertain(forces: np.ndarray, spread: np.ndarray, args) -> bool:
    """Whether the teacher's members differ by too much about the force on an atom; for large ones in relation to it."""
    return bool((spread - args.relative_spread * np.linalg.norm(forces, axis=1)).max() > args.max_spread)


def measured_walls(args) -> np.ndarray:
    """How close atoms of two elements come before the teacher fails, alone with each other (geometry.wall); Angstrom [Z, Z]."""
    teacher, walls = load_teacher("aimnet2", args.device), np.full((36, 36), np.nan)
    for symbols in progress(PAIRS, "walls"):
        i, j = (atomic_numbers[symbol] for symbol in symbols)
        distances = np.arange(0.62, 1.3, 0.01) * (covalent_radii[i] + covalent_radii[j])
        results = teacher.evaluate([pair(symbols, distance) for distance in distances])
        forces = np.array([r["forces"][1, 2] for r in results])
        trusted = [not (too_hard(r["forces"], args) or too_uncertain(r["forces"], r["force_spread"], args)) for r in results]
        walls[i, j] = walls[j, i] = wall(distances, forces, np.array(trusted))
    return walls


def make_pairs(args) -> None:
    """Atoms as close as the teacher's repulsion reaches: bare pairs of every two elements, collisions, bonds pressed together."""
    walls = measured_walls(args)
    for symbols in PAIRS:
        i, j = (atomic_numbers[symbol] for symbol in symbols)
        print(f"{'-'.join(symbols)}: {walls[i, j]:.2f} A, {walls[i, j] / (covalent_radii[i] + covalent_radii[j]):.2f} of the radii")
    frames = [] if args.side in ("validation", "held_out") else bare_pairs(walls, BARE, np.random.default_rng(args.seed))
    for atoms in frames:
        atoms.info["trajectory"] = f"{args.prefix}{args.seed}-{atoms.info['trajectory']}"
    save(args.target, [rounded(atoms) for atoms in frames + drawn(args, pushed, PUSHED, walls)])


def potential(args) -> Potential:
    """What drives the dynamics: a checkpoint runs in PyTorch, a model.pt in the compiled core."""
    if args.teacher:
        return AIMNet2(args.device)
    compiled = args.student.suffix == ".pt"
    return Compiled(args.student, args.device) if compiled else Student(load_checkpoint(args.student), args.device)


def run(args) -> None:
    """Relax, bring to temperature, sample; systems of about one size are neighbours, so that padding is short."""
    if args.stride % args.check:
        raise SystemExit(f"expected a --stride that is a multiple of --check, got {args.stride} and {args.check}")
    began = time.time()
    systems = sorted(drawn(args, starts, STARTS, tuple(args.temperatures)), key=len)
    batch = Batch(systems, args.device)
    print(f"{batch.size} systems of {len(batch.numbers) / batch.size:.1f} atoms on average", flush=True)
    model = potential(args)
    apart = flown_apart(batch)
    relax(batch, model, args.relax)
    temperatures = [atoms.info["temperature"] for atoms in systems]
    md = Langevin(batch, model, temperatures, args.timestep, args.friction, seed=args.seed)
    md.step(args.equilibrate)
    deadline = began + 60.0 * args.minutes
    frames, failures = sample(md, args.steps, args.stride, args.check, 30.0, deadline, apart, args.seed)
    kinds = [atoms.info["kind"] for atoms in systems]
    failed = Counter(kind for kind, n in zip(kinds, failures) if n)
    print("systems that failed:", {kind: f"{failed[kind]} of {n}" for kind, n in Counter(kinds).items()})
    rate = batch.size * (args.relax + args.equilibrate + args.steps) / (time.time() - began)
    print(f"{len(frames)} frames, up to {rate:.0f} system-steps/s")
    # what has evaporated further than a file holds is no use anyway
    save(args.target, [r for r in map(rounded, frames) if np.isfinite(r.positions).all() and np.abs(r.positions).max() < 32.0])


def labels(frames: list[Atoms], device: str, max_pairs: int) -> tuple[list[Atoms], dict]:
    """Frames with the labels of AIMNet2, smallest first, and its provenance."""
    teacher = load_teacher("aimnet2", device)
    frames = sorted(frames, key=len)
    groups: list[list[Atoms]] = [[]]
    for atoms in frames:
        if groups[-1] and (len(groups[-1]) + 1) * len(atoms) ** 2 > (max_pairs or teacher.max_pairs):
            groups.append([])
        groups[-1].append(atoms)
    began = time.time()
    labelled = [atoms for group in progress(groups, "label") if group for atoms in label(group, teacher)]
    print(f"{len(labelled) / (time.time() - began):.0f} frames/s", flush=True)
    return labelled, teacher.provenance


def make_labels(args) -> None:
    frames = [atoms for path in args.source for atoms in load(path)]
    labelled, provenance = labels(frames, args.device, args.max_pairs)
    finite = [atoms for atoms in labelled if all(np.isfinite(value).all() for value in atoms.calc.results.values())]
    soft = [atoms for atoms in finite if not too_hard(atoms.calc.results["forces"], args)]
    certain = [atoms for atoms in soft if not too_uncertain(atoms.calc.results["forces"], atoms.arrays["force_spread"], args)]
    walls = walls_of(frames)
    kept = [a for a in certain if a.info["kind"] == "pair" or not has_hole(a, a.calc.results["forces"], walls)]
    limits = {"max_force_eV_A": args.max_force, "max_spread_eV_A": args.max_spread, "relative_spread": args.relative_spread}
    left_out = {"not_finite": len(labelled) - len(finite), "max_force": len(finite) - len(soft)}
    left_out.update(max_spread=len(soft) - len(certain), hole=len(certain) - len(kept))
    save(args.target, kept)
    record = {"teacher": provenance, **limits, "left_out": left_out, "labelled": len(kept)}
    with replacing(args.target.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
    asked, got = (Counter(atoms.info["kind"] for atoms in part) for part in (frames, kept))
    print(f"left out: {left_out}; of each kind:", {kind: f"{n - got[kind]} of {n}" for kind, n in sorted(asked.items())})
    print(table(kept))


def quench(args) -> None:
    """Conformers of `count` held-out molecules, relaxed by AIMNet2 (dynamics with friction at 0 K), with its labels."""
    by_molecule: dict[str, list[Atoms]] = {}
    for atoms in load(args.source):
        if side(atoms.info["scaffold"]) == HELD_OUT:
            by_molecule.setdefault(atoms.info["molecule"], []).append(atoms)
    flexible = sorted((name for name, frames in by_molecule.items() if len(frames) >= 4), key=lambda n: (len(by_molecule[n][0]), n))
    chosen = flexible[:: max(1, len(flexible) // args.count)][: args.count]
    batch = Batch([atoms for name in chosen for atoms in by_molecule[name]], args.device)
    print(f"{batch.size} conformers of {len(chosen)} molecules", flush=True)
    model = AIMNet2(args.device)
    relax(batch, model, 30)
    md = Langevin(batch, model, [0.0] * batch.size, 1.0, 0.02)
    md.step(args.steps)
    labelled, provenance = labels([rounded(atoms) for atoms in batch.snapshot()], args.device, 0)
    for atoms in labelled:
        atoms.info["kind"] = "relaxed"
    forces = [np.linalg.norm(atoms.calc.results["forces"], axis=1).max() for atoms in labelled]
    save(args.target, labelled)
    args.target.with_suffix(".json").write_text(json.dumps({"teacher": provenance}, indent=2) + "\n")
    print(f"largest force that is left: median {np.median(forces):.3f}, 95 % below {np.percentile(forces, 95):.3f} eV/A")


def external(args) -> None:
    """S22 dimers with their two halves, and molecules of G2 with closed shells; labels by `label`."""
    known, frames = {atomic_numbers[symbol] for symbol in ELEMENTS}, []
    for name in s22:
        whole, (first, _) = create_s22_system(name), get_number_of_dimer_atoms(name)
        for part, atoms in (("dimer", whole), ("a", whole[:first]), ("b", whole[first:])):
            atoms.info = {"kind": "s22", "molecule": name, "trajectory": f"{name} {part}"}
            frames.append(atoms)
    for name in molecule_names:
        atoms = molecule(name)
        open_shell = atoms.numbers.sum() % 2 or atoms.get_initial_magnetic_moments().any()
        if len(atoms) > 1 and set(atoms.numbers) <= known and not open_shell:
            atoms.info = {"kind": "g2", "molecule": name, "trajectory": name}
            frames.append(atoms)
    for atoms in frames:
        atoms.set_initial_magnetic_moments(None)
        atoms.info["scaffold"] = "external"
    save(args.target, [rounded(atoms) for atoms in frames])


def table(frames: list[Atoms]) -> str:
    """Of each kind: frames, molecules, atoms; root mean square of forces' components (eV/A), largest force of a frame (median,
    95 %); energy per atom beyond the best sum of constants per element (standard deviation, meV); the teacher's spread of a
    force component (meV/A, mean and 95 % of frames)."""
    lines = [f"{'kind':12} {'frames':>7} {'mols':>6} {'atoms':>6} {'F rms':>7} {'max F':>7} {'95%':>7} {'E std':>7} {'spread':>7} {'95%':>7}"]
    labelled = bool(frames) and all(atoms.calc is not None for atoms in frames)
    if labelled:
        numbers = sorted({int(z) for atoms in frames for z in atoms.numbers})
        shifts = dict(zip(numbers, element_shifts(frames, numbers).tolist()))
    for kind in [*sorted({atoms.info["kind"] for atoms in frames}), "all"]:
        members = [atoms for atoms in frames if kind in (atoms.info["kind"], "all")]
        molecules = len({name for atoms in members for name in atoms.info["molecule"].split(".")})
        line = f"{kind:12} {len(members):7} {molecules:6} {np.mean([len(a) for a in members]):6.1f}"
        if labelled:
            forces = [atoms.calc.results["forces"] for atoms in members]
            largest = [np.linalg.norm(f, axis=1).max() for f in forces]
            rms = np.sqrt((np.concatenate(forces) ** 2).mean())
            line += f" {rms:7.2f} {np.median(largest):7.1f} {np.percentile(largest, 95):7.1f}"
            rest = [(a.calc.results["energy"] - sum(shifts[z] for z in a.numbers)) / len(a) for a in members]
            line += f" {1000 * np.std(rest):7.0f}"
            # a spread is the norm over x, y, z of standard deviations: divided by sqrt(3) it is one component's
            spread = [1000 * np.sqrt((atoms.arrays["force_spread"] ** 2).mean() / 3) for atoms in members]
            line += f" {np.mean(spread):7.1f} {np.percentile(spread, 95):7.1f}"
        lines.append(line)
    sides = Counter(side(atoms.info["scaffold"]) for atoms in frames)
    lines.append(", ".join(f"{name} {sides[number]}" for name, number in SIDES.items()) + " frames; with element: "
                 + " ".join(f"{s} {sum(s in a.symbols for a in frames)}" for s in ELEMENTS))  # fmt: skip
    return "\n".join(lines)


def describe(args) -> None:
    print(table([atoms for path in args.source for atoms in load(path)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function, sources: str | None, target: bool = True):
        p = commands.add_parser(name, description=function.__doc__)
        p.set_defaults(function=function)
        if sources:
            p.add_argument("source", type=Path, nargs=sources if sources == "+" else None)
        if target:
            p.add_argument("target", type=Path)
        p.add_argument("--seed", type=int, default=1)
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        return p

    def limits(p, force: float, relative_spread: float) -> None:
        p.add_argument("--max-force", type=float, default=force, help="eV/Angstrom; what is above it is left out")
        p.add_argument("--max-spread", type=float, default=4.0, help="eV/Angstrom, of any atom; what is above it is left out")
        p.add_argument("--relative-spread", type=float, default=relative_spread, help="so much of the atom's force on top")

    for name, function, count in (("scans", make_scans, 20000), ("pairs", make_pairs, 16000), ("run", run, 2000)):
        p = command(name, function, "1")
        p.add_argument("--count", type=int, default=count, help="systems of dynamics (run) or frames (of pairs: besides bare ones)")
        p.add_argument("--side", choices=SIDES, help="of the split; all of them, by their shares, without it")
        p.add_argument("--prefix", default=name, help="of the trajectories' names: one per round of sampling")
        if name == "pairs":
            limits(p, 70.0, 0.2)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--teacher", action="store_true")
    which.add_argument("--student", type=Path, help="checkpoint, or the model.pt of mlff-export")
    p.add_argument("--temperatures", type=float, nargs=2, default=(300.0, 1000.0), help="K")
    p.add_argument("--relax", type=int, default=20, help="steps downhill before the dynamics")
    p.add_argument("--equilibrate", type=int, default=100, help="steps before the first frame")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--minutes", type=float, default=8.0, help="stop early after this long")
    p.add_argument("--stride", type=int, default=100, help="steps between frames, a multiple of --check")
    p.add_argument("--check", type=int, default=20, help="steps between looks for failures")
    p.add_argument("--timestep", type=float, default=0.5, help="fs")
    p.add_argument("--friction", type=float, default=0.02, help="1/fs")

    p = command("label", make_labels, "+")
    limits(p, 30.0, 0.0)
    p.add_argument("--max-pairs", type=int, default=0, help="pairs of atoms at once, 20 kB each; 0: as the teacher says")
    p = command("quench", quench, "1")
    p.add_argument("--count", type=int, default=60, help="molecules")
    p.add_argument("--steps", type=int, default=1500)
    command("external", external, None)
    command("describe", describe, "+", target=False)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if hasattr(args, "target") and args.target.exists():
        print(f"{args.target} is there already")
        return
    args.function(args)


if __name__ == "__main__":
    main()
