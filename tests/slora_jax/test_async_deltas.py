"""Answers on an event loop: how often it is woken, and what reaches a reader."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from slora_jax.async_deltas import AsyncDeltas
from slora_jax.requests import Delta


def reader(requests=1, **options) -> tuple[AsyncDeltas, list]:
    aborted = []
    deltas = AsyncDeltas(aborted.append, **options)
    deltas.follow([SimpleNamespace(output=SimpleNamespace(request_id=str(i)), finished=False) for i in range(requests)])
    return deltas, aborted


def piece(text: str, last: bool = False) -> Delta:
    return Delta("r", 0, text, (1,), "length" if last else None, object() if last else None)


def on_another_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_what_gathers_while_the_loop_is_busy_wakes_it_once_and_keeps_its_order(monkeypatch):
    async def main():
        loop, woken = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a, **k: woken.append(a) or wake(*a, **k))
        (one, _), (two, _) = reader(2), reader()
        sinks = [one.sink(0), one.sink(1), two.sink(0)]

        def work():
            for number in range(5):
                for sink in sinks:
                    sink(piece(str(number), last=number == 4))

        on_another_thread(work)  # the loop waits here
        assert len(woken) == 1
        assert [(i, d.text) for i, d in await one.take()] == [(i, str(n)) for n in range(5) for i in (0, 1)]
        assert [d.text async for _, d in two] == list("01234")
        assert await one.take() == [] == await two.take()
        on_another_thread(lambda: two.sink(0)(piece("late")))
        assert len(woken) == 2  # it is woken again after it was idle

    asyncio.run(main())


def test_a_reader_that_waits_is_woken(monkeypatch):
    async def main():
        deltas, _ = reader()
        waiting = asyncio.create_task(deltas.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        on_another_thread(lambda: deltas.sink(0)(piece("a")))
        assert [d.text for _, d in await waiting] == ["a"]

    asyncio.run(main())


def test_pieces_are_diverted_only_while_the_reader_waits():
    async def main():
        deltas, _ = reader()
        sink, diverted, takes = deltas.sink(0), [], True

        def take(pieces) -> bool:
            diverted.append("".join(d.text for _, d in pieces))
            return takes

        deltas.divert(take)
        on_another_thread(lambda: sink(piece("a")))
        await asyncio.sleep(0)
        assert not diverted  # nobody waits yet
        assert [d.text for _, d in await deltas.take()] == ["a"]
        waiting = asyncio.create_task(deltas.take())
        await asyncio.sleep(0)
        on_another_thread(lambda: [sink(piece("b")), sink(piece("c"))])
        await asyncio.sleep(0.01)
        assert diverted == ["bc"] and not waiting.done()
        takes = False
        on_another_thread(lambda: sink(piece("d")))
        assert [d.text for _, d in await waiting] == ["d"] and diverted == ["bc", "d"]
        waiting = asyncio.create_task(deltas.take())
        await asyncio.sleep(0)
        deltas.close()
        on_another_thread(lambda: sink(piece("late")))
        await asyncio.sleep(0.01)
        assert diverted == ["bc", "d"]
        waiting.cancel()

    asyncio.run(main())


def test_ends_only_brings_the_last_piece_of_each_completion():
    async def main():
        deltas, _ = reader(ends_only=True)
        sink = deltas.sink(0)
        on_another_thread(lambda: [sink(piece("a")), sink(piece("b")), sink(piece("c", last=True))])
        assert [d.text for _, d in await deltas.take()] == ["c"] and await deltas.take() == []

    asyncio.run(main())


@pytest.mark.parametrize("taken", [True, False])
def test_closing_aborts_what_has_not_finished(taken):
    async def main():
        deltas, aborted = reader(2)
        on_another_thread(lambda: deltas.sink(0)(piece("a")))
        if taken:
            await deltas.take()
        deltas.close()
        assert aborted == ["0", "1"] and await deltas.take() == []
        with pytest.raises(StopAsyncIteration):
            await anext(deltas)

    asyncio.run(main())


def test_an_event_loop_that_has_ended_is_nobodys_error():
    async def main():
        return reader()[0].sink(0)

    asyncio.run(main())(piece("a"))
