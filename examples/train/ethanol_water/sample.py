"""Sampling: starting structures, then molecular dynamics driven by the teacher or by a student.

    python sample.py starts starts.extxyz --seed 1           trajectories to be run, with their temperatures
    python sample.py scans scans.extxyz --seed 1 --count 60  pairs at all distances, stretched bonds, torsions
    python sample.py run starts.extxyz sampled.extxyz --teacher so3lr --device cuda --steps 3000
    python sample.py run starts.extxyz sampled.extxyz --student round1.safetensors --device cuda --steps 20000

`run` relaxes the packed boxes, brings every system to its temperature, and writes frames at equal intervals. A student
that fails (a force above --max-force) is put back to the last sound frame of another time, and the frames that led there
are what it has to learn: they are written as well.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import read, write

from mlff.train.dynamics import SO3LR, Batch, Langevin, Student, relax, sample
from structures import describe, scans, strained, trajectories


def prefixed(frames: list[Atoms], prefix: str) -> list[Atoms]:
    """Names of trajectories made unique over rounds of sampling."""
    for atoms in frames:
        atoms.info["trajectory"] = f"{prefix}-{atoms.info['trajectory']}"
    return frames


def make_starts(args) -> None:
    starts = trajectories(np.random.default_rng(args.seed))
    for atoms, temperature in starts:
        atoms.info["temperature"] = round(float(temperature), 1)
    frames = prefixed([atoms for atoms, _ in starts], f"start{args.seed}")
    write(args.target, frames)
    print(describe(frames))


def make_scans(args) -> None:
    frames = prefixed(scans(np.random.default_rng(args.seed), args.count), f"scan{args.seed}")
    write(args.target, frames)
    print(describe(frames))


def run(args) -> None:
    starts = read(args.source, ":")
    rng = np.random.default_rng(args.seed)
    temperatures = np.array([atoms.info["temperature"] for atoms in starts])
    if args.hotter != 1.0:
        temperatures = temperatures * args.hotter
    if args.student:
        from mlff.painn import load_checkpoint

        potential = Student(load_checkpoint(args.student), args.device)
    else:
        potential = SO3LR(args.device)
    batch = Batch(prefixed(starts, args.prefix), args.device)
    if args.relax:
        relax(batch, potential, args.relax)
    md = Langevin(batch, potential, temperatures, args.timestep, args.friction, args.pressure, seed=args.seed)
    md.step(args.equilibrate)

    deadline = time.time() + 60.0 * args.minutes
    frames, failures = sample(md, args.steps, args.stride, args.check, args.max_force, deadline, seed=args.seed)
    temperature = md.kinetic() / (1.5 * 8.617333e-5 * batch.counts)
    print("failures:", {starts[b].info["trajectory"]: int(n) for b, n in enumerate(failures) if n} or "none")
    by_kind: dict[str, list[float]] = {}
    for atoms, t in zip(starts, temperature.tolist()):
        by_kind.setdefault(atoms.info["kind"], []).append(t)
    print("temperatures at the end (K):", {k: round(float(np.mean(v))) for k, v in by_kind.items()})

    written = []
    for atoms in frames:
        if atoms.pbc.all() and rng.uniform() < args.strain_share:
            atoms = strained(atoms, 0.015, rng)
        atoms.calc = None
        written.append(atoms)
    write(args.target, written)
    print(describe(written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("starts", make_starts), ("scans", make_scans), ("run", run)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        if name == "run":
            command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
        command.add_argument("--seed", type=int, default=1)
        if name == "scans":
            command.add_argument("--count", type=int, default=60, help="structures of each sort")
        if name == "run":
            which = command.add_mutually_exclusive_group(required=True)
            which.add_argument("--teacher", choices=["so3lr"])
            which.add_argument("--student", type=Path)
            command.add_argument("--prefix", required=True, help="of the trajectories' names: one per round of sampling")
            command.add_argument("--device", default="cuda")
            command.add_argument("--steps", type=int, default=3000)
            command.add_argument("--minutes", type=float, default=1e9, help="stop early after this long")
            command.add_argument("--stride", type=int, default=200, help="steps between frames, a multiple of --check")
            command.add_argument("--check", type=int, default=20, help="steps between looks for failures")
            command.add_argument("--relax", type=int, default=0, help="steps downhill before the dynamics")
            command.add_argument("--equilibrate", type=int, default=0, help="steps before the first frame")
            command.add_argument("--timestep", type=float, default=0.5, help="fs")
            command.add_argument("--friction", type=float, default=0.02, help="1/fs")
            command.add_argument("--pressure", type=float, help="bar; boxes of fixed volume without it")
            command.add_argument("--hotter", type=float, default=1.0, help="factor on all temperatures")
            command.add_argument("--max-force", type=float, default=25.0, help="eV/Angstrom")
            command.add_argument("--strain-share", type=float, default=0.3, help="of periodic frames")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.function(args)


if __name__ == "__main__":
    main()
