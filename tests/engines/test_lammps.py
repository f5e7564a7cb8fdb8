"""The pair style in LAMMPS against the float64 reference, on 1, 2 and 4 ranks, and through everything that changes atoms or the box.

Each test that takes the fixture model_file runs on the CPU and, with a file that has code for it, on the GPU that "device auto" finds.
"""

import copy
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from machine_code import architectures
from lammps_run import OUTPUT, TYPES, evaluate, pair_commands, read_results, require_lammps, run, write_data
from reference import random_model, reference
from structures import far_fragments, structure, triclinic, water_box

from mlff.export import build_payload
from mlff.painn import energy_and_gradient

ENERGY = 1e-6  # eV/atom
FORCE = 1e-5  # eV/Angstrom
VIRIAL = 1e-5  # eV/atom
FLOAT32 = 2e-6  # relative: the kernels compute in float32


@pytest.fixture(scope="module", autouse=True)
def lammps():
    require_lammps()


@pytest.fixture(scope="module")
def model():
    """Random, but weak enough beside the short-range repulsion that molecular dynamics with it is possible."""
    model = random_model(16, 3)
    model.readout["w2"].mul_(0.02)
    return model


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model_file(model, device, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lammps") / "model.pt"
    path.write_bytes(build_payload(model, {"teacher": "random weights, for tests"}, architectures() if device == "cuda" else ()))
    return path


def voigt(w: np.ndarray) -> np.ndarray:
    return w[..., [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]


def atom_virials(model, atoms: Atoms, neighbors) -> np.ndarray:
    """Half of every edge's -r dE/dr to each of its two atoms [N, 6]."""
    with torch.no_grad():
        numbers = torch.as_tensor(atoms.numbers, dtype=torch.long)
        _, g = energy_and_gradient(copy.deepcopy(model).double(), numbers, neighbors.edges, neighbors.vectors)
    r, g, result = neighbors.vectors.numpy(), g.numpy(), np.zeros((len(atoms), 3, 3))
    w = -0.25 * (r[:, :, None] * g[:, None, :] + g[:, :, None] * r[:, None, :])
    for k in range(2):
        np.add.at(result, neighbors.edges[k].numpy(), w)
    return voigt(result)


def check(results, model, atoms: Atoms) -> None:
    expected = reference(model, atoms)
    n, largest = len(atoms), max(1.0, np.abs(expected.forces).max())
    np.testing.assert_allclose(results.forces, expected.forces, rtol=0, atol=max(FORCE, FLOAT32 * largest))
    np.testing.assert_allclose(results.energies, expected.energies, rtol=0, atol=max(ENERGY, FLOAT32 * largest))
    assert abs(results.energy - expected.energy) < ENERGY * n
    np.testing.assert_allclose(results.virial, voigt(expected.virial), rtol=FLOAT32, atol=VIRIAL * n)
    virials = atom_virials(model, atoms, expected.neighbors)
    np.testing.assert_allclose(results.virials, virials, rtol=0, atol=max(VIRIAL, FLOAT32 * np.abs(virials).max()))


def check_final(folder: Path, model, name: str = "final") -> Atoms:
    """Compares LAMMPS's energy, forces and virial with the reference at the positions and in the box that LAMMPS ended with."""
    atoms = ase.io.read(folder / f"{name}.geometry", format="lammps-dump-text", index=-1)
    atoms.calc = None
    ordered = Atoms(atoms.get_chemical_symbols(), atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    check(read_results(folder, name), model, ordered)
    return ordered


FINAL = "\ndump geometry all custom 1 final.geometry id type element x y z\ndump_modify geometry sort id format float %.16g element " + (
    " ".join(TYPES) + OUTPUT.format(name="final")
)


def start(folder: Path, atoms: Atoms, model_file: Path, setup: str = "") -> str:
    """Commands that make the box and the pair style, in units metal."""
    boundary = write_data(folder / "start.data", atoms)
    return f"units metal\natom_style atomic\nboundary {boundary}\n{setup}\nread_data start.data\n" + pair_commands(model_file)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_result(ranks, model, model_file, tmp_path):
    """Per-atom energies and virials too, which test_parity.py does not compare; ghosts that are images, in boxes of all kinds."""
    structures = {name: structure(name) for name in ("water_box", "triclinic", "small_cell", "slab", "ethanol", "outside_cell")}
    for name, results in evaluate(structures, model_file, tmp_path, ranks).items():
        check(results, model, structures[name])


@pytest.mark.parametrize("layers", [1, 2])
def test_fewer_layers(layers, save_payload, tmp_path):
    model = random_model(32, layers)
    check(evaluate({"box": triclinic()}, save_payload(model), tmp_path, ranks=2)["box"], model, triclinic())


def test_ranks_without_atoms(model, model_file, tmp_path):
    """Four slabs along x: fragments 40 Angstrom apart leave some without atoms, one atom leaves three."""
    structures = {"far": far_fragments(), "single": structure("single_atom"), "isolated": structure("isolated_atom")}
    for name, results in evaluate(structures, model_file, tmp_path, ranks=4, setup="processors 4 1 1").items():
        check(results, model, structures[name])


def test_tiled_communication(model, model_file, tmp_path):
    """Atoms change ranks while the domains move."""
    script = start(tmp_path, water_box(3), model_file, "comm_style tiled") + """
balance 1.0 rcb
velocity all create 300 1
fix move all nve
fix even all balance 5 1.0 rcb
timestep 0.0002
run 12
unfix move
"""
    run(script + FINAL, tmp_path, ranks=4)
    check_final(tmp_path, model)


@pytest.mark.parametrize("commands", ["comm_modify cutoff 3.0", "comm_modify cutoff 12.0", "neighbor 0.3 bin", "newton on off"])
def test_settings_that_change_ghosts_and_lists(commands, model, model_file, tmp_path):
    newton = commands.startswith("newton")
    script = start(tmp_path, triclinic(), model_file, commands if newton else "") + ("" if newton else commands + "\n")
    run(script + FINAL, tmp_path, ranks=2)
    check_final(tmp_path, model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_atoms_without_ids(ranks, model, model_file, tmp_path):
    """Images cannot be told from other ghosts then."""
    script = start(tmp_path, water_box(2), model_file, "atom_modify id no") + "thermo_style custom step pe\nrun 0\n"
    header, atoms = (tmp_path / "start.data").read_text().split("Atoms # atomic\n\n")
    (tmp_path / "start.data").write_text(header + "Atoms # atomic\n\n" + "".join(f"0 {x.split(' ', 1)[1]}\n" for x in atoms.splitlines()))
    run(script + 'print "$(pe:%.16g)" file energy.txt\n', tmp_path, ranks)
    assert abs(float((tmp_path / "energy.txt").read_text()) - reference(model, water_box(2)).energy) < ENERGY * len(water_box(2))


def test_units_real(model, model_file, tmp_path):
    structures = {name: structure(name) for name in ("ethanol", "triclinic")}
    for name, results in evaluate(structures, model_file, tmp_path, units="real").items():
        check(results, model, structures[name])


def test_threads(model, model_file, tmp_path):
    check(evaluate({"box": water_box(3)}, model_file, tmp_path, threads=2)["box"], model, water_box(3))


def test_log_line_and_self_check(model_file, tmp_path):
    script = start(tmp_path, structure("ethanol"), model_file) + pair_commands(model_file, "device cpu check yes") + "run 0\n"
    output = run(script, tmp_path, ranks=2)
    first = [x for x in output.splitlines() if x.startswith("mlff ")][-2]
    assert first.endswith("cpu with 1 thread(s) per rank"), first
    assert "painn" in first and "teacher random weights" in first and "elements H C O" in first and "cutoff 5 A" in first, first
    assert output.count("self-check passed: largest deviation") == 1


def test_lmp_finds_the_plugin(monkeypatch, tmp_path):
    """By the entry point of the package; without a plugin LAMMPS must still start."""
    from mlff import lammps

    folder = lammps.plugin_directory()
    assert (Path(folder) / "mlffplugin.so").is_file()
    assert lammps.environment()["LAMMPS_PLUGIN_PATH"].split(":")[0] == folder
    monkeypatch.setenv("LAMMPS_PLUGIN_PATH", f"/elsewhere:{folder}")
    assert lammps.environment()["LAMMPS_PLUGIN_PATH"] == f"{folder}:/elsewhere"
    monkeypatch.setenv("MLFF_LIBRARY_PATH", str(tmp_path))
    assert lammps.plugin_directory() == ""
    with pytest.raises(FileNotFoundError, match="mlffplugin.so is not in"):
        lammps.plugin_path()


def test_mass_of_another_element_is_noticed(model_file, tmp_path):
    swapped = start(tmp_path, structure("ethanol"), model_file) + "pair_coeff * * O C H\nrun 0\n"
    output = run(swapped, tmp_path)
    assert "WARNING: Pair style mlff: atom type 1 has the mass 1.008, but pair_coeff says O (15.999)" in output


def test_atoms_come_and_go(model, model_file, tmp_path):
    """Deleted, inserted by create_atoms and by fix deposit between and during runs."""
    script = start(tmp_path, water_box(3), model_file) + """
region slab block INF INF INF INF 0 3
region top block INF INF INF INF 7 9
thermo 5
run 0
delete_atoms region slab
run 2
region gap block 1 8 1 8 0.5 1.5
create_atoms 3 random 3 4711 gap overlap 1.5
fix move all nve/limit 0.01
fix add all deposit 2 3 5 12345 region gap near 1.2
run 10
unfix move
"""
    run(script + FINAL, tmp_path, ranks=2)
    atoms = check_final(tmp_path, model)
    assert len(atoms) != 81


def test_lost_atoms_leave_a_shrinking_box(model, model_file, tmp_path):
    script = start(tmp_path, structure("water_dimer"), model_file, "boundary s s s")
    script = script.replace("boundary f f f\n", "") + "fix move all nve\ntimestep 0.0005\nthermo_modify lost ignore\nrun 20\nunfix move\n"
    run(script + FINAL, tmp_path, ranks=2)
    check_final(tmp_path, model)


def test_second_run_without_setup(model, model_file, tmp_path):
    script = start(tmp_path, water_box(3), model_file) + """
velocity all create 300 1
fix move all nve
timestep 0.0002
run 6
run 6 pre no
run 6 pre no post no
unfix move
"""
    run(script + FINAL, tmp_path, ranks=2)
    check_final(tmp_path, model)


def test_types_that_change_without_a_new_list(model, model_file, tmp_path):
    atoms = structure("ethanol")
    script = start(tmp_path, atoms, model_file) + """
neigh_modify every 1000 delay 1000 check no
thermo_style custom step pe
run 1
set atom 1 type 3
run 1 pre no
print "changed $(pe:%.16g)" file energy.txt
"""
    run(script, tmp_path)
    atoms.numbers[0] = 8
    assert abs(float((tmp_path / "energy.txt").read_text().split()[1]) - reference(model, atoms).energy) < ENERGY * len(atoms)


@pytest.mark.parametrize("ranks", [1, 2])
def test_minimize_and_box_relax(ranks, model, model_file, tmp_path):
    script = start(tmp_path, triclinic(), model_file) + """
thermo_style custom step pe press fnorm
run 0
print "before $(pe:%.16g)" file before.txt
minimize 0 0 10 100
fix relax all box/relax tri 1000.0 vmax 0.002
minimize 0 0 10 100
unfix relax
"""
    run(script + FINAL, tmp_path, ranks)
    check_final(tmp_path, model)
    assert read_results(tmp_path, "final").energy < float((tmp_path / "before.txt").read_text().split()[1]) - 0.1


def test_npt_in_a_triclinic_box(model, model_file, tmp_path):
    script = start(tmp_path, triclinic(), model_file) + """
velocity all create 300 1
fix move all npt temp 300 300 0.05 tri 1 1 0.5
timestep 0.0002
thermo 5
run 30
unfix move
"""
    run(script + FINAL, tmp_path, ranks=2)
    atoms = check_final(tmp_path, model)
    assert not np.allclose(atoms.cell, triclinic().cell, atol=1e-4)


def test_pressure_is_kinetic_and_virial(model, model_file, tmp_path):
    script = start(tmp_path, water_box(3), model_file) + """
velocity all create 300 1
compute kinetic all pressure thermo_temp ke
compute pair all pressure NULL virial
thermo_style custom step press c_kinetic c_pair
thermo_modify format float %.12g
run 0
print "$(press:%.12g) $(c_kinetic:%.12g) $(c_pair:%.12g)" file pressure.txt
"""
    run(script, tmp_path)
    total, kinetic, pair = map(float, (tmp_path / "pressure.txt").read_text().split())
    atoms = water_box(3)
    assert total == pytest.approx(kinetic + pair, rel=1e-9)
    assert pair == pytest.approx(np.trace(reference(model, atoms).virial) / 3 / atoms.get_volume() * 1.6021765e6, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nve_conserves_energy(ranks, model_file, tmp_path):
    """The error of velocity Verlet shrinks with the square of the time step: no force is missing and none is stale."""
    deviations = []
    for dt, steps in ((0.0002, 80), (0.0001, 160)):  # short: atoms without bonds bounce off their walls
        script = start(tmp_path, water_box(3), model_file) + f"""
velocity all create 300 1
fix move all nve
timestep {dt}
thermo {steps // 20}
thermo_style custom step etotal ke
thermo_modify format float %.12g
log nve.{dt}
run {steps}
"""
        run(script, tmp_path, ranks)
        lines = [x.split() for x in (tmp_path / f"nve.{dt}").read_text().splitlines()]
        rows = np.array([x for x in lines if len(x) == 3 and x[0].isdigit()], dtype=float)
        assert len(rows) == 21
        deviations.append(np.ptp(rows[:, 1]) / rows[:, 2].mean())
    assert deviations[0] < 0.01 and 0.2 < deviations[1] / deviations[0] < 0.3, deviations


def test_respa(model, model_file, tmp_path):
    script = start(tmp_path, structure("ethanol"), model_file) + "run_style respa 2 2 pair 1\ntimestep 0.0002\nfix move all nve\nrun 5\nunfix move\n"
    run(script + FINAL, tmp_path)
    check_final(tmp_path, model)


def test_restart(model_file, tmp_path):
    script = start(tmp_path, triclinic(), model_file) + f"""
velocity all create 300 1
fix move all nve
timestep 0.0002
thermo_style custom step pe
run 5
write_restart saved
run 5
print "$(pe:%.16g)" file through.txt
clear
read_restart saved
{pair_commands(model_file)}
fix move all nve
timestep 0.0002
thermo_style custom step pe
run 5
print "$(pe:%.16g)" file restarted.txt
"""
    run(script, tmp_path)
    through, restarted = (float((tmp_path / f"{x}.txt").read_text()) for x in ("through", "restarted"))
    assert abs(through - restarted) < 1e-4


@pytest.mark.parametrize("style", ["hybrid", "hybrid/overlay"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_hybrid_leaves_other_types_alone(style, ranks, model, model_file, tmp_path):
    """Carbon atoms belong to a style without forces: the model must not see them, though they sit between its atoms."""
    atoms = triclinic()
    script = start(tmp_path, atoms, model_file) + f"""
pair_style {style} mlff {model_file} zero 8.0
pair_coeff * * mlff H NULL O
pair_coeff 1*3 2 zero
pair_coeff 2 3 zero
"""
    run(script + FINAL, tmp_path, ranks)
    results = read_results(tmp_path, "final")
    own = atoms.numbers != 6
    assert not results.forces[~own].any() and not results.energies[~own].any()
    check(results._replace(energies=results.energies[own], forces=results.forces[own], virials=results.virials[own]), model, atoms[own])


def check_bonded_pairs(script: str, device: str, folder: Path, model) -> None:
    """Bonds may be there when special_bonds keeps the pairs in the neighbour list; a GPU does not use that list."""
    run(script + "special_bonds lj/coul 1 1 1\n" + FINAL, folder)
    check_final(folder, model)
    if device == "cuda":
        run(script + FINAL, folder)
        check_final(folder, model)
        return
    output = run(script + "run 0\n", folder, fails=True)
    assert "use special_bonds lj/coul 1.0 1.0 1.0" in output


def test_molecular_atoms_with_bonds(device, model, model_file, tmp_path):
    atoms = structure("ethanol")
    write_data(tmp_path / "plain.data", atoms)
    header, body = (tmp_path / "plain.data").read_text().split("Atoms # atomic\n\n")
    body = "".join(f"{x.split()[0]} 1 {' '.join(x.split()[1:])}\n" for x in body.splitlines())
    header = header.replace("3 atom types", "3 atom types\n2 bonds\n1 bond types\n2 extra bond per atom\n4 extra special per atom")
    (tmp_path / "bonds.data").write_text(header + "Atoms # bond\n\n" + body + "\nBonds\n\n1 1 1 2\n2 1 2 3\n")
    script = f"""
units metal
atom_style bond
boundary f f f
bond_style zero
read_data bonds.data
bond_coeff *
{pair_commands(model_file)}
"""
    check_bonded_pairs(script, device, tmp_path, model)


def test_molecules_of_a_template(device, model, model_file, tmp_path):
    atoms = structure("ethanol")[:3]
    write_data(tmp_path / "plain.data", atoms)
    header, body = (tmp_path / "plain.data").read_text().split("Atoms # atomic\n\n")
    rows = [x.split() for x in body.splitlines()]
    body = "".join(f"{x[0]} 1 1 {x[0]} {' '.join(x[1:])}\n" for x in rows)  # molecule, template, atom of the template
    header = header.replace("3 atom types", "3 atom types\n1 bond types")
    (tmp_path / "template.data").write_text(header + "Atoms # template\n\n" + body)
    types = "".join(f"{k + 1} {x[1]}\n" for k, x in enumerate(rows))
    (tmp_path / "three.mol").write_text(
        f"three atoms\n\n3 atoms\n2 bonds\n\nTypes\n\n{types}\nBonds\n\n1 1 1 2\n2 1 2 3\n\n"
        "Special Bond Counts\n\n1 1 1 0\n2 2 0 0\n3 1 1 0\n\nSpecial Bonds\n\n1 2 3\n2 1 3\n3 2 1\n"
    )
    script = f"""
units metal
molecule three three.mol
atom_style template three
boundary f f f
bond_style zero
read_data template.data
bond_coeff *
{pair_commands(model_file)}
"""
    check_bonded_pairs(script, device, tmp_path, model)


@pytest.fixture(scope="module")
def student_file(tmp_path_factory) -> Path:
    from mlff import pretrained
    from mlff.painn import load_checkpoint

    try:
        checkpoint = pretrained("ethanol-water")
    except ValueError as e:
        pytest.skip(str(e))
    path = tmp_path_factory.mktemp("student") / "model.pt"
    path.write_bytes(build_payload(load_checkpoint(checkpoint), {"teacher": "see the student"}))
    return path


@pytest.mark.parametrize("name", ["water", "ethanol", "npt", "hybrid"])
def test_examples(name, student_file, tmp_path):
    examples = Path(__file__).parents[2] / "examples" / "lammps"
    for file in examples.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    script = f"variable model index {student_file}\nvariable steps index 4\nvariable n index 3\ninclude in.{name}\n"
    assert "Loop time" in run(script, tmp_path, ranks=2)
