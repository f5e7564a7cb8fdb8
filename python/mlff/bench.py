"""``mlff bench``: how long an evaluation takes on this machine, by number of atoms, and optionally how long plain PyTorch takes.

Energy, forces and virial at new positions every call. Small structures are droplets of water with open boundaries, larger ones
periodic boxes at 0.1 atoms/A^3. mlff looks for its neighbours itself: *search excluded* are moves so small that the list of the
last search is kept, *search included* moves that need a new one. (Up to about a thousand atoms a GPU searches at every call.)

Three ways in: the *core* with arrays on the host (LAMMPS, ASE), whose time is that of the caller and includes the copies; on a GPU also the
TorchScript *operator* with tensors on the device (OpenMM), and the operator in a CUDA graph (OpenMM's useCUDAGraphs, loops in PyTorch), both
timed by the GPU's events. The peers are PyTorch's autograd on the same weights and the same edges, which are given to it: its time, by the
GPU's events too, includes no search.
"""

import gc
import itertools
import json
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from ase import Atoms
from ase.build import molecule
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vesin import NeighborList

from . import payload
from .core import Model, System, device_count

SIZES = (10, 21, 50, 100, 192, 648, 3000, 12167, 97336)
CPU_SIZES = SIZES[:7]  # the others take minutes
LARGE = 1_000_000
LARGEST_OPEN = 100  # atoms of structures with open boundaries
DENSITY = 0.1  # atoms/A^3
MOVE = 0.1  # A, per component; the lists have a skin of 1 A
JUMP = 1.5  # A
CAPTURED_UP_TO = 13_000  # atoms of the peers that a CUDA graph captures: its memory comes on top
COMPILED = (21, 100, 12167)  # sizes of the peers that torch.compile compiles, which takes long
FEWEST, MOST, WARM_UP = 3, 200, 3  # calls

Rows = List[Dict[str, Any]]


# ---- structures --------------------------------------------------------------------------------------------------------


def water_box(n_molecules: int, seed: int = 0) -> Atoms:
    """Water at 0.1 atoms/A^3: randomly turned molecules on a cubic lattice with gaps; those that touch are turned again."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(round(n_molecules ** (1 / 3), 6)))
    length = (3 * n_molecules / DENSITY) ** (1 / 3)
    sites = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    centres = (sites[rng.permutation(len(sites))[:n_molecules]] + 0.5) * length / side
    water = molecule("H2O")
    arms = water.positions - water.positions.mean(0)
    positions = centres[:, None] + _turned(arms, n_molecules, rng)
    gap = 1.9
    while True:  # ends: the gap that is asked for becomes smaller
        search = NeighborList(cutoff=gap, full_list=True)
        i, j = search.compute(positions.reshape(-1, 3), length * np.eye(3), True, quantities="ij")
        touching = np.unique(i[i // 3 != j // 3] // 3)
        if len(touching) == 0:
            return Atoms(np.tile(water.numbers, n_molecules), positions.reshape(-1, 3), cell=[length] * 3, pbc=True)
        positions[touching] = centres[touching, None] + _turned(arms, len(touching), rng)
        gap *= 0.98


def _turned(points: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n random orientations of the points [3, 3], from quaternions: [n, 3, 3]."""
    q = rng.normal(size=(n, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rotation = np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
    return np.einsum("abn,kb->nka", rotation, points)


def structure(n_atoms: int, known: Sequence[int]) -> Atoms:
    """A droplet of up to LARGEST_OPEN atoms, cut out of water, or a periodic box of about n_atoms.

    known: atomic numbers of the model. Without hydrogen and oxygen among them the first and the last take their places.
    """
    if n_atoms <= LARGEST_OPEN:
        box = water_box(LARGEST_OPEN)
        centres = box.positions.reshape(-1, 3, 3).mean(1)
        nearest = np.argsort(np.linalg.norm(centres - box.cell.lengths() / 2, axis=1))[: -(-n_atoms // 3)]
        atoms = box[(3 * nearest[:, None] + np.arange(3)).ravel()[:n_atoms]]
        atoms.pbc, atoms.cell = False, None
    else:
        atoms = water_box(round(n_atoms / 3))
    if not {1, 8} <= set(known):
        atoms.numbers = np.where(atoms.numbers == 8, known[-1], known[0])
    return atoms


# ---- the machine -------------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(*packages: str, device: str = "cpu") -> Dict[str, Any]:
    """Machine, versions and date: the evidence that goes with every number."""
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    if device != "cpu":
        fields = "--query-gpu=name,driver_version,memory.total"
        query = ["nvidia-smi", f"--id={device.partition(':')[2] or 0}", fields, "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip().split(", ")
            result.update(zip(("gpu", "driver", "gpu_memory"), answer))
        except (OSError, subprocess.SubprocessError):
            result["gpu"] = "unknown: nvidia-smi does not answer"
    for name in packages:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = None
    return result


# ---- timing ------------------------------------------------------------------------------------------------------------


def _measure(call: Callable[[], float], n_atoms: int, seconds: float) -> Dict[str, Any]:
    """Percentiles of what ``call`` returns, seconds: of as many calls as fit into the given time, after a warm-up."""
    start = time.perf_counter()
    for _ in range(WARM_UP):
        call()
        if time.perf_counter() - start > seconds:
            break
    times: List[float] = []
    start = time.perf_counter()
    while len(times) < FEWEST or (len(times) < MOST and time.perf_counter() - start < seconds):
        times.append(call())
    low, median, high = np.percentile(times, (10, 50, 90))
    return {
        "us_per_step": 1e6 * median, "us_p10": 1e6 * low, "us_p90": 1e6 * high, "atom_steps_per_s": n_atoms / median,
        "calls": len(times),
    }  # fmt: skip


def _failed(e: BaseException) -> Dict[str, Any]:
    text = " ".join(str(e).split()) or type(e).__name__
    return {"failed": "out of memory" if "out of memory" in text.lower() else text[:300]}


def _in_core(model: Model, device: str, atoms: Atoms, search: bool, seconds: float) -> Dict[str, Any]:
    system, rng, count = System(model, device), np.random.default_rng(0), itertools.count()
    system.set_atoms(atoms.numbers)
    cell, pbc = (atoms.cell.array, True) if atoms.pbc.all() else (None, None)

    def call() -> float:
        positions = atoms.positions + rng.uniform(-MOVE, MOVE, (len(atoms), 3)) + JUMP * (search and next(count) % 2)
        start = time.perf_counter()
        system.compute(positions, cell, pbc)
        return time.perf_counter() - start

    result = _measure(call, len(atoms), seconds)
    return {**result, "bytes_per_atom": system.bytes / len(atoms)}


def _in_operator(data: bytes, device: str, atoms: Atoms, search: bool, seconds: float, captured: bool) -> Dict[str, Any]:
    import torch

    from .torchscript import module

    script, count = module(data, atoms.numbers), itertools.count()
    torch.cuda.set_device(device)
    x = torch.tensor(atoms.positions / 10, dtype=torch.float32, device=device)  # OpenMM's unit is the nanometre
    cell = torch.tensor(atoms.cell.array / 10, dtype=torch.float32, device=device) if atoms.pbc.all() else None

    def evaluate(positions):
        return script(positions, cell)

    if captured:
        evaluate(x)  # makes room, which must not happen during the capture
        evaluate = _Captured(evaluate, x.clone())

    def call() -> float:
        return _on_device(evaluate, x + 0.1 * (MOVE * (2 * torch.rand_like(x) - 1) + JUMP * (search and next(count) % 2)))

    return _measure(call, len(atoms), seconds)


class _Captured:
    """A CUDA graph of a function of one tensor, x, which stays where it is."""

    def __init__(self, function: Callable, x):
        import torch

        self.x, self.graph = x, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function(x)

    def set(self, x) -> None:
        import torch

        with torch.no_grad():
            self.x.copy_(x)

    def __call__(self, x):
        self.set(x)
        self.graph.replay()
        return self.result


def _on_device(function: Callable, x) -> float:
    """Seconds between two events on the GPU's stream, around a function of a tensor.

    A graph finds the tensor in its place, as it would where a simulation has moved the atoms, and the stream is busy until the graph has
    arrived, for what the host takes for the launch is none of the GPU's time.
    """
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    captured = isinstance(function, _Captured)
    if captured:
        function.set(x)
    torch.cuda.synchronize()
    if captured:
        torch.cuda._sleep(1_000_000)  # cycles, 0.5 ms: longer than the launch of a thousand nodes
    start.record()
    function.graph.replay() if captured else function(x)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# ---- peers -------------------------------------------------------------------------------------------------------------


class Peers:
    """Plain PyTorch with the weights of a checkpoint.

    Args:
        checkpoint: name of a shipped student or path.
        model: its weights must be these, else ValueError.
        device: "cpu" or of the form "cuda:0".
    """

    def __init__(self, checkpoint: str, model_path: Path, device: str):
        import torch

        from . import pretrained
        from .painn import PaiNN, load_checkpoint

        class Indexed(PaiNN):
            """Takes indices of species for atomic numbers: looking them up waits for the GPU, which no graph can capture."""

            def species_index(self, atomic_numbers):
                return atomic_numbers

        path = Path(checkpoint) if Path(checkpoint).suffix else pretrained(checkpoint)
        loaded, (_, tensors) = load_checkpoint(path), payload.unpack(payload.find(model_path))
        if not np.array_equal(loaded.embedding.detach().numpy(), tensors["embedding"]):
            raise ValueError(f"{path} does not hold the weights of {model_path}: peers must be of the same model")
        loaded.extrapolation = None  # no grades are timed
        self.device, self.cutoff = torch.device(device), loaded.config.cutoff
        self.model = Indexed(loaded.config)
        self.model.load_state_dict(loaded.state_dict())
        self.model.requires_grad_(False).to(self.device)
        for part in (self.model, *self.model.layers):  # torch.compile takes a ParameterDict's letters for its keys
            for name in [name for name, child in part.named_children() if isinstance(child, torch.nn.ParameterDict)]:
                weights = dict(getattr(part, name).items())
                delattr(part, name)
                setattr(part, name, weights)
        self.index = loaded.index_of_number

    @staticmethod
    def kinds(device: str, n_atoms: int) -> Iterator[Tuple[str, bool]]:
        """Names, and whether TF32 is on. "compiled": a CUDA graph of what torch.compile makes of the model."""
        names = ["eager"]
        if device != "cpu" and n_atoms <= CAPTURED_UP_TO:
            names.append("CUDA graph")
            if n_atoms in COMPILED:
                names.append("compiled")
        return ((name, tf32) for name in names for tf32 in ((False, True) if device != "cpu" else (False,)))

    def measure(self, atoms: Atoms, kind: str, tf32: bool, forces: np.ndarray, seconds: float) -> Dict[str, Any]:
        """forces: mlff's, to compare with."""
        import torch

        from .neighbors import find_neighbors

        on_gpu = self.device.type == "cuda"
        gc.collect()
        if on_gpu:
            torch.cuda.set_device(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            found = find_neighbors(atoms.positions, self.cutoff, atoms.cell.array, atoms.pbc)
            edges, vectors = found.edges.to(self.device), found.vectors.to(self.device, torch.float32)
            species = self.index[torch.from_numpy(atoms.numbers)].to(self.device)
            run = self._runner(kind, species, edges, vectors)
            result = {"edges": edges.shape[1]}
            result["force_difference"] = float(np.abs(run(vectors).cpu().numpy() - forces).max())

            def call() -> float:
                moves = MOVE * (2 * torch.rand((len(atoms), 3), device=self.device) - 1)
                r = vectors + moves[edges[1]] - moves[edges[0]]
                if on_gpu:
                    return _on_device(run, r)
                start = time.perf_counter()
                run(r)
                return time.perf_counter() - start

            result.update(_measure(call, len(atoms), seconds))
            if on_gpu:
                result["bytes_per_atom"] = torch.cuda.max_memory_allocated() / len(atoms)
            return result
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def _runner(self, kind: str, species, edges, vectors) -> Callable:
        """A function of the edge vectors that evaluates energy, forces and virial, and returns the forces."""
        import torch

        from .painn import forces_and_virial

        model = self.model
        if kind == "compiled":
            torch._dynamo.reset()
            model = torch.compile(model, dynamic=False)

        def evaluate(r):
            energy = model(species, edges, r).sum()
            (gradient,) = torch.autograd.grad(energy, r)
            return forces_and_virial(gradient, edges, r.detach(), len(species))[0]

        if kind == "eager":
            return lambda r: evaluate(r.detach().requires_grad_(True))
        fixed = vectors.clone().requires_grad_(True)
        stream = torch.cuda.Stream()  # graphs must be warmed up beside the stream that work is on
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                evaluate(fixed)
        torch.cuda.current_stream().wait_stream(stream)
        return _Captured(evaluate, fixed)


# ---- the command -------------------------------------------------------------------------------------------------------


def bench(
    model_path,
    output,
    device: Optional[str] = None,
    sizes: Optional[Sequence[int]] = None,
    large: bool = False,
    peers: Optional[str] = None,
    seconds: float = 1.0,
    console: Optional[Console] = None,
) -> Dict[str, Any]:
    """Measures, prints tables and writes ``bench.json`` (after every measurement) and ``bench.png``.

    Args:
        model_path: a model.pt or a bare payload.
        output: folder to write to.
        device: "cpu", "cuda" or "cuda:N"; by default the first GPU if there is one.
        sizes: numbers of atoms; boxes hold whole molecules, so they may have one more or less. By default SIZES, fewer on a CPU.
        large: a million atoms, too.
        peers: checkpoint with the same weights (name of a shipped student or path): PyTorch is timed, too.
        seconds: for each measurement.

    Returns:
        what is in the JSON file. A measurement that fails has "failed" in place of numbers, and the others go on.

    Raises:
        MLFFError: a bad model, or one that cannot run on the device. ValueError: bad sizes, or a checkpoint with other weights.
    """
    device = device or ("cuda" if device_count("cuda") else "cpu")
    device = "cuda:0" if device == "cuda" else device
    sizes = list(sizes or (CPU_SIZES if device == "cpu" else SIZES)) + [LARGE] * large
    if min(sizes) < 1:
        raise ValueError(f"sizes must be numbers of atoms, got {sizes}")
    console, output, data = console or Console(), Path(output), payload.find(model_path)
    model = Model(data)
    model.check_device(device)
    torch_peers = Peers(peers, Path(model_path), device) if peers else None
    output.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    results = {
        "environment": environment("mlff", "torch", "triton", "numpy", device=device), "device": device, "model": str(model_path),
        "sha256": model.sha256, "config": model.header["config"], "rows": rows,
    }  # fmt: skip

    def record(atoms: Atoms, via: str, measure: Callable[[], Dict[str, Any]], **labels) -> None:
        boundaries = "periodic" if atoms.pbc.all() else "open"
        try:
            numbers = measure()
        except Exception as e:  # of any kind: compilers and drivers raise what they like, and one failure must not hide the rest
            numbers = _failed(e)
        rows.append({"atoms": len(atoms), "boundaries": boundaries, "via": via, **labels, **numbers})
        (output / "bench.json").write_text(json.dumps(results, indent=2) + "\n")
        progress.advance(task)

    operators = {} if device == "cpu" else {"operator": False, "operator, CUDA graph": True}
    kinds = [(n, *kind) for n in sizes for kind in (Peers.kinds(device, n) if torch_peers else ())]
    kinds.sort(key=lambda kind: (kind[1] == "compiled", kind[1] == "compiled" and kind[2]))  # what takes longest comes last
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=2 * (1 + len(operators)) * len(sizes) + len(kinds))
        for n in sizes:
            atoms = structure(n, model.atomic_numbers.tolist())
            progress.update(task, description=f"{n} atoms")
            for search in (False, True):
                record(atoms, "core", lambda: _in_core(model, device, atoms, search, seconds), search=search)
                for via, captured in operators.items():
                    record(atoms, via, lambda: _in_operator(data, device, atoms, search, seconds, captured), search=search)
        for n, kind, tf32 in kinds:
            atoms = structure(n, model.atomic_numbers.tolist())
            progress.update(task, description=f"{n} atoms, {kind}")
            record(atoms, kind, lambda: torch_peers.measure(atoms, kind, tf32, _forces(model, device, atoms), seconds), tf32=tf32)
    _print(results, console)
    _picture(results, output / "bench.png")
    console.print(f"wrote {output / 'bench.json'} and {output / 'bench.png'}", highlight=False)
    return results


def _forces(model: Model, device: str, atoms: Atoms) -> np.ndarray:
    system = System(model, device)
    system.set_atoms(atoms.numbers)
    return system.compute(atoms.positions, *((atoms.cell.array, True) if atoms.pbc.all() else ()), want=["forces"])["forces"]


def label(row: Dict[str, Any]) -> str:
    """What a row measures: "core, search included", "PyTorch eager, TF32"."""
    if "search" in row:
        return f"{row['via']}, search {'included' if row['search'] else 'excluded'}"
    return f"PyTorch {row['via']}" + ", TF32" * row["tf32"]


def in_order(rows: Rows) -> Rows:
    """mlff first, then its peers; what belongs to one label together."""
    return sorted(rows, key=lambda row: ("search" not in row, row.get("search", False), row["via"], row.get("tf32", False)))


def _print(results: Dict[str, Any], console: Console) -> None:
    machine = results["environment"].get("gpu") if results["device"] != "cpu" else results["environment"]["cpu"]
    table = Table(title=f"Energy, forces and virial on {machine}", title_justify="left", title_style="bold", box=box.SIMPLE)
    table.add_column("", style="cyan", no_wrap=True)
    for column in ("atoms", "µs\n/step", "\np10", "\np90", "atom-\nsteps/s", "bytes\n/atom"):
        table.add_column(column, justify="right")
    for name, rows in itertools.groupby(in_order(results["rows"]), key=label):
        for row in rows:
            if "failed" in row:
                table.add_row(name, str(row["atoms"]), "failed")
            else:
                times = (f"{row[key]:.0f}" for key in ("us_per_step", "us_p10", "us_p90"))
                memory = f"{row['bytes_per_atom']:.0f}" if "bytes_per_atom" in row else ""
                table.add_row(name, str(row["atoms"]), *times, f"{row['atom_steps_per_s']:.3g}", memory)
        table.add_section()
    console.print(table)
    for row in results["rows"]:
        if "failed" in row:
            console.print(f"{row['atoms']} atoms, {label(row)} failed: {row['failed']}", highlight=False, markup=False)


def _picture(results: Dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    time_axis, rate_axis = figure.subplots(1, 2)
    good = [row for row in results["rows"] if "failed" not in row]
    for name in dict.fromkeys(map(label, good)):
        rows = sorted((row for row in good if label(row) == name), key=lambda row: row["atoms"])
        atoms, style = [row["atoms"] for row in rows], "s--" if name.startswith("PyTorch") else "o-"
        name = name if name.startswith("PyTorch") else f"mlff {name}"
        time_axis.plot(atoms, [row["us_per_step"] for row in rows], style, label=name, markersize=4)
        rate_axis.plot(atoms, [row["atom_steps_per_s"] for row in rows], style, markersize=4)
    time_axis.set(xscale="log", yscale="log", xlabel="atoms", ylabel="µs per step", title="Time of energy, forces and virial")
    rate_axis.set(xscale="log", yscale="log", xlabel="atoms", ylabel="atom-steps per second", title="Throughput")
    time_axis.legend(fontsize="x-small")
    for axis in (time_axis, rate_axis):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
