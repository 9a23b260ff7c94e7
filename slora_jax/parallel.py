"""A model on several devices: its layout, the shards of its parameters, and the forward pass under shard_map."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from pallas_kernels.geometry import GROUPS
from sharding import (
    AXIS,
    LOGITS,
    POOL,
    RULES,
    WHOLE,
    Layout,
    LoraLayout,
    ShardedTable,
    Shards,
    SplitVocabulary,
    make_mesh,
    partition,
)
from slora_jax.batch import Batch, Output, Sampling, State
from slora_jax.model_config import ModelConfig, ParamSpec, param_specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """Devices and what each of them has. Make one with make_parallel."""

    mesh: Mesh
    layout: Layout

    @property
    def pool(self) -> NamedSharding:
        """Of pages[L, P, E]."""
        return NamedSharding(self.mesh, POOL)

    @property
    def page_elements(self) -> int:
        """E of the pool over all devices: each has a page of its own layout in its chunk of the last axis."""
        return self.layout.devices * self.layout.local.page_elements


def make_parallel(
    config: ModelConfig, mesh: Mesh | int, lora: LoraLayout | tuple[LoraLayout, ...] = "comm-free"
) -> Parallel:
    """Spreads a model over a mesh with an axis "tp", or over the first so many devices.

    lora: layout of the adapters, "s-lora" or "comm-free", or one for each group (qkv, o, gu, down).
    Every size works; those that do not divide by the number of devices are filled up with zeros. Raises ValueError if
    there are not as many devices, if the mesh has no such axis, or if kv heads of a device x head dim is no multiple
    of 16.
    """
    mesh = make_mesh(mesh) if isinstance(mesh, int) else mesh
    if AXIS not in mesh.shape:
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)}; one must be called {AXIS!r}")
    layout = Layout(
        devices=mesh.shape[AXIS],
        geometry=config.geometry,
        vocab_size=config.vocab_size,
        lora=(lora,) * len(GROUPS) if isinstance(lora, str) else tuple(lora),
    )
    _ = layout.local  # raises where a device's part of a page is no whole number of tiles
    return Parallel(mesh=mesh, layout=layout)


def local_config(config: ModelConfig, layout: Layout) -> ModelConfig:
    """One device's part of a model, as a model."""
    return dataclasses.replace(
        config,
        num_heads=layout.q_heads.shape[1],
        num_kv_heads=layout.kv_heads.shape[1],
        mlp_size=layout.mlp.shape[1],
        vocab_size=layout.vocab.shape[1],
    )


def param_shards(config: ModelConfig, parallel: Parallel) -> dict[str, NamedSharding | Shards]:
    """How every parameter lies on the devices, for ``load_model(shardings=...)``."""
    found: dict[str, NamedSharding | Shards] = {}
    for name, spec in param_specs(config).items():
        axis = _split_axis(spec)
        if axis is None:
            found[name] = NamedSharding(parallel.mesh, WHOLE)
        else:
            index = parallel.layout.columns(spec.axes[axis] or "", len(spec.parts) or 1)
            found[name] = Shards(mesh=parallel.mesh, axis=axis, index=index)
    return found


def shard_params(config: ModelConfig, params: Mapping[str, jax.Array], parallel: Parallel) -> dict[str, jax.Array]:
    """Parameters that lie whole on one device, spread over the mesh. Those that are on the mesh already are kept."""
    found = {}
    for name, where in param_shards(config, parallel).items():
        array = params[name]
        if array.sharding.device_set == set(parallel.mesh.devices.flat):
            found[name] = array
        elif isinstance(where, Shards):
            found[name] = where.put(np.asarray(array))
        else:
            found[name] = jax.device_put(array, where)
    return found


def shard_forward(forward: Callable[..., Any], config: ModelConfig, parallel: Parallel) -> Callable[..., Any]:
    """``forward(params, state, batch) -> (state, logits)`` of one device's part, run on all of them.

    Logits are split over the vocabulary; where it does not divide, columns past its end hold -inf. Hidden states, if
    the batch asks for them, are whole on every device.
    """
    params = {name: partition(*spec.axes) for name, spec in param_specs(config).items()}
    state = State(pages=POOL)

    def run(given: dict[str, jax.Array], old: State, batch: Batch) -> tuple[State, Any]:
        return jax.shard_map(
            forward,
            mesh=parallel.mesh,
            in_specs=(params, state, batch_specs(batch)),
            out_specs=(state, (LOGITS, WHOLE) if batch.return_hidden else LOGITS),
            check_vma=False,
        )(given, old, batch)

    return run


def shard_sample(sample: Callable[..., Output], parallel: Parallel) -> Callable[[jax.Array, Sampling], Output]:
    """``sample(logits, sampling)`` of logits that are split over the vocabulary."""
    vocabulary = SplitVocabulary.of(parallel.layout)

    def run(logits: jax.Array, sampling: Sampling) -> Output:
        return jax.shard_map(
            lambda part, s: sample(part, s, vocabulary),
            mesh=parallel.mesh,
            in_specs=(LOGITS, WHOLE),
            out_specs=WHOLE,
            check_vma=False,
        )(logits, sampling)

    return run


def batch_specs(batch: Batch) -> Batch:
    """PartitionSpec of each array of a batch: all on every device but the adapters' places."""
    whole: Batch = jax.tree.map(lambda _: WHOLE, batch)
    return dataclasses.replace(whole, adapters=ShardedTable.specs())


def _split_axis(spec: ParamSpec) -> int | None:
    return next((i for i, axis in enumerate(spec.axes) if RULES[axis] is not None), None)
