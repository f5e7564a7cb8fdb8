"""Message layers of PaiNN (Schuett, Unke, Gastegger, ICML 2021, eqs. 7 and 8) and their analytic gradients.

Edges are directed: row 0 of ``edges`` is the destination i, row 1 the source j, and the edge vector is
r_ij = x_j - x_i (with the periodic shift), d its length, u = r_ij / d. With x_j the 3F features that the source sends,

    (m_s, m_vs, m_vv) = x_j * (B(d) @ weight)          three blocks of F channels
    s_i += sum_j m_s
    v_i += sum_j (u m_vs + v_j m_vv)

Vectors are stored as [N, 3, F]; products with weights mix channels F, never the axis x, y, z, which keeps the layer
equivariant. Every ``*_backward`` takes the gradient of the energy with respect to the outputs of its forward function and
returns the gradient with respect to the inputs, with no use of autograd.
"""

from typing import Tuple

import torch
from torch import Tensor
from torch.nn.functional import silu


def silu_slope(h: Tensor) -> Tensor:
    """Derivative of silu(h) = h sigmoid(h)."""
    g = torch.sigmoid(h)
    return g * (1.0 + h * (1.0 - g))


def source_features(s: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Features x [N, 3F] that atoms send: x = silu(s w1 + b1) w2 + b2, for s [N, F]."""
    return silu(s @ w1 + b1) @ w2 + b2


def source_features_backward(g_x: Tensor, s: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Gradient [N, F] with respect to s, given the gradient g_x [N, 3F] with respect to x."""
    return (g_x @ w2.t() * silu_slope(s @ w1 + b1)) @ w1.t()


def message(x: Tensor, v: Tensor, s: Tensor, edges: Tensor, unit: Tensor, basis: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Sum of the messages of all neighbours, added to the atoms' own features.

    Args:
        x: source features [N, 3F].
        v, s: vector [N, 3, F] and scalar [N, F] features.
        edges: [2, E], row 0 the destination i, row 1 the source j.
        unit: unit vectors u [E, 3] from i to j.
        basis: radial basis B [E, K + 1].
        weight: filter weight [K + 1, 3F].

    Returns:
        new s [N, F] and v [N, 3, F].
    """
    i, j = edges[0], edges[1]
    m_s, m_vs, m_vv = torch.chunk(x[j] * (basis @ weight), 3, dim=-1)
    m_v = unit.unsqueeze(-1) * m_vs.unsqueeze(1) + v[j] * m_vv.unsqueeze(1)
    return s.index_add(0, i, m_s), v.index_add(0, i, m_v)


def message_backward(
    g_s: Tensor, g_v: Tensor, x: Tensor, v: Tensor, edges: Tensor, unit: Tensor, d: Tensor, basis: Tensor, slope: Tensor, weight: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`message`.

    Args:
        g_s, g_v: gradients with respect to the outputs, [N, F] and [N, 3, F].
        d: distances [E] in Angstrom.
        slope: dB/dd [E, K + 1]. The rest as in :func:`message`.

    Returns:
        g_x [N, 3F]; the new g_v [N, 3, F], which includes the path past the layer (g_s passes unchanged); and the
        gradient with respect to the edge vectors r_ij [E, 3], in eV/Angstrom.
    """
    i, j = edges[0], edges[1]
    w = basis @ weight
    x_j, v_j, g_s_i, g_v_i = x[j], v[j], g_s[i], g_v[i]
    g_m = torch.cat([g_s_i, (unit.unsqueeze(-1) * g_v_i).sum(1), (v_j * g_v_i).sum(1)], dim=-1)
    _, m_vs, m_vv = torch.chunk(x_j * w, 3, dim=-1)
    g_x = torch.zeros_like(x).index_add(0, j, g_m * w)
    g_v = g_v.index_add(0, j, g_v_i * m_vv.unsqueeze(1))
    g_d = (g_m * x_j * (slope @ weight)).sum(-1)
    g_unit = (g_v_i * m_vs.unsqueeze(1)).sum(-1)
    return g_x, g_v, edge_vector_gradient(g_d, g_unit, unit, d)


def edge_vector_gradient(g_d: Tensor, g_unit: Tensor, unit: Tensor, d: Tensor) -> Tensor:
    """Gradient with respect to r = d u [E, 3] from those with respect to d [E] and u [E, 3]."""
    radial = (g_unit * unit).sum(-1, keepdim=True)
    return g_d.unsqueeze(-1) * unit + (g_unit - radial * unit) / d.unsqueeze(-1)


def message_first_weights(x_species: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Weights of the first layer, in which a message depends on the source's element and the distance alone.

    In layer 1, v = 0 and x_j depends on the element z of j only, so the sum over neighbours can be done on the basis rows
    first: s_i += sum_z,k A_zk(i) q_s[zk], where A_zk(i) sums B_k(d_ij) over the neighbours of element z, and likewise for the
    vectors. That is exact, and costs one small product per atom instead of one filter per edge.

    Args:
        x_species: source features of each element [S, 3F].
        weight: filter weight [K + 1, 3F].

    Returns:
        q_s and q_v, both [S (K + 1), F].
    """
    q = x_species.unsqueeze(1) * weight.unsqueeze(0)
    q_s, q_v, _ = torch.chunk(q.reshape(-1, weight.shape[1]), 3, dim=-1)
    return q_s.contiguous(), q_v.contiguous()


def message_first(
    embedding: Tensor, q_s: Tensor, q_v: Tensor, species: Tensor, edges: Tensor, unit: Tensor, basis: Tensor
) -> Tuple[Tensor, Tensor]:
    """Embedding and first message layer in one.

    Args:
        embedding: [S, F] per element.
        q_s, q_v: from :func:`message_first_weights`.
        species: element index [N] into the model's list of elements.
        edges, unit, basis: as in :func:`message`.

    Returns:
        s [N, F] and v [N, 3, F] after the layer.
    """
    n, n_species, k = species.shape[0], embedding.shape[0], basis.shape[1]
    rows = edges[0] * n_species + species[edges[1]]
    per_edge = torch.cat([torch.ones_like(unit[:, :1]), unit], dim=-1).unsqueeze(-1) * basis.unsqueeze(1)
    moments = torch.zeros([n * n_species, 4, k], dtype=basis.dtype, device=basis.device).index_add(0, rows, per_edge)
    moments = moments.reshape(n, n_species, 4, k).transpose(1, 2).reshape(n, 4, n_species * k)
    return embedding[species] + moments[:, 0] @ q_s, moments[:, 1:] @ q_v


def message_first_backward(
    g_s: Tensor, g_v: Tensor, q_s: Tensor, q_v: Tensor, species: Tensor, edges: Tensor, unit: Tensor, d: Tensor, basis: Tensor, slope: Tensor
) -> Tensor:
    """Gradient of :func:`message_first` with respect to the edge vectors r_ij [E, 3], in eV/Angstrom."""
    n, k = species.shape[0], basis.shape[1]
    g_moments = torch.cat([(g_s @ q_s.t()).unsqueeze(1), g_v @ q_v.t()], dim=1).reshape(n, 4, q_s.shape[0] // k, k)
    g = g_moments[edges[0], :, species[edges[1]]]
    g_d = ((g[:, 0] + (unit.unsqueeze(-1) * g[:, 1:]).sum(1)) * slope).sum(-1)
    g_unit = (g[:, 1:] * basis.unsqueeze(1)).sum(-1)
    return edge_vector_gradient(g_d, g_unit, unit, d)
