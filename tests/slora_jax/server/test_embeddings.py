"""OpenAI's embeddings call: formats, refusals, limits, and the openai package."""

import asyncio
import base64

import numpy as np
import openai
import pytest

from slora_jax import EmbeddingRequest


def vectors(answer: dict) -> np.ndarray:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return np.array([entry["embedding"] for entry in answer["data"]])


def test_texts_and_token_ids_in_every_form(serving, engine):
    async def main():
        async with serving(max_prompts=2) as (client, service):  # three inputs go in two parts
            ids = await asyncio.to_thread(engine.model.tokenizer.encode, "hello")
            ref = (await engine.aembed([EmbeddingRequest("hello", "one")]))[0].embedding
            for given, count in (("hello", 1), (ids, 1), (["hello"] * 3, 3), ([ids, ids], 2)):
                answer = await client.post("/v1/embeddings", json={"model": "one", "input": given})
                assert answer.status_code == 200, answer.text
                body = answer.json()
                got = vectors(body)
                np.testing.assert_allclose(got, np.tile(ref, (count, 1)), atol=2e-5)
                np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
                tokens = count * len(ids)
                assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
                assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", "one", "embedding")
            size = engine.model.config.hidden_size
            asked = {"model": "one", "input": "hello", "encoding_format": "base64", "dimensions": size}
            packed = (await client.post("/v1/embeddings", json=asked)).json()["data"][0]["embedding"]
            np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), ref, atol=2e-5)
            base = await client.post("/v1/embeddings", json={"model": "tiny", "input": "hello"})
            assert np.abs(vectors(base.json())[0] - ref).max() > 0.01  # the adapter makes a difference
            text = (await client.get("/metrics")).text
            assert 'slora_embeddings_total{result="ok",tenant="anonymous"} 9.0' in text
            assert next(row for row in service.adapters.describe() if row["name"] == "one")["hits"] == 5

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"dimensions": 5}, 400, "dimensions"),
        ({"encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": []}, 400, "input"),
        ({"input": [[]]}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": [999]}, 400, "input"),
        ({"input": list(range(200)) * 30}, 400, "input"),
        ({"input": ["a"] * 4}, 400, "input"),
        ({"input": None}, 400, "input"),
        ({"model": "nobody"}, 404, "model"),
        ({"prompt": "a"}, 400, "prompt"),
    ],
)
def test_what_is_wrong_is_named(serving, body, status, param):
    async def main():
        async with serving(max_inputs=3) as (client, service):
            answer = await client.post("/v1/embeddings", json={"model": "one", "input": "hello"} | body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
            assert service.in_flight == 0

    asyncio.run(main())


def test_the_openai_package(running, engine):
    with running() as server, openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        ref = [output.embedding for output in engine.embed([EmbeddingRequest(text, "two") for text in ("a", "bc")])]
        for form in ({}, {"encoding_format": "float"}):  # the package itself asks for base64 and unpacks it
            answer = client.embeddings.create(model="two", input=["a", "bc"], **form)
            np.testing.assert_allclose([entry.embedding for entry in answer.data], ref, atol=2e-5)
            assert answer.usage.prompt_tokens == 3
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="two", input="a", dimensions=3)
        assert caught.value.param == "dimensions"
