"""OpenMM's CUDA platform: the force without leaving the GPU, in every precision, with and without CUDA graphs."""

import numpy as np
import openmm
import pytest
from machine_code import architectures
from openmm import app, unit
from reference import ROUNDING, random_model, reference
from structures import ethanol, mixed_elements, small_cell, triclinic, water_box
from test_openmm import assert_as_reference, assert_energy_is_conserved, fails, reduced, results, system_of, topology_of

import mlff.openmm
from mlff import torchscript
from mlff.export import build_payload
from mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
# OpenMM rounds positions (in nm) to float32 unless it computes in double precision: some 3e-7 Angstrom in these boxes.
FORCE = {"single": 2e-4, "mixed": 2e-4, "double": 1e-5}  # eV/Angstrom
# An atom that another pushes with 85 eV/Angstrom feels that as some 1e-5 of the push: repulsion changes with 10 to 30 times itself in an Angstrom.
# With exact positions the spacing of float32, in which kernels work, is left: 1.04e-5 eV/Angstrom at 86.
STEEP = {"single": 1e-5, "mixed": 1e-5, "double": ROUNDING}  # of the largest force
ENERGY = {"single": 1e-5, "mixed": 1e-5, "double": 1e-6}  # eV/atom


@pytest.fixture(scope="module")
def model():
    return random_model(32, 2)


@pytest.fixture(scope="module")
def model_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("openmm") / "model.pt"
    torchscript.save(build_payload(model, {}, architectures()), path)
    return path


@pytest.fixture(params=["single", "mixed", "double"])
def precision(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["calls", "graphs"])
def graphs(request):
    return request.param


def make_context(system, positions, precision="double", step=0.0005, platform="CUDA", integrator=None) -> openmm.Context:
    properties = {"Precision": precision} if platform == "CUDA" else {}
    integrator = integrator or openmm.VerletIntegrator(step)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform), properties)
    context.setPositions(positions / ANGSTROM_PER_NM)
    return context


def context_of(atoms, model_path, precision="double", graphs=False, **options) -> openmm.Context:
    force = mlff.openmm.create_force(model_path, topology_of(atoms), use_cuda_graphs=graphs)
    return make_context(system_of(atoms, force), atoms.positions, precision, **options)


def tolerance(precision, forces) -> float:
    """eV/Angstrom, of each component."""
    return FORCE[precision] + STEEP[precision] * np.abs(forces).max()


def check(context, model, atoms, precision="double") -> None:
    expected = reference(model, atoms)
    energy, forces = results(context)
    assert abs(energy - expected.energy) < ENERGY[precision] * len(atoms)
    np.testing.assert_allclose(forces, expected.forces, atol=tolerance(precision, expected.forces))


@pytest.mark.parametrize("structure", [ethanol, mixed_elements, water_box, triclinic, small_cell], ids=lambda f: f.__name__)
def test_equals_the_reference_platform(model, model_path, structure, precision, graphs):
    """And the float64 model. At several positions, more than OpenMM-Torch evaluates before it records a graph."""
    atoms = structure()
    context = context_of(atoms, model_path, precision, graphs)
    host = context_of(atoms, model_path, platform="Reference")
    for seed in range(3):
        for c in (context, host):
            c.setPositions(atoms.positions / ANGSTROM_PER_NM)
        check(context, model, atoms, precision)
        for found, wanted, most in zip(results(context), results(host), (ENERGY[precision] * len(atoms), None)):
            np.testing.assert_allclose(found, wanted, atol=most or tolerance(precision, wanted))
        atoms.rattle(0.02, seed=seed)


def test_subset(model, model_path, precision, graphs):
    """Atoms outside the list feel nothing, also where OpenMM orders atoms in its own way."""
    atoms = ethanol()
    n = len(atoms)
    chosen = np.random.default_rng(0).permutation(n + 40)[:n]
    whole = water_box(3)[: n + 40]
    whole.pbc = False
    whole.numbers[chosen], whole.positions[chosen] = atoms.numbers, atoms.positions
    force = mlff.openmm.create_force(model_path, topology_of(whole), atoms=chosen.tolist(), use_cuda_graphs=graphs)
    context = make_context(system_of(whole, force), whole.positions, precision)
    expected = reference(model, atoms)
    for _ in range(2):
        energy, forces = results(context)
        assert abs(energy - expected.energy) < ENERGY[precision] * n
        np.testing.assert_allclose(forces[chosen], expected.forces, atol=FORCE[precision])
        assert np.all(np.delete(forces, chosen, axis=0) == 0.0)


def test_contexts_in_turns(model, model_path, graphs):
    """Contexts of the same atoms and of others, alive at the same time."""
    cases = []
    for seed, atoms in enumerate((ethanol(), triclinic(), ethanol(), water_box(3))):
        atoms.rattle(0.02, seed=seed)
        cases.append((context_of(atoms, model_path, graphs=graphs), atoms))
    for _ in range(3):
        for context, atoms in cases:
            check(context, model, atoms)
    del cases[2], context
    for context, atoms in cases:
        check(context, model, atoms)


def test_with_other_forces(model, model_path, graphs):
    """Forces add, whatever order OpenMM keeps its atoms in for the nonbonded force."""
    atoms = water_box()
    force = mlff.openmm.create_force(model_path, topology_of(atoms), use_cuda_graphs=graphs)
    force.setForceGroup(3)
    system = system_of(atoms, force)
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    nonbonded.setCutoffDistance(0.5)
    for _ in atoms:
        nonbonded.addParticle(0.0, 0.05, 0.1)
    system.addForce(nonbonded)
    context = make_context(system, atoms.positions, step=0.0001)
    context.getIntegrator().step(20)
    state = context.getState(getPositions=True)
    atoms.positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    expected = reference(model, atoms)
    state = context.getState(getEnergy=True, getForces=True, groups={3})
    assert abs(state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV - expected.energy) < 1e-6 * len(atoms)
    forces = state.getForces(asNumpy=True)._value / (KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM)
    np.testing.assert_allclose(forces, expected.forces, atol=1e-5)


def test_energy_is_conserved(model_path, precision, graphs):
    """A small box of water for 200 steps of 0.1 fs."""
    atoms = water_box(3)
    context = context_of(atoms, model_path, precision, graphs, step=0.0001)
    openmm.LocalEnergyMinimizer.minimize(context, 10, 50)
    context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    assert_energy_is_conserved(context, 200)


def test_trajectory_of_the_reference_platform(model_path, graphs):
    """50 steps from the same start end at the same place."""
    atoms, ends = triclinic(), []
    for platform in ("Reference", "CUDA"):
        context = context_of(atoms, model_path, graphs=graphs and platform == "CUDA", platform=platform, step=0.0001)
        context.getIntegrator().step(50)
        ends.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    assert np.abs(ends[0] - atoms.positions / ANGSTROM_PER_NM).max() > 1e-4
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-6)


def test_barostat(model, model_path, precision, graphs):
    """A Monte Carlo barostat asks for energies of scaled boxes; accepted or not, forces are those of the box that stays."""
    atoms = water_box(3)
    topology = app.Topology()  # molecules, which the barostat scales as wholes
    chain = topology.addChain()
    residues = [topology.addResidue("HOH", chain) for _ in range(len(atoms) // 3)]
    for k, symbol in enumerate(atoms.symbols):
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residues[k // 3])
    topology.setPeriodicBoxVectors(reduced(atoms.cell.array) * unit.angstrom)
    system = system_of(atoms, mlff.openmm.create_force(model_path, topology, use_cuda_graphs=graphs))
    bonds = openmm.HarmonicBondForce()  # of no strength: they tell the barostat what a molecule is
    for k in range(0, len(atoms), 3):
        bonds.addBond(k, k + 1, 0.1, 0.0)
        bonds.addBond(k, k + 2, 0.1, 0.0)
    system.addForce(bonds)
    barostat = openmm.MonteCarloBarostat(1000.0 * unit.bar, 300 * unit.kelvin, 1)
    barostat.setRandomNumberSeed(1)
    system.addForce(barostat)
    context = make_context(system, atoms.positions, precision, step=0.0001)
    context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    volumes = set()
    for _ in range(20):
        context.getIntegrator().step(1)
        volumes.add(context.getState().getPeriodicBoxVolume()._value)
    assert len(volumes) > 1  # moves were accepted
    state = context.getState(getPositions=True)
    atoms.positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    atoms.set_cell(state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM)
    check(context, model, atoms, precision)


def test_file_with_elements(model, tmp_path):
    """The file alone, as a user of OpenMM-Torch loads it."""
    import openmmtorch

    atoms, path = ethanol(), tmp_path / "ethanol.pt"
    torchscript.save(build_payload(model, {}, architectures()), path, atoms.numbers)
    force = openmmtorch.TorchForce(str(path))
    force.setOutputsForces(True)
    assert_as_reference(model, make_context(system_of(atoms, force), atoms.positions), atoms)


def test_positions_that_are_not_finite(model, model_path):
    atoms = ethanol()
    context = context_of(atoms, model_path)
    positions = atoms.positions.copy()
    positions[3, 1] = np.nan
    context.setPositions(positions / ANGSTROM_PER_NM)
    assert "NaN" in fails(context) or "finite" in fails(context)
    context.setPositions(atoms.positions / ANGSTROM_PER_NM)
    check(context, model, atoms)  # the Context goes on with good input


def test_file_without_code_for_gpus(model, tmp_path):
    torchscript.save(build_payload(model), tmp_path / "cpu.pt")
    assert "no kernels for GPUs" in fails(context_of(ethanol(), tmp_path / "cpu.pt"))
