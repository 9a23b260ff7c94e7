"""Hugging Face models: config.json, safetensors files and the download from the hub. Nothing is ever unpickled."""

from collections.abc import Mapping
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from slora_jax.errors import ModelError
from slora_jax.loading.pieces import Checkpoint
from slora_jax.loading.source import safetensors_files

INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_CONFIG_FILES = ["config.json", "generation_config.json"]
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges*"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError where it cannot be read or is no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def read_hf_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    return read_json(path / "config.json")


def eos_from_hf(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids from generation_config.json, else from config.json (``config``); () where neither says."""
    generation = path / "generation_config.json"
    ids = read_json(generation).get("eos_token_id") if generation.is_file() else None
    ids = config.get("eos_token_id") if ids is None else ids
    ids = [] if ids is None else ids
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ModelError(f"{path}: eos_token_id must be an id or a list of ids, not {ids!r}")
    return tuple(dict.fromkeys(ids))


def open_checkpoint(path: Path) -> Checkpoint:
    """The tensors of all safetensors files of a model directory, headers read, values not.

    Raises ModelError for missing, damaged or pickled files, tensors found twice and dtypes that are not plain floats.
    """
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - the opened file is no dict
                    if name in where:
                        raise ModelError(f"{path}: tensor {name} is in both {where[name].name} and {file.name}")
                    header = opened.get_slice(name)
                    if header.get_dtype() not in _FLOATS:
                        raise ModelError(
                            f"{file}: tensor {name} is {header.get_dtype()}; only float weights are supported"
                        )
                    where[name], shapes[name] = file, tuple(header.get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or not a safetensors file: {_one_line(error)}") from None

    @functools.cache  # a header of thousands of tensors takes long to read
    def kept_open(file: Path) -> Any:
        return safe_open(file, framework="numpy")

    def read(name: str) -> np.ndarray:
        return kept_open(where[name]).get_tensor(name)

    def read_slice(name: str, axis: int, start: int, stop: int) -> np.ndarray:
        return kept_open(where[name]).get_slice(name)[(*[slice(None)] * axis, slice(start, stop))]

    return Checkpoint(source=str(path), shapes=shapes, read=read, read_slice=read_slice)


def download(name: str, *, weights: bool = True) -> Path:
    """The local directory of a model on the Hugging Face hub, downloaded where it is not cached yet.

    weights: False fetches the configuration only. Raises ModelError where the hub cannot be reached or refuses.
    """
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            name,
            allow_patterns=_MODEL_FILES if weights else _CONFIG_FILES,
            # Second copies of the weights in other formats; subfolders hold no part of the model.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # noqa: BLE001 - the hub client's errors share no base class
        raise ModelError(
            f"cannot download {name} from the Hugging Face hub ({_one_line(error)}); "
            "check the id and the network, or give a local directory"
        ) from None
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"{name} on the Hugging Face hub has no config.json, so it is not a supported base model")
    return Path(path)


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if not index.is_file():
        return safetensors_files(path)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}, which is not a safetensors file of this directory")
        if not (path / name).is_file():
            raise ModelError(f"{path / name} is missing though {INDEX} names it; download the model again")
    return [path / name for name in names]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:157] + "...") if len(text) > 160 else text or type(error).__name__
