"""One system through the compiled file: NVE or NVT with ASE and mlff's own kernels on the CPU.

    mlff-export ethanol-water -o model.pt
    python check_ase.py model.pt round1.extxyz --index 230 --steps 20000

A frame is given velocities of --temperature, held there by a Langevin thermostat for --equilibrate steps, and then run.
Printed at the end: drift (slope of the total energy), fluctuation about it, temperatures of the two halves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from ase import units
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet

from mlff.ase import MLFFCalculator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("structure", type=Path)
    parser.add_argument("--index", type=int, default=-1, help="frame of the file")
    parser.add_argument("--nvt", action="store_true", help="keep the thermostat on (0.01/fs)")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--equilibrate", type=int, default=1000, help="steps")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    atoms = read(args.structure, args.index)
    atoms.calc = MLFFCalculator(args.model, threads=args.threads)
    timestep = args.timestep * units.fs
    MaxwellBoltzmannDistribution(atoms, temperature_K=args.temperature, rng=rng)
    Stationary(atoms)
    Langevin(atoms, timestep, temperature_K=args.temperature, friction=0.02 / units.fs, rng=rng).run(args.equilibrate)
    Stationary(atoms)
    if args.nvt:
        md = Langevin(atoms, timestep, temperature_K=args.temperature, friction=0.01 / units.fs, rng=rng)
    else:
        md = VelocityVerlet(atoms, timestep)
    times, total, kelvin = [], [], []

    def sample() -> None:
        times.append(md.nsteps * args.timestep / 1000.0)
        total.append(1000.0 * atoms.get_total_energy() / len(atoms))
        kelvin.append(atoms.get_temperature())

    md.attach(sample, 20)
    md.run(args.steps)
    slope, offset = np.polyfit(times, total, 1)
    half = len(times) // 2
    report = {
        "atoms": len(atoms),
        "ensemble": "NVT" if args.nvt else "NVE",
        "picoseconds": times[-1],
        "temperature_first_half_K": round(float(np.mean(kelvin[:half])), 1),
        "temperature_second_half_K": round(float(np.mean(kelvin[half:])), 1),
    }
    if not args.nvt:
        report["drift_meV_per_atom_per_ps"] = float(f"{slope:.3g}")
        report["fluctuation_meV_per_atom"] = float(f"{np.std(np.array(total) - slope * np.array(times) - offset):.3g}")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
