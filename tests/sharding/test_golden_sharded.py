"""SmolLM2 and its six adapters over four devices, against PEFT's own answers. Nothing divides: 9 heads, 3 kv heads."""

import dataclasses

from golden import ROWS, make_engine, requests
import pytest

pytestmark = pytest.mark.skipif("len(__import__('jax').devices()) < 4", reason="needs 4 devices")
TOKENS = 8


def test_base_and_all_adapters_in_one_mixed_batch(smollm2_gguf):
    short = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_tokens=TOKENS)) for r in requests()]
    with make_engine(
        smollm2_gguf, tensor_parallel=4, lora_layout="s-lora", seq_buckets=(64,), token_buckets=(256,)
    ) as engine:
        for (name, row), output in zip(ROWS, engine.generate(short), strict=True):
            assert output.token_ids == row["output_token_ids"][:TOKENS], f"{name or 'base'}/{row['name']}"
        engine.check_integrity()
