"""Adapters with random weights, for tests and benchmarks."""

from collections.abc import Sequence
import dataclasses
import hashlib

from jaxtyping import Int
import numpy as np

from pallas_kernels.geometry import MODULES
from slora_jax.adapters.adapter import Adapter
from slora_jax.adapters.weights import WEIGHT_DTYPES
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig


def random_adapter(
    config: ModelConfig,
    rank: int | Int[np.ndarray, "L 7"],
    targets: Sequence[str] = MODULES,
    *,
    seed: int = 0,
    scale: int | float = 1.0,
    dtype: np.dtype | type = np.float32,
) -> Adapter:
    """An adapter whose delta ``scaling B A x`` is about `scale` times as large as the input ``x``, element by element.

    rank: of every targeted module, or an array [L, 7] (0 = not targeted; `targets` then only restricts it). seed: of
    the weights.
    dtype: of the stored weights, float32, float16 or bfloat16. Its lora_alpha is twice its largest rank.
    """
    unknown = [name for name in targets if name not in MODULES]
    if unknown:
        raise AdapterError(f"unknown target {unknown[0]!r}; targets are {', '.join(MODULES)}")
    if np.dtype(dtype) not in WEIGHT_DTYPES:
        raise AdapterError(f"dtype {np.dtype(dtype)} is not supported; use float32, float16 or bfloat16")
    chosen = np.isin(MODULES, targets)
    ranks = np.broadcast_to(rank, (config.num_layers, len(MODULES))) * chosen
    alpha = 2.0 * ranks.max(initial=0)
    rng = np.random.default_rng(seed)
    arrays: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    for layer, module in np.argwhere(ranks).tolist():
        r, inputs, outputs = int(ranks[layer, module]), config.in_sizes[module], config.out_sizes[module]
        a = rng.standard_normal((r, inputs), np.float32) * np.float32(inputs**-0.5)
        b = rng.standard_normal((outputs, r), np.float32) * np.float32(scale * r**0.5 / alpha)
        arrays.setdefault(int(layer), {})[MODULES[module]] = {"a": a.astype(dtype), "b": b.astype(dtype)}
    return Adapter.from_arrays(arrays, config, lora_alpha=alpha)


def clone(adapter: Adapter, index: int) -> Adapter:
    """Another adapter with the same weights in the same host memory, for benchmarks.

    It has a digest of its own, which is not that of its contents: to the engine the two are different adapters, each
    with pages and transfers of its own.
    """
    digest = hashlib.sha256(f"{adapter.digest} clone {index}".encode()).hexdigest()
    return dataclasses.replace(adapter, digest=digest)
