"""Over a real socket: the openai package, clients that vanish or do not read, and the shutdown."""

import asyncio
import contextlib
import json
import socket

import openai
import pytest
from running_server import Running, wait_until

from slora_jax import Request, SamplingParams, SloraError
from slora_jax.server import ServerConfig, Service

LONG = {"model": "one", "prompt": "hello", "max_tokens": 480, "ignore_eos": True, "temperature": 0}


def test_the_openai_package(running, engine):
    messages = [{"role": "user", "content": "hi"}]
    with running() as server, openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "one", "two"]
        assert client.models.retrieve("one").parent == "tiny"
        chat = client.chat.completions.create(model="one", messages=messages, max_tokens=8, temperature=0)
        asked = dict(model="one", messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=1)
        with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
        assert chunks[-1].usage == chat.usage and chat.usage.completion_tokens == 8
        again = [*messages, chat.choices[0].message, {"role": "user", "content": "and?"}]
        follow_up = client.chat.completions.create(model="one", messages=again, max_tokens=2)
        assert follow_up.choices[0].finish_reason == "length"
        text = client.completions.create(model="two", prompt=["a", "b"], max_tokens=4, temperature=0, logprobs=2, n=2)
        output = engine.generate([Request("b", "two", SamplingParams(max_tokens=4))])[0]
        assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
        assert text.choices[2].text == text.choices[3].text == output.text
        with client.completions.create(model="two", prompt="b", max_tokens=4, temperature=0, stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == output.text
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="three", prompt="a")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="one", prompt="a", temperature=-1)
        assert caught.value.param == "temperature"


def test_many_at_once_get_each_their_own(running, engine):
    async def main(url):
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def ask(index: int, streamed: bool) -> str:
                body = dict(
                    model=("tiny", "one", "two")[index % 3], prompt=f"prompt {index}", max_tokens=10, temperature=0
                )
                if not streamed:
                    return (await client.completions.create(**body)).choices[0].text
                async with await client.completions.create(**body, stream=True) as stream:
                    return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(ask(i, streamed) for i in range(18) for streamed in (False, True)))

    with running() as server:
        texts = asyncio.run(main(server.url))
        names = (None, "one", "two")
        params = SamplingParams(max_tokens=10)
        alone = [engine.generate([Request(f"prompt {i}", names[i % 3], params)])[0].text for i in range(18)]
    assert texts == [text for text in alone for _ in range(2)]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_vanishes_is_aborted(running, engine, streamed):
    with running() as server:
        connection = server.post(LONG | {"n": 8, "stream": streamed})
        if streamed:
            assert connection.getresponse().read(100).startswith(b"data: ")
        else:
            wait_until(lambda: engine.stats()["running"] == 8)
        connection.close()
        wait_until(lambda: server.service.in_flight == 0)
        assert engine.list_requests() == []
        assert engine.stats()["pages"]["kv"] == 0
        assert server.metric('slora_completions_total{finish_reason="abort"') == 8


def test_a_client_that_vanishes_while_it_waits_is_never_run(running, engine):
    with running() as server:
        first = server.post(LONG | {"n": 8})
        wait_until(lambda: engine.stats()["running"] == 8)
        second = server.post(LONG)
        wait_until(lambda: engine.stats()["waiting"] == 1)
        second.close()
        wait_until(lambda: engine.stats()["waiting"] == 0)
        assert len(json.loads(first.getresponse().read())["choices"]) == 8
        first.close()


def test_a_client_that_does_not_read_holds_nobody(running, engine):
    with running(write_seconds=0.5) as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        body = json.dumps(LONG | {"n": 8, "stream": True, "logprobs": 20}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        slow.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.stats()["running"] == 8)
        wait_until(lambda: engine.stats()["running"] == 0)  # the answers are complete, read or not
        with contextlib.closing(server.post(LONG | {"max_tokens": 4})) as other:
            assert other.getresponse().status == 200
        wait_until(lambda: server.service.in_flight == 0)  # given up after write_seconds
        slow.close()


def test_bodies_that_are_cut_short_or_no_http(running):
    with running() as server:
        for data in (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{",
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 200_000,
        ):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                with contextlib.suppress(ConnectionError):  # refused while it was still sending
                    client.sendall(data)
        with contextlib.closing(server.post(LONG | {"max_tokens": 4})) as good:
            assert good.getresponse().status == 200


def test_a_shutdown_answers_what_it_began(running, engine):
    with running() as server:
        with contextlib.closing(server.post(LONG | {"stream": True})) as connection:
            stream = connection.getresponse()
            start = stream.read(20)
            server.server.stop()
            wait_until(lambda: server.service.phase == "draining")
            with contextlib.closing(server.post(LONG)) as late:
                answer = late.getresponse()
                assert answer.status == 503 and json.loads(answer.read())["error"]["code"] == "draining"
            text = (start + stream.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text


def test_a_shutdown_waits_no_longer_than_it_may(running):
    with running(drain_seconds=0.05) as server:
        connection = server.post(LONG | {"n": 8, "stream": True})
        stream = connection.getresponse()
        stream.read(20)
        server.stop()
        assert json.loads(stream.read().split(b"data: ")[-1])["error"]["code"] == "aborted"
        connection.close()


def test_an_engine_that_cannot_be_made_ends_the_server(adapters):
    def fail():
        raise SloraError("there is no such model")

    server = Running(Service(ServerConfig(model_name="tiny", adapters=adapters), fail))
    server.thread.join(30)
    assert str(server.error) == "there is no such model"
