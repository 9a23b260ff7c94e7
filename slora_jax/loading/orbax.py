"""Orbax checkpoints: written once by ``slora-jax convert``, restored straight to the wanted dtype and sharding.

A converted model is one directory: slora_model.json (configuration), params/ (Orbax), tokenizer/ (Hugging Face files).
"""

from collections.abc import Mapping
import dataclasses
import json
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import Shards
from slora_jax.errors import ModelError
from slora_jax.loading.config import checked_config
from slora_jax.loading.hf import read_json
from slora_jax.loading.params import Progress, Shardings, round_on_device
from slora_jax.loading.source import MANIFEST
from slora_jax.model_config import ModelConfig, RopeScaling, param_specs
from slora_jax.tokenizer import Tokenizer

_FORMAT = 1
_PARAMS, _TOKENIZER = "params", "tokenizer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What slora_model.json says. ``dtype``: of the stored arrays."""

    name: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    config: ModelConfig


def save_orbax(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    *,
    tokenizer: Tokenizer | None = None,
    eos_token_ids: tuple[int, ...] = (),
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model to the new directory ``path``, whole or not at all; it is renamed into place when it is complete.

    Raises ModelError where the path exists and overwrite is False, where it is something else than a converted model,
    or where it cannot be written.
    """
    path = Path(path).expanduser().resolve()
    _check_target(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise ModelError(f"cannot write to {path.parent}: {error.strerror}") from None
    try:
        _write_params(partial / _PARAMS, params)
        if tokenizer is not None:
            tokenizer.save(partial / _TOKENIZER)
        manifest = {
            "format": _FORMAT,
            "name": name or path.name,
            "dtype": params["embed"].dtype.name,
            "eos_token_ids": list(eos_token_ids),
            "config": dataclasses.asdict(config),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        _rename(partial, path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def read_manifest(path: Path) -> Manifest:
    """slora_model.json of a converted model. Raises ModelError where it is damaged or of another version."""
    raw = read_json(path / MANIFEST)
    if raw.get("format") != _FORMAT:
        raise ModelError(f"{path}: format {raw.get('format')!r} is not {_FORMAT}; convert the model again")
    try:
        fields: dict[str, Any] = dict(raw["config"])
        if fields["rope_scaling"] is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return Manifest(
            name=raw["name"],
            dtype=raw["dtype"],
            eos_token_ids=tuple(raw["eos_token_ids"]),
            config=checked_config(str(path), **fields),
        )
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path / MANIFEST} is damaged ({error}); convert the model again") from None


def restore_params(
    path: Path,
    config: ModelConfig,
    *,
    dtype: np.dtype,
    weight_dtype: np.dtype | None = None,
    shardings: Shardings | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """The parameters as device arrays of ``dtype`` under their shardings; each device reads its own part only.

    Raises ModelError where the files are missing, damaged, or do not fit the configuration.
    """
    import orbax.checkpoint as ocp

    specs = param_specs(config)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    read_as = _read_dtype(path, dtype, weight_dtype)
    where = {name: (shardings or {}).get(name, default) for name in specs}
    target = {
        name: jax.ShapeDtypeStruct(spec.shape, read_as, sharding=_stored(where[name], spec.shape))
        for name, spec in specs.items()
    }
    total = sum(array.size for array in target.values()) * dtype.itemsize
    if progress:
        progress(0, total, _PARAMS)
    _check_stored(path / _PARAMS, target)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / _PARAMS, target)
    except Exception as error:  # noqa: BLE001 - storage errors come from several libraries
        text = " ".join(str(error).split())[:160]
        raise ModelError(f"{path}: the parameters cannot be restored ({text}); convert the model again") from None
    for name, shards in where.items():
        if isinstance(shards, Shards):
            params[name] = shards.rearrange(params[name])
    round_on_device(params, weight_dtype, dtype)
    if progress:
        progress(total, total, _PARAMS)
    return params


def restore_tokenizer(path: Path, model_vocab_size: int) -> Tokenizer | None:
    """The tokeniser stored with a converted model; None where it was converted without one."""
    return Tokenizer.from_directory(path / _TOKENIZER, model_vocab_size=model_vocab_size)


def _stored(where: jax.sharding.Sharding | Shards, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return where.stored(shape) if isinstance(where, Shards) else where


def _read_dtype(path: Path, dtype: np.dtype, weight_dtype: np.dtype | None) -> np.dtype:
    """Values are rounded by the first cast, so where they are to be rounded otherwise they are read as stored."""
    if weight_dtype is None:
        return dtype
    return jnp.dtype(read_manifest(path).dtype)


def _write_params(path: Path, params: Mapping[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, dict(params))
        checkpointer.wait_until_finished()


def _check_stored(path: Path, target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Orbax pads or cuts an array of another shape in silence, so names and shapes are compared first."""
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
    except Exception as error:  # noqa: BLE001 - as in restore_params
        text = " ".join(str(error).split())[:160]
        raise ModelError(f"{path} is no Orbax checkpoint or is damaged ({text}); convert the model again") from None
    shapes = {name: tuple(array.shape) for name, array in stored.items()}
    wanted = {name: array.shape for name, array in target.items()}
    if shapes != wanted:
        wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise ModelError(f"{path}: parameters {', '.join(wrong)} do not fit {MANIFEST}; convert the model again")


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise ModelError(f"{path} exists; choose another path or allow overwriting")
    if not (path / MANIFEST).is_file():
        raise ModelError(f"{path} exists and is not a converted model, so it is not overwritten; choose another path")


def _rename(partial: Path, path: Path) -> None:
    """Put the finished directory in place; an older model there goes away only after that."""
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.old-{partial.name[-8:]}")
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
