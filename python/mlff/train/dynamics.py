"""Molecular dynamics of many small systems in one batch, with a teacher or with a student (examples/train).

Sampling needs many short, independent trajectories of systems of 3 to 200 atoms. One at a time they leave a GPU
idle; as one graph with many components they run at the speed of one large system.

    md = Langevin(Batch(structures, "cuda"), Student(load_checkpoint("student.safetensors"), "cuda"), temperatures)
    md.step(1000)
    frames, failures = sample(md, steps=20000, stride=500, check=50)

Units: Angstrom, eV, amu, fs for times at the interface; the integrator works in ASE's units.
Cells are orthorhombic, `box` [B, 3]; an infinite box is an open boundary.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from ase import Atoms, units
from rich.console import Console
from rich.progress import track

from ..painn import PaiNN, energy_and_gradient
from .teachers import SO3LR_LONG_RANGE_CUTOFF, aimnet2_model, so3lr_calculator

FAR = 1.0e6  # Angstrom, the box length that stands for an open boundary


class Batch:
    """Positions, species and boxes of B systems, atoms one after another.

    numbers [N] int64, positions [N, 3] float64, box [B, 3] float64, system [N] int64 (the system of each atom).
    """

    def __init__(self, frames: list[Atoms], device: str):
        counts = torch.tensor([len(atoms) for atoms in frames])
        self.frames = frames
        self.size = len(frames)
        self.device = device
        self.counts = counts.to(device)
        self.system = torch.repeat_interleave(torch.arange(self.size), counts).to(device)
        self.first = (torch.cumsum(counts, 0) - counts).to(device)
        self.numbers = torch.tensor(np.concatenate([a.numbers for a in frames]), dtype=torch.long, device=device)
        self.masses = torch.tensor(np.concatenate([a.get_masses() for a in frames]), device=device)[:, None]
        self.positions = torch.tensor(np.concatenate([a.positions for a in frames]), device=device)
        boxes = []
        for atoms in frames:
            lengths = atoms.cell.lengths()
            if atoms.pbc.any() and not np.allclose(atoms.cell.array, np.diag(lengths)):
                raise ValueError(f"expected an orthorhombic cell, got {atoms.cell.array.tolist()}")
            boxes.append(np.where(atoms.pbc, lengths, FAR))
        self.box = torch.tensor(np.array(boxes), device=device)
        self.periodic = self.box[:, 0] < FAR

    def neighbors(self, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
        """All ordered pairs (i, j, image) closer than `cutoff`: edge_index [2, E] and unit_shifts [E, 3].

        The vector of an edge is x_j + shift * box - x_i. Every image is found, also in boxes smaller than the
        cutoff: pairs are first brought to their nearest image, then all shifts that can still be inside are tried.
        """
        width = int(self.counts.max())
        slot = torch.arange(width, device=self.device)
        filled = slot[None] < self.counts[:, None]  # [B, width]
        index = (self.first[:, None] + slot[None]).clamp_max(len(self.numbers) - 1)
        padded = self.positions[index]  # [B, width, 3]
        box = self.box[:, None, None, :]
        delta = padded[:, None, :, :] - padded[:, :, None, :]  # [B, i, j, 3] = x_j - x_i
        wrap = -torch.round(delta / box)
        delta = delta + wrap * box
        pair = filled[:, :, None] & filled[:, None, :]
        distinct = pair & ~torch.eye(width, dtype=torch.bool, device=self.device)
        reach = torch.floor(cutoff / self.box + 0.5).amax(0).long().tolist()
        edges, shifts = [], []
        for image in np.ndindex(*(2 * n + 1 for n in reach)):
            image = torch.tensor([k - n for k, n in zip(image, reach)], device=self.device, dtype=delta.dtype)
            home = not image.any()
            squared = (delta + image * box).square().sum(-1)
            inside = (squared < cutoff**2) & (distinct if home else pair)
            b, i, j = torch.nonzero(inside, as_tuple=True)
            edges.append(torch.stack([self.first[b] + i, self.first[b] + j]))
            shifts.append(wrap[b, i, j] + image)
        return torch.cat(edges, 1), torch.cat(shifts)

    def snapshot(self) -> list[Atoms]:
        """The current state as ASE frames (positions not wrapped, so that molecules stay whole)."""
        positions, boxes = self.positions.cpu().numpy(), self.box.cpu().numpy()
        result = []
        for b, (frame, first) in enumerate(zip(self.frames, self.first.tolist())):
            atoms = frame.copy()
            atoms.positions = positions[first : first + len(frame)]
            if frame.pbc.any():
                atoms.cell = np.diag(boxes[b])
            result.append(atoms)
        return result


class Potential:
    """Energy [B] (eV), forces [N, 3] (eV/A) and pressure [B] (eV/A^3) of a batch, over a neighbour list with a skin."""

    cutoff: float
    skin = 1.0

    def __init__(self):
        self.listed_at = None

    def edges(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Neighbours within cutoff + skin; built anew once an atom has moved half a skin or a box has changed."""
        stale = (
            self.listed_at is None
            or self.listed_at.shape != batch.positions.shape
            # written so that a position that is not finite also asks for a new list
            or not bool((self.listed_at - batch.positions).norm(dim=1).max() < 0.4 * self.skin)
            or not bool((self.listed_box / batch.box - 1).abs().max() < 0.005)
        )
        if stale:
            self.listed_at, self.listed_box = batch.positions.clone(), batch.box.clone()
            self.list = batch.neighbors(self.cutoff + self.skin)
        return self.list


def _close(batch: Batch, edge_index, unit_shifts, cutoff):
    """The edges that are inside `cutoff` now, and their lengths."""
    shifts = unit_shifts * batch.box[batch.system[edge_index[0]]]
    lengths = (batch.positions[edge_index[1]] - batch.positions[edge_index[0]] + shifts).norm(dim=1)
    inside = lengths < cutoff
    return edge_index[:, inside], unit_shifts[inside], lengths[inside]


class SO3LR(Potential):
    """SO3LR over a whole batch. `dtype` float32 moves atoms; labels are made in float64 by mlff label."""

    def __init__(self, device: str, dtype=torch.float32):
        super().__init__()
        self.model = so3lr_calculator(device).models[0].to(dtype)
        self.dtype = dtype
        self.cutoff = SO3LR_LONG_RANGE_CUTOFF

    def __call__(self, batch: Batch):
        torch.set_default_dtype(self.dtype)  # the teacher makes its constants in the default type
        far = _close(batch, *self.edges(batch), self.cutoff)
        near = far[2] < float(self.model.r_max)
        cell = torch.diag_embed(torch.where(batch.box < FAR, batch.box, torch.ones_like(batch.box))).to(self.dtype)
        zeros = torch.zeros(batch.size, device=batch.device, dtype=self.dtype)
        data = {
            "positions": batch.positions.to(self.dtype).clone(),
            "node_attrs": torch.nn.functional.one_hot(batch.numbers - 1, 118).to(self.dtype),
            "atomic_numbers": batch.numbers,
            "edge_index": far[0][:, near],
            "unit_shifts": far[1][near].to(self.dtype),
            "edge_index_lr": far[0],
            "unit_shifts_lr": far[1].to(self.dtype),
            "cell": cell.reshape(-1, 3),
            "batch": batch.system,
            "ptr": torch.cat([batch.first, batch.counts.sum()[None]]),
            "head": torch.zeros(batch.size, dtype=torch.long, device=batch.device),
            "total_charge": zeros,
            "total_spin": zeros,
        }
        out = self.model(data, compute_stress=True)
        torch.set_default_dtype(torch.float32)
        pressure = -out["stress"].detach().diagonal(dim1=-2, dim2=-1).mean(-1).double()
        return out["energy"].detach().double(), out["forces"].detach().double(), pressure


def _in_open_space(batch: Batch, name: str) -> None:
    if batch.periodic.any():
        raise ValueError(f"the potential {name} takes molecules in open space, got a periodic box; use Student or SO3LR")


class AIMNet2(Potential):
    """One member of AIMNet2's ensemble over a whole batch of molecules: it moves atoms, labels are made by all four.

    Molecules of about equal size are padded to one and evaluated together, as many as `max_pairs` pairs of atoms allow
    (about 20 kB each).
    """

    def __init__(self, device: str, member: int = 0, max_pairs: int | None = None):
        super().__init__()
        self.model = getattr(aimnet2_model(device).models, str(member))
        self.max_pairs = max_pairs or (1_000_000 if "cuda" in device else 20_000)
        self.chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.chunks_of: Batch | None = None

    def _pad(self, batch: Batch) -> None:
        """Chunks of systems of about one size: systems [b], the rows of their atoms [b, width], and which of them are atoms."""
        self.chunks, self.chunks_of = [], batch
        order = torch.argsort(batch.counts, stable=True)
        sizes = batch.counts[order].tolist()
        first = 0
        while first < len(sizes):
            last = first + 1
            while last < len(sizes) and (last + 1 - first) * sizes[last] ** 2 <= self.max_pairs:
                last += 1
            systems, slot = order[first:last], torch.arange(sizes[last - 1], device=batch.device)
            filled = slot[None] < batch.counts[systems][:, None]
            rows = torch.where(filled, batch.first[systems][:, None] + slot[None], 0)
            self.chunks.append((systems, rows, filled))
            first = last

    def __call__(self, batch: Batch):
        if self.chunks_of is not batch:
            _in_open_space(batch, "AIMNet2")
            self._pad(batch)
        energy, forces = torch.zeros_like(batch.box[:, 0]), torch.zeros_like(batch.positions)
        for systems, rows, filled in self.chunks:
            coordinates = torch.where(filled[..., None], batch.positions[rows], 0.0).float()
            numbers = torch.where(filled, batch.numbers[rows], 0)
            with torch.jit.optimized_execution(False):  # as in teachers.aimnet2
                out = self.model({"coord": coordinates, "numbers": numbers, "charge": torch.zeros_like(coordinates[:, 0, 0])})
            energy[systems] = out["energy"].detach().double()
            forces[rows[filled]] = out["forces"].detach().double()[filled]
        return energy, forces, torch.zeros_like(energy)


class Student(Potential):
    """A PaiNN of this package, through the analytic gradients of its reference."""

    def __init__(self, model: PaiNN, device: str):
        super().__init__()
        self.model = model.to(device).requires_grad_(False)
        self.cutoff = float(model.config.cutoff)

    @torch.no_grad()
    def __call__(self, batch: Batch):
        edge_index, unit_shifts, _ = _close(batch, *self.edges(batch), self.cutoff)
        shifts = unit_shifts * batch.box[batch.system[edge_index[0]]]
        vectors = batch.positions[edge_index[1]] + shifts - batch.positions[edge_index[0]]
        energies, gradient = energy_and_gradient(self.model, batch.numbers, edge_index, vectors)
        energy = torch.zeros_like(batch.box[:, 0]).index_add(0, batch.system, energies)
        forces = torch.zeros_like(batch.positions)
        forces = forces.index_add(0, edge_index[0], gradient).index_add(0, edge_index[1], -gradient)
        trace = torch.zeros_like(energy).index_add(0, batch.system[edge_index[0]], -(vectors * gradient).sum(1))
        return energy, forces, trace / (3.0 * batch.box.prod(1))


class Compiled(Potential):
    """A model file of mlff-export through the compiled core, in open space: many times faster than Student, the same numbers."""

    def __init__(self, path: Path, device: str):
        super().__init__()
        from ..core import Model, System

        self.system = System(Model(path), device)
        self.batch: Batch | None = None

    def __call__(self, batch: Batch):
        if self.batch is not batch:
            _in_open_space(batch, "Compiled")
            self.system.set_atoms(batch.numbers.cpu().numpy())
            self.system.set_structures([*batch.first.tolist(), len(batch.numbers)])
            self.batch = batch
        found = self.system.compute_batch(batch.positions.cpu().numpy(), want=("energy", "forces"))
        energy, forces = (torch.as_tensor(found[name], device=batch.device) for name in ("energy", "forces"))
        return energy, forces, torch.zeros_like(energy)


def relax(batch: Batch, potential: Potential, steps: int, longest: float = 0.05) -> None:
    """Walk downhill by at most `longest` Angstrom a step: takes the worst contacts out of packed structures."""
    for _ in range(steps):
        _, forces, _ = potential(batch)
        step = 0.01 * forces
        norm = step.norm(dim=1, keepdim=True)
        batch.positions += step * (longest / norm.clamp_min(longest))


class Langevin:
    """Langevin dynamics of all systems at their own temperatures, splitting BAOAB (Leimkuhler, Matthews 2013).

    `friction` (1/fs) is one number or one per system; where it is 0, this is velocity Verlet (NVE). With `pressure`
    (bar) periodic boxes follow an isotropic stochastic cell rescaling (Bernetti, Bussi 2020), every `barostat_stride`
    steps.
    """

    barostat_stride = 10

    def __init__(self, batch, potential, temperatures, timestep=0.5, friction=0.01, pressure=None, tau=500.0, seed=0):
        self.batch, self.potential, self.steps = batch, potential, 0
        self.generator = torch.Generator(device=batch.device).manual_seed(seed)
        self.dt = timestep * units.fs
        friction = torch.as_tensor(friction, dtype=torch.float64, device=batch.device).expand(batch.size)
        self.damp = torch.exp(-friction / units.fs * self.dt)[batch.system][:, None]
        self.thermostat = bool((friction > 0).any())
        self.pressure = None if pressure is None else pressure * 1e5 * units.Pascal
        self.tau = tau * units.fs
        self.set_temperatures(temperatures)
        self.velocities = self._noise() * (self.kT / batch.masses).sqrt()
        self.energy, self.forces, self.virial_pressure = potential(batch)

    def set_temperatures(self, temperatures) -> None:
        self.temperatures = torch.as_tensor(temperatures, dtype=torch.float64, device=self.batch.device)
        self.kT = (units.kB * self.temperatures)[self.batch.system][:, None]

    def _noise(self) -> torch.Tensor:
        shape, device = self.batch.positions.shape, self.batch.device
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device=device)

    def kinetic(self) -> torch.Tensor:
        """Kinetic energy [B] in eV."""
        each = 0.5 * (self.batch.masses * self.velocities.square()).sum(1)
        return torch.zeros_like(self.energy).index_add_(0, self.batch.system, each)

    def step(self, count: int) -> None:
        batch = self.batch
        for _ in range(count):
            self.steps += 1
            self.velocities += 0.5 * self.dt * self.forces / batch.masses
            batch.positions += 0.5 * self.dt * self.velocities
            if self.thermostat:
                thermal = ((1.0 - self.damp**2) * self.kT / batch.masses).sqrt()
                self.velocities = self.damp * self.velocities + thermal * self._noise()
            batch.positions += 0.5 * self.dt * self.velocities
            self.energy, self.forces, self.virial_pressure = self.potential(batch)
            self.velocities += 0.5 * self.dt * self.forces / batch.masses
            if self.pressure is not None and self.steps % self.barostat_stride == 0:
                self._rescale_cells()

    def snapshot(self) -> list[Atoms]:
        return self.batch.snapshot()

    def put_back(self, systems: torch.Tensor, positions: torch.Tensor, box: torch.Tensor) -> None:
        """Give some systems (mask [B]) earlier positions and boxes, and fresh velocities."""
        batch = self.batch
        atoms = systems[batch.system][:, None]
        batch.positions = torch.where(atoms, positions, batch.positions)
        batch.box = torch.where(systems[:, None], box, batch.box)
        self.velocities = torch.where(atoms, self._noise() * (self.kT / batch.masses).sqrt(), self.velocities)
        self.potential.listed_at = None
        self.energy, self.forces, self.virial_pressure = self.potential(batch)

    def _rescale_cells(self) -> None:
        batch = self.batch
        volume = batch.box.prod(1)
        kT = units.kB * self.temperatures
        compressibility = 4.5e-5 / (1e5 * units.Pascal)  # of liquid water, per bar
        ratio = compressibility * self.dt * self.barostat_stride / self.tau
        pressure = self.virial_pressure + 2.0 * self.kinetic() / (3.0 * volume)
        noise = torch.randn(batch.size, generator=self.generator, dtype=torch.float64, device=batch.device)
        strain = -ratio * (self.pressure - pressure) + (2.0 * kT * ratio / volume).sqrt() * noise
        strain = strain.clamp(-0.01, 0.01)  # of the logarithm of the volume
        scale = torch.where(batch.periodic, (strain / 3.0).exp(), torch.ones_like(strain))[:, None]
        batch.box = torch.where(batch.periodic[:, None], batch.box * scale, batch.box)
        batch.positions = batch.positions * scale[batch.system]
        self.velocities = self.velocities / scale[batch.system]


def sample(
    md: Langevin,
    steps: int,
    stride: int,
    check: int,
    max_force: float = 25.0,
    deadline: float = math.inf,
    apart: Callable[[Batch], torch.Tensor] | None = None,
    seed: int = 0,
) -> tuple[list[Atoms], np.ndarray]:
    """Run `steps` steps, or until the clock says `deadline` (time.time()), and take a frame of every sound system each `stride`.

    Every `check` steps (a divisor of stride) systems are looked at: one with a force above `max_force` (eV/Angstrom), far
    above its temperature, or in the mask `apart(batch)` [B] has failed and is put back to an earlier sound state with fresh
    velocities. Frames that are merely wrong teach a student, so the first three of a system are taken, too; frames that are torn
    apart teach nothing.

    Returns the frames, and how often each system failed [B]. Raises ValueError for a stride that check does not divide.
    """
    if stride % check:
        raise ValueError(f"expected a stride that is a multiple of check, got {stride} and {check}")
    batch, rng = md.batch, np.random.default_rng(seed)
    frames: list[Atoms] = []
    failures = np.zeros(batch.size, dtype=int)
    sound = [(batch.positions.clone(), batch.box.clone())]
    console, reported = Console(stderr=True), time.time()
    for done in track(range(0, steps, check), description="dynamics", console=console, disable=not sys.stderr.isatty()):
        if time.time() > reported + 20.0 and not sys.stderr.isatty():
            reported = time.time()
            print(f"{done} of {steps} steps, {len(frames)} frames, {np.count_nonzero(failures)} systems failed", flush=True)
        if time.time() > deadline:
            print(f"stopped by the clock after {done} steps", flush=True)
            break
        md.step(check)
        largest = torch.zeros(batch.size, dtype=torch.float64, device=batch.device)
        largest = largest.scatter_reduce(0, batch.system, md.forces.norm(dim=1).nan_to_num(1e9), "amax")
        hot = md.kinetic() / (1.5 * units.kB * batch.counts) > 4.0 * md.temperatures + 500.0
        torn = hot | ~torch.isfinite(md.energy)
        if apart is not None:
            torn |= apart(batch)
        broken = (largest > max_force) | torn
        now = None
        if (done // check + 1) % (stride // check) == 0:
            now = md.snapshot()
            frames += [now[b] for b in torch.nonzero(~broken)[:, 0].tolist()]
        if broken.any():
            snapshot = md.snapshot() if now is None else now
            for b in torch.nonzero(broken)[:, 0].tolist():
                failures[b] += 1
                if failures[b] <= 3 and largest[b] < 10.0 * max_force and not torn[b]:
                    frames.append(snapshot[b])
            md.put_back(broken, *sound[rng.integers(len(sound))])
        elif len(sound) < 20:
            sound.append((batch.positions.clone(), batch.box.clone()))
    return frames, failures
