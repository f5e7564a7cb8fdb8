"""From a checkpoint to ``model.pt``: the plan, the weights as the kernels want them, and reference structures."""

from pathlib import Path
from typing import Any, Dict, List, Optional

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

from . import __version__, payload
from .message import message_first_weights, source_features
from .neighbors import find_neighbors
from .painn import PaiNN, energy_and_gradient, forces_and_virial, load_checkpoint, read_record
from .plan import cpu_plan


def plan_tensors(model: PaiNN) -> Dict[str, np.ndarray]:
    """Weights of a float64 model under the names that the plan uses; float32, tables of constants float64."""
    config, state = model.config, dict(model.state_dict())
    first = model.layers[0]
    q_s, q_v = message_first_weights(source_features(model.embedding, **first.source), first.filter)
    for name in [n for n in state if n.startswith("layers.0.source.") or n == "layers.0.filter"]:
        del state[name]  # folded into q_s and q_v
    state.update({"layers.0.q_s": q_s, "layers.0.q_v": q_v, "readout.b2": state["readout.b2"].reshape(1)})
    tensors = {name: t.detach().numpy().astype(np.float64 if name == "shift" else np.float32) for name, t in state.items()}
    tensors["pair_table"] = model.pair_table.numpy().astype(np.float64).reshape(-1, 3)
    tensors["cutoff"] = np.array([config.cutoff], dtype=np.float64)
    return tensors


def reference_structures(species: List[str]) -> List[Atoms]:
    """Two deterministic structures that contain every element: an open cluster and a triclinic crystal-like cell.

    Distances are at least 1.1 times the sum of the covalent radii, so that no force is extreme.
    """
    rng = np.random.default_rng(2021)
    numbers = [atomic_numbers[s] for s in species]
    symbols = (species * 12)[: max(12, len(species))]
    spacing = 2.2 * max(covalent_radii[numbers]) + 0.3
    side = int(np.ceil(len(symbols) ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[: len(symbols)]
    positions = (grid + 0.5) * spacing + rng.uniform(-0.15, 0.15, (len(symbols), 3))
    cell = side * spacing * np.array([[1.0, 0.0, 0.0], [0.2, 1.0, 0.0], [-0.1, 0.15, 1.0]])
    return [
        Atoms(symbols, positions=positions, info={"name": "open cluster"}),
        Atoms(symbols, scaled_positions=positions / (side * spacing), cell=cell, pbc=True, info={"name": "triclinic cell"}),
    ]


def reference_tensors(model: PaiNN, structures: List[Atoms]) -> Dict[str, np.ndarray]:
    """The structures and their results by the plain PyTorch model in float64, named as docs/file-format.md says."""
    tensors = {}
    for index, atoms in enumerate(structures):
        edges, _, r = find_neighbors(atoms.positions, model.config.cutoff, atoms.cell.array, atoms.pbc)
        with torch.no_grad():
            energy, gradient = energy_and_gradient(model, torch.from_numpy(atoms.numbers), edges, r)
        forces, virial = forces_and_virial(gradient, edges, r, len(atoms))
        values = {
            "atomic_numbers": atoms.numbers.astype(np.int32),
            "positions": atoms.positions,
            "cell": atoms.cell.array,
            "pbc": atoms.pbc.astype(np.int32),
            "energy": energy.sum().reshape(1).numpy(),
            "forces": forces.numpy(),
            "virial": virial.numpy()[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]],
        }
        tensors.update({f"reference.{index}.{name}": value for name, value in values.items()})
    return tensors


def build_payload(model: PaiNN, provenance: Optional[Dict[str, Any]] = None) -> bytes:
    """The bytes that describe a model completely (docs/file-format.md).

    Args:
        model: any precision; it is rounded to float32, and left as it was.
        provenance: training record, any JSON values.
    """
    config = model.config
    rounded = PaiNN(config)
    rounded.load_state_dict(model.state_dict())
    rounded.double()
    structures = reference_structures(list(config.species))
    header = {
        "architecture": "painn",
        "config": {"species": list(config.species), "features": config.features, "layers": config.layers,
                   "n_radial": config.n_radial, "cutoff": config.cutoff},
        "atomic_numbers": config.atomic_numbers,
        "cutoff": config.cutoff,
        "units": {"length": "Angstrom", "energy": "eV"},
        "precision": "float32",
        "mlff_version": __version__,
        "provenance": provenance or {},
        "references": [{"name": a.info["name"], "prefix": f"reference.{k}"} for k, a in enumerate(structures)],
        "plans": {"cpu": cpu_plan(config).to_dict()},
    }
    return payload.pack(header, {**plan_tensors(rounded), **reference_tensors(rounded, structures)})


def export(model, output, structure=None, portable: bool = False) -> Path:
    """Writes ``model.pt``.

    Args:
        model: name of a shipped student (see mlff.pretrained) or path of a checkpoint.
        output: file to write.
        structure: file readable by ASE, or ase.Atoms; its elements are baked in, which TorchForce needs because it passes
            positions only.
        portable: write a forward in plain TorchScript that needs no operator library (slower).

    Returns:
        the path written.

    Raises:
        FileNotFoundError, ValueError: no such model, not a checkpoint, an element that the model does not know.
    """
    from . import pretrained, torchscript

    path = Path(model) if Path(model).is_file() or Path(model).suffix else pretrained(str(model))
    student = load_checkpoint(path)
    numbers = None
    if structure is not None:
        atoms = structure if isinstance(structure, Atoms) else ase.io.read(structure)
        unknown = sorted({chemical_symbols[z] for z in atoms.numbers} - set(student.config.species))
        if unknown:
            raise ValueError(
                f"{structure}: the model knows the elements {' '.join(student.config.species)}; the structure has {' '.join(unknown)} too"
            )
        numbers = atoms.numbers
    output = Path(output)
    torchscript.save(build_payload(student, read_record(path)), output, atomic_numbers=numbers, portable=portable)
    return output
