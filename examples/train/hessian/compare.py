"""Do Hessian-vector products of the teacher, beside energies and forces, make a better student?

    python compare.py results.json             an hour of one core; goes on where it stopped
    python compare.py quick.json --quick       seconds: shows that everything runs

Small molecules, displaced as at 300 to 600 K; the teacher is AIMNet2, the student a PaiNN of 64 features and 2 layers. A frame with
a product costs the teacher PRODUCT_COST times as much as one without, so at equal cost of the teacher products compete with as
many frames more. VARIANTS says who is compared. Beside NAME.json are written NAME.png, a picture, and NAME.labels.pt, all labels.

Needs mlff[train] with the teacher AIMNet2, and SciPy.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers
from ase.optimize import BFGS
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parent.parent / "organics"))
from geometry import HELD_OUT, TRAINING, bonds, side, thermal  # noqa: E402

from mlff.files import replacing  # noqa: E402
from mlff.painn import PaiNN, PaiNNConfig  # noqa: E402
from mlff.train.config import FitConfig  # noqa: E402
from mlff.train.data import Graphs, batches, collate, element_shifts, make_graphs  # noqa: E402
from mlff.train.fit import learning_rate_factor, loss_terms, predict  # noqa: E402
from mlff.train.frames import load  # noqa: E402
from mlff.train.teachers import aimnet2_model, load_teacher  # noqa: E402
from mlff.validate.measurement import TeacherCalculator  # noqa: E402
from mlff.validate.organics import wavenumbers  # noqa: E402

SPECIES = ["H", "C", "N", "O"]
# Processor time relative to energy and forces alone: of the teacher for a frame, of a step of training. Fixed, so that a repetition
# compares the same; what was measured is in the results.
PRODUCT_COST, STEP_COST = 2.4, 2.6


@dataclass(frozen=True)
class Variant:
    """How a student is trained: on `frames` times N frames for `steps` times the settings' steps, products weighted by `weight` (Angstrom)."""

    frames: float = 1.0
    steps: float = 1.0
    weight: float = 0.0


VARIANTS = {
    "E, F": Variant(),
    "E, F, Hv 0.01": Variant(weight=0.01),
    "E, F, Hv 0.05": Variant(weight=0.05),
    "E, F, more frames": Variant(frames=PRODUCT_COST),  # equal cost of the teacher
    "E, F, more frames, more steps": Variant(frames=PRODUCT_COST, steps=STEP_COST),  # and equal time of training
}


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on, besides VARIANTS and the seeds of students."""

    molecules: int = 100  # to train on
    largest: int = 14  # atoms of a molecule
    temperatures: tuple[float, float] = (300.0, 600.0)  # K
    sizes: tuple[int, ...] = (200, 800)  # frames N
    tested: int = 200  # frames of each kind to test with
    vibrating: int = 18  # held-out molecules whose frequencies are compared
    features: int = 64
    layers: int = 2
    steps: int = 2000
    batch: int = 8  # structures
    warmup: int = 100
    ema_decay: float = 0.99
    seed: int = 1  # of molecules, frames and directions


QUICK = Settings(molecules=3, largest=9, sizes=(4,), tested=4, vibrating=1, features=16, layers=1, steps=3, batch=2, warmup=1)


@dataclass
class Sample:
    """A labelled frame; direction v [n, 3] and product H v [n, 3] in eV/Angstrom^2, H the second derivative of the energy."""

    atoms: Atoms
    graph: Graphs
    direction: Tensor
    product: Tensor


def teacher_product(members: list, numbers: Tensor, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energy [B] in eV, forces [B, n, 3] in eV/Angstrom and H v [B, n, 3] in eV/Angstrom^2 of the mean of AIMNet2's members.

    numbers [B, n], 0 where a molecule is shorter; positions in Angstrom and directions v [B, n, 3]. H v is the gradient of v . grad E:
    two passes backwards through the energy model, which lies within the one that the wheel returns forces from.
    """
    x = positions.detach().requires_grad_(True)
    charge = torch.zeros(len(x), dtype=x.dtype)
    with torch.jit.optimized_execution(False):  # as in mlff.train.teachers
        outputs = [member.module({"coord": x, "numbers": numbers, "charge": charge}) for member in members]
        energy = torch.stack([out["energy"] for out in outputs]).mean(0)
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        (product,) = torch.autograd.grad((gradient * directions).sum(), x)
    return energy.detach(), -gradient.detach(), product


def members() -> list:
    """AIMNet2's four members."""
    models = aimnet2_model().models
    return [getattr(models, str(k)) for k in range(4)]


def student_product(model: PaiNN, batch: Graphs, directions: Tensor, create_graph: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy, forces and virial as `predict`, and H v [N, 3] in eV/Angstrom^2 for directions v [N, 3].

    Forces are an analytic gradient already, so H v = -grad (F . v) is one pass backwards, through edge vectors r = x_j - x_i.
    """
    vectors = batch.edge_vectors.detach().requires_grad_(True)
    energy, forces, virial = predict(model, replace(batch, edge_vectors=vectors))
    (slope,) = torch.autograd.grad(-(forces * directions).sum(), vectors, create_graph=create_graph)
    product = torch.zeros_like(forces).index_add(0, batch.edges[1], slope).index_add(0, batch.edges[0], -slope)
    return energy, forces, virial, product


# ---- data --------------------------------------------------------------------------------------------------------------


def chosen(settings: Settings, wanted: int, most: int, rng: np.random.Generator) -> list[list[Atoms]]:
    """Conformers of at most `most` molecules of one side of the split by scaffold, in random order."""
    by_molecule: dict[str, list[Atoms]] = {}
    for atoms in load(Path(__file__).parent.parent / "organics" / "molecules.npz"):
        small = 3 <= len(atoms) <= settings.largest and set(atoms.symbols) <= set(SPECIES)
        if small and side(atoms.info["scaffold"]) == wanted:
            by_molecule.setdefault(atoms.info["molecule"], []).append(atoms)
    names = sorted(by_molecule)
    return [by_molecule[names[k]] for k in rng.permutation(len(names))[:most]]


def displaced(molecules: list[list[Atoms]], count: int, settings: Settings, rng: np.random.Generator) -> list[Atoms]:
    """Frames of molecules drawn by chance, displaced as at a temperature drawn by chance."""
    frames = []
    for _ in range(count):
        conformers = molecules[rng.integers(len(molecules))]
        atoms = conformers[rng.integers(len(conformers))]
        frames.append(thermal(atoms, bonds(atoms), rng.uniform(*settings.temperatures), rng))
    return frames


def label(frames: list[Atoms], products: int, rng: np.random.Generator) -> tuple[list[Sample], dict]:
    """Labelled frames, the first `products` of them with H v for one direction each, and the teacher's processor time in s a frame.

    Components of v are normally distributed with unit variance.
    """
    teacher, ensemble, seconds = load_teacher("aimnet2"), members(), {"with": 0.0, "without": 0.0}
    directions = [torch.tensor(rng.normal(size=(len(atoms), 3))) for atoms in frames]
    labelled: list[dict] = [{} for _ in frames]
    order = sorted(range(len(frames)), key=lambda k: len(frames[k]))  # of about one size: little padding
    for first in range(0, len(order), 16):
        part = order[first : first + 16]
        began = time.process_time()
        for k, results in zip(part, teacher.evaluate([frames[k] for k in part])):
            labelled[k] = results
        seconds["without"] += (time.process_time() - began) / len(frames)
    order = [k for k in order if k < products]
    for first in range(0, len(order), 16):
        part = order[first : first + 16]
        began = time.process_time()
        widest = max(len(frames[k]) for k in part)
        numbers = torch.zeros(len(part), widest, dtype=torch.long)
        x, v = torch.zeros(len(part), widest, 3), torch.zeros(len(part), widest, 3)
        for row, k in enumerate(part):
            n = len(frames[k])
            numbers[row, :n] = torch.tensor(frames[k].numbers)
            x[row, :n], v[row, :n] = torch.tensor(frames[k].positions), directions[k]
        _, _, product = teacher_product(ensemble, numbers, x, v)
        for row, k in enumerate(part):
            labelled[k]["product"] = product[row, : len(frames[k])].double()
        seconds["with"] += (time.process_time() - began) / max(1, len(order))
    for atoms, results in zip(frames, labelled):
        atoms.calc = SinglePointCalculator(atoms, energy=results["energy"], forces=results["forces"])
    graphs = make_graphs(frames, PaiNNConfig().cutoff)
    samples = [
        Sample(atoms, graph, v, results.get("product", torch.full_like(v, torch.nan)))
        for atoms, graph, v, results in zip(frames, graphs, directions, labelled)
    ]
    return samples, seconds


def relaxed(molecules: list[list[Atoms]], settings: Settings) -> list[tuple[Atoms, np.ndarray]]:
    """The first conformer of each molecule, relaxed by the teacher, and the teacher's Hessian there [3n, 3n] in eV/Angstrom^2."""
    calculator, ensemble, result = TeacherCalculator(load_teacher("aimnet2")), members(), []
    for conformers in molecules[: settings.vibrating]:
        atoms = conformers[0].copy()
        atoms.calc = calculator
        BFGS(atoms, logfile=None).run(fmax=0.005, steps=300)
        n = len(atoms)
        numbers, x = torch.tensor(atoms.numbers).repeat(3 * n, 1), torch.tensor(atoms.positions).float().repeat(3 * n, 1, 1)
        _, _, rows = teacher_product(ensemble, numbers, x, torch.eye(3 * n).reshape(3 * n, n, 3))
        atoms.calc = None
        result.append((atoms, rows.reshape(3 * n, 3 * n).double().numpy()))
    return result


def make_data(settings: Settings) -> dict:
    """Labelled frames to train on (`training`, a smaller set is the beginning of a larger) and to test with (`held_out`: molecules of
    held-out scaffolds, `known`: other frames of the molecules that are trained on), and relaxed molecules."""
    rng = np.random.default_rng(settings.seed)
    known = chosen(settings, TRAINING, settings.molecules, rng)
    unknown = chosen(settings, HELD_OUT, settings.molecules, rng)
    largest = max(settings.sizes)
    training, seconds = label(displaced(known, round(PRODUCT_COST * largest), settings, rng), largest, rng)
    data = {"training": training, "teacher_seconds": seconds, "held_out_molecules": len(unknown)}
    for name, molecules in (("held_out", unknown), ("known", known)):
        data[name], _ = label(displaced(molecules, settings.tested, settings, rng), settings.tested, rng)
    data["relaxed"] = relaxed(unknown, settings)
    return data


# ---- students ----------------------------------------------------------------------------------------------------------


def train(samples: list[Sample], steps: int, weight: float, settings: Settings, seed: int) -> tuple[PaiNN, float]:
    """A student, and the processor time of a step in ms. Loss, optimiser and schedule are those of mlff.train.fit, besides the term

        weight * mean_i |d(H v)_i|_2        weight in Angstrom

    over atoms, and over structures as the forces' term."""
    torch.manual_seed(seed)
    config = FitConfig(steps=steps, warmup=settings.warmup, ema_decay=settings.ema_decay)
    model = PaiNN(PaiNNConfig(species=SPECIES, features=settings.features, layers=settings.layers))
    model.shift.copy_(element_shifts([sample.atoms for sample in samples], model.config.atomic_numbers))
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, amsgrad=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    average = get_ema_multi_avg_fn(config.ema_decay)
    graphs, generator, order = [sample.graph for sample in samples], torch.Generator().manual_seed(seed), []
    began = time.process_time()
    for _ in range(steps):
        order = order or batches(graphs, sys.maxsize, generator, max_structures=settings.batch)
        members = order.pop()
        batch = collate([graphs[k] for k in members])
        optimizer.zero_grad()
        if weight > 0:
            *prediction, product = student_product(model, batch, torch.cat([samples[k].direction for k in members]), create_graph=True)
            target = replace(batch, forces=torch.cat([samples[k].product for k in members]))
            curvature = loss_terms((prediction[0], product, prediction[2]), target)[1]  # structures are weighted as for forces
        else:
            prediction, curvature = predict(model, batch), 0.0
        energy, force, _ = loss_terms(tuple(prediction), batch)
        (config.energy_weight * energy + config.force_weight * force + weight * curvature).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        average(list(averaged.parameters()), [p.detach() for p in model.parameters()], None)
    return averaged, 1000.0 * (time.process_time() - began) / steps


def errors(model: PaiNN, samples: list[Sample], settings: Settings) -> dict[str, float]:
    """Mean absolute errors: energy in meV/atom, a component of a force in meV/Angstrom, of a product H v in eV/Angstrom^2."""
    deltas: tuple[list[Tensor], ...] = ([], [], [])
    for first in range(0, len(samples), settings.batch):
        part = samples[first : first + settings.batch]
        batch = collate([sample.graph for sample in part])
        energy, forces, _, product = student_product(model, batch, torch.cat([s.direction for s in part]), create_graph=False)
        deltas[0].append((energy - batch.energy).detach() / batch.n_atoms)
        deltas[1].append((forces - batch.forces).detach())
        deltas[2].append(product - torch.cat([s.product for s in part]))
    e, f, p = (float(torch.cat(delta).abs().mean()) for delta in deltas)
    return {"energy_meV_atom": 1000.0 * e, "force_meV_A": 1000.0 * f, "product_eV_A2": p}


def hessian(model: PaiNN, atoms: Atoms) -> np.ndarray:
    """[3n, 3n] in eV/Angstrom^2, all rows in one batch."""
    n = len(atoms)
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((n, 3)))  # a graph has labels
    batch = collate(make_graphs([atoms], model.config.cutoff) * (3 * n))
    return student_product(model, batch, torch.eye(3 * n).reshape(-1, 3).double(), False)[3].reshape(3 * n, 3 * n).numpy()


def frequency_error(model: PaiNN, molecules: list[tuple[Atoms, np.ndarray]]) -> float:
    """Mean absolute error of harmonic frequencies in cm^-1, modes in ascending order, at the teacher's minima."""
    deltas = [wavenumbers(atoms, hessian(model, atoms)) - wavenumbers(atoms, theirs) for atoms, theirs in molecules]
    return float(np.abs(np.concatenate(deltas)).mean())


# ---- results -----------------------------------------------------------------------------------------------------------

SHOWN = (  # title of a panel, where the number is
    ("force, meV/Å", lambda run: run["held_out"]["force_meV_A"]),
    ("energy, meV/atom", lambda run: run["held_out"]["energy_meV_atom"]),
    ("H v, eV/Å²", lambda run: run["held_out"]["product_eV_A2"]),
    ("frequencies, cm⁻¹", lambda run: run["frequency_cm1"]),
)


def plot(runs: list[dict], path: Path) -> None:
    """Errors on held-out molecules against N: a point for each seed, lines through the means."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, (title, number) in zip(figure.subplots(1, len(SHOWN)), SHOWN):
        for k, name in enumerate(VARIANTS):
            mine = [run for run in runs if run["variant"] == name]
            sizes = sorted({run["size"] for run in mine})
            axes.plot([run["size"] for run in mine], [number(run) for run in mine], ".", color=f"C{k}")
            means = [np.mean([number(run) for run in mine if run["size"] == size]) for size in sizes]
            axes.plot(sizes, means, "-", color=f"C{k}", label=name)
        axes.set(title=title, xlabel="frames N", xscale="log")
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({run["size"] for run in runs}), sorted({run["size"] for run in runs}), minor=False)
        axes.minorticks_off()
    figure.axes[0].legend(fontsize=7)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)


def table(runs: list[dict]) -> str:
    """Mean over seeds, and in brackets half the distance of the extremes."""
    lines = ["| N | trained on | steps | ms a step | force | energy | H v | frequencies | force, known molecules |", "|---" * 9 + "|"]
    for size in sorted({run["size"] for run in runs}):
        for name in VARIANTS:
            mine = [run for run in runs if (run["variant"], run["size"]) == (name, size)]
            if mine:
                numbers = [np.array([number(run) for run in mine]) for _, number in SHOWN]
                numbers.append(np.array([run["known"]["force_meV_A"] for run in mine]))
                cells = " | ".join(f"{x.mean():.3g} ({np.ptp(x) / 2:.2g})" for x in numbers)
                ms = np.mean([run["ms_per_step"] for run in mine])
                lines.append(f"| {size} | {name} | {mine[0]['steps']} | {ms:.0f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file to write and to go on from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of students")
    parser.add_argument("--quick", action="store_true", help="shows that everything runs")
    args = parser.parse_args()
    settings = QUICK if args.quick else Settings()
    torch.set_num_threads(1)
    kept = args.results.with_suffix(".labels.pt")
    data = torch.load(kept, weights_only=False) if kept.exists() else {}
    if data.get("settings") != settings:
        data = {"settings": settings, **make_data(settings)}
        torch.save(data, kept)
    head = {
        "settings": asdict(settings),
        "variants": {name: asdict(variant) for name, variant in VARIANTS.items()},
        "held_out_molecules": data["held_out_molecules"],
        "teacher_seconds_per_frame": data["teacher_seconds"],
        "software": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    head = json.loads(json.dumps(head))
    content = json.loads(args.results.read_text()) if args.results.exists() else {**head, "runs": []}
    if any(content[key] != head[key] for key in head):
        raise SystemExit(f"{args.results} holds results of other settings, variants or software: remove it to start afresh")
    done = {(run["variant"], run["size"], run["seed"]) for run in content["runs"]}
    for seed in args.seeds:
        for size in settings.sizes:
            for name, variant in VARIANTS.items():
                if (name, size, seed) in done:
                    continue
                samples = data["training"][: round(variant.frames * size)]
                steps = round(variant.steps * settings.steps)
                model, ms = train(samples, steps, variant.weight, settings, seed)
                run = {"variant": name, "size": size, "seed": seed, "frames": len(samples), "steps": steps, "ms_per_step": ms}
                run |= {kind: errors(model, data[kind], settings) for kind in ("held_out", "known")}
                run["frequency_cm1"] = frequency_error(model, data["relaxed"])
                run["date"] = time.strftime("%Y-%m-%d")
                content["runs"].append(run)
                with replacing(args.results) as unfinished:
                    unfinished.write_text(json.dumps(content, indent=1) + "\n")
                print(time.strftime("%H:%M"), run, flush=True)
    plot(content["runs"], args.results.with_suffix(".png"))
    print(table(content["runs"]))


if __name__ == "__main__":
    main()
