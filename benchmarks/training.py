"""Time of a training step by size of the model and of the batch: as one CUDA graph, compiled (`compile: true`), beside plain PyTorch.

    python benchmarks/training.py --steps 300

Writes benchmarks/results/training.json. Labels are zero, which costs what any others cost; batches are drawn as in a real fit.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from common import environment, write_results
from mlff.painn import PaiNN, PaiNNConfig
from mlff.train.config import FitConfig
from mlff.train.data import make_graphs
from mlff.train.fit import fit
from mlff.train.frames import load

MOLECULES = Path(__file__).parents[1] / "examples" / "train" / "organics" / "molecules.npz"
ELEMENTS = ["H", "C", "N", "O", "F", "P", "S", "Cl", "Br"]


def ms_per_step(graphs: list, features: int, layers: int, max_edges: int, compiled: bool, steps: int, device: str) -> float:
    """Median over ten stretches of a fit, of which the first, which compiles, is left out."""
    torch.manual_seed(1)
    model = PaiNN(PaiNNConfig(species=ELEMENTS, features=features, layers=layers))
    config = FitConfig(steps=steps, max_edges=max_edges, report_every=steps // 10, tf32=device == "cuda", compile=compiled)
    times = []

    def report(averaged, curves) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    fit(model, graphs, config, device, report=report)
    return 1e3 * float(np.median(np.diff(times))) / config.report_every


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--sizes", nargs="+", default=["128,3", "64,2"], help="features,layers")
    parser.add_argument("--edges", type=int, nargs="+", default=[20_000, 60_000, 120_000])
    args = parser.parse_args()
    frames = load(MOLECULES)[: args.frames]
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    graphs = make_graphs(frames, 5.0)
    rows = []
    for size in args.sizes:
        features, layers = map(int, size.split(","))
        for max_edges in args.edges:
            row = {"features": features, "layers": layers, "edges": max_edges}
            for name, compiled, steps in (("compiled", True, args.steps), ("pytorch", False, max(20, args.steps // 5))):
                row[f"{name}_ms"] = ms_per_step(graphs, features, layers, max_edges, compiled, steps, args.device)
            rows.append(row)
            print(row, flush=True)
    write_results("training", {"environment": environment("torch", "mlff", device=args.device), "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
