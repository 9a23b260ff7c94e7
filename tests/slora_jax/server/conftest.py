"""A tiny random model whose tokens are bytes, with adapters in directories, behind the server."""

from collections.abc import AsyncIterator, Callable, Iterator
import contextlib
import dataclasses
from pathlib import Path

from adapter_files import qv_tensors, write_adapter
from byte_tokenizer import byte_tokenizer
import httpx
import pytest
from running_server import Running

from slora_jax import Engine, EngineConfig
from slora_jax.loading import load_model
from slora_jax.memory import page_bytes
from slora_jax.server import ServerConfig, Service, create_app


class SharedEngine(Engine):
    """An engine that outlives the servers of the tests."""

    def close(self) -> None:
        for request in self.list_requests():
            self.abort(request["request_id"])
        for adapter in self.list_adapters():
            self.remove_adapter(adapter["name"])

    def close_at_last(self) -> None:
        super().close()


@pytest.fixture(scope="session")
def engine():
    model = dataclasses.replace(load_model("random:tiny-gqa", dtype="float32"), tokenizer=byte_tokenizer())
    settings = EngineConfig(
        dtype="float32",
        max_seqs=8,
        max_step_tokens=64,
        seq_buckets=(8,),
        token_buckets=(64,),
        compile_cache_dir="",
        max_lora_rank=8,
        page_pool_bytes=200 * page_bytes(model.config, "float32"),
    )
    engine = SharedEngine(model, settings)
    yield engine
    engine.check_integrity()
    engine.close_at_last()


@pytest.fixture
def make_adapter(engine) -> Callable[..., Path]:
    """Writes an adapter of the tiny model. Another scale, another adapter."""

    def make(path: Path, scale: float = 1.0) -> Path:
        tensors = {name: array * scale for name, array in qv_tensors(config=engine.model.config).items()}
        return write_adapter(path, tensors=tensors)

    return make


@pytest.fixture
def adapters(tmp_path, make_adapter) -> Path:
    """A directory with the adapters "one" and "two"."""
    make_adapter(tmp_path / "adapters" / "one")
    make_adapter(tmp_path / "adapters" / "two", 0.5)
    return tmp_path / "adapters"


@pytest.fixture
def serving(engine, adapters):
    """A server in this process: ``async with serving(...) as (client, service)``; arguments are ServerConfig's."""

    @contextlib.asynccontextmanager
    async def start(**config) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
        options = dict(model_name="tiny", adapters=adapters, scan_seconds=1000.0) | config
        service = Service(ServerConfig(**options), lambda: engine)
        try:
            await service.load()
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                yield client, service
        finally:
            await service.close()
        assert service.in_flight == 0

    return start


@pytest.fixture
def running(engine, adapters):
    """``with running(...) as server``; arguments are ServerConfig's."""

    @contextlib.contextmanager
    def start(**config) -> Iterator[Running]:
        options = dict(model_name="tiny", adapters=adapters, scan_seconds=1000.0) | config
        server = Running(Service(ServerConfig(**options), lambda: engine))
        try:
            yield server
        finally:
            server.stop()
        assert server.service.in_flight == 0
        pages = engine.stats()["pages"]
        assert pages["kv"] == pages["adapter"] == pages["idle_adapter"] == 0
        assert pages["free"] + pages["idle_kv"] == 200  # prefixes of base requests may be kept

    return start
