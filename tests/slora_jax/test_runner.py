"""How a Runner brings adapters to the device."""

from engines import adapters_for, config
import numpy as np

from slora_jax import Engine


def test_an_adapter_in_host_memory_takes_the_space_of_two_pieces(monkeypatch):
    model, settings = config(adapter_chunk_bytes=1)
    with Engine(model, settings, adapters_for(model, 1)) as engine:
        runner, seen = engine._core.runner, []
        image = runner.images.make(engine._registry.get("a0").contents)
        count = len(image.chunks)
        assert count > 3 and all(chunk.shape[0] == 1 for chunk in image.chunks)
        place, write = runner._place, runner._write_chunk
        monkeypatch.setattr(runner, "_place", lambda chunk: (seen.append("place"), place(chunk))[1])
        monkeypatch.setattr(runner, "_write_chunk", lambda ids, chunk: (seen.append(*ids), write(ids, chunk))[1])
        pages = list(range(count, 2 * count))
        engine._loop.call(lambda: runner.write_adapter(list(image.between(0, count)), pages))
        assert seen == ["place", *(event for page in pages[:-1] for event in ("place", page)), pages[-1]]
        written = np.asarray(runner.state.pages)[:, pages].swapaxes(0, 1)
        np.testing.assert_array_equal(written, np.concatenate(image.chunks))
