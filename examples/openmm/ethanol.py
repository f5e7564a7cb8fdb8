"""One molecule of ethanol in vacuum with constant energy; prints how well the energy is conserved."""

import argparse
from pathlib import Path

import numpy as np
import torch
from openmm import Context, LocalEnergyMinimizer, Platform, System, VerletIntegrator, unit
from openmm.app import PDBFile

import mlff.openmm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="model.pt")
parser.add_argument("--steps", type=int, default=4000, help="of 0.5 fs")
parser.add_argument("--platform", default="CPU", help="of OpenMM: Reference, CPU or CUDA")
args = parser.parse_args()
torch.set_num_threads(1)  # more gain nothing for nine atoms

pdb = PDBFile(str(Path(__file__).with_name("ethanol.pdb")))
system = System()
for atom in pdb.topology.atoms():
    system.addParticle(atom.element.mass)
system.addForce(mlff.openmm.create_force(args.model, pdb.topology))

integrator = VerletIntegrator(0.5 * unit.femtosecond)
context = Context(system, integrator, Platform.getPlatform(args.platform))
context.setPositions(pdb.positions)
LocalEnergyMinimizer.minimize(context, 10, 200)
context.setVelocitiesToTemperature(300 * unit.kelvin, 1)

block = max(1, args.steps // 10)
print("  time/ps   potential     kinetic       total   (kJ/mol)")
totals = []
for step in range(0, args.steps, block):
    integrator.step(block)
    state = context.getState(energy=True)
    potential, kinetic = state.getPotentialEnergy()._value, state.getKineticEnergy()._value
    totals.append(potential + kinetic)
    print(f"{state.getTime()._value:9.3f} {potential:11.3f} {kinetic:11.3f} {totals[-1]:11.3f}", flush=True)
print(f"the total energy varies by {np.std(totals):.3f} kJ/mol (standard deviation)")
