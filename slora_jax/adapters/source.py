"""Where an adapter's two files are: a local directory, or a repository on the Hugging Face Hub."""

from io import BufferedReader
import os
from pathlib import Path
import re

from slora_jax.adapters.limits import AdapterLimits
from slora_jax.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def locate(source: str | os.PathLike[str], limits: AdapterLimits) -> Path:
    """The directory that holds the adapter's files.

    It is downloaded first where `source` is a Hub id ``org/name[@revision]``. A path that exists is never looked up on
    the Hub. Raises AdapterError where nothing usable is there.
    """
    path = Path(source)
    if not path.exists():
        match = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
        if match is None:
            raise AdapterError(
                "no such directory; give the directory that holds adapter_config.json, or a Hugging Face id "
                "org/name[@revision]"
            )
        path = _download(match["repo"], match["revision"], limits)
    if path.is_file():
        if path.suffix in _PICKLES:
            raise AdapterError(_pickle_message(path.name))
        raise AdapterError(
            "this is a file; give the directory that holds adapter_config.json and adapter_model.safetensors"
        )
    if not (path / CONFIG_FILE).is_file():
        raise AdapterError(f"no {CONFIG_FILE} in it; give the directory of a PEFT adapter")
    if not (path / WEIGHTS_FILE).is_file():
        pickle = next((entry.name for entry in sorted(path.iterdir()) if entry.suffix in _PICKLES), None)
        raise AdapterError(
            _pickle_message(pickle)
            if pickle
            else f"no {WEIGHTS_FILE} in it; save the adapter with PEFT's save_pretrained"
        )
    return path


def open_file(path: str | os.PathLike[str], name: str) -> BufferedReader:
    """Opens a file of the directory. It never waits, as opening a named pipe would."""
    return open(os.path.join(path, name), "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK))


def read_config_file(path: str | os.PathLike[str], limits: AdapterLimits) -> bytes:
    """Bytes of adapter_config.json. Raises AdapterError where it is larger than the limit."""
    with open_file(path, CONFIG_FILE) as file:
        data = file.read(limits.max_config_bytes + 1)
    if len(data) > limits.max_config_bytes:
        raise AdapterError(
            f"{CONFIG_FILE} has more than {limits.max_config_bytes} bytes; raise AdapterLimits.max_config_bytes if it "
            "is meant"
        )
    return data


def _pickle_message(name: str) -> str:
    return (
        f"{name} is a pickle, which can run any code when it is read, so it is never opened; "
        "save the adapter with safetensors (PEFT: save_pretrained(..., safe_serialization=True))"
    )


def _download(repo: str, revision: str | None, limits: AdapterLimits) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most sources are local

    files = [CONFIG_FILE, WEIGHTS_FILE]
    try:
        plan = snapshot_download(repo, revision=revision, allow_patterns=files, dry_run=True)
        too_large = next((file for file in plan if (file.file_size or 0) > limits.max_file_bytes), None)
        if too_large is None:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:  # the Hub client raises many kinds: network, missing repository, access
        try:  # without the network, an earlier download serves
            return Path(snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=True))
        except OSError:
            reason = " ".join(str(error).split())[:200]
            raise AdapterError(
                f"no such directory, and it could not be fetched from the Hugging Face Hub ({type(error).__name__}: "
                f"{reason}); check the name, the network and your access, or give a local directory"
            ) from None
    raise AdapterError(
        f"{too_large.filename} has {too_large.file_size} bytes, over the limit of {limits.max_file_bytes}; "
        "raise AdapterLimits.max_file_bytes if it is meant"
    )
