"""Readout: values by hand, analytic gradient against autograd."""

import math

import pytest
import torch
from inputs import FEATURES as F
from inputs import isolated_pairs, without_update
from reference import random_model
from torch.autograd import grad

from mlff.readout import readout, readout_backward

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def test_values():
    """Two features, one hidden unit: e = 3 silu(s_1 + 2 s_2 - 1) + 0.5."""
    s = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    w1 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    e = readout(s, w1, torch.tensor([-1.0]).double(), torch.tensor([3.0]).double(), torch.tensor(0.5).double())
    expected = [3 * h / (1 + math.exp(-h)) + 0.5 for h in (0.0, 1.0, -2.0)]
    torch.testing.assert_close(e, torch.tensor(expected, dtype=torch.float64), **TIGHT)


def test_backward(normal):
    s = normal(5, F).requires_grad_()
    w1, b1, w2, b2 = normal(F, F // 2), normal(F // 2), normal(F // 2), normal()
    (expected,) = grad(readout(s, w1, b1, w2, b2).sum(), s)
    torch.testing.assert_close(readout_backward(s.detach(), w1, b1, w2), expected, **TIGHT)


def test_gradcheck(normal):
    inputs = tuple(t.requires_grad_() for t in (normal(3, 4), normal(4, 2), normal(2), normal(2), normal()))
    assert torch.autograd.gradcheck(readout, inputs)
    assert torch.autograd.gradgradcheck(readout, inputs, atol=1e-4)


def test_no_atoms(normal):
    assert readout(normal(0, F), normal(F, 4), normal(4), normal(4), normal()).shape == (0,)


@pytest.mark.parametrize("features", [16, 48, 128])
def test_kernel(features, assert_kernel_agrees):
    """Atoms without neighbours: the energies are the readout of the embedding, plus shifts; and pairs, for the gradient."""
    model = without_update(random_model(features, 1))
    assert_kernel_agrees(model, isolated_pairs("CO", [9.0] * 5))
    assert_kernel_agrees(model, isolated_pairs("OH", [1.5, 2.0, 3.0]))
