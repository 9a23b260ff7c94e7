"""`Adapter`: one LoRA adapter in host memory, checked against its base model and named by its contents' digest."""

from collections.abc import Mapping
import dataclasses
import hashlib
from typing import Any

from jaxtyping import Float, Float32
import numpy as np

from pallas_kernels.geometry import MODULES, Geometry
from slora_jax.adapters.arrays import flatten
from slora_jax.adapters.image import build_image
from slora_jax.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from slora_jax.adapters.peft_config import parse_config
from slora_jax.adapters.shape import AdapterShape
from slora_jax.adapters.targets import scalings
from slora_jax.adapters.tensors import check_complete, check_tensor
from slora_jax.adapters.weights import Weights, pack
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Adapter(AdapterShape):
    """An immutable LoRA adapter of one base model. Two adapters are equal when their digests are.

    digest: SHA-256 (hex) of ranks, scaling and weights, the same for the same values in whatever file, name or dtype.
    weights_digest: the same without the scaling, which is all that the image in the page pool depends on.
    base_model: the name that the adapter gives for its base model, if any; it only informs.
    """

    digest: str
    weights_digest: str
    weights: Weights
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
        return cls.from_weights(weights, scalings(peft, ranks))

    @classmethod
    def from_weights(
        cls, weights: Weights, scaling: Float32[np.ndarray, "L 7"], base_model: str | None = None
    ) -> "Adapter":
        """An adapter of weights whose shapes were checked. Raises AdapterError where one is not finite."""
        scaling.setflags(write=False)
        weights_digest = weights.check_and_digest()
        digest = hashlib.sha256(
            b"slora-jax adapter 2" + bytes.fromhex(weights_digest) + scaling.astype("<f4").tobytes()
        )
        return cls(
            ranks=weights.ranks,
            scaling=scaling,
            in_sizes=weights.in_sizes,
            out_sizes=weights.out_sizes,
            digest=digest.hexdigest(),
            weights_digest=weights_digest,
            weights=weights,
            base_model=base_model,
        )

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

    def image(self, geometry: Geometry, dtype: np.dtype | type) -> np.ndarray:
        """The weights as they lie in the page pool: a fresh array of `dtype` [num_pages, L, E], not scaled.

        See slora_jax/adapters/image.py for the order. dtype: the pool's dtype.
        """
        self._check_geometry(geometry)
        return build_image(self.weights, self.granules, geometry, np.dtype(dtype))

    @property
    def label(self) -> str:
        return f"adapter {self.digest[:12]}"

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
