"""OpenMM: a model as an ``openmmtorch.TorchForce``.

Importing this module registers the operator, which ``openmmtorch.TorchForce("model.pt")`` needs for a file that was written with
its elements baked in (``mlff-export --structure FILE``). :func:`create_force` takes the elements from the topology instead.

The force runs on OpenMM's Reference, CPU and CUDA platforms, on the last without leaving the GPU, if the file has code for it; a
portable one (``portable=True``) on every platform of OpenMM-Torch. On the CPU it uses ``torch.get_num_threads()`` threads.

The model computes in float32 with positions as OpenMM hands them over: on the CUDA platform in float32 with Precision "single" and
"mixed", which moves them by some 1e-7 of the box, and unrounded with "double".

Do not copy or serialise a System that holds a TorchForce: XmlSerializer.deserialize of any TorchForce, which copy.deepcopy uses
too, ends in a segmentation fault in acellera-openmmtorch 1.10.
"""

import logging
from typing import Optional, Sequence


def _not_about_simtk(record: logging.LogRecord) -> bool:
    return "simtk.openmm" not in record.getMessage()


logging.getLogger().addFilter(_not_about_simtk)  # openmmtorch imports OpenMM by its old name, and the user is warned of it
try:
    import openmmtorch
    from openmm import app
except ImportError as e:
    raise ImportError(f"mlff.openmm needs OpenMM and OpenMM-Torch: pip install 'mlff[openmm]' ({e})") from e
finally:
    logging.getLogger().removeFilter(_not_about_simtk)

from . import payload as payload_file
from . import torchscript

try:
    torchscript.load_operator()
except FileNotFoundError:
    pass  # portable forces need no operator; create_force reports it where one does


def create_force(
    model_path,
    topology,
    atoms: Optional[Sequence[int]] = None,
    portable: bool = False,
    self_check: bool = False,
    use_cuda_graphs: bool = False,
) -> openmmtorch.TorchForce:
    """A force that computes the energy of the topology's atoms, to be added to a System with the same particles.

    It has periodic boundaries if the topology has box vectors; the box may be triclinic and smaller than the cutoff. With
    ``atoms`` the model sees these atoms alone: their interactions with the rest of the system are for other forces.

    Args:
        model_path: a ``model.pt``; elements baked into it are not used.
        topology: openmm.app.Topology of the whole System.
        atoms: indices of the atoms that the model handles; None for all. Atoms that are left out may be of any element.
        portable: compute in plain TorchScript in place of the operator; slower, but it runs wherever torch does.
        self_check: first compare the model's reference structures with the stored results, on the CPU.
        use_cuda_graphs: on the CUDA platform, let OpenMM-Torch record the evaluation and replay it, which saves time for small
            systems. What would be an error (positions that are not finite, atoms so crowded that the memory of the recording
            does not hold their neighbours) is then a result that is NaN, and that memory is kept until the process ends.

    Raises:
        PayloadError: the file is missing, damaged, foreign or too new.
        TypeError: ``topology`` is of another type.
        ValueError: an atom without element or with one that the model does not know; wrong ``atoms``.
        RuntimeError: the self-check failed.
        FileNotFoundError: the operator library is not installed.
    """
    if not isinstance(topology, app.Topology):
        raise TypeError(f"topology: expected an openmm.app.Topology, got {type(topology).__name__}; most of what reads files has one as its .topology")
    data = payload_file.find(model_path)
    _check_elements(payload_file.unpack(data, str(model_path))[0]["config"]["species"], topology, atoms)
    if self_check:
        torchscript.self_check(data, portable)
    numbers = [atom.element.atomic_number if atom.element else 0 for atom in topology.atoms()]
    force = openmmtorch.TorchForce(torchscript.module(data, numbers, atoms, portable))
    force.setOutputsForces(True)
    force.setUsesPeriodicBoundaryConditions(topology.getPeriodicBoxVectors() is not None)
    if use_cuda_graphs:
        force.setProperty("useCUDAGraphs", "true")
    return force


def _check_elements(known: Sequence[str], topology, atoms: Optional[Sequence[int]]) -> None:
    chosen = None if atoms is None else set(int(k) for k in atoms)
    for atom in topology.atoms():
        if chosen is not None and atom.index not in chosen:
            continue
        element = atom.element.symbol if atom.element else "without an element"
        if element not in known:
            raise ValueError(
                f"atom {atom.index} ({atom.name} of {atom.residue.name} {atom.residue.id}) is {element}, which the model does not "
                f"know; it knows {' '.join(known)}. Leave the atom to another force with atoms=[...]"
            )
