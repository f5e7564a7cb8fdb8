"""Radial basis, smooth cutoff and the filter that they feed.

PaiNN (Schuett, Unke, Gastegger, ICML 2021, eq. 7 and section 3) builds a filter per edge,

    W(d) = (sum_n w_n g_n(d) + b) f(d)

with radial functions g_n and a cutoff function f. The functions of the basis are one of

    bessel      sin(n pi d / rc) / d, n = 1..K: spherical Bessel functions of order zero (Gasteiger, Gross, Guennemann, DimeNet, ICLR 2020, eq. 7)
    gaussian    exp(-((d - c_n) a_n)^2 / 2), with centres c_n and inverse widths a_n (Schuett et al., SchNet, NeurIPS 2017)

and the cutoff function is one of

    polynomial  the envelope of DimeNet (eq. 8, p = 6), whose first and second derivatives vanish at the cutoff, so that forces and their
                slopes are continuous
    cosine      (1 + cos(pi d / rc)) / 2 (Behler, J. Chem. Phys. 134, 074106, 2011), whose second derivative jumps there

The basis of an edge is one row B(d) of K + 1 numbers, (g_n f for n = 1..K, f), so that the filter is one product B(d) @ weight with the
bias as the last row of the weight.
"""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor

RADIAL_BASES = ("bessel", "gaussian")
CUTOFF_FUNCTIONS = ("polynomial", "cosine")


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


def cosine_cutoff(d: Tensor, cutoff: float) -> Tuple[Tensor, Tensor]:
    """Cosine cutoff f(d) and its derivative; arguments and results as in :func:`cutoff_envelope`."""
    half = (0.5 * math.pi) * (1.0 - torch.clamp(d / cutoff, max=1.0))  # (1 + cos y) / 2 = sin^2((pi - y) / 2), exactly zero from rc on
    sine, cosine = torch.sin(half), torch.cos(half)
    return sine * sine, sine * cosine * (-math.pi / cutoff)


def gaussian_rows(cutoff: float, n_radial: int) -> Tensor:
    """The Gaussians of a new model: centres from 0 to the cutoff, their distance as the width.

    Returns:
        [n_radial + 1, 2] float64: centre in Angstrom and inverse width in 1/Angstrom. The last row, zeros, is a Gaussian that is one
        everywhere: that of the bias.
    """
    spacing = cutoff / max(1, n_radial - 1)
    rows = torch.zeros(n_radial + 1, 2, dtype=torch.float64)
    rows[:-1, 0] = spacing * torch.arange(n_radial)
    rows[:-1, 1] = 1.0 / spacing
    return rows


def radial_basis(
    d: Tensor, cutoff: float, cutoff_function: str, n_radial: int, gaussians: Optional[Tensor]
) -> Tuple[Tensor, Tensor]:
    """Rows B(d) of the radial basis, times the cutoff function, and their derivative.

    Args:
        d: distances [E] in Angstrom, all > 0.
        cutoff: radius rc in Angstrom.
        cutoff_function: one of CUTOFF_FUNCTIONS.
        n_radial: number K of radial functions.
        gaussians: [K + 1, 2] as :func:`gaussian_rows` makes them; None: Bessel functions.

    Returns:
        B [E, K + 1] and dB/dd [E, K + 1]; the last column is the cutoff function itself.
    """
    d = d.unsqueeze(-1)
    f, df = cosine_cutoff(d, cutoff) if cutoff_function == "cosine" else cutoff_envelope(d, cutoff)
    if gaussians is not None:
        steepness = gaussians[:, 1].to(d.dtype)
        x = (d - gaussians[:, 0].to(d.dtype)) * steepness
        bell = torch.exp(-0.5 * x * x)
        return bell * f, bell * (df - x * steepness * f)
    n = torch.arange(1, n_radial + 1, dtype=d.dtype, device=d.device) * (math.pi / cutoff)
    sine, cosine = torch.sin(n * d) / d, torch.cos(n * d)
    basis = torch.cat([sine * f, f], dim=-1)
    slope = torch.cat([(n * cosine - sine) / d * f + sine * df, df], dim=-1)
    return basis, slope
