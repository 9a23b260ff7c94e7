"""SmolLM2 and the adapters of examples/ behind the server: its answers are PEFT's."""

import asyncio

from golden import GOLDEN, ROOT
import httpx
import pytest

from slora_jax import Engine, EngineConfig
from slora_jax.server import ServerConfig, Service, create_app

TOKENS = 8


@pytest.fixture(scope="module")
def make_engine(smollm2_gguf):
    options = dict(max_seqs=8, max_step_tokens=64, seq_buckets=(8,), token_buckets=(64,), max_model_len=256)
    settings = EngineConfig(dtype="float32", weight_dtype="bfloat16", compile_cache_dir="", **options)
    return lambda: Engine.from_pretrained(str(smollm2_gguf), settings)


def test_answers_are_those_of_the_reference(make_engine):
    rows = [("smollm2", GOLDEN["base"][0])]
    rows += [(name, entry["prompts"][0]) for name, entry in GOLDEN["adapters"].items()]

    async def main():
        service = Service(ServerConfig(model_name="smollm2", adapters=ROOT / "examples" / "adapters"), make_engine)
        await service.load()
        transport = httpx.ASGITransport(create_app(service))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as client:

                async def ask(name: str, row: dict) -> list[str]:
                    body = {"model": name, "prompt": row["prompt_token_ids"], "max_tokens": TOKENS, "temperature": 0}
                    body |= {"ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True}
                    answer = (await client.post("/v1/completions", json=body)).json()
                    return answer["choices"][0]["logprobs"]["tokens"]

                return await asyncio.gather(*(ask(name, row) for name, row in rows))
        finally:
            await service.close()

    answers = asyncio.run(main())
    assert answers == [[f"token_id:{token}" for token in row["output_token_ids"][:TOKENS]] for _, row in rows]
