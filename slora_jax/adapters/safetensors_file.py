"""Reading a safetensors file from an untrusted source: header first, checked in full, then the tensors' bytes.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

import dataclasses
from io import BufferedReader
import json
import math
import os
import stat
from typing import Any

import ml_dtypes
import numpy as np

from slora_jax.adapters.host_memory import map_zeros
from slora_jax.adapters.limits import AdapterLimits
from slora_jax.adapters.messages import shown
from slora_jax.errors import AdapterError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``start`` and ``end`` are byte offsets in the data section, after the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BufferedReader, limits: AdapterLimits) -> dict[str, TensorEntry]:
    """Reads and checks the header of an open safetensors file, leaving the file at the start of the data section.

    Raises AdapterError naming what is wrong.
    """
    return parse_header(*read_header_bytes(file, limits), limits)


def read_header_bytes(file: BufferedReader, limits: AdapterLimits) -> tuple[bytes, int]:
    """The header's text and how many bytes of data follow it. AdapterError where the file cannot be what it says."""
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise AdapterError("adapter_model.safetensors is not a regular file; give a directory with the file itself")
    size = status.st_size
    if size > limits.max_file_bytes:
        raise AdapterError(
            f"adapter_model.safetensors has {size} bytes, over the limit of {limits.max_file_bytes}; "
            "raise AdapterLimits.max_file_bytes if it is meant"
        )
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise AdapterError(
            f"adapter_model.safetensors is truncated or no safetensors file ({size} bytes, its header would take "
            f"{length}); copy or download it again"
        )
    if length > limits.max_header_bytes:
        raise AdapterError(
            f"adapter_model.safetensors has a header of {length} bytes, over the limit of {limits.max_header_bytes}; "
            "raise AdapterLimits.max_header_bytes if it is meant"
        )
    return file.read(length), size - 8 - length


def parse_header(text: bytes, data_bytes: int, limits: AdapterLimits) -> dict[str, TensorEntry]:
    """Tensors by name, from what read_header_bytes gave.

    They must be float32, float16 or bfloat16 and cover the data section without gap or overlap.
    Raises AdapterError naming what is wrong.
    """
    header = _decode_header(text)
    if len(header) > limits.max_tensors:
        raise AdapterError(
            f"adapter_model.safetensors holds {len(header)} tensors, over the limit of {limits.max_tensors}; "
            "raise AdapterLimits.max_tensors if it is meant"
        )
    entries = {name: _entry(name, fields) for name, fields in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise AdapterError(
                f"tensor {shown(name)} does not begin where the one before it ends; the file is damaged, save it again"
            )
        end = entry.end
    if end != data_bytes:
        what = "truncated" if end > data_bytes else "followed by bytes that belong to no tensor"
        raise AdapterError(
            f"adapter_model.safetensors is {what}: its header describes {end} bytes of data, the file holds "
            f"{data_bytes}; copy or download it again"
        )
    return entries


def read_data(file: BufferedReader, entries: dict[str, TensorEntry]) -> np.ndarray:
    """The data section that follows the header, as one uint8 array [bytes].

    Raises AdapterError where the file became shorter.
    """
    size = max((entry.end for entry in entries.values()), default=0)
    data = map_zeros((size,))
    if file.readinto(data) != size:
        raise AdapterError(
            "adapter_model.safetensors became shorter while it was read; register the adapter again when it is complete"
        )
    return data


def _decode_header(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise AdapterError(
                f"the header of adapter_model.safetensors names {shown(twice)} twice; save the adapter again"
            )
        return result

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        header = None
    if not data.startswith(b"{") or not isinstance(header, dict):
        raise AdapterError(
            "adapter_model.safetensors is no safetensors file (its header is not a JSON object); save the adapter again"
        )
    header.pop("__metadata__", None)
    return header


def _entry(name: str, fields: Any) -> TensorEntry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"tensor {shown(name)} has no proper header entry; the file is damaged, save it again")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterError(
            f"tensor {shown(name)} has dtype {shown(str(dtype))}; save the adapter in float32, float16 or bfloat16"
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise AdapterError(f"tensor {shown(name)} has a malformed shape or offsets; the file is damaged, save it again")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise AdapterError(
            f"tensor {shown(name)} of shape {shape} and dtype {dtype} does not fit its bytes; the file is damaged, "
            "save it again"
        )
    return TensorEntry(DTYPES[dtype], tuple(shape), *offsets)


def _sizes(value: Any) -> bool:
    # The bounds keep later products small; a real tensor here has two axes.
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )
