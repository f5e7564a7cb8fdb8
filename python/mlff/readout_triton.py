"""Readout on the GPU: atomic energies and their gradient at once (equations in readout.py, the form of the kernel in dense_triton.py)."""

import triton
import triton.language as tl

from .dense_triton import halves, halves_product, place, product, silu, silu_slope, weights
from .launch_triton import previous_kernel, together


@triton.jit
def readout(
    counts, s, species, w1, b1, w2, b2, shift, repulsion_energy, row_energy, g, F: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EXIT: tl.constexpr,
):
    """row_energy f64 [local]: readout, shift of the element and repulsion; g [total, 4F]: dE/ds in the first F columns.

    Atoms that the model ignores (species -1) have neither. The hidden layer is half as wide as others: each program has all of it.
    """
    row, c = place(F // BN, BM, BN)
    i = tl.program_id(0) // (F // BN) * BM + tl.arange(0, BM)
    k, m = tl.arange(0, BK), tl.arange(0, M)
    w_hi, w_lo = weights(w1 + k[:, None] * M + m[None, :], F * M)
    t_hi, t_lo = weights(w1 + c * M + m[:, None], F * M)
    bias, weight, constant = tl.load(b1 + m)[None, :], tl.load(w2 + m)[None, :], tl.load(b2)
    z, n = tl.load(species + i), tl.load(counts)
    known = z >= 0
    fixed = tl.load(shift + tl.maximum(z, 0)) + tl.load(repulsion_energy + i)
    if not EXIT:
        w_hi, w_lo, t_hi, t_lo = together(w_hi, w_lo, t_hi, t_lo)
    previous_kernel()
    if EXIT:
        if tl.program_id(0) // (F // BN) * BM >= n:
            return
    h = product(tl.load(s + row * F + k[None, :]), w_hi, w_lo) + bias
    for k0 in tl.static_range(BK, F, BK):
        w_hi, w_lo = weights(w1 + (k0 + k)[:, None] * M + m[None, :], F * M)
        h += product(tl.load(s + row * F + k0 + k[None, :]), w_hi, w_lo)
    if tl.program_id(0) % (F // BN) == 0:
        energy = (tl.sum(silu(h) * weight, 1) + constant).to(tl.float64) + fixed
        tl.store(row_energy + i, tl.where(known, energy, 0.0))
    hi, lo, scale = halves(tl.where(known[:, None], silu_slope(h) * weight, 0.0))
    tl.store(g + row * (4 * F) + c, halves_product(hi, lo, scale, t_hi, t_lo))
