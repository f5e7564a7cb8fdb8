"""The plan: which kernels run in which order on which buffers (format in docs/file-format.md, kernels in docs/kernels.md)."""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from .painn import PaiNNConfig

EDGE = ["offsets", "neighbors"]


class Plan:
    """Collects buffers and stages; :meth:`to_dict` gives what is written to the file."""

    def __init__(self):
        self.buffers: List[Dict[str, Any]] = []
        self.stages: List[Dict[str, Any]] = []
        self.grade: List[Dict[str, Any]] = []  # of extrapolation grades, run when they are wanted

    def buffer(self, name: str, rows: str, width: int, dtype: str = "f32") -> str:
        self.buffers.append({"name": name, "dtype": dtype, "rows": rows, "width": width})
        return name

    def stage(self, kernel: str, args: List[str], backward: bool = False) -> None:
        self.stages.append({"kernel": kernel, "pass": "backward" if backward else "forward", "args": args})

    def to_dict(self) -> Dict[str, Any]:
        return {"buffers": self.buffers, "stages": self.stages, **({"grade": self.grade} if self.grade else {})}


def cpu_plan(config: PaiNNConfig, grade: bool = False) -> Plan:
    """Schedule of the CPU backend: one stage per operation, dense parts in blocks of atoms inside the kernels.

    grade: with the stage of extrapolation grades, whose tensors the payload must have.
    """
    f, n = config.features, config.layers
    plan = Plan()
    for name in ("basis", "slope"):
        plan.buffer(name, "edges", config.n_radial + 1)
    gaussians = ["gaussians"] if config.radial_basis == "gaussian" else []
    kernel = "radial_basis" + ("_gaussian" if gaussians else "") + ("_cosine" if config.cutoff_function == "cosine" else "")
    plan.stage(kernel, ["distance", "cutoff", *gaussians, "basis", "slope"])
    if config.repulsion:
        plan.stage("switch_basis", ["species", *EDGE, "distance", "pair_table", "basis", "slope"])

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
        weights = [*(w + f"update.{p}" for p in ("vu", "w1", "b1", "w2", "b2")), "norm_epsilon"]
        kept = [plan.buffer(f"{b}{layer}", "local", width) for b, width in (("pq", 6 * f), ("norm", f), ("hidden", f), ("a", 3 * f))]
        plan.stage("update", [s_mid, v_mid, *weights, s, v, *kept])
    readout = [f"readout.{p}" for p in ("w1", "b1", "w2", "b2")]
    plan.stage("readout", [f"s{n - 1}", "species", *readout, "shift", "atom_energy"])
    if config.repulsion:
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
    if config.repulsion:
        plan.stage("repulsion_backward", ["species", *EDGE, "distance", "unit", "pair_table", "gradient"], backward=True)
    if grade:
        args = [f"s{n - 1}", "species", "extrapolation.projection", "extrapolation.environments", "grade"]
        plan.grade.append({"kernel": "extrapolation", "pass": "forward", "args": args})
    return plan


# Arrays and scalars that the CUDA backend provides (docs/cuda.md).
CUDA_INPUTS = {
    "counts": "i32", "positions": "f64", "elements": "i32", "structure": "i32", "starts": "i32", "boxes": "f64", "images": "i32",
    "rebuild": "i32", "flags": "i32", "energies": "f64", "virials": "f64", "atom_energy": "f64", "forces": "f64", "atom_virial": "f64", "grade": "f64",
    "status": "i32", "units": "f64", "caller_atoms": "i32", "caller_energy": "f64",
    "caller_positions": "f64", "caller_box": "f64", "caller_forces": "f64",
}
CUDA_SCALARS = ("edge_capacity", "candidate_capacity")


@dataclass(frozen=True)
class Launch:
    """How a Triton kernel is compiled.

    Attributes:
        function: the ``@triton.jit`` function; its parameters are the stage's args in order, then the constants.
        constants: values of its ``tl.constexpr`` parameters.
        warps, stages: Triton's num_warps and num_stages.
        carveout: percent of a multiprocessor's L1 memory that is to be shared memory; None leaves it to the driver.
        types: of the args ("f32*", "i32"), known once a stage has used the kernel.
    """

    function: Callable
    constants: Dict[str, Any]
    warps: int = 4
    stages: int = 2
    carveout: Optional[int] = None
    types: List[str] = field(default_factory=list)


class CudaPlan:
    """Collects the plan of the CUDA backend. Stages name launches, which carry the functions to be compiled."""

    def __init__(self, tensors: Dict[str, str]):
        """tensors: dtype of each tensor of the payload that stages may name."""
        self._dtypes = {**tensors, **CUDA_INPUTS}
        self.buffers: List[Dict[str, Any]] = []
        self.launches: Dict[str, Launch] = {}
        self.search: Dict[str, List[Dict[str, Any]]] = {}
        self.schedules: List[Dict[str, Any]] = []
        self.imports: List[Dict[str, Any]] = []  # of arrays that are on the device
        self.grade: List[Dict[str, Any]] = []  # of extrapolation grades, run when they are wanted

    def buffer(self, name: str, rows: str, width: int, dtype: str = "f32") -> str:
        self.buffers.append({"name": name, "dtype": dtype, "rows": rows, "width": width})
        self._dtypes[name] = dtype
        return name

    def launch(
        self, name: str, function: Callable, warps: int = 4, stages: int = 2, carveout: Optional[int] = None, **constants
    ) -> str:
        """Declares a kernel under a name that begins with the function's: ``message.small``."""
        self.launches[name] = Launch(function, constants, warps, stages, carveout)
        return name

    def stage(self, launch: str, args: List[str], grid: List[Any], kind: str = "forward") -> Dict[str, Any]:
        """One stage: grid is [rows, rows per block, programs per block]; kind is the pass."""
        types = ["i32" if a in CUDA_SCALARS else self._dtypes[a] + "*" for a in args]
        known = self.launches[launch].types
        if not known:
            known.extend(types)
        if known != types:
            raise ValueError(f"kernel {launch} is compiled for {known}; a stage passes {types}")
        return {"kernel": launch, "pass": kind, "args": args, "grid": grid}

    def to_dict(self) -> Dict[str, Any]:
        """The plan of docs/cuda.md, but for its kernels, which mlff.compile makes."""
        grade = {"grade": self.grade} if self.grade else {}
        imports = {"import": self.imports} if self.imports else {}
        return {"buffers": self.buffers, "search": self.search, "schedules": self.schedules, **imports, **grade}


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and ``least``."""
    return max(least, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class CudaSizes:
    """Sizes of the GPU kernels, which want powers of two: features and columns that are added are zero and change nothing.

    Attributes: features; hidden units of the readout; rows of the basis in a filter (K) and what they are rounded up to (KB); columns of the
    moments, S K, rounded up; number of elements.
    """

    features: int
    readout: int
    basis: int
    basis_block: int
    moments: int
    species: int

    @staticmethod
    def of(config: PaiNNConfig) -> "CudaSizes":
        f, k, s = power_of_two(config.features, 32), config.n_radial + 1, len(config.species)
        return CudaSizes(f, f // 2, k, power_of_two(k, 16), -(-s * k // 32) * 32, s)


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a product of up to 128 features: rows and columns of a program, Triton's num_warps."""

    rows: int
    columns: int
    warps: int

    def constants(self, features: int) -> Dict[str, int]:
        """Of a kernel: more features make the blocks smaller, so that they fit into a multiprocessor."""
        share = max(1, features // 128)
        return {"BM": max(16, self.rows // share), "BN": min(features, max(16, self.columns // share))}


@dataclass(frozen=True)
class Schedule:
    """Block sizes of all kernels between search and forces, as measured (docs/performance.md).

    Attributes:
        name: of the kernels.
        products: of kernels with one product.
        wide: of those that keep more beside it.
        early_exit: whether programs look if they have atoms, for a capacity that exceeds the atoms by many blocks.
        tile: rows that a program of the message kernels treats one after the other.
        edges, edge_warps: of a block of edges in the kernels with one edge a thread.
        carveout: of all its kernels, as :class:`Launch` has it.
        merged: of kernels with two products, forward, that begin with a hidden layer; None if those are two kernels.
        merged_backward: the same backward, where a program has as many ``units`` of the hidden layer.
    """

    name: str
    products: Blocks
    wide: Blocks
    early_exit: bool
    tile: int
    edges: int
    edge_warps: int
    carveout: Optional[int] = None
    merged: Optional[Blocks] = None
    merged_backward: Optional[Blocks] = None
    units: int = 32


HALVES_SCALE = 256.0  # of weights that are kept as pairs of halves: far below 65504 / 256, their lo parts far above the smallest half
GRADIENT_SCALE = 256.0  # of gradients between readout and edges, eV for a number of features: those of trained models are 1e-3 to 1
SMALL_ROWS = 1024  # atoms up to which all pairs are searched and every kernel is spread as widely as it can be
SMALL = Schedule("small", Blocks(16, 32, 4), Blocks(16, 32, 4), early_exit=False, tile=1, edges=64, edge_warps=2, carveout=25,
                 merged=Blocks(16, 32, 8), merged_backward=Blocks(16, 64, 4))
LARGE = Schedule("large", Blocks(64, 128, 4), Blocks(32, 64, 4), early_exit=True, tile=8, edges=32, edge_warps=1)
# Of a program of the message kernels, which is one warp. Places for edges are multiples of 16 per row, so that no block of 16 leaves
# its row: what lies there is finite, and needs no mask.
CHANNELS, EDGES = 16, 16
MERGED_FEATURES = 128  # up to which weights of a whole hidden layer fit into a program


def filter_columns(n: int) -> np.ndarray:
    """Which channel each of n columns of a stored filter is of. A thread holds columns 2 q, 2 q + 1, 8 + 2 q, 9 + 2 q of a product of the
    message kernels, and channels 4 q to 4 q + 3 of what it gathers: so they meet without going through other threads."""
    k = np.arange(n)
    return k // 16 * 16 + k // 2 % 4 * 4 + k // 8 % 2 * 2 + k % 2


def hidden_parts(schedule: Schedule, features: int) -> int:
    """Among how many programs a merged kernel of the backward pass splits a hidden layer; 0 if the schedule has none."""
    return max(1, features // schedule.units) if schedule.merged and features <= MERGED_FEATURES else 0


def cuda_plan(config: PaiNNConfig, grade: Optional[Tuple[int, int]] = None) -> CudaPlan:
    """Plan of the CUDA backend: one description, two schedules that differ in block sizes (docs/cuda.md).

    grade: numbers K and D of environments and directions of extrapolation grades (extrapolation.py); None for a plan without.
    """
    from . import caller_triton, extrapolation_triton, forces_triton, neighbors_triton

    sizes = CudaSizes.of(config)
    f, n = sizes.features, config.layers
    plan = CudaPlan(cuda_tensor_dtypes(config))
    halves, parts = 2 * sizes.basis_block, hidden_parts(SMALL, f)
    for name, width, dtype in (("basis", halves, "f16"), ("slope", halves, "f16"), ("repulsion_slope", 1, "f32"),
                               ("gradient", 4, "f32")):
        plan.buffer(name, "edges", width, dtype)
    neighbors_triton.search_buffers(plan)
    if n > 1:
        plan.buffer("pair_gradient", "edges", 4 * f // CHANNELS)
        plan.buffer("g_x", "local", 3 * f)
    for name, width in (("moments", 4 * sizes.moments), ("g_moments", 4 * sizes.moments), ("s_mid", f), ("v_mid", 3 * f), ("s0", f), ("s1", f),
                        ("g_pq", max(6, 2 * parts) * f), ("hidden", f), ("g_hidden", max(3, parts) * f)):
        plan.buffer(name, "local", width)
    if parts:
        plan.buffer("update_terms", "local", f + f * f // SMALL.products.constants(f)["BN"])
        plan.buffer("next_terms", "local", f * f // SMALL.merged.constants(f)["BN"])
    for name in ("repulsion_energy", "row_energy"):
        plan.buffer(name, "local", 1, "f64")
    for name in ("g0", "g1"):
        plan.buffer(name, "total", 4 * f)
    for layer in range(n):
        for name, width in (("pq", 6 * f), ("slope", f), ("gates", 2 * f)):
            plan.buffer(f"{name}{layer}", "local", width)
        if layer > 0:
            plan.buffer(f"x{layer}", "total", 5 * f)
            for name, width in (("x_vv", f), ("source_slope", f), ("v", 3 * f)):
                plan.buffer(f"{name}{layer}", "local", width)
    plan.search = _search_stages(plan, config, sizes)
    for schedule, rows in ((SMALL, SMALL_ROWS), (LARGE, None)):
        large = rows is None
        last = [forces_triton.forces_stage(plan, large), *forces_triton.total_stages(plan, large)]
        plan.schedules.append({"max_rows": rows, "stages": [*_cuda_stages(plan, config, sizes, schedule), *last]})
    plan.imports = caller_triton.import_stages(plan)
    if grade:
        k, d = map(power_of_two, grade)
        plan.launch("extrapolation", extrapolation_triton.extrapolation, warps=2, F=f, D=d, K=k, BF=min(f, 64), BK=min(k, 64))
        args = ["counts", "order", f"s{(n - 1) % 2}", "species", "gpu.projection", "gpu.environments", "grade"]
        plan.grade = [plan.stage("extrapolation", args, ["local", 1, 1])]
    return plan


def _of_basis(config: PaiNNConfig) -> Tuple[List[str], Dict[str, Any]]:
    """Arguments and constants of kernels that make the radial basis.

    Gaussians are a tensor of the payload; None, which is a constant of the kernel, stands for Bessel functions.
    """
    gaussians = ["gaussians"] if config.radial_basis == "gaussian" else []
    return gaussians, {"COSINE": config.cutoff_function == "cosine", **({} if gaussians else {"gaussians": None})}


def _search_stages(plan: CudaPlan, config: PaiNNConfig, sizes: CudaSizes) -> Dict[str, List[Dict[str, Any]]]:
    """Both searches, and what depends on distances and elements alone: the search among all pairs makes that in the same kernel."""
    from . import filter_triton, neighbors_triton

    gaussians, constants = _of_basis(config)
    constants.update(S=sizes.species, K=sizes.basis, KB=sizes.basis_block, SKP=sizes.moments, ROWS=power_of_two(4 * sizes.species, 16))
    made = ["pair_table", "basis", "slope", "moments", "repulsion_energy", "repulsion_slope"]
    plan.launch("pairs_radial", filter_triton.pairs_radial, warps=4, carveout=SMALL.carveout, BLOCK=128, **constants)
    args = [*neighbors_triton.DENSE.split(), *neighbors_triton.EDGES, *made, *gaussians]
    search = neighbors_triton.search_stages(plan, [plan.stage("pairs_radial", args, ["total", 1, 1])])
    plan.launch("radial", filter_triton.radial, warps=LARGE.edge_warps, stages=3, BE=LARGE.edges, **constants)
    args = ["counts", "species", "edge_count", "neighbors", "geometry", "distance", "cutoff", *made, "edge_capacity", *gaussians]
    search["list"].append(plan.stage("radial", args, ["local", 1, 1]))
    return search


def _cuda_stages(plan: CudaPlan, config: PaiNNConfig, sizes: CudaSizes, schedule: Schedule) -> List[Dict[str, Any]]:
    """Everything between search and forces: what comes after the radial basis."""
    from . import forces_triton, message_triton, readout_triton, update_triton

    f, n, sk = sizes.features, config.layers, sizes.moments
    parts = hidden_parts(schedule, f)
    stages: List[Dict[str, Any]] = []

    def add(launch, args: List[str], backward: bool = False) -> None:
        name, grid = launch
        stages.append(plan.stage(name, args, grid, "backward" if backward else "forward"))

    def launch(function: Callable, grid: List[Any], warps: int, suffix: str = "", **constants):
        name = f"{function.__name__}{suffix}.{schedule.name}"
        plan.launch(name, function, warps=warps, stages=3, carveout=schedule.carveout, **constants)
        return name, grid

    def atom_kernel(function: Callable, blocks: Blocks, suffix: str = "", width: int = f, **more):
        """A kernel whose results have the given width."""
        constants = {"F": f, **blocks.constants(f), **more}
        return launch(function, ["local", constants["BM"], width // constants["BN"]], blocks.warps, suffix, **constants)

    def product_kernel(*args, **more):
        """One product."""
        return atom_kernel(*args, EXIT=schedule.early_exit, **more)

    def message_kernel(function: Callable, suffix: str = "", **more):
        constants = {"F": f, "KB": sizes.basis_block, "TILE": schedule.tile, "C": CHANNELS, "BE": EDGES, **more}
        return launch(function, ["local", schedule.tile, f // CHANNELS], 1, suffix, **constants)

    narrow, wide = schedule.products, schedule.wide
    rows = ["edge_count", "neighbors", "geometry"]
    of_moments = {"SKP": sk, "BK": min(64, sk & -sk)}
    if parts:  # hidden layers are sums of terms, which the kernels before have made
        narrow_columns, merged_columns = narrow.constants(f)["BN"], schedule.merged.constants(f)["BN"]
        of_update, of_next = 1 + f // narrow_columns, f // merged_columns
        norms = {"EPSILON": config.norm_epsilon}
        first = atom_kernel(message_triton.message_first_merged, narrow, width=9 * f, **of_moments, **norms)
        mix = atom_kernel(update_triton.update_mix_merged, narrow, width=5 * f, **norms)
        update = {
            last: atom_kernel(update_triton.update_merged, schedule.merged, ".last" * last, width=(1 if last else 2) * f, LAST=last,
                              N=sizes.readout if last else f, TERMS=of_update)
            for last in (True, False)
        }
        source = atom_kernel(message_triton.source_merged, schedule.merged, width=3 * f, TERMS=of_next)
        read = launch(readout_triton.readout_merged, ["local", narrow.rows, 1], narrow.warps, M=sizes.readout, TERMS=of_next, BM=narrow.rows)
    else:
        first = product_kernel(message_triton.message_first, narrow, width=10 * f, **of_moments)
        mix = product_kernel(update_triton.update_mix, narrow, width=6 * f)
        update_hidden = product_kernel(update_triton.update_hidden, narrow, EPSILON=config.norm_epsilon)
        update = {
            True: product_kernel(update_triton.update, wide, ".last", LAST=True),
            False: product_kernel(update_triton.update, wide, width=2 * f, LAST=False),
        }
        source_hidden = product_kernel(message_triton.source_hidden, narrow)
        source = product_kernel(message_triton.source_features, narrow, width=3 * f)
        read = product_kernel(readout_triton.readout, narrow, M=sizes.readout, BK=min(f, 16384 // sizes.readout))
    message = message_kernel(message_triton.message)
    for layer in range(n):
        w = f"gpu.layers.{layer}."
        mid, last = ["s_mid", "v_mid"], layer == n - 1
        pq, slope = f"pq{layer}", f"slope{layer}"
        hidden, out = [w + "update.w1", w + "update.b1"], [w + "update.w2", w + "update.b2"]
        if layer == 0:
            of_terms = [w + "embedding_hidden", w + "q_hidden", hidden[0], "update_terms"] if parts else []
            add(first, ["counts", "moments", "species", "gpu.embedding", w + "q_s", w + "q_vpq", *mid, pq, *of_terms])
        else:
            x, s, v = f"x{layer}", f"s{(layer - 1) % 2}", f"v{layer}"
            own, sent, kept = [w + "source.w1", w + "source.b1"], [w + "source.w2", w + "source.b2"], f"source_slope{layer}"
            if parts:
                add(source, ["counts", "next_terms", v, own[1], *sent, kept, x, f"x_vv{layer}"])
            else:
                add(source_hidden, ["counts", s, *own, "hidden", kept])
                add(source, ["counts", "hidden", v, *sent, x, f"x_vv{layer}"])
            stages.append({"kernel": "exchange", "pass": "forward", "args": [x]})
            add(message, ["counts", x, s, v, w + "filter", *rows, "basis", *mid, "edge_capacity"])
            add(mix, ["counts", "v_mid", w + "update.vu", pq, *(["s_mid", hidden[0], "update_terms"] if parts else [])])
        # The last layer writes no vectors.
        made = [f"s{layer % 2}", f"v{layer + 1}" if not last else "g_pq", f"gates{layer}"]
        if parts:
            after = "gpu.readout.w1" if last else f"gpu.layers.{layer + 1}.source.w1"
            add(update[last], ["counts", *mid, pq, "update_terms", hidden[1], *out, after, slope, *made, "next_terms"])
        else:
            add(update_hidden, ["counts", "s_mid", pq, *hidden, "hidden", slope])
            add(update[last], ["counts", *mid, pq, "hidden", *out, *made])
    weights = [f"gpu.readout.{p}" for p in ("w1", "b1", "w2", "b2")]
    energies = ["shift", "repulsion_energy", "row_energy"]
    if parts:  # with gradients in one with what comes of them
        of_readout = ["next_terms", "species", *weights, *energies]
        name, grid = read
        stages.append(plan.stage(name, ["counts", "next_terms", "species", *weights[1:], *energies], grid, "energy"))
    else:
        add(read, ["counts", f"s{(n - 1) % 2}", "species", *weights, *energies, "g0"])

    # Gradients go from g0 to g1 through an update and back to g0 through a message layer.
    def pair(function: Callable, blocks: Blocks, **more):
        """The kernel for the last layer and for others."""
        return {last: product_kernel(function, blocks, ".last" if last else "", LAST=last, **more) for last in (True, False)}

    hidden_back = {
        last: product_kernel(update_triton.update_hidden_backward, wide, ".last" if last else "", width=(2 if last else 3) * f, LAST=last)
        for last in (True, False)
    }
    back = pair(update_triton.update_backward, wide, width=2 * f, EPSILON=config.norm_epsilon)
    mix_back = pair(update_triton.update_mix_backward, narrow, width=3 * f)
    source_hidden_back = product_kernel(message_triton.source_hidden_backward, narrow, width=3 * f)
    source_back = product_kernel(message_triton.source_features_backward, narrow)
    message_back = {last: message_kernel(message_triton.message_backward, "" if last else ".add", ADD=not last) for last in (True, False)}
    to_moments = {"width": 4 * sk, "BN": min(32, sk & -sk), "ONLY": n == 1, "SKP": sk}
    first_back = product_kernel(message_triton.message_first_backward, narrow, **to_moments)
    if parts:
        # dE/ds of a layer's output: of the last one in g0, of others the numbers that source_merged_backward leaves to be added up.
        scalars = {True: ("g0", {"SUMMANDS": 1, "WIDTH": 4 * f}), False: ("g_hidden", {"SUMMANDS": parts, "WIDTH": parts * f})}
        units, of_norm = {"H": f // parts}, {"PARTS": parts, "EPSILON": config.norm_epsilon}

        def merged_pair(function: Callable, blocks: Blocks, **more):
            return {last: atom_kernel(function, blocks, ".last" if last else "", LAST=last, **scalars[last][1], **more) for last in (True, False)}

        back = {
            True: atom_kernel(readout_triton.readout_merged_backward, schedule.merged_backward, width=2 * parts * f, M=sizes.readout,
                              TERMS=of_next, **units),
            False: atom_kernel(update_triton.update_merged_backward, schedule.merged_backward, width=2 * parts * f, SUMMANDS=parts, **units),
        }
        mix_back = merged_pair(update_triton.update_mix_merged_backward, narrow, width=3 * f, **of_norm)
        source_back = atom_kernel(message_triton.source_merged_backward, schedule.merged_backward, width=parts * f, **units)
        first_back = atom_kernel(message_triton.message_first_merged_backward, narrow, **to_moments, **scalars[n == 1][1], **of_norm)
    gaussians, of_basis = _of_basis(config)
    gradient = launch(forces_triton.edge_gradient, ["local", 1, 1], schedule.edge_warps, S=sizes.species, K=sizes.basis, SKP=sk,
                      SLICES=f // CHANNELS if n > 1 else 0, BE=schedule.edges, **of_basis)
    for layer in reversed(range(n)):
        w, last, pq, gates = f"gpu.layers.{layer}.", layer == n - 1, f"pq{layer}", f"gates{layer}"
        if parts:
            g_s = scalars[last][0]
            of_output = [*of_readout, "g0"] if last else [g_s, "g0"]
            add(back[last], ["counts", *of_output, pq, f"slope{layer}", w + "update.w2", w + "update.w1", "g_pq"], backward=True)
            mixed = ["counts", g_s, "g0", pq, gates, "g_pq"]
        else:
            add(hidden_back[last], ["counts", "g0", pq, w + "update.w2", "g_hidden"], backward=True)
            add(back[last], ["counts", "g0", pq, gates, f"slope{layer}", "g_hidden", w + "update.w1", "g1", "g_pq"], backward=True)
            mixed = ["counts", "g0", "g_pq"] if layer > 0 else ["counts", "g1", "g0", "g_pq"]
        if layer > 0:
            add(mix_back[last], [*mixed, w + "update.vu", "g1"], backward=True)
            stages.append({"kernel": "exchange", "pass": "backward", "args": ["g1"]})
            own = [f"x{layer}", f"x_vv{layer}", f"v{layer}"]
            add(message_back[last], ["counts", "g1", *own, w + "filter", *rows, "basis", "slope", "g_x", "g0", "pair_gradient", "edge_capacity"],
                backward=True)
            kept = f"source_slope{layer}"
            if parts:
                add(source_back, ["counts", "g1", "g_x", kept, w + "source.w2", w + "source.w1", "g_hidden"], backward=True)
            else:
                add(source_hidden_back, ["counts", "g_x", w + "source.w2", "g_hidden"], backward=True)
                add(source_back, ["counts", "g1", kept, "g_hidden", w + "source.w1", "g0"], backward=True)
        else:
            add(first_back, [*mixed, w + "q_s", w + "q_vpq", "g_moments"], backward=True)
    add(gradient, ["counts", "species", *rows, "distance", "cutoff", "pair_table", "g_moments", "pair_gradient" if n > 1 else "gradient",
                   "repulsion_slope", "gradient", "edge_capacity", *gaussians], backward=True)
    return stages


def cuda_tensor_dtypes(config: PaiNNConfig) -> Dict[str, str]:
    """Names and dtypes of the tensors that the CUDA plan uses (mlff.export.cuda_tensors makes them): matrices are pairs of halves."""
    names = {"cutoff": "f64", "gaussians": "f64", "pair_table": "f64", "shift": "f64", "gpu.embedding": "f32"}
    names.update({"gpu.projection": "f32", "gpu.environments": "f32"})  # if the model has extrapolation grades
    for layer in range(config.layers):
        w = f"gpu.layers.{layer}."
        inputs = ["q_s", "q_vpq", "q_hidden", "embedding_hidden"] if layer == 0 else ["filter", *(f"source.{p}" for p in ("w1", "b1", "w2", "b2"))]
        for p in (*inputs, *(f"update.{p}" for p in ("vu", "w1", "b1", "w2", "b2"))):
            names[w + p] = "f32" if p.endswith(("b1", "b2", "embedding_hidden")) else "f16"
    return {**names, "gpu.readout.w1": "f16", **{f"gpu.readout.{p}": "f32" for p in ("b1", "w2", "b2")}}
