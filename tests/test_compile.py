"""Machine code for GPUs, made where there is none: what is compiled, what is refused, and how it gets into a file."""

import subprocess

import numpy as np
import pytest
import triton
import triton.language as tl
from reference import random_model

from mlff import cli, compile, export, payload
from mlff.core import Model
from mlff.painn import PaiNNConfig, save_checkpoint
from mlff.plan import CudaPlan, Launch, cuda_plan

BLOCK = 512


@triton.jit
def scale(x, caller_y, z, capacity, counts, BLOCK: tl.constexpr):
    """z = x + y, vectorised where the addresses are known to be aligned."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(counts)
    value = tl.load(x + i, mask=i < capacity, other=0.0) + tl.load(caller_y + i, mask=i < capacity, other=0.0)
    tl.store(z + i, value.to(tl.float64), mask=inside)


@triton.jit
def broken(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, 3), 1.0)


@triton.jit
def greedy(x, y, capacity, M: tl.constexpr, K: tl.constexpr):
    """Needs 4 M K bytes of shared memory or more."""
    row = tl.arange(0, M)
    total = tl.zeros((M, M), tl.float32)
    for k in range(0, capacity):
        a = tl.load(x + k * M * K + row[:, None] * K + tl.arange(0, K)[None, :])
        total += tl.dot(a, tl.trans(a))
    tl.store(y + row[:, None] * M + row[None, :], total)


def toy_plan(name="scale", function=scale, types=("f32*", "f32*", "f64*", "i32", "i32*"), **constants) -> CudaPlan:
    plan = CudaPlan({})
    plan.launches[name] = Launch(function, constants or {"BLOCK": BLOCK}, warps=4, types=list(types))
    plan.launches["never.used"] = Launch(function, {})
    return plan


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of our own: nothing from earlier runs, nothing left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_INTERPRET", "1")  # as tests of kernels have it; the compiling processes must not
        yield


@pytest.fixture(scope="module")
def compiled():
    steps = []
    plan, tensors = compile.compile_plan(toy_plan("scale.small"), (80, 90), lambda done, total: steps.append((done, total)))
    kernels = plan["kernels"]
    assert plan["overlapping"] == []  # this kernel waits for nothing
    assert steps == [(1, 2), (2, 2)]
    return kernels, tensors


def test_tables(compiled):
    kernels, tensors = compiled
    (kernel,) = kernels.values()
    shared = kernel.pop("shared")
    assert kernels == {"scale.small": {"warps": 4, "args": ["f32*", "f32*", "f64*", "i32", "i32*"]}}
    assert set(shared) == {"sm_80", "sm_90", "ptx"} and shared["ptx"] == shared["sm_80"] > 0
    assert set(tensors) == {f"cuda.{code}.scale.small" for code in shared}
    assert all(t.dtype == np.uint8 and t.ndim == 1 for t in tensors.values())


@pytest.mark.parametrize("architecture", [80, 90])
def test_machine_code(compiled, architecture):
    code = compiled[1][f"cuda.sm_{architecture}.scale.small"].tobytes()
    assert code[:5] == b"\x7fELF\x02"
    assert int.from_bytes(code[18:20], "little") == 190  # EM_CUDA
    assert code[48] == architecture  # of e_flags
    assert b".text.scale\0" in code and b".debug_line" not in code


def test_ptx(compiled, tmp_path):
    """Entry point, order of parameters, alignment, and that a driver of CUDA 12.0 takes it for later GPUs."""
    code = compiled[1]["cuda.ptx.scale.small"].tobytes()
    assert code[-1] == 0
    text = code[:-1].decode()
    assert "//" not in text and ".version 8.0\n" in text and ".target sm_80\n" in text and ".visible .entry scale(" in text
    parameters = [line.split()[1] for line in text[text.index("(") : text.index(")")].splitlines() if ".param" in line]
    assert parameters == [".u64", ".u64", ".u64", ".u32", ".u64", ".u64", ".u64"]  # the last two: Triton's scratch memory
    assert text.count("ld.global.v4.b32") == 1 and text.count("ld.global.b32") == 5  # x; the elements of y, and counts
    (tmp_path / "kernel.ptx").write_text(text)
    tool = triton.knobs.nvidia.ptxas_blackwell.path
    subprocess.run([tool, "--gpu-name=sm_103", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")], check=True)


def test_no_architecture_leaves_ptx():
    plan, tensors = compile.compile_plan(toy_plan(), ())
    kernels = plan["kernels"]
    assert list(tensors) == ["cuda.ptx.scale"] and list(kernels["scale"]["shared"]) == ["ptx"]


def test_every_architecture():
    _, tensors = compile.compile_plan(toy_plan())
    assert set(tensors) == {"cuda.ptx.scale", *(f"cuda.sm_{x}.scale" for x in compile.ARCHITECTURES)}


def test_shared_memory():
    """A pipeline becomes shallower until the kernel fits, and is an error if it never does."""
    types = ["f32*", "f32*", "i32"]
    plan = toy_plan()
    plan.launches["greedy"] = Launch(greedy, {"M": 64, "K": 128}, warps=4, stages=4, types=types)
    shared = compile.compile_plan(plan, (90,))[0]["kernels"]["greedy"]["shared"]
    assert shared["ptx"] <= 99 << 10 < shared["sm_90"]
    with pytest.raises(compile.CompileError, match="kernel greedy for sm_80: .* bytes of shared memory, 101376 are there; use"):
        compile.compile_plan(toy_plan("greedy", greedy, types, M=64, K=512), ())


@pytest.mark.parametrize(
    "plan, message",
    [
        (lambda: toy_plan("another.small"), "the launch another.small must be named after its function, scale"),
        (lambda: toy_plan(types=["f32*"] * 6), "kernel scale for sm_80: .*the plan passes 6 arguments and the constants BLOCK"),
        (lambda: toy_plan(types=["f32*"] * 4), "the plan passes 4 arguments"),
        (lambda: toy_plan(OTHER=1), "the constants OTHER; the function has the parameters x, caller_y, z, capacity, counts, BLOCK"),
        (lambda: toy_plan("broken", broken, ["f32*"]), "kernel broken for sm_80: .*power of 2"),
    ],
    ids=["name", "many", "few", "constants", "broken"],
)
def test_errors(plan, message):
    with pytest.raises(compile.CompileError, match=message) as error:
        compile.compile_plan(plan(), (80,))
    assert "\n" not in str(error.value)


def test_the_compiler_crashes(monkeypatch):
    monkeypatch.setattr(compile, "_SERVE", "import os; os.write(2, b'bad luck\\n'); os.abort()")
    with pytest.raises(compile.CompileError, match="kernel scale for sm_80: the compiler's process ended: bad luck"):
        compile.compile_plan(toy_plan(), (80,))


def test_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert compile.compile_plan(toy_plan(), ())[1]


def test_unknown_architecture():
    with pytest.raises(ValueError, match="no GPU architecture 75; there are 80, 86, 90, 100, 120"):
        compile.compile_plan(toy_plan(), (75, 80))


@pytest.mark.slow
@pytest.mark.parametrize("features, architectures", [(128, (90,)), (256, ())])
def test_kernels_of_a_model(features, architectures):
    """They fit into the smallest multiprocessor, and those for 9.0 wait for the kernel before: else they would not overlap."""
    plan, tensors = compile.compile_plan(cuda_plan(PaiNNConfig(species=["H", "O"], features=features, layers=2)), architectures)
    assert plan["overlapping"] == [f"sm_{x}" for x in architectures]
    assert {name.rsplit(".", 1)[-1] for name in plan["kernels"]} >= {"small", "large"}
    assert len(tensors) == len(plan["kernels"]) * (1 + len(architectures))


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_export(monkeypatch, tmp_path):
    """A checkpoint whose export compiles the toy kernel in place of the model's."""
    monkeypatch.setattr(export, "cuda_plan", lambda config, grade: toy_plan("scale.small"))
    save_checkpoint(random_model(16, 2), tmp_path / "random.safetensors")
    return [str(tmp_path / "random.safetensors"), "-o", str(tmp_path / "model.pt")]


@pytest.mark.parametrize(
    "options, codes", [([], compile.ARCHITECTURES), (["--arch", "9.0,80"], (80, 90)), (["--arch", "none"], ())]
)
def test_export(toy_export, monkeypatch, options, codes, capsys):
    monkeypatch.setattr(CudaPlan, "to_dict", lambda self: {"buffers": [], "search": {}, "schedules": []})
    assert cli.export_main([*toy_export, *options]) == 0
    assert "wrote " in capsys.readouterr().out
    header, tensors = payload.unpack(payload.find(toy_export[-1]))
    assert {name for name in tensors if name.startswith("cuda.")} == {
        f"cuda.{code}.scale.small" for code in (["ptx"] if codes else []) + [f"sm_{x}" for x in codes]
    }
    assert ("cuda" in header["plans"]) == bool(codes)
    assert cli.main(["info", toy_export[-1]]) == 0
    row = " ".join(line for line in capsys.readouterr().out.splitlines() if "machine code" in line)
    assert ("1 kernels: ptx" in row) if codes else ("none: for CPUs only" in row)


def test_export_without_triton(toy_export, monkeypatch, capsys):
    monkeypatch.setattr(compile, "available", lambda: False)
    assert cli.export_main(toy_export) == 0
    captured = capsys.readouterr()
    assert "the file will serve CPUs only; for GPUs: pip install triton" in captured.out and not captured.err
    assert Model(toy_export[-1]).atomic_numbers.tolist() == [1, 6, 8]
    assert cli.export_main([*toy_export, "--arch", "80"]) == 1
    assert "Triton, which is not installed: pip install triton" in capsys.readouterr().err


def test_failed_compilation_leaves_no_file(toy_export, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(export, "cuda_plan", lambda config, grade: toy_plan("broken", broken, ["f32*"]))
    assert cli.export_main(toy_export) == 1
    assert "kernel broken for sm_80" in capsys.readouterr().err and not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("text, message", [
    ("75", "no GPU architecture 75; there are 80, 86, 90, 100, 120"), ("", "nor none"), ("all,80", "'all,80' is neither a list"),
])  # fmt: skip
def test_wrong_architectures(text, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.export_main(["ethanol-water", "-o", "model.pt", "--arch", text])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_halves_survive_the_payload():
    header, tensors = payload.unpack(export.build_payload(random_model(16, 1)))
    halves = np.linspace(-65504, 65504, 21, dtype=np.float16).reshape(3, 7)
    data = payload.pack(header, {**tensors, "halves": halves, "again": halves.copy()})
    _, read = payload.unpack(data)
    assert read["halves"].dtype == np.float16 and np.array_equal(read["halves"], halves) and np.array_equal(read["again"], halves)
    assert len(data) < len(payload.pack(header, {**tensors, "halves": halves})) + 128  # what is equal is stored once
    Model(data).self_check()


@pytest.mark.gpu
def test_driver_takes_machine_code(compiled):
    """The driver finds the entry point in the PTX and in the machine code of its GPU."""
    import ctypes

    driver = ctypes.CDLL("libcuda.so.1")
    device, major = ctypes.c_int(), ctypes.c_int()
    context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device) == 0  # compute capability
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0 and driver.cuCtxSetCurrent(context) == 0
    for code in ["ptx"] + [f"sm_{major.value}0"] * (major.value in (8, 9)):
        assert driver.cuModuleLoadData(ctypes.byref(module), compiled[1][f"cuda.{code}.scale.small"].tobytes()) == 0
        assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"scale") == 0
        assert driver.cuModuleUnload(module) == 0
    assert driver.cuDevicePrimaryCtxRelease_v2(device) == 0
