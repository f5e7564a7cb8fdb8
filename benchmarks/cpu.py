"""Speed on the CPU: mlff against eager PyTorch autograd on the same weights, edges and cores, and LAMMPS on two ranks against one.

    python benchmarks/cpu.py            # writes benchmarks/results/cpu.json and prints the tables

Each pair of numbers is taken in turns in one run, so that what else the machine does falls on both; the ratio is that of the medians.
Energy, forces and virial are evaluated at fresh positions every call. PyTorch is given its edges; mlff's time includes looking for them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import ase.io
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlff
from common import environment, water_box, write_results
from mlff.core import Model, System
from mlff.demo import lammps
from mlff.export import build_payload, export
from mlff.neighbors import find_neighbors
from mlff.painn import forces_and_virial, load_checkpoint, read_record


def eager(model, numbers, edges, vectors):
    """One evaluation by PyTorch's autograd, as a user of the plain model would write it."""
    r = vectors.to(torch.float32).requires_grad_(True)
    energy = model(numbers, edges, r).sum()
    (gradient,) = torch.autograd.grad(energy, r)
    forces_and_virial(gradient, edges, r.detach(), len(numbers))


def median_times(calls, repeats):
    """Median seconds of each of several functions, called in turns."""
    times = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, t in zip(calls, times):
            start = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                t.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def evaluations(checkpoint, payload, repeats):
    model = load_checkpoint(checkpoint).requires_grad_(False)
    rows = []
    rng = np.random.default_rng(0)
    for n_molecules in track((72, 243, 576), description="energy + forces + virial"):
        atoms = water_box(n_molecules)
        n = len(atoms)
        found = find_neighbors(atoms.positions, model.config.cutoff, atoms.cell.array, atoms.pbc)
        numbers = torch.from_numpy(atoms.numbers)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            system = System(Model(payload), threads=threads)
            system.set_atoms(atoms.numbers)

            def ours():
                positions = atoms.positions + rng.normal(0, 1e-3, (n, 3))
                system.compute(positions, atoms.cell.array, atoms.pbc)

            def theirs():
                moved = torch.from_numpy(rng.normal(0, 1e-3, (n, 3)))
                eager(model, numbers, found.edges, found.vectors + moved[found.edges[1]] - moved[found.edges[0]])

            t_eager, t_mlff = median_times([theirs, ours], repeats)
            rows.append({
                "atoms": n, "edges": int(found.edges.shape[1]), "threads": threads,
                "eager_ms": 1e3 * t_eager, "mlff_ms": 1e3 * t_mlff,
                "eager_atom_steps_per_s": n / t_eager, "mlff_atom_steps_per_s": n / t_mlff, "ratio": t_eager / t_mlff,
            })
    return rows


INPUT = """units metal
atom_style atomic
read_data water.data
mass 1 1.008
mass 2 15.999
pair_style mlff {model}
pair_coeff * * H O
velocity all create 300 1
fix 1 all nve
timestep 0.0005
run {warm_up}
run {steps}
"""


def lammps_rates(model_path, ranks, steps):
    """Seconds of the MD loop of LAMMPS, as its log reports, for one NVE run of 1728 atoms."""
    with tempfile.TemporaryDirectory() as folder:
        ase.io.write(Path(folder) / "water.data", water_box(576), format="lammps-data", specorder=["H", "O"], units="metal")
        lines = lammps(INPUT.format(model=model_path, warm_up=5, steps=steps), Path(folder), ranks)
        return float([line for line in lines if line.startswith("Loop time of")][-1].split()[3]) / steps


def load_time(model_path):
    start = time.perf_counter()
    Model(model_path)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ethanol-water", help="name of a shipped student")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30, help="MD steps of each LAMMPS run")
    args = parser.parse_args()

    checkpoint = mlff.pretrained(args.model)
    payload = build_payload(load_checkpoint(checkpoint), read_record(checkpoint))
    rows = evaluations(checkpoint, payload, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        export(args.model, path, architectures=())
        load = statistics.median(load_time(path) for _ in range(5))
        one, two = [], []
        for _ in track(range(3), description="LAMMPS on 1 and 2 ranks"):
            one.append(lammps_rates(path, 1, args.steps))
            two.append(lammps_rates(path, 2, args.steps))
    ranks = {
        "atoms": 1728, "steps": args.steps, "one_rank_ms": 1e3 * statistics.median(one), "two_ranks_ms": 1e3 * statistics.median(two),
    }
    ranks["speedup"] = ranks["one_rank_ms"] / ranks["two_ranks_ms"]
    results = {
        "environment": environment("torch", "numpy", "lammps", "mlff"), "model": args.model, "evaluations": rows, "lammps": ranks,
        "load_model_pt_s": load,
    }
    path = write_results("cpu", results)

    table = Table(title=f"Energy, forces and virial, {args.model}, {results['environment']['cpu']}")
    for column in ("atoms", "threads", "eager PyTorch / ms", "mlff / ms", "mlff / (atom-steps/s)", "times faster"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(*(str(r[k]) for k in ("atoms", "threads")), f"{r['eager_ms']:.0f}", f"{r['mlff_ms']:.1f}",
                      f"{r['mlff_atom_steps_per_s']:.0f}", f"{r['ratio']:.1f}")
    console = Console(width=110)
    console.print(table)
    console.print(f"LAMMPS, 1728 atoms: {ranks['one_rank_ms']:.1f} ms a step on one rank, {ranks['two_ranks_ms']:.1f} ms on two: "
                  f"{ranks['speedup']:.2f} times faster")
    console.print(f"loading model.pt: {load:.3f} s; written to {path}")


if __name__ == "__main__":
    main()
