"""Does a student hold? Equilibration at 300 K, then a run at constant energy, of a box of water or of a structure from a file.

    python benchmarks/nve.py                                      # 64 molecules of water, 10 ps in LAMMPS on two ranks
    python benchmarks/nve.py --engine lammps --device cuda --molecules 216 --steps 100000
    python benchmarks/nve.py --engine openmm --device cuda --molecules 216 --steps 100000
    python benchmarks/nve.py --model organics --structure python/mlff/structures/conformers.extxyz@0 --device cuda --ranks 1 --steps 1000000
    ase build MgO mgo.extxyz -x rocksalt -a 4.252 --cubic -r 3,3,3
    python benchmarks/nve.py --model mgo --structure mgo.extxyz --device cuda --ranks 1 --steps 1000000

Writes benchmarks/results/nve-MODEL-FORMULA.json and .png, on a GPU nve-MODEL-FORMULA-ENGINE-cuda.
A structure in open space is put into a large periodic box. The drift is the slope of the total energy over the averages of ten
blocks, with the standard error of that fit.
"""

import argparse
import tempfile
import time
from pathlib import Path

import ase.io
import matplotlib
import numpy as np
from ase.data import atomic_masses, atomic_numbers
from scipy.stats import linregress

from common import RESULTS, architectures, environment, water_box, write_results
from mlff.core import Model
from mlff.demo import lammps
from mlff.export import export

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TIME_STEP = 0.0005  # ps
RECORD = 20  # steps between two records
INPUT = """units metal
atom_style atomic
read_data start.data
{masses}
pair_style mlff model.pt device {device}
pair_coeff * * {elements}
neighbor 1.0 bin
minimize 0 0.05 200 400
velocity all create 300 7 mom yes dist gaussian
timestep {time_step}
fix integrate all nve
fix bath all langevin 300 300 0.1 7 zero yes
run {equilibrate}
unfix bath
velocity all scale 300
reset_timestep 0
fix record all print {record} "$(step) $(etotal) $(temp)" file energy.txt screen no title ""
thermo 2000
run {steps}
"""


def run_lammps(folder: Path, atoms, args) -> tuple:
    """Steps, total energies in eV and temperatures in K, and the seconds of the last run."""
    elements = sorted(set(atoms.symbols))
    ase.io.write(folder / "start.data", atoms, format="lammps-data", specorder=elements, units="metal")
    masses = "\n".join(f"mass {k} {atomic_masses[atomic_numbers[symbol]]}" for k, symbol in enumerate(elements, 1))
    text = INPUT.format(
        equilibrate=args.equilibrate, steps=args.steps, device=args.device, time_step=TIME_STEP, record=RECORD, masses=masses,
        elements=" ".join(elements),
    )  # fmt: skip
    lines = list(lammps(text, folder, args.ranks))
    seconds = float([line for line in lines if line.startswith("Loop time of")][-1].split()[3])
    return (*np.loadtxt(folder / "energy.txt").T, seconds)


def run_openmm(folder: Path, atoms, args) -> tuple:
    """The same in OpenMM, whose kinetic energy is that of full steps."""
    import openmm
    from openmm import app, unit

    import mlff.openmm

    system, topology = openmm.System(), app.Topology()
    residue = topology.addResidue("all", topology.addChain())
    for number, mass in zip(atoms.numbers, atoms.get_masses()):
        system.addParticle(float(mass))
        topology.addAtom("atom", app.Element.getByAtomicNumber(int(number)), residue)
    topology.setPeriodicBoxVectors([openmm.Vec3(*row) * unit.nanometer for row in atoms.cell.array / 10])
    system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
    system.addForce(mlff.openmm.create_force(folder / "model.pt", topology))
    platform = openmm.Platform.getPlatformByName("CUDA" if args.device == "cuda" else "CPU")
    context = openmm.Context(system, openmm.LangevinMiddleIntegrator(300, 10, TIME_STEP), platform)
    context.setPositions(atoms.positions / 10)
    openmm.LocalEnergyMinimizer.minimize(context, 5, 200)
    context.setVelocitiesToTemperature(300, 7)
    context.getIntegrator().step(args.equilibrate)
    state = context.getState(positions=True, velocities=True)
    context = openmm.Context(system, openmm.VerletIntegrator(TIME_STEP), platform)
    context.setPositions(state.getPositions())
    context.setVelocities(state.getVelocities())
    rows, start = [], time.perf_counter()
    for step in range(0, args.steps + 1, RECORD):
        state = context.getState(energy=True)
        kinetic = state.getKineticEnergy().value_in_unit(unit.kilojoule_per_mole)
        total = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) + kinetic
        rows.append((step, total / 96.48533212, 2 * kinetic / (3 * (len(atoms) - 1) * 0.00831446262)))
        context.getIntegrator().step(RECORD if step < args.steps else 0)
    return (*np.array(rows).T, time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ethanol-water", help="name of a shipped student, or a checkpoint")
    parser.add_argument("--structure", type=Path, help="what ASE reads (default: a box of water)")
    parser.add_argument("--engine", choices=("lammps", "openmm"), default="lammps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--molecules", type=int, default=64)
    parser.add_argument("--equilibrate", type=int, default=6000, help="steps of 0.5 fs")
    parser.add_argument("--steps", type=int, default=20000, help="steps of 0.5 fs")
    parser.add_argument("--ranks", type=int, default=2, help="of LAMMPS")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        export(args.model, folder / "model.pt", architectures=architectures(args.device))
        atoms = ase.io.read(args.structure) if args.structure else water_box(args.molecules)
        if atoms.pbc.any() and not atoms.pbc.all():
            raise SystemExit(f"{args.structure}: expected three periodic directions or none, got pbc {atoms.pbc.tolist()}")
        if not atoms.pbc.any():
            atoms.center(vacuum=10.0)
            atoms.pbc = True
        formula = atoms.get_chemical_formula()
        step, energy, temperature, seconds = {"lammps": run_lammps, "openmm": run_openmm}[args.engine](folder, atoms, args)
        sha256 = Model(folder / "model.pt").sha256

    assert len(step) == args.steps // RECORD + 1 and np.isfinite(energy).all()
    picoseconds, energy = TIME_STEP * step, 1e3 * (energy - energy[0]) / len(atoms)
    blocks = np.array_split(np.arange(len(step)), 10)
    fit = linregress([picoseconds[b].mean() for b in blocks], [energy[b].mean() for b in blocks])
    results = {
        "environment": environment("torch", "lammps", "openmm", "mlff", device=args.device), "model": Path(args.model).stem, "sha256": sha256,
        "formula": formula, "engine": args.engine, "device": args.device, "atoms": len(atoms), "steps": args.steps,
        "ms_per_step": 1e3 * seconds / args.steps,
        "picoseconds": float(picoseconds[-1]), "timestep_fs": 1e3 * TIME_STEP, "temperature_K_mean": float(temperature.mean()),
        "temperature_K_by_quarter": [float(q.mean()) for q in np.array_split(temperature, 4)],
        "drift_meV_per_atom_per_ns": 1e3 * float(fit.slope), "drift_standard_error": 1e3 * float(fit.stderr),
        "fluctuation_meV_per_atom": float((energy - np.polyval(np.polyfit(picoseconds, energy, 1), picoseconds)).std()),
    }  # fmt: skip
    name = f"nve-{Path(args.model).stem}-{formula}" + (f"-{args.engine}-cuda" if args.device == "cuda" else "")
    path = write_results(name, results)

    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 5), constrained_layout=True)
    axes[0].plot(picoseconds, energy, lw=0.6)
    axes[0].set_ylabel("total energy / (meV/atom)")
    engine = {"lammps": "LAMMPS", "openmm": "OpenMM"}[args.engine]
    title = f"{Path(args.model).stem}: {formula}, NVE in {engine}, {args.device}, drift {1e3 * fit.slope:.1f} ± {1e3 * fit.stderr:.1f} meV/atom/ns"
    axes[0].set_title(title, fontsize=10)
    axes[1].plot(picoseconds, temperature, lw=0.6, color="C1")
    axes[1].set(xlabel="time / ps", ylabel="temperature / K")
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    print({k: v for k, v in results.items() if k != "environment"}, f"written to {path}", sep="\n")


if __name__ == "__main__":
    main()
