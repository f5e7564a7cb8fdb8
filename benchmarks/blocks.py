"""Block sizes of the kernels for few atoms: device time of an evaluation with the schedule changed in one place, then in all that helped.

    python benchmarks/blocks.py        # writes benchmarks/results/blocks.json and prints a table; needs a GPU and its compiler's patience

Droplets of water, default model with random weights; search, energy, forces and virial, with import and export of arrays on the GPU.
Times are medians of replays of a CUDA graph of evaluations that follow each other. A change that helps goes into mlff.plan.SMALL by hand.
"""

import argparse
import dataclasses

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common import architectures, environment, microseconds, write_results
from mlff import plan
from mlff.bench import structure
from mlff.core import DeviceArrays, Model, System
from mlff.export import build_payload
from mlff.painn import PaiNN, PaiNNConfig
from mlff.plan import Blocks

ATOMS = (10, 21, 50, 100)
REPEATS = 20
BACK = plan.SMALL.merged_backward
CHANGES = {  # what belongs together is changed together
    "layers": [{"merged": None}],
    "products": [{"products": Blocks(16, 32, 8)}, {"products": Blocks(16, 64, 4)}],
    "forward": [{"merged": Blocks(16, 32, 4)}],
    "backward": [{"merged_backward": dataclasses.replace(BACK, warps=8)}, {"merged_backward": dataclasses.replace(BACK, columns=32)}],
    "units": [{"units": 16}],
    "edges": [{"edges": 128, "edge_warps": 4}],
}


def payload(model: PaiNN, change: dict, device: str) -> bytes:
    """The model with a changed schedule for few atoms."""
    kept = plan.SMALL
    try:
        plan.SMALL = dataclasses.replace(kept, **change)
        return build_payload(model, {}, architectures(device))
    finally:
        plan.SMALL = kept


def evaluation(data: bytes, atoms) -> float:
    """Microseconds of one among REPEATS in a graph."""
    system = System(Model(data), "cuda:0")
    system.set_atoms(atoms.numbers)
    positions, forces = torch.from_numpy(atoms.positions).cuda(), torch.zeros(len(atoms), 3, dtype=torch.float64, device="cuda")
    energy = torch.zeros(1, dtype=torch.float64, device="cuda")
    arrays = DeviceArrays(
        is_double=1, n_rows=len(atoms), positions=positions.data_ptr(), length_unit=1.0, energy_unit=1.0, energy=energy.data_ptr(),
        forces=forces.data_ptr(),
    )  # fmt: skip

    def compute() -> None:
        arrays.stream = torch.cuda.current_stream().cuda_stream
        system.compute_device(arrays)

    compute()  # makes room, which must not happen while a graph is captured
    torch.cuda.synchronize()
    us = microseconds(compute, REPEATS)
    assert torch.isfinite(forces).all()
    return us


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = PaiNN(PaiNNConfig(species=["H", "O"], features=args.features, layers=args.layers)).requires_grad_(False)
    droplets = [structure(n, (1, 8)) for n in ATOMS]

    def times(change: dict) -> list[float]:
        data = payload(model, change, "cuda")
        return [evaluation(data, atoms) for atoms in droplets]

    now = times({})
    rows, best = [("now", {}, now)], {}
    for group, change in track([(group, change) for group, changes in CHANGES.items() for change in changes], "schedules"):
        rows.append((group, change, times(change)))
        gain = float(np.mean(np.divide(rows[-1][2], now)))
        if gain < best.get(group, (0.99, None))[0]:
            best[group] = gain, change
    rows.append(("now, again", {}, times({})))
    if len(best) > 1:
        together = {key: value for _, change in best.values() for key, value in change.items()}
        rows.append(("all that helped", together, times(together)))

    entries = [{"name": name, "change": {k: str(v) for k, v in change.items()}, "us": dict(zip(map(str, ATOMS), us))} for name, change, us in rows]
    results = {"environment": environment("torch", "triton", device="cuda"), "features": args.features, "layers": args.layers, "schedules": entries}
    path = write_results("blocks", results)
    table = Table(title=f"{args.features} features, {args.layers} layers: us of an evaluation on the device")
    for column in ("changed", *map(str, ATOMS)):
        table.add_column(column, justify="left" if column == "changed" else "right")
    for name, change, us in rows:
        table.add_row(f"{name} {', '.join(f'{k}={v}' for k, v in change.items())}", *(f"{t:.1f}" for t in us))
    Console(width=150).print(table, f"written to {path}")


if __name__ == "__main__":
    main()
