"""From a checkpoint's tensors, under their Hugging Face names, to the stacked parameter arrays on the device.

One stacked array, or one device's part of it, is filled on the host at a time, then sent: host memory peaks at the
largest, not at the model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import Shards
from slora_jax.errors import ModelError
from slora_jax.loading.pieces import Checkpoint, Piece, place
from slora_jax.loading.sharded import load_shards
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
        for piece in pieces_of(config, name):
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
    done = reported = 0
    params = {}

    def report(now: int, name: str) -> None:
        nonlocal reported
        if progress and now > reported:
            reported = now
            progress(now, total, name)

    for name, spec in specs.items():
        pieces, where = pieces_of(config, name), (shardings or {}).get(name)
        end, read = done + math.prod(spec.shape) * dtype.itemsize, done

        def rounded(value: np.ndarray, name=name, end=end) -> np.ndarray:
            nonlocal read
            value = round_to(value, weight_dtype, dtype)
            read += value.nbytes
            report(min(read, end), name)  # what several devices hold is read several times
            return value

        if isinstance(where, Shards) and checkpoint.read_slice:
            params[name] = load_shards(where, spec.shape, dtype, pieces, checkpoint.read_slice, rounded)
        else:
            params[name] = _load_whole(where, spec.shape, dtype, pieces, checkpoint, rounded)
        done = end
        report(done, name)
    return params


def _load_whole(where, shape, dtype, pieces: Sequence[Piece], checkpoint: Checkpoint, rounded) -> jax.Array:
    """A parameter that is put together on the host as a whole."""
    stacked = np.empty(shape, dtype)
    for piece in pieces:
        value = rounded(checkpoint.read(piece.tensor))
        if piece.layer is None:
            stacked[...] = value
        else:
            place(stacked[piece.layer, ..., piece.start : piece.stop], value)
    # Waiting lets go of the host copy before the next array is filled.
    if isinstance(where, Shards):
        return jax.block_until_ready(where.put(stacked))
    if where is None:
        return jax.block_until_ready(jax.device_put(stacked))
    return jax.block_until_ready(jax.make_array_from_callback(shape, where, lambda index: stacked[index]))


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


def pieces_of(config: ModelConfig, name: str) -> list[Piece]:
    """The tensors that make up a parameter."""
    spec = param_specs(config)[name]
    if name in _WHOLE_MODEL:
        return [Piece(_WHOLE_MODEL[name], None, 0, spec.shape[-1])]
    pieces = []
    for layer in range(config.num_layers):
        start = 0
        for tensor, width in zip(_PER_LAYER[name], spec.parts or (spec.shape[-1],), strict=True):
            pieces.append(Piece(f"model.layers.{layer}.{tensor}", layer, start, start + width))
            start += width
    return pieces


def _ignorable(name: str, config: ModelConfig) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
