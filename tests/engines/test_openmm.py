"""OpenMM through TorchForce on the platforms without a GPU: results, boundaries, barostat, subsets, several Contexts, bad input."""

import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from reference import random_model, reference
from structures import ethanol, mixed_elements, small_cell, triclinic, water_box

import mlff.openmm
from mlff import torchscript
from mlff.export import build_payload
from mlff.payload import PayloadError
from mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
FORCE_UNIT = KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM


@pytest.fixture(scope="module")
def model():
    return random_model(32, 2)


@pytest.fixture(scope="module")
def model_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("openmm") / "model.pt"
    torchscript.save(build_payload(model), path)
    return path


@pytest.fixture(params=["Reference", "CPU"])
def platform(request):
    return openmm.Platform.getPlatform(request.param)


def reduced(cell: np.ndarray) -> np.ndarray:
    """An equivalent cell in the form that OpenMM asks for; the cell must be lower triangular."""
    a, b, c = (v.copy() for v in cell)
    c -= b * np.round(c[1] / b[1])
    c -= a * np.round(c[0] / a[0])
    b -= a * np.round(b[0] / a[0])
    return np.array([a, b, c])


def topology_of(atoms) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for number in atoms.numbers:
        element = app.Element.getByAtomicNumber(int(number)) if number > 0 else None
        topology.addAtom(element.symbol if element else "EP", element, residue)
    if atoms.pbc.all():
        topology.setPeriodicBoxVectors(reduced(atoms.cell.array) * unit.angstrom)
    return topology


def system_of(atoms, force) -> openmm.System:
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(float(mass))
    if atoms.pbc.all():
        system.setDefaultPeriodicBoxVectors(*(reduced(atoms.cell.array) / ANGSTROM_PER_NM))
    system.addForce(force)
    return system


def context_of(atoms, force, platform=None, step=0.0005) -> openmm.Context:
    platform = platform or openmm.Platform.getPlatform("CPU")
    context = openmm.Context(system_of(atoms, force), openmm.VerletIntegrator(step), platform)
    context.setPositions(atoms.positions / ANGSTROM_PER_NM)
    return context


def results(context):
    """Energy in eV and forces in eV/Angstrom."""
    state = context.getState(getEnergy=True, getForces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) / KJ_PER_MOL_PER_EV
    return energy, state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer) / FORCE_UNIT


def assert_as_reference(model, context, atoms):
    expected = reference(model, atoms)
    energy, forces = results(context)
    assert abs(energy - expected.energy) < 1e-6 * len(atoms)
    np.testing.assert_allclose(forces, expected.forces, atol=1e-5)


@pytest.mark.parametrize("structure", [ethanol, mixed_elements, water_box, triclinic, small_cell], ids=lambda f: f.__name__)
@pytest.mark.parametrize("portable", [False, True], ids=["operator", "portable"])
def test_equals_the_reference(model, model_path, platform, structure, portable):
    atoms = structure()
    force = mlff.openmm.create_force(model_path, topology_of(atoms), portable=portable)
    assert force.usesPeriodicBoundaryConditions() == bool(atoms.pbc.all()) and force.getOutputsForces()
    assert_as_reference(model, context_of(atoms, force, platform), atoms)


def test_file_with_elements(model, model_path, tmp_path):
    """The file alone, as a user of OpenMM-Torch loads it."""
    import openmmtorch

    atoms, path = ethanol(), tmp_path / "ethanol.pt"
    torchscript.save(build_payload(model), path, atoms.numbers)
    force = openmmtorch.TorchForce(str(path))
    force.setOutputsForces(True)
    assert_as_reference(model, context_of(atoms, force), atoms)


def test_moved_box_and_atoms(model, model_path):
    """Positions and box vectors of the Context count, not those that the force was made with."""
    atoms = water_box(3)
    context = context_of(atoms, mlff.openmm.create_force(model_path, topology_of(atoms)))
    results(context)
    atoms.set_cell(atoms.cell.array * [[1.04], [0.97], [1.0]], scale_atoms=True)
    atoms.positions += np.random.default_rng(0).integers(-2, 3, (len(atoms), 3)) @ atoms.cell.array
    context.setPeriodicBoxVectors(*(atoms.cell.array / ANGSTROM_PER_NM))
    context.setPositions(atoms.positions / ANGSTROM_PER_NM)
    assert_as_reference(model, context, atoms)


def test_subset(model, model_path, platform):
    """Ethanol among atoms of other forces: those may be of any element, or none, and feel nothing of the model."""
    atoms = ethanol()
    others = np.array([79, 0, 10])
    whole = atoms.copy()
    whole.extend(type(atoms)(others, positions=[[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    order = np.random.default_rng(0).permutation(len(whole))
    whole = whole[order]
    chosen = [k for k in range(len(whole)) if order[k] < len(atoms)]
    force = mlff.openmm.create_force(model_path, topology_of(whole), atoms=chosen)
    energy, forces = results(context_of(whole, force, platform))
    expected = reference(model, whole[chosen])
    assert abs(energy - expected.energy) < 1e-6 * len(atoms)
    np.testing.assert_allclose(forces[chosen], expected.forces, atol=1e-5)
    assert np.all(np.delete(forces, chosen, axis=0) == 0.0)


def test_with_other_forces(model, model_path):
    """Energies add, and force groups tell the force from others."""
    atoms = ethanol()
    force = mlff.openmm.create_force(model_path, topology_of(atoms))
    force.setForceGroup(3)
    system = system_of(atoms, force)
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.1, 1000.0)
    system.addForce(bond)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("CPU"))
    context.setPositions(atoms.positions / ANGSTROM_PER_NM)
    energies = [context.getState(getEnergy=True, groups=g).getPotentialEnergy()._value for g in ({3}, {0}, {0, 3})]
    assert abs(energies[0] / KJ_PER_MOL_PER_EV - reference(model, atoms).energy) < 1e-5
    assert energies[1] > 0 and abs(energies[0] + energies[1] - energies[2]) < 1e-6


def test_several_contexts(model, model_path):
    """Contexts of one force and of others, alive at the same time, in turns."""
    cases = []
    for atoms in (ethanol(), triclinic(), ethanol()):
        force = mlff.openmm.create_force(model_path, topology_of(atoms))
        cases += [(context_of(atoms, force), atoms)]
    shaken = cases[2][1]
    shaken.positions += np.random.default_rng(0).normal(0, 0.1, (len(shaken), 3))
    cases[2][0].setPositions(shaken.positions / ANGSTROM_PER_NM)
    for _ in range(2):
        for context, atoms in cases:
            assert_as_reference(model, context, atoms)


def velocities(context, kelvin):
    context.setVelocitiesToTemperature(kelvin * unit.kelvin, 1)


def assert_energy_is_conserved(context, steps):
    """The total energy stays within a small part of the change of the kinetic energy, which is not small itself."""
    totals, kinetic = [], []
    for _ in range(steps):
        context.getIntegrator().step(1)
        state = context.getState(getEnergy=True)
        kinetic.append(state.getKineticEnergy()._value)
        totals.append(kinetic[-1] + state.getPotentialEnergy()._value)
    assert np.ptp(kinetic) > 1.0  # the atoms move
    assert np.ptp(totals) < 0.03 * np.ptp(kinetic)


def test_energy_is_conserved(model, model_path, platform):
    """100 steps of 0.2 fs from 300 K."""
    atoms = ethanol()
    context = context_of(atoms, mlff.openmm.create_force(model_path, topology_of(atoms)), platform, step=0.0002)
    openmm.LocalEnergyMinimizer.minimize(context, 10, 20)
    velocities(context, 300)
    assert_energy_is_conserved(context, 100)


def test_barostat(model, model_path):
    """A Monte Carlo barostat asks for energies of scaled boxes; accepted or not, forces are those of the box that stays."""
    atoms = water_box(3)
    topology = topology_of(atoms)
    chain = app.Topology()  # molecules, which the barostat scales as wholes
    residues = [chain.addResidue("HOH", chain.addChain()) for _ in range(len(atoms) // 3)]
    added = [chain.addAtom(a.name, a.element, residues[a.index // 3]) for a in topology.atoms()]
    chain.setPeriodicBoxVectors(topology.getPeriodicBoxVectors())
    system = system_of(atoms, mlff.openmm.create_force(model_path, chain))
    bonds = openmm.HarmonicBondForce()  # of no strength: they tell the barostat what a molecule is
    for k in range(0, len(added), 3):
        bonds.addBond(k, k + 1, 0.1, 0.0)
        bonds.addBond(k, k + 2, 0.1, 0.0)
    system.addForce(bonds)
    barostat = openmm.MonteCarloBarostat(1000.0 * unit.bar, 300 * unit.kelvin, 1)
    barostat.setRandomNumberSeed(1)
    system.addForce(barostat)
    context = openmm.Context(system, openmm.VerletIntegrator(0.0001), openmm.Platform.getPlatform("CPU"))
    context.setPositions(atoms.positions / ANGSTROM_PER_NM)
    velocities(context, 300)
    volumes = set()
    for _ in range(20):
        context.getIntegrator().step(1)
        volumes.add(context.getState().getPeriodicBoxVolume()._value)
    assert len(volumes) > 1  # moves were accepted
    state = context.getState(getPositions=True)
    atoms.positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    atoms.set_cell(state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM)
    assert_as_reference(model, context, atoms)


def test_cuda_graphs_are_a_property_of_the_force(model, model_path):
    """For the CUDA platform; the others do not look at it."""
    atoms = ethanol()
    force = mlff.openmm.create_force(model_path, topology_of(atoms), use_cuda_graphs=True)
    assert force.getProperties()["useCUDAGraphs"] == "true"
    assert_as_reference(model, context_of(atoms, force), atoms)
    assert mlff.openmm.create_force(model_path, topology_of(atoms)).getProperties()["useCUDAGraphs"] == "false"


def test_self_check(model_path):
    mlff.openmm.create_force(model_path, topology_of(ethanol()), self_check=True)


# ---- bad input -------------------------------------------------------------------------------------------------------


def fails(context) -> str:
    """The line of the exception that a user reads: the last one of TorchScript's."""
    with pytest.raises(openmm.OpenMMException) as error:
        results(context)
    return str(error.value).strip().splitlines()[-1]


def test_unknown_element(model_path):
    atoms = ethanol()
    atoms.numbers[4] = 26
    with pytest.raises(ValueError, match=r"atom 4 \(Fe of MOL 1\) is Fe, which the model does not know; it knows H C O"):
        mlff.openmm.create_force(model_path, topology_of(atoms))
    mlff.openmm.create_force(model_path, topology_of(atoms), atoms=[0, 1, 2, 3])


def test_atom_without_element(model_path):
    atoms = ethanol()
    atoms.numbers[2] = 0
    with pytest.raises(ValueError, match="atom 2 .* is without an element"):
        mlff.openmm.create_force(model_path, topology_of(atoms))


@pytest.mark.parametrize("chosen, words", [([0, 9], "within 0 .. 8"), ([1, 1], "twice")])
def test_wrong_atoms(model_path, chosen, words):
    with pytest.raises(ValueError, match=words):
        mlff.openmm.create_force(model_path, topology_of(ethanol()), atoms=chosen)


def test_wrong_topology(model_path):
    with pytest.raises(TypeError, match="topology: expected an openmm.app.Topology, got str"):
        mlff.openmm.create_force(model_path, "system.pdb")


def test_no_elements_in_the_file(model_path, platform):
    import openmmtorch

    force = openmmtorch.TorchForce(str(model_path))
    force.setOutputsForces(True)
    message = fails(context_of(ethanol(), force, platform))
    assert "no elements baked in" in message and "mlff-export --structure FILE" in message


@pytest.mark.parametrize("portable", [False, True], ids=["operator", "portable"])
def test_other_number_of_atoms(model_path, platform, portable):
    force = mlff.openmm.create_force(model_path, topology_of(ethanol()), portable=portable)
    message = fails(context_of(mixed_elements(), force, platform))
    assert f"has {len(mixed_elements())} atoms" in message and "written for 9" in message


def test_positions_that_are_not_finite(model, model_path, platform):
    atoms = ethanol()
    context = context_of(atoms, mlff.openmm.create_force(model_path, topology_of(atoms)), platform)
    positions = atoms.positions / ANGSTROM_PER_NM
    positions[3, 1] = np.nan
    context.setPositions(positions)
    assert "NaN" in fails(context) or "finite" in fails(context)
    context.setPositions(atoms.positions / ANGSTROM_PER_NM)
    assert_as_reference(model, context, atoms)  # the Context goes on with good input


def test_box_that_is_too_small(model_path):
    atoms = small_cell()
    atoms.set_cell(np.eye(3) * 0.4)
    context = context_of(atoms, mlff.openmm.create_force(model_path, topology_of(atoms)))
    assert "smallest height allowed" in fails(context)


def test_bad_files(model, tmp_path):
    data = bytearray(build_payload(model))
    truncated, damaged, newer = bytes(data[:-100]), bytes(data[:-1]) + b"!", bytes(data[:16]) + b"\x09" + bytes(data[17:])
    for content in (None, b"", b"something else", truncated, damaged, newer):
        path = tmp_path / "model.pt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PayloadError, match="model.pt: "):
            mlff.openmm.create_force(path, topology_of(ethanol()))


def test_without_openmm_torch():
    code = "import sys; sys.modules['openmmtorch'] = None; import mlff.openmm"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ImportError: mlff.openmm needs OpenMM and OpenMM-Torch: pip install 'mlff[openmm]'" in run.stderr


def test_threads_follow_torch(model_path):
    """One or two threads: the same numbers but for rounding."""
    atoms = water_box(3)
    context = context_of(atoms, mlff.openmm.create_force(model_path, topology_of(atoms)))
    one = results(context)
    torch.set_num_threads(2)
    try:
        two = results(context)
    finally:
        torch.set_num_threads(1)
    assert abs(one[0] - two[0]) < 1e-6 * len(atoms)
    np.testing.assert_allclose(one[1], two[1], atol=1e-5)
