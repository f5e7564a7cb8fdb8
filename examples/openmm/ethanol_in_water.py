"""A mixed system: mlff inside a molecule of ethanol, TIP3P water around it, a classical interaction between the two.

The model sees the nine atoms of ethanol alone (``atoms=``). Charges and Lennard-Jones parameters of ethanol (ethanol.xml) act
between ethanol and water; inside ethanol they are switched off, since the model covers that (mechanical embedding).
"""

import argparse
import sys
from pathlib import Path

import torch
from openmm import LangevinMiddleIntegrator, NonbondedForce, Platform, unit
from openmm.app import PME, ForceField, Modeller, PDBFile, Simulation, StateDataReporter

import mlff.openmm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="model.pt")
parser.add_argument("--steps", type=int, default=1000, help="of 0.5 fs")
parser.add_argument("--platform", default="CPU", help="of OpenMM: Reference, CPU or CUDA")
args = parser.parse_args()
torch.set_num_threads(1)

here = Path(__file__).parent
pdb = PDBFile(str(here / "ethanol.pdb"))
force_field = ForceField("amber14/tip3p.xml", str(here / "ethanol.xml"))
mixed = Modeller(pdb.topology, pdb.positions)
mixed.addSolvent(force_field, padding=0.9 * unit.nanometer)
system = force_field.createSystem(mixed.topology, nonbondedMethod=PME, nonbondedCutoff=0.9 * unit.nanometer, rigidWater=True)

ethanol = [atom.index for atom in mixed.topology.atoms() if atom.residue.name == "EOH"]
classical = next(force for force in system.getForces() if isinstance(force, NonbondedForce))
for i in ethanol:
    for j in ethanol:
        if i < j:
            classical.addException(i, j, 0.0, 0.1, 0.0, replace=True)
system.addForce(mlff.openmm.create_force(args.model, mixed.topology, atoms=ethanol))

integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 5 / unit.picosecond, 0.5 * unit.femtosecond)
simulation = Simulation(mixed.topology, system, integrator, Platform.getPlatform(args.platform))
simulation.context.setPositions(mixed.positions)
simulation.minimizeEnergy(maxIterations=50)
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
print(f"{len(ethanol)} atoms by mlff, {mixed.topology.getNumAtoms() - len(ethanol)} by TIP3P", flush=True)
simulation.reporters.append(
    StateDataReporter(sys.stdout, max(1, args.steps // 5), step=True, potentialEnergy=True, temperature=True, speed=True)
)
simulation.step(args.steps)
