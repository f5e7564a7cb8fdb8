"""The portable forward of a ``model.pt``: plain TorchScript, no operator library, on whatever device torch runs.

It strings the reference operations and their analytic gradients together, in the order of :func:`mlff.painn.energy_and_gradient`,
on the weights of the payload: float32, with distances, energies and sums of forces in float64, like the core. No autograd
takes part.

It is slower than the operator and holds all edges at once, about 100 F bytes for each directed pair (F features): 512 water
molecules take 1 GB with 128 features. Its neighbour search looks at all pairs in blocks (no cell list), so its time grows
with the square of the number of atoms. Use it for a few thousand atoms at most. On a GPU sums are atomic: the last digits vary
from run to run.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

from . import units
from .filter import radial_basis
from .message import message, message_backward, message_first, message_first_backward, source_features, source_features_backward
from .painn import forces_and_virial
from .payload import unpack
from .readout import readout, readout_backward
from .repulsion import repulsion, switched
from .update import update, update_backward

PAIRS_PER_BLOCK = 1 << 20  # distances held at a time by the neighbour search
MAX_IMAGES = 10  # of a cell within the cutoff, in each direction; as in the core


def find_pairs(
    x: Tensor, cutoff: float, cell: Optional[Tensor], pairs_per_block: int = PAIRS_PER_BLOCK, max_images: int = MAX_IMAGES
) -> Tuple[Tensor, Tensor]:
    """All directed pairs within the cutoff, in plain torch.

    The separation of a pair is brought to -1/2 .. 1/2 cell vectors in each direction. Images s with |s| <= cutoff / height + 1/2
    can then lie within the cutoff, where height is the distance between the two faces of the cell; for a cell higher than
    twice the cutoff that is s = 0 alone.

    Args:
        x: positions [n, 3] in Angstrom, float64; atoms may lie outside the cell.
        cell: [3, 3] in Angstrom, rows are the cell vectors; None for no periodicity.

    Returns:
        edges [2, E] (row 0 the centre i, row 1 the neighbour j) and vectors r_ij [E, 3].
    """
    n = x.size(0)
    scaled = x
    shifts = torch.zeros([1, 3], dtype=torch.float64)
    inverse = torch.eye(3, dtype=torch.float64)
    if cell is not None:
        host = cell.to(torch.device("cpu"))
        if not bool(torch.isfinite(host).all()) or float(torch.abs(torch.linalg.det(host))) < 1e-6:
            raise RuntimeError("mlff: the box vectors must be finite and span a volume")
        inverse = torch.linalg.inv(host)
        inverse_height = torch.linalg.vector_norm(inverse, dim=0)
        if float(inverse_height.max()) > max_images / cutoff:
            raise RuntimeError(
                "mlff: the box is "
                + str(float(1.0 / inverse_height.max()))
                + " Angstrom high; the smallest height allowed is "
                + str(cutoff / max_images)
                + " (the cutoff / "
                + str(max_images)
                + ")"
            )
        reach = torch.floor(cutoff * inverse_height + 0.5)
        ranges = [torch.arange(-float(reach[k]), float(reach[k]) + 1.0, dtype=torch.float64) for k in range(3)]
        shifts = torch.cartesian_prod(ranges[0], ranges[1], ranges[2])
        scaled = x @ inverse.to(x.device)
    offsets = shifts.to(x.device) if cell is None else shifts.to(x.device) @ cell
    here = offsets.size(0) // 2  # the shift of zero, in the middle
    rows = max(1, pairs_per_block // max(1, n * offsets.size(0)))
    everyone = torch.arange(n, device=x.device)
    edges: List[Tensor] = [torch.zeros([2, 0], dtype=torch.int64, device=x.device)]
    vectors: List[Tensor] = [x[:0]]
    for start in range(0, n, rows):
        i = everyone[start : start + rows]
        d = scaled.unsqueeze(0) - scaled[i].unsqueeze(1)
        if cell is not None:
            d = (d - torch.round(d)) @ cell
        r = d.unsqueeze(2) + offsets
        inside = (r * r).sum(-1) < cutoff * cutoff
        inside[i - start, i, here] = False  # an atom is no neighbour of itself, only of its images
        found = torch.nonzero(inside)
        edges.append(torch.stack([i[found[:, 0]], found[:, 1]]))
        vectors.append(r[found[:, 0], found[:, 1], found[:, 2]])
    return torch.cat(edges, dim=1), torch.cat(vectors)


class PortableModel(nn.Module):
    """Energy and forces of a payload in plain TorchScript; the interface of :class:`mlff.torchscript.OperatorModel`.

    Weights are buffers, which follow ``.to(device)``; those of layers 1, 2 ... are stacked, since TorchScript cannot index modules.
    """

    payload: Tensor

    def __init__(self, payload: Tensor, atomic_numbers: Optional[Tensor], indices: Optional[Tensor]):
        super().__init__()
        header, tensors = unpack(payload.numpy().tobytes())
        weights = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        self.payload = payload
        self.cutoff: float = header["cutoff"]
        self.cutoff_function: str = header["config"]["cutoff_function"]
        self.n_radial: int = header["config"]["n_radial"]
        self.repulsion: bool = header["config"]["repulsion"]
        self.norm_epsilon: float = header["config"]["norm_epsilon"]
        self.n_layers: int = header["config"]["layers"]
        self.n_species: int = len(header["atomic_numbers"])
        self.n_atoms: int = -1 if atomic_numbers is None else len(atomic_numbers)
        self.register_buffer("gaussians", weights.get("gaussians"))
        self.register_buffer("embedding", weights["embedding"])
        self.register_buffer("q_s", weights["layers.0.q_s"])
        self.register_buffer("q_v", weights["layers.0.q_v"])
        for name in ("w1", "b1", "w2", "b2"):
            self.register_buffer(f"source_{name}", self._stack(weights, f"source.{name}", 1))
            self.register_buffer(f"readout_{name}", weights[f"readout.{name}"])
        self.register_buffer("filter", self._stack(weights, "filter", 1))
        for name in ("vu", "w1", "b1", "w2", "b2"):
            self.register_buffer(f"update_{name}", self._stack(weights, f"update.{name}", 0))
        self.register_buffer("shift", weights["shift"])
        self.register_buffer("pair_table", weights["pair_table"])

        atoms = torch.zeros(0, dtype=torch.int64) if atomic_numbers is None else torch.arange(len(atomic_numbers))
        atoms = atoms if indices is None else indices
        known = header["atomic_numbers"]
        self.register_buffer("atoms", atoms)
        self.register_buffer(
            "species", torch.tensor([known.index(int(atomic_numbers[k])) for k in atoms.tolist()], dtype=torch.int64)
        )

    def _stack(self, weights, name: str, first: int) -> Tensor:
        layers = [weights[f"layers.{k}.{name}"] for k in range(first, self.n_layers)]
        return torch.stack(layers) if layers else torch.zeros(0)

    def energy_and_gradient(self, edges: Tensor, r: Tensor) -> Tuple[Tensor, Tensor]:
        """Total energy in eV and dE/dr_ij [E, 3] in eV/Angstrom, float64, for edge vectors r [E, 3] in Angstrom."""
        species, dtype = self.species, self.embedding.dtype
        d64 = torch.linalg.vector_norm(r, dim=-1)
        unit64 = r / d64.unsqueeze(-1)
        unit, d = unit64.to(dtype), d64.to(dtype)
        basis, slope = radial_basis(d, self.cutoff, self.cutoff_function, self.n_radial, self.gaussians)
        pair = self.pair_table[species[edges[0]] * self.n_species + species[edges[1]]]
        if self.repulsion:
            basis, slope = switched(basis, slope, d64, pair[:, 2])
        s_in: List[Tensor] = []
        v_in: List[Tensor] = []
        s_mid: List[Tensor] = []
        v_mid: List[Tensor] = []
        x: List[Tensor] = []
        s, v = message_first(self.embedding, self.q_s, self.q_v, species, edges, unit, basis)
        for k in range(self.n_layers):
            if k > 0:
                s_in.append(s)
                v_in.append(v)
                x.append(
                    source_features(s, self.source_w1[k - 1], self.source_b1[k - 1], self.source_w2[k - 1], self.source_b2[k - 1])
                )
                s, v = message(x[-1], v, s, edges, unit, basis, self.filter[k - 1])
            s_mid.append(s)
            v_mid.append(v)
            s, v = update(
                s, v, self.update_vu[k], self.update_w1[k], self.update_b1[k], self.update_w2[k], self.update_b2[k], self.norm_epsilon
            )
        atom_energy = (
            readout(s, self.readout_w1, self.readout_b1, self.readout_w2, self.readout_b2).to(torch.float64) + self.shift[species]
        )
        energy, gradient = atom_energy.sum(), torch.zeros_like(unit64)
        if self.repulsion:
            pair_energy, pair_slope = repulsion(d64, pair)
            energy, gradient = energy + pair_energy.sum(), pair_slope.unsqueeze(-1) * unit64

        g_s, g_v = readout_backward(s, self.readout_w1, self.readout_b1, self.readout_w2), torch.zeros_like(v)
        for back in range(self.n_layers):
            k = self.n_layers - 1 - back
            g_s, g_v = update_backward(
                g_s,
                g_v,
                s_mid[k],
                v_mid[k],
                self.update_vu[k],
                self.update_w1[k],
                self.update_b1[k],
                self.update_w2[k],
                self.update_b2[k],
                self.norm_epsilon,
            )
            if k > 0:
                g_x, g_v, g_edge = message_backward(
                    g_s, g_v, x[k - 1], v_in[k - 1], edges, unit, d, basis, slope, self.filter[k - 1]
                )
                g_s = g_s + source_features_backward(
                    g_x, s_in[k - 1], self.source_w1[k - 1], self.source_b1[k - 1], self.source_w2[k - 1]
                )
            else:
                g_edge = message_first_backward(g_s, g_v, self.q_s, self.q_v, species, edges, unit, d, basis, slope)
            gradient = gradient + g_edge.to(torch.float64)
        return energy, gradient

    def forward(self, positions: Tensor, boxvectors: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        # Freezing drops what forward does not use, or folds it to a constant; this use of the payload keeps it in the file.
        if positions.dim() != 2 or self.payload[: positions.size(1)].size(0) != 3:
            raise RuntimeError("mlff: positions must have the shape [n, 3]")
        if self.n_atoms < 0:
            raise RuntimeError(
                "mlff: the model file has no elements baked in, and TorchForce passes positions only; export it with"
                " 'mlff-export --structure FILE', or use mlff.openmm.create_force(model, topology)"
            )
        if positions.size(0) != self.n_atoms:
            raise RuntimeError(
                "mlff: the system has "
                + str(positions.size(0))
                + " atoms, but the model file was written for "
                + str(self.n_atoms)
                + "; export it for this system with 'mlff-export --structure FILE' or mlff.openmm.create_force(model, topology)"
            )
        x = positions.detach().to(torch.float64)[self.atoms] * units.ANGSTROM_PER_NM
        if not bool(torch.isfinite(x).all()):
            raise RuntimeError("mlff: positions must be finite numbers, got NaN or infinity")
        cell: Optional[Tensor] = None
        if boxvectors is not None:
            cell = boxvectors.detach().to(positions.device, torch.float64) * units.ANGSTROM_PER_NM
        edges, r = find_pairs(x, self.cutoff, cell)
        if bool((r == 0.0).all(-1).any()):
            raise RuntimeError("mlff: two atoms lie at the same place")
        energy, gradient = self.energy_and_gradient(edges, r)
        forces, _ = forces_and_virial(gradient, edges, r, x.size(0))
        out = torch.zeros_like(positions, dtype=torch.float64).index_copy(0, self.atoms, forces)
        out = out * (units.KJ_PER_MOL_PER_EV * units.ANGSTROM_PER_NM)
        return energy * units.KJ_PER_MOL_PER_EV, out.to(positions.dtype)
