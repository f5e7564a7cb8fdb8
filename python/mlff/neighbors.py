"""Neighbour lists in Python, for training, the reference and tests. (The compiled core finds its own neighbours.)

Open boundaries use torch-cluster where it is installed (extra ``torch-cluster``), else vesin; periodic systems use vesin.
Both give the same result, in the same order.
"""

from typing import List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from ase.geometry import complete_cell
from torch import Tensor
from vesin import NeighborList

try:
    from torch_cluster import radius_graph
except ImportError:
    radius_graph = None

FIRST_BOUND = 128  # neighbours per atom asked of torch-cluster at first; doubled until no atom reaches it


class Neighbors(NamedTuple):
    """Directed pairs within the cutoff, both directions of every pair, sorted by (i, j, shift).

    Attributes:
        edges: [2, E] int64; row 0 the destination (centre) i, row 1 the source (neighbour) j.
        shifts: [E, 3] float64 in Angstrom, a sum of whole cell vectors: the image of j is at x_j + shift.
        vectors: [E, 3] float64 in Angstrom, r_ij = x_j + shift - x_i.
    """

    edges: Tensor
    shifts: Tensor
    vectors: Tensor


def find_neighbors(positions, cutoff: float, cell=None, pbc: Sequence[bool] = (False, False, False)) -> Neighbors:
    """All directed pairs of atoms (and of their periodic images) closer than the cutoff.

    Args:
        positions: [N, 3] in Angstrom, a tensor or array; atoms may lie outside the cell.
        cutoff: in Angstrom. The cell may be smaller.
        cell: array [3, 3], rows are the cell vectors in Angstrom. Vectors of directions that are not periodic mean nothing
            and may be zero.
        pbc: periodic directions.

    Raises:
        ValueError: positions that are not finite, or periodic directions without a cell that spans them.
    """
    x = torch.as_tensor(positions, dtype=torch.float64).detach()
    periodic = [bool(p) for p in pbc]
    if not bool(torch.isfinite(x).all()):
        raise ValueError("positions must be finite numbers, got NaN or infinity")
    if any(periodic) and cell is None:
        raise ValueError(f"pbc is {periodic} but there is no cell")
    if not any(periodic) and radius_graph is not None:
        return _sorted(_open_pairs(x, cutoff), None, x, cutoff)
    return _with_vesin(x, cutoff, cell if any(periodic) else None, periodic)


def _open_pairs(x: Tensor, cutoff: float) -> Tensor:
    """Pairs [2, E] without periodicity, by torch-cluster, whose radius_graph silently keeps max_num_neighbors (32 by default)."""
    bound = FIRST_BOUND
    while True:
        source, destination = radius_graph(x, cutoff, max_num_neighbors=bound)
        if bound >= len(x) or len(source) == 0 or int(torch.bincount(destination).max()) < bound:
            return torch.stack([destination, source])
        bound *= 2


def _with_vesin(x: Tensor, cutoff: float, cell, periodic: List[bool]) -> Neighbors:
    box = np.zeros((3, 3))
    if cell is not None:
        box[periodic] = np.asarray(cell, dtype=float)[periodic]
        if not np.isfinite(box).all() or np.linalg.matrix_rank(box, tol=1e-6) < sum(periodic):
            raise ValueError(f"the cell {np.asarray(cell).tolist()} does not span its periodic directions, pbc {periodic}")
    box = complete_cell(box)
    if len(x) == 0:
        return _sorted(torch.zeros(2, 0, dtype=torch.long), None, x, cutoff)
    search = NeighborList(cutoff=cutoff, full_list=True, n_threads=1)
    pairs, images = search.compute(x.cpu().numpy(), box, periodic, quantities="PS")
    edges, shifts = torch.as_tensor(pairs.astype(np.int64).T), torch.as_tensor(images @ box)
    return _sorted(edges.to(x.device), shifts.to(x.device), x, cutoff)


def _sorted(edges: Tensor, shifts: Optional[Tensor], x: Tensor, cutoff: float) -> Neighbors:
    """Drops pairs that are not closer than the cutoff and sorts, so that every library gives the same rows."""
    if shifts is None:
        shifts = torch.zeros(edges.shape[1], 3, dtype=torch.float64, device=x.device)
    vectors = x[edges[1]] + shifts - x[edges[0]]
    keep = torch.linalg.vector_norm(vectors, dim=-1) < cutoff
    edges, shifts, vectors = edges[:, keep], shifts[keep], vectors[keep]
    keys = (*shifts.T.flip(0), edges[1], edges[0])  # the most significant last
    order = torch.as_tensor(np.lexsort([key.cpu().numpy() for key in keys]), device=x.device)
    return Neighbors(edges[:, order], shifts[order], vectors[order])
