"""The engine on several devices: the tokens of one device, whatever adapters do."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from slora_jax import AdapterError, EmbeddingRequest, Engine, EngineConfig, Request, SamplingParams, SloraError
from slora_jax.adapters import random_adapter
from slora_jax.loading import load_model
from slora_jax.memory import page_bytes
from slora_jax.parallel import make_parallel

pytestmark = pytest.mark.skipif("len(__import__('jax').devices()) < 4", reason="needs 4 devices")
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, top_p=0.9, seed=7, logprobs=3)


def engine_config(pages, devices, lora, **kw):
    """Pages of the pool are counted in one device's page bytes."""
    config = load_model("random:tiny-gqa", dtype="float32").config
    parallel = make_parallel(config, devices, "comm-free") if devices > 1 else None
    return EngineConfig(
        dtype="float32",
        max_seqs=4,
        max_step_tokens=32,
        seq_buckets=(4,),
        token_buckets=(32,),
        max_lora_rank=32,
        compile_cache_dir="",
        tensor_parallel=devices,
        lora_layout=lora,
        page_pool_bytes=pages * page_bytes(config, "float32", parallel),
        **kw,
    )


@pytest.fixture(scope="module")
def adapters():
    config = load_model("random:tiny-gqa", dtype="float32").config
    rng = np.random.default_rng(0)
    ranks = [rng.choice([0, 1, 8, 12, 32], (config.num_layers, 7)) for _ in range(4)]
    return {f"a{i}": random_adapter(config, r, seed=i, scale=0.5) for i, r in enumerate(ranks)}


def embeddings(engine):
    rng = np.random.default_rng(1)
    names = (None, "a0", "a1", "a2")
    requests = [
        EmbeddingRequest(None, name, rng.integers(0, 256, n).tolist())
        for name, n in zip(names, (5, 40, 1, 17), strict=True)
    ]
    return np.stack([output.embedding for output in engine.embed(requests)])


def requests():
    rng = np.random.default_rng(0)
    names = (None, "a0", "a1", "a2", "a0", None)
    prompts = [rng.integers(0, 256, n).tolist() for n in (5, 20, 3, 9, 7, 12)]
    drawn = [False, False, False, False, True, True]
    return [
        Request(None, name, DRAWN if d else GREEDY, prompt)
        for name, prompt, d in zip(names, prompts, drawn, strict=True)
    ]


@pytest.fixture(scope="module")
def wanted(adapters):
    with Engine.from_pretrained("random:tiny-gqa", engine_config(400, 1, "auto"), adapters) as engine:
        tokens = [o.token_ids for o in engine.generate(requests())]
        return tokens, engine.generate([Request(None, "a3", GREEDY, [1, 2, 3])])[0].token_ids, embeddings(engine)


@pytest.mark.parametrize(("devices", "lora", "pages"), [(4, "s-lora", 40), (2, "comm-free", 60)])
def test_tokens_are_those_of_one_device_with_adapters_that_come_and_go(wanted, adapters, devices, lora, pages):
    """In the smaller pools the adapters do not fit together, so they are evicted and loaded again."""
    first = {name: adapters[name] for name in ("a0", "a1", "a2")}
    with Engine.from_pretrained("random:tiny-gqa", engine_config(pages, devices, lora), first) as engine:
        assert len(engine.model.params["wqkv"].sharding.device_set) == devices
        assert [o.token_ids for o in engine.generate(requests())] == wanted[0]
        np.testing.assert_allclose(embeddings(engine), wanted[2], atol=2e-5)
        engine.add_adapter("a0", adapters["a3"])  # replaces
        assert engine.generate([Request(None, "a0", GREEDY, [1, 2, 3])])[0].token_ids == wanted[1]
        engine.remove_adapter("a0")
        engine.add_adapter("a0", adapters["a0"])
        assert [o.token_ids for o in engine.generate(requests())] == wanted[0]
        engine.check_integrity()
        assert engine.stats()["adapter_loads"] > 5, "the pool was too large to test eviction"


def test_a_model_on_one_device_is_spread(adapters, wanted):
    model = load_model("random:tiny-gqa", dtype="float32")
    with Engine(model, engine_config(400, 4, "auto"), adapters) as engine:
        assert isinstance(engine.model.params["wo"].sharding, NamedSharding)
        assert engine.generate([Request(None, "a3", GREEDY, [1, 2, 3])])[0].token_ids == wanted[1]


def test_too_few_devices():
    config = dataclasses.replace(engine_config(10, 1, "auto"), tensor_parallel=len(jax.devices()) + 1)
    with pytest.raises(SloraError, match="tensor_parallel .* is not possible: .* devices were asked for"):
        Engine.from_pretrained("random:tiny-gqa", config)


def shared_prefix(count, tokens):
    """Requests of one prompt of 40 tokens and an end of their own, every other one with adapter a0."""
    rng = np.random.default_rng(1)
    start = rng.integers(0, 256, 40).tolist()
    params = dataclasses.replace(GREEDY, max_tokens=tokens)
    return [Request(None, ("a0", None)[i % 2], params, [*start, i]) for i in range(count)]


def test_everything_at_once(adapters):
    """Adapters come, are replaced and go while requests run that share a prefix and preempt each other."""
    asked = shared_prefix(8, 40)
    late = Request(None, "late", GREEDY, [1, 2, 3])
    with Engine.from_pretrained("random:tiny-gqa", engine_config(400, 1, "auto"), adapters) as engine:
        wanted = [o.token_ids for o in engine.generate(asked)]
        before, after = (
            engine.generate([dataclasses.replace(late, adapter=name)])[0].token_ids for name in ("a3", "a1")
        )
    with Engine.from_pretrained("random:tiny-gqa", engine_config(31, 4, "s-lora"), {"a0": adapters["a0"]}) as engine:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(engine.generate, asked)
            engine.add_adapter("late", adapters["a3"])
            assert engine.generate([late])[0].token_ids == before
            engine.add_adapter("late", adapters["a1"])
            assert engine.generate([late])[0].token_ids == after
            engine.remove_adapter("late")
            with pytest.raises(AdapterError, match="late"):
                engine.generate([late])
            assert [o.token_ids for o in running.result(300)] == wanted
        engine.check_integrity()
        stats = engine.stats()
        assert stats["preemptions"] > 0 and stats["prefix_cache"]["hit_tokens"] > 0, stats
        assert not any(a["name"] == "late" for a in engine.list_adapters())
