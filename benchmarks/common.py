"""What every benchmark shares: the machine's description with the commit, result files, times on a GPU."""

import json
import statistics
import subprocess
from pathlib import Path

import torch

from mlff import bench
from mlff.bench import water_box  # noqa: F401
from mlff.compile import ARCHITECTURES

RESULTS = Path(__file__).parent / "results"


def environment(*packages: str, device: str = "cpu") -> dict:
    """Machine, versions, date and commit: the evidence that goes with every number."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {**bench.environment(*packages, device=device), "commit": commit}


def write_results(name: str, results: dict) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def architectures(device: str) -> tuple:
    """For which GPUs a model file is made: that of the device, by its machine code or else by all of it; none for a CPU."""
    if device == "cpu":
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    fitting = [x for x in ARCHITECTURES if x // 10 == major and x % 10 <= minor]
    return (max(fitting),) if fitting else ARCHITECTURES


def microseconds(call, repeats: int) -> float:
    """Median time of a call among ``repeats`` dependent ones in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                call()
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end) / repeats)
    return statistics.median(times[2:])
