"""The engine on a GPU at Llama-2-7B's widths: all small sizes of steps, adapters that come and go, pages used again."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels.geometry import MODULES
from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters import clone, random_adapter
from slora_jax.loading import LoadedModel
from slora_jax.loading.random import random_params
from slora_jax.memory import page_bytes
from slora_jax.shapes import named_shape

RANKS = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(named_shape("llama-2-7b"), num_layers=2)
    params = random_params(config, dtype="bfloat16")
    return LoadedModel(config=config, params=params, tokenizer=None, eos_token_ids=(), name="two layers of 7B")


def make_settings(config, pages, **options):
    return EngineConfig(
        dtype="bfloat16",
        max_seqs=32,
        max_lora_rank=max(RANKS),
        page_pool_bytes=pages * page_bytes(config, "bfloat16"),
        compile_cache_dir="",
        **options,
    )


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_no_request_fails_whatever_the_size_of_its_steps(model):
    config, dtype = model.config, model.params["embed"].dtype
    first = {rank: random_adapter(config, rank, ("q", "k", "v", "o"), seed=rank, dtype=dtype) for rank in RANKS}
    adapters = {f"a{i}": clone(first[RANKS[i % len(RANKS)]], i) for i in range(24)}
    settings = make_settings(
        config,
        pages=600,  # of which 32 sequences can take 1,024
        max_step_tokens=256,
        seq_buckets=(1, 2, 4, 8, 16, 32),
        token_buckets=(64, 128, 256),
        max_model_len=512,
    )
    rng = np.random.default_rng(0)
    with Engine(model, settings, adapters) as engine:
        engine.warm_up(adapters=True)
        for count in (1, 2, 3, 4, 7, 30, 200):
            sizes = zip(rng.integers(4, 250, count), rng.integers(2, 200, count), strict=True)
            requests = [
                Request(
                    None,
                    f"a{rng.integers(len(adapters))}",
                    SamplingParams(max_tokens=int(answer), ignore_eos=True),
                    rng.integers(0, config.vocab_size, prompt).tolist(),
                )
                for prompt, answer in sizes
            ]
            errors = [
                (i, o.completions[0].error)
                for i, o in enumerate(engine.generate(requests))
                if o.finish_reason == "error"
            ]
            assert not errors, f"{len(errors)} of {count} requests: {errors[:3]}"
        engine.check_integrity()


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_few_adapters_answer_alike(model):
    """Greedy answers with and without the kernel, as far as they agree and one token on: equally probable."""
    config, dtype = model.config, model.params["embed"].dtype
    adapters = {f"a{r}": random_adapter(config, r, MODULES, seed=r, scale=0.5, dtype=dtype) for r in (8, 16, 64)}
    settings = make_settings(
        config, pages=400, max_step_tokens=64, seq_buckets=(32,), token_buckets=(64,), max_model_len=256
    )
    rng = np.random.default_rng(1)
    requests = [
        Request(
            None,
            (None, *adapters)[i % 4],
            SamplingParams(max_tokens=20, ignore_eos=True, logprobs=1),
            rng.integers(0, config.vocab_size, 3 + i).tolist(),
        )
        for i in range(24)
    ]
    answers = []
    for few in (False, True):
        with Engine(model, dataclasses.replace(settings, few_adapters=few), adapters) as engine:
            answers.append([o.completions[0].logprobs for o in engine.generate(requests)])
            engine.check_integrity()
    agreed = 0
    for without, with_few in zip(*answers, strict=True):
        assert len(without) == len(with_few) == 20
        for one, other in zip(without, with_few, strict=True):
            assert abs(one.logprob - other.logprob) < 0.1
            if one.token_id != other.token_id:
                break
            agreed += 1
    assert agreed > 0.5 * 20 * len(requests)
