"""Files that are not good models: each gives one clear line through the Python reader and through the core, and never a crash."""

import copy
import hashlib
import json
import struct

import numpy as np
import pytest
from reference import random_model

from mlff import payload
from mlff.core import MLFFError, MLFFFileError, MLFFInputError, MLFFInternalError, Model, System
from mlff.export import build_payload

HEAD = 72  # bytes in front of the header text


@pytest.fixture(scope="module")
def good() -> bytes:
    return build_payload(random_model(16, 2, species=("H", "O")))


@pytest.fixture(scope="module")
def parts(good):
    header, tensors = payload.unpack(good)
    return header, tensors


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 1000
    return text


def refused_by_core(data, match=""):
    with pytest.raises(MLFFFileError, match=match) as error:
        Model(data)
    return one_line(error)


def refused_by_both(data, match, tmp_path):
    """Both readers refuse the bytes, as a file and from memory, with messages that hold `match`; the file's name comes first."""
    path = tmp_path / "bad.pt"
    path.write_bytes(data)
    refused_by_core(data, match)
    assert refused_by_core(path, match).startswith(str(path))
    with pytest.raises(payload.PayloadError, match=match) as error:
        payload.unpack(payload.find(path), str(path))
    assert one_line(error).startswith(str(path))


def with_header(text: bytes, data: bytes = b"", version=1, zero=0) -> bytes:
    """A payload with right hash around any header text."""
    content = text + b" " * (-(HEAD + len(text)) % 64) + data
    sizes = HEAD + len(content), len(content) - len(data)
    return struct.pack("<16sIIQQ32s", payload.MAGIC, version, zero, *sizes, hashlib.sha256(content).digest()) + content


def content_of(good: bytes):
    header_size = struct.unpack_from("<Q", good, 32)[0]
    return json.loads(good[HEAD : HEAD + header_size]), good[HEAD + header_size :]


# ---- damaged ---------------------------------------------------------------------------------------------------------


def test_good_payload_loads(good, tmp_path):
    """In front, behind and unaligned: anything may surround the payload, also its own magic by accident."""
    for surroundings in (b"%s", b"x%sy", payload.MAGIC + b"zzzz%s" + payload.MAGIC, payload.MAGIC * 3 + b"%s"):
        path = tmp_path / "good.pt"
        path.write_bytes(surroundings.replace(b"%s", good))
        assert payload.find(path) == good
        for source in (path, path.read_bytes()):
            model = Model(source)
            assert model.sha256 == payload.unpack(good)[0]["sha256"]
            assert model.atomic_numbers.tolist() == [1, 8] and model.cutoff == 5.0 and model.max_exchange_width == 96
            assert model.header["architecture"] == "painn"
            model.self_check()


def test_missing_empty_and_foreign(good, tmp_path):
    for path, match in (
        (tmp_path / "missing.pt", "missing.pt: (no such|cannot open)"),
        (tmp_path, "no such model file|is not a file"),
    ):
        refused_by_core(path, match)
        with pytest.raises(payload.PayloadError, match=match):
            payload.find(path)
    (tmp_path / "bad.pt").write_bytes(b"")
    refused_by_core(tmp_path / "bad.pt", "empty")
    with pytest.raises(payload.PayloadError, match="empty"):
        payload.find(tmp_path / "bad.pt")
    for foreign in (b"x", b"PK\x03\x04" + bytes(5000), payload.MAGIC[:-1], good[16:], np.random.default_rng(0).bytes(100_000)):
        refused_by_both(foreign, "not an mlff model file", tmp_path)
    refused_by_core(b"", "not an mlff model file")


def test_unreadable_kinds_of_file(tmp_path):
    """A named pipe must not make the reader wait for ever."""
    import os

    os.mkfifo(tmp_path / "pipe.pt")
    refused_by_core(tmp_path / "pipe.pt", "is not a file")
    with pytest.raises(payload.PayloadError, match="no such model file"):
        payload.find(tmp_path / "pipe.pt")


def test_truncated(good, tmp_path):
    lengths = {16, 17, 71, 72, 73, 100, len(good) - 1, *np.linspace(18, len(good) - 2, 40).astype(int).tolist()}
    for length in lengths:
        refused_by_both(good[:length], "truncated", tmp_path)


def test_bit_flips(good, tmp_path):
    """Every bit of the fixed part and a sample of the rest: none goes unnoticed."""
    rng = np.random.default_rng(1)
    bits = [*range(8 * HEAD), *rng.integers(8 * HEAD, 8 * len(good), 400).tolist()]
    for bit in bits:
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        refused_by_both(bytes(damaged), "not an mlff model file|newer|damaged|truncated|not valid JSON", tmp_path)


def test_newer_version(good, tmp_path):
    refused_by_both(
        good[:16] + struct.pack("<I", 2) + good[20:], r"payload format 2 is newer than this mlff reads \(1\); update mlff", tmp_path
    )


@pytest.mark.parametrize("length", [*range(1, 130, 3), 4096, 4097])
def test_hash_of_any_length(length):
    """The core's SHA-256 against Python's, around the ends of its blocks: if the hash is right, the next fault is the header."""
    data = np.random.default_rng(length).bytes(length)
    refused_by_core(with_header(b"?", data), r"not valid JSON")


def test_many_accidental_magics_do_not_take_long(tmp_path):
    one = struct.pack("<16sIIQQ32s", payload.MAGIC, 1, 0, HEAD, 0, bytes(32))
    refused_by_both(one * 20_000, "damaged", tmp_path)


# ---- hostile headers, with a right hash ------------------------------------------------------------------------------

HOSTILE_TEXTS = {
    "nothing": (b"", "not valid JSON"),
    "not JSON": (b"hello", "not valid JSON"),
    "half": (b'{"tensors": {', "not valid JSON"),
    "not UTF-8": (b'{"tensors": "\xff"}', "not valid JSON"),
    "zero byte": (b'{"tensors": {}}\0', "not valid JSON"),
    "NaN": (b'{"cutoff": NaN, "tensors": {}}', "not valid JSON"),
    "infinite": (b'{"cutoff": 1e999, "tensors": {}}', "not valid JSON"),
    "half a character": (b'{"tensors": {"\\ud800": 1}}', "not valid JSON"),
    "endless digits": (b'{"cutoff": ' + b"9" * 10000 + b', "tensors": {}}', "not valid JSON"),
    "list": (b"[1, 2]", "not a JSON object"),
    "number": (b"7", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "deep lists": (b"[" * 200_000 + b"]" * 200_000, "not valid JSON|nested deeper"),
    "deep unclosed": (b'{"a":' * 100_000, "not valid JSON|nested deeper"),
    "deep objects": (b'{"tensors":' * 40 + b"1" + b"}" * 40, "nested deeper"),
    "no tensors": (b"{}", "no table of tensors"),
    "tensors a list": (b'{"tensors": []}', "no table of tensors"),
}


@pytest.mark.parametrize("case", HOSTILE_TEXTS)
def test_hostile_text(case, tmp_path):
    text, match = HOSTILE_TEXTS[case]
    refused_by_both(with_header(text), match, tmp_path)


def test_sizes_in_the_fixed_part(good, tmp_path):
    content = good[HEAD:]
    for size, header_size in (
        (0, 0),
        (HEAD - 1, 0),
        (len(good), len(good)),
        (len(good), 2**64 - 1),
        (2**64 - 1, 5),
        (2**63, 2**63),
    ):
        fixed = struct.pack("<16sIIQQ32s", payload.MAGIC, 1, 0, size, header_size, hashlib.sha256(content).digest())
        refused_by_both(fixed + content, "damaged|truncated", tmp_path)
    header_size = struct.unpack_from("<Q", good, 32)[0]
    # Off by a little, the weights would be read shifted.
    for wrong in (0, 1, 100, header_size - 1, header_size + 1, header_size - 8):
        refused_by_both(good[:32] + struct.pack("<Q", wrong) + good[40:], "damaged", tmp_path)
    for wrong in (header_size - 64, header_size + 64, 56):
        refused_by_both(good[:32] + struct.pack("<Q", wrong) + good[40:], "not valid JSON", tmp_path)
    for version, zero in ((0, 0), (1, 1)):
        refused_by_both(with_header(content, version=version, zero=zero), "damaged", tmp_path)


HOSTILE_TENSORS = {
    "not an object": (3, "needs a dtype, a shape and an offset"),
    "no dtype": ({"shape": [1], "offset": 0}, "needs a dtype"),
    "dtype a number": ({"dtype": 1, "shape": [1], "offset": 0}, "dtype must be"),
    "unknown dtype": ({"dtype": "f8", "shape": [1], "offset": 0}, "dtype must be"),
    "shape a number": ({"dtype": "f32", "shape": 4, "offset": 0}, "shape must be a list"),
    "nine dimensions": ({"dtype": "f32", "shape": [1] * 9, "offset": 0}, "shape must be a list"),
    "zero": ({"dtype": "f32", "shape": [0, 4], "offset": 0}, "dimension"),
    "negative": ({"dtype": "f32", "shape": [-4], "offset": 0}, "dimension"),
    "fraction": ({"dtype": "f32", "shape": [1.5], "offset": 0}, "dimension"),
    "text": ({"dtype": "f32", "shape": ["1"], "offset": 0}, "dimension"),
    "bool": ({"dtype": "f32", "shape": [True], "offset": 0}, "dimension"),
    "null": ({"dtype": "f32", "shape": [None], "offset": 0}, "dimension"),
    "larger than the data": ({"dtype": "f32", "shape": [2**28], "offset": 0}, "larger than|outside the data"),
    "product overflows": ({"dtype": "f64", "shape": [2**31, 2**31, 2**31, 8], "offset": 0}, "larger than|outside the data"),
    "product wraps to small": ({"dtype": "u8", "shape": [2**32, 2**32], "offset": 0}, "larger than|outside the data"),
    "dimension beyond 64 bits": ({"dtype": "u8", "shape": [2**70], "offset": 0}, "dimension"),
    "offset unaligned": ({"dtype": "f32", "shape": [1], "offset": 4}, "offset"),
    "offset beyond the end": ({"dtype": "f32", "shape": [1], "offset": 2**40}, "outside the data"),
    "offset negative": ({"dtype": "f32", "shape": [1], "offset": -64}, "offset"),
    "offset wraps": ({"dtype": "u8", "shape": [64], "offset": 2**64 - 64}, "offset"),
    "offset a fraction": ({"dtype": "f32", "shape": [1], "offset": 0.5}, "offset"),
    "crosses the end": (
        lambda n: {"dtype": "u8", "shape": [65], "offset": n // 64 * 64 - 64 + 64 * (n % 64 > 0)},
        "outside the data",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensor(case, good, tmp_path):
    entry, match = HOSTILE_TENSORS[case]
    header, data = content_of(good)
    header["tensors"]["embedding"] = entry(len(data)) if callable(entry) else entry
    refused_by_both(with_header(json.dumps(header).encode(), data), match, tmp_path)


def test_names_cannot_break_the_line(good, tmp_path):
    header, data = content_of(good)
    header["tensors"]["two\nlines\r\x1b[31m" + "x" * 5000] = {"dtype": "f8", "shape": [1], "offset": 0}
    refused_by_both(with_header(json.dumps(header).encode(), data), "dtype must be", tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, parts, tmp_path):
    header, tensors = parts
    for name in ("embedding", "shift"):
        bad = tensors[name].copy()
        bad.flat[-1] = value
        refused_by_both(
            payload.pack(header, {**tensors, name: bad}), f'tensor "{name}" holds a number that is not finite', tmp_path
        )
    halves = np.array([0.0, 6e-8, -65504.0, value], np.float16)
    refused_by_both(payload.pack(header, {**tensors, "halves": halves}), 'tensor "halves" holds a number that is not finite', tmp_path)
    assert Model(payload.pack(header, {**tensors, "halves": halves[:3]})).cutoff == 5.0


def fields(**changes):
    return lambda header: header.update(changes)


def reference_field(key, value):
    return lambda header: header["references"][0].update({key: value})


HOSTILE_HEADERS = {
    "no cutoff": (fields(cutoff=None), "cutoff must be a number"),
    "cutoff a text": (fields(cutoff="5"), "cutoff must be a number"),
    "cutoff a bool": (fields(cutoff=True), "cutoff must be a number"),
    "cutoff zero": (fields(cutoff=0), "cutoff must be a number"),
    "cutoff huge": (fields(cutoff=1e300), "cutoff must be a number"),
    "cutoff not the kernels'": (fields(cutoff=5.5), 'tensor "cutoff" does not hold'),
    "no elements": (fields(atomic_numbers=[]), "atomic_numbers must be"),
    "elements twice": (fields(atomic_numbers=[1, 1]), "atomic_numbers must be"),
    "element 0": (fields(atomic_numbers=[0, 8]), "atomic_numbers must be"),
    "element 119": (fields(atomic_numbers=[1, 119]), "atomic_numbers must be"),
    "element text": (fields(atomic_numbers=["H", "O"]), "atomic_numbers must be"),
    "element huge": (fields(atomic_numbers=[1, 2**40]), "atomic_numbers must be"),
    "many elements": (fields(atomic_numbers=[1] * 10**5), "atomic_numbers must be"),
    "other units": (fields(units={"length": "Bohr", "energy": "eV"}), "units must be"),
    "units a list": (fields(units=[1]), "units must be"),
    "architecture a number": (fields(architecture=5), "header needs architecture"),
    "config a list": (fields(config=[]), "header needs config"),
    "no plans": (fields(plans=None), "header needs plans"),
    "references an object": (fields(references={}), "header needs references"),
    "reference a number": (fields(references=[1]), "a reference structure needs"),
    "reference without tensors": (reference_field("prefix", "elsewhere"), "reference structure .* needs the tensor"),
    "reference prefix a number": (reference_field("prefix", 1), "a reference structure needs"),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_header(case, parts, tmp_path):
    change, match = HOSTILE_HEADERS[case]
    header = copy.deepcopy(parts[0])
    change(header)
    refused_by_both(payload.pack(header, parts[1]), match, tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [("positions", np.zeros((2, 3))), ("forces", np.zeros((12, 3), np.float32)), ("atomic_numbers", np.full(12, 6, np.int32))],
)
def test_hostile_reference(name, value, parts, tmp_path):
    header, tensors = parts
    refused_by_both(payload.pack(header, {**tensors, f"reference.0.{name}": value}), "reference structure", tmp_path)


def test_self_check_finds_another_model(parts):
    header, tensors = parts
    changed = Model(payload.pack(header, {**tensors, "shift": tensors["shift"] + 1.0}))
    with pytest.raises(MLFFInternalError, match="self-check: reference structure .* is not reproduced") as error:
        changed.self_check()
    one_line(error)
    without = {k: t for k, t in tensors.items() if not k.startswith("reference.")}
    with pytest.raises(MLFFFileError, match="no reference structures"):
        Model(payload.pack({**header, "references": []}, without)).self_check()


# ---- hostile plans: the core executes them, so it checks them ------------------------------------------------------------


def stage_of(plan, kernel, which=0):
    return [s for s in plan["stages"] if s["kernel"] == kernel][which]


def put_arg(kernel, old, new):
    def change(plan):
        args = stage_of(plan, kernel)["args"]
        args[args.index(old)] = new

    return change


def buffer_field(name, key, value):
    return lambda plan: next(b for b in plan["buffers"] if b["name"] == name).update({key: value})


def add_stage(kernel, args, pass_="forward", at=None):
    def change(plan):
        plan["stages"].insert(len(plan["stages"]) if at is None else at, {"kernel": kernel, "pass": pass_, "args": args})

    return change


def add_buffer(**buffer):
    return lambda plan: plan["buffers"].append(buffer)


HOSTILE_PLANS = {
    "buffers missing": (lambda plan: plan.pop("buffers"), 'cpu plan: needs a list "buffers"'),
    "stages a number": (lambda plan: plan.update(stages=1), 'cpu plan: needs a list "stages"'),
    "stage a number": (lambda plan: plan["stages"].insert(0, 5), 'stage 0: needs a text "kernel"'),
    "too many stages": (lambda plan: plan["stages"].extend(plan["stages"][-1:] * 20000), "at most 10000 entries"),
    "unknown kernel": (
        lambda plan: stage_of(plan, "readout").update(kernel="transformer"),
        r"\(transformer\): this mlff has no such kernel",
    ),
    "unknown pass": (lambda plan: stage_of(plan, "readout").update({"pass": "sideways"}), "pass must be forward or backward"),
    "forward after backward": (lambda plan: stage_of(plan, "readout").update({"pass": "backward"}), "a forward stage comes after"),
    "args a text": (lambda plan: stage_of(plan, "readout").update(args="s1"), 'needs a list "args"'),
    "args numbers": (lambda plan: stage_of(plan, "readout").update(args=[1, 2]), "args must be names"),
    "too few args": (
        lambda plan: stage_of(plan, "readout")["args"].pop(),
        r"stage \d+ \(readout\): the kernel takes 8 arguments, 7 are given",
    ),
    "unknown name": (put_arg("readout", "shift", "nowhere"), 'there is no buffer, tensor or input "nowhere"'),
    "writes a tensor": (put_arg("radial_basis", "basis", "layers.1.filter"), "is written, but it is a tensor"),
    "writes an input": (put_arg("readout", "atom_energy", "distance"), "must have rows local"),
    "writes a read-only input": (put_arg("repulsion_backward", "gradient", "unit"), "is written, but that input is read-only"),
    "writes twice": (put_arg("radial_basis", "slope", "basis"), "may be given only once"),
    "writes what it reads": (put_arg("message", "s_mid1", "s0"), "may be given only once"),
    "tensor for a buffer": (put_arg("update", "s_mid0", "embedding"), "but it is a tensor"),
    "buffer for a tensor": (put_arg("radial_basis", "cutoff", "distance"), "must be a tensor"),
    "wrong dtype": (put_arg("readout", "shift", "cutoff"), "is 1, which does not fit S"),
    "another basis": (
        lambda plan: stage_of(plan, "radial_basis").update(kernel="radial_basis_gaussian"),
        "the kernel takes 5 arguments, 4 are given",
    ),
    "Gaussians of another size": (
        lambda plan: stage_of(plan, "radial_basis").update(
            kernel="radial_basis_gaussian", args=["distance", "cutoff", "pair_table", "basis", "slope"]
        ),
        "which does not fit",
    ),
    "wrong float": (put_arg("readout", "readout.b2", "cutoff"), "must be f32, it is f64"),
    "wrong rows": (put_arg("update", "s_mid0", "basis"), "must have rows local, it has rows edges"),
    "wrong width": (put_arg("update", "s_mid0", "v_mid0"), "does not fit"),
    "wrong dimensions": (put_arg("readout", "readout.b1", "readout.w1"), "must have 1 dimensions, its shape is"),
    "wrong weight": (put_arg("update", "layers.0.update.w1", "readout.w1"), "does not fit"),
    "table of other elements": (put_arg("readout", "shift", "reference.0.virial"), "is 6, which does not fit S"),
    "pairs of other elements": (put_arg("repulsion", "pair_table", "reference.0.positions"), "which does not fit P"),
    "read before written": (add_stage("exchange", ["x1"], at=0), "is read before any stage has written it"),
    "unwritten argument": (put_arg("readout", "s1", "unwritten"), "is read before any stage has written it"),
    "gradient in the forward pass": (
        add_stage("repulsion_backward", ["species", "offsets", "neighbors", "distance", "unit", "pair_table", "gradient"], at=0),
        "exists in the backward pass only",
    ),
    "exchange of an input": (add_stage("exchange", ["species"], "backward"), "that input is read-only"),
    "exchange of edges": (add_stage("exchange", ["basis"], "backward"), "must have rows total, it has rows edges"),
    "exchange of a tensor": (add_stage("exchange", ["embedding"], "backward"), "it is a tensor"),
    "exchange of nothing": (add_stage("exchange", [], "backward"), "the kernel takes 1 arguments, 0 are given"),
    "buffer without name": (add_buffer(dtype="f32", rows="local", width=1), 'a buffer: needs a text "name"'),
    "buffer twice": (add_buffer(name="basis", dtype="f32", rows="edges", width=21), 'buffer "basis": the name is taken'),
    "buffer named as a tensor": (add_buffer(name="embedding", dtype="f32", rows="local", width=1), "the name is taken"),
    "buffer named as an input": (add_buffer(name="gradient", dtype="f64", rows="edges", width=3), "the name is taken"),
    "buffer dtype": (buffer_field("x1", "dtype", "f8"), "unknown dtype"),
    "buffer rows": (buffer_field("x1", "rows", "everything"), "rows must be local, total or edges"),
    "buffer rows + 1": (buffer_field("x1", "rows", "local+1"), "rows must be local, total or edges"),
    "buffer width zero": (buffer_field("x1", "width", 0), "width must be a whole number"),
    "buffer width negative": (buffer_field("x1", "width", -96), "width must be a whole number"),
    "buffer width a fraction": (buffer_field("x1", "width", 96.0), "width must be a whole number"),
    "buffer width huge": (buffer_field("x1", "width", 2**62), "width must be a whole number"),
    "buffer too narrow": (buffer_field("g", "width", 32), r"stage \d+ \(readout_backward\): .* does not fit"),
    "buffer too wide": (buffer_field("basis", "width", 96), "does not fit"),
}


@pytest.mark.parametrize("case", HOSTILE_PLANS)
def test_hostile_plan(case, parts):
    change, match = HOSTILE_PLANS[case]
    header = copy.deepcopy(parts[0])
    if case == "unwritten argument":
        header["plans"]["cpu"]["buffers"].append({"name": "unwritten", "dtype": "f32", "rows": "local", "width": 16})
    change(header["plans"]["cpu"])
    refused_by_core(payload.pack(header, parts[1]), match)


def test_plan_for_another_backend_only(parts):
    header = copy.deepcopy(parts[0])
    header["plans"] = {"quantum": header["plans"]["cpu"]}
    refused_by_core(payload.pack(header, parts[1]), "no plan for the cpu backend")


def test_features_that_kernels_cannot_do(good):
    """Kernels go through the features in vectors of 16: 24 features would end in the middle of one."""
    header, tensors = payload.unpack(good)
    f = 24
    for name, t in tensors.items():
        if not name.startswith("reference.") and name not in ("shift", "pair_table", "cutoff"):
            tensors[name] = np.zeros([f * n // 16 if n % 8 == 0 else n for n in t.shape], t.dtype)
    for buffer in header["plans"]["cpu"]["buffers"]:
        if buffer["width"] % 16 == 0:
            buffer["width"] = buffer["width"] // 16 * f
    refused_by_core(payload.pack(header, tensors), "number of features must be a multiple of 16, it is 24")


def test_random_plans(parts):
    """Plans with arguments, kernels and stages shuffled: refused in one line, or executed without harm."""
    rng = np.random.default_rng(3)
    inputs = ["species", "offsets", "neighbors", "distance", "unit", "atom_energy", "gradient"]
    names = [*parts[1], *(b["name"] for b in parts[0]["plans"]["cpu"]["buffers"]), *inputs]
    x = rng.uniform(0, 5, (6, 3))
    executed = 0
    for _ in range(400):
        header = copy.deepcopy(parts[0])
        plan = header["plans"]["cpu"]
        for _ in range(rng.integers(1, 3)):
            k, action = rng.integers(len(plan["stages"])), rng.integers(5)
            stage = plan["stages"][k]
            if action == 0:
                stage["args"][rng.integers(len(stage["args"]))] = names[rng.integers(len(names))]
            elif action == 1:
                del plan["stages"][k]
            elif action == 2:
                plan["stages"].insert(rng.integers(len(plan["stages"])), copy.deepcopy(stage))
            elif action == 3:
                buffer = plan["buffers"][rng.integers(len(plan["buffers"]))]
                buffer["width"] = int(rng.choice([1, 3, 16, 32, 48, 64, 96, 2 * buffer["width"]]))
            else:
                stage["kernel"] = plan["stages"][rng.integers(len(plan["stages"]))]["kernel"]
        try:
            system = System(Model(payload.pack(header, parts[1])), threads=1)
            system.set_atoms([1, 8, 1, 1, 8, 1])
            system.compute(x, 6.0 * np.eye(3), True)
            executed += 1
        except (MLFFFileError, MLFFInputError) as error:
            assert "\n" not in str(error)
    assert executed > 20


def test_every_error_of_a_file_is_an_mlff_error():
    assert issubclass(MLFFFileError, MLFFError) and issubclass(payload.PayloadError, ValueError)
