"""A crowd of callers and the event loop's other work."""

import asyncio

from slora_jax.server.turnstile import Turnstile


def test_a_few_a_turn_in_order_and_nobody_is_forgotten():
    async def main():
        turnstile, passed, turns = Turnstile(3), [], []

        async def caller(number: int) -> None:
            await turnstile.enter()
            passed.append(number)

        async def everything_else() -> None:
            while True:
                turns.append(len(passed))
                await asyncio.sleep(0)

        callers = [asyncio.create_task(caller(number)) for number in range(20)]
        other = asyncio.create_task(everything_else())
        await asyncio.sleep(0)  # all of them stand there
        callers[7].cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        other.cancel()
        assert passed == [number for number in range(20) if number != 7]
        # 3 go through at once, and the others 3 in a turn, between which the loop does everything else
        assert turns[0] == 3 and max(b - a for a, b in zip(turns, turns[1:], strict=False)) <= 3
        for number in (20, 21, 22, 23):  # it is free again
            await caller(number)
        assert passed[-4:] == [20, 21, 22, 23]

    asyncio.run(main())
