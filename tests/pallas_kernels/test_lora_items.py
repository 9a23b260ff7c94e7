"""How the LoRA kernels for short segments cut their work: every chunk is copied once and multiplied once, in order."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.arg_specs import LLAMA2_7B, LLAMA31_8B, SPECS
from pallas_kernels.lora.cluster_items import AddItems
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, LoraConfig
from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, dealt, dealt_item
from pallas_kernels.lora.plan import RECORD, group_fields, module_field
from pallas_kernels.lora.ranges import cut_blocks, num_ranges, range_of
from pallas_kernels.lora.short_items import ShrinkItems, split_chunks

CTAS = 5


@given(total=st.integers(0, 200), ctas=st.integers(1, 12))
@settings(max_examples=50)
def test_items_are_dealt_out_once(total, ctas):
    counts = [int(dealt(jnp.int32(total), cta, ctas)) for cta in range(ctas)]
    found = [int(dealt_item(cta, jnp.int32(n), ctas)) for cta in range(ctas) for n in range(counts[cta])]
    assert sorted(found) == list(range(total))


def test_items_that_become_smaller_are_dealt_out_evenly():
    sizes = np.arange(60, 0, -1)
    loads = [sum(sizes[int(dealt_item(cta, jnp.int32(n), 6))] for n in range(10)) for cta in range(6)]
    assert max(loads) == min(loads)


def _items(granules: list[int], packed: int, geometry=LLAMA2_7B, group="o") -> ShrinkItems:
    """Of token blocks whose adapters have so many granules in the group."""
    records = np.zeros((len(granules), 1, RECORD), np.int32)
    records[:, 0, group_fields(group)[1]] = granules
    return ShrinkItems(
        geometry=geometry,
        group=group,
        config=LoraConfig(expand_ctas=CTAS, shrink_packed=packed),
        chunk=4,
        num_blocks=jnp.int32(len(granules)),
        rank_blocks=jnp.int32(max(-(-g // STAGE_CHUNKS) for g in granules)),
        records=jnp.asarray(records),
        layer=0,
    )


@pytest.mark.parametrize("group, packed", [("o", 4), ("o", 2), ("o", 1), ("down", 4)])  # down: 43 chunks in 8 splits
@pytest.mark.parametrize("granules", [[3], [1, 0, 20], [8, 5, 2, 12, 1, 4]])
def test_every_chunk_is_copied_and_multiplied_once(granules, group, packed):
    items = _items(granules, packed, group=group)
    total, per_split, splits = split_chunks(LLAMA2_7B, group, items.config, 4)
    copied, sums = set(), {}
    describe = jax.jit(lambda cta, n: items.describe(cta, n, items.fetch(cta, n)))
    columns = jax.jit(lambda item, number, place, stage: items.columns(item, number, place)(stage))
    split_of, place_of, stages = jax.jit(items.split), jax.jit(items.place), jax.jit(items.stages)
    for cta in range(CTAS):
        for n in range(int(items.local(cta))):
            item = describe(cta, n)
            where = int(item.block), int(item.first_granule) // STAGE_CHUNKS
            assert int(item.height) * int(item.packed) == STAGE_CHUNKS
            places = [tuple(int(v) for v in place_of(item, s)) for s in range(STAGE_CHUNKS)]
            for number in range(int(items.sets(item))):
                for stage in range(int(stages(item, number))):
                    for place in range(int(item.packed)):
                        tile, valid, new = columns(item, number, place, stage)
                        if not valid:
                            continue
                        split = int(split_of(item, number, place)[0])
                        assert split * per_split <= int(tile) // 4 < min((split + 1) * per_split, total)
                        if not new:
                            continue  # repeated, to be multiplied by zeros
                        sums.setdefault((*where, split), []).append(int(tile) // 4)
                        for p, granule in places:
                            if p == place and granule < int(item.granules):
                                key = *where, granule, int(tile)
                                assert key not in copied
                                copied.add(key)
    assert len(copied) == sum(granules) * total
    for (block, rank_block, split), chunks in sums.items():
        assert granules[block] > rank_block * STAGE_CHUNKS
        assert chunks == list(range(split * per_split, min((split + 1) * per_split, total)))
    assert len(sums) == splits * sum(-(-g // STAGE_CHUNKS) for g in granules)


def _cut(granules: list[int], group: str) -> tuple[jax.Array, ...]:
    """Of token blocks with so many granules in the group, all modules together."""
    others = jnp.zeros((len(granules), len(GROUPS)), jnp.int32)
    index = list(GROUPS).index(group)
    return tuple(cut_blocks(others.at[:, index].set(jnp.array(granules)))[index])


@given(cut=st.lists(st.integers(0, 9), min_size=3, max_size=3), blocks=st.integers(0, 9), modules=st.integers(1, 3))
@settings(max_examples=50)
def test_ranges_are_numbered_once(cut, blocks, modules):
    cut = sorted(cut, reverse=True)
    blocks += cut[0]
    total = int(num_ranges(blocks, cut, modules))
    most = 18 * 3 << len(cut)  # of as many at any time, so that nothing is compiled anew
    found = list(zip(*(v.tolist()[:total] for v in range_of(jnp.arange(most), cut, modules)), strict=True))
    assert total <= most
    logs = [sum(block < c for c in cut) for block in range(blocks) for _ in range(modules)]
    assert found == [(item, log, part) for item, log in enumerate(logs) for part in range(1 << log)]


MIXED = SPECS["7b_decode_64_mixed_qkvo"].ranks
LOADS = [  # ranks of token blocks, group, ranges of the blocks, and the largest load of a cluster over the mean
    (MIXED, "qkv", [1] * 64, 1.45),
    (MIXED, "gu", [2] * 8 + [1] * 56, 1.52),
    (MIXED, "o", [4] * 8 + [2] * 8 + [1] * 48, 2.18),
    ([16] * 64, "qkv", [1] * 64, 1.04),
    ([16] * 64, "o", [1] * 64, 1.04),
    ([16] * 256, "qkv", [1] * 256, 1.04),
    ([16] * 256, "o", [1] * 256, 1.04),
    ([8, 16, 32, 64] * 64, "qkv", [1] * 256, 1.04),
    ([8, 16, 32, 64] * 64, "o", [1] * 256, 1.04),
    ([32] * 10, "qkv", [2] * 10, 1.65),
    ([32] * 10, "o", [4] * 10, 4.13),
    ([32] * 12, "qkv", [1] * 12, 1.84),
    ([32] * 12, "o", [4] * 12, 3.44),
    ([16] * 8, "qkv", [2] * 8, 2.07),
    ([16] * 8, "o", [8] * 8, 4.65),
    ([16] * 32, "qkv", [1] * 32, 1.38),
    ([16] * 32, "o", [2] * 32, 1.55),
    ([16] * 33, "o", [2] * 33, 1.5),
    ([128] + [8] * 255, "o", [4] + [1] * 255, 2.93),
]


@pytest.mark.parametrize("ranks, group, ranges, largest", LOADS)
def test_loads_are_balanced(ranks, group, ranges, largest):
    """The mean is that of uncut items. A range takes half its item's time for A, and its part of the other half."""
    modules = len(GROUPS[group])
    granules = np.sort(np.array(ranks) // 8)[::-1]
    cut = _cut(list(granules * modules), group)
    assert [1 << sum(block < int(c) for c in cut) for block in range(len(granules))] == ranges
    total = int(num_ranges(len(granules), cut, modules))
    cluster, n = jnp.meshgrid(jnp.arange(CLUSTERS), jnp.arange(-(-total // CLUSTERS)), indexing="ij")
    index = dealt_item(cluster, n, CLUSTERS)
    item, log, _ = (np.asarray(v) for v in range_of(index, cut, modules))
    own = np.where(index < total, granules[np.minimum(item // modules, len(granules) - 1)] * (0.5 + 0.5 / 2.0**log), 0)
    assert own.sum(axis=1).max() <= largest * granules.sum() * modules / CLUSTERS


def test_nothing_is_cut_where_no_adapter_targets_the_group():
    assert [int(c) for c in _cut([0] * 5, "o")] == [0, 0, 0]


SHARED = [
    ("qkv", 1, LLAMA2_7B),
    ("o", 3, LLAMA2_7B),
    ("gu", 20, LLAMA2_7B),
    ("qkv", 64, LLAMA2_7B),
    ("down", 70, LLAMA2_7B),
    ("qkv", 2, LLAMA31_8B),  # more ranges than chunks of k and v
]


@pytest.mark.parametrize("group, blocks, geometry", SHARED)
def test_clusters_share_all_items(group, blocks, geometry):
    """Every output chunk of every token block and module is in one item of one thread block, with all splits shrunk
    by the item's cluster.
    """
    rng = np.random.default_rng(blocks)
    records = np.zeros((max(blocks, CLUSTERS), 1, RECORD), np.int32)
    modules = GROUPS[group]
    granules = rng.integers(0, 12, (blocks, len(modules)))
    granules[: blocks // 8] *= 4  # ranges of several sizes, in the order that a plan has
    granules = granules[np.argsort(-granules.sum(axis=1))]
    cut = _cut(list(granules.sum(axis=1)), group)
    for i, m in enumerate(modules):
        records[:blocks, 0, module_field(m) + 1] = granules[:, i]
        records[:blocks, 0, module_field(m) + 2] = 8 * granules[:, :i].sum(axis=1)
    known = dict(
        geometry=geometry,
        group=group,
        config=LoraConfig(),
        chunk=4,
        num_blocks=jnp.int32(blocks),
        records=jnp.asarray(records),
        layer=0,
    )

    @functools.partial(jax.jit, static_argnums=2)
    def describe(cluster, part, n):
        halves = dict(shrink=ShrinkItems(rank_blocks=None, **known), expand=ExpandItems(**known))
        items = AddItems(**halves, cut=cut, cluster=cluster, part=part)
        item = items.describe(n, items.fetch(n))
        tiles = [items.shrink_of(item, k) for k in range(6)]
        return items.count, item, tiles, items.shrink_stages(item)

    splits = split_chunks(geometry, group, LoraConfig(), 4)[2]
    outputs, shrunk = {}, {}
    for cluster in range(CLUSTERS):
        n, count = 0, 1
        while n < count:
            for part in range(CLUSTER):
                count, item, tiles, stages = jax.tree.map(int, describe(cluster, part, n))
                if n >= count:
                    break
                expand, module = item.expand, modules.index(item.expand.module)
                own = int(granules[expand.block, module])
                # A range without outputs is not shrunk either, by none of its cluster.
                wanted = own if item.expand.length or (cluster, n) in shrunk else 0
                assert item.rank_tiles == -(-wanted // STAGE_CHUNKS)
                assert (stages > 0) == (wanted > 0)
                if own and not wanted:
                    continue
                for k, tile in enumerate(tiles[: item.rank_tiles]):
                    assert tile.first_granule == granules[expand.block, :module].sum() + k * STAGE_CHUNKS
                    assert tile.granules == min(own - k * STAGE_CHUNKS, STAGE_CHUNKS)
                shrunk.setdefault((cluster, n), []).extend(
                    range(item.shrink.first_split, item.shrink.first_split + item.shrink.num_splits)
                )
                for chunk in range(expand.length):
                    key = expand.block, expand.out_tile + 4 * chunk
                    assert key not in outputs
                    outputs[key] = own
            n += 1
    wide = sum(geometry.out_tiles(m) * int((granules[:, i] > 0).sum()) for i, m in enumerate(modules))
    assert len(outputs) == wide // 4
    assert all(sorted(found) == list(range(splits)) for found in shrunk.values())
