"""A plan for GPUs whose kernels are those of cpp/fake_cuda.cpp, and payloads with it."""

import copy

import numpy as np
from reference import random_model

from mlff import payload
from mlff.export import build_payload

SEARCH = (
    "counts positions elements structure starts boxes images cutoff order edge_count neighbors distance geometry flags rebuild"
    " edge_capacity candidate_capacity"
)
PAIRS = "counts order edge_count neighbors distance geometry cutoff x atom_energy forces atom_virial edge_capacity"
ARGS = {
    "dense": SEARCH + " caller_positions caller_box caller_atoms units",
    "list": SEARCH,
    "features_few": "counts elements order x",
    "features": "counts elements order x",
    "energy": PAIRS,
    "gradient": PAIRS,
    "total": "counts starts atom_energy forces atom_virial flags energies virials status rebuild edge_capacity candidate_capacity"
    " caller_atoms units caller_energy caller_forces",
    "load": "counts caller_positions caller_box caller_atoms units positions boxes",
}
BUFFERS = [("order", "i32", "total", 1), ("edge_count", "i32", "total", 1), ("neighbors", "i32", "edges", 1),
           ("distance", "f64", "edges", 1), ("geometry", "f32", "edges", 4), ("x", "f32", "total", 2),
           ("spare", "f16", "bins", 3), ("slot", "i32", "candidates", 1)]  # fmt: skip
INPUTS = {"positions": "f64", "boxes": "f64", "energies": "f64", "virials": "f64", "atom_energy": "f64", "forces": "f64",
          "atom_virial": "f64", "units": "f64", "caller_positions": "f64", "caller_box": "f64", "caller_energy": "f64",
          "caller_forces": "f64", "cutoff": "f64"}  # fmt: skip
ELF = np.frombuffer(b"\x7fELF\x02\x01" + bytes(58), dtype=np.uint8)


def plan() -> dict:
    dtypes = {**INPUTS, **{name: dtype for name, dtype, _, _ in BUFFERS}}

    def type_of(name):
        return "i32" if name.endswith("_capacity") else dtypes.get(name, "i32") + "*"

    def stage(kernel, kind="forward"):
        return {"kernel": kernel, "pass": kind, "args": ARGS[kernel].split(), "grid": ["local", 16, 1]}

    def schedule(features):
        exchange = {"kernel": "exchange", "pass": "forward", "args": ["x"]}
        return [stage(features), exchange, stage("energy"), stage("gradient", "backward"), stage("total")]

    shared = {"sm_80": 0, "sm_86": 0, "sm_90": 65536, "ptx": 64}
    kernels = {
        name: {"warps": 4, "args": [type_of(a) for a in args.split()], "shared": dict(shared)} for name, args in ARGS.items()
    }
    kernels["features_few"]["carveout"] = 25
    return {
        "buffers": [dict(zip(("name", "dtype", "rows", "width"), b)) for b in BUFFERS],
        "kernels": kernels,
        "overlapping": ["sm_90"],
        "search": {"dense": [stage("dense")], "list": [stage("list")]},
        "schedules": [
            {"max_rows": 100, "stages": schedule("features_few")},
            {"max_rows": None, "stages": schedule("features")},
        ],
        "import": [stage("load")],
    }


def model_parts():
    """Header without a plan for GPUs, and tensors with machine code, of a small model."""
    header, tensors = payload.unpack(build_payload(random_model(16, 2, species=("H", "O"))))
    for name in ARGS:
        tensors.update({f"cuda.sm_{a}.{name}": ELF for a in (80, 86, 90)})
        tensors[f"cuda.ptx.{name}"] = np.frombuffer(b".version 7.0\0", dtype=np.uint8)
    header["plans"].pop("cuda", None)
    return header, tensors


def packed(parts, change=lambda plan: None, **tensors) -> bytes:
    """The payload of those parts with the plan above, changed by ``change``, and with these tensors (None: without one)."""
    header, known = copy.deepcopy(parts[0]), {**parts[1], **tensors}
    header["plans"]["cuda"] = plan()
    change(header["plans"]["cuda"])
    return payload.pack(header, {k: v for k, v in known.items() if v is not None})
