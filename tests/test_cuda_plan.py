"""Plans for GPUs out of files that are not good: each gives one clear line, and never a crash."""

import numpy as np
import pytest
from fake_plan import ELF, model_parts, packed

from mlff import payload
from mlff.core import MLFFFileError, Model


@pytest.fixture(scope="module")
def parts():
    return model_parts()


def first_stage(plan):
    return plan["search"]["dense"][0]


def exchange(plan):
    return plan["schedules"][0]["stages"][1]


HOSTILE = {
    "not an object": (lambda p: p.clear(), 'needs a list "buffers"'),
    "width zero": (lambda p: p["buffers"][0].update(width=0), "the width must be a whole number from 1 to 65536"),
    "width huge": (lambda p: p["buffers"][0].update(width=65537), "the width must be"),
    "width float": (lambda p: p["buffers"][0].update(width=1.5), "the width must be"),
    "dtype": (lambda p: p["buffers"][0].update(dtype="f8"), "unknown dtype"),
    "rows": (lambda p: p["buffers"][0].update(rows="structures_plus_1"), "rows must be local, total"),
    "name of an input": (lambda p: p["buffers"][0].update(name="forces"), "the name is taken"),
    "name of a tensor": (lambda p: p["buffers"][0].update(name="cutoff"), "the name is taken"),
    "name of a scalar": (lambda p: p["buffers"][0].update(name="edge_capacity"), "the name is taken"),
    "name of the caller's": (lambda p: p["buffers"][0].update(name="caller_forces"), "the name is taken"),
    "warps 3": (lambda p: p["kernels"]["dense"].update(warps=3), "the warps must be 1, 2, 4, 8 or 16"),
    "warps 32": (lambda p: p["kernels"]["dense"].update(warps=32), "the warps must be a whole number from 1 to 16"),
    "carveout": (lambda p: p["kernels"]["dense"].update(carveout=101), "the carveout must be a whole number from 0 to 100"),
    "shared negative": (lambda p: p["kernels"]["dense"]["shared"].update(sm_90=-1), "the sm_90 must be a whole number"),
    "shared huge": (lambda p: p["kernels"]["dense"]["shared"].update(sm_90=232449), "whole number from 0 to 232448"),
    "architecture": (lambda p: p["kernels"]["dense"]["shared"].update(sm_9x=0), 'there is no architecture "sm_9x"'),
    "code missing": (lambda p: p["kernels"]["dense"]["shared"].update(sm_100=0), 'tensor "cuda.sm_100.dense" is missing'),
    "fewer architectures": (lambda p: p["kernels"]["total"]["shared"].pop("sm_90"), "the same architectures"),
    "overlapping": (lambda p: p.update(overlapping=["sm_9x"]), 'overlapping: there is no architecture "sm_9x"'),
    "no overlapping": (lambda p: p.pop("overlapping"), "overlapping"),
    "no search": (lambda p: p.pop("search"), 'needs an object "search"'),
    "no list": (lambda p: p["search"].pop("list"), 'needs a list "list"'),
    "no schedules": (lambda p: p.update(schedules=[]), "the last schedule must have the max_rows null"),
    "bounded": (lambda p: p["schedules"].pop(), "the last schedule must have the max_rows null"),
    "max_rows": (lambda p: p["schedules"][0].update(max_rows=0), "the max_rows must be a whole number"),
    "max_rows falls": (lambda p: p["schedules"].insert(1, {**p["schedules"][0]}), "the max_rows must increase"),
    "unlike exchanges": (lambda p: p["schedules"][0]["stages"].pop(1), "all schedules must exchange the same"),
    "unknown kernel": (lambda p: first_stage(p).update(kernel="rm"), "the plan has no such kernel"),
    "pass": (lambda p: first_stage(p).update({"pass": "sideways"}), "pass must be forward, backward or energy"),
    "argument missing": (lambda p: first_stage(p)["args"].pop(), "the kernel takes 21 arguments, 20 are given"),
    "argument unknown": (lambda p: first_stage(p)["args"].__setitem__(0, "nothing"), 'no buffer, tensor or input "nothing"'),
    "argument type": (lambda p: first_stage(p)["args"].__setitem__(0, "forces"), r"is f64\*, the kernel takes i32\*"),
    "scalar as pointer": (lambda p: first_stage(p)["args"].__setitem__(0, "edge_capacity"), r"is i32, the kernel takes i32\*"),
    "caller's in a list": (lambda p: p["search"]["list"][0]["args"].__setitem__(0, "caller_forces"), "does not exist in a list search"),
    "caller's in grades": (lambda p: p.update(grade=p["import"]), '"caller_positions" does not exist in a list search or grades'),
    "caller's in float32": (lambda p: p["kernels"]["load"]["args"].__setitem__(2, "f32*"), r'"caller_box" is f64\*'),
    "grid": (lambda p: first_stage(p).update(grid=["local", 16]), r"the grid must be \[rows, rows per block"),
    "grid zero": (lambda p: first_stage(p).update(grid=["local", 0, 1]), "numbers of the grid must be whole, from 1"),
    "grid y": (lambda p: first_stage(p).update(grid=["local", 1, 65536]), "numbers of the grid must be whole, from 1 to 65535"),
    "grid rows": (lambda p: first_stage(p).update(grid=["atoms", 1, 1]), "grid: rows must be"),
    "exchange of an input": (lambda p: exchange(p).update(args=["forces"]), "an exchange takes one buffer"),
    "exchange of edges": (lambda p: exchange(p).update(args=["geometry"]), "must be f32 with rows total"),
    "exchange of nothing": (lambda p: exchange(p).update(args=[]), "an exchange takes one buffer"),
    "exchange of the caller's": (lambda p: exchange(p).update(args=["caller_forces"]), "an exchange takes one buffer"),
    "exchange in an import": (lambda p: p["import"].append(exchange(p)), "an exchange takes one buffer"),
    "exchange in a search": (lambda p: p["search"]["list"].append(exchange(p)), "one buffer, in a schedule"),
    "exchange in grades": (lambda p: p.update(grade=[exchange(p)]), "one buffer, in a schedule"),
    "import": (lambda p: p.update({"import": {"f32": []}}), 'needs a list "import"'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_plan(parts, case):
    change, match = HOSTILE[case]
    with pytest.raises(MLFFFileError, match="model in memory: cuda plan.*" + match) as error:
        Model(packed(parts, change))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def truncated_elf():
    elf = ELF.copy()
    elf[40:48] = np.frombuffer(np.uint64(1000).tobytes(), np.uint8)  # where the sections are
    elf[58], elf[60] = 64, 2
    return elf


@pytest.mark.parametrize(
    "name, value",
    [("sm_90", ELF[:63]), ("sm_90", ELF.astype(np.int32)), ("sm_90", np.zeros(64, np.uint8)), ("sm_90", truncated_elf()),
     ("sm_90", None), ("ptx", np.frombuffer(b".version 7.0", np.uint8)), ("ptx", np.zeros(1, np.uint8))],
)  # fmt: skip
def test_bad_machine_code(parts, name, value):
    with pytest.raises(MLFFFileError, match=f'the tensor "cuda.{name}.total" is missing or holds no machine code'):
        Model(packed(parts, **{f"cuda.{name}.total": value}))


def test_exchange_width_is_that_of_every_device(parts):
    def widen(plan):
        plan["buffers"][5]["width"] = 1024

    assert Model(packed(parts)).max_exchange_width == Model(payload.pack(*parts)).max_exchange_width
    assert Model(packed(parts, widen)).max_exchange_width == 1024


def test_halves(parts):
    """The dtype f16: read, and refused where it is not finite."""
    Model(payload.pack(parts[0], {**parts[1], "halves": np.array([0, -65504, 6e-8], np.float16)}))
    for bad in (np.inf, -np.inf, np.nan):
        data = payload.pack(parts[0], {**parts[1], "halves": np.array([1, bad], np.float16)})
        with pytest.raises(MLFFFileError, match='tensor "halves" holds a number that is not finite'):
            Model(data)
