"""Writing and reading the payload, the bytes inside ``model.pt`` that describe a model (docs/file-format.md)."""

import hashlib
import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np

MAGIC = b"MLFF\x89PAYLOAD\r\n\x1a\n"
VERSION = 1
_HEAD = struct.Struct("<16sIIQQ32s")
_DTYPES = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64, "u8": np.uint8, "f16": np.float16}
_ALIGN = 64
_MAX_NESTING = 32  # of the header; ours has five levels
_MAX_OCCURRENCES = 64  # of the magic: bounds the time that a hostile file can take


class PayloadError(ValueError):
    """The file is missing, damaged, foreign or too new."""


def pack(header: Dict[str, Any], tensors: Dict[str, np.ndarray]) -> bytes:
    """Serialises a header (JSON values) and named arrays of the dtypes above. What is equal byte by byte is stored once."""
    names = {np.dtype(v): k for k, v in _DTYPES.items()}
    index, data, offsets = {}, bytearray(), {}
    for name, array in tensors.items():
        array = np.asarray(array)
        content = np.ascontiguousarray(array).tobytes()
        if content not in offsets:
            data.extend(b"\0" * (-len(data) % _ALIGN))
            offsets[content] = len(data)
            data.extend(content)
        index[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "offset": offsets[content]}
    text = json.dumps({**header, "tensors": index}).encode()
    text += b" " * (-(_HEAD.size + len(text)) % _ALIGN)
    content = text + bytes(data)
    return _HEAD.pack(MAGIC, VERSION, 0, _HEAD.size + len(content), len(text), hashlib.sha256(content).digest()) + content


def find(path) -> bytes:
    """The payload's bytes of a ``model.pt`` or of a bare payload file; size, version and hash are verified.

    Raises:
        PayloadError: one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise PayloadError(f"{path}: no such model file")
    if path.stat().st_size == 0:
        raise PayloadError(f"{path}: the file is empty")
    first_fault = None
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m, memoryview(m) as view:
        # The magic can occur by accident in front of the payload: the first occurrence whose size and hash fit is the payload.
        start = m.find(MAGIC)
        for _ in range(_MAX_OCCURRENCES):
            if start < 0:
                break
            with view[start:] as rest:
                fault = _fault(rest)
                if fault is None:
                    return bytes(rest[: _HEAD.unpack(rest[: _HEAD.size])[3]])
            first_fault = first_fault or fault
            start = m.find(MAGIC, start + 1)
    if first_fault:
        raise PayloadError(f"{path}: {first_fault}")
    raise PayloadError(f"{path}: not an mlff model file (no payload inside); make one with mlff-export")


def unpack(payload: bytes, name: str = "payload") -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
    """Header (without ``tensors``, with the hash as ``sha256``) and arrays of a payload, checked as docs/file-format.md says.

    Raises:
        PayloadError: damaged or too new, or a header that is not as it must be.
    """
    if not payload.startswith(MAGIC):
        raise PayloadError(f"{name}: the bytes are not a payload")
    fault = _fault(payload)
    if fault:
        raise PayloadError(f"{name}: {fault}")
    _, _, _, size, header_size, digest = _HEAD.unpack(payload[: _HEAD.size])
    data = payload[_HEAD.size + header_size : size]
    try:
        text = payload[_HEAD.size : _HEAD.size + header_size].decode()
        header = json.loads(text, parse_constant=_finite, parse_float=_finite)
        json.dumps(header, ensure_ascii=False).encode()  # fails for halves of characters, which nothing could print
    except (ValueError, RecursionError) as e:
        raise PayloadError(f"{name}: the header is not valid JSON ({_line(e)})") from e
    try:
        tensors = _tensors(header, data)
        _check_header(header, tensors)
    except PayloadError as e:
        raise PayloadError(f"{name}: {_line(e)}") from e
    del header["tensors"]
    header["sha256"] = digest.hex()
    return header, tensors


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:400]


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def _fault(data) -> Optional[str]:
    """First fault in what should be a payload at the start of the bytes; None if size, version and hash fit."""
    if len(data) < _HEAD.size:
        return "the file is truncated inside the payload's first bytes; get it again"
    _, version, zero, size, header_size, digest = _HEAD.unpack(data[: _HEAD.size])
    if version > VERSION:
        return f"payload format {version} is newer than this mlff reads ({VERSION}); update mlff"
    if version == 0 or zero != 0 or size < _HEAD.size or header_size > size - _HEAD.size or (_HEAD.size + header_size) % _ALIGN:
        return "the payload's first bytes are damaged; get the file again"
    if size > len(data):
        return f"the file is truncated: the payload has {size} bytes, {len(data)} are there; get it again"
    if hashlib.sha256(data[_HEAD.size : size]).digest() != digest:
        return "the content does not match its SHA-256: the file is damaged; get it again"
    return None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PayloadError(message)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _nesting(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= _MAX_NESTING:
        depth += 1
        level = [y for x in level if isinstance(x, (dict, list)) for y in (x.values() if isinstance(x, dict) else x)]
    return depth


def _tensors(header: Any, data: bytes) -> Dict[str, np.ndarray]:
    _require(isinstance(header, dict), "the header is not a JSON object")
    _require(_nesting(header) <= _MAX_NESTING, f"the header is nested deeper than {_MAX_NESTING} levels")
    _require(isinstance(header.get("tensors"), dict), "the header has no table of tensors")
    tensors = {}
    for key, entry in header["tensors"].items():
        what = f'tensor "{key[:80]}"'
        _require(
            isinstance(entry, dict) and {"dtype", "shape", "offset"} <= entry.keys(), f"{what} needs a dtype, a shape and an offset"
        )
        dtype, shape, offset = entry["dtype"], entry["shape"], entry["offset"]
        _require(isinstance(dtype, str) and dtype in _DTYPES, f"{what}: the dtype must be {', '.join(_DTYPES)}")
        _require(isinstance(shape, list) and len(shape) <= 8, f"{what}: the shape must be a list of at most 8 numbers")
        _require(all(map(_is_size, shape)) and 0 not in shape, f"{what}: the dimensions must be whole numbers of at least 1")
        _require(_is_size(offset) and offset % _ALIGN == 0, f"{what}: the offset must be a multiple of {_ALIGN}")
        count = math.prod(shape)
        size = count * np.dtype(_DTYPES[dtype]).itemsize
        _require(offset + size <= len(data), f"{what}: bytes {offset} to {offset + size} lie outside the data ({len(data)} bytes)")
        tensors[key] = np.frombuffer(data, _DTYPES[dtype], count=count, offset=offset).reshape(shape)
        if dtype in ("f16", "f32", "f64"):
            _require(bool(np.isfinite(tensors[key]).all()), f"{what} holds a number that is not finite")
    return tensors


def _check_header(header: Dict[str, Any], tensors: Dict[str, np.ndarray]) -> None:
    """What every reader needs. The plans are checked by the backend that executes them."""
    for key, kind in (("architecture", str), ("precision", str), ("mlff_version", str), ("config", dict), ("provenance", dict),
                      ("references", list), ("plans", dict)):  # fmt: skip
        _require(isinstance(header.get(key), kind), f"the header needs {key}, of type {kind.__name__}")
    numbers, cutoff = header.get("atomic_numbers"), header.get("cutoff")
    good = isinstance(numbers, list) and 0 < len(numbers) <= 118 and all(type(z) is int and 1 <= z <= 118 for z in numbers)
    _require(good and len(set(numbers)) == len(numbers), "atomic_numbers must be a list of different whole numbers from 1 to 118")
    _require(type(cutoff) in (int, float) and 0 < cutoff <= 100, "the cutoff must be a number above 0 and up to 100 Angstrom")
    if "cutoff" in tensors:
        good = tensors["cutoff"].dtype == np.float64 and tensors["cutoff"].size == 1 and tensors["cutoff"].item() == cutoff
        _require(good, f'tensor "cutoff" does not hold the header\'s cutoff, {cutoff}')
    _require(header.get("units") == {"length": "Angstrom", "energy": "eV"}, "the units must be Angstrom and eV")
    for reference in header["references"]:
        good = isinstance(reference, dict) and all(isinstance(reference.get(key), str) for key in ("name", "prefix"))
        _require(good, 'a reference structure needs the texts "name" and "prefix"')
        name, prefix = reference["name"], reference["prefix"]
        elements = tensors.get(f"{prefix}.atomic_numbers", np.zeros(0, np.int32))
        n = len(elements) if elements.ndim == 1 else 0
        shapes = {"atomic_numbers": (np.int32, (n,)), "positions": (np.float64, (n, 3)), "cell": (np.float64, (3, 3)),
                  "pbc": (np.int32, (3,)), "energy": (np.float64, (1,)), "forces": (np.float64, (n, 3)),
                  "virial": (np.float64, (6,))}  # fmt: skip
        for key, (dtype, shape) in shapes.items():
            t = tensors.get(f"{prefix}.{key}")
            good = t is not None and t.dtype == dtype and t.shape == shape
            wanted = f"of dtype {np.dtype(dtype)} and shape {list(shape)}"
            _require(good, f'reference structure "{name}" needs the tensor "{prefix}.{key}" {wanted}')
        _require(
            set(elements.tolist()) <= set(numbers), f'reference structure "{name}" holds an element that the model does not know'
        )
