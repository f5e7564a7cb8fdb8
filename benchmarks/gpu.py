"""Speed on a GPU: mlff against eager PyTorch, a CUDA graph of it, and torch.compile, on the same weights and edges.

    python benchmarks/gpu.py            # writes benchmarks/results/gpu.json and prints a table; under four minutes on an H100

For the shipped student, and for a smaller model with random weights. Each is measured by `mlff bench` in a process of its own with
a time limit; what was measured until then counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import mlff
from common import architectures, environment, write_results
from mlff.bench import in_order, label
from mlff.export import export
from mlff.painn import PaiNN, PaiNNConfig, save_checkpoint

SMALL = PaiNNConfig(species=["H", "C", "O"], features=64, layers=2, n_radial=20, cutoff=5.0)


def random_checkpoint(path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(PaiNN(SMALL), path)
    return path


def measure(name: str, checkpoint: Path, folder: Path, args) -> dict:
    """Results of `mlff bench`, with "error" if something went wrong."""
    result, output = {}, folder / name
    start = time.perf_counter()
    try:
        model = export(checkpoint, folder / f"{name}.pt", architectures=architectures(args.device))
        result.update(export_s=time.perf_counter() - start, file_bytes=model.stat().st_size)
        command = [sys.executable, "-m", "mlff", "bench", model, "--output", output, "--device", args.device]
        command += ["--seconds", args.seconds, "--peers", checkpoint] + (["--sizes", args.sizes] if args.sizes else [])
        subprocess.run([str(x) for x in command], check=True, timeout=args.limit, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        result["error"] = f"stopped after {args.limit} s"
    except subprocess.CalledProcessError as e:
        result["error"] = " ".join(e.stderr.split())[-500:]
    except Exception as e:  # whatever it is, the other model is measured all the same
        result["error"] = " ".join(str(e).split())[:500]
    if (output / "bench.json").is_file():
        result.update(json.loads((output / "bench.json").read_text()))
    return result


def table(name: str, result: dict) -> Table:
    """A row for each size, a column for each way, microseconds a step."""
    rows = result.get("rows", [])
    columns = list(dict.fromkeys(map(label, in_order(rows))))
    cells = {(row["atoms"], label(row)): "-" if "failed" in row else f"{row['us_per_step']:.0f}" for row in rows}
    out = Table(title=f"{name}: µs per step" + (f" ({result['error']})" if "error" in result else ""))
    out.add_column("atoms", justify="right")
    for column in columns:
        out.add_column(column, justify="right")
    for atoms in sorted({row["atoms"] for row in rows}):
        out.add_row(str(atoms), *(cells.get((atoms, column), "") for column in columns))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ethanol-water", help="name of a shipped student")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--sizes", help="numbers of atoms, as in 21,100")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each measurement")
    parser.add_argument("--limit", type=float, default=100, help="seconds for each model")
    args = parser.parse_args()

    results = {"environment": environment("torch", "triton", "numpy", "mlff", device=args.device), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        random = random_checkpoint(Path(folder) / "random.safetensors")
        checkpoints = {args.model: mlff.pretrained(args.model), "random-64x2": random}
        for name, checkpoint in checkpoints.items():
            results["models"][name] = measure(name, checkpoint, Path(folder), args)
            path = write_results("gpu", results)
    console = Console(width=160)
    for name, result in results["models"].items():
        for row in result.get("rows", []):
            if "failed" in row:
                console.print(f"{name}, {row['atoms']} atoms, {label(row)}: {row['failed']}", highlight=False)
    for name, result in results["models"].items():
        console.print(table(name, result))
    console.print(f"{results['environment'].get('gpu', results['environment']['cpu'])}; written to {path}")


if __name__ == "__main__":
    main()
