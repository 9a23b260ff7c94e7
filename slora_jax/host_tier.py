"""Which adapters lie in host memory, ready to be copied to pages: a budget of bytes, the least recently used leave.

Plain bookkeeping, no jax and no threads.
"""

from collections import OrderedDict
from collections.abc import Collection, Hashable
import dataclasses
from typing import Any

Key = Hashable


@dataclasses.dataclass(slots=True)
class _Place:
    nbytes: int
    image: Any = None  # None: reserved for one that is being made


class HostTier:
    """Images by key. Space is reserved before an image is made, so that the budget holds while it is read, too."""

    def __init__(self, budget: int):
        if budget < 1:
            raise ValueError(f"the budget must be at least 1 byte, not {budget}")
        self.budget = budget
        self.used = 0  # bytes, those that are reserved included
        self.evictions = 0
        self._places: OrderedDict[Key, _Place] = OrderedDict()  # the least recently used first

    def __contains__(self, key: Key) -> bool:
        """Whether there is an image, or a place for one."""
        return key in self._places

    def __len__(self) -> int:
        return sum(place.image is not None for place in self._places.values())

    def get(self, key: Key) -> Any:
        """The image; None if there is none, or none yet."""
        place = self._places.get(key)
        return None if place is None else place.image

    def keys(self) -> set[Any]:
        """Keys of the images."""
        return {key for key, place in self._places.items() if place.image is not None}

    def touch(self, key: Key) -> None:
        """Notes a use."""
        self._places.move_to_end(key)

    def reserve(self, key: Key, nbytes: int, keep: Collection[Key]) -> bool:
        """Makes a place, evicting images that are not in `keep`. False, with nothing changed, if that is not enough."""
        if key in self._places:
            raise ValueError(f"{key!r} has a place")
        victims, free = [], self.budget - self.used
        for other, place in self._places.items():
            if free >= nbytes:
                break
            if place.image is not None and other not in keep:
                victims.append(other)
                free += place.nbytes
        if free < nbytes:
            return False
        for victim in victims:
            self.drop(victim)
        self.evictions += len(victims)
        self._places[key] = _Place(nbytes)
        self.used += nbytes
        return True

    def fill(self, key: Key, name: Key, image: Any) -> None:
        """Puts an image in the place reserved under `key`, to be known as `name`. It is not kept if `name` has one, or
        if the place was dropped meanwhile.
        """
        place = self._places.pop(key, None)
        if place is None:
            return
        if self.get(name) is not None:
            self.used -= place.nbytes
            return
        if name in self._places:  # reserved by somebody who reads the same: this one is the first to be ready
            self.used -= self._places.pop(name).nbytes
        place.image = image
        self._places[name] = place

    def drop(self, key: Key) -> None:
        """Takes an image or a reserved place away. Nothing happens if there is none."""
        place = self._places.pop(key, None)
        if place is not None:
            self.used -= place.nbytes

    def check_integrity(self) -> None:
        """Raises AssertionError unless the bytes add up to no more than the budget."""
        assert self.used == sum(place.nbytes for place in self._places.values()), "the count of bytes is wrong"
        assert self.used <= self.budget, "the host tier is over its budget"
