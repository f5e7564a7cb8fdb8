"""Readout: atomic energies from the scalar features, and their gradient.

    e_i = silu(s w1 + b1) . w2 + b2        in eV, before the per-element shift
"""

from torch import Tensor
from torch.nn.functional import silu

from .message import silu_slope


def readout(s: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Atomic energies [N] in eV for s [N, F]; w1 [F, F/2], b1 [F/2], w2 [F/2], b2 []."""
    return silu(s @ w1 + b1) @ w2 + b2


def readout_backward(s: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Gradient [N, F] of the total energy with respect to s."""
    return (silu_slope(s @ w1 + b1) * w2) @ w1.t()
