"""What an engine adds to the time of the model on a GPU: LAMMPS and OpenMM end to end against the bare evaluation.

    python benchmarks/engines.py        # writes benchmarks/results/engines.json; needs a GPU, LAMMPS and OpenMM

LAMMPS: NVE of water boxes on one rank, time of its MD loop, against `mlff.core` on the same atoms (positions up, forces down,
list kept) in the same run. OpenMM: microseconds per step of Verlet integration of 21 atoms with the model as TorchForce, and
with a TorchForce that returns zeros, in turn; medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import ase.io
import numpy as np
import torch
from common import architectures, environment, water_box, write_results
from rich.console import Console

import mlff
from mlff.core import Model, System
from mlff.demo import lammps
from mlff.export import export

ROUNDS = 5
INPUT = """units metal
atom_style atomic
read_data water.data
mass 1 1.008
mass 2 15.999
pair_style mlff {model} device cuda
pair_coeff * * H O
velocity all create 300 1
fix 1 all nve
timestep 0.0002
run {warm_up}
run {steps}
"""


def lammps_step(model: Path, atoms, steps: int) -> float:
    """Seconds per step of LAMMPS's loop."""
    with tempfile.TemporaryDirectory() as folder:
        ase.io.write(Path(folder) / "water.data", atoms, format="lammps-data", specorder=["H", "O"], units="metal")
        lines = lammps(INPUT.format(model=model.resolve(), warm_up=20, steps=steps), Path(folder), 1)
        return float([line for line in lines if line.startswith("Loop time of")][-1].split()[3]) / steps


def bare_step(model: Path, atoms, repeats: int) -> float:
    """Median seconds of an evaluation with energy, forces and virial and the list kept."""
    system, rng, times = System(Model(model), device="cuda:0"), np.random.default_rng(0), []
    system.set_atoms(atoms.numbers)
    for _ in range(repeats):
        positions = atoms.positions + rng.normal(0, 0.003, atoms.positions.shape)
        start = time.perf_counter()
        system.compute(positions, atoms.cell.array, atoms.pbc)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


class Nothing(torch.nn.Module):
    """A force that costs what TorchForce itself costs."""

    def forward(self, positions):
        return torch.zeros(1, dtype=torch.float64, device=positions.device).sum(), torch.zeros_like(positions)


def openmm_step(force, atoms, steps: int) -> float:
    """Microseconds per step."""
    import openmm

    force.setOutputsForces(True)
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(float(mass))
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.0002), openmm.Platform.getPlatformByName("CUDA"))
    context.setPositions(atoms.positions / 10)
    integrator = context.getIntegrator()
    integrator.step(200)
    times = []
    for _ in range(5):
        context.getState(energy=True)
        start = time.perf_counter()
        integrator.step(steps)
        context.getState(energy=True)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / steps


def openmm(model: Path, folder: Path, atoms, steps: int) -> dict:
    import openmmtorch

    import mlff.openmm  # noqa: F401 - registers the operator

    torch.jit.script(Nothing()).save(str(folder / "nothing.pt"))
    times = {}
    for _ in range(ROUNDS):  # contexts in turn: one can differ from the next by 5 us
        for graphs in ("false", "true"):
            for name, path in (("model", model), ("nothing", folder / "nothing.pt")):
                force = openmmtorch.TorchForce(str(path))
                force.setProperty("useCUDAGraphs", graphs)
                times.setdefault(f"{name}_us" + ("_graphs" if graphs == "true" else ""), []).append(openmm_step(force, atoms, steps))
    return {"atoms": len(atoms), **{key: statistics.median(us) for key, us in times.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--molecules", default="4056,32445", help="water molecules of the LAMMPS runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="MD steps of each LAMMPS run")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        droplet = water_box(7)
        droplet.set_cell(None)
        droplet.pbc = False
        model = export("ethanol-water", folder / "model.pt", structure=droplet, architectures=architectures("cuda"))
        for n in map(int, args.molecules.split(",")):
            atoms = water_box(n)
            bare, step = bare_step(model, atoms, 15), lammps_step(model, atoms, args.steps)
            rows.append({"atoms": len(atoms), "bare_ms": 1e3 * bare, "lammps_ms": 1e3 * step, "share": bare / step})
        small = openmm(model, folder, droplet, 1000)
    results = {
        "environment": {**environment("torch", "openmm", "lammps"), "gpu": torch.cuda.get_device_name()},
        "model": "ethanol-water",
        "lammps": rows,
        "openmm": small,
    }
    path = write_results("engines", results)
    console = Console(width=110)
    for r in rows:
        console.print(
            f"LAMMPS, {r['atoms']} atoms: {r['lammps_ms']:.2f} ms a step, bare {r['bare_ms']:.2f} ms: {100 * r['share']:.0f} % of the bare throughput"
        )
    console.print("OpenMM: " + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in small.items()))
    console.print(f"written to {path}, {mlff.__version__}")


if __name__ == "__main__":
    main()
