"""Is a student of organic molecules worth running? Held-out scaffolds, conformer energies, S22, G2, and dynamics.

    python check.py labels organics.safetensors report.json test.npz relaxed.npz external.npz
    python check.py stability organics.pt stability.json molecules.npz --picoseconds 100 --minutes 9

`labels` compares a student with labelled files (sample.py): forces and energies by kind; relative energies of conformers
(kind relaxed) in kcal/mol; interaction energies of S22 in kcal/mol. `stability` runs one conformer of each of 50 held-out
molecules at 500 K; a model.pt goes through the compiled core, a checkpoint through PyTorch. It stops after --minutes and the
same command goes on from stability.json.state.npz.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, units

from geometry import HELD_OUT, flown_apart, side
from mlff.files import replacing
from mlff.painn import load_checkpoint
from mlff.train.data import batches, collate, make_graphs
from mlff.train.dynamics import Batch, Compiled, Langevin, Student, relax
from mlff.train.fit import errors, predict
from mlff.train.frames import load

KCAL = units.kcal / units.mol


def energies(model, graphs: list, max_edges: int, device: str) -> np.ndarray:
    """Energy [F] in eV."""
    result = np.zeros(len(graphs))
    for members in batches(graphs, max_edges):
        with torch.no_grad():
            result[members] = predict(model, collate([graphs[k] for k in members]).to(device))[0].cpu().numpy()
    return result


def statistics(deviations) -> dict:
    """Mean absolute and root mean square deviation, kcal/mol, of energies in eV."""
    deviations = np.concatenate(deviations) / KCAL
    return {"count": len(deviations), "mae": float(np.abs(deviations).mean()), "rmse": float(np.sqrt((deviations**2).mean()))}


def check_labels(args) -> None:
    frames = [atoms for path in args.files for atoms in load(path)]
    model = load_checkpoint(args.model).to(args.device).requires_grad_(False)
    graphs = make_graphs(frames, model.config.cutoff)
    max_edges = 40_000 if args.device == "cpu" else 500_000
    report: dict = {"errors": errors(model, graphs, [atoms.info["kind"] for atoms in frames], max_edges, args.device)}
    ours, theirs = energies(model, graphs, max_edges, args.device), np.array([atoms.calc.results["energy"] for atoms in frames])
    conformers, parts = defaultdict(list), defaultdict(dict)
    for k, atoms in enumerate(frames):
        if atoms.info["kind"] == "relaxed":
            conformers[atoms.info["molecule"]].append(k)
        if atoms.info["kind"] == "s22":
            parts[atoms.info["molecule"]][atoms.info["trajectory"].rpartition(" ")[2]] = k
    sets = [members for members in conformers.values() if len(members) > 1]
    if sets:
        # energies relative to the mean of a molecule's conformers: no one conformer is the reference
        deviations = [ours[m] - theirs[m] - (ours[m] - theirs[m]).mean() for m in sets]
        spread = statistics([theirs[m] - theirs[m].mean() for m in sets])["rmse"]
        report["conformer_energies_kcal_mol"] = {"molecules": len(sets), **statistics(deviations), "teachers_rms": spread}
    if parts:
        interaction = {name: [e[k["dimer"]] - e[k["a"]] - e[k["b"]] for e in (ours, theirs)] for name, k in parts.items()}
        values = np.array(list(interaction.values()))
        report["s22_kcal_mol"] = {
            **statistics([values[:, 0] - values[:, 1]]),
            "student_and_teacher": {name: [round(float(e / KCAL), 2) for e in pair] for name, pair in interaction.items()},
        }
    write_report(args.report, report)


def check_stability(args) -> None:
    chosen: dict[str, Atoms] = {}
    for atoms in load(args.molecules):
        if side(atoms.info["scaffold"]) == HELD_OUT and len(atoms) >= 12:
            chosen.setdefault(atoms.info["molecule"], atoms)
    names = sorted(chosen)[:: max(1, len(chosen) // args.count)][: args.count]
    batch = Batch(sorted((chosen[name] for name in names), key=len), args.device)
    apart = flown_apart(batch)
    compiled = args.model.suffix == ".pt"
    potential = Compiled(args.model, args.device) if compiled else Student(load_checkpoint(args.model), args.device)
    state_path, done, failed_at = args.report.with_name(args.report.name + ".state.npz"), 0, np.full(batch.size, -1)
    if not state_path.is_file():
        relax(batch, potential, 100)
    md = Langevin(batch, potential, [args.temperature] * batch.size, 0.5, 0.01)
    if state_path.is_file():
        with np.load(state_path) as state:
            batch.positions = torch.as_tensor(state["positions"], device=args.device)
            md.velocities = torch.as_tensor(state["velocities"], device=args.device)
            done, failed_at = int(state["done"]), state["failed_at"]
        md.put_back(torch.zeros(batch.size, dtype=torch.bool, device=args.device), batch.positions, batch.box)  # forces anew
        md.generator.manual_seed(done)
    home, steps, began, kelvin = batch.positions.clone(), round(args.picoseconds * 2000), time.time(), []
    first = done
    while done < steps and time.time() - began < 60 * args.minutes:
        md.step(100)
        done += 100
        temperature = md.kinetic() / (1.5 * units.kB * batch.counts)
        kelvin.append(temperature.mean().item())
        broken = apart(batch) | ~torch.isfinite(md.energy) | (temperature > 3 * args.temperature + 500)
        if broken.any():
            failed_at[(broken.cpu().numpy()) & (failed_at < 0)] = done
            md.put_back(broken, home, batch.box)
        if done % 10000 == 0:
            speed = (done - first) / (time.time() - began)
            print(f"{done} of {steps} steps, {speed:.0f} steps/s, {(failed_at >= 0).sum()} failed, {kelvin[-1]:.0f} K", flush=True)
    with replacing(state_path) as unfinished, open(unfinished, "wb") as f:
        arrays = {"positions": batch.positions, "velocities": md.velocities}
        np.savez(f, done=done, failed_at=failed_at, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    failures = {atoms.info["molecule"]: int(n) for atoms, n in zip(batch.frames, failed_at) if n >= 0}
    summary = {"molecules": batch.size, "temperature_K": args.temperature, "picoseconds": done / 2000, "failed_at_step": failures}
    write_report(args.report, {**summary, "mean_temperature_K": float(np.mean(kelvin)) if kelvin else None})


def write_report(path: Path, report: dict) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("labels", check_labels), ("stability", check_stability)):
        p = commands.add_parser(name)
        p.set_defaults(function=function)
        p.add_argument("model", type=Path)
        p.add_argument("report", type=Path)
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if function is check_labels:
            p.add_argument("files", type=Path, nargs="+")
            continue
        p.add_argument("molecules", type=Path)
        p.add_argument("--count", type=int, default=50)
        p.add_argument("--picoseconds", type=float, default=100.0)
        p.add_argument("--temperature", type=float, default=500.0, help="K")
        p.add_argument("--minutes", type=float, default=9.0)
    args = parser.parse_args()
    torch.manual_seed(1)
    args.function(args)


if __name__ == "__main__":
    main()
