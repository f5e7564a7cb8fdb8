"""Message layers: values by hand, analytic gradients against autograd, the first layer against the general one."""

import pytest
import torch
from inputs import CUTOFF, N_RADIAL, SPECIES, without_update
from inputs import FEATURES as F
from reference import random_model
from structures import structure
from torch.autograd import grad

from mlff.filter import radial_basis
from mlff.message import (
    edge_vector_gradient,
    message,
    message_backward,
    message_first,
    message_first_backward,
    message_first_weights,
    silu_slope,
    source_features,
    source_features_backward,
)

K = N_RADIAL + 1
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def test_silu_slope():
    h = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    (expected,) = grad(torch.nn.functional.silu(h).sum(), h)
    torch.testing.assert_close(silu_slope(h), expected, **TIGHT)
    assert silu_slope(torch.zeros(1)).item() == 0.5


def test_message_values():
    """Two atoms, one edge 0 <- 1 along z, one channel: s_0 += x_s w_s; v_0 += u x_vs w_vs + v_1 x_vv w_vv."""
    x = torch.tensor([[9.0, 9.0, 9.0], [2.0, 3.0, 5.0]])
    v = torch.tensor([[[1.0], [0.0], [0.0]], [[0.0], [7.0], [1.0]]])
    s = torch.tensor([[10.0], [20.0]])
    weight = torch.tensor([[1.0, 2.0, 0.5]])
    s_new, v_new = message(x, v, s, torch.tensor([[0], [1]]), torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.1]]), weight)
    # filter = 0.1 * (1, 2, 0.5); messages = (0.2, 0.6, 0.25)
    torch.testing.assert_close(s_new, torch.tensor([[10.2], [20.0]]))
    torch.testing.assert_close(v_new, torch.tensor([[[1.0], [1.75], [0.85]], [[0.0], [7.0], [1.0]]]))


def test_source_features_backward(normal):
    s, w1, b1, w2, b2 = normal(4, F).requires_grad_(), normal(F, F), normal(F), normal(F, 3 * F), normal(3 * F)
    g_x = normal(4, 3 * F)
    (expected,) = grad((source_features(s, w1, b1, w2, b2) * g_x).sum(), s)
    torch.testing.assert_close(source_features_backward(g_x, s.detach(), w1, b1, w2), expected, **TIGHT)


def geometry(vectors):
    """Everything that depends on the edge vectors, so that autograd can differentiate by them."""
    d = torch.linalg.vector_norm(vectors, dim=-1)
    basis, slope = radial_basis(d, CUTOFF, "polynomial", N_RADIAL, None)
    return d, vectors / d.unsqueeze(-1), basis, slope


def test_message_backward(graph, normal):
    x, v, s = normal(graph.n, 3 * F).requires_grad_(), normal(graph.n, 3, F).requires_grad_(), normal(graph.n, F)
    weight, g_s, g_v = normal(K, 3 * F), normal(graph.n, F), normal(graph.n, 3, F)
    r = graph.vectors.clone().requires_grad_()
    _, unit, basis, _ = geometry(r)
    s_new, v_new = message(x, v, s, graph.edges, unit, basis, weight)
    expected = grad((s_new * g_s).sum() + (v_new * g_v).sum(), (x, v, r), allow_unused=True, materialize_grads=True)
    found = message_backward(g_s, g_v, x.detach(), v.detach(), graph.edges, graph.unit, graph.d, graph.basis, graph.slope, weight)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, **TIGHT)


def test_message_first_backward(graph, normal):
    embedding, q_s, q_v = normal(SPECIES, F), normal(SPECIES * K, F), normal(SPECIES * K, F)
    g_s, g_v = normal(graph.n, F), normal(graph.n, 3, F)
    r = graph.vectors.clone().requires_grad_()
    _, unit, basis, _ = geometry(r)
    s, v = message_first(embedding, q_s, q_v, graph.species, graph.edges, unit, basis)
    (expected,) = grad((s * g_s).sum() + (v * g_v).sum(), (r,), allow_unused=True, materialize_grads=True)
    found = message_first_backward(g_s, g_v, q_s, q_v, graph.species, graph.edges, graph.unit, graph.d, graph.basis, graph.slope)
    torch.testing.assert_close(found, expected, **TIGHT)


def test_message_first_is_message_without_vectors(graph, normal):
    """With v = 0 and features that depend on the element only, the general layer gives the same s, v and edge gradients."""
    embedding, weight, x_species = normal(SPECIES, F), normal(K, 3 * F), normal(SPECIES, 3 * F)
    q_s, q_v = message_first_weights(x_species, weight)
    x, v0, s0 = x_species[graph.species], torch.zeros(graph.n, 3, F, dtype=torch.float64), embedding[graph.species]
    first = message_first(embedding, q_s, q_v, graph.species, graph.edges, graph.unit, graph.basis)
    for a, b in zip(first, message(x, v0, s0, graph.edges, graph.unit, graph.basis, weight)):
        torch.testing.assert_close(a, b, **TIGHT)
    g_s, g_v = normal(graph.n, F), normal(graph.n, 3, F)
    rest = (graph.unit, graph.d, graph.basis, graph.slope)
    _, _, expected = message_backward(g_s, g_v, x, v0, graph.edges, *rest, weight)
    found = message_first_backward(g_s, g_v, q_s, q_v, graph.species, graph.edges, *rest)
    torch.testing.assert_close(found, expected, **TIGHT)


def test_order_of_pairs_does_not_matter(graph, normal):
    x, v, s, weight = normal(graph.n, 3 * F), normal(graph.n, 3, F), normal(graph.n, F), normal(K, 3 * F)
    order = torch.randperm(graph.edges.shape[1], generator=torch.Generator().manual_seed(2))
    a = message(x, v, s, graph.edges, graph.unit, graph.basis, weight)
    b = message(x, v, s, graph.edges[:, order], graph.unit[order], graph.basis[order], weight)
    for left, right in zip(a, b):
        torch.testing.assert_close(left, right, **TIGHT)


def test_without_edges_nothing_changes(normal):
    """Zero edges, with and without atoms."""
    for n in (0, 1, 3):
        s, v, none = normal(n, F), normal(n, 3, F), torch.zeros(2, 0, dtype=torch.long)
        s_new, v_new = message(normal(n, 3 * F), v, s, none, normal(0, 3), normal(0, K), normal(K, 3 * F))
        assert torch.equal(s_new, s) and torch.equal(v_new, v)


def test_gradcheck(normal):
    """First and second derivatives of both layers by finite differences; training needs the second."""
    edges, species = torch.tensor([[0, 0, 1, 2], [1, 2, 0, 0]]), torch.tensor([0, 1, 0])
    r = (normal(4, 3) / 2 + 0.7).requires_grad_()
    x, v, s = normal(3, 6).requires_grad_(), normal(3, 3, 2).requires_grad_(), normal(3, 2).requires_grad_()
    weight = (0.3 * normal(K, 6)).requires_grad_()
    embedding, q = normal(2, 2).requires_grad_(), (0.3 * normal(2 * K, 2)).requires_grad_()

    def general(x, v, s, r, weight):
        _, unit, basis, _ = geometry(r)
        return message(x, v, s, edges, unit, basis, weight)

    def first(embedding, q, r):
        _, unit, basis, _ = geometry(r)
        return message_first(embedding, q, q, species, edges, unit, basis)

    assert torch.autograd.gradcheck(general, (x, v, s, r, weight))
    assert torch.autograd.gradcheck(first, (embedding, q, r))
    assert torch.autograd.gradgradcheck(general, (x, v, s, r, weight), atol=1e-4)
    assert torch.autograd.gradgradcheck(first, (embedding, q, r), atol=1e-4)


@pytest.mark.parametrize("along", [[1.0, 0.0, 0.0], [0.6, 0.0, 0.8]])
def test_edge_vector_gradient_values(along):
    """A gradient with respect to u along u itself has no effect (u has length 1); across it is divided by the distance."""
    u, g_d = torch.tensor([along]), torch.tensor([3.0])
    torch.testing.assert_close(edge_vector_gradient(g_d, 5 * u, u, torch.tensor([2.0])), 3 * u)
    across = torch.tensor([[0.0, 4.0, 0.0]])
    torch.testing.assert_close(edge_vector_gradient(g_d, across, u, torch.tensor([2.0])), 3 * u + across / 2)


STRUCTURES = ["ethanol", "triclinic", "small_cell", "isolated_atom", "single_atom", "dense_cluster"]


@pytest.mark.parametrize("name", STRUCTURES)
def test_kernel_of_the_first_layer(name, assert_kernel_agrees):
    assert_kernel_agrees(without_update(random_model(16, 1)), structure(name))


@pytest.mark.parametrize("features", [16, 48, 64])
@pytest.mark.parametrize("name", STRUCTURES)
def test_kernels(name, features, assert_kernel_agrees):
    """Source features and messages of the second layer, whose vectors count through the update layer behind it."""
    model = random_model(features, 2)
    model.layers[0].update["w2"].zero_()
    model.layers[0].update["b2"].fill_(0.3)
    assert_kernel_agrees(model, structure(name))
