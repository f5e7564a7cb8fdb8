"""From a checkpoint to ``model.pt``: the plan, the weights as the kernels want them, and reference structures."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

from . import __version__, compile, payload
from .message import message_first_weights, source_features
from .neighbors import find_neighbors
from .painn import DOUBLE, PaiNN, energy_and_gradient, forces_and_virial, load_checkpoint, read_record
from .plan import HALVES_SCALE, CudaSizes, cuda_tensor_dtypes, cpu_plan, cuda_plan, filter_columns, power_of_two


def plan_tensors(model: PaiNN) -> Dict[str, np.ndarray]:
    """Weights of a float64 model under the names that the plan uses; float32, tables of constants float64."""
    config, state = model.config, dict(model.state_dict())
    first = model.layers[0]
    q_s, q_v = message_first_weights(source_features(model.embedding, **first.source), first.filter)
    for name in [n for n in state if n.startswith("layers.0.source.") or n == "layers.0.filter"]:
        del state[name]  # folded into q_s and q_v
    state.update({"layers.0.q_s": q_s, "layers.0.q_v": q_v, "readout.b2": state["readout.b2"].reshape(1)})
    tensors = {name: t.detach().numpy().astype(np.float64 if name in DOUBLE else np.float32) for name, t in state.items()}
    tensors["pair_table"] = model.pair_table.numpy().astype(np.float64).reshape(-1, 3)
    tensors["cutoff"] = np.array([config.cutoff], dtype=np.float64)
    tensors["norm_epsilon"] = np.array([config.norm_epsilon], dtype=np.float32)
    if model.extrapolation is not None:
        del tensors["extrapolation.calibration"]  # which no kernel needs: it is in the header
        for name in ("projection", "environments"):
            tensors[f"extrapolation.{name}"] = tensors[f"extrapolation.{name}"].reshape(-1, model.extrapolation.projection.shape[2])
    return tensors


def pad_features(t: torch.Tensor, full: int, *shape: int) -> torch.Tensor:
    """A weight with more features, filled up with zeros: they stay zero throughout the model.

    Along each dimension of `shape` blocks of as many numbers as the model has features become blocks of `full` (those of the readout half
    as many).
    """
    for axis, size in enumerate(shape):
        if t.shape[axis] != size:
            blocks = max(1, size // full)
            parts = t.unflatten(axis, (blocks, -1))
            wanted = [*parts.shape[: axis + 1], size // blocks, *parts.shape[axis + 2 :]]
            grown = parts.new_zeros(wanted)
            grown.narrow(axis + 1, 0, parts.shape[axis + 1]).copy_(parts)
            t = grown.flatten(axis, axis + 1)
    return t


def cuda_tensors(model: PaiNN) -> Dict[str, np.ndarray]:
    """Weights of a float64 model as the GPU kernels want them: padded to powers of two (mlff.plan.CudaSizes), matrices as pairs of halves
    (dense_triton.py).

    Added features are zero throughout: their weights, biases and embeddings are.

    Raises:
        ValueError: a weight too large for that.
    """
    sizes, config = CudaSizes.of(model.config), model.config
    full = sizes.features

    def padded(t: torch.Tensor, *shape: int) -> np.ndarray:
        return pad_features(t.detach(), full, *shape).numpy()

    def more_rows(t: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.nn.functional.pad(t.detach(), (0, 0, 0, rows - len(t)))

    def halves(name: str, matrix: np.ndarray) -> np.ndarray:
        """[2 K, N]: hi above lo."""
        scaled = (matrix * HALVES_SCALE).astype(np.float32)
        if np.abs(scaled).max() > np.finfo(np.float16).max:
            raise ValueError(f"{name} has a weight of {np.abs(matrix).max():.3g}; the GPU kernels take at most {65504 / HALVES_SCALE:g}")
        hi = scaled.astype(np.float16)
        return np.concatenate([hi, (scaled - hi.astype(np.float32)).astype(np.float16)])

    first = model.layers[0]
    q_s, q_v = message_first_weights(source_features(model.embedding, **first.source), first.filter)
    weights = {"gpu.embedding": padded(model.embedding, len(config.species), full)}
    for index, layer in enumerate(model.layers):
        w, u = f"gpu.layers.{index}.", layer.update
        if index == 0:
            weights[w + "q_s"] = padded(more_rows(q_s, sizes.moments), sizes.moments, full)
            q_vpq = torch.cat([q_v, q_v @ u["vu"]], 1)
            weights[w + "q_vpq"] = padded(more_rows(q_vpq, sizes.moments), sizes.moments, 3 * full)
            of_scalars = u["w1"][: config.features]
            weights[w + "q_hidden"] = padded(more_rows(q_s @ of_scalars, sizes.moments), sizes.moments, full)
            weights[w + "embedding_hidden"] = padded(model.embedding @ of_scalars, len(config.species), full)
        else:
            for name, shape in (("w1", (full, full)), ("b1", (full,)), ("w2", (full, 3 * full)), ("b2", (3 * full,))):
                weights[w + "source." + name] = padded(layer.source[name], *shape)
            columns = padded(more_rows(layer.filter, sizes.basis_block), sizes.basis_block, 3 * full)
            weights[w + "filter"] = np.take(columns, filter_columns(3 * full), 1)
        for name, shape in (("vu", (full, 2 * full)), ("w1", (2 * full, full)), ("b1", (full,)), ("w2", (full, 3 * full)), ("b2", (3 * full,))):
            weights[w + "update." + name] = padded(u[name], *shape)
    r, m = model.readout, sizes.readout
    weights["gpu.readout.w1"] = padded(r["w1"], full, m)
    for name in ("b1", "w2"):
        weights["gpu.readout." + name] = padded(r[name], m)
    weights["gpu.readout.b2"] = r["b2"].detach().numpy().reshape(1)
    if model.extrapolation is not None:
        (k, d), grade = map(power_of_two, model.extrapolation.environments.shape[1:]), model.extrapolation
        added = k - grade.environments.shape[1]  # rows that are there already are no nearer
        environments = torch.cat([grade.environments, grade.environments[:, -1:].expand(-1, added, -1)], 1)
        directions = torch.nn.functional.pad(environments, (0, d - environments.shape[2]))
        weights["gpu.environments"] = directions.numpy().reshape(-1, d)
        projection = torch.nn.functional.pad(grade.projection, (0, d - grade.projection.shape[2]))
        weights["gpu.projection"] = padded(projection, len(projection), full, d).reshape(-1, d)
    dtypes = cuda_tensor_dtypes(config)
    return {name: halves(name, t) if dtypes[name] == "f16" else t.astype(np.float32) for name, t in weights.items()}


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


def build_payload(
    model: PaiNN,
    provenance: Optional[Dict[str, Any]] = None,
    architectures: Sequence[int] = (),
    progress: Optional[Callable[[int, int], None]] = None,
) -> bytes:
    """The bytes that describe a model completely (docs/file-format.md).

    Args:
        model: any precision; it is rounded to float32, and left as it was.
        provenance: training record, any JSON values.
        architectures, progress: of the GPUs that the payload is for, as in :func:`mlff.compile.compile_plan`; none: it is for CPUs.

    Raises:
        ValueError, ImportError, mlff.compile.CompileError: as compile_plan and cuda_tensors raise them.
    """
    config = model.config
    rounded = PaiNN(config)
    rounded.extrapolation = copy.deepcopy(model.extrapolation)
    rounded.load_state_dict(model.state_dict())
    rounded.double()
    structures, grade = reference_structures(list(config.species)), rounded.extrapolation
    plans, tensors = {"cpu": cpu_plan(config, grade is not None).to_dict()}, {**plan_tensors(rounded), **reference_tensors(rounded, structures)}
    if architectures:
        plan = cuda_plan(config, grade and tuple(grade.environments.shape[1:]))
        compiled, code = compile.compile_plan(plan, architectures, progress)
        plans["cuda"] = {**plan.to_dict(), **compiled}
        tensors.update({**cuda_tensors(rounded), **code})
    header = {
        "architecture": "painn",
        "config": asdict(config),
        "atomic_numbers": config.atomic_numbers,
        "cutoff": config.cutoff,
        "units": {"length": "Angstrom", "energy": "eV"},
        "precision": "float32",
        "mlff_version": __version__,
        "provenance": provenance or {},
        "references": [{"name": a.info["name"], "prefix": f"reference.{k}"} for k, a in enumerate(structures)],
        "plans": plans,
    }
    if grade is not None:
        header["extrapolation"] = dict(zip(("grade", "force_error_eV_A"), grade.calibration.tolist()))
    return payload.pack(header, tensors)


def _read(structure) -> Atoms:
    try:
        return ase.io.read(structure)
    except FileNotFoundError:
        raise
    except Exception as e:  # of any kind: its readers raise what they like
        raise ValueError(f"{structure}: expected a structure that ASE can read, got {type(e).__name__}: {e}") from e


def export(
    model,
    output,
    structure=None,
    portable: bool = False,
    architectures: Optional[Sequence[int]] = None,
    progress: Optional[Callable[[int, int], None]] = None,
) -> Path:
    """Writes ``model.pt``.

    Args:
        model: name of a shipped student (see mlff.pretrained) or path of a checkpoint.
        output: file to write.
        structure: file readable by ASE, or ase.Atoms; its elements are baked in, which TorchForce needs because it passes
            positions only.
        portable: write a forward in plain TorchScript that needs no operator library (slower).
        architectures: of the GPUs that the file is for, out of mlff.compile.ARCHITECTURES, () for none. By default all of them if
            Triton is installed, else none. Compiling takes about a minute on two cores; a file for CPUs is written at once.
        progress: called with the numbers of finished and of all compilations.

    Returns:
        the path written.

    Raises:
        FileNotFoundError, ValueError: no such model, not a checkpoint, an element that the model does not know, no such
            architecture.
        ImportError: architectures are asked for, and Triton is missing.
        mlff.compile.CompileError: a kernel does not compile.
    """
    from . import pretrained, torchscript

    if architectures is None:
        architectures = compile.ARCHITECTURES if compile.available() else ()
    path = Path(model) if Path(model).is_file() or Path(model).suffix else pretrained(str(model))
    student = load_checkpoint(path)
    numbers = None
    if structure is not None:
        atoms = structure if isinstance(structure, Atoms) else _read(structure)
        unknown = sorted({chemical_symbols[z] for z in atoms.numbers} - set(student.config.species))
        if unknown:
            raise ValueError(
                f"{structure}: the model knows the elements {' '.join(student.config.species)}; the structure has {' '.join(unknown)} too"
            )
        numbers = atoms.numbers
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output}: expected the name of a file to write, got a folder; for example {output / 'model.pt'}")
    if not output.parent.is_dir():  # said before the kernels are compiled, not after
        raise FileNotFoundError(f"{output}: the folder {output.parent} does not exist")
    data = build_payload(student, read_record(path), architectures, progress)
    torchscript.save(data, output, atomic_numbers=numbers, portable=portable)
    return output
