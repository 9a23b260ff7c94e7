"""Adapters in PEFT directories: checked without reading a tensor, and read later, if the files are still the same."""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import hashlib
from io import BufferedReader
import os
import weakref

import numpy as np

from slora_jax.adapters.adapter import Adapter
from slora_jax.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from slora_jax.adapters.messages import shown
from slora_jax.adapters.peft_config import PeftLoraConfig, decode_config, parse_config
from slora_jax.adapters.safetensors_file import TensorEntry, parse_header, read_data, read_header_bytes
from slora_jax.adapters.shape import AdapterShape
from slora_jax.adapters.source import CONFIG_FILE, WEIGHTS_FILE, locate, open_file, read_config_file
from slora_jax.adapters.targets import resolve
from slora_jax.adapters.tensors import check_complete, check_tensor, parse_names
from slora_jax.adapters.weights import WEIGHT_DTYPES, Weights, freeze
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig

_PLANS = 32  # pairs of configuration and header that are remembered; a header has at most a few MiB

Source = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A directory whose configuration and header were checked, so that a few hundred bytes stand for an adapter.

    stamp: hash of the configuration, the header, and the size and modification time of the weights' file. It changes
    when somebody writes the files anew, although the weights themselves were not looked at.
    """

    path: str
    shape: AdapterShape
    stamp: bytes


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What configuration and header say: the shape, and where each factor lies in the data section. key: their hash."""

    shape: AdapterShape
    entries: dict[str, TensorEntry]
    offsets: np.ndarray
    dtypes: np.ndarray
    base_model: str | None
    key: bytes


class AdapterReader:
    """Reads adapters of one base model. Thread-safe.

    Adapters of one training recipe have the same configuration and header; what they mean is worked out once.
    """

    def __init__(self, config: ModelConfig, limits: AdapterLimits = DEFAULT_LIMITS):
        self._config = config
        self._limits = limits
        self._plan = functools.lru_cache(_PLANS)(self._make_plan)
        self._shapes: weakref.WeakValueDictionary[bytes, AdapterShape] = weakref.WeakValueDictionary()

    def check(self, source: Source) -> AdapterFiles:
        """Everything that the configuration and the header can say is checked; no tensor is read.

        source: a directory, or a Hugging Face id, which is downloaded. Raises AdapterError beginning with the source.
        """
        with SourceErrors(source), self._open(source) as (path, _, plan, stamp, _):
            return AdapterFiles(path, plan.shape, stamp)

    def check_all(self, directory: Source) -> tuple[dict[str, AdapterFiles], dict[str, str]]:
        """Checks every adapter of a directory. Returns those that are right, by the name of their subdirectory, and for
        those that are not, why.

        Subdirectories without adapter_config.json, and those whose name begins with a dot, are left alone. Raises
        AdapterError if the directory cannot be read or has no adapter in it.
        """
        found: dict[str, AdapterFiles] = {}
        refused: dict[str, str] = {}
        with SourceErrors(directory):
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    found[entry.name] = self.check(entry.path)
                except AdapterError as error:
                    if os.path.exists(os.path.join(entry.path, CONFIG_FILE)):
                        refused[entry.name] = f"adapter {entry.name!r}: {error}"
            if not found and not refused:
                raise AdapterError("no adapter in it; give a directory whose subdirectories are PEFT adapters")
        return found, refused

    def read(self, source: Source | AdapterFiles) -> Adapter:
        """The whole adapter, its tensors checked. For AdapterFiles: only if the files are those that were checked.

        Raises AdapterError beginning with the source.
        """
        files = source if isinstance(source, AdapterFiles) else None
        where = source.path if isinstance(source, AdapterFiles) else source
        with SourceErrors(where), self._open(where) as (_, file, plan, stamp, written):
            if files is not None and stamp != files.stamp:
                raise changed()
            buffer = read_data(file, plan.entries)
            if os.fstat(file.fileno()).st_mtime_ns != written:
                raise AdapterError("adapter_model.safetensors was written while it was read; add the adapter again")
            shape = plan.shape
            weights = Weights(buffer, plan.offsets, plan.dtypes, shape.ranks, shape.in_sizes, shape.out_sizes)
            return Adapter.from_weights(freeze(weights), shape.scaling, plan.base_model)

    @contextlib.contextmanager
    def _open(self, source: Source) -> Iterator[tuple[str, BufferedReader, _Plan, bytes, int]]:
        """(directory, the weights' file at the start of its data, plan, stamp, when it was written in ns).

        What is checked is what is read: the same open file.
        """
        path = os.fspath(source)
        try:
            config = read_config_file(path, self._limits)
            file = open_file(path, WEIGHTS_FILE)
        except OSError as error:
            # locate knows Hub ids and says what is wrong with a directory; what it finds nothing wrong with is an error
            # of the medium
            found = os.fspath(locate(source, self._limits))
            if found == path:
                raise error from None
            path = found
            config = read_config_file(path, self._limits)
            file = open_file(path, WEIGHTS_FILE)
        with file:
            header, data_bytes = read_header_bytes(file, self._limits)
            plan = self._plan(config, header, data_bytes)
            written = os.fstat(file.fileno()).st_mtime_ns
            stamp = hashlib.blake2b(b"%b %d %d" % (plan.key, data_bytes, written), digest_size=16)
            yield path, file, plan, stamp.digest(), written

    def _make_plan(self, config_data: bytes, header: bytes, data_bytes: int) -> _Plan:
        peft: PeftLoraConfig = parse_config(decode_config(config_data), self._limits)
        ranks, scaling = resolve(peft, self._config)
        entries = parse_header(header, data_bytes, self._limits)
        names = parse_names(entries, self._config)
        check_complete(names, ranks, peft.base_model)
        offsets = np.zeros((*ranks.shape, 2), np.int64)
        dtypes = np.zeros((*ranks.shape, 2), np.uint8)
        for key, name in names.items():
            entry = entries[name]
            label = f"tensor {shown(name, 160)}"
            check_tensor(label, key, entry.shape, entry.dtype, ranks, self._config, peft.base_model)
            offsets[key], dtypes[key] = entry.start, WEIGHT_DTYPES.index(entry.dtype)
        content = hashlib.blake2b(len(header).to_bytes(8) + header + config_data).digest()
        return _Plan(self._shape(ranks, scaling), entries, offsets, dtypes, peft.base_model, content)

    def _shape(self, ranks: np.ndarray, scaling: np.ndarray) -> AdapterShape:
        """One object for equal shapes, whatever else differs in the files."""
        ranks.setflags(write=False)
        scaling.setflags(write=False)
        new = AdapterShape(
            ranks=ranks, scaling=scaling, in_sizes=self._config.in_sizes, out_sizes=self._config.out_sizes
        )
        return self._shapes.setdefault(ranks.tobytes() + scaling.tobytes(), new)


def changed() -> AdapterError:
    """For files that are not those that were registered."""
    return AdapterError(
        "the files have changed since the adapter was added; add it again under its name to serve what they hold now"
    )


class SourceErrors(contextlib.AbstractContextManager[None]):
    """Puts the source before the message of an AdapterError, and makes one of an error of the operating system.

    A class, because a generator's frame would be in a cycle with the error, and with it all that had been read.
    """

    def __init__(self, source: Source | str):
        self._source = source

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, AdapterError):
            raise AdapterError(f"{self._source}: {error}") from None
        if isinstance(error, OSError):
            reason = error.strerror or error
            message = f"{self._source}: cannot be read ({reason}); check the files and their permissions"
            raise AdapterError(message) from None
