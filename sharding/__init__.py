"""One model over several GPUs, for `jax.shard_map`: the mesh, what each device has of the parameters, the page pool and
the adapters, and the collectives that join the parts. Imports jax and pallas_kernels; slora_jax uses it, never the
other way.
"""

from sharding.collectives import embed, sum_rows
from sharding.cost import CostModel, Room, choose_layout, collective_timer, measure_latency
from sharding.layout import ROW_GROUPS, Layout, LoraLayout
from sharding.lora import project, run_length
from sharding.mesh import ADAPTER_IMAGE, AXIS, LOGITS, POOL, RULES, WHOLE, make_mesh, partition
from sharding.processes import Processes, join
from sharding.shards import Shards, take
from sharding.table import ShardedTable
from sharding.vocabulary import SplitVocabulary, Vocabulary

__all__ = [
    "ADAPTER_IMAGE",
    "AXIS",
    "LOGITS",
    "POOL",
    "ROW_GROUPS",
    "RULES",
    "Room",
    "WHOLE",
    "CostModel",
    "Layout",
    "LoraLayout",
    "Processes",
    "ShardedTable",
    "Shards",
    "SplitVocabulary",
    "Vocabulary",
    "choose_layout",
    "collective_timer",
    "embed",
    "join",
    "make_mesh",
    "measure_latency",
    "partition",
    "project",
    "run_length",
    "sum_rows",
    "take",
]
