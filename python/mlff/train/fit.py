"""Distillation: fit a PaiNN to a teacher's energies, forces and stresses.

The loss is a weighted sum of absolute errors, in which a few violent frames cannot drown the rest:

    w_E |dE| / N  +  w_F mean_i |dF_i|_2  +  w_S mean_ab |V dS_ab| / N

with energies per atom and the stress as virial per atom, all in eV. A structure of n atoms counts sqrt(n): between one
vote per atom, which would leave molecules in the gas phase out of account, and one vote per structure.

Forces are the analytic gradients of the reference (mlff.painn.energy_and_gradient), so training differentiates once,
through plain tensor operations that torch.compile can fuse. The weights that are kept are an exponential moving average,
taken at the end of a fixed schedule, or where the loss on validation data was smallest. Held-out data select nothing.

On the CPU, equal seeds give equal weights; on a GPU sums over edges are atomic and agree to rounding.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..files import replacing
from ..painn import PaiNN, energy_and_gradient
from .config import FitConfig
from .data import Graphs, Pool, batches, collate


def predict(model: PaiNN, batch: Graphs) -> tuple[Tensor, Tensor, Tensor]:
    """Energy [B] in eV, forces [N, 3] in eV/A and virial [B, 3, 3] in eV (= -V * stress)."""
    energies, gradient = energy_and_gradient(model, batch.atomic_numbers, batch.edges, batch.edge_vectors)
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
    n = n.clamp(min=1.0)  # what fills up a batch has no share
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
        energy, forces, virial = predict(model, batch)
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


@torch.no_grad()
def mean_terms(model: PaiNN, graphs: list[Graphs], max_edges: int, device: str) -> list[float]:
    """loss_terms over many structures, as if they were one batch."""
    total, votes = torch.zeros(3, dtype=torch.float64), 0.0
    for members in batches(graphs, max_edges):
        batch = collate([graphs[k] for k in members]).to(device)
        weight = float(batch.n_atoms.double().sqrt().sum())
        total += weight * torch.stack(loss_terms(predict(model, batch), batch)).cpu()
        votes += weight
    return (total / votes).tolist()


@dataclass
class Point:
    """A point of the training curves. Parts of the loss in eV: energy per atom, force, virial per atom."""

    step: int
    learning_rate: float
    training: list[float]  # mean since the last point, of the weights as they moved
    validation: list[float]  # of the averaged weights; empty without validation data
    loss: float  # weighted sum of the parts, of the validation data if there are any
    seconds: float = field(compare=False)  # since the start, without interruptions


def fit(
    model: PaiNN,
    train: list[Graphs],
    config: FitConfig,
    device: str,
    validation: Sequence[Graphs] = (),
    state_path: Path | None = None,
    job: dict | None = None,
    report: Callable[[PaiNN, list[Point]], None] | None = None,
) -> tuple[PaiNN, list[Point]]:
    """Train `model` in place and return the averaged weights as a model, and the training curves.

    With `validation` structures these are the weights of the report at which the loss on those was smallest, and training
    ends after `config.patience` reports without a smaller one. `report(averaged_model, curves)` is called every
    `config.report_every` steps and after the last.

    With `state_path` the whole state is written there before every report, and an interrupted run goes on from it to the same
    result. `job` says what is trained on what, JSON values: a state of another job or another `config` raises ValueError.
    """
    job = {**(job or {}), "fit": config.model_dump()}
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    cuda = torch.device(device).type == "cuda"
    model = model.to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    # a rate on the device can change between the launches of a CUDA graph
    rate = torch.tensor(config.learning_rate, device=device) if cuda else config.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=config.weight_decay, amsgrad=True, fused=cuda, capturable=cuda)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    weights = torch.tensor([config.energy_weight, config.force_weight, config.stress_weight], device=device)

    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    step, epoch, position = 0, 0, 0
    curves: list[Point] = []
    best: dict[str, Tensor] = {}  # averaged weights with the smallest loss on the validation data
    if state_path and state_path.exists():
        state = read_state(state_path, job, device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, epoch, position, best = state["step"], state["epoch"], state["position"], state["best"]
        curves = [Point(**point) for point in state["curves"]]

    pool = Pool(train, config.max_edges, model.config.cutoff, device)
    running = torch.zeros(4, device=device, dtype=torch.float64)  # sums of the parts of the loss, and how many
    terms_of = torch.compile(training_terms, dynamic=False) if config.compile else training_terms
    average = get_ema_multi_avg_fn(config.ema_decay)

    def take_step(batch: Graphs) -> None:
        optimizer.zero_grad(set_to_none=True)
        terms = terms_of(model, batch)
        (weights * terms).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        average(list(averaged.parameters()), [p.detach() for p in model.parameters()], None)
        running.add_(torch.cat([terms.detach(), terms.new_ones(1)]))

    take_step = graphed(take_step) if cuda and config.compile else take_step

    def epoch_batches(epoch: int) -> list[list[int]]:
        # the order depends on seed and epoch alone, so a resumed run sees the batches that it would have seen
        return pool.batches(torch.Generator().manual_seed(1_000_003 * config.seed + epoch))

    def age_of_best() -> int:
        return len(curves) - 1 - min(range(len(curves)), key=lambda k: curves[k].loss) if curves else 0

    started = time.time() - (curves[-1].seconds if curves else 0.0)
    order = epoch_batches(epoch)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("fit", total=config.steps, completed=step)
        while step < config.steps and not 0 < config.patience <= age_of_best():
            if position == len(order):
                epoch, position = epoch + 1, 0
                order = epoch_batches(epoch)
            take_step(pool.batch(order[position]))
            schedule.step()
            step, position = step + 1, position + 1
            progress.advance(task)
            if step % config.report_every == 0 or step == config.steps:
                mean = (running[:3] / running[3]).tolist()
                running.zero_()
                checked = mean_terms(averaged, validation, config.max_edges, device) if validation else []
                if not np.all(np.isfinite([*mean, *checked])):
                    raise FloatingPointError(f"the loss is not finite at step {step}: {mean}, {checked}; lower fit.learning_rate")
                loss = float(np.dot(weights.tolist(), checked or mean))
                used = config.learning_rate * learning_rate_factor(step - 1, config)
                curves.append(Point(step, used, mean, checked, loss, time.time() - started))
                if validation and age_of_best() == 0:
                    best = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
                if state_path:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    counters = {"step": step, "epoch": epoch, "position": position}
                    with replacing(state_path) as path:
                        torch.save({**state, **counters, "best": best, "curves": [asdict(p) for p in curves], "job": job}, path)
                if report:
                    report(averaged, curves)
    if best:
        averaged.load_state_dict(best)
    return averaged, curves


def training_terms(model: PaiNN, batch: Graphs) -> Tensor:
    """loss_terms [3] of one batch: what is differentiated, and compiled."""
    return torch.stack(loss_terms(predict(model, batch), batch))


def graphed(take_step: Callable[[Graphs], None]) -> Callable[[Graphs], None]:
    """The same step as one launch of a CUDA graph, without which the host takes longer to launch it than a GPU to do it.

    The first steps are taken without: they compile and allocate, which must not happen while a graph is captured.
    """
    taken, graph, stream = 0, torch.cuda.CUDAGraph(), torch.cuda.Stream()
    static: Graphs | None = None

    def replay(batch: Graphs) -> None:
        nonlocal taken, static
        taken += 1
        if taken <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                take_step(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if static is None:
            static = batch
            with torch.cuda.graph(graph):
                take_step(static)
        for f in fields(Graphs):
            getattr(static, f.name).copy_(getattr(batch, f.name))
        graph.replay()

    return replay


def read_state(path: Path, job: dict, device: str) -> dict:
    """The state of an interrupted run. Raises ValueError for one of another job, or a file that is none."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        theirs = _flat(state["job"])
    except Exception as e:
        raise ValueError(f"{path} is not the state of a training run: {e}; remove it to start afresh") from e
    ours = _flat(job)
    different = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if different:
        text = "; ".join(f"{key} was {theirs.get(key)}, is {ours.get(key)}" for key in different)
        raise ValueError(f"{path} is the state of another run: {text}. Set that back, or remove the file to start afresh")
    return state


def _flat(tree: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with keys as in fit.steps."""
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
