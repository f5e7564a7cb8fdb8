"""mlff validate: right numbers for labels of known error, failures where a model is bad, a report that stands alone."""

import copy
import json
import re

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from reference import random_model, reference
from structures import structure

from mlff import validate as module
from mlff.core import MLFFFileError
from mlff.export import build_payload
from mlff.validate import Check, validate
from mlff.validate import checks as general


@pytest.fixture(scope="module")
def model():
    return random_model(16, 1)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(general, "NVE_STEPS", 20)


def labelled(model, names, energy_error=0.0, force_error=0.0, stress_error=0.0):
    frames = []
    for name in names:
        atoms, sign = structure(name), np.array([1, -1, 1])
        r = reference(model, atoms)
        labels = {"energy": r.energy + energy_error * len(atoms), "forces": r.forces + force_error * sign}
        if atoms.pbc.all():
            labels["stress"] = (-r.virial / atoms.get_volume()).flat[[0, 4, 8, 5, 2, 1]] + stress_error
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    return frames


def by_name(report):
    return {check.name: check for check in report.checks}


def test_errors_are_those_put_in(model, save_payload, tmp_path):
    ase.io.write(tmp_path / "a.extxyz", labelled(model, ["ethanol", "triclinic"], -0.002, 0.03, 0.001))
    checks = by_name(validate(save_payload(model), tmp_path / "a.extxyz"))
    assert checks["energy, MAE"].value == pytest.approx(2.0, abs=2e-3)  # meV/atom
    assert checks["energy, mean error"].value == pytest.approx(2.0, abs=2e-3)
    for name in ("forces", "forces on H", "forces on C", "forces on O"):
        assert checks[f"{name}, MAE"].value == pytest.approx(30.0, abs=0.02)  # meV/A
        assert checks[f"{name}, RMSE"].value == pytest.approx(30.0, abs=0.02)
    assert checks["stress, MAE"].value == pytest.approx(0.1602177, abs=1e-4)  # 0.001 eV/A^3 in GPa
    assert all(checks[name].passed is None for name in checks if "MAE" in name)


def test_report(model, save_payload, tmp_path, capsys):
    frames = labelled(model, ["ethanol", "small_cell"])
    report = validate(save_payload(model), frames, tmp_path / "new folder" / "report.html")
    page = (tmp_path / "new folder" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == sum(check.figure is not None for check in report.checks) >= 4
    text = re.sub(r"base64,[^\"]+", "", page)  # any word can be in a picture
    assert "http" not in text and "src=" not in text.replace('src="data:', "")
    data = json.loads((tmp_path / "new folder" / "report.json").read_text())
    assert data["passed"] == report.passed and len(data["sha256"]) == 64 and data["n_structures"] == 2
    assert [check["name"] for check in data["checks"]] == [check.name for check in report.checks]
    printed = capsys.readouterr().out
    assert "self-check, forces" in printed and "checks with a limit passed" in printed
    assert frames[0].calc.results["energy"]  # the caller's structures are left alone


def test_a_sound_file_passes(model, save_payload, monkeypatch):
    monkeypatch.setattr(general, "NVE_STEPS", 300)  # long enough that a slope is more than the fluctuation
    model = copy.deepcopy(model)
    model.readout["w2"].mul_(0.1)  # random weights pull bonds into the wall, which is too stiff for the time step
    checks = by_name(validate(save_payload(model), [structure("ethanol"), structure("triclinic")]))
    for name in ("self-check, energy", "self-check, forces", "equivariance, energy", "equivariance, forces"):
        assert checks[name].passed, checks[name]
    for name in ("forces against finite differences", "stress against finite differences", "force at the cutoff", "energy drift"):
        assert checks[name].passed, checks[name]
    assert checks["errors"].value is None and "no energies" in checks["errors"].note


def test_a_model_that_attracts_at_short_distances_fails(tmp_path):
    bad = random_model(16, 1)
    bad.zbl_constants[..., 0] *= -1
    (tmp_path / "bad.mlff").write_bytes(bad_payload(bad))
    report = validate(tmp_path / "bad.mlff", [structure("ethanol")])
    assert not report.passed
    assert by_name(report)["close contact H-H"].passed is False
    assert by_name(report)["close contact H-H"].value > 1.0


def bad_payload(bad):
    """A payload whose repulsion has the wrong sign; build_payload alone would put the right constants back."""
    from mlff import payload

    header, tensors = payload.unpack(build_payload(bad, {}))
    header.pop("sha256")
    return payload.pack(header, {**tensors, "pair_table": bad.pair_table.numpy().reshape(-1, 3)})


def test_a_check_that_breaks_down_does_not_take_the_others_with_it(model, save_payload, monkeypatch, tmp_path):
    def broken(case):
        raise ValueError("two\nlines")

    monkeypatch.setattr(module, "CHECKS", [broken, general.self_check])
    report = validate(save_payload(model), [structure("ethanol")], tmp_path / "a.html")
    assert not report.passed and report.checks[0].note == "two lines" and report.checks[1].passed


def test_verdicts():
    assert Check("a", 1.0, limit=2.0).passed and Check("a", 3.0, limit=2.0).passed is False
    assert Check("a", float("nan"), limit=2.0).passed is False
    assert Check("a", 1.0).passed is None and Check("a", None).passed is None


def test_bad_input(model, save_payload, tmp_path):
    path = save_payload(model)
    with pytest.raises(ValueError, match="at least one atom"):
        validate(path, [])
    with pytest.raises(ValueError, match="structure 1: the model knows the elements H C O, not N"):
        validate(path, [structure("ethanol"), Atoms("N")])
    with pytest.raises(FileNotFoundError):
        validate(path, tmp_path / "none.extxyz")
    with pytest.raises(MLFFFileError, match="none.pt"):
        validate(tmp_path / "none.pt", [structure("ethanol")])
    with pytest.raises(ValueError, match="HTML"):
        validate(path, [structure("ethanol")], tmp_path / "report.json")
