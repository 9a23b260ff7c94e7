"""One door to every kind of base model: load_model and load_config."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slora_jax.loading import hf, orbax
from slora_jax.loading.config import config_from_hf
from slora_jax.loading.params import (
    Progress,
    Shardings,
    check_tensors,
    load_params,
    resolve_dtype,
    resolve_weight_dtype,
    round_on_device,
)
from slora_jax.loading.random import random_params
from slora_jax.loading.source import Source, directory_name, find_source
from slora_jax.model_config import ModelConfig
from slora_jax.shapes import named_shape
from slora_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A base model ready to run.

    params: see ``param_specs``. tokenizer: None for random shapes and for models that come without tokeniser files.
    eos_token_ids: every id that ends an answer; () where nothing says which.
    """

    config: ModelConfig
    params: dict[str, jax.Array]
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """How load_model was asked to load."""

    dtype: np.dtype
    weight_dtype: np.dtype | None
    shardings: Shardings | None
    progress: Progress | None


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: Any = "bfloat16",
    weight_dtype: Any = None,
    shardings: Shardings | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a base model onto the device.

    source: a Hugging Face directory or id (org/name), a .gguf file or a directory with exactly one, a directory written
        by ``save_orbax``, or ``random:<shape>`` (``slora_jax.shapes``).
    dtype: "float32" or "bfloat16" (name or type), the compute dtype of all parameters.
    weight_dtype: values are rounded to this type first (float32, bfloat16, float16). None: no extra rounding, except
        for quantised GGUF files, whose dequantised values are rounded to bfloat16.
    shardings: parameter name -> sharding; others go to the default device.
    progress: called with (bytes done, bytes in total, parameter name) as parameters arrive.
    Raises ModelError, one line, for everything that is wrong with the source.
    """
    options = _Options(
        dtype=resolve_dtype(dtype),
        weight_dtype=resolve_weight_dtype(weight_dtype),
        shardings=shardings,
        progress=progress,
    )
    found = find_source(source)
    if found.kind == "random":
        return _load_random(found, options)
    if found.kind == "hub":
        return _load_hf(hf.download(found.name), found.name, options)
    if found.path is None:
        raise AssertionError(f"source {found} has no path")
    load = {"hf": _load_hf, "gguf": _load_gguf, "orbax": _load_orbax}[found.kind]
    return load(found.path, found.name, options)


def load_config(source: str | os.PathLike[str], *, check_weights: bool = False) -> ModelConfig:
    """The configuration of a base model, without its weights; for an id on the hub only config.json is downloaded.

    check_weights: also compare names and shapes of the tensors with the configuration, from the files' headers
    (local models only). Raises ModelError as load_model does.
    """
    found = find_source(source)
    if found.kind == "random":
        return named_shape(found.name)
    if found.kind == "hub":
        path = hf.download(found.name, weights=False)
        return config_from_hf(hf.read_hf_config(path), found.name)
    if found.path is None:
        raise AssertionError(f"source {found} has no path")
    if found.kind == "orbax":
        return orbax.read_manifest(found.path).config
    if found.kind == "gguf":
        from slora_jax.loading import gguf

        file = gguf.GGUFFile.open(found.path)
        config = gguf.config_from_gguf(file)
        if check_weights:
            check_tensors(config, gguf.open_checkpoint(file, config))
        return config
    config = config_from_hf(hf.read_hf_config(found.path), str(found.path))
    if check_weights:
        check_tensors(config, hf.open_checkpoint(found.path))
    return config


def _load_random(found: Source, options: _Options) -> LoadedModel:
    config = named_shape(found.name)
    params = random_params(config, 0, options.dtype, options.shardings, options.progress)
    round_on_device(params, options.weight_dtype, options.dtype)
    return LoadedModel(config=config, params=params, tokenizer=None, eos_token_ids=(), name=found.name)


def _load_hf(path: Path, name: str, options: _Options) -> LoadedModel:
    raw = hf.read_hf_config(path)
    config = config_from_hf(raw, str(path))
    eos = hf.eos_from_hf(path, raw)
    checkpoint = hf.open_checkpoint(path)
    check_tensors(config, checkpoint)
    tokenizer = Tokenizer.from_directory(path, model_vocab_size=config.vocab_size)
    params = load_params(config, checkpoint, **_fields(options))
    return _loaded(config, params, tokenizer, eos, name)


def _load_gguf(path: Path, name: str, options: _Options) -> LoadedModel:
    # The gguf package takes a third of a second to import, for nothing in the other cases.
    from slora_jax.loading import gguf
    from slora_jax.loading.gguf_tokenizer import tokenizer_from_gguf

    file = gguf.GGUFFile.open(path)
    gguf.GGUFFile.forget()
    config = gguf.config_from_gguf(file)
    checkpoint = gguf.open_checkpoint(file, config)
    check_tensors(config, checkpoint)
    tokenizer = tokenizer_from_gguf(file, config.vocab_size)
    if options.weight_dtype is None and file.quantised:
        options = dataclasses.replace(options, weight_dtype=jnp.dtype("bfloat16"))
    params = load_params(config, checkpoint, **_fields(options))
    return _loaded(config, params, tokenizer, gguf.eos_from_gguf(file), name)


def _load_orbax(path: Path, name: str, options: _Options) -> LoadedModel:
    manifest = orbax.read_manifest(path)
    tokenizer = orbax.restore_tokenizer(path, manifest.config.vocab_size)
    params = orbax.restore_params(path, manifest.config, **_fields(options))
    return _loaded(manifest.config, params, tokenizer, manifest.eos_token_ids, manifest.name or directory_name(path))


def _loaded(
    config: ModelConfig, params: dict[str, jax.Array], tokenizer: Tokenizer | None, eos: tuple[int, ...], name: str
) -> LoadedModel:
    # Fine-tunes often name their end-of-turn token in the tokeniser's files only.
    own = tokenizer.eos_token_ids if tokenizer else ()
    eos = tuple(token for token in dict.fromkeys((*eos, *own)) if token < config.vocab_size)
    return LoadedModel(config=config, params=params, tokenizer=tokenizer, eos_token_ids=eos, name=name)


def _fields(options: _Options) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
