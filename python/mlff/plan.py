"""The plan: which kernels run in which order on which buffers (format in docs/file-format.md, kernels in docs/kernels.md)."""

from typing import Any, Dict, List

from .painn import PaiNNConfig

EDGE = ["offsets", "neighbors"]


class Plan:
    """Collects buffers and stages; :meth:`to_dict` gives what is written to the file."""

    def __init__(self):
        self.buffers: List[Dict[str, Any]] = []
        self.stages: List[Dict[str, Any]] = []

    def buffer(self, name: str, rows: str, width: int, dtype: str = "f32") -> str:
        self.buffers.append({"name": name, "dtype": dtype, "rows": rows, "width": width})
        return name

    def stage(self, kernel: str, args: List[str], backward: bool = False) -> None:
        self.stages.append({"kernel": kernel, "pass": "backward" if backward else "forward", "args": args})

    def to_dict(self) -> Dict[str, Any]:
        return {"buffers": self.buffers, "stages": self.stages}


def cpu_plan(config: PaiNNConfig) -> Plan:
    """Schedule of the CPU backend: one stage per operation, dense parts in blocks of atoms inside the kernels."""
    f, n = config.features, config.layers
    plan = Plan()
    for name in ("basis", "slope"):
        plan.buffer(name, "edges", config.n_radial + 1)
    plan.stage("radial_basis", ["distance", "cutoff", "basis", "slope"])

    for layer in range(n):
        w = f"layers.{layer}."
        s_mid, v_mid = plan.buffer(f"s_mid{layer}", "local", f), plan.buffer(f"v_mid{layer}", "local", 3 * f)
        if layer == 0:
            plan.stage("message_first", ["embedding", w + "q_s", w + "q_v", "species", *EDGE, "unit", "basis", s_mid, v_mid])
        else:
            s, v, x = f"s{layer - 1}", f"v{layer - 1}", plan.buffer(f"x{layer}", "total", 6 * f)
            plan.stage("source_features", [s, v, *(w + f"source.{p}" for p in ("w1", "b1", "w2", "b2")), x])
            plan.stage("exchange", [x])
            plan.stage("message", [x, s, w + "filter", *EDGE, "unit", "basis", s_mid, v_mid])
        s, v = plan.buffer(f"s{layer}", "local", f), plan.buffer(f"v{layer}", "local", 3 * f)
        weights = [w + f"update.{p}" for p in ("vu", "w1", "b1", "w2", "b2")]
        kept = [plan.buffer(f"{b}{layer}", "local", width) for b, width in (("pq", 6 * f), ("norm", f), ("hidden", f), ("a", 3 * f))]
        plan.stage("update", [s_mid, v_mid, *weights, s, v, *kept])
    readout = [f"readout.{p}" for p in ("w1", "b1", "w2", "b2")]
    plan.stage("readout", [f"s{n - 1}", "species", *readout, "shift", "atom_energy"])
    plan.stage("repulsion", ["species", *EDGE, "distance", "pair_table", "atom_energy"])

    g = plan.buffer("g", "total", 4 * f)
    if n > 1:
        plan.buffer("g_x", "local", 6 * f)
    plan.stage("readout_backward", [f"s{n - 1}", "species", *readout[:3], g], backward=True)
    for layer in reversed(range(n)):
        w = f"layers.{layer}."
        kept = [f"{b}{layer}" for b in ("pq", "norm", "hidden", "a")]
        plan.stage("update_backward", [*(w + f"update.{p}" for p in ("vu", "w1", "w2")), *kept, g], backward=True)
        geometry = [*EDGE, "unit", "distance", "basis", "slope"]
        if layer == 0:
            plan.stage("message_first_backward", [g, w + "q_s", w + "q_v", "species", *geometry, "gradient"], backward=True)
        else:
            plan.stage("exchange", [g], backward=True)
            plan.stage("message_backward", [g, f"x{layer}", w + "filter", *geometry, "g_x", "gradient"], backward=True)
            source = [w + f"source.{p}" for p in ("w1", "b1", "w2")]
            plan.stage("source_features_backward", ["g_x", f"s{layer - 1}", *source, g], backward=True)
    plan.stage("repulsion_backward", ["species", *EDGE, "distance", "unit", "pair_table", "gradient"], backward=True)
    return plan
