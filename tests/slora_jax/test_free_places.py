"""Free places against a model of XLA's allocator: what steps allocate and give back lies where it lay before."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from slora_jax import free_places
from slora_jax.free_places import GUARD_BYTES, keep_free, places

MIB = 1 << 20


class Allocator:
    """Best fit with coalescing, as tsl::BFCAllocator does it: a block is cut where at least half would be left."""

    def __init__(self, gaps):
        """gaps: sizes of free blocks that something keeps apart."""
        self.free, self.used, at = {}, {}, 0
        for gap in gaps:
            self.free[at] = gap
            at += gap + 256

    def allocate(self, size):
        size = -(-size // 256) * 256
        fitting = [(have, at) for at, have in self.free.items() if have >= size]
        have, at = min(fitting, key=lambda block: (max(256, block[0]).bit_length(), *block))
        del self.free[at]
        if have >= 2 * size or have - size >= 128 * MIB:
            self.free[at + size] = have - size
            have = size
        self.used[at] = have
        return at

    def give_back(self, at):
        size = self.used.pop(at)
        if at + size in self.free:
            size += self.free.pop(at + size)
        for other, have in list(self.free.items()):
            if other + have == at:
                del self.free[other]
                at, size = other, have + size
        self.free[at] = size


@dataclasses.dataclass
class Array:
    allocator: Allocator
    at: int

    def delete(self):
        self.allocator.give_back(self.at)


@pytest.fixture
def addresses(monkeypatch):
    monkeypatch.setattr(free_places, "_address", lambda array: array.at)


def step(allocator, temp, logits, small, alive):
    """What a step does: temporary memory, small arrays and logits, those of the step before given back at the end."""
    smalls = [allocator.allocate(size) for size in small[: len(small) // 2]]
    at = allocator.allocate(temp)
    out = allocator.allocate(logits)
    smalls += [allocator.allocate(size) for size in small[len(small) // 2 :]]
    allocator.give_back(at)
    for old in alive:
        allocator.give_back(old)
    alive[:] = [out, *smalls]
    return at


@pytest.mark.parametrize("seed", range(5))
def test_steps_find_their_memory_where_it_was(addresses, seed):
    rng = random.Random(seed)
    allocator = Allocator([rng.randrange(256, 3 * MIB) for _ in range(20)] + [4096 * MIB])
    shapes = [(rng.randrange(2, 60) * MIB + 2304, rng.randrange(2, 30) * MIB + 512) for _ in range(5)]
    wanted = {temp: 1 for temp, _ in shapes}
    for _, logits in shapes:
        wanted[logits] = wanted.get(logits, 0) + 2
    guards = keep_free(wanted, 2048 * MIB, lambda array: Array(allocator, allocator.allocate(array.nbytes)))
    assert len(guards) == len(places(wanted, 2048 * MIB))
    found, alive = {}, []
    for _ in range(200):
        temp, logits = rng.choice(shapes)
        small = [rng.randrange(1, 60_000) for _ in range(8)]
        found.setdefault(temp, set()).add(step(allocator, temp, logits, small, alive))
    assert all(len(where) == 1 for where in found.values())


def test_without_places_it_moves(addresses):
    allocator, rng, alive = Allocator([4096 * MIB]), random.Random(0), []
    where = {step(allocator, 40 * MIB, 8 * MIB, [rng.randrange(1, 60_000) for _ in range(8)], alive) for _ in range(50)}
    assert len(where) > 1


def test_the_largest_are_left_out():
    wanted = {8 * MIB: 2, 40 * MIB: 1, 1000: 5, 400 * MIB: 1}
    shared = [GUARD_BYTES] * 8
    assert places(wanted, 100 * MIB) == [40 * MIB, 8 * MIB, 8 * MIB, *shared]
    assert places(wanted, 60 * MIB) == [8 * MIB, 8 * MIB, *shared]
    assert places({}, 100 * MIB) == shared
    assert places({3 * MIB + 1: 1}, 100 * MIB)[0] == 3 * MIB + 256


def test_the_arrays_that_are_made(addresses):
    """Bytes on the device, whatever is put there; blocks are given back, guards are not."""
    allocator, made = Allocator([512 * MIB]), []

    def put(array: np.ndarray):
        made.append(array.nbytes)
        return Array(allocator, allocator.allocate(array.nbytes))

    guards = keep_free({8 * MIB: 1}, 100 * MIB, put)
    assert set(made) == {8 * MIB, GUARD_BYTES}
    assert sorted(allocator.used) == sorted(guard.at for guard in guards)


def test_where_memory_runs_out_there_are_fewer(addresses):
    allocator = Allocator([45 * MIB])

    def put(array: np.ndarray):
        try:
            return Array(allocator, allocator.allocate(array.nbytes))
        except ValueError:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory") from None

    guards = keep_free({20 * MIB: 2}, 100 * MIB, put)
    assert len(guards) == 1
    assert sorted(allocator.used) == [guards[0].at]
