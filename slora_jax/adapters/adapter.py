"""`Adapter`: one LoRA adapter in host memory, checked against its base model and named by its contents' digest."""

from collections.abc import Mapping
import dataclasses
import functools
import os
from typing import Any

from jaxtyping import Float, Float32, Int32
import numpy as np

from pallas_kernels.geometry import MODULES, TILE_RANKS, Geometry, ceil_div
from slora_jax.adapters.arrays import flatten
from slora_jax.adapters.image import build_image, layer_tiles
from slora_jax.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from slora_jax.adapters.messages import shown
from slora_jax.adapters.peft_config import PeftLoraConfig, decode_config, parse_config
from slora_jax.adapters.safetensors_file import read_data, read_header
from slora_jax.adapters.source import WEIGHTS_FILE, locate, read_config_file
from slora_jax.adapters.targets import resolve, scalings
from slora_jax.adapters.tensors import check_complete, check_tensor, parse_names
from slora_jax.adapters.weights import WEIGHT_DTYPES, Weights, freeze, pack
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """An immutable LoRA adapter of one base model. Two adapters are equal when their digests are.

    digest: SHA-256 (hex) of ranks, scaling and weights, the same for the same values in whatever file, name or dtype.
    scaling: float32 [L, 7], factor of ``B A`` for each layer and module of MODULES, 0 where a module is not targeted.
    base_model: the name that the adapter gives for its base model, if any; it only informs.
    """

    digest: str
    weights: Weights
    scaling: Float32[np.ndarray, "L 7"]
    base_model: str | None = None

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[Any, Any],
        config: ModelConfig,
        *,
        lora_alpha: int | float,
        use_rslora: bool = False,
        alpha_pattern: Mapping[str, int | float] | None = None,
        limits: AdapterLimits = DEFAULT_LIMITS,
    ) -> "Adapter":
        """An adapter from a pytree of numpy or jax arrays (slora_jax/adapters/arrays.py describes the three forms).

        Each projection's rank is that of its A. Scaling is ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` with
        `use_rslora`; `alpha_pattern` gives other alphas by module name, matched as PEFT does. The arrays are copied to
        the host.
        Raises AdapterError for a pytree of another form, a wrong shape or dtype, a missing factor, NaN or infinity.
        """
        fields = {
            "peft_type": "LORA",
            "r": 1,  # ranks come from the arrays
            "lora_alpha": lora_alpha,
            "use_rslora": use_rslora,
            "alpha_pattern": dict(alpha_pattern or {}),
        }
        peft = parse_config(fields, limits)
        tensors = flatten(arrays, config)
        ranks = np.zeros((config.num_layers, len(MODULES)), np.int32)
        for (layer, module, factor), (name, array) in tensors.items():
            if factor == 0:
                if array.ndim != 2 or not 1 <= array.shape[0] <= limits.max_rank:
                    raise AdapterError(
                        f"{name} has shape {list(array.shape)}; A is [rank, inputs] with a rank from 1 to "
                        f"{limits.max_rank}"
                    )
                ranks[layer, module] = array.shape[0]
            elif (layer, module, 0) not in tensors:
                raise AdapterError(f"{name} has no A beside it; give both factors")
        check_complete({key: name for key, (name, _) in tensors.items()}, ranks, None)
        for key, (name, array) in tensors.items():
            check_tensor(name, key, array.shape, array.dtype, ranks, config, None)
        weights = pack({key: array for key, (_, array) in tensors.items()}, ranks, config)
        return cls._checked(weights, scalings(peft, ranks), None)

    @classmethod
    def _checked(cls, weights: Weights, scaling: np.ndarray, base_model: str | None) -> "Adapter":
        scaling.setflags(write=False)
        return cls(weights.check_and_digest(scaling), weights, scaling, base_model)

    @property
    def ranks(self) -> Int32[np.ndarray, "L 7"]:
        """True rank of each layer and module, 0 where a module is not targeted."""
        return self.weights.ranks

    @functools.cached_property
    def granules(self) -> Int32[np.ndarray, "L 7"]:
        """Ranks in granules of 8, rounded up."""
        granules = -(-self.ranks // TILE_RANKS)
        granules.setflags(write=False)
        return granules

    @property
    def max_rank(self) -> int:
        return int(self.ranks.max())

    @property
    def targets(self) -> tuple[str, ...]:
        """Modules that are targeted in at least one layer, in the order of MODULES."""
        return tuple(module for module, used in zip(MODULES, self.ranks.any(axis=0), strict=True) if used)

    @property
    def rank_summary(self) -> str:
        """The rank, or "lowest-highest" where layers or modules differ."""
        ranks = self.ranks[self.ranks > 0]
        return str(ranks.max()) if ranks.min() == ranks.max() else f"{ranks.min()}-{ranks.max()}"

    @property
    def nbytes(self) -> int:
        """Host memory of the weights, in bytes."""
        return self.weights.buffer.nbytes

    def a(self, layer: int, module: str) -> Float[np.ndarray, "rank in"]:
        """PEFT's lora_A.weight of a targeted projection, read-only, in the dtype it came in. module: one of MODULES."""
        return self._factor(layer, module, 0)

    def b(self, layer: int, module: str) -> Float[np.ndarray, "out rank"]:
        """PEFT's lora_B.weight of a targeted projection, read-only, in the dtype it came in. module: one of MODULES."""
        return self._factor(layer, module, 1)

    def num_tiles(self, geometry: Geometry) -> int:
        """Adapter tiles of the whole image."""
        self._check_geometry(geometry)
        return int(layer_tiles(self.granules, geometry).sum())

    def num_pages(self, geometry: Geometry) -> int:
        """Page ids that the adapter takes in the pool."""
        return ceil_div(self.num_tiles(geometry), geometry.tiles_per_page_id)

    def tile_start(self, geometry: Geometry) -> Int32[np.ndarray, "L"]:
        """Tile of the image at which each layer begins."""
        self._check_geometry(geometry)
        tiles = layer_tiles(self.granules, geometry)
        return (np.cumsum(tiles) - tiles).astype(np.int32)

    def image(self, geometry: Geometry, dtype: np.dtype | type) -> np.ndarray:
        """The weights as they lie in the page pool: a fresh array of `dtype` [num_pages, L, E], not scaled.

        See slora_jax/adapters/image.py for the order. dtype: the pool's dtype.
        """
        self._check_geometry(geometry)
        return build_image(self.weights, self.granules, geometry, np.dtype(dtype))

    def check_fits(self, config: ModelConfig) -> None:
        """Raises AdapterError where the adapter was made for a model of other sizes."""
        ours = (self.ranks.shape[0], self.weights.in_sizes, self.weights.out_sizes)
        if ours != (config.num_layers, config.in_sizes, config.out_sizes):
            raise AdapterError(
                f"adapter {self.digest[:12]} is for a model of {ours[0]} layers, input widths {ours[1]} and output "
                f"widths {ours[2]}; this base model has {config.num_layers} layers, {config.in_sizes} and "
                f"{config.out_sizes}; give an adapter of this base model"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Adapter({self.digest[:12]}, rank {self.rank_summary}, {' '.join(self.targets)})"

    def _factor(self, layer: int, module: str, factor: int) -> np.ndarray:
        index = MODULES.index(module)
        if not self.ranks[layer, index]:
            raise AdapterError(f"the adapter does not target {module}_proj of layer {layer}; see Adapter.ranks")
        return self.weights.factor(layer, index, factor)

    def _check_geometry(self, geometry: Geometry) -> None:
        ours = (self.ranks.shape[0], self.weights.in_sizes, self.weights.out_sizes)
        theirs = (geometry.num_layers, geometry.in_sizes, geometry.out_sizes)
        if ours != theirs:
            raise ValueError(f"adapter of (layers, input widths, output widths) {ours} cannot be laid out for {theirs}")


def read_adapter(
    source: str | os.PathLike[str] | Mapping[Any, Any] | Adapter,
    config: ModelConfig,
    *,
    limits: AdapterLimits = DEFAULT_LIMITS,
) -> Adapter:
    """Reads and checks an adapter for a base model.

    source: a directory in PEFT's format; a Hugging Face id ``org/name[@revision]``; arrays with their settings,
    ``{"weights": pytree, "lora_alpha": 16, "use_rslora": False, "alpha_pattern": {}}``, the last two optional (see
    Adapter.from_arrays); or an Adapter, which is only checked against the model.
    No tensor is read before the configuration and the file's header have been checked against the model.
    Raises AdapterError, beginning with the source, that names what is refused, why, and the remedy.
    """
    label = str(source) if isinstance(source, str | os.PathLike) else "weights given as arrays"
    try:
        if isinstance(source, Adapter):
            source.check_fits(config)
            return source
        if isinstance(source, Mapping):
            return _from_mapping(source, config, limits)
        return _read_directory(source, config, limits)
    except AdapterError as error:
        raise AdapterError(f"{label}: {error}") from None
    except OSError as error:
        reason = error.strerror or error
        raise AdapterError(f"{label}: cannot be read ({reason}); check the files and their permissions") from None


def _from_mapping(source: Mapping[Any, Any], config: ModelConfig, limits: AdapterLimits) -> Adapter:
    if "weights" not in source or "lora_alpha" not in source:
        raise AdapterError(
            'give {"weights": pytree, "lora_alpha": number}; the scaling cannot be known from weights alone'
        )
    unknown = sorted(str(key) for key in source.keys() - {"weights", "lora_alpha", "use_rslora", "alpha_pattern"})
    if unknown:
        raise AdapterError(
            f"unknown key {unknown[0]!r}; the keys are weights, lora_alpha, use_rslora and alpha_pattern"
        )
    settings = {key: value for key, value in source.items() if key != "weights"}
    return Adapter.from_arrays(source["weights"], config, limits=limits, **settings)


def _read_directory(source: str | os.PathLike[str], config: ModelConfig, limits: AdapterLimits) -> Adapter:
    path = locate(source, limits)
    peft: PeftLoraConfig = parse_config(decode_config(read_config_file(path, limits)), limits)
    ranks, scaling = resolve(peft, config)
    with open(path / WEIGHTS_FILE, "rb") as file:
        entries = read_header(file, limits)
        names = parse_names(entries, config)
        check_complete(names, ranks, peft.base_model)
        offsets = np.zeros((*ranks.shape, 2), np.int64)
        dtypes = np.zeros((*ranks.shape, 2), np.uint8)
        for key, name in names.items():
            entry = entries[name]
            check_tensor(f"tensor {shown(name, 160)}", key, entry.shape, entry.dtype, ranks, config, peft.base_model)
            offsets[key], dtypes[key] = entry.start, WEIGHT_DTYPES.index(entry.dtype)
        buffer = read_data(file, entries)
    weights = freeze(Weights(buffer, offsets, dtypes, ranks, config.in_sizes, config.out_sizes))
    return Adapter._checked(weights, scaling, peft.base_model)
