"""Models of SchNetPack (Schuett et al., J. Chem. Theory Comput. 15, 448, 2019; J. Chem. Phys. 158, 144801, 2023) as checkpoints of mlff.

`best_model`, which SchNetPack writes when it trains, is a pickled ``NeuralNetworkPotential``: reading it takes SchNetPack, and runs whatever
code is in the file. A PaiNN in it is the model of painn.py with other functions of the distance. Its layers have the same order of
channels; what differs goes into the weights:

- SchNetPack multiplies from the left: all matrices are transposed. The bias of the filters becomes the last row of the filter.
- Filters and layers that are shared become copies.
- Features that are no multiple of 16, and fewer hidden units in the readout than half the features, are filled up with zeros.
- Means, atomic references and the bias of the readout become shifts of the elements, which are kept in float64.
- A unit of energy multiplies readout and shifts. A unit of length multiplies the cutoff and the Gaussians, or the weights of the
  Bessel functions sin(n pi d / rc) / d, which are inverse lengths.

SchNetPack keeps the numbers n pi / rc of its Bessel functions in float32, mlff has the exact ones. That moves forces by about 1e-6 of the
largest, as the single precision of either program does. The comparison here, in float64, is with the exact numbers on both sides.
"""

import copy
import hashlib
import json
import math
import time
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import ase.units
import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor, nn

from .export import pad_features, reference_structures
from .files import replacing
from .neighbors import find_neighbors
from .painn import PaiNN, PaiNNConfig, energy_and_gradient, forces_and_virial, save_checkpoint

ENERGY_UNITS = {
    "eV": ase.units.eV, "Hartree": ase.units.Hartree, "kcal/mol": ase.units.kcal / ase.units.mol, "kJ/mol": ase.units.kJ / ase.units.mol,
}  # fmt: skip
LENGTH_UNITS = {"Ang": ase.units.Ang, "Bohr": ase.units.Bohr, "nm": ase.units.nm}
LARGEST_DIFFERENCE = 1e-6  # of energies per atom and forces, in units of the largest force (of 1 eV and 1 eV/Angstrom if that is smaller)
COMPRESSION = (1.0, 0.8, 0.6)  # of the structures on which both are compared; 0.9 brings neighbours to the length of a bond


def import_schnetpack(
    path, output, elements: Optional[Sequence[str]] = None, energy_unit: str = "eV", length_unit: str = "Ang"
) -> Dict[str, Any]:
    """Writes a checkpoint with the energies and forces of a model of SchNetPack 2, and its record (.json) beside it.

    Args:
        path: `best_model` of SchNetPack. It is a pickle, which may run any code: read only what you trust.
        output: file to write, NAME.safetensors.
        elements: chemical symbols of the checkpoint, in its order; None: those that have an atomic reference in the model.
        energy_unit, length_unit: of the model, out of ENERGY_UNITS and LENGTH_UNITS. The file does not say.

    Returns:
        the record.

    Raises:
        FileNotFoundError: no such file or folder.
        ImportError: SchNetPack is missing.
        ValueError: not a model of SchNetPack, one that is more than a PaiNN with a sum of atomic energies and its forces, or one whose
            energies and forces are not reproduced; nothing is written.
    """
    path, output = Path(path), Path(output)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: the folder {output.parent} does not exist")
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: expected a name that ends in .safetensors")
    network = load(path)
    try:
        model = convert(network, elements, energy_unit, length_unit)
        energy, force = compare(network, model, energy_unit, length_unit)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if not (energy <= LARGEST_DIFFERENCE and force <= LARGEST_DIFFERENCE):  # so that NaN is refused
        raise ValueError(
            f"{path}: the checkpoint would differ by {energy:.1e} in energies and {force:.1e} in forces, expected at most {LARGEST_DIFFERENCE:g}"
            " (relative to the largest force): this model has something that mlff does not know"
        )
    record = {
        "name": output.stem,
        "date": time.strftime("%Y-%m-%d"),
        "model": {"architecture": "painn", **asdict(model.config)},
        "imported": {
            "from": f"SchNetPack {getattr(network, 'spk_version', '2.0')}",
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "energy_unit": energy_unit,
            "length_unit": length_unit,
            "largest_difference_of_energies": energy,
            "largest_difference_of_forces": force,
        },
    }
    save_checkpoint(model, output)
    with replacing(output.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
    return record


def load(path) -> nn.Module:
    """The ``NeuralNetworkPotential`` in a file of SchNetPack, on the CPU. Raises ImportError and ValueError as above."""
    library = _library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            network = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as e:  # of any kind: it runs what is in the file
            raise ValueError(f"{path} cannot be read as a model of SchNetPack {version('schnetpack')} ({type(e).__name__}: {e})") from None
    if type(network) is not library.model.NeuralNetworkPotential:
        raise ValueError(
            f"{path} holds {type(network).__name__}, expected NeuralNetworkPotential: the file best_model that SchNetPack's training writes"
            " (not best_model.task, and no checkpoint)"
        )
    if not hasattr(network.representation, "electronic_embeddings"):  # written before SchNetPack 2.1, whose forward asks for it
        network.representation.electronic_embeddings = []
    return network.eval()


@torch.no_grad()
def convert(network: nn.Module, elements: Optional[Sequence[str]] = None, energy_unit: str = "eV", length_unit: str = "Ang") -> PaiNN:
    """The float32 model that is a network of SchNetPack. Arguments as of :func:`import_schnetpack`; ValueError says what does not fit."""
    for unit, units, what in ((energy_unit, ENERGY_UNITS, "energy"), (length_unit, LENGTH_UNITS, "length")):
        if unit not in units:
            raise ValueError(f"the unit of {what} is {unit!r}, expected one of {', '.join(units)}")
    ev, angstrom = ENERGY_UNITS[energy_unit], LENGTH_UNITS[length_unit]
    library, r = _library(), network.representation
    _expect(r, "representation", library.representation.PaiNN)
    _expect(r.cutoff_fn, "cutoff function", library.nn.CosineCutoff)
    _expect(r.radial_basis, "radial basis", library.nn.BesselRBF, library.nn.GaussianRBF, library.nn.GaussianRBFCentered)
    if len(r.electronic_embeddings):
        raise ValueError("the model has embeddings of charge or spin (electronic_embeddings), of which mlff's models know nothing")
    readout, energy_key = _readout(network, library)
    mean, atomref = _offsets(network, energy_key, library)
    if elements is None:
        elements = [chemical_symbols[z] for z in atomref.nonzero().flatten().tolist()]
        if not elements:
            raise ValueError(
                "the file does not say for which elements the model was trained (it has no atomic references): name them, --elements H,C,O"
            )

    f, cutoff, gaussian = r.n_atom_basis, _cutoff(r), hasattr(r.radial_basis, "widths")
    full, hidden = -(-f // 16) * 16, readout["b1"].shape[0]
    if 2 * hidden > full:
        raise ValueError(f"the output network has {hidden} hidden units, expected at most {full // 2}: half the features (n_hidden=None)")
    config = PaiNNConfig(
        species=list(elements), features=full, layers=r.n_interactions, n_radial=r.radial_basis.n_rbf, cutoff=cutoff * angstrom,
        norm_epsilon=r.mixing[0].epsilon, repulsion=False, radial_basis="gaussian" if gaussian else "bessel", cutoff_function="cosine",
    )  # fmt: skip
    model = PaiNN(config).requires_grad_(False)
    numbers = torch.tensor(config.atomic_numbers)

    def put(target: Tensor, value: Tensor) -> None:
        target.copy_(pad_features(value, full, *target.shape))

    try:
        put(model.embedding, r.embedding(numbers))
        shift = readout["b2"].double() + mean + (atomref[numbers] if len(atomref) else 0.0)
    except IndexError:
        raise ValueError(f"the model has no embedding or no atomic reference for all of {' '.join(elements)}") from None
    filters = torch.cat([r.filter_net.weight.T, r.filter_net.bias[None]]).double()
    if gaussian:
        centres, widths = (t.double() * angstrom for t in (r.radial_basis.offsets, r.radial_basis.widths))
        model.gaussians[:-1] = torch.stack([centres, 1 / widths], 1)
    else:
        filters[:-1] *= angstrom
    filters = [filters] * config.layers if r.share_filters else filters.split(3 * f, 1)
    for layer, weight, interaction, mixing in zip(model.layers, filters, r.interactions, r.mixing):
        put(layer.filter, weight)
        put(layer.update["vu"], mixing.mu_channel_mix.weight.T)
        for target, net in ((layer.source, interaction.interatomic_context_net), (layer.update, mixing.intraatomic_context_net)):
            for name, value in _perceptron(net, "context network").items():
                put(target[name], value)
    for name in ("w1", "b1"):
        put(model.readout[name], readout[name])
    put(model.readout["w2"], readout["w2"][:, 0].double() * ev)
    model.readout["b2"].zero_()
    model.shift.copy_(shift * ev)
    return model


def compare(network: nn.Module, model: PaiNN, energy_unit: str = "eV", length_unit: str = "Ang") -> Tuple[float, float]:
    """Largest differences between a network of SchNetPack and the model made of it, in float64, with parameters as float32 has them.

    Returns:
        of energies per atom and of forces, both in units of the largest force of the structure (1 eV and 1 eV/Angstrom if that is smaller).
    """
    library, (ev, angstrom) = _library(), (ENERGY_UNITS[energy_unit], LENGTH_UNITS[length_unit])
    network, model = copy.deepcopy(network), copy.deepcopy(model).double()
    for parameter in network.parameters():
        parameter.data = parameter.data.float()
    network.double()
    network.postprocessors = nn.ModuleList(p for p in network.postprocessors if not isinstance(p, library.transform.CastMap))
    r, differences = network.representation, []
    if hasattr(r.radial_basis, "freqs"):
        r.radial_basis.freqs = math.pi / _cutoff(r) * torch.arange(1, r.radial_basis.n_rbf + 1, dtype=torch.float64)
    for atoms in (_compressed(a, c) for a in reference_structures(model.config.species) for c in COMPRESSION):
        edges, shifts, vectors = find_neighbors(atoms.positions, model.config.cutoff, atoms.cell.array, atoms.pbc)
        numbers, p = torch.from_numpy(atoms.numbers), library.properties
        results = network({
            p.Z: numbers, p.R: torch.from_numpy(atoms.positions) / angstrom, p.cell: torch.from_numpy(atoms.cell.array[None]) / angstrom,
            p.pbc: torch.from_numpy(atoms.pbc), p.n_atoms: torch.tensor([len(atoms)]), p.idx: torch.zeros(1, dtype=torch.long),
            p.idx_m: torch.zeros(len(atoms), dtype=torch.long), p.idx_i: edges[0], p.idx_j: edges[1], p.offsets: shifts / angstrom,
        })  # fmt: skip
        energy_key, force_key = next((m.energy_key, m.force_key) for m in network.output_modules if hasattr(m, "force_key"))
        with torch.no_grad():
            energies, gradient = energy_and_gradient(model, numbers, edges, vectors)
        forces, _ = forces_and_virial(gradient, edges, vectors, len(atoms))
        theirs = results[force_key].detach() * (ev / angstrom)
        scale = max(1.0, float(theirs.abs().max()))
        energy = float((energies.sum() - results[energy_key].detach() * ev).abs()) / len(atoms)
        differences.append((energy / scale, float((forces - theirs).abs().max()) / scale))
    energy, force = np.max(differences, axis=0)  # NaN if one is
    return float(energy), float(force)


def _library() -> Any:
    """SchNetPack."""
    from torch.utils.data import dataloader

    if not hasattr(dataloader, "T_co") and hasattr(dataloader, "_T_co"):  # SchNetPack before 2.2 imports it by the name of earlier torch
        dataloader.T_co = dataloader._T_co
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import schnetpack
    except ImportError as e:
        raise ImportError(f"a model of SchNetPack is read with SchNetPack, which cannot be imported ({e}): pip install schnetpack") from None
    return schnetpack


def _expect(thing: Any, what: str, *classes: type) -> None:
    """Exactly one of these classes: one that is derived may do anything."""
    if type(thing) not in classes:
        raise ValueError(f"the {what} is {type(thing).__name__}, expected {' or '.join(c.__name__ for c in classes)}")


def _cutoff(representation: nn.Module) -> float:
    """In the model's unit: the shortest number that is the float32 in the file, which is the one that was given. Checks the Bessel functions."""
    cutoff = float(str(representation.cutoff_fn.cutoff.float().numpy()[0]))
    freqs = getattr(representation.radial_basis, "freqs", None)
    if freqs is not None and not torch.allclose(freqs.double() * cutoff / math.pi, torch.arange(1, len(freqs) + 1).double(), rtol=1e-6, atol=0):
        raise ValueError(f"the Bessel functions are for the cutoff {math.pi / float(freqs[0]):g}, expected that of the cutoff function, {cutoff:g}")
    return cutoff


def _perceptron(net: nn.Module, what: str) -> Dict[str, Tensor]:
    """Weights [in, out] and biases of two layers with the activation SiLU between them."""
    layers = list(net)
    if len(layers) != 2:
        raise ValueError(f"the {what} has {len(layers)} layers, expected 2 (n_layers=2)")
    first, last = (layer.activation for layer in layers)
    if not (first is nn.functional.silu or isinstance(first, nn.SiLU)):
        name = getattr(first, "__name__", type(first).__name__)
        raise ValueError(f"the activation of the {what} is {name}, expected silu")
    if not isinstance(last, nn.Identity):
        raise ValueError(f"the last layer of the {what} has an activation, expected none")
    return {f"{p}{k}": t for k, layer in enumerate(layers, 1) for p, t in (("w", layer.weight.T), ("b", layer.bias))}


def _readout(network: nn.Module, library: Any) -> Tuple[Dict[str, Tensor], str]:
    """Weights of the output network and the key of the energy. The output modules must be the energy and its forces, and nothing else."""
    known = (library.atomistic.PairwiseDistances, library.atomistic.Strain)
    found = [type(m).__name__ for m in network.input_modules if type(m) not in known]
    if found:
        raise ValueError(f"the model has the input modules {' '.join(found)}, expected PairwiseDistances alone")
    modules = list(network.output_modules)
    if [type(m) for m in modules] != [library.atomistic.Atomwise, library.atomistic.Forces]:
        names = [f"{type(m).__name__} ({', '.join(getattr(m, 'model_outputs', []))})" for m in modules]
        raise ValueError(f"the model's outputs are {' and '.join(names) or 'none'}, expected Atomwise, an energy, and Forces, its gradient")
    energy, forces = modules
    if energy.n_out != 1 or energy.aggregation_mode != "sum":
        raise ValueError(
            f"the output {energy.output_key} has {energy.n_out} components and the aggregation {energy.aggregation_mode},"
            " expected a sum of atomic energies"
        )
    if forces.energy_key != energy.output_key or not forces.calc_forces:
        raise ValueError(f"the forces are not those of the output {energy.output_key}, but of {forces.energy_key}")
    return _perceptron(energy.outnet, "output network"), energy.output_key


def _offsets(network: nn.Module, energy_key: str, library: Any) -> Tuple[float, Tensor]:
    """Mean energy of an atom, and atomic references by atomic number (or none), float64, which are added after the network."""
    mean, atomref = 0.0, torch.zeros(0, dtype=torch.float64)
    for p in network.postprocessors if network.do_postprocessing else []:
        if isinstance(p, library.transform.CastMap):
            continue
        _expect(p, "postprocessor", library.transform.CastTo64, library.transform.CastTo32, library.transform.AddOffsets)
        if p._property != energy_key or not p.is_extensive:
            raise ValueError(f"the offsets of {p._property} are not offsets of the energy of each atom (is_extensive={p.is_extensive})")
        if p.add_mean:
            mean += float(p.mean)
        if p.add_atomrefs:
            added = p.atomref.double()
            atomref = added if not len(atomref) else atomref + added
    return mean, atomref


def _compressed(atoms: Atoms, factor: float) -> Atoms:
    atoms = atoms.copy()
    atoms.positions *= factor
    atoms.cell *= factor
    return atoms
