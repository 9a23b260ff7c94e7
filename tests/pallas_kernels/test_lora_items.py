"""How the LoRA kernel for short segments cuts its work: every chunk is copied once and multiplied once, in order."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora.arg_specs import LLAMA2_7B
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, dealt, dealt_item
from pallas_kernels.lora.plan import RECORD, group_fields
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


def _items(granules: list[int], sides: int, packed: int) -> ShrinkItems:
    """Of token blocks whose adapters have so many granules in the group."""
    records = np.zeros((len(granules), 1, RECORD), np.int32)
    records[:, 0, group_fields("o")[1]] = granules
    return ShrinkItems(
        geometry=LLAMA2_7B,
        group="o",
        config=LoraConfig(expand_ctas=CTAS, shrink_packed=packed),
        chunk=4,
        sides=sides,
        num_blocks=jnp.int32(len(granules)),
        rank_blocks=jnp.int32(max(-(-g // STAGE_CHUNKS) for g in granules)),
        records=jnp.asarray(records),
        layer=0,
    )


@pytest.mark.parametrize("sides, packed", [(1, 4), (2, 4), (2, 2), (2, 1)])
@pytest.mark.parametrize("granules", [[3], [1, 0, 20], [8, 5, 2, 12, 1, 4]])
def test_every_chunk_is_copied_and_multiplied_once(granules, sides, packed):
    items = _items(granules, sides, packed)
    total, per_split, splits = split_chunks(LLAMA2_7B, "o", items.config, 4)
    copied, sums = set(), {}
    describe = jax.jit(lambda cta, n: items.describe(cta, n, items.fetch(cta, n)))
    at = jax.jit(lambda item, number, stage, sub: items.column(item, number, sub)(stage))
    mine, stages = jax.jit(items.mine), jax.jit(items.stages)
    ended = dict.fromkeys(range(len(granules)), 0)
    for cta in range(CTAS):
        for n in range(int(items.local(cta))):
            item = describe(cta, n)
            ended[int(item.block)] += sides
            assert int(items.block(cta, n)) == int(item.block)
            for number in range(int(item.first_set), int(item.first_set) + int(item.num_sets)):
                for stage in range(int(stages(item, number))):
                    valid = {}
                    for s in range(STAGE_CHUNKS):
                        sub = int(items.sub(item, s))
                        tile, wanted = at(item, number, stage, sub)
                        if wanted:
                            key = int(item.block), int(item.rank_block), s - sub * int(item.granules), int(tile)
                            assert key not in copied
                            copied.add(key)
                            valid[sub] = int(tile) // 4
                    for side in range(sides):
                        first, count = (int(v) for v in mine(item, number, stage, side))
                        split = number * sides + side
                        chunks = [valid.pop(sub) for sub in range(first, first + count)]
                        sums.setdefault((int(item.block), int(item.rank_block), split), []).extend(chunks)
                    assert not valid, "chunks that nobody multiplies"
    assert len(copied) == sum(granules) * total
    assert all(count == int(items.signals) for count in ended.values())
    for (block, rank_block, split), chunks in sums.items():
        assert granules[block] > rank_block * STAGE_CHUNKS
        assert chunks == list(range(split * per_split, min((split + 1) * per_split, total)))
    assert len(sums) == splits * sum(-(-g // STAGE_CHUNKS) for g in granules)
