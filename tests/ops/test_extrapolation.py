"""Extrapolation grade: values by hand, the kernels of the core and of the GPU against the reference, what the fit must find."""

import copy

import numpy as np
import pytest
import torch
from reference import random_model
from scipy.spatial.transform import Rotation
from structures import structure

from mlff.core import MLFFInputError, Model, System
from mlff.extrapolation import Extrapolation, extrapolation_grade
from mlff.neighbors import find_neighbors
from mlff.painn import PaiNN


def with_grade(model: PaiNN, environments: int = 5, directions: int = 3) -> PaiNN:
    """A copy with random parameters of the grade."""
    generator = torch.Generator().manual_seed(3)
    model, s = copy.deepcopy(model), len(model.config.species)
    projection = torch.randn(s, model.config.features, directions, generator=generator)
    centres = torch.randn(s, environments, directions, generator=generator)
    model.extrapolation = Extrapolation(projection, centres, torch.tensor([[0.0, 1.0], [0.05, 0.2]]))
    return model


def expected(model: PaiNN, atoms) -> np.ndarray:
    edges, _, r = find_neighbors(atoms.positions, model.config.cutoff, atoms.cell.array, atoms.pbc)
    return copy.deepcopy(model).double().extrapolation_grade(torch.from_numpy(atoms.numbers), edges, r).numpy()


def test_values():
    """Two elements, two features, one direction: the first with environments at 1 and 5, the second at -2 alone."""
    projection = torch.tensor([[[1.0], [0.0]], [[1.0], [2.0]]])
    environments = torch.tensor([[[1.0], [5.0]], [[-2.0], [-2.0]]])
    s = torch.tensor([[1.5, 7.0], [3.5, 0.0], [0.0, 0.0], [1.0, 1.0]])
    grades = extrapolation_grade(s, torch.tensor([0, 0, 1, 1]), projection, environments)
    torch.testing.assert_close(grades, torch.tensor([0.5, 1.5, 2.0, 5.0]))


def test_invariance():
    model, atoms = with_grade(random_model(16, 2)), structure("mixed_elements")
    order, turned = np.random.default_rng(0).permutation(len(atoms)), atoms.copy()
    turned.positions = Rotation.random(random_state=1).apply(atoms.positions) + [3.0, -1.0, 2.0]
    np.testing.assert_allclose(expected(model, turned[order]), expected(model, atoms)[order], rtol=1e-10)


@pytest.mark.parametrize("features, layers", [(16, 1), (48, 2), (32, 3)])
@pytest.mark.parametrize("name", ["mixed_elements", "triclinic", "single_atom"])
def test_core(name, features, layers, save_payload):
    model, atoms = with_grade(random_model(features, layers)), structure(name)
    loaded = Model(save_payload(model))
    assert loaded.has_extrapolation_grade
    for threads in (1, 2):
        system = System(loaded, threads=threads)
        system.set_atoms([*atoms.numbers, -1])  # an atom that the model ignores has the grade 0
        positions = np.concatenate([atoms.positions, [[0.1, 0.2, 0.3]]])
        for others in ([], ["energy", "forces"]):
            found = system.compute(positions, atoms.cell.array, atoms.pbc, ["extrapolation_grade", *others])["extrapolation_grade"]
            np.testing.assert_allclose(found, [*expected(model, atoms), 0.0], rtol=2e-5)


def test_batch(save_payload):
    model = with_grade(random_model(16, 2))
    frames = [structure(name) for name in ("ethanol", "water_dimer", "single_atom")]
    system = System(Model(save_payload(model)))
    system.set_atoms(np.concatenate([a.numbers for a in frames]))
    system.set_structures(np.cumsum([0] + [len(a) for a in frames]))
    positions = np.concatenate([a.positions for a in frames])
    found = system.compute_batch(positions, want=["extrapolation_grade"])["extrapolation_grade"]
    np.testing.assert_allclose(found, np.concatenate([expected(model, a) for a in frames]), rtol=2e-5)


def test_a_model_without(save_payload):
    model, atoms = random_model(16, 1), structure("ethanol")
    system = System(Model(save_payload(model)))
    system.set_atoms(atoms.numbers)
    with pytest.raises(MLFFInputError, match="has no extrapolation grade; `mlff train` fits one"):
        system.compute(atoms.positions, want=["extrapolation_grade"])
    with pytest.raises(ValueError, match="has no extrapolation grade; `mlff train` fits one"):
        expected(model, atoms)


@pytest.mark.parametrize("features, layers", [(16, 1), (48, 2)])
def test_gpu_kernel(features, layers):
    """The kernel with the plan around it; rows are not in the caller's order, numbers of directions and features are no powers of two."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from plan_runner import PlanRunner

    from mlff.export import cuda_tensors, plan_tensors
    from mlff.plan import cuda_plan

    model, atoms = with_grade(random_model(features, layers)), structure("mixed_elements")
    m64, device = copy.deepcopy(model).double(), "cuda" if torch.cuda.is_available() else "cpu"
    plan = cuda_plan(model.config, (5, 3))
    runner = PlanRunner(plan, {**plan_tensors(m64), **cuda_tensors(m64)}, model.config.cutoff, device, "list")
    runner.set_atoms([*model.species_index(torch.from_numpy(atoms.numbers)), -1], edge_capacity=64, candidate_capacity=256)
    runner.arrays["grade"] = torch.full((len(atoms) + 1,), 7.0, dtype=torch.float64, device=device)
    runner.compute(np.concatenate([atoms.positions, [[0.1, 0.2, 0.3]]]))
    runner.run(runner.dict["grade"])
    np.testing.assert_allclose(runner.arrays["grade"].cpu(), [*expected(model, atoms), 0.0], rtol=2e-5)


def test_plans_without_are_what_they_were():
    from mlff.plan import cpu_plan, cuda_plan

    config = random_model(16, 2).config
    for plan, other in ((cpu_plan(config), cpu_plan(config, True)), (cuda_plan(config), cuda_plan(config, (8, 4)))):
        plain, graded = plan.to_dict(), other.to_dict()
        assert "grade" not in plain and graded.pop("grade") and graded == plain
