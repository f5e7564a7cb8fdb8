"""examples/train/ship.py: a finished student becomes a part of the package, with its card and what its validation found."""

import json
import sys
from pathlib import Path

import pytest

from mlff.painn import load_checkpoint, save_checkpoint
from reference import random_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "train"))

import ship  # noqa: E402

CHECKS = [
    {"name": "forces, MAE", "value": 12.5, "unit": "meV/Å", "limit": 15.0, "passed": True, "note": "", "section": "Errors", "error": None},
    {"name": "phonons", "value": None, "unit": "", "limit": None, "passed": False, "note": "broke down", "section": "", "error": None},
]


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ship.py", *map(str, words)])
    ship.main()


def test_a_student_is_shipped_with_its_card_and_its_checks(tmp_path, monkeypatch, capsys):
    (tmp_path / "students").mkdir()
    monkeypatch.setattr(ship, "STUDENTS", tmp_path / "students")
    checkpoint, report = tmp_path / "salt.safetensors", tmp_path / "report.json"
    save_checkpoint(random_model(16, 1), checkpoint)
    report.write_text(json.dumps({"checks": CHECKS}))
    checkpoint.with_suffix(".json").write_text(json.dumps({"name": "salt"}))
    with pytest.raises(SystemExit, match="expected a card"):
        run(monkeypatch, checkpoint, report)
    assert not list((tmp_path / "students").iterdir())
    checkpoint.with_suffix(".json").write_text(json.dumps({"name": "salt", "card": {"purpose": "tests", "limits": "all else"}}))
    run(monkeypatch, checkpoint, report)
    record = json.loads((tmp_path / "students" / "salt.json").read_text())
    assert record["card"]["limits"] == "all else"
    assert record["validation"]["forces, MAE"] == {"value": 12.5, "unit": "meV/Å", "limit": 15.0, "passed": True}
    assert record["validation"]["phonons"] == {"unit": "", "passed": False}
    assert load_checkpoint(tmp_path / "students" / "salt.safetensors").config == random_model(16, 1).config
    assert "checks that failed: phonons" in capsys.readouterr().out
