"""Update layer of PaiNN (Schuett, Unke, Gastegger, ICML 2021, eqs. 9 and 10) and its analytic gradient.

    (p, q) = (v V, v U)                                  channel mixing of the vectors, no bias
    n      = sqrt(sum_xyz p^2 + epsilon)
    (a_ss, a_vv, a_sv) = silu([s, n] w1 + b1) w2 + b2
    s += a_ss + a_sv sum_xyz p q
    v += a_vv q
"""

from typing import Tuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from .message import silu_slope


def channel_norm(p: Tensor, epsilon: float) -> Tensor:
    """Length [N, F] of each vector of p [N, 3, F], rounded off at sqrt(epsilon) (painn.PaiNNConfig.norm_epsilon)."""
    return torch.sqrt((p * p).sum(1) + epsilon)


def update(s: Tensor, v: Tensor, vu: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, epsilon: float) -> Tuple[Tensor, Tensor]:
    """New s [N, F] and v [N, 3, F].

    Args:
        s, v: scalar [N, F] and vector [N, 3, F] features.
        vu: [F, 2F], the matrices V and U side by side.
        w1, b1, w2, b2: [2F, F], [F], [F, 3F], [3F].
        epsilon: of the norm.
    """
    p, q = torch.chunk(v @ vu, 2, dim=-1)
    norm = channel_norm(p, epsilon)
    a_ss, a_vv, a_sv = torch.chunk(silu(torch.cat([s, norm], dim=-1) @ w1 + b1) @ w2 + b2, 3, dim=-1)
    return s + a_ss + a_sv * (p * q).sum(1), v + a_vv.unsqueeze(1) * q


def update_backward(
    g_s: Tensor, g_v: Tensor, s: Tensor, v: Tensor, vu: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, epsilon: float
) -> Tuple[Tensor, Tensor]:
    """Gradients with respect to the inputs s and v of :func:`update`, given those with respect to its outputs."""
    n_features = s.shape[1]
    p, q = torch.chunk(v @ vu, 2, dim=-1)
    norm = channel_norm(p, epsilon)
    h = torch.cat([s, norm], dim=-1) @ w1 + b1
    _, a_vv, a_sv = torch.chunk(silu(h) @ w2 + b2, 3, dim=-1)
    g_a = torch.cat([g_s, (g_v * q).sum(1), g_s * (p * q).sum(1)], dim=-1)
    g_context = (g_a @ w2.t() * silu_slope(h)) @ w1.t()
    g_pq = (g_s * a_sv).unsqueeze(1)
    g_p = g_pq * q + (g_context[:, n_features:] / norm).unsqueeze(1) * p
    g_q = g_pq * p + g_v * a_vv.unsqueeze(1)
    return g_s + g_context[:, :n_features], g_v + torch.cat([g_p, g_q], dim=-1) @ vu.t()
