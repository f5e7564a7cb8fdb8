"""Update layer: values by hand, analytic gradient against autograd, equivariance, vanishing vectors."""

import pytest
import torch
from inputs import FEATURES as F
from reference import random_model
from structures import structure
from torch.autograd import grad

from mlff.update import update, update_backward

EPSILON = 1e-2
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def weights(normal):
    return normal(F, 2 * F), normal(2 * F, F), normal(F), normal(F, 3 * F), normal(3 * F), EPSILON


def test_values():
    """One channel, V = U = 1, perceptron made constant (w2 = 0): a = b2, so s += a_ss + a_sv |v|^2 and v += a_vv v."""
    s, v = torch.tensor([[1.0]]), torch.tensor([[[3.0], [0.0], [4.0]]])
    vu, b2 = torch.ones(1, 2), torch.tensor([0.5, 0.25, 2.0])
    s_new, v_new = update(s, v, vu, torch.ones(2, 1), torch.zeros(1), torch.zeros(1, 3), b2, EPSILON)
    torch.testing.assert_close(s_new, torch.tensor([[1.0 + 0.5 + 2.0 * 25.0]]))
    torch.testing.assert_close(v_new, 1.25 * v)


def test_norm_enters_the_perceptron():
    """w1 passes the norm only and w2 its first output only: s += silu(sqrt(|v V|^2 + epsilon))."""
    s, v = torch.tensor([[1.0]]), torch.tensor([[[3.0], [0.0], [4.0]]])
    vu, w1, w2 = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    s_new, _ = update(s, v, vu, w1, torch.zeros(1), w2, torch.zeros(3), 21.0)
    torch.testing.assert_close(s_new, 1.0 + torch.nn.functional.silu(torch.tensor([[11.0]])))


def test_backward(normal):
    s, v = normal(5, F).requires_grad_(), normal(5, 3, F).requires_grad_()
    w, g_s, g_v = weights(normal), normal(5, F), normal(5, 3, F)
    s_new, v_new = update(s, v, *w)
    expected = grad((s_new * g_s).sum() + (v_new * g_v).sum(), (s, v))
    for a, b in zip(update_backward(g_s, g_v, s.detach(), v.detach(), *w), expected):
        torch.testing.assert_close(a, b, **TIGHT)


def test_backward_at_vanishing_vectors(normal):
    """An atom without neighbours has v = 0: the gradients are finite and agree with autograd."""
    s, v = normal(2, F).requires_grad_(), torch.zeros(2, 3, F, dtype=torch.float64, requires_grad=True)
    w, g_s, g_v = weights(normal), normal(2, F), normal(2, 3, F)
    s_new, v_new = update(s, v, *w)
    expected = grad((s_new * g_s).sum() + (v_new * g_v).sum(), (s, v))
    for a, b in zip(update_backward(g_s, g_v, s.detach(), v.detach(), *w), expected):
        assert bool(torch.isfinite(a).all())
        torch.testing.assert_close(a, b, **TIGHT)


def test_rotation(normal):
    """Scalars do not change and vectors rotate, for rotations and reflections."""
    s, v, w = normal(4, F), normal(4, 3, F), weights(normal)
    q, _ = torch.linalg.qr(normal(3, 3))
    s_new, v_new = update(s, v, *w)
    for matrix in (q, -q):
        s_turned, v_turned = update(s, torch.einsum("ab,nbf->naf", matrix, v), *w)
        torch.testing.assert_close(s_turned, s_new, **TIGHT)
        torch.testing.assert_close(v_turned, torch.einsum("ab,nbf->naf", matrix, v_new), **TIGHT)


def test_gradcheck(normal):
    s, v = normal(2, 2).requires_grad_(), normal(2, 3, 2).requires_grad_()
    w = tuple(t.requires_grad_() for t in (normal(2, 4), normal(4, 2), normal(2), normal(2, 6), normal(6)))
    w = (*w, EPSILON)
    assert torch.autograd.gradcheck(update, (s, v, *w))
    assert torch.autograd.gradgradcheck(update, (s, v, *w), atol=1e-4)


def test_no_atoms(normal):
    s, v = update(normal(0, F), normal(0, 3, F), *weights(normal))
    assert s.shape == (0, F) and v.shape == (0, 3, F)


@pytest.mark.parametrize("features", [16, 48, 64])
@pytest.mark.parametrize("name", ["ethanol", "triclinic", "isolated_atom", "single_atom"])
def test_kernel(name, features, assert_kernel_agrees):
    """One layer of messages, then the update."""
    assert_kernel_agrees(random_model(features, 1), structure(name))
