"""What is refused, with which status, and that it names the parameter. Nothing refused leaves anything behind."""

import asyncio
import json
from urllib.parse import quote

import httpx
import pytest

COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "frob"}}}
TRAVERSALS = ["../one", "..", "/etc/passwd", "one/../two", "./one", "one\x00", "..\\one", "%2e%2e/one", "one/"]


@pytest.mark.parametrize(
    "change, param",
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -7}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 300}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 64, "prompt": ["a", "b", "c"]}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 513}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"guided_json": {"type": "frob"}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}}, "structured_outputs"),
        ({"lora_path": "/etc"}, "lora_path"),
        ({"model": 5}, "model"),
    ],
)
def test_a_bad_completion_names_the_parameter(serving, change, param):
    async def main():
        async with serving() as (client, service):
            response = await client.post("/v1/completions", json=COMPLETION | change)
            assert service.in_flight == 0
        return response

    response = asyncio.run(main())
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize(
    "change, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}, {"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [TOOL]}, "tools"),  # the template of this model teaches none
        ({"tools": [TOOL, TOOL], "tool_choice": "required"}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [BAD_TOOL], "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"max_completion_tokens": 3}, "max_tokens"),
        ({"temperature": 1e400}, "temperature"),
    ],
)
def test_a_bad_chat_names_the_parameter(serving, change, param):
    async def main():
        async with serving() as (client, _):
            body = json.dumps(CHAT | change)
            return await client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})

    response = asyncio.run(main())
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b'{"model": "tiny", "prompt": "cut sho',
        b'{"model": "tiny", "prompt": "\xff\xfe"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'"text"',
    ],
)
def test_a_body_that_is_no_json_object_is_the_clients_error(serving, body):
    async def main():
        async with serving() as (client, _):
            headers = {"content-type": "application/json"}
            for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/v1/load_lora_adapter"):
                response = await client.post(path, content=body, headers=headers)
                assert response.status_code == 400, (path, response.text)
                assert response.json()["error"]["message"]
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200

    asyncio.run(main())


def test_a_body_that_is_too_large_is_refused_before_it_is_read(serving):
    async def main():
        read = 0

        async def chunks():
            nonlocal read
            for _ in range(1000):
                read += 1
                yield b"x" * 1000

        async with serving(max_body=10_000) as (client, _):
            told = await client.post("/v1/completions", content=b"x" * 10_001)
            untold = await client.post("/v1/completions", content=chunks())
            fits = await client.post("/v1/completions", json=COMPLETION)
        assert (told.status_code, untold.status_code, fits.status_code) == (413, 413, 200)
        assert read <= 12
        assert told.json()["error"]["code"] == "body_too_large"

    asyncio.run(main())


def test_a_body_that_does_not_come_is_given_up(serving):
    async def main():
        async def chunks():
            yield b"{"
            await asyncio.sleep(60)

        async with serving(body_seconds=0.05) as (client, _):
            response = await client.post("/v1/completions", content=chunks())
        assert response.status_code == 408

    asyncio.run(main())


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_name_is_ever_a_path(serving, name):
    async def main():
        async with serving() as (client, _):
            for path, body in (
                ("/v1/completions", COMPLETION | {"model": name}),
                ("/v1/chat/completions", CHAT | {"model": name}),
                ("/v1/embeddings", {"input": "x", "model": name}),
                ("/generate", {"inputs": "x", "lora_dir": name}),
                ("/generate_stream", {"inputs": "x", "lora_dir": name}),
                ("/tokenize", {"prompt": "x", "model": name}),
                ("/detokenize", {"tokens": [1], "model": name}),
            ):
                response = await client.post(path, json=body)
                assert response.status_code == 404, (path, response.text)
                assert response.json()["error"]["code"] == "model_not_found"
            for call in ("unload", "pin", "unpin", "prefetch"):
                response = await client.post(f"/v1/{call}_lora_adapter", json={"lora_name": name})
                assert response.status_code == 404 and response.json()["error"]["param"] == "lora_name"
            # as it is, and in the form that a URL asks for; nothing but a model's name is ever found there
            for path in (name.replace("\x00", ""), quote(name, safe="")):
                response = await client.get(f"/v1/models/{path}")
                assert response.status_code == 404 or response.json().get("id") in ("one", "two"), response.text

    asyncio.run(main())


def test_an_unknown_model_is_404_and_tells_nothing_of_others(serving):
    async def main():
        async with serving() as (client, _):
            response = await client.post("/v1/completions", json=COMPLETION | {"model": "on"})
            missing = await client.get("/v1/nothing")
            method = await client.get("/v1/completions")
            plain = await client.post("/v1/completions", content=json.dumps(COMPLETION))
            form = await client.post("/v1/completions", data={"model": "tiny"})
        assert response.status_code == 404
        assert response.json()["error"] == {
            "message": "the model 'on' does not exist or you may not use it; GET /v1/models lists what you may use",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"
        assert method.status_code == 405
        # a web page can send neither to another origin as JSON without asking first
        assert plain.status_code == form.status_code == 400

    asyncio.run(main())


def test_a_full_queue_is_429_with_the_time_to_wait(serving, engine):
    async def main():
        async with serving(max_queue=0) as (client, service):
            body = COMPLETION | {"max_tokens": 400, "ignore_eos": True, "n": 8}
            long = asyncio.create_task(client.post("/v1/completions", json=body))
            while service.in_flight < 8:
                await asyncio.sleep(0.001)
            refused = await client.post("/v1/completions", json=COMPLETION)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            assert (await client.get("/health")).status_code == 200
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200

    asyncio.run(main())
    assert engine.list_requests() == []


def test_a_mistake_of_ours_is_500_with_the_id_of_its_log(serving, monkeypatch, caplog):
    from slora_jax.server import routes_openai

    monkeypatch.setattr(routes_openai, "completion_params", lambda body: 1 / 0)

    async def main():
        async with serving() as (client, _):
            return await client.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "abc"})

    response: httpx.Response = asyncio.run(main())
    assert response.status_code == 500 and "abc" in response.json()["error"]["message"]
    assert response.headers["x-request-id"] == "abc"
    assert "ZeroDivisionError" in caplog.text


def test_an_answer_that_fails_is_500_whole_and_an_error_event_streamed(serving, engine, monkeypatch, caplog):
    def failing(batch):
        raise RuntimeError("the device is unwell")

    async def main():
        async with serving() as (client, _):
            monkeypatch.setattr(engine._core.runner, "forward", failing)
            whole = await client.post("/v1/completions", json=COMPLETION)
            stream = await client.post("/v1/completions", json=COMPLETION | {"stream": True})
            monkeypatch.undo()
            again = await client.post("/v1/completions", json=COMPLETION)
        assert whole.status_code == 500 and "the device is unwell" in whole.json()["error"]["message"]
        assert stream.status_code == 200
        assert json.loads(stream.text.removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert again.status_code == 200

    asyncio.run(main())
