"""Which elements of an array each device gets, in what order: what a NamedSharding cannot say."""

import dataclasses

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int
import numpy as np

from sharding.mesh import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """An array cut along one axis. Device ``d`` holds the elements ``index[d]`` of that axis; -1 stands for zeros.

    The array on the devices has ``index.size`` elements along `axis`, which is more than the whole one has where
    elements are on several devices or zeros are filled in.
    """

    mesh: Mesh
    axis: int
    index: Int[np.ndarray, "N n"]

    @property
    def sharding(self) -> NamedSharding:
        """Of the array on the devices."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * self.axis, AXIS))

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array on the devices, from that of the whole array."""
        return (*whole[: self.axis], self.index.size, *whole[self.axis + 1 :])

    def in_order(self, size: int) -> bool:
        """Whether the shards are those of a plain NamedSharding of an axis of this size."""
        return self.index.size == size and bool((self.index.ravel() == np.arange(size)).all())

    def take(self, whole: np.ndarray, device: int) -> np.ndarray:
        """One device's part of a host array."""
        return take(whole, self.axis, self.index[device])

    def put(self, whole: np.ndarray) -> jax.Array:
        """Sends to each device its part of a host array, and nothing else."""
        width = self.index.shape[1]

        def part(where: tuple[slice, ...] | None) -> np.ndarray:
            assert where is not None
            return self.take(whole, (where[self.axis].start or 0) // width)

        return jax.make_array_from_callback(self.shape(whole.shape), self.sharding, part)

    def stored(self, whole: tuple[int, ...]) -> NamedSharding:
        """A plain sharding under which to read the whole array from storage, each device its part, for `rearrange`.

        Along another axis where this one is not in order, so that picking elements of this one needs no neighbour.
        """
        if self.in_order(whole[self.axis]):
            return self.sharding
        others = [a for a in range(len(whole)) if a != self.axis and whole[a] % self.mesh.shape[AXIS] == 0]
        axes = [None] * max(others, key=lambda a: whole[a]) + [AXIS] if others else []
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def rearrange(self, array: jax.Array) -> jax.Array:
        """From the whole array under `stored` to the shards, on the devices: one all-to-all."""
        if self.in_order(array.shape[self.axis]):
            return array
        stored = self.stored(array.shape)

        def pick(array, index):
            taken = jnp.take(array, jnp.maximum(index, 0), axis=self.axis)
            real = (index >= 0).reshape(-1, *[1] * (array.ndim - 1 - self.axis))
            return lax.with_sharding_constraint(jnp.where(real, taken, 0), stored)

        return jax.jit(pick, out_shardings=self.sharding)(array, self.index.ravel())


def take(whole: np.ndarray, axis: int, index: Int[np.ndarray, "n"]) -> np.ndarray:
    """Elements of an axis in the given order, zeros for -1; a view where they are one run."""
    if index.size and index[0] >= 0 and (np.diff(index) == 1).all():
        return whole[(*[slice(None)] * axis, slice(int(index[0]), int(index[-1]) + 1))]
    part = np.take(whole, np.maximum(index, 0), axis=axis)
    part[(*[slice(None)] * axis, index < 0)] = 0
    return part
