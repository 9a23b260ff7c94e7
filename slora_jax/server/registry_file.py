"""What was loaded and unloaded through the API, kept in a file so that a restart finds it again."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path

from slora_jax.errors import SloraError
from slora_jax.server.atomic_file import write_atomically

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class RegistryState:
    """loaded: name -> path under the load root. unloaded: names of the watched directory that shall stay away."""

    loaded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unloaded: frozenset[str] = frozenset()


class RegistryFile:
    """The file. path: None keeps the state in memory alone."""

    def __init__(self, path: Path | None):
        self._path = path

    def read(self) -> RegistryState:
        """SloraError if the file is there and cannot be understood: it is never overwritten unread."""
        if self._path is None or not self._path.exists():
            return RegistryState()
        try:
            document = json.loads(self._path.read_bytes())
            if document["version"] != _VERSION:
                raise SloraError(f"{self._path} has version {document['version']!r}; this program reads {_VERSION}")
            loaded, unloaded = document["loaded"], document["unloaded"]
            strings = [*loaded.keys(), *loaded.values(), *unloaded]
            if not all(isinstance(text, str) for text in strings):
                raise TypeError
        except OSError as error:
            raise SloraError(f"{self._path}: the registry cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SloraError(f"{self._path} is no registry of this server; repair it or move it away") from None
        return RegistryState(loaded, frozenset(unloaded))

    def write(self, state: RegistryState) -> None:
        """SloraError if it cannot be written; the file is then as it was."""
        if self._path is None:
            return
        document = {"version": _VERSION, "loaded": dict(state.loaded), "unloaded": sorted(state.unloaded)}
        try:
            write_atomically(self._path, json.dumps(document, indent=2).encode() + b"\n")
        except OSError as error:
            raise SloraError(f"{self._path}: the registry cannot be written ({error.strerror})") from None
