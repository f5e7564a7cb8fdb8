"""The search among all pairs as a kernel of its own; in a model's plan it is in one with the radial basis (filter_triton.pairs_radial)."""

import triton
import triton.language as tl

from mlff.launch_triton import previous_kernel
from mlff.neighbors_triton import DENSE, EDGES, bounds, search_row, search_stages


@triton.jit
def pairs_dense(counts, positions, elements, structure, starts, boxes, images, cutoff, flags, order, species, caller_positions, caller_box,
                caller_atoms, units, edge_count, neighbors, geometry, distance, reverse, slot, edge_capacity, candidate_capacity, BLOCK: tl.constexpr):
    """Edges of one row among all pairs of its structure. Rows are the caller's atoms; ghosts have edges to local atoms only."""
    row = tl.program_id(0)
    n_local, n_total, b, element = tl.load(counts), tl.load(counts + 1), tl.load(structure + row), tl.load(elements + row)
    limit_d, seen0, seen1 = tl.load(cutoff), tl.load(flags), tl.load(flags + 1)
    length, narrow = tl.load(units), tl.load(units + 3).to(tl.int32) != 0
    start, end, n0, n1, n2 = bounds(b, starts, images)
    previous_kernel()
    if row >= n_total:
        return
    search_row(row, n_local, b, element, start, end, n0, n1, n2, limit_d, seen0, seen1, length, narrow, positions, elements, boxes, flags,
               order, species, caller_positions, caller_box, caller_atoms, edge_count, neighbors, geometry, distance, reverse, slot,
               edge_capacity, candidate_capacity, BLOCK)


def searches(plan):
    """Stages of both searches, without a model."""
    plan.launch("pairs_dense", pairs_dense, warps=4, BLOCK=128)
    return search_stages(plan, [plan.stage("pairs_dense", [*DENSE.split(), *EDGES], ["total", 1, 1])])
