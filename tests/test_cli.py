"""The commands: what they print, and one clear line with the right exit code for bad input."""

import re
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from reference import random_model

import mlff
from mlff import cli
from mlff.painn import save_checkpoint
from mlff.train import teachers

CPU = ["--arch", "none"]  # compiling for GPUs, which takes long, is in test_compile.py


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    save_checkpoint(random_model(16, 2), path)
    record = '{"name": "random", "teacher": {"name": "nobody"}, "held_out_errors": {"all": {"force": 1.5}, "water": {"force": 2.5}}}'
    path.with_suffix(".json").write_text(record)
    return path


@pytest.fixture(scope="module")
def model_pt(checkpoint):
    path = checkpoint.with_name("model.pt")
    assert cli.export_main([str(checkpoint), "-o", str(path), *CPU]) == 0
    return path


def fails(capsys, function, *arguments) -> str:
    """The one line on the error stream of a command that must fail with exit code 1."""
    capsys.readouterr()
    assert function([str(x) for x in arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and ": error: " in lines[0]
    return lines[0]


def test_import_is_cheap():
    command = "import sys, mlff, mlff.cli, mlff.lammps; print('torch' in sys.modules, mlff.__version__)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", mlff.__version__]


def test_pretrained():
    path = mlff.pretrained("ethanol-water")
    assert path.is_file() and path.with_suffix(".json").is_file()
    assert "ethanol-water" in mlff.pretrained_names()
    with pytest.raises(ValueError, match="'ethanol_water'; there are: .*ethanol-water"):
        mlff.pretrained("ethanol_water")


def test_info(model_pt, capsys):
    assert cli.main(["info", str(model_pt), "--check"]) == 0
    text = capsys.readouterr().out
    for words in ("painn", "H C O", "5.0 Å", "16", "nobody", "water", "2.5", "for CPUs only", "no elements inside", "open cluster", "triclinic cell"):
        assert words in text
    assert mlff.core.Model(model_pt).sha256[:40] in text
    assert re.search(r"self-check passed: energy within \S+ eV/atom", text)


def test_info_of_a_file_without_record(model_file, capsys):
    assert cli.main(["info", str(model_file)]) == 0
    assert "cannot be opened as TorchScript" in capsys.readouterr().out  # a bare payload, for LAMMPS and ASE


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04" + bytes(1000)], ids=["empty", "text", "foreign"])
@pytest.mark.parametrize("command", [["info"], ["validate"]], ids=lambda c: c[0])
def test_bad_model(content, command, tmp_path, capsys):
    path, structures = tmp_path / "bad.pt", tmp_path / "water.xyz"
    path.write_bytes(content)
    ase.io.write(structures, molecule("H2O"))
    assert "bad.pt" in fails(capsys, cli.main, *command, path, *([structures] if command == ["validate"] else []))


def test_damaged_model(model_pt, tmp_path, capsys):
    data = bytearray(model_pt.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(data)
    assert "SHA-256" in fails(capsys, cli.main, "info", tmp_path / "damaged.pt")
    (tmp_path / "short.pt").write_bytes(data[: len(data) // 2])
    assert "truncated" in fails(capsys, cli.main, "info", tmp_path / "short.pt")
    assert "no such model file" in fails(capsys, cli.main, "info", tmp_path / "none.pt")


def test_export_with_structure(checkpoint, tmp_path, capsys):
    ase.io.write(tmp_path / "ethanol.pdb", molecule("CH3CH2OH"))
    path = tmp_path / "model.pt"
    assert cli.export_main([str(checkpoint), "-o", str(path), "--structure", str(tmp_path / "ethanol.pdb"), *CPU]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    assert cli.main(["info", str(path)]) == 0
    assert "9 atoms, of which the model handles C2H6O" in capsys.readouterr().out


@pytest.mark.parametrize("options, kind", [([], "no elements inside"), (["--portable"], "portable, no elements inside")])
def test_export_of_a_shipped_model(options, kind, tmp_path, capsys):
    path = tmp_path / "model.pt"
    assert cli.export_main(["ethanol-water", "-o", str(path), *CPU, *options]) == 0
    assert cli.main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert kind in text and "SO3LR" in text and "held out" in text


def test_bad_export(checkpoint, tmp_path, capsys):
    out = tmp_path / "model.pt"
    ase.io.write(tmp_path / "iron.xyz", Atoms("Fe"))
    (tmp_path / "words.txt").write_text("no structure here\n")
    (tmp_path / "words.safetensors").write_text("no checkpoint here\n")
    export = cli.export_main
    assert "there are: ethanol-water" in fails(capsys, export, "methanol", "-o", out)
    assert "no checkpoint" in fails(capsys, export, tmp_path / "none.safetensors", "-o", out)
    assert "words.safetensors" in fails(capsys, export, tmp_path / "words.safetensors", "-o", out)
    assert "Fe" in fails(capsys, export, checkpoint, "-o", out, "--structure", tmp_path / "iron.xyz")
    assert "no such structure file" in fails(capsys, export, checkpoint, "-o", out, "--structure", tmp_path / "none.xyz")
    assert "words.txt: expected a structure" in fails(capsys, export, checkpoint, "-o", out, "--structure", tmp_path / "words.txt")
    assert "got a folder" in fails(capsys, export, checkpoint, "-o", tmp_path)
    fails(capsys, export, checkpoint, "-o", tmp_path / "no folder" / "model.pt")
    assert not out.exists()


def test_validate(model_pt, tmp_path, capsys, monkeypatch):
    from mlff import validate

    monkeypatch.setattr(validate, "CHECKS", validate.CHECKS[:2])
    ase.io.write(tmp_path / "water.xyz", [molecule("H2O")] * 2)
    report = tmp_path / "report.html"
    assert cli.main(["validate", str(model_pt), str(tmp_path / "water.xyz"), "--report", str(report)]) == 0
    assert report.is_file() and report.with_suffix(".json").is_file()
    monkeypatch.setattr(validate, "CHECKS", [lambda case: [validate.Check("too large", 2.0, limit=1.0)]])
    assert cli.main(["validate", str(model_pt), str(tmp_path / "water.xyz")]) == 1
    assert "no such file of structures" in fails(capsys, cli.main, "validate", model_pt, tmp_path / "none.xyz")


def test_label_and_train(tmp_path, capsys):
    rng, frames = np.random.default_rng(0), []
    for k in range(8):
        atoms = molecule("H2O")
        atoms.positions += rng.normal(0, 0.05, (3, 3))
        atoms.info["trajectory"] = f"run-{k}"
        frames.append(atoms)
    raw, out, config = tmp_path / "raw.extxyz", tmp_path / "labelled.extxyz", tmp_path / "water.yaml"
    ase.io.write(raw, frames, format="extxyz")
    options = ["--teacher", "ase.calculators.lj:LennardJones", "--options", '{"rc": 4.0}', "--device", "cpu", "--max-force", "1e9"]
    assert cli.main(["label", str(raw), "-o", str(out), *options]) == 0
    assert f"wrote {out}: 8 frames with labels of LennardJones, 0 left out" in capsys.readouterr().out
    sections = "model: {features: 16, layers: 1, n_radial: 4}\nfit: {steps: 2, report_every: 1}\n"
    sections = "data: {files: [labelled.extxyz], split_by: trajectory, held_out: 0.3}\n" + sections
    config.write_text(sections)
    assert cli.main(["train", str(config), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "held out errors" in text and f"wrote {tmp_path / 'water.safetensors'}" in text
    assert cli.export_main([str(tmp_path / "water.safetensors"), "-o", str(tmp_path / "water.pt"), *CPU]) == 0

    config.write_text(sections.replace("steps: 2", "steps: 3"))
    message = fails(capsys, cli.main, "train", config, "--device", "cpu")
    assert "water.state.pt is the state of another run: fit.steps was 2, is 3" in message
    config.write_text("fit: {}")
    assert "expected the key data" in fails(capsys, cli.main, "train", config)
    assert "unknown teacher 'magic'" in fails(capsys, cli.main, "label", raw, "-o", out, "--teacher", "magic")
    assert "no such file of structures" in fails(capsys, cli.main, "label", tmp_path / "none.xyz", "-o", out, *options)


def test_teachers_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["label", "--help"])
    text = capsys.readouterr().out
    assert [name for name in teachers.TEACHERS if name not in text] == []


def test_env(capsys):
    assert cli.main(["env"]) == 0
    exports = dict(re.fullmatch(r"export (\w+)=(.*)", line).groups() for line in capsys.readouterr().out.splitlines())
    assert (Path(exports["LAMMPS_PLUGIN_PATH"].split(":")[0]) / "mlffplugin.so").is_file()


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["info"], ["demo", "--steps", "many"], ["label", "a", "-o", "b", "--teacher", "so3lr", "--options", "3"],
     ["label", "a", "-o", "b", "--teacher", "so3lr", "--max-force", "-1"]],
    ids=["none", "unknown", "missing", "type", "json", "negative"],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 1 and "error: " in lines[0]


def test_programs():
    """The installed programs, and the module, end without a traceback."""
    for program in ([Path(sys.executable).with_name("mlff")], [Path(sys.executable).with_name("mlff-export")], [sys.executable, "-m", "mlff"]):
        done = subprocess.run([*map(str, program), "--version"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip() == f"mlff {mlff.__version__}"
