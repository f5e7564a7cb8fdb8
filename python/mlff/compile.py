"""Machine code for GPUs: compiles the kernels of a plan with Triton, ahead of time, on a machine that needs no GPU.

Triton runs in processes of its own: several compile at a time, a crash of the compiler is an error and not the end, and
TRITON_INTERPRET may be set where this is called. So kernels are found by the module and the name of their function.

Machine code runs on drivers of CUDA 12 (525 and newer; Blackwell needs those that know it). The PTX is of version 8.0, which those
drivers translate for GPUs that are newer than all machine code.
"""

import base64
import hashlib
import importlib
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from . import __version__
from .plan import CudaPlan, Launch

PTX_TARGET = 80  # PTX for it runs on every later GPU
# For which GPU Triton generates code, and the architectures that get machine code from it. Blackwell has matrix units of its own,
# for which Triton 3.6 makes some of these kernels into a mere trap; what it generates for sm_80 runs the same on every GPU.
TARGETS = {PTX_TARGET: (80, 86, 100, 120), 90: (90,)}
ARCHITECTURES = tuple(sorted(architecture for group in TARGETS.values() for architecture in group))  # 86 serves 8.7 and 8.9, too
MAX_SHARED = {PTX_TARGET: 99 << 10, 90: 227 << 10}  # bytes of shared memory that a block may have on each of them
HOW_TO_GET_TRITON = "pip install triton"
_TYPES = {"f16*": "*fp16", "f32*": "*fp32", "f64*": "*fp64", "i32*": "*i32", "i64*": "*i64", "u8*": "*u8", "i32": "i32"}
_PTX_VERSION = 80
_SERVE = "from mlff.compile import serve; serve()"
_MAX_PROCESSES = 16


class CompileError(RuntimeError):
    """A kernel cannot be compiled, or is not as docs/cuda.md says; the message is one line."""


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def compile_plan(
    plan: CudaPlan, architectures: Sequence[int] = ARCHITECTURES, progress: Optional[Callable[[int, int], None]] = None
) -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
    """Compiles every launch of a plan for every architecture, and as PTX.

    Args:
        plan: those of its launches that a stage uses are compiled.
        architectures: compute capabilities, times ten, out of ARCHITECTURES.
        progress: called with the numbers of finished and of all compilations.

    Returns:
        ``kernels`` and ``overlapping`` of the plan, and the tensors with the code (docs/cuda.md).

    Raises:
        ValueError: an architecture that is none of ARCHITECTURES.
        ImportError: Triton is missing.
        CompileError: a kernel does not compile, or is not as the executor expects it.
    """
    check_architectures(architectures)
    if not available():
        raise ImportError(f"machine code for GPUs is made by Triton, which is not installed: {HOW_TO_GET_TRITON}")
    targets = [target for target, group in TARGETS.items() if target == PTX_TARGET or set(group) & set(architectures)]
    used = {name: launch for name, launch in plan.launches.items() if launch.types}
    jobs = {(name, target): _job(name, launch, target, architectures) for name, launch in used.items() for target in targets}
    different = list(dict.fromkeys(jobs.values()))
    # Triton's key of a kernel covers the functions that it calls, but not those that are called while it compiles.
    builtins = hashlib.sha256(Path(__file__).with_name("launch_triton.py").read_bytes()).hexdigest()[:12]
    cache = "-".join(map(str, (__version__, builtins, *sorted(architectures))))
    answers = dict(zip(different, _compile_all(different, cache, progress)))
    kernels, tensors = {}, {}
    for name, launch in used.items():
        kernels[name] = {"warps": launch.warps, "args": list(launch.types), "shared": {}}
        if launch.carveout is not None:
            kernels[name]["carveout"] = launch.carveout
        for target in targets:
            answer = answers[jobs[name, target]]
            codes = {f"sm_{x}": base64.b64decode(code) for x, code in answer["cubins"].items()}
            if target == PTX_TARGET:
                codes["ptx"] = _without_comments(answer["ptx"]).encode() + b"\0"
            for code, content in codes.items():
                kernels[name]["shared"][code] = answer["shared"]
                tensors[f"cuda.{code}.{name}"] = np.frombuffer(content, np.uint8)
    waiting = [target for target in targets if all(answers[jobs[name, target]]["waits"] for name in used)]
    overlapping = [f"sm_{x}" for x in architectures if any(x in TARGETS[target] for target in waiting)]
    return {"kernels": kernels, "overlapping": overlapping}, tensors


def check_architectures(architectures: Sequence[int]) -> None:
    """Raises ValueError for one that is none of ARCHITECTURES."""
    unknown = [x for x in architectures if x not in ARCHITECTURES]
    if unknown:
        known = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(f"no GPU architecture {', '.join(map(str, unknown))}; there are {known} (86 also serves 8.7 and 8.9)")


def _without_comments(ptx: str) -> str:
    return re.sub(r"\n\s*(?=\n)", "", re.sub(r"[ \t]*//.*", "", ptx))


# ---- the side of the caller --------------------------------------------------------------------------------------------


def _job(name: str, launch: Launch, target: int, architectures: Sequence[int]) -> str:
    """What :func:`_compile` needs, as JSON; the same for two launches whose code is the same."""
    function = getattr(launch.function, "fn", launch.function)  # of Triton's wrapper, compiled or interpreted
    if name.split(".")[0] != function.__name__:  # the executor looks for it under this name
        raise CompileError(f"the launch {name} must be named after its function, {function.__name__}")
    return json.dumps({
        "module": function.__module__, "function": function.__name__, "types": launch.types, "constants": launch.constants,
        "warps": launch.warps, "stages": launch.stages, "target": target,
        "architectures": [x for x in TARGETS[target] if x in architectures],
    })  # fmt: skip


def _compile_all(jobs: List[str], cache: str, progress: Optional[Callable[[int, int], None]]) -> List[Dict[str, Any]]:
    """The answers of :func:`_compile`, in the order of the jobs. cache: a name for that of these architectures."""
    with tempfile.TemporaryDirectory(prefix="mlff-") as folder:
        environment = _environment(cache, folder)
        workers = [_Worker(environment) for _ in range(min(len(os.sched_getaffinity(0)), _MAX_PROCESSES, len(jobs)))]
        idle: "queue.SimpleQueue[_Worker]" = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def compile_one(job):
            worker = idle.get()
            try:
                return worker.compile(job)
            finally:
                idle.put(worker)

        pool = ThreadPoolExecutor(max(1, len(workers)))
        try:
            answers = []
            for answer in pool.map(compile_one, jobs):
                answers.append(answer)
                if progress:
                    progress(len(answers), len(jobs))
            return answers
        finally:
            for worker in workers:
                worker.close()
            pool.shutdown(cancel_futures=True)


def _environment(cache_name: str, folder: str) -> Dict[str, str]:
    """Of the compiling processes. Their cache is in the folder if it cannot be beside Triton's."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # two thirds of the machine code's size
    environment["TRITON_STORE_BINARY_ONLY"] = "1"  # in the cache, which would be three times as large
    # Not the cache that Triton uses when it runs kernels: what is stored in place of its machine code would confuse it.
    cache = Path(environment.get("TRITON_CACHE_DIR") or Path.home() / ".triton") / "mlff" / cache_name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError:
        cache = Path(folder)
    return {**environment, "TRITON_CACHE_DIR": str(cache)}


class _Worker:
    """A process that compiles one kernel after another."""

    def __init__(self, environment: Dict[str, str]):
        self._log = tempfile.TemporaryFile("w+")
        command, pipe = [sys.executable, "-c", _SERVE], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=environment)

    def compile(self, job: str) -> Dict[str, Any]:
        try:
            print(job, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            self._log.seek(0)
            last = ([text for text in self._log.read().splitlines() if text.strip()] or ["no message"])[-1]
        answer = json.loads(line) if line else {"error": f"the compiler's process ended: {last}"}
        if "error" in answer:
            text = " ".join(answer["error"].split())
            text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
            raise CompileError("kernel {function} for sm_{target}: ".format_map(json.loads(job)) + text)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


# ---- the side of the process that compiles -----------------------------------------------------------------------------


def serve() -> None:
    """Answers jobs, lines of JSON on the standard input, until it ends. What Triton prints goes to the error stream."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                answer = _compile(**json.loads(line))
            except Exception as e:  # of any kind: compilers raise what they like
                answer = {"error": f"{type(e).__name__}: {e}"}
            print(json.dumps(answer), file=answers, flush=True)


def _compile(module, function, types, constants, warps, stages, target, architectures) -> Dict[str, Any]:
    """One kernel for one of Triton's targets.

    Returns:
        ptx, the text; cubins, the machine code made of it in base64, by architecture; shared, the bytes of shared memory; waits,
        whether it waits by itself for the kernel before (launch_triton.py).
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), function)
    arguments, rest = kernel.arg_names[: len(types)], kernel.arg_names[len(types) :]
    if len(arguments) < len(types) or set(rest) != set(constants):
        raise ValueError(
            f"the plan passes {len(types)} arguments and the constants {', '.join(constants) or 'none'}; "
            f"the function has the parameters {', '.join(kernel.arg_names)}"
        )
    signature = {**{a: _TYPES[t] for a, t in zip(arguments, types)}, **dict.fromkeys(rest, "constexpr")}
    aligned = {(k,): [["tt.divisibility", 16]] for k, a in enumerate(arguments) if not a.startswith("caller_")}
    options = {"num_warps": warps, "ptx_version": _PTX_VERSION if target == PTX_TARGET else None}
    knobs.runtime.add_stages_inspection_hook = _assembler(architectures, MAX_SHARED[target])
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    for depth in range(stages, 0, -1):  # a pipeline that is less deep needs less shared memory
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options={**options, "num_stages": depth})
        if compiled.metadata.shared <= MAX_SHARED[target]:
            break
    else:
        needed, there = compiled.metadata.shared, MAX_SHARED[target]
        raise ValueError(f"it needs {needed} bytes of shared memory, {there} are there; use smaller blocks")

    metadata, codes = compiled.metadata, json.loads(compiled.asm["cubin"])
    ptx = codes["ptx"]
    entry = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    for what, value, expected in (
        ("its name", metadata.name, function),
        ("parameters", entry.count(".param"), len(types) + 2),  # two pointers to scratch memory come last
        ("warps", metadata.num_warps, warps),
        ("bytes of global scratch memory", metadata.global_scratch_size, 0),
        ("bytes of profiling scratch memory", metadata.profile_scratch_size, 0),
    ):
        if value != expected:
            raise ValueError(f"{what}: the compiled kernel has {value}, the executor expects {expected}")
    return {"shared": metadata.shared, "waits": "griddepcontrol.wait" in ptx, **codes}


def _assembler(architectures: Sequence[int], max_shared: int) -> Callable:
    """Triton's hook that may change its stages: the last one makes machine code for several architectures, if the kernel fits."""
    from triton import knobs

    def assemble(ptx: str, metadata: Dict[str, Any]) -> bytes:
        cubins: Dict[int, str] = {}
        with tempfile.TemporaryDirectory(prefix="mlff-") as folder:
            source, output = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_text(ptx)
            for architecture in architectures if metadata["shared"] <= max_shared else ():
                name = f"sm_{architecture}" + "a" * (architecture == 90)  # Triton's code for 9.0 needs instructions of 9.0 alone
                tool = knobs.nvidia.ptxas_blackwell if architecture >= 100 else knobs.nvidia.ptxas
                command = [tool.path, f"--gpu-name={name}", str(source), "-o", str(output)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"ptxas for {name}: {done.stderr or done.returncode}")
                cubins[architecture] = base64.b64encode(output.read_bytes()).decode()
        return json.dumps({"ptx": ptx, "cubins": cubins}).encode()

    def hook(backend, stages, *_) -> None:
        stages["cubin"] = assemble

    return hook
