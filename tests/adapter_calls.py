"""What tests of the server ask about adapters."""

import asyncio


async def scan(service, times=2) -> None:
    """What the watcher does; a change counts once it is the same in two scans."""
    for _ in range(times):
        await asyncio.to_thread(service.adapters.scan)


async def answer(client, model: str, **body) -> str:
    body = {"model": model, "prompt": "hello", "max_tokens": 6, "temperature": 0} | body
    response = await client.post("/v1/completions", json=body)
    return response.json()["choices"][0]["text"] if response.status_code == 200 else f"{response.status_code}"


async def load(client, name: str, path: str, **body):
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path} | body)


async def listed(client) -> dict[str, dict]:
    return {entry["name"]: entry for entry in (await client.get("/v1/adapters")).json()["data"]}
