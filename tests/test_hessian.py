"""The comparison of examples/train/hessian: Hessian-vector products of student and teacher, and that the script runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from reference import random_model

pytest.importorskip("scipy", reason="structures are displaced with SciPy")
pytest.importorskip("pydantic", reason="training is not installed: pip install 'mlff[train]'")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "train" / "hessian"))

import compare  # noqa: E402

from mlff.train.data import Graphs, collate, make_graphs  # noqa: E402
from mlff.train.fit import predict  # noqa: E402

WATER, ETHANOL = molecule("H2O"), molecule("CH3CH2OH")
NO_TEACHER = "the teacher aimnet2 is not installed: pip install auto3d==2.3.1"


def graphs(moved: list[Atoms]) -> Graphs:
    for atoms in moved:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    return collate(make_graphs(moved, 5.0))


def displaced(direction: np.ndarray, step: float) -> list[Atoms]:
    """Water and ethanol, moved by `step` along a direction of both."""
    result = [WATER.copy(), ETHANOL.copy()]
    for atoms, d in zip(result, np.split(direction, [len(WATER)])):
        atoms.positions += step * d
    return result


def test_product_of_a_student_is_the_difference_of_its_forces():
    model, step = random_model(16, 2).double(), 1e-5
    direction = np.random.default_rng(1).normal(size=(len(WATER) + len(ETHANOL), 3))
    batch = graphs(displaced(direction, 0.0))
    energy, forces, _, product = compare.student_product(model, batch, torch.tensor(direction), create_graph=False)
    assert torch.allclose(energy, predict(model, batch)[0]) and torch.allclose(forces, predict(model, batch)[1])
    ahead, behind = (predict(model, graphs(displaced(direction, s)))[1] for s in (step, -step))
    expected = -(ahead - behind) / (2 * step)
    assert expected.abs().max() > 10
    assert torch.allclose(product, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_weights_follow_the_error_of_the_product():
    """The gradient of a loss of products with respect to a weight, against differences."""
    model = random_model(16, 1).double().requires_grad_(True)
    direction = torch.tensor(np.random.default_rng(2).normal(size=(len(WATER) + len(ETHANOL), 3)))
    batch, weight, step = graphs(displaced(direction.numpy(), 0.0)), model.layers[0].filter, 1e-5

    def loss() -> torch.Tensor:
        return compare.student_product(model, batch, direction, create_graph=True)[3].square().mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[3, 5] += sign * step
        values.append(float(loss().detach()))
        with torch.no_grad():
            weight[3, 5] -= sign * step
    assert float(gradient[3, 5]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_hessian_is_symmetric_and_free_of_translations():
    hessian = compare.hessian(random_model(16, 1).double(), ETHANOL)
    assert np.allclose(hessian, hessian.T, atol=1e-9 * abs(hessian).max())
    assert np.allclose(hessian @ np.tile(np.eye(3), (len(ETHANOL), 1)), 0.0, atol=1e-9 * abs(hessian).max())


def test_product_of_the_teacher_is_the_difference_of_its_forces():
    pytest.importorskip("Auto3D", reason=NO_TEACHER)
    # noise of 4e-6 eV/A is left in the forces, as of float32 somewhere within the model: it needs a longer step than the student
    members, step = [member.double() for member in compare.members()], 1e-3
    numbers, x = torch.zeros(2, len(ETHANOL), dtype=torch.long), torch.zeros(2, len(ETHANOL), 3, dtype=torch.float64)
    v = torch.tensor(np.random.default_rng(3).normal(size=x.shape))
    for row, atoms in enumerate((WATER, ETHANOL)):  # a molecule that is filled up, and one that is not
        numbers[row, : len(atoms)], x[row, : len(atoms)] = torch.tensor(atoms.numbers), torch.tensor(atoms.positions)
    v[numbers == 0] = 0.0
    _, forces, product = compare.teacher_product(members, numbers, x, v)
    ahead, behind = (compare.teacher_product(members, numbers, x + s * v, v)[1] for s in (step, -step))
    expected = -(ahead - behind) / (2 * step)
    assert torch.allclose(product, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    labels = compare.load_teacher("aimnet2").evaluate([WATER, ETHANOL])
    assert np.allclose(labels[1]["forces"], forces[1], atol=1e-4)  # the teacher that mlff train asks, in float32
    assert np.allclose(labels[0]["forces"], forces[0, :3], atol=1e-4)


def test_the_comparison_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("Auto3D", reason=NO_TEACHER)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "quick.json"), "--quick", "--seeds", "1"])
    compare.main()
    content = json.loads((tmp_path / "quick.json").read_text())
    assert [run["variant"] for run in content["runs"]] == list(compare.VARIANTS)
    assert all(np.isfinite([number(run) for _, number in compare.SHOWN]).all() for run in content["runs"])
    assert (tmp_path / "quick.png").stat().st_size > 1000
    dropped = content["runs"].pop(0)
    (tmp_path / "quick.json").write_text(json.dumps(content))
    monkeypatch.setattr(compare, "make_data", None)  # labels are kept
    compare.main()
    made = json.loads((tmp_path / "quick.json").read_text())["runs"][-1]
    assert {**made, "ms_per_step": 0, "date": ""} == {**dropped, "ms_per_step": 0, "date": ""}
    monkeypatch.setattr(compare, "QUICK", replace(compare.QUICK, steps=4))
    monkeypatch.setattr(compare, "make_data", lambda settings: {"held_out_molecules": 1, "teacher_seconds": {}})
    with pytest.raises(SystemExit, match="other settings"):
        compare.main()
