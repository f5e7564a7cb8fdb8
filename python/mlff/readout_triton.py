"""Readout on the GPU: atomic energies and their gradient at once (equations in readout.py)."""

import triton
import triton.language as tl

from .dense_triton import halves, halves_product, product, silu, silu_slope


@triton.jit
def readout(
    counts, s, species, w1, b1, w2, b2, shift, repulsion_energy, row_energy, g, F: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, EXIT: tl.constexpr,
):
    """row_energy f64 [local]: readout, shift of the element and repulsion; g [total, 4F]: dE/ds in the first F columns.

    Atoms that the model ignores (species -1) have neither.
    """
    first = tl.program_id(0) * BM
    if EXIT:
        if first >= tl.load(counts):
            return
    i = first + tl.arange(0, BM)
    row = i.to(tl.int64)[:, None]
    z = tl.load(species + i)
    known = z >= 0
    m = tl.arange(0, M)
    h = tl.zeros([BM, M], tl.float32) + tl.load(b1 + m)[None, :]
    for k0 in range(0, F, BK):
        k = k0 + tl.arange(0, BK)
        h += product(tl.load(s + row * F + k[None, :]), w1 + k[:, None] * M + m[None, :], F * M)
    weight = tl.load(w2 + m)[None, :]
    energy = (tl.sum(silu(h) * weight, 1) + tl.load(b2)).to(tl.float64) + tl.load(shift + tl.maximum(z, 0))
    energy += tl.load(repulsion_energy + i)
    tl.store(row_energy + i, tl.where(known, energy, 0.0))
    hi, lo, scale = halves(tl.where(known[:, None], silu_slope(h) * weight, 0.0))
    for k0 in range(0, F, BK):
        k = k0 + tl.arange(0, BK)
        g_s = halves_product(hi, lo, w1 + k[None, :] * M + m[:, None], F * M) * scale
        tl.store(g + row * (4 * F) + k[None, :], g_s)
