"""Liquid water: 64 molecules, minimised, brought to 300 K (NVT), then with constant energy (NVE)."""

import argparse
import sys

import torch
from openmm import LangevinMiddleIntegrator, Platform, VerletIntegrator, unit
from openmm.app import ForceField, Modeller, PDBReporter, Simulation, StateDataReporter, Topology

import mlff.openmm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="model.pt")
parser.add_argument("--steps", type=int, default=400, help="of 0.5 fs, in NVT and again in NVE")
parser.add_argument("--platform", default="CPU", help="of OpenMM: Reference, CPU or CUDA")
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(args.threads)  # the force follows torch

# A box of water. The force field TIP3P places the molecules and gives the masses; its forces are thrown away.
tip3p = ForceField("amber14/tip3p.xml")
box = Modeller(Topology(), [] * unit.nanometer)
box.addSolvent(tip3p, numAdded=64, boxShape="cube", neutralize=False)
system = tip3p.createSystem(box.topology, constraints=None, rigidWater=False)
while system.getNumForces():
    system.removeForce(0)
system.addForce(mlff.openmm.create_force(args.model, box.topology))


def simulate(name, integrator, start=None):
    print(name, flush=True)
    simulation = Simulation(box.topology, system, integrator, Platform.getPlatform(args.platform))
    if start is None:
        simulation.context.setPositions(box.positions)
        simulation.minimizeEnergy(tolerance=50, maxIterations=50)
        simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    else:
        simulation.context.setState(start)
    report = max(1, args.steps // 5)
    simulation.reporters.append(
        StateDataReporter(sys.stdout, report, step=True, potentialEnergy=True, totalEnergy=True, temperature=True, speed=True)
    )
    simulation.reporters.append(PDBReporter(f"water-{name}.pdb", report, enforcePeriodicBox=True))
    simulation.step(args.steps)
    return simulation.context.getState(positions=True, velocities=True)


step = 0.5 * unit.femtosecond
state = simulate("nvt", LangevinMiddleIntegrator(300 * unit.kelvin, 5 / unit.picosecond, step))
simulate("nve", VerletIntegrator(step), state)
print("the trajectories are in water-nvt.pdb and water-nve.pdb")
