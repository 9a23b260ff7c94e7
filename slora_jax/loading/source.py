"""What a model's name stands for: a Hugging Face directory or id, a GGUF file, an Orbax directory, a random shape."""

import dataclasses
import os
from pathlib import Path
import re

from slora_jax.errors import ModelError

MANIFEST = "slora_model.json"
"""File that marks a directory written by ``slora-jax convert``."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Source:
    """``kind`` is one of hf, gguf, orbax, hub, random; ``path`` is None for hub and random."""

    kind: str
    name: str
    path: Path | None = None


def find_source(source: str | os.PathLike[str]) -> Source:
    """Decide what ``source`` is by looking at the file system only.

    Raises ModelError saying what was looked for where it is none of the supported kinds.
    """
    text = os.fspath(source)
    if text.startswith("random:"):
        return Source("random", text.removeprefix("random:"))
    path = Path(text).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.exists():
        return _file(path)
    if _looks_like_hub_id(text):
        return Source("hub", text)
    raise ModelError(
        f"no model at {text}: give a Hugging Face directory, a .gguf file, a directory written by slora-jax convert, "
        "a Hugging Face id (org/name) or random:<shape>"
    )


def directory_name(path: Path) -> str:
    return path.resolve().name


def _file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return Source("gguf", path.stem, path)
    if path.suffix in _PICKLES:
        raise _pickle_error(path)
    if path.suffix in (".safetensors", ".json"):
        raise ModelError(f"{path} is a single file of a model; give its directory, {path.parent}")
    raise ModelError(f"{path} is neither a .gguf file nor a model directory")


def _directory(path: Path) -> Source:
    name = directory_name(path)
    if (path / MANIFEST).is_file():
        return Source("orbax", name, path)
    has_config = (path / "config.json").is_file()
    ggufs = sorted(path.glob("*.gguf"))
    if has_config and (any(path.glob("*.safetensors")) or not ggufs):
        return Source("hf", name, path)
    if len(ggufs) == 1:
        return Source("gguf", ggufs[0].stem, ggufs[0])
    if ggufs:
        raise ModelError(f"{path} holds {len(ggufs)} GGUF files ({_names(ggufs)}); give the path of one")
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} is a LoRA adapter, not a base model; give its base model here and it with --adapter")
    raise ModelError(
        f"{path} holds no model: looked for config.json (Hugging Face), *.gguf and {MANIFEST} (slora-jax convert)"
    )


def safetensors_files(path: Path) -> list[Path]:
    """The weight files of a Hugging Face directory without an index, in order; ModelError where there are none."""
    files = sorted(
        file for file in path.glob("*.safetensors") if not file.name.startswith(("consolidated", "adapter_"))
    )
    if files:
        return files
    pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise _pickle_error(pickles[0])
    raise ModelError(f"{path} has a config.json but no *.safetensors files")


def _pickle_error(path: Path) -> ModelError:
    return ModelError(
        f"{path} is a pickle, which can run code when loaded and is not supported; "
        "convert it to safetensors (transformers: model.save_pretrained)"
    )


def _looks_like_hub_id(text: str) -> bool:
    if not _HUB_ID.fullmatch(text) or text.endswith((".gguf", ".safetensors", ".json", *_PICKLES)):
        return False
    # "models/llama" next to a directory "models" is a mistyped path, not an id.
    return not Path(text.split("/")[0]).exists()


def _names(files: list[Path], limit: int = 4) -> str:
    return ", ".join(file.name for file in files[:limit]) + (", ..." if len(files) > limit else "")
