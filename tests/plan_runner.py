"""Executes the CUDA plan of a model with Triton itself: under its interpreter on the CPU, or compiled on a GPU.

What plugin/cuda does in C++, in a few lines of Python, so that kernels and plan are tested where there is no GPU.
"""

from typing import Dict

import numpy as np
import torch

from mlff.plan import CUDA_SCALARS

DTYPES = {
    "f16": torch.float16, "f32": torch.float32, "f64": torch.float64, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8,
}


def inverse_box(cell, pbc) -> np.ndarray:
    """The 18 numbers of a box: vectors of periodic directions, and the rows of the inverse that belong to them."""
    cell, pbc = np.array(cell, dtype=float).reshape(3, 3), np.broadcast_to(pbc, 3)
    full = cell.copy()
    for k in range(3):
        if not pbc[k]:
            full[k] = 0
    for k in range(3):
        if not pbc[k]:  # any direction that completes the basis
            rest = np.linalg.svd(full)[2]
            full[k] = rest[np.linalg.matrix_rank(full)]
    inverse = np.linalg.inv(full).T
    return np.concatenate([np.where(pbc[:, None], cell, 0).ravel(), np.where(pbc[:, None], inverse, 0).ravel()])


def images_of(cell, pbc, cutoff: float) -> np.ndarray:
    """Images of the dense search in each direction."""
    box = inverse_box(cell, pbc).reshape(2, 3, 3)
    return np.array([int(cutoff * np.linalg.norm(row) + 0.5) for row in box[1]], dtype=np.int32)


BEYOND = 64  # rows after the end of every array that are not a number, where the executor has another array


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class PlanRunner:
    """One system. Arrays are kept in ``self.arrays`` under the names of docs/cuda.md, so a test can look at every buffer.

    Args:
        plan: what ``cuda_plan`` returns.
        tensors: the tensors of the payload as NumPy arrays.
        cutoff: of the model.
        search: "dense" or "list".
        schedule: index of the schedule.
    """

    def __init__(self, plan, tensors: Dict[str, np.ndarray], cutoff: float, device: str = "cpu", search: str = "dense", schedule: int = 0):
        self.plan, self.cutoff, self.device, self.search, self.schedule = plan, cutoff, device, search, schedule
        self.dict = plan.to_dict()
        self.tensors = {k: torch.from_numpy(np.array(v)).to(device) for k, v in tensors.items()}

    def set_atoms(self, species, n_local=None, starts=None, edge_capacity=64, candidate_capacity=128, permute=None, extra_rows=3):
        """extra_rows: rows of capacity beyond the atoms, which no kernel may count."""
        species = np.asarray(species, dtype=np.int32)
        total = len(species)
        n_local = total if n_local is None else n_local
        starts = np.array([0, total] if starts is None else starts, dtype=np.int32)
        self.n_total, self.n_local, n = total, n_local, len(starts) - 1
        permute = (self.search == "list" and n_local == total) if permute is None else permute
        self.scalars = {"edge_capacity": edge_capacity, "candidate_capacity": candidate_capacity}
        # As the executor does: capacities are multiples of 16, arrays of atoms go on to a multiple of 128, those of edges do not.
        rows = {"local": round_up(n_local + extra_rows, 16), "total": round_up(total + extra_rows, 16), "structures": n, "one": 1}
        rows["edges"] = rows["total"] * edge_capacity
        rows["candidates"] = rows["total"] * candidate_capacity
        rows["bins"] = max(64, round_up(2 * total, 16))
        self.rows = rows

        def full(count, width, dtype):
            count = round_up(rows[count], 128) if count in ("local", "total") else rows.get(count, count)
            array = torch.zeros((count + BEYOND) * width, dtype=DTYPES[dtype], device=self.device)
            if array.is_floating_point():
                array[count * width :] = torch.nan
            return array[: count * width].view((count, width) if width > 1 else count)

        a = self.arrays = {b["name"]: full(b["rows"], b["width"], b["dtype"]) for b in self.dict["buffers"]}
        shapes = {
            "positions": ("total", 3, "f64"), "boxes": ("structures", 18, "f64"), "images": ("structures", 3, "i32"), "flags": (16, 1, "i32"),
            "status": (16, 1, "i32"), "rebuild": (1, 1, "i32"), "energies": ("structures", 1, "f64"), "virials": ("structures", 6, "f64"),
            "atom_energy": ("total", 1, "f64"), "forces": ("total", 3, "f64"), "atom_virial": ("total", 6, "f64"),
        }
        for name, (count, width, dtype) in shapes.items():
            a[name] = full(count, width, dtype)
        structure = np.repeat(np.arange(n, dtype=np.int32), np.diff(starts))

        def put(values, length):
            array = np.zeros(length, dtype=np.int32)
            array[: len(values)] = values
            return torch.from_numpy(array).to(self.device)

        padded = round_up(rows["total"], 128)
        a["elements"], a["structure"] = put(species, padded), put(structure, padded)
        a["starts"], a["counts"] = put(starts, n + 1), put([n_local, total, n, int(permute)], 4)
        a["rebuild"].fill_(1)
        # The caller has no arrays on the device: null pointers.
        a.update({f"caller_{x}": torch.zeros(0, dtype=torch.float64, device=self.device) for x in ("positions", "box", "forces", "energy")})
        a["caller_atoms"], a["units"] = put(range(total), padded), torch.ones(4, dtype=torch.float64, device=self.device)

    def compute(self, positions, cells=None, pbcs=None, backward=True):
        """cells [n, 3, 3] and pbcs [n, 3], or those of one structure. Returns a dict of NumPy arrays."""
        a, n = self.arrays, self.rows["structures"]
        cells = np.zeros((n, 3, 3)) if cells is None else np.broadcast_to(np.asarray(cells, dtype=float), (n, 3, 3))
        pbcs = np.zeros((n, 3), dtype=bool) if pbcs is None else np.broadcast_to(np.asarray(pbcs, dtype=bool), (n, 3))
        a["positions"][: self.n_total] = torch.from_numpy(np.asarray(positions, dtype=float)).to(self.device)
        a["boxes"].copy_(torch.from_numpy(np.stack([inverse_box(c, p) for c, p in zip(cells, pbcs)])))
        if self.search == "dense":
            a["images"].copy_(torch.from_numpy(np.stack([images_of(c, p, self.cutoff) for c, p in zip(cells, pbcs)])))
        self.run(self.dict["search"][self.search], backward)
        self.run(self.dict["schedules"][self.schedule]["stages"], backward)
        names = ("energies", "virials", "atom_energy", "forces", "atom_virial", "status")
        return {name: a[name].cpu().numpy()[: self.n_total if name[:5] in ("atom_", "force") else None] for name in names}

    def run(self, stages, backward=True):
        for stage in stages:
            if stage["pass"] == ("energy" if backward else "backward") or stage["kernel"] == "exchange":
                continue
            rows, per_program, times = stage["grid"]
            grid = (-(-self.rows[rows] // per_program) * times,)
            launch = self.plan.launches[stage["kernel"]]
            args = [
                self.scalars[x] if x in CUDA_SCALARS else self.arrays[x] if x in self.arrays else self.tensors[x] for x in stage["args"]
            ]
            overlap = {"launch_pdl": True} if self.device != "cpu" and torch.cuda.get_device_capability()[0] >= 9 else {}
            launch.function[grid](*args, **launch.constants, num_warps=launch.warps, num_stages=launch.stages, **overlap)
