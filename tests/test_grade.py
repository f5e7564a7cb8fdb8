"""The extrapolation grade as a user meets it: what the fit must find, the checkpoint, ASE, the checks of mlff validate."""

import copy
import json

import numpy as np
import pytest
import torch
from ase.calculators.calculator import PropertyNotImplementedError
from labels import with_labels
from reference import random_model
from safetensors.torch import load_file, save_file
from structures import ethanol, water_dimer

from mlff import cli
from mlff.ase import MLFFCalculator
from mlff.export import export
from mlff.painn import load_checkpoint, save_checkpoint
from mlff.train.data import graph
from mlff.train.extrapolation import QUANTILE, UNKNOWN, calibrate, discriminants, fit_extrapolation, grades
from mlff.validate import organics
from mlff.validate.checks import Case, extrapolation


def labelled_zero(atoms):
    return with_labels(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))


def waters(count: int, seed: int) -> list:
    """Water dimers with small displacements, labelled with zeros: the fit needs no more than numbers."""
    rng, frames = np.random.default_rng(seed), []
    for _ in range(count):
        atoms = water_dimer()
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        frames.append(labelled_zero(atoms))
    return frames


@pytest.fixture(scope="module")
def student():
    """A model with random weights that knows H, C and O, with the grade of water alone."""
    model = random_model(32, 2)
    data = [[graph(atoms, 5.0, k) for k, atoms in enumerate(waters(n, seed))] for seed, n in enumerate((80, 30))]
    model.extrapolation = fit_extrapolation(model, *data, max_edges=2000, device="cpu")
    return model


@pytest.fixture(scope="module")
def files(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grade")
    save_checkpoint(student, folder / "student.safetensors")
    return folder / "student.safetensors", export(folder / "student.safetensors", folder / "student.pt", architectures=())


def test_directions_are_those_in_which_environments_differ():
    """Two environments, 4 apart in x where each fluctuates by 0.1, in a noise of 10 in y, which a plain variance would follow."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(400, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 10.0, 0.1], dtype=torch.float64)
    s[::2, 0] += 4.0
    projection, environments = discriminants(s, 2)
    points = torch.tensor([[2.0, 0.0, 0.0], [4.0, 9.0, 0.0], [0.0, -9.0, 0.0]], dtype=torch.float64) @ projection
    between, *inside = torch.cdist(points, environments).min(1).values.tolist()
    assert between > 3 * max(inside)


def test_calibration_never_falls():
    grade = np.linspace(0, 2, 1000)
    error = 0.1 + grade + np.random.default_rng(0).normal(0, 0.5, 1000)
    known = calibrate(grade, error).numpy()
    assert (np.diff(known[0]) > 0).all() and (np.diff(known[1]) >= 0).all()
    np.testing.assert_allclose(np.interp([0.5, 1.5], *known), [0.6, 1.6], atol=0.15)


def test_unit_and_what_the_data_lack(student):
    inside = grades(student, [graph(a, 5.0, k) for k, a in enumerate(waters(80, 0))], 2000, "cpu")
    assert np.mean(inside > 1) == pytest.approx(1 - QUANTILE, abs=0.01)
    alien = grades(student, [graph(labelled_zero(ethanol()), 5.0, 0)], 2000, "cpu")
    assert alien[ethanol().numbers == 6] == pytest.approx(UNKNOWN, rel=1e-5)  # no carbon in the data
    assert alien[ethanol().numbers == 8].min() > 1  # nor an oxygen that is bonded to carbon
    broken = water_dimer()
    broken.positions[1] += 0.5 * (broken.positions[1] - broken.positions[0])
    stretched = grades(student, [graph(labelled_zero(broken), 5.0, 0)], 2000, "cpu")
    assert stretched.max() > 1 > np.median(inside)


def test_checkpoint(files, student):
    loaded = load_checkpoint(files[0])
    for name, tensor in student.extrapolation.state_dict().items():
        torch.testing.assert_close(loaded.extrapolation.state_dict()[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_damaged_checkpoint(files, damage, tmp_path):
    from safetensors import safe_open

    with safe_open(str(files[0]), "pt") as f:
        metadata = f.metadata()
    tensors = load_file(files[0])
    if damage == "missing":
        del tensors["extrapolation.environments"]
    else:
        tensors["extrapolation.projection"] = tensors["extrapolation.projection"][:, :-1].contiguous()
    save_file(tensors, tmp_path / "damaged.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="weights do not fit the configuration .*extrapolation"):
        load_checkpoint(tmp_path / "damaged.safetensors")


def test_ase(files, student):
    calculator, atoms = MLFFCalculator(files[1]), water_dimer()
    expected = grades(student, [graph(labelled_zero(atoms.copy()), 5.0, 0)], 2000, "cpu")
    assert "extrapolation_grade" in calculator.implemented_properties
    atoms.calc = calculator
    forces = atoms.get_forces()
    assert "extrapolation_grade" not in calculator.results
    np.testing.assert_allclose(calculator.get_property("extrapolation_grade", atoms), expected, rtol=1e-3)
    np.testing.assert_array_equal(calculator.results["forces"], forces)
    (batched,) = calculator.calculate_batch([atoms], ["extrapolation_grade"])
    np.testing.assert_allclose(batched["extrapolation_grade"], expected, rtol=1e-3)
    every = copy.deepcopy(MLFFCalculator(files[1], with_grade=True))
    every.get_property("forces", atoms)
    np.testing.assert_allclose(every.results["extrapolation_grade"], expected, rtol=1e-3)
    assert calculator.model.calibration.shape[0] == 2


def test_a_model_without(save_payload):
    path = save_payload(random_model(16, 1))
    calculator = MLFFCalculator(path)
    assert "extrapolation_grade" not in calculator.implemented_properties and calculator.model.calibration is None
    with pytest.raises(PropertyNotImplementedError, match="has no extrapolation grade; `mlff train` fits one"):
        calculator.get_property("extrapolation_grade", water_dimer())
    with pytest.raises(ValueError, match="has no extrapolation grade"):
        MLFFCalculator(path, with_grade=True)
    assert extrapolation(Case(calculator, [water_dimer()], [{}])) == []


def test_info(files, capsys):
    assert cli.main(["info", str(files[1])]) == 0
    assert "above 1 the model extrapolates" in " ".join(capsys.readouterr().out.split())


def test_general_check(files):
    frames = waters(10, 5)
    rows = extrapolation(Case(MLFFCalculator(files[1]), [a.copy() for a in frames], [a.calc.results for a in frames]))
    assert [row.name for row in rows] == ["atoms with a grade above 1", "rank correlation with the error", "error beside the expected error"]
    assert rows[1].figure.startswith(b"\x89PNG") and rows[0].value < 10


def test_suite_tells_apart():
    """Known answers: all outside above all inside is an area of 1; the same numbers one of 1/2."""
    mine = {"conformer": [0.1, 0.2, 0.3], "ion": [0.4, 2.0], "radical": [0.1, 0.2, 0.3], "unusual": []}
    rows = {row.name: row for row in organics._extrapolation(mine, None, "")}
    assert rows["told apart, ion: 1 - AUC"].value == 0 and rows["told apart, radical: 1 - AUC"].value == pytest.approx(0.5)
    assert not rows["told apart, all: 1 - AUC"].passed and "told apart, unusual: 1 - AUC" not in rows
    assert organics._extrapolation({}, None, "") == []


def test_structures_out_of_domain():
    kinds = [atoms.info["kind"] for atoms in organics.out_of_domain()]
    assert {kind: kinds.count(kind) for kind in organics.OUT_OF_DOMAIN} == {"ion": 41, "radical": 48, "unusual": 31}
    for atoms in organics.out_of_domain():
        electrons = atoms.numbers.sum() - atoms.info["charge"]
        assert (atoms.info["charge"] != 0) == (atoms.info["kind"] == "ion") and electrons % 2 == atoms.info["unpaired_electrons"]


def test_bad_calibration(files, save_payload):
    from mlff import payload
    from mlff.core import MLFFFileError, Model

    header, tensors = payload.unpack(payload.find(files[1]))
    header = json.loads(json.dumps({key: value for key, value in header.items() if key != "sha256"}))
    header["extrapolation"] = {"grade": [1.0, 0.5], "force_error_eV_A": [0.1, 0.2]}
    with pytest.raises(MLFFFileError, match="calibration of the extrapolation grade"):
        Model(payload.pack(header, tensors))
