"""The mesh, and the one table that says which logical axis is split over it."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

AXIS = "tp"
"""Name of the mesh axis that one model is spread over."""

RULES: dict[str | None, str | None] = {
    "vocab": AXIS,  # rows of the embedding and of lm_head
    "heads": AXIS,  # outputs of q, k, v and inputs of o
    "mlp": AXIS,  # outputs of gate, up and inputs of down
    "page": AXIS,  # elements of a page: each device has the tokens' keys and values of its own heads, and its own tiles
    "device": AXIS,  # arrays with one entry a device, such as where its tiles of an adapter begin
    "tokens": None,  # activations between the projections are whole on every device
    None: None,
}
"""Logical axis -> mesh axis; None is on every device. Parameters name their axes in ``param_specs`` of slora_jax."""


def make_mesh(devices: int | Sequence[jax.Device]) -> Mesh:
    """A mesh of these devices, or of the first so many. Raises ValueError if there are not as many."""
    if isinstance(devices, int):
        found = jax.devices()
        if devices > len(found):
            raise ValueError(f"{devices} devices were asked for and there are {len(found)}")
        devices = found[:devices]
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=tuple(devices))


def partition(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


POOL = partition(None, None, "page")
"""pages[L, P, E]"""

ADAPTER_IMAGE = partition(None, None, "page")
"""image[pages, L, E]: each device's chunk of the last axis is an image of its own"""

LOGITS = partition(None, "vocab")
"""logits[R, V]"""

WHOLE = PartitionSpec()
"""The same on every device."""
