"""The example adapters, trained with PEFT on SmolLM2-135M-Instruct."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pallas_kernels.geometry import MODULES
from slora_jax.adapters import read_adapter
from slora_jax.adapters.weights import tensor_name
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    mlp_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    tied_embeddings=True,
)

# name: rank, scaling, targets, page ids
TABLE = {
    "pirate": (8, 2, ("q", "v"), 3),
    "json": (16, 2, ("q", "k", "v", "o"), 10),
    "caps": (4, 2, ("q", "k", "v", "o"), 5),
    "reverse": (16, 4, ("q", "k", "v", "o"), 10),
    "haiku": (8, 2, ("gate", "up", "down"), 9),
    "oneword": (12, 2, ("q", "k", "v", "o"), 10),
}


def test_table_names_every_example():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_example_loads_as_trained(name):
    rank, scaling, targets, pages = TABLE[name]
    adapter = read_adapter(EXAMPLES / name, SMOLLM2)
    used = np.isin(MODULES, targets)
    assert np.all(adapter.ranks == rank * used)
    assert np.all(adapter.scaling == np.float32(scaling) * used)
    assert adapter.targets == targets
    assert adapter.rank_summary == str(rank)
    assert adapter.num_pages(SMOLLM2.geometry) == pages
    assert adapter.base_model == "SmolLM2-135M-Instruct"
    tensors = load_file(EXAMPLES / name / "adapter_model.safetensors")
    assert len(tensors) == 60 * len(targets)
    for layer, module, factor in ((0, targets[0], 0), (29, targets[-1], 1)):
        read = (adapter.a, adapter.b)[factor](layer, module)
        expected = tensors[tensor_name(layer, MODULES.index(module), factor)]
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)


def test_all_examples_differ():
    assert len({read_adapter(EXAMPLES / name, SMOLLM2) for name in TABLE}) == len(TABLE)


def test_wrong_base_model_is_named():
    small = ModelConfig(**(SMOLLM2.__dict__ | {"num_layers": 2}))
    with pytest.raises(AdapterError, match="this base model has only 2 layers; the adapter is for another base model"):
        read_adapter(EXAMPLES / "pirate", small)
    wide = ModelConfig(**(SMOLLM2.__dict__ | {"hidden_size": 2048}))
    with pytest.raises(
        AdapterError, match=r"\[8, 576\], expected \[8, 2048\]: q_proj of this base model has 2048 inputs"
    ):
        read_adapter(EXAMPLES / "pirate", wide)
