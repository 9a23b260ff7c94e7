"""The base projections that bench_lora measures, with and without deltas, are those of as many different layers."""

from lora_batches import TINY
import numpy as np
from oracles import relative_error

from benchmarks.kernels.bench_lora import Inputs, products
from pallas_kernels.lora import reference
from pallas_kernels.lora.arg_specs import LoraSpec


def test_every_layer_has_a_product_of_its_own():
    """XLA makes one product of those that share activations, and a launch of it is no layer's."""
    inputs = Inputs(LoraSpec(geometry=TINY, segments=(8,) * 3, ranks=(16, 8, 16)))
    layers = range(TINY.num_layers)
    made = products(inputs, "o", len(layers))
    (xs, weights), where = made["base"][1], inputs.where()
    assert len({np.asarray(x).tobytes() for x in xs}) == len(layers) > 1
    assert all(a is b for a, b in zip(xs, made["matmul"][1][0], strict=True))
    found = {name: fn(*args) for name, (fn, args) in made.items()}
    options = dict(group="o", geometry=TINY)
    for i in layers:
        base = np.asarray(xs[i], np.float64) @ np.asarray(weights[i], np.float64)
        assert relative_error(found["base"][i], base) < 1e-2
        y = reference.shrink(xs[i], *where, layer=i, max_rank=16, **options)
        expected = reference.expand(found["base"][i], y, *where, layer=i, **options)
        off = [relative_error(found[name][i], np.asarray(expected, np.float64)) for name in ("matmul", "base")]
        assert off[0] < 1e-2 and off[0] < off[1] / 2  # one has the deltas, the other has not
