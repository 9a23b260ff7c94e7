"""The golden answers in bfloat16 over several GPUs, against one GPU and against PEFT's own."""

import functools

from golden import ROWS, make_engine
import jax
import pytest

from slora_jax import Request, SamplingParams

pytestmark = pytest.mark.gpu
NEAR_TIE = 0.6  # gap between the reference's two best logits below which rounding may choose


@functools.cache
def next_tokens(model, devices: int, lora: str) -> list[int]:
    """The token after every prefix of every golden answer, teacher-forced."""
    settings = dict(max_seqs=256, max_step_tokens=2048, seq_buckets=(256,), token_buckets=(2048,))
    settings |= dict(page_pool_bytes=4 << 30, loop="scan", tensor_parallel=devices, lora_layout=lora)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    with make_engine(model, "bfloat16", **settings) as engine:
        outputs = engine.generate(
            [Request(None, name, params, r["prompt_token_ids"] + r["output_token_ids"][:i]) for name, r, i in steps()]
        )
        engine.check_integrity()
    return [output.token_ids[0] for output in outputs]


def steps():
    return [(name, row, i) for name, row in ROWS for i in range(len(row["output_token_ids"]))]


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("lora", ["s-lora", "comm-free", "auto"])
def test_tokens_are_those_of_one_gpu(smollm2_gguf, devices, lora):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} GPUs")
    one, many = next_tokens(smollm2_gguf, 1, "auto"), next_tokens(smollm2_gguf, devices, lora)
    cases = list(zip(steps(), one, many, strict=True))
    same = sum(a == b for _, a, b in cases)
    wanted = sum(r["output_token_ids"][i] == b for (_, r, i), _, b in cases)
    print(f"\n{devices} GPUs, {lora}: {same} of {len(cases)} tokens are one GPU's, {wanted} the reference's")
    for (name, row, i), a, b in cases:
        if row["gaps"][i] >= NEAR_TIE:
            assert a == b == row["output_token_ids"][i], f"{name or 'base'}/{row['name']} step {i}"
