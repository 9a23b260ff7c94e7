"""Every call of the API, in process."""

import asyncio
import json

import httpx
import pytest

from slora_jax import Request, SamplingParams
from slora_jax.server import ServerConfig, Service, create_app


def events(text: str) -> list[dict]:
    """The chunks of an event stream, which must end as OpenAI's do."""
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def ask(client, path="/v1/completions", **body) -> dict:
    response = await client.post(path, json={"model": "tiny", "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


def joined(chunks: list[dict]) -> dict[int, dict]:
    """What the chunks of a completion say together, by index of the choice."""
    whole: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = whole.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
            one["text"] += choice["text"]
            one["finish_reason"] = choice["finish_reason"] or one["finish_reason"]
            if "token_ids" in choice:
                one["token_ids"] = one.get("token_ids", []) + choice["token_ids"]
            if choice["logprobs"]:
                one["logprobs"] = one["logprobs"] or {key: [] for key in choice["logprobs"]}
                for key, values in choice["logprobs"].items():
                    one["logprobs"][key] += values
    return whole


def test_a_completion_is_what_the_engine_generates(serving, engine):
    async def main():
        async with serving() as (client, _):
            answers = [await ask(client, model=name, prompt="hello", max_tokens=12) for name in ("tiny", "one", "two")]
            requests = [Request("hello", name, SamplingParams(max_tokens=12)) for name in (None, "one", "two")]
            outputs = await asyncio.to_thread(engine.generate, requests)
        assert [a["choices"][0]["text"] for a in answers] == [o.text for o in outputs]
        assert len({o.text for o in outputs}) == 3
        assert answers[1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
        assert answers[1]["system_fingerprint"] == outputs[1].adapter_digest
        assert answers[1]["object"] == "text_completion" and answers[1]["model"] == "one"
        assert answers[1]["choices"][0]["finish_reason"] == "length"

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hello", "max_tokens": 20},
        {"prompt": [1, 2, 3], "max_tokens": 5, "model": "two"},
        {"prompt": ["one", "two", "three"], "max_tokens": 9, "n": 2, "temperature": 1.0, "seed": 3},
        {"prompt": [[5, 6], [7]], "max_tokens": 4, "logprobs": 2, "model": "one"},
        {"prompt": ["ab", "c"], "max_tokens": 6, "echo": True, "logprobs": 0},
        {"prompt": "score me", "max_tokens": 0, "echo": True, "logprobs": 3},
        {"prompt": "hello", "max_tokens": 30, "logit_bias": {"65": 100}, "stop": "AAAA"},
        {"prompt": "hello", "max_tokens": 30, "frequency_penalty": 1.5, "presence_penalty": 0.5, "top_p": 0.9},
        {"prompt": "hello", "max_tokens": 3, "logprobs": 1, "return_tokens_as_token_ids": True},
        {"prompt": "hello", "max_tokens": 20, "return_token_ids": True, "n": 2},
        {"prompt": "score me", "max_tokens": 0, "echo": True, "logprobs": 0, "return_token_ids": True},
    ],
)
def test_a_stream_says_what_the_whole_says(serving, body):
    async def main():
        async with serving() as (client, _):
            body.setdefault("seed", 7)
            whole = await ask(client, **body)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            response = await client.post("/v1/completions", json={"model": "tiny", "temperature": 0} | body | options)
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(response.text)
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
        streamed = joined(chunks)
        assert len(streamed) == len(whole["choices"])
        for choice in whole["choices"]:
            assert streamed[choice["index"]] == {
                key: choice[key] for key in ("text", "logprobs", "finish_reason", "token_ids") if key in choice
            }
            if body.get("return_token_ids") and body["max_tokens"]:
                assert len(choice["token_ids"]) == body["max_tokens"]

    asyncio.run(main())


def test_echo_and_log_probabilities(serving, engine):
    async def main():
        async with serving() as (client, _):
            scored = await ask(client, model="one", prompt="score", max_tokens=0, echo=True, logprobs=2)
            params = SamplingParams(max_tokens=1, prompt_logprobs=2)
            output = (await asyncio.to_thread(engine.generate, [Request("score", "one", params)]))[0]
        choice = scored["choices"][0]
        assert choice["text"] == "score" and choice["finish_reason"] == "length"
        assert choice["logprobs"]["tokens"] == list("score")
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
        assert choice["logprobs"]["token_logprobs"] == [e and e.logprob for e in output.prompt_logprobs]
        assert scored["usage"]["completion_tokens"] == 0

    asyncio.run(main())


def test_a_stop_string_ends_the_text_and_is_not_in_it(serving):
    async def main():
        async with serving() as (client, _):
            body = dict(prompt="x", max_tokens=30, logit_bias={"33": 100})  # the same byte over and over
            free = (await ask(client, **body))["choices"][0]
            letter = free["text"][0]
            stopped = (await ask(client, **body, stop=["nothing", letter * 3]))["choices"][0]
        assert free["text"] == letter * 30
        assert (stopped["text"], stopped["finish_reason"], stopped["stop_reason"]) == ("", "stop", letter * 3)

    asyncio.run(main())


def test_chat_streamed_and_not(serving, engine):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = dict(
        messages=messages, max_completion_tokens=10, logprobs=True, top_logprobs=2, n=2, temperature=1.0, seed=5
    )

    async def main():
        async with serving() as (client, _):
            whole = await ask(client, "/v1/chat/completions", **body, model="two")
            response = await client.post("/v1/chat/completions", json=body | {"model": "two", "stream": True})
            default = await ask(client, "/v1/chat/completions", messages=messages, model="one")
        chunks = events(response.text)
        first = chunks[0]["choices"]
        assert [c["delta"] for c in first] == [{"role": "assistant", "content": ""}] * 2
        for choice in whole["choices"]:
            mine = [c for chunk in chunks[1:] for c in chunk["choices"] if c["index"] == choice["index"]]
            assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
            assert [e for c in mine for e in c["logprobs"]["content"]] == choice["logprobs"]["content"]
            assert mine[-1]["finish_reason"] == choice["finish_reason"]
            assert len(choice["logprobs"]["content"]) == 10
            assert [len(e["top_logprobs"]) for e in choice["logprobs"]["content"]] == [2] * 10
        assert whole["object"] == "chat.completion" and chunks[0]["object"] == "chat.completion.chunk"
        # an answer whose length is left open may fill the model's context
        assert default["usage"]["total_tokens"] == engine.max_model_len

    asyncio.run(main())


def test_models_show_parents(serving):
    async def main():
        async with serving() as (client, _):
            listed = (await client.get("/v1/models")).json()
            one = (await client.get("/v1/models/one")).json()
            nobody = await client.get("/v1/models/nobody")
        assert listed["object"] == "list"
        assert [(m["id"], m["parent"], m["root"]) for m in listed["data"]] == [
            ("tiny", None, "tiny"),
            ("one", "tiny", "one"),
            ("two", "tiny", "two"),
        ]
        assert one == listed["data"][1]
        assert nobody.status_code == 404

    asyncio.run(main())


def test_tokens_and_back(serving, engine):
    async def main():
        async with serving() as (client, _):
            tokens = await client.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True})
            text = await client.post("/detokenize", json={"tokens": tokens.json()["tokens"], "model": "one"})
            chat = await client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})
            both = await client.post("/tokenize", json={"prompt": "a", "messages": [{"role": "user", "content": "hi"}]})
            bad = await client.post("/detokenize", json={"tokens": [999]})
        assert tokens.json()["count"] == 6 and tokens.json()["max_model_len"] == engine.max_model_len
        assert tokens.json()["token_strs"][0] == "h"
        assert text.json() == {"prompt": "héllo"}
        assert engine.model.tokenizer.decode(chat.json()["tokens"]) == "user: hi\nassistant:"
        assert both.status_code == 400 and both.json()["error"]["param"] == "prompt"
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "tokens"

    asyncio.run(main())


def test_slora_clients(serving):
    async def main():
        async with serving() as (client, _):
            body = {
                "model_dir": "/models/base",
                "lora_dir": "one",
                "inputs": "hello",
                "parameters": {"do_sample": False, "ignore_eos": True, "max_new_tokens": 8, "return_details": True},
                "req_id": 5,
            }
            whole = (await client.post("/generate", json=body)).json()
            stream = await client.post("/generate_stream", json=body)
            base = (await client.post("/generate", json={"inputs": "hello"})).json()
            unknown = await client.post("/generate", json=body | {"lora_dir": "../../etc"})
        pieces = [json.loads(line.removeprefix("data:")) for line in stream.text.split("\n\n") if line]
        assert "".join(p["token"]["text"] for p in pieces) == whole["generated_text"][0]
        assert [p["token"]["id"] for p in pieces] == [t["id"] for t in whole["tokens"]]
        assert [p["finished"] for p in pieces] == [False] * 7 + [True]
        assert whole["count_output_tokens"] == 8 and base["count_output_tokens"] == 16
        assert base["generated_text"] != whole["generated_text"]
        assert unknown.status_code == 404

    asyncio.run(main())


def test_operation(serving):
    async def main():
        async with serving() as (client, service):
            await ask(client, model="one", prompt="hello", max_tokens=3)
            got = {
                path: await client.get(path) for path in ("/health", "/ready", "/version", "/metrics", "/status", "/")
            }
            schema = (await client.get("/openapi.json")).json()
            service.phase = "draining"
            draining = await client.get("/ready")
            refused = await client.post("/v1/completions", json={"model": "one", "prompt": "hello"})
            alive = await client.get("/health")
        assert {path: r.status_code for path, r in got.items()} == dict.fromkeys(got, 200)
        assert {"/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter"} <= schema["paths"].keys()
        assert draining.status_code == 503 and draining.json() == {"status": "draining"}
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        assert alive.status_code == 200
        status = got["/status"].json()
        assert sum(count for _, count in status["page_map"]) == status["stats"]["num_pages"] == 200
        assert status["adapters"][0]["tier"] == "device" and status["adapters"][1]["tier"] == "disk"
        page = got["/"]
        assert "script-src 'sha256-" in page.headers["content-security-policy"]
        assert "http" not in page.text.replace("http-equiv", "")  # no outside asset

    asyncio.run(main())


def test_metrics(serving):
    async def main():
        async with serving() as (client, _):
            await ask(client, model="one", prompt="hello", max_tokens=3)
            await client.post("/v1/completions", json={"model": "nobody", "prompt": "hello"})
            text = (await client.get("/metrics")).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values['slora_completions_total{finish_reason="length",tenant="anonymous"}']) == 1
        assert float(values['slora_prompt_tokens_total{tenant="anonymous"}']) == 5
        assert float(values['slora_generated_tokens_total{tenant="anonymous"}']) == 3
        assert float(values["slora_time_to_first_token_seconds_count"]) == 1
        assert float(values["slora_time_per_output_token_seconds_count"]) == 1
        assert float(values['slora_refused_total{code="model_not_found"}']) == 1
        assert float(values['vllm:num_requests_running{model_name="tiny"}']) == 0
        assert float(values['vllm:num_requests_waiting{model_name="tiny"}']) == 0
        assert 0 <= float(values['vllm:kv_cache_usage_perc{model_name="tiny"}']) <= 1
        assert float(values['vllm:cache_config_info{block_size="16",num_gpu_blocks="200"}']) == 1
        assert any(name.startswith('vllm:lora_requests_info{max_lora="8",running_lora_adapters=""') for name in values)
        assert float(values['slora_pages{kind="idle_adapter"}']) > 0

    asyncio.run(main())


def test_nothing_is_compiled_after_the_warm_up(serving, engine):
    async def main():
        async with serving(warm_up=True) as (client, _):
            compiled = engine.stats()["compiles"]
            for name in ("tiny", "one"):
                await ask(client, model=name, prompt="hello", max_tokens=3)
            assert engine.stats()["compiles"] == compiled

    asyncio.run(main())


def test_a_server_that_is_loading_says_so(engine, adapters):
    async def main():
        service = Service(ServerConfig(model_name="tiny", adapters=adapters), lambda: engine)
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            paths = ("/health", "/ready", "/metrics", "/status", "/v1/models", "/v1/adapters")
            got = {path: (await client.get(path)).status_code for path in paths}
            answer = await client.post("/v1/completions", json={"model": "one", "prompt": "hello"})
        assert got == {
            "/health": 200, "/ready": 503, "/metrics": 200, "/status": 200, "/v1/models": 503, "/v1/adapters": 503,
        }  # fmt: skip
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "loading"

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate_stream"])
def test_who_reads_the_end_of_a_stream_may_ask_again_at_once(serving, path):
    body = {"model": "tiny", "max_tokens": 3, "ignore_eos": True, "stream": True}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    if "generate" in path:
        body = {"inputs": "hi", "parameters": {"max_new_tokens": 3, "ignore_eos": True}}
    ends = (b'"finish_reason":"length"', b'"finished":true')

    async def main():
        async with serving() as (_, service):
            sent, free = b"", []
            data = json.dumps(body).encode()

            async def receive():
                if data in given:
                    await asyncio.Event().wait()  # it stays
                given.append(data)
                return {"type": "http.request", "body": data}

            async def send(message):
                nonlocal sent
                sent += message.get("body", b"")
                if any(end in sent for end in ends):
                    free.append(service.in_flight == 0)

            given: list[bytes] = []
            headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
            await create_app(service)(scope, receive, send)
            assert free and all(free)

    asyncio.run(main())
