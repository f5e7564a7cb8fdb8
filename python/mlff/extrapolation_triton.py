"""Extrapolation grades on the GPU (equation in extrapolation.py): one program an atom, for each may be of another element."""

import triton
import triton.language as tl

from .launch_triton import previous_kernel


@triton.jit
def extrapolation(
    counts, order, s, species, projection, environments, grade, F: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BF: tl.constexpr,
    BK: tl.constexpr,
):
    """grade f64 [total], caller's order; 0 for atoms that the model ignores (species -1)."""
    i = tl.program_id(0)
    f, d, k = tl.arange(0, BF), tl.arange(0, D), tl.arange(0, BK)
    previous_kernel()
    if i >= tl.load(counts):
        return
    z = tl.load(species + i)
    row, element = i.to(tl.int64), tl.maximum(z, 0)
    x = tl.zeros([D], tl.float32)
    for f0 in range(0, F, BF):
        part = tl.load(projection + (element * F + f0 + f)[:, None] * D + d[None, :])
        x += tl.sum(part * tl.load(s + row * F + f0 + f)[:, None], 0)
    least = tl.full([BK], float("inf"), tl.float32)
    for k0 in range(0, K, BK):
        away = tl.load(environments + (element * K + k0 + k)[:, None] * D + d[None, :]) - x[None, :]
        least = tl.minimum(least, tl.sum(away * away, 1))
    found = tl.sqrt(tl.min(least, 0).to(tl.float64))
    tl.store(grade + tl.load(order + i), tl.where(z >= 0, found, 0.0))
