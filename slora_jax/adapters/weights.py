"""The A and B factors of one adapter in host memory: one compact buffer in the dtypes they came in."""

from collections.abc import Iterator, Mapping
import dataclasses
import hashlib

import ml_dtypes
import numpy as np

from slora_jax.adapters.host_memory import map_zeros
from slora_jax.adapters.safetensors_file import DTYPES
from slora_jax.adapters.targets import projection_name
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig

WEIGHT_DTYPES = tuple(DTYPES.values())

# Largest magnitude that float32 to bfloat16 rounding leaves finite.
_LARGEST = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Weights of the targeted projections.

    buffer: uint8 [bytes], not writeable. offsets: int64 [L, 7, 2], where A and B begin. dtypes: uint8 [L, 7, 2], index
    into WEIGHT_DTYPES. ranks: int32 [L, 7], 0 = not targeted. in_sizes, out_sizes: widths of the 7 modules.
    """

    buffer: np.ndarray
    offsets: np.ndarray
    dtypes: np.ndarray
    ranks: np.ndarray
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]

    def factor(self, layer: int, module: int, factor: int) -> np.ndarray:
        """A [rank, in] (factor 0) or B [out, rank] (factor 1) of a targeted projection, a view in its own dtype."""
        rank = int(self.ranks[layer, module])
        shape = (rank, self.in_sizes[module]) if factor == 0 else (self.out_sizes[module], rank)
        dtype = WEIGHT_DTYPES[self.dtypes[layer, module, factor]]
        start = int(self.offsets[layer, module, factor])
        return self.buffer[start : start + shape[0] * shape[1] * dtype.itemsize].view(dtype).reshape(shape)

    def keys(self) -> Iterator[tuple[int, int, int]]:
        """(layer, module, factor) of every tensor, in canonical order."""
        for layer, module in np.argwhere(self.ranks).tolist():
            for factor in (0, 1):
                yield int(layer), int(module), factor

    def check_and_digest(self) -> str:
        """SHA-256 (hex) over shapes, ranks and weights.

        Weights enter as float32, which holds float16 and bfloat16 exactly, so that the same values give the same digest
        whatever dtype or order they are stored in. Raises AdapterError naming a tensor with NaN, infinity or a value
        beyond bfloat16.
        """
        digest = hashlib.sha256(b"slora-jax weights 2")
        digest.update(np.array([self.ranks.shape[0], *self.in_sizes, *self.out_sizes], "<i8"))
        digest.update(self.ranks.astype("<i4"))
        for key in self.keys():
            wide = np.ascontiguousarray(self.factor(*key), dtype="<f4")
            if not np.abs(wide).max() <= _LARGEST:  # also when the maximum is NaN
                bad = (
                    "NaN"
                    if np.isnan(wide).any()
                    else "infinity"
                    if np.isinf(wide).any()
                    else "a value too large for bfloat16"
                )
                raise AdapterError(
                    f"tensor {tensor_name(*key)} holds {bad}; the training run diverged or the file is damaged"
                )
            digest.update(wide)
        return digest.hexdigest()


def pack(tensors: Mapping[tuple[int, int, int], np.ndarray], ranks: np.ndarray, config: ModelConfig) -> Weights:
    """Copies checked tensors, by (layer, module, factor), into one buffer."""
    offsets = np.zeros((*ranks.shape, 2), np.int64)
    dtypes = np.zeros((*ranks.shape, 2), np.uint8)
    buffer = map_zeros((sum(tensor.nbytes for tensor in tensors.values()),))
    end = 0
    for key in sorted(tensors):
        tensor = tensors[key]
        offsets[key], dtypes[key] = end, WEIGHT_DTYPES.index(tensor.dtype)
        buffer[end : end + tensor.nbytes] = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        end += tensor.nbytes
    return freeze(Weights(buffer, offsets, dtypes, ranks, config.in_sizes, config.out_sizes))


def freeze(weights: Weights) -> Weights:
    """Makes the arrays read-only: an adapter's contents must stay what its digest says."""
    for array in (weights.buffer, weights.offsets, weights.dtypes, weights.ranks):
        array.setflags(write=False)
    return weights


def tensor_name(layer: int, module: int, factor: int) -> str:
    """PEFT's name of a tensor, for instance ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``."""
    return f"base_model.model.{projection_name(layer, module)}.lora_{'AB'[factor]}.weight"
