"""The pair style on a GPU: what it hands over, on one rank and on two, which device it takes, and what it refuses.

Without a GPU: the driver is the stand-in of fake_gpu.py, whose model of pairs is the plan for GPUs in these files; their plan
for the CPU is a PaiNN, so that results tell which of them was used. Tests with a real GPU are in test_lammps.py and test_parity.py.
"""

import ase.io
import numpy as np
import pytest
from ase import Atoms
from fake_gpu import atoms_of, expected
from fake_plan import model_parts, packed
from lammps_run import OUTPUT, read_results, require_lammps, run, write_data
from reference import random_model, reference

TYPES = ["H", "O"]
GEOMETRY = """
dump geometry all custom 1 final.geometry id type element x y z
dump_modify geometry sort id format float %.16g element H O
"""
EXCLUDE = "neigh_modify exclude type 1 1\n"


@pytest.fixture(scope="module", autouse=True)
def lammps():
    require_lammps()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fake") / "model.pt"
    path.write_bytes(packed(model_parts()))
    return path


@pytest.fixture(autouse=True)
def driver(fake_library, monkeypatch):
    monkeypatch.setenv("MLFF_CUDA_DRIVER", str(fake_library))


def box(n=60, length=9.0, pbc=True, tilt=0.0) -> Atoms:
    numbers, positions = atoms_of(n, length)
    return Atoms(numbers, positions, cell=[[length, 0, 0], [tilt, length, 0], [0, -tilt, 1.1 * length]], pbc=pbc)


def start(folder, atoms, model_file, options="", coefficients="H O") -> str:
    boundary = write_data(folder / "start.data", atoms, TYPES)
    return f"""
units metal
atom_style atomic
boundary {boundary}
read_data start.data
pair_style mlff {model_file} {options}
pair_coeff * * {coefficients}
"""


def loaded(output: str) -> str:
    """The line about the model; there is one."""
    (line,) = (x for x in output.splitlines() if x.startswith("mlff ") and "sha256" in x)
    return line


def check(folder, atoms, own=slice(None)) -> None:
    """LAMMPS's results against the stand-in's model of the atoms ``own``."""
    found, wanted = read_results(folder, "final"), expected(atoms.numbers[own], atoms.positions[own], atoms.cell.array, atoms.pbc)
    scale = max(1.0, np.abs(wanted["forces"]).max(), np.abs(wanted["atom_virial"]).max())
    assert found.energy == pytest.approx(wanted["energy"], rel=1e-6)
    np.testing.assert_allclose(found.energies[own], wanted["atom_energy"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.forces[own], wanted["forces"], rtol=0, atol=3e-6 * scale)
    np.testing.assert_allclose(found.virials[own], wanted["atom_virial"], rtol=0, atol=3e-6 * scale)
    np.testing.assert_allclose(found.virial, wanted["virial"], rtol=3e-6, atol=3e-6 * scale * len(atoms))


def check_final(folder) -> Atoms:
    """At the positions and in the box that LAMMPS ended with."""
    atoms = ase.io.read(folder / "final.geometry", format="lammps-dump-text", index=-1)
    atoms.calc = None
    check(folder, atoms)
    return atoms


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("atoms", [
    box(), box(tilt=1.5), box(pbc=[True, True, False], tilt=0.0), box(pbc=False), box(1, 5.5), box(150, 12.0), box(40, 6.2),
], ids=["box", "tilted", "slab", "open", "one", "list", "images"])  # fmt: skip
def test_results(ranks, atoms, model_file, tmp_path):
    output = run(start(tmp_path, atoms, model_file) + OUTPUT.format(name="final"), tmp_path, ranks)
    check(tmp_path, atoms)
    assert loaded(output).endswith("cuda:0" if ranks == 1 else "cuda:0 on rank 0, 2 rank(s) on 1 GPU(s)")
    assert "neighbor lists" not in output, "LAMMPS builds a list that nobody needs"


def test_images_of_atoms_without_ids(model_file, tmp_path):
    script = start(tmp_path, box(), model_file).replace("atom_style atomic", "atom_style atomic\natom_modify id no")
    header, atoms = (tmp_path / "start.data").read_text().split("Atoms # atomic\n\n")
    atoms = "".join(f"0 {x.split(' ', 1)[1]}\n" for x in atoms.splitlines())
    (tmp_path / "start.data").write_text(f"{header}Atoms # atomic\n\n{atoms}")
    run(script + 'thermo_style custom step pe\nrun 0\nprint "$(pe:%.16g)" file energy.txt\n', tmp_path)
    wanted = expected(box().numbers, box().positions, box().cell.array, True)["energy"]
    assert float((tmp_path / "energy.txt").read_text()) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_atoms_and_box_change(ranks, model_file, tmp_path):
    """Atoms move, cross the boundaries, are sorted, deleted, made and turned into others; the box is strained and tilted."""
    script = start(tmp_path, box(tilt=0.5), model_file) + """
atom_modify sort 3 2.0
neigh_modify every 2 delay 0 check no
velocity all create 2000 1
fix move all nve
timestep 0.0002
run 7
set atom 5 type 2
run 2 pre no
unfix move
group two id 7 11
delete_atoms group two
run 1
create_atoms 2 single 3.0 8.0 4.0
fix move all npt temp 300 300 0.05 tri 1 1 0.5
run 8
unfix move
change_box all x scale 1.05 xy delta 0.3 remap
""" + GEOMETRY
    run(script + OUTPUT.format(name="final"), tmp_path, ranks)
    assert len(check_final(tmp_path)) == 59


def test_atoms_of_other_styles(model_file, tmp_path):
    """NULL, and hybrid/overlay over all atoms: the list is asked for, but never built."""
    atoms = box()
    script = start(tmp_path, atoms, model_file).split("pair_style")[0] + f"""
pair_style hybrid/overlay mlff {model_file} device cuda zero 8.0
pair_coeff * * mlff NULL O
pair_coeff * * zero
"""
    run(script + OUTPUT.format(name="final"), tmp_path)
    check(tmp_path, atoms, atoms.numbers == 8)
    assert not read_results(tmp_path, "final").forces[atoms.numbers == 1].any()


PARTIAL = "pair_style hybrid mlff {0} device {1} zero 8.0\npair_coeff * * mlff H O\npair_coeff 1 2 zero\n"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("reason", ["exclude", "hybrid"])
def test_what_a_gpu_cannot_do(ranks, reason, model_file, tmp_path):
    """Under "auto" the CPU does it, and the log says why, once; else it is an error. Twice, because a second run sets up again."""
    def script(device):
        text = start(tmp_path, box(), model_file, f"device {device}") + EXCLUDE
        return text if reason == "exclude" else text.split("pair_style")[0] + PARTIAL.format(model_file, device)

    run(script("cpu") + OUTPUT.format(name="final"), tmp_path, ranks)
    wanted = read_results(tmp_path, "final")
    (tmp_path / "results.txt").unlink()
    output = run(script("auto") + "run 0\n" + OUTPUT.format(name="final"), tmp_path, ranks)
    found = read_results(tmp_path, "final")
    assert found.energy == pytest.approx(wanted.energy, abs=1e-5)
    np.testing.assert_allclose(found.forces, wanted.forces, atol=1e-5)
    words = "neigh_modify exclude" if reason == "exclude" else "pair_style hybrid gives some of them to another style"
    assert "cuda:0" in loaded(output)
    (line,) = (x for x in output.splitlines() if x.startswith("mlff ") and "on the CPU: a GPU evaluates" in x)
    assert words in line
    output = run(script("cuda") + "run 0\n", tmp_path, ranks, fails=True)
    assert words in output and "use device cpu" in output


def test_ranks_take_gpus_in_turns(model_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_COUNT", "2")
    for options, words in (("", "cuda:0 on rank 0, 3 rank(s) on 2"), ("device cuda:1", "cuda:1 on rank 0, 3 rank(s) on 1")):
        words += " GPU(s)"
        assert loaded(run(start(tmp_path, box(), model_file, options) + "run 0\n", tmp_path, ranks=3)).endswith(words)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind, words", [
    ("driver", "no NVIDIA driver"), ("gpu", "finds no GPU"), ("old", "has code for"),
    ("file", "has no kernels for GPUs"),
])  # fmt: skip
def test_without_a_gpu_that_serves(ranks, kind, words, model_file, tmp_path, monkeypatch, save_payload):
    """Under "auto" the CPU, with the reason in the one line about the model; else an error."""
    if kind == "driver":
        monkeypatch.setenv("MLFF_CUDA_DRIVER", str(tmp_path / "none.so"))
    elif kind == "file":
        model_file = save_payload(random_model(16, 2, species=("H", "O")))
    else:
        name, value = {"gpu": ("COUNT", "0"), "old": ("ARCH", "70")}[kind]
        monkeypatch.setenv(f"FAKE_CUDA_{name}", value)
    output = run(start(tmp_path, box(), model_file) + OUTPUT.format(name="final"), tmp_path, ranks)
    line = loaded(output)
    assert "cpu with 1 thread(s) per rank: " in line and words in line and "model in memory" not in line, line
    wanted = reference(random_model(16, 2, species=("H", "O")), box())
    assert read_results(tmp_path, "final").energy == pytest.approx(wanted.energy, abs=1e-4)
    assert words not in run(start(tmp_path, box(), model_file, "device cpu") + "run 0\n", tmp_path, ranks)
    output = run(start(tmp_path, box(), model_file, "device cuda") + "run 0\n", tmp_path, ranks, fails=True)
    assert f"Pair style mlff: {model_file}: " in output and words in output


def test_no_such_gpu(model_file, tmp_path):
    output = run(start(tmp_path, box(), model_file, "device cuda:3"), tmp_path, ranks=2, fails=True)
    assert "this machine has 1 GPU, numbered from 0" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_errors_name_atoms_by_their_ids(ranks, model_file, tmp_path):
    atoms = box(pbc=False)
    atoms.positions[41] = atoms.positions[17]
    script = start(tmp_path, atoms, model_file).replace("read_data", "atom_modify sort 1 3.0\nread_data")
    output = run(script + "run 0\n", tmp_path, ranks, fails=True)
    assert "step 0: atoms 18 and 42 are at the same place" in output or "step 0: atoms 42 and 18 are" in output, output[-1000:]
    nan = """
variable nan atom exp(1000)-exp(1000)
neigh_modify every 1000 delay 1000 check no
fix move all nve
run 0
group one id 3
set group one vx v_nan
run 2
"""
    output = run(start(tmp_path, box(), model_file) + nan, tmp_path, ranks, fails=True)
    assert "step 1: the position of atom 3 is not finite (x = " in output


def test_run_without_setup_after_pair_style(model_file, tmp_path):
    again = f"run 0\npair_style mlff {model_file}\npair_coeff * * H O\nrun 1 pre no\n"
    assert "needs 'pre yes'" in run(start(tmp_path, box(), model_file) + again, tmp_path, fails=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_device_changes_between_runs(ranks, model_file, tmp_path):
    """The same pair style with other options: lists come and go, and those that stay are used on."""
    script = start(tmp_path, box(), model_file, "device cpu") + "thermo_modify format float %.16g\n"
    for device in ("cpu", "cuda", "cuda", "cpu", "cpu"):
        script += f"pair_style mlff {model_file} device {device}\npair_coeff * * H O\nrun 0\nrun 0\nprint 'energy $(pe:%.16g)'\n"
    output = run(script, tmp_path, ranks)
    energies = [float(x.split()[1]) for x in output.splitlines() if x.startswith("energy ")]
    on_cpu = reference(random_model(16, 2, species=("H", "O")), box()).energy
    on_gpu = expected(box().numbers, box().positions, box().cell.array, True)["energy"]
    assert energies == pytest.approx([on_cpu, on_gpu, on_gpu, on_cpu, on_cpu], rel=1e-6)
