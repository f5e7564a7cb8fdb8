"""Time of every GPU kernel beside the time that its memory traffic must take at least.

    python benchmarks/kernels.py        # writes benchmarks/results/kernels.json and prints the tables; needs a GPU

Each kernel of the plan is compiled by Triton and repeated in a CUDA graph; times are medians of graph replays over the number
of repetitions, so they include what a dependent kernel costs at least in a graph (about 1 us). The floor counts every number
that a kernel reads or writes once, at the bandwidth of a large copy measured in the same run; for the message kernels it also
counts one read per edge of what is gathered from neighbours. Gathers come from the L2 cache where that is large enough, which
is faster, so their floor is a guide, not a bound.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import environment, microseconds, water_box, write_results  # noqa: E402
from plan_runner import PlanRunner  # noqa: E402

from mlff.export import cuda_tensors, plan_tensors  # noqa: E402
from mlff.painn import PaiNN, PaiNNConfig  # noqa: E402
from mlff.plan import cuda_plan  # noqa: E402

SIZES = {"f16": 2, "f32": 4, "f64": 8, "i32": 4, "i64": 8, "u8": 1}
GATHERED = {"message": 5, "message_backward": 4}  # numbers per channel and edge


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    a = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / (1e-6 * microseconds(lambda: b.copy_(a), 3))


def traffic(runner: PlanRunner, stage, edges: int) -> float:
    """Bytes that a stage moves at least."""
    widths = {b["name"]: b for b in runner.dict["buffers"]}
    total = 0.0
    for name in stage["args"]:
        if name in runner.tensors:
            total += runner.tensors[name].numel() * runner.tensors[name].element_size()
        elif name in widths:
            b = widths[name]
            rows = {"edges": edges, "candidates": 2 * edges}.get(b["rows"], runner.n_total)
            total += rows * b["width"] * SIZES[b["dtype"]]
    kernel = stage["kernel"].split(".")[0]
    features = runner.plan.launches[stage["kernel"]].constants.get("F", 0)
    return total + GATHERED.get(kernel, 0) * 4 * features * edges


def measure(config: PaiNNConfig, n_molecules: int, search: str, schedule: int, bandwidth: float) -> dict:
    torch.manual_seed(0)
    model = PaiNN(config).requires_grad_(False).double()
    runner = PlanRunner(cuda_plan(config), {**plan_tensors(model), **cuda_tensors(model)}, config.cutoff, "cuda", search, schedule)
    atoms = water_box(n_molecules)
    runner.set_atoms(
        np.where(atoms.numbers == 1, 0, 1),
        edge_capacity=96,
        candidate_capacity=160 if search == "list" else len(atoms) + 15,
        extra_rows=0,
    )
    box = (atoms.cell.array, True) if search == "list" else (None, None)
    out = runner.compute(atoms.positions, *box)
    runner.compute(atoms.positions, *box)  # now the list is kept
    edges = int(runner.arrays["edge_count"].sum())
    assert np.isfinite(out["forces"]).all() and not out["status"][3:8].any()
    repeats, rows = 4 if len(atoms) > 1000 else 20, []
    stages = [
        s
        for s in runner.dict["search"][search] + runner.dict["schedules"][schedule]["stages"]
        if s["kernel"] != "exchange" and s["pass"] != "energy"
    ]
    for stage in stages:
        floor = 1e6 * traffic(runner, stage, edges) / bandwidth
        rows.append({"kernel": stage["kernel"], "us": microseconds(lambda: runner.run([stage]), repeats), "floor_us": floor})
    total = microseconds(lambda: runner.run(stages), 1 if len(atoms) > 1000 else repeats)  # a graph's start takes 10 us
    return {
        "features": config.features,
        "layers": config.layers,
        "atoms": len(atoms),
        "edges": edges,
        "search": search,
        "kernels": rows,
        "evaluation_us": total,
        "atom_steps_per_s": 1e6 * len(atoms) / total,
    }


def main():
    bandwidth = copy_bandwidth()
    default, small = PaiNNConfig(species=["H", "O"]), PaiNNConfig(species=["H", "O"], features=64, layers=2)
    results = [
        measure(default, 4056, "list", 1, bandwidth),
        measure(small, 4056, "list", 1, bandwidth),
        measure(default, 7, "dense", 0, bandwidth),
    ]
    device = torch.cuda.get_device_properties(0)
    write_results(
        "kernels",
        {
            "environment": {**environment("torch", "triton", "numpy"), "gpu": device.name},
            "copy_bytes_per_s": bandwidth,
            "evaluations": results,
        },
    )
    console = Console(width=110)
    for r in results:
        table = Table(
            title=f"{r['features']} features, {r['layers']} layers, {r['atoms']} atoms, {r['edges'] / r['atoms']:.1f} edges an atom: "
            f"{r['evaluation_us']:.0f} us, {r['atom_steps_per_s'] / 1e6:.2f} M atom-steps/s"
        )
        for column in ("kernel", "us", "ns/atom", "floor us", "of floor"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for k in r["kernels"]:
            table.add_row(
                k["kernel"],
                f"{k['us']:.2f}",
                f"{1e3 * k['us'] / r['atoms']:.2f}",
                f"{k['floor_us']:.2f}",
                f"{k['us'] / max(k['floor_us'], 1e-9):.1f}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
