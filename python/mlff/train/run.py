"""`mlff train student.yaml`: labels, training, checkpoint and record.

Beside the configuration NAME.yaml are written

    NAME.safetensors   the student, for mlff-export; at every report, so that it can be looked at early
    NAME.json          its record: teacher, data, settings, errors on held-out structures
    NAME.png           training curves
    NAME.state.pt      the state of the run: the same command goes on from it after an interruption

On the CPU equal configurations and data give equal weights, interrupted or not.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import torch
from ase.data import chemical_symbols
from matplotlib.figure import Figure

from ..files import replacing
from ..painn import PaiNN, PaiNNConfig, load_checkpoint, read_record, save_checkpoint
from .config import Config, DataConfig, read_config
from .data import element_shifts, make_graphs, read_frames, sha256, shortest_distances, split
from .extrapolation import QUANTILE, fit_extrapolation, grades
from .fit import Point, errors, fit
from .label import label_file, summary
from .teachers import load_teacher

LOOKED_AT = 20_000  # structures to train on whose errors are told, evenly spread over all
FITTED_GRADE = 60_000  # likewise, for the extrapolation grade


def train(path: Path, device: str) -> dict:
    """The student of a configuration file; returns its record."""
    config = read_config(path)
    output = path.with_suffix(".safetensors")
    files = labelled_files(config.data, device)
    for file in files:
        if file.with_suffix(".json") == path.with_suffix(".json"):
            raise ValueError(f"{path}: the records of {file} and of the student would be one file; rename one of them")
    teachers = [teacher for teacher in (read_record(file).get("teacher") for file in files) if teacher]
    if any(teacher != teachers[0] for teacher in teachers):
        raise ValueError(f"{path}: expected one teacher for all files, got {' and '.join(map(str, teachers))}")
    data, settings = config.data, config.fit
    frames = read_frames(files, data.split_by)
    sides = split(frames, data.split_by, data.validation, data.held_out, settings.seed)
    torch.manual_seed(settings.seed)
    model = new_model(config, frames, sides[0])
    graphs = make_graphs(frames, model.config.cutoff)
    training, validation, held_out = ([graphs[k] for k in side] for side in sides)
    end_with_data(model, training, bool(config.start))
    counts = f"{len(training)} structures to train on, {len(validation)} to validate with, {len(held_out)} held out"
    print(f"{counts}; {device}", flush=True)

    def report(averaged: PaiNN, curves: list[Point]) -> None:
        point, names = curves[-1], ("energy", "force", "virial")
        for label, terms in (("training", point.training), ("validation", point.validation)):
            if terms:
                values = ", ".join(f"{name} {1000 * value:.3g}" for name, value in zip(names, terms) if value)
                print(f"step {point.step}, {label}: {values} meV", flush=True)
        save_checkpoint(averaged, output)
        plot(curves, path.with_suffix(".png"))

    job = {
        "model": asdict(model.config),
        "start": sha256([config.start]) if config.start else None,
        "data": {"sha256": sha256(files), **data.model_dump(include={"split_by", "validation", "held_out"})},
    }
    averaged, curves = fit(model, training, settings, device, validation, path.with_suffix(".state.pt"), job, report)
    torch.set_float32_matmul_precision("highest")  # errors are those of the weights as they are used
    averaged.extrapolation = fit_extrapolation(averaged, spread(training, FITTED_GRADE), validation, settings.max_edges, device)
    save_checkpoint(averaged, output)
    seen = spread(training, LOOKED_AT)
    kinds = [str(atoms.info["kind"]) for atoms in frames]
    record = {
        "name": path.stem,
        "date": time.strftime("%Y-%m-%d"),
        **({"card": config.card.model_dump()} if config.card else {}),
        "model": {"architecture": "painn", **asdict(averaged.config)},
        "repulsion_radius_A": {
            f"{a}-{b}": round(float(averaged.repulsion_radius[i, j]), 4)
            for (i, a), (j, b) in combinations_with_replacement(enumerate(averaged.config.species), 2)
        },
        "teacher": teachers[0] if teachers else None,
        "data": {
            "structures": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "training": len(training),
            "validation": len(validation),
            "held_out": len(held_out),
            "held_out_groups": sorted({str(frames[k].info[data.split_by]) for k in sides[2]}),
            "files": [p.name for p in files],
            "sha256": job["data"]["sha256"],
            "split_by": data.split_by,
        },
        "fit": {
            **settings.model_dump(),
            "start": config.start.name if config.start else None,
            "steps_done": curves[-1].step,
            "steps_kept": min(curves, key=lambda p: p.loss).step if validation else curves[-1].step,
            "seconds": round(curves[-1].seconds),
        },
        "held_out_errors": errors(averaged, held_out, kinds, settings.max_edges, device) if held_out else {},
        "training_errors": errors(averaged, seen, kinds, settings.max_edges, device),
        "extrapolation": {
            "quantile": QUANTILE,
            "calibrated_with": "validation" if validation else "training",
            **{
                f"share_above_1_{name}": round(float(np.mean(grades(averaged, side, settings.max_edges, device) > 1)), 6)
                for name, side in (("training", seen), ("validation", validation), ("held_out", held_out))
                if side
            },
        },
        "software": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "hardware": torch.cuda.get_device_name() if "cuda" in device else "CPU",
    }
    with replacing(path.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
    return record


def spread(graphs: list, most: int) -> list:
    """Every n-th of many, at most `most`."""
    return graphs[:: max(1, -(-len(graphs) // most))]


def labelled_files(data: DataConfig, device: str) -> list[Path]:
    """The labelled files: those of the configuration, or the labels of its teacher, which are made where they are missing."""
    suffix = f".{data.teacher.rpartition(':')[2].lower()}.extxyz" if data.teacher else None
    files = [file.with_name(file.stem + suffix) if suffix else file for file in data.files]
    if len(set(files)) < len(files):
        raise ValueError(f"data.files: expected distinct files of labels, got {' '.join(map(str, files))}")
    if data.teacher is None:
        return files
    teacher = load_teacher(data.teacher, device, **data.teacher_options)
    for file, target in zip(data.files, files):
        record = label_file(file, target, teacher, data.max_force)
        if not record["labelled"]:
            raise ValueError(f"{file}: nothing is left to train on, with data.max_force = {data.max_force} eV/A: {summary(record)}")
        print(f"{target}: {summary(record)}", flush=True)
    return files


def new_model(config: Config, frames: list, training: list[int]) -> PaiNN:
    """The model to train, which knows all elements of the data: from a checkpoint, or random weights."""
    elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
    if config.start:
        model, known = load_checkpoint(config.start), str(config.start)
        model.extrapolation = None  # belongs to the weights that are left
    else:
        settings = config.model.model_dump() if config.model else {}
        species = settings.pop("species", None) or [chemical_symbols[z] for z in elements]
        model, known = PaiNN(PaiNNConfig(species=species, **settings)), "model.species"
        model.shift.copy_(element_shifts([frames[k] for k in training], model.config.atomic_numbers))
    missing = [chemical_symbols[z] for z in elements if z not in model.config.atomic_numbers]
    if missing:
        raise ValueError(f"the data hold {' '.join(missing)}, but {known} has only {' '.join(model.config.species)}")
    return model


def end_with_data(model: PaiNN, training: list, started: bool = False) -> None:
    """Lets the network end, and the repulsion of nuclei begin, where the graphs to train on end; started: where those of its first training do, too."""
    if model.config.repulsion:
        shortest = shortest_distances(training, model.index_of_number, model.config.cutoff)
        model.repulsion_radius.copy_(torch.minimum(model.repulsion_radius, shortest) if started else shortest)


def plot(curves: list[Point], path: Path) -> None:
    """Training curves as PNG: the parts of the loss that the data have, and where the validation loss was smallest."""
    parts = [k for k in range(3) if any(point.training[k] > 0 for point in curves)]
    figure = Figure(figsize=(5 * len(parts), 4), layout="constrained")
    steps = [point.step for point in curves]
    for k, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False)[0]):
        axes.plot(steps, [1000 * point.training[k] for point in curves], ".-", label="training")
        if curves[0].validation:
            axes.plot(steps, [1000 * point.validation[k] for point in curves], ".-", label="validation, averaged weights")
            axes.axvline(min(curves, key=lambda point: point.loss).step, color="0.7", lw=1, label="smallest loss")
        axes.set(xlabel="step", title=("energy, meV/atom", "force, meV/Å", "virial, meV/atom")[k], yscale="log")
        axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110)
