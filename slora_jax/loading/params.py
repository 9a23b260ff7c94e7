"""From a checkpoint's tensors, under their Hugging Face names, to the stacked parameter arrays on the device.

One stacked array is filled on the host at a time, then sent: host memory peaks at the largest array, not at the model.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import Shards
from slora_jax.errors import ModelError
from slora_jax.model_config import ModelConfig, param_specs

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in total, name of what was just done)."""

Shardings = Mapping[str, jax.sharding.Sharding | Shards]
"""Sharding by parameter name; parameters that are not named go to the default device."""

_WHOLE_MODEL = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_PER_LAYER = {
    "attn_norm": ("input_layernorm.weight",),
    "wqkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "bqkv": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "wo": ("self_attn.o_proj.weight",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "wgu": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "wdown": ("mlp.down_proj.weight",),
}
_TRANSPOSE_ROWS = 128
"""Rows transposed at a time: keeps both sides in the CPU's cache, five times faster than one call of numpy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors of a base model by Hugging Face name: shapes known beforehand, values (float) read on demand."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Where one checkpoint tensor goes: ``layer`` of the stacked array, columns ``start:stop`` of its last axis."""

    tensor: str
    layer: int | None
    start: int
    stop: int


def resolve_dtype(dtype: Any, what: str = "dtype", allowed: Iterable[str] = ("float32", "bfloat16")) -> np.dtype:
    """numpy dtype of a name or jax/numpy type. Raises ModelError where it is not one of ``allowed``."""
    allowed = tuple(allowed)
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in allowed:
        raise ModelError(f"{what} {dtype!s} is not supported; choose one of {', '.join(allowed)}")
    return found


def resolve_weight_dtype(dtype: Any) -> np.dtype | None:
    """As resolve_dtype for the type that weights are rounded to first; None is kept."""
    return None if dtype is None else resolve_dtype(dtype, "weight_dtype", ("float32", "bfloat16", "float16"))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape ([out, in] for projections) of every tensor the model needs."""
    shapes = {}
    for name, spec in param_specs(config).items():
        for piece in _pieces(config, name):
            width = piece.stop - piece.start
            if piece.layer is None:
                shapes[piece.tensor] = spec.shape
            else:
                shapes[piece.tensor] = (width,) if len(spec.shape) == 2 else (width, spec.shape[1])
    return shapes


def check_tensors(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise ModelError naming the missing, mis-shaped or surplus tensors of a checkpoint."""
    expected, found = expected_shapes(config), checkpoint.shapes
    missing = [name for name in expected if name not in found]
    if missing:
        raise ModelError(f"{checkpoint.source}: missing tensors: {_some(missing)}")
    wrong = [
        f"{name} is {list(found[name])}, config says {list(shape)}"
        for name, shape in expected.items()
        if tuple(found[name]) != shape
    ]
    if wrong:
        raise ModelError(f"{checkpoint.source}: tensors of the wrong shape: {_some(wrong)}")
    surplus = [name for name in found if name not in expected and not _ignorable(name, config)]
    if surplus:
        raise ModelError(
            f"{checkpoint.source}: tensors that {config.architecture} does not have: {_some(surplus)}; "
            "the checkpoint is of another architecture than its config says"
        )


def load_params(
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    dtype: np.dtype,
    weight_dtype: np.dtype | None = None,
    shardings: Shardings | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """The parameters of ``param_specs(config)`` as device arrays of ``dtype``, rounded to ``weight_dtype`` first.

    Raises ModelError as check_tensors does, before any tensor is read.
    """
    check_tensors(config, checkpoint)
    specs = param_specs(config)
    total = sum(math.prod(spec.shape) for spec in specs.values()) * dtype.itemsize
    done = 0
    params = {}
    for name, spec in specs.items():
        stacked = np.empty(spec.shape, dtype)
        for piece in _pieces(config, name):
            value = round_to(checkpoint.read(piece.tensor), weight_dtype, dtype)
            _place(stacked, piece, value)
            done += value.nbytes
            if progress:
                progress(done, total, name)
        # Waiting lets go of the host copy before the next array is filled.
        where = (shardings or {}).get(name)
        array = where.put(stacked) if isinstance(where, Shards) else jax.device_put(stacked, where)
        params[name] = jax.block_until_ready(array)
        del stacked
    return params


def round_to(value: np.ndarray, weight_dtype: np.dtype | None, dtype: np.dtype) -> np.ndarray:
    """``value`` rounded to ``weight_dtype`` (None: not), then cast to ``dtype``; round to nearest even."""
    if weight_dtype is not None:
        value = value.astype(weight_dtype, copy=False)
    return value.astype(dtype, copy=False)


def round_on_device(params: dict[str, jax.Array], weight_dtype: np.dtype | None, dtype: np.dtype) -> None:
    """round_to for arrays on the device, replacing them one at a time so that only one of them exists twice."""
    for name in params:
        if weight_dtype is not None:
            params[name] = params[name].astype(weight_dtype)
        params[name] = params[name].astype(dtype)


def _pieces(config: ModelConfig, name: str) -> list[_Piece]:
    spec = param_specs(config)[name]
    if name in _WHOLE_MODEL:
        return [_Piece(_WHOLE_MODEL[name], None, 0, spec.shape[-1])]
    pieces = []
    for layer in range(config.num_layers):
        start = 0
        for tensor, width in zip(_PER_LAYER[name], spec.parts or (spec.shape[-1],), strict=True):
            pieces.append(_Piece(f"model.layers.{layer}.{tensor}", layer, start, start + width))
            start += width
    return pieces


def _place(stacked: np.ndarray, piece: _Piece, value: np.ndarray) -> None:
    if piece.layer is None:
        stacked[...] = value
    elif value.ndim == 1:
        stacked[piece.layer, piece.start : piece.stop] = value
    else:
        # numpy copies bfloat16 element by element; the same bits as integers go several times faster.
        bits = np.dtype(f"u{stacked.dtype.itemsize}")
        target, value = stacked[piece.layer, :, piece.start : piece.stop].view(bits), value.view(bits)
        for row in range(0, value.shape[0], _TRANSPOSE_ROWS):
            target[:, row : row + _TRANSPOSE_ROWS] = value[row : row + _TRANSPOSE_ROWS].T


def _ignorable(name: str, config: ModelConfig) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
