"""Does a student hold molecular dynamics? NVE of water, of ethanol in the gas phase and in water; NVT of ethanol in water.

    python check_md.py student.safetensors report.json --device cuda

Every system is packed, relaxed, brought to 300 K for --equilibrate steps, and run for --steps. Reported per system: the
slope of a straight line through the total energy (drift), the rest's standard deviation (fluctuation), and temperatures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.progress import track

from mlff.painn import load_checkpoint
from mlff.train.dynamics import Batch, Langevin, Student, relax
from structures import box, ethanol


def systems(rng: np.random.Generator) -> list[tuple[str, str, object]]:
    """Name, ensemble and structure."""
    result = [(f"64 waters, copy {k}", "NVE", box(64, 0, 1.0, rng)) for k in range(3)]
    result += [(f"ethanol in the gas phase, copy {k}", "NVE", ethanol(rng)) for k in range(4)]
    result += [("1 ethanol + 55 waters", "NVE", box(55, 1, 0.97, rng)), ("1 ethanol + 55 waters", "NVT", box(55, 1, 0.97, rng))]
    result += [("10 ethanols", "NVE", box(0, 10, 0.79, rng))]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--equilibrate", type=int, default=4000)
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    chosen = systems(np.random.default_rng(args.seed))
    batch = Batch([atoms for _, _, atoms in chosen], args.device)
    potential = Student(load_checkpoint(args.student), args.device)
    started = time.time()
    relax(batch, potential, 150)
    temperatures = [args.temperature] * batch.size
    md = Langevin(batch, potential, temperatures, args.timestep, 0.02, seed=args.seed)
    md.step(args.equilibrate)
    friction = [0.0 if ensemble == "NVE" else 0.01 for _, ensemble, _ in chosen]
    velocities = md.velocities
    md = Langevin(batch, potential, temperatures, args.timestep, friction, seed=args.seed)
    md.velocities = velocities
    times, total, kinetic = [], [], []
    every = 20
    for k in track(range(0, args.steps, every), description="check"):
        md.step(every)
        times.append((k + every) * args.timestep / 1000.0)
        kinetic.append(md.kinetic().cpu().numpy())
        total.append(md.energy.cpu().numpy() + kinetic[-1])
    total, kinetic = np.array(total), np.array(kinetic)
    counts = batch.counts.cpu().numpy()
    kelvin = kinetic / (1.5 * 8.617333262e-5 * counts)
    half = len(times) // 2
    report = []
    for b, (name, ensemble, atoms) in enumerate(chosen):
        per_atom = 1000.0 * total[:, b] / counts[b]
        finite = bool(np.all(np.isfinite(per_atom)))
        slope, offset = np.polyfit(times, per_atom, 1) if finite else (np.nan, np.nan)
        entry = {
            "system": name,
            "ensemble": ensemble,
            "atoms": int(counts[b]),
            "picoseconds": round(times[-1], 3),
            "held": finite and bool(kelvin[:, b].max() < 5 * args.temperature),
            "temperature_first_half_K": round(float(kelvin[:half, b].mean()), 1),
            "temperature_second_half_K": round(float(kelvin[half:, b].mean()), 1),
        }
        if ensemble == "NVE":
            entry["drift_meV_per_atom_per_ps"] = float(f"{slope:.4g}")
            entry["fluctuation_meV_per_atom"] = float(f"{(per_atom - slope * np.array(times) - offset).std():.4g}")
        report.append(entry)
        print(entry, flush=True)
    summary = {"timestep_fs": args.timestep, "seconds": round(time.time() - started), "systems": report}
    args.report.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
