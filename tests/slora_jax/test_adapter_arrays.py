"""Adapters from pytrees of arrays, and the digest that says which adapters are the same."""

import re

from adapter_files import CONFIG, qv_fields, qv_tensors, tensor_name, write_adapter
import jax
from jax import numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from slora_jax.adapters import Adapter, AdapterLimits, random_adapter, read_adapter
from slora_jax.errors import AdapterError

BF16 = ml_dtypes.bfloat16


def nested(tensors, key=lambda layer: layer, suffix=""):
    return {
        key(layer): {
            module + suffix: {f.lower(): tensors[tensor_name(layer, module, f)] for f in "AB"} for module in ("q", "v")
        }
        for layer in range(3)
    }


def stacked(tensors):
    return {
        module: {f.lower(): np.stack([tensors[tensor_name(layer, module, f)] for layer in range(3)]) for f in "AB"}
        for module in ("q", "v")
    }


@pytest.fixture
def from_file(tmp_path) -> Adapter:
    return read_adapter(write_adapter(tmp_path / "file"), CONFIG)


def test_all_forms_give_the_adapter_of_the_file(from_file):
    tensors = qv_tensors()
    forms = [
        tensors,
        nested(tensors),
        nested(tensors, str),
        nested(tensors, lambda layer: f"layers.{layer}", "_proj"),
        stacked(tensors),
        jax.tree.map(jnp.asarray, tensors),
        jax.tree.map(jnp.asarray, stacked(tensors)),
    ]
    for arrays in forms:
        adapter = Adapter.from_arrays(arrays, CONFIG, lora_alpha=8)
        assert adapter == from_file and hash(adapter) == hash(from_file)
        assert read_adapter({"weights": arrays, "lora_alpha": 8}, CONFIG) == from_file
        np.testing.assert_array_equal(adapter.ranks, from_file.ranks)
        np.testing.assert_array_equal(adapter.scaling, from_file.scaling)
    assert read_adapter(from_file, CONFIG) is from_file


def test_later_changes_of_the_arrays_do_not_reach_the_adapter():
    tensors = qv_tensors()
    adapter = Adapter.from_arrays(tensors, CONFIG, lora_alpha=8)
    for tensor in tensors.values():
        tensor[:] = 0
    assert adapter.a(0, "q").any()


def test_scaling_options():
    options = dict(lora_alpha=6, use_rslora=True, alpha_pattern={"v_proj": 2})
    adapter = Adapter.from_arrays(qv_tensors(), CONFIG, **options)
    np.testing.assert_array_equal(adapter.scaling[1], np.float32([3, 0, 1, 0, 0, 0, 0]))
    assert read_adapter({"weights": qv_tensors()} | options, CONFIG) == adapter


def test_same_contents_in_other_files_names_and_dtypes_have_the_same_digest(tmp_path, from_file):
    rounded = {name: tensor.astype(BF16) for name, tensor in qv_tensors().items()}
    widened = {name: tensor.astype(np.float32) for name, tensor in rounded.items()}
    mixed = rounded | {name: widened[name] for name in list(rounded)[::3]}
    fields = qv_fields(r=99, rank_pattern={".*": 4}, lora_alpha=1, alpha_pattern={"q_proj": 8, "v_proj": 8})
    digests = {
        read_adapter(write_adapter(tmp_path / "bf16", tensors=rounded), CONFIG).digest,
        read_adapter(write_adapter(tmp_path / "f32", tensors=widened), CONFIG).digest,
        read_adapter(write_adapter(tmp_path / "config", fields, mixed), CONFIG).digest,
        Adapter.from_arrays(stacked(widened), CONFIG, lora_alpha=8).digest,
    }
    assert len(digests) == 1
    assert from_file.digest not in digests
    halves = {name: tensor.astype(np.float16) for name, tensor in qv_tensors().items()}
    wide = {name: tensor.astype(np.float32) for name, tensor in halves.items()}
    assert Adapter.from_arrays(halves, CONFIG, lora_alpha=8) == Adapter.from_arrays(wide, CONFIG, lora_alpha=8)


def test_any_change_changes_the_digest(from_file):
    tensors = qv_tensors()
    digests = {from_file.digest}
    for name in (tensor_name(0, "q", "A"), tensor_name(2, "v", "B")):
        one = tensors[name].copy()
        one[1, 1] = np.nextafter(one[1, 1], np.float32(9))
        digests.add(Adapter.from_arrays(tensors | {name: one}, CONFIG, lora_alpha=8).digest)
    digests.add(Adapter.from_arrays(tensors, CONFIG, lora_alpha=9).digest)
    digests.add(Adapter.from_arrays(tensors, CONFIG, lora_alpha=8, alpha_pattern={"0.self_attn.q_proj": 7}).digest)
    without = {name: tensor for name, tensor in tensors.items() if ".2." not in name}
    digests.add(Adapter.from_arrays(without, CONFIG, lora_alpha=8).digest)
    # the same numbers under another module
    moved = {name.replace("q_proj", "o_proj"): tensor for name, tensor in tensors.items()}
    digests.add(Adapter.from_arrays(moved, CONFIG, lora_alpha=8).digest)
    assert len(digests) == 7


def bad(path, value):
    """The nested pytree with one entry replaced, or removed where `value` is None."""
    tree = nested(qv_tensors())
    *parents, last = path
    node = tree
    for key in parents:
        node = node[key]
    node[last] = value
    if value is None:
        del node[last]
    return tree


A, B = np.ones((4, 32), np.float32), np.ones((32, 4), np.float32)
REFUSED = [
    ({}, "the pytree of weights is empty"),
    (bad([0, "q", "b"], None), '[0][\'q\'] must hold exactly "a" [rank, inputs] and "b" [outputs, rank]'),
    (bad([0, "q", "bias"], A), "must hold exactly"),
    (bad([0, "w"], {"a": A, "b": B}), "[0]['w'] is not a projection"),
    (bad(["layer_0"], {}), "key 'layer_0' is neither a layer"),
    (bad([3], {"q": {"a": A, "b": B}}), "layer 3: this base model has only 3 layers"),
    (bad(["0"], {"q": {"a": A, "b": B}}), "stand for the same weight; give it once"),
    (bad([0, "q", "a"], A.T), "its axes look swapped"),
    (bad([0, "q", "b"], A), "[0]['q']['b'] has shape [4, 32], expected [32, 4]: its axes look swapped"),
    (bad([0, "q", "b"], np.ones((32, 5), np.float32)), "its rank is 5, not 4"),
    (bad([0, "q", "b"], np.ones((16, 4), np.float32)), "q_proj of this base model has 32 outputs"),
    (bad([0, "q", "a"], np.ones((4, 32, 1), np.float32)), "A is [rank, inputs] with a rank from 1 to 512"),
    (bad([0, "q", "a"], np.ones((0, 32), np.float32)), "A is [rank, inputs] with a rank from 1 to 512"),
    (bad([0, "q", "a"], np.ones((4, 32))), "has dtype float64; cast it to float32"),
    (bad([0, "q", "a"], [[1.0]]), "[0]['q']['a'] is list, not an array"),
    (bad([0, "q", "a"], A * np.nan), "holds NaN"),
    ({"q": {"a": A, "b": B}}, "stacked weights have 3 axes, the first of 3 layers"),
    ({"q": {"a": np.ones((2, 4, 32), np.float32), "b": np.ones((3, 32, 4), np.float32)}}, "the first of 3 layers"),
    (qv_tensors() | {0: A}, "mixes PEFT's tensor names with other keys"),
    ({tensor_name(0, "q", "B"): B}, "has no A beside it"),
    ({tensor_name(0, "q", "A"): A}, "lora_B.weight is missing"),
    ({tensor_name(0, "q", "A").replace("q_proj", "w_proj"): A}, "unexpected tensor"),
]


@pytest.mark.parametrize(("arrays", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused_arrays(arrays, words):
    with pytest.raises(AdapterError, match=re.escape(words)) as error:
        Adapter.from_arrays(arrays, CONFIG, lora_alpha=8)
    assert "\n" not in str(error.value)


def test_refused_settings():
    with pytest.raises(AdapterError, match='weights given as arrays: give {"weights": pytree, "lora_alpha": number}'):
        read_adapter(qv_tensors(), CONFIG)
    with pytest.raises(AdapterError, match="unknown key 'r'; the keys are weights, lora_alpha"):
        read_adapter({"weights": qv_tensors(), "lora_alpha": 8, "r": 4}, CONFIG)
    with pytest.raises(AdapterError, match="lora_alpha must be a finite number"):
        Adapter.from_arrays(qv_tensors(), CONFIG, lora_alpha=float("inf"))
    with pytest.raises(AdapterError, match="a rank from 1 to 2"):
        Adapter.from_arrays(qv_tensors(), CONFIG, lora_alpha=8, limits=AdapterLimits(max_rank=2))


def test_arrays_that_other_hosts_hold_are_refused():
    class Spread:
        shape, dtype, is_fully_addressable = (4, 32), np.float32, False

    with pytest.raises(AdapterError, match="spread over several hosts; gather it first"):
        Adapter.from_arrays(bad([0, "q", "a"], Spread()), CONFIG, lora_alpha=8)


def test_an_adapter_of_another_model_is_refused():
    adapter = random_adapter(CONFIG, 4)
    other = CONFIG.__class__(**(CONFIG.__dict__ | {"mlp_size": 64}))
    with pytest.raises(AdapterError, match="weights given as arrays: adapter .* is for a model of 3 layers"):
        read_adapter(adapter, other)
