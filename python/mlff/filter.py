"""Radial basis, smooth cutoff and the filter that they feed.

PaiNN (Schuett, Unke, Gastegger, ICML 2021, eq. 7 and section 3) builds a filter per edge,

    W(d) = (sum_n w_n sin(n pi d / rc) / d + b) f(d)

with a cutoff function f. Here f is the polynomial envelope of DimeNet (Gasteiger, Gross, Guennemann, ICLR 2020, eq. 8,
p = 6), whose first and second derivatives vanish at the cutoff, so that forces and their slopes are continuous.

The basis of an edge is one row B(d) of K + 1 numbers, (sin(n pi d / rc) f / d for n = 1..K, f), so that the filter is one
product B(d) @ weight with the bias as the last row of the weight.
"""

import math
from typing import Tuple

import torch
from torch import Tensor


def cutoff_envelope(d: Tensor, cutoff: float) -> Tuple[Tensor, Tensor]:
    """Polynomial cutoff f(d) and its derivative.

    Args:
        d: distances in Angstrom, any shape.
        cutoff: radius rc in Angstrom.

    Returns:
        f (1 at d = 0, 0 at d >= rc) and df/dd in 1/Angstrom, shaped as d.
    """
    x = torch.clamp(d / cutoff, max=1.0)
    x5 = x * x * x * x * x
    f = 1.0 + x5 * x * (-28.0 + x * (48.0 - 21.0 * x))
    df = x5 * (-168.0 + x * (336.0 - 168.0 * x)) / cutoff
    return f, df


def radial_basis(d: Tensor, cutoff: float, n_radial: int) -> Tuple[Tensor, Tensor]:
    """Rows B(d) of the radial basis, times the cutoff function, and their derivative.

    Args:
        d: distances [E] in Angstrom, all > 0.
        cutoff: radius rc in Angstrom.
        n_radial: number K of sine functions.

    Returns:
        B [E, K + 1] and dB/dd [E, K + 1]; the last column is the cutoff function itself.
    """
    n = torch.arange(1, n_radial + 1, dtype=d.dtype, device=d.device) * (math.pi / cutoff)
    d = d.unsqueeze(-1)
    f, df = cutoff_envelope(d, cutoff)
    sine, cosine = torch.sin(n * d) / d, torch.cos(n * d)
    basis = torch.cat([sine * f, f], dim=-1)
    slope = torch.cat([(n * cosine - sine) / d * f + sine * df, df], dim=-1)
    return basis, slope
