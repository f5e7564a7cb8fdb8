"""What a smaller and a larger model cost and gain: the same data, the same short schedule, three sizes.

    python sizes.py organics.yaml sizes.json --steps 10000

Writes after each size, and goes on with those that are missing; beside it NAME.png: force errors against the steps and against the time
of a step. Errors are those of dynamics at 300 to 500 K (kind md-cool) on the side that is held out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from mlff.files import replacing
from mlff.train.config import read_config
from mlff.train.data import make_graphs, read_frames, split
from mlff.train.fit import errors, fit
from mlff.train.run import end_with_data, new_model

SIZES = ((64, 2), (128, 3), (256, 3))  # features, layers
KIND = "md-cool"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--reports", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    config = read_config(args.config)
    data, settings = config.data, config.fit.model_copy(update={"steps": args.steps, "report_every": args.steps // args.reports})
    results = json.loads(args.target.read_text()) if args.target.is_file() else {}
    frames = read_frames(data.files, data.split_by)
    sides = split(frames, data.split_by, data.validation, data.held_out, settings.seed)
    forces = np.concatenate([frames[k].calc.results["forces"] for k in sides[2] if frames[k].info["kind"] == KIND])
    graphs = make_graphs(frames, config.model.cutoff)
    training, validation = ([graphs[k] for k in side] for side in sides[:2])
    judged = [graphs[k] for k in sides[2] if frames[k].info["kind"] == KIND]
    for features, layers in SIZES:
        name = f"{features} features, {layers} layers"
        if name in results:
            continue
        sized = config.model_copy(update={"model": config.model.model_copy(update={"features": features, "layers": layers})})
        torch.manual_seed(settings.seed)
        model = new_model(sized, frames, sides[0])
        end_with_data(model, training)
        began = time.time()
        fitted, curves = fit(model, training, settings, args.device, validation)
        found = errors(fitted, judged, [KIND] * len(frames), settings.max_edges, args.device)[KIND]
        # the last stretch holds no compilation
        ms = 1000 * (curves[-1].seconds - curves[-2].seconds) / (curves[-1].step - curves[-2].step)
        results[name] = {
            "parameters": sum(p.numel() for p in fitted.parameters()), "steps": args.steps, "ms_per_step": ms, "seconds": time.time() - began,
            "frames": len(training), "held_out": {**found, "force_R2": 1 - (found["force_meV_A_rmse"] / 1000) ** 2 / float((forces**2).mean())},
            "curve": [{"step": p.step, "validation_force_meV_A": 1000 * p.validation[1]} for p in curves],
            "torch": torch.__version__, "hardware": torch.cuda.get_device_name() if "cuda" in args.device else "CPU",
        }  # fmt: skip
        print(name, results[name], flush=True)
        with replacing(args.target) as unfinished:
            unfinished.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, args.target.with_suffix(".png"))


def plot(results: dict, path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, result in results.items():
        left.plot([p["step"] for p in result["curve"]], [p["validation_force_meV_A"] for p in result["curve"]], ".-", label=name)
        right.plot(result["ms_per_step"], result["held_out"]["force_meV_A_mae"], "o", label=name)
    left.set(xlabel="step", ylabel="validation, length of the force's error, meV/Å", yscale="log")
    right.set(xlabel="time of a training step, ms", ylabel=f"held out, {KIND}: force, meV/Å", xlim=(0, None), ylim=(0, None))
    left.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
