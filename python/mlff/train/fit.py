"""Distillation: fit a PaiNN to a teacher's energies, forces and stresses.

    python -m mlff.train.fit labelled.extxyz --output student.safetensors --steps 20000 --device cuda

The loss is a weighted sum of absolute errors, in which a few violent frames cannot drown the rest:

    w_E |dE| / N  +  w_F mean_i |dF_i|_2  +  w_S mean_ab |V dS_ab| / N

with energies per atom and the stress as virial per atom, all in eV. A structure of n atoms counts sqrt(n): between one
vote per atom, which would leave molecules in the gas phase out of account, and one vote per structure.

Forces are the analytic gradients of the reference (mlff.painn.energy_and_gradient), so training differentiates once,
through plain tensor operations that torch.compile can fuse. The weights that are kept are an exponential moving average,
taken at the end of a fixed schedule: nothing is selected by the held-out errors.

On the CPU, equal seeds give equal weights; on a GPU sums over edges are atomic and agree to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..painn import PaiNN, PaiNNConfig, energy_and_gradient, load_checkpoint, save_checkpoint
from .data import Graphs, batches, collate, element_shifts, graph, read_frames, sha256, split


@dataclass
class FitConfig:
    steps: int = 20000
    max_edges: int = 40000  # per batch
    learning_rate: float = 1e-3
    warmup: int = 500  # steps
    final_fraction: float = 0.01  # of the learning rate, at the end of the cosine
    weight_decay: float = 1e-6
    clip: float = 10.0  # norm of the gradient
    ema_decay: float = 0.999
    energy_weight: float = 5.0
    force_weight: float = 1.0
    stress_weight: float = 1.0
    held_out: float = 0.1  # share of the trajectories
    seed: int = 1
    tf32: bool = False
    compile: bool = False


def predict(evaluate, model: PaiNN, batch: Graphs) -> tuple[Tensor, Tensor, Tensor]:
    """Energy [B] in eV, forces [N, 3] in eV/A and virial [B, 3, 3] in eV (= -V * stress)."""
    energies, gradient = evaluate(model, batch.atomic_numbers, batch.edges, batch.edge_vectors)
    energy = torch.zeros_like(batch.energy).index_add(0, batch.structure, energies)
    forces = torch.zeros_like(batch.forces)
    forces = forces.index_add(0, batch.edges[0], gradient).index_add(0, batch.edges[1], -gradient)
    outer = -batch.edge_vectors[:, :, None] * gradient[:, None, :]
    virial = torch.zeros_like(batch.stress).index_add(0, batch.edge_structure, outer)
    return energy, forces, 0.5 * (virial + virial.transpose(1, 2))


def loss_terms(prediction: tuple[Tensor, Tensor, Tensor], batch: Graphs) -> tuple[Tensor, Tensor, Tensor]:
    """Energy, force and stress parts of the loss, each a weighted mean over the batch (see the top of the file)."""
    energy, forces, virial = prediction
    n = batch.n_atoms.to(energy.dtype)
    share = n.sqrt() / n.sqrt().sum()
    energy_error = (energy - batch.energy).abs() / n
    # the norm has no derivative at zero, which a converged atom could reach
    force_error = (forces - batch.forces).square().sum(1).add(1e-10).sqrt()
    force_error = torch.zeros_like(n).index_add(0, batch.structure, force_error) / n
    virial_error = (virial + batch.volume[:, None, None] * batch.stress).abs().mean((1, 2)) / n
    virial_error = torch.where(batch.has_stress, virial_error, torch.zeros_like(virial_error))
    return (share * energy_error).sum(), (share * force_error).sum(), (share * virial_error).sum()


@torch.no_grad()
def errors(model: PaiNN, graphs: list[Graphs], kinds: list[str], max_edges: int, device: str) -> dict[str, dict]:
    """Errors of `model` over structures: all of them, and by kind.

    Units: energies meV/atom, forces meV/A (per component), stress meV/A^3 (per component, periodic structures).
    """
    rows: dict[str, list[tuple]] = {}
    for members in batches(graphs, max_edges):
        batch = collate([graphs[k] for k in members]).to(device)
        energy, forces, virial = predict(energy_and_gradient, model, batch)
        d_energy = ((energy - batch.energy) / batch.n_atoms).cpu().numpy()
        d_forces = (forces - batch.forces).cpu()
        d_stress = (-virial / batch.volume[:, None, None] - batch.stress).cpu().numpy()
        per_structure = torch.split(d_forces, batch.n_atoms.tolist())
        for b, k in enumerate(batch.index.tolist()):
            stress = d_stress[b].ravel() if batch.has_stress[b] else np.zeros(0)
            row = (d_energy[b : b + 1], per_structure[b].numpy().ravel(), stress)
            for name in ("all", kinds[k]):
                rows.setdefault(name, []).append(row)
    result = {}
    for name in sorted(rows):
        entry: dict[str, float] = {"structures": len(rows[name])}
        for label, values in zip(("energy_per_atom_meV", "force_meV_A", "stress_meV_A3"), zip(*rows[name])):
            delta = 1000.0 * np.concatenate(values)
            if len(delta):
                entry[f"{label}_mae"] = round(float(np.abs(delta).mean()), 4)
                entry[f"{label}_rmse"] = round(float(np.sqrt((delta**2).mean())), 4)
        result[name] = entry
    return result


def learning_rate_factor(step: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine down to `final_fraction`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.final_fraction + (1.0 - config.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def fit(
    model: PaiNN,
    train: list[Graphs],
    config: FitConfig,
    device: str,
    state_path: Path | None = None,
    report=None,
    report_every: int = 1000,
) -> PaiNN:
    """Train `model` in place and return the averaged weights as a model.

    With `state_path`, the whole state is written there at every report, and an interrupted run goes on from it.
    `report(step, averaged_model, mean_loss_terms)` is called every `report_every` steps and after the last.
    """
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    model = model.to(device)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, amsgrad=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    evaluate = torch.compile(energy_and_gradient, dynamic=True) if config.compile else energy_and_gradient
    weights = torch.tensor([config.energy_weight, config.force_weight, config.stress_weight], device=device)

    step, epoch, position = 0, 0, 0
    if state_path and state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        for part, name in ((model, "model"), (averaged, "averaged"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[name])
        step, epoch, position = state["step"], state["epoch"], state["position"]

    def epoch_batches(epoch: int) -> list[list[int]]:
        # the order depends on seed and epoch alone, so a resumed run sees the batches that it would have seen
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)
        return batches(train, config.max_edges, generator)

    order = epoch_batches(epoch)
    running = torch.zeros(4, device=device, dtype=torch.float64)
    with Progress() as progress:
        task = progress.add_task("fit", total=config.steps, completed=step)
        while step < config.steps:
            if position == len(order):
                epoch, position = epoch + 1, 0
                order = epoch_batches(epoch)
            batch = collate([train[k] for k in order[position]]).to(device)
            terms = torch.stack(loss_terms(predict(evaluate, model, batch), batch))
            optimizer.zero_grad(set_to_none=True)
            (weights * terms).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            step, position = step + 1, position + 1
            running += torch.cat([terms.detach(), terms.new_ones(1)])
            progress.advance(task)
            if step % report_every == 0 or step == config.steps:
                mean = (running[:3] / running[3]).tolist()
                running.zero_()
                if not np.all(np.isfinite(mean)):
                    raise FloatingPointError(f"the loss is not finite at step {step}: {mean}; lower the learning rate")
                if state_path:
                    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
                    state = {name: part.state_dict() for name, part in parts.items()}
                    unfinished = state_path.with_suffix(".tmp")  # an interruption leaves the last state whole
                    torch.save({**state, "step": step, "epoch": epoch, "position": position}, unfinished)
                    unfinished.replace(state_path)
                if report:
                    report(step, averaged.module, mean)
    return averaged.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="labelled extxyz files")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write, .safetensors; record beside it")
    parser.add_argument("--name", help="name of the student in its record (default: the file's)")
    parser.add_argument("--start", type=Path, help="checkpoint to start from instead of random weights")
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--state", type=Path, help="where to keep the state of an interrupted run")
    parser.add_argument("--report-every", type=int, default=1000)
    for name, value in asdict(FitConfig()).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(value), default=value)
    args = parser.parse_args()
    config = FitConfig(**{name: getattr(args, name) for name in asdict(FitConfig())})

    torch.manual_seed(config.seed)
    frames = read_frames(args.data)
    train_index, test_index = split(frames, config.held_out, config.seed)
    kinds = [atoms.info["kind"] for atoms in frames]
    if args.start:
        model = load_checkpoint(args.start)
    else:
        model = PaiNN(PaiNNConfig(features=args.features, layers=args.layers))
        model.shift.copy_(element_shifts([frames[k] for k in train_index], model.config.atomic_numbers))
    graphs = [graph(atoms, model.config.cutoff, k) for k, atoms in enumerate(frames)]
    graphs = [g.to(args.device) for g in graphs]  # small enough to stay on the device
    test = [graphs[k] for k in test_index]
    print(f"{len(train_index)} structures to train on, {len(test_index)} held out, {args.device}", flush=True)

    started = time.time()

    def report(step: int, averaged: PaiNN, mean: list[float]) -> None:
        entry = errors(averaged, test, kinds, config.max_edges, args.device)["all"]
        text = "  ".join(f"{name} {value}" for name, value in entry.items())
        print(f"step {step}  {time.time() - started:.0f} s  loss {[round(x, 5) for x in mean]}  held out: {text}", flush=True)
        save_checkpoint(averaged, args.output)

    averaged = fit(model, [graphs[k] for k in train_index], config, args.device, args.state, report, args.report_every)
    torch.set_float32_matmul_precision("highest")  # errors are those of the weights as they are used
    save_checkpoint(averaged, args.output)
    held_out = errors(averaged, test, kinds, config.max_edges, args.device)
    teachers = [json.loads(p.with_suffix(".json").read_text())["teacher"] for p in args.data if p.with_suffix(".json").exists()]
    if any(t != teachers[0] for t in teachers):
        raise ValueError(f"expected one teacher for all files, got {teachers}")
    record = {
        "name": args.name or args.output.stem,
        "date": time.strftime("%Y-%m-%d"),
        "model": {"architecture": "painn", **asdict(averaged.config)},
        "teacher": teachers[0] if teachers else None,
        "data": {
            "structures": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "training": len(train_index),
            "held_out": len(test_index),
            "held_out_trajectories": sorted({str(frames[k].info["trajectory"]) for k in test_index}),
            "files": [p.name for p in args.data],
            "sha256": sha256(args.data),
        },
        "fit": {**asdict(config), "start": args.start.name if args.start else None, "seconds": round(time.time() - started)},
        "held_out_errors": held_out,
        "training_errors": errors(averaged, [graphs[k] for k in train_index], kinds, config.max_edges, args.device)["all"],
        "software": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "hardware": torch.cuda.get_device_name() if "cuda" in args.device else "CPU",
    }
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(held_out, indent=1))


if __name__ == "__main__":
    main()
