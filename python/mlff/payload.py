"""Writing and reading the payload, the bytes inside ``model.pt`` that describe a model (docs/file-format.md)."""

import hashlib
import json
import mmap
import struct
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np

MAGIC = b"MLFF\x89PAYLOAD\r\n\x1a\n"
VERSION = 1
_HEAD = struct.Struct("<16sIIQQ32s")
_DTYPES = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64, "u8": np.uint8}
_ALIGN = 64


class PayloadError(ValueError):
    """The file is missing, damaged, foreign or too new."""


def pack(header: Dict[str, Any], tensors: Dict[str, np.ndarray]) -> bytes:
    """Serialises a header (JSON values) and named arrays of the dtypes above."""
    names = {np.dtype(v): k for k, v in _DTYPES.items()}
    index, data = {}, bytearray()
    for name, array in tensors.items():
        array = np.asarray(array)
        data.extend(b"\0" * (-len(data) % _ALIGN))
        index[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "offset": len(data)}
        data.extend(np.ascontiguousarray(array).tobytes())
    text = json.dumps({**header, "tensors": index}).encode()
    text += b" " * (-(_HEAD.size + len(text)) % _ALIGN)
    content = text + bytes(data)
    return _HEAD.pack(MAGIC, VERSION, 0, _HEAD.size + len(content), len(text), hashlib.sha256(content).digest()) + content


def find(path) -> bytes:
    """The payload's bytes of a ``model.pt`` or of a bare payload file.

    Raises:
        PayloadError: one line that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise PayloadError(f"{path}: no such model file")
    if path.stat().st_size == 0:
        raise PayloadError(f"{path}: the file is empty")
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m:
        start = m.find(MAGIC)
        if start < 0:
            raise PayloadError(f"{path}: not an mlff model file (no payload inside); make one with mlff-export")
        if len(m) - start < _HEAD.size:
            raise PayloadError(f"{path}: the file is truncated")
        _, version, _, size, _, _ = _HEAD.unpack(m[start : start + _HEAD.size])
        if version > VERSION:
            raise PayloadError(f"{path}: payload format {version} is newer than this mlff reads ({VERSION}); update mlff")
        if size < _HEAD.size or start + size > len(m):
            raise PayloadError(f"{path}: the file is truncated: the payload has {size} bytes, {len(m) - start} are there")
        return m[start : start + size]


def unpack(payload: bytes, name: str = "payload") -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
    """Header and arrays of a payload, checked against its hash.

    Raises:
        PayloadError: damaged content.
    """
    _, _, _, size, header_size, digest = _HEAD.unpack(payload[: _HEAD.size])
    content = payload[_HEAD.size : size]
    if hashlib.sha256(content).digest() != digest:
        raise PayloadError(f"{name}: the content does not match its SHA-256; the file is damaged, get it again")
    header = json.loads(content[:header_size])
    tensors = {}
    for key, t in header.pop("tensors").items():
        tensors[key] = np.frombuffer(
            content, _DTYPES[t["dtype"]], count=int(np.prod(t["shape"], dtype=np.int64)), offset=header_size + t["offset"]
        ).reshape(t["shape"])
    header["sha256"] = digest.hex()
    return header, tensors
